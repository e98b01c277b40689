// What the kernel of a decode step is given, and where things are in a block's shared memory.
#pragma once

#include <cstdint>

#include "anabranch.h"
#include "attention/args.cuh"
#include "common/bf16.cuh"
#include "common/warp.cuh"
#include "router/args.cuh"

namespace anabranch::decode_step {

// Few, because all of them do what little there is to do between products.
constexpr uint32_t kWarps = 8;
constexpr uint32_t kThreads = kWarps * kWarpSize;
// Elements of a row that a step of weights has, of each of 16 rows.
constexpr uint32_t kChunk = 32;
constexpr uint32_t kChunkBytes = kChunk * 2;
constexpr uint32_t kStreamBytes = 16 * kChunkBytes;
// Steps of weights that a warp has on their way: as many as there is room for. While blocks wait for one another, the
// next product's weights come.
__host__ __device__ constexpr uint32_t depth_of(bool latent) {
  return latent ? 6 : 9;
}
__host__ __device__ constexpr uint32_t ring_bytes(bool latent) {
  return kWarps * depth_of(latent) * kStreamBytes;
}
constexpr uint32_t kMaxLayers = ANABRANCH_DECODE_LAYERS;
// Pairs of the residual stream's elements that a thread keeps in registers.
constexpr uint32_t kPairs = 8;
constexpr uint32_t kMaxHidden = 2 * kPairs * kThreads;
// Slots of a token: routed and shared experts.
constexpr uint32_t kMaxSlots = 32;
constexpr uint32_t kMaxExperts = 256;
// Query heads of a key head: rows of an mma.
constexpr uint32_t kRows = 16;
constexpr uint32_t kMaxRotated = 128;  // pairs of elements of a head

// One word between blocks: 32 bits, and the epoch that they are of.
using Word = unsigned long long;

// A head's norm and rotation.
struct Heads {
  const float* frequencies;  // [pairs]
  float attention_factor;
  float eps;
  uint32_t first;  // of the rotated elements of a head
  uint32_t pairs;
  bool interleaved;
};

// Words of a layer's hand-overs, each buffer on 16 bytes. They are used again by the next layer: between two layers,
// every block has waited for all others twice.
struct Words {
  Word* projected;   // rows of the first products, a float each
  Word* absorbed;    // [heads, key_dim], two bf16 each
  Word* parts;       // [blocks, 16, value_dim], a float each
  Word* statistics;  // [blocks, 16, 2]: maximum and sum
  Word* attended;    // [heads, value_dim], two bf16 each
  Word* expanded;    // [heads, o_dim], two bf16 each
  Word* attention;   // [d]: what attention adds to the residual stream, a float each
  Word* logits;      // [E], a float each
  Word* h;           // [slots, n], two bf16 each
  Word* experts;     // [d], as attention
};

constexpr uint32_t kProducts = 7;

// How a product is cut among blocks: block b has base units, the first `extra` blocks one more.
struct Cut {
  uint32_t base;
  uint32_t extra;
  uint32_t width;   // elements of a slot
  uint32_t chunks;  // of all slots
  uint32_t unit_bits;
  uint32_t tile_bits;
  uint32_t group_bits;
};

// Division by multiplication, of numbers whose product with the divisor is below 2^31.
struct Divisor {
  uint32_t reciprocal;

  __host__ __device__ static Divisor of(uint32_t divisor) {
    return {divisor == 0 ? 0 : static_cast<uint32_t>(((uint64_t{1} << 31) + divisor - 1) / divisor)};
  }
  __host__ __device__ __forceinline__ uint32_t quotient(uint32_t number) const {
    return static_cast<uint32_t>(uint64_t{number} * reciprocal >> 31);
  }
};

struct Args {
  AnabranchDecodeLayer layers[kMaxLayers];
  uint32_t num_layers;
  uint16_t* x;      // [d] bf16: the residual stream
  uint32_t* epoch;  // of the last layer of the launch before
  Words words;
  attention::Args attention;  // one sequence with one query
  const int32_t* position;
  const int32_t* cache_row;  // of the new key
  Heads heads;
  router::Args router;
  bool ranks_plainly;  // the largest logits are chosen, nothing else
  uint32_t hidden;
  float norm_eps;
  uint32_t q_dim;          // of a head that is projected
  uint32_t o_dim;          // of a head that goes into the output product
  uint32_t intermediate;   // n of an expert
  uint32_t dense;          // n of a layer without experts
  uint32_t shared;         // experts that every token visits
  uint32_t sums_bytes;     // of shared memory
  Cut cuts[2][kProducts];  // of layers without and with experts
  Divisor of_intermediate;
  Divisor of_intermediate_chunks;
  Divisor of_dense;
  Divisor of_dense_chunks;
};

// A tile of keys and values in shared memory.
template <bool kLatent>
struct TileOf {
  static constexpr uint32_t kKeys = kLatent ? 32 : 64;
  static constexpr uint32_t kStages = kLatent ? 1 : 2;
};

// A merge's factors and totals of at most so many parts, in place of the keys.
constexpr uint32_t kMostBlocks = 256;
constexpr uint32_t kFactorBytes = kMostBlocks * kRows * 2 * 4;

__host__ __device__ constexpr uint32_t chunks_of(uint32_t elements) {
  return (elements + kChunk - 1) / kChunk;
}

// Bytes from a row of a matrix to the next: rows four banks further, so that eight of them lie apart.
__host__ __device__ constexpr uint32_t pitch_of(uint32_t elements) {
  return elements * 2 + 16;
}

// Shared memory, in bytes from its start. Attention's part and the vectors that come after it take turns in one place.
struct Places {
  uint32_t x;         // [d] bf16: the norm; vectors are followed by zeros up to whole chunks
  uint32_t q;         // latent: [heads, q_dim] bf16
  uint32_t attended;  // latent: [heads, value_dim] bf16
  uint32_t sums;      // [groups of warps, tiles, 16] floats: of a product's rows
  uint32_t vector;    // the output product's input, or h
  // In the vector's place:
  uint32_t keys;     // [stages, keys, key pitch]
  uint32_t values;   // [stages, keys, value pitch]
  uint32_t query;    // [16 + 2, key pitch] bf16: queries, then the new key and value
  uint32_t fresh;    // [16 + 2, fresh_dim] floats: new queries, key, value
  uint32_t norms;    // [2, key_dim] floats: weights of the norms of queries and keys
  uint32_t scores;   // [parts, 16, keys] floats
  uint32_t weights;  // [16, keys + 8] bf16
  uint32_t bytes;

  template <bool kLatent>
  __host__ __device__ static Places of(const Args& args) {
    using Tile = TileOf<kLatent>;
    const auto up = [](uint32_t bytes) { return (bytes + 127) / 128 * 128; };
    const attention::Args& a = args.attention;
    Places p;
    p.x = ring_bytes(kLatent);
    p.q = p.x + up(chunks_of(args.hidden) * kChunkBytes);
    p.attended = p.q + (kLatent ? up(a.num_heads * chunks_of(args.q_dim) * kChunkBytes) : 0);
    p.sums = p.attended + (kLatent ? up(a.num_heads * chunks_of(a.value_dim) * kChunkBytes) : 0);
    p.vector = p.sums + up(args.sums_bytes);
    p.keys = p.vector;
    p.values = p.keys + Tile::kStages * Tile::kKeys * pitch_of(a.key_dim);
    p.query = kLatent ? p.values : p.values + Tile::kStages * Tile::kKeys * pitch_of(a.value_dim);
    p.fresh = p.query + up((kRows + 2) * pitch_of(a.key_dim));
    p.norms = p.fresh + up((kRows * fresh_dim<kLatent>(args) + a.key_dim + a.value_dim) * 4);
    p.scores = p.norms + up(2 * a.key_dim * 4);
    p.weights = p.scores + kRows * kWarps * 8 * 4;
    uint32_t attention = p.weights + kRows * (Tile::kKeys + 8) * 2 - p.vector;
    if (attention < kFactorBytes) attention = kFactorBytes;
    const uint32_t slots = args.router.topk + args.shared;
    uint32_t wide = chunks_of(a.num_heads * args.o_dim);
    const uint32_t experts = slots * chunks_of(args.intermediate);
    wide = wide > experts ? wide : experts;
    wide = wide > chunks_of(args.dense) ? wide : chunks_of(args.dense);
    p.bytes = p.vector + up(attention > wide * kChunkBytes ? attention : wide * kChunkBytes);
    return p;
  }

  // Elements of a query head that wait as floats for their rotation: the others are final.
  template <bool kLatent>
  __host__ __device__ static uint32_t fresh_dim(const Args& args) {
    return kLatent ? 2 * args.heads.pairs : args.attention.key_dim;
  }
};

}  // namespace anabranch::decode_step
