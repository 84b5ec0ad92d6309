#include "cpu/updates.h"

#include <algorithm>

#include "core/pairwise.h"
#include "cpu/parallel.h"

namespace fusedopt::cpu {

void UpdateRecord::begin(const std::vector<TensorDesc>& tensors) {
  int64_t count = 0;
  ends_.clear();
  for (const TensorDesc& tensor : tensors) ends_.push_back(count += blocks_of(tensor, kBlock));
  if (count <= capacity_) return;
  capacity_ = 0;  // until there is memory
  // Not zeroed: the step writes every one of them.
  updates_.reset(new float[static_cast<size_t>(count)]);
  weights_.reset(new float[static_cast<size_t>(count)]);
  capacity_ = count;
}

UpdateTarget UpdateRecord::target(int64_t index) const {
  const int64_t first = index == 0 ? 0 : ends_[index - 1];
  return {updates_.get() + first, weights_.get() + first};
}

std::vector<UpdateSums> UpdateRecord::totals(const Kernels& kernels, int threads) const {
  struct Chunk {
    const float* numbers;
    int64_t count;
  };
  std::vector<Chunk> chunks;  // those of a tensor's updates, then those of its weights
  for (size_t i = 0; i < ends_.size(); ++i) {
    const UpdateTarget of = target(static_cast<int64_t>(i));
    const int64_t count = updates_.get() + ends_[i] - of.updates;
    for (const float* numbers : {of.updates, of.weights}) {
      for (int64_t at = 0; at < count; at += kReductionChunk) {
        chunks.push_back({numbers + at, std::min(count - at, kReductionChunk)});
      }
    }
  }
  std::vector<double> sums(chunks.size());
  parallel_items(static_cast<int64_t>(chunks.size()), threads,
                 [&](int64_t i) { sums[i] = kernels.sum(chunks[i].numbers, chunks[i].count); });
  std::vector<UpdateSums> totals;
  double* first = sums.data();
  for (size_t i = 0; i < ends_.size(); ++i) {
    const int64_t count = chunks_of(ends_[i] - (i == 0 ? 0 : ends_[i - 1]));
    totals.push_back({pairwise_sum(first, count), pairwise_sum(first + count, count)});
    first += 2 * count;
  }
  return totals;
}

}  // namespace fusedopt::cpu
