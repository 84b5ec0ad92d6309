// Vectors of floats and of words for the loops that are written in them (strips.inl), in AVX-512 or in AVX2. Both files
// have the same functions, those that rules ask for (rules/rule.h) included; a block is the same number of elements in
// either, and of vectors not.
#pragma once

// GCC's own headers leave operands undefined on purpose, and warn of it wherever they are inlined.
#if defined(__AVX2__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#if defined(__AVX512BW__)
#include "cpu/lanes_avx512.inl"
#elif defined(__AVX2__)
#include "cpu/lanes_avx2.inl"
#endif

#if defined(__AVX2__)

namespace fusedopt {
namespace {

constexpr int kVectors = kBlock / kVector;
constexpr int kPacked = 4;  // vectors whose numbers, as bytes, are one

// 64 numbers: in registers, or where there are too few, on the stack.
struct LaneBlock {
  Lanes at[kVectors];
};

FUSEDOPT_FN LaneBlock load_block(const float* x) {
  LaneBlock block;
  for (int j = 0; j < kVectors; ++j) block.at[j] = load_lanes(x + kVector * j);
  return block;
}

FUSEDOPT_FN Bits magnitude_of(Lanes x) { return masked(bits_of(x), all(~kSignBit)); }

// The largest magnitude of a block, as an integer.
FUSEDOPT_FN uint32_t largest_of(const LaneBlock& x) {
  Bits sizes[kVectors];
  for (int j = 0; j < kVectors; ++j) sizes[j] = magnitude_of(x.at[j]);
  return largest_of(sizes);
}

}  // namespace
}  // namespace fusedopt

#endif
