// Launches THE kernel for the tensors of a rule: those with codes, or those without.
#pragma once

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
  filled.row = kQuantized ? tensor.row : tensor.numel;
  filled.first_index = tensor.first_index;
  filled.formats = formats_of(tensor, Rule::kStates, filled.row);
  if constexpr (is_factored<Rule>()) {
    filled.row_factors = scratch->row_factors;
    filled.column_factors = scratch->column_factors;
    filled.row_count = tensor.factors.row_count;
    filled.column_count = tensor.factors.column_count;
  }
}

template <class Rule, bool kQuantized>
void launch_steps(const Listed& listed, cudaStream_t stream) {
  using Params = StepParams<Rule, kQuantized>;
  static_assert(sizeof(Params) <= kParameterBytes && sizeof(Derived<Rule>) <= kDerivedBytes);
  Packed<Params> packed(step_kernel<Rule, kQuantized>, kThreads, stream);
  packed.params->derived = reinterpret_cast<const Derived<Rule>*>(listed.derived);
  for (size_t i = 0; i < listed.tensors.size(); ++i) {
    const TensorDesc& tensor = listed.batch.tensors[listed.tensors[i]];
    if (tensor.numel == 0 || is_quantized(tensor, Rule::kStates) != kQuantized) continue;
    DeviceTensor<Rule, kQuantized> filled{};
    fill(tensor, is_factored<Rule>() ? &listed.scratch[i] : nullptr, filled);
    filled.index = static_cast<int32_t>(i);
    const int64_t tiles = tensor.numel / filled.row * divided_up(filled.row, kTile);
    packed.add(filled, divided_up(tiles, kBlockTiles));
  }
  packed.flush();
}

}  // namespace
}  // namespace fusedopt::cuda
