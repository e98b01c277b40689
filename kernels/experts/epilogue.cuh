// What becomes of a warpgroup's sums: 64 rows of weights by kN tokens.
#pragma once

#include "common/bf16.cuh"
#include "common/silu.cuh"
#include "experts/pipeline.cuh"
#include "ptx/convert.cuh"
#include "ptx/shared.cuh"
#include "ptx/stmatrix.cuh"
#include "ptx/warpgroup.cuh"

namespace anabranch::experts {

// Results go out by way of shared memory, where 32 tokens have rows of 128 bytes, 16-byte chunks exchanged by the row's
// number: written 8 columns at a time, read as whole lines. Stored from the sums' registers they would reach memory in
// pieces of 16 and 32 bytes, which took a sixth of the time of a large layer.
__device__ __forceinline__ uint32_t out_address(uint32_t out, uint32_t token, uint32_t chunk) {
  return out + token * 128 + (chunk ^ token % 8) * 16;
}

// Stores `chunks` chunks of 8 columns of up to 32 tokens, from first_token of the item on. `result` has rows of
// `width`.
__device__ __forceinline__ void store_out(const Item& item, uint32_t out, uint32_t first_token, uint32_t chunks,
                                          uint16_t* result, uint32_t width, uint32_t first_column) {
  const uint32_t thread = threadIdx.x % 128;
  const uint32_t chunk = thread % 8;
  const uint32_t column = first_column + chunk * kVector;
  if (chunk >= chunks || column >= width) return;
#pragma unroll
  for (uint32_t token = thread / 8; token < kOutTokens; token += 16) {
    if (first_token + token >= item.rows) break;
    const uint4 value = ptx::ld_shared_16(out_address(out, token, chunk));
    // Not to be kept in the cache at the cost of weights and tokens.
    __stcs(reinterpret_cast<uint4*>(result + uint64_t{item.first_row + first_token + token} * width + column), value);
  }
}

// Hands kCount matrices of 8 columns by 8 tokens to shared memory. Lane l gives the address of token l % 8 of matrix
// l / 8.
template <int kCount>
__device__ __forceinline__ void put(uint32_t address, const uint32_t* words) {
  uint32_t r[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) r[i] = words[i];
  ptx::stmatrix_trans(address, r);
}

// h = silu(gate) * up: of a block's 64 rows of weights, every warp has eight columns of h.
template <int kN, uint32_t kHeight>
__device__ __forceinline__ void store_gated(const Args& args, const Item& item, const float (&sums)[kHeight][kN / 2],
                                            uint32_t first_column, uint32_t out, uint32_t barrier) {
  const uint32_t lane = threadIdx.x % kWarpSize;
  const uint32_t warp = threadIdx.x % 128 / kWarpSize;
#pragma unroll
  for (int first = 0; first < kN / 8; first += 4) {
    constexpr int kAll = kN / 8;
    const int left = kAll - first;
#pragma unroll
    for (uint32_t block = 0; block < kHeight; ++block) {
      uint32_t words[4] = {};
#pragma unroll
      for (int j = first; j < first + 4 && j < kAll; ++j) {
        const float* d = sums[block] + 4 * j;
        words[j - first] = ptx::cvt_bf16x2(silu(d[0]) * d[2], silu(d[1]) * d[3]);
      }
      const uint32_t to = out_address(out, lane, block * 4 + warp);
      if (left >= 4) {
        put<4>(to, words);
      } else if (left == 2) {
        put<2>(to, words);
      } else {
        put<1>(to, words);
      }
    }
    ptx::named_barrier(barrier, 128);
    store_out(item, out, first * 8, kHeight * 4, args.h, args.intermediate, first_column);
    ptx::named_barrier(barrier, 128);
  }
}

// y: of a block's 64 columns, every warp has 16.
template <int kN>
__device__ __forceinline__ void store_down(const Args& args, const Item& item, const float (&sums)[kN / 2],
                                           uint32_t first_column, uint32_t out, uint32_t barrier) {
  const uint32_t lane = threadIdx.x % kWarpSize;
  const uint32_t warp = threadIdx.x % 128 / kWarpSize;
#pragma unroll
  for (int first = 0; first < kN / 8; first += 4) {
#pragma unroll
    for (int j = first; j < first + 4 && j < kN / 8; j += 2) {
      uint32_t words[4] = {};
#pragma unroll
      for (int i = 0; i < 2 && j + i < kN / 8; ++i) {
        const float* d = sums + 4 * (j + i);
        words[2 * i] = ptx::cvt_bf16x2(d[0], d[1]);
        words[2 * i + 1] = ptx::cvt_bf16x2(d[2], d[3]);
      }
      const uint32_t token = (j - first) * 8 + lane / 16 * 8 + lane % 8;
      const uint32_t to = out_address(out, token, warp * 2 + lane / 8 % 2);
      if (j + 1 < kN / 8) {
        put<4>(to, words);
      } else {
        put<2>(to, words);
      }
    }
    ptx::named_barrier(barrier, 128);
    store_out(item, out, first * 8, 8, args.y, args.hidden, first_column);
    ptx::named_barrier(barrier, 128);
  }
}

// Tokens that a warpgroup sums up at a time: eight threads for 64 columns of each.
constexpr uint32_t kSumTokens = 16;

// out[t] = sum_k weights[t, k] * y[inverse[t, k]] in 64 columns of 16 tokens, by one warpgroup. k ascends. `wait_for_y`
// returns once y is complete in these columns; the whole warpgroup calls it.
template <class Wait>
__device__ __forceinline__ void combine_columns(const Args& args, const int32_t* inverse, uint32_t first_column,
                                                uint32_t first_token, const Wait& wait_for_y) {
  constexpr uint32_t kAtOnce = 8;
  const uint32_t thread = threadIdx.x % 128;
  const uint32_t column = first_column + thread % 8 * kVector;
  const uint32_t token = first_token + thread / 8;
  const bool inside = column < args.hidden && token < args.num_tokens;
  const uint32_t first = token * args.topk;
  float sum[kVector] = {};
  for (uint32_t base = 0; base < args.topk; base += kAtOnce) {
    // Where to look is known before there is anything to see.
    uint32_t row[kAtOnce];
    float weight[kAtOnce];
#pragma unroll
    for (uint32_t i = 0; i < kAtOnce; ++i) {
      const bool there = inside && base + i < args.topk;
      row[i] = there ? static_cast<uint32_t>(inverse[first + base + i]) : args.num_rows;
      weight[i] = there ? args.weights[first + base + i] : 0.0f;
    }
    if (base == 0) wait_for_y();
    uint4 packed[kAtOnce];
#pragma unroll
    for (uint32_t i = 0; i < kAtOnce; ++i) {
      // Other blocks wrote it: past the first-level cache.
      if (row[i] < args.num_rows) {
        packed[i] = __ldcg(reinterpret_cast<const uint4*>(args.y + uint64_t{row[i]} * args.hidden + column));
      }
    }
#pragma unroll
    for (uint32_t i = 0; i < kAtOnce; ++i) {
      if (row[i] >= args.num_rows) continue;
      float value[kVector];
      unpack(value, packed[i]);
#pragma unroll
      for (uint32_t j = 0; j < kVector; ++j) sum[j] = fmaf(weight[i], value[j], sum[j]);
    }
  }
  if (inside) *reinterpret_cast<uint4*>(args.out + uint64_t{token} * args.hidden + column) = pack(sum);
}

}  // namespace anabranch::experts
