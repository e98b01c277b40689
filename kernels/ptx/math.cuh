// Approximate arithmetic of the special-function unit, one instruction a function.
#pragma once

namespace anabranch::ptx {

// 2^x within 2 ulp; subnormal results are 0. 2^-inf is 0, 2^inf is inf, NaN stays.
__device__ __forceinline__ float ex2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1/x within 1 ulp; 1/inf is 0, NaN stays.
__device__ __forceinline__ float rcp_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace anabranch::ptx
