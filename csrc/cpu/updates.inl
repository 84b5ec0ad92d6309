// The sums of squares of an update and of the weights after it, by block: on request, and within the step's own loops,
// whose wait for memory hides most of it.
#pragma once

#include <algorithm>

#include "cpu/kernels.h"
#include "cpu/strip_formats.inl"

namespace fusedopt {
namespace {

#if defined(__AVX2__)

// The sums of 8 lanes of each, the upper half of them being added to the lower until one is left.
FUSEDOPT_FN void store_sums(__m256 update, __m256 weight, float* to_update, float* to_weight) {
  const __m128 u = _mm256_castps256_ps128(update) + _mm256_extractf128_ps(update, 1);
  const __m128 w = _mm256_castps256_ps128(weight) + _mm256_extractf128_ps(weight, 1);
  const __m128 both = _mm_movelh_ps(u, w) + _mm_movehl_ps(w, u);
  const __m128 sums = both + _mm_movehdup_ps(both);
  _mm_store_ss(to_update, sums);
  _mm_store_ss(to_weight, _mm_movehl_ps(sums, sums));
}
#if defined(__AVX512BW__)
FUSEDOPT_FN void store_sums(__m512 update, __m512 weight, float* to_update, float* to_weight) {
  store_sums(_mm512_castps512_ps256(update) + _mm512_extractf32x8_ps(update, 1),
             _mm512_castps512_ps256(weight) + _mm512_extractf32x8_ps(weight, 1), to_update, to_weight);
}
#endif

// Of a block of kBlock weights, whose vectors are at(j).
template <class Before, class After>
FUSEDOPT_FN void sum_block(const Before& before, const After& after, float* update, float* weight) {
  Lanes u[kVectors], w[kVectors];
  for (int j = 0; j < kVectors; ++j) {
    const Lanes x = after.at(j), moved = x - before.at(j);
    u[j] = moved * moved;
    w[j] = x * x;
  }
  for (int half = kVectors / 2; half > 0; half /= 2) {
    for (int j = 0; j < half; ++j) {
      u[j] = u[j] + u[j + half];
      w[j] = w[j] + w[j + half];
    }
  }
  store_sums(u[0], w[0], update, weight);
}

#endif

FUSEDOPT_FN void sum_block(const float* before, const float* after, float* update, float* weight) {
#if defined(__AVX2__)
  sum_block(Loaded{before}, Loaded{after}, update, weight);
#else
  float u[kBlock], w[kBlock];
  for (int i = 0; i < kBlock; ++i) {
    const float moved = after[i] - before[i];
    u[i] = moved * moved;
    w[i] = after[i] * after[i];
  }
  for (int half = kBlock / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) {
      u[i] = u[i] + u[i + half];
      w[i] = w[i] + w[i + half];
    }
  }
  *update = u[0];
  *weight = w[0];
#endif
}

// Of a run of elements of a tensor, which come one after the other and are whole blocks.
class UpdateTally {
 public:
  UpdateTally(const UpdateTarget& target, const TensorDesc& tensor, int64_t begin) : row_(block_row(tensor)) {
    const int64_t row = begin / row_, column = begin - row * row_;
    const int64_t block = row * divided_up(row_, kBlock) + column / kBlock;
    updates_ = target.updates + block;
    weights_ = target.weights + block;
    left_ = row_ - column;
  }

  // The next n elements. Not inlined, as it would be for each rule.
  __attribute__((noinline)) void add(const float* before, const float* after, int n) {
    for (int done = 0; done < n;) {
      const int length = static_cast<int>(std::min<int64_t>(left_, kBlock));  // of this block
      const int count = std::min(n - done, length - held_);
      if (count == kBlock) {
        sum_next(before + done, after + done);
      } else {
        std::copy_n(before + done, count, before_ + held_);
        std::copy_n(after + done, count, after_ + held_);
        held_ += count;
        if (held_ == length) {
          std::fill(before_ + held_, before_ + kBlock, 0.0f);
          std::fill(after_ + held_, after_ + kBlock, 0.0f);
          sum_next(before_, after_);
          held_ = 0;
        }
      }
      done += count;
    }
  }

#if defined(__AVX2__)
  // The same of a strip of kBlock weights, before it is stepped and after. Longer runs of strips would still be in
  // cache, but hide less of the time that memory takes.
  template <class Weights>
  FUSEDOPT_FN void keep(const Weights& weights) {
    for (int j = 0; j < kVectors; ++j) store_lanes(before_ + kVector * j, weights.at(j));
  }
  template <class Weights>
  __attribute__((noinline)) void add_strip(const Weights& weights) {
    sum_block(Loaded{before_}, weights, updates_++, weights_++);
    left_ -= kBlock;
  }
#endif

 private:
  FUSEDOPT_FN void sum_next(const float* before, const float* after) {
    sum_block(before, after, updates_++, weights_++);
    left_ = left_ > kBlock ? left_ - kBlock : row_;
  }

  float *updates_, *weights_;  // of the next block
  int64_t row_, left_;         // elements of a row, and of this one from the next block on
  int held_ = 0;               // of the next block
  alignas(64) float before_[kBlock], after_[kBlock];
};

}  // namespace
}  // namespace fusedopt
