// The loop of tile.inl for the layouts that most training runs have, in vectors: a strip of 64 elements is decoded,
// updated and encoded without leaving registers (AVX-512), or the top of the stack (AVX2). In tiles, which go through
// L1, the divisions of an update and the arithmetic of codes wait for each other; here they overlap, and a step in
// 8 bits takes two thirds of the time.
#pragma once

#include <tuple>
#include <type_traits>
#include <utility>

#include "cpu/kernels.h"
#include "cpu/normalize.inl"
#include "cpu/strip_formats.inl"
#include "cpu/updates.inl"
#include "rules/normalize.h"

#if defined(__AVX2__)

namespace fusedopt {
namespace {

// ---- what a rule gets for a gradient -----------------------------------------------------------

struct PlainGradient {
  float multiplier;
  PlainGradient(const TensorDesc&, const StepContext& context, int64_t) : multiplier(context.grad_multiplier) {}
  FUSEDOPT_FN Lanes of(Lanes g, int) const { return g * multiplier; }
  FUSEDOPT_FN void next_strip() {}
};

// The quotient by a factored second moment, of rows of whole strips and without a clamp.
struct FactoredGradient {
  const TensorDesc& tensor;
  float multiplier;
  MatrixPlace place;
  float row;
  const float* columns;

  FactoredGradient(const TensorDesc& t, const StepContext& context, int64_t at)
      : tensor(t), multiplier(context.grad_multiplier), place(MatrixPlace::of(t.factors, at)) {
    find_row();
  }
  FUSEDOPT_FN Lanes of(Lanes g, int i) const {
    return (row * load_lanes(columns + place.column + i)) * (g * multiplier);
  }
  FUSEDOPT_FN void next_strip() {
    place.column += kStrip;
    if (place.column < tensor.factors.column_count) return;
    place.column = 0;
    ++place.row;
    if (place.row < tensor.scratch->row_total) find_row();
  }
  void find_row() {
    row = tensor.scratch->row_factors[place.row];
    columns = tensor.scratch->column_factors + place.row / tensor.factors.row_count * tensor.factors.column_count;
  }
};

template <class Rule, class = void>
struct GradientOf {
  using type = PlainGradient;
};
template <class Rule>
struct GradientOf<Rule, std::enable_if_t<kGetsQuotient<Rule>>> {
  using type = FactoredGradient;
};

// Whether the gradients of a tensor can be taken in this way.
template <class Rule>
bool has_gradient_strips(const TensorDesc& tensor, const StepContext& context) {
  if constexpr (!kGetsQuotient<Rule>) {
    return true;
  } else {
    const auto& hyper = *static_cast<const typename Rule::Hyper*>(context.hyper);
    return Rule::kSecondMoment < 0 && !hyper.moments.is_clamped && tensor.factors.column_count % kStrip == 0;
  }
}

#if defined(__AVX512BW__)
constexpr bool kDenseStrips = true;
#else
constexpr bool kDenseStrips = false;  // tiles of 16-bit formats are as fast
#endif

// ---- the loop ----------------------------------------------------------------------------------

template <class Rule, class Weights, class State, size_t... k>
void step_strips(const TensorDesc& tensor, const StepContext& context, int64_t begin, int64_t length,
                 UpdateTally* updates, std::index_sequence<k...>) {
  const auto hyper = *static_cast<const typename Rule::Hyper*>(context.hyper);
  const uint32_t lo = static_cast<uint32_t>(tensor.first_index + begin);
  Stream streams[] = {{context.stream_keys[0], lo}, {context.stream_keys[1], lo}};
  Stream param_stream(context.stream_keys[kParamStream], lo);
  const Weights weights(tensor, begin);
  typename GradientOf<Rule>::type gradient(tensor, context, begin);
  // One more than there are states, since there may be none.
  const State states[] = {State(tensor.states[k], begin)..., State(tensor.states[0], 0)};
  const bool draws = ((tensor.states[k].rounding == Rounding::kStochastic) || ...);

  // If updates are summed, strip by strip, around a loop that knows nothing of it: a condition within it took ordinary
  // steps some percent of their time.
  for (int64_t begun = 0, end; begun < length; begun = end) {
    end = updates == nullptr ? length : begun + kStrip;
    if (updates != nullptr) updates->keep(weights.load(begun));
    for (int64_t i = begun; i < end; i += kStrip) {
      // Where only two tensors are read, the hardware alone does not keep enough loads under way (Emerald Rapids: .48
      // ns per element, with this .42; Zen 4 gained nothing).
      if constexpr (Rule::kStates == 0 && std::is_same_v<Weights, Float32Weights>) {
        prefetch_after<kStrip>(weights.p + i);
        prefetch_after<kStrip>(weights.g + i);
      }
      const auto weight = weights.load(i);
      const auto grad = weights.gradient(i);
      [[maybe_unused]] const std::tuple held(states[k].template decode<Rule::kSigned[k]>(i)...);
      [[maybe_unused]] LaneBlock p, roots, decoded[sizeof...(k) + 1];
      for (int j = 0; j < kVectors; ++j) {
        p.at[j] = weight.at(j);
        Lanes s[] = {std::get<k>(held).at(j)..., Lanes{}};
        roots.at[j] = Rule::update(p.at[j], gradient.of(grad.at(j), kVector * j), s, hyper);
        ((decoded[k].at[j] = s[k]), ...);
      }
      weights.store(i, p, Weights::kDraws ? param_stream.next() : RunBits{});
      [[maybe_unused]] const BlockScale scales[] = {states[k].template scale_of<Rule::kSigned[k]>(decoded[k])..., {}};
      [[maybe_unused]] RunBits random[sizeof...(k) / 2 + 1] = {};
      gradient.next_strip();
      if (draws) {
        for (size_t stream = 0; stream < (sizeof...(k) + 1) / 2; ++stream) random[stream] = streams[stream].next();
      }
      (states[k].template encode<Rule::kSigned[k], Rule::kRooted == k>(i, decoded[k], roots, scales[k], random[k / 2],
                                                                       k & 1),
       ...);
    }
    if (updates != nullptr) updates->add_strip(weights.load(begun));
  }
}

template <class T>
struct Type {
  using type = T;
};

template <class Rule, class State>
void step_strips_of(const TensorDesc& tensor, const StepContext& context, int64_t begin, int64_t length,
                    UpdateTally* updates) {
  const auto step = [&](auto weights) {
    step_strips<Rule, typename decltype(weights)::type, State>(tensor, context, begin, length, updates,
                                                               std::make_index_sequence<Rule::kStates>());
  };
  const bool stochastic = tensor.param.rounding == Rounding::kStochastic;
  if (tensor.param.dtype == DType::kFloat32) {
    step(Type<Float32Weights>());
  } else if (tensor.master_format == Master::kSplit24) {
    stochastic ? step(Type<Split24Weights<true>>()) : step(Type<Split24Weights<false>>());
  } else {
    stochastic ? step(Type<BFloat16Weights<true>>()) : step(Type<BFloat16Weights<false>>());
  }
}

// Steps as much of a chunk as comes in strips of a layout that is known here. Returns how many elements that were.
template <class Rule>
int64_t take_strips(const TensorDesc& tensor, const StepContext& context, int64_t begin, int64_t length,
                    UpdateTally* updates) {
  if constexpr (Rule::kStates == 0 && !kGetsQuotient<Rule>) {
    return 0;
  } else {
    const bool has_weights = tensor.param.dtype == tensor.grad.dtype &&
                             (tensor.param.dtype == DType::kFloat32 ||
                              (tensor.param.dtype == DType::kBFloat16 &&
                               (tensor.master_format == Master::kNone || tensor.master_format == Master::kSplit24)));
    // A strip is a run of random bits, whose key changes where the upper half of an index does. Where blocks are
    // stored, this holds but for 2^32.
    const uint64_t index = static_cast<uint64_t>(tensor.first_index + begin);
    if (tensor.segment != 0) return 0;
    if (!has_weights || !has_gradient_strips<Rule>(tensor, context) || index % kRun != 0) return 0;
    if (length < kStrip || (index >> 32) != ((index + static_cast<uint64_t>(length)) >> 32)) return 0;
    bool blocks = Rule::kStates > 0 && tensor.row == tensor.numel;  // rows of whole blocks
    bool halves = Rule::kStates > 0;
    // float32 throughout would leave nothing to decode; but sums hide between the loads of strips, not of whole tiles.
    bool floats = tensor.param.dtype != DType::kFloat32 || kGetsQuotient<Rule> || updates != nullptr;
    for (int k = 0; k < Rule::kStates; ++k) {
      blocks &= tensor.states[k].is_blockwise();
      halves &= tensor.states[k].dtype == DType::kBFloat16;
      floats &= tensor.states[k].dtype == DType::kFloat32;
    }
    const int64_t whole = length - length % kStrip;
    if (blocks) step_strips_of<Rule, BlockState>(tensor, context, begin, whole, updates);
    if constexpr (kDenseStrips) {
      if (halves) step_strips_of<Rule, BFloat16State>(tensor, context, begin, whole, updates);
      if (floats) step_strips_of<Rule, Float32State>(tensor, context, begin, whole, updates);
    }
    return blocks || (kDenseStrips && (halves || floats)) ? whole : 0;
  }
}

}  // namespace
}  // namespace fusedopt

#endif
