// The CPU entry points: whole lists of tensors, threads over the chunks of all of them at once.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/registry.h"
#include "core/tensors.h"
#include "cpu/kernels.h"
#include "cpu/updates.h"

namespace fusedopt::cpu {

// Instruction sets compiled in that this machine runs, the best last.
std::vector<std::string> available_isas();

// The one in use: FUSEDOPT_CPU_ISA if set, else the best. Throws std::invalid_argument if the variable
// names one that is unknown or that this machine cannot run. Read anew by every call.
std::string selected_isa();
const Kernels& selected_kernels();

// What is recorded of a step on request; null where it is not.
struct Recording {
  HealthCounts* health = nullptr;  // one element for each tensor, to which counts are added
  UpdateRecord* updates = nullptr;
};

// Takes one step: applies each tensor's rule and adds one to its step count.
void step(const std::vector<TensorDesc>& tensors, const std::vector<GroupDesc>& groups, int threads,
          const Recording& recording);

// How many sums square_sums writes: one for every reduction chunk of every gradient, in order.
int64_t count_square_sums(const std::vector<TensorDesc>& tensors);
void square_sums(const std::vector<TensorDesc>& tensors, double* sums, int threads);

// Steps a chunk of the tensor of that index by the rule of that number, and records it; several threads may do so at
// once.
void step_chunk(const Kernels& kernels, int rule, const TensorDesc& tensor, int64_t index, const StepContext& context,
                int64_t begin, int64_t length, const Recording& recording);

// The last place at or before an element where a tensor may be cut: not within a block.
int64_t cut_between_blocks(const TensorDesc& tensor, int64_t position);

// Zeroes fresh memory from all threads, on huge pages where the system grants them.
void zero(void* data, int64_t bytes, int threads);

}  // namespace fusedopt::cpu
