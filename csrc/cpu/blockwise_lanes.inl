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

// How a state takes R from its half of the random bits: as fraction_of does, or always kHalf, from (bits & mask) | set.
struct Draw {
  Bits mask, set;
  explicit Draw(Rounding rounding)
      : mask(all(rounding == Rounding::kNearest ? 0u : 0x7FFE00u)),
        set(all(rounding == Rounding::kNearest ? bits_of(1.0f + kHalf) : 0x3F800100u)) {}
  FUSEDOPT_FN Lanes of(Bits random, int half) const {
    return lanes_of(merged(half == 0 ? shift_right<9>(random) : shift_left<7>(random), mask, set)) - 1.0f;
  }
};

// The largest q with q^2 <= steps: proposed by an estimate of the root (11 bits or more), corrected by comparison. An
// IEEE root of 16 numbers takes 16 to 18 cycles on Intel's cores, in which no other root or quotient begins.
FUSEDOPT_FN Lanes whole_root(Lanes steps) {
  const Lanes magic = all(0x1.8p23f);  // what is added to it is rounded to an integer
  const Lanes inverse = inverse_root_estimate(larger(steps, all(0x1p-60f)));
  const Lanes nearest = add_product(steps, inverse, magic) - magic;
  return add_where(is_above(nearest * nearest, steps), nearest, all(-1.0f));
}

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
      const Lanes below = kRoots ? cut(roots.at[j] * scale.root_units) : whole_root(steps);
      // Products are exact, so nothing is rounded that Square8::encode does not round.
      const Lanes left = subtract_product(below, below, steps);
      const Lanes right = draw.of(random.at(j), half) * add_product(below, all(2.0f), all(1.0f));
      q[i] = to_integers(add_where(is_above(left, right), below, all(1.0f)));
    }
    store_codes<kSigned>(q, packed, codes + kVector * begin);
  }
}

}  // namespace
}  // namespace fusedopt

#endif
