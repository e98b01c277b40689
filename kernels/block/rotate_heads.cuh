// RoPE's kernels: one block a token.
#pragma once

#include <cstdint>

#include "common/bf16.cuh"
#include "common/norm.cuh"
#include "common/turn.cuh"
#include "common/warp.cuh"
#include "ptx/grid_dependency.cuh"
#include "ptx/prefetch.cuh"

namespace anabranch::block {

constexpr uint32_t kRopeThreads = 128;
// Most pairs of a head: their cosines and sines wait in shared memory.
constexpr uint32_t kMaxPairs = 512;
// Most elements of a head that are normed: their weights wait there too.
constexpr uint32_t kMaxNorm = 2 * kWarpSize * kVector;

// Heads of every token and where their elements go.
struct Heads {
  const uint16_t* from;
  uint16_t* to;
  uint64_t from_stride;  // elements between tokens
  uint64_t to_stride;    // elements between tokens (q) or rows of the cache (k, v)
  uint32_t heads;
  uint32_t head_dim;
  uint32_t first;  // of the rotated elements of a head
};

// The norm of heads' first elements, before they are clamped.
struct Norm {
  const float* weight;  // [width]
  uint32_t width;       // 0: no norm
  uint32_t lane_bits;   // 2^lane_bits lanes share a head, a warp at most
  float eps;
};

struct RopeArgs {
  Heads q;  // in place
  Heads k;  // to the cache
  Heads v;  // to the cache, nothing rotated
  Norm q_norm;
  Norm k_norm;
  const float* frequencies;
  const int32_t* positions;
  const int32_t* cache_rows;
  uint32_t num_cache_rows;
  uint32_t pairs;  // rotary_dim / 2
  bool interleaved;
  float attention_factor;
  float clip;
};

struct alignas(16) Angles {
  float cos[kMaxPairs];
  float sin[kMaxPairs];
};

struct alignas(16) Weights {
  float q[kMaxNorm];
  float k[kMaxNorm];
};

// Pairs of an item, 16 bytes of a head's rotated elements; with halves, a vector and the one that it turns with.
__host__ __device__ constexpr uint32_t pairs_of_item(bool interleaved) {
  return interleaved ? kVector / 2 : kVector;
}

__device__ __forceinline__ void fill_angles(Angles& angles, const RopeArgs& args, float position) {
  for (uint32_t pair = threadIdx.x; pair < args.pairs; pair += blockDim.x) {
    float sin;
    float cos;
    cos_sin(position * args.frequencies[pair], cos, sin);
    angles.cos[pair] = cos * args.attention_factor;
    angles.sin[pair] = sin * args.attention_factor;
  }
}

// NaN stays NaN.
__device__ __forceinline__ float clamped(float x, float clip) {
  return x > clip ? clip : x < -clip ? -clip : x;
}

// A vector of a head's elements as they are.
struct Plain {
  float clip;

  __device__ __forceinline__ void read(float (&x)[kVector], const uint16_t* from, uint32_t at) const {
    unpack(x, *reinterpret_cast<const uint4*>(from + at));
#pragma unroll
    for (uint32_t j = 0; j < kVector; ++j) x[j] = clamped(x[j], clip);
  }
};

// A vector of a normed head, `at` counted from its start: rounded before it is clamped, as a norm apart would leave it.
struct Normed {
  const float* weight;
  uint32_t width;
  float scale;
  float clip;

  __device__ __forceinline__ void read(float (&x)[kVector], const uint16_t* from, uint32_t at) const {
    unpack(x, *reinterpret_cast<const uint4*>(from + at));
    if (at < width) {
      float w[kVector];
      load(w, reinterpret_cast<const float4*>(weight + at));
#pragma unroll
      for (uint32_t j = 0; j < kVector; ++j) x[j] = x[j] * scale * w[j];
      unpack(x, pack(x));
    }
#pragma unroll
    for (uint32_t j = 0; j < kVector; ++j) x[j] = clamped(x[j], clip);
  }
};

__device__ __forceinline__ void store(uint16_t* to, const float (&x)[kVector]) {
  *reinterpret_cast<uint4*>(to) = pack(x);
}

// Item `item` of a head's rotated elements; `from` and `to` are the head's start.
template <class Source>
__device__ __forceinline__ void rotate_item(const RopeArgs& args, const Heads& heads, const Source& source,
                                            const uint16_t* from, uint16_t* to, uint32_t item, const Angles& angles) {
  const uint32_t first = item * pairs_of_item(args.interleaved);
  float a[kVector];
  if (args.interleaved) {
    const uint32_t at = heads.first + 2 * first;
    source.read(a, from, at);
#pragma unroll
    for (uint32_t j = 0; j < kVector; j += 2) {
      turn(a[j], a[j + 1], angles.cos[first + j / 2], angles.sin[first + j / 2]);
    }
    store(to + at, a);
    return;
  }
  float b[kVector];
  const uint32_t at = heads.first + first;
  source.read(a, from, at);
  source.read(b, from, at + args.pairs);
  float cos[kVector];
  float sin[kVector];
  load(cos, reinterpret_cast<const float4*>(angles.cos + first));
  load(sin, reinterpret_cast<const float4*>(angles.sin + first));
#pragma unroll
  for (uint32_t j = 0; j < kVector; ++j) turn(a[j], b[j], cos[j], sin[j]);
  store(to + at, a);
  store(to + at + args.pairs, b);
}

// Item `item` of a head's elements that are not rotated, 16 bytes at a time: `rotary` elements from `first` on are left
// out.
template <class Source>
__device__ __forceinline__ void copy_item(const Heads& heads, const Source& source, const uint16_t* from, uint16_t* to,
                                          uint32_t item, uint32_t rotary) {
  const uint32_t column = item * kVector;
  const uint32_t at = column + (column < heads.first ? 0 : rotary);
  float x[kVector];
  source.read(x, from, at);
  store(to + at, x);
}

// Items of all heads of a token, one head's after another's, where there is no norm.
__device__ __forceinline__ void rotate_plain(const RopeArgs& args, const Heads& heads, const uint16_t* from,
                                             uint16_t* to, uint32_t item, const Angles& angles) {
  const uint32_t per_head = args.pairs / pairs_of_item(args.interleaved);
  const uint32_t head = item / per_head * heads.head_dim;
  rotate_item(args, heads, Plain{args.clip}, from + head, to + head, item % per_head, angles);
}

__device__ __forceinline__ void copy_plain(const RopeArgs& args, const Heads& heads, const uint16_t* from, uint16_t* to,
                                           uint32_t item, uint32_t rotary) {
  const uint32_t per_head = (heads.head_dim - rotary) / kVector;
  const uint32_t head = item / per_head * heads.head_dim;
  copy_item(heads, Plain{args.clip}, from + head, to + head, item % per_head, rotary);
}

// A lane's part of the normed heads of a token, which are spread over whole warps from lane 0 on. Nothing of a head is
// written before all of it is in the sum.
__device__ __forceinline__ void rotate_normed(const RopeArgs& args, const Heads& heads, const Norm& norm,
                                              const float* weight, const uint16_t* from, uint16_t* to, uint32_t lane,
                                              const Angles& angles) {
  const uint32_t lanes = 1u << norm.lane_bits;
  const uint32_t head = lane >> norm.lane_bits;
  const uint32_t member = lane & (lanes - 1);
  const bool inside = head < heads.heads;
  from += head * heads.head_dim;
  to += head * heads.head_dim;
  // Two vectors a lane are all: a head's items hold no more, and a warp's are kMaxNorm.
  const uint32_t low = member * kVector;
  const uint32_t high = low + lanes * kVector;
  const uint4 x = inside && low < norm.width ? *reinterpret_cast<const uint4*>(from + low) : uint4{};
  const uint4 y = inside && high < norm.width ? *reinterpret_cast<const uint4*>(from + high) : uint4{};
  const float sum = add_squares(0.0f, x) + add_squares(0.0f, y);
  const float scale = norm_scale(group_sum(sum, lanes), static_cast<float>(norm.width), norm.eps);
  if (!inside) return;
  const Normed source = {weight, norm.width, scale, args.clip};
  const uint32_t rotary = 2 * args.pairs;
  const uint32_t turns = args.pairs / pairs_of_item(args.interleaved);
  const uint32_t items = turns + (heads.head_dim - rotary) / kVector;
  for (uint32_t item = member; item < items; item += lanes) {
    if (item < turns) {
      rotate_item(args, heads, source, from, to, item, angles);
    } else {
      copy_item(heads, source, from, to, item - turns, rotary);
    }
  }
}

// This thread's four of a norm's weights.
__device__ __forceinline__ float4 four_weights(const Norm& norm) {
  static_assert(kMaxNorm == 4 * kRopeThreads);
  const bool there = 4 * threadIdx.x < norm.width;
  return there ? reinterpret_cast<const float4*>(norm.weight)[threadIdx.x] : float4{};
}

__device__ __forceinline__ void prefetch_weights(const Norm& norm) {
  if (32 * threadIdx.x < norm.width) ptx::prefetch_l2(norm.weight + 32 * threadIdx.x);
}

__device__ __forceinline__ uint32_t whole_warps(uint32_t lanes) {
  return (lanes + kWarpSize - 1) / kWarpSize * kWarpSize;
}

// Everything is whole vectors: first, pairs (interleaved: half as many), head_dim and norms' widths are multiples of 8.
template <bool kNorms>
__global__ void __launch_bounds__(kRopeThreads) rotate_vectors(const __grid_constant__ RopeArgs args) {
  ptx::launch_dependents();
  if constexpr (kNorms) {
    // May come before the wait: see norm_rows.
    prefetch_weights(args.q_norm);
    prefetch_weights(args.k_norm);
  }
  ptx::wait_for_prerequisites();
  __shared__ Angles angles;
  __shared__ Weights weights;
  const uint64_t token = blockIdx.x;
  // These are on their way while the angles are worked out.
  const uint32_t row = args.cache_rows == nullptr ? 0xffffffffu : static_cast<uint32_t>(args.cache_rows[token]);
  const float4 q_weights = kNorms ? four_weights(args.q_norm) : float4{};
  const float4 k_weights = kNorms ? four_weights(args.k_norm) : float4{};
  if (args.q.heads + args.k.heads > 0) fill_angles(angles, args, static_cast<float>(args.positions[token]));
  if constexpr (kNorms) {
    reinterpret_cast<float4*>(weights.q)[threadIdx.x] = q_weights;
    reinterpret_cast<float4*>(weights.k)[threadIdx.x] = k_weights;
  }
  __syncthreads();
  const bool cached = row < args.num_cache_rows;
  const uint32_t rotary = 2 * args.pairs;
  const uint32_t rotated = args.pairs / pairs_of_item(args.interleaved);
  const bool q_plain = !kNorms || args.q_norm.width == 0;
  const bool k_plain = !kNorms || args.k_norm.width == 0;
  // Normed heads come first, and each kind takes whole warps, in which every lane takes part in the sums.
  const uint32_t q_lanes = q_plain ? 0 : whole_warps(args.q.heads << args.q_norm.lane_bits);
  const uint32_t k_lanes = k_plain || !cached ? 0 : whole_warps(args.k.heads << args.k_norm.lane_bits);
  // Elements of q that are not rotated stay where they are, unless they are to be clamped.
  const bool clip = args.clip < INFINITY;
  const uint32_t q_turns = q_plain ? args.q.heads * rotated : 0;
  const uint32_t q_copies = q_plain && clip ? args.q.heads * ((args.q.head_dim - rotary) / kVector) : 0;
  const uint32_t k_turns = k_plain && cached ? args.k.heads * rotated : 0;
  const uint32_t k_copies = k_plain && cached ? args.k.heads * ((args.k.head_dim - rotary) / kVector) : 0;
  const uint32_t v_copies = cached ? args.v.heads * (args.v.head_dim / kVector) : 0;

  const uint16_t* const q_from = args.q.from + token * args.q.from_stride;
  uint16_t* const q_to = args.q.to + token * args.q.to_stride;
  const uint16_t* const k_from = args.k.from + token * args.k.from_stride;
  uint16_t* const k_to = args.k.to + row * args.k.to_stride;
  const uint16_t* const v_from = args.v.from + token * args.v.from_stride;
  uint16_t* const v_to = args.v.to + row * args.v.to_stride;
  const uint32_t end = q_lanes + k_lanes + q_turns + q_copies + k_turns + k_copies + v_copies;
  for (uint32_t item = blockIdx.y * kRopeThreads + threadIdx.x; item < end; item += gridDim.y * kRopeThreads) {
    uint32_t i = item;
    if constexpr (kNorms) {
      if (i < q_lanes) {
        rotate_normed(args, args.q, args.q_norm, weights.q, q_from, q_to, i, angles);
        continue;
      }
      if ((i -= q_lanes) < k_lanes) {
        rotate_normed(args, args.k, args.k_norm, weights.k, k_from, k_to, i, angles);
        continue;
      }
      i -= k_lanes;
    }
    if (i < q_turns) {
      rotate_plain(args, args.q, q_from, q_to, i, angles);
    } else if ((i -= q_turns) < q_copies) {
      copy_plain(args, args.q, q_from, q_to, i, rotary);
    } else if ((i -= q_copies) < k_turns) {
      rotate_plain(args, args.k, k_from, k_to, i, angles);
    } else if ((i -= k_turns) < k_copies) {
      copy_plain(args, args.k, k_from, k_to, i, rotary);
    } else {
      copy_plain(args, args.v, v_from, v_to, i - k_copies, 0);
    }
  }
}

// One token's heads, a warp each, an element or a pair of them at a time, whatever the sizes.
__device__ __forceinline__ void rotate_any(const RopeArgs& args, const Heads& heads, const Norm& norm,
                                           const uint16_t* from, uint16_t* to, uint32_t pairs, const Angles& angles) {
  const uint32_t lane = threadIdx.x % kWarpSize;
  const uint32_t work = heads.head_dim - pairs;  // pairs, and elements that are in none
  for (uint32_t head = threadIdx.x / kWarpSize; head < heads.heads; head += kRopeThreads / kWarpSize) {
    const uint16_t* const x = from + head * heads.head_dim;
    uint16_t* const y = to + head * heads.head_dim;
    float sum = 0.0f;
    for (uint32_t at = lane; at < norm.width; at += kWarpSize) {
      const float element = bf16_to_float(x[at]);
      sum = fmaf(element, element, sum);
    }
    const float scale = norm_scale(warp_sum(sum), static_cast<float>(norm.width), norm.eps);
    const auto read = [&](uint32_t at) {
      float element = bf16_to_float(x[at]);
      if (at < norm.width) element = bf16_to_float(float_to_bf16(element * scale * norm.weight[at]));
      return clamped(element, args.clip);
    };
    for (uint32_t within = lane; within < work; within += kWarpSize) {
      if (within < pairs) {
        const uint32_t i = heads.first + (args.interleaved ? 2 * within : within);
        const uint32_t j = i + (args.interleaved ? 1 : pairs);
        float a = read(i);
        float b = read(j);
        turn(a, b, angles.cos[within], angles.sin[within]);
        y[i] = float_to_bf16(a);
        y[j] = float_to_bf16(b);
      } else {
        const uint32_t column = within - pairs;
        const uint32_t at = column + (column < heads.first ? 0 : 2 * pairs);
        y[at] = float_to_bf16(read(at));
      }
    }
  }
}

__global__ void __launch_bounds__(kRopeThreads) rotate_elements(const __grid_constant__ RopeArgs args) {
  ptx::launch_dependents();
  ptx::wait_for_prerequisites();
  __shared__ Angles angles;
  const uint64_t token = blockIdx.x;
  if (args.q.heads + args.k.heads > 0) fill_angles(angles, args, static_cast<float>(args.positions[token]));
  __syncthreads();
  const Heads& q = args.q;
  const Heads& k = args.k;
  const Heads& v = args.v;
  rotate_any(args, q, args.q_norm, q.from + token * q.from_stride, q.to + token * q.to_stride, args.pairs, angles);
  const uint32_t row = args.cache_rows == nullptr ? 0xffffffffu : static_cast<uint32_t>(args.cache_rows[token]);
  if (row >= args.num_cache_rows) return;
  rotate_any(args, k, args.k_norm, k.from + token * k.from_stride, k.to + row * k.to_stride, args.pairs, angles);
  rotate_any(args, v, {}, v.from + token * v.from_stride, v.to + row * v.to_stride, 0, angles);
}

}  // namespace anabranch::block
