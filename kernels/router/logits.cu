// router_logits: the gate product, what a router judges by.
//
//   logits[t, e] = sum_i x[t, i] gate[e, i] + bias[e]
//
//   x [T, d] bf16, gate [E, d] bf16, bias [E] float32 or null -> logits [T, E] float32, summed in float32
//
// Reference: anabranch::reference::linear. Architecture: 8.0 and newer. Alignment: 16 bytes for x and gate.
//
// Up to kFewTokens tokens, and wherever E is not a multiple of 8, logits.cuh's kernel: E / 16 blocks for every 8 or 32
// tokens, so that a model's gate is read by many multiprocessors at once. Beyond, grouped_gemm with one expert. The two
// add in different orders: a token's logits hang on which of them runs, never on the other tokens.
//
// Bounds. FLOPs: 2 T E d. Bytes: 2 E d + 2 T d + 4 T E.

#include "common/launch.cuh"
#include "router/logits.cuh"

namespace anabranch::router {
namespace {

constexpr uint64_t kFewTokens = 64;

AnabranchStatus check_logits(const AnabranchRouterLogitsParams& params) {
  if (params.num_experts < 1 || params.num_experts > 1024 || params.hidden_size < 8 || params.hidden_size % 8 != 0 ||
      params.hidden_size > 1u << 30 || params.num_tokens >= uint64_t{1} << 31) {
    return ANABRANCH_STATUS_SETTING;
  }
  if (params.num_tokens == 0) return ANABRANCH_STATUS_OK;
  if (params.x == nullptr || params.gate == nullptr || params.logits == nullptr) return ANABRANCH_STATUS_POINTER;
  const bool aligned = is_aligned(params.x, 16) && is_aligned(params.gate, 16) && is_aligned(params.bias, 4) &&
                       is_aligned(params.logits, 4);
  return aligned ? ANABRANCH_STATUS_OK : ANABRANCH_STATUS_ALIGNMENT;
}

template <uint32_t kTiles>
AnabranchStatus launch_few(const LogitsArgs& args, cudaStream_t stream) {
  // Rows of blocks are counted in 16 bits: more tokens than 65,535 times 32 go in parts.
  constexpr uint32_t kMost = 65535u * 8 * kTiles;
  for (uint32_t first = 0; first < args.num_tokens; first += kMost) {
    LogitsArgs part = args;
    part.x += uint64_t{first} * args.vectors;
    part.logits += uint64_t{first} * args.num_experts;
    part.num_tokens = args.num_tokens - first < kMost ? args.num_tokens - first : kMost;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3((args.num_experts - 1) / kLogitExperts + 1, (part.num_tokens - 1) / (8 * kTiles) + 1);
    config.blockDim = kLogitThreads;
    config.stream = stream;
    ANABRANCH_TRY(launch_overlapping(multiply_gate<kTiles>, config, part));
  }
  return ANABRANCH_STATUS_OK;
}

AnabranchStatus many(const AnabranchRouterLogitsParams& params, cudaStream_t stream) {
  AnabranchGroupedGemmParams gemm = {};
  gemm.num_rows = params.num_tokens;
  gemm.num_tokens = params.num_tokens;
  gemm.num_experts = 1;
  gemm.in_features = params.hidden_size;
  gemm.out_features = params.num_experts;
  gemm.epilogue = ANABRANCH_EPILOGUE_LINEAR;
  gemm.y_dtype = ANABRANCH_DTYPE_F32;
  gemm.x = params.x;
  gemm.weights = params.gate;
  gemm.bias = params.bias;
  gemm.y = params.logits;
  return anabranch_grouped_gemm(&gemm, stream);
}

}  // namespace
}  // namespace anabranch::router

extern "C" AnabranchStatus anabranch_router_logits(const AnabranchRouterLogitsParams* params, AnabranchStream stream) {
  using namespace anabranch;
  using namespace anabranch::router;
  if (params == nullptr) return ANABRANCH_STATUS_POINTER;
  ANABRANCH_TRY(check_logits(*params));
  if (params->num_tokens == 0) return ANABRANCH_STATUS_OK;
  // What the product of many asks of its operands beyond what is asked here.
  const bool fits = params->num_experts % 8 == 0 && is_aligned(params->logits, 16) && is_aligned(params->bias, 8);
  if (params->num_tokens > kFewTokens && fits) return many(*params, stream);
  LogitsArgs args = {};
  args.x = static_cast<const uint4*>(params->x);
  args.gate = static_cast<const uint4*>(params->gate);
  args.bias = params->bias;
  args.logits = params->logits;
  args.num_tokens = static_cast<uint32_t>(params->num_tokens);
  args.num_experts = params->num_experts;
  args.vectors = params->hidden_size / 8;
  return params->num_tokens <= 8 ? launch_few<1>(args, stream) : launch_few<4>(args, stream);
}
