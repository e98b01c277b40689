// The host's side of a rule: whether it contradicts itself, and what the kernels are given for it.
#pragma once

#include <cmath>

#include "common/launch.cuh"
#include "router/rules.cuh"

namespace anabranch::router {

constexpr uint32_t kMaxExperts = 1024;
constexpr uint32_t kMaxTopk = 32;

inline bool in_range(uint32_t value, uint32_t low, uint32_t high) {
  return value >= low && value <= high;
}

inline AnabranchStatus check_routing(const AnabranchRouting& routing) {
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

inline bool is_power_of_two(uint32_t value) {
  return value != 0 && (value & (value - 1)) == 0;
}

inline Groups groups_of(const AnabranchRouting& routing, uint32_t values) {
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

inline Args args_of(const AnabranchRouterParams& params, uint32_t values) {
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
  args.pitch = routing.topk;
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

// A kernel's template arguments, as a value.
template <int kValues_, class Rule_>
struct Variant {
  static constexpr int kValues = kValues_;
  using Rule = Rule_;
};

template <int kValues, class Launch>
AnabranchStatus with_rule(const AnabranchRouterParams& params, const Launch& launch) {
  const Args args = args_of(params, kValues);
  if constexpr (kValues == 4) {
    if (SoftmaxRule::fits<kValues>(args)) return launch(Variant<kValues, SoftmaxRule>(), args);
  }
  if constexpr (kValues == 8) {
    if (GroupedSigmoidRule::fits<kValues>(args)) return launch(Variant<kValues, GroupedSigmoidRule>(), args);
  }
  return launch(Variant<kValues, AnyRule>(), args);
}

// Calls `launch(Variant, Args)` with what suits the routing.
template <class Launch>
AnabranchStatus with_variant(const AnabranchRouterParams& params, const Launch& launch) {
  const uint32_t experts = params.routing.num_experts;
  if (experts <= 32) return with_rule<1>(params, launch);    // Mixtral, Qwen1.5-MoE's lesser kin
  if (experts <= 64) return with_rule<2>(params, launch);    // DeepSeek-V2-Lite, OLMoE
  if (experts <= 128) return with_rule<4>(params, launch);   // Qwen3-MoE, GLM-4.5-Air
  if (experts <= 256) return with_rule<8>(params, launch);   // DeepSeek-V3, GLM-4.5
  if (experts <= 512) return with_rule<16>(params, launch);  // Kimi K2, Qwen3-Next
  return with_rule<32>(params, launch);
}

}  // namespace anabranch::router
