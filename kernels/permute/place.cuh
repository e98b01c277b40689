// The permutation's two kernels: counts a block, then places.
#pragma once

#include <cstdint>

#include "common/warp.cuh"
#include "ptx/grid_dependency.cuh"

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

constexpr uint32_t kNowhere = 0xffffffffu;

// The expert of a pair, kNowhere if it has none or is past the end.
__device__ __forceinline__ uint32_t expert_of(const Args& args, uint32_t pair) {
  const uint32_t id = pair < args.num_pairs ? static_cast<uint32_t>(args.ids[pair]) : kNowhere;
  return id < args.num_experts ? id : kNowhere;
}

// counts[block, e]: how many pairs of the block's go to expert e.
static __global__ void __launch_bounds__(1024) count_pairs(const __grid_constant__ Args args) {
  extern __shared__ uint32_t shared[];  // [E]
  for (uint32_t e = threadIdx.x; e < args.num_experts; e += blockDim.x) shared[e] = 0;
  __syncthreads();
  const uint32_t pairs = args.pairs_a_warp * (blockDim.x / kWarpSize);
  const uint64_t first = uint64_t{blockIdx.x} * pairs;
  for (uint32_t i = threadIdx.x; i < pairs && first + i < args.num_pairs; i += blockDim.x) {
    const uint32_t expert = expert_of(args, static_cast<uint32_t>(first) + i);
    if (expert != kNowhere) atomicAdd(shared + expert, 1u);
  }
  __syncthreads();
  uint32_t* counts = args.counts + blockIdx.x * args.num_experts;
  for (uint32_t e = threadIdx.x; e < args.num_experts; e += blockDim.x) counts[e] = shared[e];
}

// total[e] of all blocks and before[e] of the blocks before this one. Integer sums: their order does not matter.
__device__ __forceinline__ void sum_blocks(const Args& args, uint32_t* total, uint32_t* before) {
  const uint32_t lane = threadIdx.x % kWarpSize;
  const uint32_t warp = threadIdx.x / kWarpSize;
  const uint32_t warps = blockDim.x / kWarpSize;
  for (uint32_t e = lane; e < args.num_experts; e += kWarpSize) {
    uint32_t all = 0;
    uint32_t earlier = 0;
#pragma unroll 4
    for (uint32_t block = warp; block < gridDim.x; block += warps) {
      const uint32_t count = __ldg(args.counts + block * args.num_experts + e);
      all += count;
      earlier += block < blockIdx.x ? count : 0;
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
// `shared`: [warps, E], [E], [E]. Whole blocks call.
__device__ __forceinline__ void place_rows(const Args& args, uint32_t* shared) {
  const uint32_t experts = args.num_experts;
  const uint32_t lane = threadIdx.x % kWarpSize;
  const uint32_t warp = threadIdx.x / kWarpSize;
  const uint32_t warps = blockDim.x / kWarpSize;
  uint32_t* next = shared + warp * experts;
  uint32_t* total = shared + warps * experts;
  uint32_t* before = total + experts;
  __shared__ uint32_t num_rows;

  for (uint32_t i = threadIdx.x; i < (warps + 2) * experts; i += blockDim.x) shared[i] = 0;
  __syncthreads();
  const uint64_t first = (uint64_t{blockIdx.x} * warps + warp) * args.pairs_a_warp;
  const uint32_t begin = static_cast<uint32_t>(first < args.num_pairs ? first : args.num_pairs);
  const uint32_t left = args.num_pairs - begin;
  const uint32_t end = begin + (left < args.pairs_a_warp ? left : args.pairs_a_warp);
#pragma unroll 4
  for (uint32_t pair = begin + lane; pair < end; pair += kWarpSize) {
    const uint32_t expert = expert_of(args, pair);
    if (expert != kNowhere) atomicAdd(next + expert, 1u);
  }
  if (gridDim.x > 1) sum_blocks(args, total, before);
  __syncthreads();

  // Along each expert's column: what the warps before have.
  for (uint32_t e = threadIdx.x; e < experts; e += blockDim.x) {
    uint32_t sum = before[e];
    for (uint32_t w = 0; w < warps; ++w) {
      const uint32_t count = shared[w * experts + e];
      shared[w * experts + e] = sum;
      sum += count;
    }
    if (gridDim.x == 1) total[e] = sum;
  }
  __syncthreads();
  if (warp == 0) {
    const uint32_t rows = exclusive_scan(total, experts);
    if (lane == 0) num_rows = rows;
  }
  __syncthreads();
  if (blockIdx.x == 0) {
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
  const uint64_t stride = uint64_t{gridDim.x} * blockDim.x;
  for (uint64_t row = num_rows + uint64_t{blockIdx.x} * blockDim.x + threadIdx.x; row < args.num_pairs; row += stride) {
    args.slots[row] = kNowhere;
  }
}

static __global__ void __launch_bounds__(1024) place_pairs(const __grid_constant__ Args args) {
  extern __shared__ uint32_t shared[];
  ptx::launch_dependents();
  place_rows(args, shared);
}

}  // namespace anabranch::permute
