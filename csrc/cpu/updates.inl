// The sums of squares of an update and of the weights after it, by reduction chunk, as reduce.inl adds: on request, and
// within the step's own loops, whose wait for memory hides most of it.
#pragma once

#include <algorithm>

#include "cpu/formats.inl"
#include "cpu/reduce.inl"

namespace fusedopt {
namespace {

// Adds the squares of both to sums of their own, in one loop: each waits for its additions, and they fill the gaps.
FUSEDOPT_FN void add_both(LaneSum& a_sum, const float* a, LaneSum& b_sum, const float* b, int n) {
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

// Of a run of elements of a tensor, which come one after the other.
class UpdateTally {
 public:
  UpdateTally(const UpdateTarget& target, const TensorDesc& tensor, int64_t begin)
      : target_(target), numel_(tensor.numel), at_(begin), begins_within_(target.begin != nullptr) {
    find_end();
  }

  // The next n <= kTile elements. Not inlined, as it would be for each rule.
  __attribute__((noinline)) void add(const float* before, const float* after, int n) {
    alignas(64) float updates[kTile];
#pragma GCC ivdep
    for (int i = 0; i < n; ++i) updates[i] = after[i] - before[i];
    for (int done = 0; done < n;) {
      const int count = static_cast<int>(std::min<int64_t>(n - done, chunk_end_ - at_));
      if (begins_within_) {
        keep_rest(updates + done, after + done, count);
      } else {
        add_run(updates + done, after + done, count);
      }
      done += count;
      advance(count);
    }
  }

  // Once the run has been added.
  __attribute__((noinline)) void end() {
    if (target_.end == nullptr) return;
    target_.end->count = at_ % kReductionChunk;
    store(updates_.sums, target_.end->update_lanes);
    store(weights_.sums, target_.end->weight_lanes);
  }

#if defined(__AVX2__)
  // The same of a strip of kBlock elements, of a run that begins with a reduction chunk: before it is stepped and
  // after.
  template <class Weights>
  FUSEDOPT_FN void keep(const Weights& weights) {
    for (int j = 0; j < kVectors; ++j) store_lanes(before_ + kVector * j, weights.at(j));
  }
  template <class Weights>
  FUSEDOPT_FN void add_strip(const Weights& weights) {
    for (int j = 0; j < kVectors; ++j) store_lanes(after_ + kVector * j, weights.at(j));
    add_kept();
  }
#endif

 private:
  void find_end() { chunk_end_ = std::min((at_ / kReductionChunk + 1) * kReductionChunk, numel_); }

  FUSEDOPT_FN void advance(int64_t count) {
    at_ += count;
    if (at_ == chunk_end_) end_chunk();
  }

  __attribute__((noinline)) void end_chunk() {
    if (!begins_within_) target_.chunks[(at_ - 1) / kReductionChunk] = {updates_.total(), weights_.total()};
    begins_within_ = false;
    updates_ = weights_ = {};
    find_end();
  }

  void keep_rest(const float* updates, const float* weights, int n) {
    UpdateCut& cut = *target_.begin;
    std::copy_n(updates, n, cut.updates + cut.rest);
    std::copy_n(weights, n, cut.weights + cut.rest);
    cut.rest += n;
  }

#if defined(__AVX2__)
  __attribute__((noinline)) void add_kept() {
    alignas(64) float updates[kBlock];
    for (int at = 0; at < kBlock; at += kVector) {
      store_lanes(updates + at, load_lanes(after_ + at) - load_lanes(before_ + at));
    }
    add_both(updates_, updates, weights_, after_, kBlock);
    advance(kBlock);
  }
#endif

  // Elements of one chunk, from any lane on.
  void add_run(const float* updates, const float* weights, int n) {
    const int lane = static_cast<int>(at_ % kLanes);
    const int odd = lane == 0 ? 0 : std::min(kLanes - lane, n);
    if (odd > 0) {
      float shifted[2][kLanes] = {};
      std::copy_n(updates, odd, shifted[0] + lane);
      std::copy_n(weights, odd, shifted[1] + lane);
      add_both(updates_, shifted[0], weights_, shifted[1], kLanes);
    }
    add_both(updates_, updates + odd, weights_, weights + odd, n - odd);
  }

  const UpdateTarget& target_;
  int64_t numel_, at_, chunk_end_;
  bool begins_within_;  // a chunk, whose rest the cut takes
  LaneSum updates_, weights_;
#if defined(__AVX2__)
  alignas(64) float before_[kBlock], after_[kBlock];
#endif
};

}  // namespace
}  // namespace fusedopt
