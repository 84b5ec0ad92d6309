// The contract of a rule: the element-wise equation of one optimizer.
//
// A rule is a struct with
//
//   static constexpr int kStates;        how many state tensors it keeps, at most kMaxStates
//   static constexpr const char* kStateNames[kStates];  their names, those of torch.optim
//   struct Config { double ...; };       hyperparameters of one param group, as the user gave them
//   static constexpr ConfigField kFields[];             Config's members by name
//   struct Hyper { float ...; };         what the equation needs, derived once per step
//   static Hyper derive(const Config&, int64_t step);   step counts from 1
//   static void update(float& p, float g, float (&s)[kStates], const Hyper&);
//
// derive computes in double and rounds each result to fp32 once. update computes in fp32 with IEEE
// add, mul, div and sqrt in the order its header states; nothing is contracted, so every instruction
// set and device gives the same bits. g arrives multiplied by +-(inverse loss scale x clip
// coefficient), negative to maximize. Storage, threads and launches are other rooms.
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
FUSEDOPT_FN float root(float x) { return __builtin_sqrtf(x); }
FUSEDOPT_FN double root(double x) { return __builtin_sqrt(x); }

// The larger of two, NaN if either is, as torch.maximum.
FUSEDOPT_FN float maximum(float a, float b) { return (b > a || b != b) ? b : a; }

}  // namespace
}  // namespace fusedopt
