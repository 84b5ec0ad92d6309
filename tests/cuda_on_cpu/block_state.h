// What is known of the block that runs: its threads, its warps, and who waits for whom.
#pragma once

#include <cstdint>
#include <exception>
#include <string>

#include "fibers.h"
#include "language.h"

namespace cuda_on_cpu {

constexpr int kMaxThreads = 1024;
constexpr int kLanes = 32;
constexpr int kMaxWarps = kMaxThreads / kLanes;

// Where in the source an operation is called.
struct Site {
  const char* file = "";
  int line = 0;
};

struct Warp;

// A warp operation. When all lanes of `mask` have arrived, `resolve` makes `results` of `values` for each of them.
// Operations are told apart by their address.
struct Operation {
  const char* name;
  void (*resolve)(Warp& warp, uint32_t mask);
};

// Lanes that wait for each other, and how many of them are there.
struct Group {
  const Operation* operation;
  uint32_t mask, arrived;
};

struct Warp {
  uint32_t existing = 0, finished = 0, at_barrier = 0;
  int group_count = 0;
  Group groups[kLanes];
  uint64_t values[kLanes], results[kLanes];
  int sources[kLanes];  // shuffles: which lane to read
};

struct Thread {
  Fiber* fiber = nullptr;  // none before it starts
  uint3 index;
  Site site;  // of the last barrier or warp operation
};

struct Block {
  int thread_count = 0, finished_count = 0;
  int barrier_count = 0;
  Site barrier_site;
  Thread threads[kMaxThreads];
  Warp warps[kMaxWarps];

  int ready_count = 0;
  int16_t ready[kMaxThreads];  // a stack, so that a warp goes on while its lanes' stacks are in cache
  uint64_t seed = 0, random = 0;

  void (*body)(const void*) = nullptr;  // the kernel and its parameters
  const void* parameters = nullptr;

  int running = -1;  // a thread, or -1 outside kernels
  Fiber* fiber = nullptr;
  Context launcher;
  std::string failure;
  std::exception_ptr exception;
};

CUDA_ON_CPU_VARIABLE Block block;

inline Warp& warp_of(int thread) { return block.warps[thread / kLanes]; }
inline uint32_t bit_of(int thread) { return uint32_t{1} << (thread % kLanes); }

}  // namespace cuda_on_cpu
