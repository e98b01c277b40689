// What the launches that route are given, worked out on the host.
#pragma once

#include "moe_layer/front.cuh"
#include "moe_layer/workspace.cuh"
#include "router/host.cuh"

namespace anabranch::moe_layer {

// The router's part.
inline AnabranchRouterParams routed(const AnabranchMoeLayerParams& params, const Workspace& workspace) {
  AnabranchRouterParams routed = {};
  routed.routing = params.shape.routing;
  routed.num_tokens = params.num_tokens;
  routed.logits = params.logits;
  routed.selection_bias = params.selection_bias;
  routed.topk_ids = workspace.ids;
  routed.topk_weights = workspace.weights;
  return routed;
}

// All but the router's part.
inline FrontArgs front_args(const AnabranchMoeLayerParams& params, const Workspace& workspace,
                            uint64_t progress_words) {
  FrontArgs args = {};
  if (params.logits == nullptr) {
    args.given_ids = params.topk_ids;
    args.given_weights = params.topk_weights;
  } else if (params.topk_ids != nullptr || params.topk_weights != nullptr) {
    args.routed_ids = params.topk_ids != nullptr ? params.topk_ids : workspace.routed_ids;
    args.routed_weights = params.topk_weights != nullptr ? params.topk_weights : workspace.routed_weights;
  }
  args.shared_gate = params.shared_gate;
  args.progress = workspace.progress;
  args.progress_words = static_cast<uint32_t>(progress_words);
  args.shared = params.shape.num_shared;
  return args;
}

}  // namespace anabranch::moe_layer
