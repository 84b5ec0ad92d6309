// The sums of squares of an update and of the weights after it, by reduction chunk, as reduce.inl adds: on request.
#pragma once

#include "cpu/formats.inl"
#include "cpu/reduce.inl"

namespace fusedopt {
namespace {

// The weights that some elements of a tensor stand for, masters included.
void read_weights(const TensorDesc& tensor, int64_t begin, int64_t length, float* weights) {
  alignas(64) float tile[kTile], spare[kTile];
  for (int64_t at = begin; at < begin + length; at += kTile) {
    const int n = static_cast<int>(std::min<int64_t>(kTile, begin + length - at));
    memcpy(weights + (at - begin), load_param(tensor, at, n, tile, spare), sizeof(float) * static_cast<size_t>(n));
  }
}

// Adds the squares of both to sums of their own, in one loop: each waits for its additions, and they fill the gaps.
void add_both(LaneSum& a_sum, const float* a, LaneSum& b_sum, const float* b, int n) {
  DoubleLanes of_a = a_sum.sums, of_b = b_sum.sums;
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    add_squares(of_a, a + i);
    add_squares(of_b, b + i);
  }
  if (i < n) {
    add_squares(of_a, Padded<float>(a + i, n - i).at);
    add_squares(of_b, Padded<float>(b + i, n - i).at);
  }
  a_sum.sums = of_a;
  b_sum.sums = of_b;
}

// Of whole reduction chunks from `begin` on, of which the last may end with the tensor; `before` are the weights that
// the update began with.
void sum_updates(const TensorDesc& tensor, int64_t begin, int64_t length, const float* before, UpdateSums* sums) {
  alignas(64) float tile[kTile], spare[kTile], update[kTile];
  for (int64_t chunk = begin; chunk < begin + length; chunk += kReductionChunk) {
    const int64_t end = std::min(chunk + kReductionChunk, begin + length);
    LaneSum updates, weights;
    for (int64_t at = chunk; at < end; at += kTile) {
      const int n = static_cast<int>(std::min<int64_t>(kTile, end - at));
      const float* after = load_param(tensor, at, n, tile, spare);
#pragma GCC ivdep
      for (int i = 0; i < n; ++i) update[i] = after[i] - before[at - begin + i];
      add_both(updates, update, weights, after, n);
    }
    *sums++ = {updates.total(), weights.total()};
  }
}

}  // namespace
}  // namespace fusedopt
