// The consumers of the Hopper kernel: warpgroups that score, weigh and add up, 64 queries each.
#pragma once

#include "attention/pipeline.cuh"
#include "ptx/convert.cuh"
#include "ptx/math.cuh"
#include "ptx/special.cuh"
#include "ptx/warpgroup.cuh"
#include "ptx/wgmma.cuh"

namespace anabranch::attention::hopper {

// A thread has two of its warp's rows, lane / 4 and the one eight below, and of every eight columns two: wgmma's places
// (wgmma.cuh), in which `half` 0 and 1 are these rows.
template <class Tile>
using Scores = float[Tile::kKeys / 2];
template <class Tile>
using Sums = float[Tile::kValueDim / 2];
// Scores as bf16, as the second product takes them.
template <class Tile>
using Weights = uint32_t[Tile::kKeys / 16][4];

// Numbers of the block's named barriers; 0 is __syncthreads'.
constexpr uint32_t kTurnBarrier = 1;  // and following, one a warpgroup

// Warpgroups issue products in turn. Each waits at its own barrier for the one before it.
template <class Tile>
struct Turns {
  uint32_t group;

  __device__ __forceinline__ void begin() const {
    if (group == Tile::kGroups - 1) pass();
  }
  __device__ __forceinline__ void take() const {
    if (Tile::kTakesTurns) ptx::named_barrier(kTurnBarrier + group, 256);
  }
  __device__ __forceinline__ void pass() const {
    if (Tile::kTakesTurns) ptx::named_barrier_arrive(kTurnBarrier + (group + 1) % Tile::kGroups, 256);
  }
  // The last one's last turn goes to nobody.
  __device__ __forceinline__ void end() const {
    if (group == 0) take();
  }
};

// Issues scores = Q K^T. In a descriptor addresses count 16 bytes.
template <class Tile>
__device__ __forceinline__ void score(Scores<Tile>& scores, uint64_t q, uint64_t k) {
  ptx::wgmma_fence();
#pragma unroll
  for (uint32_t slice = 0; slice < Tile::kKeyDim / 16; ++slice) {
    const uint64_t a = q + slice / 4 * (Tile::kQueryPanelBytes / 16) + slice % 4 * 2;
    const uint64_t b = k + slice / 4 * (Tile::kPanelBytes / 16) + slice % 4 * 2;
    if (slice == 0) {
      ptx::wgmma_bf16_first<Tile::kKeys>(scores, a, b);
    } else {
      ptx::wgmma_bf16<Tile::kKeys>(scores, a, b);
    }
  }
  ptx::wgmma_commit();
}

// Issues sums += weights V.
template <class Tile>
__device__ __forceinline__ void add_values(Sums<Tile>& sums, const Weights<Tile>& weights, uint64_t v) {
  constexpr uint32_t kSliceBytes = 16 * 128;
  ptx::wgmma_fence();
#pragma unroll
  for (uint32_t slice = 0; slice < Tile::kKeys / 16; ++slice) {
    ptx::wgmma_bf16_rows<Tile::kValueDim>(sums, weights[slice], v + slice * (kSliceBytes / 16));
  }
  ptx::wgmma_commit();
}

// Minus infinity where a key is not visible: in the lane's first row from its column `limit` on, counted from its
// first.
template <class Tile>
__device__ __forceinline__ void mask(Scores<Tile>& scores, int limit) {
#pragma unroll
  for (int n = 0; n < static_cast<int>(Tile::kKeys / 8); ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (n * 8 + i % 2 >= limit + i / 2 * 8) scores[n * 4 + i] = -INFINITY;
    }
  }
}

// Of a tile. Made where it is used, as registers are short over the loop.
__device__ __forceinline__ uint32_t first_row_of_warp() {
  return ptx::tid_x() / kWarpSize * 16 - 64;
}

struct RowState {
  float largest[2] = {-INFINITY, -INFINITY};
  // This lane's part.
  float sum[2] = {};
};

// Scores become weights relative to the row's largest so far; `shrink` is what earlier ones become smaller by.
template <class Tile>
__device__ __forceinline__ void weigh(Scores<Tile>& scores, RowState& state, float (&shrink)[2], float scale_log2) {
  float largest[2] = {state.largest[0], state.largest[1]};
#pragma unroll
  for (uint32_t i = 0; i < Tile::kKeys / 2; i += 2) {
    const uint32_t half = i / 2 % 2;
    largest[half] = fmaxf(largest[half], fmaxf(scores[i], scores[i + 1]));
  }
  float base[2];
#pragma unroll
  for (uint32_t half = 0; half < 2; ++half) {
    largest[half] = fmaxf(largest[half], __shfl_xor_sync(kFullWarp, largest[half], 1));
    largest[half] = fmaxf(largest[half], __shfl_xor_sync(kFullWarp, largest[half], 2));
    // A row that has seen nothing has no largest score: its weights are 0, not NaN.
    base[half] = largest[half] == -INFINITY ? 0.0f : largest[half] * scale_log2;
    shrink[half] = ptx::ex2_approx(__fmaf_rn(state.largest[half], scale_log2, -base[half]));
    state.largest[half] = largest[half];
    state.sum[half] *= shrink[half];
  }
#pragma unroll
  for (uint32_t i = 0; i < Tile::kKeys / 2; i += 2) {
    const uint32_t half = i / 2 % 2;
    scores[i] = ptx::ex2_approx(__fmaf_rn(scores[i], scale_log2, -base[half]));
    scores[i + 1] = ptx::ex2_approx(__fmaf_rn(scores[i + 1], scale_log2, -base[half]));
    state.sum[half] += scores[i] + scores[i + 1];
  }
}

// A product's result becomes another's operand where it is.
template <class Tile>
__device__ __forceinline__ void pack_weights(Weights<Tile>& weights, const Scores<Tile>& scores) {
#pragma unroll
  for (uint32_t i = 0; i < Tile::kKeys / 4; ++i) {
    weights[i / 4][i % 4] = ptx::cvt_bf16x2(scores[2 * i], scores[2 * i + 1]);
  }
}

// Each of a row's four lanes has a word of every chunk; afterwards each has a chunk, lane l the l-th.
__device__ __forceinline__ void exchange(uint32_t (&words)[4], uint32_t lane) {
#pragma unroll
  for (uint32_t step = 1; step <= 2; step *= 2) {
    const bool upper = lane & step;
#pragma unroll
    for (uint32_t i = 0; i < 4; ++i) {
      if (i & step) continue;
      const uint32_t got = __shfl_xor_sync(kFullWarp, upper ? words[i] : words[i + step], step);
      (upper ? words[i] : words[i + step]) = got;
    }
  }
}

template <class Tile>
__device__ __forceinline__ void store(const Args& args, const Item& item, const Sums<Tile>& sums,
                                      const RowState& state) {
  const uint32_t warp_row = first_row_of_warp();
  const uint32_t lane = ptx::tid_x() % kWarpSize;
#pragma unroll
  for (uint32_t half = 0; half < 2; ++half) {
    float sum = state.sum[half];
    sum += __shfl_xor_sync(kFullWarp, sum, 1);
    sum += __shfl_xor_sync(kFullWarp, sum, 2);
    const float inverse = 1.0f / sum;
    const uint32_t row = warp_row + half * 8 + lane / 4;
    const uint64_t vector = static_cast<uint64_t>(item.first_row + row) * args.num_heads + item.head;
    __nv_bfloat16* out = args.out + vector * args.value_dim;
#pragma unroll
    for (uint32_t first = 0; first < Tile::kValueDim / 8; first += 4) {
      uint32_t words[4];
#pragma unroll
      for (uint32_t i = 0; i < 4; ++i) {
        const float* pair = sums + (first + i) * 4 + 2 * half;
        words[i] = ptx::cvt_bf16x2(pair[0] * inverse, pair[1] * inverse);
      }
      exchange(words, lane);
      const uint32_t column = (first + lane % 4) * 8;
      if (row < item.rows && column < args.value_dim) {
        *reinterpret_cast<uint4*>(out + column) = make_uint4(words[0], words[1], words[2], words[3]);
      }
    }
  }
}

// One warpgroup, through all of the block's items. A tile's scores are made, and then weighed, while the values of the
// tile before are added up.
template <class Tile>
__device__ __forceinline__ void consume(const Args& args, const Pipeline<Tile>& pipeline) {
  const Turns<Tile> turns{threadIdx.x / 128 - 1};
  const bool signals = threadIdx.x % 128 == 0;
  const auto release = [&](uint32_t barrier) {
    if (signals) ptx::mbarrier_arrive(barrier);
  };
  const uint64_t q_rows = ptx::wgmma_descriptor(pipeline.q + turns.group * (Tile::kGroupRows * 128));
  Position queue, q, keys, values;
  turns.begin();
#pragma unroll 1
  while (true) {
    wait(pipeline.item_full(queue.index), queue.parity);
    const Item& item = pipeline.item(queue.index);
    if (item.rows == 0) break;
    const uint32_t tiles = item.tiles;
    const int warp_visible = item.visible + static_cast<int>(first_row_of_warp());
    Sums<Tile> sums = {};
    RowState state;
    if (tiles > 0) {
      Scores<Tile> scores;
      Weights<Tile> weights;
      float shrink[2];
      const auto issue_scores = [&] { score<Tile>(scores, q_rows, ptx::wgmma_descriptor(pipeline.keys(keys.index))); };
      const auto issue_values = [&] {
        add_values<Tile>(sums, weights, ptx::wgmma_descriptor_rows(pipeline.values(values.index), Tile::kPanelBytes));
      };
      // Once a tile's scores are made.
      const auto weigh_tile = [&](uint32_t tile) {
        ptx::wgmma_settle(scores);
        release(pipeline.keys_empty(keys.index));
        keys.advance(Tile::kStages);
        if (tile + 1 == tiles) release(pipeline.q_empty());
        // Of the tile's keys, the warp's first row sees this many.
        const int limit = warp_visible - static_cast<int>(tile * Tile::kKeys);
        if (limit < static_cast<int>(Tile::kKeys)) {
          const uint32_t lane = ptx::tid_x() % kWarpSize;
          mask<Tile>(scores, limit + static_cast<int>(lane / 4) - static_cast<int>(lane % 4 * 2));
        }
        weigh<Tile>(scores, state, shrink, args.scale_log2);
      };
      // Once its values are added.
      const auto release_values = [&] {
        ptx::wgmma_settle(sums);
        release(pipeline.values_empty(values.index));
        values.advance(Tile::kStages);
      };

      wait(pipeline.q_full(), q.parity);
      q.advance(1);
      wait(pipeline.keys_full(keys.index), keys.parity);
      issue_scores();
      ptx::wgmma_wait<0>();
      weigh_tile(0);
      pack_weights<Tile>(weights, scores);
      if (tiles > 1) wait(pipeline.keys_full(keys.index), keys.parity);
#pragma unroll 1
      for (uint32_t tile = 1; tile < tiles; ++tile) {
        turns.take();
        issue_scores();
        wait(pipeline.values_full(values.index), values.parity);
        issue_values();
        turns.pass();
        ptx::wgmma_wait<1>();
        weigh_tile(tile);
        ptx::wgmma_settle(scores);
        // Here, for it ends a piece of straight code: within one the assembler puts the next wait before the weighing.
        if (tile + 1 < tiles) wait(pipeline.keys_full(keys.index), keys.parity);
        ptx::wgmma_wait<0>();
        // The registers of the weights have been the product's.
        ptx::wgmma_settle(scores);
        release_values();
#pragma unroll
        for (uint32_t i = 0; i < Tile::kValueDim / 2; ++i) sums[i] *= shrink[i / 2 % 2];
        pack_weights<Tile>(weights, scores);
      }
      wait(pipeline.values_full(values.index), values.parity);
      issue_values();
      ptx::wgmma_wait<0>();
      release_values();
    }
    store<Tile>(args, item, sums, state);
    ptx::mbarrier_arrive(pipeline.item_empty(queue.index));
    queue.advance(kQueue);
  }
  turns.end();
}

}  // namespace anabranch::attention::hopper
