// The loop of tile.inl for the layouts that most training runs have, in AVX-512: a strip of 64 elements is
// decoded, updated and encoded without leaving registers. Going through tiles in L1, the divisions of an
// update and the arithmetic of codes wait for each other; here they overlap, and a step in 8 bits takes two thirds
// of the time. Numbers go through the same operations as in storage/, hence to the same bits.
#pragma once

#if defined(__AVX512BW__)

#include <tuple>
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
  FUSEDOPT_FN BitBlock next_block() {
    BitBlock block;
    for (Bits& bits : block.at) bits = next();
    return block;
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

// 64 codes of 16 bits as the upper halves of 64 words, zeros below.
FUSEDOPT_FN BitBlock widen(const uint16_t* codes) {
  const Bits first = _mm512_loadu_si512(codes), second = _mm512_loadu_si512(codes + 2 * kVector);
  const Bits word = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const Bits lower = _mm512_slli_epi32(word, 16), upper = _mm512_add_epi32(lower, all(16u << 16));
  constexpr __mmask32 kOdd = 0xAAAAAAAAu;
  return {{_mm512_maskz_permutexvar_epi16(kOdd, lower, first), _mm512_maskz_permutexvar_epi16(kOdd, upper, first),
           _mm512_maskz_permutexvar_epi16(kOdd, lower, second), _mm512_maskz_permutexvar_epi16(kOdd, upper, second)}};
}

// The words of two vectors that are at 2 k, or at 2 k + 1.
FUSEDOPT_FN Bits even_words(Bits a, Bits b, bool odd) {
  const Bits word = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const Bits pair = _mm512_add_epi32(_mm512_slli_epi32(word, 2), _mm512_slli_epi32(word, 18));
  const Bits first = _mm512_add_epi32(pair, all(0x00020000u + (odd ? 0x00010001u : 0u)));
  return _mm512_permutex2var_epi16(a, first, b);
}

// Stores the upper halves of 64 words.
FUSEDOPT_FN void narrow(const BitBlock& x, uint16_t* codes) {
  _mm512_storeu_si512(codes, even_words(x.at[0], x.at[1], true));
  _mm512_storeu_si512(codes + 2 * kVector, even_words(x.at[2], x.at[3], true));
}

// What rounding to nearest even adds.
FUSEDOPT_FN Bits half_even(Lanes x) {
  const Bits odd = _mm512_and_si512(_mm512_srli_epi32(bits_of(x), 16), all(1u));
  return _mm512_add_epi32(odd, all(0x7FFFu));
}

FUSEDOPT_FN bool has_nan(const LaneBlock& x) {
  const __mmask16 first = _mm512_cmp_ps_mask(x.at[0], x.at[1], _CMP_UNORD_Q);
  return (first | _mm512_cmp_ps_mask(x.at[2], x.at[3], _CMP_UNORD_Q)) != 0;
}

// Stores the upper halves of x + added, but of NaN as BFloat16::keep_nan has it.
FUSEDOPT_FN void store_upper(const LaneBlock& x, const BitBlock& added, uint16_t* codes) {
  BitBlock rounded;
  for (int j = 0; j < kVectors; ++j) rounded.at[j] = _mm512_add_epi32(bits_of(x.at[j]), added.at[j]);
  if (__builtin_expect(has_nan(x), false)) {
    for (int j = 0; j < kVectors; ++j) {
      const __mmask16 nan = _mm512_cmp_ps_mask(x.at[j], x.at[j], _CMP_UNORD_Q);
      rounded.at[j] = _mm512_mask_or_epi32(rounded.at[j], nan, bits_of(x.at[j]), all(0x400000u));
    }
  }
  narrow(rounded, codes);
}

// Where the vectors of a strip come from: loaded when they are used, or widened all at once.
struct Loaded {
  const float* x;
  FUSEDOPT_FN Lanes at(int j) const { return _mm512_loadu_ps(x + kVector * j); }
};
struct Widened {
  BitBlock x;
  FUSEDOPT_FN Lanes at(int j) const { return lanes_of(x.at[j]); }
};

// A parameter, and a gradient of the same dtype, is one of these. kDraws: whether it takes random bits.
struct Float32Weights {
  static constexpr bool kDraws = false;
  float* p;
  const float* g;
  Float32Weights(const TensorDesc& t, int64_t at)
      : p(static_cast<float*>(t.param.data) + at), g(static_cast<const float*>(t.grad.data) + at) {}
  FUSEDOPT_FN Loaded load(int64_t i) const { return {p + i}; }
  FUSEDOPT_FN Loaded gradient(int64_t i) const { return {g + i}; }
  FUSEDOPT_FN void store(int64_t i, const LaneBlock& x, const BitBlock&) const {
    for (int j = 0; j < kVectors; ++j) _mm512_storeu_ps(p + i + kVector * j, x.at[j]);
  }
};

template <bool kStochastic>
struct BFloat16Weights {
  static constexpr bool kDraws = kStochastic;
  uint16_t* p;
  const uint16_t* g;
  BFloat16Weights(const TensorDesc& t, int64_t at)
      : p(static_cast<uint16_t*>(t.param.data) + at), g(static_cast<const uint16_t*>(t.grad.data) + at) {}
  FUSEDOPT_FN Widened load(int64_t i) const { return {widen(p + i)}; }
  FUSEDOPT_FN Widened gradient(int64_t i) const { return {widen(g + i)}; }
  FUSEDOPT_FN void store(int64_t i, const LaneBlock& x, const BitBlock& random) const {
    BitBlock added;
    for (int j = 0; j < kVectors; ++j) {
      added.at[j] = kStochastic ? half_of(random.at[j], 0) : half_even(x.at[j]);
    }
    store_upper(x, added, p + i);
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
  struct Joined {
    BitBlock high;
    const int8_t* low;
    FUSEDOPT_FN Lanes at(int j) const {
      const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(low + kVector * j));
      return lanes_of(_mm512_add_epi32(high.at[j], _mm512_slli_epi32(_mm512_cvtepi8_epi32(bytes), 8)));
    }
  };
  FUSEDOPT_FN Joined load(int64_t i) const { return {widen(p + i), low + i}; }
  FUSEDOPT_FN Widened gradient(int64_t i) const { return {widen(g + i)}; }
  FUSEDOPT_FN void store(int64_t i, const LaneBlock& x, const BitBlock& random) const {
    BitBlock kept, high;
    for (int j = 0; j < kVectors; ++j) {
      const __mmask16 nan = _mm512_cmp_ps_mask(x.at[j], x.at[j], _CMP_UNORD_Q);
      const Bits u = _mm512_mask_mov_epi32(bits_of(x.at[j]), nan, all(0x7FC00000u));
      kept.at[j] = _mm512_add_epi32(u, kStochastic ? _mm512_srli_epi32(random.at[j], 24) : all(0x80u));
      // Rounded to nearest, ties away. What the lowest byte holds neither carries nor is looked at again.
      high.at[j] = _mm512_add_epi32(kept.at[j], all(0x8000u));
    }
    narrow(high, p + i);
    // The second byte of each word: of the lower halves the upper bytes. Packing works within 128-bit lanes.
    const Bits first = _mm512_srli_epi16(even_words(kept.at[0], kept.at[1], false), 8);
    const Bits second = _mm512_srli_epi16(even_words(kept.at[2], kept.at[3], false), 8);
    const Bits order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
    _mm512_storeu_si512(low + i, _mm512_permutexvar_epi64(order, _mm512_packus_epi16(first, second)));
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
  template <bool kSigned>
  FUSEDOPT_FN Loaded decode(int64_t i) const {
    return {values + i};
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
  template <bool kSigned>
  FUSEDOPT_FN Widened decode(int64_t i) const {
    return {widen(codes + i)};
  }
  template <bool kSigned>
  FUSEDOPT_FN BlockScale scale_of(const LaneBlock&) const {
    return {};
  }
  template <bool kSigned, bool kRoots>
  FUSEDOPT_FN void encode(int64_t i, const LaneBlock& x, const LaneBlock&, const BlockScale&, const BitBlock& random,
                          int k) const {
    BitBlock added;
    for (int j = 0; j < kVectors; ++j) {
      const Bits drawn = _mm512_and_si512(half_of(random.at[j], k), all(0xFFFFu));
      added.at[j] = nearest ? half_even(x.at[j]) : drawn;
    }
    store_upper(x, added, codes + i);
  }
};

struct BlockState {
  uint8_t* codes;
  uint8_t* scales;
  Draw draw;
  BlockState(const Buffer& state, int64_t at)
      : codes(static_cast<uint8_t*>(state.data) + at), scales(state.scales + at / kBlock), draw(state.rounding) {}

  template <bool kSigned>
  struct Decoded {
    const uint8_t* codes;
    float unit;
    FUSEDOPT_FN Lanes at(int j) const {
      const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + kVector * j));
      const Bits code = kSigned ? _mm512_cvtepi8_epi32(bytes) : _mm512_cvtepu8_epi32(bytes);
      const Lanes q = _mm512_cvtepi32_ps(kSigned ? _mm512_and_si512(code, all(0x7Fu)) : code);
      const Lanes size = q * q * unit;
      return kSigned ? lanes_of(_mm512_ternarylogic_epi32(bits_of(size), code, all(kSignBit), 0xF8)) : size;
    }
  };
  template <bool kSigned>
  FUSEDOPT_FN Decoded<kSigned> decode(int64_t i) const {
    return {codes + i, Square8<kSigned>::unit_of(scales[i / kBlock])};
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
    weights.store(i, p, Weights::kDraws ? param_stream.next_block() : BitBlock{});
    [[maybe_unused]] const BlockScale scales[] = {states[k].template scale_of<Rule::kSigned[k]>(decoded[k])..., {}};
    [[maybe_unused]] BitBlock random[sizeof...(k) / 2 + 1] = {};
    gradient.next_strip();
    if (draws) {
      for (size_t stream = 0; stream < (sizeof...(k) + 1) / 2; ++stream) random[stream] = streams[stream].next_block();
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
