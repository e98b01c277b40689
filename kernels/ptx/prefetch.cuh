// Hints to the caches, one instruction a function.
#pragma once

namespace anabranch::ptx {

// Brings the line of a global address into the second-level cache.
__device__ __forceinline__ void prefetch_l2(const void* address) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}

}  // namespace anabranch::ptx
