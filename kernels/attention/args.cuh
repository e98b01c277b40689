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
  const uint32_t* block_table;
  const uint32_t* table_starts;
  __nv_bfloat16* out;
  // With more than one split: [splits, T * num_heads, value_dim] sums, then as many (maximum, sum of weights) pairs.
  float* partial_sums;
  float2* partial_weights;
  // 0 where there are no blocks.
  uint32_t table_len;
  uint32_t num_blocks;
  // Blocks are of 2^block_shift rows.
  uint32_t block_shift;
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

// Every tile of keys begins at a multiple of its size, which divides this and thus a block: it lies within one.
constexpr uint32_t kLeastBlock = 64;

// Whatever the device's numbers say, nothing outside of q, out, the tables and the cache is touched.
struct SequenceQueries {
  uint32_t first_token;
  uint32_t queries;

  __device__ __forceinline__ SequenceQueries(const Args& args, uint32_t index) {
    first_token = min(args.q_offsets[index], args.num_tokens);
    const uint32_t end = min(args.q_offsets[index + 1], args.num_tokens);
    queries = end > first_token ? end - first_token : 0;
  }
};

struct SequenceKeys {
  uint32_t keys;
  // Its table.
  uint32_t table;

  SequenceKeys() = default;
  __device__ __forceinline__ SequenceKeys(const Args& args, uint32_t index) {
    table = min(args.table_starts[index], args.table_len);
    const uint64_t held = static_cast<uint64_t>(args.table_len - table) << args.block_shift;
    const uint32_t most = held < INT32_MAX ? static_cast<uint32_t>(held) : INT32_MAX;
    keys = min(args.kv_lengths[index], most);
  }

  // The block of a position below `keys`.
  __device__ __forceinline__ uint32_t block(const Args& args, uint32_t position) const {
    return args.block_table[table + (position >> args.block_shift)];
  }
};

// One sequence.
struct Sequence : SequenceQueries, SequenceKeys {
  __device__ __forceinline__ Sequence(const Args& args, uint32_t index)
      : SequenceQueries(args, index), SequenceKeys(args, index) {}

  // How many keys query i sees: those of positions below this.
  __device__ __forceinline__ int visible(uint32_t query) const {
    return static_cast<int>(keys) - static_cast<int>(queries) + static_cast<int>(query) + 1;
  }
};

// The cache's row of a position in its block. Apart from the look-up, so that that can be ahead of its use.
__device__ __forceinline__ uint64_t cache_row(const Args& args, uint32_t block, uint32_t position) {
  const uint64_t first = static_cast<uint64_t>(min(block, args.num_blocks - 1)) << args.block_shift;
  return first + (position & ((1u << args.block_shift) - 1));
}

}  // namespace anabranch::attention
