// Tiles of the grouped GEMM, and which one a shape gets: plain arithmetic, checked where it is compiled.
#pragma once

#include <cstdint>

namespace anabranch::grouped_gemm {

// A step of the main loop covers 64 elements of the inner dimension, 128 bytes of a row: eight chunks of 16 bytes,
// which are swizzled within the row so that both copies and ldmatrix touch every bank once.
constexpr uint32_t kStepDepth = 64;
constexpr uint32_t kRowBytes = 128;
// Slices of a step: one mma is 16 deep.
constexpr uint32_t kSlices = kStepDepth / 16;

// kM rows of x by kN rows of the weights, split among kWarpsM x kWarpsN warps, kStages steps in shared memory.
template <int kM_, int kN_, int kWarpsM_, int kWarpsN_, int kStages_, int kBlocksPerSm_>
struct TileShape {
  static constexpr uint32_t kM = kM_;
  static constexpr uint32_t kN = kN_;
  static constexpr uint32_t kWarpsM = kWarpsM_;
  static constexpr uint32_t kWarpsN = kWarpsN_;
  static constexpr uint32_t kStages = kStages_;
  static constexpr uint32_t kBlocksPerSm = kBlocksPerSm_;
  static constexpr uint32_t kThreads = 32 * kWarpsM * kWarpsN;
  // Part of one warp, and how many 16 x 8 products that is.
  static constexpr uint32_t kWarpM = kM / kWarpsM;
  static constexpr uint32_t kWarpN = kN / kWarpsN;
  static constexpr uint32_t kMmaM = kWarpM / 16;
  static constexpr uint32_t kMmaN = kWarpN / 8;
  // A pass of copies: eight threads a row.
  static constexpr uint32_t kRowsPerPass = kThreads / 8;
  static constexpr uint32_t kPassesA = kM / kRowsPerPass;
  static constexpr uint32_t kPassesB = kN / kRowsPerPass;
  static constexpr uint32_t kBytesA = kM * kRowBytes;
  static constexpr uint32_t kStageBytes = (kM + kN) * kRowBytes;

  static_assert(kWarpM % 16 == 0 && kWarpN % 16 == 0, "ldmatrix.x4 takes 16 rows of either operand");
  static_assert(kM % kRowsPerPass == 0 && kN % kRowsPerPass == 0, "passes are whole");
  static_assert(kRowsPerPass % 16 == 0, "gate and up rows alternate by eight, the same way in every pass");
  static_assert(kM <= kThreads, "a thread looks up one row");
  static_assert(kStages >= 2, "one step is read while others are under way");
};

// Few tokens an expert: weights pass through once. Seven stages keep 48 KiB of weights a block under way, so that a
// block or two on a multiprocessor already draw its share of the memory's bandwidth.
using Rows16 = TileShape<16, 64, 1, 4, 7, 3>;
// Between: an expert's rows in one tile still, so that its weights pass once through the second-level cache.
using Rows32 = TileShape<32, 128, 1, 4, 3, 3>;
using Rows64 = TileShape<64, 128, 2, 2, 3, 3>;
// Many rows. A warp's 64 x 64 keep shared memory (128 bytes a clock) behind the tensor cores; two blocks a
// multiprocessor hide each other's epilogue.
using Rows128 = TileShape<128, 128, 2, 2, 3, 2>;
// The same warps, half as many bytes of x for each product.
using Rows128Wide = TileShape<128, 256, 2, 4, 4, 1>;

enum class TileId : uint32_t { kRows16, kRows32, kRows64, kRows128, kRows128Wide };
constexpr uint32_t kTileCount = 5;

// Dynamic shared memory of a block: stages, a tile's rows, offsets and first tiles of the experts.
template <class Tile>
__host__ __device__ constexpr uint32_t shared_bytes(uint32_t experts) {
  return Tile::kStages * Tile::kStageBytes + 4 * (Tile::kM + 2 * (experts + 1));
}

// What the choice hangs on.
struct Work {
  // Most rows of all experts together, and how many experts share them.
  uint64_t rows;
  uint32_t experts;
  // Rows of an expert's weights.
  uint32_t weight_rows;
  uint32_t multiprocessors;
  // Most shared memory of a block.
  uint32_t shared_limit;
};

constexpr uint64_t divide_up(uint64_t a, uint64_t b) {
  return (a + b - 1) / b;
}

constexpr uint64_t root(uint64_t x) {
  uint64_t y = x;
  while (y > x / (y == 0 ? 1 : y)) y = (y + x / y) / 2;
  return y;
}

// Clocks of a multiprocessor for one 16-deep slice of a tile: bytes at the 28 a clock that the second-level cache
// delivers, or products at 85% of the 1270 a clock that mma.sync reaches (both of an H200, from published numbers).
template <class Tile>
constexpr uint64_t slice_clocks() {
  const uint64_t bytes = (Tile::kM + Tile::kN) * 32 / 28;
  const uint64_t products = Tile::kM * Tile::kN * 16 / 1080;
  return bytes > products ? bytes : products;
}

template <class Tile>
constexpr uint64_t clocks(const Work& work) {
  if (shared_bytes<Tile>(work.experts) > work.shared_limit) return UINT64_MAX;
  const uint64_t hit = work.rows < work.experts ? work.rows : work.experts;
  const uint64_t mean = divide_up(work.rows, hit);
  // Of several experts one has more rows than another: by a standard deviation, say.
  const uint64_t rows = work.experts == 1 ? mean : mean + root(mean);
  const uint64_t tiles = hit * divide_up(rows, Tile::kM) * divide_up(work.weight_rows, Tile::kN);
  return divide_up(tiles, work.multiprocessors) * slice_clocks<Tile>();
}

// The tile that should take least time; a larger one must promise an eighth less. `rows` and `weight_rows` are not 0.
constexpr TileId choose_tile(const Work& work) {
  const uint64_t all[kTileCount] = {clocks<Rows16>(work), clocks<Rows32>(work), clocks<Rows64>(work),
                                    clocks<Rows128>(work), clocks<Rows128Wide>(work)};
  uint32_t best = 0;
  for (uint32_t tile = 1; tile < kTileCount; ++tile) {
    if (all[tile] < all[best] - all[best] / 8) best = tile;
  }
  return static_cast<TileId>(best);
}

namespace checks {

// On an H200: rows, experts, weight rows.
constexpr TileId h200(uint64_t rows, uint32_t experts, uint32_t weight_rows) {
  return choose_tile({rows, experts, weight_rows, 132, 227 * 1024});
}

// Qwen3-30B-A3B, first product, T = 1, 64, 512, 16,384.
static_assert(h200(8, 128, 1536) == TileId::kRows16);
static_assert(h200(512, 128, 1536) == TileId::kRows16);
static_assert(h200(4096, 128, 1536) == TileId::kRows64);
static_assert(h200(131072, 128, 1536) == TileId::kRows128Wide);
// DeepSeek-V3, T = 512: 16 rows an expert, give or take four.
static_assert(h200(4096, 256, 4096) == TileId::kRows32);
// Dense: a projection of one token, of 128 (small tiles, so that most multiprocessors have one), of 16,384.
static_assert(h200(1, 1, 2048) == TileId::kRows16);
static_assert(h200(128, 1, 2048) == TileId::kRows16);
static_assert(h200(16384, 1, 4096) == TileId::kRows128Wide);
// 99 KiB of shared memory (8.6, 8.9) hold no wide tile, and with 1,024 experts no large one.
static_assert(choose_tile({131072, 128, 1536, 128, 99 * 1024}) == TileId::kRows128);
static_assert(choose_tile({131072, 1024, 1536, 128, 99 * 1024}) == TileId::kRows64);
static_assert(root(0) == 0 && root(1) == 1 && root(15) == 3 && root(16) == 4);

}  // namespace checks

}  // namespace anabranch::grouped_gemm
