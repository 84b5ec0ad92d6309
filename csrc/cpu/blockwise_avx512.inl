// The arithmetic of storage/blockwise8.h, which bounds an 8-bit step, in AVX-512 intrinsics: a block of 64 elements
// at a time. The codes are those that it defines.
#pragma once

#if defined(__AVX512BW__)

#include "core/tensors.h"
#include "cpu/lanes_avx512.inl"
#include "storage/blockwise8.h"

namespace fusedopt {
namespace {

// How a state takes R from its half of the random bits: as fraction_of does, or always kHalf, from (bits & mask) | set.
struct Draw {
  Bits mask, set;
  explicit Draw(Rounding rounding)
      : mask(all(rounding == Rounding::kNearest ? 0u : 0x7FFE00u)),
        set(all(rounding == Rounding::kNearest ? bits_of(1.0f + kHalf) : 0x3F800100u)) {}
  FUSEDOPT_FN Lanes of(Bits random, int half) const {
    const Bits shifted = half == 0 ? _mm512_srli_epi32(random, 9) : _mm512_slli_epi32(random, 7);
    return lanes_of(_mm512_ternarylogic_epi32(shifted, mask, set, 0xEA)) - 1.0f;
  }
};

// A block in registers.
struct LaneBlock {
  Lanes at[kVectors];
};
struct BitBlock {
  Bits at[kVectors];
};

FUSEDOPT_FN LaneBlock load_block(const float* x) {
  return {{_mm512_loadu_ps(x), _mm512_loadu_ps(x + kVector), _mm512_loadu_ps(x + 2 * kVector),
           _mm512_loadu_ps(x + 3 * kVector)}};
}
FUSEDOPT_FN BitBlock load_block(const uint32_t* x) {
  return {{_mm512_loadu_si512(x), _mm512_loadu_si512(x + kVector), _mm512_loadu_si512(x + 2 * kVector),
           _mm512_loadu_si512(x + 3 * kVector)}};
}

// The largest magnitude of a block, as an integer.
FUSEDOPT_FN uint32_t largest_of(const LaneBlock& x) {
  const Bits most = _mm512_max_epi32(_mm512_max_epi32(magnitude_of(x.at[0]), magnitude_of(x.at[1])),
                                     _mm512_max_epi32(magnitude_of(x.at[2]), magnitude_of(x.at[3])));
  const __m256i half = _mm256_max_epi32(_mm512_castsi512_si256(most), _mm512_extracti64x4_epi64(most, 1));
  __m128i lane = _mm_max_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  lane = _mm_max_epi32(lane, _mm_shuffle_epi32(lane, 0x4E));
  lane = _mm_max_epi32(lane, _mm_shuffle_epi32(lane, 0xB1));
  return static_cast<uint32_t>(_mm_cvtsi128_si32(lane));
}

// The q whose square is the largest below `steps`: proposed by an estimate of the root (14 bits), corrected by
// comparison. An IEEE root takes 16 to 18 cycles on Intel's cores, in which no other root or quotient begins.
FUSEDOPT_FN Lanes whole_root(Lanes steps) {
  const Lanes magic = all(0x1.8p23f);  // what is added to it is rounded to an integer
  const Lanes inverse = _mm512_rsqrt14_ps(_mm512_max_ps(steps, all(0x1p-60f)));
  const Lanes nearest = _mm512_fmadd_ps(steps, inverse, magic) - magic;
  const __mmask16 is_above = _mm512_cmp_ps_mask(nearest * nearest, steps, _CMP_GT_OQ);
  return _mm512_mask_sub_ps(nearest, is_above, nearest, all(1.0f));
}

// The 64 codes of a block, with half `half` of the random bits. kRoots: whether `roots` holds the square roots of x.
template <bool kSigned, bool kRoots>
FUSEDOPT_FN Bits encode_block(const LaneBlock& x, const LaneBlock& roots, const BlockScale& scale, const Draw& draw,
                              const BitBlock& random, int half) {
  Bits q[kVectors];
  for (int j = 0; j < kVectors; ++j) {
    const Lanes steps = lanes_of(magnitude_of(x.at[j])) * scale.to_steps;
    Lanes below;
    if constexpr (kRoots) {
      below = _mm512_cvtepi32_ps(_mm512_cvttps_epi32(roots.at[j] * scale.root_units));
    } else {
      below = whole_root(steps);
    }
    // Products are exact, so nothing is rounded that Square8::encode does not round.
    const Lanes left = _mm512_fnmadd_ps(below, below, steps);
    const Lanes right = draw.of(random.at[j], half) * _mm512_fmadd_ps(below, all(2.0f), all(1.0f));
    const __mmask16 goes_up = _mm512_cmp_ps_mask(left, right, _CMP_GT_OQ);
    q[j] = _mm512_cvtps_epi32(_mm512_mask_add_ps(below, goes_up, below, all(1.0f)));
  }
  // Packing works within 128-bit lanes; `order` undoes that.
  const Bits order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  Bits code = _mm512_packus_epi16(_mm512_packus_epi32(q[0], q[1]), _mm512_packus_epi32(q[2], q[3]));
  if constexpr (kSigned) {  // saturation keeps signs; a zero has none
    const Bits minus = _mm512_packs_epi16(_mm512_packs_epi32(bits_of(x.at[0]), bits_of(x.at[1])),
                                          _mm512_packs_epi32(bits_of(x.at[2]), bits_of(x.at[3])));
    const Bits both = _mm512_ternarylogic_epi32(code, minus, all(0x80808080u), 0xF8);
    code = _mm512_maskz_mov_epi8(_mm512_test_epi8_mask(code, code), both);
  } else {  // only zero has the code zero
    const Bits some = _mm512_packus_epi16(_mm512_packs_epi32(magnitude_of(x.at[0]), magnitude_of(x.at[1])),
                                          _mm512_packs_epi32(magnitude_of(x.at[2]), magnitude_of(x.at[3])));
    code = _mm512_max_epu8(code, _mm512_min_epu8(some, _mm512_set1_epi8(1)));
  }
  return _mm512_permutexvar_epi32(order, code);
}

}  // namespace
}  // namespace fusedopt

#endif
