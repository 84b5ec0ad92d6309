// Sums by chunk: of the squares of gradients, for their norm, and of the sums that blocks of weights have (sums.cuh).
#pragma once

#include <type_traits>

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

constexpr int kNormThreads = 64;

// The numbers of a chunk are rows of 16, one for each lane of its sum. A thread adds as many lanes as it loads at once.
constexpr int lanes_of_thread(DType dtype) { return 16 / static_cast<int>(size_of(dtype)); }

// How many chunks a block sums.
constexpr int chunks_of_block(DType dtype) { return kNormThreads * lanes_of_thread(dtype) / kSumLanes; }

namespace {

// The sum of a chunk, of its numbers or of their squares, for the first of the threads that share it. All threads of a
// warp call this.
template <DType kDType, bool kSquares>
FUSEDOPT_DEVICE double sum_of_chunk(const void* data, int64_t begin, int length) {
  using Number = std::conditional_t<kDType == DType::kFloat32, uint32_t, uint16_t>;
  constexpr int kLanes = lanes_of_thread(kDType), kLoads = 8;
  const int first = static_cast<int>(threadIdx.x) * kLanes % kSumLanes;
  const Number* numbers = static_cast<const Number*>(data) + begin + first;
  double sums[kLanes] = {};
  // Zeros fill up the last row: they change no sum.
  const auto add_rows = [&](const auto& load) {
    for_each_loaded<kLoads>(0, static_cast<int>(divided_up(length, kSumLanes)), 1, load, [&](const Raw& raw, int, int) {
#pragma unroll
      for (int lane = 0; lane < kLanes; ++lane) {
        const float number = kDType == DType::kFloat32    ? float_of(raw.words[lane])
                             : kDType == DType::kBFloat16 ? BFloat16::decode(raw.get<uint16_t>(lane))
                                                          : Float16::decode(raw.get<uint16_t>(lane));
        sums[lane] = kSquares ? with_square(sums[lane], number) : sums[lane] + static_cast<double>(number);
      }
    });
  };
  if (length == kReductionChunk && reinterpret_cast<uintptr_t>(data) % 16 == 0) {
    add_rows([&](int row) {
      Raw raw;
      load_words<4>(numbers + row * kSumLanes, raw.words);
      return raw;
    });
  } else {
    rarely();
    add_rows([&](int row) {
      Raw raw;
#pragma unroll
      for (int lane = 0; lane < kLanes; ++lane) {
        const int at = row * kSumLanes + lane;
        raw.set(lane, first + at < length ? numbers[at] : Number{});
      }
      return raw;
    });
  }
#pragma unroll
  for (int width = kLanes / 2; width > 0; width /= 2) {
#pragma unroll
    for (int lane = 0; lane < width; ++lane) sums[lane] = sums[2 * lane] + sums[2 * lane + 1];
  }
  return total_of_lanes<kSumLanes / kLanes>(sums[0]);
}

template <DType kDType, bool kSquares>
FUSEDOPT_DEVICE void sum_chunks(const SumParams& params, const SummedTensor& tensor) {
  const int thread = static_cast<int>(threadIdx.x) * lanes_of_thread(kDType);
  const int64_t chunk =
      static_cast<int64_t>(blockIdx.x - tensor.first_block) * chunks_of_block(kDType) + thread / kSumLanes;
  const int64_t begin = chunk * kReductionChunk;
  const int length = length_of_chunk(begin, tensor.numel);
  const double sum = sum_of_chunk<kDType, kSquares>(tensor.data, begin, length);
  if (thread % kSumLanes == 0 && length > 0) params.sums[tensor.first_chunk + chunk] = sum;
}

__global__ void __launch_bounds__(kNormThreads) square_sum_kernel(const __grid_constant__ SumParams params) {
  const SummedTensor& tensor = params.tensors[find_tensor(params.tensors, params.count, blockIdx.x)];
  if (tensor.dtype == DType::kFloat32) {
    sum_chunks<DType::kFloat32, true>(params, tensor);
  } else if (tensor.dtype == DType::kBFloat16) {
    sum_chunks<DType::kBFloat16, true>(params, tensor);
  } else {
    sum_chunks<DType::kFloat16, true>(params, tensor);
  }
}

// Of numbers in float32.
__global__ void __launch_bounds__(kNormThreads) number_sum_kernel(const __grid_constant__ SumParams params) {
  sum_chunks<DType::kFloat32, false>(params, params.tensors[find_tensor(params.tensors, params.count, blockIdx.x)]);
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
