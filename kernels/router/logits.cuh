// The gate product for few tokens: a block takes 16 experts and up to 32 tokens, and its warps share the hidden size.
#pragma once

#include <cstdint>

#include "common/warp.cuh"
#include "ptx/grid_dependency.cuh"
#include "ptx/mma.cuh"

namespace anabranch::router {

constexpr uint32_t kLogitExperts = 16;  // of a block: the rows of an mma
constexpr uint32_t kLogitWarps = 16;
constexpr uint32_t kLogitThreads = kLogitWarps * kWarpSize;
constexpr uint32_t kLogitChunk = 32;  // elements of the hidden size that a warp takes at a time: 8 a lane of four

struct LogitsArgs {
  const uint4* x;     // [T, vectors]
  const uint4* gate;  // [E, vectors]
  const float* bias;  // [E] or null
  float* logits;      // [T, E]
  uint32_t num_tokens;
  uint32_t num_experts;
  uint32_t vectors;  // of a row: d / 8
};

// Eight elements of a row, zeros where there is no row or the row has ended.
__device__ __forceinline__ uint4 load_vector(const uint4* rows, bool there, uint32_t row, uint32_t vectors,
                                             uint32_t at) {
  return there && at < vectors ? rows[uint64_t{row} * vectors + at] : make_uint4(0, 0, 0, 0);
}

// kTiles tiles of 8 tokens. The order of a sum hangs on d alone: chunk c goes to warp c % 16, a warp adds its chunks in
// order, and the warps' sums are added in order. mma asks which elements of the hidden size a lane holds only to agree
// between its operands, so a lane takes eight neighbours, one load, for two products. Tokens are columns of mma: one's
// NaN stays with it.
template <uint32_t kTiles>
static __global__ void __launch_bounds__(kLogitThreads) multiply_gate(const __grid_constant__ LogitsArgs args) {
  ptx::launch_dependents();
  ptx::wait_for_prerequisites();
  constexpr uint32_t kTokens = 8 * kTiles;
  __shared__ float sums[kLogitWarps][kTokens][kLogitExperts + 1];
  const uint32_t warp = threadIdx.x / kWarpSize;
  const uint32_t lane = threadIdx.x % kWarpSize;
  const uint32_t first_expert = blockIdx.x * kLogitExperts;
  const uint32_t first_token = blockIdx.y * kTokens;
  const uint32_t row = lane / 4;
  const uint32_t expert = first_expert + row;

  float c[kTiles][4] = {};
  const uint32_t chunks = (args.vectors + 3) / 4;
#pragma unroll 4
  for (uint32_t chunk = warp; chunk < chunks; chunk += kLogitWarps) {
    const uint32_t at = chunk * 4 + lane % 4;
    const uint4 low = load_vector(args.gate, expert < args.num_experts, expert, args.vectors, at);
    const uint4 high = load_vector(args.gate, expert + 8 < args.num_experts, expert + 8, args.vectors, at);
    uint4 x[kTiles];
#pragma unroll
    for (uint32_t tile = 0; tile < kTiles; ++tile) {
      const uint32_t token = first_token + tile * 8 + row;
      x[tile] = load_vector(args.x, token < args.num_tokens, token, args.vectors, at);
    }
#pragma unroll
    for (uint32_t tile = 0; tile < kTiles; ++tile) {
      ptx::mma_m16n8k16_bf16(c[tile], {low.x, high.x, low.y, high.y}, {x[tile].x, x[tile].y});
      ptx::mma_m16n8k16_bf16(c[tile], {low.z, high.z, low.w, high.w}, {x[tile].z, x[tile].w});
    }
  }
#pragma unroll
  for (uint32_t tile = 0; tile < kTiles; ++tile) {
    const uint32_t token = tile * 8 + lane % 4 * 2;
    sums[warp][token][row] = c[tile][0];
    sums[warp][token + 1][row] = c[tile][1];
    sums[warp][token][row + 8] = c[tile][2];
    sums[warp][token + 1][row + 8] = c[tile][3];
  }
  __syncthreads();
  const uint32_t mine = threadIdx.x % kLogitExperts;
  for (uint32_t token = threadIdx.x / kLogitExperts; token < kTokens; token += kLogitThreads / kLogitExperts) {
    if (first_token + token >= args.num_tokens || first_expert + mine >= args.num_experts) continue;
    float sum = args.bias == nullptr ? 0.0f : args.bias[first_expert + mine];
#pragma unroll
    for (uint32_t i = 0; i < kLogitWarps; ++i) sum += sums[i][token][mine];
    args.logits[uint64_t{first_token + token} * args.num_experts + first_expert + mine] = sum;
  }
}

}  // namespace anabranch::router
