// The combine's kernel: a warp sums 32 vectors of a token's rows.
#pragma once

#include <cstdint>

#include "common/bf16.cuh"
#include "common/warp.cuh"
#include "ptx/grid_dependency.cuh"

namespace anabranch::combine {

constexpr uint32_t kThreads = 256;
constexpr uint32_t kWarps = kThreads / kWarpSize;
// Rows whose loads are in flight together.
constexpr uint32_t kRows = 4;

struct Args {
  const uint4* y;            // [R, vectors]
  const int32_t* inverse;    // [T, K]
  const float* weights;      // [T, K]
  const uint4* shared;       // [T, vectors] or null
  const float* shared_gate;  // [T] or null
  void* out;                 // [T, vectors]
  uint32_t num_items;        // T * items_per_token
  uint32_t num_rows;         // R
  uint32_t topk;             // K
  uint32_t vectors;          // of a row
  uint32_t items_per_token;  // ceil(vectors / 32)
};

// How the result is stored: vector `at` of all.
struct Bf16Out {
  static __device__ __forceinline__ void store(void* out, uint64_t at, const float (&x)[kVector]) {
    static_cast<uint4*>(out)[at] = pack(x);
  }
};

struct FloatOut {
  static __device__ __forceinline__ void store(void* out, uint64_t at, const float (&x)[kVector]) {
    float4* to = static_cast<float4*>(out) + 2 * at;
    to[0] = make_float4(x[0], x[1], x[2], x[3]);
    to[1] = make_float4(x[4], x[5], x[6], x[7]);
  }
};

__device__ __forceinline__ void add_scaled(float (&sum)[kVector], float weight, const uint4& packed) {
  float x[kVector];
  unpack(x, packed);
#pragma unroll
  for (uint32_t i = 0; i < kVector; ++i) sum[i] = fmaf(weight, x[i], sum[i]);
}

template <typename Out>
__global__ void __launch_bounds__(kThreads) sum_rows(const __grid_constant__ Args args) {
  // What the launch before writes is not read through the read-only cache (__ldg): the two may overlap.
  ptx::launch_dependents();
  ptx::wait_for_prerequisites();
  const uint32_t lane = threadIdx.x % kWarpSize;
  const uint32_t item = blockIdx.x * kWarps + threadIdx.x / kWarpSize;
  if (item >= args.num_items) return;
  const uint64_t token = item / args.items_per_token;
  const uint32_t at = item % args.items_per_token * kWarpSize + lane;
  const bool inside = at < args.vectors;

  // Lane k holds slot k.
  uint32_t row = args.num_rows;
  float weight = 0.0f;
  if (lane < args.topk) {
    row = static_cast<uint32_t>(args.inverse[token * args.topk + lane]);
    weight = args.weights[token * args.topk + lane];
  }
  uint4 shared = make_uint4(0, 0, 0, 0);
  if (args.shared != nullptr && inside) shared = args.shared[token * args.vectors + at];

  float sum[kVector] = {};
  for (uint32_t base = 0; base < args.topk; base += kRows) {
    uint4 value[kRows];
    float factor[kRows];
    bool present[kRows];
#pragma unroll
    for (uint32_t i = 0; i < kRows; ++i) {
      // Lanes past the last slot hold no row. kRows divides the warp: no shuffle goes past its last lane.
      const uint32_t source = __shfl_sync(kFullWarp, row, base + i);
      factor[i] = __shfl_sync(kFullWarp, weight, base + i);
      present[i] = source < args.num_rows;
      value[i] = make_uint4(0, 0, 0, 0);
      if (present[i] && inside) value[i] = args.y[uint64_t{source} * args.vectors + at];
    }
#pragma unroll
    for (uint32_t i = 0; i < kRows; ++i) {
      if (present[i]) add_scaled(sum, factor[i], value[i]);
    }
  }
  if (args.shared != nullptr) {
    const float gate = args.shared_gate == nullptr ? 1.0f : 1.0f / (1.0f + expf(-args.shared_gate[token]));
    add_scaled(sum, gate, shared);
  }
  if (inside) Out::store(args.out, token * args.vectors + at, sum);
}

static_assert(kWarpSize % kRows == 0);

}  // namespace anabranch::combine
