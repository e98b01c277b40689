// Capacity: an expert accepts only so many tokens, slot 0 of every token before slot 1 of any, tokens in order (GShard,
// arXiv 2006.16668, algorithm 1). What comes too late gets id -1 and weight 0.
//
// One block an expert; those within capacity, most of them, return at once. An overfull one reads all ids twice: first
// it counts its tokens slot by slot, which tells in which slot the last place goes; then it drops every later slot, and
// of that one all but the first tokens, in order. Integer counts only: the result does not depend on timing.
#pragma once

#include "common/warp.cuh"

namespace anabranch::router {

constexpr uint32_t kDropThreads = 512;
constexpr uint32_t kMaxSlots = 32;

__global__ void __launch_bounds__(kDropThreads) drop_overflow(int32_t* ids, float* weights, uint32_t* counts,
                                                              uint32_t num_slots, uint32_t topk, uint32_t capacity) {
  const uint32_t expert = blockIdx.x;
  if (counts[expert] <= capacity) return;
  constexpr uint32_t kWarps = kDropThreads / kWarpSize;
  __shared__ uint32_t per_slot[kMaxSlots];
  __shared__ uint32_t per_warp[kWarps];
  const uint32_t lane = threadIdx.x % kWarpSize;
  const uint32_t warp = threadIdx.x / kWarpSize;
  if (threadIdx.x < kMaxSlots) per_slot[threadIdx.x] = 0;
  __syncthreads();
  // Other blocks turn their experts' ids into -1 meanwhile: neither value is this block's expert. Ids are read past the
  // first cache, which would not see them change.
  for (uint32_t at = threadIdx.x; at < num_slots; at += kDropThreads) {
    if (__ldcg(ids + at) == static_cast<int32_t>(expert)) atomicAdd(per_slot + at % topk, 1u);
  }
  __syncthreads();
  uint32_t last = 0;         // the slot that holds the last place
  uint32_t room = capacity;  // places left for that slot
  while (per_slot[last] <= room) room -= per_slot[last++];

  for (uint32_t base = 0; base < num_slots; base += kDropThreads) {
    const uint32_t at = base + threadIdx.x;
    const bool mine = at < num_slots && __ldcg(ids + at) == static_cast<int32_t>(expert);
    const uint32_t slot = at % topk;
    const bool waits = mine && slot == last;
    bool dropped = mine && slot > last;
    if (__syncthreads_or(waits)) {
      const uint32_t waiting = __ballot_sync(kFullWarp, waits);
      if (lane == 0) per_warp[warp] = __popc(waiting);
      __syncthreads();
      uint32_t earlier = 0;
      uint32_t all = 0;
      for (uint32_t i = 0; i < kWarps; ++i) {
        if (i < warp) earlier += per_warp[i];
        all += per_warp[i];
      }
      earlier += __popc(waiting & ((1u << lane) - 1));
      dropped |= waits && earlier >= room;
      room -= min(room, all);
    }
    if (dropped) {
      ids[at] = -1;
      weights[at] = 0.0f;
    }
  }
  if (threadIdx.x == 0) counts[expert] = capacity;
}

}  // namespace anabranch::router
