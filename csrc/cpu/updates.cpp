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
    const bool has_edges = tensor.row % kBlock != 0;
    tensors_.push_back({count, chunks, std::vector<Edge>(has_edges ? divided_up(tensor.numel, kCut) : 0)});
    count += chunks;
  }
  sums_.resize(count);
}

float* UpdateRecord::weights_of_thread(int64_t count) {
  static thread_local std::vector<float> held;
  if (static_cast<int64_t>(held.size()) < count) held.resize(count);
  return held.data();
}

void UpdateRecord::add(const Kernels& kernels, const TensorDesc& tensor, int64_t index, int64_t begin, int64_t length,
                       float* before) {
  Tensor& own = tensors_[index];
  const int64_t end = begin + length;
  const int64_t first = std::min(divided_up(begin, kReductionChunk) * kReductionChunk, end);
  const int64_t last = end == tensor.numel ? end : std::max(first, end / kReductionChunk * kReductionChunk);
  if (first < last) {
    UpdateSums* const sums = sums_.data() + own.first + first / kReductionChunk;
    kernels.sum_updates(tensor, first, last - first, before + (first - begin), sums);
  }
  if (first == begin && last == end) return;

  float* const after = before + length;
  kernels.read_weights(tensor, begin, length, after);
  for (int64_t i = 0; i < length; ++i) before[i] = after[i] - before[i];
  if (first > begin) {
    Edge& edge = own.edges[divided_up(first, kCut) - 1];
    edge.rest = first - begin;
    std::copy_n(before, edge.rest, edge.updates);
    std::copy_n(after, edge.rest, edge.weights);
  }
  if (last < end) {
    Edge& edge = own.edges[last / kCut];
    edge.count = end - last;
    std::fill_n(edge.update_lanes, kSumLanes, 0.0);
    std::fill_n(edge.weight_lanes, kSumLanes, 0.0);
    add_to_lanes(before + (last - begin), 0, edge.count, edge.update_lanes);
    add_to_lanes(after + (last - begin), 0, edge.count, edge.weight_lanes);
  }
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
    for (size_t i = 0; i < tensor.edges.size(); ++i) {
      Edge& edge = tensor.edges[i];
      if (edge.count == 0) continue;
      add_to_lanes(edge.updates, edge.count, edge.rest, edge.update_lanes);
      add_to_lanes(edge.weights, edge.count, edge.rest, edge.weight_lanes);
      // The chunk that ends with the cut's multiple.
      const int64_t chunk = (static_cast<int64_t>(i) + 1) * (kCut / kReductionChunk) - 1;
      sums_[tensor.first + chunk] = {total_of(edge.update_lanes), total_of(edge.weight_lanes)};
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
