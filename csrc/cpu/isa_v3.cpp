// Instruction set "v3" (x86-64-v3 AVX2). CMakeLists.txt holds its flags.
#include "cpu/tile.inl"

FUSEDOPT_KERNELS(kV3Kernels)
