// Marks and bit casts shared by every room of the core.
//
// The kernel headers (rules/, storage/, cpu/tile.inl) are compiled once per instruction set, with
// different flags, into one library. Everything in them therefore lives in an anonymous namespace
// and is forced inline: a weak symbol would let the linker keep the AVX-512 copy for all callers.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define FUSEDOPT_FN __host__ __device__ __forceinline__
#else
#define FUSEDOPT_FN __attribute__((always_inline)) inline
#endif

namespace fusedopt {
namespace {

FUSEDOPT_FN uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

FUSEDOPT_FN float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

FUSEDOPT_FN constexpr int64_t divided_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// base^exponent by repeated squaring: the same multiplications, hence the same double, on the host,
// on a device and in the reference path (fusedopt/reference/arithmetic.py). Never libm's pow.
FUSEDOPT_FN double power(double base, int64_t exponent) {
  double result = 1.0;
  for (; exponent > 0; exponent >>= 1) {
    if (exponent & 1) result *= base;
    base *= base;
  }
  return result;
}

}  // namespace
}  // namespace fusedopt
