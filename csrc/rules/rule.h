// The contract of a rule: the element-wise equation of one optimizer.
//
// A rule is a struct with
//
//   static constexpr int kStates;        how many state tensors it keeps, at most kMaxStates
//   static constexpr const char* kStateNames[kStates];  their names, those of torch.optim
//   static constexpr bool kSigned[kStates];             which hold numbers of both signs
//   struct Config { double ...; };       hyperparameters of one param group, as the user gave them
//   static constexpr ConfigField kFields[];             Config's members by name
//   struct Hyper { float ...; };         what the equation needs, derived once per step
//   static FUSEDOPT_FN Hyper derive(const Config&, int64_t step);   step counts from 1
//   static constexpr int kRooted;        a state whose square root update has at hand, or -1
//   template <class F> static F update(F& p, F g, F* s, const Hyper&);
//                                        returns that root, of the new state; 0 if there is none.
//                                        F is float or a vector of them
//
// derive computes in double and rounds each result to fp32 once. update computes in fp32 with IEEE
// add, mul, div and sqrt in the order its header states; nothing is contracted, so every instruction
// set and device gives the same bits. g arrives multiplied by +-(inverse loss scale x clip
// coefficient), negative to maximize. 8-bit storage needs roots, too, and is bound by them: hence kRooted.
// Storage, threads and launches are other rooms.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/portable.h"
#include "core/tensors.h"

namespace fusedopt {
namespace {

struct ConfigField {
  const char* name;
  size_t offset;  // of a double in Config
};

// IEEE square root: the builtin compiles to the instruction because errno is off.
#if defined(__CUDA_ARCH__)
FUSEDOPT_FN float root(float x) { return __fsqrt_rn(x); }
FUSEDOPT_FN double root(double x) { return __dsqrt_rn(x); }
#else
FUSEDOPT_FN float root(float x) { return __builtin_sqrtf(x); }
FUSEDOPT_FN double root(double x) { return __builtin_sqrt(x); }
#endif

// -1, 1, or x itself where it is zero or NaN.
FUSEDOPT_FN float sign(float x) { return x > 0.0f ? 1.0f : (x < 0.0f ? -1.0f : x); }

// The larger of two, NaN if either is, as torch.maximum.
FUSEDOPT_FN float maximum(float a, float b) { return (b > a || b != b) ? b : a; }

}  // namespace
}  // namespace fusedopt
