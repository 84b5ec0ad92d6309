// Launches THE kernel for the tensors of a rule: those that are stepped row by row, or the others.
#pragma once

#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#include "cuda/launch.cuh"
#include "cuda/tile.cuh"

namespace fusedopt::cuda {
namespace {

template <class Rule, bool kQuantized>
void fill(const TensorDesc& tensor, const NormalizeScratch* scratch, DeviceTensor<Rule, kQuantized>& filled) {
  filled.param = tensor.param.data;
  filled.grad = tensor.grad.data;
  for (int k = 0; k < Rule::kStates; ++k) {
    filled.states[k] = tensor.states[k].data;
    if constexpr (kQuantized) filled.scales[k] = tensor.states[k].scales;
  }
  filled.master = tensor.master.data;
  filled.numel = tensor.numel;
  filled.row = block_row(tensor);
  if constexpr (kQuantized) filled.row_gap = tensor.segment == 0 ? 0 : tensor.segment_stride - tensor.segment;
  filled.first_index = tensor.first_index;
  filled.formats = formats_of(tensor, Rule::kStates, filled.row);
  if constexpr (is_factored<Rule>()) {
    filled.row_factors = scratch->row_factors;
    filled.column_factors = scratch->column_factors;
    filled.row_count = tensor.factors.row_count;
    filled.column_count = tensor.factors.column_count;
  }
}

// Whether tensors of a rule may have these formats; if not, there is no kernel. Without states, one of the lists of
// formats that differ in states is enough; second moments that are up to date before the step are float32. Three states
// in codes, none of whose roots the rule has at hand, need more registers than the usual kernels have: the general one
// takes them.
template <class Rule, class TensorFormats>
constexpr bool kMayHave = true;
template <class Rule, DType kParam, Master kMaster, DType kState>
constexpr bool kMayHave<Rule, UsualFormats<kParam, kMaster, kState>> =
    Rule::kStates == 0 ? kState == kParam
                       : (!has_new_second_moment<Rule>() || kState == DType::kFloat32) &&
                             !(kState == DType::kUInt8 && Rule::kStates > 2 && Rule::kRooted < 0);

template <class Rule, bool kQuantized>
struct Kernel {
  bool (*fits)(const Formats&, int states);
  void (*function)(StepParams<Rule, kQuantized>);
};

// Emulated kernels take minutes to compile, so tests may ask for few: a rule then has kernels for every other one of
// the usual formats, so that each rule meets some formats and each format some rules. The general kernel steps the
// rest.
#ifdef FUSEDOPT_FEW_KERNELS
constexpr size_t kEvery = 2;
#else
constexpr size_t kEvery = 1;
#endif

template <class Rule, bool kQuantized, class... Each, size_t... kPlaces>
std::vector<Kernel<Rule, kQuantized>> kernels_for(FormatsList<Each...>, std::index_sequence<kPlaces...>) {
  std::vector<Kernel<Rule, kQuantized>> kernels;
  const auto add = [&](auto* formats, auto place) {
    using TensorFormats = std::remove_pointer_t<decltype(formats)>;
    constexpr bool kIsGeneral = std::is_same_v<TensorFormats, Formats>;
    if constexpr (kIsGeneral || (kMayHave<Rule, TensorFormats> && (place() + Rule::kStates) % kEvery == 0)) {
      kernels.push_back({TensorFormats::fit, step_kernel<Rule, kQuantized, TensorFormats>});
    }
  };
  (add(static_cast<Each*>(nullptr), std::integral_constant<size_t, kPlaces>{}), ...);
  return kernels;
}

template <class Rule, bool kQuantized, class... Each>
std::vector<Kernel<Rule, kQuantized>> kernels_for(FormatsList<Each...> list) {
  return kernels_for<Rule, kQuantized>(list, std::index_sequence_for<Each...>{});
}

// A launch for each of the formats that tensors have. The last kernel takes any, and it alone can sum squares.
template <class Rule, bool kQuantized>
void launch_steps(const Listed& listed, cudaStream_t stream) {
  using Params = StepParams<Rule, kQuantized>;
  static_assert(sizeof(Params) <= kParameterBytes && sizeof(Derived<Rule>) <= kDerivedBytes);
  const auto kernels = kernels_for<Rule, kQuantized>(std::conditional_t<kQuantized, QuantizedFormats, DenseFormats>{});
  std::vector<std::unique_ptr<Packed<Params>>> launches(kernels.size());
  for (size_t i = 0; i < listed.tensors.size(); ++i) {
    const TensorDesc& tensor = listed.batch.tensors[listed.tensors[i]];
    if (tensor.numel == 0 || is_quantized(tensor, Rule::kStates) != kQuantized) continue;
    DeviceTensor<Rule, kQuantized> filled{};
    fill(tensor, is_factored<Rule>() ? &listed.scratch[i] : nullptr, filled);
    filled.index = static_cast<int32_t>(i);
    if (listed.summing != nullptr) filled.first_four = listed.summing->first_fours[listed.tensors[i]];
    size_t k = listed.summing != nullptr ? kernels.size() - 1 : 0;
    while (!kernels[k].fits(filled.formats, Rule::kStates)) ++k;
    if (!launches[k]) {
      launches[k] = std::make_unique<Packed<Params>>(kernels[k].function, kThreads, stream);
      launches[k]->params->derived = reinterpret_cast<const Derived<Rule>*>(listed.derived);
      launches[k]->params->sums = listed.summing != nullptr ? listed.summing->blocks : BlockSums{};
    }
    const int64_t tiles = tensor.numel / filled.row * divided_up(filled.row, kTile);
    launches[k]->add(filled, divided_up(tiles, kBlockTiles));
  }
  for (const auto& launch : launches) {
    if (launch) launch->flush();
  }
}

}  // namespace
}  // namespace fusedopt::cuda
