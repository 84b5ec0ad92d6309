// THE loop over a chunk, compiled once per instruction set: decode a tile to fp32, apply the rule,
// encode it back. A tile lives in L1; numbers that are fp32 already are used in place. Formats and
// rules add here, they do not multiply.
#pragma once

#include "core/portable.h"
#include "cpu/kernels.h"
#include "rules/all.h"
#include "storage/dense.h"
#include "storage/random.h"

namespace fusedopt {
namespace {

constexpr int kTile = 256;       // elements; 512 measured 30 % slower for 16-bit formats
constexpr int kLine = 16;        // fp32 elements of a cache line
constexpr int kPrefetch = 2048;  // bytes ahead of the load; 1 to 4 KiB measured alike

// Asks for the line that lies kPrefetch bytes ahead, which may be past the end: a prefetch never faults.
FUSEDOPT_FN void prefetch(const void* address) {
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(address) + kPrefetch));
}

template <class Format>
void decode_tile(const uint16_t* source, float* target, int n) {
  for (int i = 0; i < n; i += 2 * kLine) prefetch(source + i);
#pragma GCC ivdep
  for (int i = 0; i < n; ++i) target[i] = Format::decode(source[i]);
}

template <class Format>
void encode_tile(const float* source, uint16_t* target, int n) {
#pragma GCC ivdep
  for (int i = 0; i < n; ++i) target[i] = Format::encode_nearest(source[i]);
}

template <class Format, int kHalf>
void encode_tile(const float* source, uint16_t* target, int n, const uint32_t* random) {
#pragma GCC ivdep
  for (int i = 0; i < n; ++i) target[i] = Format::encode_stochastic(source[i], half_of(random[i], kHalf));
}

// The fp32 values of n elements from `begin`: memory itself if it is fp32, else `tile`, decoded.
float* load(const Buffer& buffer, int64_t begin, int n, float* tile) {
  const uint16_t* source = static_cast<const uint16_t*>(buffer.data) + begin;
  switch (buffer.dtype) {
    case DType::kFloat32:
      return static_cast<float*>(buffer.data) + begin;
    case DType::kBFloat16:
      decode_tile<BFloat16>(source, tile, n);
      return tile;
    case DType::kFloat16:
      decode_tile<Float16>(source, tile, n);
      return tile;
  }
  return tile;
}

template <class Format>
void encode_as(Rounding rounding, const float* values, uint16_t* target, int n, const uint32_t* random, int half) {
  if (rounding == Rounding::kNearest) {
    encode_tile<Format>(values, target, n);
  } else if (half == 0) {
    encode_tile<Format, 0>(values, target, n, random);
  } else {
    encode_tile<Format, 1>(values, target, n, random);
  }
}

// Writes back what load gave; nothing to do where it was memory itself.
void store(const Buffer& buffer, int64_t begin, int n, const float* values, const uint32_t* random, int half) {
  uint16_t* target = static_cast<uint16_t*>(buffer.data) + begin;
  if (buffer.dtype == DType::kBFloat16) encode_as<BFloat16>(buffer.rounding, values, target, n, random, half);
  if (buffer.dtype == DType::kFloat16) encode_as<Float16>(buffer.rounding, values, target, n, random, half);
}

template <class Rule, int kCount>
FUSEDOPT_FN void update_run(float* p, const float* g, float* const (&s)[Rule::kStates], int begin, float multiplier,
                            const typename Rule::Hyper& hyper) {
#pragma GCC ivdep
  for (int i = begin; i < begin + kCount; ++i) {
    float param = p[i];
    float state[Rule::kStates];
    for (int k = 0; k < Rule::kStates; ++k) state[k] = s[k][i];
    Rule::update(param, g[i] * multiplier, state, hyper);
    p[i] = param;
    for (int k = 0; k < Rule::kStates; ++k) s[k][i] = state[k];
  }
}

template <class Rule>
void update_tile(float* p, const float* g, float* const (&s)[Rule::kStates], int n, float multiplier,
                 const typename Rule::Hyper& hyper) {
  int i = 0;
  for (; i + kLine <= n; i += kLine) {
    prefetch(p + i);
    prefetch(g + i);
    for (int k = 0; k < Rule::kStates; ++k) prefetch(s[k] + i);
    update_run<Rule, kLine>(p, g, s, i, multiplier, hyper);
  }
  for (; i < n; ++i) update_run<Rule, 1>(p, g, s, i, multiplier, hyper);
}

template <class Rule>
void step_chunk(const TensorDesc& tensor, const StepContext& context, int64_t begin, int64_t length) {
  alignas(64) float param_tile[kTile], grad_tile[kTile], state_tiles[Rule::kStates][kTile];
  alignas(64) uint32_t random[kTile];
  const auto hyper = *static_cast<const typename Rule::Hyper*>(context.hyper);

  const int64_t end = begin + length;
  for (int64_t at = begin; at < end;) {
    const uint64_t index = static_cast<uint64_t>(tensor.first_index + at);
    const uint32_t lo = static_cast<uint32_t>(index);
    const uint32_t hi = static_cast<uint32_t>(index >> 32);
    int n = static_cast<int>(end - at < kTile ? end - at : kTile);
    const uint64_t until_wrap = (uint64_t{1} << 32) - lo;  // random keys change where lo wraps
    if (static_cast<uint64_t>(n) > until_wrap) n = static_cast<int>(until_wrap);

    float* p = load(tensor.param, at, n, param_tile);
    const float* g = load(tensor.grad, at, n, grad_tile);
    float* s[Rule::kStates];
    for (int k = 0; k < Rule::kStates; ++k) s[k] = load(tensor.states[k], at, n, state_tiles[k]);

    update_tile<Rule>(p, g, s, n, context.grad_multiplier, hyper);

    store(tensor.param, at, n, p, nullptr, 0);
    int stream_held = -1;
    for (int k = 0; k < Rule::kStates; ++k) {
      const Buffer& state = tensor.states[k];
      if (state.rounding == Rounding::kStochastic && stream_held != k / 2) {
        stream_held = k / 2;
        const uint32_t key = key_at(context.stream_keys[k / 2], hi);
#pragma GCC ivdep
        for (int i = 0; i < n; ++i) random[i] = random_bits(lo + static_cast<uint32_t>(i), key);
      }
      store(state, at, n, s[k], random, k & 1);
    }
    at += n;
  }
}

}  // namespace
}  // namespace fusedopt

#include "cpu/reduce.inl"

// The table of this instruction set; `name` has external linkage, all else in this file has not.
#define FUSEDOPT_STEP_ENTRY(name, type) fusedopt::step_chunk<fusedopt::type>,
#define FUSEDOPT_KERNELS(name)               \
  namespace fusedopt {                       \
  extern const Kernels name;                 \
  const Kernels name = {                     \
      {FUSEDOPT_RULES(FUSEDOPT_STEP_ENTRY)}, \
      square_sum,                            \
  };                                         \
  }
