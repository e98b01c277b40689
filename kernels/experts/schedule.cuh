// Which item of work is what. Every block works it out for itself from the experts' offsets, which the host does not
// know.
//
// Items are tiles of the first product, then tiles of the second, each expert by expert; within an expert by bands of
// up to 16 tiles of tokens, within a band weights tile by weights tile. Blocks that run at once so share weights, and a
// band's tokens, in the second-level cache. An expert's tokens are spread evenly over as few tiles as hold
// them. Last come, where they are asked for, items that sum up columns of the result.
#pragma once

#include "common/warp.cuh"
#include "experts/args.cuh"

namespace anabranch::experts {

constexpr uint32_t kBand = 16;
constexpr uint32_t kGate = 0;
constexpr uint32_t kDown = 1;
constexpr uint32_t kSum = 2;
constexpr uint32_t kNoItem = 3;

// An item, as the consumers and the gathering warps read it from shared memory.
struct alignas(16) Item {
  uint32_t phase;  // kGate: first product, kDown: second, kSum, kNoItem: no more
  uint32_t expert;
  uint32_t first_row;    // in permuted order
  uint32_t rows;         // 0 to token_tile
  uint32_t weight_tile;  // of the product's rows of weights
  uint32_t token_tile;   // of all; with kSum how many tiles there are
};

class Schedule {
 public:
  // `words`: 2 (experts + 1) of shared memory. One whole warp calls this and everything else.
  __device__ __forceinline__ Schedule(const Args& args, uint32_t* words)
      : args_(args), offsets_(words), first_tile_(words + args.num_experts + 1), tiles_(0) {}

  // Reads the experts' offsets.
  __device__ __forceinline__ void read(const uint32_t* offsets) {
    const uint32_t lane = threadIdx.x % kWarpSize;
#pragma unroll 4
    for (uint32_t expert = lane; expert <= args_.num_experts; expert += kWarpSize) {
      // Offsets past the end would be written through: they are not believed.
      offsets_[expert] = min(offsets[expert], args_.num_rows);
    }
    __syncwarp();
    uint32_t sum = 0;
    for (uint32_t base = 0; base < args_.num_experts; base += kWarpSize) {
      const uint32_t expert = base + lane;
      const uint32_t tiles = expert < args_.num_experts ? tiles_of(expert) : 0;
      const uint32_t inclusive = warp_inclusive_sum(tiles, lane);
      if (expert < args_.num_experts) first_tile_[expert] = sum + inclusive - tiles;
      sum += __shfl_sync(kFullWarp, inclusive, kWarpSize - 1);
    }
    if (lane == 0) first_tile_[args_.num_experts] = sum;
    __syncwarp();
    tiles_ = sum;
  }

  // The same number in every lane.
  __device__ __forceinline__ Item at(uint32_t number) const {
    Item item = {};
    uint32_t weight_tiles = args_.gate_tiles;
    if (number >= tiles_ * weight_tiles) {
      number -= tiles_ * weight_tiles;
      item.phase = kDown;
      weight_tiles = args_.down_tiles;
    }
    if (number >= tiles_ * weight_tiles) {
      item.weight_tile = number - tiles_ * weight_tiles;
      item.phase = item.weight_tile < args_.sum_tiles ? kSum : kNoItem;
      item.token_tile = tiles_;
      return item;
    }
    item.expert = expert_of(number / weight_tiles);
    const uint32_t first = first_tile_[item.expert];
    const uint32_t tiles = first_tile_[item.expert + 1] - first;
    const uint32_t local = number - first * weight_tiles;
    const uint32_t band = local / (kBand * weight_tiles);
    const uint32_t within = local - band * kBand * weight_tiles;
    const uint32_t height = min(kBand, tiles - band * kBand);
    item.weight_tile = within / height;
    const uint32_t tile = band * kBand + within - item.weight_tile * height;
    item.token_tile = first + tile;
    const uint32_t begin = offsets_[item.expert];
    const uint32_t count = offsets_[item.expert + 1] - begin;
    const uint32_t even = (count + tiles - 1) / tiles;
    const uint32_t size = min(args_.token_tile, (even + 15) / 16 * 16);
    item.first_row = begin + tile * size;
    item.rows = min(size, count - min(count, tile * size));
    return item;
  }

 private:
  __device__ __forceinline__ uint32_t tiles_of(uint32_t expert) const {
    const uint32_t begin = offsets_[expert];
    const uint32_t end = offsets_[expert + 1];
    return end > begin ? (end - begin - 1) / args_.token_tile + 1 : 0;
  }

  // The expert that has a tile of tokens: of the experts' ends, those at or before it are counted, first every share-th
  // by a lane each, then one by one within a share. Two rounds do up to 1,024 experts.
  __device__ __forceinline__ uint32_t expert_of(uint32_t tile) const {
    const uint32_t lane = threadIdx.x % kWarpSize;
    const uint32_t experts = args_.num_experts;
    const uint32_t share = (experts + kWarpSize - 1) / kWarpSize;
    const uint32_t last = min((lane + 1) * share, experts);
    const uint32_t begin = share * __popc(__ballot_sync(kFullWarp, first_tile_[last] <= tile));
    const uint32_t end = min(begin + lane + 1, experts);
    const bool before = lane < share && first_tile_[end] <= tile;
    return begin + __popc(__ballot_sync(kFullWarp, before));
  }

  const Args& args_;
  uint32_t* offsets_;
  uint32_t* first_tile_;
  uint32_t tiles_;
};

}  // namespace anabranch::experts
