// Brings steps of both operands to shared memory. It runs ahead of the products, on into the block's next tile: an
// epilogue and the first loads of the tile after it pass side by side.
#pragma once

#include "grouped_gemm/config.cuh"
#include "grouped_gemm/scheduler.cuh"
#include "ptx/cp_async.cuh"

namespace anabranch::grouped_gemm {

// Thread t copies chunk t % 8 (8 elements) of row t / 8 of every pass, of x and of the weights.
//
// With kPaired a tile's rows of weights alternate, eight rows of the gate, then eight of up for the same columns of y:
// the two lie side by side in one warp's accumulators.
template <class Tile, bool kPaired>
class Loader {
 public:
  static constexpr uint32_t kWidth = kPaired ? Tile::kN / 2 : Tile::kN;  // columns of y in a tile

  // `stages` and `rows` are shared memory: kStages * kStageBytes, and kM words.
  __device__ __forceinline__ Loader(const Args& args, const Schedule<Tile>& schedule, uint32_t stages, uint32_t* rows)
      : args_(args), schedule_(schedule), rows_(rows), tile_(blockIdx.x - gridDim.x), depth_(args.depth), stage_(0) {
    const uint32_t row = threadIdx.x / 8;
    target_ = stages + row * kRowBytes + (threadIdx.x % 8 ^ row % 8) * 16;
  }

  // Before the four quarters of a step. All threads of the block call everything here, together.
  __device__ __forceinline__ void begin() {
    if (depth_ < args_.depth) return;
    tile_ += gridDim.x;
    // Past the last tile depth_ stays out of range: zeros are written that nobody reads.
    if (tile_ < schedule_.tiles()) open();
  }

  // Quarter kQuarter of the step's copies: spread over the slices of a step of products. Addresses of what is out of
  // range are wild, and not read from.
  template <uint32_t kQuarter>
  __device__ __forceinline__ void copy() const {
    constexpr uint32_t kPasses = Tile::kPassesA + Tile::kPassesB;
    constexpr uint32_t kColumnsPerPass = kPaired ? Tile::kRowsPerPass / 2 : Tile::kRowsPerPass;
    const uint32_t column = depth_ + threadIdx.x % 8 * 8;
    const bool inside = column < args_.depth;
    const uint32_t pitch = args_.depth * 2;
    const uint32_t target = target_ + stage_ * Tile::kStageBytes;
#pragma unroll
    for (uint32_t pass = kPasses * kQuarter / 4; pass < kPasses * (kQuarter + 1) / 4; ++pass) {
      const uint32_t to = target + pass * Tile::kRowsPerPass * kRowBytes;
      if (pass < Tile::kPassesA) {
        const uint32_t row = rows_[threadIdx.x / 8 + pass * Tile::kRowsPerPass];
        const char* from = reinterpret_cast<const char*>(args_.x + column) + static_cast<uint64_t>(row) * pitch;
        ptx::cp_async_16(to, from, inside && row != kNone);
      } else {
        const uint32_t skipped = (pass - Tile::kPassesA) * kColumnsPerPass;
        const char* from = reinterpret_cast<const char*>(weights_ + column) + static_cast<uint64_t>(skipped) * pitch;
        ptx::cp_async_16(to, from, inside && first_column_ + skipped < args_.columns);
      }
    }
  }

  // After the four quarters. A group is closed whether or not it holds anything, so that waits can count groups.
  __device__ __forceinline__ void end() {
    ptx::cp_async_commit();
    depth_ += kStepDepth;
    stage_ = stage_ + 1 == Tile::kStages ? 0 : stage_ + 1;
  }

  __device__ __forceinline__ void step() {
    begin();
    copy<0>();
    copy<1>();
    copy<2>();
    copy<3>();
    end();
  }

 private:
  static constexpr uint32_t kNone = 0xffffffffu;

  // Looks up the tile's rows and this thread's rows of weights.
  __device__ __forceinline__ void open() {
    depth_ = 0;
    const TileAt at = schedule_.at(tile_, kWidth);
    __syncthreads();  // nobody reads the rows of the tile before
    if (threadIdx.x < Tile::kM) {
      const bool valid = threadIdx.x < at.rows;
      uint32_t row = at.first_row + threadIdx.x;
      if (args_.slots != nullptr && valid) row = args_.slots[row] / args_.topk;
      rows_[threadIdx.x] = valid && row < args_.x_rows ? row : kNone;
    }
    const uint32_t row = threadIdx.x / 8;
    const uint32_t in_tile = kPaired ? row / 16 * 8 + row % 8 : row;
    first_column_ = at.first_column + in_tile;
    const uint64_t per_expert = kPaired ? 2 * static_cast<uint64_t>(args_.columns) : args_.columns;
    const uint64_t weight_row = at.expert * per_expert + (kPaired && row % 16 >= 8 ? args_.columns : 0) + first_column_;
    weights_ = args_.weights + weight_row * args_.depth;
    __syncthreads();
  }

  const Args& args_;
  const Schedule<Tile>& schedule_;
  uint32_t* rows_;
  const __nv_bfloat16* weights_;
  uint32_t first_column_;
  uint32_t tile_;
  uint32_t depth_;
  uint32_t stage_;
  uint32_t target_;
};

}  // namespace anabranch::grouped_gemm
