// Group-limited routing: experts outside a token's best groups are masked with minus infinity (DeepSeek-V2
// section 2.2.2, DeepSeek-V3's noaux_tc).
#pragma once

#include "common/warp.cuh"
#include "router/args.cuh"

namespace anabranch::router {

// The two largest values seen.
struct Best {
  float first = -INFINITY;
  float second = -INFINITY;

  __device__ __forceinline__ void add(float value) {
    second = fmaxf(second, fminf(first, value));
    first = fmaxf(first, value);
  }

  __device__ __forceinline__ void merge(float other_first, float other_second) {
    second = fmaxf(fminf(first, other_first), fmaxf(second, other_second));
    first = fmaxf(first, other_first);
  }

  // The group's score; infinities of both signs count as minus infinity.
  __device__ __forceinline__ float score(bool top2_sum) const {
    return top2_sum ? fmaxf(first + second, -INFINITY) : first;
  }
};

// Whether group a is chosen before group b.
__device__ __forceinline__ bool before(float score_a, uint32_t a, float score_b, uint32_t b) {
  return score_a > score_b || (score_a == score_b && a < b);
}

// Groups that lie in whole lanes, a power of two of them each: no shared memory. The lanes of a group share out the
// comparisons with the other groups.
template <int kValues>
__device__ __forceinline__ void limit_aligned(const Groups& groups, float (&value)[kValues], uint32_t lane) {
  Best best;
#pragma unroll
  for (int i = 0; i < kValues; ++i) best.add(value[i]);
  for (uint32_t step = 1; step < groups.lanes; step *= 2) {
    const float first = __shfl_xor_sync(kFullWarp, best.first, step);
    best.merge(first, __shfl_xor_sync(kFullWarp, best.second, step));
  }
  const float score = best.score(groups.top2_sum);
  const uint32_t member = lane & (groups.lanes - 1);
  const uint32_t own = (lane - member) / groups.lanes;
  uint32_t better = 0;
  for (uint32_t base = 0; base < groups.count; base += groups.lanes) {
    const uint32_t other = base + member;
    const float other_score = __shfl_sync(kFullWarp, score, other * groups.lanes);
    better += other < groups.count && before(other_score, other, score, own);
  }
  for (uint32_t step = 1; step < groups.lanes; step *= 2) better += __shfl_xor_sync(kFullWarp, better, step);
  if (better < groups.kept) return;
#pragma unroll
  for (int i = 0; i < kValues; ++i) value[i] = -INFINITY;
}

// Any groups. `row` and `score` are this warp's shared memory; row[e] holds expert e's value.
template <int kValues>
__device__ void limit_any(const Groups& groups, float (&value)[kValues], uint32_t lane, const float* row,
                          float* score) {
  for (uint32_t group = lane; group < groups.count; group += kWarpSize) {
    Best best;
    for (uint32_t i = 0; i < groups.size; ++i) best.add(row[group * groups.size + i]);
    score[group] = best.score(groups.top2_sum);
  }
  __syncwarp();
  uint32_t kept = 0;  // bit i: group lane + 32 i
  for (uint32_t group = lane, bit = 0; group < groups.count; group += kWarpSize, ++bit) {
    uint32_t better = 0;
    for (uint32_t other = 0; other < groups.count; ++other) better += before(score[other], other, score[group], group);
    kept |= static_cast<uint32_t>(better < groups.kept) << bit;
  }
  __syncwarp();
  for (uint32_t group = lane, bit = 0; group < groups.count; group += kWarpSize, ++bit) {
    score[group] = kept >> bit & 1 ? 1.0f : 0.0f;
  }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    const uint32_t group = (lane * kValues + i) * groups.reciprocal >> 21;
    if (group < groups.count && score[group] == 0.0f) value[i] = -INFINITY;
  }
  __syncwarp();
}

}  // namespace anabranch::router
