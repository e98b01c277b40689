// Whole rows picked from a matrix: what permute_rows and embedding share.
//
// A warp takes an item, kGatherVectors vectors of one row; each lane has up to eight 16-byte loads in flight before its
// first store.
#pragma once

#include <cstdint>

#include "common/launch.cuh"
#include "common/warp.cuh"
#include "ptx/grid_dependency.cuh"

namespace anabranch {

constexpr uint32_t kGatherThreads = 256;
constexpr uint32_t kGatherLoads = 8;
constexpr uint32_t kGatherVectors = kGatherLoads * kWarpSize;

struct GatherArgs {
  const uint4* from;        // [num_from, vectors]
  const uint32_t* indices;  // [num_rows]
  uint4* to;                // [num_rows, vectors]
  uint32_t num_items;       // num_rows * items_per_row
  uint32_t num_from;
  uint32_t vectors;        // of a row
  uint32_t items_per_row;  // ceil(vectors / kGatherVectors)
  uint32_t divisor;        // index / divisor is the row to take
  uint32_t filler;         // fills, four bytes at a time, the row of an index that leads nowhere
};

static __global__ void __launch_bounds__(kGatherThreads) gather(const __grid_constant__ GatherArgs args) {
  ptx::launch_dependents();
  ptx::wait_for_prerequisites();
  const uint32_t lane = threadIdx.x % kWarpSize;
  const uint32_t item = blockIdx.x * (kGatherThreads / kWarpSize) + threadIdx.x / kWarpSize;
  if (item >= args.num_items) return;
  const uint64_t row = item / args.items_per_row;
  const uint32_t first = item % args.items_per_row * kGatherVectors + lane;
  const uint32_t source = args.indices[row] / args.divisor;
  const bool found = source < args.num_from;
  const uint4* from = args.from + uint64_t{found ? source : 0} * args.vectors;
  uint4* to = args.to + row * args.vectors;
  uint4 value[kGatherLoads];
#pragma unroll
  for (uint32_t i = 0; i < kGatherLoads; ++i) {
    const uint32_t at = first + i * kWarpSize;
    value[i] = make_uint4(args.filler, args.filler, args.filler, args.filler);
    if (found && at < args.vectors) value[i] = from[at];
  }
#pragma unroll
  for (uint32_t i = 0; i < kGatherLoads; ++i) {
    const uint32_t at = first + i * kWarpSize;
    if (at < args.vectors) to[at] = value[i];
  }
}

// Launches `gather` for `rows` rows of `vectors` vectors, at least one of each; the sizes in `args` are set here.
static AnabranchStatus launch_gather(GatherArgs args, uint64_t rows, uint32_t vectors, cudaStream_t stream) {
  args.vectors = vectors;
  args.items_per_row = (vectors - 1) / kGatherVectors + 1;
  // Items are counted in 31 bits: no GPU holds that many.
  const uint64_t items = rows * args.items_per_row;
  if (items >= uint64_t{1} << 31) return ANABRANCH_STATUS_SETTING;
  args.num_items = static_cast<uint32_t>(items);
  cudaLaunchConfig_t config = {};
  config.gridDim = (args.num_items - 1) / (kGatherThreads / kWarpSize) + 1;
  config.blockDim = kGatherThreads;
  config.stream = stream;
  return launch_overlapping(gather, config, args);
}

}  // namespace anabranch
