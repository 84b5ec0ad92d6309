// Steps on a CUDA device: plans launches and makes them. Nothing here waits for the device or reads from it.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <vector>

#include "core/registry.h"
#include "core/tensors.h"
#include "cuda/prepare.h"

namespace fusedopt::cuda {

// A step's tensors and groups.
struct Batch {
  const std::vector<TensorDesc>& tensors;
  const std::vector<GroupDesc>& groups;
};

// The learning rate of a group where it is on the device: float32 or float64.
struct DeviceLr {
  const void* data = nullptr;
  bool is_double = false;
};

// Bytes of device memory that `step` needs beside the tensors; aligned to 256.
int64_t workspace_bytes(const Batch& batch, bool clips, bool sums_updates);

// Steps everything. `scaling.square_sum` is set here if gradients are clipped. `sums_updates`: whether sums of squares
// are taken, first of the updates of all tensors, then of their weights, count_update_sums of each.
void step(const Batch& batch, const std::vector<DeviceLr>& lrs, Scaling scaling, bool clips, bool sums_updates,
          double* update_sums, void* workspace, cudaStream_t stream);

// How many chunks the sums of the blocks of all tensors come in (fusedopt/reference/norm.py).
int64_t count_update_sums(const Batch& batch);

// Sums of squares of gradients by chunk, in list order, as cpu::square_sums.
int64_t count_square_sums(const Batch& batch);
void square_sums(const Batch& batch, double* sums, cudaStream_t stream);

}  // namespace fusedopt::cuda
