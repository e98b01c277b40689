// Top-k of a row that a warp holds, ties to the lower expert.
//
// Lane l holds experts l * kValues and following, so the order of lanes, then of values, is the order of experts. A
// top-k that finds one maximum after another would scan all values K times. Instead:
//   1. the K-th largest of the lanes' maxima is a bound: K values reach it, so every one of the top K does;
//   2. the values that reach it, about K + K^2/64 of random ones, move to one lane each, in expert order;
//   3. K rounds among those lanes rank them.
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

// The place of each lane's key among the `topk` largest; equal keys rank by lane. At least `topk` keys are not 0.
__device__ __forceinline__ uint32_t rank_lanes(uint32_t key, uint32_t lane, uint32_t topk) {
  uint32_t rank = kUnranked;
  const uint32_t bit = 1u << lane;
  for (uint32_t round = 0; round < topk; ++round) {
    const uint32_t best = __reduce_max_sync(kFullWarp, key);
    const uint32_t winners = __ballot_sync(kFullWarp, key == best);
    if ((winners & (0u - winners)) == bit) {
      rank = round;
      key = 0;
    }
  }
  return rank;
}

// The `topk`-th largest of the lanes' keys, none of which is 0.
__device__ __forceinline__ uint32_t nth_largest(uint32_t key, uint32_t topk) {
  uint32_t largest;
  uint32_t reached = 0;
  do {
    largest = __reduce_max_sync(kFullWarp, key);
    reached += __popc(__ballot_sync(kFullWarp, key == largest));
    if (key == largest) key = 0;
  } while (reached < topk);
  return largest;
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

// `row` (holding all values once more) and `candidates` are this warp's shared memory. The caller separates tokens by a
// __syncwarp().
template <int kValues>
__device__ __forceinline__ Choice choose(const float (&value)[kValues], uint32_t lane, uint32_t topk, const float* row,
                                         uint16_t* candidates) {
  if constexpr (kValues == 1) return {lane, rank_lanes(ordered_key(value[0]), lane, topk)};
  float head = value[0];
#pragma unroll
  for (int i = 1; i < kValues; ++i) head = fmaxf(head, value[i]);
  const float bound = from_ordered_key(nth_largest(ordered_key(head), topk));
  uint32_t reaching = 0;
#pragma unroll
  for (int i = 0; i < kValues; ++i) reaching |= static_cast<uint32_t>(value[i] >= bound) << i;
  const uint32_t count = __popc(reaching);
  const uint32_t through = warp_inclusive_sum(count, lane);
  const uint32_t total = __shfl_sync(kFullWarp, through, kWarpSize - 1);
  if (total > kWarpSize) return choose_in_turn<kValues>(row, lane, topk);
  for (uint16_t* to = candidates + through - count; reaching != 0; reaching &= reaching - 1, ++to) {
    *to = static_cast<uint16_t>(lane * kValues + __ffs(static_cast<int>(reaching)) - 1);
  }
  __syncwarp();
  const bool candidate = lane < total;
  const uint32_t expert = candidate ? candidates[lane] : 0;
  return {expert, rank_lanes(candidate ? ordered_key(row[expert]) : 0, lane, topk)};
}

}  // namespace anabranch::router
