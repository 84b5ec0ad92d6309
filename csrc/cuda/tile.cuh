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

// How often `length` goes into `at`, which is less than length + kTile: as a rule without a division.
FUSEDOPT_DEVICE int times_within_tile(int64_t at, int64_t length) {
  if (at < length) return 0;
  return length >= kTile ? 1 : static_cast<int>(static_cast<uint32_t>(at) / static_cast<uint32_t>(length));
}

// Loads the factors of the rows and columns of a lane's elements. Where the tile begins in its matrix is the same for
// all lanes; from there it is less than a tile to any of them.
template <class Tensor>
FUSEDOPT_DEVICE void load_factors(const Tensor& tensor, const Place& place, float (&rows)[kLane],
                                  float (&columns)[kLane]) {
  const int64_t width = tensor.column_count, height = tensor.row_count;
  const int64_t tile_row = place.begin / width, tile_column = place.begin - tile_row * width;
  const int64_t tile_matrix = tile_row / height;
#pragma unroll
  for (int run = 0; run < 2; ++run) {
    int64_t column = tile_column + place.runs[run];
    const int down = times_within_tile(column, width);
    column -= down * width;
    int64_t row = tile_row - tile_matrix * height + down;  // of its matrix
    const int matrices = times_within_tile(row, height);
    row -= matrices * height;
    const float* row_at = tensor.row_factors + tile_row + down;
    const float* columns_at = tensor.column_factors + (tile_matrix + matrices) * width;
    if (place.begin % 4 == 0 && width % 4 == 0) {  // a run stays in its row
      if (!place.holds(run * 4)) continue;
      const float row_factor = *row_at;
      Raw four;
      load_words<4>(columns_at + column, four.words);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        rows[run * 4 + j] = row_factor;
        columns[run * 4 + j] = float_of(four.words[j]);
      }
      continue;
    }
#pragma unroll
    for (int j = run * 4; j < run * 4 + 4; ++j) {
      if (!place.holds(j)) continue;
      rows[j] = *row_at;
      columns[j] = columns_at[column];
      if (++column < width) continue;
      column = 0;
      ++row_at;
      if (++row < height) continue;
      row = 0;
      columns_at += width;
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

// `first_block`: of codes, of the tile. `first_index`: of the tensor's first element, as seen from the tile's row.
template <class Rule, bool kQuantized, class TensorFormats>
FUSEDOPT_DEVICE void step_tile(const DeviceTensor<Rule, kQuantized>& tensor, const TensorFormats& formats,
                               const Derived<Rule>& derived, const Place& place, int64_t first_block,
                               int64_t first_index) {
  constexpr int kSlots = DeviceTensor<Rule, kQuantized>::kSlots;
  const auto has_codes = [&](int k) { return kQuantized && formats.state(k) == DType::kUInt8; };
  const auto scales_of = [&](int k) { return tensor.scales[kQuantized ? k : 0] + first_block; };

  // All loads, before anything waits for the first.
  Raw raw_param, raw_master, raw_grad, raw_states[kSlots];
  uint8_t scales[kSlots][2];
  [[maybe_unused]] float rows[kLane], columns[kLane];
  const auto load_all = [&](auto whole) {
    constexpr bool kWhole = decltype(whole)::value;
    load_param<TensorFormats, kWhole>(tensor.param, tensor.master, formats, place, raw_param, raw_master);
    load<kWhole>(tensor.grad, formats.grad(), place, raw_grad);
    for_each_state<Rule>([&](auto k) {
      load<kWhole>(tensor.states[k], formats.state(k), place, raw_states[k]);
      if (has_codes(k)) load_scales<kWhole>(scales_of(k), place, scales[k]);
    });
  };
  if (place.is_whole) {
    load_all(std::true_type{});
  } else {
    rarely();
    load_all(std::false_type{});
  }
  if constexpr (is_factored<Rule>()) load_factors(tensor, place, rows, columns);

  float p[kLane], g[kLane], s[kSlots][kLane];
  decode_param(raw_param, raw_master, formats, p);
  decode(raw_grad, formats.grad(), g);
  for_each_state<Rule>([&](auto k) {
    if (has_codes(k)) {
      decode_codes<Rule::kSigned[k]>(raw_states[k], scales[k], s[k]);
    } else {
      decode(raw_states[k], formats.state(k), s[k]);
    }
  });

  float multiplier = derived.grad_multiplier;
  if constexpr (kIsNormalizing<Rule>) {
    const Moments& moments = derived.hyper.moments;
    const auto normalize_all = [&](auto clamped) {
      constexpr bool kClamped = decltype(clamped)::value;
#pragma unroll
      for (int j = 0; j < kLane; ++j) {
        if constexpr (is_factored<Rule>()) {
          g[j] = normalize<kClamped>(g[j] * multiplier, rows[j], columns[j], moments);
        } else {
          g[j] = normalize<kClamped>(g[j] * multiplier, s[Rule::kSecondMoment][j], moments);
        }
      }
    };
    if (moments.is_clamped) {
      normalize_all(std::true_type{});
    } else {
      normalize_all(std::false_type{});
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

  uint32_t random[kLane] = {};
  for_each_state<Rule>([&](auto k) {
    const bool rounds = formats.rounds_state(k);
    // States 2 k and 2 k + 1 share a stream.
    if (k % 2 == 0 && (rounds || (k + 1 < Rule::kStates && formats.rounds_state(k + 1)))) {
      draw(derived.stream_keys[k / 2], first_index, place, random);
    }
    if (has_codes(k)) {
      store_codes<Rule::kSigned[k], k == Rule::kRooted>(tensor.states[k], scales_of(k), rounds, place, s[k], roots,
                                                        random, k & 1);
    } else {
      store(tensor.states[k], formats.state(k), rounds, place, s[k], random, k & 1);
    }
  });
  if (formats.rounds_param()) draw(derived.stream_keys[kParamStream], first_index, place, random);
  store_param(tensor.param, tensor.master, formats, place, p, random);
}

template <class Rule, bool kQuantized, class TensorFormats>
__global__ void __launch_bounds__(kThreads, TensorFormats::kResidentBlocks)
    step_kernel(const __grid_constant__ StepParams<Rule, kQuantized> params) {
  const auto& tensor = params.tensors[find_tensor(params.tensors, params.count, blockIdx.x)];
  const Derived<Rule> derived = params.derived[tensor.index];  // a copy: stores below might alias it
  if (derived.skips) return;
  const TensorFormats formats(tensor.formats);
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  const int64_t tile = static_cast<int64_t>(blockIdx.x - tensor.first_block) * kBlockTiles + warp;
  // Without codes, a tensor is one row.
  const int64_t row_tiles = divided_up(tensor.row, kTile), row_blocks = divided_up(tensor.row, kBlock);
  int64_t row = kQuantized ? tile / row_tiles : 0, row_tile = tile - row * row_tiles;
#pragma unroll 1
  for (int i = 0; i < kTilesEach && row * tensor.row + row_tile * kTile < tensor.numel; ++i) {
    const int64_t column = row_tile * kTile, left = tensor.row - column;
    const Place place = place_of(lane, row * tensor.row + column, static_cast<int>(left < kTile ? left : kTile),
                                 tensor.formats.is_aligned, formats.is_split());
    int64_t first_index = tensor.first_index;
    if constexpr (kQuantized) first_index += row * tensor.row_gap;
    step_tile(tensor, formats, derived, place, row * row_blocks + column / kBlock, first_index);
    row_tile += kWarps;
    if constexpr (kQuantized) {
      for (; row_tile >= row_tiles; row_tile -= row_tiles) ++row;
    }
  }
}

}  // namespace
}  // namespace fusedopt::cuda
