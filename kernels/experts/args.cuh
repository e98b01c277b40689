// What the experts' kernel is given, and how its tiles are cut: a pure function of the shape and the device.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "permute/place.cuh"

namespace anabranch::experts {

// Columns of both operands, of the inner dimension, in a panel of a stage: 128 bytes, the swizzle's width.
constexpr uint32_t kDepth = 64;
constexpr uint32_t kRowBytes = kDepth * 2;
// Rows of weights of one product: wgmma's M.
constexpr uint32_t kBlockRows = 64;
// Most tokens of a tile: wgmma's N.
constexpr uint32_t kMostTokens = 176;
constexpr uint32_t kMostStages = 24;
// Items that the weights' producer may be ahead of the consumers.
constexpr uint32_t kQueue = 2;

// Tokens that a warpgroup has in its part of shared memory on their way out, 64 columns of each.
constexpr uint32_t kOutTokens = 32;
constexpr uint32_t kOutBytes = kOutTokens * 128;

struct Args {
  // gate_up as [E, n / 8, 2, 8, d]: a box is whole groups of 16 rows, eight of the gate before the same eight of up.
  CUtensorMap gate_up;
  CUtensorMap down;             // [E, d, n]
  CUtensorMap gated_map;        // h: [R, n], in boxes of h_rows rows
  const uint16_t* x;            // [T, d] bf16
  permute::Args pairs;          // offsets, slots and inverse: found there or, if `places`, made of ids by each block
  const float* weights;         // [T, K]
  uint16_t* h;                  // [R, n] bf16
  uint16_t* y;                  // [R, d] bf16
  uint16_t* out;                // [T, d] bf16, or null: somebody else combines
  uint32_t* next_item;          // zero before the launch, as all progress
  uint32_t* gated;              // [token tiles]: warpgroups that have written their part of a tile's h
  uint32_t* summed;             // [d / 64]: tiles of y that a warpgroup has written, by its columns
  const void* gate_up_weights;  // what the map is of
  uint32_t warm_tokens;         // bytes of x that are wanted in the second-level cache early
  uint32_t warm_weights;        // and of gate_up
  uint32_t num_tokens;
  uint32_t num_rows;  // R = T K
  bool places;        // every block sorts the pairs for itself, in its shared memory
  uint32_t num_experts;
  uint32_t topk;
  uint32_t hidden;
  uint32_t intermediate;
  uint32_t h_rows;      // 8 or 16
  uint32_t token_tile;  // most tokens of a tile, a multiple of h_rows
  uint32_t stages;
  uint32_t gate_tiles;  // tiles of gate_up's rows
  uint32_t down_tiles;  // tiles of down's rows
  uint32_t sum_tiles;   // items that sum up columns, 0 where somebody else does
};

// How a kernel's tiles are shared out: kGroups consumer warpgroups, each with kHeight blocks of 64 rows of weights;
// kMost tokens at most; kPanels panels a stage.
template <uint32_t kGroups_, uint32_t kHeight_, int kMost_, uint32_t kPanels_>
struct Tile {
  static constexpr uint32_t kGroups = kGroups_;
  static constexpr uint32_t kHeight = kHeight_;
  static constexpr int kMost = kMost_;
  static constexpr uint32_t kPanels = kPanels_;
  // With so few tokens the kernel may be alone.
  static constexpr bool kMayBeAlone = kMost <= 64;
  static constexpr uint32_t kRows = kGroups * kHeight * kBlockRows;
  static constexpr uint32_t kPanelBytes = kRows * kRowBytes;  // of weights
};

enum class TileId : uint32_t { kOneToken, kFew, kMany };

// Few tokens an expert: memory is what counts, and rows of weights are read 256 bytes at a time.
using Few = Tile<2, 1, 64, 2>;
using Many = Tile<2, 2, kMostTokens, 1>;

// The choice for a shape.
struct Config {
  TileId tile;
  uint32_t rows;        // of weights in a tile
  uint32_t token_tile;  // most tokens of a tile
  uint32_t stages;
  uint32_t shared_bytes;
  bool alone;  // the kernel sorts pairs and sums up, and no other launch is needed for that
};

struct Problem {
  uint64_t tokens;
  uint64_t experts;
  uint64_t topk;
  uint64_t hidden;
  uint64_t intermediate;
  uint64_t shared_limit;  // bytes a block may have
  uint64_t multiprocessors;
};

// Up to so many tokens the kernel permutes and combines: every block sorts all pairs, and a warpgroup sums up 64
// columns, each in a microsecond or two, less than another launch.
constexpr uint64_t kMostAlone = 64;

constexpr uint64_t least(uint64_t a, uint64_t b) {
  return a < b ? a : b;
}

// Shared memory beside the stages: results on their way out, the queue of items, the schedule, barriers.
constexpr uint64_t fixed_bytes(uint64_t groups, uint64_t experts, uint64_t pairs_here) {
  return groups * kOutBytes + (32 + 16) * kQueue + 4 * 2 * (experts + 1 + pairs_here);
}
constexpr uint64_t kStageBarriers = 16;

template <class Shape>
constexpr Config fit(TileId tile, uint64_t token_tile, const Problem& problem) {
  Config config = {};
  config.tile = tile;
  config.rows = Shape::kRows;
  config.token_tile = static_cast<uint32_t>(least(token_tile, Shape::kMost));
  const uint64_t stage = uint64_t{Shape::kPanels} * kRowBytes * (Shape::kRows + config.token_tile);
  config.alone = problem.tokens <= kMostAlone;
  const uint64_t pairs_here = config.alone ? problem.tokens * problem.topk : 0;
  const uint64_t fixed = fixed_bytes(Shape::kGroups, problem.experts, pairs_here);
  config.stages = static_cast<uint32_t>(least((problem.shared_limit - fixed) / (stage + kStageBarriers), kMostStages));
  config.shared_bytes = static_cast<uint32_t>(fixed + config.stages * (stage + kStageBarriers));
  return config;
}

// A single token's kernel (one_token.cuh): steps of 512 bytes that a block's warps have on their way, shared evenly
// among them. 120 KiB a multiprocessor, where 40 would keep memory busy, for the time in which all wait for h.
constexpr uint32_t kOneTokenRing = 242;

// The steps, x, h, three barriers and a word.
constexpr uint64_t one_token_bytes(uint32_t warps, const Problem& problem) {
  return kOneTokenRing / warps * warps * 512 + 2 * (problem.hidden + problem.topk * problem.intermediate) + 4 * 8;
}

constexpr uint64_t turns(uint64_t rows, uint32_t warps) {
  return (rows + warps - 1) / warps;
}

// How many warps: they take a block's rows of either product by turns, and where few are left for the last turn memory
// rests. As if that took as long as all others.
constexpr uint32_t one_token_warps(const Problem& problem) {
  const uint64_t columns = problem.topk * problem.intermediate;
  const uint64_t gated = (columns + problem.multiprocessors - 1) / problem.multiprocessors;
  const uint64_t summed = (problem.hidden + problem.multiprocessors - 1) / problem.multiprocessors;
  uint32_t best = 0;
  uint64_t least_rows = 0;
  for (const uint32_t warps : {24u, 22u, 20u}) {
    const uint64_t rows = warps * (turns(gated, warps) * 2 * problem.hidden + turns(summed, warps) * columns);
    if (best != 0 && rows >= least_rows) continue;
    best = warps;
    least_rows = rows;
  }
  return best;
}

constexpr Config choose(const Problem& problem) {
  if (problem.tokens == 1) {
    const uint32_t warps = one_token_warps(problem);
    const uint64_t bytes = one_token_bytes(warps, problem);
    if (bytes <= problem.shared_limit) {
      return {TileId::kOneToken, 1, 1, kOneTokenRing / warps, static_cast<uint32_t>(bytes), true};
    }
  }
  const uint64_t pairs = problem.tokens * problem.topk;
  const uint64_t hit = least(pairs, problem.experts);
  const uint64_t mean = hit == 0 ? 0 : (pairs + hit - 1) / hit;
  // Twice the mean holds nearly every expert's tokens; a fuller one has several tiles and reads its weights again from
  // the second-level cache. No expert has a token twice.
  const uint64_t wanted = least(2 * mean + 8, problem.tokens);
  const uint64_t token_tile = wanted <= 8 ? 8 : (wanted + 15) / 16 * 16;
  // Above, two tiles an expert of Few's would be the rule.
  return mean <= 64 ? fit<Few>(TileId::kFew, token_tile, problem) : fit<Many>(TileId::kMany, token_tile, problem);
}

// A Hopper and the shapes of named models.
constexpr Config choose_there(uint64_t tokens, uint64_t experts, uint64_t topk, uint64_t hidden = 2048,
                              uint64_t intermediate = 768) {
  return choose({tokens, experts, topk, hidden, intermediate, 227 * 1024, 132});
}
// Qwen3-30B-A3B, DeepSeekMoE-16B, DeepSeek-V3 and Mixtral-8x7B: 24, 22, 22 and 20 warps.
static_assert(choose_there(1, 128, 8).tile == TileId::kOneToken && choose_there(1, 128, 8).stages == 10);
static_assert(choose_there(1, 64, 6, 2048, 1408).stages == 11 && choose_there(1, 256, 8, 7168, 2048).stages == 11);
static_assert(choose_there(1, 8, 2, 4096, 14336).stages == 12 && choose_there(1, 8, 2, 4096, 14336).rows == 1);
static_assert(choose_there(1, 64, 32, 4096, 14336).tile == TileId::kFew);
static_assert(choose_there(2, 64, 6).tile == TileId::kFew && choose_there(2, 64, 6).token_tile == 8);
static_assert(choose_there(3, 64, 6).stages == 6 && choose_there(512, 128, 8).token_tile == 64);
static_assert(choose_there(16384, 64, 6).token_tile == 176 && choose_there(16384, 256, 8).stages == 4);
static_assert(choose_there(4096, 1024, 32).stages >= 3);

// Most tiles of tokens, whatever the routing: an expert's last one may be nearly empty.
constexpr uint64_t most_tiles(const Config& config, uint64_t pairs, uint64_t experts) {
  return least(pairs, experts) + pairs / config.token_tile;
}

}  // namespace anabranch::experts
