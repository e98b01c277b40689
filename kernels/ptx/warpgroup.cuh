// Warps and warpgroups among themselves (sm_90), one instruction a function.
#pragma once

#include <cstdint>

namespace anabranch::ptx {

// Gives registers of this warpgroup back, down to kCount a thread.
template <int kCount>
__device__ __forceinline__ void register_dealloc() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}

// Takes registers, up to kCount a thread; waits until there are so many.
template <int kCount>
__device__ __forceinline__ void register_alloc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}

// Waits for `threads` threads at the block's barrier number `id`.
__device__ __forceinline__ void named_barrier(uint32_t id, uint32_t threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// The same without waiting: for others to go on.
__device__ __forceinline__ void named_barrier_arrive(uint32_t id, uint32_t threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Shared memory that threads wrote, and this thread has seen, is seen by wgmma and the copy engine.
__device__ __forceinline__ void fence_shared_proxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// The same of global memory.
__device__ __forceinline__ void fence_global_proxy() {
  asm volatile("fence.proxy.async.global;" ::: "memory");
}

}  // namespace anabranch::ptx
