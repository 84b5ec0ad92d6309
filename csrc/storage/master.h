// Weights with more precision than a bfloat16 parameter: a step computes with w, the parameter is its
// upper part, and what is cut off is kept beside it.
//
//   split32  the lower 16 bits of w, exactly: the run of a float32 parameter, bit for bit
//   split24  the next 8 of them, rounded by 8 random bits (to nearest, a weight of 1 stalls under 1e-5)
//   kahan    w - p, in a dense format of its own
//
// The upper half is rounded with ties away, so that the remainder fits a signed integer.
#pragma once

#include "storage/dense.h"

namespace fusedopt {
namespace {

struct Split {
  uint16_t high;
  int16_t low;
};

// NaN as one pattern: others would become -0 or inf by the carry.
FUSEDOPT_FN uint32_t canonical(uint32_t u) { return (u & ~kSignBit) > kInfinity ? 0x7FC00000u : u; }

// What was split has a remainder of 0 where it is NaN. Any other NaN means that something else has written the
// parameter since, a zero for example, which has no negative remainder: the written value counts.
FUSEDOPT_FN float join(uint16_t high, int16_t low) {
  const uint32_t upper = static_cast<uint32_t>(high) << 16;
  const float w = float_of(upper + static_cast<uint32_t>(static_cast<int32_t>(low)));
  return w == w ? w : float_of(upper);
}

FUSEDOPT_FN Split split_bits(uint32_t u) {
  const uint32_t high = (u + 0x8000u) >> 16;
  return {static_cast<uint16_t>(high), static_cast<int16_t>(u - (high << 16))};
}

FUSEDOPT_FN Split split32(float w) { return split_bits(canonical(bits_of(w))); }

// `random` has 8 bits; 0x80 rounds to nearest. The low byte of `low` is then zero.
FUSEDOPT_FN Split split24(float w, uint32_t random) { return split_bits((canonical(bits_of(w)) + random) & ~0xFFu); }

// What p lacks of w; 0 for a parameter that is inf or NaN.
FUSEDOPT_FN float remainder_of(float w, float p) { return (bits_of(p) & kInfinity) == kInfinity ? 0.0f : w - p; }

// Whether a 16-bit code is w rounded up or down. If not, something else has written the parameter since,
// and the written value counts.
template <class Format>
FUSEDOPT_FN bool is_rounding_of(uint16_t code, float w) {
  return code == Format::encode_stochastic(w, 0u) || code == Format::encode_stochastic(w, 0xFFFFu);
}

}  // namespace
}  // namespace fusedopt
