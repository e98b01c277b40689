// Shared memory by 32-bit address, one instruction a function.
#pragma once

#include <cstdint>

namespace anabranch::ptx {

__device__ __forceinline__ uint4 ld_shared_16(uint32_t address) {
  uint4 value;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "r"(address)
               : "memory");
  return value;
}

}  // namespace anabranch::ptx
