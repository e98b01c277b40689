// rms_norm: RMS norm of rows, of the residual stream after what is added to it, or of heads in place.
//
//   x += delta (optional);   out = x / sqrt(mean(x^2) + eps) * weight
//
//   x, delta, out [T, heads, width] bf16, tokens a stride apart; weight [width] bf16 or float32. out may be x.
//
// Reference: anabranch::reference::rms_norm. Architecture: 8.0 and newer. Alignment: 16 bytes, rows too.
//
// Arithmetic is float32; the residual stream stays bf16, as Transformers has it, and what is normed is the rounded sum.
// A group of threads takes a row and keeps it in registers: 8 to 32 threads with one vector of 16 bytes each up to a
// width of 256 (heads), a warp with up to 4 each to 1,024, a block with 2 each beyond, so that one row is done soon.
// The choice hangs on the width only, and so does the order of the sum: a row's result does not depend on the others.
//
// Bounds. Bytes: 4 T d, 8 T d with delta: T = 16,384, d = 2,048: 134 MB, 31 us at 4.28 TB/s; 268 MB, 63 us. Five FLOP a
// value.

#include "block/norm_rows.cuh"
#include "common/launch.cuh"

namespace anabranch::block {
namespace {

// A thread's most vectors times a block's most threads.
constexpr uint32_t kMaxWidth = 8 * 1024 * kVector;
constexpr uint32_t kGroupBlock = 256;

struct NormShape {
  uint32_t vectors_a_thread;  // 1, 2, 4 or 8
  uint32_t threads;           // a row
};

// Which threads have which vectors of a row. A pure function of the width.
constexpr NormShape norm_shape(uint32_t vectors) {
  NormShape shape = {};
  shape.vectors_a_thread = vectors <= 32 ? 1 : vectors <= 128 ? 4 : vectors <= 2048 ? 2 : 8;
  const uint32_t wanted = (vectors + shape.vectors_a_thread - 1) / shape.vectors_a_thread;
  shape.threads = 8;
  while (shape.threads < wanted && shape.threads < kWarpSize) shape.threads *= 2;
  if (shape.threads < wanted) shape.threads = (wanted + kWarpSize - 1) / kWarpSize * kWarpSize;
  return shape;
}

static_assert(norm_shape(1).threads == 8 && norm_shape(16).threads == 16 && norm_shape(32).threads == 32);
static_assert(norm_shape(64).threads == 16 && norm_shape(256).threads == 128 && norm_shape(640).threads == 320);
static_assert(norm_shape(kMaxWidth / kVector).threads == 1024);

AnabranchStatus check(const AnabranchRmsNormParams& params) {
  const uint64_t row = uint64_t{params.num_heads} * params.width;
  const bool width = params.width > 0 && params.width % kVector == 0 && params.width <= kMaxWidth;
  const bool strides = params.x_stride % kVector == 0 && params.x_stride >= row && params.out_stride % kVector == 0 &&
                       params.out_stride >= row;
  if (!width || !strides || params.num_heads == 0 || !(params.eps >= 0.0f) ||
      params.num_tokens >= (uint64_t{1} << 31) / params.num_heads) {
    return ANABRANCH_STATUS_SETTING;
  }
  if (params.weight == nullptr || (params.num_tokens > 0 && (params.x == nullptr || params.out == nullptr))) {
    return ANABRANCH_STATUS_POINTER;
  }
  for (const void* pointer :
       {static_cast<const void*>(params.x), params.delta, params.weight, static_cast<const void*>(params.out)}) {
    if (!is_aligned(pointer, 16)) return ANABRANCH_STATUS_ALIGNMENT;
  }
  return ANABRANCH_STATUS_OK;
}

template <uint32_t kVectors, typename Weight>
AnabranchStatus launch(const NormArgs& args, cudaStream_t stream) {
  cudaLaunchConfig_t config = {};
  config.blockDim = args.threads > kWarpSize ? args.threads : kGroupBlock;
  const uint32_t rows = config.blockDim.x / args.threads;
  config.gridDim = (args.num_rows - 1) / rows + 1;
  config.stream = stream;
  return launch_overlapping(norm_rows<kVectors, Weight>, config, args);
}

template <typename Weight>
AnabranchStatus launch_for(const AnabranchRmsNormParams& params, cudaStream_t stream) {
  NormArgs args = {};
  args.x = static_cast<uint4*>(params.x);
  args.delta = static_cast<const uint4*>(params.delta);
  args.weight = params.weight;
  args.out = static_cast<uint4*>(params.out);
  args.x_stride = params.x_stride / kVector;
  args.out_stride = params.out_stride / kVector;
  args.num_rows = static_cast<uint32_t>(params.num_tokens * params.num_heads);
  args.heads = params.num_heads;
  args.vectors = params.width / kVector;
  const NormShape shape = norm_shape(args.vectors);
  args.threads = shape.threads;
  args.width = static_cast<float>(params.width);
  args.eps = params.eps;
  if (shape.vectors_a_thread == 1) return launch<1, Weight>(args, stream);
  if (shape.vectors_a_thread == 2) return launch<2, Weight>(args, stream);
  if (shape.vectors_a_thread == 4) return launch<4, Weight>(args, stream);
  return launch<8, Weight>(args, stream);
}

}  // namespace
}  // namespace anabranch::block

extern "C" AnabranchStatus anabranch_rms_norm(const AnabranchRmsNormParams* params, AnabranchStream stream) {
  using namespace anabranch;
  if (params == nullptr) return ANABRANCH_STATUS_POINTER;
  ANABRANCH_TRY(block::check(*params));
  const bool nothing = params->num_tokens == 0;
  switch (params->weight_dtype) {
    case ANABRANCH_DTYPE_BF16:
      return nothing ? ANABRANCH_STATUS_OK : block::launch_for<block::Bf16Weight>(*params, stream);
    case ANABRANCH_DTYPE_F32:
      return nothing ? ANABRANCH_STATUS_OK : block::launch_for<block::FloatWeight>(*params, stream);
    default:
      return ANABRANCH_STATUS_UNSUPPORTED;
  }
}
