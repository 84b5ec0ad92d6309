// The step of rules that normalize (rules/normalize.h): passes for sums, then the step.
#pragma once

#include <cstdint>
#include <vector>

#include "core/registry.h"
#include "core/tensors.h"
#include "cpu/kernels.h"

namespace fusedopt::cpu {

struct Recording;

// Steps the `tensors` that are `listed`, except for their step counts. `recording` is that of cpu::step.
void step_normalizing(const std::vector<TensorDesc>& tensors, const std::vector<int32_t>& listed,
                      const std::vector<GroupDesc>& groups, const Kernels& kernels, int threads,
                      const Recording& recording);

}  // namespace fusedopt::cpu
