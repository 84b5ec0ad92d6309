// Decode and encode of the part of a tile that one lane of a warp has: eight numbers, in registers. The formats are
// those of storage/; the format of a buffer is the same for all lanes. Loading is apart (lane_memory.cuh), because a
// tile's loads have to be under way together: nothing may wait for the first before the last.
#pragma once

#include "cuda/lane_memory.cuh"
#include "storage/blockwise8.h"
#include "storage/dense.h"
#include "storage/master.h"
#include "storage/random.h"

namespace fusedopt::cuda {
namespace {

// ---- dense -------------------------------------------------------------------------------------

FUSEDOPT_DEVICE void decode(const Raw& raw, DType dtype, float (&x)[kLane]) {
  if (dtype == DType::kFloat32) {
#pragma unroll
    for (int j = 0; j < kLane; ++j) x[j] = float_of(raw.words[j]);
  } else if (dtype == DType::kBFloat16) {
#pragma unroll
    for (int j = 0; j < kLane; ++j) x[j] = BFloat16::decode(raw.get<uint16_t>(j));
  } else {
#pragma unroll
    for (int j = 0; j < kLane; ++j) x[j] = Float16::decode(raw.get<uint16_t>(j));
  }
}

template <class Format>
FUSEDOPT_DEVICE void encode16(const float (&x)[kLane], bool rounds, const uint32_t (&random)[kLane], int half,
                              Raw& raw) {
  if (rounds) {
#pragma unroll
    for (int j = 0; j < kLane; ++j) raw.set(j, Format::encode_stochastic(x[j], half_of(random[j], half)));
  } else {
#pragma unroll
    for (int j = 0; j < kLane; ++j) raw.set(j, Format::encode_nearest(x[j]));
  }
}

FUSEDOPT_DEVICE void encode(const float (&x)[kLane], DType dtype, bool rounds, const uint32_t (&random)[kLane],
                            int half, Raw& raw) {
  if (dtype == DType::kFloat32) {
#pragma unroll
    for (int j = 0; j < kLane; ++j) raw.words[j] = bits_of(x[j]);
  } else if (dtype == DType::kBFloat16) {
    encode16<BFloat16>(x, rounds, random, half, raw);
  } else {
    encode16<Float16>(x, rounds, random, half, raw);
  }
}

FUSEDOPT_DEVICE void store(void* data, DType dtype, bool rounds, const Place& place, const float (&x)[kLane],
                           const uint32_t (&random)[kLane], int half) {
  Raw raw;
  encode(x, dtype, rounds, random, half, raw);
  store(raw, data, dtype, place);
}

// The random bits of a lane's elements. The upper half of the index, and with it the key, may change within a tile.
FUSEDOPT_DEVICE void draw(uint32_t stream_key, int64_t first_index, const Place& place, uint32_t (&random)[kLane]) {
  const uint64_t begin = static_cast<uint64_t>(first_index + place.begin);
  const uint32_t lo = static_cast<uint32_t>(begin), hi = static_cast<uint32_t>(begin >> 32);
  uint32_t key = stream_key;
  if (hi != 0) {
    rarely();
    key = key_at(stream_key, hi);
  }
  if (lo % kLane == 0 && lo <= 0xFFFFFFFFu - (kTile - 1)) {  // what a lane has side by side is of one run of the hash
    random[0] = random_bits(lo + static_cast<uint32_t>(place.runs[0]), key);
    random[4] = place.is_split ? random_bits(lo + static_cast<uint32_t>(place.runs[1]), key) : random[0] + 4 * kGolden;
#pragma unroll
    for (int j = 0; j < kLane; ++j) random[j] = random[j / 4 * 4] + static_cast<uint32_t>(j % 4) * kGolden;
    return;
  }
  rarely();
  const uint32_t next = key_at(stream_key, hi + 1);
#pragma unroll
  for (int j = 0; j < kLane; ++j) {
    const uint32_t at = lo + static_cast<uint32_t>(place.offset(j));
    random[j] = random_bits(at, at < lo ? next : key);
  }
}

// ---- blockwise: a block is the run of sixteen lanes side by side or, if runs are, both runs of eight ---------------

// The block of a run, in its tile.
FUSEDOPT_DEVICE int block_of(const Place& place, int run) {
  return (place.is_split && run == 1 ? place.runs[1] : place.runs[0]) / kBlock;
}

// The scales of a lane's runs, as they lie in memory from the tile's first on.
template <bool kWhole>
FUSEDOPT_DEVICE void load_scales(const uint8_t* scales, const Place& place, uint8_t (&loaded)[2]) {
#pragma unroll
  for (int run = 0; run < 2; ++run) {
    if (run == 1 && !place.is_split) {
      loaded[1] = loaded[0];
    } else {
      loaded[run] = kWhole || place.holds(run * 4) ? scales[block_of(place, run)] : uint8_t{};
    }
  }
}

template <bool kSigned>
FUSEDOPT_DEVICE void decode_codes(const Raw& codes, const uint8_t (&scales)[2], float (&x)[kLane]) {
#pragma unroll
  for (int j = 0; j < kLane; ++j) {
    x[j] = Square8<kSigned>::decode(codes.get<uint8_t>(j), Square8<kSigned>::unit_of(scales[j / 4]));
  }
}

FUSEDOPT_DEVICE uint32_t larger(uint32_t a, uint32_t b) { return a > b ? a : b; }
FUSEDOPT_DEVICE uint32_t larger_of_lanes(uint32_t x, int distance) {
  return larger(x, __shfl_xor_sync(0xFFFFFFFFu, x, distance));
}

// The largest magnitudes of the blocks of a lane's runs, as integers. All lanes of a warp call this.
FUSEDOPT_DEVICE void largest_of_blocks(const float (&x)[kLane], const Place& place, uint32_t (&largest)[2]) {
  uint32_t sizes[kLane];
#pragma unroll
  for (int j = 0; j < kLane; ++j) sizes[j] = bits_of(x[j]) & ~kSignBit;
  if (!place.is_whole) {
    rarely();
#pragma unroll
    for (int j = 0; j < kLane; ++j) sizes[j] = place.holds(j) ? sizes[j] : 0u;
  }
#pragma unroll
  for (int run = 0; run < 2; ++run) {
    const uint32_t* of_run = sizes + run * 4;
    largest[run] = larger(larger(of_run[0], of_run[1]), larger(of_run[2], of_run[3]));
  }
  if (!place.is_split) {
    uint32_t top = larger(largest[0], largest[1]);
#pragma unroll
    for (int distance = 1; distance < kBlock / kLane; distance *= 2) top = larger_of_lanes(top, distance);
    largest[0] = largest[1] = top;
    return;
  }
  // Two blocks at once: even lanes go on with the first runs of a pair of lanes, odd ones with the second.
  const bool is_odd = threadIdx.x % 2 != 0;
  const uint32_t given = is_odd ? largest[0] : largest[1], kept = is_odd ? largest[1] : largest[0];
  uint32_t top = larger(kept, __shfl_xor_sync(0xFFFFFFFFu, given, 1));
#pragma unroll
  for (int distance = 2; distance < kBlock / 4; distance *= 2) top = larger_of_lanes(top, distance);
  const uint32_t of_other_run = __shfl_xor_sync(0xFFFFFFFFu, top, 1);
  largest[0] = is_odd ? of_other_run : top;
  largest[1] = is_odd ? top : of_other_run;
}

// `roots`: the square roots of the numbers, if kRoots. `scales`: from the tile's first on.
template <bool kSigned, bool kRoots>
FUSEDOPT_DEVICE void store_codes(void* codes, uint8_t* scales, bool rounds, const Place& place, const float (&x)[kLane],
                                 const float (&roots)[kLane], const uint32_t (&random)[kLane], int half) {
  uint32_t largest[2];
  largest_of_blocks(x, place, largest);
  Raw encoded{};
#pragma unroll
  for (int run = 0; run < 2; ++run) {
    const BlockScale scale = Square8<kSigned>::scale_of(largest[run]);
    if (scale.is_special()) {
      rarely();
    } else {
#pragma unroll
      for (int j = run * 4; j < run * 4 + 4; ++j) {
        const float rooted = kRoots ? roots[j] : root(float_of(bits_of(x[j]) & ~kSignBit));
        const float threshold = rounds ? fraction_of(half_of(random[j], half)) : kHalf;
        encoded.set(j, Square8<kSigned>::encode(x[j], rooted, scale, threshold));
      }
    }
    if (place.runs[run] % kBlock == 0 && (place.is_whole || place.holds(run * 4))) {
      scales[place.runs[run] / kBlock] = static_cast<uint8_t>(scale.code);
    }
  }
  store_numbers<uint8_t>(encoded, codes, place);
}

// ---- a parameter with its master -----------------------------------------------------------------

template <class Format>
FUSEDOPT_DEVICE float adopt_written(uint16_t code, float kept) {
  return is_rounding_of<Format>(code, kept) ? kept : Format::decode(code);
}

// `formats` are Formats or UsualFormats.
template <class TensorFormats>
FUSEDOPT_DEVICE void decode_param(const Raw& param, const Raw& master, const TensorFormats& formats,
                                  float (&w)[kLane]) {
  const Master kind = formats.master_format();
  const DType dtype = formats.param();
  if (kind == Master::kNone) return decode(param, dtype, w);
  if (kind == Master::kKahan) {
    float rest[kLane];
    decode(param, dtype, w);
    decode(master, formats.master(), rest);
#pragma unroll
    for (int j = 0; j < kLane; ++j) w[j] = w[j] + rest[j];
    return;
  }
  if (kind == Master::kSplit24) {
#pragma unroll
    for (int j = 0; j < kLane; ++j) {
      w[j] = join(param.get<uint16_t>(j), static_cast<int16_t>(master.get<int8_t>(j) * 256));
    }
  } else if (kind == Master::kSplit32) {
#pragma unroll
    for (int j = 0; j < kLane; ++j) w[j] = join(param.get<uint16_t>(j), master.get<int16_t>(j));
  } else {
#pragma unroll
    for (int j = 0; j < kLane; ++j) {
      const uint16_t code = param.get<uint16_t>(j);
      const float kept = float_of(master.words[j]);
      w[j] = dtype == DType::kBFloat16 ? adopt_written<BFloat16>(code, kept) : adopt_written<Float16>(code, kept);
    }
  }
}

template <class TensorFormats, bool kWhole>
FUSEDOPT_DEVICE void load_param(const void* param, const void* master, const TensorFormats& formats, const Place& place,
                                Raw& raw, Raw& raw_master) {
  load<kWhole>(param, formats.param(), place, raw);
  if (formats.master_format() != Master::kNone) load<kWhole>(master, formats.master(), place, raw_master);
}

// `random`: the bits of the parameter's stream.
template <class TensorFormats>
FUSEDOPT_DEVICE void store_param(void* param, void* master, const TensorFormats& formats, const Place& place,
                                 const float (&w)[kLane], const uint32_t (&random)[kLane]) {
  const Master kind = formats.master_format();
  const DType dtype = formats.param();
  const bool rounds = formats.rounds_param();
  if (kind == Master::kNone || kind == Master::kFloat32) {
    store(param, dtype, rounds, place, w, random, 0);
    if (kind == Master::kFloat32) store(master, DType::kFloat32, false, place, w, random, 0);
    return;
  }
  Raw codes;
  if (kind == Master::kKahan) {
    encode(w, dtype, false, random, 0, codes);
    float rest[kLane];
#pragma unroll
    for (int j = 0; j < kLane; ++j) {
      const uint16_t code = codes.get<uint16_t>(j);
      rest[j] = remainder_of(w[j], dtype == DType::kBFloat16 ? BFloat16::decode(code) : Float16::decode(code));
    }
    store(master, formats.master(), rounds, place, rest, random, 0);
  } else if (kind == Master::kSplit24) {
    Raw low;
#pragma unroll
    for (int j = 0; j < kLane; ++j) {
      const Split split = split24(w[j], rounds ? random[j] >> 24 : 0x80u);
      codes.set(j, split.high);
      low.set(j, static_cast<uint8_t>(split.low >> 8));
    }
    store_numbers<uint8_t>(low, master, place);
  } else {
    Raw low;
#pragma unroll
    for (int j = 0; j < kLane; ++j) {
      const Split split = split32(w[j]);
      codes.set(j, split.high);
      low.set(j, static_cast<uint16_t>(split.low));
    }
    store_numbers<uint16_t>(low, master, place);
  }
  store_numbers<uint16_t>(codes, param, place);
}

}  // namespace
}  // namespace fusedopt::cuda
