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
FUSEDOPT_DEVICE void exchange(float (&x)[kLane], int lane, int distance) {
  constexpr int kHalf = kCount / 2;
  const bool keeps_upper = (lane & distance) != 0;
#pragma unroll
  for (int i = 0; i < kHalf; ++i) {
    const float kept = keeps_upper ? x[kHalf + i] : x[i], given = keeps_upper ? x[i] : x[kHalf + i];
    x[i] = kept + __shfl_xor_sync(0xFFFFFFFFu, given, distance);
  }
}

// Stores the sums of a tile's blocks.
//
// An element's number in its block has six bits. Halves are added over the highest bit first, then over the next, and
// so on; a bit is one of the lane's number, or of the element's in its lane:
//
//   bit                  5       4       3       2       1      0      others
//   runs apart           lane 3  lane 2  lane 1  lane 0  j 1    j 0    j 2 and lane 4: which block
//   runs side by side    lane 2  lane 1  lane 0  j 2     j 1    j 0    lane 4 and lane 3: which block
//
// To add over a bit of the lane, two lanes exchange halves of what they have, so that each goes on with half as many
// numbers, those with one value of a bit of j. That bit is from then on the bit of the lane that was added over.
FUSEDOPT_DEVICE void store_block_sums(float (&x)[kLane], const Place& place, float* sums) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int distance = place.is_split ? 8 : 4;
  exchange<8>(x, lane, distance);
  exchange<4>(x, lane, distance / 2);
  exchange<2>(x, lane, distance / 4);
  float sum = x[0];
  sum = sum + __shfl_xor_sync(0xFFFFFFFFu, sum, place.is_split ? 1 : 4);
  sum = sum + __shfl_xor_sync(0xFFFFFFFFu, sum, place.is_split ? 4 : 2);
  sum = sum + __shfl_xor_sync(0xFFFFFFFFu, sum, place.is_split ? 2 : 1);
  const int block = place.is_split ? lane / 16 + lane / 8 % 2 * 2 : lane / 8;
  if (lane % 8 == 0 && block * kBlock < place.count) sums[block] = sum;
}

FUSEDOPT_DEVICE void sum_squares(const float (&numbers)[kLane], const Place& place, float* sums) {
  float squares[kLane];
#pragma unroll
  for (int j = 0; j < kLane; ++j) squares[j] = numbers[j] * numbers[j];
  store_block_sums(squares, place, sums);
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
                              const Place& stored, bool is_left_out, const Raw& raw_param, const Raw& raw_master,
                              const BlockSums& sums) {
  float weights[kLane], updates[kLane];
  load_weights(param, master, formats, place, updates);
  decode_param(raw_param, raw_master, formats, weights);
#pragma unroll
  for (int j = 0; j < kLane; ++j) {
    if (!stored.holds(j)) weights[j] = updates[j];
    updates[j] = is_left_out ? 0.0f : weights[j] - updates[j];  // also of weights that are infinite
  }
  sum_squares(updates, place, sums.updates);
  sum_squares(weights, place, sums.weights);
}

}  // namespace
}  // namespace fusedopt::cuda
