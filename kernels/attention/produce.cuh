// The producers of the Hopper kernel: a warp that takes items and brings queries and keys, and one that brings values.
// They meet in barriers only, so that the next item's keys come while this one's last values are waited for.
#pragma once

#include "attention/pipeline.cuh"
#include "ptx/tensor_copy.cuh"
#include "ptx/warpgroup.cuh"

namespace anabranch::attention::hopper {

constexpr uint32_t kNoItem = UINT32_MAX;

// Numbers the items: sequence after sequence, a sequence's last tile of queries first, which sees the most keys, and
// all heads of a tile next to each other, which share keys in the second-level cache. A warp looks at as many sequences
// at once as it has lanes, so that those without a tile, or with few, cost nothing.
template <class Tile>
class Schedule {
 public:
  __device__ __forceinline__ explicit Schedule(const Args& args) : args_(args) { count(); }

  // The item of this number; numbers ascend from call to call. The whole warp calls.
  __device__ __forceinline__ Item at(uint32_t number) {
    if (number == kNoItem) return {};
    while (number - before_ >= __shfl_sync(kFullWarp, end_, kWarpSize - 1)) {
      // Sequences past the last have no items, of which there are fewer than 2^31.
      if (first_ >= args_.num_sequences) return {};
      before_ += __shfl_sync(kFullWarp, end_, kWarpSize - 1);
      first_ += kWarpSize;
      count();
    }
    const uint32_t owner = __ffs(__ballot_sync(kFullWarp, number - before_ < end_)) - 1;
    const uint32_t tiles = __shfl_sync(kFullWarp, tiles_, owner);
    const uint32_t place = number - before_ - (__shfl_sync(kFullWarp, end_, owner) - tiles * args_.num_heads);
    const Sequence sequence(args_, first_ + owner);
    const uint32_t first_query = (tiles - 1 - place / args_.num_heads) * Tile::kRows;
    const uint32_t rows = min(sequence.queries - first_query, Tile::kRows);
    Item item;
    item.first_row = sequence.first_token + first_query;
    item.rows = rows;
    item.head = place % args_.num_heads;
    item.kv_head = item.head / args_.group;
    item.table = sequence.table;
    item.keys = static_cast<uint32_t>(max(sequence.visible(first_query + rows - 1), 0));
    item.visible = sequence.visible(first_query);
    item.tiles = (item.keys + Tile::kKeys - 1) / Tile::kKeys;
    return item;
  }

 private:
  __device__ __forceinline__ void count() {
    const uint32_t lane = threadIdx.x % kWarpSize;
    const uint32_t sequence = first_ + lane;
    tiles_ = 0;
    if (sequence < args_.num_sequences) {
      tiles_ = min((Sequence(args_, sequence).queries + Tile::kRows - 1) / Tile::kRows, args_.row_tiles);
    }
    end_ = warp_inclusive_sum(tiles_ * args_.num_heads, lane);
  }

  const Args& args_;
  // Lane l has sequence first_ + l, whose items are those up to before_ + end_.
  uint32_t first_ = 0;
  uint32_t before_ = 0;
  uint32_t tiles_;
  uint32_t end_;
};

// The cache's rows where an item's pieces of keys begin. The table is read for as many as there are lanes at once.
class Pieces {
 public:
  __device__ __forceinline__ Pieces(const Args& args, const Item& item) : args_(args), item_(item) {}

  // The whole warp calls, for 0, 1, 2 and so on.
  __device__ __forceinline__ uint32_t row(uint32_t piece) {
    if (piece % kWarpSize == 0) {
      const uint32_t position = (piece + threadIdx.x % kWarpSize) * kPieceRows;
      const bool there = position < item_.keys;
      const uint32_t block = there ? args_.block_table[item_.table + (position >> args_.block_shift)] : 0;
      row_ = static_cast<uint32_t>(cache_row(args_, block, position));
    }
    return __shfl_sync(kFullWarp, row_, piece % kWarpSize);
  }

 private:
  const Args& args_;
  const Item& item_;
  uint32_t row_ = 0;
};

// Copies what there is of the tile of keys or values that begins at `first`: one lane does, all call.
template <class Tile, uint32_t kPanels>
__device__ __forceinline__ void copy_tile(const CUtensorMap& map, Pieces& pieces, const Item& item, uint32_t first,
                                          uint32_t to, uint32_t barrier) {
  const bool copies = threadIdx.x % kWarpSize == 0;
  const uint32_t there = min((item.keys - first + kPieceRows - 1) / kPieceRows, Tile::kKeys / kPieceRows);
  if (copies) ptx::mbarrier_arrive_expect(barrier, there * kPanels * kPieceBytes);
#pragma unroll
  for (uint32_t piece = 0; piece < Tile::kKeys / kPieceRows; ++piece) {
    const uint32_t row = pieces.row(first / kPieceRows + piece);
    if (!copies || piece >= there) continue;
#pragma unroll
    for (uint32_t panel = 0; panel < kPanels; ++panel) {
      ptx::tensor_copy_3d(to + panel * Tile::kPanelBytes + piece * kPieceBytes, &map, barrier, panel * 64, item.kv_head,
                          row);
    }
  }
}

// One whole warp: takes items, tells the other roles, and brings each item's queries and keys.
template <class Tile>
__device__ __forceinline__ void load_keys(const HopperArgs& hopper, const Pipeline<Tile>& pipeline) {
  const Args& args = hopper.args;
  const bool leads = threadIdx.x % kWarpSize == 0;
  Schedule<Tile> schedule(args);
  Position queue, stage, q;
  uint32_t number = blockIdx.x;
  while (true) {
    wait(pipeline.item_empty(queue.index), queue.parity ^ 1);
    // Read where it is: registers are few. Consumers hold it until all that is brought for it has been used.
    Item& item = pipeline.item(queue.index);
    const Item next_item = schedule.at(number);
    if (leads) {
      item = next_item;
      ptx::mbarrier_arrive(pipeline.item_full(queue.index));
    }
    __syncwarp();
    queue.advance(kQueue);
    if (item.rows == 0) return;
    // Blocks that are done early take more; the number is on its way while keys are.
    uint32_t next = kNoItem;
    if (leads && hopper.next_item != nullptr) next = gridDim.x + atomicAdd(hopper.next_item, 1u);

    Pieces pieces(args, item);
    for (uint32_t tile = 0; tile < item.tiles; ++tile) {
      wait(pipeline.keys_empty(stage.index), stage.parity ^ 1);
      // A lane that fell behind by a turn of the ring would take the barrier's phase for the one before.
      __syncwarp();
      copy_tile<Tile, Tile::kKeyPanels>(hopper.keys, pieces, item, tile * Tile::kKeys, pipeline.keys(stage.index),
                                        pipeline.keys_full(stage.index));
      stage.advance(Tile::kStages);
      if (tile > 0) continue;
      // The first keys can come while the queries before these are still in use.
      wait(pipeline.q_empty(), q.parity ^ 1);
      __syncwarp();
      q.advance(1);
      if (!leads) continue;
      ptx::mbarrier_arrive_expect(pipeline.q_full(), Tile::kQueryBytes);
#pragma unroll
      for (uint32_t group = 0; group < Tile::kGroups; ++group) {
#pragma unroll
        for (uint32_t panel = 0; panel < Tile::kKeyPanels; ++panel) {
          // Rows past the sequence's last are others' or zeros: what becomes of them is not stored.
          ptx::tensor_copy_3d(pipeline.q + panel * Tile::kQueryPanelBytes + group * kPieceBytes, &hopper.q,
                              pipeline.q_full(), panel * 64, item.head, item.first_row + group * Tile::kGroupRows);
        }
      }
    }
    number = __shfl_sync(kFullWarp, next, 0);
  }
}

// One whole warp: brings values. Those past the last key that the item's queries see are made zeros, for a weight of
// zero times what lies there may be NaN.
template <class Tile>
__device__ __forceinline__ void load_values(const HopperArgs& hopper, const Pipeline<Tile>& pipeline) {
  const uint32_t lane = threadIdx.x % kWarpSize;
  Position queue, stage, tail;
  while (true) {
    const Item item = take_item(pipeline, queue);
    __syncwarp();
    if (item.rows == 0) return;
    Pieces pieces(hopper.args, item);
    for (uint32_t tile = 0; tile < item.tiles; ++tile) {
      wait(pipeline.values_empty(stage.index), stage.parity ^ 1);
      __syncwarp();
      const uint32_t first = tile * Tile::kKeys;
      const uint32_t full = pipeline.values_full(stage.index);
      const bool whole = item.keys - first >= Tile::kKeys;
      copy_tile<Tile, Tile::kValuePanels>(hopper.values, pieces, item, first, pipeline.values(stage.index),
                                          whole ? full : pipeline.tail());
      if (!whole) {
        wait(pipeline.tail(), tail.parity);
        __syncwarp();
        tail.advance(1);
        char* panel = pipeline.values_memory(stage.index);
        for (uint32_t i = 0; i < Tile::kValuePanels; ++i, panel += Tile::kPanelBytes) {
          for (uint32_t at = (item.keys - first) * 128 + lane * 16; at < Tile::kPanelBytes; at += kWarpSize * 16) {
            *reinterpret_cast<uint4*>(panel + at) = {};
          }
        }
        // Written by ordinary stores, read by wgmma.
        ptx::fence_shared_proxy();
        __syncwarp();
        if (lane == 0) ptx::mbarrier_arrive(full);
      }
      stage.advance(Tile::kStages);
    }
  }
}

}  // namespace anabranch::attention::hopper
