// Counter-based random bits: f(seed, step, index of the element in the global tensor).
//
//   key_k = fmix(fmix(seed G + step) + k),  and key_k = fmix(key_k ^ hi) if hi
//   h_k   = fmix((lo >> 6) G + key_k) + (lo & 63) G
//
// with hi and lo the halves of the 64-bit index, G = 0x9E3779B1 and fmix the 32-bit finalizer of
// MurmurHash3 (A. Appleby, public domain). There is one hash for each aligned run of 64 elements, and
// within a run a Weyl sequence: since G is odd, the bits of each element are uniform, and those of a run
// are spread evenly, so that sums over it are less noisy than with independent bits. Runs and steps are
// independent of each other. State 0 takes the high half of h_0 and state 1 the low half; states 2 and 3
// share h_1 in the same way. The bits depend neither on threads nor on shards.
#pragma once

#include "core/portable.h"

namespace fusedopt {
namespace {

constexpr uint32_t kGolden = 0x9E3779B1u;
constexpr uint32_t kRun = 64;  // elements that share a hash
constexpr int kStreams = 3;    // of states 0 and 1, of states 2 and 3, of the parameter
constexpr int kParamStream = 2;

FUSEDOPT_FN uint32_t fmix(uint32_t h) {
  h ^= h >> 16;
  h *= 0x85EBCA6Bu;
  h ^= h >> 13;
  h *= 0xC2B2AE35u;
  h ^= h >> 16;
  return h;
}

// The key of stream k at one step; the same for every element below index 2^32.
FUSEDOPT_FN uint32_t stream_key(uint32_t seed, int64_t step, uint32_t k) {
  return fmix(fmix(seed * kGolden + static_cast<uint32_t>(step)) + k);
}

FUSEDOPT_FN void fill_stream_keys(uint32_t seed, int64_t step, uint32_t (&keys)[kStreams]) {
  for (uint32_t k = 0; k < kStreams; ++k) keys[k] = stream_key(seed, step, k);
}

// The same for the elements whose index has the upper half `hi`.
FUSEDOPT_FN uint32_t key_at(uint32_t key, uint32_t hi) { return hi ? fmix(key ^ hi) : key; }

// What the elements of a run have in common.
FUSEDOPT_FN uint32_t run_hash(uint32_t run, uint32_t key) { return fmix(run * kGolden + key); }

// The elements that follow in the same run have kGolden more each.
FUSEDOPT_FN uint32_t random_bits(uint32_t lo, uint32_t key) { return run_hash(lo / kRun, key) + lo % kRun * kGolden; }

// The 16 bits of state `k` out of its stream's 32.
FUSEDOPT_FN uint32_t half_of(uint32_t bits, int k) { return (k & 1) ? bits & 0xFFFFu : bits >> 16; }

}  // namespace
}  // namespace fusedopt
