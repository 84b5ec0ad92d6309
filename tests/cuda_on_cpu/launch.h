// Running a kernel over its grid.
#pragma once

#include <cfenv>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "block.h"
#include "shared_memory.h"

namespace cuda_on_cpu {

inline uint64_t order_from_environment() {
  const char* text = std::getenv("CUDA_ON_CPU_ORDER");
  return text == nullptr ? 0 : std::strtoull(text, nullptr, 10);
}

CUDA_ON_CPU_VARIABLE uint64_t order_seed = order_from_environment();
CUDA_ON_CPU_VARIABLE std::recursive_mutex launching;

// In which order blocks begin and threads go on: 0, as numbered (the default, unless CUDA_ON_CPU_ORDER is set); any
// other seed, at random, but the same for the same seed.
inline void set_order(uint64_t seed) { order_seed = seed; }

inline uint64_t scrambled(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return (x ^ (x >> 31)) | 1;
}

// One launch at a time. Numbers are those of IEEE while it lasts, as on a device: the thread that launches may flush
// subnormals.
class Launch {
 public:
  Launch() : lock_(launching) {
    if (block.running >= 0) throw std::runtime_error("A kernel launches a kernel, which is not emulated.");
    std::fegetenv(&environment_);
    std::fesetenv(FE_DFL_ENV);
  }
  Launch(const Launch&) = delete;
  ~Launch() {
    block.running = -1;
    block.failure.clear();
    block.exception = nullptr;
    std::fesetenv(&environment_);
  }

 private:
  std::lock_guard<std::recursive_mutex> lock_;
  SharedMemoryOfLaunch shared_memory_;
  std::fenv_t environment_;
};

inline void run_block(const uint3& index) {
  blockIdx = index;
  SharedMemoryOfLaunch::poison();
  block.finished_count = block.barrier_count = block.ready_count = 0;
  for (Warp& warp : block.warps) warp.finished = warp.at_barrier = 0, warp.group_count = 0;
  for (int thread = block.thread_count - 1; thread >= 0; --thread) {
    block.threads[thread].fiber = nullptr;
    make_ready(thread);
  }
  set_running(take_ready());
  block.fiber = block.threads[block.running].fiber = fibers.take();
  switch_context(block.launcher, block.fiber->context);
  if (!block.exception && block.failure.empty()) return;
  fibers.restart_all();
  if (block.exception) std::rethrow_exception(block.exception);
  throw std::runtime_error("In block " + text_of(index) + ", " + block.failure + ".");
}

// Calls body(parameters) for every thread of the grid.
inline void run_grid(const dim3& grid, const dim3& threads, void (*body)(const void*), const void* parameters) {
  const Launch launch;
  gridDim = grid;
  blockDim = threads;
  block.body = body;
  block.parameters = parameters;
  block.seed = order_seed;
  block.random = scrambled(order_seed);
  block.thread_count = static_cast<int>(threads.x * threads.y * threads.z);
  for (Warp& warp : block.warps) warp.existing = 0;
  for (int thread = 0; thread < block.thread_count; ++thread) {
    const unsigned linear = static_cast<unsigned>(thread);
    block.threads[thread].index = {linear % threads.x, linear / threads.x % threads.y, linear / threads.x / threads.y};
    warp_of(thread).existing |= bit_of(thread);
  }

  const auto run_nth = [&grid](uint64_t n) {
    const uint64_t row = n / grid.x;
    run_block(
        {static_cast<unsigned>(n % grid.x), static_cast<unsigned>(row % grid.y), static_cast<unsigned>(row / grid.y)});
  };
  const uint64_t count = uint64_t{grid.x} * grid.y * grid.z;
  if (order_seed == 0) {
    for (uint64_t n = 0; n < count; ++n) run_nth(n);
    return;
  }
  std::vector<uint64_t> order(count);
  for (uint64_t n = 0; n < count; ++n) {
    const uint64_t any = scrambled(order_seed + n) % (n + 1);
    order[n] = order[any];
    order[any] = n;
  }
  for (const uint64_t n : order) run_nth(n);
}

// What a kernel may take, as the compiler of CUDA lays parameters out.
template <class... Parameters>
constexpr size_t parameter_bytes() {
  size_t bytes = 0;
  ((bytes = (bytes + alignof(Parameters) - 1) / alignof(Parameters) * alignof(Parameters) + sizeof(Parameters)), ...);
  return bytes;
}

// Every thread is handed copies of its own, as parameters by value are.
template <class... Parameters>
void run_kernel(const dim3& grid, const dim3& threads, void (*kernel)(Parameters...),
                const std::tuple<Parameters...>& parameters) {
  using Call = std::pair<void (*)(Parameters...), const std::tuple<Parameters...>*>;
  const Call call(kernel, &parameters);
  const auto body = [](const void* data) {
    const Call& call = *static_cast<const Call*>(data);
    std::apply(call.first, *call.second);
  };
  run_grid(grid, threads, body, &call);
}

}  // namespace cuda_on_cpu
