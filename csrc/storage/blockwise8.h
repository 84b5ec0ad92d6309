// 8-bit blockwise storage: squares with a power-of-two scale.
//
// A block is 64 elements of a row. It has one scale byte s, and each element has one code byte:
//
//   x = +- q^2 2^(s - 127)       q = 0..127 and a sign bit; or, where nothing is negative, q = 0..255
//
// Squares spread the codes over 4.2 (4.8) decades, which a variance needs; with a power of two as the
// scale, encode and decode are exact but for the rounding of q. It is x that is rounded, not its root:
// with R uniform, E[decode(encode(x))] = x. s = 0 is a block of zeros, so zeroed memory is the zero
// state; s = 255 marks a block that held inf, NaN or a number above 3.36e38. All of that block decodes
// to NaN, and nothing else does.
//
// All of it is integer arithmetic or exact in fp32, whatever order a device chooses, except for the
// root, which only has to be close: encode corrects a q that is one too small, and a q that is one too
// large comes from an x that is within rounding of q^2.
#pragma once

#include "rules/rule.h"

namespace fusedopt {
namespace {

constexpr int kBlock = 64;
constexpr uint32_t kTooLarge = 0x7F7D0000u;  // magnitudes from here on spoil their block
constexpr uint32_t kHalf = 0x8000u;          // R of rounding to nearest

// What encode needs of a block.
struct BlockScale {
  uint32_t code;     // s
  float to_units;    // 2^(127 - s + 15): |x| in units of 2^-15 of the smallest step
  float root_units;  // 2^((127 - s) / 2): root |x| in units of q

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
    return {scale, float_of((269 + kShift - exponent) << 23), float_of(root_units)};
  }

  // `root` is the square root of |x|; R has 16 bits and is odd, or kHalf.
  static FUSEDOPT_FN uint8_t encode(float x, float root, const BlockScale& scale, uint32_t random) {
    const uint32_t u = bits_of(x);
    const float size = float_of(u & 0x7FFFFFFFu) * scale.to_units;  // exact, or underflows to 0
    const int32_t units = static_cast<int32_t>(size);
    int32_t q = static_cast<int32_t>(root * scale.root_units);
    // Up if 2 (units - q^2 2^15) > R (2q + 1), rearranged to one multiplication; all fits 31 bits.
    const int32_t r = static_cast<int32_t>(random);
    q += units - (r >> 1) > q * ((q << 15) + r) ? 1 : 0;
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
