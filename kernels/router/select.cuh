// Top-k of a row that a warp holds, ties to the lower expert.
//
// A top-k that finds one maximum after another would scan all values K times. Instead:
//   1. the K-th largest of the lanes' maxima is a bound: K values reach it, so every one of the top K does;
//   2. the values that reach it, about K + K^2/64 of random ones, move to one lane each;
//   3. a candidate's place is the number of candidates before it.
// Where more than 32 values reach the bound (many ties, or K near 32), one maximum after another is found after all.
#pragma once

#include "common/warp.cuh"
#include "router/args.cuh"

namespace anabranch::router {

constexpr uint32_t kUnranked = 0xffffffffu;

// A lane's part in the choice: an expert and its place, or kUnranked.
struct Choice {
  uint32_t expert;
  uint32_t rank;
};

// A warp's shared memory for the choice: the candidates.
struct alignas(16) Scratch {
  float value[kWarpSize];
  uint16_t expert[kWarpSize];
};
static_assert(sizeof(Scratch) == 4 * kScratchWords);

// The `topk`-th largest of the lanes' values, equal ones counting once; minus infinity where there are fewer.
__device__ __forceinline__ float nth_largest(float value, uint32_t topk) {
  uint32_t key = ordered_key(value);
  uint32_t largest = 0;
#pragma unroll 8
  for (uint32_t round = 0; round < topk; ++round) {
    largest = __reduce_max_sync(kFullWarp, key);
    if (key == largest) key = 0;
  }
  return largest != 0 ? from_ordered_key(largest) : -INFINITY;
}

// This lane's place among the first `total` lanes' candidates, larger values first, then lower experts; kUnranked in
// lanes that hold none. `expert` of the scratch is set.
__device__ __forceinline__ uint32_t rank_candidates(float value, uint32_t expert, uint32_t lane, uint32_t total,
                                                    Scratch* scratch) {
  const bool candidate = lane < total;
  scratch->value[lane] = candidate ? value : -INFINITY;
  __syncwarp();
  uint32_t rank = 0;
#pragma unroll 1
  for (uint32_t i = 0; i < total; i += 4) {
    const float4 other = *reinterpret_cast<const float4*>(scratch->value + i);
    if (other.x > value) ++rank;
    if (other.y > value) ++rank;
    if (other.z > value) ++rank;
    if (other.w > value) ++rank;
  }
  // Places that differ add up to this; equal values share a place, and then the experts decide.
  if (__reduce_add_sync(kFullWarp, candidate ? rank : 0) != total * (total - 1) / 2) {
    for (uint32_t i = 0; i < total; ++i) {
      if (scratch->value[i] == value && scratch->expert[i] < expert) ++rank;
    }
  }
  return candidate ? rank : kUnranked;
}

// One maximum after another: lane r gets the expert of rank r.
template <int kValues>
__device__ __noinline__ Choice choose_in_turn(const float* row, uint32_t lane, uint32_t topk) {
  uint32_t taken = 0;  // bit i: this lane's value i
  Choice choice = {0, kUnranked};
  for (uint32_t round = 0; round < topk; ++round) {
    uint32_t best = 0;
    uint32_t best_at = 0;
    for (uint32_t i = 0; i < kValues; ++i) {
      const uint32_t key = ordered_key(row[lane * kValues + i]);
      if ((taken >> i & 1) == 0 && key > best) best = key, best_at = i;
    }
    const uint32_t largest = __reduce_max_sync(kFullWarp, best);
    const uint32_t winner = __ffs(static_cast<int>(__ballot_sync(kFullWarp, best == largest))) - 1;
    if (lane == winner) taken |= 1u << best_at;
    const uint32_t expert = __shfl_sync(kFullWarp, lane * kValues + best_at, winner);
    if (lane == round) choice = {expert, round};
  }
  return choice;
}

// `row`, holding all values once more, and `scratch` are this warp's shared memory. The caller separates tokens by a
// __syncwarp().
template <int kValues>
__device__ __forceinline__ Choice choose(const float (&value)[kValues], uint32_t lane, const Args& args,
                                         const float* row, Scratch* scratch) {
  if constexpr (kValues == 1) {
    scratch->expert[lane] = static_cast<uint16_t>(lane);
    return {lane, rank_candidates(value[0], lane, lane, args.num_experts, scratch)};
  }
  float head = value[0];
#pragma unroll
  for (int i = 1; i < kValues; ++i) head = fmaxf(head, value[i]);
  const float bound = nth_largest(head, args.topk);
  uint32_t reaching = 0;
#pragma unroll
  for (int i = 0; i < kValues; ++i) reaching |= static_cast<uint32_t>(value[i] >= bound) << i;
  // Each round moves one value of every lane that has any left.
  uint32_t total = 0;
  const uint32_t before = (1u << lane) - 1;
  while (const uint32_t holders = __ballot_sync(kFullWarp, reaching != 0)) {
    const uint32_t to = total + __popc(holders & before);
    if (reaching != 0 && to < kWarpSize) {
      scratch->expert[to] = static_cast<uint16_t>(lane * kValues + __ffs(static_cast<int>(reaching)) - 1);
    }
    reaching &= reaching - 1;
    total += __popc(holders);
  }
  if (total > kWarpSize) return choose_in_turn<kValues>(row, lane, args.topk);
  __syncwarp();
  const uint32_t expert = lane < total ? scratch->expert[lane] : 0;
  return {expert, rank_candidates(row[expert], expert, lane, total, scratch)};
}

}  // namespace anabranch::router
