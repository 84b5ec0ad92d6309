// The sum of squares of one reduction chunk, in double: 16 lanes, each summed in order, then added
// in pairs. The order is fixed, so the sum depends neither on the instruction set nor on threads;
// fusedopt/reference/norm.py does the same additions and also adds up the chunks.
#pragma once

#include "cpu/formats.inl"
#include "cpu/kernels.h"
#include "cpu/vectors.inl"

namespace fusedopt {
namespace {

// The first n of 16 numbers, filled up with zeros, whose squares change no sum.
template <class Number>
struct Padded {
  Number at[kLanes] = {};
  FUSEDOPT_FN Padded(const Number* x, int n) { memcpy(at, x, sizeof(Number) * static_cast<size_t>(n)); }
};

template <class Number>
FUSEDOPT_FN void add_squares(DoubleLanes& sums, const Number* x) {
  sums.low = add_square(sums.low, widen(load_floats(x)));
  sums.high = add_square(sums.high, widen(load_floats(x + kHalfLanes)));
}

// The lanes' sums, added in pairs.
FUSEDOPT_FN double total_of(const DoubleLanes& sums) {
  double lanes[kLanes];
  store(sums, lanes);
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
