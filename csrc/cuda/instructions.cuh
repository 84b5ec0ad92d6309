// Instructions that C++ has no operator for. Each has a model for the CPU, where the tests run the kernels: to the bit,
// or, for approximations, with the error that they may have. What is made of an approximation must not depend on it.
#pragma once

#include <cuda_runtime.h>

#include "storage/dense.h"

#define FUSEDOPT_DEVICE __device__ __forceinline__

namespace fusedopt::cuda {
namespace {

// Marks what few warps do. The compiler leaves it a branch, instead of computing both ways and selecting, and
// bench/sass.py knows which way warps go: the instruction triggers an event that nobody has asked for.
FUSEDOPT_DEVICE void rarely() {
#if defined(__CUDA_ARCH__)
  asm volatile("pmevent 0;");
#endif
}

// Keeps what follows in its branch. The compiler sets constants before it branches, for all warps.
FUSEDOPT_DEVICE void stay_here() {
#if defined(__CUDA_ARCH__)
  asm volatile("");
#endif
}

// Four of the eight bytes of y:x. Each nibble of the selector names one; if its upper bit is set, all bits of the
// result are that byte's upper bit.
template <uint32_t kSelector>
FUSEDOPT_DEVICE uint32_t bytes_of(uint32_t x, uint32_t y) {
#if defined(__CUDA_ARCH__)
  uint32_t result;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(x), "r"(y), "n"(kSelector));
  return result;
#else
  uint32_t result = 0;
  for (int k = 0; k < 4; ++k) {
    const uint32_t nibble = kSelector >> 4 * k & 15, from = nibble & 4 ? y : x;
    const uint32_t byte = from >> 8 * (nibble & 3) & 0xFF;
    result |= (nibble & 8 ? (byte & 0x80 ? 0xFFu : 0u) : byte) << 8 * k;
  }
  return result;
#endif
}

// Byte kByte of each of four words.
template <int kByte>
FUSEDOPT_DEVICE uint32_t gathered(const uint32_t* words) {
  constexpr uint32_t kPair = kByte | (4u + kByte) << 4;
  return bytes_of<0x5410>(bytes_of<kPair>(words[0], words[1]), bytes_of<kPair>(words[2], words[3]));
}

// Two numbers rounded to the nearest bfloat16, ties to even, side by side. NaN becomes one pattern.
FUSEDOPT_DEVICE uint32_t nearest_bfloat16(float low, float high) {
#if __CUDA_ARCH__ >= 800
  uint32_t result;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  return result;
#else
  return BFloat16::encode_nearest(low) | static_cast<uint32_t>(BFloat16::encode_nearest(high)) << 16;
#endif
}

// 1/x for a normal number whose inverse is one, and 1/sqrt(x) for a normal one. The hardware's error is below two units
// in the last place. The model has none, because the sums that follow (numbers.cuh) are exact only with the errors that
// the hardware does have, which are not published.
FUSEDOPT_DEVICE float inverse_estimate(float x) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return 1.0f / x;
#endif
}
FUSEDOPT_DEVICE float inverse_root_estimate(float x) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return static_cast<float>(1.0 / __builtin_sqrt(static_cast<double>(x)));
#endif
}

// sqrt(|x|), wrong by one unit in the last place at most. Subnormal numbers are taken for 0.
FUSEDOPT_DEVICE float root_estimate(float x) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(fabsf(x)));
  return result;
#else
  const uint32_t u = bits_of(x) & 0x7FFFFFFFu;
  if (u < 0x00800000u || u >= 0x7F800000u) return u < 0x00800000u ? 0.0f : float_of(u);
  const uint32_t error = (u * 0x9E3779B1u >> 30) % 3;  // one too many, one too few, or none
  return float_of(bits_of(__builtin_sqrtf(float_of(u))) + error - 1);
#endif
}

}  // namespace
}  // namespace fusedopt::cuda
