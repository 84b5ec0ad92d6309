// Launches THE kernel for the tensors of a rule: those with codes, or those without.
#pragma once

#include <memory>

#include "cuda/launch.cuh"
#include "cuda/tile.cuh"

namespace fusedopt::cuda {
namespace {

inline bool lies_on_16(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

inline Formats formats_of(const TensorDesc& tensor, int states, int64_t row) {
  Formats formats{};
  formats.param = static_cast<uint32_t>(tensor.param.dtype);
  formats.grad = static_cast<uint32_t>(tensor.grad.dtype);
  formats.master = static_cast<uint32_t>(tensor.master.dtype);
  formats.master_format = static_cast<uint32_t>(tensor.master_format);
  formats.rounds_param = tensor.param.rounding == Rounding::kStochastic;
  bool aligned = lies_on_16(tensor.param.data) && lies_on_16(tensor.grad.data) && lies_on_16(tensor.master.data) &&
                 (row == tensor.numel || row % kLane == 0);
  bool has_float32 = tensor.param.dtype == DType::kFloat32 || tensor.grad.dtype == DType::kFloat32 ||
                     (tensor.master_format != Master::kNone && tensor.master.dtype == DType::kFloat32);
  for (int k = 0; k < states; ++k) {
    const Buffer& state = tensor.states[k];
    formats.states |= static_cast<uint32_t>(state.dtype) << (3 * k);
    formats.rounds_states |= static_cast<uint32_t>(state.rounding == Rounding::kStochastic) << k;
    aligned = aligned && lies_on_16(state.data);
    has_float32 = has_float32 || state.dtype == DType::kFloat32;
  }
  formats.is_aligned = aligned;
  formats.is_split = has_float32;
  return formats;
}

template <class Rule, bool kQuantized>
void fill(const TensorDesc& tensor, DeviceTensor<Rule, kQuantized>& filled) {
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
    filled.row_factors = tensor.scratch->row_factors;
    filled.column_factors = tensor.scratch->column_factors;
    filled.row_count = tensor.factors.row_count;
    filled.column_count = tensor.factors.column_count;
  }
}

template <class Rule, bool kQuantized>
void launch_steps(const Listed& listed, cudaStream_t stream) {
  using Params = StepParams<Rule, kQuantized>;
  static_assert(sizeof(Params) <= kParameterBytes && sizeof(Derived<Rule>) <= kDerivedBytes);
  const auto params = std::make_unique<Params>();
  params->derived = reinterpret_cast<const Derived<Rule>*>(listed.derived);
  params->count = 0;
  int64_t blocks = 0;
  const auto flush = [&] {
    if (params->count == 0) return;
    launch(step_kernel<Rule, kQuantized>, blocks, kThreads, stream, *params);
    params->count = 0;
    blocks = 0;
  };
  for (size_t i = 0; i < listed.tensors.size(); ++i) {
    const TensorDesc& tensor = listed.batch.tensors[listed.tensors[i]];
    if (tensor.numel == 0 || is_quantized(tensor, Rule::kStates) != kQuantized) continue;
    auto& filled = params->tensors[params->count++];
    fill(tensor, filled);
    filled.index = static_cast<int32_t>(i);
    filled.first_block = static_cast<uint32_t>(blocks);
    const int64_t tiles = tensor.numel / filled.row * divided_up(filled.row, kTile);
    blocks += divided_up(tiles, kBlockTiles);
    if (params->count == kTensorsOfLaunch<Rule, kQuantized>) flush();
  }
  flush();
}

}  // namespace
}  // namespace fusedopt::cuda
