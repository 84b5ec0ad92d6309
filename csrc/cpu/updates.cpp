#include "cpu/updates.h"

#include <algorithm>

#include "core/pairwise.h"

namespace fusedopt::cpu {
namespace {

void add_to_lanes(const float* x, int64_t first, int64_t n, double* lanes) {
  for (int64_t i = 0; i < n; ++i) {
    const double value = x[i];
    lanes[(first + i) % kSumLanes] += value * value;
  }
}

}  // namespace

UpdateRecord::UpdateRecord(const std::vector<TensorDesc>& tensors) {
  int64_t count = 0;
  for (const TensorDesc& tensor : tensors) {
    const int64_t chunks = chunks_of(tensor.numel);
    const bool has_cuts = tensor.row % kBlock != 0;
    tensors_.push_back({count, chunks, std::vector<UpdateCut>(has_cuts ? divided_up(tensor.numel, kCut) : 0)});
    count += chunks;
  }
  sums_.resize(count);
}

UpdateTarget UpdateRecord::target(const TensorDesc& tensor, int64_t index, int64_t begin, int64_t length) {
  Tensor& own = tensors_[index];
  const auto cut_at = [&](int64_t at) {
    return at % kReductionChunk == 0 || at == tensor.numel ? nullptr : &own.cuts[at / kCut];
  };
  return {sums_.data() + own.first, cut_at(begin), cut_at(begin + length)};
}

std::vector<UpdateSums> UpdateRecord::totals() {
  std::vector<UpdateSums> totals;
  std::vector<double> updates, weights;
  const auto total_of = [](double* lanes) {
    double sums[kSumLanes];
    std::copy_n(lanes, kSumLanes, sums);
    return pairwise_sum(sums, kSumLanes);
  };
  for (Tensor& tensor : tensors_) {
    for (size_t i = 0; i < tensor.cuts.size(); ++i) {
      UpdateCut& cut = tensor.cuts[i];
      if (cut.count == 0) continue;
      add_to_lanes(cut.updates, cut.count, cut.rest, cut.update_lanes);
      add_to_lanes(cut.weights, cut.count, cut.rest, cut.weight_lanes);
      // The chunk that ends with the cut's multiple.
      const int64_t chunk = (static_cast<int64_t>(i) + 1) * (kCut / kReductionChunk) - 1;
      sums_[tensor.first + chunk] = {total_of(cut.update_lanes), total_of(cut.weight_lanes)};
    }
    updates.clear();
    weights.clear();
    for (int64_t i = 0; i < tensor.count; ++i) {
      updates.push_back(sums_[tensor.first + i].update);
      weights.push_back(sums_[tensor.first + i].weight);
    }
    totals.push_back({pairwise_sum(updates.data(), tensor.count), pairwise_sum(weights.data(), tensor.count)});
  }
  return totals;
}

}  // namespace fusedopt::cpu
