// Logits to scores, and the adaptive number of slots. A warp holds a token: lane l has experts l * kValues and
// following.
#pragma once

#include <cmath>

#include "common/warp.cuh"
#include "ptx/math.cuh"
#include "router/args.cuh"

namespace anabranch::router {

constexpr float kLog2e = 1.4426950408889634f;

// This lane's part of a row of E floats; minus infinity past its end.
template <int kValues>
__device__ __forceinline__ void load_row(float (&value)[kValues], const float* row, uint32_t first,
                                         uint32_t num_experts, bool wide) {
#pragma unroll
  for (int i = 0; i < kValues; ++i) value[i] = -INFINITY;
  if constexpr (kValues >= 4) {
    if (wide) {
#pragma unroll
      for (int i = 0; i < kValues; i += 4) {
        if (first + i >= num_experts) continue;
        const float4 four = *reinterpret_cast<const float4*>(row + first + i);
        value[i] = four.x, value[i + 1] = four.y, value[i + 2] = four.z, value[i + 3] = four.w;
      }
      return;
    }
  }
  if constexpr (kValues == 2) {
    if (wide) {
      if (first >= num_experts) return;
      const float2 two = *reinterpret_cast<const float2*>(row + first);
      value[0] = two.x, value[1] = two.y;
      return;
    }
  }
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    if (first + i < num_experts) value[i] = row[first + i];
  }
}

// Whether any lane holds a NaN.
template <int kValues>
__device__ __forceinline__ bool any_nan(const float (&value)[kValues]) {
  bool found = false;
#pragma unroll
  for (int i = 0; i < kValues; ++i) found |= isnan(value[i]);
  return __any_sync(kFullWarp, found);
}

// Copies this lane's values to a row in shared memory.
template <int kValues>
__device__ __forceinline__ void store_row(float* row, const float (&value)[kValues], uint32_t first) {
  if constexpr (kValues >= 4) {
#pragma unroll
    for (int i = 0; i < kValues; i += 4) {
      *reinterpret_cast<float4*>(row + first + i) = make_float4(value[i], value[i + 1], value[i + 2], value[i + 3]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kValues; ++i) row[first + i] = value[i];
  }
}

// exp(x) for x <= 0, within 1e-7 * |x| relative: for sums and for ranking. The weights themselves use expf.
__device__ __forceinline__ float exp_fast(float x) {
  return ptx::ex2_approx(x * kLog2e);
}

// 1 / (1 + exp(-x)), for ranking: within 3 ulp above -1, within 1e-7 absolute everywhere.
__device__ __forceinline__ float sigmoid_fast(float x) {
  return ptx::rcp_approx(1.0f + exp_fast(-x));
}

// For the weights: within 3 ulp. Division is a multiplication by the reciprocal throughout, 2 ulp instead of a half,
// for a third of the instructions.
__device__ __forceinline__ float sigmoid(float x) {
  return ptx::rcp_approx(1.0f + expf(-x));
}

// The sum of exp_fast(logit - max), halves added to halves: with the lanes' five additions, 1,024 terms pass ten
// roundings and not thirty-six, which holds a weight of 1 within 1e-6.
template <int kValues>
__device__ __forceinline__ float sum_exp(const float* logit, float max) {
  if constexpr (kValues == 1) {
    return exp_fast(logit[0] - max);
  } else {
    return sum_exp<kValues / 2>(logit, max) + sum_exp<kValues - kValues / 2>(logit + kValues / 2, max);
  }
}

// What softmax needs to know of all logits of a token.
struct Softmax {
  float max;
  float sum;
};

template <int kValues>
__device__ __forceinline__ Softmax softmax_of(const float (&logit)[kValues]) {
  float max = -INFINITY;
#pragma unroll
  for (int i = 0; i < kValues; ++i) max = fmaxf(max, logit[i]);
  max = warp_max(max);
  return {max, warp_sum(sum_exp<kValues>(logit, max))};
}

// Entropy of softmax(logits), in nats.
template <int kValues>
__device__ float entropy_of(const float (&logit)[kValues]) {
  const Softmax softmax = softmax_of(logit);
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kValues; ++i) sum += expf(logit[i] - softmax.max);
  sum = warp_sum(sum);
  float entropy = 0.0f;
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    const float p = expf(logit[i] - softmax.max) / sum;
    entropy -= p == 0.0f ? 0.0f : p * logf(p);
  }
  return warp_sum(entropy);
}

// clamp(floor(complexity * topk), 1, topk), NaN counting as 0.
__device__ __forceinline__ uint32_t slots(double complexity, uint32_t topk) {
  const double used = complexity * topk;
  if (!(used >= 1.0)) return 1;
  return used >= topk ? topk : static_cast<uint32_t>(used);
}

template <int kValues>
__device__ __forceinline__ uint32_t used_slots(const Args& args, const float (&logit)[kValues], uint32_t token) {
  switch (args.adaptive) {
    case ANABRANCH_ADAPTIVE_COMPLEXITY:
      return slots(__ldg(args.complexity + token), args.topk);
    case ANABRANCH_ADAPTIVE_ENTROPY:
      return args.num_experts < 2 ? 1 : slots(entropy_of(logit) / args.log_experts, args.topk);
    default:
      return args.topk;
  }
}

// Turns logits into what experts are ranked by, without the group limit: minus infinity past the last expert. It may be
// NaN. Additions are written as such: contracted into a multiplication they would round otherwise than elsewhere.
template <int kValues>
__device__ __forceinline__ void selection_scores(const Args& args, float (&value)[kValues], uint32_t first,
                                                 const Softmax& softmax) {
  float bias[kValues];
  if (args.has_bias) {
    load_row(bias, args.bias, first, args.num_experts, args.wide_loads);
  } else {
#pragma unroll
    for (int i = 0; i < kValues; ++i) bias[i] = first + i < args.num_experts ? 0.0f : -INFINITY;
  }
  if (!args.rank_by_logits && args.score == ANABRANCH_SCORE_SIGMOID) {
#pragma unroll
    for (int i = 0; i < kValues; ++i) value[i] = sigmoid_fast(value[i]);
  } else if (!args.rank_by_logits) {
    const float reciprocal = ptx::rcp_approx(softmax.sum);
#pragma unroll
    for (int i = 0; i < kValues; ++i) value[i] = __fmul_rn(exp_fast(value[i] - softmax.max), reciprocal);
  }
#pragma unroll
  for (int i = 0; i < kValues; ++i) value[i] = __fadd_rn(value[i], bias[i]);
}

}  // namespace anabranch::router
