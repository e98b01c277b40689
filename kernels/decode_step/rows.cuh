// A warp's rows of weights through all layers, in the order in which it multiplies them: they are on their way while
// blocks wait for one another's results.
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

  __device__ __forceinline__ Feed(const Args& args, uint32_t layer) {
    const bool routes = args.layers[layer].gate != nullptr;
    shared = routes ? args.shared : 1;
    routed = routes ? args.router.topk : 0;
    first = routes ? args.router.num_experts : 0;
    n = routes ? args.intermediate : args.dense;
  }

  // The expert of a slot; kMaxExperts or more where there is none.
  __device__ __forceinline__ uint32_t expert(const Slots& slots, uint32_t slot) const {
    return slot < shared ? first + slot : static_cast<uint32_t>(slots.expert[slot - shared]);
  }
  __device__ __forceinline__ bool is_there(const Slots& slots, uint32_t slot) const {
    return slot < shared || slots.expert[slot - shared] >= 0;
  }
  __device__ __forceinline__ float weight(const Slots& slots, uint32_t slot) const {
    return slot < shared ? 1.0f : slots.weight[slot - shared];
  }
};

// The products of a layer.
enum class Product : uint32_t { kProject, kAbsorb, kExpand, kOutput, kShared, kRouted, kDown };

// Rows, or where two results make a word, two results' rows.
template <bool kLatent>
__device__ __forceinline__ uint32_t units_of(const Args& args, uint32_t layer, Product product) {
  const attention::Args& a = args.attention;
  switch (product) {
    case Product::kProject:
      return kLatent ? a.num_heads * args.q_dim + a.key_dim : (a.num_heads + 2 * a.num_kv_heads) * a.key_dim;
    case Product::kAbsorb:
      return a.num_heads * a.key_dim / 2;
    case Product::kExpand:
      return a.num_heads * args.o_dim / 2;
    case Product::kShared: {
      const Feed feed(args, layer);
      return feed.shared * feed.n / 2;
    }
    case Product::kRouted: {
      const Feed feed(args, layer);
      return feed.routed * feed.n / 2;
    }
    default:
      return args.hidden;
  }
}

// What a warp has of a product: of the block's neighbouring units, every kWarps-th from `start` on.
struct Span {
  uint32_t first;
  uint32_t count;
  uint32_t start;
};

// Deals units to warps by turns, from one product to the next.
class Deal {
 public:
  __device__ __forceinline__ Span next(uint32_t units) {
    const Share share(units);
    const uint32_t warp = threadIdx.x / kWarpSize;
    const uint32_t start = warp >= turn_ ? warp - turn_ : warp + kWarps - turn_;
    turn_ = (turn_ + share.count) % kWarps;
    return {share.first, share.count, start};
  }

 private:
  uint32_t turn_ = 0;
};

template <bool kLatent>
class StepRows {
 public:
  __device__ __forceinline__ StepRows(const Args& args, const Slots& slots) : args_(args), slots_(slots) {
    enter(Product::kProject);
  }

  __device__ __forceinline__ bool next(const uint4*& row, uint32_t& vectors) {
    for (;;) {
      while (unit_ < span_.count) {
        if (find(row, vectors)) return true;
      }
      if (!advance()) return false;
    }
  }

  // The routing of one more layer is known.
  __device__ __forceinline__ void resume() { ++known_; }

 private:
  __device__ __forceinline__ void enter(Product product) {
    product_ = product;
    span_ = deal_.next(units_of<kLatent>(args_, layer_, product));
    unit_ = span_.start;
    row_ = 0;
  }

  __device__ __forceinline__ bool advance() {
    switch (product_) {
      case Product::kProject:
        enter(kLatent ? Product::kAbsorb : Product::kOutput);
        return true;
      case Product::kAbsorb:
        enter(Product::kExpand);
        return true;
      case Product::kExpand:
        enter(Product::kOutput);
        return true;
      case Product::kOutput:
        enter(Product::kShared);
        return true;
      case Product::kShared: {
        const bool routes = args_.layers[layer_].gate != nullptr;
        if (routes && known_ == routed_) return false;
        routed_ += routes;
        enter(Product::kRouted);
        return true;
      }
      case Product::kRouted:
        enter(Product::kDown);
        return true;
      default:
        if (layer_ + 1 == args_.num_layers) return false;
        ++layer_;
        enter(Product::kProject);
        return true;
    }
  }

  // The unit's next row; goes on to the next unit after its last.
  __device__ __forceinline__ bool find(const uint4*& row, uint32_t& vectors) {
    const AnabranchDecodeLayer& layer = args_.layers[layer_];
    const attention::Args& a = args_.attention;
    const uint32_t unit = span_.first + unit_;
    uint32_t rows = 1;
    uint64_t number = unit;
    const void* weights;
    vectors = args_.hidden / kVector;
    switch (product_) {
      case Product::kProject:
        weights = layer.q;
        if (kLatent && unit >= a.num_heads * args_.q_dim) {
          weights = layer.kv;
          number = unit - a.num_heads * args_.q_dim;
        }
        break;
      case Product::kAbsorb:
        weights = layer.absorb;
        vectors = args_.q_dim / kVector;
        rows = 2;
        number = 2 * unit + row_;
        break;
      case Product::kExpand:
        weights = layer.expand;
        vectors = a.value_dim / kVector;
        rows = 2;
        number = 2 * unit + row_;
        break;
      case Product::kOutput:
        weights = layer.output;
        vectors = a.num_heads * args_.o_dim / kVector;
        break;
      case Product::kShared:
      case Product::kRouted: {
        const Feed feed(args_, layer_);
        const uint32_t slot = 2 * unit / feed.n;
        const uint32_t column = 2 * unit - slot * feed.n;
        const bool routed = product_ == Product::kRouted;
        if (routed && !feed.is_there(slots_, feed.shared + slot)) {
          unit_ += kWarps;
          return false;
        }
        const uint32_t expert = feed.expert(slots_, slot + (routed ? feed.shared : 0));
        weights = layer.gate_up;
        rows = 4;
        // Gate and up of the first column, then of the second.
        number = uint64_t{2} * expert * feed.n + column + row_ / 2 + (row_ % 2) * feed.n;
        break;
      }
      default: {
        const Feed feed(args_, layer_);
        rows = feed.shared + feed.routed;
        while (row_ < rows && !feed.is_there(slots_, row_)) ++row_;
        if (row_ >= rows) {
          row_ = 0;
          unit_ += kWarps;
          return false;
        }
        weights = layer.down;
        vectors = feed.n / kVector;
        number = uint64_t{feed.expert(slots_, row_)} * args_.hidden + unit;
      }
    }
    row = static_cast<const uint4*>(weights) + number * vectors;
    if (++row_ == rows) {
      row_ = 0;
      unit_ += kWarps;
    }
    return true;
  }

  const Args& args_;
  const Slots& slots_;
  Deal deal_;
  Span span_;
  Product product_;
  uint32_t layer_ = 0;
  uint32_t unit_ = 0;    // of the span
  uint32_t row_ = 0;     // of the unit
  uint32_t routed_ = 0;  // layers with a router whose experts' rows have been begun,
  uint32_t known_ = 0;   // and whose routing is known
};

}  // namespace anabranch::decode_step
