// Eight bf16 values, 16 bytes: what one load or store moves.
#pragma once

#include <cstdint>

#include "ptx/convert.cuh"

namespace anabranch {

// Elements of a vector.
constexpr uint32_t kVector = 8;

__device__ __forceinline__ float bf16_to_float(uint16_t bits) {
  return __uint_as_float(static_cast<uint32_t>(bits) << 16);
}

__device__ __forceinline__ uint16_t float_to_bf16(float x) {
  return static_cast<uint16_t>(ptx::cvt_bf16x2(x, 0.0f));
}

__device__ __forceinline__ void unpack(float (&x)[kVector], const uint4& packed) {
  const uint32_t words[] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
  for (uint32_t i = 0; i < 4; ++i) {
    x[2 * i] = __uint_as_float(words[i] << 16);
    x[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
  }
}

__device__ __forceinline__ uint4 pack(const float (&x)[kVector]) {
  return make_uint4(ptx::cvt_bf16x2(x[0], x[1]), ptx::cvt_bf16x2(x[2], x[3]), ptx::cvt_bf16x2(x[4], x[5]),
                    ptx::cvt_bf16x2(x[6], x[7]));
}

// Eight floats from memory aligned to 16.
__device__ __forceinline__ void load(float (&x)[kVector], const float4* from) {
  const float4 low = from[0];
  const float4 high = from[1];
  x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w;
  x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
}

}  // namespace anabranch
