// Filling the shared memory of all kernels with bytes that make a NaN of every number, so that whoever reads before
// anybody has written does not get by on zeros.
//
// What is filled are all thread_local variables, without initial value, of the library or program that the kernels are
// in, so their bytes are kept for as long as a launch lasts: kernels have no business with those of the host. Build
// with -fvisibility=hidden if `__shared__` is in functions outside anonymous namespaces: otherwise the dynamic linker
// lets two libraries that have the same function share its variables.
#pragma once

#include <link.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "language.h"

namespace cuda_on_cpu {

// One that is certainly among them, and tells where they are for the thread that asks.
CUDA_ON_CPU_VARIABLE thread_local char anchor __attribute__((used));

// Where they begin, as seen from the anchor, and how many bytes they take; the same for all threads.
struct SharedMemory {
  std::ptrdiff_t offset = 0;
  std::size_t bytes = 0;

  static SharedMemory find() {
    SharedMemory found;
    anchor = 1;  // has the memory allocated for this thread
    dl_iterate_phdr(look_at, &found);
    return found;
  }

 private:
  static int look_at(dl_phdr_info* info, std::size_t, void* data) {
    const auto begin = reinterpret_cast<std::uintptr_t>(info->dlpi_tls_data);
    const auto here = reinterpret_cast<std::uintptr_t>(&anchor);
    for (int k = 0; begin != 0 && k < info->dlpi_phnum; ++k) {
      const auto& segment = info->dlpi_phdr[k];
      if (segment.p_type != PT_TLS || here < begin || here >= begin + segment.p_memsz) continue;
      auto& found = *static_cast<SharedMemory*>(data);
      found.offset = static_cast<std::ptrdiff_t>(begin + segment.p_filesz) - static_cast<std::ptrdiff_t>(here);
      found.bytes = segment.p_memsz - segment.p_filesz;
      return 1;
    }
    return 0;
  }
};

CUDA_ON_CPU_VARIABLE SharedMemory shared_memory;

class SharedMemoryOfLaunch {
 public:
  SharedMemoryOfLaunch() {
    if (shared_memory.bytes == 0) shared_memory = SharedMemory::find();
    saved_.assign(begin(), begin() + shared_memory.bytes);
  }
  SharedMemoryOfLaunch(const SharedMemoryOfLaunch&) = delete;
  ~SharedMemoryOfLaunch() { std::copy(saved_.begin(), saved_.end(), begin()); }

  static void poison() { memset(begin(), 0xff, shared_memory.bytes); }

 private:
  static char* begin() { return &anchor + shared_memory.offset; }

  std::vector<char> saved_;
};

}  // namespace cuda_on_cpu
