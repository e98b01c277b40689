// All that a few tokens need before their experts: residual addition, RMS norm, gate product, routing, shared experts.
// One cluster of blocks does it, each with some of the experts' gate rows, and the first of them routes.
#pragma once

#include <cstdint>

#include "common/norm_tokens.cuh"
#include "common/warp.cuh"
#include "moe_layer/front.cuh"
#include "ptx/cluster.cuh"
#include "ptx/grid_dependency.cuh"
#include "ptx/mma.cuh"
#include "router/logits.cuh"

namespace anabranch::moe_layer {

constexpr uint32_t kGateTokens = 8;  // the columns of an mma
constexpr uint32_t kGateBlocks = 8;  // the most that a cluster may have anywhere
constexpr uint32_t kGateWarps = router::kLogitWarps;
constexpr uint32_t kGateThreads = kGateWarps * kWarpSize;
// Chunks of a gate row that a warp asks for before x is there.
constexpr uint32_t kHeld = 4;

struct GateArgs {
  FrontArgs front;           // whose router reads the logits in shared memory
  NormTokens norm;           // of residual and delta
  uint4* residual;           // [T, vectors]
  const uint4* gate;         // [E, vectors]
  uint4* x;                  // [T, vectors]
  float* logits;             // [T, E]
  uint32_t vectors;          // of a row: d / 8
  uint32_t experts_a_block;  // a multiple of 16
};

// A block's shared memory, in bytes from its start.
struct GatePlaces {
  uint32_t pitch;   // vectors from a token's x to the next's: rows four vectors further do not share banks
  uint32_t logits;  // [T, E]
  uint32_t sums;    // [warps, tokens, experts of a tile and one]
  uint32_t router;  // what route_rows asks for
  uint32_t bytes;

  __host__ __device__ GatePlaces(uint32_t tokens, uint32_t vectors, uint32_t experts, uint32_t router_words) {
    pitch = vectors + 4;
    logits = tokens * pitch * 16;
    sums = logits + (tokens * experts + 3) / 4 * 16;
    router = sums + kGateWarps * kGateTokens * (router::kLogitExperts + 1) * 4;
    bytes = router + router_words * 4;
  }
};

// What a lane holds of two gate rows, eight apart, in a chunk.
struct GateChunk {
  uint4 low;
  uint4 high;

  __device__ __forceinline__ void read(const GateArgs& args, uint32_t expert, uint32_t chunk) {
    const uint32_t experts = args.front.router.num_experts;
    const uint32_t at = chunk * 4 + threadIdx.x % 4;
    low = router::load_vector(args.gate, expert < experts, expert, args.vectors, at);
    high = router::load_vector(args.gate, expert + 8 < experts, expert + 8, args.vectors, at);
  }
};

// The product of the block's gate rows with all tokens, to the first block's shared memory and to global memory. A sum
// is that of router_logits, to the bit.
class GateProduct {
 public:
  __device__ __forceinline__ explicit GateProduct(const GateArgs& args)
      : args_(args),
        warp_(threadIdx.x / kWarpSize),
        row_(threadIdx.x % kWarpSize / 4),
        first_(blockIdx.x * args.experts_a_block),
        chunks_((args.vectors + 3) / 4) {}

  // Asks for the first of the block's gate rows.
  __device__ __forceinline__ void hold() {
#pragma unroll
    for (uint32_t i = 0; i < kHeld; ++i) held_[i].read(args_, first_ + row_, warp_ + i * kGateWarps);
  }

  __device__ __forceinline__ void multiply(const GatePlaces& places, const uint4* x, float* sums,
                                           uint32_t mapped_logits) {
    using Sums = float[kGateTokens][router::kLogitExperts + 1];
    Sums* const of_warp = reinterpret_cast<Sums*>(sums);
    const router::Args& router = args_.front.router;
    for (uint32_t tile = 0; tile < args_.experts_a_block; tile += router::kLogitExperts) {
      if (first_ + tile >= router.num_experts) break;
      float c[4] = {};
#pragma unroll
      for (uint32_t i = 0; i < kHeld; ++i) {
        if (tile > 0) held_[i].read(args_, first_ + tile + row_, warp_ + i * kGateWarps);
      }
#pragma unroll
      for (uint32_t i = 0; i < kHeld; ++i) add(c, held_[i], x, places.pitch, warp_ + i * kGateWarps);
#pragma unroll 4
      for (uint32_t chunk = warp_ + kHeld * kGateWarps; chunk < chunks_; chunk += kGateWarps) {
        GateChunk next;
        next.read(args_, first_ + tile + row_, chunk);
        add(c, next, x, places.pitch, chunk);
      }
      const uint32_t token = threadIdx.x % 4 * 2;
      of_warp[warp_][token][row_] = c[0];
      of_warp[warp_][token + 1][row_] = c[1];
      of_warp[warp_][token][row_ + 8] = c[2];
      of_warp[warp_][token + 1][row_ + 8] = c[3];
      __syncthreads();
      const uint32_t mine = threadIdx.x % router::kLogitExperts;
      const uint32_t expert = first_ + tile + mine;
      const uint32_t of = threadIdx.x / router::kLogitExperts;
      if (of < router.num_tokens && expert < router.num_experts) {
        float sum = 0.0f;
#pragma unroll
        for (uint32_t i = 0; i < kGateWarps; ++i) sum += of_warp[i][of][mine];
        const uint32_t at = of * router.num_experts + expert;
        ptx::st_cluster(mapped_logits + at * 4, sum);
        args_.logits[at] = sum;
      }
      __syncthreads();
    }
  }

 private:
  __device__ __forceinline__ void add(float (&c)[4], const GateChunk& w, const uint4* x, uint32_t pitch,
                                      uint32_t chunk) {
    const uint32_t at = chunk * 4 + threadIdx.x % 4;
    uint4 v = {};
    if (row_ < args_.front.router.num_tokens && at < args_.vectors) v = x[row_ * pitch + at];
    ptx::mma_m16n8k16_bf16(c, {w.low.x, w.high.x, w.low.y, w.high.y}, {v.x, v.y});
    ptx::mma_m16n8k16_bf16(c, {w.low.z, w.high.z, w.low.w, w.high.w}, {v.z, v.w});
  }

  const GateArgs& args_;
  uint32_t warp_;
  uint32_t row_;
  uint32_t first_;
  uint32_t chunks_;
  GateChunk held_[kHeld];
};

// x, and the residual stream after the addition, to memory: a share of every token's vectors.
__device__ __forceinline__ void write_tokens(const GateArgs& args, const GatePlaces& places, const uint4* x,
                                             uint32_t share, uint32_t shares) {
  const uint32_t all = args.front.router.num_tokens * args.vectors;
  for (uint32_t i = share * kGateThreads + threadIdx.x; i < all; i += shares * kGateThreads) {
    const uint32_t token = i / args.vectors;
    if (args.norm.delta != nullptr) args.residual[i] = sum_of(args.residual[i], args.norm.delta[i]);
    args.x[i] = x[token * places.pitch + i - token * args.vectors];
  }
}

template <int kValues, class Rule>
__global__ void __launch_bounds__(kGateThreads, 1) gate_tokens(const __grid_constant__ GateArgs args) {
  static_assert(router::Tile<kValues>::kThreads == kGateThreads);
  extern __shared__ __align__(16) char arena[];
  const uint32_t tokens = args.front.router.num_tokens;
  const GatePlaces places(tokens, args.vectors, args.front.router.num_experts, 0);
  uint4* const x = reinterpret_cast<uint4*>(arena);
  float* const logits = reinterpret_cast<float*>(arena + places.logits);
  const uint32_t rank = ptx::cluster_rank();

  // Another block's shared memory may be written once that block runs.
  ptx::cluster_arrive();
  ptx::launch_dependents();
  GateProduct product(args);
  ptx::wait_for_prerequisites();
  product.hold();
  const FrontArgs& front = args.front;
  for (uint32_t i = rank * kGateThreads + threadIdx.x; i < front.progress_words; i += gridDim.x * kGateThreads) {
    front.progress[i] = 0;
  }
  norm_tokens<kGateWarps>(args.norm, x, places.pitch);
  ptx::cluster_wait();
  const uint32_t mapped = ptx::map_shared(static_cast<uint32_t>(__cvta_generic_to_shared(logits)), 0);
  product.multiply(places, x, reinterpret_cast<float*>(arena + places.sums), mapped);
  // From here on, nobody reads the residual stream as it was.
  ptx::cluster_arrive();
  ptx::cluster_wait();
  // The blocks that do not route write; one alone does both.
  if (rank > 0 || gridDim.x == 1) {
    write_tokens(args, places, x, rank > 0 ? rank - 1 : 0, gridDim.x > 1 ? gridDim.x - 1 : 1);
  }
  if (rank > 0) return;
  router::Args router = front.router;
  router.logits = logits;
  router::route_rows<kValues>(Rule::template fixed<kValues>(router),
                              reinterpret_cast<uint32_t*>(arena + places.router));
  __syncwarp();
  const uint32_t warp = threadIdx.x / kWarpSize;
  if (warp < tokens) finish_token(front, warp, threadIdx.x % kWarpSize);
}

}  // namespace anabranch::moe_layer
