// argmax: the greedy choice of the next token.
//
//   ids[b] = min { i : logits[b, i] = max_j logits[b, j] };   -1 where a logit is NaN or plus infinity, or all are
//   minus infinity
//
//   logits [B, V] bf16 or float32 -> ids [B] int32
//
// Reference: anabranch::reference::sample with Sampling::greedy(), which refuses what is -1 here. Architecture: 8.0 and
// newer. Alignment: elements; rows that start on 16 bytes are read 16 bytes at a time.
//
// A block takes 8,192 logits of a row, 32 a thread, and a second launch, a warp a row, takes the best of those; a row
// of one chunk needs no second launch. Logit and id make one 64-bit number whose largest is the answer, in any order.
//
// Bounds. Bytes: 4 B V (2 B V for bf16): B = 1, V = 151,936: 0.6 MB, 0.14 us at 4.3 TB/s, so two launches are what it
// costs; B = 64: 39 MB, 9 us. One comparison a logit.

#include "common/launch.cuh"
#include "sampling/best.cuh"

namespace anabranch::sampling {
namespace {

uint64_t chunks_of(uint64_t vocab_size) {
  return (vocab_size - 1) / kChunk + 1;
}

AnabranchStatus check_sizes(uint64_t num_rows, uint64_t vocab_size) {
  const bool vocab = vocab_size >= 1 && vocab_size < uint64_t{1} << 31;
  const bool holds = vocab && num_rows < (uint64_t{1} << 31) / chunks_of(vocab_size);
  return holds ? ANABRANCH_STATUS_OK : ANABRANCH_STATUS_SETTING;
}

uint64_t workspace_of(uint64_t num_rows, uint64_t vocab_size) {
  const uint64_t chunks = chunks_of(vocab_size);
  return chunks == 1 ? 0 : sizeof(uint64_t) * num_rows * chunks;
}

AnabranchStatus check(const AnabranchArgmaxParams& params) {
  ANABRANCH_TRY(check_sizes(params.num_rows, params.vocab_size));
  if (params.num_rows == 0) return ANABRANCH_STATUS_OK;
  const uint64_t bytes = workspace_of(params.num_rows, params.vocab_size);
  if (params.logits == nullptr || params.ids == nullptr || (bytes > 0 && params.workspace == nullptr)) {
    return ANABRANCH_STATUS_POINTER;
  }
  const uint64_t element = params.logits_dtype == ANABRANCH_DTYPE_F32 ? 4 : 2;
  if (!is_aligned(params.logits, element) || !is_aligned(params.ids, 4) ||
      (bytes > 0 && !is_aligned(params.workspace, 8))) {
    return ANABRANCH_STATUS_ALIGNMENT;
  }
  return params.workspace_bytes < bytes ? ANABRANCH_STATUS_WORKSPACE : ANABRANCH_STATUS_OK;
}

template <typename Logits>
AnabranchStatus launch(const AnabranchArgmaxParams& params, cudaStream_t stream) {
  if (params.num_rows == 0) return ANABRANCH_STATUS_OK;
  Args args = {};
  args.logits = params.logits;
  args.best = static_cast<uint64_t*>(params.workspace);
  args.ids = params.ids;
  args.num_rows = static_cast<uint32_t>(params.num_rows);
  args.vocab_size = static_cast<uint32_t>(params.vocab_size);
  args.chunks = static_cast<uint32_t>(chunks_of(params.vocab_size));
  args.wide = params.vocab_size % Logits::kWidth == 0 && is_aligned(params.logits, 16);
  cudaLaunchConfig_t config = {};
  config.gridDim = args.num_rows * args.chunks;
  config.blockDim = kThreads;
  config.stream = stream;
  ANABRANCH_TRY(launch_overlapping(best_of_chunk<Logits>, config, args));
  if (args.chunks == 1) return ANABRANCH_STATUS_OK;
  config.gridDim = (args.num_rows - 1) / kWarps + 1;
  return launch_overlapping(best_of_row, config, args);
}

}  // namespace
}  // namespace anabranch::sampling

extern "C" AnabranchStatus anabranch_argmax_workspace(uint64_t num_rows, uint64_t vocab_size, uint64_t* bytes) {
  using namespace anabranch::sampling;
  if (bytes == nullptr) return ANABRANCH_STATUS_POINTER;
  ANABRANCH_TRY(check_sizes(num_rows, vocab_size));
  *bytes = workspace_of(num_rows, vocab_size);
  return ANABRANCH_STATUS_OK;
}

extern "C" AnabranchStatus anabranch_argmax(const AnabranchArgmaxParams* params, AnabranchStream stream) {
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
