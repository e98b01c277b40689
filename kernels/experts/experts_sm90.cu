// experts: both products of every expert, in one launch, on Hopper.
//
//   h[r] = silu(x[t] W_gate^T) * (x[t] W_up^T),   y[r] = h[r] W_down^T     r: permuted row of a pair of token t
//   out[t] = sum_k weights[t, k] y[inverse[t, k]]                        where asked for (few tokens)
//
//   x [T, d], gate_up [E, 2n, d], down [E, d, n] bf16, offsets [E + 1], slots [R], inverse [T, K], weights [T, K]
//   -> h [R, n], y [R, d], out [T, d] bf16. Sums in float32, in an order that depends on d and n alone.
//
// Reference: anabranch::reference::grouped_gemm, ::combine. Architecture: 9.0a (TMA, wgmma, setmaxnreg). Alignment: 16
// bytes; d a multiple of 16, n of 8.
//
// Weights are wgmma's M side, tokens its N side: 8 to 192 of them in steps of 16, so that an expert with few tokens
// costs few products and one with up to 192 reads its weights once. A block stays on its multiprocessor and takes items
// (schedule.cuh) from a common counter: first tiles of h, then tiles of y. One warp brings weights (TMA), three gather
// tokens (cp.async; no permuted copy of x is made), one or two warpgroups multiply (consume.cuh). A tile of y waits, in
// its tokens only, until its tokens' h is complete: its weights are on their way before that, and memory does not rest
// between the products.
//
// Bounds. FLOPs 6 R d n; bytes 6 d n an expert hit. A step of 256 x 192 x 64 is 6.3 MFLOP and 56 KiB from the
// second-level cache: 1,536 clocks of wgmma on a multiprocessor, 37 bytes a clock.

#include "common/launch.cuh"
#include "experts/consume.cuh"
#include "experts/experts.cuh"
#include "ptx/grid_dependency.cuh"

namespace anabranch::experts {
namespace {

// Registers a thread: the block begins with 64 Ki of them over all its threads, in eights (168 with three warpgroups),
// and the producers leave theirs to the consumers.
template <class Shape>
constexpr int kProducerRegisters = 40;
template <class Shape>
constexpr int kConsumerRegisters = Shape::kGroups == 2 ? 232 : 216;

template <class Shape>
__global__ void __launch_bounds__(128 * (Shape::kGroups + 1), 1) run_experts(const __grid_constant__ Args args) {
  extern __shared__ __align__(1024) char shared[];
  const Pipeline pipeline(shared, args, Shape::kRows);
  if (threadIdx.x == 0) {
    pipeline.init(args.stages, Shape::kGroups);
    ptx::prefetch_tensor_map(&args.gate_up);
    ptx::prefetch_tensor_map(&args.down);
  }
  ptx::wait_for_prerequisites();
  const Schedule schedule(args, pipeline.words);
  if (schedule.tiles() == 0 && args.out != nullptr) {
    // Nobody chose anything: no column has a last tile.
    const uint64_t vectors = uint64_t{args.num_tokens} * args.hidden / kVector;
    for (uint64_t i = uint64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < vectors; i += gridDim.x * blockDim.x) {
      reinterpret_cast<uint4*>(args.out)[i] = make_uint4(0, 0, 0, 0);
    }
  }
  if (threadIdx.x < 128) {
    ptx::register_dealloc<kProducerRegisters<Shape>>();
    if (threadIdx.x < kWarpSize) {
      bring_weights<Shape::kRows>(args, schedule, pipeline);
    } else {
      gather_tokens<Shape::kRows, Shape::kGroups>(args, pipeline);
    }
  } else {
    ptx::register_alloc<kConsumerRegisters<Shape>>();
    consume<Shape>(args, schedule, pipeline);
  }
}

// The driver's function that makes tensor maps, found at run time: nothing links to the driver.
using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                            const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                            CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

AnabranchStatus encoder(Encode* encode) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
  ANABRANCH_TRY(
      checked(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found)));
  if (found != cudaDriverEntryPointSuccess) return ANABRANCH_STATUS_UNSUPPORTED;
  *encode = reinterpret_cast<Encode>(function);
  return ANABRANCH_STATUS_OK;
}

// Weights [experts, rows, columns] as [experts, rows / 16, 2, 8, columns]: element i of the second dimension and j of
// the third is row `inner` i + `outer` j of a group; groups are `group` rows apart.
AnabranchStatus make_map(CUtensorMap* map, const void* weights, uint64_t experts, uint64_t rows, uint64_t columns,
                         uint64_t inner, uint64_t outer, uint64_t group, uint32_t groups_of_box) {
  Encode encode = nullptr;
  ANABRANCH_TRY(encoder(&encode));
  const uint64_t row = columns * 2;
  const cuuint64_t sizes[] = {columns, 8, 2, rows / 16, experts};
  const cuuint64_t strides[] = {inner * row, outer * row, group * row, rows * row};
  const cuuint32_t box[] = {kDepth, 8, 2, groups_of_box, 1};
  const cuuint32_t steps[] = {1, 1, 1, 1, 1};
  const CUresult made = encode(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 5, const_cast<void*>(weights), sizes, strides,
                               box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                               CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return made == CUDA_SUCCESS ? ANABRANCH_STATUS_OK : ANABRANCH_STATUS_SETTING;
}

template <class Shape>
AnabranchStatus launch(const Config& config, Args& args, const void* gate_up, const void* down, cudaStream_t stream) {
  args.token_tile = config.token_tile;
  args.stages = config.stages;
  args.gate_tiles = (args.intermediate - 1) / (Shape::kRows / 2) + 1;
  args.down_tiles = (args.hidden - 1) / Shape::kRows + 1;
  const uint64_t n = args.intermediate;
  ANABRANCH_TRY(make_map(&args.gate_up, gate_up, args.num_experts, 2 * n, args.hidden, 1, n, 8, Shape::kRows / 16));
  ANABRANCH_TRY(make_map(&args.down, down, args.num_experts, args.hidden, n, 2, 1, 16, Shape::kRows / 16));

  int blocks = 0;
  ANABRANCH_TRY(checked(multiprocessors(&blocks)));
  const auto kernel = run_experts<Shape>;
  ANABRANCH_TRY(checked(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                             static_cast<int>(config.shared_bytes))));
  cudaLaunchAttribute overlap = {};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t launch = {};
  launch.gridDim = static_cast<uint32_t>(blocks);
  launch.blockDim = 128 * (Shape::kGroups + 1);
  launch.dynamicSmemBytes = config.shared_bytes;
  launch.stream = stream;
  launch.attrs = &overlap;
  launch.numAttrs = 1;
  return checked(cudaLaunchKernelEx(&launch, kernel, args));
}

}  // namespace

AnabranchStatus launch_sm90(const Config& config, Args args, const void* gate_up, const void* down,
                            cudaStream_t stream) {
  switch (config.rows) {
    case 64:
      return launch<Tile<1, 1, 64>>(config, args, gate_up, down, stream);
    case 256:
      return launch<Tile<2, 2, kMostTokens>>(config, args, gate_up, down, stream);
    default:
      return ANABRANCH_STATUS_UNSUPPORTED;
  }
}

}  // namespace anabranch::experts
