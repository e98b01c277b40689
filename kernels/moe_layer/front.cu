// The layer's first launch on Hopper: from logits, or a routing given, to pairs.

#include "moe_layer/front.cuh"

#include "moe_layer/launch_front.cuh"
#include "router/host.cuh"

namespace anabranch::moe_layer {
namespace {

template <class Variant>
AnabranchStatus launch(FrontArgs& args, uint32_t blocks_wanted, cudaStream_t stream) {
  constexpr int kValues = Variant::kValues;
  using Rule = typename Variant::Rule;
  int multiprocessors = 0;
  ANABRANCH_TRY(checked(anabranch::multiprocessors(&multiprocessors)));
  const uint32_t most = static_cast<uint32_t>(multiprocessors) * Rule::blocks_per_sm(kValues);
  const bool group_scores = args.router.groups.count > 1 && args.router.groups.lanes == 0;
  cudaLaunchConfig_t config = {};
  config.gridDim = blocks_wanted < most ? blocks_wanted : most;
  config.blockDim = router::Tile<kValues>::kThreads;
  config.dynamicSmemBytes = 4 * router::shared_words<kValues>(group_scores);
  config.stream = stream;
  return launch_overlapping(route_pairs<kValues, Rule>, config, args);
}

}  // namespace

AnabranchStatus launch_front(const AnabranchMoeLayerParams& params, const Sizes& sizes, const Workspace& workspace,
                             uint64_t progress_words, cudaStream_t stream) {
  const AnabranchMoeShape& shape = params.shape;
  AnabranchRouterParams routed = {};
  routed.routing = shape.routing;
  routed.num_tokens = params.num_tokens;
  routed.logits = params.logits;
  routed.selection_bias = params.selection_bias;
  routed.topk_ids = workspace.ids;
  routed.topk_weights = workspace.weights;
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
  args.shared = shape.num_shared;
  return router::with_variant(routed, [&](auto variant, const router::Args& router) {
    args.router = router;
    args.router.pitch = static_cast<uint32_t>(sizes.topk);
    constexpr uint32_t kWarps = router::Tile<decltype(variant)::kValues>::kWarps;
    return launch<decltype(variant)>(args, (router.num_tokens - 1) / kWarps + 1, stream);
  });
}

}  // namespace anabranch::moe_layer
