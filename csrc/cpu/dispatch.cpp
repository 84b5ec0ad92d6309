#include "cpu/dispatch.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "core/chunks.h"
#include "cpu/kernels.h"
#include "cpu/normalize.h"
#include "cpu/parallel.h"
#include "storage/blockwise8.h"
#include "storage/random.h"

namespace fusedopt::cpu {
namespace {

// A step's chunk: long enough to hide its start, short enough to share out evenly.
constexpr int64_t kStepChunk = int64_t{1} << 16;

struct Isa {
  const char* name;
  const Kernels* kernels;
  bool runs;
};

const std::vector<Isa>& isas() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
                  __builtin_cpu_supports("bmi2");
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
  static const std::vector<Isa> all = {
      {"baseline", &kBaselineKernels, true}, {"v3", &kV3Kernels, v3}, {"v4", &kV4Kernels, v4}};
#elif defined(__aarch64__)
  static const std::vector<Isa> all = {{"neon", &kNeonKernels, true}};
#else
  static const std::vector<Isa> all = {{"baseline", &kBaselineKernels, true}};
#endif
  return all;
}

const Isa& select() {
  const char* wanted = std::getenv("FUSEDOPT_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') {
    const Isa* best = nullptr;
    for (const Isa& isa : isas()) {
      if (isa.runs) best = &isa;
    }
    return *best;
  }
  for (const Isa& isa : isas()) {
    if (isa.runs && std::strcmp(isa.name, wanted) == 0) return isa;
  }
  std::string message = "FUSEDOPT_CPU_ISA='" + std::string(wanted) + "' is not available here; unset it or use one of:";
  for (const std::string& name : available_isas()) message += " " + name;
  throw std::invalid_argument(message);
}

// The derived numbers of one (group, step): parameters of a group that have taken equally many steps share one.
struct Derived {
  StepContext context;
  alignas(16) unsigned char hyper[kMaxHyperBytes];
};

struct Contexts {
  std::vector<Derived> derived;
  std::vector<int32_t> of_tensor;
};

Contexts derive_all(const std::vector<TensorDesc>& tensors, const std::vector<GroupDesc>& groups) {
  const IeeeMode ieee;
  Contexts result;
  result.of_tensor.reserve(tensors.size());
  std::vector<int64_t> last_step(groups.size(), 0);
  std::vector<int32_t> last_context(groups.size(), -1);
  for (const TensorDesc& tensor : tensors) {
    const GroupDesc& group = groups[tensor.group];
    const int64_t step = static_cast<int64_t>(*tensor.step) + 1;
    int32_t& held = last_context[tensor.group];
    if (held < 0 || last_step[tensor.group] != step) {
      held = static_cast<int32_t>(result.derived.size());
      last_step[tensor.group] = step;
      Derived& derived = result.derived.emplace_back();
      const RuleInfo& info = rules()[group.rule];
      if (!info.normalizes) info.derive(group.config, step, {}, derived.hyper);
      derived.context.grad_multiplier = static_cast<float>(group.grad_multiplier);
      fill_stream_keys(group.seed, step, derived.context.stream_keys);
    }
    result.of_tensor.push_back(held);
  }
  // Only now, as the vector no longer moves its elements.
  for (Derived& derived : result.derived) derived.context.hyper = derived.hyper;
  return result;
}

// Runs body(chunk index, chunk) over a plan; the chunks of an item in order, on one thread.
template <class Body>
void for_each_chunk(const ChunkPlan& plan, int threads, const Body& body) {
  parallel_items(static_cast<int64_t>(plan.item_ends.size()), threads, [&](int64_t item) {
    for (int64_t i = item == 0 ? 0 : plan.item_ends[item - 1]; i < plan.item_ends[item]; ++i) {
      body(i, plan.chunks[i]);
    }
  });
}

ChunkPlan plan_reduction(const std::vector<TensorDesc>& tensors) {
  return plan_chunks(
      static_cast<int64_t>(tensors.size()), [&](int64_t i) { return tensors[i].numel; },
      [](int64_t, int64_t position) { return position; }, kReductionChunk, kStepChunk);
}

template <class TakesOnePass>
ChunkPlan plan_step(const std::vector<TensorDesc>& tensors, const TakesOnePass& takes_one_pass) {
  return plan_chunks(
      static_cast<int64_t>(tensors.size()), [&](int64_t i) { return takes_one_pass(i) ? tensors[i].numel : 0; },
      [&](int64_t i, int64_t position) { return cut_between_blocks(tensors[i], position); }, kStepChunk, kStepChunk);
}

}  // namespace

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : isas()) {
    if (isa.runs) names.emplace_back(isa.name);
  }
  return names;
}

void step_chunk(const Kernels& kernels, int rule, const TensorDesc& tensor, int64_t index, const StepContext& context,
                int64_t begin, int64_t length, const Recording& recording) {
  const StepFn step = kernels.step[rule];
  HealthCounts counts;
  HealthCounts* const counted = recording.health == nullptr ? nullptr : &counts;
  if (recording.updates == nullptr) {
    step(tensor, context, begin, length, {counted, nullptr});
  } else {
    const UpdateTarget target = recording.updates->target(index);
    step(tensor, context, begin, length, {counted, &target});
  }
  if (counted == nullptr) return;
#if defined(_OPENMP)
#pragma omp critical(fusedopt_health)
#endif
  for (const HealthCount& each : kHealthCounts) recording.health[index].*each.count += counts.*each.count;
}

int64_t cut_between_blocks(const TensorDesc& tensor, int64_t position) {
  return position - position % block_row(tensor) % kBlock;
}

std::string selected_isa() { return select().name; }

const Kernels& selected_kernels() { return *select().kernels; }

void step(const std::vector<TensorDesc>& tensors, const std::vector<GroupDesc>& groups, int threads,
          const Recording& recording) {
  const Kernels& kernels = selected_kernels();
  const Contexts contexts = derive_all(tensors, groups);
  const auto takes_one_pass = [&](int64_t i) { return !rules()[groups[tensors[i].group].rule].normalizes; };
  for_each_chunk(plan_step(tensors, takes_one_pass), threads, [&](int64_t, const Chunk& chunk) {
    const TensorDesc& tensor = tensors[chunk.tensor];
    const Derived& derived = contexts.derived[contexts.of_tensor[chunk.tensor]];
    step_chunk(kernels, groups[tensor.group].rule, tensor, chunk.tensor, derived.context, chunk.begin, chunk.length,
               recording);
  });
  std::vector<int32_t> others;
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (!takes_one_pass(static_cast<int64_t>(i))) others.push_back(static_cast<int32_t>(i));
  }
  step_normalizing(tensors, others, groups, kernels, threads, recording);
  for (const TensorDesc& tensor : tensors) *tensor.step += 1.0f;
}

int64_t count_square_sums(const std::vector<TensorDesc>& tensors) {
  int64_t count = 0;
  for (const TensorDesc& tensor : tensors) count += chunks_of(tensor.numel);
  return count;
}

void square_sums(const std::vector<TensorDesc>& tensors, double* sums, int threads) {
  const Kernels& kernels = selected_kernels();
  for_each_chunk(plan_reduction(tensors), threads, [&](int64_t i, const Chunk& chunk) {
    sums[i] = kernels.square_sum(tensors[chunk.tensor].grad, chunk.begin, chunk.length);
  });
}

void zero(void* data, int64_t bytes, int threads) {
#if defined(__linux__)
  // Huge pages halve the first step and save about 8 % of every later one; a refusal costs nothing.
  constexpr uintptr_t kHuge = uintptr_t{1} << 21;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHuge - 1) & ~(kHuge - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) & ~(kHuge - 1);
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
  constexpr int64_t kBlock = int64_t{1} << 21;
  parallel_items((bytes + kBlock - 1) / kBlock, threads, [&](int64_t i) {
    std::memset(static_cast<char*>(data) + i * kBlock, 0, static_cast<size_t>(std::min(kBlock, bytes - i * kBlock)));
  });
}

}  // namespace fusedopt::cpu
