// How large a step's updates are, measured within the step.
#pragma once

#include <cstdint>
#include <vector>

#include "core/tensors.h"
#include "cpu/kernels.h"

namespace fusedopt::cpu {

// Of a step's tensors. Sums are taken by reduction chunk (core/pairwise.h), so that they hang neither on threads nor on
// how the step is cut up.
class UpdateRecord {
 public:
  explicit UpdateRecord(const std::vector<TensorDesc>& tensors);

  // Where the sums of some elements of the tensor of that index go; several threads may ask at once. Begin and end are
  // those of the tensor, or cut_between_blocks of a multiple of kCut.
  UpdateTarget target(const TensorDesc& tensor, int64_t index, int64_t begin, int64_t length);

  // Once the step is over: of each tensor.
  std::vector<UpdateSums> totals();

  static constexpr int64_t kCut = int64_t{1} << 16;

 private:
  struct Tensor {
    int64_t first, count;  // of its sums
    std::vector<UpdateCut> cuts;
  };

  std::vector<Tensor> tensors_;
  std::vector<UpdateSums> sums_;
};

}  // namespace fusedopt::cpu
