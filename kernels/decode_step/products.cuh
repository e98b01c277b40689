// The products of a layer: which rows of which weights a block has, and with what they are multiplied.
#pragma once

#include <cstdint>

#include "decode_step/args.cuh"

namespace anabranch::decode_step {

// A token's routing, in shared memory.
struct Slots {
  int32_t expert[kMaxSlots];  // of routed slots; no expert's where a slot is unused
  float weight[kMaxSlots];
};

// The feed-forward part of a layer: slots of shared experts, then routed ones. A dense one is a single shared expert.
struct Feed {
  uint32_t shared;
  uint32_t routed;
  uint32_t first;  // the first shared expert's place among the weights
  uint32_t n;

  __host__ __device__ __forceinline__ Feed(const Args& args, bool routes) {
    shared = routes ? args.shared : 1;
    routed = routes ? args.router.topk : 0;
    first = routes ? args.router.num_experts : 0;
    n = routes ? args.intermediate : args.dense;
  }

  __host__ __device__ __forceinline__ uint32_t slots() const { return shared + routed; }
  __device__ __forceinline__ bool is_there(const Slots& slots, uint32_t slot) const {
    return slot < shared || slots.expert[slot - shared] >= 0;
  }
  // Only of a slot that is there.
  __device__ __forceinline__ uint32_t expert(const Slots& slots, uint32_t slot) const {
    return slot < shared ? first + slot : static_cast<uint32_t>(slots.expert[slot - shared]);
  }
  __device__ __forceinline__ float weight(const Slots& slots, uint32_t slot) const {
    return slot < shared ? 1.0f : slots.weight[slot - shared];
  }
};

// In the order in which a layer has them. kShared and kRouted are the first product of shared and of routed experts.
enum class Product : uint32_t { kProject, kAbsorb, kExpand, kOutput, kShared, kRouted, kDown };

// A block's part of a product. Rows come in tiles of twice eight: of most products 16 neighbours, of kShared and kRouted
// eight columns' rows of the gate and the same of up, of products by head eight rows of one head.
struct Part {
  uint32_t first;   // row, column or, of products by head, group of eight rows
  uint32_t count;   // of them
  uint32_t tiles;
  uint32_t slots;   // vectors that a row's parts are multiplied with, one after another
  uint32_t width;   // elements of each
  uint32_t chunks;  // of kChunk elements, of all slots
  uint32_t groups;  // of warps that share the chunks; the others of a product share its tiles

  template <bool kLatent>
  __host__ __device__ __forceinline__ static Part of(const Args& args, bool routes, Product product, uint32_t block,
                                                     uint32_t blocks) {
    const attention::Args& a = args.attention;
    const Feed feed(args, routes);
    uint32_t units = args.hidden;
    uint32_t unit = 1;
    uint32_t rows = 16;  // units of a tile
    Part part = {};
    part.slots = 1;
    part.width = args.hidden;
    switch (product) {
      case Product::kProject:
        units = kLatent ? a.num_heads * args.q_dim + a.key_dim : (a.num_heads + 2 * a.num_kv_heads) * a.key_dim;
        break;
      case Product::kAbsorb:
        units = a.num_heads * a.key_dim / 8;
        rows = 1;
        part.width = args.q_dim;
        break;
      case Product::kExpand:
        units = a.num_heads * args.o_dim / 8;
        rows = 1;
        part.width = a.value_dim;
        break;
      case Product::kOutput:
        part.width = a.num_heads * args.o_dim;
        break;
      case Product::kShared:
      case Product::kRouted:
        // Two neighbours are one word of h.
        units = (product == Product::kShared ? feed.shared : feed.routed) * feed.n / 2;
        unit = 2;
        rows = 8;
        break;
      default:
        part.slots = feed.slots();
        part.width = feed.n;
    }
    const uint32_t first = static_cast<uint32_t>(uint64_t{units} * block / blocks);
    part.first = first * unit;
    part.count = (static_cast<uint32_t>(uint64_t{units} * (block + 1) / blocks) - first) * unit;
    part.tiles = (part.count + rows - 1) / rows;
    part.chunks = part.slots * chunks_of(part.width);
    part.groups = kWarps;
    while (part.groups > 1 && part.chunks < 2 * part.groups) part.groups /= 2;
    return part;
  }
};

}  // namespace anabranch::decode_step
