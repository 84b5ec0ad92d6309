#include "cuda/launch.h"

#include "cuda/launch.cuh"
#include "cuda/norm.cuh"
#include "cuda/normalize.h"

namespace fusedopt::cuda {
namespace {

// Room for the sums of chunks, then the sums of those, and so on down to one.
int64_t pairwise_numbers(int64_t count) {
  int64_t total = count;
  while (count > 1) total += count = divided_up(count, kPairs);
  return total + 1;
}

// Adds numbers in pairs. Returns where the sum will be.
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

// The tensors of each rule, in list order.
std::vector<std::vector<int32_t>> tensors_by_rule(const Batch& batch) {
  std::vector<std::vector<int32_t>> listed(rules().size());
  for (size_t i = 0; i < batch.tensors.size(); ++i) {
    listed[batch.groups[batch.tensors[i].group].rule].push_back(static_cast<int32_t>(i));
  }
  return listed;
}

}  // namespace

int64_t count_square_sums(const Batch& batch) {
  int64_t count = 0;
  for (const TensorDesc& tensor : batch.tensors) count += chunks_of(tensor.numel);
  return count;
}

int64_t workspace_bytes(const Batch& batch, bool clips) {
  const int64_t sums = clips ? pairwise_numbers(count_square_sums(batch)) : 0;
  int64_t most = 0;  // rules follow each other and use the same memory
  const auto tensors = tensors_by_rule(batch);
  for (int rule = 0; rule < static_cast<int>(tensors.size()); ++rule) {
    if (rules()[rule].normalizes) most = std::max(most, normalization_bytes({batch, tensors[rule], rule}));
  }
  return derived_bytes(batch) + aligned(sums * static_cast<int64_t>(sizeof(double))) + most;
}

void square_sums(const Batch& batch, double* sums, cudaStream_t stream) {
  Packed<SumParams> packed(square_sum_kernel, kNormThreads, stream);
  packed.params->sums = sums;
  int64_t chunks = 0;
  for (const TensorDesc& tensor : batch.tensors) {
    const int64_t count = chunks_of(tensor.numel);
    packed.add(SummedTensor{tensor.grad.data, tensor.numel, chunks, 0, tensor.grad.dtype},
               divided_up(count, chunks_of_block(tensor.grad.dtype)));
    chunks += count;
  }
  packed.flush();
}

void step(const Batch& batch, const std::vector<DeviceLr>& lrs, Scaling scaling, bool clips, void* workspace,
          cudaStream_t stream) {
  auto* free = static_cast<unsigned char*>(workspace);
  unsigned char* derived = free;
  free += derived_bytes(batch);
  if (clips) {
    auto* sums = reinterpret_cast<double*>(free);
    square_sums(batch, sums, stream);
    const int64_t count = count_square_sums(batch);
    scaling.square_sum = pairwise_sum(sums, count, stream);
    free += aligned(pairwise_numbers(count) * static_cast<int64_t>(sizeof(double)));
  }
  auto tensors = tensors_by_rule(batch);
  for (int rule = 0; rule < static_cast<int>(tensors.size()); ++rule) {
    if (tensors[rule].empty()) continue;
    Listed listed{batch, std::move(tensors[rule]), rule, derived};
    derived += kDerivedBytes * static_cast<int64_t>(listed.tensors.size());
    if (rules()[rule].normalizes) {
      prepare_normalizing(listed, lrs, scaling, free, stream);
    } else {
      kPrepare[rule](listed, lrs, scaling, nullptr, true, stream);
    }
    kStepDense[rule](listed, stream);
    kStepQuantized[rule](listed, stream);
  }
}

}  // namespace fusedopt::cuda
