#include "cuda/launch.h"

#include <memory>

#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"

namespace fusedopt::cuda {
namespace {

constexpr int64_t kAlignment = 256;

int64_t aligned(int64_t bytes) { return divided_up(bytes, kAlignment) * kAlignment; }

// Room for the sums of chunks, then the sums of those, and so on down to one.
int64_t pairwise_numbers(int64_t count) {
  int64_t total = count;
  while (count > 1) total += count = divided_up(count, kPairs);
  return total + 1;
}

// Adds numbers in pairs; where the sum is.
const double* pairwise_sum(double* numbers, int64_t count, cudaStream_t stream) {
  if (count == 0) {
    check(cudaMemsetAsync(numbers, 0, sizeof(double), stream), "clearing a sum");
    return numbers;
  }
  while (count > 1) {
    const int64_t blocks = divided_up(count, kPairs);
    launch(pairwise_kernel, blocks, kSumThreads, stream, static_cast<const double*>(numbers), count, numbers + count);
    numbers += count;
    count = blocks;
  }
  return numbers;
}

int64_t derived_bytes(const Batch& batch) {
  return aligned(kDerivedBytes * static_cast<int64_t>(batch.tensors.size()));
}

}  // namespace

int64_t count_square_sums(const Batch& batch) {
  int64_t count = 0;
  for (const TensorDesc& tensor : batch.tensors) count += divided_up(tensor.numel, kSumChunk);
  return count;
}

int64_t workspace_bytes(const Batch& batch, bool clips) {
  const int64_t sums = clips ? pairwise_numbers(count_square_sums(batch)) : 0;
  return derived_bytes(batch) + aligned(sums * static_cast<int64_t>(sizeof(double)));
}

void square_sums(const Batch& batch, double* sums, cudaStream_t stream) {
  const auto params = std::make_unique<SumParams>();
  params->sums = sums;
  params->count = 0;
  int64_t blocks = 0, chunks = 0;
  const auto flush = [&] {
    if (params->count > 0) launch(square_sum_kernel, blocks, kSumThreads, stream, *params);
    params->count = 0;
    blocks = 0;
  };
  for (const TensorDesc& tensor : batch.tensors) {
    if (tensor.numel == 0) continue;
    params->tensors[params->count++] = {tensor.grad.data, tensor.numel, chunks, static_cast<uint32_t>(blocks),
                                        static_cast<uint32_t>(tensor.grad.dtype)};
    const int64_t count = divided_up(tensor.numel, kSumChunk);
    chunks += count;
    blocks += divided_up(count, kBlockChunks);
    if (params->count == kSummedTensors) flush();
  }
  flush();
}

void step(const Batch& batch, const std::vector<DeviceLr>& lrs, Scaling scaling, bool clips, void* workspace,
          cudaStream_t stream) {
  auto* free = static_cast<unsigned char*>(workspace);
  unsigned char* derived = free;
  free += derived_bytes(batch);
  if (clips) {
    auto* sums = reinterpret_cast<double*>(free);
    square_sums(batch, sums, stream);
    scaling.square_sum = pairwise_sum(sums, count_square_sums(batch), stream);
  }
  for (int rule = 0; rule < static_cast<int>(rules().size()); ++rule) {
    Listed listed{batch, {}, rule, derived};
    for (size_t i = 0; i < batch.tensors.size(); ++i) {
      if (batch.groups[batch.tensors[i].group].rule == rule) listed.tensors.push_back(static_cast<int32_t>(i));
    }
    if (listed.tensors.empty()) continue;
    derived += kDerivedBytes * static_cast<int64_t>(listed.tensors.size());
    kPrepare[rule](listed, lrs, scaling, nullptr, true, stream);
    kStepDense[rule](listed, stream);
    kStepQuantized[rule](listed, stream);
  }
}

}  // namespace fusedopt::cuda
