// Conversions, one instruction a function.
#pragma once

#include <cstdint>

namespace anabranch::ptx {

// Two floats rounded to the nearest bf16, ties to even; `low` in the lower half. NaN becomes the canonical one.
__device__ __forceinline__ uint32_t cvt_bf16x2(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

}  // namespace anabranch::ptx
