// Stacks to run on and the switch from one to another.
//
// The switch is a few instructions on x86-64: it saves what a call preserves and nothing else. setjmp and longjmp would
// save more and, where the C library is fortified, refuse to jump to another stack; swapcontext works everywhere but
// asks the kernel for the signal mask twice. It is the way on other machines, or with CUDA_ON_CPU_UCONTEXT defined.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "language.h"

#if !defined(__x86_64__) && !defined(CUDA_ON_CPU_UCONTEXT)
#define CUDA_ON_CPU_UCONTEXT 1
#endif
#if defined(CUDA_ON_CPU_UCONTEXT)
#include <ucontext.h>
#endif

namespace cuda_on_cpu {

// Where a stack that is not running goes on.
struct Context {
#if defined(CUDA_ON_CPU_UCONTEXT)
  ucontext_t saved;
#else
  void* stack_pointer = nullptr;
#endif
};

#if defined(CUDA_ON_CPU_UCONTEXT)

inline void switch_context(Context& from, Context& to) { swapcontext(&from.saved, &to.saved); }

#else

// Returns when somebody switches back to `from`. Naked: the return address is all that lies on the stack before it.
// noipa: the compiler must not conclude from its few instructions that shared memory is the same after it.
__attribute__((naked, noinline, noipa, visibility("hidden"))) inline void switch_context(Context& /*rdi*/,
                                                                                         Context& /*rsi*/) {
  __asm__(
      "pushq %rbp\n\t"
      "pushq %rbx\n\t"
      "pushq %r12\n\t"
      "pushq %r13\n\t"
      "pushq %r14\n\t"
      "pushq %r15\n\t"
      "movq %rsp, (%rdi)\n\t"
      "movq (%rsi), %rsp\n\t"
      "popq %r15\n\t"
      "popq %r14\n\t"
      "popq %r13\n\t"
      "popq %r12\n\t"
      "popq %rbx\n\t"
      "popq %rbp\n\t"
      "ret");
}

#endif

// A stack of 256 KiB, most of which is never touched, and a page below it that must not be: a kernel that overflows
// ends with a segmentation fault instead of a wrong result. Made once and used for many threads.
class Fiber {
 public:
  Context context;

  Fiber(size_t index, void (*run)()) : run_(run), page_(static_cast<size_t>(sysconf(_SC_PAGESIZE))) {
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    memory_ = mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (memory_ == MAP_FAILED || mprotect(memory_, page_, PROT_NONE) != 0) throw std::bad_alloc();
    // If all stacks began at the same offset, the threads of a warp would fight for the same few sets of the cache.
    top_ = static_cast<char*>(memory_) + kBytes - index % kOffsets * kOffsetBytes;
    restart();
  }
  Fiber(const Fiber&) = delete;
  ~Fiber() { munmap(memory_, kBytes); }

  // The next switch to this fiber calls run(), which must not return. Whatever was on the stack is forgotten.
  void restart() {
#if defined(CUDA_ON_CPU_UCONTEXT)
    getcontext(&context.saved);
    context.saved.uc_stack.ss_sp = static_cast<char*>(memory_) + page_;
    context.saved.uc_stack.ss_size = static_cast<size_t>(top_ - static_cast<char*>(context.saved.uc_stack.ss_sp));
    context.saved.uc_link = nullptr;
    makecontext(&context.saved, run_, 0);
#else
    // As the switch finds it: six registers, where to return to, and the (null) return address that run() sees.
    void* frame[8] = {};
    frame[6] = reinterpret_cast<void*>(run_);
    context.stack_pointer = top_ - sizeof frame;
    memcpy(context.stack_pointer, frame, sizeof frame);
#endif
  }

 private:
  static constexpr size_t kBytes = 256 << 10;
  static constexpr size_t kOffsets = 37, kOffsetBytes = 448;

  void (*run_)();
  size_t page_;
  void* memory_;
  char* top_;
};

// All fibers, and which of them are free.
class FiberPool {
 public:
  explicit FiberPool(void (*run)()) : run_(run) {}

  Fiber* take() {
    if (free_.empty()) {
      all_.push_back(std::make_unique<Fiber>(all_.size(), run_));
      free_.reserve(all_.size());  // so that give() does not allocate
      return all_.back().get();
    }
    Fiber* fiber = free_.back();
    free_.pop_back();
    return fiber;
  }

  void give(Fiber* fiber) { free_.push_back(fiber); }

  // Abandons whatever runs on any of them.
  void restart_all() {
    free_.clear();
    for (auto& fiber : all_) {
      fiber->restart();
      free_.push_back(fiber.get());
    }
  }

 private:
  void (*run_)();
  std::vector<std::unique_ptr<Fiber>> all_;
  std::vector<Fiber*> free_;
};

}  // namespace cuda_on_cpu
