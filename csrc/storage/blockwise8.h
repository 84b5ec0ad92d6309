// 8-bit blockwise storage: squares with a power-of-two scale.
//
// A block is 64 elements of a row. It has one scale byte s, and each element has one code byte:
//
//   x = +- q^2 2^(s - 127)       q = 0..127 and a sign bit; or, where nothing is negative, q = 0..255
//
// Squares spread the codes over 4.2 (4.8) decades, which a variance needs; with a power of two as the
// scale, encode and decode are exact but for the rounding of q. It is x that is rounded, not its root.
// With t = |x| 2^(127 - s), the code is
//
//   q      where q^2 <= t < (q + 1)^2 and t - q^2 <= R (2q + 1), in exact arithmetic
//   q + 1  where t - q^2 > R (2q + 1)
//
// R = (2 r + 1) 2^-15 with 14 random bits r, so that E[decode(encode(x))] = x; or 1/2, to round to nearest. Where
// nothing is negative, x > 0 never has the code 0: a variance never becomes zero while its mean is alive. s = 0 is a
// block of zeros, so zeroed memory is the zero state; s = 255 marks a block that held inf, NaN or a number
// above 3.36e38. All of that block decodes to NaN, and nothing else does.
//
// How q is found is left to each device: the nearest integer to any root whose error is below a third serves, if it
// is then compared with t. In fp32, q^2 is exact, t - q^2 is where it is not negative, and so is R (2q + 1), whose
// factors have 15 and 9 bits. t is, but for numbers too small to matter. Square8::encode takes a root that is correctly
// rounded, or the product of one with root_units: cut to an integer, it is q, but for t so close to q^2 or (q + 1)^2
// that the code is the same for every R (tests/storage/test_codes.py tries all of them).
#pragma once

#include "rules/rule.h"

namespace fusedopt {
namespace {

constexpr int kBlock = 64;
constexpr uint32_t kTooLarge = 0x7F7D0000u;  // magnitudes from here on spoil their block
constexpr float kHalf = 0.5f;                // R of rounding to nearest

// R of stochastic rounding, from 16 random bits.
FUSEDOPT_FN float fraction_of(uint32_t bits) { return float_of(0x3F800100u | bits >> 2 << 9) - 1.0f; }

// What encode needs of a block.
struct BlockScale {
  uint32_t code;     // s
  float to_steps;    // 2^(127 - s)
  float root_units;  // its root

  // Zero or not finite: all codes are 0.
  FUSEDOPT_FN bool is_special() const { return code == 0 || code == 255; }
};

template <bool kSigned>
struct Square8 {
  static constexpr uint32_t kTop = kSigned ? 127 : 255;                // the largest q
  static constexpr uint32_t kShift = kSigned ? 13 : 15;                // K: s = exponent - K
  static constexpr uint32_t kCeiling = kSigned ? 0x3FBFFu : 0x1FEFFu;  // C: q stays within kTop

  static FUSEDOPT_FN float unit_of(uint32_t scale) { return float_of(scale << 23); }

  static FUSEDOPT_FN float decode(uint8_t code, float unit) {
    const float q = static_cast<float>(kSigned ? code & 0x7F : code);
    const float size = q * q * unit;
    if constexpr (!kSigned) return size;
    const int32_t extended = static_cast<int8_t>(code);  // the sign bit of a code is that of the number
    return float_of(bits_of(size) | (static_cast<uint32_t>(extended) & 0x80000000u));
  }

  // The scale of a block whose largest magnitude, as an integer, is `largest`.
  static FUSEDOPT_FN BlockScale scale_of(uint32_t largest) {
    if (largest == 0) return {0, 0.0f, 0.0f};
    if (largest >= kTooLarge) return {255, 0.0f, 0.0f};
    uint32_t exponent = (largest + kCeiling) >> 23;
    exponent = exponent < 32 ? 32 : exponent;
    const uint32_t scale = exponent - kShift;
    // 2^((127 - scale) / 2): the exponent halved, and root 2 where it was odd. 0x3504F3 are root 2's bits.
    const uint32_t twice = 127 + 254 - scale;
    const uint32_t root_units = ((twice >> 1) << 23) + (twice & 1) * 0x3504F3u;
    return {scale, float_of((254 - scale) << 23), float_of(root_units)};
  }

  // `root` is the square root of |x|, `threshold` R.
  static FUSEDOPT_FN uint8_t encode(float x, float root, const BlockScale& scale, float threshold) {
    const uint32_t u = bits_of(x);
    const float steps = float_of(u & 0x7FFFFFFFu) * scale.to_steps;
    int32_t q = static_cast<int32_t>(root * scale.root_units);
    const float below = static_cast<float>(q);
    q += steps - below * below > threshold * (below + below + 1.0f) ? 1 : 0;
    if constexpr (kSigned) {
      return static_cast<uint8_t>(q | (q ? (u >> 24) & 0x80u : 0u));
    } else {
      // A variance never becomes zero while its mean is alive.
      return static_cast<uint8_t>(q == 0 && (u & 0x7FFFFFFFu) != 0 ? 1 : q);
    }
  }
};

}  // namespace
}  // namespace fusedopt
