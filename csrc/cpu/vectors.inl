// Eight and sixteen numbers at a time, for sums whose order of additions is fixed: as many registers as the instruction
// set needs for them. GCC 12 takes vectors that are longer than a register through memory: with them the first
// pass of normalize.inl, in cache, took 2.1 ns per element instead of .47 with AVX2, 1.7 instead of .95 with SSE2.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/pairwise.h"
#include "core/portable.h"
#include "cpu/lanes.inl"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fusedopt {
namespace {

constexpr int kLanes = kSumLanes;
constexpr int kHalfLanes = kLanes / 2;

template <class Half>
struct Pair {
  Half low = {}, high = {};
};
template <class Half>
FUSEDOPT_FN Pair<Half> operator+(const Pair<Half>& a, const Pair<Half>& b) {
  return {a.low + b.low, a.high + b.high};
}
template <class Half>
FUSEDOPT_FN Pair<Half> operator*(const Pair<Half>& a, const Pair<Half>& b) {
  return {a.low * b.low, a.high * b.high};
}
template <class Half>
FUSEDOPT_FN Pair<Half> operator*(const Pair<Half>& a, float b) {
  return {a.low * b, a.high * b};
}

// Eight floats, eight doubles and sixteen floats. In add_square, sum + x x, the product is exact because x was a float,
// so doing both in one instruction changes nothing.
#if defined(__AVX512F__)

typedef float Floats __attribute__((vector_size(32)));
typedef double Doubles __attribute__((vector_size(64)));
typedef float WideFloats __attribute__((vector_size(64)));

FUSEDOPT_FN Doubles widen(const Floats& x) { return Doubles(_mm512_cvtps_pd(__m256(x))); }
FUSEDOPT_FN Pair<Doubles> widen(const WideFloats& x) {
  return {widen(Floats(_mm512_castps512_ps256(__m512(x)))), widen(Floats(_mm512_extractf32x8_ps(__m512(x), 1)))};
}
FUSEDOPT_FN Doubles add_square(const Doubles& sum, const Doubles& x) {
  return Doubles(_mm512_fmadd_pd(__m512d(x), __m512d(x), __m512d(sum)));
}

#elif defined(__AVX2__)

typedef float Floats __attribute__((vector_size(32)));
typedef double FourDoubles __attribute__((vector_size(32)));
using Doubles = Pair<FourDoubles>;
using WideFloats = Pair<Floats>;

FUSEDOPT_FN Doubles widen(const Floats& x) {
  return {FourDoubles(_mm256_cvtps_pd(_mm256_castps256_ps128(__m256(x)))),
          FourDoubles(_mm256_cvtps_pd(_mm256_extractf128_ps(__m256(x), 1)))};
}
FUSEDOPT_FN FourDoubles add_square(const FourDoubles& sum, const FourDoubles& x) {
  return FourDoubles(_mm256_fmadd_pd(__m256d(x), __m256d(x), __m256d(sum)));
}

#else

typedef float FourFloats __attribute__((vector_size(16)));
typedef double TwoDoubles __attribute__((vector_size(16)));
using Floats = Pair<FourFloats>;
using Doubles = Pair<Pair<TwoDoubles> >;
using WideFloats = Pair<Floats>;

FUSEDOPT_FN Pair<TwoDoubles> widen(const FourFloats& x) {
#if defined(__x86_64__)
  return {TwoDoubles(_mm_cvtps_pd(__m128(x))), TwoDoubles(_mm_cvtps_pd(_mm_movehl_ps(__m128(x), __m128(x))))};
#else
  typedef float TwoFloats __attribute__((vector_size(8)));
  TwoFloats halves[2];
  memcpy(halves, &x, sizeof halves);
  return {__builtin_convertvector(halves[0], TwoDoubles), __builtin_convertvector(halves[1], TwoDoubles)};
#endif
}
FUSEDOPT_FN TwoDoubles add_square(const TwoDoubles& sum, const TwoDoubles& x) { return sum + x * x; }

#endif

template <class Half>
FUSEDOPT_FN auto widen(const Pair<Half>& x) {
  return Pair<decltype(widen(x.low))>{widen(x.low), widen(x.high)};
}
template <class Half>
FUSEDOPT_FN Pair<Half> add_square(const Pair<Half>& sum, const Pair<Half>& x) {
  return {add_square(sum.low, x.low), add_square(sum.high, x.high)};
}

using DoubleLanes = Pair<Doubles>;

// Register by register: copied as a whole, a pair would be cut into other pieces than it is used in.
template <class Vector>
FUSEDOPT_FN void load_into(Vector& target, const void* x) {
  memcpy(&target, x, sizeof target);
}
template <class Half>
FUSEDOPT_FN void load_into(Pair<Half>& target, const void* x) {
  load_into(target.low, x);
  load_into(target.high, static_cast<const char*>(x) + sizeof(Half));
}
template <class Vector>
FUSEDOPT_FN Vector load_as(const void* x) {
  Vector loaded;
  load_into(loaded, x);
  return loaded;
}

template <class Vector>
FUSEDOPT_FN void store(const Vector& x, void* target) {
  memcpy(target, &x, sizeof x);
}
template <class Half>
FUSEDOPT_FN void store(const Pair<Half>& x, void* target) {
  store(x.low, target);
  store(x.high, static_cast<char*>(target) + sizeof(Half));
}

FUSEDOPT_FN Floats load_floats(const float* x) { return load_as<Floats>(x); }
FUSEDOPT_FN Floats load_floats(const uint16_t* bfloat16) {
#if defined(__AVX2__)  // GCC 12 converts vectors in pieces
  const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bfloat16));
  return Floats(_mm256_slli_epi32(_mm256_cvtepu16_epi32(codes), 16));
#else
  typedef uint16_t Codes __attribute__((vector_size(kHalfLanes * sizeof(uint16_t))));
  typedef uint32_t Words __attribute__((vector_size(kHalfLanes * sizeof(uint32_t))));
  const Words words = __builtin_convertvector(load_as<Codes>(bfloat16), Words) << 16;
  return load_as<Floats>(&words);
#endif
}

FUSEDOPT_FN WideFloats load_wide(const float* x) { return load_as<WideFloats>(x); }
FUSEDOPT_FN WideFloats load_wide(const uint16_t* bfloat16) {
#if defined(__AVX512F__)
  const __m256i codes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bfloat16));
  return WideFloats(_mm512_slli_epi32(_mm512_cvtepu16_epi32(codes), 16));
#else
  return {load_floats(bfloat16), load_floats(bfloat16 + kHalfLanes)};
#endif
}

}  // namespace
}  // namespace fusedopt
