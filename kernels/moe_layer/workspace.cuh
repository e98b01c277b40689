// What a layer keeps between its launches, and where in the workspace.
#pragma once

#include <cstdint>

#include "anabranch.h"

namespace anabranch::moe_layer {

struct Sizes {
  uint64_t tokens;   // T
  uint64_t experts;  // E + S: all that have weights
  uint64_t topk;     // K + S: all that a token visits
  uint64_t hidden;
  uint64_t intermediate;

  uint64_t pairs() const { return tokens * topk; }
};

constexpr uint64_t kAlign = 256;

// Hands out parts of the workspace, one after another; from a null base it only counts.
class Parts {
 public:
  explicit Parts(void* base) : base_(static_cast<char*>(base)) {}

  template <typename T>
  T* take(uint64_t count) {
    void* part = base_ == nullptr ? nullptr : base_ + used_;
    used_ += (count * sizeof(T) + kAlign - 1) / kAlign * kAlign;
    return static_cast<T*>(part);
  }

  uint64_t used() const { return used_; }

 private:
  char* base_;
  uint64_t used_ = 0;
};

struct Workspace {
  int32_t* ids;         // [T, K + S]
  float* weights;       // [T, K + S]
  int32_t* routed_ids;  // [T, K]: the router's, where shared experts are added to them
  float* routed_weights;
  uint32_t* counts;   // [E]
  uint32_t* offsets;  // [E + S + 1]
  uint32_t* slots;    // [T (K + S)]
  int32_t* inverse;   // [T, K + S]
  char* permute;
  uint64_t permute_bytes;
  uint16_t* h;         // [T (K + S), n] bf16
  uint16_t* y;         // [T (K + S), d] bf16
  uint32_t* progress;  // what the expert products have done, in blocks of rows and columns

  Workspace(const Sizes& sizes, uint64_t permute_size, uint64_t progress_words, Parts& parts)
      : ids(parts.take<int32_t>(sizes.pairs())),
        weights(parts.take<float>(sizes.pairs())),
        routed_ids(parts.take<int32_t>(sizes.pairs())),
        routed_weights(parts.take<float>(sizes.pairs())),
        counts(parts.take<uint32_t>(sizes.experts)),
        offsets(parts.take<uint32_t>(sizes.experts + 1)),
        slots(parts.take<uint32_t>(sizes.pairs())),
        inverse(parts.take<int32_t>(sizes.pairs())),
        permute(parts.take<char>(permute_size)),
        permute_bytes(permute_size),
        h(parts.take<uint16_t>(sizes.pairs() * sizes.intermediate)),
        y(parts.take<uint16_t>(sizes.pairs() * sizes.hidden)),
        progress(parts.take<uint32_t>(progress_words)) {}
};

}  // namespace anabranch::moe_layer
