// Sums of squares of gradients for their norm: the additions of cpu/reduce.inl and fusedopt/reference/norm.py, in the
// same order, so the norm has the same bits.
#pragma once

#include "cuda/descriptors.h"
#include "cuda/lane.cuh"

namespace fusedopt::cuda {

constexpr int kSumLanes = 16;    // of a chunk, each summed in order
constexpr int kSumChunk = 4096;  // elements
constexpr int kSumThreads = 256;
constexpr int kBlockChunks = kSumThreads / kSumLanes;
constexpr int kPairs = 2048;  // numbers that a block adds in pairs: a power of two

struct SummedTensor {
  const void* data;
  int64_t numel;
  int64_t first_chunk;   // where its sums go
  uint32_t first_block;  // of the launch
  uint32_t dtype;
};

constexpr int kSummedTensors = (kParameterBytes - 64) / static_cast<int>(sizeof(SummedTensor));

struct SumParams {
  double* sums;
  int32_t count;
  SummedTensor tensors[kSummedTensors];
};

namespace {

FUSEDOPT_DEVICE float number_at(const void* data, DType dtype, int64_t i) {
  if (dtype == DType::kFloat32) return static_cast<const float*>(data)[i];
  const uint16_t code = static_cast<const uint16_t*>(data)[i];
  return dtype == DType::kBFloat16 ? BFloat16::decode(code) : Float16::decode(code);
}

// The sum of 16 lanes' sums, in pairs; all lanes of the warp come here, and lane 0 of each half gets it.
FUSEDOPT_DEVICE double total_of_lanes(double sum) {
#pragma unroll
  for (int other = 1; other < kSumLanes; other *= 2) {
    sum = sum + __shfl_down_sync(0xFFFFFFFFu, sum, other);
  }
  return sum;
}

// The sum of the squares of `length` numbers from `begin`, of which `lane` adds every 16th.
FUSEDOPT_DEVICE double lane_square_sum(const void* data, DType dtype, int64_t begin, int length, int lane) {
  double sum = 0.0;
#pragma unroll 8
  for (int i = lane; i < length; i += kSumLanes) {
    const double x = static_cast<double>(number_at(data, dtype, begin + i));
    sum = sum + x * x;  // the product is exact
  }
  return sum;
}

__global__ void __launch_bounds__(kSumThreads) square_sum_kernel(const __grid_constant__ SumParams params) {
  const SummedTensor& tensor = params.tensors[find_tensor(params.tensors, params.count, blockIdx.x)];
  const int lane = static_cast<int>(threadIdx.x % kSumLanes);
  const int64_t chunk = static_cast<int64_t>(blockIdx.x - tensor.first_block) * kBlockChunks + threadIdx.x / kSumLanes;
  const int64_t begin = chunk * kSumChunk, left = tensor.numel - begin;
  const int length = static_cast<int>(left < 0 ? 0 : left < kSumChunk ? left : kSumChunk);
  const double sum =
      total_of_lanes(lane_square_sum(tensor.data, static_cast<DType>(tensor.dtype), begin, length, lane));
  if (lane == 0 && length > 0) params.sums[tensor.first_chunk + chunk] = sum;
}

// Each block adds 2,048 numbers in pairs, an odd one out moving up. As all blocks but the last are full, doing the same
// to the blocks' sums gives what pairs over all numbers give.
__global__ void __launch_bounds__(kSumThreads) pairwise_kernel(const double* numbers, int64_t count, double* sums) {
  __shared__ double held[kPairs];
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kPairs, left = count - begin;
  int n = static_cast<int>(left < kPairs ? left : kPairs);
  for (int i = static_cast<int>(threadIdx.x); i < n; i += kSumThreads) held[i] = numbers[begin + i];
  __syncthreads();
  while (n > 1) {
    const int half = n / 2;
    // Sums move down: into the first halves of pairs that others read only after a barrier.
    double added[kPairs / 2 / kSumThreads];
#pragma unroll
    for (int k = 0; k < kPairs / 2 / kSumThreads; ++k) {
      const int i = static_cast<int>(threadIdx.x) + k * kSumThreads;
      if (i < half) added[k] = held[2 * i] + held[2 * i + 1];
    }
    const double last = held[n - 1];
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kPairs / 2 / kSumThreads; ++k) {
      const int i = static_cast<int>(threadIdx.x) + k * kSumThreads;
      if (i < half) held[i] = added[k];
    }
    if (n % 2 == 1 && threadIdx.x == 0) held[half] = last;
    n = half + n % 2;
    __syncthreads();
  }
  if (threadIdx.x == 0) sums[blockIdx.x] = held[0];
}

}  // namespace
}  // namespace fusedopt::cuda
