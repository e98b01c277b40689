// combine: the weighted sum of what a token's experts answered.
//
//   out[t] = sum_k topk_weights[t, k] * y[inverse[t, k]] + sigmoid(shared_gate[t]) * shared[t]
//
//   y [R, d] bf16, inverse [T, K] int32, topk_weights [T, K] float32, shared [T, d] bf16 or null, shared_gate [T]
//   float32 or null -> out [T, d] bf16 or float32. A pair whose row is not one of y's adds nothing, whatever its
//   weight.
//
// Reference: anabranch::reference::combine (and the end of MoeLayer::forward_routed). Architecture: 8.0 and newer.
// Alignment: 16 bytes for y, shared and out.
//
// Sums are float32, k ascending, shared experts last: a token's result depends on its own rows only. A warp takes 32
// vectors of 16 bytes of one token, each lane one of them; rows and weights are read once a warp, a lane each, and
// handed around; four rows are in flight at a time.
//
// Bounds. Bytes: 2 d (T K + T), and as much again as out for shared: T = 16,384, K = 8, d = 2,048: 604 MB, 141 us at
// 4.28 TB/s. Two FLOP a value read.

#include "combine/sum_rows.cuh"
#include "common/launch.cuh"

namespace anabranch::combine {
namespace {

constexpr uint32_t kMaxTopk = 32;

AnabranchStatus check(const AnabranchCombineParams& params) {
  const bool topk = params.topk >= 1 && params.topk <= kMaxTopk;
  const bool width = params.hidden_size > 0 && params.hidden_size % kVector == 0;
  if (!topk || !width || params.num_tokens >= uint64_t{1} << 31 || params.num_rows >= uint64_t{1} << 31) {
    return ANABRANCH_STATUS_SETTING;
  }
  if (params.num_tokens == 0) return ANABRANCH_STATUS_OK;
  if ((params.num_rows > 0 && params.y == nullptr) || params.inverse == nullptr || params.topk_weights == nullptr ||
      params.out == nullptr || (params.shared == nullptr && params.shared_gate != nullptr)) {
    return ANABRANCH_STATUS_POINTER;
  }
  const bool aligned = is_aligned(params.y, 16) && is_aligned(params.inverse, 4) &&
                       is_aligned(params.topk_weights, 4) && is_aligned(params.shared, 16) &&
                       is_aligned(params.shared_gate, 4) && is_aligned(params.out, 16);
  return aligned ? ANABRANCH_STATUS_OK : ANABRANCH_STATUS_ALIGNMENT;
}

template <typename Out>
AnabranchStatus launch(const AnabranchCombineParams& params, cudaStream_t stream) {
  Args args = {};
  args.y = static_cast<const uint4*>(params.y);
  args.inverse = params.inverse;
  args.weights = params.topk_weights;
  args.shared = static_cast<const uint4*>(params.shared);
  args.shared_gate = params.shared_gate;
  args.out = params.out;
  args.num_rows = static_cast<uint32_t>(params.num_rows);
  args.topk = params.topk;
  args.vectors = params.hidden_size / kVector;
  args.items_per_token = (args.vectors - 1) / kWarpSize + 1;
  // Items are counted in 31 bits: no GPU holds that many.
  const uint64_t items = params.num_tokens * args.items_per_token;
  if (items >= uint64_t{1} << 31) return ANABRANCH_STATUS_SETTING;
  args.num_items = static_cast<uint32_t>(items);
  cudaLaunchConfig_t config = {};
  config.gridDim = (args.num_items - 1) / kWarps + 1;
  config.blockDim = kThreads;
  config.stream = stream;
  return launch_overlapping(sum_rows<Out>, config, args);
}

AnabranchStatus launch_for(const AnabranchCombineParams& params, cudaStream_t stream) {
  switch (params.out_dtype) {
    case ANABRANCH_DTYPE_BF16:
      return launch<Bf16Out>(params, stream);
    case ANABRANCH_DTYPE_F32:
      return launch<FloatOut>(params, stream);
    default:
      return ANABRANCH_STATUS_UNSUPPORTED;
  }
}

}  // namespace
}  // namespace anabranch::combine

extern "C" AnabranchStatus anabranch_combine(const AnabranchCombineParams* params, AnabranchStream stream) {
  using namespace anabranch;
  if (params == nullptr) return ANABRANCH_STATUS_POINTER;
  ANABRANCH_TRY(combine::check(*params));
  return params->num_tokens == 0 ? ANABRANCH_STATUS_OK : combine::launch_for(*params, stream);
}
