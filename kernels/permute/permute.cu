// permute: (token, slot) pairs in the order of their experts, and back; rows of x in that order.
//
//   sort pairs token * K + slot by topk_ids, stable; pairs without an expert go nowhere
//   slots[row] = pair, inverse[pair] = row, expert_offsets[e] = first row of expert e
//   permute_rows: out[row] = x[slots[row] / K]
//
//   topk_ids [T, K] int32 -> expert_offsets [E + 1], slots [T * K], inverse [T, K];   x [T, d] bf16 -> out [R, d] bf16
//
// Reference: anabranch::reference::Permutation (new, permute). Architecture: 8.0 and newer. Alignment: elements; 16
// bytes for x and out.
//
// A counting sort. Up to kAlone pairs one block does everything in one launch, else a first launch counts each block's
// pairs by expert and a second one sums those of the blocks before (each block for itself, from the second-level cache)
// and places its pairs. Within a block every warp has consecutive pairs and counts of its own, so that ranks are stable
// without any order among warps. Permuted rows: a warp takes 256 vectors of 16 bytes of one row.
//
// Bounds. Bytes: 16 P for P = T K pairs, ids read twice: T = 16,384, K = 8: 2.1 MB, 0.5 us at 4.3 TB/s, so two launches
// are what it costs. A few integer operations a pair. Permuted rows: 2 d (T + R) bytes; T = 16,384, K = 8, d = 2,048:
// 604 MB, 141 us.

#include "common/bf16.cuh"
#include "common/gather.cuh"
#include "common/launch.cuh"
#include "permute/place.cuh"
#include "ptx/grid_dependency.cuh"

namespace anabranch::permute {
namespace {

// counts[block, e]: how many pairs of the block's go to expert e.
__global__ void __launch_bounds__(1024) count_pairs(const __grid_constant__ Args args) {
  extern __shared__ uint32_t shared[];  // [E]
  ptx::launch_dependents();
  ptx::wait_for_prerequisites();
  for (uint32_t e = threadIdx.x; e < args.num_experts; e += blockDim.x) shared[e] = 0;
  __syncthreads();
  const uint32_t pairs = args.pairs_a_warp * (blockDim.x / kWarpSize);
  const uint64_t first = uint64_t{blockIdx.x} * pairs;
  for (uint32_t i = threadIdx.x; i < pairs && first + i < args.num_pairs; i += blockDim.x) {
    const uint32_t expert = expert_of(args, static_cast<uint32_t>(first) + i);
    if (expert != kNowhere) atomicAdd(shared + expert, 1u);
  }
  __syncthreads();
  uint32_t* counts = args.counts + blockIdx.x * args.num_experts;
  for (uint32_t e = threadIdx.x; e < args.num_experts; e += blockDim.x) counts[e] = shared[e];
}

__global__ void __launch_bounds__(1024) place_pairs(const __grid_constant__ Args args) {
  extern __shared__ uint32_t shared[];
  ptx::launch_dependents();
  ptx::wait_for_prerequisites();
  place_rows(args, blockIdx.x, gridDim.x, shared);
}

constexpr uint32_t kMaxExperts = 1024;
constexpr uint32_t kMaxTopk = 32;
// Most pairs for a single block: 8 rounds a warp cost about what a second launch does.
constexpr uint32_t kAlone = 8192;
// Fewest pairs a block has where there are several, and most blocks: each block reads all blocks' counts, which takes
// longer than it saves where they are more. The same on every device, and so is the workspace.
constexpr uint32_t kPairsABlock = 2048;
constexpr uint32_t kMostBlocks = 128;
// Words of shared memory that the warps' counts may take: with two rows for all of the block, under 48 KiB.
constexpr uint32_t kCountWords = 9 * 1024;

struct Shape {
  uint32_t blocks;
  uint32_t warps;
  uint32_t pairs_a_warp;
};

// How many warps, and which pairs each of them has. A pure function of the sizes.
constexpr Shape shape_of(uint32_t pairs, uint32_t experts) {
  Shape shape = {};
  shape.warps = 32;
  while (shape.warps > 8 && shape.warps * experts > kCountWords) shape.warps /= 2;
  shape.blocks = pairs <= kAlone ? 1 : (pairs - 1) / kPairsABlock + 1;
  if (shape.blocks > kMostBlocks) shape.blocks = kMostBlocks;
  const uint32_t all = 32 * shape.blocks * shape.warps;
  shape.pairs_a_warp = pairs == 0 ? 32 : ((pairs - 1) / all + 1) * 32;
  return shape;
}

static_assert(shape_of(0, 8).blocks == 1 && shape_of(kAlone, 8).blocks == 1 && shape_of(kAlone + 1, 8).blocks == 5);
static_assert(shape_of(1u << 25, 1024).blocks == kMostBlocks && shape_of(1u << 25, 1024).warps == 8);
static_assert(place_words(shape_of(100, 288).warps, 288) * 4 <= 48 * 1024 && shape_of(100, 256).warps == 32);
static_assert(place_words(shape_of(100, 576).warps, 576) * 4 <= 48 * 1024 && place_words(8, 1024) * 4 <= 48 * 1024);

AnabranchStatus check_sizes(uint64_t num_tokens, uint32_t topk, uint32_t num_experts) {
  const bool holds = topk >= 1 && topk <= kMaxTopk && num_experts >= 1 && num_experts <= kMaxExperts &&
                     num_tokens <= ((uint64_t{1} << 31) - 1) / topk;
  return holds ? ANABRANCH_STATUS_OK : ANABRANCH_STATUS_SETTING;
}

uint64_t workspace_of(uint64_t pairs, uint32_t experts) {
  const Shape shape = shape_of(static_cast<uint32_t>(pairs), experts);
  return shape.blocks == 1 ? 0 : uint64_t{4} * shape.blocks * experts;
}

AnabranchStatus check(const AnabranchPermuteParams& params) {
  ANABRANCH_TRY(check_sizes(params.num_tokens, params.topk, params.num_experts));
  const uint64_t bytes = workspace_of(params.num_tokens * params.topk, params.num_experts);
  const bool tokens = params.num_tokens > 0;
  if (params.expert_offsets == nullptr ||
      (tokens && (params.topk_ids == nullptr || params.slots == nullptr || params.inverse == nullptr)) ||
      (bytes > 0 && params.workspace == nullptr)) {
    return ANABRANCH_STATUS_POINTER;
  }
  const void* const pointers[] = {params.topk_ids, params.expert_offsets, params.slots, params.inverse,
                                  bytes > 0 ? params.workspace : nullptr};
  for (const void* pointer : pointers) {
    if (!is_aligned(pointer, 4)) return ANABRANCH_STATUS_ALIGNMENT;
  }
  return params.workspace_bytes < bytes ? ANABRANCH_STATUS_WORKSPACE : ANABRANCH_STATUS_OK;
}

AnabranchStatus launch(const AnabranchPermuteParams& params, cudaStream_t stream) {
  const uint32_t pairs = static_cast<uint32_t>(params.num_tokens * params.topk);
  const uint32_t experts = params.num_experts;
  const Shape shape = shape_of(pairs, experts);
  Args args = {};
  args.ids = params.topk_ids;
  args.offsets = params.expert_offsets;
  args.slots = params.slots;
  args.inverse = params.inverse;
  args.counts = static_cast<uint32_t*>(params.workspace);
  args.num_pairs = pairs;
  args.num_experts = experts;
  args.pairs_a_warp = shape.pairs_a_warp;
  cudaLaunchConfig_t config = {};
  config.gridDim = shape.blocks;
  config.blockDim = shape.warps * kWarpSize;
  config.stream = stream;
  if (shape.blocks > 1) {
    config.dynamicSmemBytes = 4 * experts;
    ANABRANCH_TRY(launch_overlapping(count_pairs, config, args));
  }
  config.dynamicSmemBytes = 4 * place_words(shape.warps, experts);
  return launch_overlapping(place_pairs, config, args);
}

AnabranchStatus check_rows(const AnabranchPermuteRowsParams& params) {
  ANABRANCH_TRY(check_sizes(params.num_tokens, params.topk, 1));
  if (params.hidden_size == 0 || params.hidden_size % kVector != 0 || params.num_rows >= uint64_t{1} << 31) {
    return ANABRANCH_STATUS_SETTING;
  }
  if (params.num_rows == 0) return ANABRANCH_STATUS_OK;
  if ((params.num_tokens > 0 && params.x == nullptr) || params.slots == nullptr || params.out == nullptr) {
    return ANABRANCH_STATUS_POINTER;
  }
  const bool aligned = is_aligned(params.x, 16) && is_aligned(params.slots, 4) && is_aligned(params.out, 16);
  return aligned ? ANABRANCH_STATUS_OK : ANABRANCH_STATUS_ALIGNMENT;
}

AnabranchStatus launch_rows(const AnabranchPermuteRowsParams& params, cudaStream_t stream) {
  GatherArgs args = {};
  args.from = static_cast<const uint4*>(params.x);
  args.indices = params.slots;
  args.to = static_cast<uint4*>(params.out);
  args.num_from = static_cast<uint32_t>(params.num_tokens);
  args.divisor = params.topk;
  args.filler = 0;
  return launch_gather(args, params.num_rows, params.hidden_size / kVector, stream);
}

}  // namespace
}  // namespace anabranch::permute

extern "C" AnabranchStatus anabranch_permute_workspace(uint64_t num_tokens, uint32_t topk, uint32_t num_experts,
                                                       uint64_t* bytes) {
  using namespace anabranch::permute;
  if (bytes == nullptr) return ANABRANCH_STATUS_POINTER;
  ANABRANCH_TRY(check_sizes(num_tokens, topk, num_experts));
  // More blocks never need less.
  *bytes = workspace_of(num_tokens * topk, num_experts);
  return ANABRANCH_STATUS_OK;
}

extern "C" AnabranchStatus anabranch_permute(const AnabranchPermuteParams* params, AnabranchStream stream) {
  using namespace anabranch;
  if (params == nullptr) return ANABRANCH_STATUS_POINTER;
  ANABRANCH_TRY(permute::check(*params));
  return permute::launch(*params, stream);
}

extern "C" AnabranchStatus anabranch_permute_rows(const AnabranchPermuteRowsParams* params, AnabranchStream stream) {
  using namespace anabranch;
  if (params == nullptr) return ANABRANCH_STATUS_POINTER;
  ANABRANCH_TRY(permute::check_rows(*params));
  return params->num_rows == 0 ? ANABRANCH_STATUS_OK : permute::launch_rows(*params, stream);
}
