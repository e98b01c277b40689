// Rules that are compiled in. The kernel takes every setting at run time; a rule of published models overwrites its
// copy of them with constants, and the compiler drops what they leave no use for.
#pragma once

#include "router/args.cuh"

namespace anabranch::router {

// Whatever the arguments say.
struct AnyRule {
  static constexpr uint32_t blocks_per_sm(int values) { return values <= 8 ? 3 : 4; }

  template <int kValues>
  __host__ __device__ static Args fixed(Args args) {
    return args;
  }

  template <int kValues>
  static bool fits(const Args&) {
    return true;
  }
};

// With 32 registers a thread, 64 warps share a multiprocessor: two rounds do for 16,384 tokens on 132 of them.
constexpr uint32_t kPlainBlocksPerSm = 4;

// What the rules below share: eight of 32 * kValues experts, and nothing adaptive.
template <int kValues>
__host__ __device__ inline Args plain(Args args) {
  args.num_experts = 32 * kValues;
  args.topk = 8;
  args.adaptive = ANABRANCH_ADAPTIVE_FIXED;
  args.wide_loads = true;
  args.groups.count = 0;
  return args;
}

template <int kValues>
bool is_plain(const Args& args) {
  return args.num_experts == 32 * kValues && args.topk == 8 && args.adaptive == ANABRANCH_ADAPTIVE_FIXED &&
         args.wide_loads;
}

// Softmax, renormalised: Qwen3-MoE.
struct SoftmaxRule {
  static constexpr uint32_t blocks_per_sm(int) { return kPlainBlocksPerSm; }

  template <int kValues>
  __host__ __device__ static Args fixed(Args args) {
    args = plain<kValues>(args);
    args.score = ANABRANCH_SCORE_SOFTMAX;
    args.renormalize = true;
    args.rank_by_logits = true;
    args.has_bias = false;
    return args;
  }

  template <int kValues>
  static bool fits(const Args& args) {
    return is_plain<kValues>(args) && args.score == ANABRANCH_SCORE_SOFTMAX && args.renormalize &&
           args.rank_by_logits && !args.has_bias && args.groups.count <= 1;
  }
};

// Sigmoid with selection bias, renormalised, eight groups scored by their two best: DeepSeek-V3.
struct GroupedSigmoidRule {
  static constexpr uint32_t kGroups = 8;

  static constexpr uint32_t blocks_per_sm(int) { return kPlainBlocksPerSm; }

  template <int kValues>
  __host__ __device__ static Args fixed(Args args) {
    args = plain<kValues>(args);
    args.score = ANABRANCH_SCORE_SIGMOID;
    args.has_bias = true;
    args.renormalize = true;
    args.rank_by_logits = false;
    args.groups.count = kGroups;
    args.groups.size = 32 * kValues / kGroups;
    args.groups.lanes = 32 / kGroups;
    args.groups.top2_sum = true;
    return args;
  }

  template <int kValues>
  static bool fits(const Args& args) {
    return is_plain<kValues>(args) && args.score == ANABRANCH_SCORE_SIGMOID && args.renormalize &&
           !args.rank_by_logits && args.has_bias && args.groups.count == kGroups && args.groups.top2_sum;
  }
};

}  // namespace anabranch::router
