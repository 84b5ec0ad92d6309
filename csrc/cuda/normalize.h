// What comes before the step of rules that normalize (rules/normalize.h): sums over tensors, averages, factors.
#pragma once

#include "cuda/launch.cuh"

namespace fusedopt::cuda {

// Bytes of device memory that this takes; a multiple of 256.
int64_t normalization_bytes(const Listed& listed);

// Prepares the step, brings second moments up to date and says in `listed.scratch` where the factors are: in the
// workspace, which is in use until the step has been taken.
void prepare_normalizing(Listed& listed, const std::vector<DeviceLr>& lrs, const Scaling& scaling, void* workspace,
                         cudaStream_t stream);

}  // namespace fusedopt::cuda
