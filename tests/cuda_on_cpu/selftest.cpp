// The kernels of selftest_kernels.cuh behind functions that Python can call. Compiles with g++ and, as CUDA, with nvcc.
#include <cstring>
#include <exception>
#include <stdexcept>
#include <string>

#include "selftest_kernels.cuh"

namespace {

using Kernel = void (*)(const unsigned*, unsigned*);

#if defined(CUDA_ON_CPU)
void throws(const unsigned*, unsigned*) {
  __syncthreads();
  if (threadIdx.x == 3) throw std::out_of_range("thrown by a kernel");
  __syncthreads();
}
void launches(const unsigned*, unsigned* output) {
  const cudaLaunchConfig_t config = {};
  output[0] = static_cast<unsigned>(cudaLaunchKernelEx(&config, traps, nullptr, nullptr));
  cuda_on_cpu::run_grid(1, 1, nullptr, nullptr);
}
#endif

struct Entry {
  const char* name;
  Kernel kernel;
};

const Entry kKernels[] = {
    {"sums", sums},
    {"indices", indices},
    {"atomics", atomics},
    {"votes", votes},
    {"shuffles", shuffles},
    {"intrinsics", intrinsics},
    {"sums_rounded_down", sums_rounded_down},
    {"vectors", vectors},
    {"misaligned_load", misaligned_load},
    {"misaligned_store", misaligned_store},
    {"misaligned_vector", misaligned_vector},
    {"misaligned_vector_store", misaligned_vector_store},
    {"misaligned_number", misaligned_number},
    {"reads_before_writing", reads_before_writing},
    {"reverses", reverses<true>},
    {"reverses_without_barrier", reverses<false>},
    {"takes_tickets", takes_tickets},
    {"does_little", does_little},
    {"barrier_in_branch", barrier_in_branch},
    {"barrier_after_return", barrier_after_return},
    {"barriers_at_two_sites", barriers_at_two_sites},
    {"barrier_against_ballot", barrier_against_ballot},
    {"ballot_against_barrier", ballot_against_barrier},
    {"shuffle_against_ballot", shuffle_against_ballot},
    {"masks_differ", masks_differ},
    {"mask_without_caller", mask_without_caller},
    {"mask_names_finished_lane", mask_names_finished_lane},
    {"mask_names_absent_lane", mask_names_absent_lane},
    {"finishes_while_awaited", finishes_while_awaited},
    {"waits_in_a_circle", waits_in_a_circle},
    {"shuffle_from_outside", shuffle_from_outside},
    {"traps", traps},
    {"meets_in_parts", meets_in_parts},
#if defined(CUDA_ON_CPU)
    {"throws", throws},
    {"launches", launches},
#endif
};

std::string message;

// A launch fills memory beside it (shared_memory.h).
thread_local unsigned kept;

template <class... Expected, class... Actual>
int launch(const unsigned* grid, const unsigned* threads, void (*kernel)(Expected...), Actual... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(grid[0], grid[1], grid[2]);
  config.blockDim = dim3(threads[0], threads[1], threads[2]);
  try {
    return cudaLaunchKernelEx(&config, kernel, arguments...);
  } catch (const std::exception& error) {
    message = error.what();
    return -1;
  }
}

}  // namespace

// Everything else is hidden (-fvisibility=hidden).
#pragma GCC visibility push(default)
extern "C" {

#if defined(CUDA_ON_CPU)
void selftest_set_order(unsigned long long seed) { cuda_on_cpu::set_order(seed); }
#endif

const char* selftest_message() { return message.c_str(); }

// Returns an error of CUDA's, or -1 for an exception, whose text selftest_message() then has.
int selftest_launch(const char* name, const unsigned* grid, const unsigned* threads, const unsigned* input,
                    unsigned* output) {
  for (const Entry& entry : kKernels) {
    if (strcmp(entry.name, name) == 0) return launch(grid, threads, entry.kernel, input, output);
  }
  message = "There is no such kernel.";
  return -2;
}

int selftest_parameters(const unsigned* grid, const unsigned* threads, unsigned value, unsigned* output) {
  Parameters parameters;
  parameters.values[999] = value;
  return launch(grid, threads, changes_parameters, parameters, parameters, output);
}

// Sets a variable of the calling thread and returns what it was.
unsigned selftest_kept(unsigned value) {
  const unsigned before = kept;
  kept = value;
  return before;
}

// The host's side: memory, copies, events, attributes and errors. 0, or the number of the line that found fault.
#define EXPECT(condition) \
  if (!(condition)) return __LINE__
int selftest_runtime() {
  cudaGetLastError();  // of others
  int value = 0;
  EXPECT(cudaGetDeviceCount(&value) == cudaSuccess && value >= 1);
  EXPECT(cudaGetDevice(&value) == cudaSuccess && value == 0 && cudaSetDevice(0) == cudaSuccess);
  EXPECT(cudaDeviceGetAttribute(&value, cudaDevAttrMultiProcessorCount, 0) == cudaSuccess && value > 0);
  EXPECT(cudaDeviceGetAttribute(&value, cudaDevAttrMaxSharedMemoryPerBlock, 0) == cudaSuccess && value == 49152);
  EXPECT(cudaDeviceGetAttribute(&value, cudaDevAttrComputeCapabilityMajor, 0) == cudaSuccess && value == 9);
  EXPECT(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&value, sums, 256, 0) == cudaSuccess && value >= 1);
  EXPECT(cudaFuncSetAttribute(sums, cudaFuncAttributePreferredSharedMemoryCarveout, 50) == cudaSuccess);

  const cudaStream_t stream = nullptr;
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusActive;
  EXPECT(cudaStreamIsCapturing(stream, &status) == cudaSuccess && status == cudaStreamCaptureStatusNone);
  cudaEvent_t event;
  EXPECT(cudaEventCreateWithFlags(&event, cudaEventDisableTiming) == cudaSuccess);
  EXPECT(cudaEventRecord(event, stream) == cudaSuccess && cudaEventSynchronize(event) == cudaSuccess);
  EXPECT(cudaEventDestroy(event) == cudaSuccess);

  unsigned *device = nullptr, host[4] = {1, 2, 3, 4};
  EXPECT(cudaMalloc(&device, sizeof host) == cudaSuccess && device != nullptr);
  EXPECT(cudaMemcpyAsync(device, host, sizeof host, cudaMemcpyHostToDevice, stream) == cudaSuccess);
  EXPECT(cudaMemsetAsync(device, 0, sizeof *host, stream) == cudaSuccess);
  EXPECT(cudaMemcpyAsync(host, device, sizeof host, cudaMemcpyDeviceToHost, stream) == cudaSuccess);
  EXPECT(cudaStreamSynchronize(stream) == cudaSuccess && cudaDeviceSynchronize() == cudaSuccess);
  EXPECT(host[0] == 0 && host[1] == 2 && host[3] == 4);
  EXPECT(cudaFree(device) == cudaSuccess);
  void* memory = nullptr;
  EXPECT(cudaMallocAsync(&memory, 100, stream) == cudaSuccess && cudaFreeAsync(memory, stream) == cudaSuccess);

  EXPECT(cudaGetLastError() == cudaSuccess);
  EXPECT(cudaSetDevice(12345) == cudaErrorInvalidDevice && cudaPeekAtLastError() == cudaErrorInvalidDevice);
  EXPECT(cudaGetLastError() == cudaErrorInvalidDevice && cudaGetLastError() == cudaSuccess);
  EXPECT(strcmp(cudaGetErrorName(cudaErrorInvalidValue), "cudaErrorInvalidValue") == 0);
  EXPECT(strcmp(cudaGetErrorString(cudaErrorMemoryAllocation), "out of memory") == 0);
  return 0;
}

}  // extern "C"
#pragma GCC visibility pop
