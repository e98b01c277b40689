// Rows of weights on their way through a warp, to be multiplied with vectors in shared memory: products with a few
// tokens, for which only the weights' way through memory counts.
#pragma once

#include <cstdint>

#include "common/warp.cuh"
#include "ptx/cp_async.cuh"
#include "ptx/mma.cuh"
#include "ptx/shared.cuh"

namespace anabranch {

// What a warp copies at once: 16 bytes a lane.
constexpr uint32_t kStepBytes = kWarpSize * 16;

// A row's products with kTokens vectors in shared memory, `pitch` bytes apart from the address `vector` on.
//
// The tensor cores do it: what eight times four lanes have are segments, of the row along M and of a vector along N,
// and the products of like segments, on the diagonal, are wanted. That is a sixteenth of what is multiplied, and a
// sixth of the instructions that unpacking and multiplying would take.
template <uint32_t kTokens>
class DotProducts {
 public:
  __device__ __forceinline__ DotProducts(uint32_t vectors, uint32_t vector, uint32_t pitch)
      : vectors_(vectors), vector_(vector), pitch_(pitch) {}

  // Adds a step: this lane's vector w, the at-th of the row; zeros past its end.
  __device__ __forceinline__ void add(const uint4& w, uint32_t at) {
#pragma unroll
    for (uint32_t t = 0; t < kTokens; ++t) {
      uint4 v = {};
      if (at < vectors_) v = ptx::ld_shared_16(vector_ + t * pitch_ + at * 16);
      // Which of a vector's elements are which k of a product is of no importance as long as both agree.
      ptx::mma_m16n8k16_bf16(low_[t], {w.x, 0, w.y, 0}, {v.x, v.y});
      ptx::mma_m16n8k16_bf16(high_[t], {w.z, 0, w.w, 0}, {v.z, v.w});
    }
  }

  // This lane's parts.
  __device__ __forceinline__ void read(float (&parts)[kTokens]) const {
    // Lane l has row l / 4 in columns 2 (l % 4) and the next.
    const uint32_t lane = threadIdx.x % kWarpSize;
    const uint32_t row = lane / 4;
#pragma unroll
    for (uint32_t t = 0; t < kTokens; ++t) {
      const float sum = row % 2 == 0 ? low_[t][0] + high_[t][0] : low_[t][1] + high_[t][1];
      parts[t] = lane % 4 == row / 2 ? sum : 0.0f;
    }
  }

 private:
  uint32_t vectors_;
  uint32_t vector_;
  uint32_t pitch_;
  float low_[kTokens][4] = {};
  float high_[kTokens][4] = {};
};

// One warp's rows, one after another, kDepth steps ahead of what is multiplied. Every lane copies for itself alone, and
// so meets nobody.
//
// `Rows` knows the rows: `bool next(const uint4*& row, uint32_t& vectors)` finds the next one, whose elements, a
// multiple of eight, are that many vectors; false after the last. The whole warp calls everything.
template <uint32_t kDepth, class Rows>
class RowStream {
 public:
  // `ring`: address of kDepth steps of shared memory that are the warp's own.
  __device__ __forceinline__ RowStream(uint32_t ring, const Rows& rows)
      : rows_(rows), ring_(ring + threadIdx.x % kWarpSize * 16) {}

  // Asks for the first steps.
  __device__ __forceinline__ void begin() {
    turn();
    for (uint32_t i = 0; i < kDepth; ++i) ask();
  }

  // This lane's parts of the next row's products with kTokens vectors, `pitch` bytes apart from the address `vector`
  // on.
  template <uint32_t kTokens>
  __device__ __forceinline__ void multiply(uint32_t vectors, uint32_t vector, uint32_t pitch, float (&parts)[kTokens]) {
    const uint32_t lane = threadIdx.x % kWarpSize;
    DotProducts<kTokens> products(vectors, vector, pitch);
    for (uint32_t at = lane; at < vectors + lane; at += kWarpSize) {
      ptx::cp_async_wait<kDepth - 1>();
      products.add(ptx::ld_shared_16(ring_ + step_ * kStepBytes), at);
      ask();
    }
    products.read(parts);
  }

 private:
  // Asks for the next step, if there is one, to where the last one was read.
  __device__ __forceinline__ void ask() {
    if (left_ > 0) {
      const uint32_t lane = threadIdx.x % kWarpSize;
      ptx::cp_async_16(ring_ + step_ * kStepBytes, next_ + lane, lane < left_);
      if (left_ > kWarpSize) {
        next_ += kWarpSize;
        left_ -= kWarpSize;
      } else {
        turn();
      }
    }
    ptx::cp_async_commit();
    step_ = step_ == kDepth - 1 ? 0 : step_ + 1;
  }

  __device__ __forceinline__ void turn() {
    if (!rows_.next(next_, left_)) left_ = 0;
  }

  Rows rows_;
  uint32_t ring_;  // this lane's part of the first step
  uint32_t step_ = 0;
  const uint4* next_ = nullptr;
  uint32_t left_ = 0;  // vectors of the row, 0 after the last
};

// What a block has of a number of things: neighbours, whose weights lie together in memory.
struct Share {
  uint32_t first;
  uint32_t count;

  __device__ __forceinline__ explicit Share(uint32_t all) : Share(all, blockIdx.x) {}
  // Of another block.
  __device__ __forceinline__ Share(uint32_t all, uint32_t block)
      : first(static_cast<uint32_t>(uint64_t{all} * block / gridDim.x)),
        count(static_cast<uint32_t>(uint64_t{all} * (block + 1) / gridDim.x) - first) {}
};

}  // namespace anabranch
