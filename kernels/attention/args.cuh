// What the kernels of attention are told, and what they read of a sequence.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

namespace anabranch::attention {

// Parts that a sequence's keys are cut into, at most: merge.cuh keeps a weight for each.
constexpr uint32_t kMaxSplits = 128;

struct Args {
  const __nv_bfloat16* q;
  const __nv_bfloat16* keys;
  const __nv_bfloat16* values;
  const uint32_t* q_offsets;
  const uint32_t* kv_lengths;
  const uint32_t* kv_rows;
  __nv_bfloat16* out;
  // With more than one split: [splits, T * num_heads, value_dim] sums, then as many (maximum, sum of weights) pairs.
  float* partial_sums;
  float2* partial_weights;
  uint64_t cache_rows;
  uint32_t num_tokens;
  uint32_t num_sequences;
  uint32_t num_heads;
  uint32_t num_kv_heads;
  // Query heads of a key head.
  uint32_t group;
  uint32_t key_dim;
  uint32_t value_dim;
  uint32_t key_stride;
  uint32_t value_stride;
  // scale * log2(e): weights are powers of two.
  float scale_log2;
  uint32_t splits;
  // Blocks that share one sequence's rows of one key head.
  uint32_t row_tiles;
};

// One sequence. Whatever the device's numbers say, nothing outside of q, out and the cache is touched.
struct Sequence {
  uint32_t first_token;
  uint32_t queries;
  uint32_t keys;
  uint64_t first_row;

  __device__ __forceinline__ Sequence(const Args& args, uint32_t index) {
    first_token = min(args.q_offsets[index], args.num_tokens);
    const uint32_t end = min(args.q_offsets[index + 1], args.num_tokens);
    queries = end > first_token ? end - first_token : 0;
    first_row = args.kv_rows[index];
    const uint64_t held = first_row < args.cache_rows ? args.cache_rows - first_row : 0;
    keys = args.kv_lengths[index];
    keys = keys < held ? keys : static_cast<uint32_t>(held);
  }

  // How many keys query i sees: those of positions below this.
  __device__ __forceinline__ int visible(uint32_t query) const {
    return static_cast<int>(keys) - static_cast<int>(queries) + static_cast<int>(query) + 1;
  }
};

}  // namespace anabranch::attention
