// The kernel of a decode step; decode_step_sm90.cu says what it computes.
#pragma once

#include "common/bf16.cuh"
#include "common/norm.cuh"
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

// Any rule of a router. Apart, because its code is long and mostly not wanted.
__device__ __noinline__ void choose_by(const router::Args& router, uint32_t* counts, float* row) {
  if (router.num_experts <= 64) {
    router::route_row<2>(router, router.logits, 0, counts, row);
  } else if (router.num_experts <= 128) {
    router::route_row<4>(router, router.logits, 0, counts, row);
  } else {
    router::route_row<8>(router, router.logits, 0, counts, row);
  }
}

template <bool kLatent>
class Step {
 public:
  __device__ __forceinline__ Step(const Args& args, const Places& places, char* arena, Shared& shared)
      : args_(args),
        places_(places),
        arena_(arena),
        shared_(shared),
        attend_(args, places, arena, shared.attend),
        stream_(args, shared.slots, address(threadIdx.x / kWarpSize * depth_of(kLatent) * kStreamBytes)) {}

  __device__ __forceinline__ void run() {
    stream_.begin();
    const uint32_t before = *args_.epoch;
    attend_.prepare();
    read();
    clear_tails();
    // After the last expert there is nobody.
#pragma unroll 1
    for (uint32_t i = threadIdx.x; i < kMaxExperts; i += kThreads) shared_.logits[i] = -INFINITY;
    layer_ = 0;
    epoch_ = before + 1;
    // One place for all products: what is written once stays in the instruction cache.
    Product product = Product::kProject;
    for (;;) {
      receive(product);
      const Part part(args_, routes(), product, blockIdx.x);
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
      // Experts are chosen while the shared ones' last tiles are on their way, so that the routed ones' come after
      // them.
      bool chooses = product == Product::kShared && routes();
      uint32_t begin = 0;
      uint32_t end = chooses ? stream_.before_last(part) : part.tiles;
      for (;;) {
        stream_.multiply(part, begin, end, address(vectors), bytes, units, sums());
        if (chooses) choose();
        chooses = false;
        if (end == part.tiles) break;
        begin = end;
        end = part.tiles;
      }
      if (part.count > 0) {
        __syncthreads();
        publish(product, part);
      }
      if (product == Product::kShared || product == Product::kRouted) publish_tails(product);
      product = after<kLatent>(product, routes());
      if (product == Product::kProject) {
        if (++layer_ == args_.num_layers) break;
        ++epoch_;
      }
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

  // Brings what the product multiplies, and does what comes before it.
  __device__ __forceinline__ void receive(Product product) {
    switch (product) {
      case Product::kProject:
      case Product::kShared: {
        const bool begins = product == Product::kProject;
        const Word* const words = !begins ? args_.words.attention : layer_ == 0 ? nullptr : args_.words.experts;
        // On its way while the norm waits.
        GateRow gate;
        const bool judges = !begins && routes() && blockIdx.x < args_.router.num_experts;
        if (judges) gate.read(*this, blockIdx.x);
        norm(words, begins ? epoch_ - 1 : epoch_, begins);
        if (judges) judge(gate);
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
        receive_vector(kLatent ? args_.words.expanded : args_.words.attended, args_.attention.num_heads * args_.o_dim,
                       places_.vector);
        clear_tail(places_.vector, args_.attention.num_heads * args_.o_dim);
        break;
      case Product::kRouted:
        // The shared experts' sums are read until all have published theirs.
        break;
      case Product::kDown:
        receive_vector(args_.words.h, h_elements(), places_.vector);
        break;
    }
    __syncthreads();
  }

  // The sum of a row, of a product's [groups, tiles, 16].
  __device__ __forceinline__ float sum_of(const Part& part, uint32_t row) const {
    const float* from = sums() + row;
    float sum = 0.0f;
#pragma unroll 4
    for (uint32_t group = 0; group < 1u << part.group_bits; ++group, from += part.tiles * 16) sum += *from;
    return sum;
  }

  // What the warps have summed up, as words. A thread has a row; a tile's are neighbouring lanes.
  __device__ __forceinline__ void publish(Product product, const Part& part) {
    const Feed feed(args_, routes());
    const uint32_t rows = part.tiles * 16;
#pragma unroll 1
    for (uint32_t base = warp() * kWarpSize; base < rows; base += kThreads) {
      const uint32_t row = base + lane();
      const uint32_t tile = row / 16;
      const uint32_t of_tile = row % 16;
      const bool even = of_tile < 8 && of_tile % 2 == 0;
      float sum = row < rows ? sum_of(part, row) : 0.0f;
      switch (product) {
        case Product::kProject:
        case Product::kOutput:
        case Product::kDown: {
          Word* const words = product == Product::kProject  ? args_.words.projected
                              : product == Product::kOutput ? args_.words.attention
                                                            : args_.words.experts;
          if (row < part.count) decode_step::publish(words + part.first + row, sum, epoch_);
          break;
        }
        case Product::kAbsorb:
        case Product::kExpand: {
          Word* const words = product == Product::kAbsorb ? args_.words.absorbed : args_.words.expanded;
          const float next = __shfl_down_sync(kFullWarp, sum, 1);
          if (even && tile < part.count) {
            const uint32_t word = (part.first + tile) * 4 + of_tile / 2;
            decode_step::publish(words + word, ptx::cvt_bf16x2(sum, next), epoch_);
          }
          break;
        }
        default: {
          const uint32_t column = tile * 8 + of_tile % 8;
          uint32_t slot = feed.of_n.quotient(part.first + column);
          const uint32_t element = part.first + column - slot * feed.n;
          if (product == Product::kRouted) slot += feed.shared;
          sum = silu(sum) * __shfl_down_sync(kFullWarp, sum, 8);
          // Of unused slots zeros.
          const bool inside = column < part.count;
          sum = inside && feed.is_there(shared_.slots, slot) ? sum * feed.weight(shared_.slots, slot) : 0.0f;
          const float next = __shfl_down_sync(kFullWarp, sum, 1);
          if (even && inside) {
            Word* const words = args_.words.h + slot * chunks_of(feed.n) * (kChunk / 2);
            decode_step::publish(words + element / 2, ptx::cvt_bf16x2(sum, next), epoch_);
          }
        }
      }
    }
  }

  // Zeros up to whole chunks after the slots' parts of h, where they are not that.
  __device__ __forceinline__ void publish_tails(Product product) {
    const Feed feed(args_, routes());
    const uint32_t words = chunks_of(feed.n) * (kChunk / 2);
    const uint32_t tail = words - feed.n / 2;
    if (tail == 0 || blockIdx.x != 0) return;
    const uint32_t first = product == Product::kRouted ? feed.shared : 0;
    const uint32_t count = product == Product::kRouted ? feed.routed : feed.shared;
#pragma unroll 1
    for (uint32_t i = threadIdx.x; i < count * tail; i += kThreads) {
      const uint32_t slot = i / tail;
      decode_step::publish(args_.words.h + (first + slot) * words + feed.n / 2 + i - slot * tail, 0u, epoch_);
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
#pragma unroll 1
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
    if (begins) attend_.begin(weights());
    sum = 0.0f;
#pragma unroll
    for (uint32_t i = 0; i < kWarps; ++i) sum += shared_.squares[i];
    const float scale = norm_scale(sum, static_cast<float>(args_.hidden), args_.norm_eps);
#pragma unroll
    for (uint32_t i = 0; i < kPairs; ++i) {
      const uint32_t pair = threadIdx.x + i * kThreads;
      if (pair >= pairs) break;
      reinterpret_cast<uint32_t*>(arena_ + places_.x)[pair] =
          ptx::cvt_bf16x2(residual_[i].x * scale * scales[i].x, residual_[i].y * scale * scales[i].y);
    }
    __syncthreads();
  }

  // Words of two bf16 each to a vector in shared memory.
  __device__ __forceinline__ void receive_vector(const Word* words, uint32_t elements, uint32_t place) {
    receive_pairs<4>(words, elements / 4, epoch_, [&](uint32_t pair, Two two) {
      *reinterpret_cast<uint2*>(arena_ + place + pair * 8) = make_uint2(two.first, two.second);
    });
  }

  // h of all slots, each of whole chunks.
  __device__ __forceinline__ uint32_t h_elements() const {
    const Feed feed(args_, routes());
    return feed.slots() * chunks_of(feed.n) * kChunk;
  }

  // Projected queries of the heads that the block absorbs.
  __device__ __forceinline__ void receive_queries() {
    const Part part(args_, routes(), Product::kAbsorb, blockIdx.x);
    if (part.count == 0) return;
    const uint32_t units = args_.attention.key_dim / 8;
    const uint32_t first = part.first / units;
    const uint32_t heads = (part.first + part.count - 1) / units + 1 - first;
    const uint32_t pitch = chunks_of(args_.q_dim) * kChunkBytes;
    const uint32_t half = args_.q_dim / 2;
    receive_pairs<2>(args_.words.projected + first * args_.q_dim, heads * half, epoch_, [&](uint32_t pair, Two two) {
      const uint32_t head = pair / half;
      *reinterpret_cast<uint32_t*>(arena_ + places_.q + (first + head) * pitch + (pair - head * half) * 4) =
          ptx::cvt_bf16x2(__uint_as_float(two.first), __uint_as_float(two.second));
    });
  }

  // Attended latents of the heads that the block expands, of all parts that keys were cut into.
  __device__ __forceinline__ void receive_latents() {
    const Part part(args_, routes(), Product::kExpand, blockIdx.x);
    if (part.count == 0) return;
    const uint32_t units = args_.o_dim / 8;
    const uint32_t first = part.first / units;
    const uint32_t heads = (part.first + part.count - 1) / units + 1 - first;
    attend_.receive_sums(first, heads, places_.attended, chunks_of(args_.attention.value_dim) * kChunkBytes, epoch_);
  }

  // This thread's part of an expert's row of the gate.
  struct GateRow {
    static constexpr uint32_t kVectors = kMaxHidden / kVector / kThreads;
    uint4 held[kVectors];

    __device__ __forceinline__ void read(const Step& step, uint32_t expert) {
      const uint32_t vectors = step.args_.hidden / kVector;
      const uint4* const row = static_cast<const uint4*>(step.weights().gate) + uint64_t{expert} * vectors;
#pragma unroll
      for (uint32_t i = 0; i < kVectors; ++i) {
        const uint32_t at = threadIdx.x + i * kThreads;
        held[i] = at < vectors ? row[at] : uint4{};
      }
    }
  };

  // The gate's rows are spread over all blocks, which multiply the shared experts' before they look at the logits.
  __device__ __forceinline__ void judge(GateRow& gate) {
    const uint32_t experts = args_.router.num_experts;
    const uint4* const x = reinterpret_cast<const uint4*>(arena_ + places_.x);
#pragma unroll 1
    for (uint32_t turn = 0, expert = blockIdx.x; expert < experts; ++turn, expert += gridDim.x) {
      if (turn > 0) gate.read(*this, expert);
      float sum = 0.0f;
#pragma unroll
      for (uint32_t i = 0; i < GateRow::kVectors; ++i) {
        const uint32_t at = threadIdx.x + i * kThreads;
        float a[kVector];
        float b[kVector];
        unpack(a, gate.held[i]);
        unpack(b, at < args_.hidden / kVector ? x[at] : uint4{});
#pragma unroll
        for (uint32_t j = 0; j < kVector; ++j) sum = fmaf(a[j], b[j], sum);
      }
      sum = warp_sum(sum);
      if (lane() == 0) shared_.gate[turn][warp()] = sum;
    }
    __syncthreads();
    if (warp() != 0) return;
#pragma unroll 1
    for (uint32_t turn = 0, expert = blockIdx.x; expert < experts; ++turn, expert += gridDim.x) {
      const float sum = warp_sum(lane() < kWarps ? shared_.gate[turn][lane()] : 0.0f);
      if (lane() == 0) decode_step::publish(args_.words.logits + expert, sum, epoch_);
    }
  }

  // Every block routes for itself, to the same experts.
  __device__ __forceinline__ void choose() {
    const uint32_t pairs = args_.router.num_experts / 2;
    float2 two = {};
    if (threadIdx.x < pairs) {
      const Two words = receive_two(args_.words.logits + 2 * threadIdx.x, epoch_);
      two = make_float2(__uint_as_float(words.first), __uint_as_float(words.second));
      reinterpret_cast<float2*>(shared_.logits)[threadIdx.x] = two;
    }
    const bool odd = __syncthreads_or(!isfinite(two.x) || !isfinite(two.y)) != 0;
    if (odd || !args_.ranks_plainly) {
      if (warp() == 0) choose_by_rule();
    } else {
      rank();
    }
    __syncthreads();
    stream_.resume();
    // Nobody wants the weights before the next barrier.
    if (!odd && args_.ranks_plainly && warp() == 0) weigh();
  }

  // An expert's place is the number of those before it, which some threads count together.
  __device__ __forceinline__ void rank() {
    static_assert(kThreads >= kMaxExperts);
    const uint32_t experts = args_.router.num_experts;
    const uint32_t bits = experts <= kThreads / 4 ? 2 : experts <= kThreads / 2 ? 1 : 0;
    const uint32_t expert = threadIdx.x >> bits;
    const float own = shared_.logits[expert];
    uint32_t before = 0;
#pragma unroll 2
    for (uint32_t other = (threadIdx.x & ((1u << bits) - 1)) * 4; other < experts; other += 4u << bits) {
      const float4 four = *reinterpret_cast<const float4*>(shared_.logits + other);
      before += four.x > own || (four.x == own && other < expert);
      before += four.y > own || (four.y == own && other + 1 < expert);
      before += four.z > own || (four.z == own && other + 2 < expert);
      before += four.w > own || (four.w == own && other + 3 < expert);
    }
    if (bits > 0) before += __shfl_xor_sync(kFullWarp, before, 1);
    if (bits > 1) before += __shfl_xor_sync(kFullWarp, before, 2);
    if (expert < experts && before < args_.router.topk) shared_.slots.expert[before] = static_cast<int32_t>(expert);
  }

  // The weights of the chosen, as the router's kernel has them.
  __device__ __forceinline__ void weigh() {
    const router::Args& router = args_.router;
    router::Softmax softmax = {shared_.logits[shared_.slots.expert[0]], 0.0f};
    if (router.score == ANABRANCH_SCORE_SOFTMAX) {
#pragma unroll 1
      for (uint32_t expert = lane(); expert < router.num_experts; expert += kWarpSize) {
        softmax.sum += router::exp_fast(shared_.logits[expert] - softmax.max);
      }
      softmax.sum = warp_sum(softmax.sum);
    }
    const bool chosen = lane() < router.topk;
    const float logit = chosen ? shared_.logits[shared_.slots.expert[lane()]] : -INFINITY;
    const float weight = router::weigh(router, chosen, logit, softmax, false);
    if (chosen) shared_.slots.weight[lane()] = weight;
  }

  __device__ __forceinline__ void choose_by_rule() {
    router::Args router = args_.router;
    router.logits = shared_.logits;
    router.bias = weights().selection_bias;
    router.ids = shared_.slots.expert;
    router.weights = shared_.slots.weight;
    choose_by(router, shared_.counts, shared_.row);
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
