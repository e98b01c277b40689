// linear: a dense product of few tokens, for which only the weights' way through memory counts.
//
//   y[t] = x[t] W^T + b,   or   y[t] = silu(x[t] W_gate^T) * (x[t] W_up^T)
//
// where x may be the RMS norm of what is given, after an addition: x[t] = norm(x'[t] + delta[t]).
//
//   x [T, d] bf16, T at most 8 (on Hopper 64), W [n, d] or [2 n, d] (gate rows, then up rows) bf16, b [n] float32 or
//   null -> y [T, n] bf16 or float32. Sums in float32, in an order that depends on the sizes and the device; another
//   than grouped_gemm's.
//
// Reference: anabranch::reference::linear. Architecture: 8.0 and newer. Alignment: 16 bytes; d and n multiples of 8.
//
// On Hopper tiles_sm90.cu multiplies all but the fewest tokens. Here a block has neighbouring rows of W, which its
// warps take by turns, each through a ring of its own (common/row_stream.cuh). Two blocks share a multiprocessor: one's
// end overlaps with the other's. The rings begin before the launch before has ended where the caller says that nobody
// writes the weights any more. (Bringing them to the second-level cache instead, which needs no such word, makes
// everything slower.)
//
// Every block makes the norm for itself, while its first weights are on their way: a launch less before every product
// that reads the residual stream. The sum is written by all blocks to another place than x, which they still read.
//
// Bounds. Bytes: 2 n d, twice that with SwiGLU; T = 1, n = d = 2,048: 8.4 MB, 1.8 us at 4.6 TB/s.

#include "common/bf16.cuh"
#include "common/launch.cuh"
#include "common/norm_tokens.cuh"
#include "common/row_stream.cuh"
#include "common/silu.cuh"
#include "linear/tiles.cuh"
#include "ptx/grid_dependency.cuh"

namespace anabranch::linear {
namespace {

constexpr uint32_t kMaxTokens = 8;
// A token takes two mma for a step's 512 bytes. With more than so many, a product of many bytes is bound by them, and
// grouped_gemm is faster; one of few is not long enough for that one to get going.
constexpr uint32_t kFewTokens = 4;
constexpr uint64_t kFewBytes = uint64_t{32} << 20;
constexpr uint32_t kMaxFeatures = 1u << 30;
constexpr uint32_t kWarps = 16;
constexpr uint32_t kThreads = kWarps * kWarpSize;
// Steps on their way: 64 KiB a block, of which two share a multiprocessor.
constexpr uint32_t kDepth = 8;
constexpr uint32_t kRingBytes = kWarps * kDepth * kStepBytes;

struct Args {
  const uint4* x;        // [T, vectors]
  const uint4* weights;  // [n or 2 n, vectors]
  const float* bias;     // [n] or null
  void* y;               // [T, n]
  NormTokens norm;       // of x; without a weight, x is multiplied as it is
  uint4* sum;            // x + delta, or null
  uint32_t tokens;
  uint32_t vectors;  // of 8 elements, of a row
  uint32_t columns;  // n
  bool wide_y;       // y is float32, else bf16
  bool settled;      // weights may be read before the launches before this one have ended
};

// One warp's rows: those of every kWarps-th column of its block, gate and up by turns where there are two.
template <bool kSwiGlu>
class WeightRows {
 public:
  __device__ __forceinline__ WeightRows(const Args& args, const Share& share)
      : args_(args), share_(share), column_(threadIdx.x / kWarpSize) {}

  __device__ __forceinline__ bool next(const uint4*& row, uint32_t& vectors) {
    if (column_ >= share_.count) return false;
    vectors = args_.vectors;
    const uint64_t number = uint64_t{share_.first} + column_ + (kSwiGlu && is_up_next_ ? args_.columns : 0);
    row = args_.weights + number * vectors;
    if (!kSwiGlu || is_up_next_) column_ += kWarps;
    is_up_next_ = kSwiGlu && !is_up_next_;
    return true;
  }

 private:
  const Args& args_;
  const Share& share_;
  uint32_t column_;
  bool is_up_next_ = false;
};

template <uint32_t kTokens>
__device__ __forceinline__ void store(const Args& args, uint32_t column, const float (&sums)[kTokens]) {
  const uint32_t lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (uint32_t t = 0; t < kTokens; ++t) {
    if (lane != t || t >= args.tokens) continue;
    const uint64_t at = uint64_t{t} * args.columns + column;
    if (args.wide_y) {
      static_cast<float*>(args.y)[at] = sums[t];
    } else {
      static_cast<uint16_t*>(args.y)[at] = float_to_bf16(sums[t]);
    }
  }
}

template <uint32_t kTokens, bool kSwiGlu>
__global__ void __launch_bounds__(kThreads, kTokens <= 2 ? 2 : 1) multiply_rows(const __grid_constant__ Args args) {
  // The warps' rings, then x.
  extern __shared__ __align__(128) char shared[];
  const Share share(args.columns);
  ptx::launch_dependents();
  const uint32_t ring = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  RowStream<kDepth, WeightRows<kSwiGlu>> rows(ring + threadIdx.x / kWarpSize * kDepth * kStepBytes,
                                              WeightRows<kSwiGlu>(args, share));
  if (args.settled) rows.begin();
  ptx::wait_for_prerequisites();
  if (!args.settled) rows.begin();
  uint4* const x = reinterpret_cast<uint4*>(shared + kRingBytes);
  const uint32_t vectors = args.tokens * args.vectors;
  const bool norms = args.norm.weight != nullptr;
  // Of tokens that there are not, zeros.
  for (uint32_t i = threadIdx.x + (norms ? vectors : 0); i < kTokens * args.vectors; i += kThreads) {
    x[i] = i < vectors ? args.x[i] : uint4{};
  }
  if (norms) {
    norm_tokens<kWarps>(args.norm, x, args.vectors);
  } else {
    __syncthreads();
  }
  for (uint32_t column = threadIdx.x / kWarpSize; column < share.count; column += kWarps) {
    float sums[kTokens];
    rows.multiply(args.vectors, ring + kRingBytes, args.vectors * 16, sums);
#pragma unroll
    for (uint32_t t = 0; t < kTokens; ++t) sums[t] = warp_sum(sums[t]);
    if constexpr (kSwiGlu) {
      float up[kTokens];
      rows.multiply(args.vectors, ring + kRingBytes, args.vectors * 16, up);
#pragma unroll
      for (uint32_t t = 0; t < kTokens; ++t) sums[t] = silu(sums[t]) * warp_sum(up[t]);
    } else if (args.bias != nullptr) {
      const float bias = args.bias[share.first + column];
#pragma unroll
      for (uint32_t t = 0; t < kTokens; ++t) sums[t] += bias;
    }
    store(args, share.first + column, sums);
  }
  if (args.sum == nullptr) return;
  for (uint32_t i = blockIdx.x * kThreads + threadIdx.x; i < vectors; i += gridDim.x * kThreads) {
    args.sum[i] = args.norm.delta == nullptr ? args.x[i] : sum_of(args.x[i], args.norm.delta[i]);
  }
}

// The tokens that a kernel is made for.
uint32_t rounded(uint64_t tokens) {
  return tokens <= 1 ? 1 : tokens <= 2 ? 2 : tokens <= 4 ? 4 : 8;
}

// Rings, x, and the warps' parts of the norm.
uint64_t shared_bytes(uint64_t tokens, uint64_t in_features) {
  return kRingBytes + rounded(tokens) * in_features * 2 + kWarps * sizeof(float);
}

AnabranchStatus check(const AnabranchLinearParams& params) {
  const auto is_width = [](uint32_t width) { return width >= 8 && width <= kMaxFeatures && width % 8 == 0; };
  if (!is_width(params.in_features) || !is_width(params.out_features)) return ANABRANCH_STATUS_SETTING;
  const bool swiglu = params.epilogue == ANABRANCH_EPILOGUE_SWIGLU;
  if ((params.epilogue != ANABRANCH_EPILOGUE_LINEAR && !swiglu) ||
      (params.y_dtype != ANABRANCH_DTYPE_BF16 && params.y_dtype != ANABRANCH_DTYPE_F32)) {
    return ANABRANCH_STATUS_UNSUPPORTED;
  }
  const bool norms = params.norm_weight != nullptr;
  if (norms && !(params.norm_eps >= 0.0f)) return ANABRANCH_STATUS_SETTING;
  if ((params.bias != nullptr && swiglu) || (!norms && (params.delta != nullptr || params.sum != nullptr)) ||
      (params.sum != nullptr && params.sum == params.x) ||
      (params.num_tokens > 0 && (params.x == nullptr || params.weights == nullptr || params.y == nullptr))) {
    return ANABRANCH_STATUS_POINTER;
  }
  if (!is_aligned(params.x, 16) || !is_aligned(params.weights, 16) || !is_aligned(params.y, 4) ||
      !is_aligned(params.bias, 4) || !is_aligned(params.norm_weight, 16) || !is_aligned(params.delta, 16) ||
      !is_aligned(params.sum, 16)) {
    return ANABRANCH_STATUS_ALIGNMENT;
  }
  return ANABRANCH_STATUS_OK;
}

template <uint32_t kTokens, bool kSwiGlu>
AnabranchStatus launch(const Args& args, cudaStream_t stream) {
  int device = 0;
  int multiprocessors = 0;
  int shared = 0;
  ANABRANCH_TRY(checked(cudaGetDevice(&device)));
  ANABRANCH_TRY(checked(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device)));
  ANABRANCH_TRY(checked(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device)));
  const auto kernel = multiply_rows<kTokens, kSwiGlu>;
  const uint32_t bytes = kRingBytes + kTokens * args.vectors * 16;
  // A kibibyte of each block's is the system's.
  const bool both = kTokens <= 2 && 2 * (bytes + kWarps * 4 + 1024) <= static_cast<uint32_t>(shared);
  ANABRANCH_TRY(
      checked(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes))));
  cudaLaunchConfig_t config = {};
  config.gridDim = static_cast<uint32_t>(both ? 2 * multiprocessors : multiprocessors);
  config.blockDim = kThreads;
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  return launch_overlapping(kernel, config, args);
}

template <bool kSwiGlu>
AnabranchStatus launch_for(const Args& args, cudaStream_t stream) {
  switch (rounded(args.tokens)) {
    case 1:
      return launch<1, kSwiGlu>(args, stream);
    case 2:
      return launch<2, kSwiGlu>(args, stream);
    case 4:
      return launch<4, kSwiGlu>(args, stream);
    default:
      return launch<8, kSwiGlu>(args, stream);
  }
}

enum class Way : uint32_t { kNone, kRows, kTiles };

// Who multiplies so many tokens on the current device.
AnabranchStatus choose(uint64_t tokens, uint32_t in_features, uint64_t weight_rows, bool norms, Way* way) {
  int device = 0;
  int shared = 0;
  ANABRANCH_TRY(checked(cudaGetDevice(&device)));
  ANABRANCH_TRY(checked(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device)));
  const uint64_t bytes = 2 * weight_rows * in_features;
  const bool fits = shared_bytes(tokens, in_features) <= static_cast<uint64_t>(shared);
  if (tokens <= kFewTokens && fits) {
    *way = Way::kRows;
  } else if (!norms && tokens <= kMostTileTokens && is_there_sm90()) {
    *way = Way::kTiles;
  } else {
    *way = tokens <= kMaxTokens && bytes < kFewBytes && fits ? Way::kRows : Way::kNone;
  }
  return ANABRANCH_STATUS_OK;
}

AnabranchStatus launch_rows(const AnabranchLinearParams& params, cudaStream_t stream) {
  Args args = {};
  args.x = static_cast<const uint4*>(params.x);
  args.weights = static_cast<const uint4*>(params.weights);
  args.bias = params.bias;
  args.y = params.y;
  args.norm.x = args.x;
  args.norm.delta = static_cast<const uint4*>(params.delta);
  args.norm.weight = reinterpret_cast<const float4*>(params.norm_weight);
  args.norm.tokens = static_cast<uint32_t>(params.num_tokens);
  args.norm.vectors = params.in_features / kVector;
  args.norm.width = static_cast<float>(params.in_features);
  args.norm.eps = params.norm_eps;
  args.sum = static_cast<uint4*>(params.sum);
  args.tokens = static_cast<uint32_t>(params.num_tokens);
  args.vectors = params.in_features / kVector;
  args.columns = params.out_features;
  args.settled = params.weights_settled != 0;
  args.wide_y = params.y_dtype == ANABRANCH_DTYPE_F32;
  return params.epilogue == ANABRANCH_EPILOGUE_SWIGLU ? launch_for<true>(args, stream)
                                                      : launch_for<false>(args, stream);
}

}  // namespace
}  // namespace anabranch::linear

extern "C" AnabranchStatus anabranch_linear_takes(uint64_t num_tokens, uint32_t in_features, uint64_t weight_rows,
                                                  uint32_t norms, uint32_t* takes) {
  using namespace anabranch;
  if (takes == nullptr) return ANABRANCH_STATUS_POINTER;
  linear::Way way = linear::Way::kNone;
  ANABRANCH_TRY(linear::choose(num_tokens, in_features, weight_rows, norms != 0, &way));
  *takes = way != linear::Way::kNone;
  return ANABRANCH_STATUS_OK;
}

extern "C" AnabranchStatus anabranch_linear(const AnabranchLinearParams* params, AnabranchStream stream) {
  using namespace anabranch;
  if (params == nullptr) return ANABRANCH_STATUS_POINTER;
  ANABRANCH_TRY(linear::check(*params));
  if (params->num_tokens == 0) return ANABRANCH_STATUS_OK;
  const uint64_t rows = uint64_t{params->out_features} * (params->epilogue == ANABRANCH_EPILOGUE_SWIGLU ? 2 : 1);
  linear::Way way = linear::Way::kNone;
  ANABRANCH_TRY(linear::choose(params->num_tokens, params->in_features, rows, params->norm_weight != nullptr, &way));
  switch (way) {
    case linear::Way::kRows:
      return linear::launch_rows(*params, stream);
    case linear::Way::kTiles:
      return linear::launch_tiles(*params, stream);
    default:
      return ANABRANCH_STATUS_SETTING;
  }
}
