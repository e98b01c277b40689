// The grouped GEMM's kernel and its launch; grouped_gemm.cu says what it computes.
//
// A block keeps kStages steps of 64 elements of the inner dimension in shared memory. While it multiplies slice s of a
// step it reads slice s + 1 into a second set of registers, and starts a quarter of the copies of the step kStages - 1
// ahead, into the stage that was read last. One barrier a step: before the last slice's products, so that the next
// step's first slice can be read during them.
#pragma once

#include "common/launch.cuh"
#include "grouped_gemm/config.cuh"
#include "grouped_gemm/epilogue.cuh"
#include "grouped_gemm/fragments.cuh"
#include "grouped_gemm/loader.cuh"
#include "grouped_gemm/scheduler.cuh"
#include "ptx/grid_dependency.cuh"

namespace anabranch::grouped_gemm {

template <class Tile, Epilogue kEpilogue>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocksPerSm) multiply(const __grid_constant__ Args args) {
  ptx::launch_dependents();
  ptx::wait_for_prerequisites();
  extern __shared__ __align__(128) uint8_t shared[];
  const uint32_t stages = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  uint32_t* rows = reinterpret_cast<uint32_t*>(shared + Tile::kStages * Tile::kStageBytes);
  const Schedule<Tile> schedule(args, rows + Tile::kM, rows);
  if (blockIdx.x >= schedule.tiles()) return;

  using Load = Loader<Tile, kEpilogue == Epilogue::kSwiGlu>;
  Load loader(args, schedule, stages, rows);
#pragma unroll 1
  for (uint32_t stage = 0; stage + 1 < Tile::kStages; ++stage) loader.step();

  const uint32_t warp_m = threadIdx.x / 32 / Tile::kWarpsN;
  const uint32_t warp_n = threadIdx.x / 32 % Tile::kWarpsN;
  const Addresses<Tile> addresses(stages, warp_m, warp_n);
  const uint32_t steps = (args.depth + kStepDepth - 1) / kStepDepth;
  uint32_t stage = 0;
  // Of the groups, all but the newest kStages - 2 are here: the step to be read next.
  ptx::cp_async_wait<Tile::kStages - 2>();
  __syncthreads();
  Fragments<Tile> fragments[2];
  fragments[0].load(addresses, 0, 0);

#pragma unroll 1
  for (uint32_t tile = blockIdx.x; tile < schedule.tiles(); tile += gridDim.x) {
    Accumulators<Tile> sums = {};
#pragma unroll 1
    for (uint32_t step = 0; step < steps; ++step) {
      loader.begin();
      fragments[1].load(addresses, stage, 1);
      loader.template copy<0>();
      fragments[0].multiply(sums);

      fragments[0].load(addresses, stage, 2);
      loader.template copy<1>();
      fragments[1].multiply(sums);

      fragments[1].load(addresses, stage, 3);
      loader.template copy<2>();
      fragments[0].multiply(sums);

      loader.template copy<3>();
      loader.end();
      stage = stage + Tile::kStageBytes == Tile::kStages * Tile::kStageBytes ? 0 : stage + Tile::kStageBytes;
      ptx::cp_async_wait<Tile::kStages - 2>();
      __syncthreads();
      fragments[0].load(addresses, stage, 0);
      fragments[1].multiply(sums);
    }
    Store<Tile, kEpilogue>::tile(args, schedule.at(tile, Load::kWidth), sums, warp_m, warp_n);
  }
  // Zeros may still be on their way to shared memory that is about to be another block's.
  ptx::cp_async_wait<0>();
}

// What the launch needs to know of the device.
struct Device {
  int multiprocessors;
  int shared_per_block;
  int shared_per_multiprocessor;
};

template <class Tile, Epilogue kEpilogue>
AnabranchStatus launch_tile(const Device& device, Args args, cudaStream_t stream) {
  constexpr bool kPaired = kEpilogue == Epilogue::kSwiGlu;
  const uint32_t bytes = shared_bytes<Tile>(args.experts);
  if (bytes > static_cast<uint32_t>(device.shared_per_block)) return ANABRANCH_STATUS_UNSUPPORTED;
  args.column_tiles = static_cast<uint32_t>(divide_up(args.columns, Loader<Tile, kPaired>::kWidth));
  // The most that the rows can make: an expert's last tile may be nearly empty.
  const uint64_t hit = args.rows < args.experts ? args.rows : args.experts;
  const uint64_t tiles = (args.rows / Tile::kM + hit) * args.column_tiles;
  // Tiles are counted in 32 bits, and so are those of rows even where every expert claims all rows.
  const uint64_t claimed = (args.rows / Tile::kM + 1) * uint64_t{args.experts};
  if (tiles >= uint64_t{1} << 31 || claimed >= uint64_t{1} << 31) return ANABRANCH_STATUS_SETTING;
  args.most_tiles = static_cast<uint32_t>(tiles);
  // A kibibyte of each block's shared memory is the system's.
  const uint64_t fit = static_cast<uint32_t>(device.shared_per_multiprocessor) / (bytes + 1024);
  const uint64_t per_multiprocessor = fit < 1 ? 1 : fit < Tile::kBlocksPerSm ? fit : Tile::kBlocksPerSm;
  const uint64_t most = per_multiprocessor * static_cast<uint32_t>(device.multiprocessors);

  const auto kernel = multiply<Tile, kEpilogue>;
  ANABRANCH_TRY(
      checked(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes))));
  cudaLaunchConfig_t config = {};
  config.gridDim = static_cast<uint32_t>(tiles < most ? tiles : most);
  config.blockDim = Tile::kThreads;
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  return launch_overlapping(kernel, config, args);
}

template <Epilogue kEpilogue>
AnabranchStatus launch_tiles(TileId tile, const Device& device, const Args& args, cudaStream_t stream) {
  switch (tile) {
    case TileId::kRows16:
      return launch_tile<Rows16, kEpilogue>(device, args, stream);
    case TileId::kRows32:
      return launch_tile<Rows32, kEpilogue>(device, args, stream);
    case TileId::kRows64:
      return launch_tile<Rows64, kEpilogue>(device, args, stream);
    case TileId::kRows128:
      return launch_tile<Rows128, kEpilogue>(device, args, stream);
    case TileId::kRows128Wide:
      return launch_tile<Rows128Wide, kEpilogue>(device, args, stream);
  }
  return ANABRANCH_STATUS_UNSUPPORTED;
}

// Each compiled in a file of its own, side by side.
AnabranchStatus launch_linear(TileId tile, const Device& device, const Args& args, cudaStream_t stream);
AnabranchStatus launch_activated(TileId tile, const Device& device, const Args& args, cudaStream_t stream);
AnabranchStatus launch_swiglu(TileId tile, const Device& device, const Args& args, cudaStream_t stream);

}  // namespace anabranch::grouped_gemm
