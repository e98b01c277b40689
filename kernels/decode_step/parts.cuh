// Sums over keys that several blocks have parts of, and how they become one.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/warp.cuh"
#include "decode_step/args.cuh"
#include "decode_step/words.cuh"
#include "ptx/math.cuh"

namespace anabranch::decode_step {

// The parts of one key head. Whole blocks call what receives.
struct Parts {
  const Words& words;
  uint32_t value_dim;
  uint32_t splits;
  float* factors;  // shared memory: [splits, rows]
  uint32_t epoch;

  // Words from a part's sums to the next's.
  __device__ __forceinline__ uint64_t pitch() const { return uint64_t{kRows} * value_dim; }

  // Factors of `rows` rows from the first-th on, of the blocks from `block` on.
  __device__ __forceinline__ void receive_factors(uint32_t block, uint32_t first, uint32_t rows) const {
    const uint32_t lane = threadIdx.x % kWarpSize;
#pragma unroll 1
    for (uint32_t row = threadIdx.x / kWarpSize; row < rows; row += kWarps) {
      const Word* const statistics = words.statistics + (block * kRows + first + row) * 2;
      float maximum = -INFINITY;
#pragma unroll 1
      for (uint32_t part = lane; part < splits; part += kWarpSize) {
        const float of_part = __uint_as_float(receive_two(statistics + part * kRows * 2, epoch).first);
        factors[part * rows + row] = of_part;
        maximum = fmaxf(maximum, of_part);
      }
      maximum = warp_max(maximum);
      const float base = maximum == -INFINITY ? 0.0f : maximum;
      float sum = 0.0f;
#pragma unroll 1
      for (uint32_t part = lane; part < splits; part += kWarpSize) {
        const float factor = ptx::ex2_approx(factors[part * rows + row] - base);
        sum = fmaf(factor, __uint_as_float(receive_two(statistics + part * kRows * 2, epoch).second), sum);
        factors[part * rows + row] = factor;
      }
      sum = warp_sum(sum);
      const float reciprocal = sum == 0.0f ? 0.0f : 1.0f / sum;
#pragma unroll 1
      for (uint32_t part = lane; part < splits; part += kWarpSize) factors[part * rows + row] *= reciprocal;
    }
    __syncthreads();
  }

  // Two elements of some parts, on their way.
  struct Batch {
    static constexpr uint32_t kParts = 4;
    Word first[kParts];
    Word second[kParts];
  };

  // Asks for two elements of the parts from `part` on, of which `from` is the first's.
  __device__ __forceinline__ void ask(Batch& batch, const Word* from, uint32_t part) const {
#pragma unroll
    for (uint32_t i = 0; i < Batch::kParts; ++i) {
      if (part + i < splits) ptx::ld_relaxed_2(from + (part + i) * pitch(), batch.first[i], batch.second[i]);
    }
  }

  // Two elements' sums over all parts, of which the first are on their way, by the factors of row `row` of `rows`.
  __device__ __forceinline__ float2 sum(Batch& batch, const Word* from, uint32_t row, uint32_t rows) const {
    float2 sum = {};
#pragma unroll 1
    for (uint32_t part = 0; part < splits; part += Batch::kParts) {
      if (part > 0) ask(batch, from, part);
#pragma unroll
      for (uint32_t i = 0; i < Batch::kParts; ++i) {
        if (part + i >= splits) continue;
        const Two two = received(from + (part + i) * pitch(), batch.first[i], batch.second[i], epoch);
        const float factor = factors[(part + i) * rows + row];
        sum.x = fmaf(factor, __uint_as_float(two.first), sum.x);
        sum.y = fmaf(factor, __uint_as_float(two.second), sum.y);
      }
    }
    return sum;
  }
};

}  // namespace anabranch::decode_step
