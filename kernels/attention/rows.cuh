// Rows of a matrix in shared memory, as copies and ldmatrix touch every bank once.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "ptx/cp_async.cuh"
#include "ptx/special.cuh"

namespace anabranch::attention {

// Rows of kDim bf16 elements, in pieces of 128 bytes: chunk c (16 bytes) of row r lies at c ^ (r % 8) within its piece.
template <uint32_t kDim>
struct Rows {
  static constexpr uint32_t kPieces = (kDim + 63) / 64;
  static constexpr uint32_t kBytes = kPieces * 128;

  // For ldmatrix: a lane always addresses rows that are the same modulo 8, and chunks 2 s and 2 s + 1 of slice s (16
  // elements), so that one address and an exclusive-or serve all slices.
  struct Address {
    uint32_t first;

    // `shared` is row 0, on 128 bytes; `row` this lane's first row, `chunk` its chunk of slice 0.
    __device__ __forceinline__ Address(uint32_t shared, uint32_t row, uint32_t chunk)
        : first(shared + row * kBytes + (chunk ^ (row % 8)) * 16) {}

    // `skipped` is a multiple of 8.
    __device__ __forceinline__ uint32_t at(uint32_t skipped, uint32_t slice) const {
      return (first ^ (slice % 4 * 32)) + skipped * kBytes + slice / 4 * 128;
    }
  };

  // Copies kCount rows with kThreads threads: thread t copies chunk t % 8 of every piece of row t / 8 of each pass.
  // `row_at(r)` is the address of row r; rows from `rows` on, and elements from `dim` on, become zeros.
  template <uint32_t kCount, uint32_t kThreads, class RowAt>
  __device__ __forceinline__ static void copy(uint32_t shared, uint32_t rows, uint32_t dim, RowAt row_at) {
    constexpr uint32_t kStep = kThreads / 8;
    static_assert(kCount % kStep == 0 && kStep % 8 == 0);
    const uint32_t thread = threadIdx.x;
    const uint32_t row = thread / 8;
#pragma unroll
    for (uint32_t pass = 0; pass < kCount / kStep; ++pass) {
      const uint32_t skipped = pass * kStep;
      copy_row(thread, shared + skipped * kBytes, row_at(row + skipped) + thread % 8 * 8, row + skipped < rows, dim);
    }
  }

  // The same of rows `stride` elements apart, the first at `from`.
  template <uint32_t kCount, uint32_t kThreads>
  __device__ __forceinline__ static void copy(uint32_t shared, uint32_t rows, uint32_t dim, const __nv_bfloat16* from,
                                              uint32_t stride) {
    constexpr uint32_t kStep = kThreads / 8;
    static_assert(kCount % kStep == 0 && kStep % 8 == 0);
    const uint32_t thread = ptx::tid_x();
    const uint32_t row = thread / 8;
    from += static_cast<uint64_t>(row) * stride + thread % 8 * 8;
#pragma unroll
    for (uint32_t pass = 0; pass < kCount / kStep; ++pass) {
      const uint32_t skipped = pass * kStep;
      copy_row(thread, shared + skipped * kBytes, from, row + skipped < rows, dim);
      from += static_cast<uint64_t>(kStep) * stride;
    }
  }

 private:
  // A thread's chunks of a row; `shared` is where row 0 of the pass lies.
  __device__ __forceinline__ static void copy_row(uint32_t thread, uint32_t shared, const __nv_bfloat16* source,
                                                  bool valid, uint32_t dim) {
    const uint32_t row = thread / 8;
    const uint32_t chunk = thread % 8;
    const uint32_t target = shared + row * kBytes + (chunk ^ (row % 8)) * 16;
#pragma unroll
    for (uint32_t piece = 0; piece < kPieces; ++piece) {
      const uint32_t column = piece * 64 + chunk * 8;
      if (column < kDim) ptx::cp_async_16(target + piece * 128, source + piece * 64, valid && column < dim);
    }
  }
};

}  // namespace anabranch::attention
