// Instruction set "neon" (aarch64 NEON). CMakeLists.txt holds its flags.
#include "cpu/tile.inl"

FUSEDOPT_KERNELS(kNeonKernels)
