// The arithmetic of storage/blockwise8.h, which bounds an 8-bit step, in vectors: a block of 64 elements at a time. The
// codes are those that it defines.
#pragma once

#include "core/tensors.h"
#include "cpu/lanes.inl"
#include "storage/random.h"

#if defined(__AVX2__)

namespace fusedopt {
namespace {

// The random bits of a block: loaded, or made where they are used, since those of a run differ by multiples of kGolden.
struct LoadedBits {
  const uint32_t* x;
  FUSEDOPT_FN Bits at(int j) const { return load_bits(x + kVector * j); }
};
struct RunBits {
  Bits first;
  FUSEDOPT_FN Bits at(int j) const { return add(first, all(static_cast<uint32_t>(kVector * j) * kGolden)); }
};

// How a state takes 1 + R from its half of the random bits: as fraction_of does, or with kHalf for R. It is (bits &
// mask) | set.
struct Draw {
  Bits mask, set;
  explicit Draw(Rounding rounding)
      : mask(all(rounding == Rounding::kNearest ? 0u : 0x7FFE00u)),
        set(all(rounding == Rounding::kNearest ? bits_of(1.0f + kHalf) : 0x3F800100u)) {}
  FUSEDOPT_FN Lanes of(Bits random, int half) const {
    return lanes_of(merged(half == 0 ? shift_right<9>(random) : shift_left<7>(random), mask, set));
  }
};

// Stores the 64 codes of a block. kRoots: whether `roots` holds the square roots of x. `random`: its bits, of which
// `half` is the half to take.
template <bool kSigned, bool kRoots, class Random>
FUSEDOPT_FN void encode_block(const LaneBlock& x, const LaneBlock& roots, const BlockScale& scale, const Draw& draw,
                              const Random& random, int half, uint8_t* codes) {
  for (int begin = 0; begin < kVectors; begin += kPacked) {
    Lanes packed[kPacked];
    Bits q[kPacked];
    for (int i = 0; i < kPacked; ++i) {
      const int j = begin + i;
      packed[i] = x.at[j];
      const Lanes steps = lanes_of(magnitude_of(x.at[j])) * scale.to_steps;
      Whole below;
      if constexpr (kRoots) {
        below.integers = cut(roots.at[j] * scale.root_units);
        below.numbers = from_integers(below.integers);
      } else {
        below = whole_root(steps);
      }
      // Products are exact and the difference R (2q + 1) is, so nothing is rounded that Square8::encode does not round.
      const Lanes left = subtract_product(below.numbers, below.numbers, steps);
      const Lanes width = add_product(below.numbers, all(2.0f), all(1.0f));
      const Lanes right = product_minus(draw.of(random.at(j), half), width, width);
      q[i] = increment(is_above(left, right), below.integers);
    }
    store_codes<kSigned>(q, packed, codes + kVector * begin);
  }
}

}  // namespace
}  // namespace fusedopt

#endif
