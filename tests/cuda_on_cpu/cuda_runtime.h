// CUDA on the CPU, for tests. With
//   g++ -std=c++17 -x c++ -I tests/cuda_on_cpu -ffp-contract=off -fvisibility=hidden -fsanitize=alignment
// kernel sources, and the code that launches them by cudaLaunchKernelEx, compile and run where there is no GPU. They
// are the very files that nvcc compiles, so their bits can be compared with those of the CPU backend anywhere.
//
// One thread of CUDA is one fiber; blocks run one after another on the thread that launches. Arithmetic is that of the
// host. Convergence is checked strictly: what hardware may let pass (a barrier that a finished thread never reached, a
// mask that names a lane that is not there) throws std::runtime_error out of the launch, with a sentence that says who
// waits where.
//
// Not here: <<<>>>, dynamic shared memory, half precision headers, cooperative groups, clusters, and threads that spin
// until another thread writes. `alignas` must precede `__shared__`, or be __align__. Without
// -fsanitize=alignment, a misaligned address goes unseen except by __ldg and the like, which always check.
#pragma once

#define CUDA_ON_CPU 1

#include "alignment.h"
#include "atomics.h"
#include "block.h"
#include "device_functions.h"
#include "fibers.h"
#include "language.h"
#include "launch.h"
#include "runtime_api.h"
#include "shared_memory.h"
#include "warp.h"
