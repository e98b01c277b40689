// Signals between blocks through global memory, one instruction a function.
#pragma once

#include <cstdint>

namespace anabranch::ptx {

// What was written before it, by this thread or by those it met at a barrier, is seen by whoever acquires the sum.
__device__ __forceinline__ void red_release_add(uint32_t* address, uint32_t value) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}

// The value before the addition; releases what was written and acquires what earlier adders released.
__device__ __forceinline__ uint32_t atom_acq_rel_add(uint32_t* address, uint32_t value) {
  uint32_t before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(before) : "l"(address), "r"(value) : "memory");
  return before;
}

__device__ __forceinline__ uint32_t ld_acquire(const uint32_t* address) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
}

}  // namespace anabranch::ptx
