// The arithmetic of storage/blockwise8.h, which bounds an 8-bit step, in AVX-512 intrinsics: a block of 64 elements
// at a time. Operations on numbers are those of Square8, and so are the bits.
#pragma once

#if defined(__AVX512BW__)

#include "core/tensors.h"
#include "cpu/lanes_avx512.inl"
#include "storage/blockwise8.h"

namespace fusedopt {
namespace {

// How a state takes R from its half of the random bits: (half & mask) | set, which for rounding to nearest is kHalf.
struct Draw {
  Bits mask, set;
  explicit Draw(Rounding rounding)
      : mask(all(rounding == Rounding::kNearest ? 0u : 0xFFFFu)),
        set(all(rounding == Rounding::kNearest ? kHalf : 1u)) {}
  FUSEDOPT_FN Bits of(Bits half) const { return _mm512_ternarylogic_epi32(half, mask, set, 0xEA); }
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

// The 64 codes of a block. `halves`: 16 random bits in each lower half, with anything above. kRoots: whether `roots`
// holds the square roots of x.
template <bool kSigned, bool kRoots>
FUSEDOPT_FN Bits encode_block(const LaneBlock& x, const LaneBlock& roots, const BlockScale& scale, const Draw& draw,
                              const BitBlock& halves) {
  Bits q[kVectors];
  for (int j = 0; j < kVectors; ++j) {
    const Lanes size = lanes_of(magnitude_of(x.at[j]));
    const Lanes rooted = kRoots ? roots.at[j] : root(size);
    const Bits units = _mm512_cvttps_epi32(size * scale.to_units);
    const Bits below = _mm512_cvttps_epi32(rooted * scale.root_units);
    const Bits r = draw.of(halves.at[j]);
    const Bits left = _mm512_sub_epi32(units, _mm512_srli_epi32(r, 1));
    const Bits right = _mm512_mullo_epi32(below, _mm512_add_epi32(_mm512_slli_epi32(below, 15), r));
    q[j] = _mm512_mask_add_epi32(below, _mm512_cmpgt_epi32_mask(left, right), below, all(1u));
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
