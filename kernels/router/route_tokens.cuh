// The router's kernel: one warp a token, from logits to ids, weights and counts.
#pragma once

#include "ptx/grid_dependency.cuh"
#include "ptx/prefetch.cuh"
#include "router/args.cuh"
#include "router/groups.cuh"
#include "router/rules.cuh"
#include "router/scores.cuh"
#include "router/select.cuh"

namespace anabranch::router {

// The weight of this lane's expert; 0 in lanes that chose none.
__device__ __forceinline__ float weigh(const Args& args, bool chosen, float logit, const Softmax& softmax,
                                       bool poisoned) {
  float weight = 0.0f;
  if (args.score == ANABRANCH_SCORE_TOPK_SOFTMAX) {
    const float max = warp_max(logit);
    weight = chosen ? expf(logit - max) : 0.0f;
    weight *= ptx::rcp_approx(warp_sum(weight));
  } else {
    if (chosen) {
      weight = args.score == ANABRANCH_SCORE_SIGMOID ? sigmoid(logit)
                                                     : expf(logit - softmax.max) * ptx::rcp_approx(softmax.sum);
    }
    if (args.renormalize) weight *= ptx::rcp_approx(warp_sum(weight) + 1e-20f);
  }
  return poisoned ? NAN : weight * args.scale;
}

// Clears the counts, while the kernel that adds to them is already at work on its tokens.
static __global__ void clear_counts(uint32_t* counts, uint32_t num_experts) {
  ptx::launch_dependents();
  for (uint32_t expert = threadIdx.x; expert < num_experts; expert += blockDim.x) counts[expert] = 0;
}

// One warp routes a token by the row of `logits`; `row`, of warp_words, is its shared memory.
template <int kValues>
__device__ __forceinline__ void route_row(const Args& args, const float* logits, uint32_t token, uint32_t* counts,
                                          float* row) {
  using Shape = Tile<kValues>;
  const uint32_t lane = threadIdx.x % kWarpSize;
  const bool group_scores = args.groups.count > 1 && args.groups.lanes == 0;
  Scratch* scratch = reinterpret_cast<Scratch*>(row + Shape::kRow);
  float* group_score = row + Shape::kRow + kScratchWords;
  const uint32_t first = lane * kValues;
  float value[kValues];
  load_row(value, logits, first, args.num_experts, args.wide_loads);
  const uint32_t used = used_slots(args, value, token);
  Softmax softmax = {0.0f, 1.0f};
  if (args.score == ANABRANCH_SCORE_SOFTMAX) softmax = softmax_of(value);
  selection_scores(args, value, first, softmax);
  // A NaN among the logits is one among the scores, which also have others (a NaN of the bias, say).
  bool poisoned = any_nan(value);
  if (poisoned) {
#pragma unroll
    for (int i = 0; i < kValues; ++i) value[i] = fmaxf(value[i], -INFINITY);
    float logit[kValues];
    load_row(logit, logits, first, args.num_experts, args.wide_loads);
    poisoned = any_nan(logit);
  }

  if (group_scores) {
    store_row(row, value, first);
    __syncwarp();
    limit_any(args.groups, value, lane, row, group_score);
  } else if (args.groups.count > 1) {
    limit_aligned(args.groups, value, lane);
  }
  if constexpr (kValues > 1) {
    store_row(row, value, first);
    __syncwarp();
  }
  const Choice choice = choose(value, lane, args, row, scratch);
  __syncwarp();

  const bool chosen = choice.rank < used;
  const float logit = chosen ? logits[choice.expert] : -INFINITY;
  const float weight = weigh(args, chosen, logit, softmax, poisoned);
  if (choice.rank < args.topk) {
    const uint32_t at = token * args.pitch + choice.rank;  // below 2^31
    args.ids[at] = chosen ? static_cast<int32_t>(choice.expert) : -1;
    args.weights[at] = chosen ? weight : 0.0f;
  }
  if (chosen) atomicAdd(counts + choice.expert, 1u);
}

// Routes this block's tokens, those of every gridDim.x-th round of warps; `shared` begins with the block's counts.
// Whole blocks call.
template <int kValues>
__device__ __forceinline__ void route_rows(const Args& args, uint32_t* shared) {
  using Shape = Tile<kValues>;
  const uint32_t warp = threadIdx.x / kWarpSize;
  const bool group_scores = args.groups.count > 1 && args.groups.lanes == 0;
  uint32_t* counts = shared;
  float* row = reinterpret_cast<float*>(shared + Shape::kRow + warp * warp_words<kValues>(group_scores));

#pragma unroll 1  // a few turns at most: unrolled, its checks would cost more
  for (uint32_t expert = threadIdx.x; expert < args.num_experts; expert += Shape::kThreads) counts[expert] = 0;
  __syncthreads();

  const uint32_t first = threadIdx.x % kWarpSize * kValues;
  const uint32_t stride = gridDim.x * Shape::kWarps;
  for (uint32_t token = blockIdx.x * Shape::kWarps + warp; token < args.num_tokens; token += stride) {
    const float* logits = args.logits + static_cast<uint64_t>(token) * args.num_experts;
    // The warp's next row comes into the cache while this one is worked on.
    if (token + stride < args.num_tokens && first < args.num_experts) {
      ptx::prefetch_l2(logits + static_cast<uint64_t>(stride) * args.num_experts + first);
    }
    route_row<kValues>(args, logits, token, counts, row);
  }
}

template <int kValues, class Rule>
__global__ void __launch_bounds__(Tile<kValues>::kThreads, Rule::blocks_per_sm(kValues))
    route_tokens(const __grid_constant__ Args given) {
  const Args args = Rule::template fixed<kValues>(given);
  extern __shared__ __align__(16) uint32_t shared[];
  route_rows<kValues>(args, shared);
  const uint32_t* counts = shared;
  __syncthreads();
  ptx::wait_for_prerequisites();
#pragma unroll 1
  for (uint32_t expert = threadIdx.x; expert < args.num_experts; expert += Tile<kValues>::kThreads) {
    if (gridDim.x == 1) {
      args.counts[expert] = counts[expert];
    } else if (counts[expert] != 0) {
      atomicAdd(args.counts + expert, counts[expert]);
    }
  }
}

}  // namespace anabranch::router
