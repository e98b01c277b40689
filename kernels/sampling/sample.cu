// sample: the next token drawn from a row of logits.
//
//   penalty      z_i <- z_i / r if z_i > 0, else z_i * r, for tokens seen
//   temperature  p_i  = exp((z_i - max z) / t)
//   top-k, top-p, min-p, then the first token, by falling p, at which the running sum passes u times what is left
//
//   logits [B, V] bf16 or float32, rows [B] settings and u, seen [B, ceil(V / 32)] bits -> ids [B] int32
//
// Reference: anabranch::reference::sample. Architecture: 8.0 and newer. Alignment: elements.
//
// One block a row, 1,024 threads; a selection reads the row five times, four of them only to find the few tokens that
// matter, from the second-level cache. Deterministic: sums are of integers. Probabilities are float32, so that a token
// may be drawn where the reference in float64 draws its neighbour if u lies within about 1e-6 of the border between
// them. Settings lie in device memory, a row's own, so that a captured call serves whatever mixture comes next.
//
// Bounds. Bytes: one read of the logits, 4 B V: B = 1, V = 151,936: 0.6 MB, 0.14 us at 4.3 TB/s. One block reads at
// about 100 GB/s, so a pass takes 6 us and all three selections about 100; rows up to the number of multiprocessors are
// free.

#include "common/launch.cuh"
#include "sampling/draw.cuh"

namespace anabranch::sampling {
namespace {

// The sum of 2^22 probabilities of at most 2^40 fits 64 bits.
constexpr uint64_t kMaxVocab = uint64_t{1} << 22;

AnabranchStatus check(const AnabranchSampleParams& params) {
  const bool sizes = params.num_rows < uint64_t{1} << 31 && params.vocab_size >= 1 && params.vocab_size <= kMaxVocab;
  if (!sizes) return ANABRANCH_STATUS_SETTING;
  if (params.num_rows == 0) return ANABRANCH_STATUS_OK;
  if (params.logits == nullptr || params.rows == nullptr || params.ids == nullptr) return ANABRANCH_STATUS_POINTER;
  const uint64_t element = params.logits_dtype == ANABRANCH_DTYPE_F32 ? 4 : 2;
  const bool aligned = is_aligned(params.logits, element) && is_aligned(params.rows, 8) && is_aligned(params.seen, 4) &&
                       is_aligned(params.ids, 4);
  return aligned ? ANABRANCH_STATUS_OK : ANABRANCH_STATUS_ALIGNMENT;
}

template <typename Logits>
AnabranchStatus launch(const AnabranchSampleParams& params, cudaStream_t stream) {
  if (params.num_rows == 0) return ANABRANCH_STATUS_OK;
  DrawArgs args = {};
  args.logits = params.logits;
  args.rows = params.rows;
  args.seen = params.seen;
  args.ids = params.ids;
  args.vocab_size = static_cast<uint32_t>(params.vocab_size);
  args.words = (args.vocab_size - 1) / 32 + 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = static_cast<uint32_t>(params.num_rows);
  config.blockDim = kDrawThreads;
  config.stream = stream;
  return launch_overlapping(draw<Logits>, config, args);
}

}  // namespace
}  // namespace anabranch::sampling

extern "C" AnabranchStatus anabranch_sample(const AnabranchSampleParams* params, AnabranchStream stream) {
  using namespace anabranch;
  if (params == nullptr) return ANABRANCH_STATUS_POINTER;
  ANABRANCH_TRY(sampling::check(*params));
  switch (params->logits_dtype) {
    case ANABRANCH_DTYPE_F32:
      return sampling::launch<sampling::FloatLogits>(*params, stream);
    case ANABRANCH_DTYPE_BF16:
      return sampling::launch<sampling::Bf16Logits>(*params, stream);
    default:
      return ANABRANCH_STATUS_UNSUPPORTED;
  }
}
