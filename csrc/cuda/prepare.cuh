// What a step derives before it begins, with one thread per tensor: on the device, so that nothing waits for step
// counts, learning rates or the gradient norm. It also counts the step.
#pragma once

#include "cuda/descriptors.h"
#include "cuda/lane.cuh"
#include "cuda/prepare.h"
#include "rules/all.h"

namespace fusedopt::cuda {

// Of rules that normalize.
template <bool kNormalizes>
struct PreparedSums {
  Normalization* normalization;
  int64_t numel;
  DType dtype;
};
template <>
struct PreparedSums<false> {};

template <class Rule>
struct PreparedTensor : PreparedSums<kIsNormalizing<Rule>> {
  float* step;
  int32_t group;  // of the launch
};

constexpr int kPrepareThreads = 64;

template <class Rule>
struct PreparedGroup {
  typename Rule::Config config;
  const void* lr;  // on the device, or null
  int32_t lr_is_double;
  uint32_t seed;
  double grad_multiplier;
};

constexpr int kPreparedGroups = kParameterBytes > 4096 ? 32 : 4;

template <class Rule>
struct PrepareParams {
  static constexpr int kCapacity = static_cast<int>(
      (kParameterBytes - 128 - kPreparedGroups * sizeof(PreparedGroup<Rule>)) / sizeof(PreparedTensor<Rule>));
  Scaling scaling;
  Derived<Rule>* derived;  // of the first tensor
  int32_t count;
  int32_t counts;  // the step; 0 when hyperparameters are derived once more, from sums
  PreparedGroup<Rule> groups[kPreparedGroups];
  PreparedTensor<Rule> tensors[kCapacity];
};

namespace {

template <class Rule>
FUSEDOPT_DEVICE typename Rule::Config config_of(const PreparedGroup<Rule>& group) {
  typename Rule::Config config = group.config;
  if (group.lr != nullptr) {
    config.lr = group.lr_is_double ? *static_cast<const double*>(group.lr)
                                   : static_cast<double>(*static_cast<const float*>(group.lr));
  }
  return config;
}

template <class Rule>
FUSEDOPT_DEVICE typename Rule::Hyper derive(const typename Rule::Config& config, int64_t step,
                                            const PreparedTensor<Rule>& tensor) {
  if constexpr (kIsNormalizing<Rule>) {
    const Normalization& found = *tensor.normalization;
    return Rule::derive(config, step, {found.param, found.update, tensor.numel, tensor.dtype});
  } else {
    return Rule::derive(config, step);
  }
}

// What gradients are multiplied by, and whether no step is to be taken.
struct Decision {
  double multiplier;
  int32_t skips;
};

// Inverse loss scale x clip coefficient, by the operations of fusedopt/engine/gather.py.
FUSEDOPT_DEVICE Decision decide(const Scaling& scaling, float* grad_norm) {
  const bool found_inf = scaling.found_inf != nullptr && *scaling.found_inf != 0.0f;
  const double multiplier = scaling.grad_scale == nullptr ? 1.0 : 1.0 / static_cast<double>(*scaling.grad_scale);
  if (scaling.square_sum == nullptr) return {multiplier, found_inf};
  const double norm = root(*scaling.square_sum) * multiplier;
  if (grad_norm != nullptr) *grad_norm = static_cast<float>(norm);
  const bool is_above = scaling.skip_above < HUGE_VAL && !(norm <= scaling.skip_above);
  const double coefficient = scaling.max_grad_norm / (norm + kClipEps);
  return {multiplier * (coefficient > 1.0 ? 1.0 : coefficient), found_inf || is_above};  // NaN stays NaN
}

template <class Rule>
__global__ void prepare_kernel(const __grid_constant__ PrepareParams<Rule> params) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= params.count) return;
  const PreparedTensor<Rule>& tensor = params.tensors[i];
  const PreparedGroup<Rule>& group = params.groups[tensor.group];
  Derived<Rule>& derived = params.derived[i];
  const auto [multiplier, skips] = decide(params.scaling, i == 0 ? params.scaling.grad_norm : nullptr);
  derived.skips = skips;
  if constexpr (kIsNormalizing<Rule>) {
    tensor.normalization->skips = derived.skips;
    if (params.counts) tensor.normalization->param = tensor.normalization->update = 0.0;
  }
  if (derived.skips) return;
  const int64_t step = static_cast<int64_t>(*tensor.step) + params.counts;
  derived.hyper = derive<Rule>(config_of(group), step, tensor);
  derived.grad_multiplier = static_cast<float>(group.grad_multiplier * multiplier);
  if constexpr (kIsNormalizing<Rule>) {
    tensor.normalization->moments = derived.hyper.moments;
    tensor.normalization->multiplier = derived.grad_multiplier;
  }
  fill_stream_keys(group.seed, step, derived.stream_keys);
  if (params.counts) *tensor.step += 1.0f;
}

}  // namespace
}  // namespace fusedopt::cuda
