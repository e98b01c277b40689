// Where pairs go: a block's part of the counting sort.
#pragma once

#include <cstdint>

#include "common/warp.cuh"

namespace anabranch::permute {

struct Args {
  const int32_t* ids;     // [P]: pairs, token-major
  uint32_t* offsets;      // [E + 1]
  uint32_t* slots;        // [P]
  int32_t* inverse;       // [P]
  uint32_t* counts;       // [blocks, E]: the workspace; not touched by a single block
  uint32_t num_pairs;     // P
  uint32_t num_experts;   // E
  uint32_t pairs_a_warp;  // consecutive ones, a multiple of 32
};

// Words of shared memory that place_rows needs: a row of E for each warp, two for the block, and the number of rows.
__host__ __device__ constexpr uint32_t place_words(uint32_t warps, uint32_t experts) {
  return (warps + 2) * experts + 1;
}

constexpr uint32_t kNowhere = 0xffffffffu;

// The expert of a pair, kNowhere if it has none or is past the end.
__device__ __forceinline__ uint32_t expert_of(const Args& args, uint32_t pair) {
  const uint32_t id = pair < args.num_pairs ? static_cast<uint32_t>(args.ids[pair]) : kNowhere;
  return id < args.num_experts ? id : kNowhere;
}

// total[e] of all blocks and before[e] of the blocks before this one. Integer sums: their order does not matter.
__device__ __forceinline__ void sum_blocks(const Args& args, uint32_t block, uint32_t blocks, uint32_t* total,
                                           uint32_t* before) {
  const uint32_t lane = threadIdx.x % kWarpSize;
  const uint32_t warp = threadIdx.x / kWarpSize;
  const uint32_t warps = blockDim.x / kWarpSize;
  for (uint32_t e = lane; e < args.num_experts; e += kWarpSize) {
    uint32_t all = 0;
    uint32_t earlier = 0;
#pragma unroll 4
    for (uint32_t other = warp; other < blocks; other += warps) {
      const uint32_t count = args.counts[other * args.num_experts + e];
      all += count;
      earlier += other < block ? count : 0;
    }
    atomicAdd(total + e, all);
    atomicAdd(before + e, earlier);
  }
}

// Turns total[e] into the sum of the experts before e, and returns the sum of all, in the first warp's lanes.
__device__ __forceinline__ uint32_t exclusive_scan(uint32_t* total, uint32_t num_experts) {
  const uint32_t lane = threadIdx.x % kWarpSize;
  uint32_t sum = 0;
  for (uint32_t base = 0; base < num_experts; base += kWarpSize) {
    const uint32_t e = base + lane;
    const uint32_t count = e < num_experts ? total[e] : 0;
    const uint32_t inclusive = warp_inclusive_sum(count, lane);
    if (e < num_experts) total[e] = sum + inclusive - count;
    sum += __shfl_sync(kFullWarp, inclusive, kWarpSize - 1);
  }
  return sum;
}

// A block has consecutive pairs and each of its warps consecutive ones of those. Every warp counts its own, the counts
// before it (experts before, blocks before, warps before) make the row of its first pair of each expert, and it goes
// through its pairs once more, 32 at a time: a pair's row is the expert's next one plus the pairs of that expert in
// lower lanes.
//
// `shared`: place_words. Whole blocks call, each of `blocks` with its number.
__device__ __forceinline__ void place_rows(const Args& args, uint32_t block, uint32_t blocks, uint32_t* shared) {
  const uint32_t experts = args.num_experts;
  const uint32_t lane = threadIdx.x % kWarpSize;
  const uint32_t warp = threadIdx.x / kWarpSize;
  const uint32_t warps = blockDim.x / kWarpSize;
  uint32_t* next = shared + warp * experts;
  uint32_t* total = shared + warps * experts;
  uint32_t* before = total + experts;
  uint32_t& num_rows = before[experts];

  for (uint32_t i = threadIdx.x; i < (warps + 2) * experts; i += blockDim.x) shared[i] = 0;
  __syncthreads();
  const uint64_t first = (uint64_t{block} * warps + warp) * args.pairs_a_warp;
  const uint32_t begin = static_cast<uint32_t>(first < args.num_pairs ? first : args.num_pairs);
  const uint32_t left = args.num_pairs - begin;
  const uint32_t end = begin + (left < args.pairs_a_warp ? left : args.pairs_a_warp);
#pragma unroll 4
  for (uint32_t pair = begin + lane; pair < end; pair += kWarpSize) {
    const uint32_t expert = expert_of(args, pair);
    if (expert != kNowhere) atomicAdd(next + expert, 1u);
  }
  if (blocks > 1) sum_blocks(args, block, blocks, total, before);
  __syncthreads();

  // Along each expert's column: what the warps before have.
  for (uint32_t e = threadIdx.x; e < experts; e += blockDim.x) {
    uint32_t sum = before[e];
    for (uint32_t w = 0; w < warps; ++w) {
      const uint32_t count = shared[w * experts + e];
      shared[w * experts + e] = sum;
      sum += count;
    }
    if (blocks == 1) total[e] = sum;
  }
  __syncthreads();
  if (warp == 0) {
    const uint32_t rows = exclusive_scan(total, experts);
    if (lane == 0) num_rows = rows;
  }
  __syncthreads();
  if (block == 0) {
    for (uint32_t e = threadIdx.x; e < experts; e += blockDim.x) args.offsets[e] = total[e];
    if (threadIdx.x == 0) args.offsets[experts] = num_rows;
  }

  for (uint32_t base = begin; base < end; base += kWarpSize) {
    const uint32_t pair = base + lane;
    const uint32_t expert = pair < end ? expert_of(args, pair) : kNowhere;
    const uint32_t peers = __match_any_sync(kFullWarp, expert);
    const uint32_t rank = __popc(peers & ((1u << lane) - 1));
    const uint32_t start = expert == kNowhere ? 0 : next[expert];
    __syncwarp();
    if (expert != kNowhere && rank == 0) next[expert] = start + __popc(peers);
    __syncwarp();
    if (expert != kNowhere) {
      const uint32_t row = total[expert] + start + rank;
      args.slots[row] = pair;
      args.inverse[pair] = static_cast<int32_t>(row);
    } else if (pair < end) {
      args.inverse[pair] = -1;
    }
  }
  const uint64_t stride = uint64_t{blocks} * blockDim.x;
  for (uint64_t row = num_rows + uint64_t{block} * blockDim.x + threadIdx.x; row < args.num_pairs; row += stride) {
    args.slots[row] = kNowhere;
  }
}

}  // namespace anabranch::permute
