// Streams and events as queues that run late, and memory that is told apart, where a test asks for it.
//
// By default everything happens at once, in order, in memory of one kind. After `late(seed)`, what is put into a stream
// waits there until somebody waits for it, or a throw of dice runs it; of several streams that could go on, dice choose
// one. The same seed gives the same order. So work that nothing orders runs in an order that a device might have
// chosen, and a wait that is missing shows as other bits.
//
// A copy has a beginning and an end, between which other streams run, and its target holds 0xff. What is known to be
// wrong throws a sentence: copies whose memory overlaps, a kernel with an argument that points into memory that a copy
// is at, a kernel or an asynchronous copy with pageable memory of the host, and all that can never run.
#pragma once

#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "language.h"

struct CUevent_st {
  std::chrono::steady_clock::time_point time;
  uint64_t recorded = 0;  // how often it was put into a stream
  uint64_t reached = 0;   // the last of these that has run
};

namespace cuda_on_cpu {

enum class Memory { kDevice, kPinned, kPageable };

struct Region {
  size_t bytes;
  Memory memory;
};

struct Copy {
  const char *to, *from;
  size_t bytes;
};

}  // namespace cuda_on_cpu

struct CUstream_st {
  struct Entry {
    std::function<void()> run;
    CUevent_st* awaited;  // or run nothing, but wait for it
    uint64_t count;
  };
  std::deque<Entry> entries;
};

namespace cuda_on_cpu {

struct Queues {
  bool is_late = false;
  uint64_t random = 1;
  CUstream_st default_stream;
  std::vector<CUstream_st*> streams{&default_stream};
  std::vector<Copy> copies;                  // that have begun and not ended
  std::map<const char*, Region> regions;     // memory that was asked for, by where it begins
  size_t capacity = SIZE_MAX, used = 0;      // bytes of the device
  uint64_t allocations = 0;                  // of memory of any kind, since it began
  uint64_t bytes_in = 0, bytes_out = 0;      // copied to the device and from it
  std::map<const void*, uint64_t> launches;  // how many of each kernel
};
CUDA_ON_CPU_VARIABLE Queues queues;

inline uint64_t dice() {
  uint64_t& x = queues.random;
  x ^= x << 13;
  x ^= x >> 7;
  x ^= x << 17;
  return x >> 11;
}

// ---- memory --------------------------------------------------------------------------------------------------------

// The region that an address is in; null if nobody asked for it here.
inline const Region* region_of(const void* address) {
  auto found = queues.regions.upper_bound(static_cast<const char*>(address));
  if (found == queues.regions.begin()) return nullptr;
  --found;
  return static_cast<const char*>(address) < found->first + found->second.bytes ? &found->second : nullptr;
}

inline Memory memory_of(const void* address) {
  const Region* region = region_of(address);
  return region == nullptr ? Memory::kDevice : region->memory;
}

// As aligned as the device's, and filled with what makes a NaN of every number: nobody may rely on zeros.
inline void* take_memory(size_t bytes, Memory memory) {
  constexpr size_t kAlignment = 256;
  const size_t rounded = (bytes + kAlignment - 1) / kAlignment * kAlignment;
  if (rounded < bytes) return nullptr;
  if (memory == Memory::kDevice && rounded > queues.capacity - queues.used) return nullptr;
  void* taken = std::aligned_alloc(kAlignment, rounded);
  if (taken == nullptr) return nullptr;
  if (memory == Memory::kDevice) queues.used += rounded;
  queues.regions[static_cast<char*>(taken)] = {rounded, memory};
  ++queues.allocations;
  return std::memset(taken, 0xff, rounded);
}

inline void give_memory(void* taken) {
  const auto found = queues.regions.find(static_cast<char*>(taken));
  if (found == queues.regions.end()) throw std::runtime_error("What is freed was never allocated here.");
  if (found->second.memory == Memory::kDevice) queues.used -= found->second.bytes;
  queues.regions.erase(found);
  std::free(taken);
}

// Memory that somebody else has made, such as a mapped file's, and the end of it.
inline void declare_memory(const void* address, size_t bytes, Memory memory) {
  queues.regions[static_cast<const char*>(address)] = {bytes, memory};
}
inline void forget_memory(const void* address) { queues.regions.erase(static_cast<const char*>(address)); }

// ---- queues --------------------------------------------------------------------------------------------------------

// Runs the first entry of one of the streams that can go on. False if there is none.
inline bool advance() {
  std::vector<CUstream_st*> able;
  for (CUstream_st* stream : queues.streams) {
    if (stream->entries.empty()) continue;
    const CUstream_st::Entry& first = stream->entries.front();
    if (first.awaited == nullptr || first.awaited->reached >= first.count) able.push_back(stream);
  }
  if (able.empty()) return false;
  CUstream_st* chosen = able[dice() % able.size()];
  const CUstream_st::Entry entry = std::move(chosen->entries.front());
  chosen->entries.pop_front();
  if (entry.awaited == nullptr) entry.run();
  return true;
}

template <class Done>
void advance_until(Done done) {
  while (!done()) {
    if (!advance()) throw std::runtime_error("Streams wait for each other, or for an event that nobody records.");
  }
}

inline CUstream_st* stream_of(CUstream_st* stream) { return stream == nullptr ? &queues.default_stream : stream; }

inline void put(CUstream_st* stream, CUstream_st::Entry entry) {
  if (!queues.is_late) {
    if (entry.awaited == nullptr) entry.run();
    return;
  }
  stream_of(stream)->entries.push_back(std::move(entry));
  while (dice() % 3 == 0 && advance()) {
  }
}
inline void put(CUstream_st* stream, std::function<void()> run) { put(stream, {std::move(run), nullptr, 0}); }

inline void finish(CUstream_st* stream) {
  advance_until([stream] { return stream_of(stream)->entries.empty(); });
}
inline void finish_all() {
  for (CUstream_st* stream : queues.streams) finish(stream);
}

// Begins to be late, with a seed, or ends with 0. What waits is run first.
inline void late(uint64_t seed) {
  finish_all();
  queues.is_late = seed != 0;
  queues.random = (seed + 1) * 0x9e3779b97f4a7c15;
}

// Forgets everything that waits: after an exception.
inline void drop_all() {
  for (CUstream_st* stream : queues.streams) stream->entries.clear();
  queues.copies.clear();
}

// ---- copies and kernels --------------------------------------------------------------------------------------------

inline bool overlap(const char* a, size_t a_bytes, const char* b, size_t b_bytes) {
  return a < b + b_bytes && b < a + a_bytes;
}

inline void check_copy(const Copy& copy) {
  for (const Copy& other : queues.copies) {
    if (overlap(copy.to, copy.bytes, other.to, other.bytes)) {
      throw std::runtime_error("A copy writes memory that another copy is writing.");
    }
    if (overlap(copy.to, copy.bytes, other.from, other.bytes)) {
      throw std::runtime_error("A copy writes memory that another copy is reading.");
    }
    if (overlap(copy.from, copy.bytes, other.to, other.bytes)) {
      throw std::runtime_error("A copy reads memory that another copy is writing.");
    }
  }
}

inline void copy_memory(void* to, const void* from, size_t bytes, CUstream_st* stream) {
  if (bytes == 0) return;
  const Memory target = memory_of(to), source = memory_of(from);
  if (target == Memory::kPageable || source == Memory::kPageable) {
    throw std::runtime_error("An asynchronous copy has pageable memory of the host, for which it would wait.");
  }
  if (source != Memory::kDevice && target == Memory::kDevice) queues.bytes_in += bytes;
  if (source == Memory::kDevice && target != Memory::kDevice) queues.bytes_out += bytes;
  const Copy copy{static_cast<const char*>(to), static_cast<const char*>(from), bytes};
  if (!queues.is_late) {
    std::memmove(to, from, bytes);
    return;
  }
  put(stream, [copy, to] {
    check_copy(copy);
    queues.copies.push_back(copy);
    std::memset(to, 0xff, copy.bytes);
  });
  put(stream, [copy, to] {
    for (size_t k = 0; k < queues.copies.size(); ++k) {
      if (queues.copies[k].to == copy.to) {
        queues.copies.erase(queues.copies.begin() + static_cast<long>(k));
        break;
      }
    }
    std::memmove(to, copy.from, copy.bytes);
  });
}

// Looks at a kernel's parameters for addresses that it must not use. A number that happens to look like one is as
// unlikely as that of a page in 2^47 bytes.
inline void check_parameters(const void* parameters, size_t bytes) {
  const char* memory = static_cast<const char*>(parameters);
  for (size_t at = 0; at + sizeof(char*) <= bytes; at += sizeof(char*)) {
    const char* address;
    std::memcpy(&address, memory + at, sizeof address);
    const Region* region = region_of(address);
    if (region != nullptr && region->memory != Memory::kDevice) {
      throw std::runtime_error(region->memory == Memory::kPinned
                                   ? "A kernel has an argument that points into pinned memory of the host."
                                   : "A kernel has an argument that points into pageable memory of the host.");
    }
    for (const Copy& copy : queues.copies) {
      if (overlap(address, 1, copy.to, copy.bytes)) {
        throw std::runtime_error("A kernel has an argument that points into memory that a copy is writing.");
      }
      if (overlap(address, 1, copy.from, copy.bytes)) {
        throw std::runtime_error("A kernel has an argument that points into memory that a copy is reading.");
      }
    }
  }
}

}  // namespace cuda_on_cpu
