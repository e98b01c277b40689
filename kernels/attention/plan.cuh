// Which kernel a shape gets, and how its work is split: plain arithmetic on what the host knows, so that the same shape
// on the same GPU always gives the same bits.
#pragma once

#include "attention/args.cuh"
#include "attention/decode.cuh"
#include "attention/hopper.cuh"
#include "attention/prefill.cuh"
#include "common/launch.cuh"

namespace anabranch::attention {

// Sizes between these are padded with zeros on their way to shared memory.
using Prefill64 = PrefillTile<64, 64, 2>;     // gpt-oss, Llama-like small models
using Prefill96 = PrefillTile<96, 96, 2>;     // Phi-3.5-MoE's kin
using Prefill128 = PrefillTile<128, 128, 2>;  // Mixtral, Qwen3-MoE, OLMoE, GLM-4.5
using Prefill192 = PrefillTile<192, 128, 2>;  // DeepSeek-V2 and V3, expanded

// Three or four blocks a multiprocessor keep some 96 KiB of keys and values on their way.
using Decode64 = DecodeTile<64, 64, 16, 64, 4, false, 4>;
using Decode128 = DecodeTile<128, 128, 16, 64, 4, false, 3>;
using Decode192 = DecodeTile<192, 128, 16, 64, 4, false, 2>;
using Latent16 = DecodeTile<576, 512, 16, 32, 4, true, 2>;  // DeepSeek-V2-Lite: 16 heads
using Latent64 = DecodeTile<576, 512, 64, 32, 2, true, 1>;  // DeepSeek-V2 and V3: 128 heads; prefill, absorbed

enum class Kernel {
  kPrefill64,
  kPrefill96,
  kPrefill128,
  kPrefill192,
  kHopper64,
  kHopper128,
  kHopper192,
  kDecode64,
  kDecode128,
  kDecode192,
  kLatent16,
  kLatent64
};

// What the launch needs to know of the device.
struct Device {
  uint32_t multiprocessors;
  uint32_t shared_per_block;
  uint32_t shared_per_multiprocessor;
  // It is of 9.0, and can run this build's code for that.
  bool hopper;
};

struct Problem {
  uint32_t num_sequences;
  uint32_t num_kv_heads;
  uint32_t group;
  uint32_t key_dim;
  uint32_t value_dim;
  uint32_t max_q_len;
  uint32_t max_kv_len;
  bool values_are_keys;
  // There are blocks, and a table.
  bool cached;
};

// Rows of one key head, queries times heads of the group, up to which the keys are split and not the queries.
constexpr uint64_t kDecodeRows = 64;
// Above this many rows one tile of 64 beats several of 16, each of which reads all keys.
constexpr uint64_t kLatentRows = 32;

// Tokens of a sequence from which Hopper's kernel is used: a tile of it is as many.
constexpr uint32_t kHopperQueries = 128;

constexpr bool fits(const Problem& problem, uint32_t key_dim, uint32_t value_dim) {
  return problem.key_dim <= key_dim && problem.value_dim <= value_dim;
}

constexpr bool is_supported(const Problem& problem) {
  return fits(problem, 192, 128) || (problem.values_are_keys && fits(problem, 576, 512));
}

// Items are counted in 31 bits, and of an empty cache there is no tensor map.
constexpr bool suits_hopper(const Problem& problem) {
  const uint64_t tiles = (static_cast<uint64_t>(problem.max_q_len) + Hopper128::kRows - 1) / Hopper128::kRows;
  const uint64_t heads = static_cast<uint64_t>(problem.num_kv_heads) * problem.group;
  return fits(problem, 192, 128) && problem.max_q_len >= kHopperQueries && problem.cached &&
         heads < uint64_t{1} << 31 && tiles * problem.num_sequences < (uint64_t{1} << 31) / heads;
}

constexpr Kernel choose_kernel(const Problem& problem, const Device& device) {
  const uint64_t rows = static_cast<uint64_t>(problem.max_q_len) * problem.group;
  if (!fits(problem, 192, 128)) {
    return rows > kLatentRows && Latent64::kSharedBytes <= device.shared_per_block ? Kernel::kLatent64
                                                                                   : Kernel::kLatent16;
  }
  if (rows <= kDecodeRows) {
    return fits(problem, 64, 64)     ? Kernel::kDecode64
           : fits(problem, 128, 128) ? Kernel::kDecode128
                                     : Kernel::kDecode192;
  }
  if (device.hopper && suits_hopper(problem)) {
    return fits(problem, 64, 64)     ? Kernel::kHopper64
           : fits(problem, 128, 128) ? Kernel::kHopper128
                                     : Kernel::kHopper192;
  }
  return fits(problem, 64, 64)     ? Kernel::kPrefill64
         : fits(problem, 96, 96)   ? Kernel::kPrefill96
         : fits(problem, 128, 128) ? Kernel::kPrefill128
                                   : Kernel::kPrefill192;
}

// Blocks that share one sequence's rows of one key head, and parts that its keys are cut into.
struct Split {
  uint64_t row_tiles;
  uint32_t splits;
};

// As many splits as the GPU holds blocks at once, but none of less than one tile of keys; and a few tiles are not worth
// the launch that would put their parts together.
template <class Tile>
constexpr Split choose_split(const Problem& problem, const Device& device) {
  const uint64_t rows = static_cast<uint64_t>(problem.max_q_len) * problem.group;
  const uint64_t row_tiles = (rows + Tile::kRows - 1) / Tile::kRows;
  const uint64_t blocks = row_tiles * problem.num_kv_heads * problem.num_sequences;
  // A kibibyte of each block's shared memory is the system's.
  const uint32_t fit = device.shared_per_multiprocessor / (Tile::kSharedBytes + 1024);
  const uint32_t per_multiprocessor = fit < 1 ? 1 : fit < Tile::kBlocksPerSm ? fit : Tile::kBlocksPerSm;
  const uint64_t capacity = static_cast<uint64_t>(device.multiprocessors) * per_multiprocessor;
  const uint64_t most = (static_cast<uint64_t>(problem.max_kv_len) + Tile::kKeys - 1) / Tile::kKeys;
  uint64_t splits = blocks == 0 ? 1 : capacity / blocks;
  splits = most <= 4 ? 1 : splits < most ? splits : most;
  splits = splits < kMaxSplits ? splits : kMaxSplits;
  return {row_tiles, splits < 1 ? 1 : static_cast<uint32_t>(splits)};
}

constexpr bool is_hopper(Kernel kernel) {
  return kernel >= Kernel::kHopper64 && kernel <= Kernel::kHopper192;
}

constexpr Split split_of(Kernel kernel, const Problem& problem, const Device& device) {
  switch (kernel) {
    case Kernel::kDecode64:
      return choose_split<Decode64>(problem, device);
    case Kernel::kDecode128:
      return choose_split<Decode128>(problem, device);
    case Kernel::kDecode192:
      return choose_split<Decode192>(problem, device);
    case Kernel::kLatent16:
      return choose_split<Latent16>(problem, device);
    case Kernel::kLatent64:
      return choose_split<Latent64>(problem, device);
    case Kernel::kHopper64:
      return {(static_cast<uint64_t>(problem.max_q_len) + Hopper64::kRows - 1) / Hopper64::kRows, 1};
    default:
      static_assert(Hopper128::kRows == Prefill128::kRows && Hopper192::kRows == Prefill128::kRows);
      return {(static_cast<uint64_t>(problem.max_q_len) + Prefill128::kRows - 1) / Prefill128::kRows, 1};
  }
}

// An H200: one sequence of Qwen3-30B-A3B with 32,768 keys is cut so that three blocks a multiprocessor have work, 64
// sequences are not cut.
constexpr Device kH200 = {132, 232448, 233472, true};
static_assert(choose_split<Decode128>({1, 4, 8, 128, 128, 1, 32768, false, true}, kH200).splits == 99);
static_assert(choose_split<Decode128>({64, 4, 8, 128, 128, 1, 32768, false, true}, kH200).splits == 1);
static_assert(choose_kernel({1, 1, 128, 576, 512, 1, 32768, true, true}, kH200) == Kernel::kLatent64);
static_assert(choose_kernel({1, 1, 128, 576, 512, 1, 32768, true, true}, {84, 101376, 102400, false}) ==
              Kernel::kLatent16);

static_assert(choose_kernel({1, 4, 8, 128, 128, 4096, 4096, false, true}, kH200) == Kernel::kHopper128);
static_assert(choose_kernel({1, 16, 1, 192, 128, 4096, 4096, false, true}, kH200) == Kernel::kHopper192);
static_assert(choose_kernel({1, 4, 8, 128, 128, 100, 4096, false, true}, kH200) == Kernel::kPrefill128);
static_assert(choose_kernel({1, 4, 8, 128, 128, 4096, 0, false, false}, kH200) == Kernel::kPrefill128);

// In prefill_sm90.cu: whether this build's code for 9.0a can run on the current device.
bool is_there_sm90();

// `next_item` is a word of workspace, or null where each of the at most `items` tiles of queries has a block.
AnabranchStatus launch_hopper(Kernel kernel, const Args& args, uint64_t items, uint32_t* next_item,
                              cudaStream_t stream);

// In prefill.cu and decode.cu.
AnabranchStatus launch_prefill(Kernel kernel, const Args& args, cudaStream_t stream);
AnabranchStatus launch_decode(Kernel kernel, const Args& args, cudaStream_t stream);

template <class Tile>
AnabranchStatus launch(void (*kernel)(Args), dim3 grid, const Args& args, cudaStream_t stream) {
  ANABRANCH_TRY(checked(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Tile::kSharedBytes)));
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = Tile::kThreads;
  config.dynamicSmemBytes = Tile::kSharedBytes;
  config.stream = stream;
  return launch_overlapping(kernel, config, args);
}

}  // namespace anabranch::attention
