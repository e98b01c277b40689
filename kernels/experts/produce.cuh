// The producers: a warp that brings weights with the copy engine, and three that gather tokens. They meet in the full
// barriers only, so that weights run ahead while tokens wait for another block's part of h.
#pragma once

#include "experts/pipeline.cuh"
#include "ptx/cp_async.cuh"
#include "ptx/gpu_scope.cuh"
#include "ptx/grid_dependency.cuh"
#include "ptx/tensor_copy.cuh"
#include "ptx/warpgroup.cuh"

namespace anabranch::experts {

template <class Shape>
__device__ __forceinline__ uint32_t steps_of(const Args& args, const Item& item) {
  constexpr uint32_t kColumns = Shape::kPanels * kDepth;
  if (item.dry != 0) return 1;
  return ((item.phase == kGate ? args.hidden : args.intermediate) + kColumns - 1) / kColumns;
}

// One whole warp: takes items, tells the others in this block, and loads each item's weights.
template <class Shape>
class WeightLoader {
 public:
  __device__ __forceinline__ WeightLoader(const Args& args, const Pipeline<Shape>& pipeline)
      : args_(args), pipeline_(pipeline) {}

  __device__ __forceinline__ void run() {
    // While the launches before are at work: one step of either product without results. It brings code, tensor maps
    // and pages to where they are found quickly; cold, each is a wait of its own.
    Item item = {};
    item.dry = 1;
#pragma unroll 1
    for (item.phase = kGate; item.phase <= kDown; ++item.phase) load(item);
    ptx::wait_for_prerequisites();
    Schedule schedule(args_, pipeline_.words);
    ask();
    schedule.read();
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
    if (item.dry == 0) ask();
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

// A warp's copies into stages of the ring. They are announced by one arrival a warp, once they are done: an arrival a
// thread would cost shared memory more than the copies do. To keep copies in flight a stage is announced after the next
// one's are issued, or as soon as there is nothing else to do.
template <class Shape>
class Announcer {
 public:
  __device__ __forceinline__ explicit Announcer(const Pipeline<Shape>& pipeline) : pipeline_(pipeline) {}

  // The copies of stage `index` have been issued.
  __device__ __forceinline__ void issued(uint32_t index) {
    ptx::cp_async_commit();
    if (pending_ != kNone) {
      ptx::cp_async_wait<1>();
      arrive();
    }
    pending_ = index;
  }

  // Before this warp waits for anything that could, in the end, wait for what it has issued.
  __device__ __forceinline__ void flush() {
    if (pending_ == kNone) return;
    ptx::cp_async_wait<0>();
    arrive();
    pending_ = kNone;
  }

  // Waits for a barrier's phase, announcing first unless it is over already.
  __device__ __forceinline__ void wait_for(uint32_t barrier, uint32_t parity) {
    if (__all_sync(kFullWarp, ptx::mbarrier_test_wait(barrier, parity))) return;
    flush();
    wait(barrier, parity);
  }

 private:
  static constexpr uint32_t kNone = 0xffffffffu;

  __device__ __forceinline__ void arrive() {
    // Written by ordinary copies, read by the asynchronous proxy.
    ptx::fence_shared_proxy();
    __syncwarp();
    if (threadIdx.x % kWarpSize == 0) ptx::mbarrier_arrive(pipeline_.full + 8 * pending_);
  }

  const Pipeline<Shape>& pipeline_;
  uint32_t pending_ = kNone;
};

// Rows of x that the permutation picks. Eight threads copy a row's 128 bytes; such a team has up to 16 rows one after
// another. Rows past the tile's last hold anything: what a product makes of them is not stored.
template <class Shape>
__device__ __forceinline__ void gather_rows(const Args& args, const Pipeline<Shape>& pipeline, const Item& item,
                                            Announcer<Shape>& announcer, Position& stage) {
  constexpr uint32_t kTeams = kGatherThreads / 8;
  constexpr uint32_t kRowsATeam = (Shape::kMost + kTeams * 4 - 1) / (kTeams * 4) * 4;
  const uint32_t thread = threadIdx.x - kWarpSize;
  // A team's first row is a multiple of four: so is its place in the swizzle's eight.
  const uint32_t rows = (item.rows + kTeams * 4 - 1) / (kTeams * 4) * 4;
  const uint32_t first = thread / 8 * rows;
  const uint32_t count = min(rows, item.rows - min(item.rows, first));
  // Where each row begins, in 16 bytes.
  uint32_t begin[kRowsATeam];
#pragma unroll
  for (uint32_t i = 0; i < kRowsATeam; ++i) begin[i] = i < count ? args.slots[item.first_row + first + i] : 0;
#pragma unroll
  for (uint32_t i = 0; i < kRowsATeam; ++i) {
    // A slot that leads nowhere reads the first token: its row is not one of a token's.
    const uint32_t token = begin[i] / args.topk;
    begin[i] = (token < args.num_tokens ? token : 0) * (args.hidden / 8) + thread % 8;
  }

  const uint32_t steps = steps_of<Shape>(args, item);
  const char* from = reinterpret_cast<const char*>(args.x);
  // Of a row, chunk c stands at place c ^ row % 8.
  const uint32_t place = first * kRowBytes + (thread % 8 ^ first % 8) * 16;
  uint32_t chunk = thread % 8;
  for (uint32_t step = 0; step < steps; ++step) {
    announcer.wait_for(pipeline.empty + 8 * stage.index, stage.parity ^ 1);
    uint32_t to = pipeline.stages + stage.index * pipeline.stage_bytes + Shape::kPanels * Shape::kPanelBytes + place;
#pragma unroll
    for (uint32_t panel = 0; panel < Shape::kPanels; ++panel) {
      const bool inside = chunk < args.hidden / 8;
#pragma unroll
      for (uint32_t base = 0; base < kRowsATeam; base += 4) {
        if (base >= count) break;
#pragma unroll
        for (uint32_t i = base; i < base + 4; ++i) {
          if (i < count) ptx::cp_async_16((to ^ i % 8 * 16) + i * kRowBytes, from + uint64_t{begin[i]} * 16, inside);
        }
      }
      chunk += 8;
      from += kRowBytes;
      to += pipeline.panel_bytes;
    }
    announcer.issued(stage.index);
    stage.advance(args.stages);
  }
}

// Rows of h, one after another: the copy engine's work again, a lane of each warp asking for every third box. They are
// read once all their columns are written.
template <class Shape>
__device__ __forceinline__ void bring_gated(const Args& args, const Pipeline<Shape>& pipeline, const Item& item,
                                            Announcer<Shape>& announcer, Position& stage) {
  announcer.flush();
  const uint32_t warp = threadIdx.x / kWarpSize - 1;
  const uint32_t all = args.gate_tiles * Shape::kGroups;
  const uint32_t boxes = (item.rows + args.h_rows - 1) / args.h_rows;
  const uint32_t mine = (boxes + kGatherWarps - 1 - warp) / kGatherWarps;
  const uint32_t box_bytes = args.h_rows * kRowBytes;
  const uint32_t steps = steps_of<Shape>(args, item);
  const bool leads = threadIdx.x % kWarpSize == 0;
  if (leads && item.dry == 0) {
    while (ptx::ld_acquire(args.gated + item.token_tile) < all) {
    }
    // Written by ordinary stores, read by the copy engine.
    ptx::fence_global_proxy();
  }
  uint32_t column = 0;
  for (uint32_t step = 0; step < steps; ++step) {
    if (leads) {
      const uint32_t full = pipeline.full + 8 * stage.index;
      wait(pipeline.empty + 8 * stage.index, stage.parity ^ 1);
      ptx::mbarrier_arrive_expect(full, Shape::kPanels * mine * box_bytes);
      uint32_t to = pipeline.stages + stage.index * pipeline.stage_bytes + Shape::kPanels * Shape::kPanelBytes;
#pragma unroll
      for (uint32_t panel = 0; panel < Shape::kPanels; ++panel) {
        for (uint32_t box = warp; box < boxes; box += kGatherWarps) {
          ptx::tensor_copy_2d(to + box * box_bytes, &args.gated_map, full, column, item.first_row + box * args.h_rows);
        }
        column += kDepth;
        to += pipeline.panel_bytes;
      }
    }
    stage.advance(args.stages);
  }
  __syncwarp();
}

// Loads each item's tokens.
template <class Shape>
__device__ __forceinline__ void bring_tokens(const Args& args, const Pipeline<Shape>& pipeline) {
  Announcer<Shape> announcer(pipeline);
  Position stage;
  Position queue;
  while (true) {
    announcer.wait_for(pipeline.item_full + 8 * queue.index, queue.parity);
    const Item item = pipeline.items[queue.index];
    __syncwarp();
    if (threadIdx.x % kWarpSize == 0) ptx::mbarrier_arrive(pipeline.item_empty + 8 * queue.index);
    queue.advance(kQueue);
    if (item.phase == kNoItem) break;
    if (item.phase == kGate) gather_rows(args, pipeline, item, announcer, stage);
    if (item.phase == kDown) bring_gated(args, pipeline, item, announcer, stage);
    // Copies of the dry items are announced before: the warp that brings weights may wait for their stages.
    if (item.dry != 0) announcer.flush();
    if (item.dry != 0 && item.phase == kDown) ptx::wait_for_prerequisites();
  }
  announcer.flush();
}

}  // namespace anabranch::experts
