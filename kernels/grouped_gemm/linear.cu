// The grouped GEMM's kernels for y = x W^T, or + b.

#include "grouped_gemm/kernel.cuh"

AnabranchStatus anabranch::grouped_gemm::launch_linear(TileId tile, const Device& device, const Args& args,
                                                       cudaStream_t stream) {
  return launch_tiles<Epilogue::kLinear>(tile, device, args, stream);
}
