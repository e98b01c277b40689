// random: reproducible noise of about a normal distribution, made where it is needed.
//
//   h = splitmix64(seed + (i + 1) * 0x9e3779b97f4a7c15), four 16-bit numbers of it u0 to u3
//   out[i] = (u0 + u1 + u2 + u3 - 131,070) * (scale * sqrt(3) / 65,536)     mean 0, standard deviation scale
//
//   -> out [N] bf16 or float32
//
// An element hangs on the seed and its place alone, and every step is exact but for one product and the rounding to
// bf16: the same bits on every machine. No value is further from 0 than 3.46 scale.
//
// Reference: anabranch::reference::random. Architecture: 8.0 and newer. Alignment: 16 bytes. A thread makes eight
// elements.
//
// Bounds. Bytes: 2 N or 4 N, written once.

#include "common/bf16.cuh"
#include "common/launch.cuh"

namespace anabranch::random {
namespace {

constexpr uint32_t kThreads = 256;
constexpr uint64_t kGolden = 0x9e3779b97f4a7c15ull;

__device__ __forceinline__ uint64_t mix(uint64_t bits) {
  bits = (bits ^ (bits >> 30)) * 0xbf58476d1ce4e5b9ull;
  bits = (bits ^ (bits >> 27)) * 0x94d049bb133111ebull;
  return bits ^ (bits >> 31);
}

__device__ __forceinline__ float value(uint64_t seed, uint64_t at, float unit) {
  const uint64_t bits = mix(seed + (at + 1) * kGolden);
  const int32_t sum =
      static_cast<int32_t>(static_cast<uint32_t>(bits & 0xffff) + static_cast<uint32_t>(bits >> 16 & 0xffff) +
                           static_cast<uint32_t>(bits >> 32 & 0xffff) + static_cast<uint32_t>(bits >> 48));
  return static_cast<float>(sum - 131070) * unit;
}

template <bool kWide>
__global__ void __launch_bounds__(kThreads) fill(void* out, uint64_t num_elements, uint64_t seed, float unit) {
  const uint64_t first = (uint64_t{blockIdx.x} * kThreads + threadIdx.x) * kVector;
  if (first >= num_elements) return;
  float x[kVector];
#pragma unroll
  for (uint32_t i = 0; i < kVector; ++i) x[i] = value(seed, first + i, unit);
  if (first + kVector <= num_elements) {
    if (kWide) {
      float4* const to = static_cast<float4*>(out) + first / 4;
      to[0] = make_float4(x[0], x[1], x[2], x[3]);
      to[1] = make_float4(x[4], x[5], x[6], x[7]);
    } else {
      static_cast<uint4*>(out)[first / kVector] = pack(x);
    }
    return;
  }
#pragma unroll
  for (uint32_t i = 0; i < kVector; ++i) {
    if (first + i >= num_elements) return;
    if (kWide) {
      static_cast<float*>(out)[first + i] = x[i];
    } else {
      static_cast<uint16_t*>(out)[first + i] = float_to_bf16(x[i]);
    }
  }
}

AnabranchStatus launch(const AnabranchRandomParams& params, cudaStream_t stream) {
  const uint64_t blocks = (params.num_elements - 1) / (uint64_t{kThreads} * kVector) + 1;
  if (blocks >= uint64_t{1} << 31) return ANABRANCH_STATUS_SETTING;
  cudaLaunchConfig_t config = {};
  config.gridDim = static_cast<uint32_t>(blocks);
  config.blockDim = kThreads;
  config.stream = stream;
  // sqrt(3) / 65,536, rounded once; the product is rounded once more, as the reference does.
  const float unit = params.scale * 2.6428995e-5f;
  switch (params.out_dtype) {
    case ANABRANCH_DTYPE_BF16:
      return checked(cudaLaunchKernelEx(&config, fill<false>, params.out, params.num_elements, params.seed, unit));
    case ANABRANCH_DTYPE_F32:
      return checked(cudaLaunchKernelEx(&config, fill<true>, params.out, params.num_elements, params.seed, unit));
    default:
      return ANABRANCH_STATUS_UNSUPPORTED;
  }
}

}  // namespace
}  // namespace anabranch::random

extern "C" AnabranchStatus anabranch_random(const AnabranchRandomParams* params, AnabranchStream stream) {
  using namespace anabranch;
  if (params == nullptr) return ANABRANCH_STATUS_POINTER;
  if (params->num_elements == 0) return ANABRANCH_STATUS_OK;
  if (params->out == nullptr) return ANABRANCH_STATUS_POINTER;
  if (!is_aligned(params->out, 16)) return ANABRANCH_STATUS_ALIGNMENT;
  return random::launch(*params, stream);
}
