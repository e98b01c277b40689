// One slice of a warp's operands in registers, and its products.
#pragma once

#include "grouped_gemm/config.cuh"
#include "ptx/ldmatrix.cuh"
#include "ptx/mma.cuh"

namespace anabranch::grouped_gemm {

template <class Tile>
using Accumulators = float[Tile::kMmaM][Tile::kMmaN][4];

// Where a lane's rows lie in a stage. Rows that a lane ever addresses are the same modulo eight, so that slice s lies
// at its chunk of slice 0 exclusive-or 32 s.
template <class Tile>
struct Addresses {
  uint32_t a;
  uint32_t b;
  uint32_t chunk_a;
  uint32_t chunk_b;

  __device__ __forceinline__ Addresses(uint32_t stages, uint32_t warp_m, uint32_t warp_n) {
    const uint32_t lane = threadIdx.x % 32;
    // Matrices 0 and 1 of x are rows 0-7 and 8-15 at depth 0-7, 2 and 3 the same at 8-15; of the weights 0 and 1 are
    // rows 0-7 at depth 0-7 and 8-15.
    a = stages + (warp_m * Tile::kWarpM + lane % 16) * kRowBytes;
    b = stages + Tile::kBytesA + (warp_n * Tile::kWarpN + lane % 8 + lane / 16 * 8) * kRowBytes;
    chunk_a = ((lane / 16) ^ (lane % 8)) * 16;
    chunk_b = ((lane / 8 % 2) ^ (lane % 8)) * 16;
  }
};

template <class Tile>
struct Fragments {
  uint32_t a[Tile::kMmaM][4];
  uint32_t b[Tile::kMmaN][2];

  // `stage` is a number of bytes.
  __device__ __forceinline__ void load(const Addresses<Tile>& at, uint32_t stage, uint32_t slice) {
    const uint32_t from_a = at.a + stage + (at.chunk_a ^ (slice * 32));
    const uint32_t from_b = at.b + stage + (at.chunk_b ^ (slice * 32));
#pragma unroll
    for (uint32_t i = 0; i < Tile::kMmaM; ++i) {
      ptx::ldmatrix_x4(a[i][0], a[i][1], a[i][2], a[i][3], from_a + i * 16 * kRowBytes);
    }
#pragma unroll
    for (uint32_t j = 0; j < Tile::kMmaN; j += 2) {
      ptx::ldmatrix_x4(b[j][0], b[j][1], b[j + 1][0], b[j + 1][1], from_b + j * 8 * kRowBytes);
    }
  }

  // Down one column of products and up the next: each takes over an operand of the one before.
  __device__ __forceinline__ void multiply(Accumulators<Tile>& sums) const {
#pragma unroll
    for (uint32_t j = 0; j < Tile::kMmaN; ++j) {
#pragma unroll
      for (uint32_t i = 0; i < Tile::kMmaM; ++i) {
        const uint32_t row = j % 2 == 0 ? i : Tile::kMmaM - 1 - i;
        ptx::mma_m16n8k16_bf16(sums[row][j], a[row], b[j]);
      }
    }
  }
};

}  // namespace anabranch::grouped_gemm
