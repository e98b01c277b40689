// From a warp's sums to y: activation in float32, one rounding, stores of 16 bytes a lane where the tile is wide
// enough.
#pragma once

#include "common/silu.cuh"
#include "common/warp.cuh"
#include "grouped_gemm/fragments.cuh"
#include "grouped_gemm/scheduler.cuh"

namespace anabranch::grouped_gemm {

template <Epilogue kEpilogue>
__device__ __forceinline__ float activate(const Args& args, float x) {
  if constexpr (kEpilogue == Epilogue::kActivated) {
    if (args.gelu) return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
    return x < 0.0f ? 0.0f : x;  // NaN stays NaN
  } else {
    return x;
  }
}

__device__ __forceinline__ uint32_t pack(float2 pair) {
  const __nv_bfloat162 packed = __float22bfloat162_rn(pair);
  return reinterpret_cast<const uint32_t&>(packed);
}

// Among the four lanes of a row: lane q gives its pair of columns of four products and receives all of product q.
__device__ __forceinline__ void transpose_quad(uint32_t (&words)[4]) {
  const uint32_t lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (uint32_t bit = 1; bit <= 2; bit *= 2) {
    const bool high = (lane & bit) != 0;
#pragma unroll
    for (uint32_t i = 0; i < 4; ++i) {
      if ((i & bit) != 0) continue;
      const uint32_t received = __shfl_xor_sync(kFullWarp, high ? words[i] : words[i + bit], bit);
      (high ? words[i] : words[i + bit]) = received;
    }
  }
}

template <class Tile, Epilogue kEpilogue>
struct Store {
  static constexpr bool kPaired = kEpilogue == Epilogue::kSwiGlu;
  static constexpr uint32_t kProducts = kPaired ? Tile::kMmaN / 2 : Tile::kMmaN;  // across the warp's columns of y
  static constexpr uint32_t kGroup = kProducts % 4 == 0 ? 4 : 1;

  // What is added to a lane's pair of columns: to the product, or to gate and to up.
  struct Bias {
    float2 first;
    float2 up;
  };

  static __device__ __forceinline__ Bias bias_of(const Args& args, uint32_t expert, uint32_t column) {
    Bias bias = {};
    if (args.bias == nullptr || column >= args.columns) return bias;
    const float* from = args.bias + static_cast<uint64_t>(expert) * args.columns * (kPaired ? 2 : 1) + column;
    bias.first = *reinterpret_cast<const float2*>(from);
    if constexpr (kPaired) bias.up = *reinterpret_cast<const float2*>(from + args.columns);
    return bias;
  }

  // This lane's pair of values of y in row 8 half + lane / 4 of products i and columns of products j.
  static __device__ __forceinline__ float2 value(const Args& args, const Accumulators<Tile>& sums, uint32_t i,
                                                 uint32_t j, uint32_t half, const Bias& bias) {
    if constexpr (kPaired) {
      const float (&gate)[4] = sums[i][2 * j];
      const float (&up)[4] = sums[i][2 * j + 1];
      return {silu(gate[2 * half] + bias.first.x) * (up[2 * half] + bias.up.x),
              silu(gate[2 * half + 1] + bias.first.y) * (up[2 * half + 1] + bias.up.y)};
    } else {
      const float (&sum)[4] = sums[i][j];
      return {activate<kEpilogue>(args, sum[2 * half] + bias.first.x),
              activate<kEpilogue>(args, sum[2 * half + 1] + bias.first.y)};
    }
  }

  static __device__ __forceinline__ void tile(const Args& args, const TileAt& at, const Accumulators<Tile>& sums,
                                              uint32_t warp_m, uint32_t warp_n) {
    const uint32_t lane = threadIdx.x % kWarpSize;
    const uint32_t first_column = at.first_column + warp_n * kProducts * 8;
    const uint32_t first_row = warp_m * Tile::kWarpM + lane / 4;
#pragma unroll
    for (uint32_t group = 0; group < kProducts; group += kGroup) {
      Bias bias[kGroup];
#pragma unroll
      for (uint32_t j = 0; j < kGroup; ++j) {
        bias[j] = bias_of(args, at.expert, first_column + (group + j) * 8 + lane % 4 * 2);
      }
#pragma unroll
      for (uint32_t i = 0; i < Tile::kMmaM; ++i) {
#pragma unroll
        for (uint32_t half = 0; half < 2; ++half) {
          const uint32_t row = first_row + i * 16 + half * 8;
          float2 values[kGroup];
#pragma unroll
          for (uint32_t j = 0; j < kGroup; ++j) values[j] = value(args, sums, i, group + j, half, bias[j]);
          const uint64_t y_row = static_cast<uint64_t>(at.first_row + row) * args.columns;
          store(args, y_row, first_column + group * 8, row < at.rows, values);
        }
      }
    }
  }

  // `column` is the first of the group's.
  static __device__ __forceinline__ void store(const Args& args, uint64_t y_row, uint32_t column, bool valid,
                                               const float2 (&values)[kGroup]) {
    const uint32_t quad_lane = threadIdx.x % 4;
    if constexpr (kGroup == 4) {
      if (!args.wide_y) {
        uint32_t words[4];
#pragma unroll
        for (uint32_t j = 0; j < 4; ++j) words[j] = pack(values[j]);
        transpose_quad(words);
        column += quad_lane * 8;
        if (valid && column < args.columns) {
          __nv_bfloat16* to = static_cast<__nv_bfloat16*>(args.y) + y_row + column;
          *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
        }
        return;
      }
    }
    column += quad_lane * 2;
#pragma unroll
    for (uint32_t j = 0; j < kGroup; ++j, column += 8) {
      if (!valid || column >= args.columns) continue;
      if (args.wide_y) {
        *reinterpret_cast<float2*>(static_cast<float*>(args.y) + y_row + column) = values[j];
      } else {
        *reinterpret_cast<uint32_t*>(static_cast<__nv_bfloat16*>(args.y) + y_row + column) = pack(values[j]);
      }
    }
  }
};

}  // namespace anabranch::grouped_gemm
