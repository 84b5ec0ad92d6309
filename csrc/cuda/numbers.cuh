// The numbers that a lane has of a tile, as the vector over which rules are templates (rules/rule.h).
//
// Roots and quotients are those of IEEE. The compiler's code for one asks first whether the operands are in a middle
// range, and calls a subroutine if not: a branch for each, across which no instruction moves. Here all numbers of a
// lane are asked about at once. What is computed is the same as in the compiler's code: an estimate of an inverse, then
// fused operations that correct what it gives.
#pragma once

#include "cuda/descriptors.h"
#include "cuda/instructions.cuh"
#include "rules/rule.h"
#include "storage/dense.h"

namespace fusedopt::cuda {
namespace {

// The largest of a run of four integers. What a quotient, a root and the scale of a block ask about the same numbers is
// asked in the same order, so that it is computed once.
FUSEDOPT_DEVICE uint32_t largest_of_run(const uint32_t* x) { return max(max(x[0], x[1]), max(x[2], x[3])); }

// Numbers as integers without their signs or, if none is negative, as they are: a sign is that of NaN then. They are in
// order as the numbers are.
template <bool kSigned>
FUSEDOPT_DEVICE void sizes_of(const float (&x)[kLane], uint32_t (&sizes)[kLane]) {
#pragma unroll
  for (int j = 0; j < kLane; ++j) sizes[j] = kSigned ? bits_of(x[j]) & ~kSignBit : bits_of(x[j]);
}

// Whether all of these are between two positive numbers.
template <bool kSigned>
FUSEDOPT_DEVICE bool are_within(const float (&x)[kLane], float least, float most) {
  uint32_t sizes[kLane];
  sizes_of<kSigned>(x, sizes);
  const auto smaller = [&](int i) { return min(static_cast<int32_t>(sizes[i]), static_cast<int32_t>(sizes[i + 1])); };
  const int32_t smallest = min(min(smaller(0), smaller(2)), min(smaller(4), smaller(6)));
  const uint32_t largest = max(largest_of_run(sizes), largest_of_run(sizes + 4));
  return smallest >= static_cast<int32_t>(bits_of(least)) && largest <= bits_of(most);
}

// The functions are friends so that they are found for this type only.
struct Numbers {
  float at[kLane] = {};

  friend FUSEDOPT_DEVICE Numbers operator+(const Numbers& a, const Numbers& b) {
    return each([&](int j) { return a.at[j] + b.at[j]; });
  }
  friend FUSEDOPT_DEVICE Numbers operator-(const Numbers& a, const Numbers& b) {
    return each([&](int j) { return a.at[j] - b.at[j]; });
  }
  friend FUSEDOPT_DEVICE Numbers operator*(const Numbers& a, const Numbers& b) {
    return each([&](int j) { return a.at[j] * b.at[j]; });
  }
  friend FUSEDOPT_DEVICE Numbers operator+(const Numbers& a, float b) {
    return each([&](int j) { return a.at[j] + b; });
  }
  friend FUSEDOPT_DEVICE Numbers operator*(const Numbers& a, float b) {
    return each([&](int j) { return a.at[j] * b; });
  }
  friend FUSEDOPT_DEVICE Numbers operator*(float a, const Numbers& b) { return b * a; }

  friend FUSEDOPT_DEVICE Numbers sign(const Numbers& x) {
    return each([&](int j) { return fusedopt::sign(x.at[j]); });
  }
  friend FUSEDOPT_DEVICE Numbers maximum(const Numbers& a, const Numbers& b) {
    return each([&](int j) { return fusedopt::maximum(a.at[j], b.at[j]); });
  }

  friend FUSEDOPT_DEVICE Numbers root(const Numbers& x) {
    // What the square of an estimate lacks of x is a number then, down to its last bit.
    if (!are_within<false>(x.at, 0x1p-100f, 0x1.fffffep127f)) {
      rarely();
      return each([&](int j) {
        const bool is_zero = x.at[j] == 0.0f;  // for which the compiler's code would call its subroutine
        const float rooted = fusedopt::root(is_zero ? 1.0f : x.at[j]);
        return is_zero ? x.at[j] : rooted;
      });
    }
    return each([&](int j) {
      const float inverse = inverse_root_estimate(x.at[j]), estimate = x.at[j] * inverse;
      return __fmaf_rn(__fmaf_rn(-estimate, estimate, x.at[j]), 0.5f * inverse, estimate);
    });
  }

  friend FUSEDOPT_DEVICE Numbers operator/(const Numbers& a, const Numbers& b) {
    // Quotients are normal then, and what b times a quotient lacks of a is a number down to its last bit.
    if (!are_within<true>(a.at, 0x1p-95f, 0x1p63f) || !are_within<false>(b.at, 0x1p-63f, 0x1p30f)) {
      rarely();
      return each([&](int j) {
        const bool is_zero = a.at[j] == 0.0f && b.at[j] > 0.0f;  // as above
        const float quotient = (is_zero ? 1.0f : a.at[j]) / b.at[j];
        return is_zero ? a.at[j] : quotient;
      });
    }
    return each([&](int j) {
      const float estimate = inverse_estimate(b.at[j]);
      const float inverse = __fmaf_rn(estimate, __fmaf_rn(-b.at[j], estimate, 1.0f), estimate);
      const float quotient = a.at[j] * inverse;
      return __fmaf_rn(inverse, __fmaf_rn(-b.at[j], quotient, a.at[j]), quotient);
    });
  }

 private:
  template <class Get>
  static FUSEDOPT_DEVICE Numbers each(const Get& get) {
    Numbers result;
#pragma unroll
    for (int j = 0; j < kLane; ++j) result.at[j] = get(j);
    return result;
  }
};

}  // namespace
}  // namespace fusedopt::cuda
