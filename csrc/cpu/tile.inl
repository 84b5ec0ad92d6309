// THE loop over a chunk, compiled once per instruction set: decode a tile to fp32, apply the rule,
// encode it back. A tile lives in L1; numbers that are fp32 already are used in place. Formats and
// rules add here, they do not multiply.
#pragma once

#include <optional>
#include <type_traits>

#include "cpu/formats.inl"
#include "cpu/health.inl"
#include "cpu/kernels.h"
#include "cpu/normalize.inl"
#include "cpu/strips.inl"
#include "cpu/undo.inl"
#include "cpu/updates.inl"
#include "rules/all.h"

namespace fusedopt {
namespace {

// Arrays of states have at least one element, as C++ has no empty ones.
template <class Rule>
constexpr int kSlots = Rule::kStates > 0 ? Rule::kStates : 1;

// `roots` is null, or receives the roots of the state whose root the rule has at hand.
template <class Rule>
FUSEDOPT_FN void update_tile(float* p, const float* g, float* const (&s)[kSlots<Rule>], float* roots, int n,
                             float multiplier, const typename Rule::Hyper& hyper) {
#pragma GCC ivdep
  for (int i = 0; i < n; ++i) {
    float param = p[i];
    float state[kSlots<Rule>];
    for (int k = 0; k < Rule::kStates; ++k) state[k] = s[k][i];
    [[maybe_unused]] const float root = Rule::update(param, g[i] * multiplier, state, hyper);
    p[i] = param;
    for (int k = 0; k < Rule::kStates; ++k) s[k][i] = state[k];
    if (roots != nullptr) roots[i] = root;
  }
}

template <class Rule>
FUSEDOPT_FN bool has_blocks(const TensorDesc& tensor) {
  for (int k = 0; k < Rule::kStates; ++k) {
    if (tensor.states[k].is_blockwise()) return true;
  }
  return false;
}

// The random bits of n elements from `index` of the global tensor.
void draw(uint32_t stream_key, uint64_t index, int n, uint32_t* random) {
  for (int done = 0; done < n;) {
    const uint32_t lo = static_cast<uint32_t>(index);
    const uint32_t first = random_bits(lo, key_at(stream_key, static_cast<uint32_t>(index >> 32)));
    const int left = static_cast<int>(kRun - lo % kRun);  // of the run
    const int count = left < n - done ? left : n - done;
#pragma GCC ivdep
    for (int i = 0; i < count; ++i) random[done + i] = first + static_cast<uint32_t>(i) * kGolden;
    done += count;
    index += static_cast<uint64_t>(count);
  }
}

// The random bits of n elements of a tensor from `at` on.
void draw(const TensorDesc& tensor, uint32_t stream_key, int64_t at, int n, uint32_t* random) {
  if (tensor.segment == 0) return draw(stream_key, static_cast<uint64_t>(tensor.first_index + at), n, random);
  for (int done = 0; done < n;) {
    const int64_t number = (at + done) / tensor.segment, place = at + done - number * tensor.segment;
    const int64_t left = tensor.segment - place;
    const int count = left < n - done ? static_cast<int>(left) : n - done;
    const int64_t index = tensor.first_index + number * tensor.segment_stride + place;
    draw(stream_key, static_cast<uint64_t>(index), count, random + done);
    done += count;
  }
}

// kSkips: tensor.skips_blocks, a constant because keeping bytes in this loop costs memory-bound steps a tenth of their
// time.
template <class Rule, bool kHasBlocks, bool kSkips = false>
void step_tiles(const TensorDesc& tensor, const StepContext& context, int64_t begin, int64_t length,
                HealthCounts* health, UpdateTally* updates) {
  alignas(64) float param_tile[kTile], grad_tile[kTile], state_tiles[kSlots<Rule>][kTile], spare[kTile], before[kTile];
  alignas(64) uint32_t random[kTile];
  const auto hyper = *static_cast<const typename Rule::Hyper*>(context.hyper);
  [[maybe_unused]] alignas(64) float normalized[kGetsQuotient<Rule> ? kTile : 1];
  [[maybe_unused]] MatrixPlace place = MatrixPlace::of(tensor.factors, begin);
  const bool draws_for_param = tensor.param.rounding == Rounding::kStochastic;
  bool ends_with_rows = kHasBlocks;
  if constexpr (kSkips) ends_with_rows = has_blocks<Rule>(tensor);

  const int64_t end = begin + length;
  for (int64_t at = begin; at < end;) {
    const int n = tile_length(tensor, ends_with_rows, at, end);

    [[maybe_unused]] std::conditional_t<kSkips, std::optional<Undo>, char> undo{};
    if constexpr (kSkips) undo.emplace(tensor, Rule::kStates, at, n);
    float* p = load_param(tensor, at, n, param_tile, spare);
    const float* g = load(tensor.grad, at, n, grad_tile);
    float* s[kSlots<Rule>];
    for (int k = 0; k < Rule::kStates; ++k) {
      s[k] = load_state(tensor.states[k], tensor.row, at, n, state_tiles[k]);
    }

    if (health != nullptr || updates != nullptr) memcpy(before, p, sizeof(float) * static_cast<size_t>(n));

    constexpr bool kKeepRoots = kHasBlocks && Rule::kRooted >= 0;
    if constexpr (kGetsQuotient<Rule>) {
      if constexpr (Rule::kSecondMoment < 0) {
        normalize_matrix(tensor, hyper.moments, context.grad_multiplier, g, n, place, normalized);
      } else {
        normalize_vector(hyper.moments, context.grad_multiplier, g, s[Rule::kSecondMoment], n, normalized);
      }
      update_tile<Rule>(p, normalized, s, nullptr, n, 1.0f, hyper);
    } else {
      update_tile<Rule>(p, g, s, kKeepRoots ? spare : nullptr, n, context.grad_multiplier, hyper);
    }

    if constexpr (kSkips) {
      undo->judge(p);
      for (int k = 0; k < Rule::kStates; ++k) undo->judge(s[k]);
    }

    int stream_held = -1;
    for (int k = 0; k < Rule::kStates; ++k) {
      const Buffer& state = tensor.states[k];
      if (state.rounding == Rounding::kStochastic && stream_held != k / 2) {
        stream_held = k / 2;
        draw(tensor, context.stream_keys[stream_held], at, n, random);
      }
      store_state(state, tensor.row, at, n, s[k], kKeepRoots && k == Rule::kRooted ? spare : nullptr, random, k & 1);
    }
    if (draws_for_param) draw(tensor, context.stream_keys[kParamStream], at, n, random);
    store_param(tensor, at, n, p, spare, random);
    if constexpr (kSkips) {
      const int64_t skipped = undo->put_back();
      if (health != nullptr) health->skipped += skipped;
    }
    if (health != nullptr) {
      count_stalled(before, load_param(tensor, at, n, param_tile, spare), g, n, *health);
      for (int k = 0; k < Rule::kStates; ++k) count_codes(tensor.states[k], tensor.row, at, n, *health);
    }
    if (updates != nullptr) updates->add(before, load_param(tensor, at, n, param_tile, spare), n);
    at += n;
  }
}

template <class Rule>
void step_run(const TensorDesc& tensor, const StepContext& context, int64_t begin, int64_t length, HealthCounts* health,
              UpdateTally* updates) {
#if defined(__AVX2__)
  if (health == nullptr && !tensor.skips_blocks) {
    const int64_t taken = take_strips<Rule>(tensor, context, begin, length, updates);
    begin += taken;
    length -= taken;
  }
#endif
  if (tensor.skips_blocks) {
    if constexpr (!kGetsQuotient<Rule>) step_tiles<Rule, true, true>(tensor, context, begin, length, health, updates);
  } else if (has_blocks<Rule>(tensor)) {
    step_tiles<Rule, true>(tensor, context, begin, length, health, updates);
  } else {
    step_tiles<Rule, false>(tensor, context, begin, length, health, updates);
  }
}

template <class Rule>
void step_chunk(const TensorDesc& tensor, const StepContext& context, int64_t begin, int64_t length,
                const StepRecord& record) {
  if (record.updates == nullptr) return step_run<Rule>(tensor, context, begin, length, record.health, nullptr);
  UpdateTally tally(*record.updates, tensor, begin);
  step_run<Rule>(tensor, context, begin, length, record.health, &tally);
}

}  // namespace
}  // namespace fusedopt

// The table of this instruction set; `name` has external linkage, and nothing else in this file does.
#define FUSEDOPT_STEP_ENTRY(name, type) fusedopt::step_chunk<fusedopt::type>,
#define FUSEDOPT_KERNELS(name)               \
  namespace fusedopt {                       \
  extern const Kernels name;                 \
  const Kernels name = {                     \
      {FUSEDOPT_RULES(FUSEDOPT_STEP_ENTRY)}, \
      square_sum,                            \
      sum_unit,                              \
      sum_weighted,                          \
      sum,                                   \
      sum_matrix_updates,                    \
      sum_vector_updates,                    \
      sum_quotients,                         \
  };                                         \
  }
