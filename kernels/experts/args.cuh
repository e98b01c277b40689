// What the experts' kernel is given, and how its tiles are cut: a pure function of the shape and the device.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace anabranch::experts {

// Columns of both operands, of the inner dimension, that a stage holds: 128 bytes, the swizzle's width.
constexpr uint32_t kDepth = 64;
constexpr uint32_t kRowBytes = kDepth * 2;
// Rows of weights of one product: wgmma's M.
constexpr uint32_t kBlockRows = 64;
// Most tokens of a tile: wgmma's N.
constexpr uint32_t kMostTokens = 192;
constexpr uint32_t kMostStages = 24;
// Items that the weights' producer may be ahead of the consumers.
constexpr uint32_t kQueue = 2;

struct Args {
  // Weights as [E, rows / 16, 2, 8, columns]: a box is whole groups of 16 rows. In a group of gate_up's, eight rows of
  // the gate stand before the same eight of up; in one of down's, the even rows before the odd ones.
  CUtensorMap gate_up;
  CUtensorMap down;
  const uint16_t* x;        // [T, d] bf16
  const uint32_t* offsets;  // [E + 1]
  const uint32_t* slots;    // [R]
  const int32_t* inverse;   // [T, K]
  const float* weights;     // [T, K]
  uint16_t* h;              // [R, n] bf16
  uint16_t* y;              // [R, d] bf16
  uint16_t* out;            // [T, d] bf16, or null: somebody else combines
  uint32_t* next_item;      // zero before the launch, as all progress
  uint32_t* gated;          // [token tiles]: warpgroups that have written their part of a tile's h
  uint32_t* summed;         // [d / 64]: tiles of y that are written, for each 64 columns
  uint32_t num_tokens;
  uint32_t num_rows;  // R = T K
  uint32_t num_experts;
  uint32_t topk;
  uint32_t hidden;
  uint32_t intermediate;
  uint32_t token_tile;  // most tokens of a tile, a multiple of 8
  uint32_t stages;
  uint32_t gate_tiles;  // tiles of gate_up's rows
  uint32_t down_tiles;  // tiles of down's rows
};

// The choice for a shape.
struct Config {
  uint32_t rows;        // of weights in a tile: 64 (one consumer warpgroup) or 256 (two)
  uint32_t token_tile;  // most tokens of a tile
  uint32_t stages;
  uint32_t shared_bytes;
  bool combines;  // the last tile of 64 columns sums them up, and no other launch is needed
};

struct Problem {
  uint64_t tokens;
  uint64_t experts;
  uint64_t topk;
  uint64_t shared_limit;  // bytes a block may have
};

// Up to so many tokens the kernel combines: what a warpgroup then does at the end for 64 columns takes a microsecond or
// two, less than another launch.
constexpr uint64_t kMostCombined = 64;

constexpr uint64_t least(uint64_t a, uint64_t b) {
  return a < b ? a : b;
}

// Shared memory beside the stages: the queue of items, rows of a tile, flags, the schedule, barriers.
constexpr uint64_t fixed_bytes(uint64_t experts) {
  return (32 + 16) * kQueue + 4 * kMostTokens + 16 + 4 * 2 * (experts + 1);
}
constexpr uint64_t kStageBarriers = 16;

constexpr Config choose(const Problem& problem) {
  Config config = {};
  const uint64_t pairs = problem.tokens * problem.topk;
  const uint64_t hit = least(pairs, problem.experts);
  const uint64_t mean = hit == 0 ? 0 : (pairs + hit - 1) / hit;
  // Twice the mean holds nearly every expert's tokens; a fuller one has several tiles and reads its weights again from
  // the second-level cache. No expert has a token twice.
  const uint64_t wanted = least(2 * mean + 8, problem.tokens);
  config.rows = mean > 8 ? 256 : 64;
  const uint64_t most = config.rows == 64 ? 64 : kMostTokens;
  const uint64_t rounded = wanted <= 8 ? 8 : (wanted + 15) / 16 * 16;
  config.token_tile = static_cast<uint32_t>(least(rounded, most));
  const uint64_t stage = uint64_t{kRowBytes} * (config.rows + config.token_tile);
  const uint64_t fixed = fixed_bytes(problem.experts);
  config.stages = static_cast<uint32_t>(least((problem.shared_limit - fixed) / (stage + kStageBarriers), kMostStages));
  config.shared_bytes = static_cast<uint32_t>(fixed + config.stages * (stage + kStageBarriers));
  config.combines = problem.tokens <= kMostCombined;
  return config;
}

constexpr uint64_t kHopper = 227 * 1024;
static_assert(choose({1, 64, 6, kHopper}).rows == 64 && choose({1, 64, 6, kHopper}).token_tile == 8);
static_assert(choose({1, 64, 6, kHopper}).stages == 24 && choose({64, 256, 8, kHopper}).token_tile == 16);
static_assert(choose({16384, 64, 6, kHopper}).token_tile == 192 && choose({16384, 256, 8, kHopper}).stages == 4);
static_assert(choose({4096, 1024, 32, kHopper}).stages == 3);

// Most tiles of tokens, whatever the routing.
constexpr uint64_t most_tiles(uint64_t pairs, uint64_t experts, uint64_t token_tile) {
  return least(pairs, experts) + pairs / token_tile;
}

}  // namespace anabranch::experts
