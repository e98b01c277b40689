// moe_layer: from router logits to the layer's output, one call.
//
//   out[t] = sum_k w[t, k] E_k(x[t]) + g[t] sum_s S_s(x[t]),   E(x) = (silu(x W_gate^T) * (x W_up^T)) W_down^T
//
//   x [T, d] bf16, logits [T, E] float32, gate_up [E + S, 2n, d] bf16, down [E + S, d, n] bf16 -> out [T, d] bf16
//
// Reference: anabranch::reference::MoeLayer. Architecture: 8.0 and newer; on 9.0 the expert products are those of
// experts/. Alignment: 16 bytes for what is bf16, 256 for the workspace.
//
// moe_block is the same from the residual stream on: rms_norm, router_logits and the layer, the gate in their place
// where it takes the shape (gate_sm90.cu).
//
// This file only puts launches one after another. 8.0: router, extend (with shared experts), permute, grouped_gemm with
// SwiGLU, grouped_gemm, combine. 9.0: the front (router and extend in one; both where tokens may be dropped), then the
// experts alone with few tokens, else permute, experts, combine.
//
// Bounds. FLOPs: 6 T (K + S) d n. Bytes: 6 d n an expert hit, 4 T d.

#include "common/launch.cuh"
#include "experts/experts.cuh"
#include "moe_layer/extend.cuh"
#include "moe_layer/launch_front.cuh"
#include "moe_layer/launch_gate.cuh"
#include "moe_layer/workspace.cuh"

namespace anabranch::moe_layer {
namespace {

constexpr uint64_t kMaxExperts = 1024;
constexpr uint64_t kMaxTopk = 32;

Sizes sizes_of(const AnabranchMoeShape& shape, uint64_t num_tokens) {
  return {num_tokens, uint64_t{shape.routing.num_experts} + shape.num_shared,
          uint64_t{shape.routing.topk} + shape.num_shared, shape.hidden_size, shape.intermediate_size};
}

bool is_width(uint32_t width) {
  return width >= 8 && width <= 1u << 30 && width % 8 == 0;
}

AnabranchStatus check_shape(const AnabranchMoeShape& shape, uint64_t num_tokens) {
  const Sizes sizes = sizes_of(shape, num_tokens);
  if (sizes.experts > kMaxExperts || sizes.topk > kMaxTopk || !is_width(shape.hidden_size) ||
      !is_width(shape.intermediate_size) || num_tokens >= (uint64_t{1} << 31) / (sizes.topk == 0 ? 1 : sizes.topk)) {
    return ANABRANCH_STATUS_SETTING;
  }
  if (shape.arch != ANABRANCH_ARCH_AUTO && shape.arch != ANABRANCH_ARCH_SM80 && shape.arch != ANABRANCH_ARCH_SM90) {
    return ANABRANCH_STATUS_UNSUPPORTED;
  }
  uint64_t bytes = 0;
  return anabranch_router_workspace(&shape.routing, num_tokens, &bytes);
}

AnabranchStatus permute_bytes_of(const Sizes& sizes, uint64_t* bytes) {
  return anabranch_permute_workspace(sizes.tokens, static_cast<uint32_t>(sizes.topk),
                                     static_cast<uint32_t>(sizes.experts), bytes);
}

struct Device {
  int major;
  int minor;
  int multiprocessors;
  int shared_per_block;
};

AnabranchStatus ask(Device* device) {
  int current = 0;
  ANABRANCH_TRY(checked(cudaGetDevice(&current)));
  const struct {
    int* to;
    cudaDeviceAttr what;
  } facts[] = {{&device->major, cudaDevAttrComputeCapabilityMajor},
               {&device->minor, cudaDevAttrComputeCapabilityMinor},
               {&device->multiprocessors, cudaDevAttrMultiProcessorCount},
               {&device->shared_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin}};
  for (const auto& fact : facts) ANABRANCH_TRY(checked(cudaDeviceGetAttribute(fact.to, fact.what, current)));
  return ANABRANCH_STATUS_OK;
}

// Whether the kernels for 9.0 take the shape: rows are found by 32-bit counts of 16 bytes.
bool suits_sm90(const Device& device, const Sizes& sizes) {
  constexpr uint64_t kMost = uint64_t{1} << 31;
  return device.major == 9 && device.minor == 0 && experts::is_there_sm90() &&
         sizes.tokens * sizes.hidden / 8 < kMost && sizes.pairs() * sizes.intermediate / 8 < kMost;
}

// What is done with a shape.
struct Plan {
  AnabranchArch arch;
  experts::Config experts;  // with ANABRANCH_ARCH_SM90
  uint64_t token_tiles;     // the most there can be
  uint64_t progress_words;
  uint64_t permute_bytes;
  uint64_t workspace_bytes;
  uint32_t blocks;
  bool fronts;  // one launch does all that comes before the permutation: nothing is dropped
  bool gates;   // of a block, also what comes before that
};

// Words of progress: the counter of items has a line of its own, then token tiles, then 64 columns of the result each.
constexpr uint64_t kCounterWords = 32;

AnabranchStatus plan_of(const AnabranchMoeShape& shape, uint64_t num_tokens, Plan* plan) {
  ANABRANCH_TRY(check_shape(shape, num_tokens));
  const Sizes sizes = sizes_of(shape, num_tokens);
  Device device = {};
  ANABRANCH_TRY(ask(&device));
  *plan = {};
  plan->arch = shape.arch != ANABRANCH_ARCH_AUTO ? shape.arch
               : suits_sm90(device, sizes)       ? ANABRANCH_ARCH_SM90
                                                 : ANABRANCH_ARCH_SM80;
  if (plan->arch == ANABRANCH_ARCH_SM90) {
    if (!suits_sm90(device, sizes)) return ANABRANCH_STATUS_UNSUPPORTED;
    plan->experts = experts::choose({sizes.tokens, sizes.experts, sizes.topk, sizes.hidden, sizes.intermediate,
                                     static_cast<uint64_t>(device.shared_per_block),
                                     static_cast<uint64_t>(device.multiprocessors)});
    // A single token's kernel has a word for each block there instead.
    const uint64_t tiles = experts::most_tiles(plan->experts, sizes.pairs(), sizes.experts);
    const uint64_t blocks = static_cast<uint64_t>(device.multiprocessors);
    plan->token_tiles = tiles > blocks ? tiles : blocks;
    plan->progress_words = kCounterWords + plan->token_tiles + (sizes.hidden - 1) / experts::kBlockRows + 8;
    plan->blocks = static_cast<uint32_t>(device.multiprocessors);
    const uint64_t capacity = shape.routing.expert_capacity;
    plan->fronts = (capacity == 0 || capacity >= num_tokens) && shape.routing.adaptive != ANABRANCH_ADAPTIVE_COMPLEXITY;
    plan->gates = plan->fronts && takes_gate(shape, num_tokens, device.shared_per_block);
  }
  ANABRANCH_TRY(permute_bytes_of(sizes, &plan->permute_bytes));
  Parts parts(nullptr);
  const Workspace workspace(sizes, plan->permute_bytes, plan->progress_words, parts);
  static_cast<void>(workspace);
  plan->workspace_bytes = parts.used();
  return ANABRANCH_STATUS_OK;
}

uint32_t launches_of(const AnabranchMoeShape& shape, const Plan& plan) {
  const uint32_t before = plan.fronts ? 1 : 1 + (shape.num_shared > 0 ? 1 : 0);
  const uint32_t permute = 1 + (plan.permute_bytes > 0 ? 1 : 0);
  if (plan.arch == ANABRANCH_ARCH_SM80) return before + permute + 3;
  return plan.experts.alone ? before + 1 : before + permute + 2;
}

AnabranchStatus check(const AnabranchMoeLayerParams& params, const Plan& plan) {
  if (params.num_tokens == 0) return ANABRANCH_STATUS_OK;
  const bool routed = params.topk_ids != nullptr && params.topk_weights != nullptr;
  if (params.x == nullptr || params.gate_up == nullptr || params.down == nullptr || params.out == nullptr ||
      params.workspace == nullptr || (params.logits == nullptr && !routed) ||
      (params.shared_gate != nullptr && params.shape.num_shared == 0)) {
    return ANABRANCH_STATUS_POINTER;
  }
  const bool aligned = is_aligned(params.x, 16) && is_aligned(params.gate_up, 16) && is_aligned(params.down, 16) &&
                       is_aligned(params.out, 16) && is_aligned(params.workspace, kAlign) &&
                       is_aligned(params.logits, 4) && is_aligned(params.selection_bias, 4) &&
                       is_aligned(params.shared_gate, 4) && is_aligned(params.topk_ids, 4) &&
                       is_aligned(params.topk_weights, 4);
  if (!aligned) return ANABRANCH_STATUS_ALIGNMENT;
  return params.workspace_bytes < plan.workspace_bytes ? ANABRANCH_STATUS_WORKSPACE : ANABRANCH_STATUS_OK;
}

AnabranchStatus check(const AnabranchMoeBlockParams& params) {
  if (!(params.norm_eps >= 0.0f)) return ANABRANCH_STATUS_SETTING;
  if (params.num_tokens == 0) return ANABRANCH_STATUS_OK;
  if (params.residual == nullptr || params.norm_weight == nullptr || params.gate == nullptr || params.x == nullptr ||
      params.logits == nullptr) {
    return ANABRANCH_STATUS_POINTER;
  }
  const bool aligned = is_aligned(params.residual, 16) && is_aligned(params.delta, 16) &&
                       is_aligned(params.norm_weight, 16) && is_aligned(params.gate, 16) &&
                       is_aligned(params.logits, 16);
  return aligned ? ANABRANCH_STATUS_OK : ANABRANCH_STATUS_ALIGNMENT;
}

// The layer of a block.
AnabranchMoeLayerParams layer_of(const AnabranchMoeBlockParams& block) {
  AnabranchMoeLayerParams layer = {};
  layer.shape = block.shape;
  layer.num_tokens = block.num_tokens;
  layer.x = block.x;
  layer.logits = block.logits;
  layer.selection_bias = block.selection_bias;
  layer.gate_up = block.gate_up;
  layer.down = block.down;
  layer.topk_ids = block.topk_ids;
  layer.topk_weights = block.topk_weights;
  layer.out = block.out;
  layer.workspace = block.workspace;
  layer.workspace_bytes = block.workspace_bytes;
  return layer;
}

// Routes, or takes the routing given; `workspace` points to what the permutation and the combine are to read.
AnabranchStatus route(const AnabranchMoeLayerParams& params, Workspace& workspace, cudaStream_t stream) {
  const AnabranchMoeShape& shape = params.shape;
  const bool extended = shape.num_shared > 0;
  int32_t* ids = params.topk_ids != nullptr ? params.topk_ids : workspace.routed_ids;
  float* weights = params.topk_weights != nullptr ? params.topk_weights : workspace.routed_weights;
  if (params.logits != nullptr) {
    AnabranchRouterParams router = {};
    router.routing = shape.routing;
    router.num_tokens = params.num_tokens;
    router.logits = params.logits;
    router.selection_bias = params.selection_bias;
    router.topk_ids = ids;
    router.topk_weights = weights;
    router.expert_counts = workspace.counts;
    ANABRANCH_TRY(anabranch_router(&router, stream));
  }
  if (!extended) {
    workspace.ids = ids;
    workspace.weights = weights;
    return ANABRANCH_STATUS_OK;
  }
  ExtendArgs args = {};
  args.routed_ids = ids;
  args.routed_weights = weights;
  args.shared_gate = params.shared_gate;
  args.ids = workspace.ids;
  args.weights = workspace.weights;
  args.topk = shape.routing.topk;
  args.shared = shape.num_shared;
  args.num_experts = shape.routing.num_experts;
  args.num_pairs = static_cast<uint32_t>(params.num_tokens) * (args.topk + args.shared);
  cudaLaunchConfig_t config = {};
  config.gridDim = (args.num_pairs - 1) / kExtendThreads + 1;
  config.blockDim = kExtendThreads;
  config.stream = stream;
  return checked(cudaLaunchKernelEx(&config, extend_topk, args));
}

AnabranchStatus permute(const Sizes& sizes, const Workspace& workspace, cudaStream_t stream) {
  AnabranchPermuteParams permute = {};
  permute.num_tokens = sizes.tokens;
  permute.topk = static_cast<uint32_t>(sizes.topk);
  permute.num_experts = static_cast<uint32_t>(sizes.experts);
  permute.topk_ids = workspace.ids;
  permute.expert_offsets = workspace.offsets;
  permute.slots = workspace.slots;
  permute.inverse = workspace.inverse;
  permute.workspace = workspace.permute_bytes > 0 ? workspace.permute : nullptr;
  permute.workspace_bytes = workspace.permute_bytes;
  return anabranch_permute(&permute, stream);
}

AnabranchStatus combine(const AnabranchMoeLayerParams& params, const Sizes& sizes, const Workspace& workspace,
                        cudaStream_t stream) {
  AnabranchCombineParams combine = {};
  combine.num_tokens = sizes.tokens;
  combine.num_rows = sizes.pairs();
  combine.topk = static_cast<uint32_t>(sizes.topk);
  combine.hidden_size = params.shape.hidden_size;
  combine.y = workspace.y;
  combine.inverse = workspace.inverse;
  combine.topk_weights = workspace.weights;
  combine.out = params.out;
  combine.out_dtype = ANABRANCH_DTYPE_BF16;
  return anabranch_combine(&combine, stream);
}

// The expert products of 8.0 and newer.
AnabranchStatus experts_sm80(const AnabranchMoeLayerParams& params, const Sizes& sizes, const Workspace& workspace,
                             cudaStream_t stream) {
  AnabranchGroupedGemmParams gemm = {};
  gemm.num_rows = sizes.pairs();
  gemm.num_tokens = sizes.tokens;
  gemm.num_experts = static_cast<uint32_t>(sizes.experts);
  gemm.topk = static_cast<uint32_t>(sizes.topk);
  gemm.in_features = params.shape.hidden_size;
  gemm.out_features = params.shape.intermediate_size;
  gemm.epilogue = ANABRANCH_EPILOGUE_SWIGLU;
  gemm.y_dtype = ANABRANCH_DTYPE_BF16;
  gemm.x = params.x;
  gemm.weights = params.gate_up;
  gemm.expert_offsets = workspace.offsets;
  gemm.row_slots = workspace.slots;
  gemm.y = workspace.h;
  ANABRANCH_TRY(anabranch_grouped_gemm(&gemm, stream));

  gemm.num_tokens = sizes.pairs();
  gemm.topk = 0;
  gemm.in_features = params.shape.intermediate_size;
  gemm.out_features = params.shape.hidden_size;
  gemm.epilogue = ANABRANCH_EPILOGUE_LINEAR;
  gemm.x = workspace.h;
  gemm.weights = params.down;
  gemm.row_slots = nullptr;
  gemm.y = workspace.y;
  return anabranch_grouped_gemm(&gemm, stream);
}

// Those of 9.0, and with few tokens the combine as well.
AnabranchStatus experts_sm90(const AnabranchMoeLayerParams& params, const Sizes& sizes, const Plan& plan,
                             const Workspace& workspace, cudaStream_t stream) {
  experts::Args args = {};
  args.x = static_cast<const uint16_t*>(params.x);
  args.pairs.ids = workspace.ids;
  args.pairs.offsets = workspace.offsets;
  args.pairs.slots = workspace.slots;
  args.pairs.inverse = workspace.inverse;
  args.pairs.num_pairs = static_cast<uint32_t>(sizes.pairs());
  args.pairs.num_experts = static_cast<uint32_t>(sizes.experts);
  args.weights = workspace.weights;
  args.h = workspace.h;
  args.y = workspace.y;
  args.out = plan.experts.alone ? static_cast<uint16_t*>(params.out) : nullptr;
  args.next_item = workspace.progress;
  args.gated = workspace.progress + kCounterWords;
  args.summed = args.gated + plan.token_tiles;
  args.num_tokens = static_cast<uint32_t>(sizes.tokens);
  args.num_rows = static_cast<uint32_t>(sizes.pairs());
  args.num_experts = static_cast<uint32_t>(sizes.experts);
  args.topk = static_cast<uint32_t>(sizes.topk);
  args.hidden = params.shape.hidden_size;
  args.intermediate = params.shape.intermediate_size;
  return experts::launch_sm90(plan.experts, args, params.gate_up, params.down, stream);
}

AnabranchStatus norm(const AnabranchMoeBlockParams& block, cudaStream_t stream) {
  AnabranchRmsNormParams norm = {};
  norm.num_tokens = block.num_tokens;
  norm.num_heads = 1;
  norm.width = block.shape.hidden_size;
  norm.x = block.residual;
  norm.x_stride = block.shape.hidden_size;
  norm.delta = block.delta;
  norm.weight = block.norm_weight;
  norm.weight_dtype = ANABRANCH_DTYPE_F32;
  norm.eps = block.norm_eps;
  norm.out = block.x;
  norm.out_stride = block.shape.hidden_size;
  return anabranch_rms_norm(&norm, stream);
}

AnabranchStatus gate_product(const AnabranchMoeBlockParams& block, cudaStream_t stream) {
  AnabranchRouterLogitsParams product = {};
  product.num_tokens = block.num_tokens;
  product.num_experts = block.shape.routing.num_experts;
  product.hidden_size = block.shape.hidden_size;
  product.x = block.x;
  product.gate = block.gate;
  product.logits = block.logits;
  return anabranch_router_logits(&product, stream);
}

// The layer; of a block, with what comes before it.
AnabranchStatus run(const AnabranchMoeLayerParams& params, const Plan& plan, const AnabranchMoeBlockParams* block,
                    cudaStream_t stream) {
  const Sizes sizes = sizes_of(params.shape, params.num_tokens);
  Parts parts(params.workspace);
  Workspace workspace(sizes, plan.permute_bytes, plan.progress_words, parts);
  const bool gates = block != nullptr && plan.gates;
  if (block != nullptr && !gates) {
    ANABRANCH_TRY(norm(*block, stream));
    ANABRANCH_TRY(gate_product(*block, stream));
  }
  if (gates) {
    ANABRANCH_TRY(launch_gate(*block, params, sizes, workspace, plan.progress_words, stream));
  } else if (plan.fronts) {
    ANABRANCH_TRY(launch_front(params, sizes, workspace, plan.progress_words, stream));
  } else {
    if (plan.arch == ANABRANCH_ARCH_SM90) {
      ANABRANCH_TRY(checked(cudaMemsetAsync(workspace.progress, 0, 4 * plan.progress_words, stream)));
    }
    ANABRANCH_TRY(route(params, workspace, stream));
  }
  if (plan.arch == ANABRANCH_ARCH_SM80) {
    ANABRANCH_TRY(permute(sizes, workspace, stream));
    ANABRANCH_TRY(experts_sm80(params, sizes, workspace, stream));
    return combine(params, sizes, workspace, stream);
  }
  if (plan.experts.alone) return experts_sm90(params, sizes, plan, workspace, stream);
  ANABRANCH_TRY(permute(sizes, workspace, stream));
  ANABRANCH_TRY(experts_sm90(params, sizes, plan, workspace, stream));
  return combine(params, sizes, workspace, stream);
}

}  // namespace
}  // namespace anabranch::moe_layer

extern "C" AnabranchStatus anabranch_moe_plan(const AnabranchMoeShape* shape, uint64_t num_tokens,
                                              AnabranchMoePlan* plan) {
  using namespace anabranch;
  if (shape == nullptr || plan == nullptr) return ANABRANCH_STATUS_POINTER;
  moe_layer::Plan chosen = {};
  ANABRANCH_TRY(moe_layer::plan_of(*shape, num_tokens, &chosen));
  *plan = {};
  plan->arch = chosen.arch;
  plan->tile_rows = chosen.experts.rows;
  plan->tile_tokens = chosen.experts.token_tile;
  plan->stages = chosen.experts.stages;
  plan->blocks = chosen.blocks;
  plan->launches = moe_layer::launches_of(*shape, chosen);
  plan->workspace_bytes = chosen.workspace_bytes;
  return ANABRANCH_STATUS_OK;
}

extern "C" AnabranchStatus anabranch_moe_layer(const AnabranchMoeLayerParams* params, AnabranchStream stream) {
  using namespace anabranch;
  if (params == nullptr) return ANABRANCH_STATUS_POINTER;
  moe_layer::Plan plan = {};
  ANABRANCH_TRY(moe_layer::plan_of(params->shape, params->num_tokens, &plan));
  ANABRANCH_TRY(moe_layer::check(*params, plan));
  return params->num_tokens == 0 ? ANABRANCH_STATUS_OK : moe_layer::run(*params, plan, nullptr, stream);
}

extern "C" AnabranchStatus anabranch_moe_block(const AnabranchMoeBlockParams* params, AnabranchStream stream) {
  using namespace anabranch;
  if (params == nullptr) return ANABRANCH_STATUS_POINTER;
  moe_layer::Plan plan = {};
  ANABRANCH_TRY(moe_layer::plan_of(params->shape, params->num_tokens, &plan));
  ANABRANCH_TRY(moe_layer::check(*params));
  const AnabranchMoeLayerParams layer = moe_layer::layer_of(*params);
  ANABRANCH_TRY(moe_layer::check(layer, plan));
  return params->num_tokens == 0 ? ANABRANCH_STATUS_OK : moe_layer::run(layer, plan, params, stream);
}
