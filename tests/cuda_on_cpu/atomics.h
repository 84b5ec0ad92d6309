// Atomic operations. No two threads run at once, so each is a plain read and write; they return the old value.
#pragma once

#define CUDA_ON_CPU_ATOMIC(name, type, result)  \
  inline type name(type* address, type value) { \
    const type old = *address;                  \
    *address = (result);                        \
    return old;                                 \
  }

#define CUDA_ON_CPU_ATOMICS(type)                                   \
  CUDA_ON_CPU_ATOMIC(atomicMax, type, old < value ? value : old)    \
  CUDA_ON_CPU_ATOMIC(atomicMin, type, value < old ? value : old)    \
  CUDA_ON_CPU_ATOMIC(atomicOr, type, old | value)                   \
  CUDA_ON_CPU_ATOMIC(atomicAnd, type, old& value)                   \
  CUDA_ON_CPU_ATOMIC(atomicXor, type, old ^ value)                  \
  CUDA_ON_CPU_ATOMIC(atomicExch, type, value)                       \
  inline type atomicCAS(type* address, type expected, type value) { \
    const type old = *address;                                      \
    if (old == expected) *address = value;                          \
    return old;                                                     \
  }

CUDA_ON_CPU_ATOMICS(int)
CUDA_ON_CPU_ATOMICS(unsigned)
CUDA_ON_CPU_ATOMICS(unsigned long long)

// Sums wrap, whether they have a sign or not.
CUDA_ON_CPU_ATOMIC(atomicAdd, int, static_cast<int>(static_cast<unsigned>(old) + static_cast<unsigned>(value)))
CUDA_ON_CPU_ATOMIC(atomicAdd, unsigned, old + value)
CUDA_ON_CPU_ATOMIC(atomicAdd, unsigned long long, old + value)
CUDA_ON_CPU_ATOMIC(atomicAdd, float, old + value)
CUDA_ON_CPU_ATOMIC(atomicAdd, double, old + value)
CUDA_ON_CPU_ATOMIC(atomicSub, int, static_cast<int>(static_cast<unsigned>(old) - static_cast<unsigned>(value)))
CUDA_ON_CPU_ATOMIC(atomicSub, unsigned, old - value)
CUDA_ON_CPU_ATOMIC(atomicExch, float, value)
CUDA_ON_CPU_ATOMIC(atomicInc, unsigned, old >= value ? 0 : old + 1)
CUDA_ON_CPU_ATOMIC(atomicDec, unsigned, old == 0 || old > value ? value : old - 1)
