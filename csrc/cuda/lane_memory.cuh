// What a lane of a warp has of a tile, and how it loads and stores that: eight numbers as they lie in memory. Formats
// come later (lane.cuh).
#pragma once

#include <cuda_runtime.h>

#include <cstring>
#include <type_traits>

#include "core/tensors.h"
#include "cuda/descriptors.h"
#include "cuda/instructions.cuh"

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
  int64_t begin;         // of the tile, in its tensor
  int runs[2];           // within the tile
  int count;             // elements of the tile
  bool is_whole;         // all 256, aligned
  bool is_split;         // the runs are half a tile apart
  uint32_t without = 0;  // a bit for each of a lane's elements that it leaves alone

  FUSEDOPT_DEVICE int offset(int j) const { return runs[j / 4] + j % 4; }
  FUSEDOPT_DEVICE bool holds(int j) const { return offset(j) < count && (without >> j & 1u) == 0; }

  FUSEDOPT_DEVICE Place leaving(uint32_t elements) const {
    Place rest = *this;
    rest.without = elements;
    rest.is_whole &= elements == 0;
    return rest;
  }
};

FUSEDOPT_DEVICE Place place_of(int lane, int64_t begin, int count, bool is_aligned, bool is_split) {
  Place place;
  place.begin = begin;
  place.runs[0] = is_split ? lane * 4 : lane * 8;
  place.runs[1] = is_split ? kTile / 2 + lane * 4 : lane * 8 + 4;
  place.count = count;
  place.is_whole = is_aligned & (count == kTile);
  place.is_split = is_split;
  return place;
}

// Calls use(std::true_type) for a whole tile, use(std::false_type) for others.
template <class Use>
FUSEDOPT_DEVICE void with_whole(const Place& place, const Use& use) {
  if (place.is_whole) {
    use(std::true_type{});
  } else {
    rarely();
    use(std::false_type{});
  }
}

// Eight numbers as they lie in memory. Those of one or two bytes are several to a word and leave the last words free.
struct Raw {
  uint32_t words[kLane];

  template <class Number>
  FUSEDOPT_DEVICE Number get(int j) const {
    constexpr int kEach = 4 / static_cast<int>(sizeof(Number));
    return static_cast<Number>(words[j / kEach] >> (j % kEach * 8 * static_cast<int>(sizeof(Number))));
  }
  // Numbers are set in order, each once: bytes of a word that come later may hold anything.
  template <class Number>
  FUSEDOPT_DEVICE void set(int j, Number number) {
    uint32_t& word = words[j / (4 / static_cast<int>(sizeof(Number)))];
    if constexpr (sizeof(Number) == 4) {
      word = number;
    } else if constexpr (sizeof(Number) == 2) {
      word = j % 2 == 0 ? number : __byte_perm(word, number, 0x5410);
    } else {
      constexpr uint32_t kSelectors[] = {0, 0x3240, 0x3410, 0x4210};
      word = j % 4 == 0 ? number : __byte_perm(word, number, kSelectors[j % 4]);
    }
  }
};

// Words that are one access.
template <int kWords>
struct VectorOf;
template <>
struct VectorOf<1> {
  using Type = uint32_t;
};
template <>
struct VectorOf<2> {
  using Type = uint2;
};
template <>
struct VectorOf<4> {
  using Type = uint4;
};

template <int kWords>
FUSEDOPT_DEVICE void load_words(const void* source, uint32_t* words) {
  const auto loaded = *static_cast<const typename VectorOf<kWords>::Type*>(source);
  memcpy(words, &loaded, sizeof loaded);
}

// An assignment would do, but the compiler would take it apart and merge it with the stores of single numbers.
template <int kWords>
FUSEDOPT_DEVICE void store_words(const uint32_t* words, void* target) {
  using Vector = typename VectorOf<kWords>::Type;
  Vector stored;
  memcpy(&stored, words, sizeof stored);
  __stwb(static_cast<Vector*>(target), stored);
}

// `kWhole`: place.is_whole. Past the end of the tile, numbers are 0.
template <class Number, bool kWhole>
FUSEDOPT_DEVICE void load_numbers(const void* data, const Place& place, Raw& raw) {
  const Number* source = static_cast<const Number*>(data) + place.begin;
  constexpr int kRun = static_cast<int>(sizeof(Number));  // words of a run
  if constexpr (!kWhole) {
#pragma unroll
    for (int j = 0; j < kLane; ++j) raw.set(j, place.holds(j) ? source[place.offset(j)] : Number{});
    return;
  }
  if constexpr (kRun < 4) {
    if (!place.is_split) return load_words<2 * kRun>(source + place.runs[0], raw.words);
  }
  load_words<kRun>(source + place.runs[0], raw.words);
  load_words<kRun>(source + place.runs[1], raw.words + kRun);
}

template <class Number, bool kWhole>
FUSEDOPT_DEVICE void store_numbers(const Raw& raw, void* data, const Place& place) {
  Number* target = static_cast<Number*>(data) + place.begin;
  constexpr int kRun = static_cast<int>(sizeof(Number));
  if constexpr (!kWhole) {
#pragma unroll
    for (int j = 0; j < kLane; ++j) {
      if (place.holds(j)) target[place.offset(j)] = raw.get<Number>(j);
    }
    return;
  }
  if constexpr (kRun < 4) {
    if (!place.is_split) return store_words<2 * kRun>(raw.words, target + place.runs[0]);
  }
  store_words<kRun>(raw.words, target + place.runs[0]);
  store_words<kRun>(raw.words + kRun, target + place.runs[1]);
}

template <bool kWhole>
FUSEDOPT_DEVICE void load(const void* data, DType dtype, const Place& place, Raw& raw) {
  switch (size_of(dtype)) {
    case 4:
      return load_numbers<uint32_t, kWhole>(data, place, raw);
    case 2:
      return load_numbers<uint16_t, kWhole>(data, place, raw);
    default:
      return load_numbers<uint8_t, kWhole>(data, place, raw);
  }
}

// A single number, as the first of eight.
FUSEDOPT_DEVICE void load_one(const void* data, DType dtype, int64_t i, Raw& raw) {
  switch (size_of(dtype)) {
    case 4:
      return raw.set(0, static_cast<const uint32_t*>(data)[i]);
    case 2:
      return raw.set(0, static_cast<const uint16_t*>(data)[i]);
    default:
      return raw.set(0, static_cast<const uint8_t*>(data)[i]);
  }
}

template <bool kWhole>
FUSEDOPT_DEVICE void store(void* data, DType dtype, const Place& place, const Raw& raw) {
  switch (size_of(dtype)) {
    case 4:
      return store_numbers<uint32_t, kWhole>(raw, data, place);
    case 2:
      return store_numbers<uint16_t, kWhole>(raw, data, place);
    default:
      return store_numbers<uint8_t, kWhole>(raw, data, place);
  }
}

}  // namespace
}  // namespace fusedopt::cuda
