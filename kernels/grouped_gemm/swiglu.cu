// The grouped GEMM's kernels for y = silu(x W_gate^T) * (x W_up^T).

#include "grouped_gemm/kernel.cuh"

AnabranchStatus anabranch::grouped_gemm::launch_swiglu(TileId tile, const Device& device, const Args& args,
                                                       cudaStream_t stream) {
  return launch_tiles<Epilogue::kSwiGlu>(tile, device, args, stream);
}
