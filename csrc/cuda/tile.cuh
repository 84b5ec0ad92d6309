// THE kernel: one warp per tile, with the same steps as cpu/tile.inl: decode to fp32, apply the rule, encode. One
// launch takes many tensors.
#pragma once

#include <utility>

#include "cuda/descriptors.h"
#include "cuda/lane.cuh"
#include "rules/all.h"

namespace fusedopt::cuda {
namespace {

template <class Rule, bool kQuantized>
constexpr int kTensorsOfLaunch =
    static_cast<int>((kParameterBytes - 64) / static_cast<int>(sizeof(DeviceTensor<Rule, kQuantized>)));

template <class Rule, bool kQuantized>
struct StepParams {
  const Derived<Rule>* derived;
  int32_t count;
  DeviceTensor<Rule, kQuantized> tensors[kTensorsOfLaunch<Rule, kQuantized>];
};

// Normalizes a lane's gradients by the factors of their rows and columns.
template <class Tensor>
FUSEDOPT_DEVICE void normalize_factored(const Tensor& tensor, const Moments& moments, const Place& place,
                                        float multiplier, float (&g)[kLane]) {
#pragma unroll
  for (int run = 0; run < 2; ++run) {
    const int64_t at = place.begin + place.runs[run];
    int64_t row = at / tensor.column_count, column = at - row * tensor.column_count;
#pragma unroll
    for (int j = run * 4; j < run * 4 + 4; ++j) {
      if (!place.holds(j)) continue;
      const int64_t matrix = row / tensor.row_count;
      const float columns = tensor.column_factors[matrix * tensor.column_count + column];
      const float rows = tensor.row_factors[row];
      g[j] = moments.is_clamped ? normalize<true>(g[j] * multiplier, rows, columns, moments)
                                : normalize<false>(g[j] * multiplier, rows, columns, moments);
      if (++column == tensor.column_count) {
        column = 0;
        ++row;
      }
    }
  }
}

// Calls use(k), k a constant, for every state of a rule.
template <class Use, int... kStates>
FUSEDOPT_DEVICE void for_each_of(const Use& use, std::integer_sequence<int, kStates...>) {
  (use(std::integral_constant<int, kStates>{}), ...);
}
template <class Rule, class Use>
FUSEDOPT_DEVICE void for_each_state(const Use& use) {
  for_each_of(use, std::make_integer_sequence<int, Rule::kStates>{});
}

template <class Rule, bool kQuantized>
FUSEDOPT_DEVICE void step_tile(const DeviceTensor<Rule, kQuantized>& tensor, const Derived<Rule>& derived,
                               const Place& place, int64_t block) {
  constexpr int kSlots = DeviceTensor<Rule, kQuantized>::kSlots;
  const Formats formats = tensor.formats;
  float p[kLane], g[kLane], s[kSlots][kLane];
  load_param(tensor.param, tensor.master, formats, place, p);
  load(tensor.grad, formats.grad, place, g);
  for_each_state<Rule>([&](auto k) {
    const uint32_t dtype = formats.states >> (3 * k) & 7u;
    if (kQuantized && static_cast<DType>(dtype) == DType::kUInt8) {
      const uint8_t scale = place.holds(0) ? tensor.scales[kQuantized ? k : 0][block] : 0;
      decode_codes<Rule::kSigned[k]>(tensor.states[k], scale, place, s[k]);
    } else {
      load(tensor.states[k], dtype, place, s[k]);
    }
  });

  float multiplier = derived.grad_multiplier;
  if constexpr (kIsNormalizing<Rule>) {
    const Moments& moments = derived.hyper.moments;
    if constexpr (is_factored<Rule>()) {
      normalize_factored(tensor, moments, place, multiplier, g);
    } else {
#pragma unroll
      for (int j = 0; j < kLane; ++j) {
        const float second = s[Rule::kSecondMoment][j];
        g[j] = moments.is_clamped ? normalize<true>(g[j] * multiplier, second, moments)
                                  : normalize<false>(g[j] * multiplier, second, moments);
      }
    }
    multiplier = 1.0f;
  }

  float roots[kLane];
#pragma unroll
  for (int j = 0; j < kLane; ++j) {
    float state[kSlots];
#pragma unroll
    for (int k = 0; k < Rule::kStates; ++k) state[k] = s[k][j];
    roots[j] = Rule::update(p[j], g[j] * multiplier, state, derived.hyper);
#pragma unroll
    for (int k = 0; k < Rule::kStates; ++k) s[k][j] = state[k];
  }

  uint32_t random[kLane];
  for_each_state<Rule>([&](auto k) {
    const uint32_t dtype = formats.states >> (3 * k) & 7u;
    const bool rounds = formats.rounds_states >> k & 1u;
    // States 2 k and 2 k + 1 share a stream.
    const bool is_drawn = k % 2 == 1 && (formats.rounds_states << 1 >> k & 1u);
    if (rounds && !is_drawn) draw(derived.stream_keys[k / 2], tensor.first_index, place, random);
    if (kQuantized && static_cast<DType>(dtype) == DType::kUInt8) {
      store_codes<Rule::kSigned[k], k == Rule::kRooted>(tensor.states[k], tensor.scales[kQuantized ? k : 0] + block,
                                                        rounds, place, s[k], roots, random, k & 1);
    } else {
      store(tensor.states[k], dtype, rounds, place, s[k], random, k & 1);
    }
  });
  if (formats.rounds_param) draw(derived.stream_keys[kParamStream], tensor.first_index, place, random);
  store_param(tensor.param, tensor.master, formats, place, p, random);
}

template <class Rule, bool kQuantized>
__global__ void __launch_bounds__(kThreads, kResidentBlocks)
    step_kernel(const __grid_constant__ StepParams<Rule, kQuantized> params) {
  const auto& tensor = params.tensors[find_tensor(params.tensors, params.count, blockIdx.x)];
  const Derived<Rule> derived = params.derived[tensor.index];  // a copy: stores below might alias it
  if (derived.skips) return;
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  const int64_t row_tiles = (tensor.row + kTile - 1) / kTile;
  const int64_t tiles = tensor.numel / tensor.row * row_tiles;
  int64_t tile = static_cast<int64_t>(blockIdx.x - tensor.first_block) * kBlockTiles + warp;
  for (int i = 0; i < kTilesEach && tile < tiles; ++i, tile += kWarps) {
    const int64_t row = tiles == row_tiles ? 0 : tile / row_tiles;
    const int64_t column = (tile - row * row_tiles) * kTile;
    const int64_t left = tensor.row - column;
    const Place place = place_of(lane, row * tensor.row + column, static_cast<int>(left < kTile ? left : kTile),
                                 tensor.formats.is_aligned, !kQuantized && tensor.formats.is_split);
    const int64_t row_blocks = (tensor.row + kBlock - 1) / kBlock;
    step_tile<Rule, kQuantized>(tensor, derived, place, row * row_blocks + (column + place.runs[0]) / kBlock);
  }
}

}  // namespace
}  // namespace fusedopt::cuda
