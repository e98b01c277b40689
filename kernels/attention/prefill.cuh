// Attention of many queries a sequence; attention.cu says what it computes.
//
// A block takes kRows queries of one head and walks the keys, kKeys at a time (FlashAttention-2, arXiv 2307.08691).
// Four warps share the queries, 32 each: a fragment of keys or values serves two products, so that shared memory keeps
// up with mma.sync. Scores stay in registers and become the operand of the second product as they are. While scores are
// made the values come, while values are added up the next keys come; a second block of the multiprocessor fills the
// gaps. Blocks with most keys start first.
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
#include "ptx/special.cuh"

namespace anabranch::attention {

template <uint32_t kKeyDim_, uint32_t kValueDim_, uint32_t kBlocksPerSm_>
struct PrefillTile {
  static constexpr uint32_t kKeyDim = kKeyDim_;
  static constexpr uint32_t kValueDim = kValueDim_;
  static constexpr uint32_t kBlocksPerSm = kBlocksPerSm_;
  static constexpr uint32_t kThreads = 128;
  static constexpr uint32_t kRows = 128;
  static constexpr uint32_t kKeys = 64;
  static constexpr uint32_t kWarpRows = kRows / (kThreads / 32);
  // Products of 16 x 8: down the queries, over the keys, over the elements of a value.
  static constexpr uint32_t kMmaM = kWarpRows / 16;
  static constexpr uint32_t kMmaKeys = kKeys / 8;
  static constexpr uint32_t kMmaValue = kValueDim / 8;
  using Key = Rows<kKeyDim>;
  using Value = Rows<kValueDim>;
  static constexpr uint32_t kQueryBytes = kRows * Key::kBytes;
  static constexpr uint32_t kKeyBytes = kKeys * Key::kBytes;
  static constexpr uint32_t kSharedBytes = kQueryBytes + kKeyBytes + kKeys * Value::kBytes;
  static_assert(kKeyDim % 16 == 0 && kValueDim % 16 == 0 && kLeastBlock % kKeys == 0);
};

template <class Tile>
using Scores = float[Tile::kMmaM][Tile::kMmaKeys][4];
template <class Tile>
using Sums = float[Tile::kMmaM][Tile::kMmaValue][4];
// Scores as bf16, as the second product takes them.
template <class Tile>
using Weights = uint32_t[Tile::kMmaM][Tile::kMmaKeys][2];

// scores = Q K^T for this warp's rows.
template <class Tile>
__device__ __forceinline__ void score(Scores<Tile>& scores, const typename Tile::Key::Address& q,
                                      const typename Tile::Key::Address& k) {
#pragma unroll
  for (uint32_t slice = 0; slice < Tile::kKeyDim / 16; ++slice) {
    uint32_t a[Tile::kMmaM][4];
#pragma unroll
    for (uint32_t m = 0; m < Tile::kMmaM; ++m) {
      ptx::ldmatrix_x4(a[m][0], a[m][1], a[m][2], a[m][3], q.at(m * 16, slice));
    }
#pragma unroll
    for (uint32_t n = 0; n < Tile::kMmaKeys; n += 2) {
      uint32_t b[2][2];
      ptx::ldmatrix_x4(b[0][0], b[1][0], b[0][1], b[1][1], k.at(n * 8, slice));
#pragma unroll
      for (uint32_t m = 0; m < Tile::kMmaM; ++m) {
        ptx::mma_m16n8k16_bf16(scores[m][n], a[m], b[0]);
        ptx::mma_m16n8k16_bf16(scores[m][n + 1], a[m], b[1]);
      }
    }
  }
}

// Minus infinity where a key is not visible. `visible` is that of the lane's first row, `first_key` the lane's first.
template <class Tile>
__device__ __forceinline__ void mask(Scores<Tile>& scores, int visible, int first_key) {
#pragma unroll
  for (uint32_t m = 0; m < Tile::kMmaM; ++m) {
#pragma unroll
    for (uint32_t n = 0; n < Tile::kMmaKeys; ++n) {
#pragma unroll
      for (uint32_t i = 0; i < 4; ++i) {
        const int key = first_key + static_cast<int>(n * 8 + i % 2);
        if (key >= visible + static_cast<int>(m * 16 + i / 2 * 8)) scores[m][n][i] = -INFINITY;
      }
    }
  }
}

// Scores become weights relative to the row's largest so far; what was summed before shrinks accordingly.
template <class Tile>
__device__ __forceinline__ void weigh(Weights<Tile>& weights, const Scores<Tile>& scores, Sums<Tile>& sums,
                                      float (&row_max)[Tile::kMmaM][2], float (&row_sum)[Tile::kMmaM][2],
                                      float scale_log2) {
#pragma unroll
  for (uint32_t m = 0; m < Tile::kMmaM; ++m) {
#pragma unroll
    for (uint32_t half = 0; half < 2; ++half) {
      float largest = row_max[m][half];
#pragma unroll
      for (uint32_t n = 0; n < Tile::kMmaKeys; ++n) {
        largest = fmaxf(largest, fmaxf(scores[m][n][2 * half], scores[m][n][2 * half + 1]));
      }
      largest = fmaxf(largest, __shfl_xor_sync(kFullWarp, largest, 1));
      largest = fmaxf(largest, __shfl_xor_sync(kFullWarp, largest, 2));
      // A row that has seen nothing has no largest score: its weights are 0, not NaN.
      const float base = largest == -INFINITY ? 0.0f : largest * scale_log2;
      const float shrink = ptx::ex2_approx(__fmaf_rn(row_max[m][half], scale_log2, -base));
      row_max[m][half] = largest;
      float sum = row_sum[m][half] * shrink;
#pragma unroll
      for (uint32_t n = 0; n < Tile::kMmaKeys; ++n) {
        const float low = ptx::ex2_approx(__fmaf_rn(scores[m][n][2 * half], scale_log2, -base));
        const float high = ptx::ex2_approx(__fmaf_rn(scores[m][n][2 * half + 1], scale_log2, -base));
        weights[m][n][half] = ptx::cvt_bf16x2(low, high);
        sum += low + high;
      }
      row_sum[m][half] = sum;
#pragma unroll
      for (uint32_t n = 0; n < Tile::kMmaValue; ++n) {
        sums[m][n][2 * half] *= shrink;
        sums[m][n][2 * half + 1] *= shrink;
      }
    }
  }
}

// sums += weights V
template <class Tile>
__device__ __forceinline__ void add_values(Sums<Tile>& sums, const Weights<Tile>& weights,
                                           const typename Tile::Value::Address& v) {
#pragma unroll
  for (uint32_t slice = 0; slice < Tile::kKeys / 16; ++slice) {
    uint32_t a[Tile::kMmaM][4];
#pragma unroll
    for (uint32_t m = 0; m < Tile::kMmaM; ++m) {
#pragma unroll
      for (uint32_t i = 0; i < 4; ++i) a[m][i] = weights[m][2 * slice + i / 2][i % 2];
    }
#pragma unroll
    for (uint32_t n = 0; n < Tile::kMmaValue; n += 2) {
      uint32_t b[2][2];
      ptx::ldmatrix_x4_trans(b[0][0], b[0][1], b[1][0], b[1][1], v.at(slice * 16, n / 2));
#pragma unroll
      for (uint32_t m = 0; m < Tile::kMmaM; ++m) {
        ptx::mma_m16n8k16_bf16(sums[m][n], a[m], b[0]);
        ptx::mma_m16n8k16_bf16(sums[m][n + 1], a[m], b[1]);
      }
    }
  }
}

// Grid: x heads of all sequences, y tiles of queries, the last ones first.
template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocksPerSm) prefill(const __grid_constant__ Args args) {
  ptx::launch_dependents();
  ptx::wait_for_prerequisites();
  extern __shared__ __align__(128) uint8_t shared[];
  const uint32_t shared_q = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const uint32_t shared_k = shared_q + Tile::kQueryBytes;
  const uint32_t shared_v = shared_k + Tile::kKeyBytes;
  const Sequence sequence(args, blockIdx.x / args.num_heads);
  const uint32_t head = blockIdx.x % args.num_heads;
  const uint32_t first_query = (gridDim.y - 1 - blockIdx.y) * Tile::kRows;
  if (first_query >= sequence.queries) return;

  const uint32_t last_query = min(first_query + Tile::kRows, sequence.queries) - 1;
  const uint32_t keys = static_cast<uint32_t>(max(sequence.visible(last_query), 0));
  const uint32_t kv_head = head / args.group;
  // Of the tile whose keys were copied last, then of the one whose keys are copied next.
  uint32_t block = keys > 0 ? sequence.block(args, 0) : 0;
  const auto copy_keys = [&](uint32_t first) {
    const uint64_t row = cache_row(args, block, first);
    const __nv_bfloat16* from = args.keys + row * args.key_stride + kv_head * args.key_dim;
    Tile::Key::template copy<Tile::kKeys, Tile::kThreads>(shared_k, keys - first, args.key_dim, from, args.key_stride);
    ptx::cp_async_commit();
  };
  const auto copy_values = [&](uint32_t first) {
    const uint64_t row = cache_row(args, block, first);
    const __nv_bfloat16* from = args.values + row * args.value_stride + kv_head * args.value_dim;
    Tile::Value::template copy<Tile::kKeys, Tile::kThreads>(shared_v, keys - first, args.value_dim, from,
                                                            args.value_stride);
    ptx::cp_async_commit();
    if (first + Tile::kKeys < keys) block = sequence.block(args, first + Tile::kKeys);
  };

  const uint64_t first_token = sequence.first_token + first_query;
  const __nv_bfloat16* q_rows = args.q + (first_token * args.num_heads + head) * args.key_dim;
  if (keys > 0) {
    Tile::Key::template copy<Tile::kRows, Tile::kThreads>(shared_q, last_query + 1 - first_query, args.key_dim, q_rows,
                                                          args.num_heads * args.key_dim);
    copy_keys(0);
  }

  const uint32_t warp_row = threadIdx.x / 32 * Tile::kWarpRows;
  const int warp_visible = sequence.visible(first_query + warp_row);
  Sums<Tile> sums = {};
  float row_max[Tile::kMmaM][2];
  float row_sum[Tile::kMmaM][2] = {};
#pragma unroll
  for (uint32_t m = 0; m < Tile::kMmaM; ++m) row_max[m][0] = row_max[m][1] = -INFINITY;

#pragma unroll 1
  for (uint32_t first = 0; first < keys; first += Tile::kKeys) {
    const int first_key = static_cast<int>(first);
    // The diagonal leaves nothing of the last tiles to the first warps.
    const bool sees = first_key < warp_visible + static_cast<int>(Tile::kWarpRows) - 1;
    ptx::cp_async_wait<0>();
    __syncthreads();  // keys are here, and nobody reads the values before
    copy_values(first);
    Scores<Tile> scores = {};
    if (sees) {
      const uint32_t lane = ptx::tid_x() % 32;
      score<Tile>(scores, typename Tile::Key::Address(shared_q + warp_row * Tile::Key::kBytes, lane % 16, lane / 16),
                  typename Tile::Key::Address(shared_k, lane % 16, lane / 16));
    }
    ptx::cp_async_wait<0>();
    __syncthreads();  // values are here, and nobody reads the keys
    if (first + Tile::kKeys < keys) copy_keys(first + Tile::kKeys);
    if (sees) {
      const uint32_t lane = ptx::tid_x() % 32;
      if (first_key + static_cast<int>(Tile::kKeys) > warp_visible) {
        mask<Tile>(scores, warp_visible + static_cast<int>(lane / 4), first_key + static_cast<int>(lane % 4 * 2));
      }
      Weights<Tile> weights;
      weigh<Tile>(weights, scores, sums, row_max, row_sum, args.scale_log2);
      add_values<Tile>(sums, weights, typename Tile::Value::Address(shared_v, lane % 16, lane / 16));
    }
  }
  ptx::cp_async_wait<0>();

  // Read again: over the loop registers are short, which is also why addresses are made where they are used.
  const uint32_t lane = ptx::tid_x() % 32;
  const Sequence same(args, blockIdx.x / args.num_heads);
#pragma unroll
  for (uint32_t m = 0; m < Tile::kMmaM; ++m) {
#pragma unroll
    for (uint32_t half = 0; half < 2; ++half) {
      float sum = row_sum[m][half];
      sum += __shfl_xor_sync(kFullWarp, sum, 1);
      sum += __shfl_xor_sync(kFullWarp, sum, 2);
      const float inverse = 1.0f / sum;
      const uint32_t query = first_query + warp_row + m * 16 + half * 8 + lane / 4;
      const uint64_t row = static_cast<uint64_t>(same.first_token + query) * args.num_heads + head;
      __nv_bfloat16* out = args.out + row * args.value_dim + lane % 4 * 2;
#pragma unroll
      for (uint32_t n = 0; n < Tile::kMmaValue; ++n) {
        if (query < same.queries && n * 8 < args.value_dim) {
          *reinterpret_cast<uint32_t*>(out + n * 8) =
              ptx::cvt_bf16x2(sums[m][n][2 * half] * inverse, sums[m][n][2 * half + 1] * inverse);
        }
      }
    }
  }
}

}  // namespace anabranch::attention
