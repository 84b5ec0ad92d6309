// As much of the runtime's interface as launching and copying need. Memory is the host's; everything happens at once,
// in order, unless a test wants it late (queues.h).
#pragma once

#include <chrono>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <tuple>
#include <utility>

#include "language.h"
#include "launch.h"
#include "queues.h"

#define CUDART_VERSION 13000

#define CUDA_ON_CPU_ERRORS(X)                                                      \
  X(cudaSuccess, 0, "no error")                                                    \
  X(cudaErrorInvalidValue, 1, "invalid argument")                                  \
  X(cudaErrorMemoryAllocation, 2, "out of memory")                                 \
  X(cudaErrorInvalidConfiguration, 9, "invalid configuration argument")            \
  X(cudaErrorInvalidDevicePointer, 17, "invalid device pointer")                   \
  X(cudaErrorInvalidDeviceFunction, 98, "invalid device function")                 \
  X(cudaErrorNoDevice, 100, "no CUDA-capable device is detected")                  \
  X(cudaErrorInvalidDevice, 101, "invalid device ordinal")                         \
  X(cudaErrorInvalidResourceHandle, 400, "invalid resource handle")                \
  X(cudaErrorNotReady, 600, "device not ready")                                    \
  X(cudaErrorIllegalAddress, 700, "an illegal memory access was encountered")      \
  X(cudaErrorLaunchOutOfResources, 701, "too many resources requested for launch") \
  X(cudaErrorLaunchFailure, 719, "unspecified launch failure")                     \
  X(cudaErrorNotSupported, 801, "operation not supported")                         \
  X(cudaErrorUnknown, 999, "unknown error")

enum cudaError {
#define CUDA_ON_CPU_ERROR(name, value, text) name = value,
  CUDA_ON_CPU_ERRORS(CUDA_ON_CPU_ERROR)
#undef CUDA_ON_CPU_ERROR
};
using cudaError_t = cudaError;

namespace cuda_on_cpu {

CUDA_ON_CPU_VARIABLE cudaError_t last_error = cudaSuccess;

inline cudaError_t remember(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

constexpr int kMultiprocessors = 4;
constexpr int kBlocksPerMultiprocessor = 2;
constexpr size_t kSharedBytes = 48 << 10;
constexpr size_t kParameterBytes = 32764;

}  // namespace cuda_on_cpu

inline const char* cudaGetErrorName(cudaError_t error) {
#define CUDA_ON_CPU_ERROR(name, value, text) \
  if (error == name) return #name;
  CUDA_ON_CPU_ERRORS(CUDA_ON_CPU_ERROR)
#undef CUDA_ON_CPU_ERROR
  return "unrecognized error code";
}

inline const char* cudaGetErrorString(cudaError_t error) {
#define CUDA_ON_CPU_ERROR(name, value, text) \
  if (error == name) return text;
  CUDA_ON_CPU_ERRORS(CUDA_ON_CPU_ERROR)
#undef CUDA_ON_CPU_ERROR
  return "unrecognized error code";
}

inline cudaError_t cudaPeekAtLastError() { return cuda_on_cpu::last_error; }
inline cudaError_t cudaGetLastError() { return std::exchange(cuda_on_cpu::last_error, cudaSuccess); }

// ---------------------------------------------------------------------------------------------------------------------
// The device.

enum cudaDeviceAttr {
  cudaDevAttrMaxThreadsPerBlock = 1,
  cudaDevAttrMaxSharedMemoryPerBlock = 8,
  cudaDevAttrWarpSize = 10,
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrMaxThreadsPerMultiProcessor = 39,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97
};

inline cudaError_t cudaDriverGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int device) {
  return cuda_on_cpu::remember(device == 0 ? cudaSuccess : cudaErrorInvalidDevice);
}
inline cudaError_t cudaDeviceSynchronize() { return cuda_on_cpu::finish_all(), cudaSuccess; }

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device != 0) return cuda_on_cpu::remember(cudaErrorInvalidDevice);
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock:
      return *value = cuda_on_cpu::kMaxThreads, cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlock:
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      return *value = cuda_on_cpu::kSharedBytes, cudaSuccess;
    case cudaDevAttrWarpSize:
      return *value = warpSize, cudaSuccess;
    case cudaDevAttrMultiProcessorCount:
      return *value = cuda_on_cpu::kMultiprocessors, cudaSuccess;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      return *value = 2 * cuda_on_cpu::kMaxThreads, cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      return *value = 9, cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      return *value = 0, cudaSuccess;
  }
  return cuda_on_cpu::remember(cudaErrorInvalidValue);
}

// ---------------------------------------------------------------------------------------------------------------------
// Streams and events.

using cudaStream_t = struct CUstream_st*;
using cudaEvent_t = CUevent_st*;

enum cudaStreamCaptureStatus {
  cudaStreamCaptureStatusNone = 0,
  cudaStreamCaptureStatusActive = 1,
  cudaStreamCaptureStatusInvalidated = 2
};
constexpr unsigned cudaStreamDefault = 0, cudaStreamNonBlocking = 1;
constexpr unsigned cudaEventDefault = 0, cudaEventBlockingSync = 1, cudaEventDisableTiming = 2;

inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  cuda_on_cpu::queues.streams.push_back(*stream = new CUstream_st());
  return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t stream) { return cuda_on_cpu::finish(stream), cudaSuccess; }
inline cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned = 0) {
  cuda_on_cpu::put(stream, {nullptr, event, event->recorded});
  return cudaSuccess;
}
inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  return *status = cudaStreamCaptureStatusNone, cudaSuccess;
}

inline cudaError_t cudaEventCreate(cudaEvent_t* event) { return *event = new CUevent_st(), cudaSuccess; }
inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) { return cudaEventCreate(event); }
inline cudaError_t cudaEventDestroy(cudaEvent_t event) { return delete event, cudaSuccess; }
inline cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream = nullptr) {
  const uint64_t count = ++event->recorded;
  cuda_on_cpu::put(stream, [event, count] {
    event->reached = count;
    event->time = std::chrono::steady_clock::now();
  });
  return cudaSuccess;
}
inline cudaError_t cudaEventQuery(cudaEvent_t event) {
  return event->reached >= event->recorded ? cudaSuccess : cudaErrorNotReady;
}
inline cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  cuda_on_cpu::advance_until([event, count = event->recorded] { return event->reached >= count; });
  return cudaSuccess;
}
inline cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t from, cudaEvent_t to) {
  *milliseconds = std::chrono::duration<float, std::milli>(to->time - from->time).count();
  return cudaSuccess;
}

// ---------------------------------------------------------------------------------------------------------------------
// Memory.

enum cudaMemcpyKind {
  cudaMemcpyHostToHost = 0,
  cudaMemcpyHostToDevice = 1,
  cudaMemcpyDeviceToHost = 2,
  cudaMemcpyDeviceToDevice = 3,
  cudaMemcpyDefault = 4
};

namespace cuda_on_cpu {

template <class T>
cudaError_t malloc_of(T** pointer, size_t bytes, Memory memory) {
  *pointer = nullptr;
  if (bytes == 0) return cudaSuccess;
  *pointer = static_cast<T*>(take_memory(bytes, memory));
  return *pointer == nullptr ? remember(cudaErrorMemoryAllocation) : cudaSuccess;
}

}  // namespace cuda_on_cpu

template <class T>
cudaError_t cudaMalloc(T** pointer, size_t bytes) {
  return cuda_on_cpu::malloc_of(pointer, bytes, cuda_on_cpu::Memory::kDevice);
}
template <class T>
cudaError_t cudaMallocAsync(T** pointer, size_t bytes, cudaStream_t) {
  return cudaMalloc(pointer, bytes);
}
template <class T>
cudaError_t cudaMallocHost(T** pointer, size_t bytes, unsigned = 0) {
  return cuda_on_cpu::malloc_of(pointer, bytes, cuda_on_cpu::Memory::kPinned);
}
inline cudaError_t cudaMemGetInfo(size_t* left, size_t* total) {
  *total = cuda_on_cpu::queues.capacity;
  *left = *total - cuda_on_cpu::queues.used;
  return cudaSuccess;
}
inline cudaError_t cudaFree(void* pointer) {  // which waits for the device
  cuda_on_cpu::finish_all();
  if (pointer != nullptr) cuda_on_cpu::give_memory(pointer);
  return cudaSuccess;
}
inline cudaError_t cudaFreeAsync(void* pointer, cudaStream_t) { return cudaFree(pointer); }
inline cudaError_t cudaFreeHost(void* pointer) { return cudaFree(pointer); }

inline cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  cuda_on_cpu::finish_all();
  if (bytes > 0) memmove(to, from, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                                   cudaStream_t stream = nullptr) {
  cuda_on_cpu::copy_memory(to, from, bytes, stream);
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream = nullptr) {
  if (bytes > 0) cuda_on_cpu::put(stream, [to, value, bytes] { memset(to, value, bytes); });
  return cudaSuccess;
}
inline cudaError_t cudaMemset(void* to, int value, size_t bytes) { return cudaMemsetAsync(to, value, bytes); }
template <class T>
cudaError_t cudaMemcpyToSymbol(const T& symbol, const void* from, size_t bytes, size_t offset = 0,
                               cudaMemcpyKind kind = cudaMemcpyHostToDevice) {
  if (offset > sizeof(T) || bytes > sizeof(T) - offset) return cuda_on_cpu::remember(cudaErrorInvalidValue);
  return cudaMemcpy(reinterpret_cast<char*>(const_cast<std::remove_const_t<T>*>(&symbol)) + offset, from, bytes, kind);
}

// ---------------------------------------------------------------------------------------------------------------------
// Launching.

enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributePreferredSharedMemoryCarveout = 9
};

template <class T>
cudaError_t cudaFuncSetAttribute(T* /*kernel*/, cudaFuncAttribute, int) {
  return cudaSuccess;
}

template <class T>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, T /*kernel*/, int threads, size_t shared_bytes) {
  if (threads < 1 || threads > cuda_on_cpu::kMaxThreads) return cuda_on_cpu::remember(cudaErrorInvalidValue);
  *blocks = shared_bytes > cuda_on_cpu::kSharedBytes ? 0 : cuda_on_cpu::kBlocksPerMultiprocessor;
  return cudaSuccess;
}

enum cudaLaunchAttributeID {
  cudaLaunchAttributeIgnore = 0,
  cudaLaunchAttributeCooperative = 2,
  cudaLaunchAttributeClusterDimension = 4,
  cudaLaunchAttributeProgrammaticStreamSerialization = 6,
  cudaLaunchAttributePriority = 8
};

union cudaLaunchAttributeValue {
  int cooperative;
  struct {
    unsigned x, y, z;
  } clusterDim;
  int programmaticStreamSerializationAllowed;
  int priority;
};

struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

namespace cuda_on_cpu {

inline cudaError_t check_launch(const cudaLaunchConfig_t& config) {
  const dim3& grid = config.gridDim;
  const dim3& threads = config.blockDim;
  if (grid.x < 1 || grid.x > 0x7fffffff || grid.y < 1 || grid.y > 65535 || grid.z < 1 || grid.z > 65535) {
    return cudaErrorInvalidConfiguration;
  }
  if (threads.x < 1 || threads.x > 1024 || threads.y < 1 || threads.y > 1024 || threads.z < 1 || threads.z > 64) {
    return cudaErrorInvalidConfiguration;
  }
  if (threads.x * threads.y * threads.z > kMaxThreads) return cudaErrorInvalidConfiguration;
  if (config.dynamicSmemBytes > kSharedBytes) return cudaErrorInvalidValue;
  for (unsigned k = 0; k < config.numAttrs; ++k) {
    const cudaLaunchAttribute& attribute = config.attrs[k];
    const auto& cluster = attribute.val.clusterDim;
    if (attribute.id == cudaLaunchAttributeCooperative && attribute.val.cooperative) return cudaErrorNotSupported;
    if (attribute.id == cudaLaunchAttributeClusterDimension && cluster.x * cluster.y * cluster.z != 1) {
      return cudaErrorNotSupported;
    }
  }
  return cudaSuccess;
}

}  // namespace cuda_on_cpu

template <class... Expected, class... Actual>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Expected...), Actual&&... arguments) {
  static_assert(cuda_on_cpu::parameter_bytes<Expected...>() <= cuda_on_cpu::kParameterBytes,
                "a kernel's parameters take 32,764 bytes at most");
  static_assert((!std::is_reference_v<Expected> && ...), "a kernel's parameters are passed by value");
  const cudaError_t error = cuda_on_cpu::check_launch(*config);
  if (error != cudaSuccess) return cuda_on_cpu::remember(error);
  ++cuda_on_cpu::queues.launches[reinterpret_cast<const void*>(kernel)];
  // Padding is zero, since the parameters are searched for addresses. The heap keeps a launch that is late.
  using Parameters = std::tuple<Expected...>;
  const std::shared_ptr<void> memory(std::calloc(1, sizeof(Parameters)), [](void* kept) {
    static_cast<Parameters*>(kept)->~Parameters();
    std::free(kept);
  });
  const auto* parameters = new (memory.get()) Parameters(std::forward<Actual>(arguments)...);
  cuda_on_cpu::put(config->stream, [memory, parameters, kernel, grid = config->gridDim, block = config->blockDim] {
    if (!cuda_on_cpu::queues.regions.empty()) cuda_on_cpu::check_parameters(parameters, sizeof(Parameters));
    cuda_on_cpu::run_kernel(grid, block, kernel, *parameters);
  });
  return cudaSuccess;
}

// A launch begins when the one before has ended, so neither has anything to do.
inline void cudaGridDependencySynchronize() {}
inline void cudaTriggerProgrammaticLaunchCompletion() {}
