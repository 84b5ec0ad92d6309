// THE kernel: one warp per tile, with the same steps as cpu/tile.inl: decode to fp32, apply the rule, encode. One
// launch takes many tensors.
#pragma once

#include <utility>

#include "cuda/descriptors.h"
#include "cuda/lane.cuh"
#include "cuda/sums.cuh"
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
  BlockSums sums;
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

// A bit for each of a lane's elements that is not finite, or that a block of codes cannot hold.
FUSEDOPT_DEVICE uint32_t spoilt_of(const float (&x)[kLane], const Place& place) {
  uint32_t spoilt = 0;
#pragma unroll
  for (int j = 0; j < kLane; ++j) {
    if ((bits_of(x[j]) & ~kSignBit) >= kTooLarge && place.holds(j)) spoilt |= 1u << j;
  }
  return spoilt;
}

// `first_block`: of the tile. `first_index`: of the tensor's first element, as seen from the tile's row.
template <class Rule, bool kQuantized, class TensorFormats>
FUSEDOPT_DEVICE void step_tile(const DeviceTensor<Rule, kQuantized>& tensor, const TensorFormats& formats,
                               const Derived<Rule>& derived, const Place& place, int64_t first_block,
                               int64_t first_index, const BlockSums& all_sums) {
  constexpr int kSlots = DeviceTensor<Rule, kQuantized>::kSlots;
  const auto has_codes = [&](int k) { return kQuantized && formats.state(k) == DType::kUInt8; };
  const auto scales_of = [&](int k) { return tensor.scales[kQuantized ? k : 0] + first_block; };

  // All loads, before anything waits for the first.
  Raw raw_param, raw_master, raw_grad, raw_states[kSlots];
  uint32_t scales[kSlots][2];
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
  with_whole(place, load_all);
  if constexpr (is_factored<Rule>()) load_factors(tensor, place, rows, columns);

  Numbers param, grad, states[kSlots];
  decode_param(raw_param, raw_master, formats, param.at);
  decode(raw_grad, formats.grad(), grad.at);
  for_each_state<Rule>([&](auto k) {
    if (has_codes(k)) {
      decode_codes<Rule::kSigned[k]>(raw_states[k], scales[k], states[k].at);
    } else {
      decode(raw_states[k], formats.state(k), states[k].at);
    }
  });

  float multiplier = derived.grad_multiplier;
  if constexpr (kGetsQuotient<Rule>) {
    const Moments& moments = derived.hyper.moments;
    const auto normalize_all = [&](auto clamped) {
      constexpr bool kClamped = decltype(clamped)::value;
#pragma unroll
      for (int j = 0; j < kLane; ++j) {
        if constexpr (is_factored<Rule>()) {
          grad.at[j] = normalize<kClamped>(grad.at[j] * multiplier, rows[j], columns[j], moments);
        } else {
          const float second = states[Rule::kSecondMoment].at[j];
          grad.at[j] = normalize<kClamped>(grad.at[j] * multiplier, second, moments);
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

  const Numbers roots = Rule::update(param, grad * multiplier, states, derived.hyper);

  // A step that is left out is here to sum what stays as it was.
  const bool is_left_out = TensorFormats::kMaySum && derived.skips;
  uint32_t spoilt = is_left_out ? ~0u : 0;
  if (formats.skips_blocks()) {
    spoilt |= spoilt_of(param.at, place);
    bool has_blocks = false;
    for_each_state<Rule>([&](auto k) {
      spoilt |= spoilt_of(states[k].at, place);
      has_blocks |= has_codes(k);
    });
    if (has_blocks) spoilt = spread_over_blocks(spoilt, place);
  }
  const Place stored = place.leaving(spoilt);

  // What was loaded is not needed any more, so what is stored takes its place.
  const Source source(first_index + place.begin);
  uint32_t random[kLane];  // of what is rounded stochastically
  [[maybe_unused]] uint32_t fractions[kLane];
  for_each_state<Rule>([&](auto k) {
    const bool rounds = formats.rounds_state(k);
    // States 2 k and 2 k + 1 share a stream, if there are as many.
    const bool next_rounds = k + 1 < Rule::kStates ? formats.rounds_state(k + 1) : rounds;
    if (k % 2 == 0) {
      if (rounds || next_rounds) {
        draw(derived.stream_keys[k / 2], source, place, random);
        if constexpr (kQuantized) take_fractions(rounds, next_rounds, random, fractions);
      } else if constexpr (kQuantized) {
        stay_here();
#pragma unroll
        for (int j = 0; j < kLane; ++j) fractions[j] = kHalves;
      }
    }
    if (has_codes(k)) {
      constexpr bool kSigned = Rule::kSigned[k];
      const Numbers own = kSigned || k == Rule::kRooted ? roots : root(states[k]);
      encode_codes<kSigned>(states[k].at, own.at, fractions, k & 1, place, raw_states[k], scales[k]);
    } else {
      encode(states[k].at, formats.state(k), rounds, random, k & 1, raw_states[k]);
    }
  });
  if (formats.rounds_param()) draw(derived.stream_keys[kParamStream], source, place, random);
  encode_param(param.at, formats, random, raw_param, raw_master);

  const auto store_states = [&](auto whole) {
    constexpr bool kWhole = decltype(whole)::value;
    for_each_state<Rule>([&](auto k) {
      store<kWhole>(tensor.states[k], formats.state(k), stored, raw_states[k]);
      if (has_codes(k)) store_scales<kWhole>(scales_of(k), stored, scales[k]);
    });
  };
  const auto store_weights = [&](auto whole) {
    constexpr bool kWhole = decltype(whole)::value;
    store_param<TensorFormats, kWhole>(tensor.param, tensor.master, formats, stored, raw_param, raw_master);
  };
  if constexpr (TensorFormats::kMaySum) {
    with_whole(stored, store_states);
    // Between the two, when states are out of the way and weights are still as they were in memory.
    if (all_sums.updates != nullptr) {
      sum_tile(tensor.param, tensor.master, formats, place, stored, is_left_out, raw_param, raw_master,
               all_sums.from(4 * static_cast<int64_t>(tensor.first_four) + first_block));
    }
    with_whole(stored, store_weights);
  } else {
    with_whole(stored, [&](auto whole) {
      store_states(whole);
      store_weights(whole);
    });
  }
}

template <class Rule, bool kQuantized, class TensorFormats>
__global__ void __launch_bounds__(kThreads, TensorFormats::resident_blocks(Rule::kStates))
    step_kernel(const __grid_constant__ StepParams<Rule, kQuantized> params) {
  const auto& tensor = params.tensors[find_tensor(params.tensors, params.count, blockIdx.x)];
  const Derived<Rule> derived = params.derived[tensor.index];  // a copy: stores below might alias it
  if (derived.skips && (!TensorFormats::kMaySum || params.sums.updates == nullptr)) return;
  const TensorFormats formats(tensor.formats);
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  const int64_t tile = static_cast<int64_t>(blockIdx.x - tensor.first_block) * kBlockTiles + warp;
  // Without codes, a tensor is one row. `left`: of the row, from the beginning of the tile on.
  const int64_t row_tiles = divided_up(tensor.row, kTile), row_blocks = divided_up(tensor.row, kBlock);
  const int64_t row = kQuantized ? tile / row_tiles : 0, row_tile = tile - row * row_tiles;
  int64_t begin = row * tensor.row + row_tile * kTile, left = tensor.row - row_tile * kTile;
  int64_t first_block = row * row_blocks + row_tile * (kTile / kBlock), first_index = tensor.first_index;
  if constexpr (kQuantized) first_index += row * tensor.row_gap;
#pragma unroll 1
  for (int i = 0; i < kTilesEach && begin < tensor.numel; ++i) {
    const Place place = place_of(lane, begin, static_cast<int>(left < kTile ? left : kTile), tensor.formats.is_aligned,
                                 formats.is_split());
    step_tile(tensor, formats, derived, place, first_block, first_index, params.sums);
    begin += kWarps * kTile;
    left -= kWarps * kTile;
    first_block += kWarps * (kTile / kBlock);
    if constexpr (kQuantized) {
      while (left <= 0) {  // in a later row, whose blocks begin anew
        begin += tensor.row - row_tiles * kTile;
        left += row_tiles * kTile;
        first_block += row_blocks - row_tiles * (kTile / kBlock);
        first_index += tensor.row_gap;
      }
    }
  }
}

}  // namespace
}  // namespace fusedopt::cuda
