// With few tokens one block does all that comes before the expert products: routes, adds the shared experts, sorts
// pairs by expert and clears the products' progress.
#pragma once

#include "permute/place.cuh"
#include "router/route_tokens.cuh"

namespace anabranch::moe_layer {

struct FrontArgs {
  router::Args router;         // writes to `permute`'s ids; its logits are null where the routing is given
  permute::Args permute;       // over K + S
  const int32_t* given_ids;    // [T, K] or null
  const float* given_weights;  // [T, K] or null
  int32_t* routed_ids;         // [T, K]: a copy of what the router chose, or null
  float* routed_weights;       // likewise
  const float* shared_gate;    // [T] or null
  uint32_t* progress;
  uint32_t progress_words;
  uint32_t shared;  // S
};

template <int kValues>
__global__ void __launch_bounds__(router::Tile<kValues>::kThreads)
    route_and_place(const __grid_constant__ FrontArgs args) {
  extern __shared__ __align__(16) uint32_t shared[];
  ptx::launch_dependents();
  for (uint32_t i = threadIdx.x; i < args.progress_words; i += blockDim.x) args.progress[i] = 0;
  const router::Args& router = args.router;
  if (router.logits != nullptr) router::route_rows<kValues>(router, shared);
  const uint32_t pitch = router.pitch;
  const uint32_t topk = router.topk;
  for (uint32_t token = threadIdx.x; token < router.num_tokens; token += blockDim.x) {
    const float weight = args.shared_gate == nullptr ? 1.0f : 1.0f / (1.0f + expf(-args.shared_gate[token]));
    for (uint32_t i = 0; i < args.shared; ++i) {
      router.ids[token * pitch + topk + i] = static_cast<int32_t>(router.num_experts + i);
      router.weights[token * pitch + topk + i] = weight;
    }
  }
  __syncthreads();
  for (uint32_t pair = threadIdx.x; pair < router.num_tokens * topk; pair += blockDim.x) {
    const uint32_t token = pair / topk;
    const uint32_t at = token * pitch + pair - token * topk;
    if (args.given_ids != nullptr) {
      // What is no routed expert's must not become a shared one's.
      const int32_t id = args.given_ids[pair];
      router.ids[at] = static_cast<uint32_t>(id) < router.num_experts ? id : -1;
      router.weights[at] = args.given_weights[pair];
    }
    if (args.routed_ids != nullptr) {
      args.routed_ids[pair] = router.ids[at];
      args.routed_weights[pair] = router.weights[at];
    }
  }
  __syncthreads();
  permute::place_rows(args.permute, shared);
}

}  // namespace anabranch::moe_layer
