// Counts what goes wrong quietly in a step. This is done only on request, and costs nothing otherwise.
#pragma once

#include "cpu/formats.inl"

namespace fusedopt {
namespace {

// Of one tile, before and after: weights that their gradient did not move, once they were stored; gradients
// that are inf or NaN.
void count_stalled(const float* before, const float* after, const float* grad, int n, HealthCounts& counts) {
  int stalled = 0, nonfinite = 0;
  for (int i = 0; i < n; ++i) {
    stalled += (bits_of(grad[i]) & ~kSignBit) != 0 && bits_of(before[i]) == bits_of(after[i]);
    nonfinite += (bits_of(grad[i]) & kInfinity) == kInfinity;
  }
  counts.stalled += stalled;
  counts.nonfinite_grads += nonfinite;
}

// Codes at the end of their range, and blocks that are not finite.
void count_codes(const Buffer& state, int64_t row, int64_t begin, int n, HealthCounts& counts) {
  if (!state.is_blockwise()) return;
  const uint8_t* codes = at<uint8_t>(state, begin);
  const uint8_t* scales = state.scales + block_index(row, begin);
  const int top = state.is_signed ? 0x7F : 0xFF;
  int saturated = 0, nonfinite = 0;
  for (int i = 0; i < n; ++i) saturated += (codes[i] & top) == top;
  for (int b = 0; b * kBlock < n; ++b) nonfinite += scales[b] == 255;
  counts.codes += n;
  counts.saturated_codes += saturated;
  counts.nonfinite_blocks += nonfinite;
}

}  // namespace
}  // namespace fusedopt
