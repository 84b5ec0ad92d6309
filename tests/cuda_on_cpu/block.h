// The threads of a block: who runs, who waits at which barrier or warp operation, and who waits in vain.
//
// A thread runs until it has to wait for others; the last to arrive lets them go on and goes on itself. So a warp
// operation costs one switch per lane. A wait that cannot end is found when it comes about: a lane is asked for that
// has finished, or that waits for somebody who waits for it. Only a longer circle is found when nobody can go on.
#pragma once

#include <cstdint>
#include <cstring>
#include <exception>
#include <string>
#include <utility>

#include "block_state.h"
#include "failures.h"
#include "fibers.h"
#include "language.h"

namespace cuda_on_cpu {

// ---------------------------------------------------------------------------------------------------------------------
// Scheduling.

inline void make_ready(int thread) { block.ready[block.ready_count++] = static_cast<int16_t>(thread); }

// Of all that could go on, the one that became ready last; or any, if there is a seed.
inline int take_ready() {
  if (block.seed != 0) {
    block.random ^= block.random << 13;
    block.random ^= block.random >> 7;
    block.random ^= block.random << 17;
    const int any = static_cast<int>((block.random >> 33) % static_cast<uint64_t>(block.ready_count));
    std::swap(block.ready[any], block.ready[block.ready_count - 1]);
  }
  return block.ready[--block.ready_count];
}

void run_threads();

CUDA_ON_CPU_VARIABLE FiberPool fibers{run_threads};

inline void set_running(int thread) {
  block.running = thread;
  threadIdx = block.threads[thread].index;
}

// Leaves the fiber that runs for the one that `block.running` is on.
inline void switch_to_running() {
  Fiber* from = block.fiber;
  Thread& thread = block.threads[block.running];
  if (thread.fiber == nullptr) thread.fiber = fibers.take();
  block.fiber = thread.fiber;
  switch_context(from->context, thread.fiber->context);
}

// Until somebody has made the thread ready again.
inline void wait() {
  if (block.ready_count == 0) fail_of_deadlock();
  set_running(take_ready());
  switch_to_running();
}

inline void finish() {
  const int me = block.running;
  Warp& warp = warp_of(me);
  if (block.barrier_count > 0) fail_of_finished(me, any_at_barrier());
  for (int k = 0; k < warp.group_count; ++k) {
    if (warp.groups[k].mask & bit_of(me)) fail_of_finished(me, member_of(me, warp.groups[k]));
  }
  warp.finished |= bit_of(me);
  ++block.finished_count;
}

// What every fiber runs: threads from their beginning, one after another, as long as there are any that have not begun.
// A kernel whose threads never wait for each other thus runs without a switch.
inline void run_threads() {
  for (;;) {
    Fiber* const mine = block.fiber;
    block.threads[block.running].fiber = mine;
    try {
      block.body(block.parameters);
    } catch (...) {
      block.exception = std::current_exception();
    }
    if (block.exception) switch_context(mine->context, block.launcher);
    finish();
    if (block.finished_count == block.thread_count) {
      fibers.give(mine);
      switch_context(mine->context, block.launcher);
      continue;
    }
    if (block.ready_count == 0) fail_of_deadlock();
    set_running(take_ready());
    if (block.threads[block.running].fiber == nullptr) continue;
    fibers.give(mine);
    switch_to_running();
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Waiting for others.

inline bool is_same(const Site& a, const Site& b) {
  return a.line == b.line && (a.file == b.file || strcmp(a.file, b.file) == 0);
}

inline void synchronize_block(Site site) {
  if (block.running < 0) fail("__syncthreads is called outside a kernel");
  const int me = block.running;
  Warp& warp = warp_of(me);
  block.threads[me].site = site;
  if (block.finished_count > 0) fail_at_barrier(me, any_finished());
  for (int k = 0; k < warp.group_count; ++k) {
    if (warp.groups[k].mask & bit_of(me)) fail_at_barrier(me, member_of(me, warp.groups[k]));
  }
  if (block.barrier_count > 0 && !is_same(block.barrier_site, site)) fail_at_barrier(me, any_at_barrier());

  if (++block.barrier_count < block.thread_count) {
    block.barrier_site = site;
    warp.at_barrier |= bit_of(me);
    wait();
    return;
  }
  block.barrier_count = 0;
  for (Warp& each : block.warps) each.at_barrier = 0;
  for (int thread = block.thread_count - 1; thread >= 0; --thread) {
    if (thread != me) make_ready(thread);
  }
}

inline Group& join_group(int me, const Operation& operation, uint32_t mask) {
  Warp& warp = warp_of(me);
  if (!(mask & bit_of(me))) fail_of_mask(me, operation, mask, -1);
  const uint32_t absent = mask & (~warp.existing | warp.finished | warp.at_barrier);
  if (absent) fail_of_mask(me, operation, mask, __builtin_ctz(absent));
  Group* found = nullptr;
  for (int k = 0; k < warp.group_count; ++k) {
    Group& group = warp.groups[k];
    if (group.mask == mask && group.operation == &operation) {
      found = &group;
    } else if ((group.mask & bit_of(me)) && (group.arrived & mask)) {
      fail_of_meeting(me, operation, mask, group);
    }
  }
  if (found != nullptr) return *found;
  warp.groups[warp.group_count] = {&operation, mask, 0};
  return warp.groups[warp.group_count++];
}

// One lane's part in a warp operation: gives a value, and has its result once all lanes of the mask are there.
inline uint64_t exchange(const Operation& operation, uint32_t mask, uint64_t value, int source, Site site) {
  if (block.running < 0) fail(std::string(operation.name) + " is called outside a kernel");
  const int me = block.running;
  const int lane = me % kLanes;
  Warp& warp = warp_of(me);
  block.threads[me].site = site;
  Group& group = join_group(me, operation, mask);
  if (!(mask >> source & 1)) fail_of_source(me, operation, mask, source);
  warp.values[lane] = value;
  warp.sources[lane] = source;
  group.arrived |= bit_of(me);
  if (group.arrived != mask) {
    wait();
    return warp.results[lane];
  }
  group = warp.groups[--warp.group_count];
  operation.resolve(warp, mask);
  for (int other = kLanes - 1; other >= 0; --other) {
    if (other != lane && (mask >> other & 1)) make_ready(me - lane + other);
  }
  return warp.results[lane];
}

}  // namespace cuda_on_cpu
