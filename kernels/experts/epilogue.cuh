// What becomes of a warpgroup's sums: 64 rows of weights by kN tokens.
#pragma once

#include "common/bf16.cuh"
#include "experts/pipeline.cuh"
#include "ptx/convert.cuh"
#include "ptx/math.cuh"

namespace anabranch::experts {

__device__ __forceinline__ float silu_times(float gate, float up) {
  constexpr float kLog2E = 1.44269504f;
  return gate * up * ptx::rcp_approx(1.0f + ptx::ex2_approx(-kLog2E * gate));
}

// h = silu(gate) * up. A thread holds both for one column and two tokens, and trades with the thread of the next
// column: each then stores one token's two columns.
template <int kN>
__device__ __forceinline__ void store_gated(const Args& args, const Item& item, const float (&sums)[kN / 2],
                                            uint32_t first_column) {
  const uint32_t thread = threadIdx.x % 128;
  const uint32_t lane = threadIdx.x % kWarpSize;
  const bool odd = lane / 4 % 2 == 1;
  const uint32_t column = first_column + thread / kWarpSize * 8 + lane / 8 * 2;
  const bool inside = column < args.intermediate;
  uint32_t token = lane % 4 * 2 + (odd ? 1 : 0);
  uint16_t* h = args.h + uint64_t{item.first_row + token} * args.intermediate + column;
  const uint64_t stride = uint64_t{8} * args.intermediate;
  const uint32_t order = odd ? 0x3276 : 0x5410;
#pragma unroll
  for (int j = 0; j < kN / 8; ++j) {
    const uint32_t own =
        ptx::cvt_bf16x2(silu_times(sums[4 * j], sums[4 * j + 2]), silu_times(sums[4 * j + 1], sums[4 * j + 3]));
    const uint32_t other = __shfl_xor_sync(kFullWarp, own, 4);
    // Even: own low, other low. Odd: other high, own high.
    const uint32_t pair = __byte_perm(own, other, order);
    if (inside && token < item.rows) *reinterpret_cast<uint32_t*>(h) = pair;
    token += 8;
    h += stride;
  }
}

// y. A thread holds two columns that are neighbours in memory, for two tokens.
template <int kN>
__device__ __forceinline__ void store_down(const Args& args, const Item& item, const float (&sums)[kN / 2],
                                           uint32_t first_column) {
  const uint32_t thread = threadIdx.x % 128;
  const uint32_t lane = threadIdx.x % kWarpSize;
  const uint32_t column = first_column + thread / kWarpSize * 16 + lane / 4 * 2;
  const bool inside = column < args.hidden;
  uint32_t token = lane % 4 * 2;
  uint16_t* y = args.y + uint64_t{item.first_row + token} * args.hidden + column;
  const uint64_t stride = uint64_t{8} * args.hidden;
#pragma unroll
  for (int j = 0; j < kN / 8; ++j) {
    const uint32_t even = ptx::cvt_bf16x2(sums[4 * j], sums[4 * j + 2]);
    const uint32_t odd = ptx::cvt_bf16x2(sums[4 * j + 1], sums[4 * j + 3]);
    if (inside && token < item.rows) *reinterpret_cast<uint32_t*>(y) = even;
    if (inside && token + 1 < item.rows) *reinterpret_cast<uint32_t*>(y + args.hidden) = odd;
    token += 8;
    y += stride;
  }
}

// out[t] = sum_k weights[t, k] * y[inverse[t, k]] in 64 columns, by one warpgroup: eight threads a token. k ascends.
__device__ __forceinline__ void combine_columns(const Args& args, uint32_t first_column) {
  const uint32_t thread = threadIdx.x % 128;
  const uint32_t column = first_column + thread % 8 * kVector;
  if (column >= args.hidden) return;
  for (uint32_t token = thread / 8; token < args.num_tokens; token += 16) {
    float sum[kVector] = {};
#pragma unroll 8
    for (uint32_t k = 0; k < args.topk; ++k) {
      const uint32_t row = static_cast<uint32_t>(args.inverse[token * args.topk + k]);
      const float weight = args.weights[token * args.topk + k];
      if (row >= args.num_rows) continue;
      float value[kVector];
      // Other blocks wrote it: past the first-level cache.
      unpack(value, __ldcg(reinterpret_cast<const uint4*>(args.y + uint64_t{row} * args.hidden + column)));
#pragma unroll
      for (uint32_t i = 0; i < kVector; ++i) sum[i] = fmaf(weight, value[i], sum[i]);
    }
    *reinterpret_cast<uint4*>(args.out + uint64_t{token} * args.hidden + column) = pack(sum);
  }
}

}  // namespace anabranch::experts
