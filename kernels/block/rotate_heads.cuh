// RoPE's kernels: one block a token.
#pragma once

#include <cstdint>

#include "common/bf16.cuh"
#include "common/warp.cuh"
#include "ptx/grid_dependency.cuh"

namespace anabranch::block {

constexpr uint32_t kRopeThreads = 128;
// Most pairs of a head: their cosines and sines wait in shared memory.
constexpr uint32_t kMaxPairs = 512;

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

struct RopeArgs {
  Heads q;  // in place
  Heads k;  // to the cache
  Heads v;  // to the cache, nothing rotated
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

// cos and sin of an angle that is a float: the product of position and frequency is rounded as the reference rounds it.
// Turns are counted in float64, because at position 100,000 a float32 reduction would lose the fraction, and sincospif
// takes no slow path.
__device__ __forceinline__ void fill_angles(Angles& angles, const RopeArgs& args, float position) {
  for (uint32_t pair = threadIdx.x; pair < args.pairs; pair += blockDim.x) {
    const double turns = static_cast<double>(position * args.frequencies[pair]) * 0.15915494309189535;
    float sin;
    float cos;
    sincospif(2.0f * static_cast<float>(turns - rint(turns)), &sin, &cos);
    angles.cos[pair] = cos * args.attention_factor;
    angles.sin[pair] = sin * args.attention_factor;
  }
}

// NaN stays NaN.
__device__ __forceinline__ float clamped(float x, float clip) {
  return x > clip ? clip : x < -clip ? -clip : x;
}

__device__ __forceinline__ void turn(float& a, float& b, float cos, float sin) {
  const float turned = a * cos - b * sin;
  b = b * cos + a * sin;
  a = turned;
}

__device__ __forceinline__ void load_clamped(float (&x)[kVector], const uint16_t* from, float clip) {
  unpack(x, *reinterpret_cast<const uint4*>(from));
#pragma unroll
  for (uint32_t j = 0; j < kVector; ++j) x[j] = clamped(x[j], clip);
}

__device__ __forceinline__ void store(uint16_t* to, const float (&x)[kVector]) {
  *reinterpret_cast<uint4*>(to) = pack(x);
}

// Item `item` of a token's rotated heads, 16 bytes at a time: with halves, a vector and the one that it turns with.
__device__ __forceinline__ void rotate_item(const RopeArgs& args, const Heads& heads, const uint16_t* from,
                                            uint16_t* to, uint32_t item, const Angles& angles) {
  float a[kVector];
  if (args.interleaved) {
    const uint32_t per_head = 2 * args.pairs / kVector;
    const uint32_t vector = item % per_head;
    const uint32_t at = item / per_head * heads.head_dim + heads.first + vector * kVector;
    load_clamped(a, from + at, args.clip);
#pragma unroll
    for (uint32_t j = 0; j < kVector; j += 2) {
      const uint32_t pair = (vector * kVector + j) / 2;
      turn(a[j], a[j + 1], angles.cos[pair], angles.sin[pair]);
    }
    store(to + at, a);
    return;
  }
  float b[kVector];
  const uint32_t per_head = args.pairs / kVector;
  const uint32_t pair = item % per_head * kVector;
  const uint32_t at = item / per_head * heads.head_dim + heads.first + pair;
  load_clamped(a, from + at, args.clip);
  load_clamped(b, from + at + args.pairs, args.clip);
  float cos[kVector];
  float sin[kVector];
  load(cos, reinterpret_cast<const float4*>(angles.cos + pair));
  load(sin, reinterpret_cast<const float4*>(angles.sin + pair));
#pragma unroll
  for (uint32_t j = 0; j < kVector; ++j) turn(a[j], b[j], cos[j], sin[j]);
  store(to + at, a);
  store(to + at + args.pairs, b);
}

// Item `item` of a token's elements that are not rotated, 16 bytes at a time: `rotary` elements from `first` on are
// left out.
__device__ __forceinline__ void copy_item(const Heads& heads, const uint16_t* from, uint16_t* to, uint32_t item,
                                          uint32_t rotary, float clip) {
  const uint32_t per_head = (heads.head_dim - rotary) / kVector;
  const uint32_t column = item % per_head * kVector;
  const uint32_t at = item / per_head * heads.head_dim + column + (column < heads.first ? 0 : rotary);
  float x[kVector];
  load_clamped(x, from + at, clip);
  store(to + at, x);
}

// Everything is whole vectors: first, pairs (interleaved: half as many) and head_dim are multiples of 8.
__global__ void __launch_bounds__(kRopeThreads) rotate_vectors(const __grid_constant__ RopeArgs args) {
  ptx::launch_dependents();
  ptx::wait_for_prerequisites();
  __shared__ Angles angles;
  const uint64_t token = blockIdx.x;
  if (args.q.heads + args.k.heads > 0) fill_angles(angles, args, static_cast<float>(args.positions[token]));
  __syncthreads();
  const uint32_t row = args.cache_rows == nullptr ? 0xffffffffu : static_cast<uint32_t>(args.cache_rows[token]);
  const bool cached = row < args.num_cache_rows;
  const uint32_t rotary = 2 * args.pairs;
  const uint32_t rotated = args.pairs / (args.interleaved ? kVector / 2 : kVector);
  // Elements of q that are not rotated stay where they are, unless they are to be clamped.
  const bool clip = args.clip < INFINITY;
  const uint32_t q_turns = args.q.heads * rotated;
  const uint32_t q_copies = clip ? args.q.heads * ((args.q.head_dim - rotary) / kVector) : 0;
  const uint32_t k_turns = cached ? args.k.heads * rotated : 0;
  const uint32_t k_copies = cached ? args.k.heads * ((args.k.head_dim - rotary) / kVector) : 0;
  const uint32_t v_copies = cached ? args.v.heads * (args.v.head_dim / kVector) : 0;

  const uint16_t* const q_from = args.q.from + token * args.q.from_stride;
  uint16_t* const q_to = args.q.to + token * args.q.to_stride;
  const uint16_t* const k_from = args.k.from + token * args.k.from_stride;
  uint16_t* const k_to = args.k.to + row * args.k.to_stride;
  const uint16_t* const v_from = args.v.from + token * args.v.from_stride;
  uint16_t* const v_to = args.v.to + row * args.v.to_stride;
  const uint32_t end = q_turns + q_copies + k_turns + k_copies + v_copies;
  for (uint32_t item = blockIdx.y * kRopeThreads + threadIdx.x; item < end; item += gridDim.y * kRopeThreads) {
    uint32_t i = item;
    if (i < q_turns) {
      rotate_item(args, args.q, q_from, q_to, i, angles);
    } else if ((i -= q_turns) < q_copies) {
      copy_item(args.q, q_from, q_to, i, rotary, args.clip);
    } else if ((i -= q_copies) < k_turns) {
      rotate_item(args, args.k, k_from, k_to, i, angles);
    } else if ((i -= k_turns) < k_copies) {
      copy_item(args.k, k_from, k_to, i, rotary, args.clip);
    } else {
      copy_item(args.v, v_from, v_to, i - k_copies, 0, args.clip);
    }
  }
}

// One token's heads, an element or a pair of them at a time, whatever the sizes.
__device__ __forceinline__ void rotate_any(const RopeArgs& args, const Heads& heads, const uint16_t* from, uint16_t* to,
                                           uint32_t pairs, const Angles& angles) {
  const uint32_t work = heads.head_dim - pairs;  // pairs, and elements that are in none
  for (uint32_t item = threadIdx.x; item < heads.heads * work; item += kRopeThreads) {
    const uint32_t within = item % work;
    const uint32_t head = item / work * heads.head_dim;
    if (within < pairs) {
      const uint32_t i = head + heads.first + (args.interleaved ? 2 * within : within);
      const uint32_t j = i + (args.interleaved ? 1 : pairs);
      float a = clamped(bf16_to_float(from[i]), args.clip);
      float b = clamped(bf16_to_float(from[j]), args.clip);
      turn(a, b, angles.cos[within], angles.sin[within]);
      to[i] = float_to_bf16(a);
      to[j] = float_to_bf16(b);
    } else {
      const uint32_t column = within - pairs;
      const uint32_t at = head + column + (column < heads.first ? 0 : 2 * pairs);
      to[at] = float_to_bf16(clamped(bf16_to_float(from[at]), args.clip));
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
  rotate_any(args, q, q.from + token * q.from_stride, q.to + token * q.to_stride, args.pairs, angles);
  const uint32_t row = args.cache_rows == nullptr ? 0xffffffffu : static_cast<uint32_t>(args.cache_rows[token]);
  if (row >= args.num_cache_rows) return;
  rotate_any(args, k, k.from + token * k.from_stride, k.to + row * k.to_stride, args.pairs, angles);
  rotate_any(args, v, v.from + token * v.from_stride, v.to + row * v.to_stride, 0, angles);
}

}  // namespace anabranch::block
