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

// Eight bytes at once, ordered with nothing else.
__device__ __forceinline__ void st_relaxed(unsigned long long* address, unsigned long long value) {
  asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(address), "l"(value) : "memory");
}

// Two times eight bytes, on 16.
__device__ __forceinline__ void st_relaxed_2(unsigned long long* address, unsigned long long a, unsigned long long b) {
  asm volatile("st.relaxed.gpu.global.v2.u64 [%0], {%1, %2};" ::"l"(address), "l"(a), "l"(b) : "memory");
}

__device__ __forceinline__ void ld_relaxed_2(const unsigned long long* address, unsigned long long& a,
                                             unsigned long long& b) {
  asm volatile("ld.relaxed.gpu.global.v2.u64 {%0, %1}, [%2];" : "=l"(a), "=l"(b) : "l"(address) : "memory");
}

}  // namespace anabranch::ptx
