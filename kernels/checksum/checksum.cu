// checksum: the exclusive or of all words of an array, at the speed at which memory can be read.
//
//   out[0] = x[0] ^ x[1] ^ ...     x [N] uint32 -> out [1] uint32
//
// The order does not matter, so blocks add theirs atomically to a word that is cleared before. A thread has eight loads
// of 16 bytes in flight.
//
// Reference: anabranch::reference::checksum. Architecture: 8.0 and newer. Alignment: 16 bytes for x.
//
// Bounds. Bytes: 4 N, read once.

#include "common/launch.cuh"
#include "common/warp.cuh"

namespace anabranch::checksum {
namespace {

constexpr uint32_t kThreads = 512;
constexpr uint32_t kLoads = 8;
constexpr uint32_t kBlocksPerMultiprocessor = 4;

__global__ void __launch_bounds__(kThreads) exclusive_or(const uint32_t* x, uint64_t num_words, uint32_t* out) {
  const uint4* const vectors = reinterpret_cast<const uint4*>(x);
  const uint64_t count = num_words / 4;
  const uint64_t threads = uint64_t{gridDim.x} * kThreads;
  const uint64_t thread = uint64_t{blockIdx.x} * kThreads + threadIdx.x;
  uint32_t word = 0;
  uint64_t at = thread;
  for (; at + (kLoads - 1) * threads < count; at += kLoads * threads) {
    uint4 loaded[kLoads];
#pragma unroll
    for (uint32_t i = 0; i < kLoads; ++i) loaded[i] = __ldcs(vectors + at + i * threads);
#pragma unroll
    for (uint32_t i = 0; i < kLoads; ++i) word ^= loaded[i].x ^ loaded[i].y ^ loaded[i].z ^ loaded[i].w;
  }
  for (; at < count; at += threads) {
    const uint4 loaded = vectors[at];
    word ^= loaded.x ^ loaded.y ^ loaded.z ^ loaded.w;
  }
  if (thread < num_words - 4 * count) word ^= x[4 * count + thread];
  word = __reduce_xor_sync(kFullWarp, word);
  if (threadIdx.x % kWarpSize == 0 && word != 0) atomicXor(out, word);
}

AnabranchStatus launch(const AnabranchChecksumParams& params, cudaStream_t stream) {
  int count = 0;
  ANABRANCH_TRY(checked(multiprocessors(&count)));
  ANABRANCH_TRY(checked(cudaMemsetAsync(params.out, 0, sizeof(uint32_t), stream)));
  if (params.num_words == 0) return ANABRANCH_STATUS_OK;
  const uint64_t most = (params.num_words - 1) / kThreads + 1;
  const uint64_t full = uint64_t{kBlocksPerMultiprocessor} * static_cast<uint32_t>(count);
  cudaLaunchConfig_t config = {};
  config.gridDim = static_cast<uint32_t>(most < full ? most : full);
  config.blockDim = kThreads;
  config.stream = stream;
  return checked(cudaLaunchKernelEx(&config, exclusive_or, params.x, params.num_words, params.out));
}

}  // namespace
}  // namespace anabranch::checksum

extern "C" AnabranchStatus anabranch_checksum(const AnabranchChecksumParams* params, AnabranchStream stream) {
  using namespace anabranch;
  if (params == nullptr || params->out == nullptr || (params->num_words > 0 && params->x == nullptr)) {
    return ANABRANCH_STATUS_POINTER;
  }
  if (!is_aligned(params->x, 16) || !is_aligned(params->out, 4)) return ANABRANCH_STATUS_ALIGNMENT;
  return checksum::launch(*params, stream);
}
