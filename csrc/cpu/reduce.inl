// The sum of squares of one reduction chunk, in double: 16 lanes, each summed in order, then added
// in pairs. The order is fixed, so the sum depends neither on the instruction set nor on threads;
// fusedopt/reference/norm.py does the same additions and also adds up the chunks.
#pragma once

#include "cpu/formats.inl"
#include "cpu/kernels.h"
#include "cpu/lanes_avx512.inl"

namespace fusedopt {
namespace {

constexpr int kLanes = 16;
constexpr int kHalfLanes = kLanes / 2;

// Lanes as the compilers' own vectors, which they keep in registers as long as they fit into one; an array of sums
// stayed in memory and the loop waited for it (measured: 4 x slower with AVX-512).
typedef float Floats __attribute__((vector_size(kHalfLanes * sizeof(float))));
typedef double Doubles __attribute__((vector_size(kHalfLanes * sizeof(double))));
typedef float WideFloats __attribute__((vector_size(kLanes * sizeof(float))));

struct DoubleLanes {
  Doubles low = {}, high = {};
};

FUSEDOPT_FN Floats load_floats(const float* x) {
  Floats loaded;
  memcpy(&loaded, x, sizeof loaded);
  return loaded;
}
FUSEDOPT_FN Floats load_floats(const uint16_t* bfloat16) {
#if defined(__AVX512F__)  // GCC 12 converts vectors in pieces
  const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bfloat16));
  return Floats(_mm256_slli_epi32(_mm256_cvtepu16_epi32(codes), 16));
#else
  typedef uint16_t Codes __attribute__((vector_size(kHalfLanes * sizeof(uint16_t))));
  typedef uint32_t Words __attribute__((vector_size(kHalfLanes * sizeof(uint32_t))));
  Codes codes;
  memcpy(&codes, bfloat16, sizeof codes);
  const Words words = __builtin_convertvector(codes, Words) << 16;
  Floats loaded;
  memcpy(&loaded, &words, sizeof loaded);
  return loaded;
#endif
}

FUSEDOPT_FN WideFloats load_wide(const float* x) {
  WideFloats loaded;
  memcpy(&loaded, x, sizeof loaded);
  return loaded;
}
FUSEDOPT_FN WideFloats load_wide(const uint16_t* bfloat16) {
#if defined(__AVX512F__)
  const __m256i codes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bfloat16));
  return WideFloats(_mm512_slli_epi32(_mm512_cvtepu16_epi32(codes), 16));
#else
  const Floats halves[] = {load_floats(bfloat16), load_floats(bfloat16 + kHalfLanes)};
  WideFloats loaded;
  memcpy(&loaded, halves, sizeof loaded);
  return loaded;
#endif
}

// The first n of 16 numbers and zeros, whose squares change no sum.
template <class Number>
struct Padded {
  Number at[kLanes] = {};
  FUSEDOPT_FN Padded(const Number* x, int n) { memcpy(at, x, sizeof(Number) * static_cast<size_t>(n)); }
};

FUSEDOPT_FN Doubles widen(const Floats& x) {
#if defined(__AVX512F__)
  return Doubles(_mm512_cvtps_pd(__m256(x)));
#else
  return __builtin_convertvector(x, Doubles);
#endif
}

FUSEDOPT_FN DoubleLanes widen(const WideFloats& x) {
#if defined(__AVX512F__)
  return {widen(Floats(_mm512_castps512_ps256(__m512(x)))), widen(Floats(_mm512_extractf32x8_ps(__m512(x), 1)))};
#else
  Floats halves[2];
  memcpy(halves, &x, sizeof halves);
  return {widen(halves[0]), widen(halves[1])};
#endif
}

// sum + x x, where x were floats: the product is exact in double, so adding it in the same instruction changes nothing.
FUSEDOPT_FN Doubles add_square(const Doubles& sum, const Doubles& x) {
#if defined(__AVX512F__)
  return Doubles(_mm512_fmadd_pd(__m512d(x), __m512d(x), __m512d(sum)));
#else
  return sum + x * x;
#endif
}

template <class Number>
FUSEDOPT_FN void add_squares(DoubleLanes& sums, const Number* x) {
  sums.low = add_square(sums.low, widen(load_floats(x)));
  sums.high = add_square(sums.high, widen(load_floats(x + kHalfLanes)));
}

// The lanes' sums, added in pairs.
FUSEDOPT_FN double total_of(const DoubleLanes& sums) {
  double lanes[kLanes];
  memcpy(lanes, &sums.low, sizeof sums.low);
  memcpy(lanes + kHalfLanes, &sums.high, sizeof sums.high);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int lane = 0; lane < width; ++lane) lanes[lane] = lanes[2 * lane] + lanes[2 * lane + 1];
  }
  return lanes[0];
}

// Adds runs of numbers, each of which begins at lane 0.
struct LaneSum {
  DoubleLanes sums;

  template <class Number>
  FUSEDOPT_FN void add_squares(const Number* x, int n) {
    DoubleLanes held = sums;
    int i = 0;
    for (; i + kLanes <= n; i += kLanes) fusedopt::add_squares(held, x + i);
    if (i < n) fusedopt::add_squares(held, Padded<Number>(x + i, n - i).at);
    sums = held;
  }
  FUSEDOPT_FN double total() const { return total_of(sums); }
};

double square_sum(const Buffer& buffer, int64_t begin, int64_t length) {
  alignas(64) float tile[kTile];
  LaneSum sum;
  for (int64_t at = begin; at < begin + length; at += kTile) {
    const int64_t left = begin + length - at;
    const int n = static_cast<int>(left < kTile ? left : kTile);
    if (buffer.dtype == DType::kBFloat16) {
      sum.add_squares(fusedopt::at<uint16_t>(buffer, at), n);
    } else {
      sum.add_squares(load(buffer, at, n, tile), n);
    }
  }
  return sum.total();
}

}  // namespace
}  // namespace fusedopt
