// The producers: a warp that brings weights with the copy engine, and three that gather tokens. They meet in the full
// barriers only, so that weights run ahead while tokens wait for another block's part of h.
#pragma once

#include "experts/pipeline.cuh"
#include "ptx/cp_async.cuh"
#include "ptx/gpu_scope.cuh"
#include "ptx/tensor_copy.cuh"
#include "ptx/warpgroup.cuh"

namespace anabranch::experts {

__device__ __forceinline__ uint32_t steps_of(const Args& args, uint32_t phase) {
  return ((phase == 0 ? args.hidden : args.intermediate) + kDepth - 1) / kDepth;
}

// Takes items in turn from all blocks' common counter, so that no block waits for one that does not run, tells the
// others in this block, and loads each item's weights. One whole warp.
template <uint32_t kRows>
__device__ __forceinline__ void bring_weights(const Args& args, const Schedule& schedule, const Pipeline& pipeline) {
  constexpr uint32_t kWeightBytes = kRows * kRowBytes;
  const uint32_t lane = threadIdx.x;
  Position stage;
  Position queue;
  uint32_t number = 0;
  if (lane == 0) number = atomicAdd(args.next_item, 1u);
  while (true) {
    const Item item = schedule.at(__shfl_sync(kFullWarp, number, 0));
    if (lane == 0) {
      wait(pipeline.item_empty + 8 * queue.index, queue.parity ^ 1);
      pipeline.items[queue.index] = item;
      ptx::mbarrier_arrive(pipeline.item_full + 8 * queue.index);
    }
    queue.advance(kQueue);
    if (item.phase == kNoItem) return;
    if (lane == 0) {
      // The next item's number is on its way while this one's weights are.
      number = atomicAdd(args.next_item, 1u);
      const CUtensorMap* map = item.phase == 0 ? &args.gate_up : &args.down;
      const uint32_t steps = steps_of(args, item.phase);
      for (uint32_t step = 0; step < steps; ++step) {
        const uint32_t full = pipeline.full + 8 * stage.index;
        wait(pipeline.empty + 8 * stage.index, stage.parity ^ 1);
        ptx::mbarrier_arrive_expect(full, kWeightBytes);
        ptx::tensor_copy_5d(pipeline.stages + stage.index * pipeline.stage_bytes, map, full, step * kDepth, 0, 0,
                            item.weight_tile * (kRows / 16), item.expert);
        stage.advance(args.stages);
      }
    }
    __syncwarp();
  }
}

// Loads each item's tokens: rows of x picked by the permutation, or rows of h once they are written. Thread t copies
// chunk t % 8 (8 elements) of row t / 8 of every 12. Rows past the tile's last hold anything: what a product makes of
// them is not stored.
template <uint32_t kRows, uint32_t kGroups>
__device__ __forceinline__ void gather_tokens(const Args& args, const Pipeline& pipeline) {
  constexpr uint32_t kWeightBytes = kRows * kRowBytes;
  constexpr uint32_t kRowsPerPass = kGatherThreads / 8;
  const uint32_t thread = threadIdx.x - kWarpSize;
  const uint32_t lane = threadIdx.x % kWarpSize;
  const uint32_t chunk = thread % 8;
  const uint32_t first = thread / 8;
  Position stage;
  Position queue;
  while (true) {
    wait(pipeline.item_full + 8 * queue.index, queue.parity);
    const Item item = pipeline.items[queue.index];
    __syncwarp();
    if (lane == 0) ptx::mbarrier_arrive(pipeline.item_empty + 8 * queue.index);
    queue.advance(kQueue);
    if (item.phase == kNoItem) break;

    const uint32_t width = item.phase == 0 ? args.hidden : args.intermediate;
    const uint16_t* base = item.phase == 0 ? args.x : args.h;
    // Nobody copies the tile before any more.
    ptx::named_barrier(kGatherBarrier, kGatherThreads);
    for (uint32_t i = thread; i < item.rows; i += kGatherThreads) {
      const uint32_t row = item.first_row + i;
      // A slot that leads nowhere reads the first token: its row is not one of a token's.
      uint32_t source = row;
      if (item.phase == 0) {
        source = args.slots[row] / args.topk;
        if (source >= args.num_tokens) source = 0;
      }
      pipeline.rows[i] = source * (width / 8);
    }
    if (item.phase == 1) {
      const uint32_t all = args.gate_tiles * kGroups;
      if (lane == 0) {
        while (ptx::ld_acquire(args.gated + item.token_tile) < all) {
        }
      }
    }
    ptx::named_barrier(kGatherBarrier, kGatherThreads);

    const uint32_t steps = steps_of(args, item.phase);
    const char* from = reinterpret_cast<const char*>(base) + chunk * 16;
    const uint32_t chunks = width / 8;
    for (uint32_t step = 0; step < steps; ++step) {
      const uint32_t full = pipeline.full + 8 * stage.index;
      wait(pipeline.empty + 8 * stage.index, stage.parity ^ 1);
      const bool inside = step * 8 + chunk < chunks;
      uint32_t to = pipeline.stages + stage.index * pipeline.stage_bytes + kWeightBytes;
#pragma unroll 4
      for (uint32_t row = first; row < item.rows; row += kRowsPerPass) {
        ptx::cp_async_16(to + row * kRowBytes + (chunk ^ row % 8) * 16, from + uint64_t{pipeline.rows[row]} * 16,
                         inside);
      }
      ptx::mbarrier_arrive_after_copies(full);
      from += kRowBytes;
      stage.advance(args.stages);
    }
  }
  // Copies may still be on their way to shared memory that is about to be another block's.
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
}

}  // namespace anabranch::experts
