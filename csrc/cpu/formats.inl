// Decode and encode of a tile: dense and blockwise states, parameters with their masters. Neither rules
// nor the order of a step are known here.
#pragma once

#include "core/portable.h"
#include "core/tensors.h"
#include "cpu/blockwise_lanes.inl"
#include "storage/blockwise8.h"
#include "storage/dense.h"
#include "storage/master.h"
#include "storage/random.h"

namespace fusedopt {
namespace {

constexpr int kTile = 256;  // elements; 512 measured 30 % slower for 16-bit formats
template <class Number>
FUSEDOPT_FN Number* at(const Buffer& buffer, int64_t begin) {
  return static_cast<Number*>(buffer.data) + begin;
}

// How many elements from `at` on make a tile: to the end of the chunk and, where there are blocks, of the row.
FUSEDOPT_FN int tile_length(const TensorDesc& tensor, bool ends_with_rows, int64_t at, int64_t end) {
  int64_t n = end - at < kTile ? end - at : kTile;
  if (ends_with_rows) {
    const int64_t left = at < tensor.row ? tensor.row - at : tensor.row - at % tensor.row;
    if (n > left) n = left;
  }
  return static_cast<int>(n);
}

// ---- dense -------------------------------------------------------------------------------------

template <class Format>
void decode_tile(const uint16_t* source, float* target, int n) {
#pragma GCC ivdep
  for (int i = 0; i < n; ++i) target[i] = Format::decode(source[i]);
}

template <class Format>
void encode_tile(const float* source, uint16_t* target, int n) {
#pragma GCC ivdep
  for (int i = 0; i < n; ++i) target[i] = Format::encode_nearest(source[i]);
}

template <class Format, int kHalfIndex>
void encode_tile(const float* source, uint16_t* target, int n, const uint32_t* random) {
#pragma GCC ivdep
  for (int i = 0; i < n; ++i) target[i] = Format::encode_stochastic(source[i], half_of(random[i], kHalfIndex));
}

// The fp32 values of n elements from `begin`: memory itself if it is fp32, else `tile`, decoded.
float* load(const Buffer& buffer, int64_t begin, int n, float* tile) {
  if (buffer.dtype == DType::kFloat32) return at<float>(buffer, begin);
  if (buffer.dtype == DType::kBFloat16) decode_tile<BFloat16>(at<uint16_t>(buffer, begin), tile, n);
  if (buffer.dtype == DType::kFloat16) decode_tile<Float16>(at<uint16_t>(buffer, begin), tile, n);
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
void store(const Buffer& buffer, Rounding rounding, int64_t begin, int n, const float* values, const uint32_t* random,
           int half) {
  uint16_t* target = at<uint16_t>(buffer, begin);
  if (buffer.dtype == DType::kBFloat16) encode_as<BFloat16>(rounding, values, target, n, random, half);
  if (buffer.dtype == DType::kFloat16) encode_as<Float16>(rounding, values, target, n, random, half);
}

// ---- blockwise ---------------------------------------------------------------------------------

// The index of the block that begins at an element. Rows of whole blocks count as one long row.
FUSEDOPT_FN int64_t block_index(int64_t row, int64_t begin) {
  if (begin < row) return begin / kBlock;
  return begin / row * ((row + kBlock - 1) / kBlock) + begin % row / kBlock;
}

template <bool kSigned>
void decode_blocks(const uint8_t* codes, const uint8_t* scales, float* target, int n) {
  for (int begin = 0; begin < n; begin += kBlock) {
    const float unit = Square8<kSigned>::unit_of(scales[begin / kBlock]);
    if (begin + kBlock <= n) {
#pragma GCC ivdep
      for (int i = begin; i < begin + kBlock; ++i) target[i] = Square8<kSigned>::decode(codes[i], unit);
    } else {
      for (int i = begin; i < n; ++i) target[i] = Square8<kSigned>::decode(codes[i], unit);
    }
  }
}

// The largest magnitude of n numbers, as an integer: integers have the order of the numbers, with NaN above all.
FUSEDOPT_FN uint32_t largest_of(const float* values, int n) {
#if defined(__AVX2__)
  if (n == kBlock) return largest_of(load_block(values));
#endif
  int32_t top = 0;
  for (int i = 0; i < n; ++i) {
    const int32_t size = static_cast<int32_t>(bits_of(values[i]) & ~kSignBit);
    top = size > top ? size : top;
  }
  return static_cast<uint32_t>(top);
}

// kHalfIndex: which half of `random` is this state's; -1 rounds to nearest. kRoots: whether `roots` holds the
// square roots of the values.
template <bool kSigned, int kHalfIndex, bool kRoots>
FUSEDOPT_FN void encode_run(const float* values, const float* roots, uint8_t* codes, int n, const BlockScale& scale,
                            const uint32_t* random) {
#pragma GCC ivdep
  for (int i = 0; i < n; ++i) {
    const float size = float_of(bits_of(values[i]) & ~kSignBit);
    const float threshold = kHalfIndex < 0 ? kHalf : fraction_of(half_of(random[i], kHalfIndex));
    codes[i] = Square8<kSigned>::encode(values[i], kRoots ? roots[i] : root(size), scale, threshold);
  }
}

template <bool kSigned, int kHalfIndex, bool kRoots>
FUSEDOPT_FN void encode_whole_block(const float* values, const float* roots, uint8_t* codes, const BlockScale& scale,
                                    const uint32_t* random) {
#if defined(__AVX2__)
  const Draw draw(kHalfIndex < 0 ? Rounding::kNearest : Rounding::kStochastic);
  const LoadedBits bits{kHalfIndex < 0 ? reinterpret_cast<const uint32_t*>(values) : random};  // or anything
  encode_block<kSigned, kRoots>(load_block(values), kRoots ? load_block(roots) : LaneBlock{}, scale, draw, bits,
                                kHalfIndex, codes);
#else
  encode_run<kSigned, kHalfIndex, kRoots>(values, roots, codes, kBlock, scale, random);
#endif
}

template <bool kSigned, int kHalfIndex, bool kRoots>
void encode_blocks(const float* values, const float* roots, uint8_t* codes, uint8_t* scales, int n,
                   const uint32_t* random) {
  for (int begin = 0; begin < n; begin += kBlock) {
    const int length = n - begin < kBlock ? n - begin : kBlock;
    const BlockScale scale = Square8<kSigned>::scale_of(largest_of(values + begin, length));
    scales[begin / kBlock] = static_cast<uint8_t>(scale.code);
    if (scale.is_special()) {
      memset(codes + begin, 0, static_cast<size_t>(length));
    } else if (length < kBlock) {
      encode_run<kSigned, kHalfIndex, kRoots>(values + begin, roots + begin, codes + begin, length, scale,
                                              random + begin);
    } else {
      encode_whole_block<kSigned, kHalfIndex, kRoots>(values + begin, roots + begin, codes + begin, scale,
                                                      random + begin);
    }
  }
}

template <bool kSigned, bool kRoots>
void encode_blocks_as(int half, const float* values, const float* roots, uint8_t* codes, uint8_t* scales, int n,
                      const uint32_t* random) {
  if (half < 0) encode_blocks<kSigned, -1, kRoots>(values, roots, codes, scales, n, random);
  if (half == 0) encode_blocks<kSigned, 0, kRoots>(values, roots, codes, scales, n, random);
  if (half == 1) encode_blocks<kSigned, 1, kRoots>(values, roots, codes, scales, n, random);
}

// ---- a state of either kind --------------------------------------------------------------------

float* load_state(const Buffer& state, int64_t row, int64_t begin, int n, float* tile) {
  if (!state.is_blockwise()) return load(state, begin, n, tile);
  const uint8_t* scales = state.scales + block_index(row, begin);
  if (state.is_signed) {
    decode_blocks<true>(at<uint8_t>(state, begin), scales, tile, n);
  } else {
    decode_blocks<false>(at<uint8_t>(state, begin), scales, tile, n);
  }
  return tile;
}

// `roots`: the values' square roots if the rule had them, else null.
void store_state(const Buffer& state, int64_t row, int64_t begin, int n, const float* values, const float* roots,
                 const uint32_t* random, int half) {
  if (!state.is_blockwise()) return store(state, state.rounding, begin, n, values, random, half);
  uint8_t* codes = at<uint8_t>(state, begin);
  uint8_t* scales = state.scales + block_index(row, begin);
  if (state.rounding == Rounding::kNearest) half = -1;
  if (state.is_signed) return encode_blocks_as<true, false>(half, values, values, codes, scales, n, random);
  if (roots == nullptr) return encode_blocks_as<false, false>(half, values, values, codes, scales, n, random);
  encode_blocks_as<false, true>(half, values, roots, codes, scales, n, random);
}

// ---- a parameter with its master ---------------------------------------------------------------

template <class Low>
void join_tile(const uint16_t* high, const Low* low, float* target, int n) {
#pragma GCC ivdep
  for (int i = 0; i < n; ++i) {
    target[i] = join(high[i], static_cast<int16_t>(sizeof(Low) == 1 ? low[i] * 256 : low[i]));
  }
}

void split32_tile(const float* source, uint16_t* high, int16_t* low, int n) {
#pragma GCC ivdep
  for (int i = 0; i < n; ++i) {
    const Split split = split32(source[i]);
    high[i] = split.high;
    low[i] = split.low;
  }
}

// Rounded to nearest where `random` is null.
void split24_tile(const float* source, uint16_t* high, int8_t* low, int n, const uint32_t* random) {
  if (random == nullptr) {
    for (int i = 0; i < n; ++i) {
      const Split split = split24(source[i], 0x80u);
      high[i] = split.high;
      low[i] = static_cast<int8_t>(split.low >> 8);
    }
    return;
  }
#pragma GCC ivdep
  for (int i = 0; i < n; ++i) {
    const Split split = split24(source[i], random[i] >> 24);
    high[i] = split.high;
    low[i] = static_cast<int8_t>(split.low >> 8);
  }
}

template <class Format>
void adopt_written(const uint16_t* codes, float* master, int n) {
#pragma GCC ivdep
  for (int i = 0; i < n; ++i) {
    const float kept = master[i];
    master[i] = is_rounding_of<Format>(codes[i], kept) ? kept : Format::decode(codes[i]);
  }
}

// The weights to compute with, of n elements from `begin`: memory itself, or decoded into `tile`.
float* load_param(const TensorDesc& tensor, int64_t begin, int n, float* tile, float* spare) {
  const Buffer& param = tensor.param;
  const Buffer& master = tensor.master;
  const uint16_t* codes = at<uint16_t>(param, begin);
  switch (tensor.master_format) {
    case Master::kNone:
      return load(param, begin, n, tile);
    case Master::kSplit24:
      join_tile(codes, at<int8_t>(master, begin), tile, n);
      return tile;
    case Master::kSplit32:
      join_tile(codes, at<int16_t>(master, begin), tile, n);
      return tile;
    case Master::kKahan: {
      const float* p = load(param, begin, n, tile);
      const float* rest = load(master, begin, n, spare);
#pragma GCC ivdep
      for (int i = 0; i < n; ++i) tile[i] = p[i] + rest[i];
      return tile;
    }
    case Master::kFloat32:
      if (param.dtype == DType::kBFloat16) adopt_written<BFloat16>(codes, at<float>(master, begin), n);
      if (param.dtype == DType::kFloat16) adopt_written<Float16>(codes, at<float>(master, begin), n);
      return at<float>(master, begin);
  }
  return tile;
}

// Writes back the weights `w` that load_param gave. `random`: the bits of the parameter's stream.
void store_param(const TensorDesc& tensor, int64_t begin, int n, float* w, float* spare, const uint32_t* random) {
  const Buffer& param = tensor.param;
  const Buffer& master = tensor.master;
  const Rounding rounding = param.rounding;
  uint16_t* codes = at<uint16_t>(param, begin);
  switch (tensor.master_format) {
    case Master::kNone:
    case Master::kFloat32:
      return store(param, rounding, begin, n, w, random, 0);
    case Master::kSplit24:
      return split24_tile(w, codes, at<int8_t>(master, begin), n, rounding == Rounding::kNearest ? nullptr : random);
    case Master::kSplit32:
      return split32_tile(w, codes, at<int16_t>(master, begin), n);
    case Master::kKahan: {
      store(param, Rounding::kNearest, begin, n, w, nullptr, 0);
      const float* p = load(param, begin, n, spare);
#pragma GCC ivdep
      for (int i = 0; i < n; ++i) w[i] = remainder_of(w[i], p[i]);
      if (master.dtype == DType::kFloat32) {
        memcpy(at<float>(master, begin), w, sizeof(float) * static_cast<size_t>(n));
      } else {
        store(master, rounding, begin, n, w, random, 0);
      }
      return;
    }
  }
}

}  // namespace
}  // namespace fusedopt
