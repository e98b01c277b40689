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

// A warp's shared memory for the choice.
struct alignas(16) Scratch {
  uint64_t key[kWarpSize];     // the candidates, larger ones before smaller ones
  uint16_t expert[kWarpSize];  // the candidates' ids
};
static_assert(sizeof(Scratch) == 4 * kScratchWords);

// Orders candidates: larger values first, then lower experts. No key is 0.
__device__ __forceinline__ uint64_t candidate_key(float value, uint32_t expert) {
  return static_cast<uint64_t>(ordered_key(value)) << 32 | (0xffffffffu - expert);
}

// The `topk`-th largest of the lanes' values, equal ones counting once; the least of them where there are fewer.
__device__ __forceinline__ float nth_largest(float value, uint32_t topk) {
  uint32_t key = ordered_key(value);
  uint32_t bound = 0;
#pragma unroll 8
  for (uint32_t round = 0; round < topk; ++round) {
    const uint32_t largest = __reduce_max_sync(kFullWarp, key);
    if (largest != 0) bound = largest;
    if (key == largest) key = 0;
  }
  return from_ordered_key(bound);
}

// The number of the first `total` keys before this lane's; kUnranked in lanes that hold no candidate.
__device__ __forceinline__ uint32_t rank_candidates(uint64_t key, uint32_t lane, uint32_t total, uint64_t* shared) {
  shared[lane] = lane < total ? key : 0;
  __syncwarp();
  uint32_t rank = 0;
  for (uint32_t i = 0; i < total; i += 4) {  // 0 past the last: before no one
    const ulonglong2 two = *reinterpret_cast<const ulonglong2*>(shared + i);
    const ulonglong2 more = *reinterpret_cast<const ulonglong2*>(shared + i + 2);
    rank += two.x > key;
    rank += two.y > key;
    rank += more.x > key;
    rank += more.y > key;
  }
  return lane < total ? rank : kUnranked;
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
    return {lane, rank_candidates(candidate_key(value[0], lane), lane, args.num_experts, scratch->key)};
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
  return {expert, rank_candidates(candidate_key(row[expert], expert), lane, total, scratch->key)};
}

}  // namespace anabranch::router
