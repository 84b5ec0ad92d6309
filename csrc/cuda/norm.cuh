// Sums of squares of gradients for their norm.
#pragma once

#include "cuda/descriptors.h"
#include "cuda/reduce.cuh"

namespace fusedopt::cuda {

struct SummedTensor {
  const void* data;
  int64_t numel;
  int64_t first_chunk;   // where its sums go
  uint32_t first_block;  // of the launch
  DType dtype;
};

constexpr int kSummedTensors = (kParameterBytes - 64) / static_cast<int>(sizeof(SummedTensor));

struct SumParams {
  double* sums;
  int32_t count;
  SummedTensor tensors[kSummedTensors];
};

namespace {

__global__ void __launch_bounds__(kSumThreads) square_sum_kernel(const __grid_constant__ SumParams params) {
  const SummedTensor& tensor = params.tensors[find_tensor(params.tensors, params.count, blockIdx.x)];
  const int lane = static_cast<int>(threadIdx.x % kSumLanes);
  const int64_t chunk = static_cast<int64_t>(blockIdx.x - tensor.first_block) * kBlockChunks + threadIdx.x / kSumLanes;
  const int64_t begin = chunk * kReductionChunk;
  const int length = length_of_chunk(begin, tensor.numel);
  double sum = 0.0;
  with_numbers(tensor.data, tensor.dtype, [&](const auto& number) {
    const auto load = [&](int i) { return number(begin + i); };
    sum = lane_square_sum<8>(length, lane, load, [](float x, int) { return x; });
  });
  sum = total_of_lanes(sum);
  if (lane == 0 && length > 0) params.sums[tensor.first_chunk + chunk] = sum;
}

// Each block adds 2,048 numbers in pairs; their sums are added in the same way, and so on.
__global__ void __launch_bounds__(kSumThreads) pairwise_kernel(const double* numbers, int64_t count, double* sums) {
  __shared__ double held[kPairs];
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kPairs;
  const double sum = sum_of_pairs(numbers + begin, count - begin, held);
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

}  // namespace
}  // namespace fusedopt::cuda
