// experts: both products of every expert, in one launch, on Hopper.
//
//   h[r] = silu(x[t] W_gate^T) * (x[t] W_up^T),   y[r] = h[r] W_down^T     r: permuted row of a pair of token t
//   out[t] = sum_k weights[t, k] y[inverse[t, k]]                        where asked for (few tokens)
//
//   x [T, d], gate_up [E, 2n, d], down [E, d, n] bf16, ids [T, K] or their permutation, weights [T, K]
//   -> h [R, n], y [R, d], out [T, d] bf16. Sums in float32, in an order that depends on d and n alone.
//
// Reference: anabranch::reference::grouped_gemm, ::combine. Architecture: 9.0a (TMA, wgmma, setmaxnreg). Alignment: 16
// bytes; d and n multiples of 8.
//
// Weights are wgmma's M side, tokens its N side: 8 to 176 of them in steps of 16, so that an expert with few tokens
// costs few products and one with up to 176 reads its weights once. A block stays on its multiprocessor and takes items
// (schedule.cuh) from a common counter: first tiles of h, then tiles of y. One warp brings weights (TMA), three gather
// tokens (cp.async; no permuted copy of x is made), two warpgroups multiply (consume.cuh). A tile of y waits, in
// its tokens only, until its tokens' h is complete: its weights are on their way before that, and memory does not rest
// between the products.
//
// Bounds. FLOPs 6 R d n; bytes 6 d n an expert hit. A step of 256 x 176 x 64 is 6.3 MFLOP and 56 KiB from the
// second-level cache: 1,536 clocks of wgmma on a multiprocessor, 37 bytes a clock.

#include "common/launch.cuh"
#include "common/tensor_map.cuh"
#include "experts/consume.cuh"
#include "experts/experts.cuh"
#include "experts/one_token.cuh"
#include "ptx/grid_dependency.cuh"
#include "ptx/prefetch.cuh"

namespace anabranch::experts {
namespace {

// Registers a thread: the block begins with 64 Ki of them over all its threads, 168 each, and the
// producers leave some of theirs to the consumers.
template <class Shape>
constexpr int kProducerRegisters = 56;
template <class Shape>
constexpr int kConsumerRegisters = 224;

// While the launches before are at work: brings tokens to the second-level cache, so that they do not wait behind all
// blocks' weights later, and where nearly every expert will have tokens, the weights that are read first.
__device__ __forceinline__ void warm_cache(const Args& args) {
  constexpr uint32_t kLine = 128;
  constexpr uint32_t kPiece = 16 * 1024;
  const uint32_t thread = blockIdx.x * blockDim.x + threadIdx.x;
  const uint32_t threads = gridDim.x * blockDim.x;
  for (uint32_t at = thread; at < args.warm_tokens / kLine; at += threads) {
    ptx::prefetch_l2(reinterpret_cast<const char*>(args.x) + uint64_t{at} * kLine);
  }
  if (threadIdx.x % kWarpSize != 0) return;
  for (uint32_t at = thread / kWarpSize; at < args.warm_weights / kPiece; at += threads / kWarpSize) {
    ptx::bulk_prefetch_l2(static_cast<const char*>(args.gate_up_weights) + uint64_t{at} * kPiece, kPiece);
  }
}

template <class Shape>
__global__ void __launch_bounds__(128 * (Shape::kGroups + 1), 1) run_experts(const __grid_constant__ Args args) {
  extern __shared__ __align__(1024) char shared[];
  const Pipeline<Shape> pipeline(shared, args);
  if (threadIdx.x == 0) {
    pipeline.init(args.stages);
    ptx::prefetch_tensor_map(&args.gate_up);
    ptx::prefetch_tensor_map(&args.down);
    ptx::prefetch_tensor_map(&args.gated_map);
  }
  warm_cache(args);
  ptx::launch_dependents();
  ptx::wait_for_prerequisites();
  if (Shape::kMayBeAlone && args.places) {
    permute::Args pairs = args.pairs;
    pairs.offsets = pipeline.offsets;
    pairs.slots = pipeline.slots;
    pairs.inverse = pipeline.inverse;
    permute::place_rows(pairs, 0, 1, pipeline.scratch);
    // Written by ordinary stores, and by the copy engine next.
    ptx::fence_shared_proxy();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    ptx::register_dealloc<kProducerRegisters<Shape>>();
    if (threadIdx.x < kWarpSize) {
      WeightLoader<Shape>(args, pipeline).run();
    } else {
      TokenLoader<Shape>(args, pipeline).run();
    }
  } else {
    ptx::register_alloc<kConsumerRegisters<Shape>>();
    consume<Shape>(args, pipeline);
  }
}

AnabranchStatus make_maps(Args& args, const void* gate_up, const void* down, uint32_t rows) {
  const uint64_t experts = args.num_experts;
  const uint64_t d = args.hidden;
  const uint64_t n = args.intermediate;
  ANABRANCH_TRY(make_map<5>(&args.gate_up, gate_up, {d, 8, 2, n / 8, experts}, {2 * d, 2 * d * n, 16 * d, 4 * d * n},
                            {kDepth, 8, 2, rows / 16, 1}));
  ANABRANCH_TRY(make_map<3>(&args.down, down, {n, d, experts}, {2 * n, 2 * n * d}, {kDepth, rows, 1}));
  return make_map<2>(&args.gated_map, args.h, {n, args.num_rows}, {2 * n}, {kDepth, args.h_rows});
}

template <class Shape>
AnabranchStatus launch(const Config& config, Args& args, const void* gate_up, const void* down, cudaStream_t stream) {
  args.token_tile = config.token_tile;
  args.places = config.alone;
  constexpr uint32_t kWarps = 4 * (Shape::kGroups + 1);
  args.pairs.pairs_a_warp = ((args.num_rows - 1) / (kWarpSize * kWarps) + 1) * kWarpSize;
  args.stages = config.stages;
  args.gate_tiles = (args.intermediate - 1) / (Shape::kRows / 2) + 1;
  args.down_tiles = (args.hidden - 1) / Shape::kRows + 1;
  const uint32_t sums = ((args.hidden - 1) / kBlockRows + 1) * ((args.num_tokens - 1) / kSumTokens + 1);
  args.sum_tiles = config.alone ? (sums - 1) / Shape::kGroups + 1 : 0;
  args.h_rows = args.token_tile % 16 == 0 ? 16 : 8;
  ANABRANCH_TRY(make_maps(args, gate_up, down, Shape::kRows));
  // A part of the second-level cache's 50 MB, and no more than there is.
  constexpr uint64_t kWarm = uint64_t{24} << 20;
  const uint64_t pairs = uint64_t{args.num_tokens} * args.topk;
  args.gate_up_weights = gate_up;
  args.warm_tokens = static_cast<uint32_t>(least(uint64_t{args.num_tokens} * args.hidden * 2, kWarm / 8));
  args.warm_weights = static_cast<uint32_t>(
      pairs >= 2 * args.num_experts ? least(uint64_t{args.num_experts} * 4 * args.intermediate * args.hidden, kWarm)
                                    : 0);

  int blocks = 0;
  ANABRANCH_TRY(checked(multiprocessors(&blocks)));
  const auto kernel = run_experts<Shape>;
  ANABRANCH_TRY(checked(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                             static_cast<int>(config.shared_bytes))));
  cudaLaunchConfig_t launch = {};
  launch.gridDim = static_cast<uint32_t>(blocks);
  launch.blockDim = 128 * (Shape::kGroups + 1);
  launch.dynamicSmemBytes = config.shared_bytes;
  launch.stream = stream;
  return launch_overlapping(kernel, launch, args);
}

}  // namespace

bool is_there_sm90() {
  cudaFuncAttributes attributes = {};
  return checked(cudaFuncGetAttributes(&attributes, run_experts<Few>)) == ANABRANCH_STATUS_OK;
}

AnabranchStatus launch_sm90(const Config& config, Args args, const void* gate_up, const void* down,
                            cudaStream_t stream) {
  switch (config.tile) {
    case TileId::kOneToken:
      return launch_one_token(config, args, gate_up, down, stream);
    case TileId::kFew:
      return launch<Few>(config, args, gate_up, down, stream);
    case TileId::kMany:
      return launch<Many>(config, args, gate_up, down, stream);
  }
  return ANABRANCH_STATUS_UNSUPPORTED;
}

}  // namespace anabranch::experts
