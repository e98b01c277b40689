// grouped_gemm: every expert's weights times its own segment of rows.
//
//   y[r] = epilogue(x[source(r)] W_e^T)    for offsets[e] <= r < offsets[e + 1], source(r) = slots[r] / K or r
//   epilogue: + bias | ReLU(. + bias) | GELU(. + bias) | silu(gate + bias) * (up + bias), where W_e and its bias
//   are the gate's, then up's
//
//   x [T, d] bf16, W [E, n, d] or [E, 2n, d] bf16, bias [E, n] or [E, 2n] float32 or null, offsets [E + 1], slots [R]
//   or null
//   -> y [R, n] bf16 or float32. Sums in float32, in an order that depends on d alone: the same bits whatever else is
//   in the batch and whichever tile is chosen.
//
// Reference: anabranch::reference::grouped_gemm and ::linear. Architecture: 8.0 and newer (mma.sync, cp.async,
// ldmatrix). Alignment: x, W and y on 16 bytes, d and n multiples of 8; everything else is ragged: copies are
// predicated by 16 bytes.
//
// Blocks stay and take tile after tile (scheduler.cuh); 4 or 8 warps share a tile of kM rows of x by kN rows of W
// (config.cuh), each up to 64 x 64 as 4 x 8 mma.m16n8k16; kernel.cuh has the main loop. The host knows no count: a
// launch is as large as R rows may need, and blocks without a tile leave.
//
// Bounds, R = T K rows. FLOPs: 2 R d n, twice that with SwiGLU. Bytes: 2 (E hit) d n of weights (twice with SwiGLU), 2
// R d of x at most, 2 R n of y. On an H200 (4.6 TB/s read) mma.sync can issue about 1,270 multiply-adds a clock and
// multiprocessor, 62% of what wgmma can: 570 TFLOP/s at 1.7 GHz. A tile of m x n reads 2 (m + n) bytes for each 2 m n
// FLOPs from the second-level cache, at some 28 bytes a clock: 128 x 256 can reach 535 TFLOP/s that way, 128 x 128 400.
//
// A step of 128 x 256 on sm_90 is 306 instructions a warp: 128 HMMA, 32 LDSM, 12 LDGSTS; 232 registers, nothing in
// local memory. Measured on an H200 for Qwen3-30B-A3B (d = 2048, n = 768, E = 128, K = 8) at T = 16,384: 393 TFLOP/s in
// the first product, 349 in the second. docs/kernels/grouped_gemm.md has the arithmetic.

#include "common/launch.cuh"
#include "grouped_gemm/kernel.cuh"

namespace anabranch::grouped_gemm {
namespace {

constexpr uint32_t kMaxExperts = 1024;
constexpr uint32_t kMaxTopk = 32;
constexpr uint32_t kMaxFeatures = 1u << 30;

bool is_width(uint32_t features) {
  return features >= 8 && features <= kMaxFeatures && features % 8 == 0;
}

AnabranchStatus check(const AnabranchGroupedGemmParams& params) {
  const bool gathers = params.row_slots != nullptr;
  if (!is_width(params.in_features) || !is_width(params.out_features) || params.num_experts < 1 ||
      params.num_experts > kMaxExperts || params.num_rows >= uint64_t{1} << 31 ||
      params.num_tokens >= uint64_t{1} << 31 || params.tile > ANABRANCH_TILE_128X256) {
    return ANABRANCH_STATUS_SETTING;
  }
  if (gathers ? params.topk < 1 || params.topk > kMaxTopk : params.topk != 0 || params.num_tokens != params.num_rows) {
    return ANABRANCH_STATUS_SETTING;
  }
  if (params.epilogue > ANABRANCH_EPILOGUE_SWIGLU ||
      (params.y_dtype != ANABRANCH_DTYPE_BF16 && params.y_dtype != ANABRANCH_DTYPE_F32)) {
    return ANABRANCH_STATUS_UNSUPPORTED;
  }
  if ((params.expert_offsets == nullptr && params.num_experts != 1) ||
      (params.num_rows > 0 && (params.x == nullptr || params.weights == nullptr || params.y == nullptr))) {
    return ANABRANCH_STATUS_POINTER;
  }
  if (!is_aligned(params.x, 16) || !is_aligned(params.weights, 16) || !is_aligned(params.y, 16) ||
      !is_aligned(params.bias, 8) || !is_aligned(params.expert_offsets, 4) || !is_aligned(params.row_slots, 4)) {
    return ANABRANCH_STATUS_ALIGNMENT;
  }
  return ANABRANCH_STATUS_OK;
}

Args args_of(const AnabranchGroupedGemmParams& params) {
  Args args = {};
  args.x = static_cast<const __nv_bfloat16*>(params.x);
  args.weights = static_cast<const __nv_bfloat16*>(params.weights);
  args.bias = params.bias;
  args.offsets = params.expert_offsets;
  args.slots = params.row_slots;
  args.y = params.y;
  args.rows = static_cast<uint32_t>(params.num_rows);
  args.x_rows = static_cast<uint32_t>(params.num_tokens);
  args.experts = params.num_experts;
  args.topk = params.topk;
  args.depth = params.in_features;
  args.columns = params.out_features;
  args.wide_y = params.y_dtype == ANABRANCH_DTYPE_F32;
  args.gelu = params.epilogue == ANABRANCH_EPILOGUE_GELU;
  return args;
}

cudaError_t describe(Device* device) {
  int ordinal = 0;
  cudaError_t error = cudaGetDevice(&ordinal);
  const auto ask = [&](int* value, cudaDeviceAttr attribute) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(value, attribute, ordinal);
  };
  ask(&device->multiprocessors, cudaDevAttrMultiProcessorCount);
  ask(&device->shared_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  ask(&device->shared_per_multiprocessor, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  return error;
}

TileId tile_of(const AnabranchGroupedGemmParams& params, const Device& device) {
  // The header counts from AUTO, which is 0.
  if (params.tile != ANABRANCH_TILE_AUTO) return static_cast<TileId>(params.tile - 1);
  const uint32_t weight_rows =
      params.epilogue == ANABRANCH_EPILOGUE_SWIGLU ? 2 * params.out_features : params.out_features;
  return choose_tile({params.num_rows, params.num_experts, weight_rows, static_cast<uint32_t>(device.multiprocessors),
                      static_cast<uint32_t>(device.shared_per_block)});
}

static_assert(static_cast<uint32_t>(TileId::kRows16) + 1 == ANABRANCH_TILE_16X64 &&
              static_cast<uint32_t>(TileId::kRows32) + 1 == ANABRANCH_TILE_32X128 &&
              static_cast<uint32_t>(TileId::kRows64) + 1 == ANABRANCH_TILE_64X128 &&
              static_cast<uint32_t>(TileId::kRows128) + 1 == ANABRANCH_TILE_128X128 &&
              static_cast<uint32_t>(TileId::kRows128Wide) + 1 == ANABRANCH_TILE_128X256);

}  // namespace
}  // namespace anabranch::grouped_gemm

extern "C" AnabranchStatus anabranch_grouped_gemm(const AnabranchGroupedGemmParams* params, AnabranchStream stream) {
  using namespace anabranch;
  using namespace anabranch::grouped_gemm;
  if (params == nullptr) return ANABRANCH_STATUS_POINTER;
  ANABRANCH_TRY(check(*params));
  if (params->num_rows == 0) return ANABRANCH_STATUS_OK;
  Device device = {};
  ANABRANCH_TRY(checked(describe(&device)));
  const TileId tile = tile_of(*params, device);
  const Args args = args_of(*params);
  switch (params->epilogue) {
    case ANABRANCH_EPILOGUE_LINEAR:
      return launch_linear(tile, device, args, stream);
    case ANABRANCH_EPILOGUE_RELU:
    case ANABRANCH_EPILOGUE_GELU:
      return launch_activated(tile, device, args, stream);
    case ANABRANCH_EPILOGUE_SWIGLU:
      return launch_swiglu(tile, device, args, stream);
  }
  return ANABRANCH_STATUS_UNSUPPORTED;
}
