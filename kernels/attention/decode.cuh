// Attention of few queries a sequence; attention.cu says what it computes.
//
// The heads of a key head's group, of all queries, are rows of one tile: each key is read once for all of them. The
// keys of a sequence are split among blocks, as many as fill the GPU (Flash-Decoding); merge.cuh puts the parts
// together.
//
// Warps share a tile twice over: for the scores each takes some of the rows and keys, for the sums each takes all rows
// and some elements of the values, which is what lets a value of 512 elements stay in registers. In between, maxima and
// weights pass through shared memory. Two stages: one tile of keys and values comes while the other is worked on.
#pragma once

#include "attention/args.cuh"
#include "attention/rows.cuh"
#include "common/warp.cuh"
#include "ptx/convert.cuh"
#include "ptx/grid_dependency.cuh"
#include "ptx/ldmatrix.cuh"
#include "ptx/ldmatrix_trans.cuh"
#include "ptx/math.cuh"
#include "ptx/mma.cuh"

namespace anabranch::attention {

// With kShared values are the first elements of keys.
template <uint32_t kKeyDim_, uint32_t kValueDim_, uint32_t kRows_, uint32_t kKeys_, uint32_t kWarpsKeys_, bool kShared_,
          uint32_t kBlocksPerSm_>
struct DecodeTile {
  static constexpr uint32_t kKeyDim = kKeyDim_;
  static constexpr uint32_t kValueDim = kValueDim_;
  static constexpr uint32_t kRows = kRows_;
  static constexpr uint32_t kKeys = kKeys_;
  static constexpr bool kShared = kShared_;
  static constexpr uint32_t kBlocksPerSm = kBlocksPerSm_;
  // A warp scores 16 rows.
  static constexpr uint32_t kWarpsRows = kRows / 16;
  static constexpr uint32_t kWarpsKeys = kWarpsKeys_;
  static constexpr uint32_t kWarps = kWarpsRows * kWarpsKeys;
  static constexpr uint32_t kThreads = 32 * kWarps;
  static constexpr uint32_t kWarpKeys = kKeys / kWarpsKeys;
  static constexpr uint32_t kWarpValue = kValueDim / kWarps;
  static constexpr uint32_t kMmaKeys = kWarpKeys / 8;
  static constexpr uint32_t kMmaRows = kRows / 16;
  static constexpr uint32_t kMmaValue = kWarpValue / 8;
  using Key = Rows<kKeyDim>;
  // Values that are keys keep the keys' rows.
  using Value = Rows<kShared ? kKeyDim : kValueDim>;
  using Weight = Rows<64>;
  static constexpr uint32_t kQueryBytes = kRows * Key::kBytes;
  static constexpr uint32_t kKeyBytes = kKeys * Key::kBytes;
  static constexpr uint32_t kStageBytes = kKeyBytes + (kShared ? 0 : kKeys * Value::kBytes);
  static constexpr uint32_t kWeightBytes = kRows * Weight::kBytes;
  static constexpr uint32_t kStatistics = kWarpsKeys * kRows;
  static constexpr uint32_t kSharedBytes = kQueryBytes + 2 * kStageBytes + kWeightBytes + 2 * 4 * kStatistics;
  static_assert(kLeastBlock % kKeys == 0 && kKeys % 16 == 0 && kWarpValue % 16 == 0 && kKeyDim % 32 == 0);
  static_assert(kMmaKeys == 1 || kMmaKeys == 2);
};

// Scores of 16 rows and kMmaKeys * 8 keys. Two sums, of even and of odd slices, so that products need not wait for each
// other.
template <class Tile>
__device__ __forceinline__ void score(float (&scores)[Tile::kMmaKeys][4], const typename Tile::Key::Address& q,
                                      const typename Tile::Key::Address& k) {
  float odd[Tile::kMmaKeys][4] = {};
#pragma unroll
  for (uint32_t slice = 0; slice < Tile::kKeyDim / 16; slice += 2) {
    uint32_t a[2][4];
    uint32_t b[2][Tile::kMmaKeys][2];
#pragma unroll
    for (uint32_t i = 0; i < 2; ++i) ptx::ldmatrix_x4(a[i][0], a[i][1], a[i][2], a[i][3], q.at(0, slice + i));
    if constexpr (Tile::kMmaKeys == 1) {
      ptx::ldmatrix_x4(b[0][0][0], b[0][0][1], b[1][0][0], b[1][0][1], k.at(0, slice));
    } else {
#pragma unroll
      for (uint32_t i = 0; i < 2; ++i) {
        ptx::ldmatrix_x4(b[i][0][0], b[i][0][1], b[i][1][0], b[i][1][1], k.at(0, slice + i));
      }
    }
#pragma unroll
    for (uint32_t n = 0; n < Tile::kMmaKeys; ++n) {
      ptx::mma_m16n8k16_bf16(scores[n], a[0], b[0][n]);
      ptx::mma_m16n8k16_bf16(odd[n], a[1], b[1][n]);
    }
  }
#pragma unroll
  for (uint32_t n = 0; n < Tile::kMmaKeys; ++n) {
#pragma unroll
    for (uint32_t i = 0; i < 4; ++i) scores[n][i] += odd[n][i];
  }
}

__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, 1));
  return fmaxf(x, __shfl_xor_sync(kFullWarp, x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(kFullWarp, x, 1);
  return x + __shfl_xor_sync(kFullWarp, x, 2);
}

// What weights are relative to, and what a sum shrinks by, as a row's largest score grows.
struct Rescale {
  float base;
  float shrink;

  __device__ __forceinline__ Rescale(float& largest, float candidate) {
    const float next = fmaxf(largest, candidate);
    // A row that has seen nothing has no largest score: its weights are 0, not NaN.
    base = next == -INFINITY ? 0.0f : next;
    shrink = ptx::ex2_approx(largest - base);
    largest = next;
  }
};

// Grid: x tiles of rows of all key heads of all sequences, y splits of the keys.
template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocksPerSm) decode(const __grid_constant__ Args args) {
  ptx::launch_dependents();
  ptx::wait_for_prerequisites();
  extern __shared__ __align__(128) uint8_t shared[];
  const uint32_t shared_q = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const uint32_t shared_k = shared_q + Tile::kQueryBytes;
  const uint32_t shared_v = Tile::kShared ? shared_k : shared_k + Tile::kKeyBytes;
  uint8_t* const weights = shared + Tile::kQueryBytes + 2 * Tile::kStageBytes;
  // [kWarpsKeys][kRows] each: what a warp found among its keys.
  float* const maxima = reinterpret_cast<float*>(weights + Tile::kWeightBytes);
  float* const totals = maxima + Tile::kStatistics;

  const uint32_t kv_head = blockIdx.x / args.row_tiles % args.num_kv_heads;
  const Sequence sequence(args, blockIdx.x / args.row_tiles / args.num_kv_heads);
  const uint32_t first_row = blockIdx.x % args.row_tiles * Tile::kRows;
  const uint32_t rows = sequence.queries * args.group;
  if (first_row >= rows) return;

  // Row r is query r / group of head kv_head * group + r % group.
  const uint32_t last_row = min(first_row + Tile::kRows, rows) - 1;
  const uint32_t visible = static_cast<uint32_t>(max(sequence.visible(last_row / args.group), 0));
  const uint32_t chunk =
      ((sequence.keys + args.splits - 1) / args.splits + Tile::kKeys - 1) / Tile::kKeys * Tile::kKeys;
  const uint32_t begin = min(blockIdx.y * chunk, visible);
  const uint32_t end = min(begin + chunk, visible);
  const uint32_t tiles = (end - begin + Tile::kKeys - 1) / Tile::kKeys;
  // Of the tile that is copied next.
  uint32_t block = tiles > 0 ? sequence.block(args, begin) : 0;
  const auto copy_tile = [&](uint32_t tile) {
    const uint32_t first = begin + tile * Tile::kKeys;
    const uint64_t row = cache_row(args, block, first);
    const uint32_t stage = tile % 2 * Tile::kStageBytes;
    Tile::Key::template copy<Tile::kKeys, Tile::kThreads>(shared_k + stage, end - first, args.key_dim,
                                                          args.keys + row * args.key_stride + kv_head * args.key_dim,
                                                          args.key_stride);
    if constexpr (!Tile::kShared) {
      Tile::Value::template copy<Tile::kKeys, Tile::kThreads>(
          shared_v + stage, end - first, args.value_dim,
          args.values + row * args.value_stride + kv_head * args.value_dim, args.value_stride);
    }
    ptx::cp_async_commit();
    if (tile + 1 < tiles) block = sequence.block(args, first + Tile::kKeys);
  };

  const auto output_row = [&](uint32_t row) {
    const uint64_t token = sequence.first_token + row / args.group;
    return token * args.num_heads + kv_head * args.group + row % args.group;
  };
  if (tiles > 0) {
    Tile::Key::template copy<Tile::kRows, Tile::kThreads>(shared_q, rows - first_row, args.key_dim, [&](uint32_t row) {
      return args.q + output_row(first_row + row) * args.key_dim;
    });
    copy_tile(0);
  }

  const uint32_t lane = threadIdx.x % 32;
  const uint32_t warp = threadIdx.x / 32;
  const uint32_t warp_row = warp / Tile::kWarpsKeys * 16;
  const uint32_t warp_keys = warp % Tile::kWarpsKeys;
  const uint32_t first_key = warp_keys * Tile::kWarpKeys;
  const typename Tile::Key::Address q_at(shared_q, warp_row + lane % 16, lane / 16);
  // Eight keys: the four chunks of two slices. Sixteen: the two of one.
  typename Tile::Key::Address k_at(shared_k, first_key + (Tile::kMmaKeys == 1 ? lane % 8 : lane % 8 + lane / 16 * 8),
                                   Tile::kMmaKeys == 1 ? lane / 8 : lane / 8 % 2);
  const typename Tile::Weight::Address w_at(static_cast<uint32_t>(__cvta_generic_to_shared(weights)), lane % 16,
                                            lane / 16);
  typename Tile::Value::Address v_at(shared_v, lane % 16, lane / 16);

  float sums[Tile::kMmaRows][Tile::kMmaValue][4] = {};
  // Of all rows, for the sums, and of the rows that this warp scores.
  float row_max[Tile::kMmaRows][2];
  float scored_max[2] = {-INFINITY, -INFINITY};
  float scored_sum[2] = {};
#pragma unroll
  for (uint32_t m = 0; m < Tile::kMmaRows; ++m) row_max[m][0] = row_max[m][1] = -INFINITY;
  int scored_visible[2];
#pragma unroll
  for (uint32_t half = 0; half < 2; ++half) {
    const uint32_t row = first_row + warp_row + half * 8 + lane / 4;
    scored_visible[half] = sequence.visible(row / args.group) - static_cast<int>(begin);
  }
  const auto largest_of = [&](uint32_t row) {
    float largest = maxima[row];
#pragma unroll
    for (uint32_t part = 1; part < Tile::kWarpsKeys; ++part) {
      largest = fmaxf(largest, maxima[part * Tile::kRows + row]);
    }
    return largest;
  };

#pragma unroll 1
  for (uint32_t tile = 0; tile < tiles; ++tile) {
    ptx::cp_async_wait<0>();
    __syncthreads();  // the tile is here, and nobody reads the one before, its maxima or its weights
    if (tile + 1 < tiles) copy_tile(tile + 1);

    float scores[Tile::kMmaKeys][4] = {};
    score<Tile>(scores, q_at, k_at);
#pragma unroll
    for (uint32_t half = 0; half < 2; ++half) {
      float largest = -INFINITY;
#pragma unroll
      for (uint32_t n = 0; n < Tile::kMmaKeys; ++n) {
#pragma unroll
        for (uint32_t i = 0; i < 2; ++i) {
          const int key = static_cast<int>(tile * Tile::kKeys + first_key + n * 8 + lane % 4 * 2 + i);
          float& score = scores[n][2 * half + i];
          score =
              key < scored_visible[half] && key < static_cast<int>(end - begin) ? score * args.scale_log2 : -INFINITY;
          largest = fmaxf(largest, score);
        }
      }
      largest = quad_max(largest);
      if (lane % 4 == 0) maxima[warp_keys * Tile::kRows + warp_row + half * 8 + lane / 4] = largest;
    }
    __syncthreads();  // maxima are here

#pragma unroll
    for (uint32_t half = 0; half < 2; ++half) {
      const uint32_t row = warp_row + half * 8 + lane / 4;
      const Rescale rescale(scored_max[half], largest_of(row));
      float sum = scored_sum[half] * rescale.shrink;
#pragma unroll
      for (uint32_t n = 0; n < Tile::kMmaKeys; ++n) {
        const float low = ptx::ex2_approx(scores[n][2 * half] - rescale.base);
        const float high = ptx::ex2_approx(scores[n][2 * half + 1] - rescale.base);
        sum += low + high;
        const uint32_t at = row * Tile::Weight::kBytes + ((first_key / 8 + n) ^ (row % 8)) * 16 + lane % 4 * 4;
        *reinterpret_cast<uint32_t*>(weights + at) = ptx::cvt_bf16x2(low, high);
      }
      scored_sum[half] = sum;
    }
#pragma unroll
    for (uint32_t m = 0; m < Tile::kMmaRows; ++m) {
#pragma unroll
      for (uint32_t half = 0; half < 2; ++half) {
        const Rescale rescale(row_max[m][half], largest_of(m * 16 + half * 8 + lane / 4));
#pragma unroll
        for (uint32_t n = 0; n < Tile::kMmaValue; ++n) {
          sums[m][n][2 * half] *= rescale.shrink;
          sums[m][n][2 * half + 1] *= rescale.shrink;
        }
      }
    }
    __syncthreads();  // weights are here

#pragma unroll
    for (uint32_t slice = 0; slice < Tile::kKeys / 16; ++slice) {
      uint32_t a[Tile::kMmaRows][4];
#pragma unroll
      for (uint32_t m = 0; m < Tile::kMmaRows; ++m) {
        ptx::ldmatrix_x4(a[m][0], a[m][1], a[m][2], a[m][3], w_at.at(m * 16, slice));
      }
#pragma unroll
      for (uint32_t n = 0; n < Tile::kMmaValue; n += 2) {
        uint32_t b[2][2];
        const uint32_t columns = warp * (Tile::kWarpValue / 16) + n / 2;
        ptx::ldmatrix_x4_trans(b[0][0], b[0][1], b[1][0], b[1][1], v_at.at(slice * 16, columns));
#pragma unroll
        for (uint32_t m = 0; m < Tile::kMmaRows; ++m) {
          ptx::mma_m16n8k16_bf16(sums[m][n], a[m], b[0]);
          ptx::mma_m16n8k16_bf16(sums[m][n + 1], a[m], b[1]);
        }
      }
    }
    // To the other stage.
    const uint32_t step = tile % 2 == 0 ? Tile::kStageBytes : 0 - Tile::kStageBytes;
    k_at.first += step;
    v_at.first += step;
  }

#pragma unroll
  for (uint32_t half = 0; half < 2; ++half) {
    const float sum = quad_sum(scored_sum[half]);
    if (lane % 4 == 0) totals[warp_keys * Tile::kRows + warp_row + half * 8 + lane / 4] = sum;
  }
  __syncthreads();
  const uint64_t part = static_cast<uint64_t>(blockIdx.y) * args.num_tokens * args.num_heads;
#pragma unroll
  for (uint32_t m = 0; m < Tile::kMmaRows; ++m) {
#pragma unroll
    for (uint32_t half = 0; half < 2; ++half) {
      const uint32_t row = m * 16 + half * 8 + lane / 4;
      if (first_row + row > last_row) continue;
      float total = totals[row];
#pragma unroll
      for (uint32_t i = 1; i < Tile::kWarpsKeys; ++i) total += totals[i * Tile::kRows + row];
      const uint64_t to = output_row(first_row + row);
      if (args.splits > 1 && warp == 0 && lane % 4 == 0) {
        args.partial_weights[part + to] = make_float2(row_max[m][half], total);
      }
      const float inverse = 1.0f / total;
#pragma unroll
      for (uint32_t n = 0; n < Tile::kMmaValue; ++n) {
        const uint32_t column = warp * Tile::kWarpValue + n * 8 + lane % 4 * 2;
        // A split that saw nothing says so by its weights; its sums are not read.
        if (column >= args.value_dim || (args.splits > 1 && tiles == 0)) continue;
        const float low = sums[m][n][2 * half];
        const float high = sums[m][n][2 * half + 1];
        if (args.splits > 1) {
          *reinterpret_cast<float2*>(args.partial_sums + (part + to) * args.value_dim + column) =
              make_float2(low, high);
        } else {
          *reinterpret_cast<uint32_t*>(args.out + to * args.value_dim + column) =
              ptx::cvt_bf16x2(low * inverse, high * inverse);
        }
      }
    }
  }
}

}  // namespace anabranch::attention
