// The producers: a warp that brings weights with the copy engine, and three that gather tokens. They meet in the full
// barriers only, so that weights run ahead while tokens wait for another block's part of h.
#pragma once

#include "experts/pipeline.cuh"
#include "ptx/cp_async.cuh"
#include "ptx/gpu_scope.cuh"
#include "ptx/tensor_copy.cuh"
#include "ptx/warpgroup.cuh"

namespace anabranch::experts {

template <class Shape>
__device__ __forceinline__ uint32_t steps_of(const Args& args, const Item& item) {
  constexpr uint32_t kColumns = Shape::kPanels * kDepth;
  return ((item.phase == kGate ? args.hidden : args.intermediate) + kColumns - 1) / kColumns;
}

// One whole warp: takes items, tells the others in this block, and loads each item's weights.
template <class Shape>
class WeightLoader {
 public:
  __device__ __forceinline__ WeightLoader(const Args& args, const Pipeline<Shape>& pipeline)
      : args_(args), pipeline_(pipeline) {}

  __device__ __forceinline__ void run() {
    Schedule schedule(args_, pipeline_.words);
    ask();
    schedule.read(pipeline_.offsets);
    Item item;
    do {
      item = schedule.at(__shfl_sync(kFullWarp, number_, 0));
      load(item);
    } while (item.phase != kNoItem);
  }

 private:
  // Items come in turn from all blocks' common counter, so that no block waits for one that does not run.
  __device__ __forceinline__ void ask() {
    if (threadIdx.x == 0) number_ = atomicAdd(args_.next_item, 1u);
  }

  __device__ __forceinline__ void load(const Item& item) {
    if (threadIdx.x == 0) {
      wait(pipeline_.item_empty + 8 * queue_.index, queue_.parity ^ 1);
      pipeline_.items[queue_.index] = item;
      ptx::mbarrier_arrive(pipeline_.item_full + 8 * queue_.index);
    }
    queue_.advance(kQueue);
    if (item.phase == kNoItem) return;
    // The next item's number is on its way while this one's weights are.
    ask();
    if (threadIdx.x == 0 && item.phase != kSum) load_weights(item);
    __syncwarp();
  }

  __device__ __forceinline__ void load_weights(const Item& item) {
    const uint32_t steps = steps_of<Shape>(args_, item);
    uint32_t column = 0;
    for (uint32_t step = 0; step < steps; ++step) {
      const uint32_t full = pipeline_.full + 8 * stage_.index;
      wait(pipeline_.empty + 8 * stage_.index, stage_.parity ^ 1);
      ptx::mbarrier_arrive_expect(full, Shape::kPanels * Shape::kPanelBytes);
      uint32_t to = pipeline_.stages + stage_.index * pipeline_.stage_bytes;
#pragma unroll
      for (uint32_t panel = 0; panel < Shape::kPanels; ++panel) {
        if (item.phase == kGate) {
          ptx::tensor_copy_5d(to, &args_.gate_up, full, column, 0, 0, item.weight_tile * (Shape::kRows / 16),
                              item.expert);
        } else {
          ptx::tensor_copy_3d(to, &args_.down, full, column, item.weight_tile * Shape::kRows, item.expert);
        }
        column += kDepth;
        to += Shape::kPanelBytes;
      }
      stage_.advance(args_.stages);
    }
  }

  const Args& args_;
  const Pipeline<Shape>& pipeline_;
  Position stage_;
  Position queue_;
  uint32_t number_ = 0;
};

// Three warps load tokens, each every third stage: a warp waits for its copies to arrive while the others issue theirs.
// One arrival announces a stage; one of each thread would cost shared memory more than the copies do.
template <class Shape>
class TokenLoader {
 public:
  __device__ __forceinline__ TokenLoader(const Args& args, const Pipeline<Shape>& pipeline)
      : args_(args), pipeline_(pipeline), turn_(threadIdx.x / kWarpSize - 1) {}

  __device__ __forceinline__ void run() {
    Position queue;
    while (true) {
      wait(pipeline_.item_full + 8 * queue.index, queue.parity);
      const Item item = pipeline_.items[queue.index];
      ptx::mbarrier_arrive(pipeline_.item_empty + 8 * queue.index);
      __syncwarp();
      queue.advance(kQueue);
      if (item.phase == kNoItem) return;
      if (item.phase == kGate) gather(item);
      if (item.phase == kDown) bring_gated(item);
    }
  }

 private:
  static constexpr uint32_t kLanesARow = 4;
  static constexpr uint32_t kRowsAtOnce = kWarpSize / kLanesARow;
  static constexpr uint32_t kRowsALane = Shape::kMost / kRowsAtOnce;

  __device__ __forceinline__ static uint32_t lane() { return threadIdx.x % kWarpSize; }

  // Calls `load(step, full barrier, address of the stage's tokens)` for those of the item's steps that are this warp's,
  // once their stage is free.
  template <class Load>
  __device__ __forceinline__ void for_my_steps(const Item& item, const Load& load) {
    const uint32_t steps = steps_of<Shape>(args_, item);
    for (uint32_t step = 0; step < steps; ++step) {
      if (turn_ == 0) {
        wait(pipeline_.empty + 8 * stage_.index, stage_.parity ^ 1);
        // A lane that fell behind by a turn of the ring would take the barrier's phase for the one before.
        __syncwarp();
        load(step, pipeline_.full + 8 * stage_.index,
             pipeline_.stages + stage_.index * pipeline_.stage_bytes + Shape::kPanels * Shape::kPanelBytes);
      }
      turn_ = turn_ == 0 ? kTokenWarps - 1 : turn_ - 1;
      stage_.advance(args_.stages);
    }
  }

  // Rows of x that the permutation picks. Four lanes copy a row's 128 bytes in two halves, eight rows at once: a lane
  // then has few rows to remember, and always the same place in the swizzle's eight. Rows past the tile's last hold
  // anything: what a product makes of them is not stored.
  __device__ __forceinline__ void gather(const Item& item) {
    // Where each row begins, in 16 bytes.
    uint32_t begin[kRowsALane];
#pragma unroll
    for (uint32_t i = 0; i < kRowsALane; ++i) {
      const uint32_t row = i * kRowsAtOnce + lane() / kLanesARow;
      const uint32_t token = row < item.rows ? pipeline_.slots[item.first_row + row] / args_.topk : 0;
      // A slot that leads nowhere reads the first token: its row is not one of a token's.
      begin[i] = (token < args_.num_tokens ? token : 0) * (args_.hidden / 8);
    }
    // Of a row, chunk c stands at place c ^ row % 8.
    const uint32_t place = lane() / kLanesARow * kRowBytes + (lane() % kLanesARow ^ lane() / kLanesARow) * 16;
    for_my_steps(item, [&](uint32_t step, uint32_t full, uint32_t to) {
      uint32_t chunk = step * Shape::kPanels * (kDepth / 8) + lane() % kLanesARow;
      to += place;
#pragma unroll
      for (uint32_t panel = 0; panel < Shape::kPanels; ++panel) {
        const bool low = chunk < args_.hidden / 8;
        const bool high = chunk + kLanesARow < args_.hidden / 8;
        const uint4* from = reinterpret_cast<const uint4*>(args_.x) + chunk;
#pragma unroll
        for (uint32_t i = 0; i < kRowsALane; ++i) {
          if (i * kRowsAtOnce >= item.rows) break;
          const uint4* row = from + begin[i];
          ptx::cp_async_16(to + i * kRowsAtOnce * kRowBytes, row, low);
          ptx::cp_async_16((to ^ kLanesARow * 16) + i * kRowsAtOnce * kRowBytes, row + kLanesARow, high);
        }
        chunk += kDepth / 8;
        to += pipeline_.panel_bytes;
      }
      ptx::cp_async_commit();
      ptx::cp_async_wait<0>();
      // Written by ordinary copies, read by the asynchronous proxy.
      ptx::fence_shared_proxy();
      __syncwarp();
      if (lane() == 0) ptx::mbarrier_arrive(full);
    });
  }

  // Rows of h, one after another: the copy engine's work again. They are read once all their columns are written.
  __device__ __forceinline__ void bring_gated(const Item& item) {
    const uint32_t all = args_.gate_tiles * Shape::kGroups;
    const uint32_t boxes = (item.rows + args_.h_rows - 1) / args_.h_rows;
    const uint32_t box_bytes = args_.h_rows * kRowBytes;
    if (lane() == 0) {
      while (ptx::ld_acquire(args_.gated + item.token_tile) < all) {
      }
      // Written by ordinary stores, read by the copy engine.
      ptx::fence_global_proxy();
    }
    for_my_steps(item, [&](uint32_t step, uint32_t full, uint32_t to) {
      if (lane() != 0) return;
      ptx::mbarrier_arrive_expect(full, Shape::kPanels * boxes * box_bytes);
      uint32_t column = step * Shape::kPanels * kDepth;
#pragma unroll
      for (uint32_t panel = 0; panel < Shape::kPanels; ++panel) {
        for (uint32_t box = 0; box < boxes; ++box) {
          ptx::tensor_copy_2d(to + box * box_bytes, &args_.gated_map, full, column,
                              item.first_row + box * args_.h_rows);
        }
        column += kDepth;
        to += pipeline_.panel_bytes;
      }
    });
    __syncwarp();
  }

  const Args& args_;
  const Pipeline<Shape>& pipeline_;
  Position stage_;
  uint32_t turn_;  // steps until the next that is this warp's
};

}  // namespace anabranch::experts
