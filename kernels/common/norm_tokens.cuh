// The RMS norm of a few tokens, which a block makes for itself before it multiplies: a launch less, for a read of the
// tokens by every block.
#pragma once

#include <cstdint>

#include "common/bf16.cuh"
#include "common/norm.cuh"
#include "common/warp.cuh"

namespace anabranch {

struct NormTokens {
  const uint4* x;        // [T, vectors]
  const uint4* delta;    // as x, to be added first; or null
  const float4* weight;  // [d]
  uint32_t tokens;
  uint32_t vectors;  // of a row: d / 8
  float width;       // d
  float eps;
};

// Eight values plus eight, rounded to bf16.
__device__ __forceinline__ uint4 sum_of(const uint4& left, const uint4& right) {
  float a[kVector];
  float b[kVector];
  unpack(a, left);
  unpack(b, right);
#pragma unroll
  for (uint32_t i = 0; i < kVector; ++i) a[i] += b[i];
  return pack(a);
}

// norm(x + delta) to rows `pitch` vectors apart in shared memory. The block's kWarps warps share up to kWarps tokens
// evenly. The sum's order depends on their number and on d alone. Ends with a barrier.
template <uint32_t kWarps>
__device__ __forceinline__ void norm_tokens(const NormTokens& args, uint4* out, uint32_t pitch) {
  __shared__ float partial[kWarps];
  uint32_t warps = kWarps;
  for (uint32_t slots = 1; slots < args.tokens; slots *= 2) warps /= 2;
  const uint32_t warp = threadIdx.x / kWarpSize;
  const uint32_t token = warp / warps;
  const uint32_t threads = warps * kWarpSize;
  const uint32_t member = threadIdx.x % threads;
  const bool inside = token < args.tokens;
  uint4* const row = out + token * pitch;
  const uint64_t start = uint64_t{token} * args.vectors;
  // Asked for before the barrier: mostly a thread has one vector, and this is its weight.
  float weight[kVector] = {};
  if (inside && member < args.vectors) load(weight, args.weight + 2 * member);
  float sum = 0.0f;
  if (inside) {
#pragma unroll 4
    for (uint32_t at = member; at < args.vectors; at += threads) {
      uint4 value = args.x[start + at];
      if (args.delta != nullptr) value = sum_of(value, args.delta[start + at]);
      row[at] = value;
      float a[kVector];
      unpack(a, value);
#pragma unroll
      for (uint32_t i = 0; i < kVector; ++i) sum = fmaf(a[i], a[i], sum);
    }
  }
  sum = warp_sum(sum);
  if (threadIdx.x % kWarpSize == 0) partial[warp] = sum;
  __syncthreads();
  if (inside) {
    sum = 0.0f;
    for (uint32_t i = 0; i < warps; ++i) sum += partial[token * warps + i];
    const float scale = norm_scale(sum, args.width, args.eps);
    for (uint32_t at = member; at < args.vectors; at += threads) {
      float a[kVector];
      unpack(a, row[at]);
      if (at != member) load(weight, args.weight + 2 * at);
#pragma unroll
      for (uint32_t i = 0; i < kVector; ++i) a[i] = a[i] * scale * weight[i];
      row[at] = pack(a);
    }
  }
  __syncthreads();
}

}  // namespace anabranch
