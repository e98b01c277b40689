// The layer's first launch on Hopper: from logits, or a routing given, to pairs.

#include "moe_layer/front.cuh"

#include "moe_layer/front_args.cuh"
#include "moe_layer/launch_front.cuh"

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
  FrontArgs args = front_args(params, workspace, progress_words);
  return router::with_variant(routed(params, workspace), [&](auto variant, const router::Args& router) {
    args.router = router;
    args.router.pitch = static_cast<uint32_t>(sizes.topk);
    constexpr uint32_t kWarps = router::Tile<decltype(variant)::kValues>::kWarps;
    return launch<decltype(variant)>(args, (router.num_tokens - 1) / kWarps + 1, stream);
  });
}

}  // namespace anabranch::moe_layer
