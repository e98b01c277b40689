// Which tile is where: every block works it out for itself from the experts' offsets, which the host does not know.
//
// Tiles are numbered expert by expert; within an expert by bands of 16 tiles of rows, within a band column by column.
// Blocks that run at once so share weights, and a band's rows, in the second-level cache. A block takes tiles
// blockIdx.x, blockIdx.x + gridDim.x and so on.
#pragma once

#include "common/warp.cuh"
#include "grouped_gemm/args.cuh"

namespace anabranch::grouped_gemm {

constexpr uint32_t kBand = 16;

struct TileAt {
  uint32_t expert;
  uint32_t first_row;     // in permuted order
  uint32_t rows;          // valid ones, 1 to Tile::kM
  uint32_t first_column;  // of y
};

template <class Tile>
class Schedule {
 public:
  // `words`: 2 (experts + 1) of shared memory. `scratch`: one word a warp, free again when this returns. All threads
  // call.
  __device__ __forceinline__ Schedule(const Args& args, uint32_t* words, uint32_t* scratch)
      : offsets_(words), first_tile_(words + args.experts + 1), experts_(args.experts), columns_(args.column_tiles) {
    for (uint32_t expert = threadIdx.x; expert <= args.experts; expert += Tile::kThreads) {
      // Offsets past the end would be written through: they are not believed.
      const uint32_t offset = args.offsets == nullptr ? (expert == 0 ? 0 : args.rows) : args.offsets[expert];
      offsets_[expert] = offset < args.rows ? offset : args.rows;
    }
    __syncthreads();
    const uint32_t share = (args.experts + Tile::kThreads - 1) / Tile::kThreads;
    const uint32_t begin = min(threadIdx.x * share, args.experts);
    const uint32_t end = min(begin + share, args.experts);
    uint32_t own = 0;
    for (uint32_t expert = begin; expert < end; ++expert) own += row_tiles(expert);
    const uint32_t lane = threadIdx.x % kWarpSize;
    const uint32_t warp = threadIdx.x / kWarpSize;
    uint32_t next = warp_inclusive_sum(own, lane);
    if (lane == kWarpSize - 1) scratch[warp] = next;
    next -= own;
    __syncthreads();
    for (uint32_t before = 0; before < warp; ++before) next += scratch[before];
    for (uint32_t expert = begin; expert < end; ++expert) {
      first_tile_[expert] = next;
      next += row_tiles(expert);
    }
    if (threadIdx.x == Tile::kThreads - 1) first_tile_[args.experts] = next;
    __syncthreads();
    tiles_ = min(first_tile_[args.experts] * columns_, args.most_tiles);
  }

  __device__ __forceinline__ uint32_t tiles() const { return tiles_; }

  // Whole warps call, with the same tile in every lane, below tiles(). `width`: columns of y in a tile.
  __device__ __forceinline__ TileAt at(uint32_t tile, uint32_t width) const {
    const uint32_t expert = expert_of(tile / columns_);
    const uint32_t first = first_tile_[expert];
    const uint32_t row_tiles = first_tile_[expert + 1] - first;
    const uint32_t local = tile - first * columns_;
    const uint32_t band = local / (kBand * columns_);
    const uint32_t within = local - band * kBand * columns_;
    const uint32_t height = min(kBand, row_tiles - band * kBand);
    const uint32_t column = within / height;
    const uint32_t row = (band * kBand + within - column * height) * Tile::kM;
    const uint32_t begin = offsets_[expert];
    return {expert, begin + row, min(Tile::kM, offsets_[expert + 1] - begin - row), column * width};
  }

 private:
  __device__ __forceinline__ uint32_t row_tiles(uint32_t expert) const {
    const uint32_t begin = offsets_[expert];
    const uint32_t end = offsets_[expert + 1];
    return end > begin ? (end - begin + Tile::kM - 1) / Tile::kM : 0;
  }

  // The expert that has the tile of rows: of the experts' ends, those at or before it are counted, first every share-th
  // by a lane each, then one by one within a share. Two rounds do up to 1,024 experts.
  __device__ __forceinline__ uint32_t expert_of(uint32_t row_tile) const {
    const uint32_t lane = threadIdx.x % kWarpSize;
    const uint32_t share = (experts_ + kWarpSize - 1) / kWarpSize;
    const uint32_t last = min((lane + 1) * share, experts_);
    const uint32_t begin = share * __popc(__ballot_sync(kFullWarp, first_tile_[last] <= row_tile));
    const uint32_t end = min(begin + lane + 1, experts_);
    const bool before = lane < share && first_tile_[end] <= row_tile;
    return begin + __popc(__ballot_sync(kFullWarp, before));
  }

  uint32_t* offsets_;
  uint32_t* first_tile_;
  uint32_t experts_;
  uint32_t columns_;
  uint32_t tiles_;
};

}  // namespace anabranch::grouped_gemm
