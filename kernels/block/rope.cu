// rope: rotary position embedding of queries in place, of keys on their way into the cache; values go along. Before
// that, where it is asked for, an RMS norm of each head of the queries or keys, or of the first part of it.
//
//   (a, b) -> (a cos - b sin, b cos + a sin),  angle = position * frequency,  for each pair of a head's rotated
//   elements q in place;   k_cache[cache_rows[t]] = rotated k[t];   v_cache[cache_rows[t]] = v[t]
//
//   q [T, Hq, dq], k [T, Hk, dk], v [T, Hv, dv] bf16, tokens a stride apart (parts of one product's rows, say);
//   positions, cache_rows [T] int32; frequencies [rotary_dim / 2], norms' weights [up to dq, dk] float32 -> q; k_cache
//   [N, Hk, dk], v_cache [N, Hv, dv] bf16
//
// Reference: anabranch::reference::rms_norm_heads, a clamp, anabranch::reference::rotate. Architecture: 8.0 and newer.
// Alignment: elements; 16 bytes at a time where all pointers, strides and sizes are multiples of that.
//
// A block takes a token: its threads compute the angles once for all heads, then go through the vectors of q, k and v.
// A normed head is shared by as many lanes as it has items, vectors to copy or pairs of them to turn, a warp at most.
// They sum its squares, two vectors each, then read it again from the first-level cache. What is turned is the norm
// rounded to bf16; up to 256 elements are summed in rms_norm's order and have its bits.
//
// Bounds. Bytes: 4 T (Hq dq' + Hk dk + Hv dv), dq' the elements rotated: T = 16,384 with 32 + 4 + 4 heads of 128: 336
// MB, 78 us at 4.28 TB/s. Three FLOP a value, five more where it is normed; T rotary_dim / 2 sines and cosines.

#include <algorithm>

#include "block/rotate_heads.cuh"
#include "common/launch.cuh"

namespace anabranch::block {
namespace {

AnabranchStatus check_heads(const AnabranchHeads& heads, uint32_t rotary, bool tokens) {
  if (heads.num_heads == 0) return ANABRANCH_STATUS_OK;
  const uint64_t width = uint64_t{heads.num_heads} * heads.head_dim;
  // Elements of a token are counted in 31 bits.
  const bool fits = heads.head_dim > 0 && uint64_t{heads.first} + rotary <= heads.head_dim && width <= heads.stride &&
                    width < uint64_t{1} << 31;
  if (!fits) return ANABRANCH_STATUS_SETTING;
  if (tokens && heads.data == nullptr) return ANABRANCH_STATUS_POINTER;
  return is_aligned(heads.data, 2) ? ANABRANCH_STATUS_OK : ANABRANCH_STATUS_ALIGNMENT;
}

AnabranchStatus check_norm(const AnabranchHeadNorm& norm, const AnabranchHeads& heads) {
  if (norm.weight == nullptr || heads.num_heads == 0) return ANABRANCH_STATUS_OK;
  const bool fits = norm.width > 0 && norm.width <= heads.head_dim && norm.width <= kMaxNorm && norm.eps >= 0.0f;
  if (!fits) return ANABRANCH_STATUS_SETTING;
  return is_aligned(norm.weight, 4) ? ANABRANCH_STATUS_OK : ANABRANCH_STATUS_ALIGNMENT;
}

AnabranchStatus check(const AnabranchRopeParams& params) {
  const uint32_t rotary = params.rotary_dim;
  const bool tokens = params.num_tokens > 0;
  if (params.layout > ANABRANCH_ROPE_LAYOUT_INTERLEAVED) return ANABRANCH_STATUS_UNSUPPORTED;
  if (rotary == 0 || rotary % 2 != 0 || rotary > 2 * kMaxPairs || !(params.clip > 0.0f) ||
      params.num_tokens >= uint64_t{1} << 31 || params.num_cache_rows >= uint64_t{1} << 31) {
    return ANABRANCH_STATUS_SETTING;
  }
  ANABRANCH_TRY(check_heads(params.q, rotary, tokens));
  ANABRANCH_TRY(check_heads(params.k, rotary, tokens));
  AnabranchHeads v = params.v;
  v.first = 0;
  ANABRANCH_TRY(check_heads(v, 0, tokens));
  ANABRANCH_TRY(check_norm(params.q_norm, params.q));
  ANABRANCH_TRY(check_norm(params.k_norm, params.k));
  if (!tokens) return ANABRANCH_STATUS_OK;
  const bool keys = params.k.num_heads > 0;
  const bool values = params.v.num_heads > 0;
  const bool rows = params.num_cache_rows > 0;
  if (params.frequencies == nullptr || params.positions == nullptr ||
      ((keys || values) && params.cache_rows == nullptr) || (keys && rows && params.k_cache == nullptr) ||
      (values && rows && params.v_cache == nullptr)) {
    return ANABRANCH_STATUS_POINTER;
  }
  const bool aligned = is_aligned(params.frequencies, 4) && is_aligned(params.positions, 4) &&
                       is_aligned(params.cache_rows, 4) && is_aligned(params.k_cache, 2) &&
                       is_aligned(params.v_cache, 2);
  return aligned ? ANABRANCH_STATUS_OK : ANABRANCH_STATUS_ALIGNMENT;
}

// Up to so many tokens leave most multiprocessors without a block of their own. Their heads are shared among several
// blocks, each of which works out the angles.
constexpr uint64_t kFewTokens = 16;
constexpr uint64_t kMostShares = 64;

Heads heads_of(const AnabranchHeads& heads, void* to, uint64_t to_stride) {
  return {static_cast<const uint16_t*>(heads.data),
          static_cast<uint16_t*>(to),
          heads.stride,
          to_stride,
          heads.num_heads,
          heads.head_dim,
          heads.first};
}

Norm norm_of(const AnabranchHeadNorm& norm, const Heads& heads, uint32_t pairs, bool interleaved) {
  if (norm.weight == nullptr || heads.heads == 0) return {};
  const uint32_t items = pairs / pairs_of_item(interleaved) + (heads.head_dim - 2 * pairs) / kVector;
  uint32_t lane_bits = 0;
  while (1u << lane_bits < items && 1u << lane_bits < kWarpSize) ++lane_bits;
  return {norm.weight, norm.width, lane_bits, norm.eps};
}

// Vectors that keep threads busy: of a normed head, two for each of its lanes.
uint64_t vectors_of(const Heads& heads, const Norm& norm) {
  return uint64_t{heads.heads} * (norm.width > 0 ? 2u << norm.lane_bits : heads.head_dim / kVector);
}

bool is_wide(const Heads& heads) {
  return heads.heads == 0 ||
         (is_aligned(heads.from, 16) && is_aligned(heads.to, 16) && heads.from_stride % kVector == 0 &&
          heads.to_stride % kVector == 0 && heads.head_dim % kVector == 0 && heads.first % kVector == 0);
}

bool is_wide(const Norm& norm) {
  return is_aligned(norm.weight, 16) && norm.width % kVector == 0;
}

AnabranchStatus launch(const AnabranchRopeParams& params, cudaStream_t stream) {
  RopeArgs args = {};
  args.q = heads_of(params.q, params.q.data, params.q.stride);
  args.k = heads_of(params.k, params.k_cache, uint64_t{params.k.num_heads} * params.k.head_dim);
  args.v = heads_of(params.v, params.v_cache, uint64_t{params.v.num_heads} * params.v.head_dim);
  args.v.first = 0;
  args.frequencies = params.frequencies;
  args.positions = params.positions;
  args.cache_rows = params.cache_rows;
  args.num_cache_rows = static_cast<uint32_t>(params.num_cache_rows);
  args.pairs = params.rotary_dim / 2;
  args.interleaved = params.layout == ANABRANCH_ROPE_LAYOUT_INTERLEAVED;
  args.attention_factor = params.attention_factor;
  args.clip = params.clip;
  args.q_norm = norm_of(params.q_norm, args.q, args.pairs, args.interleaved);
  args.k_norm = norm_of(params.k_norm, args.k, args.pairs, args.interleaved);
  const bool whole = args.pairs % pairs_of_item(args.interleaved) == 0;
  const bool wide =
      whole && is_wide(args.q) && is_wide(args.k) && is_wide(args.v) && is_wide(args.q_norm) && is_wide(args.k_norm);
  cudaLaunchConfig_t config = {};
  config.gridDim = static_cast<uint32_t>(params.num_tokens);
  const uint64_t vectors = vectors_of(args.q, args.q_norm) + vectors_of(args.k, args.k_norm) + vectors_of(args.v, {});
  const uint64_t shares = std::clamp<uint64_t>((vectors + 2 * kRopeThreads - 1) / (2 * kRopeThreads), 1, kMostShares);
  config.gridDim.y = wide && params.num_tokens <= kFewTokens ? static_cast<uint32_t>(shares) : 1;
  config.blockDim = kRopeThreads;
  config.stream = stream;
  const bool norms = args.q_norm.width + args.k_norm.width > 0;
  const auto vectors_kernel = norms ? rotate_vectors<true> : rotate_vectors<false>;
  return launch_overlapping(wide ? vectors_kernel : rotate_elements, config, args);
}

}  // namespace
}  // namespace anabranch::block

extern "C" AnabranchStatus anabranch_rope(const AnabranchRopeParams* params, AnabranchStream stream) {
  using namespace anabranch;
  if (params == nullptr) return ANABRANCH_STATUS_POINTER;
  ANABRANCH_TRY(block::check(*params));
  return params->num_tokens == 0 ? ANABRANCH_STATUS_OK : block::launch(*params, stream);
}
