// The kernel of a decode step; decode_step_sm90.cu says what it computes.
#pragma once

#include "common/bf16.cuh"
#include "common/row_stream.cuh"
#include "common/silu.cuh"
#include "decode_step/attend.cuh"
#include "decode_step/rows.cuh"
#include "decode_step/words.cuh"
#include "router/route_tokens.cuh"

namespace anabranch::decode_step {

// Turns in which blocks take the gate's rows, at most.
constexpr uint32_t kGateTurns = 4;

struct Shared {
  AttendShared attend;
  Slots slots;
  float squares[kWarps];
  float gate[kGateTurns][kWarps];
  alignas(16) float logits[kMaxExperts];
  uint32_t counts[kMaxExperts];
  alignas(16) float row[router::warp_words<8>(true)];
};

template <bool kLatent>
class Step {
  using Rows = StepRows<kLatent>;

 public:
  __device__ __forceinline__ Step(const Args& args, const Places& places, char* arena, Shared& shared)
      : args_(args),
        places_(places),
        arena_(arena),
        shared_(shared),
        attend_(args, places, arena, shared.attend),
        rows_(address(threadIdx.x / kWarpSize * kDepth * kStepBytes), Rows(args, shared.slots)) {}

  __device__ __forceinline__ void run() {
    rows_.begin();
    const uint32_t before = *args_.epoch;
    attend_.prepare();
    read();
    for (uint32_t layer = 0; layer < args_.num_layers; ++layer) {
      const AnabranchDecodeLayer& weights = args_.layers[layer];
      epoch_ = before + layer + 1;
      norm(layer == 0 ? nullptr : args_.words.experts, epoch_ - 1, weights.attention_norm, &weights);
      project();
      if constexpr (kLatent) absorb();
      attend_.run(weights, epoch_);
      if constexpr (kLatent) expand();
      output();
      norm(args_.words.attention, epoch_, weights.feed_forward_norm, nullptr);
      if (weights.gate != nullptr) route(weights);
      gate_up(Feed(args_, layer));
      down(Feed(args_, layer));
    }
    finish(before);
  }

 private:
  __device__ __forceinline__ uint32_t address(uint32_t place) const {
    return static_cast<uint32_t>(__cvta_generic_to_shared(arena_)) + place;
  }
  __device__ __forceinline__ static uint32_t lane() { return threadIdx.x % kWarpSize; }
  __device__ __forceinline__ static uint32_t warp() { return threadIdx.x / kWarpSize; }

  // The sum of the next row's product with a vector in shared memory.
  __device__ __forceinline__ float multiply(uint32_t elements, uint32_t place) {
    float part[1];
    rows_.multiply(elements / kVector, address(place), 0, part);
    return warp_sum(part[0]);
  }

  // The residual stream as the step before left it.
  __device__ __forceinline__ void read() {
#pragma unroll
    for (uint32_t i = 0; i < kPairs; ++i) {
      const uint32_t pair = threadIdx.x + i * kThreads;
      if (pair >= args_.hidden / 2) break;
      const uint32_t two = reinterpret_cast<const uint32_t*>(args_.x)[pair];
      residual_[i] = make_float2(__uint_as_float(two << 16), __uint_as_float(two & 0xffff0000u));
    }
  }

  // Adds what all blocks have made of it.
  __device__ __forceinline__ void add(const Word* words, uint32_t epoch) {
    Word a[kPairs];
    Word b[kPairs];
#pragma unroll
    for (uint32_t i = 0; i < kPairs; ++i) {
      const uint32_t pair = threadIdx.x + i * kThreads;
      if (pair < args_.hidden / 2) ptx::ld_relaxed_2(words + 2 * pair, a[i], b[i]);
    }
#pragma unroll
    for (uint32_t i = 0; i < kPairs; ++i) {
      const uint32_t pair = threadIdx.x + i * kThreads;
      if (pair >= args_.hidden / 2) break;
      Two two = {static_cast<uint32_t>(a[i]), static_cast<uint32_t>(b[i])};
      const bool there = static_cast<uint32_t>(a[i] >> 32) == epoch && static_cast<uint32_t>(b[i] >> 32) == epoch;
      if (!there) two = receive(words + 2 * pair, epoch);
      residual_[i].x += __uint_as_float(two.first);
      residual_[i].y += __uint_as_float(two.second);
    }
  }

  // The norm of the residual stream, after an addition, to x. Every block makes it for itself, to the same bits. With
  // `begins`, that layer's attention asks for its first keys on the way.
  __device__ __forceinline__ void norm(const Word* words, uint32_t epoch, const float* weight,
                                       const AnabranchDecodeLayer* begins) {
    const uint32_t pairs = args_.hidden / 2;
    float2 weights[kPairs];
#pragma unroll
    for (uint32_t i = 0; i < kPairs; ++i) {
      const uint32_t pair = threadIdx.x + i * kThreads;
      if (pair < pairs) weights[i] = reinterpret_cast<const float2*>(weight)[pair];
    }
    if (words != nullptr) add(words, epoch);
    float sum = 0.0f;
#pragma unroll
    for (uint32_t i = 0; i < kPairs; ++i) {
      if (threadIdx.x + i * kThreads >= pairs) break;
      sum = fmaf(residual_[i].x, residual_[i].x, sum);
      sum = fmaf(residual_[i].y, residual_[i].y, sum);
    }
    sum = warp_sum(sum);
    if (lane() == 0) shared_.squares[warp()] = sum;
    // h was written where the copy engine will write keys.
    if (begins != nullptr) ptx::fence_shared_proxy();
    __syncthreads();
    if (begins != nullptr && warp() == 0) attend_.begin(*begins);
    sum = 0.0f;
#pragma unroll
    for (uint32_t i = 0; i < kWarps; ++i) sum += shared_.squares[i];
    const float scale = 1.0f / sqrtf(sum / static_cast<float>(args_.hidden) + args_.norm_eps);
#pragma unroll
    for (uint32_t i = 0; i < kPairs; ++i) {
      const uint32_t pair = threadIdx.x + i * kThreads;
      if (pair >= pairs) break;
      reinterpret_cast<uint32_t*>(arena_ + places_.x)[pair] =
          ptx::cvt_bf16x2(residual_[i].x * scale * weights[i].x, residual_[i].y * scale * weights[i].y);
    }
    __syncthreads();
  }

  // Words of two bf16 each to a vector in shared memory, from the first-th element on.
  __device__ __forceinline__ void receive_vector(const Word* words, uint32_t first, uint32_t elements, uint32_t place) {
    receive_pairs<4>(words + first / 2, threadIdx.x, kThreads, elements / 4, epoch_, [&](uint32_t pair, Two two) {
      *reinterpret_cast<uint2*>(arena_ + place + 2 * first + pair * 8) = make_uint2(two.first, two.second);
    });
  }

  __device__ __forceinline__ Span deal(Product product, uint32_t layer) {
    return deal_.next(units_of<kLatent>(args_, layer, product));
  }

  __device__ __forceinline__ void project() {
    const Span span = deal(Product::kProject, 0);
    for (uint32_t unit = span.start; unit < span.count; unit += kWarps) {
      const float sum = multiply(args_.hidden, places_.x);
      if (lane() == 0) publish(args_.words.projected + span.first + unit, sum, epoch_);
    }
  }

  // Products by head: units of two rows, of `rows` a head, with the head's part of a vector.
  __device__ __forceinline__ void by_head(const Span& span, uint32_t rows, uint32_t elements, uint32_t place,
                                          Word* words) {
    for (uint32_t unit = span.start; unit < span.count; unit += kWarps) {
      const uint32_t head = 2 * (span.first + unit) / rows;
      const float first = multiply(elements, place + head * elements * 2);
      const float second = multiply(elements, place + head * elements * 2);
      if (lane() == 0) publish(words + span.first + unit, ptx::cvt_bf16x2(first, second), epoch_);
    }
  }

  // Projected queries to those of the latent's width.
  __device__ __forceinline__ void absorb() {
    const Span span = deal(Product::kAbsorb, 0);
    const uint32_t rows = args_.attention.key_dim;
    if (span.count > 0) {
      const uint32_t first = 2 * span.first / rows;
      const uint32_t last = (2 * (span.first + span.count) - 1) / rows;
      const uint32_t start = first * args_.q_dim;
      receive_pairs<2>(args_.words.projected + start, threadIdx.x, kThreads, (last + 1 - first) * args_.q_dim / 2,
                       epoch_, [&](uint32_t pair, Two two) {
                         *reinterpret_cast<uint32_t*>(arena_ + places_.q + 2 * start + pair * 4) =
                             ptx::cvt_bf16x2(__uint_as_float(two.first), __uint_as_float(two.second));
                       });
    }
    __syncthreads();
    by_head(span, rows, args_.q_dim, places_.q, args_.words.absorbed);
  }

  // Attended latents to the heads' output.
  __device__ __forceinline__ void expand() {
    const Span span = deal(Product::kExpand, 0);
    const uint32_t rows = args_.o_dim;
    const uint32_t latent = args_.attention.value_dim;
    if (span.count > 0) {
      const uint32_t first = 2 * span.first / rows;
      const uint32_t last = (2 * (span.first + span.count) - 1) / rows;
      receive_vector(args_.words.attended, first * latent, (last + 1 - first) * latent, places_.attended);
    }
    __syncthreads();
    by_head(span, rows, latent, places_.attended, args_.words.expanded);
  }

  __device__ __forceinline__ void output() {
    const Span span = deal(Product::kOutput, 0);
    const uint32_t width = args_.attention.num_heads * args_.o_dim;
    receive_vector(kLatent ? args_.words.expanded : args_.words.attended, 0, width, places_.vector);
    __syncthreads();
    for (uint32_t unit = span.start; unit < span.count; unit += kWarps) {
      const float sum = multiply(width, places_.vector);
      if (lane() == 0) publish(args_.words.attention + span.first + unit, sum, epoch_);
    }
  }

  // The gate's rows are spread over all blocks; then each block routes for itself.
  __device__ __forceinline__ void route(const AnabranchDecodeLayer& weights) {
    const uint32_t experts = args_.router.num_experts;
    const uint32_t vectors = args_.hidden / kVector;
    const uint4* const gate = static_cast<const uint4*>(weights.gate);
    const uint4* const x = reinterpret_cast<const uint4*>(arena_ + places_.x);
    for (uint32_t turn = 0, expert = blockIdx.x; expert < experts; ++turn, expert += gridDim.x) {
      float sum = 0.0f;
      for (uint32_t at = threadIdx.x; at < vectors; at += kThreads) {
        float a[kVector];
        float b[kVector];
        unpack(a, gate[uint64_t{expert} * vectors + at]);
        unpack(b, x[at]);
#pragma unroll
        for (uint32_t i = 0; i < kVector; ++i) sum = fmaf(a[i], b[i], sum);
      }
      sum = warp_sum(sum);
      if (lane() == 0) shared_.gate[turn][warp()] = sum;
    }
    __syncthreads();
    if (warp() == 0) {
      for (uint32_t turn = 0, expert = blockIdx.x; expert < experts; ++turn, expert += gridDim.x) {
        const float sum = warp_sum(lane() < kWarps ? shared_.gate[turn][lane()] : 0.0f);
        if (lane() == 0) publish(args_.words.logits + expert, sum, epoch_);
      }
      receive_pairs<4>(args_.words.logits, lane(), kWarpSize, experts / 2, epoch_, [&](uint32_t pair, Two two) {
        reinterpret_cast<float2*>(shared_.logits)[pair] =
            make_float2(__uint_as_float(two.first), __uint_as_float(two.second));
      });
      __syncwarp();
      choose(weights);
    }
    __syncthreads();
    rows_.resume();
  }

  __device__ __forceinline__ void choose(const AnabranchDecodeLayer& weights) {
    router::Args router = args_.router;
    router.bias = weights.selection_bias;
    router.ids = shared_.slots.expert;
    router.weights = shared_.slots.weight;
    if (router.num_experts <= 64) {
      router::route_row<2>(router, shared_.logits, 0, shared_.counts, shared_.row);
    } else if (router.num_experts <= 128) {
      router::route_row<4>(router, shared_.logits, 0, shared_.counts, shared_.row);
    } else {
      router::route_row<8>(router, shared_.logits, 0, shared_.counts, shared_.row);
    }
  }

  __device__ __forceinline__ void gate_up(const Feed& feed) {
    activate(feed, 0, deal_.next(feed.shared * feed.n / 2));
    activate(feed, feed.shared, deal_.next(feed.routed * feed.n / 2));
  }

  // Two elements of h at a time, of the slots from `slot` on.
  __device__ __forceinline__ void activate(const Feed& feed, uint32_t slot, const Span& span) {
    for (uint32_t unit = span.start; unit < span.count; unit += kWarps) {
      const uint32_t word = span.first + unit;
      if (!feed.is_there(shared_.slots, slot + 2 * word / feed.n)) continue;
      float h[2];
#pragma unroll
      for (uint32_t i = 0; i < 2; ++i) {
        const float gate = multiply(args_.hidden, places_.x);
        h[i] = silu(gate) * multiply(args_.hidden, places_.x);
      }
      if (lane() == 0) publish(args_.words.h + slot * feed.n / 2 + word, ptx::cvt_bf16x2(h[0], h[1]), epoch_);
    }
  }

  __device__ __forceinline__ void down(const Feed& feed) {
    const uint32_t slots = feed.shared + feed.routed;
    // Slot by slot, because nobody writes those of unused ones.
    for (uint32_t slot = 0; slot < slots; ++slot) {
      if (feed.is_there(shared_.slots, slot)) receive_vector(args_.words.h, slot * feed.n, feed.n, places_.vector);
    }
    __syncthreads();
    const Span span = deal_.next(args_.hidden);
    for (uint32_t unit = span.start; unit < span.count; unit += kWarps) {
      float sum = 0.0f;
      for (uint32_t slot = 0; slot < slots; ++slot) {
        if (!feed.is_there(shared_.slots, slot)) continue;
        float part[1];
        rows_.multiply(feed.n / kVector, address(places_.vector + slot * feed.n * 2), 0, part);
        sum = fmaf(feed.weight(shared_.slots, slot), part[0], sum);
      }
      sum = warp_sum(sum);
      if (lane() == 0) publish(args_.words.experts + span.first + unit, sum, epoch_);
    }
  }

  // One block writes the residual stream, and what epoch the next launch begins after: by now, every block has read it.
  __device__ __forceinline__ void finish(uint32_t before) {
    if (blockIdx.x != 0) return;
    add(args_.words.experts, epoch_);
#pragma unroll
    for (uint32_t i = 0; i < kPairs; ++i) {
      const uint32_t pair = threadIdx.x + i * kThreads;
      if (pair >= args_.hidden / 2) break;
      reinterpret_cast<uint32_t*>(args_.x)[pair] = ptx::cvt_bf16x2(residual_[i].x, residual_[i].y);
    }
    __syncthreads();
    if (threadIdx.x == 0) *args_.epoch = before + args_.num_layers;
  }

  const Args& args_;
  const Places& places_;
  char* const arena_;
  Shared& shared_;
  Attend<kLatent> attend_;
  RowStream<kDepth, Rows> rows_;
  Deal deal_;
  float2 residual_[kPairs];
  uint32_t epoch_ = 0;
};

template <bool kLatent>
__global__ void __launch_bounds__(kThreads, 1) decode_step(const __grid_constant__ Args args) {
  extern __shared__ __align__(128) char arena[];
  __shared__ Shared shared;
  const Places places = Places::of<kLatent>(args);
  Step<kLatent>(args, places, arena, shared).run();
}

}  // namespace anabranch::decode_step
