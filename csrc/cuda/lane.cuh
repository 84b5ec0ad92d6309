// Decode and encode of the part of a tile that one lane of a warp has: eight numbers, in registers. The formats are
// those of storage/; the format of a buffer is the same for all lanes.
#pragma once

#include <cuda_runtime.h>

#include "core/tensors.h"
#include "cuda/descriptors.h"
#include "storage/blockwise8.h"
#include "storage/dense.h"
#include "storage/master.h"
#include "storage/random.h"

#define FUSEDOPT_DEVICE __device__ __forceinline__

namespace fusedopt::cuda {
namespace {

// The last tensor that begins at a block or before it.
template <class Tensor>
FUSEDOPT_DEVICE int find_tensor(const Tensor* tensors, int count, uint32_t block) {
  int low = 0, high = count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (tensors[middle].first_block <= block ? low : high) = middle;
  }
  return low;
}

// The elements of a tile that a lane has: two runs of four. Side by side, they are one access of 16 bytes in a 16-bit
// format; half a tile apart, accesses of 16 bytes to float32 leave no gaps between lanes.
struct Place {
  int64_t begin;  // of the tile, in its tensor
  int runs[2];    // within the tile
  int count;      // elements of the tile
  bool is_whole;  // all 256, aligned
  bool is_split;  // the runs are half a tile apart

  FUSEDOPT_DEVICE int offset(int j) const { return runs[j / 4] + j % 4; }
  FUSEDOPT_DEVICE bool holds(int j) const { return offset(j) < count; }
};

FUSEDOPT_DEVICE Place place_of(int lane, int64_t begin, int count, bool is_aligned, bool is_split) {
  Place place;
  place.begin = begin;
  place.runs[0] = is_split ? lane * 4 : lane * 8;
  place.runs[1] = is_split ? kTile / 2 + lane * 4 : lane * 8 + 4;
  place.count = count;
  place.is_whole = is_aligned && count == kTile;
  place.is_split = is_split;
  return place;
}

// Eight numbers of 1, 2 or 4 bytes, as they lie in memory. Past the end of the tile they are 0.
template <class Number>
struct Eight {
  Number at[kLane];
};

template <class Vector, class Number>
FUSEDOPT_DEVICE void load_vector(const Number* source, Number* target) {
  const Vector loaded = *reinterpret_cast<const Vector*>(source);
  memcpy(target, &loaded, sizeof loaded);
}

// An assignment would do, but the compiler would take it apart and merge it with the stores of single numbers.
template <class Vector, class Number>
FUSEDOPT_DEVICE void store_vector(const Number* source, Number* target) {
  Vector stored;
  memcpy(&stored, source, sizeof stored);
  __stwb(reinterpret_cast<Vector*>(target), stored);
}

// Vectors of 4 and of 8 numbers of a given size.
template <int kBytes>
struct Vectors;
template <>
struct Vectors<1> {
  using Four = uint32_t;
  using Eight = uint2;
};
template <>
struct Vectors<2> {
  using Four = uint2;
  using Eight = uint4;
};
template <>
struct Vectors<4> {
  using Four = uint4;
};

template <class Number>
FUSEDOPT_DEVICE Eight<Number> load_eight(const void* data, const Place& place) {
  const Number* source = static_cast<const Number*>(data) + place.begin;
  Eight<Number> x;
  if (place.is_whole) {
    if constexpr (sizeof(Number) < 4) {
      if (!place.is_split) {
        load_vector<typename Vectors<sizeof(Number)>::Eight>(source + place.runs[0], x.at);
        return x;
      }
    }
    load_vector<typename Vectors<sizeof(Number)>::Four>(source + place.runs[0], x.at);
    load_vector<typename Vectors<sizeof(Number)>::Four>(source + place.runs[1], x.at + 4);
    return x;
  }
#pragma unroll
  for (int j = 0; j < kLane; ++j) x.at[j] = place.holds(j) ? source[place.offset(j)] : Number{};
  return x;
}

template <class Number>
FUSEDOPT_DEVICE void store_eight(const Eight<Number>& x, void* data, const Place& place) {
  Number* target = static_cast<Number*>(data) + place.begin;
  if (place.is_whole) {
    if constexpr (sizeof(Number) < 4) {
      if (!place.is_split) {
        store_vector<typename Vectors<sizeof(Number)>::Eight>(x.at, target + place.runs[0]);
        return;
      }
    }
    store_vector<typename Vectors<sizeof(Number)>::Four>(x.at, target + place.runs[0]);
    store_vector<typename Vectors<sizeof(Number)>::Four>(x.at + 4, target + place.runs[1]);
    return;
  }
#pragma unroll
  for (int j = 0; j < kLane; ++j) {
    if (place.holds(j)) target[place.offset(j)] = x.at[j];
  }
}

// ---- dense -------------------------------------------------------------------------------------

FUSEDOPT_DEVICE void load(const void* data, uint32_t dtype, const Place& place, float (&x)[kLane]) {
  if (static_cast<DType>(dtype) == DType::kFloat32) {
    const Eight<float> loaded = load_eight<float>(data, place);
#pragma unroll
    for (int j = 0; j < kLane; ++j) x[j] = loaded.at[j];
    return;
  }
  const Eight<uint16_t> codes = load_eight<uint16_t>(data, place);
  if (static_cast<DType>(dtype) == DType::kBFloat16) {
#pragma unroll
    for (int j = 0; j < kLane; ++j) x[j] = BFloat16::decode(codes.at[j]);
  } else {
#pragma unroll
    for (int j = 0; j < kLane; ++j) x[j] = Float16::decode(codes.at[j]);
  }
}

template <class Format>
FUSEDOPT_DEVICE Eight<uint16_t> encode(const float (&x)[kLane], bool rounds, const uint32_t (&random)[kLane],
                                       int half) {
  Eight<uint16_t> codes;
  if (rounds) {
#pragma unroll
    for (int j = 0; j < kLane; ++j) codes.at[j] = Format::encode_stochastic(x[j], half_of(random[j], half));
  } else {
#pragma unroll
    for (int j = 0; j < kLane; ++j) codes.at[j] = Format::encode_nearest(x[j]);
  }
  return codes;
}

FUSEDOPT_DEVICE Eight<uint16_t> encode_as(DType dtype, const float (&x)[kLane], bool rounds,
                                          const uint32_t (&random)[kLane], int half) {
  return dtype == DType::kBFloat16 ? encode<BFloat16>(x, rounds, random, half)
                                   : encode<Float16>(x, rounds, random, half);
}

FUSEDOPT_DEVICE void store(void* data, uint32_t dtype, bool rounds, const Place& place, const float (&x)[kLane],
                           const uint32_t (&random)[kLane], int half) {
  if (static_cast<DType>(dtype) == DType::kFloat32) {
    Eight<float> stored;
#pragma unroll
    for (int j = 0; j < kLane; ++j) stored.at[j] = x[j];
    store_eight(stored, data, place);
  } else {
    store_eight(encode_as(static_cast<DType>(dtype), x, rounds, random, half), data, place);
  }
}

// The random bits of a lane's elements. The upper half of the index, and with it the key, may change in the middle of a
// run.
FUSEDOPT_DEVICE void draw(uint32_t stream_key, int64_t first_index, const Place& place, uint32_t (&random)[kLane]) {
#pragma unroll
  for (int run = 0; run < 2; ++run) {
    const uint64_t index = static_cast<uint64_t>(first_index + place.begin + place.runs[run]);
    const uint32_t lo = static_cast<uint32_t>(index), hi = static_cast<uint32_t>(index >> 32);
    const uint32_t key = key_at(stream_key, hi);
    const uint32_t next = lo > 0xFFFFFFFFu - 3u ? key_at(stream_key, hi + 1) : key;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint32_t at = lo + static_cast<uint32_t>(j);
      random[run * 4 + j] = random_bits(at, at < lo ? next : key);
    }
  }
}

// ---- blockwise: eight lanes side by side have a block --------------------------------------------

template <bool kSigned>
FUSEDOPT_DEVICE void decode_codes(const void* codes, uint8_t scale, const Place& place, float (&x)[kLane]) {
  const Eight<uint8_t> loaded = load_eight<uint8_t>(codes, place);
  const float unit = Square8<kSigned>::unit_of(scale);
#pragma unroll
  for (int j = 0; j < kLane; ++j) x[j] = Square8<kSigned>::decode(loaded.at[j], unit);
}

// The largest magnitude of a block, as an integer. All lanes of a warp call this.
FUSEDOPT_DEVICE uint32_t largest_of_block(const float (&x)[kLane], const Place& place) {
  uint32_t top = 0;
#pragma unroll
  for (int j = 0; j < kLane; ++j) {
    const uint32_t size = place.holds(j) ? bits_of(x[j]) & ~kSignBit : 0u;
    top = size > top ? size : top;
  }
#pragma unroll
  for (int other = 1; other < kBlock / kLane; other *= 2) {
    const uint32_t size = __shfl_xor_sync(0xFFFFFFFFu, top, other);
    top = size > top ? size : top;
  }
  return top;
}

// `roots`: the square roots of the numbers, if kRoots.
template <bool kSigned, bool kRoots>
FUSEDOPT_DEVICE void store_codes(void* codes, uint8_t* scale_at, bool rounds, const Place& place,
                                 const float (&x)[kLane], const float (&roots)[kLane], const uint32_t (&random)[kLane],
                                 int half) {
  const BlockScale scale = Square8<kSigned>::scale_of(largest_of_block(x, place));
  Eight<uint8_t> encoded{};
  if (!scale.is_special()) {
#pragma unroll
    for (int j = 0; j < kLane; ++j) {
      const float rooted = kRoots ? roots[j] : root(float_of(bits_of(x[j]) & ~kSignBit));
      const uint32_t bits = rounds ? half_of(random[j], half) | 1u : kHalf;
      encoded.at[j] = Square8<kSigned>::encode(x[j], rooted, scale, bits);
    }
  }
  store_eight(encoded, codes, place);
  if (place.runs[0] % kBlock == 0 && place.holds(0)) *scale_at = static_cast<uint8_t>(scale.code);
}

// ---- a parameter with its master -----------------------------------------------------------------

template <class Format>
FUSEDOPT_DEVICE float adopt_written(uint16_t code, float kept) {
  return is_rounding_of<Format>(code, kept) ? kept : Format::decode(code);
}

FUSEDOPT_DEVICE void load_param(const void* param, const void* master, const Formats& formats, const Place& place,
                                float (&w)[kLane]) {
  const Master kind = static_cast<Master>(formats.master_format);
  if (kind == Master::kNone) return load(param, formats.param, place, w);
  if (kind == Master::kKahan) {
    float rest[kLane];
    load(param, formats.param, place, w);
    load(master, formats.master, place, rest);
#pragma unroll
    for (int j = 0; j < kLane; ++j) w[j] = w[j] + rest[j];
    return;
  }
  const Eight<uint16_t> codes = load_eight<uint16_t>(param, place);
  if (kind == Master::kSplit24) {
    const Eight<int8_t> low = load_eight<int8_t>(master, place);
#pragma unroll
    for (int j = 0; j < kLane; ++j) w[j] = join(codes.at[j], static_cast<int16_t>(low.at[j] * 256));
  } else if (kind == Master::kSplit32) {
    const Eight<int16_t> low = load_eight<int16_t>(master, place);
#pragma unroll
    for (int j = 0; j < kLane; ++j) w[j] = join(codes.at[j], low.at[j]);
  } else {
    load(master, static_cast<uint32_t>(DType::kFloat32), place, w);
#pragma unroll
    for (int j = 0; j < kLane; ++j) {
      w[j] = static_cast<DType>(formats.param) == DType::kBFloat16 ? adopt_written<BFloat16>(codes.at[j], w[j])
                                                                   : adopt_written<Float16>(codes.at[j], w[j]);
    }
  }
}

// `random`: the bits of the parameter's stream.
FUSEDOPT_DEVICE void store_param(void* param, void* master, const Formats& formats, const Place& place,
                                 const float (&w)[kLane], const uint32_t (&random)[kLane]) {
  const Master kind = static_cast<Master>(formats.master_format);
  const bool rounds = formats.rounds_param != 0;
  if (kind == Master::kNone || kind == Master::kFloat32) {
    store(param, formats.param, rounds, place, w, random, 0);
    if (kind == Master::kFloat32) store(master, static_cast<uint32_t>(DType::kFloat32), false, place, w, random, 0);
    return;
  }
  Eight<uint16_t> codes;
  if (kind == Master::kKahan) {
    const DType dtype = static_cast<DType>(formats.param);
    codes = encode_as(dtype, w, false, random, 0);
    float rest[kLane];
#pragma unroll
    for (int j = 0; j < kLane; ++j) {
      const float p = dtype == DType::kBFloat16 ? BFloat16::decode(codes.at[j]) : Float16::decode(codes.at[j]);
      rest[j] = remainder_of(w[j], p);
    }
    store(master, formats.master, rounds, place, rest, random, 0);
  } else if (kind == Master::kSplit24) {
    Eight<int8_t> low;
#pragma unroll
    for (int j = 0; j < kLane; ++j) {
      const Split split = split24(w[j], rounds ? random[j] >> 24 : 0x80u);
      codes.at[j] = split.high;
      low.at[j] = static_cast<int8_t>(split.low >> 8);
    }
    store_eight(low, master, place);
  } else {
    Eight<int16_t> low;
#pragma unroll
    for (int j = 0; j < kLane; ++j) {
      const Split split = split32(w[j]);
      codes.at[j] = split.high;
      low.at[j] = split.low;
    }
    store_eight(low, master, place);
  }
  store_eight(codes, param, place);
}

}  // namespace
}  // namespace fusedopt::cuda
