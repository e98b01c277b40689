// Hints to the caches, one instruction a function.
#pragma once

#include <cstdint>

namespace anabranch::ptx {

// Brings the line of a global address into the second-level cache.
__device__ __forceinline__ void prefetch_l2(const void* address) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}

// Brings `bytes` bytes from an address on 16 bytes into the second-level cache (sm_90). A multiple of 16.
__device__ __forceinline__ void bulk_prefetch_l2(const void* address, uint32_t bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(address), "r"(bytes) : "memory");
}

}  // namespace anabranch::ptx
