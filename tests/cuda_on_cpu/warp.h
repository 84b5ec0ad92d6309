// Barriers, shuffles, votes and reductions, as kernels call them. The last two arguments of each are where it is
// called, for the sentence that says so.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "block.h"

#define CUDA_ON_CPU_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

namespace cuda_on_cpu {

template <class T>
T from_bits(uint64_t bits) {
  T value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

template <class T>
uint64_t to_bits(T value) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8),
                "lanes exchange numbers of 4 or 8 bytes");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  return bits;
}

inline void give_nothing(Warp&, uint32_t) {}

inline void give_sources(Warp& warp, uint32_t mask) {
  for (int lane = 0; lane < kLanes; ++lane) {
    if (mask >> lane & 1) warp.results[lane] = warp.values[warp.sources[lane]];
  }
}

inline void give_all(Warp& warp, uint32_t mask, uint64_t result) {
  for (int lane = 0; lane < kLanes; ++lane) {
    if (mask >> lane & 1) warp.results[lane] = result;
  }
}

inline uint32_t ballot_of(const Warp& warp, uint32_t mask) {
  uint32_t ballot = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    if ((mask >> lane & 1) && warp.values[lane] != 0) ballot |= uint32_t{1} << lane;
  }
  return ballot;
}

inline void give_ballot(Warp& warp, uint32_t mask) { give_all(warp, mask, ballot_of(warp, mask)); }
inline void give_any(Warp& warp, uint32_t mask) { give_all(warp, mask, ballot_of(warp, mask) != 0); }
inline void give_every(Warp& warp, uint32_t mask) { give_all(warp, mask, ballot_of(warp, mask) == mask); }

template <class T, T (*combine)(T, T)>
void give_reduced(Warp& warp, uint32_t mask) {
  int lane = __builtin_ctz(mask);
  T result = from_bits<T>(warp.values[lane]);
  while (++lane < kLanes) {
    if (mask >> lane & 1) result = combine(result, from_bits<T>(warp.values[lane]));
  }
  give_all(warp, mask, to_bits(result));
}

// A sum wraps, whether it has a sign or not.
template <class T>
T sum_of(T a, T b) {
  return static_cast<T>(static_cast<unsigned>(a) + static_cast<unsigned>(b));
}
template <class T>
T larger_of(T a, T b) {
  return a < b ? b : a;
}
template <class T>
T smaller_of(T a, T b) {
  return b < a ? b : a;
}
inline unsigned all_bits_of(unsigned a, unsigned b) { return a | b; }
inline unsigned common_bits_of(unsigned a, unsigned b) { return a & b; }
inline unsigned odd_bits_of(unsigned a, unsigned b) { return a ^ b; }

inline constexpr Operation kSyncWarp{"__syncwarp", give_nothing};
inline constexpr Operation kShuffle{"__shfl_sync", give_sources};
inline constexpr Operation kShuffleUp{"__shfl_up_sync", give_sources};
inline constexpr Operation kShuffleDown{"__shfl_down_sync", give_sources};
inline constexpr Operation kShuffleXor{"__shfl_xor_sync", give_sources};
inline constexpr Operation kBallot{"__ballot_sync", give_ballot};
inline constexpr Operation kAny{"__any_sync", give_any};
inline constexpr Operation kAll{"__all_sync", give_every};

inline int own_lane() { return block.running < 0 ? 0 : block.running % kLanes; }

// The last lane of the part of a warp that a shuffle of this width stays in.
inline int last_of_segment(int lane, int width) {
  if (width < 1 || width > kLanes || (width & (width - 1)) != 0) {
    fail("a shuffle's width is " + std::to_string(width) + ", which is no power of two up to 32");
  }
  return lane | (width - 1);
}

template <class T>
T shuffle(const Operation& operation, unsigned mask, T value, int source, const char* file, int line) {
  return from_bits<T>(exchange(operation, mask, to_bits(value), source, {file, line}));
}

}  // namespace cuda_on_cpu

inline void __syncthreads(CUDA_ON_CPU_SITE) { cuda_on_cpu::synchronize_block({file, line}); }

inline void __syncwarp(unsigned mask = 0xffffffff, CUDA_ON_CPU_SITE) {
  cuda_on_cpu::exchange(cuda_on_cpu::kSyncWarp, mask, 0, cuda_on_cpu::own_lane(), {file, line});
}

// Threads of a block take turns on one processor, so there is nothing to order but what the compiler does.
inline void __threadfence_block() { __asm__ __volatile__("" ::: "memory"); }
inline void __threadfence() { __threadfence_block(); }
inline void __threadfence_system() { __threadfence_block(); }

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize, CUDA_ON_CPU_SITE) {
  const int last = cuda_on_cpu::last_of_segment(cuda_on_cpu::own_lane(), width);
  const int from = last - (width - 1) + (source & (width - 1));
  return cuda_on_cpu::shuffle(cuda_on_cpu::kShuffle, mask, value, from, file, line);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize, CUDA_ON_CPU_SITE) {
  const int lane = cuda_on_cpu::own_lane();
  const int first = cuda_on_cpu::last_of_segment(lane, width) - (width - 1);
  const int from = delta > static_cast<unsigned>(lane - first) ? lane : lane - static_cast<int>(delta);
  return cuda_on_cpu::shuffle(cuda_on_cpu::kShuffleUp, mask, value, from, file, line);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize, CUDA_ON_CPU_SITE) {
  const int lane = cuda_on_cpu::own_lane();
  const int last = cuda_on_cpu::last_of_segment(lane, width);
  const int from = delta > static_cast<unsigned>(last - lane) ? lane : lane + static_cast<int>(delta);
  return cuda_on_cpu::shuffle(cuda_on_cpu::kShuffleDown, mask, value, from, file, line);
}

// Earlier parts of the warp can be read, later ones cannot: so it is on hardware.
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = warpSize, CUDA_ON_CPU_SITE) {
  const int lane = cuda_on_cpu::own_lane();
  const int other = lane ^ (bits & (warpSize - 1));
  const int from = other > cuda_on_cpu::last_of_segment(lane, width) ? lane : other;
  return cuda_on_cpu::shuffle(cuda_on_cpu::kShuffleXor, mask, value, from, file, line);
}

#define CUDA_ON_CPU_VOTE(type, name, operation)                                                                        \
  inline type name(unsigned mask, int predicate, CUDA_ON_CPU_SITE) {                                                   \
    const int lane = cuda_on_cpu::own_lane();                                                                          \
    return static_cast<type>(cuda_on_cpu::exchange(cuda_on_cpu::operation, mask, predicate != 0, lane, {file, line})); \
  }
CUDA_ON_CPU_VOTE(unsigned, __ballot_sync, kBallot)
CUDA_ON_CPU_VOTE(int, __any_sync, kAny)
CUDA_ON_CPU_VOTE(int, __all_sync, kAll)

#define CUDA_ON_CPU_REDUCTION(type, name, combine)                                                                   \
  inline type name(unsigned mask, type value, CUDA_ON_CPU_SITE) {                                                    \
    static constexpr cuda_on_cpu::Operation operation{#name, cuda_on_cpu::give_reduced<type, cuda_on_cpu::combine>}; \
    return cuda_on_cpu::shuffle(operation, mask, value, cuda_on_cpu::own_lane(), file, line);                        \
  }
CUDA_ON_CPU_REDUCTION(int, __reduce_add_sync, sum_of<int>)
CUDA_ON_CPU_REDUCTION(int, __reduce_max_sync, larger_of<int>)
CUDA_ON_CPU_REDUCTION(int, __reduce_min_sync, smaller_of<int>)
CUDA_ON_CPU_REDUCTION(unsigned, __reduce_add_sync, sum_of<unsigned>)
CUDA_ON_CPU_REDUCTION(unsigned, __reduce_max_sync, larger_of<unsigned>)
CUDA_ON_CPU_REDUCTION(unsigned, __reduce_min_sync, smaller_of<unsigned>)
CUDA_ON_CPU_REDUCTION(unsigned, __reduce_or_sync, all_bits_of)
CUDA_ON_CPU_REDUCTION(unsigned, __reduce_and_sync, common_bits_of)
CUDA_ON_CPU_REDUCTION(unsigned, __reduce_xor_sync, odd_bits_of)

inline unsigned __activemask() {
  cuda_on_cpu::fail("__activemask is called, which is not emulated: it depends on how threads are scheduled");
}

[[noreturn]] inline void __trap() {
  const int thread = cuda_on_cpu::block.running;
  cuda_on_cpu::fail((thread < 0 ? std::string("the host") : cuda_on_cpu::name_of(thread)) + " calls __trap");
}
