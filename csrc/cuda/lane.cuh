// Decode and encode of the part of a tile that one lane of a warp has: eight numbers, in registers. The formats are
// those of storage/; the format of a buffer is the same for all lanes. Loading is apart (lane_memory.cuh), because a
// tile's loads have to be under way together: nothing may wait for the first before the last.
#pragma once

#include "cuda/codes.cuh"
#include "cuda/lane_memory.cuh"
#include "cuda/numbers.cuh"
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

FUSEDOPT_DEVICE void encode_float16(const float (&x)[kLane], bool rounds, const uint32_t (&random)[kLane], int half,
                                    Raw& raw) {
  if (rounds) {
#pragma unroll
    for (int j = 0; j < kLane; ++j) raw.set(j, Float16::encode_stochastic(x[j], half_of(random[j], half)));
  } else {
#pragma unroll
    for (int j = 0; j < kLane; ++j) raw.set(j, Float16::encode_nearest(x[j]));
  }
}

// Numbers as integers to which some bits may be added: of NaN, one that stays NaN. A sum is NaN if one of the numbers
// is, and to add costs less than to look at each.
FUSEDOPT_DEVICE void summable_bits(const float (&x)[kLane], uint32_t (&bits)[kLane]) {
#pragma unroll
  for (int j = 0; j < kLane; ++j) bits[j] = bits_of(x[j]);
  const float sum = ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]));
  if (sum == sum) return;
  rarely();
#pragma unroll
  for (int j = 0; j < kLane; ++j) bits[j] = canonical(bits[j]);
}

// The upper halves of words, in pairs.
FUSEDOPT_DEVICE void take_upper_halves(const uint32_t (&words)[kLane], Raw& raw) {
#pragma unroll
  for (int j = 0; j < kLane; j += 2) raw.words[j / 2] = bytes_of<0x7632>(words[j], words[j + 1]);
}

FUSEDOPT_DEVICE void encode_bfloat16(const float (&x)[kLane], bool rounds, const uint32_t (&random)[kLane], int half,
                                     Raw& raw) {
  if (rounds) {
    uint32_t bits[kLane];
    summable_bits(x, bits);
#pragma unroll
    for (int j = 0; j < kLane; ++j) bits[j] += half_of(random[j], half);
    take_upper_halves(bits, raw);
  } else {
#pragma unroll
    for (int j = 0; j < kLane; j += 2) raw.words[j / 2] = nearest_bfloat16(x[j], x[j + 1]);
  }
}

FUSEDOPT_DEVICE void encode(const float (&x)[kLane], DType dtype, bool rounds, const uint32_t (&random)[kLane],
                            int half, Raw& raw) {
  if (dtype == DType::kFloat32) {
#pragma unroll
    for (int j = 0; j < kLane; ++j) raw.words[j] = bits_of(x[j]);
  } else if (dtype == DType::kBFloat16) {
    encode_bfloat16(x, rounds, random, half, raw);
  } else {
    encode_float16(x, rounds, random, half, raw);
  }
}

// Where a tile's random bits are.
struct Source {
  uint32_t lo, hi;  // of the index of the tile's first element
  bool is_simple;   // one key, and what a lane has side by side is of one run of the hash

  FUSEDOPT_DEVICE explicit Source(int64_t first)
      : lo(static_cast<uint32_t>(first)), hi(static_cast<uint32_t>(static_cast<uint64_t>(first) >> 32)) {
    is_simple = hi == 0 && lo % kLane == 0 && lo <= 0xFFFFFFFFu - (kTile - 1);
  }
};

// The random bits of a lane's elements. The upper half of the index, and with it the key, may change within a tile.
FUSEDOPT_DEVICE void draw(uint32_t stream_key, const Source& source, const Place& place, uint32_t (&random)[kLane]) {
  if (source.is_simple) {
    random[0] = random_bits(source.lo + static_cast<uint32_t>(place.runs[0]), stream_key);
    random[4] = place.is_split ? random_bits(source.lo + static_cast<uint32_t>(place.runs[1]), stream_key)
                               : random[0] + 4 * kGolden;
#pragma unroll
    for (int j = 0; j < kLane; ++j) random[j] = random[j / 4 * 4] + static_cast<uint32_t>(j % 4) * kGolden;
    return;
  }
  rarely();
  const uint32_t key = key_at(stream_key, source.hi), next = key_at(stream_key, source.hi + 1);
#pragma unroll
  for (int j = 0; j < kLane; ++j) {
    const uint32_t at = source.lo + static_cast<uint32_t>(place.offset(j));
    random[j] = random_bits(at, at < source.lo ? next : key);
  }
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
FUSEDOPT_DEVICE void encode_param(const float (&w)[kLane], const TensorFormats& formats,
                                  const uint32_t (&random)[kLane], Raw& param, Raw& master) {
  const Master kind = formats.master_format();
  const DType dtype = formats.param();
  const bool rounds = formats.rounds_param();
  if (kind == Master::kNone || kind == Master::kFloat32) {
    encode(w, dtype, rounds, random, 0, param);
    if (kind == Master::kFloat32) encode(w, DType::kFloat32, false, random, 0, master);
  } else if (kind == Master::kKahan) {
    encode(w, dtype, false, random, 0, param);
    float written[kLane], rest[kLane];
    decode(param, dtype, written);
#pragma unroll
    for (int j = 0; j < kLane; ++j) rest[j] = remainder_of(w[j], written[j]);
    encode(rest, formats.master(), rounds, random, 0, master);
  } else {
    // storage/master.h with what it subtracts left out, because the lower halves do not depend on it.
    uint32_t bits[kLane];
    summable_bits(w, bits);
    if (kind == Master::kSplit24) {
#pragma unroll
      for (int j = 0; j < kLane; ++j) bits[j] += rounds ? random[j] >> 24 : 0x80u;
      master.words[0] = gathered<1>(bits);
      master.words[1] = gathered<1>(bits + 4);
    } else {
#pragma unroll
      for (int j = 0; j < kLane; j += 2) master.words[j / 2] = bytes_of<0x5410>(bits[j], bits[j + 1]);
    }
#pragma unroll
    for (int j = 0; j < kLane; ++j) bits[j] += 0x8000u;
    take_upper_halves(bits, param);
  }
}

template <class TensorFormats, bool kWhole>
FUSEDOPT_DEVICE void store_param(void* param, void* master, const TensorFormats& formats, const Place& place,
                                 const Raw& raw, const Raw& raw_master) {
  if (formats.master_format() != Master::kNone) store<kWhole>(master, formats.master(), place, raw_master);
  store<kWhole>(param, formats.param(), place, raw);
}

}  // namespace
}  // namespace fusedopt::cuda
