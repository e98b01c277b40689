// Copies from global to shared memory that run while the thread goes on (sm_80), one instruction a function.
#pragma once

#include <cstdint>

namespace anabranch::ptx {

// Sixteen bytes, past the first-level cache; zeros, and no read, where `valid` is false. Both addresses on 16 bytes.
__device__ __forceinline__ void cp_async_16(uint32_t shared, const void* global, bool valid) {
  const uint32_t bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(bytes)
               : "memory");
}

// Closes the group of this thread's copies since the last one.
__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most kPending of this thread's groups, the newest, are under way.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace anabranch::ptx
