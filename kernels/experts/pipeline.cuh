// How the roles of a block hand stages and items to each other.
#pragma once

#include "experts/schedule.cuh"
#include "ptx/mbarrier.cuh"

namespace anabranch::experts {

// Threads that gather rows of tokens: the first warpgroup without its first warp, which brings the weights.
constexpr uint32_t kGatherWarps = 3;
constexpr uint32_t kGatherThreads = kGatherWarps * kWarpSize;

// Numbers of the block's named barriers; 0 is __syncthreads'.
constexpr uint32_t kGatherBarrier = 1;
constexpr uint32_t kGroupBarrier = 2;  // and following, one a consumer warpgroup

__device__ __forceinline__ void wait(uint32_t barrier, uint32_t parity) {
  while (!ptx::mbarrier_try_wait(barrier, parity)) {
  }
}

// Where a role is in a ring of stages: which one, and how often it has been around, by parity.
struct Position {
  uint32_t index = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance(uint32_t length) {
    if (++index == length) {
      index = 0;
      parity ^= 1;
    }
  }
};

// Shared memory, by 32-bit address. Stages begin on 1024 bytes, as the swizzle wants.
struct Pipeline {
  uint32_t stage_bytes;
  uint32_t stages;      // address of the first
  uint32_t full;        // [stages]: weights and tokens are there
  uint32_t empty;       // [stages]: every consumer warpgroup is done
  uint32_t item_full;   // [kQueue]
  uint32_t item_empty;  // [kQueue]
  Item* items;          // [kQueue]
  uint32_t* rows;       // [kMostTokens]: where a tile's gathered rows begin, in 16 bytes
  uint32_t* words;      // the schedule's
  uint32_t* last;       // [groups]: whether a warpgroup is the last of its columns

  __device__ __forceinline__ Pipeline(char* shared, const Args& args, uint32_t weight_rows) {
    stage_bytes = (weight_rows + args.token_tile) * kRowBytes;
    stages = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    const uint32_t behind = args.stages * stage_bytes;
    items = reinterpret_cast<Item*>(shared + behind);
    rows = reinterpret_cast<uint32_t*>(items + kQueue);
    last = rows + kMostTokens;
    item_full = stages + behind + kQueue * sizeof(Item) + 4 * (kMostTokens + 4);
    item_empty = item_full + 8 * kQueue;
    full = item_empty + 8 * kQueue;
    empty = full + 8 * args.stages;
    words = last + 4 + 2 * (2 * kQueue + 2 * args.stages);
  }

  // One thread calls, before anybody waits.
  __device__ __forceinline__ void init(uint32_t num_stages, uint32_t groups) const {
    for (uint32_t i = 0; i < num_stages; ++i) {
      ptx::mbarrier_init(full + 8 * i, 1 + kGatherThreads);
      ptx::mbarrier_init(empty + 8 * i, groups);
    }
    for (uint32_t i = 0; i < kQueue; ++i) {
      ptx::mbarrier_init(item_full + 8 * i, 1);
      ptx::mbarrier_init(item_empty + 8 * i, kGatherWarps + groups);
    }
    ptx::fence_mbarrier_init();
  }
};
static_assert(sizeof(Item) == 32);

}  // namespace anabranch::experts
