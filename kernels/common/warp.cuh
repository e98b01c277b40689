// Reductions over the 32 lanes of a warp, every lane taking part. The order of additions is fixed: the same inputs give
// the same bits.
#pragma once

#include <cstdint>

#include "common/ordered.cuh"

namespace anabranch {

constexpr uint32_t kFullWarp = 0xffffffffu;
constexpr uint32_t kWarpSize = 32;

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (uint32_t step = kWarpSize / 2; step > 0; step /= 2) x += __shfl_xor_sync(kFullWarp, x, step);
  return x;
}

// The sum of this lane's group: `lanes` neighbours, a power of two.
__device__ __forceinline__ float group_sum(float x, uint32_t lanes) {
  for (uint32_t step = lanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(kFullWarp, x, step);
  return x;
}

// The largest value; none may be NaN.
__device__ __forceinline__ float warp_max(float x) {
  return from_ordered_key(__reduce_max_sync(kFullWarp, ordered_key(x)));
}

// The sum of the lanes up to and including this one.
__device__ __forceinline__ uint32_t warp_inclusive_sum(uint32_t x, uint32_t lane) {
#pragma unroll
  for (uint32_t step = 1; step < kWarpSize; step *= 2) {
    const uint32_t below = __shfl_up_sync(kFullWarp, x, step);
    if (lane >= step) x += below;
  }
  return x;
}

}  // namespace anabranch
