// How large a step's updates are, measured while its weights are in cache.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "core/tensors.h"
#include "cpu/kernels.h"
#include "storage/blockwise8.h"

namespace fusedopt::cpu {

// Of a step's tensors. Sums are taken by reduction chunk (core/pairwise.h), so that they hang neither on threads nor on
// how the step is cut up.
class UpdateRecord {
 public:
  explicit UpdateRecord(const std::vector<TensorDesc>& tensors);

  // Steps some elements of the tensor of that index and takes their sums; several threads may do so at once. `step`
  // steps a run of elements. Begin and end are those of the tensor, or cut_between_blocks of a multiple of kCut.
  template <class Step>
  void take(const Kernels& kernels, const TensorDesc& tensor, int64_t index, int64_t begin, int64_t length,
            const Step& step) {
    float* const before = weights_of_thread(2 * length);
    const bool is_even = tensor.row % kBlock == 0;  // so every multiple of kPiece is a place to cut
    for (int64_t at = begin; at < begin + length;) {
      const int64_t n = is_even ? std::min(kPiece, begin + length - at) : length;
      kernels.read_weights(tensor, at, n, before);
      step(at, n);
      add(kernels, tensor, index, at, n, before);
      at += n;
    }
  }

  // Once the step is over: of each tensor.
  std::vector<UpdateSums> totals();

  static constexpr int64_t kCut = int64_t{1} << 16;

 private:
  // So that what is read of it before the step is still in a second-level cache after it.
  static constexpr int64_t kPiece = kReductionChunk;

  // Where a tensor is cut within a reduction chunk, fewer than kBlock elements before its end: what is on either side.
  struct Edge {
    double update_lanes[kSumLanes], weight_lanes[kSumLanes];
    int64_t count = 0;  // elements before the cut
    int64_t rest = 0;   // and from it on, up to the end of the chunk
    float updates[kBlock], weights[kBlock];
  };

  struct Tensor {
    int64_t first, count;  // of its sums
    std::vector<Edge> edges;
  };

  static float* weights_of_thread(int64_t count);
  void add(const Kernels& kernels, const TensorDesc& tensor, int64_t index, int64_t begin, int64_t length,
           float* before);

  std::vector<Tensor> tensors_;
  std::vector<UpdateSums> sums_;
};

}  // namespace fusedopt::cpu
