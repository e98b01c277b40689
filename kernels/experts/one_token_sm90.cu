// one_token: a single token's experts, from its routing to the layer's output, on Hopper.
//
//   h[k] = silu(x W_gate^T) * (x W_up^T),   out = sum_k weights[k] (h[k] W_down^T)     W: those of expert ids[k]
//
//   x [d], gate_up [E, 2n, d], down [E, d, n] bf16, ids [K], weights [K] -> h [K, n], out [d] bf16. Sums in float32, in
//   an order that depends on d, n and K alone.
//
// Reference: anabranch::reference::MoeLayer. Architecture: 9.0 (copy engine). Alignment: 16 bytes; d and n multiples
// of 8.
//
// With one token the products are dot products, and only the weights' way through memory counts. Every lane of every
// warp copies weights for itself alone, 16 bytes at a time, kDepth steps of its warp ahead, and so meets nobody while
// it multiplies. A warp's part of the second product follows its part of the first in the same ring of steps, so that
// memory does not rest while the blocks wait for one another's h. A warp takes a column of the result through all K
// experts, which leaves nothing to sum up afterwards.
//
// Bounds. Bytes 6 d n an expert hit; one multiply-add for two bytes.

#include "common/bf16.cuh"
#include "common/launch.cuh"
#include "common/warp.cuh"
#include "experts/one_token.cuh"
#include "experts/silu.cuh"
#include "ptx/bulk_copy.cuh"
#include "ptx/cp_async.cuh"
#include "ptx/gpu_scope.cuh"
#include "ptx/grid_dependency.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/mma.cuh"
#include "ptx/shared.cuh"
#include "ptx/warpgroup.cuh"

namespace anabranch::experts {
namespace {

constexpr uint32_t kThreads = (kOneTokenWarps + 1) * kWarpSize;
constexpr uint32_t kDepth = kOneTokenSteps;
constexpr uint32_t kStepBytes = kWarpSize * 16;

__device__ __forceinline__ void wait(uint32_t barrier, uint32_t parity) {
  while (!ptx::mbarrier_try_wait(barrier, parity)) {
  }
}

struct OneTokenArgs {
  const uint16_t* x;        // [d] bf16
  const uint16_t* gate_up;  // [E, 2n, d] bf16
  const uint16_t* down;     // [E, d, n] bf16
  const int32_t* ids;       // [K]; one that is no expert's adds nothing
  const float* weights;     // [K]
  uint16_t* h;              // [K, n] bf16
  uint16_t* out;            // [d] bf16
  uint32_t* gated;          // blocks that have written their part of h; zero before the launch
  uint32_t num_experts;
  uint32_t topk;
  uint32_t hidden;
  uint32_t intermediate;
};

// Shared memory, by address.
struct Places {
  uint32_t ring;       // [warps, kDepth] steps
  uint32_t x;          // [d]
  uint32_t h;          // [K, n]
  uint32_t x_there;    // barriers: x has been copied,
  uint32_t gate_done;  // all warps have written their part of h,
  uint32_t h_there;    // h of all blocks has been copied

  __device__ __forceinline__ Places(const char* shared, const OneTokenArgs& args)
      : ring(static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
        x(ring + kOneTokenWarps * kDepth * kStepBytes),
        h(x + args.hidden * 2),
        x_there(h + args.topk * args.intermediate * 2),
        gate_done(x_there + 8),
        h_there(x_there + 16) {}
};

// What a block has of a number of things: neighbours, whose weights lie together in memory.
struct Share {
  uint32_t first;
  uint32_t count;

  __device__ __forceinline__ explicit Share(uint32_t all)
      : first(static_cast<uint32_t>(uint64_t{all} * blockIdx.x / gridDim.x)),
        count(static_cast<uint32_t>(uint64_t{all} * (blockIdx.x + 1) / gridDim.x) - first) {}
};

// The token's experts: lane k has the k-th.
class Chosen {
 public:
  __device__ __forceinline__ explicit Chosen(const OneTokenArgs& args) {
    const uint32_t lane = threadIdx.x % kWarpSize;
    const bool there = lane < args.topk;
    expert_ = there ? static_cast<uint32_t>(args.ids[lane]) : args.num_experts;
    weight_ = there ? args.weights[lane] : 0.0f;
    valid_ = __ballot_sync(kFullWarp, expert_ < args.num_experts);
  }

  __device__ __forceinline__ bool is_there(uint32_t k) const { return valid_ >> k & 1; }
  // Whole warps call these.
  __device__ __forceinline__ uint32_t expert(uint32_t k) const { return __shfl_sync(kFullWarp, expert_, k); }
  __device__ __forceinline__ float weight(uint32_t k) const { return __shfl_sync(kFullWarp, weight_, k); }

 private:
  uint32_t expert_;
  float weight_;
  uint32_t valid_;
};

// One warp's rows of both products, one after another: of the first, gate and up of a column of h, of the second, a
// column of the result by all experts. `next` is the row whose copies are being asked for, kDepth steps ahead.
class Multiplier {
 public:
  __device__ __forceinline__ Multiplier(const OneTokenArgs& args, const Places& places, const Chosen& chosen,
                                        uint32_t warp)
      : args_(args),
        places_(places),
        chosen_(chosen),
        warp_(warp),
        lane_(threadIdx.x % kWarpSize),
        ring_(places.ring + warp * kDepth * kStepBytes + lane_ * 16),
        columns_(args.topk * args.intermediate),
        results_(args.hidden),
        next_unit_(warp) {}

  __device__ __forceinline__ void run() {
    find_gate();
    for (uint32_t i = 0; i < kDepth; ++i) ask();
    wait(places_.x_there, 0);
    for (uint32_t unit = warp_; unit < columns_.count; unit += kOneTokenWarps) {
      const uint32_t column = columns_.first + unit;
      if (!chosen_.is_there(column / args_.intermediate)) continue;
      const float gate = warp_sum(dot(args_.hidden / kVector, places_.x));
      const float up = warp_sum(dot(args_.hidden / kVector, places_.x));
      if (lane_ == 0) args_.h[column] = float_to_bf16(silu_times(gate, up));
    }
    if (lane_ == 0) {
      // Written by ordinary stores, read by the copy engine.
      ptx::fence_global_proxy();
      ptx::mbarrier_arrive(places_.gate_done);
    }
    wait(places_.h_there, 0);
    for (uint32_t unit = warp_; unit < results_.count; unit += kOneTokenWarps) {
      float sum = 0.0f;
      for (uint32_t k = 0; k < args_.topk; ++k) {
        if (!chosen_.is_there(k)) continue;
        const float part = dot(args_.intermediate / kVector, places_.h + k * args_.intermediate * 2);
        sum = fmaf(chosen_.weight(k), part, sum);
      }
      sum = warp_sum(sum);
      if (lane_ == 0) args_.out[results_.first + unit] = float_to_bf16(sum);
    }
  }

 private:
  // This lane's part of the next row's product with a vector in shared memory. The tensor cores do it: what eight times
  // four lanes have are segments, of the row along M and of the vector along N, and the products of like segments, on
  // the diagonal, are wanted. That is a sixteenth of what is multiplied, and a sixth of the instructions that unpacking
  // and multiplying would take.
  __device__ __forceinline__ float dot(uint32_t vectors, uint32_t vector) {
    float low[4] = {};
    float high[4] = {};
    for (uint32_t at = lane_; at < vectors + lane_; at += kWarpSize) {
      ptx::cp_async_wait<kDepth - 1>();
      const uint4 w = ptx::ld_shared_16(ring_ + step_ * kStepBytes);
      uint4 v = {};
      if (at < vectors) v = ptx::ld_shared_16(vector + at * 16);
      // Which of a vector's elements are which k of a product is of no importance as long as both agree.
      ptx::mma_m16n8k16_bf16(low, {w.x, 0, w.y, 0}, {v.x, v.y});
      ptx::mma_m16n8k16_bf16(high, {w.z, 0, w.w, 0}, {v.z, v.w});
      ask();
    }
    // Lane l has row l / 4 in columns 2 (l % 4) and the next.
    const uint32_t row = lane_ / 4;
    if (lane_ % 4 != row / 2) return 0.0f;
    return row % 2 == 0 ? low[0] + high[0] : low[1] + high[1];
  }

  // Asks for the copies of the next step, if there is one, to where the last one was read.
  __device__ __forceinline__ void ask() {
    if (left_ > 0) {
      ptx::cp_async_16(ring_ + step_ * kStepBytes, next_ + lane_, lane_ < left_);
      if (left_ > kWarpSize) {
        next_ += kWarpSize;
        left_ -= kWarpSize;
      } else {
        turn();
      }
    }
    ptx::cp_async_commit();
    step_ = step_ == kDepth - 1 ? 0 : step_ + 1;
  }

  // To the row after.
  __device__ __forceinline__ void turn() {
    if (next_is_down_) {
      ++next_slot_;
      find_down();
    } else if (!next_is_up_) {
      next_is_up_ = true;
      next_ = next_row_ + uint64_t{args_.intermediate} * (args_.hidden / kVector);
      left_ = args_.hidden / kVector;
    } else {
      next_is_up_ = false;
      next_unit_ += kOneTokenWarps;
      find_gate();
    }
  }

  // The next row from next_unit_ on, of an expert that is there.
  __device__ __forceinline__ void find_gate() {
    for (; next_unit_ < columns_.count; next_unit_ += kOneTokenWarps) {
      const uint32_t column = columns_.first + next_unit_;
      const uint32_t k = column / args_.intermediate;
      if (!chosen_.is_there(k)) continue;
      // Of 2n rows an expert.
      const uint64_t row = uint64_t{2 * chosen_.expert(k) - k} * args_.intermediate + column;
      left_ = args_.hidden / kVector;
      next_row_ = reinterpret_cast<const uint4*>(args_.gate_up) + row * left_;
      next_ = next_row_;
      return;
    }
    next_is_down_ = true;
    next_unit_ = warp_;
    find_down();
  }

  // From next_slot_ of next_unit_ on.
  __device__ __forceinline__ void find_down() {
    for (; next_unit_ < results_.count; next_unit_ += kOneTokenWarps) {
      for (; next_slot_ < args_.topk; ++next_slot_) {
        if (!chosen_.is_there(next_slot_)) continue;
        const uint64_t row = uint64_t{chosen_.expert(next_slot_)} * args_.hidden + results_.first + next_unit_;
        left_ = args_.intermediate / kVector;
        next_ = reinterpret_cast<const uint4*>(args_.down) + row * left_;
        return;
      }
      next_slot_ = 0;
    }
    left_ = 0;
  }

  const OneTokenArgs& args_;
  const Places& places_;
  const Chosen& chosen_;
  uint32_t warp_;
  uint32_t lane_;
  uint32_t ring_;  // this lane's part of the first step
  Share columns_;  // of all experts' h
  Share results_;
  uint32_t step_ = 0;
  const uint4* next_ = nullptr;
  const uint4* next_row_ = nullptr;  // where the gate's row begins
  uint32_t left_ = 0;                // vectors of the row, 0 after the last
  uint32_t next_unit_;
  uint32_t next_slot_ = 0;
  bool next_is_up_ = false;
  bool next_is_down_ = false;
};

// One thread brings x and, when all blocks have written it, h.
__device__ __forceinline__ void bring_vectors(const OneTokenArgs& args, const Places& places) {
  ptx::mbarrier_arrive_expect(places.x_there, args.hidden * 2);
  ptx::bulk_copy(places.x, args.x, args.hidden * 2, places.x_there);
  wait(places.gate_done, 0);
  ptx::red_release_add(args.gated, 1);
  while (ptx::ld_acquire(args.gated) < gridDim.x) {
  }
  ptx::fence_global_proxy();
  const uint32_t bytes = args.topk * args.intermediate * 2;
  ptx::mbarrier_arrive_expect(places.h_there, bytes);
  ptx::bulk_copy(places.h, args.h, bytes, places.h_there);
}

__global__ void __launch_bounds__(kThreads, 1) run_one_token(const __grid_constant__ OneTokenArgs args) {
  extern __shared__ __align__(128) char shared[];
  const Places places(shared, args);
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(places.x_there, 1);
    ptx::mbarrier_init(places.gate_done, kOneTokenWarps);
    ptx::mbarrier_init(places.h_there, 1);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  ptx::launch_dependents();
  ptx::wait_for_prerequisites();
  const uint32_t warp = threadIdx.x / kWarpSize;
  if (warp < kOneTokenWarps) {
    const Chosen chosen(args);
    Multiplier(args, places, chosen, warp).run();
  } else if (threadIdx.x % kWarpSize == 0) {
    bring_vectors(args, places);
  }
}

}  // namespace

AnabranchStatus launch_one_token(const Config& config, const Args& args, const void* gate_up, const void* down,
                                 cudaStream_t stream) {
  OneTokenArgs one = {};
  one.x = args.x;
  one.gate_up = static_cast<const uint16_t*>(gate_up);
  one.down = static_cast<const uint16_t*>(down);
  one.ids = args.pairs.ids;
  one.weights = args.weights;
  one.h = args.h;
  one.out = args.out;
  one.gated = args.next_item;
  one.num_experts = args.num_experts;
  one.topk = args.topk;
  one.hidden = args.hidden;
  one.intermediate = args.intermediate;
  int blocks = 0;
  ANABRANCH_TRY(checked(multiprocessors(&blocks)));
  ANABRANCH_TRY(checked(cudaFuncSetAttribute(run_one_token, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                             static_cast<int>(config.shared_bytes))));
  cudaLaunchConfig_t launch = {};
  launch.gridDim = static_cast<uint32_t>(blocks);
  launch.blockDim = kThreads;
  launch.dynamicSmemBytes = config.shared_bytes;
  launch.stream = stream;
  return launch_overlapping(run_one_token, launch, one);
}

}  // namespace anabranch::experts
