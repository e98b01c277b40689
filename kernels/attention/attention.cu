// attention: softmax(scale q K^T + causal mask) V over a cache of keys and values, for several sequences at once.
//
//   out[t, h] = sum_s softmax_s(scale q[t, h] . K[s, h']) V[s, h']    s = 0 ... S_b - T_b + i, h' = h / (H / H_kv)
//   for query i of sequence b, t = q_offsets[b] + i, with position s in row s % block_size of the cache's block
//   block_table[table_starts[b] + s / block_size]
//
//   q [T, H Dk] bf16, keys [blocks, block_size, stride >= H_kv Dk] bf16, values likewise with Dv or the keys themselves
//   (latent attention: Dk = 576, Dv = 512, H_kv = 1) -> out [T, H Dv] bf16. Scores, softmax and sums in float32;
//   weights are rounded to bf16 for the second product, as FlashAttention does.
//
// Reference: anabranch::reference::attention, and what latent_attention does over its cache. Architecture: 8.0 and
// newer (mma.sync, cp.async, ldmatrix); 9.0 has its own for many queries. Alignment: q, keys, values and out on 16
// bytes; Dk, Dv and strides multiples of 8; lengths are ragged: copies are predicated by 16 bytes, and what lies past a
// length is never read.
//
// Many queries: prefill.cuh, a block of 4 warps takes 128 queries of one head, or on Hopper prefill_sm90.cu, where
// blocks take 128 or 192 queries of one head after the other. Few: decode.cuh, a block of 4 or 8 warps
// takes up to 16 or 64 rows (queries times heads of a group) and a part of the keys; then merge.cuh, a block every 128
// elements of a row.
// Which one is decided in plan.cuh from sizes that the host knows; the device's lengths decide inside. The same call
// gives the same bits; other bounds, or another number of sequences, may cut the keys differently and round
// differently.
//
// Bounds. FLOPs: 2 (Dk + Dv) H keys seen, half of T S a sequence of T = S. Bytes: 2 (H Dk + H Dv) T of q and out, and
// 2 H_kv (Dk + Dv) S of the cache once. T = S = 4096, H = 32, D = 128: 137 GFLOP; mma.sync can reach 570 TFLOP/s on an
// H200 (1,270 multiply-adds a clock and multiprocessor at 1.7 GHz): 0.24 ms. One query, B = 64, S = 32,768, H_kv =
// 4: 4.3 GB, 1.0 ms at 4.3 TB/s.
//
// A warp's tile of 32 x 64, D = 128, of prefill on sm_90: 256 HMMA and 80 LDSM among some 1,350 instructions, 255
// registers, nothing in local memory. The LDSM read 40 KiB of shared
// memory: 1,280 clocks of its 128 bytes a clock for four warps' 1,650 clocks of HMMA. The 64 exponentials a thread are
// 512 clocks of the special-function units, and scheduled between the second product's HMMA.

#include "attention/merge.cuh"
#include "attention/plan.cuh"

namespace anabranch::attention {
namespace {

constexpr uint64_t kMost = uint64_t{1} << 31;
constexpr float kLog2E = 1.44269504f;

bool is_dim(uint32_t dim) {
  return dim > 0 && dim % 8 == 0;
}

Problem problem_of(const AnabranchAttentionParams& params) {
  const uint64_t tokens = params.num_tokens;
  return {params.num_sequences,
          params.num_kv_heads,
          params.num_heads / params.num_kv_heads,
          params.key_dim,
          params.value_dim,
          params.max_q_len < tokens ? params.max_q_len : static_cast<uint32_t>(tokens),
          params.max_kv_len,
          params.values == params.keys && params.value_stride == params.key_stride && params.num_kv_heads == 1 &&
              params.value_dim <= params.key_dim,
          params.num_blocks > 0 && params.table_len > 0};
}

AnabranchStatus check_sizes(const AnabranchAttentionParams& params) {
  const uint32_t heads = params.num_heads;
  const uint32_t kv_heads = params.num_kv_heads;
  if (heads == 0 || kv_heads == 0 || heads % kv_heads != 0 || !is_dim(params.key_dim) || !is_dim(params.value_dim) ||
      !(params.scale > 0.0f && params.scale < INFINITY) || params.max_kv_len >= kMost ||
      params.num_tokens >= kMost / heads || params.num_sequences >= kMost) {
    return ANABRANCH_STATUS_SETTING;
  }
  const uint64_t block = params.block_size;
  if (block < kLeastBlock || block >= kMost || (block & (block - 1)) != 0 || params.num_blocks >= kMost / block ||
      params.table_len >= kMost) {
    return ANABRANCH_STATUS_SETTING;
  }
  if (!is_supported(problem_of(params))) return ANABRANCH_STATUS_UNSUPPORTED;
  const bool wide_enough = params.key_stride >= static_cast<uint64_t>(kv_heads) * params.key_dim &&
                           params.value_stride >= static_cast<uint64_t>(kv_heads) * params.value_dim;
  const bool in_range = params.key_stride < kMost && params.value_stride < kMost &&
                        static_cast<uint64_t>(heads) * params.key_dim < kMost &&
                        static_cast<uint64_t>(heads) * params.value_dim < kMost;
  const bool on_chunks = params.key_stride % 8 == 0 && params.value_stride % 8 == 0;
  return wide_enough && in_range && on_chunks ? ANABRANCH_STATUS_OK : ANABRANCH_STATUS_SETTING;
}

AnabranchStatus check_pointers(const AnabranchAttentionParams& params) {
  const bool cached = params.num_blocks > 0 && params.table_len > 0;
  if (params.q == nullptr || params.out == nullptr || params.q_offsets == nullptr || params.kv_lengths == nullptr ||
      params.table_starts == nullptr ||
      (cached && (params.block_table == nullptr || params.keys == nullptr || params.values == nullptr))) {
    return ANABRANCH_STATUS_POINTER;
  }
  for (const void* pointer : {params.q, params.keys, params.values, static_cast<const void*>(params.out),
                              static_cast<const void*>(params.workspace)}) {
    if (!is_aligned(pointer, 16)) return ANABRANCH_STATUS_ALIGNMENT;
  }
  for (const uint32_t* pointer : {params.q_offsets, params.kv_lengths, params.block_table, params.table_starts}) {
    if (!is_aligned(pointer, 4)) return ANABRANCH_STATUS_ALIGNMENT;
  }
  return ANABRANCH_STATUS_OK;
}

cudaError_t describe(Device* device) {
  int ordinal = 0;
  cudaError_t error = cudaGetDevice(&ordinal);
  const auto ask = [&](uint32_t* value, cudaDeviceAttr attribute) {
    int answer = 0;
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&answer, attribute, ordinal);
    *value = static_cast<uint32_t>(answer);
  };
  ask(&device->multiprocessors, cudaDevAttrMultiProcessorCount);
  ask(&device->shared_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  ask(&device->shared_per_multiprocessor, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  uint32_t major = 0;
  uint32_t minor = 0;
  ask(&major, cudaDevAttrComputeCapabilityMajor);
  ask(&minor, cudaDevAttrComputeCapabilityMinor);
  device->hopper = major == 9 && minor == 0;
  return error;
}

struct Plan {
  Kernel kernel;
  Split split;
  // Tiles of queries, at most, that Hopper's kernel has, and whether it counts them in the workspace.
  uint64_t items;
  bool counts;
  // Of partial sums, and of everything.
  uint64_t sums_bytes;
  uint64_t workspace_bytes;
};

AnabranchStatus make_plan(const AnabranchAttentionParams& params, Plan* plan) {
  Device device = {};
  ANABRANCH_TRY(checked(describe(&device)));
  const Problem problem = problem_of(params);
  // Asked where it matters only, for the first question loads the code.
  device.hopper = device.hopper && suits_hopper(problem) && is_there_sm90();
  plan->kernel = choose_kernel(problem, device);
  plan->split = split_of(plan->kernel, problem, device);
  const uint64_t parts = plan->split.splits * params.num_tokens * params.num_heads;
  const bool splits = plan->split.splits > 1;
  plan->sums_bytes = splits ? parts * params.value_dim * sizeof(float) : 0;
  plan->items = plan->split.row_tiles * params.num_sequences * params.num_heads;
  plan->counts = is_hopper(plan->kernel) && plan->items > device.multiprocessors;
  plan->workspace_bytes = plan->sums_bytes + (splits ? parts * sizeof(float2) : plan->counts ? sizeof(uint32_t) : 0);
  const bool decodes = plan->kernel >= Kernel::kDecode64;
  const uint64_t heads = decodes ? plan->split.row_tiles * params.num_kv_heads : params.num_heads;
  // A grid's sizes: 2^31 - 1 across, 2^16 - 1 down.
  const bool fits =
      heads < kMost && heads * params.num_sequences < kMost && (decodes || plan->split.row_tiles < uint64_t{1} << 16);
  return fits ? ANABRANCH_STATUS_OK : ANABRANCH_STATUS_SETTING;
}

Args args_of(const AnabranchAttentionParams& params, const Plan& plan) {
  Args args = {};
  args.q = static_cast<const __nv_bfloat16*>(params.q);
  args.keys = static_cast<const __nv_bfloat16*>(params.keys);
  args.values = static_cast<const __nv_bfloat16*>(params.values);
  args.q_offsets = params.q_offsets;
  args.kv_lengths = params.kv_lengths;
  args.block_table = params.block_table;
  args.table_starts = params.table_starts;
  args.out = static_cast<__nv_bfloat16*>(params.out);
  args.partial_sums = static_cast<float*>(params.workspace);
  args.partial_weights = reinterpret_cast<float2*>(static_cast<uint8_t*>(params.workspace) + plan.sums_bytes);
  args.table_len = params.num_blocks > 0 ? static_cast<uint32_t>(params.table_len) : 0;
  args.num_blocks = static_cast<uint32_t>(params.num_blocks);
  while (uint64_t{1} << args.block_shift < params.block_size) ++args.block_shift;
  args.num_tokens = static_cast<uint32_t>(params.num_tokens);
  args.num_sequences = params.num_sequences;
  args.num_heads = params.num_heads;
  args.num_kv_heads = params.num_kv_heads;
  args.group = params.num_heads / params.num_kv_heads;
  args.key_dim = params.key_dim;
  args.value_dim = params.value_dim;
  args.key_stride = static_cast<uint32_t>(params.key_stride);
  args.value_stride = static_cast<uint32_t>(params.value_stride);
  args.scale_log2 = params.scale * kLog2E;
  args.splits = plan.split.splits;
  args.row_tiles = static_cast<uint32_t>(plan.split.row_tiles);
  return args;
}

AnabranchStatus launch_merge(const Args& args, cudaStream_t stream) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(args.num_tokens * args.num_heads, (args.value_dim - 1) / kMergeColumns + 1);
  config.blockDim = kMergeThreads;
  config.stream = stream;
  return launch_overlapping(merge, config, args);
}

bool is_empty(const AnabranchAttentionParams& params) {
  return params.num_tokens == 0 || params.num_sequences == 0 || params.max_q_len == 0;
}

}  // namespace
}  // namespace anabranch::attention

extern "C" AnabranchStatus anabranch_attention_workspace(const AnabranchAttentionParams* params, uint64_t* bytes) {
  using namespace anabranch::attention;
  if (params == nullptr || bytes == nullptr) return ANABRANCH_STATUS_POINTER;
  ANABRANCH_TRY(check_sizes(*params));
  *bytes = 0;
  if (is_empty(*params)) return ANABRANCH_STATUS_OK;
  Plan plan = {};
  ANABRANCH_TRY(make_plan(*params, &plan));
  *bytes = plan.workspace_bytes;
  return ANABRANCH_STATUS_OK;
}

extern "C" AnabranchStatus anabranch_attention(const AnabranchAttentionParams* params, AnabranchStream stream) {
  using namespace anabranch::attention;
  if (params == nullptr) return ANABRANCH_STATUS_POINTER;
  ANABRANCH_TRY(check_sizes(*params));
  if (is_empty(*params)) return ANABRANCH_STATUS_OK;
  ANABRANCH_TRY(check_pointers(*params));
  Plan plan = {};
  ANABRANCH_TRY(make_plan(*params, &plan));
  if (plan.workspace_bytes > params->workspace_bytes) return ANABRANCH_STATUS_WORKSPACE;
  if (plan.workspace_bytes > 0 && params->workspace == nullptr) return ANABRANCH_STATUS_POINTER;
  const Args args = args_of(*params, plan);
  if (is_hopper(plan.kernel)) {
    uint32_t* counter = plan.counts ? static_cast<uint32_t*>(params->workspace) : nullptr;
    return launch_hopper(plan.kernel, args, plan.items, counter, stream);
  }
  if (plan.kernel < Kernel::kDecode64) return launch_prefill(plan.kernel, args, stream);
  ANABRANCH_TRY(launch_decode(plan.kernel, args, stream));
  return args.splits > 1 ? launch_merge(args, stream) : ANABRANCH_STATUS_OK;
}
