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
  Divisor of_n;       // by n, and
  Divisor of_chunks;  // by the chunks of n elements

  __host__ __device__ __forceinline__ Feed(const Args& args, bool routes) {
    shared = routes ? args.shared : 1;
    routed = routes ? args.router.topk : 0;
    first = routes ? args.router.num_experts : 0;
    n = routes ? args.intermediate : args.dense;
    of_n = routes ? args.of_intermediate : args.of_dense;
    of_chunks = routes ? args.of_intermediate_chunks : args.of_dense_chunks;
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
static_assert(static_cast<uint32_t>(Product::kDown) + 1 == kProducts);

// The next product, of the next layer after the last.
template <bool kLatent>
__device__ __forceinline__ Product after(Product product, bool routes) {
  switch (product) {
    case Product::kProject:
      return kLatent ? Product::kAbsorb : Product::kOutput;
    case Product::kShared:
      return routes ? Product::kRouted : Product::kDown;
    case Product::kDown:
      return Product::kProject;
    default:
      return static_cast<Product>(static_cast<uint32_t>(product) + 1);
  }
}

// A block's part of a product. Rows come in tiles of twice eight: of most products 16 neighbours, of kShared and
// kRouted eight columns' rows of the gate and the same of up, of products by head eight rows of one head.
struct Part {
  uint32_t first;  // row, column or, of products by head, group of eight rows
  uint32_t count;  // of them
  uint32_t tiles;
  uint32_t width;       // elements of each of a row's slots
  uint32_t chunks;      // of kChunk elements, of all slots
  uint32_t group_bits;  // 2^group_bits warps share the chunks; the others of a product share its tiles

  __host__ __device__ __forceinline__ Part(const Args& args, bool routes, Product product, uint32_t block) {
    const Cut& cut = args.cuts[routes][static_cast<uint32_t>(product)];
    first = (block * cut.base + (block < cut.extra ? block : cut.extra)) << cut.unit_bits;
    count = (cut.base + (block < cut.extra ? 1 : 0)) << cut.unit_bits;
    tiles = (count + (1u << cut.tile_bits) - 1) >> cut.tile_bits;
    width = cut.width;
    chunks = cut.chunks;
    group_bits = cut.group_bits;
  }
};

// How a product is cut among blocks.
template <bool kLatent>
Cut cut_of(const Args& args, bool routes, Product product, uint32_t blocks) {
  const attention::Args& a = args.attention;
  const Feed feed(args, routes);
  uint32_t units = args.hidden;
  uint32_t slots = 1;
  Cut cut = {};
  cut.tile_bits = 4;
  cut.width = args.hidden;
  switch (product) {
    case Product::kProject:
      units = kLatent ? a.num_heads * args.q_dim + a.key_dim : (a.num_heads + 2 * a.num_kv_heads) * a.key_dim;
      break;
    case Product::kAbsorb:
      units = a.num_heads * a.key_dim / 8;
      cut.tile_bits = 0;
      cut.width = args.q_dim;
      break;
    case Product::kExpand:
      units = a.num_heads * args.o_dim / 8;
      cut.tile_bits = 0;
      cut.width = a.value_dim;
      break;
    case Product::kOutput:
      cut.width = a.num_heads * args.o_dim;
      break;
    case Product::kShared:
    case Product::kRouted:
      // Two neighbours are one word of h.
      units = (product == Product::kShared ? feed.shared : feed.routed) * feed.n / 2;
      cut.unit_bits = 1;
      cut.tile_bits = 3;
      break;
    default:
      slots = feed.slots();
      cut.width = feed.n;
  }
  cut.base = units / blocks;
  cut.extra = units % blocks;
  cut.chunks = slots * chunks_of(cut.width);
  while ((2u << cut.group_bits) <= kWarps && cut.chunks >= (4u << cut.group_bits)) ++cut.group_bits;
  return cut;
}

}  // namespace anabranch::decode_step
