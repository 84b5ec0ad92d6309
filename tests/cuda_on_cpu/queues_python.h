// What tests ask of the emulated runtime itself: streams, events, copies and memory, as addresses.
#pragma once

#include <pybind11/pybind11.h>

#include "cuda_runtime.h"

namespace cuda_on_cpu {

inline void checked(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

inline void bind_queues(pybind11::module_& parent) {
  using Address = uintptr_t;
  pybind11::module_ module = parent.def_submodule("runtime", "The emulated runtime.");
  const auto stream_at = [](Address address) { return reinterpret_cast<cudaStream_t>(address); };
  const auto event_at = [](Address address) { return reinterpret_cast<cudaEvent_t>(address); };
  module.def("late", &late);
  module.def("drop_all", &drop_all);
  module.def("synchronize", &finish_all);
  module.def("create_stream", [] {
    cudaStream_t stream;
    checked(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    return reinterpret_cast<Address>(stream);
  });
  module.def("create_event", [] {
    cudaEvent_t event;
    checked(cudaEventCreate(&event));
    return reinterpret_cast<Address>(event);
  });
  module.def("record",
             [=](Address event, Address stream) { checked(cudaEventRecord(event_at(event), stream_at(stream))); });
  module.def("wait",
             [=](Address stream, Address event) { checked(cudaStreamWaitEvent(stream_at(stream), event_at(event))); });
  module.def("synchronize_stream", [=](Address stream) { checked(cudaStreamSynchronize(stream_at(stream))); });
  module.def("synchronize_event", [=](Address event) { checked(cudaEventSynchronize(event_at(event))); });
  module.def("is_done", [=](Address event) { return cudaEventQuery(event_at(event)) == cudaSuccess; });
  module.def("copy", [=](Address to, Address from, size_t bytes, Address stream) {
    checked(cudaMemcpyAsync(reinterpret_cast<void*>(to), reinterpret_cast<void*>(from), bytes, cudaMemcpyDefault,
                            stream_at(stream)));
  });
  const auto kind_of = [](const std::string& kind) {
    return kind == "device" ? Memory::kDevice : kind == "pinned" ? Memory::kPinned : Memory::kPageable;
  };
  module.def("take", [=](size_t bytes, const std::string& kind) {
    return reinterpret_cast<Address>(take_memory(bytes, kind_of(kind)));
  });
  module.def("declare", [=](Address address, size_t bytes, const std::string& kind) {
    declare_memory(reinterpret_cast<const void*>(address), bytes, kind_of(kind));
  });
  module.def("forget", [](Address address) { forget_memory(reinterpret_cast<const void*>(address)); });
  module.def("give", [](Address address) { give_memory(reinterpret_cast<void*>(address)); });
  module.def("memory_of", [](Address address) {
    const Region* region = region_of(reinterpret_cast<void*>(address));
    if (region == nullptr) return "";
    return region->memory == Memory::kDevice ? "device" : region->memory == Memory::kPinned ? "pinned" : "pageable";
  });
  module.def("set_capacity", [](size_t bytes) { queues.capacity = bytes; });
  module.def("memory", [] { return std::make_pair(queues.capacity - queues.used, queues.capacity); });
  module.def("counts", [] {
    pybind11::dict counts;
    counts["allocations"] = queues.allocations;
    counts["bytes_in"] = queues.bytes_in;
    counts["bytes_out"] = queues.bytes_out;
    return counts;
  });
  module.def("launches", [] {
    pybind11::dict launches;
    for (const auto& [kernel, count] : queues.launches) {
      launches[pybind11::int_(reinterpret_cast<Address>(kernel))] = count;
    }
    return launches;
  });
}

}  // namespace cuda_on_cpu
