// What crosses from the host to the kernels: tensors of one launch, by value, and what a step derives on the device.
#pragma once

#include <cstdint>

#include "core/tensors.h"
#include "cuda/formats.h"
#include "rules/normalize.h"
#include "storage/random.h"

namespace fusedopt::cuda {

constexpr int kTile = 256;     // elements, of one warp
constexpr int kLane = 8;       // of these, for one lane
constexpr int kWarps = 4;      // of a block
constexpr int kTilesEach = 4;  // of a warp
constexpr int kBlockTiles = kWarps * kTilesEach;
constexpr int kThreads = kWarps * 32;

// Kernel parameters may take 32,764 bytes from CUDA 12.1 on, 4,096 before.
#if !defined(CUDART_VERSION) || CUDART_VERSION >= 12010
constexpr int kParameterBytes = 32000;
#else
constexpr int kParameterBytes = 3800;
#endif

// The factors of rows and columns, where second moments are factored (rules/normalize.h).
template <bool kFactored>
struct DeviceFactors {
  const float *row_factors, *column_factors;
  int64_t row_count, column_count;  // of one matrix
};
template <>
struct DeviceFactors<false> {};

template <class Rule>
constexpr bool is_factored() {
  if constexpr (kIsNormalizing<Rule>) return Rule::kSecondMoment < 0;
  return false;
}

// Whether second moments are a state that is up to date before the step, in float32.
template <class Rule>
constexpr bool has_new_second_moment() {
  if constexpr (kGetsQuotient<Rule>) return Rule::kSecondMoment >= 0;
  return false;
}

// By how much more the global tensor's index grows from row to row than the place does.
template <bool kHasRows>
struct DeviceRowGap {
  int64_t row_gap;
};
template <>
struct DeviceRowGap<false> {};

template <class Rule, bool kQuantized>
struct DeviceTensor : DeviceFactors<is_factored<Rule>()>, DeviceRowGap<kQuantized> {
  static constexpr int kSlots = Rule::kStates > 0 ? Rule::kStates : 1;  // C++ has no empty arrays

  void* param;
  const void* grad;
  void* states[kSlots];
  uint8_t* scales[kQuantized ? kSlots : 1];  // of codes
  void* master;
  int64_t numel, row, first_index;  // blocks of codes do not cross rows; without codes, all elements are one row
  uint32_t first_block;             // of this tensor, in the launch
  int32_t index;                    // of its derived numbers, in the step
  Formats formats;
  uint32_t first_four;  // of the sums of its blocks, if a step takes them
};

// Where the sums of squares of blocks go (sums.cuh); null if a step takes none.
struct BlockSums {
  float *updates, *weights;

  FUSEDOPT_FN BlockSums from(int64_t block) const { return {updates + block, weights + block}; }
};

// What is the same for all elements of a tensor in one step; derived by one thread.
template <class Rule>
struct Derived {
  typename Rule::Hyper hyper;
  float grad_multiplier;
  uint32_t stream_keys[kStreams];
  int32_t skips;  // 1: gradients were not finite, nothing changes
};

// The same for a tensor that is read before its step (rules/normalize.h), and what is found out on the way.
struct Normalization {
  Moments moments;
  float multiplier;
  int32_t skips;
  double param, update;  // sums of squares
};

}  // namespace fusedopt::cuda
