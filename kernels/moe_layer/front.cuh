// What comes before the permutation: routes, adds the shared experts to each token's, and clears the expert products'
// progress.
#pragma once

#include "router/route_tokens.cuh"

namespace anabranch::moe_layer {

struct FrontArgs {
  router::Args router;         // writes pairs [T, K + S]; its logits are null where the routing is given
  const int32_t* given_ids;    // [T, K] or null
  const float* given_weights;  // [T, K] or null
  int32_t* routed_ids;         // [T, K]: a copy of what the router chose, or null
  float* routed_weights;       // likewise
  const float* shared_gate;    // [T] or null
  uint32_t* progress;
  uint32_t progress_words;
  uint32_t shared;  // S
};

// The warp whose lanes are K + S slots of a token: takes what is given, copies what the router chose, adds shared
// experts.
__device__ __forceinline__ void finish_token(const FrontArgs& args, uint32_t token, uint32_t slot) {
  const router::Args& router = args.router;
  const uint32_t at = token * router.pitch + slot;
  const uint32_t routed = token * router.topk + slot;
  if (slot >= router.topk + args.shared) return;
  if (slot >= router.topk) {
    router.ids[at] = static_cast<int32_t>(router.num_experts + slot - router.topk);
    router.weights[at] = args.shared_gate == nullptr ? 1.0f : 1.0f / (1.0f + expf(-args.shared_gate[token]));
  } else if (args.given_ids != nullptr) {
    // What is no routed expert's must not become a shared one's.
    const int32_t id = args.given_ids[routed];
    router.ids[at] = static_cast<uint32_t>(id) < router.num_experts ? id : -1;
    router.weights[at] = args.given_weights[routed];
  } else if (args.routed_ids != nullptr) {
    args.routed_ids[routed] = router.ids[at];
    args.routed_weights[routed] = router.weights[at];
  }
}

template <int kValues, class Rule>
__global__ void __launch_bounds__(router::Tile<kValues>::kThreads, Rule::blocks_per_sm(kValues))
    route_pairs(const __grid_constant__ FrontArgs args) {
  extern __shared__ __align__(16) uint32_t shared[];
  ptx::launch_dependents();
  ptx::wait_for_prerequisites();
  const uint32_t thread = blockIdx.x * blockDim.x + threadIdx.x;
  const uint32_t threads = gridDim.x * blockDim.x;
  for (uint32_t i = thread; i < args.progress_words; i += threads) args.progress[i] = 0;
  if (args.router.logits != nullptr) {
    router::route_rows<kValues>(Rule::template fixed<kValues>(args.router), shared);
    __syncwarp();
  }
  // The tokens that this warp has routed.
  for (uint32_t token = thread / kWarpSize; token < args.router.num_tokens; token += threads / kWarpSize) {
    finish_token(args, token, threadIdx.x % kWarpSize);
  }
}

}  // namespace anabranch::moe_layer
