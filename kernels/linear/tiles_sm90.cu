// linear on Hopper, of as many tokens as fit beside each other into an instruction: linear.cu says what it computes.
//
// Weights are wgmma's M side, tokens its N side: 8, 16, 32 or 64 of them. A tile is 128 rows of W, of which two
// warpgroups have 64 each; one warp brings weights and tokens with the copy engine, in steps of 64 columns. So that
// all multiprocessors draw on memory at once whatever the shape is, the blocks of a cluster share a tile's columns, and
// add their sums up through each other's shared memory, in the order of their ranks. Three blocks share a
// multiprocessor: one's end overlaps with others' middle. The weights' way begins before the launch before has ended
// where the caller says that nobody writes them any more.
//
//   y[t] = x[t] W^T + b,   or   y[t] = silu(x[t] W_gate^T) * (x[t] W_up^T), whose tiles have eight rows of the gate
//   before the same eight of up
//
// Reference: anabranch::reference::linear. Architecture: 9.0a (TMA, wgmma, clusters). Alignment: 16 bytes, y 4; d and n
// multiples of 8.
//
// Bounds. Bytes: 2 n d of weights once; x comes from the second-level cache, once a tile: T = 64 adds half to
// what that delivers.

#include "common/bf16.cuh"
#include "common/launch.cuh"
#include "common/ring.cuh"
#include "common/silu.cuh"
#include "common/tensor_map.cuh"
#include "common/warp.cuh"
#include "linear/tiles.cuh"
#include "ptx/cluster.cuh"
#include "ptx/convert.cuh"
#include "ptx/grid_dependency.cuh"
#include "ptx/tensor_copy.cuh"
#include "ptx/warpgroup.cuh"
#include "ptx/wgmma.cuh"

namespace anabranch::linear {
namespace {

constexpr uint32_t kGroups = 2;
constexpr uint32_t kGroupRows = 64;  // wgmma's M
constexpr uint32_t kRows = kGroups * kGroupRows;
constexpr uint32_t kDepth = 64;  // columns of a step: 128 bytes, the swizzle's width
constexpr uint32_t kRowBytes = kDepth * 2;
constexpr uint32_t kWeightBytes = kRows * kRowBytes;
constexpr uint32_t kConsumers = kGroups * 128;
constexpr uint32_t kThreads = kConsumers + kWarpSize;
constexpr uint32_t kBlocks = 3;  // that share a multiprocessor
constexpr uint32_t kMostSplits = 8;
constexpr uint32_t kConsumerBarrier = 1;

template <int kTokens>
struct Tile {
  static constexpr uint32_t kTokenBytes = kTokens * kRowBytes;
  static constexpr uint32_t kStageBytes = kWeightBytes + kTokenBytes;
  // What a third of a multiprocessor's shared memory holds.
  static constexpr uint32_t kStages = kTokens <= 16 ? 4 : 3;
  static constexpr uint32_t kRingBytes = kStages * kStageBytes;
  // Sums take the ring's place, token by token; four threads that write at once are eight banks apart.
  static constexpr uint32_t kPitch = kRows + 4;
  static constexpr uint32_t kSharedBytes = kRingBytes + 2 * 8 * kStages;
  static_assert(kTokens * kPitch * 4 <= kRingBytes);
  static_assert(kBlocks * (kSharedBytes + 1024) <= 228 * 1024);
};

struct TilesArgs {
  CUtensorMap weights;  // [n, d], or with SwiGLU [n / 8, 2, 8, d]
  CUtensorMap x;        // [T, d]
  const float* bias;    // [n] or null
  void* y;              // [T, n]
  uint32_t tokens;
  uint32_t columns;  // n
  uint32_t steps;    // of the depth
  uint32_t splits;   // blocks of a cluster, which share them
  bool wide_y;       // y is float32, else bf16
  bool settled;      // weights may be read before the launches before this one have ended
};

// One lane: a block's steps of weights and tokens.
template <int kTokens, bool kSwiGlu>
__device__ __forceinline__ void bring(const TilesArgs& args, uint32_t ring, uint32_t tile, uint32_t first,
                                      uint32_t end) {
  using Tile = linear::Tile<kTokens>;
  const uint32_t full = ring + Tile::kRingBytes;
  const uint32_t empty = full + 8 * Tile::kStages;
  const auto bring_weights = [&](uint32_t step, uint32_t stage) {
    ptx::mbarrier_arrive_expect(full + 8 * stage, Tile::kStageBytes);
    const uint32_t to = ring + stage * Tile::kStageBytes;
    if constexpr (kSwiGlu) {
      ptx::tensor_copy_5d(to, &args.weights, full + 8 * stage, step * kDepth, 0, 0, tile * (kRows / 16), 0);
    } else {
      ptx::tensor_copy_2d(to, &args.weights, full + 8 * stage, step * kDepth, tile * kRows);
    }
  };
  const auto bring_tokens = [&](uint32_t step, uint32_t stage) {
    ptx::tensor_copy_2d(ring + stage * Tile::kStageBytes + kWeightBytes, &args.x, full + 8 * stage, step * kDepth, 0);
  };
  const uint32_t ahead = min(Tile::kStages, end - first);
  if (!args.settled) ptx::wait_for_prerequisites();
  for (uint32_t i = 0; i < ahead; ++i) bring_weights(first + i, i);
  if (args.settled) ptx::wait_for_prerequisites();
  for (uint32_t i = 0; i < ahead; ++i) bring_tokens(first + i, i);
  Position stage;
  for (uint32_t step = first + ahead; step < end; ++step) {
    // The consumers' first round frees what is brought in the second.
    wait(empty + 8 * stage.index, stage.parity);
    bring_weights(step, stage.index);
    bring_tokens(step, stage.index);
    stage.advance(Tile::kStages);
  }
}

// A warpgroup's sums over the block's steps, to shared memory: [token, row], once nobody reads the ring any more.
template <int kTokens>
__device__ __forceinline__ void multiply(uint32_t ring, float* sums, uint32_t steps) {
  using Tile = linear::Tile<kTokens>;
  const uint32_t full = ring + Tile::kRingBytes;
  const uint32_t empty = full + 8 * Tile::kStages;
  const uint32_t group = threadIdx.x / 128;
  const bool signals = threadIdx.x % 128 == 0;
  float d[kTokens / 2] = {};
  Position stage;
  uint32_t done = 0;
  for (uint32_t step = 0; step < steps; ++step) {
    wait(full + 8 * stage.index, stage.parity);
    const uint32_t at = ring + stage.index * Tile::kStageBytes;
    const uint64_t a = ptx::wgmma_descriptor(at + group * kGroupRows * kRowBytes);
    const uint64_t b = ptx::wgmma_descriptor(at + kWeightBytes);
    ptx::wgmma_fence();
#pragma unroll
    // In a descriptor addresses count 16 bytes.
    for (uint32_t slice = 0; slice < kDepth / 16; ++slice) ptx::wgmma_bf16<kTokens>(d, a + slice * 2, b + slice * 2);
    ptx::wgmma_commit();
    if (step > 0) {
      ptx::wgmma_wait<1>();
      if (signals) ptx::mbarrier_arrive(empty + 8 * done);
    }
    done = stage.index;
    stage.advance(Tile::kStages);
  }
  ptx::wgmma_wait<0>();
  ptx::wgmma_settle(d);
  ptx::named_barrier(kConsumerBarrier, kConsumers);
  const uint32_t lane = threadIdx.x % kWarpSize;
  const uint32_t row = threadIdx.x / kWarpSize * 16 + lane / 4;
#pragma unroll
  for (uint32_t j = 0; j < kTokens / 8; ++j) {
    float* const to = sums + (8 * j + lane % 4 * 2) * Tile::kPitch + row;
    to[0] = d[4 * j];
    to[Tile::kPitch] = d[4 * j + 1];
    to[8] = d[4 * j + 2];
    to[Tile::kPitch + 8] = d[4 * j + 3];
  }
}

// Four neighbouring rows' sums for a token, of all blocks of the cluster: asked for at once, added in order.
__device__ __forceinline__ float4 add_up(uint32_t address, uint32_t splits) {
  float4 parts[kMostSplits];
#pragma unroll
  for (uint32_t rank = 0; rank < kMostSplits; ++rank) {
    if (rank < splits) parts[rank] = ptx::ld_cluster_16(ptx::map_shared(address, rank));
  }
  float4 sum = {};
#pragma unroll
  for (uint32_t rank = 0; rank < kMostSplits; ++rank) {
    if (rank >= splits) break;
    const float4& part = parts[rank];
    sum = {sum.x + part.x, sum.y + part.y, sum.z + part.z, sum.w + part.w};
  }
  return sum;
}

// Four neighbouring elements of y, which may lie on 4 bytes only.
__device__ __forceinline__ void store(const TilesArgs& args, uint32_t token, uint32_t column, const float4& four) {
  const uint64_t at = uint64_t{token} * args.columns + column;
  if (args.wide_y) {
    float* const y = static_cast<float*>(args.y) + at;
    y[0] = four.x;
    y[1] = four.y;
    y[2] = four.z;
    y[3] = four.w;
  } else {
    uint32_t* const y = reinterpret_cast<uint32_t*>(static_cast<uint16_t*>(args.y) + at);
    y[0] = ptx::cvt_bf16x2(four.x, four.y);
    y[1] = ptx::cvt_bf16x2(four.z, four.w);
  }
}

// The block's share of the tile's results.
template <int kTokens, bool kSwiGlu>
__device__ __forceinline__ void finish(const TilesArgs& args, uint32_t sums, uint32_t tile, uint32_t rank) {
  constexpr uint32_t kColumns = kSwiGlu ? kRows / 2 : kRows;
  constexpr uint32_t kFours = kColumns / 4;
  for (uint32_t unit = rank * kConsumers + threadIdx.x; unit < args.tokens * kFours; unit += args.splits * kConsumers) {
    const uint32_t token = unit / kFours;
    const uint32_t first = unit % kFours * 4;
    const uint32_t column = tile * kColumns + first;
    if (column >= args.columns) continue;
    const uint32_t of_token = sums + token * Tile<kTokens>::kPitch * 4;
    float4 four;
    if constexpr (kSwiGlu) {
      const uint32_t gate = of_token + (first / 8 * 16 + first % 8) * 4;
      const float4 g = add_up(gate, args.splits);
      const float4 up = add_up(gate + 8 * 4, args.splits);
      four = {silu(g.x) * up.x, silu(g.y) * up.y, silu(g.z) * up.z, silu(g.w) * up.w};
    } else {
      four = add_up(of_token + first * 4, args.splits);
      if (args.bias != nullptr) {
        const float* const bias = args.bias + column;
        four = {four.x + bias[0], four.y + bias[1], four.z + bias[2], four.w + bias[3]};
      }
    }
    store(args, token, column, four);
  }
}

template <int kTokens, bool kSwiGlu>
__global__ void __launch_bounds__(kThreads, kBlocks) multiply_tiles(const __grid_constant__ TilesArgs args) {
  using Tile = linear::Tile<kTokens>;
  extern __shared__ __align__(1024) char shared[];
  const uint32_t ring = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  if (threadIdx.x == 0) {
    for (uint32_t stage = 0; stage < Tile::kStages; ++stage) {
      ptx::mbarrier_init(ring + Tile::kRingBytes + 8 * stage, 1);
      ptx::mbarrier_init(ring + Tile::kRingBytes + 8 * (Tile::kStages + stage), kGroups);
    }
    ptx::fence_mbarrier_init();
    ptx::prefetch_tensor_map(&args.weights);
    ptx::prefetch_tensor_map(&args.x);
  }
  __syncthreads();
  ptx::launch_dependents();
  const uint32_t tile = blockIdx.x / args.splits;
  const uint32_t rank = blockIdx.x - tile * args.splits;
  const uint32_t first = args.steps * rank / args.splits;
  const uint32_t end = args.steps * (rank + 1) / args.splits;
  if (threadIdx.x < kConsumers) {
    ptx::wait_for_prerequisites();
    multiply<kTokens>(ring, reinterpret_cast<float*>(shared), end - first);
  } else {
    if (threadIdx.x == kConsumers) bring<kTokens, kSwiGlu>(args, ring, tile, first, end);
    __syncwarp();
  }
  ptx::cluster_arrive();
  ptx::cluster_wait();
  if (threadIdx.x < kConsumers) finish<kTokens, kSwiGlu>(args, ring, tile, rank);
  // Shared memory is others' to read until all are done.
  ptx::cluster_arrive();
  ptx::cluster_wait();
}

// As many blocks to a tile as run at once, and no block without some steps.
uint32_t splits_of(uint32_t tiles, uint32_t steps, uint32_t multiprocessors) {
  constexpr uint32_t kLeastSteps = 2;
  uint32_t splits = 1;
  while (splits < kMostSplits && tiles * splits * 2 <= kBlocks * multiprocessors && steps >= splits * 2 * kLeastSteps) {
    splits *= 2;
  }
  return splits;
}

template <int kTokens, bool kSwiGlu>
AnabranchStatus launch(const AnabranchLinearParams& params, cudaStream_t stream) {
  const uint64_t d = params.in_features;
  const uint64_t n = params.out_features;
  TilesArgs args = {};
  if (kSwiGlu) {
    ANABRANCH_TRY(make_map<5>(&args.weights, params.weights, {d, 8, 2, n / 8, 1}, {2 * d, 2 * d * n, 16 * d, 4 * d * n},
                              {kDepth, 8, 2, kRows / 16, 1}));
  } else {
    ANABRANCH_TRY(make_map<2>(&args.weights, params.weights, {d, n}, {2 * d}, {kDepth, kRows}));
  }
  ANABRANCH_TRY(make_map<2>(&args.x, params.x, {d, params.num_tokens}, {2 * d}, {kDepth, kTokens}));
  args.bias = params.bias;
  args.y = params.y;
  args.tokens = static_cast<uint32_t>(params.num_tokens);
  args.columns = params.out_features;
  args.steps = (params.in_features - 1) / kDepth + 1;
  args.wide_y = params.y_dtype == ANABRANCH_DTYPE_F32;
  args.settled = params.weights_settled != 0;
  int blocks = 0;
  ANABRANCH_TRY(checked(multiprocessors(&blocks)));
  const uint32_t tiles = static_cast<uint32_t>(((kSwiGlu ? 2 * n : n) - 1) / kRows + 1);
  args.splits = splits_of(tiles, args.steps, static_cast<uint32_t>(blocks));
  const auto kernel = multiply_tiles<kTokens, kSwiGlu>;
  ANABRANCH_TRY(
      checked(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Tile<kTokens>::kSharedBytes)));
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = args.splits;
  cluster.val.clusterDim.y = 1;
  cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = tiles * args.splits;
  config.blockDim = kThreads;
  config.dynamicSmemBytes = Tile<kTokens>::kSharedBytes;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  return launch_overlapping(kernel, config, args);
}

template <bool kSwiGlu>
AnabranchStatus launch_for(const AnabranchLinearParams& params, cudaStream_t stream) {
  static_assert(kMostTileTokens == 64);
  if (params.num_tokens <= 8) return launch<8, kSwiGlu>(params, stream);
  if (params.num_tokens <= 16) return launch<16, kSwiGlu>(params, stream);
  if (params.num_tokens <= 32) return launch<32, kSwiGlu>(params, stream);
  return launch<64, kSwiGlu>(params, stream);
}

}  // namespace

bool is_there_sm90() {
  cudaFuncAttributes attributes = {};
  return checked(cudaFuncGetAttributes(&attributes, multiply_tiles<8, false>)) == ANABRANCH_STATUS_OK;
}

AnabranchStatus launch_tiles(const AnabranchLinearParams& params, cudaStream_t stream) {
  return params.epilogue == ANABRANCH_EPILOGUE_SWIGLU ? launch_for<true>(params, stream)
                                                      : launch_for<false>(params, stream);
}

}  // namespace anabranch::linear
