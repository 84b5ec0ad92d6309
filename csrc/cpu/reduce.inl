// The sum of squares of one reduction chunk, in double: 16 lanes, each summed in order, then added
// in pairs. The order is fixed, so the sum depends neither on the instruction set nor on threads;
// fusedopt/reference/norm.py does the same additions and also adds up the chunks.
#pragma once

#include "cpu/tile.inl"

namespace fusedopt {
namespace {

constexpr int kLanes = 16;

double square_sum(const Buffer& buffer, int64_t begin, int64_t length) {
  alignas(64) float tile[kTile];
  alignas(64) double lanes[kLanes] = {};
  for (int64_t at = begin; at < begin + length; at += kTile) {
    const int64_t left = begin + length - at;
    const int n = static_cast<int>(left < kTile ? left : kTile);
    const float* x = load(buffer, at, n, tile);
    int i = 0;
    for (; i + kLanes <= n; i += kLanes) {
      prefetch(x + i);
      for (int lane = 0; lane < kLanes; ++lane) {
        const double value = x[i + lane];
        lanes[lane] += value * value;
      }
    }
    for (int lane = 0; i < n; ++i, ++lane) {
      const double value = x[i];
      lanes[lane] += value * value;
    }
  }
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int lane = 0; lane < width; ++lane) lanes[lane] = lanes[2 * lane] + lanes[2 * lane + 1];
  }
  return lanes[0];
}

}  // namespace
}  // namespace fusedopt
