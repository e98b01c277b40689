// The activation between the two products.
#pragma once

#include "ptx/math.cuh"

namespace anabranch::experts {

__device__ __forceinline__ float silu_times(float gate, float up) {
  constexpr float kLog2E = 1.44269504f;
  return gate * up * ptx::rcp_approx(1.0f + ptx::ex2_approx(-kLog2E * gate));
}

}  // namespace anabranch::experts
