// The producers: a warp that brings weights with the copy engine, and three that gather tokens. They meet in the full
// barriers only, so that weights run ahead while tokens wait for another block's part of h.
#pragma once

#include "experts/pipeline.cuh"
#include "ptx/cluster.cuh"
#include "ptx/cp_async.cuh"
#include "ptx/gpu_scope.cuh"
#include "ptx/tensor_copy.cuh"
#include "ptx/warpgroup.cuh"

namespace anabranch::experts {

template <class Shape>
__device__ __forceinline__ uint32_t steps_of(const Args& args, uint32_t phase) {
  constexpr uint32_t kColumns = Shape::kPanels * kDepth;
  return ((phase == kGate ? args.hidden : args.intermediate) + kColumns - 1) / kColumns;
}

// Items come in turn from all blocks' common counter, so that no block waits for one that does not run. In a cluster
// the first block asks and sends the number to the other. One thread a block.
template <class Shape>
class Numbers {
 public:
  __device__ __forceinline__ Numbers(const Args& args, const Pipeline<Shape>& pipeline, uint32_t rank)
      : args_(args), pipeline_(pipeline), rank_(rank) {}

  // Asks for the next number; it is on its way while the caller does something else.
  __device__ __forceinline__ void ask() {
    if (rank_ == 0) number_ = atomicAdd(args_.next_item, 1u);
  }

  // Passes on what came.
  __device__ __forceinline__ void send() {
    if constexpr (Shape::kCluster == 2) {
      if (rank_ != 0) return;
      wait(pipeline_.mail_empty + 8 * mail_.index, mail_.parity ^ 1);
      const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(pipeline_.mail + mail_.index));
      ptx::store_async(ptx::map_shared(to, 1), number_, ptx::map_shared(pipeline_.mail_full + 8 * mail_.index, 1));
      mail_.advance(kQueue);
    }
  }

  // The number asked for last. Follows send().
  __device__ __forceinline__ uint32_t get() {
    if constexpr (Shape::kCluster == 2) {
      if (rank_ != 0) {
        const uint32_t full = pipeline_.mail_full + 8 * mail_.index;
        ptx::mbarrier_arrive_expect(full, 4);
        wait(full, mail_.parity);
        number_ = *static_cast<volatile uint32_t*>(pipeline_.mail + mail_.index);
        ptx::mbarrier_arrive_cluster(ptx::map_shared(pipeline_.mail_empty + 8 * mail_.index, 0));
        mail_.advance(kQueue);
      }
    }
    return number_;
  }

 private:
  const Args& args_;
  const Pipeline<Shape>& pipeline_;
  uint32_t rank_;
  uint32_t number_ = 0;
  Position mail_;
};

// Takes items, tells the others in this block, and loads each item's weights; in a cluster each block loads a half for
// both. One whole warp.
template <class Shape>
__device__ __forceinline__ void bring_weights(const Args& args, const Schedule<Shape::kCluster>& schedule,
                                              const Pipeline<Shape>& pipeline, uint32_t rank) {
  // A number that comes is passed on when so many steps were loaded.
  constexpr uint32_t kSendAfter = 3;
  constexpr uint32_t kShareBytes = Shape::kPanelBytes / Shape::kCluster;
  constexpr uint32_t kShareGroups = Shape::kRows / 16 / Shape::kCluster;
  const uint32_t lane = threadIdx.x;
  Numbers<Shape> numbers(args, pipeline, rank);
  Position stage;
  Position queue;
  if (lane == 0) {
    numbers.ask();
    numbers.send();
  }
  while (true) {
    const uint32_t number = lane == 0 ? numbers.get() : 0;
    const Item item = schedule.at(__shfl_sync(kFullWarp, number, 0), rank);
    if (lane == 0) {
      wait(pipeline.item_empty + 8 * queue.index, queue.parity ^ 1);
      pipeline.items[queue.index] = item;
      ptx::mbarrier_arrive(pipeline.item_full + 8 * queue.index);
    }
    queue.advance(kQueue);
    if (item.phase == kNoItem) return;
    if (lane == 0) {
      numbers.ask();
      const CUtensorMap* map = item.phase == kGate ? &args.gate_up : &args.down;
      const uint32_t steps = item.phase == kSum ? 0 : steps_of<Shape>(args, item.phase);
      const uint32_t group = (item.weight_tile * Shape::kCluster + rank) * kShareGroups;
      uint32_t column = 0;
      for (uint32_t step = 0; step < steps; ++step) {
        const uint32_t full = pipeline.full + 8 * stage.index;
        wait(pipeline.empty + 8 * stage.index, stage.parity ^ 1);
        ptx::mbarrier_arrive_expect(full, Shape::kPanels * Shape::kPanelBytes);
        uint32_t to = pipeline.stages + stage.index * pipeline.stage_bytes + rank * kShareBytes;
#pragma unroll
        for (uint32_t panel = 0; panel < Shape::kPanels; ++panel) {
          if constexpr (Shape::kCluster == 1) {
            ptx::tensor_copy_5d(to, map, full, column, 0, 0, group, item.expert);
          } else {
            ptx::tensor_multicast_5d(to, map, full, 3, column, 0, 0, group, item.expert);
          }
          column += kDepth;
          to += Shape::kPanelBytes;
        }
        stage.advance(args.stages);
        if (step == kSendAfter) numbers.send();
      }
      if (steps <= kSendAfter) numbers.send();
    }
    __syncwarp();
  }
}

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
    ptx::fence_proxy_async();
    __syncwarp();
    if (threadIdx.x % kWarpSize == 0) ptx::mbarrier_arrive(pipeline_.full + 8 * pending_);
  }

  const Pipeline<Shape>& pipeline_;
  uint32_t pending_ = kNone;
};

// Loads each item's tokens: rows of x picked by the permutation, or rows of h once they are written. Eight threads copy
// a row's 128 bytes; such a team has up to 16 rows one after another. Rows past the tile's last hold anything: what a
// product makes of them is not stored.
template <class Shape>
__device__ __forceinline__ void gather_tokens(const Args& args, const Pipeline<Shape>& pipeline) {
  constexpr uint32_t kTeams = kGatherThreads / 8;
  constexpr uint32_t kRowsATeam = (Shape::kMost + kTeams * 4 - 1) / (kTeams * 4) * 4;
  const uint32_t thread = threadIdx.x - kWarpSize;
  const uint32_t lane = threadIdx.x % kWarpSize;
  const uint32_t team = thread / 8;
  Announcer<Shape> announcer(pipeline);
  Position stage;
  Position queue;
  while (true) {
    announcer.wait_for(pipeline.item_full + 8 * queue.index, queue.parity);
    const Item item = pipeline.items[queue.index];
    __syncwarp();
    if (lane == 0) ptx::mbarrier_arrive(pipeline.item_empty + 8 * queue.index);
    queue.advance(kQueue);
    if (item.phase == kSum) continue;
    if (item.phase == kNoItem) break;

    // A team's first row is a multiple of four: so is its place in the swizzle's eight.
    const uint32_t rows = (item.rows + kTeams * 4 - 1) / (kTeams * 4) * 4;
    const uint32_t first = team * rows;
    const uint32_t count = min(rows, item.rows - min(item.rows, first));
    const uint32_t width = item.phase == kGate ? args.hidden : args.intermediate;
    // Where each row begins, in 16 bytes.
    uint32_t begin[kRowsATeam];
    if (item.phase == kGate) {
#pragma unroll
      for (uint32_t i = 0; i < kRowsATeam; ++i) {
        begin[i] = i < count ? args.slots[item.first_row + first + i] : 0;
      }
#pragma unroll
      for (uint32_t i = 0; i < kRowsATeam; ++i) {
        // A slot that leads nowhere reads the first token: its row is not one of a token's.
        const uint32_t token = begin[i] / args.topk;
        begin[i] = (token < args.num_tokens ? token : 0) * (width / 8) + thread % 8;
      }
    } else {
      const uint32_t all = args.gate_tiles * Shape::kGroups;
      if (ptx::ld_acquire(args.gated + item.token_tile) < all) {
        announcer.flush();
        while (ptx::ld_acquire(args.gated + item.token_tile) < all) {
        }
      }
      __syncwarp();
#pragma unroll
      for (uint32_t i = 0; i < kRowsATeam; ++i) begin[i] = (item.first_row + first + i) * (width / 8) + thread % 8;
    }

    const uint32_t steps = steps_of<Shape>(args, item.phase);
    const char* from = reinterpret_cast<const char*>(item.phase == kGate ? args.x : args.h);
    // Of a row, chunk c stands at place c ^ row % 8.
    const uint32_t place = first * kRowBytes + (thread % 8 ^ first % 8) * 16;
    uint32_t chunk = thread % 8;
    for (uint32_t step = 0; step < steps; ++step) {
      announcer.wait_for(pipeline.empty + 8 * stage.index, stage.parity ^ 1);
      uint32_t to = pipeline.stages + stage.index * pipeline.stage_bytes + Shape::kPanels * Shape::kPanelBytes + place;
#pragma unroll
      for (uint32_t panel = 0; panel < Shape::kPanels; ++panel) {
        const bool inside = chunk < width / 8;
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
  announcer.flush();
}

}  // namespace anabranch::experts
