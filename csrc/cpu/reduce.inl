// The sum of squares of one reduction chunk, in double: 16 lanes, each summed in order, then added
// in pairs. The order is fixed, so the sum depends neither on the instruction set nor on threads;
// fusedopt/reference/norm.py does the same additions and also adds up the chunks.
#pragma once

#include "cpu/formats.inl"
#include "cpu/kernels.h"

namespace fusedopt {
namespace {

constexpr int kLanes = 16;

// Lanes as the compilers' own vectors, which they keep in registers; an array of sums stayed in memory
// and the loop waited for it (measured: 4 x slower with AVX-512).
typedef float FloatLanes __attribute__((vector_size(kLanes * sizeof(float))));
typedef double DoubleLanes __attribute__((vector_size(kLanes * sizeof(double))));

FUSEDOPT_FN void add_squares(DoubleLanes& sums, const FloatLanes& loaded) {
  const DoubleLanes values = __builtin_convertvector(loaded, DoubleLanes);
  sums += values * values;
}

// The lanes' sums, added in pairs.
FUSEDOPT_FN double total_of(const DoubleLanes& sums) {
  double lanes[kLanes];
  memcpy(lanes, &sums, sizeof lanes);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int lane = 0; lane < width; ++lane) lanes[lane] = lanes[2 * lane] + lanes[2 * lane + 1];
  }
  return lanes[0];
}

// Adds runs of numbers, each of which begins at lane 0.
struct LaneSum {
  DoubleLanes sums = {};

  FUSEDOPT_FN void add_squares(const float* x, int n) {
    DoubleLanes held = sums;
    int i = 0;
    for (; i + kLanes <= n; i += kLanes) {
      FloatLanes loaded;
      memcpy(&loaded, x + i, sizeof loaded);
      fusedopt::add_squares(held, loaded);
    }
    if (i < n) {
      FloatLanes loaded = {};  // zeros past the end: their squares change no sum
      memcpy(&loaded, x + i, sizeof(float) * static_cast<size_t>(n - i));
      fusedopt::add_squares(held, loaded);
    }
    sums = held;
  }
  FUSEDOPT_FN double total() const { return total_of(sums); }
};

// Adds the squares of 16 numbers to the sums of their row and of their columns.
FUSEDOPT_FN void add_row(const float* x, float multiplier, DoubleLanes& row, DoubleLanes& columns) {
  FloatLanes loaded;
  memcpy(&loaded, x, sizeof loaded);
  const DoubleLanes values = __builtin_convertvector(loaded * multiplier, DoubleLanes);
  const DoubleLanes squares = values * values;
  row += squares;
  columns += squares;
}

double square_sum(const Buffer& buffer, int64_t begin, int64_t length) {
  alignas(64) float tile[kTile];
  LaneSum sum;
  for (int64_t at = begin; at < begin + length; at += kTile) {
    const int64_t left = begin + length - at;
    const int n = static_cast<int>(left < kTile ? left : kTile);
    sum.add_squares(load(buffer, at, n, tile), n);
  }
  return sum.total();
}

}  // namespace
}  // namespace fusedopt
