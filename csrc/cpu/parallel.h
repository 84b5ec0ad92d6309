// Threads over work items, each in IEEE mode.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace fusedopt::cpu {

// Rounding to nearest, subnormals kept, for as long as it lives. torch.set_flush_denormal reaches some
// threads only; without this the bits would depend on which thread took a chunk.
class IeeeMode {
 public:
  IeeeMode(const IeeeMode&) = delete;
  IeeeMode& operator=(const IeeeMode&) = delete;
#if defined(__x86_64__)
  IeeeMode() : saved_(_mm_getcsr()) { _mm_setcsr(kDefaultMxcsr); }
  ~IeeeMode() { _mm_setcsr(saved_); }

 private:
  static constexpr unsigned kDefaultMxcsr = 0x1F80;  // exceptions masked, no FTZ, no DAZ
  unsigned saved_;
#elif defined(__aarch64__)
  IeeeMode() {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    asm volatile("msr fpcr, %0" : : "r"(uint64_t{0}));
  }
  ~IeeeMode() { asm volatile("msr fpcr, %0" : : "r"(saved_)); }

 private:
  uint64_t saved_;
#else
  IeeeMode() = default;
#endif
};

// Calls body(item) for every item, from at most `threads` threads; who takes which is left open.
template <class Body>
void parallel_items(int64_t items, int threads, const Body& body) {
  std::atomic<int64_t> next{0};
  [[maybe_unused]] const int team = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, items)));
#if defined(_OPENMP)
#pragma omp parallel num_threads(team) if (team > 1)
#endif
  {
    const IeeeMode ieee;
    for (int64_t item; (item = next.fetch_add(1, std::memory_order_relaxed)) < items;) body(item);
  }
}

}  // namespace fusedopt::cpu
