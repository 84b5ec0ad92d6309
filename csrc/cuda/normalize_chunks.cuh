// Sums of squares over chunks of tensors, in whatever formats these are.
#pragma once

#include "cuda/lane.cuh"
#include "cuda/normalize_tensors.h"
#include "cuda/reduce.cuh"

namespace fusedopt::cuda {
namespace {

template <class Tensor>
FUSEDOPT_DEVICE const Tensor& tensor_of_block(const NormalizeParams<Tensor>& params) {
  return params.tensors[find_tensor(params.tensors, params.count, blockIdx.x)];
}

// The number of a thread among those of its tensor.
template <class Tensor>
FUSEDOPT_DEVICE int64_t thread_of(const Tensor& tensor) {
  return static_cast<int64_t>(blockIdx.x - tensor.first_block) * blockDim.x + threadIdx.x;
}

FUSEDOPT_DEVICE int sum_lane() { return static_cast<int>(threadIdx.x % kSumLanes); }

// Calls use(weight), weight(i) being element i in full precision. The kind of master is known in each call, so that
// loads do not wait for branches.
template <class Use>
FUSEDOPT_DEVICE void with_weights(const NormalizedBuffers& tensor, const Use& use) {
  const auto with_master = [&](auto kind) {
    Formats formats = tensor.formats;
    formats.master_kind = static_cast<uint32_t>(kind());
    use([=, &tensor](int64_t i) {
      Raw param, master;
      load_one(tensor.param, formats.param(), i, param);
      load_one(tensor.master, formats.master(), i, master);
      float w[kLane];
      decode_param(param, master, formats, w);
      return w[0];
    });
  };
  switch (tensor.formats.master_format()) {
    case Master::kNone:
      with_numbers(tensor.param, tensor.formats.param(), use);
      break;
    case Master::kKahan:
      with_master(std::integral_constant<Master, Master::kKahan>{});
      break;
    case Master::kSplit24:
      with_master(std::integral_constant<Master, Master::kSplit24>{});
      break;
    case Master::kSplit32:
      with_master(std::integral_constant<Master, Master::kSplit32>{});
      break;
    case Master::kFloat32:
      with_master(std::integral_constant<Master, Master::kFloat32>{});
      break;
  }
}

// The sum of the squares of a chunk, added by 16 threads; the first of them gets it, and all threads of a warp call
// this. `with` is with_numbers or with_weights, bound to a tensor; see lane_square_sum for the other arguments.
template <int kLoads, class With, class Load, class Value>
FUSEDOPT_DEVICE double chunk_square_sum(const With& with, int length, const Load& load, const Value& value) {
  double sum = 0.0;
  with([&](const auto& number) {
    sum = lane_square_sum<kLoads>(length, sum_lane(), [&](int i) { return load(number, i); }, value);
  });
  return total_of_lanes(sum);
}

// Of gradients as they are loaded.
template <int kLoads, class Load, class Value>
FUSEDOPT_DEVICE double chunk_sum_of_grads(const NormalizedBuffers& tensor, int length, const Load& load,
                                          const Value& value) {
  return chunk_square_sum<kLoads>([&](const auto& use) { with_numbers(tensor.grad, tensor.formats.grad(), use); },
                                  length, load, value);
}

// Of gradients times a multiplier.
template <int kLoads>
FUSEDOPT_DEVICE double chunk_sum_of_grads(const NormalizedBuffers& tensor, int64_t begin, int length,
                                          float multiplier) {
  return chunk_sum_of_grads<kLoads>(
      tensor, length, [=](const auto& grad, int i) { return grad(begin + i); },
      [=](float g, int) { return g * multiplier; });
}

template <int kLoads>
FUSEDOPT_DEVICE double chunk_sum_of_weights(const NormalizedBuffers& tensor, int64_t begin, int length) {
  return chunk_square_sum<kLoads>([&](const auto& use) { with_weights(tensor, use); }, length,
                                  [=](const auto& weight, int i) { return weight(begin + i); },
                                  [](float w, int) { return w; });
}

// A gradient and what else is needed to normalize it.
struct GradAnd {
  float grad, other;
};

}  // namespace
}  // namespace fusedopt::cuda
