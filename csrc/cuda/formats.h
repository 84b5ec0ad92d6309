// The formats of a tensor's buffers: as a launch finds them or, for the usual ones, as constants. Kernels are templates
// over them, and what they ask is the same.
#pragma once

#include <cstdint>

#include "core/portable.h"
#include "core/tensors.h"

namespace fusedopt::cuda {

// Any formats, in one word.
struct Formats {
  uint32_t param_dtype : 3, grad_dtype : 3, master_dtype : 3;  // DType
  uint32_t master_kind : 3;                                    // Master
  uint32_t state_dtypes : 12;                                  // 3 bits each
  uint32_t state_roundings : 4;                                // 1 bit each, stochastically
  uint32_t param_rounding : 1;
  uint32_t has_float32 : 1;  // in some buffer
  uint32_t is_aligned : 1;   // whole tiles lie on multiples of 16 bytes in every buffer
  uint32_t skips : 1;        // what a step would spoil stays as it was (TensorDesc::skips_blocks)

  // At least so many blocks fit on a multiprocessor. That leaves 168 registers per thread, with which no rule spills.
  static constexpr int resident_blocks(int) { return 3; }

  // Whether kernels for these formats sum squares on the way (sums.cuh) if they are asked to.
  static constexpr bool kMaySum = true;

  // Whether a kernel for these formats can step a tensor with `found`.
  static constexpr bool fit(const Formats&, int) { return true; }

  FUSEDOPT_FN DType param() const { return static_cast<DType>(param_dtype); }
  FUSEDOPT_FN DType grad() const { return static_cast<DType>(grad_dtype); }
  FUSEDOPT_FN DType master() const { return static_cast<DType>(master_dtype); }
  FUSEDOPT_FN Master master_format() const { return static_cast<Master>(master_kind); }
  FUSEDOPT_FN DType state(int k) const { return static_cast<DType>(state_dtypes >> (3 * k) & 7u); }
  // A lane takes two runs of four elements, half a tile apart: float32 is accessed without gaps.
  FUSEDOPT_FN bool is_split() const { return has_float32 != 0; }

  FUSEDOPT_FN bool rounds_state(int k) const { return state_roundings >> k & 1u; }  // stochastically, as below
  FUSEDOPT_FN bool rounds_param() const { return param_rounding != 0; }
  FUSEDOPT_FN bool skips_blocks() const { return skips != 0; }
};

// Usual formats: constants hide what was found, so that nothing is looked up between the loads of a tile. How numbers
// are rounded is still looked up: it comes after the loads.
template <DType kParam, Master kMaster, DType kState>
struct UsualFormats : Formats {
  static_assert(kMaster == Master::kNone || kMaster == Master::kSplit24);
  // 80 or 96 registers. A warp that loads one state less has fewer bytes under way, so there have to be more of them.
  static constexpr int resident_blocks(int states) { return states < 2 ? 6 : 5; }

  static constexpr bool kMaySum = false;  // few steps do

  FUSEDOPT_FN explicit UsualFormats(const Formats& found) : Formats(found) {}

  static bool fit(const Formats& found, int states) {
    bool fits =
        found.param() == kParam && found.grad() == kParam && found.master_format() == kMaster && !found.skips_blocks();
    for (int k = 0; k < states; ++k) fits = fits && found.state(k) == kState;
    return fits;
  }

  static FUSEDOPT_FN constexpr DType param() { return kParam; }
  static FUSEDOPT_FN constexpr DType grad() { return kParam; }
  static FUSEDOPT_FN constexpr DType master() { return DType::kInt8; }
  static FUSEDOPT_FN constexpr Master master_format() { return kMaster; }
  static FUSEDOPT_FN constexpr DType state(int) { return kState; }
  static FUSEDOPT_FN constexpr bool skips_blocks() { return false; }
  static FUSEDOPT_FN constexpr bool is_split() { return kParam == DType::kFloat32 || kState == DType::kFloat32; }
};

// Formats that have kernels of their own, and any others last.
template <class... Each>
struct FormatsList {};

using DenseFormats = FormatsList<UsualFormats<DType::kFloat32, Master::kNone, DType::kFloat32>,
                                 UsualFormats<DType::kBFloat16, Master::kNone, DType::kFloat32>,
                                 UsualFormats<DType::kBFloat16, Master::kNone, DType::kBFloat16>,
                                 UsualFormats<DType::kBFloat16, Master::kSplit24, DType::kFloat32>,
                                 UsualFormats<DType::kBFloat16, Master::kSplit24, DType::kBFloat16>, Formats>;
using QuantizedFormats = FormatsList<UsualFormats<DType::kFloat32, Master::kNone, DType::kUInt8>,
                                     UsualFormats<DType::kBFloat16, Master::kNone, DType::kUInt8>,
                                     UsualFormats<DType::kBFloat16, Master::kSplit24, DType::kUInt8>, Formats>;

}  // namespace fusedopt::cuda
