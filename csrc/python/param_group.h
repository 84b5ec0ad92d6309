// A param group of a step: its rule, and the names under which a parameter's state holds what the rule keeps.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "core/registry.h"
#include "core/tensors.h"

namespace fusedopt {

// One state of a rule: how it is stored, and its names in a parameter's state, interned.
struct StateSpec {
  Rounding rounding;
  bool is_signed;
  pybind11::object key, codes_key, scales_key;
};

struct ParamGroup {
  // See TensorTable::add_group.
  ParamGroup(const std::string& rule, const std::map<std::string, double>& config, uint32_t seed,
             const std::vector<int>& roundings, int rounding, int master, const std::string& master_key,
             bool skips_blocks, int param_group, std::vector<int64_t> positions);

  bool is_factored() const { return static_cast<bool>(factor_keys[0]); }  // second moments are

  // The place of its parameter number `position` in the optimizer's lists: param group, and position in that.
  std::pair<int, int64_t> listed(int64_t position) const {
    return {param_group, positions.empty() ? position : positions[position]};
  }

  GroupDesc desc;
  std::vector<StateSpec> states;
  std::array<pybind11::object, 2> factor_keys;  // null where second moments are not factored
  Rounding rounding;                            // of parameters
  Master master;
  pybind11::object master_key;
  bool skips_blocks;
  int param_group;
  std::vector<int64_t> positions;
};

}  // namespace fusedopt
