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

// Sums a row of numbers by chunk, from the given one on. Returns which chunk comes next.
int64_t add_row(Packed<SumParams>& packed, const void* data, int64_t numel, DType dtype, int64_t first_chunk) {
  const int64_t count = chunks_of(numel);
  packed.add(SummedTensor{data, numel, first_chunk, 0, dtype}, divided_up(count, chunks_of_block(dtype)));
  return first_chunk + count;
}

// Room for the sums of a tensor's blocks, in fours. Those of a step are fewer than 2^32, which would take 128 GiB.
int64_t fours_of(const TensorDesc& tensor) { return divided_up(blocks_of(tensor, kBlock), 4); }

// Bytes for the sums of the blocks of all tensors, of updates or of weights.
int64_t block_sums_bytes(const Batch& batch) {
  int64_t fours = 0;
  for (const TensorDesc& tensor : batch.tensors) fours += fours_of(tensor);
  return aligned(4 * fours * static_cast<int64_t>(sizeof(float)));
}

Summing summing_in(unsigned char* memory, const Batch& batch) {
  Summing summing;
  summing.blocks.updates = reinterpret_cast<float*>(memory);
  summing.blocks.weights = reinterpret_cast<float*>(memory + block_sums_bytes(batch));
  int64_t fours = 0;
  for (const TensorDesc& tensor : batch.tensors) {
    summing.first_fours.push_back(static_cast<uint32_t>(fours));
    fours += fours_of(tensor);
  }
  return summing;
}

// Sums the sums of blocks by chunk.
void sum_blocks(const Batch& batch, const Summing& summing, double* sums, cudaStream_t stream) {
  Packed<SumParams> packed(number_sum_kernel, kNormThreads, stream);
  packed.params->sums = sums;
  int64_t chunks = 0;
  for (const float* of_all : {summing.blocks.updates, summing.blocks.weights}) {
    for (size_t i = 0; i < batch.tensors.size(); ++i) {
      const float* blocks = of_all + 4 * static_cast<int64_t>(summing.first_fours[i]);
      chunks = add_row(packed, blocks, blocks_of(batch.tensors[i], kBlock), DType::kFloat32, chunks);
    }
  }
  packed.flush();
}

}  // namespace

int64_t count_square_sums(const Batch& batch) {
  int64_t count = 0;
  for (const TensorDesc& tensor : batch.tensors) count += chunks_of(tensor.numel);
  return count;
}

int64_t count_update_sums(const Batch& batch) {
  int64_t count = 0;
  for (const TensorDesc& tensor : batch.tensors) count += chunks_of(blocks_of(tensor, kBlock));
  return count;
}

int64_t workspace_bytes(const Batch& batch, bool clips, bool sums_updates) {
  const int64_t sums = clips ? pairwise_numbers(count_square_sums(batch)) : 0;
  int64_t most = 0;  // rules follow each other and use the same memory
  const auto tensors = tensors_by_rule(batch);
  for (int rule = 0; rule < static_cast<int>(tensors.size()); ++rule) {
    if (rules()[rule].normalizes) most = std::max(most, normalization_bytes({batch, tensors[rule], rule}));
  }
  const int64_t blocks = sums_updates ? 2 * block_sums_bytes(batch) : 0;
  return derived_bytes(batch) + aligned(sums * static_cast<int64_t>(sizeof(double))) + blocks + most;
}

void square_sums(const Batch& batch, double* sums, cudaStream_t stream) {
  Packed<SumParams> packed(square_sum_kernel, kNormThreads, stream);
  packed.params->sums = sums;
  int64_t chunks = 0;
  for (const TensorDesc& tensor : batch.tensors) {
    chunks = add_row(packed, tensor.grad.data, tensor.numel, tensor.grad.dtype, chunks);
  }
  packed.flush();
}

void step(const Batch& batch, const std::vector<DeviceLr>& lrs, Scaling scaling, bool clips, bool sums_updates,
          double* update_sums, void* workspace, cudaStream_t stream) {
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
  Summing summing;
  if (sums_updates) {
    summing = summing_in(free, batch);
    free += 2 * block_sums_bytes(batch);
  }
  auto tensors = tensors_by_rule(batch);
  for (int rule = 0; rule < static_cast<int>(tensors.size()); ++rule) {
    if (tensors[rule].empty()) continue;
    Listed listed{batch, std::move(tensors[rule]), rule, derived, sums_updates ? &summing : nullptr};
    derived += kDerivedBytes * static_cast<int64_t>(listed.tensors.size());
    if (rules()[rule].normalizes) {
      prepare_normalizing(listed, lrs, scaling, free, stream);
    } else {
      kPrepare[rule](listed, lrs, scaling, nullptr, true, stream);
    }
    kStepDense[rule](listed, stream);
    kStepQuantized[rule](listed, stream);
  }
  if (sums_updates) sum_blocks(batch, summing, update_sums, stream);
}

}  // namespace fusedopt::cuda
