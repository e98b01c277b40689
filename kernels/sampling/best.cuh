// The argmax's two kernels: the best of each chunk of a row, then of each row.
#pragma once

#include <cstdint>

#include "ptx/grid_dependency.cuh"
#include "sampling/candidate.cuh"

namespace anabranch::sampling {

constexpr uint32_t kThreads = 256;
constexpr uint32_t kWarps = kThreads / kWarpSize;
// Logits of a block: 32 a thread.
constexpr uint32_t kChunk = 8192;

struct Args {
  const void* logits;  // [B, V]
  uint64_t* best;      // [B, chunks], or null if a row is one chunk
  int32_t* ids;        // [B]
  uint32_t num_rows;
  uint32_t vocab_size;
  uint32_t chunks;  // of a row
  bool wide;        // rows start on 16 bytes and are whole multiples of that
};

template <typename Logits>
__global__ void __launch_bounds__(kThreads) best_of_chunk(const __grid_constant__ Args args) {
  ptx::launch_dependents();
  ptx::wait_for_prerequisites();
  constexpr uint32_t kWidth = Logits::kWidth;
  const uint32_t row = blockIdx.x / args.chunks;
  const uint32_t first = blockIdx.x % args.chunks * kChunk;
  const uint32_t left = args.vocab_size - first;
  const uint32_t count = left < kChunk ? left : kChunk;
  const uint64_t start = uint64_t{row} * args.vocab_size + first;
  uint64_t best = 0;
  if (args.wide) {
#pragma unroll 8
    for (uint32_t at = threadIdx.x * kWidth; at < count; at += kThreads * kWidth) {
      float logits[kWidth];
      Logits::read(logits, args.logits, start + at);
#pragma unroll
      for (uint32_t i = 0; i < kWidth; ++i) best = larger(best, candidate(logits[i], first + at + i));
    }
  } else {
#pragma unroll 8
    for (uint32_t at = threadIdx.x; at < count; at += kThreads) {
      best = larger(best, candidate(Logits::read(args.logits, start + at), first + at));
    }
  }
  __shared__ uint64_t of_warp[kWarps];
  best = warp_largest(best);
  if (threadIdx.x % kWarpSize == 0) of_warp[threadIdx.x / kWarpSize] = best;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (uint32_t warp = 1; warp < kWarps; ++warp) best = larger(best, of_warp[warp]);
  if (args.chunks == 1) {
    args.ids[row] = id_of(best);
  } else {
    args.best[blockIdx.x] = best;
  }
}

// A warp a row.
__global__ void __launch_bounds__(kThreads) best_of_row(const __grid_constant__ Args args) {
  ptx::launch_dependents();
  ptx::wait_for_prerequisites();
  const uint32_t lane = threadIdx.x % kWarpSize;
  const uint32_t row = blockIdx.x * kWarps + threadIdx.x / kWarpSize;
  if (row >= args.num_rows) return;
  uint64_t best = 0;
  for (uint32_t chunk = lane; chunk < args.chunks; chunk += kWarpSize) {
    best = larger(best, args.best[uint64_t{row} * args.chunks + chunk]);
  }
  best = warp_largest(best);
  if (lane == 0) args.ids[row] = id_of(best);
}

}  // namespace anabranch::sampling
