// The instantiations of attention for few queries; attention.cu has the checks.

#include "attention/plan.cuh"

namespace anabranch::attention {
namespace {

template <class Tile>
AnabranchStatus launch_tile(const Args& args, cudaStream_t stream) {
  const dim3 grid(args.num_sequences * args.num_kv_heads * args.row_tiles, args.splits);
  return launch<Tile>(decode<Tile>, grid, args, stream);
}

}  // namespace

AnabranchStatus launch_decode(Kernel kernel, const Args& args, cudaStream_t stream) {
  switch (kernel) {
    case Kernel::kDecode64:
      return launch_tile<Decode64>(args, stream);
    case Kernel::kDecode128:
      return launch_tile<Decode128>(args, stream);
    case Kernel::kDecode192:
      return launch_tile<Decode192>(args, stream);
    case Kernel::kLatent16:
      return launch_tile<Latent16>(args, stream);
    case Kernel::kLatent64:
      return launch_tile<Latent64>(args, stream);
    default:
      return ANABRANCH_STATUS_UNSUPPORTED;
  }
}

}  // namespace anabranch::attention
