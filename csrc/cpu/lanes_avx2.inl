// A strip of 64 elements in AVX2: eight vectors of eight. What strips.inl and its formats are written in; see
// lanes.inl.
#pragma once

#include <immintrin.h>

#include "storage/blockwise8.h"
#include "storage/dense.h"

namespace fusedopt {
namespace {

typedef __m256 Lanes;
typedef __m256i Bits;
typedef __m256 Mask;  // all bits of a lane, or none

constexpr int kVector = 8;

FUSEDOPT_FN Bits all(uint32_t value) { return _mm256_set1_epi32(static_cast<int>(value)); }
FUSEDOPT_FN Lanes all(float value) { return _mm256_set1_ps(value); }
FUSEDOPT_FN Bits count_lanes() { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }
FUSEDOPT_FN Bits bits_of(Lanes x) { return _mm256_castps_si256(x); }
FUSEDOPT_FN Lanes lanes_of(Bits x) { return _mm256_castsi256_ps(x); }

FUSEDOPT_FN Lanes load_lanes(const float* x) { return _mm256_loadu_ps(x); }
FUSEDOPT_FN Bits load_bits(const uint32_t* x) { return _mm256_loadu_si256(reinterpret_cast<const Bits*>(x)); }
FUSEDOPT_FN void store_lanes(float* target, Lanes x) { _mm256_storeu_ps(target, x); }

// ---- integers ----------------------------------------------------------------------------------

FUSEDOPT_FN Bits add(Bits a, Bits b) { return _mm256_add_epi32(a, b); }
FUSEDOPT_FN Bits multiply(Bits a, Bits b) { return _mm256_mullo_epi32(a, b); }
template <int n>
FUSEDOPT_FN Bits shift_left(Bits x) {
  return _mm256_slli_epi32(x, n);
}
template <int n>
FUSEDOPT_FN Bits shift_right(Bits x) {
  return _mm256_srli_epi32(x, n);
}
FUSEDOPT_FN Bits masked(Bits x, Bits mask) { return _mm256_and_si256(x, mask); }
FUSEDOPT_FN Bits merged(Bits x, Bits mask, Bits set) { return _mm256_or_si256(_mm256_and_si256(x, mask), set); }

// ---- numbers -----------------------------------------------------------------------------------

FUSEDOPT_FN Lanes root(Lanes x) { return _mm256_sqrt_ps(x); }
FUSEDOPT_FN Lanes from_integers(Bits x) { return _mm256_cvtepi32_ps(x); }
FUSEDOPT_FN Bits cut(Lanes x) { return _mm256_cvttps_epi32(x); }
FUSEDOPT_FN Lanes add_product(Lanes a, Lanes b, Lanes c) { return _mm256_fmadd_ps(a, b, c); }
FUSEDOPT_FN Lanes subtract_product(Lanes a, Lanes b, Lanes c) { return _mm256_fnmadd_ps(a, b, c); }
FUSEDOPT_FN Lanes product_minus(Lanes a, Lanes b, Lanes c) { return _mm256_fmsub_ps(a, b, c); }

FUSEDOPT_FN Mask is_above(Lanes a, Lanes b) { return _mm256_cmp_ps(a, b, _CMP_GT_OQ); }
FUSEDOPT_FN Mask is_nan(Lanes x) { return _mm256_cmp_ps(x, x, _CMP_UNORD_Q); }
FUSEDOPT_FN Mask has_nan(Lanes a, Lanes b) { return _mm256_cmp_ps(a, b, _CMP_UNORD_Q); }
FUSEDOPT_FN Mask either(Mask a, Mask b) { return _mm256_or_ps(a, b); }
FUSEDOPT_FN bool any(Mask x) { return _mm256_movemask_ps(x) != 0; }
FUSEDOPT_FN Bits select(Mask chosen, Bits yes, Bits no) { return _mm256_blendv_epi8(no, yes, bits_of(chosen)); }
FUSEDOPT_FN Lanes select(Mask chosen, Lanes yes, Lanes no) { return _mm256_blendv_ps(no, yes, chosen); }
FUSEDOPT_FN Bits increment(Mask chosen, Bits x) { return _mm256_sub_epi32(x, bits_of(chosen)); }

FUSEDOPT_FN Lanes sign(Lanes x) {
  const Lanes ones = lanes_of(merged(bits_of(x), all(kSignBit), all(0x3F800000u)));
  return select(_mm256_cmp_ps(x, Lanes{}, _CMP_NEQ_OQ), ones, x);
}
FUSEDOPT_FN Lanes maximum(Lanes a, Lanes b) { return select(either(is_above(b, a), is_nan(b)), b, a); }

// Integers, and the same as numbers.
struct Whole {
  Bits integers;
  Lanes numbers;
};

// The largest q with q^2 <= x, or one more where x is within rounding of that (storage/blockwise8.h). An estimate that
// is corrected, as in AVX-512, took 3 to 8 % more time for a step (Emerald Rapids).
FUSEDOPT_FN Whole whole_root(Lanes x) {
  const Bits q = cut(root(x));
  return {q, from_integers(q)};
}

// The largest of eight vectors of magnitudes.
FUSEDOPT_FN uint32_t largest_of(const Bits (&x)[8]) {
  Bits most = x[0];
  for (int j = 1; j < 8; ++j) most = _mm256_max_epi32(most, x[j]);
  __m128i lane = _mm_max_epi32(_mm256_castsi256_si128(most), _mm256_extracti128_si256(most, 1));
  lane = _mm_max_epi32(lane, _mm_shuffle_epi32(lane, 0x4E));
  lane = _mm_max_epi32(lane, _mm_shuffle_epi32(lane, 0xB1));
  return static_cast<uint32_t>(_mm_cvtsi128_si32(lane));
}

// ---- 16 bits -----------------------------------------------------------------------------------

// 64 codes of 16 bits as the upper halves of words, zeros below: widened where they are used.
struct UpperHalves {
  const uint16_t* codes;
  FUSEDOPT_FN explicit UpperHalves(const uint16_t* x) : codes(x) {}
  FUSEDOPT_FN Bits at(int j) const {
    const __m128i loaded = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + kVector * j));
    return shift_left<16>(_mm256_cvtepu16_epi32(loaded));
  }
};

// Stores the upper halves of the words of four vectors.
FUSEDOPT_FN void store_upper_halves(const Bits (&x)[4], uint16_t* target) {
  for (int j = 0; j < 4; j += 2) {
    const Bits packed = _mm256_packus_epi32(shift_right<16>(x[j]), shift_right<16>(x[j + 1]));
    _mm256_storeu_si256(reinterpret_cast<Bits*>(target + kVector * j), _mm256_permute4x64_epi64(packed, 0xD8));
  }
}

// ---- bytes: packing works within 128 bits, and what comes last puts them in order ------------------

// Sign- or zero-extended.
template <bool kSigned>
FUSEDOPT_FN Bits load_bytes(const void* bytes) {
  const __m128i loaded = _mm_loadl_epi64(static_cast<const __m128i*>(bytes));
  return kSigned ? _mm256_cvtepi8_epi32(loaded) : _mm256_cvtepu8_epi32(loaded);
}

FUSEDOPT_FN void store_in_order(Bits bytes, void* target) {
  const Bits order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  _mm256_storeu_si256(static_cast<Bits*>(target), _mm256_permutevar8x32_epi32(bytes, order));
}

// Stores the second byte of each word of four vectors.
FUSEDOPT_FN void store_second_bytes(const Bits (&x)[4], void* target) {
  Bits second[4];
  for (int j = 0; j < 4; ++j) second[j] = masked(shift_right<8>(x[j]), all(0xFFu));
  store_in_order(
      _mm256_packus_epi16(_mm256_packus_epi32(second[0], second[1]), _mm256_packus_epi32(second[2], second[3])),
      target);
}

// Stores codes: each q with the sign of its number x, unless it is 0; or, if not kSigned, at least 1 unless x is 0.
template <bool kSigned>
FUSEDOPT_FN void store_codes(const Bits (&q)[4], const Lanes (&x)[4], uint8_t* target) {
  Bits code = _mm256_packus_epi16(_mm256_packus_epi32(q[0], q[1]), _mm256_packus_epi32(q[2], q[3]));
  if constexpr (kSigned) {  // saturation keeps signs
    const Bits minus = _mm256_packs_epi16(_mm256_packs_epi32(bits_of(x[0]), bits_of(x[1])),
                                          _mm256_packs_epi32(bits_of(x[2]), bits_of(x[3])));
    const Bits both = merged(minus, all(0x80808080u), code);
    code = _mm256_andnot_si256(_mm256_cmpeq_epi8(code, Bits{}), both);
  } else {
    const Bits size = all(~kSignBit);
    const Bits some = _mm256_packus_epi16(_mm256_packs_epi32(masked(bits_of(x[0]), size), masked(bits_of(x[1]), size)),
                                          _mm256_packs_epi32(masked(bits_of(x[2]), size), masked(bits_of(x[3]), size)));
    code = _mm256_max_epu8(code, _mm256_min_epu8(some, _mm256_set1_epi8(1)));
  }
  store_in_order(code, target);
}

}  // namespace
}  // namespace fusedopt
