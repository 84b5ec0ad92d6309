// The sums of squares of an update and of the weights after it, by blocks of 64, on the way of a step that is asked for
// them: in float32 and in halves, which a warp adds in registers (fusedopt/reference/norm.py).
#pragma once

#include "cuda/lane.cuh"

namespace fusedopt::cuda {
namespace {

// Of its first kCount numbers, a lane gives half to the lane whose number differs by `distance`, which gives the other
// half of its own; to what it keeps it adds what it is given. The lane with that bit in its number keeps the upper
// half.
template <int kCount>
FUSEDOPT_DEVICE void exchange(float (&x)[2 * kLane], int lane, int distance) {
  constexpr int kHalf = kCount / 2;
  const bool keeps_upper = (lane & distance) != 0;
#pragma unroll
  for (int i = 0; i < kHalf; ++i) {
    const float kept = keeps_upper ? x[kHalf + i] : x[i], given = keeps_upper ? x[i] : x[kHalf + i];
    x[i] = kept + __shfl_xor_sync(0xFFFFFFFFu, given, distance);
  }
}

// Squares the updates and the weights of a tile, and stores the sums of its blocks.
//
// An element's number in its block has six bits. Halves are added over the highest bit first, then over the next, and
// so on; a bit is one of the lane's number, or of the element's in its lane:
//
//   bit                  5       4       3       2       1      0      others
//   runs apart           lane 3  lane 2  lane 1  lane 0  j 1    j 0    j 2 and lane 4: which block
//   runs side by side    lane 2  lane 1  lane 0  j 2     j 1    j 0    lane 4 and lane 3: which block
//
// A lane begins with 16 numbers, eight of each kind. To add over a bit of the lane, two lanes exchange halves of what
// they have, so that each goes on with half as many numbers: first one of the kinds, then those with one value of a bit
// of j, which is from then on the bit of the lane that was added over.
// Updates of a tile that is not stepped are 0, even of weights that are not finite.
template <bool kIsStepped>
FUSEDOPT_DEVICE void sum_blocks(const float (&before)[kLane], const float (&after)[kLane], const Place& place,
                                const BlockSums& sums) {
  float x[2 * kLane];
#pragma unroll
  for (int i = 0; i < kLane; ++i) {
    const int j = i / 2 + i % 2 * 4;  // of runs side by side: bit 2 of j is the last, which is never exchanged
    const float weight = place.is_split ? after[i] : after[j];
    const float update = kIsStepped ? weight - (place.is_split ? before[i] : before[j]) : 0.0f;
    x[i] = update * update;
    x[kLane + i] = weight * weight;
  }
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int distance = place.is_split ? 8 : 4;
  exchange<16>(x, lane, distance);
  exchange<8>(x, lane, distance / 2);
  exchange<4>(x, lane, distance / 4);
  if (place.is_split) {
    exchange<2>(x, lane, 1);
  } else {
    x[0] = x[0] + x[1];
  }
  float sum = x[0];
  sum = sum + __shfl_xor_sync(0xFFFFFFFFu, sum, 2);
  sum = sum + __shfl_xor_sync(0xFFFFFFFFu, sum, 1);
  const int block = place.is_split ? lane / 16 + lane / 4 % 2 * 2 : lane / 8;
  float* of_kind = (lane & distance) != 0 ? sums.weights : sums.updates;
  if (lane % 4 == 0 && block * kBlock < place.count) of_kind[block] = sum;
}

// Weights as they are in memory. Past the end of the tile, they are 0.
template <class TensorFormats>
FUSEDOPT_DEVICE void load_weights(const void* param, const void* master, const TensorFormats& formats,
                                  const Place& place, float (&weights)[kLane]) {
  Raw raw, raw_master;
  with_whole(place, [&](auto whole) {
    load_param<TensorFormats, decltype(whole)::value>(param, master, formats, place, raw, raw_master);
  });
  decode_param(raw, raw_master, formats, weights);
}

// Of a tile of which `stored` is about to be stored. It is still as it was in memory, from where it is loaded once
// more: to keep what was loaded at first would take registers that the step needs.
template <class TensorFormats>
FUSEDOPT_DEVICE void sum_tile(const void* param, const void* master, const TensorFormats& formats, const Place& place,
                              const Place& stored, const Raw& raw_param, const Raw& raw_master, const BlockSums& sums) {
  float before[kLane], after[kLane];
  load_weights(param, master, formats, place, before);
  decode_param(raw_param, raw_master, formats, after);
#pragma unroll
  for (int j = 0; j < kLane; ++j) {
    if (!stored.holds(j)) after[j] = before[j];
  }
  sum_blocks<true>(before, after, place, sums);
}

// Of a tile that is not stepped.
template <class TensorFormats>
FUSEDOPT_DEVICE void sum_unchanged_tile(const void* param, const void* master, const TensorFormats& formats,
                                        const Place& place, const BlockSums& sums) {
  float weights[kLane];
  load_weights(param, master, formats, place, weights);
  sum_blocks<false>(weights, weights, place, sums);
}

}  // namespace
}  // namespace fusedopt::cuda
