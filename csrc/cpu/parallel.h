// Threads over work items, each in IEEE mode.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

#if defined(_OPENMP)
#include <omp.h>
#endif
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

// How many threads this many items keep busy.
inline int team_for(int64_t items, int threads) {
  return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, items)));
}

// Calls body(thread) in each thread of a team.
template <class Body>
void parallel_team([[maybe_unused]] int team, const Body& body) {
#if defined(_OPENMP)
#pragma omp parallel num_threads(team) if (team > 1)
#endif
  {
    const IeeeMode ieee;
#if defined(_OPENMP)
    body(omp_get_thread_num());
#else
    body(0);
#endif
  }
}

// Calls body(item) for every item, from at most `threads` threads; which thread takes which item is left open.
template <class Body>
void parallel_items(int64_t items, int threads, const Body& body) {
  std::atomic<int64_t> next{0};
  parallel_team(team_for(items, threads), [&](int) {
    for (int64_t item; (item = next.fetch_add(1, std::memory_order_relaxed)) < items;) body(item);
  });
}

// Items in as many runs as a team has threads, so that a thread finds in its own cache what it had before.
class Shares {
 public:
  enum class Order { kForwards, kBackwards };

  Shares(int64_t items, int team, Order order = Order::kForwards) : shares_(static_cast<size_t>(team)), order_(order) {
    for (int thread = 0; thread < team; ++thread) {
      shares_[thread].begin = items * thread / team;
      shares_[thread].end = items * (thread + 1) / team;
    }
  }

  // Takes the first quarter of each share away, at most `most` items.
  Shares keep_back(int64_t most) {
    Shares kept(0, static_cast<int>(shares_.size()), order_);
    for (size_t i = 0; i < shares_.size(); ++i) {
      kept.shares_[i].begin = shares_[i].begin;
      shares_[i].begin += std::min((shares_[i].end - shares_[i].begin) / 4, most);
      kept.shares_[i].end = shares_[i].begin;
    }
    return kept;
  }

  // Calls body(item) for the share of a thread, then for what is left of others'.
  template <class Body>
  void take(int thread, const Body& body) {
    for (size_t i = 0; i < shares_.size(); ++i) {
      Share& share = shares_[(static_cast<size_t>(thread) + i) % shares_.size()];
      const int64_t count = share.end - share.begin;
      for (int64_t k; (k = share.taken.fetch_add(1, std::memory_order_relaxed)) < count;) {
        body(order_ == Order::kForwards ? share.begin + k : share.end - 1 - k);
      }
    }
  }

 private:
  struct alignas(128) Share {  // in cache lines of its own
    std::atomic<int64_t> taken{0};
    int64_t begin = 0, end = 0;
  };
  std::vector<Share> shares_;
  Order order_;
};

}  // namespace fusedopt::cpu
