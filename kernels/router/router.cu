// router: from logits to expert ids, weights and counts.
//
//   scores = softmax(logits) | sigmoid(logits) | softmax over the chosen
//   select = scores + bias (or logits, where nothing reorders them), minus infinity outside the best groups
//   ids    = top-k of select, ties to the lower id
//   w      = scores[ids], renormalised or not, times the scale; counts[e] = tokens of expert e
//
//   logits [T, E] float32, bias [E] or null, complexity [T] or null -> ids [T, K], weights [T, K], counts [E]
//
// Reference: anabranch::reference::router. Architecture: 8.0 and newer (redux.sync). Alignment: elements; rows that
// start on 16 bytes are read 16 bytes at a time.
//
// A warp takes a token, lane l experts l * V and following with V = 1, 2, 4, ... 32 values a lane; blocks stay and take
// further tokens, so that a block's counts, kept in shared memory, are added to the result once. Every setting is an
// argument; the rules of rules.cuh are compiled in.
//
// Bounds. Bytes: 4 T (E + 2 K), one read of the logits: T = 16,384, E = 256, K = 8: 18.9 MB, 4.4 us at 4.3 TB/s. Issue:
// 31 tokens a scheduler on 132 multiprocessors, by estimate 430 instructions each: 7.6 us at 1.755 GHz; about 100 FLOP
// a logit are no bound. Measured on an H200: 13.1 us for DeepSeek-V3's routing, 9.6 us for Qwen3-30B-A3B's
// (docs/performance.md).

#include "common/launch.cuh"
#include "router/args.cuh"
#include "router/drop_overflow.cuh"
#include "router/host.cuh"
#include "router/route_tokens.cuh"

namespace anabranch::router {
namespace {

AnabranchStatus check(const AnabranchRouterParams& params) {
  ANABRANCH_TRY(check_routing(params.routing));
  // Slots are counted in 31 bits.
  if (params.num_tokens > (uint64_t{1} << 31) / params.routing.topk - 1) return ANABRANCH_STATUS_SETTING;
  const bool tokens = params.num_tokens > 0;
  const bool complexity = params.routing.adaptive == ANABRANCH_ADAPTIVE_COMPLEXITY;
  if (params.expert_counts == nullptr ||
      (tokens && (params.logits == nullptr || params.topk_ids == nullptr || params.topk_weights == nullptr)) ||
      (tokens && complexity && params.complexity == nullptr) || (!complexity && params.complexity != nullptr)) {
    return ANABRANCH_STATUS_POINTER;
  }
  const void* const pointers[] = {params.logits,   params.selection_bias, params.complexity,
                                  params.topk_ids, params.topk_weights,   params.expert_counts};
  for (const void* pointer : pointers) {
    if (!is_aligned(pointer, 4)) return ANABRANCH_STATUS_ALIGNMENT;
  }
  return ANABRANCH_STATUS_OK;
}

template <int kValues, class Rule>
AnabranchStatus launch_as(const Args& args, cudaStream_t stream) {
  using Shape = Tile<kValues>;
  int sms = 0;
  ANABRANCH_TRY(checked(multiprocessors(&sms)));
  const uint32_t most = static_cast<uint32_t>(sms) * Rule::blocks_per_sm(kValues);
  // Up to two tokens a warp, one block is quicker than several that need their counts cleared first.
  const uint32_t wanted = args.num_tokens <= 2 * Shape::kWarps ? 1 : (args.num_tokens - 1) / Shape::kWarps + 1;
  const uint32_t blocks = wanted < most ? wanted : most;
  const bool group_scores = args.groups.count > 1 && args.groups.lanes == 0;
  cudaLaunchConfig_t config = {};
  config.stream = stream;
  cudaLaunchAttribute overlap = {};
  if (blocks > 1) {
    config.gridDim = 1;
    config.blockDim = 256;
    ANABRANCH_TRY(checked(cudaLaunchKernelEx(&config, clear_counts, args.counts, args.num_experts)));
    bool can = false;
    ANABRANCH_TRY(checked(can_overlap(route_tokens<kValues, Rule>, &can)));
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    config.attrs = &overlap;
    config.numAttrs = can ? 1 : 0;
  }
  config.gridDim = blocks;
  config.blockDim = Shape::kThreads;
  config.dynamicSmemBytes = 4 * shared_words<kValues>(group_scores);
  return checked(cudaLaunchKernelEx(&config, route_tokens<kValues, Rule>, args));
}

AnabranchStatus launch(const AnabranchRouterParams& params, cudaStream_t stream) {
  return with_variant(params, [stream](auto variant, const Args& args) {
    using Variant = decltype(variant);
    return launch_as<Variant::kValues, typename Variant::Rule>(args, stream);
  });
}

AnabranchStatus drop(const AnabranchRouterParams& params, cudaStream_t stream) {
  const AnabranchRouting& routing = params.routing;
  const uint32_t slots = static_cast<uint32_t>(params.num_tokens) * routing.topk;
  // An expert cannot have more tokens than there are: such a capacity drops nothing.
  if (routing.expert_capacity == 0 || routing.expert_capacity >= params.num_tokens) return ANABRANCH_STATUS_OK;
  cudaLaunchConfig_t config = {};
  config.gridDim = routing.num_experts;
  config.blockDim = kDropThreads;
  config.stream = stream;
  return checked(cudaLaunchKernelEx(&config, drop_overflow, params.topk_ids, params.topk_weights, params.expert_counts,
                                    slots, routing.topk, static_cast<uint32_t>(routing.expert_capacity)));
}

}  // namespace
}  // namespace anabranch::router

extern "C" AnabranchStatus anabranch_router_workspace(const AnabranchRouting* routing, uint64_t num_tokens,
                                                      uint64_t* bytes) {
  static_cast<void>(num_tokens);
  if (routing == nullptr || bytes == nullptr) return ANABRANCH_STATUS_POINTER;
  ANABRANCH_TRY(anabranch::router::check_routing(*routing));
  *bytes = 0;
  return ANABRANCH_STATUS_OK;
}

extern "C" AnabranchStatus anabranch_router(const AnabranchRouterParams* params, AnabranchStream stream) {
  using namespace anabranch;
  if (params == nullptr) return ANABRANCH_STATUS_POINTER;
  ANABRANCH_TRY(router::check(*params));
  if (params->num_tokens == 0) {
    return checked(cudaMemsetAsync(params->expert_counts, 0, 4 * params->routing.num_experts, stream));
  }
  ANABRANCH_TRY(router::launch(*params, stream));
  return router::drop(*params, stream);
}
