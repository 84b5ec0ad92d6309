// Dense storage: float32, bfloat16, float16, one number at a time. All integer or exact arithmetic,
// so every instruction set and device gives the same bits; the tile loop vectorises it.
//
//   nearest     round to nearest even, as torch's casts
//   stochastic  up with the probability of the part cut off, given 16 random bits r. E[decode] = x
//               exactly in bfloat16, which cuts 16 bits; within 2^-16 of a spacing in float16
//
// Inf stays inf, NaN stays NaN (quiet), and what rounds past the largest number becomes inf.
#pragma once

#include "core/portable.h"

namespace fusedopt {
namespace {

constexpr uint32_t kSignBit = 0x80000000u;
constexpr uint32_t kInfinity = 0x7F800000u;

struct BFloat16 {
  static FUSEDOPT_FN float decode(uint16_t code) { return float_of(static_cast<uint32_t>(code) << 16); }

  // NaN would round to inf or wrap to zero: it is cut short instead, with the quiet bit set.
  static FUSEDOPT_FN uint16_t keep_nan(uint32_t u, uint32_t rounded) {
    return static_cast<uint16_t>((u & ~kSignBit) > kInfinity ? (u >> 16) | 0x40u : rounded);
  }

  static FUSEDOPT_FN uint16_t encode_nearest(float x) {
    const uint32_t u = bits_of(x);
    return keep_nan(u, (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16);
  }

  static FUSEDOPT_FN uint16_t encode_stochastic(float x, uint32_t r) {
    const uint32_t u = bits_of(x);
    return keep_nan(u, (u + r) >> 16);
  }
};

struct Float16 {
  // Exponents 1..30 move up by 112; 31 (inf, NaN) by 224; 0 (zero, subnormal) is an integer times 2^-24.
  static FUSEDOPT_FN float decode(uint16_t code) {
    const uint32_t magnitude = code & 0x7FFFu;
    const uint32_t sign = static_cast<uint32_t>(code & 0x8000u) << 16;
    const uint32_t normal = (magnitude << 13) + (magnitude >= 0x7C00u ? 224u << 23 : 112u << 23);
    const uint32_t tiny = bits_of(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f);
    return float_of((magnitude < 0x400u ? tiny : normal) | sign);
  }

  static FUSEDOPT_FN uint16_t assemble(uint32_t u, uint32_t magnitude, uint32_t rounded) {
    // 0x47800000 is 2^16: from there on, and wherever rounding carried, the result is inf.
    uint32_t code = magnitude >= 0x47800000u || rounded > 0x7C00u ? 0x7C00u : rounded;
    code = magnitude > kInfinity ? 0x7E00u : code;
    return static_cast<uint16_t>(code | ((u & kSignBit) >> 16));
  }

  static FUSEDOPT_FN uint16_t encode_nearest(float x) {
    const uint32_t u = bits_of(x);
    const uint32_t magnitude = u & ~kSignBit;
    const uint32_t normal = (magnitude - (112u << 23) + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
    // Adding 0.5, whose spacing is 2^-24, rounds a subnormal result in the add itself.
    const uint32_t tiny = bits_of(float_of(magnitude) + 0.5f) - 0x3F000000u;
    return assemble(u, magnitude, magnitude < 0x38800000u ? tiny : normal);
  }

  static FUSEDOPT_FN uint16_t encode_stochastic(float x, uint32_t r) {
    const uint32_t u = bits_of(x);
    const uint32_t magnitude = u & ~kSignBit;
    const uint32_t normal = (magnitude - (112u << 23) + (r >> 3)) >> 13;
    // In units of 2^-40 a subnormal result has 26 bits, of which the lower 16 are cut.
    const bool is_tiny = magnitude < 0x38800000u;
    const float scaled = float_of(is_tiny ? magnitude : 0u) * 0x1p40f;
    const uint32_t tiny = (static_cast<uint32_t>(static_cast<int32_t>(scaled)) + r) >> 16;
    return assemble(u, magnitude, is_tiny ? tiny : normal);
  }
};

}  // namespace
}  // namespace fusedopt
