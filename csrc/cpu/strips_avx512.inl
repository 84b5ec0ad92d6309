// The loop of tile.inl for the layouts that most training runs have, in AVX-512: a strip of 64 elements is
// decoded, updated and encoded without leaving registers. Going through tiles in L1, the divisions of an
// update and the arithmetic of codes wait for each other; here they overlap, and a step in 8 bits takes two thirds
// of the time. Numbers go through the same operations as in storage/, hence to the same bits.
#pragma once

#if defined(__AVX512BW__)

#include <utility>

#include "cpu/blockwise_avx512.inl"
#include "cpu/kernels.h"
#include "cpu/normalize.inl"
#include "rules/normalize.h"
#include "storage/blockwise8.h"
#include "storage/random.h"

namespace fusedopt {
namespace {

constexpr int kStrip = kBlock;  // elements

// ---- random bits -------------------------------------------------------------------------------

// fmix of storage/random.h for vectors of consecutive elements, one vector after the other.
struct Stream {
  Bits counter;
  FUSEDOPT_FN Stream(uint32_t key, uint32_t lo) {
    const Bits lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    counter = _mm512_add_epi32(_mm512_mullo_epi32(_mm512_add_epi32(lane, all(lo)), all(kGolden)), all(key));
  }
  FUSEDOPT_FN Bits next() {
    Bits h = counter;
    counter = _mm512_add_epi32(counter, all(kGolden * kVector));
    h = _mm512_mullo_epi32(_mm512_xor_si512(h, _mm512_srli_epi32(h, 16)), all(0x85EBCA6Bu));
    h = _mm512_mullo_epi32(_mm512_xor_si512(h, _mm512_srli_epi32(h, 13)), all(0xC2B2AE35u));
    return h;
  }
};
// The finalizer's last operation, of which the upper half does not see anything. The lower one comes with bits above
// it.
FUSEDOPT_FN Bits half_of(Bits h, int k) {
  const Bits upper = _mm512_srli_epi32(h, 16);
  return (k & 1) ? _mm512_xor_si512(h, upper) : upper;
}
FUSEDOPT_FN BitBlock halves_of(const BitBlock& h, int k) {
  BitBlock halves;
  for (int j = 0; j < kVectors; ++j) halves.at[j] = half_of(h.at[j], k);
  return halves;
}

// ---- parameters and gradients ------------------------------------------------------------------

FUSEDOPT_FN Bits widen(const uint16_t* codes) {
  return _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes))), 16);
}
FUSEDOPT_FN void narrow(Bits x, uint16_t* codes) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes), _mm512_cvtepi32_epi16(x));
}

// The upper half of x + added, but of NaN as BFloat16::keep_nan has it.
FUSEDOPT_FN Bits upper_half(Lanes x, Bits added) {
  const Bits rounded = _mm512_srli_epi32(_mm512_add_epi32(bits_of(x), added), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  return _mm512_mask_or_epi32(rounded, nan, _mm512_srli_epi32(bits_of(x), 16), all(0x40u));
}
// What rounding to nearest even adds.
FUSEDOPT_FN Bits half_even(Lanes x) {
  const Bits odd = _mm512_and_si512(_mm512_srli_epi32(bits_of(x), 16), all(1u));
  return _mm512_add_epi32(odd, all(0x7FFFu));
}

// A parameter, or a gradient of the same dtype, is one of these. kDraws: whether it takes random bits.
struct Float32Weights {
  static constexpr bool kDraws = false;
  float* p;
  const float* g;
  Float32Weights(const TensorDesc& t, int64_t at)
      : p(static_cast<float*>(t.param.data) + at), g(static_cast<const float*>(t.grad.data) + at) {}
  FUSEDOPT_FN Lanes load(int64_t i) const { return _mm512_loadu_ps(p + i); }
  FUSEDOPT_FN Lanes gradient(int64_t i) const { return _mm512_loadu_ps(g + i); }
  FUSEDOPT_FN void store(int64_t i, Lanes x, Bits) const { _mm512_storeu_ps(p + i, x); }
};

template <bool kStochastic>
struct BFloat16Weights {
  static constexpr bool kDraws = kStochastic;
  uint16_t* p;
  const uint16_t* g;
  BFloat16Weights(const TensorDesc& t, int64_t at)
      : p(static_cast<uint16_t*>(t.param.data) + at), g(static_cast<const uint16_t*>(t.grad.data) + at) {}
  FUSEDOPT_FN Lanes load(int64_t i) const { return lanes_of(widen(p + i)); }
  FUSEDOPT_FN Lanes gradient(int64_t i) const { return lanes_of(widen(g + i)); }
  FUSEDOPT_FN void store(int64_t i, Lanes x, Bits random) const {
    narrow(upper_half(x, kStochastic ? half_of(random, 0) : half_even(x)), p + i);
  }
};

template <bool kStochastic>
struct Split24Weights {
  static constexpr bool kDraws = kStochastic;
  uint16_t* p;
  const uint16_t* g;
  int8_t* low;
  Split24Weights(const TensorDesc& t, int64_t at)
      : p(static_cast<uint16_t*>(t.param.data) + at),
        g(static_cast<const uint16_t*>(t.grad.data) + at),
        low(static_cast<int8_t*>(t.master.data) + at) {}
  FUSEDOPT_FN Lanes load(int64_t i) const {
    const Bits rest = _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(low + i)));
    return lanes_of(_mm512_add_epi32(widen(p + i), _mm512_slli_epi32(rest, 8)));
  }
  FUSEDOPT_FN Lanes gradient(int64_t i) const { return lanes_of(widen(g + i)); }
  FUSEDOPT_FN void store(int64_t i, Lanes x, Bits random) const {
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    const Bits u = _mm512_mask_mov_epi32(bits_of(x), nan, all(0x7FC00000u));
    const Bits added = kStochastic ? _mm512_srli_epi32(random, 24) : all(0x80u);
    const Bits kept = _mm512_add_epi32(u, added);
    // Rounded to nearest, ties away. What the lowest byte holds neither carries nor is looked at again.
    narrow(_mm512_srli_epi32(_mm512_add_epi32(kept, all(0x8000u)), 16), p + i);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(low + i), _mm512_cvtepi32_epi8(_mm512_srli_epi32(kept, 8)));
  }
};

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
    return (row * _mm512_loadu_ps(columns + place.column + i)) * (g * multiplier);
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
struct GradientOf<Rule, std::enable_if_t<kIsNormalizing<Rule>>> {
  using type = FactoredGradient;
};

// Whether the gradients of a tensor come as that.
template <class Rule>
bool has_gradient_strips(const TensorDesc& tensor, const StepContext& context) {
  if constexpr (!kIsNormalizing<Rule>) {
    return true;
  } else {
    const auto& hyper = *static_cast<const typename Rule::Hyper*>(context.hyper);
    return Rule::kSecondMoment < 0 && !hyper.moments.is_clamped && tensor.factors.column_count % kStrip == 0;
  }
}

// ---- states ------------------------------------------------------------------------------------

struct Float32State {
  float* values;
  Float32State(const Buffer& state, int64_t at) : values(static_cast<float*>(state.data) + at) {}
  FUSEDOPT_FN float unit(int64_t) const { return 1.0f; }
  template <bool kSigned>
  FUSEDOPT_FN Lanes decode(int64_t i, float) const {
    return _mm512_loadu_ps(values + i);
  }
  template <bool kSigned>
  FUSEDOPT_FN BlockScale scale_of(const LaneBlock&) const {
    return {};
  }
  template <bool kSigned, bool kRoots>
  FUSEDOPT_FN void encode(int64_t i, const LaneBlock& x, const LaneBlock&, const BlockScale&, const BitBlock&,
                          int) const {
    for (int j = 0; j < kVectors; ++j) _mm512_storeu_ps(values + i + kVector * j, x.at[j]);
  }
};

struct BFloat16State {
  uint16_t* codes;
  bool nearest;
  BFloat16State(const Buffer& state, int64_t at)
      : codes(static_cast<uint16_t*>(state.data) + at), nearest(state.rounding == Rounding::kNearest) {}
  FUSEDOPT_FN float unit(int64_t) const { return 1.0f; }
  template <bool kSigned>
  FUSEDOPT_FN Lanes decode(int64_t i, float) const {
    return lanes_of(widen(codes + i));
  }
  template <bool kSigned>
  FUSEDOPT_FN BlockScale scale_of(const LaneBlock&) const {
    return {};
  }
  template <bool kSigned, bool kRoots>
  FUSEDOPT_FN void encode(int64_t i, const LaneBlock& x, const LaneBlock&, const BlockScale&, const BitBlock& random,
                          int k) const {
    for (int j = 0; j < kVectors; ++j) {
      const Bits drawn = _mm512_and_si512(half_of(random.at[j], k), all(0xFFFFu));
      narrow(upper_half(x.at[j], nearest ? half_even(x.at[j]) : drawn), codes + i + kVector * j);
    }
  }
};

struct BlockState {
  uint8_t* codes;
  uint8_t* scales;
  Draw draw;
  BlockState(const Buffer& state, int64_t at)
      : codes(static_cast<uint8_t*>(state.data) + at), scales(state.scales + at / kBlock), draw(state.rounding) {}

  FUSEDOPT_FN float unit(int64_t i) const { return Square8<true>::unit_of(scales[i / kBlock]); }

  template <bool kSigned>
  FUSEDOPT_FN Lanes decode(int64_t i, float unit) const {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i));
    const Bits code = kSigned ? _mm512_cvtepi8_epi32(bytes) : _mm512_cvtepu8_epi32(bytes);
    const Lanes q = _mm512_cvtepi32_ps(kSigned ? _mm512_and_si512(code, all(0x7Fu)) : code);
    const Lanes size = q * q * unit;
    return kSigned ? lanes_of(_mm512_ternarylogic_epi32(bits_of(size), code, all(kSignBit), 0xF8)) : size;
  }

  template <bool kSigned>
  FUSEDOPT_FN BlockScale scale_of(const LaneBlock& x) const {
    return Square8<kSigned>::scale_of(largest_of(x));
  }

  template <bool kSigned, bool kRoots>
  FUSEDOPT_FN void encode(int64_t i, const LaneBlock& x, const LaneBlock& roots, const BlockScale& scale,
                          const BitBlock& random, int k) const {
    scales[i / kBlock] = static_cast<uint8_t>(scale.code);
    if (__builtin_expect(scale.is_special(), false)) {
      _mm512_storeu_si512(codes + i, _mm512_setzero_si512());
      return;
    }
    _mm512_storeu_si512(codes + i, encode_block<kSigned, kRoots>(x, roots, scale, draw, halves_of(random, k)));
  }
};

// ---- the loop ----------------------------------------------------------------------------------

template <class Rule, class Weights, class State, size_t... k>
void step_strips(const TensorDesc& tensor, const StepContext& context, int64_t begin, int64_t length,
                 std::index_sequence<k...>) {
  const auto hyper = *static_cast<const typename Rule::Hyper*>(context.hyper);
  const uint32_t lo = static_cast<uint32_t>(tensor.first_index + begin);
  Stream streams[] = {{context.stream_keys[0], lo}, {context.stream_keys[1], lo}};
  Stream param_stream(context.stream_keys[kParamStream], lo);
  const Weights weights(tensor, begin);
  typename GradientOf<Rule>::type gradient(tensor, context, begin);
  // One more than there are states, since there may be none.
  const State states[] = {State(tensor.states[k], begin)..., State(tensor.states[0], 0)};
  const bool draws = ((tensor.states[k].rounding == Rounding::kStochastic) || ...);

  for (int64_t i = 0; i < length; i += kStrip) {
    [[maybe_unused]] const float units[] = {states[k].unit(i)..., 0.0f};
    [[maybe_unused]] LaneBlock decoded[sizeof...(k) + 1], roots;
    for (int j = 0; j < kVectors; ++j) {
      const int64_t at = i + kVector * j;
      Lanes p = weights.load(at);
      Lanes s[] = {states[k].template decode<Rule::kSigned[k]>(at, units[k])..., Lanes{}};
      roots.at[j] = Rule::update(p, gradient.of(weights.gradient(at), kVector * j), s, hyper);
      weights.store(at, p, Weights::kDraws ? param_stream.next() : Bits{});
      ((decoded[k].at[j] = s[k]), ...);
    }
    [[maybe_unused]] const BlockScale scales[] = {states[k].template scale_of<Rule::kSigned[k]>(decoded[k])..., {}};
    [[maybe_unused]] BitBlock random[sizeof...(k) / 2 + 1] = {};
    gradient.next_strip();
    if (draws) {
      for (size_t stream = 0; stream < (sizeof...(k) + 1) / 2; ++stream) {
        for (int j = 0; j < kVectors; ++j) random[stream].at[j] = streams[stream].next();
      }
    }
    (states[k].template encode<Rule::kSigned[k], Rule::kRooted == k>(i, decoded[k], roots, scales[k], random[k / 2],
                                                                     k & 1),
     ...);
  }
}

template <class T>
struct Type {
  using type = T;
};

template <class Rule, class State>
void step_strips_of(const TensorDesc& tensor, const StepContext& context, int64_t begin, int64_t length) {
  const auto step = [&](auto weights) {
    step_strips<Rule, typename decltype(weights)::type, State>(tensor, context, begin, length,
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

// Takes as much of a chunk as comes in strips of a layout that is known here; how many elements that were.
template <class Rule>
int64_t take_strips(const TensorDesc& tensor, const StepContext& context, int64_t begin, int64_t length) {
  if constexpr (Rule::kStates == 0 && !kIsNormalizing<Rule>) {
    return 0;
  } else {
    const bool has_weights = tensor.param.dtype == tensor.grad.dtype &&
                             (tensor.param.dtype == DType::kFloat32 ||
                              (tensor.param.dtype == DType::kBFloat16 &&
                               (tensor.master_format == Master::kNone || tensor.master_format == Master::kSplit24)));
    // The key of random bits changes where the upper half of an index does.
    const uint64_t index = static_cast<uint64_t>(tensor.first_index + begin);
    if (!has_weights || !has_gradient_strips<Rule>(tensor, context)) return 0;
    if (length < kStrip || (index >> 32) != ((index + static_cast<uint64_t>(length)) >> 32)) return 0;
    bool blocks = Rule::kStates > 0 && tensor.row == tensor.numel;  // rows of whole blocks
    bool halves = Rule::kStates > 0;
    // float32 throughout would leave nothing to decode.
    bool floats = tensor.param.dtype != DType::kFloat32 || kIsNormalizing<Rule>;
    for (int k = 0; k < Rule::kStates; ++k) {
      blocks &= tensor.states[k].is_blockwise() && tensor.states[k].is_signed == Rule::kSigned[k];
      halves &= tensor.states[k].dtype == DType::kBFloat16;
      floats &= tensor.states[k].dtype == DType::kFloat32;
    }
    const int64_t whole = length - length % kStrip;
    if (blocks) step_strips_of<Rule, BlockState>(tensor, context, begin, whole);
    if (halves) step_strips_of<Rule, BFloat16State>(tensor, context, begin, whole);
    if (floats) step_strips_of<Rule, Float32State>(tensor, context, begin, whole);
    return blocks || halves || floats ? whole : 0;
  }
}

}  // namespace
}  // namespace fusedopt

#endif
