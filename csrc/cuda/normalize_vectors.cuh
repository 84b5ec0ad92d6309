// Sums over tensors that have a second moment for each element, before the step of a rule that normalizes: those of
// cpu/normalize.inl, in the same order.
#pragma once

#include "cuda/normalize_chunks.cuh"
#include "storage/blockwise8.h"

namespace fusedopt::cuda {
namespace {

template <bool kClamped>
FUSEDOPT_DEVICE double vector_update_sum(const NormalizedVector& v, const Normalization& known, int64_t begin,
                                         int length) {
  const Moments moments = known.moments;
  const float multiplier = known.multiplier;
  float* second = static_cast<float*>(v.second) + begin;
  return chunk_sum_of_grads<8>(
      v, length, [=](const auto& grad, int i) { return GradAnd{grad(begin + i), second[i]}; },
      [=](const GradAnd& x, int i) {
        const float moved = second_moment<kClamped>(x.other, x.grad * multiplier, moments);
        second[i] = moved;
        return normalize<kClamped>(x.grad * multiplier, moved, moments);
      });
}

// Calls use(second), second(i) being the second moment of element i before the step.
template <class Use>
FUSEDOPT_DEVICE void with_second_moments(const NormalizedVector& v, const Use& use) {
  if (v.second_dtype != DType::kUInt8) return with_numbers(v.second, v.second_dtype, use);
  const auto* codes = static_cast<const uint8_t*>(v.second);
  const uint8_t* scales = v.scales;
  const int64_t row = v.row, row_blocks = divided_up(row, kBlock);
  use([=](int64_t i) {
    const int64_t line = i < row ? 0 : i / row;
    const uint8_t scale = scales[line * row_blocks + (i - line * row) / kBlock];
    return Square8<false>::decode(codes[i], Square8<false>::unit_of(scale));
  });
}

// Where the step brings second moments up to date: they are only read.
FUSEDOPT_DEVICE double quotient_sum(const NormalizedVector& v, const Normalization& known, int64_t begin, int length) {
  const Moments moments = known.moments;
  const float multiplier = known.multiplier;
  double sum = 0.0;
  with_second_moments(v, [&](const auto& second) {
    sum = chunk_sum_of_grads<8>(
        v, length, [=](const auto& grad, int i) { return GradAnd{grad(begin + i), second(begin + i)}; },
        [=](const GradAnd& x, int) {
          const float grad = x.grad * multiplier;
          return normalize<true>(grad, second_moment<true>(x.other, grad, moments), moments);
        });
  });
  return sum;
}

// Brings second moments up to date on the way, unless the step does.
__global__ void __launch_bounds__(kSumThreads) vector_kernel(const __grid_constant__ VectorParams params) {
  const NormalizedVector& v = tensor_of_block(params);
  const Normalization& known = params.normalizations[v.index];
  if (known.skips) return;
  const int64_t chunk = thread_of(v) / kSumLanes, begin = chunk * kReductionChunk;
  const int length = length_of_chunk(begin, v.numel);
  const bool is_first = sum_lane() == 0 && length > 0;
  const double sum = !v.takes_quotient          ? quotient_sum(v, known, begin, length)
                     : known.moments.is_clamped ? vector_update_sum<true>(v, known, begin, length)
                                                : vector_update_sum<false>(v, known, begin, length);
  if (is_first) v.update_sums[chunk] = sum;
  if (v.param_sums == nullptr) return;
  const double weights = chunk_sum_of_weights<8>(v, begin, length);
  if (is_first) v.param_sums[chunk] = weights;
}

}  // namespace
}  // namespace fusedopt::cuda
