// Instruction set "baseline" (the compiler's default SSE2 on x86-64). CMakeLists.txt holds its flags.
#include "cpu/tile.inl"

FUSEDOPT_KERNELS(kBaselineKernels)
