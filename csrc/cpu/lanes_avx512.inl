// A strip of 64 elements in AVX-512: four vectors of sixteen. What strips.inl and its formats are written in; see
// lanes.inl.
#pragma once

#include <immintrin.h>

#include "storage/blockwise8.h"
#include "storage/dense.h"

namespace fusedopt {
namespace {

typedef __m512 Lanes;
typedef __m512i Bits;
typedef __mmask16 Mask;

constexpr int kVector = 16;

FUSEDOPT_FN Bits all(uint32_t value) { return _mm512_set1_epi32(static_cast<int>(value)); }
FUSEDOPT_FN Lanes all(float value) { return _mm512_set1_ps(value); }
FUSEDOPT_FN Bits count_lanes() { return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }
FUSEDOPT_FN Bits bits_of(Lanes x) { return _mm512_castps_si512(x); }
FUSEDOPT_FN Lanes lanes_of(Bits x) { return _mm512_castsi512_ps(x); }

FUSEDOPT_FN Lanes load_lanes(const float* x) { return _mm512_loadu_ps(x); }
FUSEDOPT_FN Bits load_bits(const uint32_t* x) { return _mm512_loadu_si512(x); }
FUSEDOPT_FN void store_lanes(float* target, Lanes x) { _mm512_storeu_ps(target, x); }

// ---- integers ----------------------------------------------------------------------------------

FUSEDOPT_FN Bits add(Bits a, Bits b) { return _mm512_add_epi32(a, b); }
FUSEDOPT_FN Bits multiply(Bits a, Bits b) { return _mm512_mullo_epi32(a, b); }
template <int n>
FUSEDOPT_FN Bits shift_left(Bits x) {
  return _mm512_slli_epi32(x, n);
}
template <int n>
FUSEDOPT_FN Bits shift_right(Bits x) {
  return _mm512_srli_epi32(x, n);
}
FUSEDOPT_FN Bits masked(Bits x, Bits mask) { return _mm512_and_si512(x, mask); }
FUSEDOPT_FN Bits merged(Bits x, Bits mask, Bits set) { return _mm512_ternarylogic_epi32(x, mask, set, 0xEA); }

// ---- numbers -----------------------------------------------------------------------------------

FUSEDOPT_FN Lanes root(Lanes x) { return _mm512_sqrt_ps(x); }
FUSEDOPT_FN Lanes from_integers(Bits x) { return _mm512_cvtepi32_ps(x); }
FUSEDOPT_FN Bits cut(Lanes x) { return _mm512_cvttps_epi32(x); }
FUSEDOPT_FN Lanes add_product(Lanes a, Lanes b, Lanes c) { return _mm512_fmadd_ps(a, b, c); }
FUSEDOPT_FN Lanes subtract_product(Lanes a, Lanes b, Lanes c) { return _mm512_fnmadd_ps(a, b, c); }
FUSEDOPT_FN Lanes product_minus(Lanes a, Lanes b, Lanes c) { return _mm512_fmsub_ps(a, b, c); }

FUSEDOPT_FN Mask is_above(Lanes a, Lanes b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
FUSEDOPT_FN Mask is_nan(Lanes x) { return _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q); }
FUSEDOPT_FN Mask has_nan(Lanes a, Lanes b) { return _mm512_cmp_ps_mask(a, b, _CMP_UNORD_Q); }
FUSEDOPT_FN Mask either(Mask a, Mask b) { return a | b; }
FUSEDOPT_FN bool any(Mask x) { return x != 0; }
FUSEDOPT_FN Bits select(Mask chosen, Bits yes, Bits no) { return _mm512_mask_mov_epi32(no, chosen, yes); }
FUSEDOPT_FN Lanes select(Mask chosen, Lanes yes, Lanes no) { return _mm512_mask_mov_ps(no, chosen, yes); }
FUSEDOPT_FN Bits increment(Mask chosen, Bits x) { return _mm512_mask_add_epi32(x, chosen, x, all(1u)); }

FUSEDOPT_FN Lanes sign(Lanes x) {
  const Lanes ones = lanes_of(_mm512_ternarylogic_epi32(all(0x3F800000u), bits_of(x), all(kSignBit), 0xF8));
  return _mm512_mask_mov_ps(x, _mm512_cmp_ps_mask(x, Lanes{}, _CMP_NEQ_OQ), ones);
}
FUSEDOPT_FN Lanes maximum(Lanes a, Lanes b) { return select(either(is_above(b, a), is_nan(b)), b, a); }

// Integers, and the same as numbers.
struct Whole {
  Bits integers;
  Lanes numbers;
};

// The largest q with q^2 <= x: proposed by an estimate of the root (14 bits), corrected by comparison. An IEEE root
// takes 16 to 18 cycles on Intel's cores, in which no other root or quotient begins. Of 0 it is NaN, and as an integer
// the most negative one, which saturates to the code 0.
FUSEDOPT_FN Whole whole_root(Lanes x) {
  const Lanes magic = all(0x1.8p23f);  // what is added to it is rounded to an integer
  const Lanes nearest = add_product(x, _mm512_rsqrt14_ps(x), magic) - magic;
  const Lanes q = _mm512_mask_sub_ps(nearest, is_above(nearest * nearest, x), nearest, all(1.0f));
  return {_mm512_cvtps_epi32(q), q};
}

// The largest of four vectors of magnitudes.
FUSEDOPT_FN uint32_t largest_of(const Bits (&x)[4]) {
  const Bits most = _mm512_max_epi32(_mm512_max_epi32(x[0], x[1]), _mm512_max_epi32(x[2], x[3]));
  const __m256i half = _mm256_max_epi32(_mm512_castsi512_si256(most), _mm512_extracti64x4_epi64(most, 1));
  __m128i lane = _mm_max_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  lane = _mm_max_epi32(lane, _mm_shuffle_epi32(lane, 0x4E));
  lane = _mm_max_epi32(lane, _mm_shuffle_epi32(lane, 0xB1));
  return static_cast<uint32_t>(_mm_cvtsi128_si32(lane));
}

// ---- 16 bits -----------------------------------------------------------------------------------

// 64 codes of 16 bits as the upper halves of words, zeros below.
struct UpperHalves {
  Bits words[4];
  FUSEDOPT_FN explicit UpperHalves(const uint16_t* codes) {
    const Bits first = _mm512_loadu_si512(codes), second = _mm512_loadu_si512(codes + 2 * kVector);
    const Bits lower = shift_left<16>(count_lanes()), upper = add(lower, all(16u << 16));
    constexpr __mmask32 kOdd = 0xAAAAAAAAu;
    words[0] = _mm512_maskz_permutexvar_epi16(kOdd, lower, first);
    words[1] = _mm512_maskz_permutexvar_epi16(kOdd, upper, first);
    words[2] = _mm512_maskz_permutexvar_epi16(kOdd, lower, second);
    words[3] = _mm512_maskz_permutexvar_epi16(kOdd, upper, second);
  }
  FUSEDOPT_FN Bits at(int j) const { return words[j]; }
};

// The words of two vectors at the even places, or at the odd ones.
FUSEDOPT_FN Bits alternate_words(Bits a, Bits b, bool odd) {
  const Bits word = count_lanes();
  const Bits pair = add(shift_left<2>(word), shift_left<18>(word));
  const Bits first = add(pair, all(0x00020000u + (odd ? 0x00010001u : 0u)));
  return _mm512_permutex2var_epi16(a, first, b);
}

// Stores the upper halves of the words of four vectors.
FUSEDOPT_FN void store_upper_halves(const Bits (&x)[4], uint16_t* target) {
  _mm512_storeu_si512(target, alternate_words(x[0], x[1], true));
  _mm512_storeu_si512(target + 2 * kVector, alternate_words(x[2], x[3], true));
}

// ---- bytes: packing works within 128 bits, and what comes last puts them in order ------------------

// Sign- or zero-extended.
template <bool kSigned>
FUSEDOPT_FN Bits load_bytes(const void* bytes) {
  const __m128i loaded = _mm_loadu_si128(static_cast<const __m128i*>(bytes));
  return kSigned ? _mm512_cvtepi8_epi32(loaded) : _mm512_cvtepu8_epi32(loaded);
}

// Stores the second byte of each word of four vectors.
FUSEDOPT_FN void store_second_bytes(const Bits (&x)[4], void* target) {
  const Bits first = _mm512_srli_epi16(alternate_words(x[0], x[1], false), 8);
  const Bits second = _mm512_srli_epi16(alternate_words(x[2], x[3], false), 8);
  const Bits order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
  _mm512_storeu_si512(target, _mm512_permutexvar_epi64(order, _mm512_packus_epi16(first, second)));
}

// Stores codes: each q with the sign of its number x, unless it is 0; or, if not kSigned, at least 1 unless x is 0.
template <bool kSigned>
FUSEDOPT_FN void store_codes(const Bits (&q)[4], const Lanes (&x)[4], uint8_t* target) {
  Bits code = _mm512_packus_epi16(_mm512_packus_epi32(q[0], q[1]), _mm512_packus_epi32(q[2], q[3]));
  if constexpr (kSigned) {  // saturation keeps signs
    const Bits minus = _mm512_packs_epi16(_mm512_packs_epi32(bits_of(x[0]), bits_of(x[1])),
                                          _mm512_packs_epi32(bits_of(x[2]), bits_of(x[3])));
    const Bits both = _mm512_ternarylogic_epi32(code, minus, all(0x80808080u), 0xF8);
    code = _mm512_maskz_mov_epi8(_mm512_test_epi8_mask(code, code), both);
  } else {
    const Bits size = all(~kSignBit);
    const Bits some = _mm512_packus_epi16(_mm512_packs_epi32(masked(bits_of(x[0]), size), masked(bits_of(x[1]), size)),
                                          _mm512_packs_epi32(masked(bits_of(x[2]), size), masked(bits_of(x[3]), size)));
    code = _mm512_max_epu8(code, _mm512_min_epu8(some, _mm512_set1_epi8(1)));
  }
  const Bits order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  _mm512_storeu_si512(target, _mm512_permutexvar_epi32(order, code));
}

}  // namespace
}  // namespace fusedopt
