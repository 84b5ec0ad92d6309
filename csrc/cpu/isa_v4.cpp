// Instruction set "v4" (x86-64-v4 AVX-512). CMakeLists.txt holds its flags.
#include "cpu/tile.inl"

FUSEDOPT_KERNELS(kV4Kernels)
