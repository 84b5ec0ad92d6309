// Launching, shared by the files that make launches: an error becomes an exception, and a list that is too long for one
// launch becomes several. Kernels are compiled in several files, so that these build side by side; each fills a table.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <iterator>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/registry.h"
#include "cuda/descriptors.h"
#include "cuda/launch.h"

namespace fusedopt::cuda {

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string("CUDA: ") + what + " failed: " + cudaGetErrorString(error));
}

constexpr int64_t kMaxBlocks = 0x7FFFFFFF;

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, cudaStream_t stream, Arguments&&... arguments) {
  if (blocks > kMaxBlocks) throw std::runtime_error("CUDA: a launch would need more than 2^31 - 1 blocks");
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = stream;
  check(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...), "a launch");
}

// Packs the tensors of one kernel into as few launches as possible. Params has `tensors`, each of which knows its first
// block, and their `count`.
template <class Params>
class Packed {
 public:
  Packed(void (*kernel)(Params), int threads, cudaStream_t stream)
      : params(std::make_unique<Params>()), kernel_(kernel), threads_(threads), stream_(stream) {
    params->count = 0;
  }

  template <class Tensor>
  void add(const Tensor& tensor, int64_t blocks) {
    if (blocks == 0) return;
    if (blocks_ + blocks > kMaxBlocks) flush();
    Tensor& added = params->tensors[params->count++];
    added = tensor;
    added.first_block = static_cast<uint32_t>(blocks_);
    blocks_ += blocks;
    if (params->count == static_cast<int32_t>(std::size(params->tensors))) flush();
  }

  // Has to be called once more at the end.
  void flush() {
    if (params->count > 0) launch(kernel_, blocks_, threads_, stream_, *params);
    params->count = 0;
    blocks_ = 0;
  }

  const std::unique_ptr<Params> params;  // for what all tensors share

 private:
  void (*kernel_)(Params);
  int threads_;
  cudaStream_t stream_;
  int64_t blocks_ = 0;
};

// Pieces of device memory begin at multiples of this many bytes.
constexpr int64_t kAlignment = 256;

constexpr int64_t aligned(int64_t bytes) { return divided_up(bytes, kAlignment) * kAlignment; }

// What is derived for a tensor takes at most so many bytes.
constexpr int64_t kDerivedBytes = 192;

// Where a step keeps the sums of blocks that it is asked for: those of each tensor of the batch begin at a multiple of
// four, so that one access loads as many.
struct Summing {
  BlockSums blocks;
  std::vector<uint32_t> first_fours;
};

// The tensors of a step that one rule steps.
struct Listed {
  const Batch& batch;
  std::vector<int32_t> tensors;
  int rule;
  unsigned char* derived = nullptr;            // of these tensors, in device memory
  const Summing* summing = nullptr;            // null if nothing is summed
  std::vector<NormalizeScratch> scratch = {};  // of these tensors, where second moments are factored
};

// Derives what the step of a rule's tensors needs. `normalizations`, one for each tensor, is null except for rules that
// normalize. `counts`: whether the step is counted, as it is unless hyperparameters are derived once more, from sums.
using PrepareFn = void (*)(const Listed&, const std::vector<DeviceLr>&, const Scaling&, Normalization* normalizations,
                           bool counts, cudaStream_t);
// Takes the tensors that are stepped row by row (`is_quantized`), or the others.
using StepFn = void (*)(const Listed&, cudaStream_t);

// By rule, in the order of rules/all.h.
extern const PrepareFn kPrepare[];
extern const StepFn kStepDense[], kStepQuantized[];

inline bool lies_on_16(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

inline Formats formats_of(const TensorDesc& tensor, int states, int64_t row) {
  Formats formats{};
  formats.param_dtype = static_cast<uint32_t>(tensor.param.dtype);
  formats.grad_dtype = static_cast<uint32_t>(tensor.grad.dtype);
  formats.master_dtype = static_cast<uint32_t>(tensor.master.dtype);
  formats.master_kind = static_cast<uint32_t>(tensor.master_format);
  formats.param_rounding = tensor.param.rounding == Rounding::kStochastic;
  bool aligned = lies_on_16(tensor.param.data) && lies_on_16(tensor.grad.data) && lies_on_16(tensor.master.data) &&
                 (row == tensor.numel || row % kLane == 0);
  bool has_float32 = tensor.param.dtype == DType::kFloat32 || tensor.grad.dtype == DType::kFloat32 ||
                     (tensor.master_format != Master::kNone && tensor.master.dtype == DType::kFloat32);
  for (int k = 0; k < states; ++k) {
    const Buffer& state = tensor.states[k];
    formats.state_dtypes |= static_cast<uint32_t>(state.dtype) << (3 * k);
    formats.state_roundings |= static_cast<uint32_t>(state.rounding == Rounding::kStochastic) << k;
    aligned = aligned && lies_on_16(state.data);
    has_float32 = has_float32 || state.dtype == DType::kFloat32;
  }
  formats.has_float32 = has_float32;
  formats.is_aligned = aligned;
  formats.skips = tensor.skips_blocks;
  return formats;
}

// Whether a tensor is stepped row by row: blocks of codes do not cross rows, nor random bits segments.
inline bool is_quantized(const TensorDesc& tensor, int states) {
  if (tensor.segment != 0) return true;
  for (int k = 0; k < states; ++k) {
    if (tensor.states[k].is_blockwise()) return true;
  }
  return false;
}

}  // namespace fusedopt::cuda
