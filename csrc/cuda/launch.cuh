// Launching, shared by the files that make launches: an error is an exception, a list longer than a launch takes is
// several launches. Kernels are compiled in several files, so that these build side by side; each fills a table.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
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

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, cudaStream_t stream, Arguments&&... arguments) {
  if (blocks > 0x7FFFFFFF) throw std::runtime_error("CUDA: a launch would need more than 2^31 - 1 blocks");
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = stream;
  check(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...), "a launch");
}

constexpr int64_t divided_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// What is derived for a tensor takes at most this.
constexpr int64_t kDerivedBytes = 192;

// Some tensors of a step that one rule steps.
struct Listed {
  const Batch& batch;
  std::vector<int32_t> tensors;
  int rule;
  unsigned char* derived;  // of these tensors, in device memory
};

// The prepared state of the tensors of a rule. `sums` are null but for rules that normalize; `counts` the step, which
// is so but when hyperparameters are derived once more, from sums.
using PrepareFn = void (*)(const Listed&, const std::vector<DeviceLr>&, const Scaling&, TensorSums* sums, bool counts,
                           cudaStream_t);
// `is_quantized`: takes the tensors that have codes, or those that have none.
using StepFn = void (*)(const Listed&, cudaStream_t);

// By rule, in the order of rules/all.h.
extern const PrepareFn kPrepare[];
extern const StepFn kStepDense[], kStepQuantized[];

inline bool is_quantized(const TensorDesc& tensor, int states) {
  for (int k = 0; k < states; ++k) {
    if (tensor.states[k].is_blockwise()) return true;
  }
  return false;
}

}  // namespace fusedopt::cuda
