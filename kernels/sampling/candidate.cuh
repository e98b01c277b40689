// Logits as they are stored, and as numbers to be ranked.
#pragma once

#include <cstdint>

#include "common/bf16.cuh"
#include "common/ordered.cuh"
#include "common/warp.cuh"

namespace anabranch::sampling {

// A logit and its id as one number: the larger the better. Equal logits: the lower id. kRefused is above all others.
constexpr uint64_t kRefused = ~uint64_t{0};

__device__ __forceinline__ uint64_t candidate(float logit, uint32_t id) {
  // Not below plus infinity: that, or NaN.
  if (!(logit < INFINITY)) return kRefused;
  return uint64_t{ordered_key(logit)} << 32 | (0xffffffffu - id);
}

__device__ __forceinline__ int32_t id_of(uint64_t best) {
  const uint32_t key = static_cast<uint32_t>(best >> 32);
  return best == kRefused || key == ordered_key(-INFINITY) ? -1 : static_cast<int32_t>(0xffffffffu - best);
}

__device__ __forceinline__ uint64_t larger(uint64_t a, uint64_t b) {
  return a > b ? a : b;
}

__device__ __forceinline__ uint64_t warp_largest(uint64_t x) {
#pragma unroll
  for (uint32_t step = kWarpSize / 2; step > 0; step /= 2) {
    x = larger(x, __shfl_xor_sync(kFullWarp, static_cast<unsigned long long>(x), step));
  }
  return x;
}

// How logits are stored: 16 bytes of them, and one.
struct FloatLogits {
  static constexpr uint32_t kWidth = 4;
  static __device__ __forceinline__ float read(const void* logits, uint64_t at) {
    return static_cast<const float*>(logits)[at];
  }
  static __device__ __forceinline__ void read(float (&x)[kWidth], const void* logits, uint64_t at) {
    const float4 packed = *(reinterpret_cast<const float4*>(static_cast<const float*>(logits) + at));
    x[0] = packed.x, x[1] = packed.y, x[2] = packed.z, x[3] = packed.w;
  }
};

struct Bf16Logits {
  static constexpr uint32_t kWidth = kVector;
  static __device__ __forceinline__ float read(const void* logits, uint64_t at) {
    return bf16_to_float(static_cast<const uint16_t*>(logits)[at]);
  }
  static __device__ __forceinline__ void read(float (&x)[kWidth], const void* logits, uint64_t at) {
    unpack(x, *(reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(logits) + at)));
  }
};

}  // namespace anabranch::sampling
