// Kernels that try out what cuda_on_cpu promises. They are CUDA, and compile with nvcc too: what the emulation accepts
// and a device would not is of no use. Each takes what it reads and what it writes; cuda/test_on_cpu.py knows which.
#pragma once

#include <cuda_runtime.h>

namespace outside {

// Shared memory of functions that other source files could share, beside that of functions which they could not.
template <class T, int kSize>
__device__ T* scratch() {
  __shared__ T values[kSize];
  return values;
}

inline __device__ unsigned* counter() {
  __shared__ unsigned count;
  return &count;
}

}  // namespace outside

namespace {

constexpr unsigned kAll = 0xffffffff;

__device__ __forceinline__ unsigned linear_thread() {
  return (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
}
__device__ __forceinline__ unsigned linear_block() {
  return (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
}
__device__ __forceinline__ unsigned global_thread() {
  return linear_block() * blockDim.x * blockDim.y * blockDim.z + linear_thread();
}

// ---------------------------------------------------------------------------------------------------------------------
// What converges.

template <class T>
__device__ T warp_sum(T value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(kAll, value, distance);
  return value;
}

template <class T>
__device__ T block_sum(T value) {
  __shared__ T partial[32];
  value = warp_sum(value);
  const unsigned warp = linear_thread() / 32, lane = linear_thread() % 32;
  if (lane == 0) partial[warp] = value;
  __syncthreads();
  const unsigned warps = (blockDim.x * blockDim.y * blockDim.z + 31) / 32;
  if (warp == 0) value = warp_sum(lane < warps ? partial[lane] : T(0));
  __syncthreads();
  return value;
}

__global__ void __launch_bounds__(1024) sums(const unsigned* __restrict__ input, unsigned* output) {
  const unsigned mine = input[global_thread()];
  const unsigned total = block_sum(mine);
  const float real = block_sum(static_cast<float>(mine) * 0.5f);
  if (linear_thread() == 0) output[2 * linear_block()] = total, output[2 * linear_block() + 1] = __float_as_uint(real);
}

__global__ void indices(const unsigned*, unsigned* output) {
  unsigned* mine = output + 12 * global_thread();
  const dim3 values[4] = {threadIdx, blockIdx, blockDim, gridDim};
  for (int k = 0; k < 4; ++k) {
    mine[3 * k] = values[k].x;
    mine[3 * k + 1] = values[k].y;
    mine[3 * k + 2] = values[k].z;
  }
}

__global__ void atomics(const unsigned* input, unsigned* output) {
  const unsigned value = input[global_thread()];
  atomicAdd(output + value % 8, 1u);
  atomicAdd(reinterpret_cast<int*>(output) + 8, -static_cast<int>(value));
  atomicMax(output + 9, value);
  atomicMin(output + 10, value);
  atomicMax(reinterpret_cast<int*>(output) + 11, -static_cast<int>(value));
  atomicOr(output + 12, value);
  atomicAnd(output + 13, value | 0xf0);
  atomicInc(output + 14, 6);
  atomicAdd(reinterpret_cast<float*>(output) + 15, 0.25f);
  atomicAdd(reinterpret_cast<unsigned long long*>(output) + 8, 0x100000001ull);
  atomicAdd(reinterpret_cast<double*>(output) + 9, 0.5);
  atomicMax(reinterpret_cast<unsigned long long*>(output) + 10, 0x100000000ull + value);
  unsigned seen = output[22] + 1;  // adds by compare and swap, which is refused at first
  for (unsigned expected = ~seen; seen != expected;) {
    expected = seen;
    seen = atomicCAS(output + 22, expected, expected + value);
  }
  if (atomicExch(output + 23, 1) == 0) atomicExch(output + 24, 7);
}

__global__ void votes(const unsigned* input, unsigned* output) {
  const unsigned lane = threadIdx.x, value = input[lane];
  unsigned* mine = output + 12 * lane;
  const int signed_value = static_cast<int>(value) - 45;
  const unsigned half = lane < 16 ? 0xffff : 0xffff0000;
  mine[0] = __ballot_sync(kAll, value & 1);
  mine[1] = static_cast<unsigned>(__any_sync(kAll, value == 3));
  mine[2] = static_cast<unsigned>(__all_sync(kAll, value < 100));
  mine[3] = __ballot_sync(half, value & 2);  // both halves of the warp, each by itself
  mine[4] = __reduce_add_sync(kAll, value);
  mine[5] = __reduce_max_sync(kAll, value);
  mine[6] = __reduce_min_sync(half, value);
  mine[7] = static_cast<unsigned>(__reduce_max_sync(kAll, signed_value));
  mine[8] = static_cast<unsigned>(__reduce_min_sync(kAll, signed_value));
  mine[9] = static_cast<unsigned>(__reduce_add_sync(kAll, signed_value));
  mine[10] = __reduce_or_sync(kAll, value);
  mine[11] = __reduce_and_sync(half, value);
}

__global__ void shuffles(const unsigned* input, unsigned* output) {
  const unsigned lane = threadIdx.x, value = input[lane];
  unsigned* mine = output + 12 * lane;
  mine[0] = __shfl_sync(kAll, value, 5);
  mine[1] = __shfl_sync(kAll, value, static_cast<int>(lane * 7), 8);
  mine[2] = __shfl_up_sync(kAll, value, 3);
  mine[3] = __shfl_up_sync(kAll, value, 3, 16);
  mine[4] = __shfl_down_sync(kAll, value, 5);
  mine[5] = __shfl_down_sync(kAll, value, 5, 8);
  mine[6] = __shfl_xor_sync(kAll, value, 9);
  mine[7] = __shfl_xor_sync(kAll, value, 9, 8);
  const double real = __shfl_xor_sync(kAll, 0.5 * value, 1);
  mine[8] = static_cast<unsigned>(2 * real);
  const unsigned long long wide = __shfl_down_sync(kAll, value * 0x100000001ull, 1);
  mine[9] = static_cast<unsigned>(wide >> 32);
  mine[10] = static_cast<unsigned>(static_cast<int>(__shfl_sync(kAll, -static_cast<float>(value), 31)));
  mine[11] = 0;
  if (lane % 2 == 1) mine[11] = __shfl_sync(0xaaaaaaaa, value, 9);
}

__global__ void intrinsics(const unsigned* input, unsigned* output) {
  const unsigned a = input[0], b = input[1];
  const float x = __uint_as_float(input[2]), y = __uint_as_float(input[3]), z = __int_as_float(input[4]);
  const unsigned values[] = {static_cast<unsigned>(__popc(a)),
                             static_cast<unsigned>(__clz(static_cast<int>(a))),
                             static_cast<unsigned>(__ffs(static_cast<int>(a))),
                             __brev(a),
                             __byte_perm(a, b, 0x7150),
                             __umulhi(a, b),
                             __funnelshift_l(a, b, 9),
                             __float_as_uint(__fadd_rn(x, y)),
                             __float_as_uint(__fsub_rn(x, y)),
                             __float_as_uint(__fadd_rn(__fmul_rn(x, y), z)),
                             __float_as_uint(__fdiv_rn(x, y)),
                             __float_as_uint(__fsqrt_rn(x)),
                             __float_as_uint(__fmaf_rn(x, y, z)),
                             min(a, b),
                             max(a, b),
                             static_cast<unsigned>(__clz(0))};
  for (unsigned k = 0; k < sizeof values / sizeof *values; ++k) output[k] = values[k];
  auto* doubles = reinterpret_cast<long long*>(output + 16);
  const double d = __longlong_as_double(__double_as_longlong(x));
  doubles[0] = __double_as_longlong(__dadd_rn(d, __dmul_rn(d, __ddiv_rn(1.0, __dsqrt_rn(d)))));
}

// Of the pairs of numbers in the input, one for each thread.
__global__ void sums_rounded_down(const unsigned* input, unsigned* output) {
  const unsigned* mine = input + 2 * threadIdx.x;
  output[threadIdx.x] = __float_as_uint(__fadd_rd(__uint_as_float(mine[0]), __uint_as_float(mine[1])));
}

__global__ void vectors(const unsigned* input, unsigned* output) {
  const uint4 four = __ldg(reinterpret_cast<const uint4*>(input) + threadIdx.x);
  const float2 two = __ldcs(reinterpret_cast<const float2*>(input) + 2 * threadIdx.x);
  __stcs(reinterpret_cast<uint4*>(output) + 2 * threadIdx.x, make_uint4(four.w, four.z, four.y, four.x));
  __stcg(reinterpret_cast<float2*>(output) + 4 * threadIdx.x + 2, make_float2(two.y, two.x));
  __stwt(output + 8 * threadIdx.x + 6, __ldcg(input));
  __stcs(output + 8 * threadIdx.x + 7, __ldca(input + 1));
}

__global__ void misaligned_load(const unsigned* input, unsigned* output) {
  output[threadIdx.x] = __ldg(reinterpret_cast<const uint4*>(input + threadIdx.x)).x;
}
__global__ void misaligned_store(const unsigned* input, unsigned* output) {
  __stcs(reinterpret_cast<uint2*>(output + 2 * threadIdx.x + 1), make_uint2(input[0], input[0]));
}

// Without an intrinsic function. Whole vectors, members of them, and numbers.
__global__ void misaligned_vector(const unsigned* input, unsigned* output) {
  const uint4 loaded = *reinterpret_cast<const uint4*>(input + threadIdx.x);
  output[threadIdx.x] = loaded.x + loaded.w;
}
__global__ void misaligned_vector_store(const unsigned* input, unsigned* output) {
  *reinterpret_cast<uint2*>(output + 2 * threadIdx.x + 1) = make_uint2(input[0], input[0]);
}
__global__ void misaligned_number(const unsigned* input, unsigned* output) {
  output[threadIdx.x] = *reinterpret_cast<const unsigned*>(reinterpret_cast<const char*>(input) + threadIdx.x);
}

template <class T>
__device__ T* own_scratch() {
  __shared__ T values[8];
  return values;
}

// Writes, for every thread, what shared memory of several kinds held before anybody wrote it; then writes it.
__global__ void reads_before_writing(const unsigned*, unsigned* output) {
  __shared__ unsigned single;
  __shared__ __align__(16) float many[8];
  alignas(16) __shared__ unsigned char bytes[16];
  const unsigned values[] = {single,
                             __float_as_uint(many[threadIdx.x]),
                             bytes[threadIdx.x],
                             outside::scratch<unsigned, 8>()[threadIdx.x],
                             *outside::counter(),
                             own_scratch<unsigned>()[threadIdx.x]};
  for (int k = 0; k < 6; ++k) output[6 * global_thread() + k] = values[k];
  __syncthreads();
  single = *outside::counter() = many[threadIdx.x] = bytes[threadIdx.x] = 0;
  outside::scratch<unsigned, 8>()[threadIdx.x] = own_scratch<unsigned>()[threadIdx.x] = 0;
}

// Without the barrier, what a thread reads depends on whether its neighbour has been there.
template <bool kHasBarrier>
__global__ void reverses(const unsigned* input, unsigned* output) {
  __shared__ unsigned values[1024];
  values[threadIdx.x] = input[global_thread()];
  if (kHasBarrier) __syncthreads();
  output[global_thread()] = values[blockDim.x - 1 - threadIdx.x];
}

// Which thread of the grid comes first is a matter of the order of blocks.
__global__ void takes_tickets(const unsigned*, unsigned* output) {
  const unsigned ticket = atomicAdd(output, 1u);
  output[1 + global_thread()] = ticket;
}

__global__ void does_little(const unsigned* input, unsigned* output) { output[global_thread()] = input[0]; }

struct Parameters {
  unsigned values[1000];
};

// Every thread changes its own copy.
__global__ void changes_parameters(__grid_constant__ const Parameters fixed, Parameters own, unsigned* output) {
  own.values[999] += 1;
  __syncthreads();
  output[global_thread()] = fixed.values[999] + 1000 * own.values[999];
}

// ---------------------------------------------------------------------------------------------------------------------
// What does not converge.

__global__ void barrier_in_branch(const unsigned*, unsigned*) {
  if (threadIdx.x != 31) __syncthreads();
}
__global__ void barrier_after_return(const unsigned*, unsigned*) {
  if (threadIdx.x == 0) return;
  __syncthreads();
}
__global__ void barriers_at_two_sites(const unsigned*, unsigned*) {
  if (threadIdx.x < 40) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}
__global__ void barrier_against_ballot(const unsigned*, unsigned* output) {
  if (threadIdx.x == 31) {
    __syncthreads();
  } else {
    output[threadIdx.x] = __ballot_sync(kAll, 1);
  }
}
__global__ void ballot_against_barrier(const unsigned*, unsigned* output) {
  if (threadIdx.x == 31) {
    output[threadIdx.x] = __ballot_sync(kAll, 1);
  } else {
    __syncthreads();
  }
}
__global__ void shuffle_against_ballot(const unsigned*, unsigned* output) {
  if (threadIdx.x < 3) {
    output[threadIdx.x] = __shfl_xor_sync(kAll, 1u, 1);
  } else {
    output[threadIdx.x] = __ballot_sync(kAll, 1);
  }
}
__global__ void masks_differ(const unsigned*, unsigned*) { __syncwarp(threadIdx.x % 32 < 4 ? 0xffffff : kAll); }
__global__ void mask_without_caller(const unsigned*, unsigned*) { __syncwarp(0xfff0); }
__global__ void mask_names_finished_lane(const unsigned*, unsigned*) {
  if (threadIdx.x != 2) __syncwarp();
}
__global__ void mask_names_absent_lane(const unsigned*, unsigned*) { __syncwarp(); }
__global__ void finishes_while_awaited(const unsigned*, unsigned*) {
  if (threadIdx.x != 31) __syncwarp();
}
__global__ void waits_in_a_circle(const unsigned*, unsigned*) {
  if (threadIdx.x < 3) __syncwarp(1u << threadIdx.x | 1u << (threadIdx.x + 1) % 3);
}
__global__ void shuffle_from_outside(const unsigned*, unsigned* output) {
  if (threadIdx.x < 16) output[threadIdx.x] = __shfl_down_sync(0xffff, threadIdx.x, 4);
}
__global__ void traps(const unsigned*, unsigned*) {
  if (global_thread() == 70) __trap();
}

// A subset of a warp may meet while the others wait for it, and the same function may be called from two places.
__global__ void meets_in_parts(const unsigned* input, unsigned* output) {
  const unsigned value = input[threadIdx.x];
  unsigned sum = 0;
  if (threadIdx.x < 8) sum = __reduce_add_sync(0xff, value);
  __syncwarp();
  sum += value % 2 ? warp_sum(value) : warp_sum(value);
  output[threadIdx.x] = sum;
}

}  // namespace
