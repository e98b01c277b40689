// Special registers, one instruction a function.
#pragma once

#include <cstdint>

namespace anabranch::ptx {

// threadIdx.x, read anew at every call: what is computed from it is not kept over a loop where registers are short.
__device__ __forceinline__ uint32_t tid_x() {
  uint32_t index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  return index;
}

}  // namespace anabranch::ptx
