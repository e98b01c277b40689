// The activation of gated experts.
#pragma once

#include "ptx/math.cuh"

namespace anabranch {

// silu(x) = x * sigmoid(x), in two instructions of the special-function unit. Far below zero it is -0, so that it comes
// before the product with up, which might overflow.
__device__ __forceinline__ float silu(float x) {
  constexpr float kLog2E = 1.4426950408889634f;
  return x * ptx::rcp_approx(1.0f + ptx::ex2_approx(-kLog2E * x));
}

}  // namespace anabranch
