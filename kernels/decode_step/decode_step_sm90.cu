// decode_step: one token through all layers of a model, in one launch.
//
//   x += attention(norm(x));   x += feed_forward(norm(x));   for every layer
//
//   x [d] bf16 in place; a layer's weights bf16, and its paged cache of one sequence, to which the token's key and
//   value are added. The residual stream is float32 between layers, sums are float32, what is multiplied is bf16.
//
// Reference: anabranch::reference of each part. Architecture: 9.0. Alignment: 16 bytes; widths multiples of 8.
//
// A token's products are of matrices and vectors, and only the weights' way through memory counts. A launch for each
// would let memory rest at every end and beginning; here a block stays on its multiprocessor through all layers. Each
// warp knows its pieces of all weights in order (stream.cuh) and has kDepth steps of them on their way: while blocks
// wait for one another's results, the next product's weights come. Only routed experts' must wait, for the routing;
// shared experts' come before them.
//
// Blocks hand results over through words that carry the layer's number beside 32 bits of data (words.cuh): one trip
// through the second-level cache. A layer has six such: projections, attended heads, their output product, the gate's
// logits, h, and the experts' sum; attention has one more where several blocks share a head, latent attention two for
// its products by head. What is small, every block does for itself: residual addition, norm, choice of experts. So all
// blocks hold the residual stream, to the same bits.
//
// The launch is cooperative: blocks wait for one another, so all must run.
//
// Bounds. Bytes of the active weights over bandwidth; Qwen3-30B-A3B 6.1 GB, 1.3 ms at 4.6 TB/s without the LM head's.

#include <algorithm>

#include "common/launch.cuh"
#include "decode_step/decode_step.cuh"
#include "router/host.cuh"

namespace anabranch::decode_step {
namespace {

constexpr float kLog2E = 1.4426950408889634f;

bool is_width(uint32_t width) {
  return width >= 8 && width % 8 == 0 && width <= 1u << 20;
}

bool is_latent(const AnabranchDecodeShape& shape) {
  return shape.q_dim != 0;
}

bool routes(const AnabranchDecodeShape& shape) {
  return shape.routing.num_experts != 0;
}

// Whether there is a kernel for such sizes, on some device.
bool is_supported(const AnabranchDecodeShape& shape) {
  const bool latent = is_latent(shape);
  const uint32_t heads = shape.num_heads;
  const uint32_t kv_heads = shape.num_kv_heads;
  if (shape.num_layers == 0 || shape.num_layers > kMaxLayers || !is_width(shape.hidden_size) ||
      shape.hidden_size > kMaxHidden || heads == 0 || kv_heads == 0 || heads % kv_heads != 0 ||
      heads / kv_heads > kRows || heads > 1024) {
    return false;
  }
  if (shape.key_dim % 16 != 0 || !is_width(shape.key_dim) || !is_width(shape.value_dim) ||
      shape.value_dim > shape.key_dim || shape.key_dim > (latent ? 576 : 128) || shape.value_dim > 512) {
    return false;
  }
  if (shape.rotary_dim % 2 != 0 || shape.rotary_dim / 2 > kMaxRotated ||
      shape.rotary_first + shape.rotary_dim > shape.key_dim) {
    return false;
  }
  if (latent && (kv_heads != 1 || !is_width(shape.q_dim) || !is_width(shape.o_dim) ||
                 shape.rotary_first != shape.value_dim || shape.rotary_first + shape.rotary_dim != shape.key_dim)) {
    return false;
  }
  if (!latent && shape.value_dim != shape.key_dim) return false;
  if (routes(shape)) {
    const AnabranchRouting& routing = shape.routing;
    if (routing.num_experts % 2 != 0 || routing.num_experts > kMaxExperts ||
        routing.topk + shape.num_shared > kMaxSlots || routing.adaptive == ANABRANCH_ADAPTIVE_COMPLEXITY ||
        !is_width(shape.intermediate_size)) {
      return false;
    }
    // What Divisor takes.
    const uint64_t width = shape.intermediate_size;
    if ((routing.topk + shape.num_shared) * width * width >= uint64_t{1} << 31) return false;
  } else if (shape.dense_size == 0) {
    return false;
  }
  return shape.dense_size == 0 || (is_width(shape.dense_size) && shape.dense_size < 1u << 15);
}

// All but what a call brings: pointers and the cache's sizes.
Args args_of(const AnabranchDecodeShape& shape) {
  Args args = {};
  args.num_layers = shape.num_layers;
  args.hidden = shape.hidden_size;
  args.norm_eps = shape.norm_eps;
  args.q_dim = shape.q_dim;
  args.o_dim = is_latent(shape) ? shape.o_dim : shape.value_dim;
  args.dense = shape.dense_size;
  args.heads.attention_factor = shape.attention_factor;
  args.heads.eps = shape.head_norm_eps;
  args.heads.first = shape.rotary_first;
  args.heads.pairs = shape.rotary_dim / 2;
  args.heads.interleaved = shape.layout == ANABRANCH_ROPE_LAYOUT_INTERLEAVED;
  attention::Args& attention = args.attention;
  attention.num_tokens = 1;
  attention.num_sequences = 1;
  attention.num_heads = shape.num_heads;
  attention.num_kv_heads = shape.num_kv_heads;
  attention.group = shape.num_heads / shape.num_kv_heads;
  attention.key_dim = shape.key_dim;
  attention.value_dim = shape.value_dim;
  attention.key_stride = shape.num_kv_heads * shape.key_dim;
  attention.value_stride = shape.num_kv_heads * shape.value_dim;
  attention.scale_log2 = shape.scale * kLog2E;
  if (routes(shape)) {
    AnabranchRouterParams params = {};
    params.routing = shape.routing;
    params.num_tokens = 1;
    const uint32_t experts = shape.routing.num_experts;
    args.router = router::args_of(params, experts <= 64 ? 2 : experts <= 128 ? 4 : 8);
    args.intermediate = shape.intermediate_size;
    args.shared = shape.num_shared;
  }
  return args;
}

// Divides the workspace; without one, tells its size.
uint64_t divide(const AnabranchDecodeShape& shape, uint32_t blocks, void* workspace, Args* args) {
  const uint64_t heads = shape.num_heads;
  const uint64_t slots = routes(shape) ? shape.routing.topk + shape.num_shared : 0;
  const uint64_t h =
      std::max<uint64_t>(slots * chunks_of(shape.intermediate_size), chunks_of(shape.dense_size)) * kChunk / 2;
  uint64_t at = 32;  // words; the epoch is in the first
  const auto take = [&](uint64_t words) {
    Word* const place = static_cast<Word*>(workspace) + at;
    at += (words + 15) / 16 * 16;
    return place;
  };
  Words& words = args->words;
  args->epoch = static_cast<uint32_t*>(workspace);
  const uint64_t key_dim = shape.key_dim;
  words.projected = take(is_latent(shape) ? heads * shape.q_dim + key_dim : (heads + 2 * shape.num_kv_heads) * key_dim);
  words.absorbed = take(is_latent(shape) ? heads * key_dim / 2 : 0);
  words.parts = take(uint64_t{blocks} * kRows * shape.value_dim);
  words.statistics = take(uint64_t{blocks} * kRows * 2);
  words.attended = take(heads * shape.value_dim / 2);
  words.expanded = take(is_latent(shape) ? heads * shape.o_dim / 2 : 0);
  words.attention = take(shape.hidden_size);
  words.logits = take(shape.routing.num_experts);
  words.h = take(h);
  words.experts = take(shape.hidden_size);
  return at * sizeof(Word);
}

// Cuts products, and makes room for the sums of one's rows, of whichever block and layer has most.
template <bool kLatent>
void cut(Args& args, uint32_t blocks) {
  for (const bool routes : {false, true}) {
    if (routes ? args.router.num_experts == 0 : args.dense == 0) continue;
    for (uint32_t product = 0; product < kProducts; ++product) {
      args.cuts[routes][product] = cut_of<kLatent>(args, routes, static_cast<Product>(product), blocks);
      const Part part(args, routes, static_cast<Product>(product), 0);
      args.sums_bytes = std::max(args.sums_bytes, (part.tiles * 16 * 4) << part.group_bits);
    }
  }
  args.of_intermediate = Divisor::of(args.intermediate);
  args.of_intermediate_chunks = Divisor::of(chunks_of(args.intermediate));
  args.of_dense = Divisor::of(args.dense);
  args.of_dense_chunks = Divisor::of(chunks_of(args.dense));
}

struct Plan {
  bool takes;
  uint32_t blocks;
  uint32_t shared_bytes;
  uint64_t workspace_bytes;
};

template <bool kLatent>
AnabranchStatus plan_for(const AnabranchDecodeShape& shape, Args& args, Plan* plan) {
  int device = 0;
  int major = 0;
  int multiprocessors = 0;
  int most = 0;
  ANABRANCH_TRY(checked(cudaGetDevice(&device)));
  ANABRANCH_TRY(checked(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device)));
  ANABRANCH_TRY(checked(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device)));
  ANABRANCH_TRY(checked(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device)));
  // Every block has some of the output products' columns: whoever waits for all of them has waited for all blocks.
  plan->blocks = std::min({static_cast<uint32_t>(multiprocessors), shape.hidden_size, kMostBlocks});
  cut<kLatent>(args, plan->blocks);
  plan->shared_bytes = Places::of<kLatent>(args).bytes;
  plan->workspace_bytes = divide(shape, plan->blocks, nullptr, &args);
  plan->takes = major == 9 && plan->shared_bytes + sizeof(Shared) <= static_cast<uint32_t>(most) &&
                shape.num_kv_heads <= plan->blocks && shape.routing.num_experts <= kGateTurns * plan->blocks;
  return ANABRANCH_STATUS_OK;
}

AnabranchStatus plan_of(const AnabranchDecodeShape& shape, Args& args, Plan* plan) {
  *plan = {};
  if (!is_supported(shape)) return ANABRANCH_STATUS_OK;
  if (routes(shape)) ANABRANCH_TRY(router::check_routing(shape.routing));
  args = args_of(shape);
  return is_latent(shape) ? plan_for<true>(shape, args, plan) : plan_for<false>(shape, args, plan);
}

AnabranchStatus check_layer(const AnabranchDecodeShape& shape, const AnabranchDecodeLayer& layer) {
  const bool latent = is_latent(shape);
  if (layer.attention_norm == nullptr || layer.q == nullptr || layer.output == nullptr || layer.k_cache == nullptr ||
      layer.feed_forward_norm == nullptr || layer.gate_up == nullptr || layer.down == nullptr ||
      (latent ? layer.kv == nullptr || layer.absorb == nullptr || layer.expand == nullptr : layer.v_cache == nullptr)) {
    return ANABRANCH_STATUS_POINTER;
  }
  if (layer.gate != nullptr ? !routes(shape) : shape.dense_size == 0) return ANABRANCH_STATUS_SETTING;
  for (const void* pointer :
       {layer.q, layer.kv, layer.absorb, layer.expand, layer.output, layer.gate, layer.gate_up, layer.down,
        static_cast<const void*>(layer.k_cache), static_cast<const void*>(layer.v_cache),
        static_cast<const void*>(layer.selection_bias)}) {
    if (!is_aligned(pointer, 16)) return ANABRANCH_STATUS_ALIGNMENT;
  }
  for (const float* pointer : {layer.attention_norm, layer.q_norm, layer.k_norm, layer.feed_forward_norm}) {
    if (!is_aligned(pointer, 16)) return ANABRANCH_STATUS_ALIGNMENT;
  }
  return ANABRANCH_STATUS_OK;
}

bool is_biased(const AnabranchDecodeStepParams& params) {
  return std::any_of(params.layers, params.layers + params.shape.num_layers,
                     [](const AnabranchDecodeLayer& layer) { return layer.selection_bias != nullptr; });
}

AnabranchStatus check(const AnabranchDecodeStepParams& params, const Plan& plan) {
  const AnabranchDecodeShape& shape = params.shape;
  if (!plan.takes) return ANABRANCH_STATUS_UNSUPPORTED;
  if (params.layers == nullptr || (params.frequencies == nullptr && shape.rotary_dim > 0) ||
      params.position == nullptr || params.cache_row == nullptr || params.kv_length == nullptr ||
      params.table_start == nullptr || params.block_table == nullptr || params.x == nullptr ||
      params.workspace == nullptr) {
    return ANABRANCH_STATUS_POINTER;
  }
  if (!is_aligned(params.x, 16) || !is_aligned(params.workspace, 256)) return ANABRANCH_STATUS_ALIGNMENT;
  if (params.workspace_bytes < plan.workspace_bytes) return ANABRANCH_STATUS_WORKSPACE;
  const uint64_t most = uint64_t{1} << 31;
  const bool blocks = params.block_size >= attention::kLeastBlock && router::is_power_of_two(params.block_size) &&
                      params.cache_rows >= params.block_size && params.cache_rows % params.block_size == 0;
  if (!blocks || params.cache_rows >= most || params.table_len == 0 || params.table_len >= most) {
    return ANABRANCH_STATUS_SETTING;
  }
  const bool biased = is_biased(params);
  for (uint32_t layer = 0; layer < shape.num_layers; ++layer) {
    ANABRANCH_TRY(check_layer(shape, params.layers[layer]));
    // The router's rule is the same in all layers.
    const bool routed = params.layers[layer].gate != nullptr;
    if (routed && biased != (params.layers[layer].selection_bias != nullptr)) return ANABRANCH_STATUS_POINTER;
  }
  return ANABRANCH_STATUS_OK;
}

void bring(const AnabranchDecodeStepParams& params, const Plan& plan, Args& args) {
  std::copy(params.layers, params.layers + params.shape.num_layers, args.layers);
  if (is_biased(params)) {
    // What is ranked by depends on whether there is a bias.
    args.router.has_bias = true;
    args.router.rank_by_logits = args.router.score == ANABRANCH_SCORE_TOPK_SOFTMAX;
  }
  args.ranks_plainly =
      args.router.rank_by_logits && args.router.groups.count <= 1 && args.router.adaptive == ANABRANCH_ADAPTIVE_FIXED;
  args.x = static_cast<uint16_t*>(params.x);
  args.position = params.position;
  args.cache_row = params.cache_row;
  args.heads.frequencies = params.frequencies;
  attention::Args& attention = args.attention;
  attention.kv_lengths = params.kv_length;
  attention.table_starts = params.table_start;
  attention.block_table = params.block_table;
  attention.table_len = static_cast<uint32_t>(params.table_len);
  while (1u << attention.block_shift < params.block_size) ++attention.block_shift;
  attention.num_blocks = static_cast<uint32_t>(params.cache_rows / params.block_size);
  divide(params.shape, plan.blocks, params.workspace, &args);
}

template <bool kLatent>
AnabranchStatus launch(const Args& args, const Plan& plan, cudaStream_t stream) {
  const auto kernel = decode_step<kLatent>;
  ANABRANCH_TRY(checked(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(plan.shared_bytes))));
  cudaLaunchAttribute cooperative = {};
  cooperative.id = cudaLaunchAttributeCooperative;
  cooperative.val.cooperative = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = plan.blocks;
  config.blockDim = kThreads;
  config.dynamicSmemBytes = plan.shared_bytes;
  config.stream = stream;
  config.attrs = &cooperative;
  config.numAttrs = 1;
  return checked(cudaLaunchKernelEx(&config, kernel, args));
}

}  // namespace
}  // namespace anabranch::decode_step

extern "C" AnabranchStatus anabranch_decode_step_takes(const AnabranchDecodeShape* shape, uint32_t* takes,
                                                       uint64_t* bytes) {
  using namespace anabranch;
  if (shape == nullptr || takes == nullptr || bytes == nullptr) return ANABRANCH_STATUS_POINTER;
  decode_step::Args args = {};
  decode_step::Plan plan = {};
  ANABRANCH_TRY(decode_step::plan_of(*shape, args, &plan));
  *takes = plan.takes ? 1 : 0;
  *bytes = plan.takes ? plan.workspace_bytes : 0;
  return ANABRANCH_STATUS_OK;
}

extern "C" AnabranchStatus anabranch_decode_step(const AnabranchDecodeStepParams* params, AnabranchStream stream) {
  using namespace anabranch;
  if (params == nullptr) return ANABRANCH_STATUS_POINTER;
  decode_step::Args args = {};
  decode_step::Plan plan = {};
  ANABRANCH_TRY(decode_step::plan_of(params->shape, args, &plan));
  ANABRANCH_TRY(decode_step::check(*params, plan));
  decode_step::bring(*params, plan, args);
  return params->shape.q_dim != 0 ? decode_step::launch<true>(args, plan, stream)
                                  : decode_step::launch<false>(args, plan, stream);
}
