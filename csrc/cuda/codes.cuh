// The 8-bit codes of storage/blockwise8.h that a lane has of a tile. A block is the run of sixteen lanes side by side
// or, if runs are, both runs of eight.
//
// The hardware converts between integers and float32 at a fraction of the rate at which it adds. So bytes are put where
// they count as a number: a code into the fraction of a power of two, which is then subtracted, or where a subnormal
// number has its bits, as it has no power of two; random bits likewise. A root is cut to an integer by adding a power
// of two, rounded downwards, after which the integer is the last byte.
#pragma once

#include "cuda/lane_memory.cuh"
#include "cuda/numbers.cuh"
#include "storage/blockwise8.h"
#include "storage/dense.h"
#include "storage/random.h"

namespace fusedopt::cuda {
namespace {

// The block of a run, in its tile.
FUSEDOPT_DEVICE int block_of(const Place& place, int run) {
  return (place.is_split && run == 1 ? place.runs[1] : place.runs[0]) / kBlock;
}

// The scales of a lane's runs, as they lie in memory from the tile's first on.
template <bool kWhole>
FUSEDOPT_DEVICE void load_scales(const uint8_t* scales, const Place& place, uint32_t (&loaded)[2]) {
#pragma unroll
  for (int run = 0; run < 2; ++run) {
    if (run == 1 && !place.is_split) {
      loaded[1] = loaded[0];
    } else {
      loaded[run] = kWhole || place.holds(run * 4) ? scales[block_of(place, run)] : 0u;
    }
  }
}

// Byte j of a word as the third byte of a number, of another as the fourth. The first two are the upper bit of the
// third, which is 0.
template <int j>
constexpr uint32_t kThird = (8u + j) | (8u + j) << 4 | j << 8 | (4u + j) << 12;

template <int j>
FUSEDOPT_DEVICE float signed_number(uint32_t sizes, uint32_t signs) {
  return float_of(bytes_of<kThird<j>>(sizes, signs));
}
template <int j>
FUSEDOPT_DEVICE float unsigned_number(uint32_t codes) {
  return float_of(bytes_of<0x7440u | j>(codes, bits_of(0x1p23f))) - 0x1p23f;
}

template <bool kSigned>
FUSEDOPT_DEVICE void decode_codes(const Raw& codes, const uint32_t (&scales)[2], float (&x)[kLane]) {
#pragma unroll
  for (int run = 0; run < 2; ++run) {
    const float unit = Square8<kSigned>::unit_of(scales[run]);
    const uint32_t word = codes.words[run];
    float* of_run = x + run * 4;
    if constexpr (kSigned) {
      // +- q 2^-133, which is subnormal, then +- q 2^-6. Scales are at most 242, or 255, so 2^12 units are a number
      // wherever a unit is.
      const uint32_t sizes = word & 0x7F7F7F7Fu, signs = word & 0x80808080u;
      const float larger_unit = unit * 0x1p12f;
      const float tiny[4] = {signed_number<0>(sizes, signs), signed_number<1>(sizes, signs),
                             signed_number<2>(sizes, signs), signed_number<3>(sizes, signs)};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float q = tiny[j] * 0x1p127f;
        of_run[j] = q * (fabsf(q) * larger_unit);
      }
    } else {
      const float q[4] = {unsigned_number<0>(word), unsigned_number<1>(word), unsigned_number<2>(word),
                          unsigned_number<3>(word)};
#pragma unroll
      for (int j = 0; j < 4; ++j) of_run[j] = q[j] * (q[j] * unit);
    }
  }
}

FUSEDOPT_DEVICE uint32_t larger_of_lanes(uint32_t x, int distance) {
  return max(x, __shfl_xor_sync(0xFFFFFFFFu, x, distance));
}

// The largest magnitudes of the blocks of a lane's runs, as integers. All lanes of a warp call this.
template <bool kSigned>
FUSEDOPT_DEVICE void largest_of_blocks(const float (&x)[kLane], const Place& place, uint32_t (&largest)[2]) {
  uint32_t sizes[kLane];
  sizes_of<kSigned>(x, sizes);
#pragma unroll
  for (int run = 0; run < 2; ++run) largest[run] = largest_of_run(sizes + run * 4);
  if (!place.is_whole) {  // what lies past the end has no part in the scale
    rarely();
#pragma unroll
    for (int j = 0; j < kLane; ++j) sizes[j] = place.holds(j) ? sizes[j] : 0u;
#pragma unroll
    for (int run = 0; run < 2; ++run) largest[run] = largest_of_run(sizes + run * 4);
  }
  if (!place.is_split) {
    uint32_t top = max(largest[0], largest[1]);
#pragma unroll
    for (int distance = 1; distance < kBlock / kLane; distance *= 2) top = larger_of_lanes(top, distance);
    largest[0] = largest[1] = top;
    return;
  }
  // Two blocks at once: even lanes go on with the first runs of a pair of lanes, odd ones with the second.
  const bool is_odd = threadIdx.x % 2 != 0;
  const uint32_t given = is_odd ? largest[0] : largest[1], kept = is_odd ? largest[1] : largest[0];
  uint32_t top = max(kept, __shfl_xor_sync(0xFFFFFFFFu, given, 1));
#pragma unroll
  for (int distance = 2; distance < kBlock / 4; distance *= 2) top = larger_of_lanes(top, distance);
  const uint32_t of_other_run = __shfl_xor_sync(0xFFFFFFFFu, top, 1);
  largest[0] = is_odd ? of_other_run : top;
  largest[1] = is_odd ? top : of_other_run;
}

// Bits of a lane's elements, set for all of a block where they are set for one. All lanes of a warp call this.
FUSEDOPT_DEVICE uint32_t spread_over_blocks(uint32_t elements, const Place& place) {
  uint32_t runs = ((elements & 0x0Fu) != 0 ? 0x0Fu : 0u) | ((elements & 0xF0u) != 0 ? 0xF0u : 0u);
  if (!place.is_split && runs != 0) runs = 0xFFu;
  const int lanes = place.is_split ? kBlock / 4 : kBlock / kLane;
  for (int distance = 1; distance < lanes; distance *= 2) runs |= __shfl_xor_sync(0xFFFFFFFFu, runs, distance);
  return runs;
}

// R 2^16 of the two states that share a stream, the first in the upper half, if both are rounded to nearest.
constexpr uint32_t kHalves = 0x80008000u;

// The same from the bits that they share, if one at least is rounded stochastically.
FUSEDOPT_DEVICE void take_fractions(bool first_rounds, bool second_rounds, const uint32_t (&random)[kLane],
                                    uint32_t (&fractions)[kLane]) {
#pragma unroll
  for (int j = 0; j < kLane; ++j) fractions[j] = (random[j] & 0xFFFCFFFCu) | 0x00020002u;
  if (first_rounds && second_rounds) return;
  rarely();
  const uint32_t of_nearest = first_rounds ? 0x0000FFFFu : 0xFFFF0000u;
#pragma unroll
  for (int j = 0; j < kLane; ++j) fractions[j] = (fractions[j] & ~of_nearest) | (kHalves & of_nearest);
}

// R 2^-125 of one of them, which is subnormal or nearly so.
FUSEDOPT_DEVICE float fraction_of_state(uint32_t fractions, int half) {
  return float_of(half == 0 ? bytes_of<0x4324>(fractions, 0u) : bytes_of<0x4104>(fractions, 0u));
}

// The last byte of the result is the code, without a sign: of t 2^-8, a root of it, cut, and R 2^-125. Roots are
// counted in sixteenths, so that the products fit.
FUSEDOPT_DEVICE uint32_t rounded(float steps, float root, float fraction) {
  const float cut = __fadd_rd(root, 0x1p19f);
  const float below = cut - 0x1p19f;
  const float left = __fmaf_rn(-below, below, steps);
  // Less than zero where t - q^2 > R (2q + 1); the products are exact, and so is the sign of their difference.
  const float excess = __fmaf_rn(fraction, __fmaf_rn(below, 0x1p122f, 0x1p117f), -left);
  return bits_of(cut) + (bits_of(excess) >> 31);
}

// The four codes of a run in one word. `roots`: the square roots of the numbers, if nothing is negative; up to 127,
// codes are found by an estimate. `fractions`: R 2^-125 of each.
template <bool kSigned>
FUSEDOPT_DEVICE uint32_t encode_run(const float* x, const float* roots, const BlockScale& scale,
                                    const float (&fractions)[4]) {
  const float to_steps = scale.to_steps * 0x1p-8f, root_units = scale.root_units * 0x1p-4f;
  uint32_t codes[4], bits[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    bits[j] = bits_of(x[j]);
    const float steps = fabsf(x[j]) * to_steps;
    codes[j] = rounded(steps, kSigned ? root_estimate(steps) : roots[j] * root_units, fractions[j]);
  }
  const uint32_t word = gathered<0>(codes);
  if constexpr (!kSigned) return word;
  const uint32_t is_some = word + 0x7F7F7F7Fu;  // the upper bit of each byte; a zero has no sign
  return word | (gathered<3>(bits) & is_some & 0x80808080u);
}

FUSEDOPT_DEVICE bool has_zero_byte(uint32_t bytes) { return ((bytes - 0x01010101u) & ~bytes & 0x80808080u) != 0; }

// The codes of a lane, and the scales of its runs. `roots`: the square roots of the numbers, if nothing is negative.
// `fractions`: of the state and the other one that shares its random bits.
template <bool kSigned>
FUSEDOPT_DEVICE void encode_codes(const float (&x)[kLane], const float (&roots)[kLane],
                                  const uint32_t (&fractions)[kLane], int half, const Place& place, Raw& codes,
                                  uint32_t (&scales)[2]) {
  uint32_t largest[2];
  largest_of_blocks<kSigned>(x, place, largest);
  BlockScale scale;
#pragma unroll
  for (int run = 0; run < 2; ++run) {
    if (run == 0 || place.is_split) scale = Square8<kSigned>::scale_of(largest[run]);
    float of_run[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) of_run[j] = fraction_of_state(fractions[run * 4 + j], half);
    codes.words[run] = encode_run<kSigned>(x + run * 4, roots + run * 4, scale, of_run);
    scales[run] = scale.code;
  }
  if (!kSigned && (has_zero_byte(codes.words[0]) || has_zero_byte(codes.words[1]))) {
    rarely();  // a variance never becomes zero while its mean is alive
#pragma unroll
    for (int j = 0; j < kLane; ++j) {
      const uint32_t one = 1u << j % 4 * 8;
      if ((codes.words[j / 4] & one * 0xFFu) == 0 && bits_of(x[j]) != 0) codes.words[j / 4] += one;
    }
  }
#pragma unroll
  for (int run = 0; run < 2; ++run) codes.words[run] = scales[run] == 0 || scales[run] == 255 ? 0 : codes.words[run];
}

template <bool kWhole>
FUSEDOPT_DEVICE void store_scales(uint8_t* scales, const Place& place, const uint32_t (&stored)[2]) {
#pragma unroll
  for (int run = 0; run < 2; ++run) {
    if (run == 1 && !place.is_split) continue;  // a block of the first run goes on
    if (place.runs[run] % kBlock == 0 && (kWhole || place.holds(run * 4))) {
      scales[place.runs[run] / kBlock] = static_cast<uint8_t>(stored[run]);
    }
  }
}

}  // namespace
}  // namespace fusedopt::cuda
