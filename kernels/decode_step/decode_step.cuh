// The kernel of a decode step; decode_step_sm90.cu says what it computes.
#pragma once

#include "common/bf16.cuh"
#include "common/silu.cuh"
#include "decode_step/attend.cuh"
#include "decode_step/stream.cuh"
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
 public:
  __device__ __forceinline__ Step(const Args& args, const Places& places, char* arena, Shared& shared)
      : args_(args),
        places_(places),
        arena_(arena),
        shared_(shared),
        attend_(args, places, arena, shared.attend),
        stream_(args, shared.slots, address(threadIdx.x / kWarpSize * kDepth * kStreamBytes)) {}

  __device__ __forceinline__ void run() {
    stream_.begin();
    const uint32_t before = *args_.epoch;
    attend_.prepare();
    read();
    clear_tails();
    layer_ = 0;
    epoch_ = before + 1;
    // One place for all products: what is written once stays in the instruction cache.
    Product product = Product::kProject;
    for (;;) {
      receive(product);
      const Part part = Part::of<kLatent>(args_, routes(), product, blockIdx.x, gridDim.x);
      uint32_t vectors = places_.vector;
      uint32_t units = 0;
      uint32_t bytes = 0;
      if (product == Product::kProject || product == Product::kShared || product == Product::kRouted) {
        vectors = places_.x;
      } else if (kLatent && (product == Product::kAbsorb || product == Product::kExpand)) {
        const bool absorbs = product == Product::kAbsorb;
        vectors = absorbs ? places_.q : places_.attended;
        units = (absorbs ? args_.attention.key_dim : args_.o_dim) / 8;
        bytes = chunks_of(part.width) * kChunkBytes;
      }
      stream_.multiply(part, address(vectors), bytes, units, sums());
      __syncthreads();
      publish(product, part);
      if (product == Product::kDown) {
        if (++layer_ == args_.num_layers) break;
        ++epoch_;
      }
      product = after(product);
    }
    finish(before);
  }

 private:
  __device__ __forceinline__ uint32_t address(uint32_t place) const {
    return static_cast<uint32_t>(__cvta_generic_to_shared(arena_)) + place;
  }
  __device__ __forceinline__ static uint32_t lane() { return threadIdx.x % kWarpSize; }
  __device__ __forceinline__ static uint32_t warp() { return threadIdx.x / kWarpSize; }

  __device__ __forceinline__ const AnabranchDecodeLayer& weights() const { return args_.layers[layer_]; }
  __device__ __forceinline__ bool routes() const { return weights().gate != nullptr; }
  __device__ __forceinline__ float* sums() const { return reinterpret_cast<float*>(arena_ + places_.sums); }

  __device__ __forceinline__ Product after(Product product) const {
    switch (product) {
      case Product::kProject:
        return kLatent ? Product::kAbsorb : Product::kOutput;
      case Product::kShared:
        return routes() ? Product::kRouted : Product::kDown;
      case Product::kDown:
        return Product::kProject;
      default:
        return static_cast<Product>(static_cast<uint32_t>(product) + 1);
    }
  }

  // Brings what the product multiplies, and does what comes before it.
  __device__ __forceinline__ void receive(Product product) {
    switch (product) {
      case Product::kProject:
      case Product::kShared: {
        const bool begins = product == Product::kProject;
        const Word* const words = !begins ? args_.words.attention : layer_ == 0 ? nullptr : args_.words.experts;
        norm(words, begins ? epoch_ - 1 : epoch_, begins);
        if (!begins && routes()) judge();
        return;
      }
      case Product::kAbsorb:
        if constexpr (kLatent) receive_queries();
        break;
      case Product::kExpand:
        if constexpr (kLatent) {
          attend_.run(weights(), epoch_);
          receive_latents();
        }
        break;
      case Product::kOutput:
        if constexpr (!kLatent) attend_.run(weights(), epoch_);
        receive_vector(kLatent ? args_.words.expanded : args_.words.attended, 0,
                       args_.attention.num_heads * args_.o_dim, places_.vector);
        clear_tail(places_.vector, args_.attention.num_heads * args_.o_dim);
        break;
      case Product::kRouted:
        if (warp() == 0) choose();
        __syncthreads();
        stream_.resume();
        return;
      case Product::kDown:
        receive_h(Feed(args_, routes()));
        break;
    }
    __syncthreads();
  }

  // A row's sum.
  __device__ __forceinline__ float sum_of(const Part& part, uint32_t row) const {
    const float* const from = sums() + row;
    float sum = 0.0f;
    for (uint32_t group = 0; group < part.groups; ++group) sum += from[group * part.tiles * 16];
    return sum;
  }

  // What the warps have summed up, as words.
  __device__ __forceinline__ void publish(Product product, const Part& part) {
    switch (product) {
      case Product::kProject:
      case Product::kOutput:
      case Product::kDown: {
        Word* const words = product == Product::kProject  ? args_.words.projected
                            : product == Product::kOutput ? args_.words.attention
                                                          : args_.words.experts;
        for (uint32_t row = threadIdx.x; row < part.count; row += kThreads) {
          decode_step::publish(words + part.first + row, sum_of(part, row), epoch_);
        }
        return;
      }
      case Product::kAbsorb:
      case Product::kExpand: {
        Word* const words = product == Product::kAbsorb ? args_.words.absorbed : args_.words.expanded;
        for (uint32_t pair = threadIdx.x; pair < part.count * 4; pair += kThreads) {
          const uint32_t row = pair / 4 * 16 + pair % 4 * 2;
          const uint32_t two = ptx::cvt_bf16x2(sum_of(part, row), sum_of(part, row + 1));
          decode_step::publish(words + part.first * 4 + pair, two, epoch_);
        }
        return;
      }
      default: {
        const Feed feed(args_, routes());
        const uint32_t first = (product == Product::kRouted ? feed.shared * feed.n : 0) + part.first;
        for (uint32_t pair = threadIdx.x; pair < part.count / 2; pair += kThreads) {
          const uint32_t column = first + 2 * pair;
          const uint32_t slot = column / feed.n;
          if (!feed.is_there(shared_.slots, slot)) continue;
          const float weight = feed.weight(shared_.slots, slot);
          const uint32_t row = pair / 4 * 16 + pair % 4 * 2;
          const float x = silu(sum_of(part, row)) * sum_of(part, row + 8) * weight;
          const float y = silu(sum_of(part, row + 1)) * sum_of(part, row + 9) * weight;
          decode_step::publish(args_.words.h + column / 2, ptx::cvt_bf16x2(x, y), epoch_);
        }
      }
    }
  }

  // Zeros after a vector, up to whole chunks.
  __device__ __forceinline__ void clear_tail(uint32_t place, uint32_t elements) {
    const uint32_t at = elements + threadIdx.x;
    if (at < chunks_of(elements) * kChunk) reinterpret_cast<uint16_t*>(arena_ + place)[at] = 0;
  }

  // Of the vectors that keep their place.
  __device__ __forceinline__ void clear_tails() {
    clear_tail(places_.x, args_.hidden);
    if constexpr (kLatent) {
      for (uint32_t head = 0; head < args_.attention.num_heads; ++head) {
        clear_tail(places_.q + head * chunks_of(args_.q_dim) * kChunkBytes, args_.q_dim);
        clear_tail(places_.attended + head * chunks_of(args_.attention.value_dim) * kChunkBytes,
                   args_.attention.value_dim);
      }
    }
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
      const Two two = received(words + 2 * pair, a[i], b[i], epoch);
      residual_[i].x += __uint_as_float(two.first);
      residual_[i].y += __uint_as_float(two.second);
    }
  }

  // The norm of the residual stream, after an addition, to x. Every block makes it for itself, to the same bits. With
  // `begins`, the layer's attention asks for its first keys on the way.
  __device__ __forceinline__ void norm(const Word* words, uint32_t epoch, bool begins) {
    const uint32_t pairs = args_.hidden / 2;
    const float* const weight = begins ? weights().attention_norm : weights().feed_forward_norm;
    float2 scales[kPairs];
#pragma unroll
    for (uint32_t i = 0; i < kPairs; ++i) {
      const uint32_t pair = threadIdx.x + i * kThreads;
      if (pair < pairs) scales[i] = reinterpret_cast<const float2*>(weight)[pair];
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
    if (begins) ptx::fence_shared_proxy();
    __syncthreads();
    if (begins && warp() == 0) attend_.begin(weights());
    sum = 0.0f;
#pragma unroll
    for (uint32_t i = 0; i < kWarps; ++i) sum += shared_.squares[i];
    const float scale = 1.0f / sqrtf(sum / static_cast<float>(args_.hidden) + args_.norm_eps);
#pragma unroll
    for (uint32_t i = 0; i < kPairs; ++i) {
      const uint32_t pair = threadIdx.x + i * kThreads;
      if (pair >= pairs) break;
      reinterpret_cast<uint32_t*>(arena_ + places_.x)[pair] =
          ptx::cvt_bf16x2(residual_[i].x * scale * scales[i].x, residual_[i].y * scale * scales[i].y);
    }
    __syncthreads();
  }

  // Words of two bf16 each to a vector in shared memory, from the first-th element on.
  __device__ __forceinline__ void receive_vector(const Word* words, uint32_t first, uint32_t elements, uint32_t place) {
    receive_pairs<4>(words + first / 2, threadIdx.x, kThreads, elements / 4, epoch_, [&](uint32_t pair, Two two) {
      *reinterpret_cast<uint2*>(arena_ + place + 2 * first + pair * 8) = make_uint2(two.first, two.second);
    });
  }

  // Projected queries of the heads that the block absorbs.
  __device__ __forceinline__ void receive_queries() {
    const Part part = Part::of<kLatent>(args_, true, Product::kAbsorb, blockIdx.x, gridDim.x);
    if (part.count == 0) return;
    const uint32_t units = args_.attention.key_dim / 8;
    const uint32_t first = part.first / units;
    const uint32_t heads = (part.first + part.count - 1) / units + 1 - first;
    const uint32_t pitch = chunks_of(args_.q_dim) * kChunkBytes;
    const uint32_t half = args_.q_dim / 2;
    receive_pairs<2>(args_.words.projected + first * args_.q_dim, threadIdx.x, kThreads, heads * half, epoch_,
                     [&](uint32_t pair, Two two) {
                       const uint32_t head = pair / half;
                       *reinterpret_cast<uint32_t*>(arena_ + places_.q + (first + head) * pitch +
                                                    (pair - head * half) * 4) =
                           ptx::cvt_bf16x2(__uint_as_float(two.first), __uint_as_float(two.second));
                     });
  }

  // Attended latents of the heads that the block expands.
  __device__ __forceinline__ void receive_latents() {
    const Part part = Part::of<kLatent>(args_, true, Product::kExpand, blockIdx.x, gridDim.x);
    if (part.count == 0) return;
    const uint32_t units = args_.o_dim / 8;
    const uint32_t first = part.first / units;
    const uint32_t heads = (part.first + part.count - 1) / units + 1 - first;
    const uint32_t latent = args_.attention.value_dim;
    const uint32_t pitch = chunks_of(latent) * kChunkBytes;
    const uint32_t quarter = latent / 4;
    receive_pairs<4>(args_.words.attended + first * latent / 2, threadIdx.x, kThreads, heads * quarter, epoch_,
                     [&](uint32_t pair, Two two) {
                       const uint32_t head = pair / quarter;
                       *reinterpret_cast<uint2*>(arena_ + places_.attended + (first + head) * pitch +
                                                 (pair - head * quarter) * 8) = make_uint2(two.first, two.second);
                     });
  }

  // h of all slots. Nobody writes those of unused ones, which are zeros.
  __device__ __forceinline__ void receive_h(const Feed& feed) {
    const uint32_t quarter = feed.n / 4;
    const uint32_t pitch = chunks_of(feed.n) * kChunkBytes;
    for (uint32_t slot = 0; slot < feed.slots(); ++slot) {
      const uint32_t place = places_.vector + slot * pitch;
      clear_tail(place, feed.n);
      if (feed.is_there(shared_.slots, slot)) continue;
      for (uint32_t i = threadIdx.x; i < pitch / 16; i += kThreads) {
        *reinterpret_cast<uint4*>(arena_ + place + i * 16) = uint4{};
      }
    }
    const uint32_t pairs = feed.slots() * quarter;
    for (uint32_t base = threadIdx.x; base < pairs; base += 4 * kThreads) {
      Word a[4];
      Word b[4];
      bool wanted[4];
#pragma unroll
      for (uint32_t i = 0; i < 4; ++i) {
        const uint32_t pair = base + i * kThreads;
        wanted[i] = pair < pairs && feed.is_there(shared_.slots, pair / quarter);
        if (wanted[i]) ptx::ld_relaxed_2(args_.words.h + 2 * pair, a[i], b[i]);
      }
#pragma unroll
      for (uint32_t i = 0; i < 4; ++i) {
        if (!wanted[i]) continue;
        const uint32_t pair = base + i * kThreads;
        const Two two = received(args_.words.h + 2 * pair, a[i], b[i], epoch_);
        const uint32_t slot = pair / quarter;
        *reinterpret_cast<uint2*>(arena_ + places_.vector + slot * pitch + (pair - slot * quarter) * 8) =
            make_uint2(two.first, two.second);
      }
    }
  }

  // The gate's rows are spread over all blocks, which multiply the shared experts' before they look at the logits.
  __device__ __forceinline__ void judge() {
    const uint32_t experts = args_.router.num_experts;
    const uint32_t vectors = args_.hidden / kVector;
    const uint4* const gate = static_cast<const uint4*>(weights().gate);
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
    if (warp() != 0) return;
    for (uint32_t turn = 0, expert = blockIdx.x; expert < experts; ++turn, expert += gridDim.x) {
      const float sum = warp_sum(lane() < kWarps ? shared_.gate[turn][lane()] : 0.0f);
      if (lane() == 0) decode_step::publish(args_.words.logits + expert, sum, epoch_);
    }
  }

  // One warp of each block routes, to the same experts.
  __device__ __forceinline__ void choose() {
    const uint32_t experts = args_.router.num_experts;
    receive_pairs<4>(args_.words.logits, lane(), kWarpSize, experts / 2, epoch_, [&](uint32_t pair, Two two) {
      reinterpret_cast<float2*>(shared_.logits)[pair] =
          make_float2(__uint_as_float(two.first), __uint_as_float(two.second));
    });
    __syncwarp();
    router::Args router = args_.router;
    router.bias = weights().selection_bias;
    router.ids = shared_.slots.expert;
    router.weights = shared_.slots.weight;
    if (experts <= 64) {
      router::route_row<2>(router, shared_.logits, 0, shared_.counts, shared_.row);
    } else if (experts <= 128) {
      router::route_row<4>(router, shared_.logits, 0, shared_.counts, shared_.row);
    } else {
      router::route_row<8>(router, shared_.logits, 0, shared_.counts, shared_.row);
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
  WeightStream<kLatent> stream_;
  float2 residual_[kPairs];
  uint32_t layer_;
  uint32_t epoch_;
};

template <bool kLatent>
__global__ void __launch_bounds__(kThreads, 1) decode_step(const __grid_constant__ Args args) {
  extern __shared__ __align__(128) char arena[];
  __shared__ Shared shared;
  const Places places = Places::of<kLatent>(args);
  Step<kLatent>(args, places, arena, shared).run();
}

}  // namespace anabranch::decode_step
