// How large a step's updates are, measured within the step.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "core/tensors.h"
#include "cpu/kernels.h"

namespace fusedopt::cpu {

// Of a step's tensors. Sums are taken by block of weights (fusedopt/reference/norm.py), so that they hang neither on
// threads nor on how the step is cut up.
class UpdateRecord {
 public:
  // Starts a step of these tensors. What was allocated is used again: to get it from the system took a tenth of the
  // time that sums take.
  void begin(const std::vector<TensorDesc>& tensors);

  // Where the sums of the tensor of that index go. Several threads may write at once, each those of its own blocks.
  UpdateTarget target(int64_t index) const;

  // Once the step is over: of each tensor.
  std::vector<UpdateSums> totals(const Kernels& kernels, int threads) const;

 private:
  std::vector<int64_t> ends_;  // of each tensor's blocks
  std::unique_ptr<float[]> updates_, weights_;
  int64_t capacity_ = 0;
};

}  // namespace fusedopt::cpu
