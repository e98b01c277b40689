// The few tokens' front of a layer: one block from logits to the permutation.

#include "moe_layer/front.cuh"

#include "moe_layer/launch_front.cuh"
#include "router/host.cuh"

namespace anabranch::moe_layer {
namespace {

template <int kValues>
AnabranchStatus launch(FrontArgs& args, const AnabranchRouterParams& params, cudaStream_t stream) {
  constexpr uint32_t kWarps = router::Tile<kValues>::kWarps;
  const uint32_t pitch = args.router.pitch;
  args.router = router::args_of(params, kValues);
  args.router.pitch = pitch;
  const uint32_t pairs = args.permute.num_pairs;
  args.permute.pairs_a_warp = ((pairs - 1) / (32 * kWarps) + 1) * 32;
  const bool group_scores = args.router.groups.count > 1 && args.router.groups.lanes == 0;
  const uint32_t route_words = router::shared_words<kValues>(group_scores);
  const uint32_t place_words = (kWarps + 2) * args.permute.num_experts;
  cudaLaunchConfig_t config = {};
  config.gridDim = 1;
  config.blockDim = router::Tile<kValues>::kThreads;
  config.dynamicSmemBytes = 4 * (route_words > place_words ? route_words : place_words);
  config.stream = stream;
  return checked(cudaLaunchKernelEx(&config, route_and_place<kValues>, args));
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
  args.router.pitch = static_cast<uint32_t>(sizes.topk);
  if (params.logits == nullptr) {
    args.given_ids = params.topk_ids;
    args.given_weights = params.topk_weights;
  } else if (params.topk_ids != nullptr || params.topk_weights != nullptr) {
    args.routed_ids = params.topk_ids != nullptr ? params.topk_ids : workspace.routed_ids;
    args.routed_weights = params.topk_weights != nullptr ? params.topk_weights : workspace.routed_weights;
  }
  args.permute.ids = workspace.ids;
  args.permute.offsets = workspace.offsets;
  args.permute.slots = workspace.slots;
  args.permute.inverse = workspace.inverse;
  args.permute.num_pairs = static_cast<uint32_t>(sizes.pairs());
  args.permute.num_experts = static_cast<uint32_t>(sizes.experts);
  args.shared_gate = params.shared_gate;
  args.progress = workspace.progress;
  args.progress_words = static_cast<uint32_t>(progress_words);
  args.shared = shape.num_shared;
  // Values a lane: as the router's own launches have it.
  const uint32_t experts = shape.routing.num_experts;
  if (experts <= 32) return launch<1>(args, routed, stream);
  if (experts <= 64) return launch<2>(args, routed, stream);
  if (experts <= 128) return launch<4>(args, routed, stream);
  if (experts <= 256) return launch<8>(args, routed, stream);
  if (experts <= 512) return launch<16>(args, routed, stream);
  return launch<32>(args, routed, stream);
}

}  // namespace anabranch::moe_layer
