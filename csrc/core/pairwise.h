// Sums in pairs, an odd one out moving up unchanged: the order in which all backends add partial sums
// (fusedopt/reference/norm.py).
#pragma once

#include <cstdint>

#include "core/portable.h"

namespace fusedopt {

constexpr int64_t kReductionChunk = 4096;  // elements whose sum is one of those partial sums
constexpr int kSumLanes = 16;              // of a chunk, each summed in order

namespace {

FUSEDOPT_FN constexpr int64_t chunks_of(int64_t numel) { return divided_up(numel, kReductionChunk); }

// Destroys the numbers.
FUSEDOPT_FN double pairwise_sum(double* x, int64_t n) {
  if (n == 0) return 0.0;
  while (n > 1) {
    const int64_t half = n / 2;
    for (int64_t i = 0; i < half; ++i) x[i] = x[2 * i] + x[2 * i + 1];
    if (n % 2 == 1) x[half] = x[n - 1];
    n = half + n % 2;
  }
  return x[0];
}

}  // namespace
}  // namespace fusedopt
