// Puts the splits of a row together; attention.cu says what it computes.
#pragma once

#include "attention/args.cuh"
#include "common/warp.cuh"
#include "ptx/convert.cuh"
#include "ptx/grid_dependency.cuh"
#include "ptx/math.cuh"

namespace anabranch::attention {

constexpr uint32_t kMergeThreads = 256;
// Elements of a row that a block takes: four a lane.
constexpr uint32_t kMergeColumns = 4 * kWarpSize;

// Grid: x rows of out, y every kMergeColumns of their elements. Warp w takes the splits w, w + 8, w + 16, ...; what the
// warps found is added in their order. With few rows it is the blocks and loads under way that bound the time.
__global__ void __launch_bounds__(kMergeThreads) merge(const __grid_constant__ Args args) {
  ptx::launch_dependents();
  ptx::wait_for_prerequisites();
  constexpr uint32_t kWarps = kMergeThreads / kWarpSize;
  __shared__ float weights[kMaxSplits];
  __shared__ float4 found[kWarps][kWarpSize];
  const uint32_t row = blockIdx.x;
  const uint32_t token = row / args.num_heads;
  if (token < args.q_offsets[0] || token >= args.q_offsets[args.num_sequences]) return;

  const uint64_t rows = static_cast<uint64_t>(args.num_tokens) * args.num_heads;
  const uint32_t lane = threadIdx.x % kWarpSize;
  const uint32_t warp = threadIdx.x / kWarpSize;
  // Every warp finds the same.
  float largest = -INFINITY;
  for (uint32_t split = lane; split < args.splits; split += kWarpSize) {
    largest = fmaxf(largest, args.partial_weights[split * rows + row].x);
  }
#pragma unroll
  for (uint32_t step = kWarpSize / 2; step > 0; step /= 2) {
    largest = fmaxf(largest, __shfl_xor_sync(kFullWarp, largest, step));
  }
  const float base = largest == -INFINITY ? 0.0f : largest;
  float total = 0.0f;
  for (uint32_t split = lane; split < args.splits; split += kWarpSize) {
    const float2 part = args.partial_weights[split * rows + row];
    const float weight = ptx::ex2_approx(part.x - base);
    total += weight * part.y;
    if (warp == 0) weights[split] = weight;
  }
  const float inverse = 1.0f / warp_sum(total);
  __syncthreads();

  const uint32_t columns = args.value_dim / 4;
  const uint32_t column = blockIdx.y * kWarpSize + lane;
  float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  if (column < columns) {
    const float4* sums = reinterpret_cast<const float4*>(args.partial_sums) + column;
#pragma unroll 8
    for (uint32_t split = warp; split < args.splits; split += kWarps) {
      const float weight = weights[split];
      // Where a weight is NaN the total is, too.
      if (!(weight > 0.0f)) continue;
      const float4 part = sums[(split * rows + row) * columns];
      sum.x += weight * part.x, sum.y += weight * part.y, sum.z += weight * part.z, sum.w += weight * part.w;
    }
  }
  found[warp][lane] = sum;
  __syncthreads();
  if (warp > 0 || column >= columns) return;
#pragma unroll
  for (uint32_t i = 1; i < kWarps; ++i) {
    const float4 part = found[i][lane];
    sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
  }
  reinterpret_cast<uint2*>(args.out)[static_cast<uint64_t>(row) * columns + column] =
      make_uint2(ptx::cvt_bf16x2(sum.x * inverse, sum.y * inverse), ptx::cvt_bf16x2(sum.z * inverse, sum.w * inverse));
}

}  // namespace anabranch::attention
