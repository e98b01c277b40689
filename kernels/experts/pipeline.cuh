// How the roles of a block hand stages and items to each other.
#pragma once

#include "common/ring.cuh"
#include "experts/schedule.cuh"
#include "ptx/mbarrier.cuh"

namespace anabranch::experts {

// Warps that load tokens: the first warpgroup without its first warp, which brings the weights.
constexpr uint32_t kTokenWarps = 3;

// Numbers of the block's named barriers; 0 is __syncthreads'.
constexpr uint32_t kGroupBarrier = 1;  // and following, one a consumer warpgroup

// Shared memory, by 32-bit address. Stages begin on 1024 bytes, as the swizzle wants: panels of weights, then panels of
// tokens.
template <class Shape>
struct Pipeline {
  uint32_t panel_bytes;  // of tokens
  uint32_t stage_bytes;
  uint32_t stages;      // address of the first
  uint32_t outs;        // [groups]: results on their way out
  uint32_t full;        // [stages]: weights and tokens are there
  uint32_t empty;       // [stages]: every consumer warpgroup is done
  uint32_t item_full;   // [kQueue]
  uint32_t item_empty;  // [kQueue]: every thread that reads it has
  Item* items;          // [kQueue]
  uint32_t* words;      // the schedule's
  uint32_t* scratch;    // the stages, while nothing else is in them
  // The permutation, in shared memory if it is the block's own.
  uint32_t* offsets;  // [E + 1]
  uint32_t* slots;    // [R]
  int32_t* inverse;   // [T, K]

  __device__ __forceinline__ Pipeline(char* shared, const Args& args) {
    panel_bytes = args.token_tile * kRowBytes;
    stage_bytes = Shape::kPanels * (Shape::kPanelBytes + panel_bytes);
    stages = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    uint32_t used = args.stages * stage_bytes;
    outs = stages + used;
    used += Shape::kGroups * kOutBytes;
    items = reinterpret_cast<Item*>(shared + used);
    used += kQueue * sizeof(Item);
    item_full = stages + used;
    item_empty = item_full + 8 * kQueue;
    full = item_empty + 8 * kQueue;
    empty = full + 8 * args.stages;
    used += 8 * (2 * kQueue + 2 * args.stages);
    words = reinterpret_cast<uint32_t*>(shared + used);
    scratch = reinterpret_cast<uint32_t*>(shared);
    offsets = args.pairs.offsets;
    slots = args.pairs.slots;
    inverse = args.pairs.inverse;
    if (Shape::kMayBeAlone && args.places) {
      offsets = words;
      slots = words + 2 * (args.num_experts + 1);
      inverse = reinterpret_cast<int32_t*>(slots + args.num_rows);
    }
  }

  // One thread calls, before anybody waits.
  __device__ __forceinline__ void init(uint32_t num_stages) const {
    for (uint32_t i = 0; i < num_stages; ++i) {
      ptx::mbarrier_init(full + 8 * i, 2);  // the weights' warp and one of the tokens'
      ptx::mbarrier_init(empty + 8 * i, Shape::kGroups);
    }
    for (uint32_t i = 0; i < kQueue; ++i) {
      ptx::mbarrier_init(item_full + 8 * i, 1);
      ptx::mbarrier_init(item_empty + 8 * i, (kTokenWarps + 4 * Shape::kGroups) * kWarpSize);
    }
    ptx::fence_mbarrier_init();
  }
};
static_assert(sizeof(Item) == 32);

}  // namespace anabranch::experts
