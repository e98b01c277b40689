// The grouped GEMM's kernels for y = act(x W^T + b), act = ReLU or exact GELU.

#include "grouped_gemm/kernel.cuh"

AnabranchStatus anabranch::grouped_gemm::launch_activated(TileId tile, const Device& device, const Args& args,
                                                          cudaStream_t stream) {
  return launch_tiles<Epilogue::kActivated>(tile, device, args, stream);
}
