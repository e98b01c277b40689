// The RMS norm's kernel: a row stays in registers from its only read to its only write.
#pragma once

#include <cstdint>

#include "common/bf16.cuh"
#include "common/norm.cuh"
#include "common/warp.cuh"
#include "ptx/grid_dependency.cuh"

namespace anabranch::block {

struct NormArgs {
  uint4* x;            // rows of `vectors`, heads one after another, tokens x_stride apart
  const uint4* delta;  // as x, or null
  const void* weight;  // [width]
  uint4* out;
  uint64_t x_stride;    // vectors
  uint64_t out_stride;  // vectors
  uint32_t num_rows;    // T * heads
  uint32_t heads;
  uint32_t vectors;  // of a row
  uint32_t threads;  // that share a row: a power of two from 8 to 32, several rows a block; or whole warps
  float width;
  float eps;
};

// The weight's types: eight values at a vector's place.
struct Bf16Weight {
  static __device__ __forceinline__ void read(float (&w)[kVector], const void* weight, uint32_t at) {
    unpack(w, static_cast<const uint4*>(weight)[at]);
  }
};

struct FloatWeight {
  static __device__ __forceinline__ void read(float (&w)[kVector], const void* weight, uint32_t at) {
    load(w, static_cast<const float4*>(weight) + 2 * at);
  }
};

// The sum over the `threads` that share a row, in an order that hangs on `threads` only.
__device__ __forceinline__ float sum_over(float x, uint32_t threads) {
  x = group_sum(x, threads < kWarpSize ? threads : kWarpSize);
  if (threads <= kWarpSize) return x;
  __shared__ float partial[kWarpSize];
  if (threadIdx.x % kWarpSize == 0) partial[threadIdx.x / kWarpSize] = x;
  __syncthreads();
  const uint32_t warps = threads / kWarpSize;
  x = 0.0f;
  for (uint32_t warp = 0; warp < warps; ++warp) x += partial[warp];
  return x;
}

// kVectors: how many vectors a thread has at most. Threads past the last row compute with zeros and store nothing, so
// that every lane takes part in the sums.
template <uint32_t kVectors, typename Weight>
__global__ void __launch_bounds__(1024) norm_rows(const __grid_constant__ NormArgs args) {
  ptx::launch_dependents();
  ptx::wait_for_prerequisites();
  const uint32_t member = threadIdx.x % args.threads;
  const uint64_t row = uint64_t{blockIdx.x} * (blockDim.x / args.threads) + threadIdx.x / args.threads;
  const bool inside = row < args.num_rows;
  const uint32_t token = static_cast<uint32_t>(row) / args.heads;
  const uint32_t head = static_cast<uint32_t>(row) % args.heads;
  const uint64_t start = token * args.x_stride + head * args.vectors;

  // All loads before the first store, which the compiler could not tell to be elsewhere.
  uint4 x[kVectors];
  uint4 delta[kVectors];
  float sum = 0.0f;
#pragma unroll
  for (uint32_t i = 0; i < kVectors; ++i) {
    const uint32_t at = member + i * args.threads;
    const bool there = inside && at < args.vectors;
    x[i] = there ? args.x[start + at] : uint4{};
    delta[i] = there && args.delta != nullptr ? args.delta[start + at] : uint4{};
  }
  if (args.delta != nullptr) {
#pragma unroll
    for (uint32_t i = 0; i < kVectors; ++i) {
      const uint32_t at = member + i * args.threads;
      if (inside && at < args.vectors) {
        float a[kVector];
        float b[kVector];
        unpack(a, x[i]);
        unpack(b, delta[i]);
#pragma unroll
        for (uint32_t j = 0; j < kVector; ++j) a[j] += b[j];
        x[i] = pack(a);
        args.x[start + at] = x[i];
      }
    }
  }
#pragma unroll
  for (uint32_t i = 0; i < kVectors; ++i) sum = add_squares(sum, x[i]);
  const float scale = norm_scale(sum_over(sum, args.threads), args.width, args.eps);
#pragma unroll
  for (uint32_t i = 0; i < kVectors; ++i) {
    const uint32_t at = member + i * args.threads;
    if (inside && at < args.vectors) {
      float a[kVector];
      float w[kVector];
      unpack(a, x[i]);
      Weight::read(w, args.weight, at);
#pragma unroll
      for (uint32_t j = 0; j < kVector; ++j) a[j] = a[j] * scale * w[j];
      args.out[token * args.out_stride + head * args.vectors + at] = pack(a);
    }
  }
}

}  // namespace anabranch::block
