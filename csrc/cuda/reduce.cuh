// Sums in double, with the additions of cpu/reduce.inl and fusedopt/reference/norm.py in the same order, so they have
// the same bits: chunks in 16 lanes, lanes and chunks in pairs.
#pragma once

#include "core/pairwise.h"
#include "cuda/descriptors.h"
#include "cuda/lane.cuh"

namespace fusedopt::cuda {

constexpr int kSumThreads = 256;
constexpr int kBlockChunks = kSumThreads / kSumLanes;  // that a block of 16 lanes each takes
constexpr int kPairs = 2048;                           // numbers that a block adds in pairs: a power of two

namespace {

// Calls use(number), where number(i) is element i. Each format has a loop of its own, whose loads do not wait for
// branches.
template <class Use>
FUSEDOPT_DEVICE void with_numbers(const void* data, DType dtype, const Use& use) {
  const auto* codes = static_cast<const uint16_t*>(data);
  if (dtype == DType::kFloat32) {
    use([=](int64_t i) { return static_cast<const float*>(data)[i]; });
  } else if (dtype == DType::kBFloat16) {
    use([=](int64_t i) { return BFloat16::decode(codes[i]); });
  } else {
    use([=](int64_t i) { return Float16::decode(codes[i]); });
  }
}

// The sum of the sums of kCount threads, in pairs; all lanes of the warp call this, and the first of those threads
// gets it.
template <int kCount = kSumLanes>
FUSEDOPT_DEVICE double total_of_lanes(double sum) {
#pragma unroll
  for (int other = 1; other < kCount; other *= 2) {
    sum = sum + __shfl_down_sync(0xFFFFFFFFu, sum, other);
  }
  return sum;
}

// sum + x x. The product is exact in double, so rounding once gives the same.
FUSEDOPT_DEVICE double with_square(double sum, float x) {
  return __fma_rn(static_cast<double>(x), static_cast<double>(x), sum);
}

// Calls use(load(i), i, k) for every `stride`th i from `first` on, in order, with kLoads loads under way at once; k
// counts these. Loads are kept apart from their use, because the compiler moves no load across a branch or a store.
template <int kLoads, class Load, class Use>
FUSEDOPT_DEVICE void for_each_loaded(int first, int end, int stride, const Load& load, const Use& use) {
  const auto take = [&](auto is_whole) {
    decltype(load(first)) held[kLoads];
#pragma unroll
    for (int k = 0; k < kLoads; ++k) {
      const int i = first + k * stride;
      held[k] = is_whole() || i < end ? load(i) : decltype(load(first)){};
    }
#pragma unroll
    for (int k = 0; k < kLoads; ++k) {
      const int i = first + k * stride;
      if (is_whole() || i < end) use(held[k], i, k);
    }
  };
#pragma unroll 1
  for (; first + (kLoads - 1) * stride < end; first += kLoads * stride) take(std::true_type{});
  if (first < end) take(std::false_type{});
}

// What `lane` adds of the squares of `length` numbers: every 16th. Number i is value(load(i), i).
template <int kLoads, class Load, class Value>
FUSEDOPT_DEVICE double lane_square_sum(int length, int lane, const Load& load, const Value& value) {
  double sum = 0.0;
  for_each_loaded<kLoads>(lane, length, kSumLanes, load, [&](const auto& loaded, int i, int) {
    const double x = static_cast<double>(value(loaded, i));
    sum = sum + x * x;  // with_square would be the same, but slab_kernel would spill
  });
  return sum;
}

// How many elements a chunk has that begins at `begin`.
FUSEDOPT_DEVICE int length_of_chunk(int64_t begin, int64_t end) {
  const int64_t left = end - begin;
  return static_cast<int>(left < 0 ? 0 : left < kReductionChunk ? left : kReductionChunk);
}

// The sum in pairs, an odd one out moving up, of the first 2,048 of `count` numbers: by a block of kSumThreads.
FUSEDOPT_DEVICE double sum_of_pairs(const double* numbers, int64_t count, double (&held)[kPairs]) {
  int n = static_cast<int>(count < kPairs ? count : kPairs);
  for (int i = static_cast<int>(threadIdx.x); i < n; i += kSumThreads) held[i] = numbers[i];
  __syncthreads();
  while (n > 1) {
    const int half = n / 2;
    // Sums move down, into places that other threads still read as parts of pairs: hence the barrier.
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
  const double sum = held[0];
  __syncthreads();
  return sum;
}

// The sum in pairs of all `count` numbers, by one block; the numbers are destroyed. All runs of 2,048 but the last are
// full, so adding their sums in pairs gives the same as pairs over all numbers.
FUSEDOPT_DEVICE double pairwise_sum_of_block(double* numbers, int64_t count, double (&held)[kPairs]) {
  double sum = 0.0;
  while (count > 0) {
    const int64_t runs = divided_up(count, kPairs);
    for (int64_t k = 0; k < runs; ++k) {
      sum = sum_of_pairs(numbers + k * kPairs, count - k * kPairs, held);
      if (threadIdx.x == 0) numbers[k] = sum;
    }
    __syncthreads();
    count = runs > 1 ? runs : 0;
  }
  return sum;
}

}  // namespace
}  // namespace fusedopt::cuda
