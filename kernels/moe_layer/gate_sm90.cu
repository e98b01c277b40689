// The first launch of a block of few tokens on Hopper: from the residual stream to pairs.

#include "moe_layer/front_args.cuh"
#include "moe_layer/gate_tokens.cuh"
#include "moe_layer/launch_gate.cuh"

namespace anabranch::moe_layer {
namespace {

// Experts that a warp's lanes hold eight of at most: the router's kernels for more have fewer threads a block.
constexpr uint32_t kMostExperts = 256;

uint32_t experts_a_block(uint32_t experts) {
  const uint32_t tiles = (experts - 1) / router::kLogitExperts + 1;
  return ((tiles - 1) / kGateBlocks + 1) * router::kLogitExperts;
}

template <class Variant>
AnabranchStatus launch(GateArgs& args, cudaStream_t stream) {
  const router::Args& router = args.front.router;
  const bool group_scores = router.groups.count > 1 && router.groups.lanes == 0;
  const GatePlaces places(router.num_tokens, args.vectors, router.num_experts,
                          router::shared_words<Variant::kValues>(group_scores));
  const auto kernel = gate_tokens<Variant::kValues, typename Variant::Rule>;
  ANABRANCH_TRY(checked(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(places.bytes))));
  cudaLaunchAttribute cluster = {};
  cudaLaunchConfig_t config = {};
  config.gridDim = (router.num_experts - 1) / args.experts_a_block + 1;
  config.blockDim = kGateThreads;
  config.dynamicSmemBytes = places.bytes;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = config.gridDim.x;
  cluster.val.clusterDim.y = 1;
  cluster.val.clusterDim.z = 1;
  return launch_overlapping(kernel, config, args);
}

}  // namespace

bool takes_gate(const AnabranchMoeShape& shape, uint64_t num_tokens, int shared_bytes) {
  if (num_tokens > kGateTokens || shape.routing.num_experts > kMostExperts || shape.hidden_size > 1u << 16)
    return false;
  const GatePlaces most(static_cast<uint32_t>(num_tokens), shape.hidden_size / kVector, shape.routing.num_experts,
                        router::shared_words<8>(true));
  // Beside them, the warps' sums of squares.
  return most.bytes + 4 * kGateWarps <= static_cast<uint32_t>(shared_bytes);
}

AnabranchStatus launch_gate(const AnabranchMoeBlockParams& block, const AnabranchMoeLayerParams& layer,
                            const Sizes& sizes, const Workspace& workspace, uint64_t progress_words,
                            cudaStream_t stream) {
  GateArgs args = {};
  args.front = front_args(layer, workspace, progress_words);
  args.residual = static_cast<uint4*>(block.residual);
  args.norm.x = args.residual;
  args.norm.delta = static_cast<const uint4*>(block.delta);
  args.norm.weight = reinterpret_cast<const float4*>(block.norm_weight);
  args.norm.tokens = static_cast<uint32_t>(block.num_tokens);
  args.norm.vectors = block.shape.hidden_size / kVector;
  args.norm.width = static_cast<float>(block.shape.hidden_size);
  args.norm.eps = block.norm_eps;
  args.gate = static_cast<const uint4*>(block.gate);
  args.x = static_cast<uint4*>(block.x);
  args.logits = block.logits;
  args.vectors = block.shape.hidden_size / kVector;
  args.experts_a_block = experts_a_block(block.shape.routing.num_experts);
  return router::with_variant(routed(layer, workspace), [&](auto variant, const router::Args& router) {
    args.front.router = router;
    args.front.router.pitch = static_cast<uint32_t>(sizes.topk);
    if constexpr (decltype(variant)::kValues <= 8) {
      return launch<decltype(variant)>(args, stream);
    } else {
      return ANABRANCH_STATUS_UNSUPPORTED;
    }
  });
}

}  // namespace anabranch::moe_layer
