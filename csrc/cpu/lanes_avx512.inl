// Vectors of 16 floats, with the operators of a float, and what rules ask for beyond those.
#pragma once

#if defined(__AVX512BW__)

// GCC's own headers leave operands undefined on purpose, and warn of it wherever they are inlined.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>

#include "storage/blockwise8.h"
#include "storage/dense.h"

namespace fusedopt {
namespace {

typedef __m512 Lanes;  // a vector of floats, with the operators of one
typedef __m512i Bits;

constexpr int kVector = 16;  // elements in a register
constexpr int kVectors = kBlock / kVector;

FUSEDOPT_FN Bits all(uint32_t value) { return _mm512_set1_epi32(static_cast<int>(value)); }
FUSEDOPT_FN Lanes all(float value) { return _mm512_set1_ps(value); }
FUSEDOPT_FN Bits bits_of(Lanes x) { return _mm512_castps_si512(x); }
FUSEDOPT_FN Lanes lanes_of(Bits x) { return _mm512_castsi512_ps(x); }
FUSEDOPT_FN Bits magnitude_of(Lanes x) { return _mm512_and_si512(bits_of(x), all(~kSignBit)); }

// What rules ask for (rules/rule.h).
FUSEDOPT_FN Lanes root(Lanes x) { return _mm512_sqrt_ps(x); }
FUSEDOPT_FN Lanes sign(Lanes x) {
  const Lanes ones = lanes_of(_mm512_ternarylogic_epi32(all(0x3F800000u), bits_of(x), all(kSignBit), 0xF8));
  return _mm512_mask_mov_ps(x, _mm512_cmp_ps_mask(x, Lanes{}, _CMP_NEQ_OQ), ones);
}
FUSEDOPT_FN Lanes maximum(Lanes a, Lanes b) {
  const __mmask16 second = _mm512_cmp_ps_mask(b, a, _CMP_GT_OQ) | _mm512_cmp_ps_mask(b, b, _CMP_UNORD_Q);
  return _mm512_mask_mov_ps(a, second, b);
}

}  // namespace
}  // namespace fusedopt

#endif
