// Decode and encode of strips of 64 elements in registers: weights, states and random bits of strips.inl. Numbers go
// through the same operations as in storage/, so the bits are the same.
#pragma once

#include "cpu/blockwise_lanes.inl"
#include "cpu/kernels.h"
#include "storage/blockwise8.h"
#include "storage/random.h"

#if defined(__AVX2__)

namespace fusedopt {
namespace {

constexpr int kStrip = kBlock;  // elements

// ---- random bits -------------------------------------------------------------------------------

// Those of one strip after the other, each of which is a run of storage/random.h.
static_assert(kStrip == kRun);
struct Stream {
  uint32_t key, run;
  FUSEDOPT_FN Stream(uint32_t stream_key, uint32_t lo) : key(stream_key), run(lo / kRun) {}
  FUSEDOPT_FN RunBits next() { return {add(all(run_hash(run++, key)), multiply(count_lanes(), all(kGolden)))}; }
};
// The lower half comes with other bits above it.
FUSEDOPT_FN Bits half_of(Bits h, int k) { return (k & 1) ? h : shift_right<16>(h); }

// ---- parameters and gradients ------------------------------------------------------------------

// Stores the upper halves of 64 words, which words(j) gives.
template <class Words>
FUSEDOPT_FN void store_upper_halves_of(const Words& words, uint16_t* codes) {
  for (int begin = 0; begin < kVectors; begin += kPacked) {
    Bits packed[kPacked];
    for (int i = 0; i < kPacked; ++i) packed[i] = words(begin + i);
    store_upper_halves(packed, codes + kVector * begin);
  }
}

// What rounding to nearest even adds.
FUSEDOPT_FN Bits half_even(Lanes x) { return add(masked(shift_right<16>(bits_of(x)), all(1u)), all(0x7FFFu)); }

FUSEDOPT_FN bool has_nan(const LaneBlock& x) {
  Mask found = has_nan(x.at[0], x.at[1]);
  for (int j = 2; j < kVectors; j += 2) found = either(found, has_nan(x.at[j], x.at[j + 1]));
  return any(found);
}

// Stores the upper halves of x + added(j); NaN is stored as BFloat16::keep_nan does it.
template <class Added>
FUSEDOPT_FN void store_rounded(const LaneBlock& x, const Added& added, uint16_t* codes) {
  const auto rounded = [&](int j) { return add(bits_of(x.at[j]), added(j)); };
  if (__builtin_expect(has_nan(x), false)) {
    store_upper_halves_of(
        [&](int j) {
          const Bits quiet = merged(bits_of(x.at[j]), all(~0x400000u), all(0x400000u));
          return select(is_nan(x.at[j]), quiet, rounded(j));
        },
        codes);
  } else {
    store_upper_halves_of(rounded, codes);
  }
}

// Where the vectors of a strip come from.
struct Loaded {
  const float* x;
  FUSEDOPT_FN Lanes at(int j) const { return load_lanes(x + kVector * j); }
};
struct Widened {
  UpperHalves x;
  FUSEDOPT_FN Lanes at(int j) const { return lanes_of(x.at(j)); }
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
  FUSEDOPT_FN void store(int64_t i, const LaneBlock& x, const RunBits&) const {
    for (int j = 0; j < kVectors; ++j) store_lanes(p + i + kVector * j, x.at[j]);
  }
};

template <bool kStochastic>
struct BFloat16Weights {
  static constexpr bool kDraws = kStochastic;
  uint16_t* p;
  const uint16_t* g;
  BFloat16Weights(const TensorDesc& t, int64_t at)
      : p(static_cast<uint16_t*>(t.param.data) + at), g(static_cast<const uint16_t*>(t.grad.data) + at) {}
  FUSEDOPT_FN Widened load(int64_t i) const { return {UpperHalves(p + i)}; }
  FUSEDOPT_FN Widened gradient(int64_t i) const { return {UpperHalves(g + i)}; }
  FUSEDOPT_FN void store(int64_t i, const LaneBlock& x, const RunBits& random) const {
    store_rounded(x, [&](int j) { return kStochastic ? half_of(random.at(j), 0) : half_even(x.at[j]); }, p + i);
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
    UpperHalves high;
    const int8_t* low;
    FUSEDOPT_FN Lanes at(int j) const {
      const Bits upper = high.at(j);
      const Lanes joined = lanes_of(add(upper, shift_left<8>(load_bytes<true>(low + kVector * j))));
      return select(is_nan(joined), lanes_of(upper), joined);  // as `join`
    }
  };
  FUSEDOPT_FN Joined load(int64_t i) const { return {UpperHalves(p + i), low + i}; }
  FUSEDOPT_FN Widened gradient(int64_t i) const { return {UpperHalves(g + i)}; }
  FUSEDOPT_FN void store(int64_t i, const LaneBlock& x, const RunBits& random) const {
    for (int begin = 0; begin < kVectors; begin += kPacked) {
      Bits kept[kPacked], high[kPacked];
      for (int k = 0; k < kPacked; ++k) {
        const int j = begin + k;
        const Bits u = select(is_nan(x.at[j]), all(0x7FC00000u), bits_of(x.at[j]));
        kept[k] = add(u, kStochastic ? shift_right<24>(random.at(j)) : all(0x80u));
        // Rounded to nearest, ties away. The lowest byte carries nothing and is not looked at again.
        high[k] = add(kept[k], all(0x8000u));
      }
      store_upper_halves(high, p + i + kVector * begin);
      store_second_bytes(kept, low + i + kVector * begin);
    }
  }
};

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
  FUSEDOPT_FN void encode(int64_t i, const LaneBlock& x, const LaneBlock&, const BlockScale&, const RunBits&,
                          int) const {
    for (int j = 0; j < kVectors; ++j) store_lanes(values + i + kVector * j, x.at[j]);
  }
};

struct BFloat16State {
  uint16_t* codes;
  bool nearest;
  BFloat16State(const Buffer& state, int64_t at)
      : codes(static_cast<uint16_t*>(state.data) + at), nearest(state.rounding == Rounding::kNearest) {}
  template <bool kSigned>
  FUSEDOPT_FN Widened decode(int64_t i) const {
    return {UpperHalves(codes + i)};
  }
  template <bool kSigned>
  FUSEDOPT_FN BlockScale scale_of(const LaneBlock&) const {
    return {};
  }
  template <bool kSigned, bool kRoots>
  FUSEDOPT_FN void encode(int64_t i, const LaneBlock& x, const LaneBlock&, const BlockScale&, const RunBits& random,
                          int k) const {
    store_rounded(
        x, [&](int j) { return nearest ? half_even(x.at[j]) : masked(half_of(random.at(j), k), all(0xFFFFu)); },
        codes + i);
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
      const Bits code = load_bytes<kSigned>(codes + kVector * j);
      const Lanes q = from_integers(kSigned ? masked(code, all(0x7Fu)) : code);
      const Lanes size = q * q * unit;
      return kSigned ? lanes_of(merged(code, all(kSignBit), bits_of(size))) : size;
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
                          const RunBits& random, int k) const {
    scales[i / kBlock] = static_cast<uint8_t>(scale.code);
    if (__builtin_expect(scale.is_special(), false)) {
      memset(codes + i, 0, kBlock);
    } else {
      encode_block<kSigned, kRoots>(x, roots, scale, draw, random, k, codes + i);
    }
  }
};

}  // namespace
}  // namespace fusedopt

#endif
