// What the router's kernels are given, worked out once on the host.
#pragma once

#include <cstdint>

#include "anabranch.h"

namespace anabranch::router {

struct Groups {
  uint32_t count;       // 0 or 1: no limit
  uint32_t kept;        // groups a token may choose from
  uint32_t size;        // experts of a group
  uint32_t lanes;       // lanes that hold a group between them, a power of two; 0 if groups and lanes do not line up
  uint32_t reciprocal;  // ceil(2^21 / size): expert * reciprocal >> 21 is the expert's group
  bool top2_sum;        // scored by the sum of the two best, else by the best
};

struct Args {
  const float* logits;      // [T, E]
  const float* bias;        // [E] or null
  const float* complexity;  // [T] or null
  int32_t* ids;             // [T, K] with rows `pitch` apart
  float* weights;           // likewise
  uint32_t* counts;         // [E], zero before the launch unless one block does everything
  uint32_t num_tokens;
  uint32_t num_experts;
  uint32_t topk;
  uint32_t pitch;  // elements from a token's ids to the next's
  AnabranchScore score;
  AnabranchAdaptive adaptive;
  bool has_bias;
  bool renormalize;
  bool rank_by_logits;  // nothing is done to the logits that could reorder them: rank by them, not by their scores
  bool wide_loads;      // rows start on 16 bytes (8 with two values a lane) and are whole multiples of that
  float scale;
  double log_experts;  // ln E
  Groups groups;
};

// How a kernel with so many values a lane is launched. Shared memory of a block stays under 48 KiB at any setting. How
// many blocks share a multiprocessor is the rule's to say: it has the registers.
template <int kValues>
struct Tile {
  static constexpr uint32_t kThreads = kValues <= 8 ? 512 : kValues == 16 ? 256 : 128;
  static constexpr uint32_t kWarps = kThreads / 32;
  static constexpr uint32_t kRow = 32 * kValues;
};

// Words of dynamic shared memory: the block's counts, then for each warp a row of selection scores, what the choice
// needs (48 words) and, where groups and lanes do not line up, the groups' scores.
constexpr uint32_t kScratchWords = 48;

template <int kValues>
__host__ __device__ constexpr uint32_t warp_words(bool group_scores) {
  return Tile<kValues>::kRow + kScratchWords + (group_scores ? Tile<kValues>::kRow : 0);
}

template <int kValues>
__host__ __device__ constexpr uint32_t shared_words(bool group_scores) {
  return Tile<kValues>::kRow + Tile<kValues>::kWarps * warp_words<kValues>(group_scores);
}

static_assert(shared_words<8>(true) * 4 <= 48 * 1024 && shared_words<16>(true) * 4 <= 48 * 1024 &&
              shared_words<32>(true) * 4 <= 48 * 1024);

}  // namespace anabranch::router
