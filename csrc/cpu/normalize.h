// The step of rules that normalize (rules/normalize.h): passes for sums, then the step.
#pragma once

#include <cstdint>
#include <vector>

#include "core/registry.h"
#include "core/tensors.h"
#include "cpu/kernels.h"

namespace fusedopt::cpu {

struct Recording;

// The parameter that a tensor is, or of which it is a shard.
struct Whole {
  int64_t numel = 0;
  int64_t row_count = 0, column_count = 0;  // of a matrix; 0 if there is none
  int64_t matrices = 0;                     // how many of them are here at least in part
  bool cuts_columns = false;                // whether a row may lie in several shards

  static Whole of(const TensorDesc& tensor) {
    return {tensor.numel, tensor.factors.row_count, tensor.factors.column_count, 0, false};
  }
};

// Steps the `tensors` that are `listed`, except for their step counts. `recording` is that of cpu::step.
void step_normalizing(const std::vector<TensorDesc>& tensors, const std::vector<int32_t>& listed,
                      const std::vector<GroupDesc>& groups, const Kernels& kernels, int threads,
                      const Recording& recording);

}  // namespace fusedopt::cpu
