#include "cuda/prepare.cuh"

#include <map>
#include <memory>

#include "cuda/launch.cuh"

namespace fusedopt::cuda {
namespace {

template <class Rule>
PreparedGroup<Rule> prepared(const GroupDesc& group, const DeviceLr& lr) {
  PreparedGroup<Rule> filled{};
  memcpy(&filled.config, group.config, sizeof filled.config);
  filled.lr = lr.data;
  filled.lr_is_double = lr.is_double;
  filled.seed = group.seed;
  filled.grad_multiplier = group.grad_multiplier;
  return filled;
}

template <class Rule>
void launch_prepare(const Listed& listed, const std::vector<DeviceLr>& lrs, const Scaling& scaling,
                    Normalization* normalizations, bool counts, cudaStream_t stream) {
  using Params = PrepareParams<Rule>;
  static_assert(sizeof(Params) <= kParameterBytes);
  const auto params = std::make_unique<Params>();
  params->scaling = scaling;
  params->counts = counts;
  params->count = 0;
  std::map<int32_t, int32_t> places;  // of groups in the launch
  size_t first = 0;
  const auto flush = [&] {
    if (params->count == 0) return;
    params->derived = reinterpret_cast<Derived<Rule>*>(listed.derived) + first;
    launch(prepare_kernel<Rule>, divided_up(params->count, kPrepareThreads), kPrepareThreads, stream, *params);
    first += params->count;
    params->count = 0;
    places.clear();
  };
  for (size_t i = 0; i < listed.tensors.size(); ++i) {
    const TensorDesc& tensor = listed.batch.tensors[listed.tensors[i]];
    const bool is_new = places.count(tensor.group) == 0;
    if (params->count == Params::kCapacity || (is_new && places.size() == kPreparedGroups)) flush();
    const auto [place, inserted] = places.try_emplace(tensor.group, static_cast<int32_t>(places.size()));
    if (inserted) {
      params->groups[place->second] = prepared<Rule>(listed.batch.groups[tensor.group], lrs[tensor.group]);
    }
    PreparedTensor<Rule>& filled = params->tensors[params->count++];
    filled.step = tensor.step;
    filled.group = place->second;
    if constexpr (kIsNormalizing<Rule>) {
      filled.normalization = normalizations + i;
      filled.numel = tensor.numel;
      filled.dtype = tensor.param.dtype;
    }
  }
  flush();
}

}  // namespace

#define FUSEDOPT_PREPARE(name, type) launch_prepare<type>,
const PrepareFn kPrepare[] = {FUSEDOPT_RULES(FUSEDOPT_PREPARE)};

}  // namespace fusedopt::cuda
