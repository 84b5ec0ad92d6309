// The rules as data: what a host needs to know of them to fill, derive and launch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "core/tensors.h"
#include "rules/normalize.h"

namespace fusedopt {

constexpr size_t kMaxConfigBytes = 256;
constexpr size_t kMaxHyperBytes = 128;

struct RuleField {
  const char* name;
  size_t offset;  // of a double in the rule's Config
};

struct RuleInfo {
  const char* name;
  int states;
  const char* const* state_names;
  const bool* is_signed;
  std::vector<RuleField> fields;
  void (*derive)(const void* config, int64_t step, const TensorSums& sums, void* hyper);  // most rules take no sums
  bool normalizes = false;                                                                // rules/normalize.h
  bool takes_quotient = false;
  int second_moment = -1;          // the state that holds it, if it is not factored
  const char* row_name = nullptr;  // of factored second moments
  const char* column_name = nullptr;
  bool (*reads_weights)(const void* config) = nullptr;
  const Moments& (*moments)(const void* hyper) = nullptr;
};

// All rules, in the order of rules/all.h.
const std::vector<RuleInfo>& rules();

// One param group of a step: its rule and hyperparameters, in double as the user gave them.
struct GroupDesc {
  int rule = 0;
  uint32_t seed = 0;
  double grad_multiplier = 1.0;  // +- inverse loss scale x clip coefficient
  alignas(8) unsigned char config[kMaxConfigBytes] = {};
};

// The tensors of a step as modules hand them to each other, by address: they must come from one build.
struct StepLists {
  std::vector<TensorDesc> tensors;
  std::vector<GroupDesc> groups;
};

// A number that is the same in modules that agree on the layout of these lists in memory.
inline int64_t layout_of_lists() {
  return static_cast<int64_t>(sizeof(TensorDesc)) << 32 | static_cast<int64_t>(sizeof(GroupDesc)) << 8 |
         static_cast<int64_t>(rules().size());
}

}  // namespace fusedopt
