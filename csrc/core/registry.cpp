#include "core/registry.h"

#include "rules/all.h"

namespace fusedopt {
namespace {

template <class Rule>
RuleInfo describe(const char* name) {
  static_assert(sizeof(typename Rule::Config) <= kMaxConfigBytes, "raise kMaxConfigBytes");
  static_assert(sizeof(typename Rule::Hyper) <= kMaxHyperBytes, "raise kMaxHyperBytes");
  static_assert(Rule::kStates <= kMaxStates, "raise kMaxStates");
  RuleInfo info{};
  info.name = name;
  info.states = Rule::kStates;
  info.state_names = Rule::kStateNames;
  info.is_signed = Rule::kSigned;
  for (const ConfigField& field : Rule::kFields) info.fields.push_back({field.name, field.offset});
  using Config = typename Rule::Config;
  using Hyper = typename Rule::Hyper;
  if constexpr (kIsNormalizing<Rule>) {
    info.normalizes = true;
    info.takes_quotient = Rule::kTakesQuotient;
    info.second_moment = Rule::kSecondMoment;
    if constexpr (Rule::kSecondMoment < 0) {
      info.row_name = Rule::kRowName;
      info.column_name = Rule::kColumnName;
    }
    info.derive = [](const void* config, int64_t step, const TensorSums& sums, void* hyper) {
      *static_cast<Hyper*>(hyper) = Rule::derive(*static_cast<const Config*>(config), step, sums);
    };
    info.reads_weights = [](const void* config) { return Rule::reads_weights(*static_cast<const Config*>(config)); };
    info.moments = [](const void* hyper) -> const Moments& { return static_cast<const Hyper*>(hyper)->moments; };
  } else {
    info.derive = [](const void* config, int64_t step, const TensorSums&, void* hyper) {
      *static_cast<Hyper*>(hyper) = Rule::derive(*static_cast<const Config*>(config), step);
    };
  }
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
