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
// warp copies weights for itself alone, 16 bytes at a time, some steps of its warp ahead, and so meets nobody while
// it multiplies. A warp's part of the second product follows its part of the first in the same ring of steps, so that
// memory does not rest while the blocks wait for one another's h. A warp takes a column of the result through all K
// experts, which leaves nothing to sum up afterwards. A block that waits long does the part of h of blocks that have
// not begun: another stream's kernel may hold their multiprocessors, and wait for this one's.
//
// Bounds. Bytes 6 d n an expert hit; one multiply-add for two bytes.

#include "common/bf16.cuh"
#include "common/launch.cuh"
#include "common/ring.cuh"
#include "common/row_stream.cuh"
#include "common/silu.cuh"
#include "common/warp.cuh"
#include "experts/one_token.cuh"
#include "ptx/bulk_copy.cuh"
#include "ptx/gpu_scope.cuh"
#include "ptx/grid_dependency.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/warpgroup.cuh"

namespace anabranch::experts {
namespace {

// Steps of a warp.
template <uint32_t kWarps>
constexpr uint32_t kSteps = kOneTokenRing / kWarps;
template <uint32_t kWarps>
constexpr uint32_t kRingBytes = kWarps * kSteps<kWarps> * kStepBytes;
// One more brings vectors.
template <uint32_t kWarps>
constexpr uint32_t kThreads = (kWarps + 1) * kWarpSize;

struct OneTokenArgs {
  const uint16_t* x;        // [d] bf16
  const uint16_t* gate_up;  // [E, 2n, d] bf16
  const uint16_t* down;     // [E, d, n] bf16
  const int32_t* ids;       // [K]; one that is no expert's adds nothing
  const float* weights;     // [K]
  uint16_t* h;              // [K, n] bf16
  uint16_t* out;            // [d] bf16
  uint32_t* gated;          // parts of h that are written, a block's each; zero before the launch
  uint32_t* begun;          // [blocks]: whether somebody does a block's part of h; zero before the launch
  uint32_t num_experts;
  uint32_t topk;
  uint32_t hidden;
  uint32_t intermediate;
};

// Shared memory, by address.
struct Places {
  uint32_t ring;       // [warps, depth] steps
  uint32_t x;          // [d]
  uint32_t h;          // [K, n]
  uint32_t x_there;    // barriers: x has been copied,
  uint32_t gate_done;  // all warps have written their part of h,
  uint32_t h_there;    // h of all blocks has been copied
  uint32_t* is_own;    // whether the block does its part of h, and no other does

  __device__ __forceinline__ Places(const char* shared, uint32_t ring_bytes, const OneTokenArgs& args)
      : ring(static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
        x(ring + ring_bytes),
        h(x + args.hidden * 2),
        x_there(h + args.topk * args.intermediate * 2),
        gate_done(x_there + 8),
        h_there(x_there + 16),
        is_own(reinterpret_cast<uint32_t*>(const_cast<char*>(shared) + (h_there + 8 - ring))) {}
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

// Where a column of h has its row of the gate; that of up is n rows below.
__device__ __forceinline__ const uint4* gate_row(const OneTokenArgs& args, const Chosen& chosen, uint32_t column) {
  const uint32_t k = column / args.intermediate;
  const uint64_t row = uint64_t{2} * chosen.expert(k) * args.intermediate + (column - k * args.intermediate);
  return reinterpret_cast<const uint4*>(args.gate_up) + row * (args.hidden / kVector);
}

// One warp's rows of both products, one after another: of the first, gate and up of a column of h, of the second, a
// column of the result by all experts.
template <uint32_t kWarps>
class ExpertRows {
 public:
  __device__ __forceinline__ ExpertRows(const OneTokenArgs& args, const Chosen& chosen, const Share& columns,
                                        const Share& results, uint32_t warp)
      : args_(args), chosen_(chosen), columns_(columns), results_(results), warp_(warp), unit_(warp) {}

  __device__ __forceinline__ bool next(const uint4*& row, uint32_t& vectors) {
    if (!is_down_) {
      vectors = args_.hidden / kVector;
      if (is_up_next_) {
        is_up_next_ = false;
        unit_ += kWarps;
        row = gate_ + uint64_t{args_.intermediate} * vectors;
        return true;
      }
      for (; unit_ < columns_.count; unit_ += kWarps) {
        const uint32_t column = columns_.first + unit_;
        const uint32_t k = column / args_.intermediate;
        if (!chosen_.is_there(k)) continue;
        gate_ = gate_row(args_, chosen_, column);
        row = gate_;
        is_up_next_ = true;
        return true;
      }
      is_down_ = true;
      unit_ = warp_;
    }
    vectors = args_.intermediate / kVector;
    for (; unit_ < results_.count; unit_ += kWarps) {
      while (slot_ < args_.topk) {
        const uint32_t k = slot_++;
        if (!chosen_.is_there(k)) continue;
        const uint64_t number = uint64_t{chosen_.expert(k)} * args_.hidden + results_.first + unit_;
        row = reinterpret_cast<const uint4*>(args_.down) + number * vectors;
        return true;
      }
      slot_ = 0;
    }
    return false;
  }

 private:
  const OneTokenArgs& args_;
  const Chosen& chosen_;
  const Share& columns_;  // of all experts' h
  const Share& results_;
  uint32_t warp_;
  uint32_t unit_;
  uint32_t slot_ = 0;
  const uint4* gate_ = nullptr;
  bool is_up_next_ = false;
  bool is_down_ = false;
};

// What a warp does for its part of both products.
template <uint32_t kWarps>
__device__ __forceinline__ void multiply(const OneTokenArgs& args, const Places& places, uint32_t warp) {
  const uint32_t lane = threadIdx.x % kWarpSize;
  const Chosen chosen(args);
  const Share columns(args.topk * args.intermediate);
  const Share results(args.hidden);
  constexpr uint32_t kDeep = kSteps<kWarps>;
  RowStream<kDeep, ExpertRows<kWarps>> rows(places.ring + warp * kDeep * kStepBytes,
                                            ExpertRows<kWarps>(args, chosen, columns, results, warp));
  rows.begin();
  wait(places.x_there, 0);
  const bool is_own = *places.is_own != 0;
  for (uint32_t unit = warp; unit < columns.count; unit += kWarps) {
    const uint32_t column = columns.first + unit;
    if (!chosen.is_there(column / args.intermediate)) continue;
    float part[1];
    rows.multiply(args.hidden / kVector, places.x, 0, part);
    const float gate = warp_sum(part[0]);
    rows.multiply(args.hidden / kVector, places.x, 0, part);
    const float up = warp_sum(part[0]);
    if (lane == 0 && is_own) args.h[column] = float_to_bf16(silu(gate) * up);
  }
  if (lane == 0) {
    // Written by ordinary stores, read by the copy engine.
    ptx::fence_global_proxy();
    ptx::mbarrier_arrive(places.gate_done);
  }
  wait(places.h_there, 0);
  for (uint32_t unit = warp; unit < results.count; unit += kWarps) {
    float sum = 0.0f;
    for (uint32_t k = 0; k < args.topk; ++k) {
      if (!chosen.is_there(k)) continue;
      float part[1];
      rows.multiply(args.intermediate / kVector, places.h + k * args.intermediate * 2, 0, part);
      sum = fmaf(chosen.weight(k), part[0], sum);
    }
    sum = warp_sum(sum);
    if (lane == 0) args.out[results.first + unit] = float_to_bf16(sum);
  }
}

// A row's product with x, as `multiply` makes it to the bit, without a ring.
__device__ __forceinline__ float times_x(const OneTokenArgs& args, const Places& places, const uint4* row) {
  const uint32_t lane = threadIdx.x % kWarpSize;
  const uint32_t vectors = args.hidden / kVector;
  DotProducts<1> products(vectors, places.x, 0);
  for (uint32_t at = lane; at < vectors + lane; at += kWarpSize) products.add(at < vectors ? row[at] : uint4{}, at);
  float part[1];
  products.read(part);
  return warp_sum(part[0]);
}

// One warp does the part of h of a block that has not begun, unless another was faster.
__device__ __forceinline__ void stand_in_for(const OneTokenArgs& args, const Places& places, const Chosen& chosen,
                                             uint32_t block) {
  const uint32_t lane = threadIdx.x % kWarpSize;
  const uint32_t begun = lane == 0 ? atomicExch(args.begun + block, 1u) : 0;
  if (__shfl_sync(kFullWarp, begun, 0) != 0) return;
  const Share columns(args.topk * args.intermediate, block);
  for (uint32_t column = columns.first; column < columns.first + columns.count; ++column) {
    if (!chosen.is_there(column / args.intermediate)) continue;
    const uint4* const row = gate_row(args, chosen, column);
    const float gate = times_x(args, places, row);
    const float up = times_x(args, places, row + uint64_t{args.intermediate} * (args.hidden / kVector));
    if (lane == 0) args.h[column] = float_to_bf16(silu(gate) * up);
  }
  if (lane == 0) {
    ptx::fence_global_proxy();
    ptx::red_release_add(args.gated, 1);
  }
}

// The same for all such blocks. Mostly there are none.
__device__ __forceinline__ void stand_in(const OneTokenArgs& args, const Places& places) {
  const Chosen chosen(args);
  wait(places.x_there, 0);
  for (uint32_t base = 0; base < gridDim.x; base += kWarpSize) {
    const uint32_t block = base + threadIdx.x % kWarpSize;
    const bool absent = block < gridDim.x && ptx::ld_acquire(args.begun + block) == 0;
    for (uint32_t left = __ballot_sync(kFullWarp, absent); left != 0; left &= left - 1) {
      stand_in_for(args, places, chosen, base + __ffs(static_cast<int>(left)) - 1);
    }
  }
}

// Looks at the count of parts before blocks that have not begun are looked for: some 50 us, which no block takes longer
// than another.
constexpr uint32_t kPatience = 64;

// One warp brings x and, when all of it is written, h.
__device__ __forceinline__ void bring_vectors(const OneTokenArgs& args, const Places& places) {
  const uint32_t lane = threadIdx.x % kWarpSize;
  bool is_own = false;
  if (lane == 0) {
    is_own = atomicExch(args.begun + blockIdx.x, 1u) == 0;
    *places.is_own = is_own ? 1 : 0;
    ptx::mbarrier_arrive_expect(places.x_there, args.hidden * 2);
    ptx::bulk_copy(places.x, args.x, args.hidden * 2, places.x_there);
  }
  wait(places.gate_done, 0);
  if (lane == 0 && is_own) ptx::red_release_add(args.gated, 1);
  for (uint32_t looks = 1;; ++looks) {
    const uint32_t parts = lane == 0 ? ptx::ld_acquire(args.gated) : 0;
    if (__shfl_sync(kFullWarp, parts, 0) >= gridDim.x) break;
    if (looks % kPatience == 0) stand_in(args, places);
  }
  if (lane == 0) {
    ptx::fence_global_proxy();
    const uint32_t bytes = args.topk * args.intermediate * 2;
    ptx::mbarrier_arrive_expect(places.h_there, bytes);
    ptx::bulk_copy(places.h, args.h, bytes, places.h_there);
  }
}

template <uint32_t kWarps>
__global__ void __launch_bounds__(kThreads<kWarps>, 1) run_one_token(const __grid_constant__ OneTokenArgs args) {
  extern __shared__ __align__(128) char shared[];
  const Places places(shared, kRingBytes<kWarps>, args);
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(places.x_there, 1);
    ptx::mbarrier_init(places.gate_done, kWarps);
    ptx::mbarrier_init(places.h_there, 1);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  ptx::launch_dependents();
  ptx::wait_for_prerequisites();
  const uint32_t warp = threadIdx.x / kWarpSize;
  if (warp < kWarps) {
    multiply<kWarps>(args, places, warp);
  } else {
    bring_vectors(args, places);
  }
}

template <uint32_t kWarps>
AnabranchStatus launch(const Config& config, const OneTokenArgs& args, cudaStream_t stream) {
  int blocks = 0;
  ANABRANCH_TRY(checked(multiprocessors(&blocks)));
  const auto kernel = run_one_token<kWarps>;
  ANABRANCH_TRY(checked(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                             static_cast<int>(config.shared_bytes))));
  cudaLaunchConfig_t launch = {};
  launch.gridDim = static_cast<uint32_t>(blocks);
  launch.blockDim = kThreads<kWarps>;
  launch.dynamicSmemBytes = config.shared_bytes;
  launch.stream = stream;
  return launch_overlapping(kernel, launch, args);
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
  one.begun = args.gated;
  one.num_experts = args.num_experts;
  one.topk = args.topk;
  one.hidden = args.hidden;
  one.intermediate = args.intermediate;
  switch (config.stages) {
    case kSteps<24>:
      return launch<24>(config, one, stream);
    case kSteps<22>:
      return launch<22>(config, one, stream);
    case kSteps<20>:
      return launch<20>(config, one, stream);
    default:
      return ANABRANCH_STATUS_UNSUPPORTED;
  }
}

}  // namespace anabranch::experts
