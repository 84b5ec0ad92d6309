// Decode and encode of strips of 64 elements in AVX-512 registers: weights, states and random bits of
// strips_avx512.inl. Numbers go through the same operations as in storage/, so the bits are the same.
#pragma once

#if defined(__AVX512BW__)

#include "cpu/blockwise_avx512.inl"
#include "cpu/kernels.h"
#include "storage/blockwise8.h"
#include "storage/random.h"

namespace fusedopt {
namespace {

constexpr int kStrip = kBlock;  // elements

// ---- random bits -------------------------------------------------------------------------------

// The bits of consecutive strips, by storage/random.h. Strips that begin in the middle of a run end in the next one.
struct Stream {
  uint32_t key, run, within, hash;  // of the first element of the next strip
  FUSEDOPT_FN Stream(uint32_t stream_key, uint32_t lo)
      : key(stream_key), run(lo / kRun), within(lo % kRun), hash(run_hash(run, key)) {}
  FUSEDOPT_FN BitBlock next_block() {
    const Bits lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const Bits weyl = _mm512_mullo_epi32(lane, all(kGolden));
    const Bits first = _mm512_add_epi32(all(hash + within * kGolden), weyl);
    BitBlock block;
    for (int j = 0; j < kVectors; ++j) {
      block.at[j] = _mm512_add_epi32(first, all(static_cast<uint32_t>(kVector * j) * kGolden));
    }
    const uint32_t next_hash = run_hash(++run, key);
    if (__builtin_expect(within != 0, false)) {
      const Bits change = all(next_hash - hash - kRun * kGolden);
      for (int j = 0; j < kVectors; ++j) {
        const Bits place = _mm512_add_epi32(lane, all(static_cast<uint32_t>(kVector * j) + within));
        const __mmask16 is_next = _mm512_cmpge_epi32_mask(place, all(kRun));
        block.at[j] = _mm512_mask_add_epi32(block.at[j], is_next, block.at[j], change);
      }
    }
    hash = next_hash;
    return block;
  }
};
// The lower half comes with other bits above it.
FUSEDOPT_FN Bits half_of(Bits h, int k) { return (k & 1) ? h : _mm512_srli_epi32(h, 16); }

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

// The words of two vectors at the even places, or at the odd ones.
FUSEDOPT_FN Bits alternate_words(Bits a, Bits b, bool odd) {
  const Bits word = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const Bits pair = _mm512_add_epi32(_mm512_slli_epi32(word, 2), _mm512_slli_epi32(word, 18));
  const Bits first = _mm512_add_epi32(pair, all(0x00020000u + (odd ? 0x00010001u : 0u)));
  return _mm512_permutex2var_epi16(a, first, b);
}

// Stores the upper halves of 64 words.
FUSEDOPT_FN void narrow(const BitBlock& x, uint16_t* codes) {
  _mm512_storeu_si512(codes, alternate_words(x.at[0], x.at[1], true));
  _mm512_storeu_si512(codes + 2 * kVector, alternate_words(x.at[2], x.at[3], true));
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

// Stores the upper halves of x + added; NaN is stored as BFloat16::keep_nan does it.
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
      // Rounded to nearest, ties away. The lowest byte carries nothing and is not looked at again.
      high.at[j] = _mm512_add_epi32(kept.at[j], all(0x8000u));
    }
    narrow(high, p + i);
    // The second byte of each word, which is the upper byte of its lower half. Packing works within 128-bit lanes.
    const Bits first = _mm512_srli_epi16(alternate_words(kept.at[0], kept.at[1], false), 8);
    const Bits second = _mm512_srli_epi16(alternate_words(kept.at[2], kept.at[3], false), 8);
    const Bits order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
    _mm512_storeu_si512(low + i, _mm512_permutexvar_epi64(order, _mm512_packus_epi16(first, second)));
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
    _mm512_storeu_si512(codes + i, encode_block<kSigned, kRoots>(x, roots, scale, draw, random, k));
  }
};

}  // namespace
}  // namespace fusedopt

#endif
