// Shared experts as experts that every token visits: K slots of the router's, then S more.
#pragma once

#include <cstdint>

namespace anabranch::moe_layer {

constexpr uint32_t kExtendThreads = 256;

struct ExtendArgs {
  const int32_t* routed_ids;    // [T, K]
  const float* routed_weights;  // [T, K]
  const float* shared_gate;     // [T] or null
  int32_t* ids;                 // [T, K + S]
  float* weights;               // [T, K + S]
  uint32_t num_pairs;           // T (K + S)
  uint32_t topk;                // K
  uint32_t shared;              // S
  uint32_t num_experts;         // E
};

// A thread takes a slot.
static __global__ void __launch_bounds__(kExtendThreads) extend_topk(const __grid_constant__ ExtendArgs args) {
  const uint32_t pair = blockIdx.x * kExtendThreads + threadIdx.x;
  if (pair >= args.num_pairs) return;
  const uint32_t all = args.topk + args.shared;
  const uint32_t token = pair / all;
  const uint32_t slot = pair - token * all;
  int32_t id;
  float weight = 1.0f;
  if (slot < args.topk) {
    id = args.routed_ids[token * args.topk + slot];
    // What is no routed expert's must not become a shared one's.
    if (static_cast<uint32_t>(id) >= args.num_experts) id = -1;
    weight = args.routed_weights[token * args.topk + slot];
  } else {
    id = static_cast<int32_t>(args.num_experts + slot - args.topk);
    if (args.shared_gate != nullptr) weight = 1.0f / (1.0f + expf(-args.shared_gate[token]));
  }
  args.ids[pair] = id;
  args.weights[pair] = weight;
}

}  // namespace anabranch::moe_layer
