// The words that CUDA adds to C++, and its vector types with their alignment.
#pragma once

#include <cstddef>

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#error "cuda_on_cpu switches stacks, which AddressSanitizer and ThreadSanitizer cannot follow. Build without them."
#endif

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)

// Shared memory is one static variable for all blocks, since they run one after another. All of it must be found, to be
// filled before every block. A named section would be the plain way, but GCC forgets it in templates; what it does keep
// together is what belongs to a thread of the host, and that may as well be separate for each. `used` keeps the
// compiler from reasoning that nobody else writes it.
#define __shared__ static thread_local __attribute__((used))

// The state of the emulation. Hidden, since the dynamic linker otherwise takes the inline variables of two libraries
// for one, even of libraries that see nothing else of each other.
#define CUDA_ON_CPU_VARIABLE inline __attribute__((visibility("hidden")))

namespace cuda_on_cpu {

template <class T>
constexpr bool kIsVector = false;

}  // namespace cuda_on_cpu

#define CUDA_ON_CPU_VECTOR_2(type, number, alignment)                     \
  struct __attribute__((aligned(alignment))) type##2 { number x, y; };    \
  constexpr type##2 make_##type##2(number x, number y) { return {x, y}; } \
  namespace cuda_on_cpu {                                                 \
  template <>                                                             \
  inline constexpr bool kIsVector<type##2> = true;                        \
  }

#define CUDA_ON_CPU_VECTOR_3(type, number) \
  struct type##3 { number x, y, z; };      \
  constexpr type##3 make_##type##3(number x, number y, number z) { return {x, y, z}; }

#define CUDA_ON_CPU_VECTOR_4(type, number, alignment)                                               \
  struct __attribute__((aligned(alignment))) type##4 { number x, y, z, w; };                        \
  constexpr type##4 make_##type##4(number x, number y, number z, number w) { return {x, y, z, w}; } \
  namespace cuda_on_cpu {                                                                           \
  template <>                                                                                       \
  inline constexpr bool kIsVector<type##4> = true;                                                  \
  }

CUDA_ON_CPU_VECTOR_2(char, signed char, 2)
CUDA_ON_CPU_VECTOR_4(char, signed char, 4)
CUDA_ON_CPU_VECTOR_2(uchar, unsigned char, 2)
CUDA_ON_CPU_VECTOR_4(uchar, unsigned char, 4)
CUDA_ON_CPU_VECTOR_2(short, short, 4)
CUDA_ON_CPU_VECTOR_4(short, short, 8)
CUDA_ON_CPU_VECTOR_2(ushort, unsigned short, 4)
CUDA_ON_CPU_VECTOR_4(ushort, unsigned short, 8)
CUDA_ON_CPU_VECTOR_2(int, int, 8)
CUDA_ON_CPU_VECTOR_3(int, int)
CUDA_ON_CPU_VECTOR_4(int, int, 16)
CUDA_ON_CPU_VECTOR_2(uint, unsigned, 8)
CUDA_ON_CPU_VECTOR_3(uint, unsigned)
CUDA_ON_CPU_VECTOR_4(uint, unsigned, 16)
CUDA_ON_CPU_VECTOR_2(float, float, 8)
CUDA_ON_CPU_VECTOR_3(float, float)
CUDA_ON_CPU_VECTOR_4(float, float, 16)
CUDA_ON_CPU_VECTOR_2(longlong, long long, 16)
CUDA_ON_CPU_VECTOR_2(ulonglong, unsigned long long, 16)
CUDA_ON_CPU_VECTOR_2(double, double, 16)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
  constexpr operator uint3() const { return {x, y, z}; }
};

CUDA_ON_CPU_VARIABLE uint3 threadIdx, blockIdx;
CUDA_ON_CPU_VARIABLE dim3 blockDim, gridDim;
constexpr int warpSize = 32;
