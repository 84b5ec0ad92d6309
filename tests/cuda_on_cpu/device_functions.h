// Intrinsic functions: bits, arithmetic rounded to nearest, loads and stores with cache hints.
#pragma once

#include <math.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "failures.h"
#include "language.h"

namespace cuda_on_cpu {

template <class To, class From>
__forceinline__ To bit_cast(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  memcpy(&result, &value, sizeof result);
  return result;
}

// Keeps a product from being fused with a sum that follows, whatever the compiler's flags.
template <class T>
__forceinline__ T product(T a, T b) {
  T result = a * b;
#if defined(__x86_64__)
  __asm__("" : "+x"(result));
#elif defined(__aarch64__)
  __asm__("" : "+w"(result));
#else
  __asm__("" : "+m"(result));
#endif
  return result;
}

// Hardware raises an error for a misaligned access; x86-64 would let it pass.
template <class T>
__forceinline__ void check_access(const T* address, const char* name) {
  static_assert(std::is_arithmetic_v<T> || kIsVector<T>, "loads and stores with cache hints take numbers and vectors");
  if (reinterpret_cast<uintptr_t>(address) % alignof(T) == 0) return;
  fail((block.running < 0 ? std::string("the host") : name_of(block.running)) + " accesses " +
       std::to_string(sizeof(T)) + " bytes at a misaligned address through " + name);
}

}  // namespace cuda_on_cpu

#define CUDA_ON_CPU_BITS(name, to, from) \
  __forceinline__ to name(from value) { return cuda_on_cpu::bit_cast<to>(value); }
CUDA_ON_CPU_BITS(__float_as_uint, unsigned, float)
CUDA_ON_CPU_BITS(__uint_as_float, float, unsigned)
CUDA_ON_CPU_BITS(__float_as_int, int, float)
CUDA_ON_CPU_BITS(__int_as_float, float, int)
CUDA_ON_CPU_BITS(__double_as_longlong, long long, double)
CUDA_ON_CPU_BITS(__longlong_as_double, double, long long)

#define CUDA_ON_CPU_ARITHMETIC(letter, type, root, fused)                                        \
  __forceinline__ type __##letter##add_rn(type a, type b) { return a + b; }                      \
  __forceinline__ type __##letter##sub_rn(type a, type b) { return a - b; }                      \
  __forceinline__ type __##letter##mul_rn(type a, type b) { return cuda_on_cpu::product(a, b); } \
  __forceinline__ type __##letter##div_rn(type a, type b) { return a / b; }                      \
  __forceinline__ type __##letter##sqrt_rn(type a) { return root(a); }
CUDA_ON_CPU_ARITHMETIC(f, float, __builtin_sqrtf, __builtin_fmaf)
CUDA_ON_CPU_ARITHMETIC(d, double, __builtin_sqrt, __builtin_fma)
__forceinline__ float __fmaf_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
__forceinline__ double __fma_rn(double a, double b, double c) { return __builtin_fma(a, b, c); }

// Rounded downwards: the sum rounded to nearest or, if the error of that says that it was rounded up, its neighbour.
inline float __fadd_rd(float a, float b) {
  const float sum = a + b;
  if (!__builtin_isfinite(sum)) {
    const bool overflows = __builtin_isfinite(a) && __builtin_isfinite(b) && sum > 0.0f;
    return overflows ? __FLT_MAX__ : sum;
  }
  if (sum == 0.0f) return (a == 0.0f && b == 0.0f && !__builtin_signbit(a) && !__builtin_signbit(b)) ? 0.0f : -0.0f;
  const float of_b = sum - a;
  const float error = (a - (sum - of_b)) + (b - of_b);  // exact
  return error < 0.0f ? nextafterf(sum, -INFINITY) : sum;
}

// Device code has these without std::.
#define CUDA_ON_CPU_EXTREMES(type)                             \
  constexpr type min(type a, type b) { return b < a ? b : a; } \
  constexpr type max(type a, type b) { return a < b ? b : a; }
CUDA_ON_CPU_EXTREMES(int)
CUDA_ON_CPU_EXTREMES(unsigned)
CUDA_ON_CPU_EXTREMES(long)
CUDA_ON_CPU_EXTREMES(unsigned long)
CUDA_ON_CPU_EXTREMES(long long)
CUDA_ON_CPU_EXTREMES(unsigned long long)
// Unlike a comparison, these give the other number if one is NaN.
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }

__forceinline__ int __popc(unsigned x) { return __builtin_popcount(x); }
__forceinline__ int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
__forceinline__ int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
__forceinline__ int __clzll(long long x) { return x == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(x)); }
__forceinline__ int __ffs(int x) { return __builtin_ffs(x); }
__forceinline__ int __ffsll(long long x) { return __builtin_ffsll(x); }

inline unsigned __brev(unsigned x) {
  x = (x >> 1 & 0x55555555) | (x & 0x55555555) << 1;
  x = (x >> 2 & 0x33333333) | (x & 0x33333333) << 2;
  x = (x >> 4 & 0x0f0f0f0f) | (x & 0x0f0f0f0f) << 4;
  return __builtin_bswap32(x);
}

// Each nibble of the selector chooses one of the eight bytes of y:x.
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t bytes = uint64_t{y} << 32 | x;
  unsigned result = 0;
  for (int k = 0; k < 4; ++k) {
    result |= static_cast<unsigned>(bytes >> (selector >> 4 * k & 7) * 8 & 0xff) << 8 * k;
  }
  return result;
}

__forceinline__ unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(uint64_t{a} * b >> 32); }
__forceinline__ int __mulhi(int a, int b) { return static_cast<int>(int64_t{a} * b >> 32); }
__forceinline__ unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}
__forceinline__ unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((uint64_t{high} << 32 | low) << (shift & 31) >> 32);
}
__forceinline__ unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((uint64_t{high} << 32 | low) >> (shift & 31));
}

#define CUDA_ON_CPU_LOAD(name)                 \
  template <class T>                           \
  __forceinline__ T name(const T* address) {   \
    cuda_on_cpu::check_access(address, #name); \
    return *address;                           \
  }
CUDA_ON_CPU_LOAD(__ldg)
CUDA_ON_CPU_LOAD(__ldca)
CUDA_ON_CPU_LOAD(__ldcg)
CUDA_ON_CPU_LOAD(__ldcs)
CUDA_ON_CPU_LOAD(__ldcv)
CUDA_ON_CPU_LOAD(__ldlu)

#define CUDA_ON_CPU_STORE(name)                                        \
  template <class T>                                                   \
  __forceinline__ void name(T* address, std::common_type_t<T> value) { \
    cuda_on_cpu::check_access(address, #name);                         \
    *address = value;                                                  \
  }
CUDA_ON_CPU_STORE(__stcg)
CUDA_ON_CPU_STORE(__stcs)
CUDA_ON_CPU_STORE(__stwb)
CUDA_ON_CPU_STORE(__stwt)
