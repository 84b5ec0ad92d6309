// The sentences with which a launch ends that cannot go on.
#pragma once

#include <cstdio>
#include <stdexcept>
#include <string>
#include <utility>

#include "block_state.h"

namespace cuda_on_cpu {

// Ends the launch with this sentence. The stacks of the block's threads are abandoned as they are, without running
// destructors: kernels own nothing, and unwinding would have to pass through functions that are noexcept.
[[noreturn]] inline void fail(std::string sentence) {
  if (block.running < 0) throw std::runtime_error(sentence + ".");
  block.failure = std::move(sentence);
  switch_context(block.fiber->context, block.launcher);
  __builtin_unreachable();
}

inline std::string text_of(const uint3& index) {
  char text[48];
  snprintf(text, sizeof text, "(%u,%u,%u)", index.x, index.y, index.z);
  return text;
}

inline std::string text_of(const Site& site) { return std::string(site.file) + ":" + std::to_string(site.line); }

inline std::string name_of(int thread) {
  return "thread " + text_of(block.threads[thread].index) + " (warp " + std::to_string(thread / kLanes) + ", lane " +
         std::to_string(thread % kLanes) + ")";
}

inline std::string with_mask(const Operation& operation, uint32_t mask) {
  char text[32];
  snprintf(text, sizeof text, " with mask 0x%08x", mask);
  return operation.name + std::string(text);
}

inline std::string call_of(int thread, const Operation& operation, uint32_t mask) {
  return name_of(thread) + " calls " + with_mask(operation, mask) + " at " + text_of(block.threads[thread].site);
}

// What a thread that does not run is doing.
inline std::string state_of(int thread) {
  const Warp& warp = warp_of(thread);
  const uint32_t bit = bit_of(thread);
  const std::string at = " at " + text_of(block.threads[thread].site);
  if (warp.finished & bit) return name_of(thread) + " has finished";
  if (warp.at_barrier & bit) return name_of(thread) + " waits in __syncthreads" + at;
  for (int k = 0; k < warp.group_count; ++k) {
    const Group& group = warp.groups[k];
    if (group.arrived & bit) return name_of(thread) + " waits in " + with_mask(*group.operation, group.mask) + at;
  }
  return name_of(thread) + " has not come as far";
}

// Someone to name as an example.
inline int any_with(uint32_t Warp::* lanes) {
  for (int warp = 0; warp < kMaxWarps; ++warp) {
    if (block.warps[warp].*lanes) return warp * kLanes + __builtin_ctz(block.warps[warp].*lanes);
  }
  return 0;
}
inline int any_finished() { return any_with(&Warp::finished); }
inline int any_at_barrier() { return any_with(&Warp::at_barrier); }
inline int member_of(int me, const Group& group) { return me / kLanes * kLanes + __builtin_ctz(group.arrived); }

[[noreturn]] inline void fail_of_finished(int me, int waiting) {
  fail(name_of(me) + " finishes, but " + state_of(waiting) + " for it");
}

[[noreturn]] inline void fail_at_barrier(int me, int other) {
  fail(name_of(me) + " calls __syncthreads at " + text_of(block.threads[me].site) + ", but " + state_of(other));
}

// `lane` is one that cannot come, or -1 if the caller itself is not in its mask.
[[noreturn]] inline void fail_of_mask(int me, const Operation& operation, uint32_t mask, int lane) {
  const std::string call = call_of(me, operation, mask);
  if (lane < 0) fail(call + ", which does not contain its own lane");
  const std::string names = call + ", which names lane " + std::to_string(lane) + ", but ";
  const int other = me / kLanes * kLanes + lane;
  fail(names + (other < block.thread_count ? state_of(other) : "the block ends before it"));
}

[[noreturn]] inline void fail_of_meeting(int me, const Operation& operation, uint32_t mask, const Group& other) {
  const int waiting = me / kLanes * kLanes + __builtin_ctz(other.arrived & mask);
  fail(call_of(me, operation, mask) + ", but " + state_of(waiting) + " for it");
}

[[noreturn]] inline void fail_of_source(int me, const Operation& operation, uint32_t mask, int source) {
  fail(call_of(me, operation, mask) + " and reads lane " + std::to_string(source) +
       ", which the mask does not contain");
}

[[noreturn]] inline void fail_of_deadlock() {
  std::string sentence = "all threads wait for each other: ";
  int told = 0;
  for (int thread = 0; thread < block.thread_count && told < 4; ++thread) {
    if (warp_of(thread).finished & bit_of(thread)) continue;
    sentence += (told++ > 0 ? "; " : "") + state_of(thread);
  }
  fail(sentence);
}

}  // namespace cuda_on_cpu
