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

#include <cmath>

#include "common/launch.cuh"
#include "router/args.cuh"
#include "router/drop_overflow.cuh"
#include "router/route_tokens.cuh"

namespace anabranch::router {
namespace {

constexpr uint32_t kMaxExperts = 1024;
constexpr uint32_t kMaxTopk = 32;

bool in_range(uint32_t value, uint32_t low, uint32_t high) {
  return value >= low && value <= high;
}

AnabranchStatus check_routing(const AnabranchRouting& routing) {
  const uint32_t experts = routing.num_experts;
  if (!in_range(experts, 1, kMaxExperts) || !in_range(routing.topk, 1, kMaxTopk) || routing.topk > experts) {
    return ANABRANCH_STATUS_SETTING;
  }
  if (!in_range(routing.score, ANABRANCH_SCORE_SOFTMAX, ANABRANCH_SCORE_TOPK_SOFTMAX) ||
      !in_range(routing.renormalize, ANABRANCH_RENORMALIZE_NONE, ANABRANCH_RENORMALIZE_SUM) ||
      !in_range(routing.group_score, ANABRANCH_GROUP_SCORE_MAX, ANABRANCH_GROUP_SCORE_TOP2_SUM) ||
      !in_range(routing.adaptive, ANABRANCH_ADAPTIVE_FIXED, ANABRANCH_ADAPTIVE_ENTROPY)) {
    return ANABRANCH_STATUS_UNSUPPORTED;
  }
  if (routing.n_group == 0) return ANABRANCH_STATUS_OK;
  const uint32_t size = experts / routing.n_group;
  const bool divides = size > 0 && size * routing.n_group == experts;
  const bool reaches = in_range(routing.topk_group, 1, routing.n_group) && routing.topk <= routing.topk_group * size;
  const bool enough = routing.group_score == ANABRANCH_GROUP_SCORE_MAX || size >= 2;
  return divides && reaches && enough ? ANABRANCH_STATUS_OK : ANABRANCH_STATUS_SETTING;
}

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

bool is_power_of_two(uint32_t value) {
  return value != 0 && (value & (value - 1)) == 0;
}

Groups groups_of(const AnabranchRouting& routing, uint32_t values) {
  if (routing.n_group == 0) return {};
  const uint32_t size = routing.num_experts / routing.n_group;
  const uint32_t lanes = size % values == 0 && is_power_of_two(size / values) ? size / values : 0;
  return {routing.n_group,
          routing.topk_group,
          size,
          lanes,
          ((1u << 21) + size - 1) / size,
          routing.group_score == ANABRANCH_GROUP_SCORE_TOP2_SUM};
}

Args args_of(const AnabranchRouterParams& params, uint32_t values) {
  const AnabranchRouting& routing = params.routing;
  const uint32_t width = values < 4 ? values : 4;  // floats of one load
  Args args = {};
  args.logits = params.logits;
  args.bias = params.selection_bias;
  args.complexity = params.complexity;
  args.ids = params.topk_ids;
  args.weights = params.topk_weights;
  args.counts = params.expert_counts;
  args.num_tokens = static_cast<uint32_t>(params.num_tokens);
  args.num_experts = routing.num_experts;
  args.topk = routing.topk;
  args.score = routing.score;
  args.has_bias = params.selection_bias != nullptr;
  args.adaptive = routing.adaptive;
  args.renormalize = routing.renormalize == ANABRANCH_RENORMALIZE_SUM;
  args.scale = routing.scale;
  args.log_experts = std::log(static_cast<double>(routing.num_experts));
  args.groups = groups_of(routing, values);
  args.rank_by_logits =
      routing.score == ANABRANCH_SCORE_TOPK_SOFTMAX || (params.selection_bias == nullptr && !args.groups.top2_sum);
  args.wide_loads = routing.num_experts % width == 0 && is_aligned(params.logits, 4 * width) &&
                    is_aligned(params.selection_bias, 4 * width);
  return args;
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

template <int kValues>
AnabranchStatus launch(const AnabranchRouterParams& params, cudaStream_t stream) {
  const Args args = args_of(params, kValues);
  if constexpr (kValues == 4) {
    if (SoftmaxRule::fits<kValues>(args)) return launch_as<kValues, SoftmaxRule>(args, stream);
  }
  if constexpr (kValues == 8) {
    if (GroupedSigmoidRule::fits<kValues>(args)) return launch_as<kValues, GroupedSigmoidRule>(args, stream);
  }
  return launch_as<kValues, AnyRule>(args, stream);
}

AnabranchStatus launch_for(const AnabranchRouterParams& params, cudaStream_t stream) {
  const uint32_t experts = params.routing.num_experts;
  if (experts <= 32) return launch<1>(params, stream);    // Mixtral, Qwen1.5-MoE's lesser kin
  if (experts <= 64) return launch<2>(params, stream);    // DeepSeek-V2-Lite, OLMoE
  if (experts <= 128) return launch<4>(params, stream);   // Qwen3-MoE, GLM-4.5-Air
  if (experts <= 256) return launch<8>(params, stream);   // DeepSeek-V3, GLM-4.5
  if (experts <= 512) return launch<16>(params, stream);  // Kimi K2, Qwen3-Next
  return launch<32>(params, stream);
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
  ANABRANCH_TRY(router::launch_for(*params, stream));
  return router::drop(*params, stream);
}
