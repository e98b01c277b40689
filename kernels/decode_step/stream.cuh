// The weights' way through a warp: its pieces of all layers' products in the order in which it multiplies them, kDepth
// steps ahead. They are on their way while blocks wait for one another's results.
//
// A warp has some columns of all its block's rows, so that warps are done together however few rows there are. A step
// is 64 bytes of each of 16 rows. Lane l copies 16 of them of row l / 4 and of the one eight below, and multiplies what
// it has copied itself, and so meets nobody.
#pragma once

#include <cstdint>

#include "decode_step/products.cuh"
#include "ptx/cp_async.cuh"
#include "ptx/mma.cuh"
#include "ptx/shared.cuh"

namespace anabranch::decode_step {

template <bool kLatent>
class WeightStream {
  static constexpr uint32_t kDepth = depth_of(kLatent);

 public:
  // `ring`: address of kDepth steps of shared memory that are the warp's own.
  __device__ __forceinline__ WeightStream(const Args& args, const Slots& slots, uint32_t ring)
      : args_(args),
        slots_(slots),
        ring_(ring + threadIdx.x % kWarpSize * 16),
        part_(args, args.layers[0].gate != nullptr, Product::kProject, blockIdx.x),
        turn_(part_) {
    enter(Product::kProject);
  }

  // Asks for the first steps.
  __device__ __forceinline__ void begin() {
    owed_ = kDepth;
    fill();
  }

  // Goes on after a routing that was not known yet, and asks for what could not be asked for since.
  __device__ __forceinline__ void resume() {
    ++known_;
    fill();
  }

  // The part's tiles before those that the warps multiply last; all, where those are the first, too.
  __device__ __forceinline__ static uint32_t before_last(const Part& part) {
    const uint32_t at_once = kWarps >> part.group_bits;
    return part.tiles <= at_once ? part.tiles : (part.tiles - 1) / at_once * at_once;
  }

  // Sums of the part's rows over this warp's chunks, of tiles from `begin` to `end`, to sums[warp's group][tile, 16].
  // `vectors`: address of the slots' vectors, each of whole chunks.
  __device__ __forceinline__ void multiply(const Part& part, uint32_t begin, uint32_t end, uint32_t vectors,
                                           uint32_t vector_bytes_a_head, uint32_t units_a_head, float* sums) {
    const uint32_t lane = threadIdx.x % kWarpSize;
    const Turn turn(part);
#pragma unroll 1
    for (uint32_t tile = begin + turn.tile; tile < end; tile += turn.tiles) {
      float c[4] = {};
      uint32_t vector = vectors + turn.chunk * kChunkBytes + lane % 4 * 16;
      if (kLatent && units_a_head != 0) vector += (part.first + tile) / units_a_head * vector_bytes_a_head;
#pragma unroll 1
      for (uint32_t left = turn.end - turn.chunk; left > 0; --left) {
        ptx::cp_async_wait<kDepth - 1>();
        const uint4 low = ptx::ld_shared_16(ring_ + step_ * kStreamBytes);
        const uint4 high = ptx::ld_shared_16(ring_ + step_ * kStreamBytes + kStreamBytes / 2);
        const uint4 x = ptx::ld_shared_16(vector);
        // Which of a row's elements are which k of a product is of no importance as long as both sides agree.
        ptx::mma_m16n8k16_bf16(c, {low.x, high.x, low.y, high.y}, {x.x, x.y});
        ptx::mma_m16n8k16_bf16(c, {low.z, high.z, low.w, high.w}, {x.z, x.w});
        vector += kChunkBytes;
        ask();
      }
      // All columns are the same.
      if (lane % 4 == 0) {
        float* const to = sums + (turn.group * part.tiles + tile) * 16 + lane / 4;
        to[0] = c[0];
        to[8] = c[2];
      }
    }
  }

 private:
  // A warp's part of its block's.
  struct Turn {
    uint32_t group;
    uint32_t chunk;
    uint32_t end;
    uint32_t tile;   // the first,
    uint32_t tiles;  // and from one to the next

    __device__ __forceinline__ explicit Turn(const Part& part) {
      const uint32_t warp = threadIdx.x / kWarpSize;
      tile = warp >> part.group_bits;
      tiles = kWarps >> part.group_bits;
      group = warp - (tile << part.group_bits);
      chunk = group * part.chunks >> part.group_bits;
      end = (group + 1) * part.chunks >> part.group_bits;
    }
  };

  // Asks for what is owed.
  __device__ __forceinline__ void fill() {
    uint32_t step = step_ >= owed_ ? step_ - owed_ : step_ + kDepth - owed_;
#pragma unroll 1
    for (; owed_ > 0 && find(); --owed_) {
      copy(step);
      ptx::cp_async_commit();
      step = step == kDepth - 1 ? 0 : step + 1;
    }
    // Without a copy, an empty group keeps count.
#pragma unroll 1
    for (uint32_t i = 0; i < owed_; ++i) ptx::cp_async_commit();
  }

  __device__ __forceinline__ void ask() {
    if (find()) {
      copy(step_);
    } else {
      ++owed_;
    }
    ptx::cp_async_commit();
    step_ = step_ == kDepth - 1 ? 0 : step_ + 1;
  }

  __device__ __forceinline__ bool routes() const { return args_.layers[layer_].gate != nullptr; }

  __device__ __forceinline__ void enter(Product product) {
    product_ = product;
    part_ = Part(args_, routes(), product, blockIdx.x);
    turn_ = Turn(part_);
    tile_ = turn_.tile;
    chunk_ = turn_.chunk;
    begin_tile();
  }

  // Whether there is a next step; goes on to the product that has it.
  __device__ __forceinline__ bool find() {
    while (tile_ >= part_.tiles) {
      if (!advance()) return false;
    }
    return true;
  }

  __device__ __forceinline__ bool advance() {
    const Product next = after<kLatent>(product_, routes());
    if (next == Product::kRouted) {
      if (known_ == routed_) return false;
      ++routed_;
    } else if (next == Product::kProject) {
      if (layer_ + 1 == args_.num_layers) return false;
      ++layer_;
    }
    enter(next);
    return true;
  }

  // Where this lane's rows of the tile begin.
  __device__ __forceinline__ void begin_tile() {
    if (tile_ >= part_.tiles) return;
    const AnabranchDecodeLayer& layer = args_.layers[layer_];
    const attention::Args& a = args_.attention;
    const uint32_t row = threadIdx.x % kWarpSize / 4;
    const uint32_t low = tile_ * 16 + row;
    const void* weights = layer.output;
    is_low_ = low < part_.count;
    is_high_ = low + 8 < part_.count;
    uint32_t low_row = part_.first + low;
    uint32_t high_row = low_row + 8;
    at_ = chunk_ * kChunk + threadIdx.x % 4 * kVector;
    switch (product_) {
      case Product::kProject: {
        weights = layer.q;
        if (kLatent) {
          const uint32_t rows = a.num_heads * args_.q_dim;
          // Both matrices have rows of d.
          low_ = row_of(low_row < rows ? layer.q : layer.kv, low_row < rows ? low_row : low_row - rows);
          high_ = row_of(high_row < rows ? layer.q : layer.kv, high_row < rows ? high_row : high_row - rows);
          return;
        }
        break;
      }
      case Product::kAbsorb:
      case Product::kExpand:
        weights = product_ == Product::kAbsorb ? layer.absorb : layer.expand;
        low_row = (part_.first + tile_) * 8 + row;
        high_row = low_row;
        is_low_ = true;
        is_high_ = false;
        break;
      case Product::kShared:
      case Product::kRouted: {
        const Feed feed(args_, routes());
        const uint32_t column = tile_ * 8 + row;
        uint32_t slot = feed.of_n.quotient(part_.first + column);
        const uint32_t of_slot = part_.first + column - slot * feed.n;
        if (product_ == Product::kRouted) slot += feed.shared;
        is_low_ = column < part_.count && feed.is_there(slots_, slot);
        is_high_ = is_low_;
        weights = layer.gate_up;
        low_row = is_low_ ? 2 * feed.expert(slots_, slot) * feed.n + of_slot : 0;
        high_row = low_row + feed.n;
        break;
      }
      case Product::kDown:
        begin_slot();
        return;
      default:
        break;
    }
    low_ = row_of(weights, low_row);
    high_ = row_of(weights, high_row);
  }

  __device__ __forceinline__ const uint16_t* row_of(const void* weights, uint32_t row) const {
    return static_cast<const uint16_t*>(weights) + uint64_t{row} * part_.width + at_;
  }

  // kDown: where this lane's rows of the chunk's slot begin.
  __device__ __forceinline__ void begin_slot() {
    const Feed feed(args_, routes());
    const uint32_t chunks = chunks_of(part_.width);
    const uint32_t slot = feed.of_chunks.quotient(chunk_);
    const uint32_t low = tile_ * 16 + threadIdx.x % kWarpSize / 4;
    const bool there = feed.is_there(slots_, slot);
    at_ = (chunk_ - slot * chunks) * kChunk + threadIdx.x % 4 * kVector;
    is_low_ = there && low < part_.count;
    is_high_ = there && low + 8 < part_.count;
    const uint32_t expert = there ? feed.expert(slots_, slot) : 0;
    low_ = row_of(args_.layers[layer_].down, expert * args_.hidden + part_.first + low);
    high_ = low_ + uint64_t{8} * part_.width;
  }

  // Copies a step, and goes on.
  __device__ __forceinline__ void copy(uint32_t step) {
    const bool inside = at_ < part_.width;
    ptx::cp_async_16(ring_ + step * kStreamBytes, low_, is_low_ && inside);
    ptx::cp_async_16(ring_ + step * kStreamBytes + kStreamBytes / 2, high_, is_high_ && inside);
    low_ += kChunk;
    high_ += kChunk;
    at_ += kChunk;
    ++chunk_;
    if (chunk_ == turn_.end) {
      chunk_ = turn_.chunk;
      tile_ += turn_.tiles;
      begin_tile();
    } else if (product_ == Product::kDown && at_ - threadIdx.x % 4 * kVector >= part_.width) {
      begin_slot();
    }
  }

  const Args& args_;
  const Slots& slots_;
  uint32_t ring_;  // this lane's part of the first step
  uint32_t step_ = 0;
  uint32_t owed_ = 0;    // steps that were not asked for, because there was none
  uint32_t routed_ = 0;  // layers with a router whose experts' rows have been begun,
  uint32_t known_ = 0;   // and whose routing is known
  uint32_t layer_ = 0;
  Product product_;
  Part part_;
  Turn turn_;
  uint32_t tile_;
  uint32_t chunk_;
  const uint16_t* low_;
  const uint16_t* high_;
  uint32_t at_;  // the element of its slot that low_ is at
  bool is_low_;
  bool is_high_;
};

}  // namespace anabranch::decode_step
