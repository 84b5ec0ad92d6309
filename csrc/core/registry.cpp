#include "core/registry.h"

#include "rules/all.h"

namespace fusedopt {
namespace {

template <class Rule>
RuleInfo describe(const char* name) {
  static_assert(sizeof(typename Rule::Config) <= kMaxConfigBytes, "raise kMaxConfigBytes");
  static_assert(sizeof(typename Rule::Hyper) <= kMaxHyperBytes, "raise kMaxHyperBytes");
  static_assert(Rule::kStates <= kMaxStates, "raise kMaxStates");
  RuleInfo info{name, Rule::kStates, Rule::kStateNames, {}, nullptr};
  for (const ConfigField& field : Rule::kFields) info.fields.push_back({field.name, field.offset});
  info.derive = [](const void* config, int64_t step, void* hyper) {
    *static_cast<typename Rule::Hyper*>(hyper) = Rule::derive(*static_cast<const typename Rule::Config*>(config), step);
  };
  return info;
}

}  // namespace

const std::vector<RuleInfo>& rules() {
#define FUSEDOPT_DESCRIBE(name, type) describe<type>(#name),
  static const std::vector<RuleInfo> all = {FUSEDOPT_RULES(FUSEDOPT_DESCRIBE)};
#undef FUSEDOPT_DESCRIBE
  return all;
}

}  // namespace fusedopt
