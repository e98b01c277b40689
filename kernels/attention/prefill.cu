// The instantiations of attention for many queries; attention.cu has the checks.

#include "attention/plan.cuh"

namespace anabranch::attention {
namespace {

template <class Tile>
AnabranchStatus launch_tile(const Args& args, cudaStream_t stream) {
  const dim3 grid(args.num_sequences * args.num_heads, args.row_tiles);
  return launch<Tile>(prefill<Tile>, grid, args, stream);
}

}  // namespace

AnabranchStatus launch_prefill(Kernel kernel, const Args& args, cudaStream_t stream) {
  switch (kernel) {
    case Kernel::kPrefill64:
      return launch_tile<Prefill64>(args, stream);
    case Kernel::kPrefill96:
      return launch_tile<Prefill96>(args, stream);
    case Kernel::kPrefill128:
      return launch_tile<Prefill128>(args, stream);
    case Kernel::kPrefill192:
      return launch_tile<Prefill192>(args, stream);
    default:
      return ANABRANCH_STATUS_UNSUPPORTED;
  }
}

}  // namespace anabranch::attention
