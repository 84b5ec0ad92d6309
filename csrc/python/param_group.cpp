#include "python/param_group.h"

#include <cstring>
#include <utility>

namespace py = pybind11;

namespace fusedopt {
namespace {

int find_rule(const std::string& name) {
  for (size_t i = 0; i < rules().size(); ++i) {
    if (name == rules()[i].name) return static_cast<int>(i);
  }
  throw py::value_error("the core has no rule '" + name + "'");
}

py::object interned(const std::string& text) {
  return py::reinterpret_steal<py::object>(PyUnicode_InternFromString(text.c_str()));
}

}  // namespace

ParamGroup::ParamGroup(const std::string& rule, const std::map<std::string, double>& config, uint32_t seed,
                       const std::vector<int>& roundings, int rounding, int master, const std::string& master_key,
                       bool skips_blocks, int param_group, std::vector<int64_t> positions)
    : rounding(static_cast<Rounding>(rounding)),
      master(static_cast<Master>(master)),
      master_key(interned(master_key)),
      skips_blocks(skips_blocks),
      param_group(param_group),
      positions(std::move(positions)) {
  desc.rule = find_rule(rule);
  desc.seed = seed;
  const RuleInfo& info = rules()[desc.rule];
  if (skips_blocks && info.takes_quotient) throw py::value_error("rule '" + rule + "' cannot skip blocks");
  for (const RuleField& field : info.fields) {
    const auto found = config.find(field.name);
    if (found == config.end())
      throw py::type_error("rule '" + rule + "' needs the hyperparameter '" + field.name + "'");
    std::memcpy(desc.config + field.offset, &found->second, sizeof(double));
  }
  if (config.size() != info.fields.size()) {
    throw py::type_error("rule '" + rule + "' was given a hyperparameter that it does not have");
  }
  const size_t count = static_cast<size_t>(info.states);
  const size_t listed = count + (info.row_name == nullptr ? 0 : 2);
  if (roundings.size() != listed) {
    throw py::value_error("rule '" + rule + "' has " + std::to_string(listed) + " states");
  }
  for (size_t k = 0; k < count; ++k) {
    const std::string name = info.state_names[k];
    states.push_back({static_cast<Rounding>(roundings[k]), info.is_signed[k], interned(name), interned(name + "_codes"),
                      interned(name + "_scales")});
  }
  if (info.row_name != nullptr) factor_keys = {interned(info.row_name), interned(info.column_name)};
}

}  // namespace fusedopt
