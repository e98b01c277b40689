// What an RMS norm multiplies with: the same bits wherever a row's squares are summed in the same order.
#pragma once

#include <cstdint>

#include "common/bf16.cuh"

namespace anabranch {

__device__ __forceinline__ float add_squares(float sum, const uint4& packed) {
  float x[kVector];
  unpack(x, packed);
#pragma unroll
  for (uint32_t j = 0; j < kVector; ++j) sum = fmaf(x[j], x[j], sum);
  return sum;
}

__device__ __forceinline__ float norm_scale(float sum_of_squares, float width, float eps) {
  return 1.0f / sqrtf(sum_of_squares / width + eps);
}

}  // namespace anabranch
