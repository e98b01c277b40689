// Attention of many queries a sequence, on Hopper; attention.cu says what it computes.
//
// FlashAttention-3's plan (arXiv 2407.08608). Blocks stay on their multiprocessors and take items (produce.cuh): tiles
// of queries of one head, those with the most keys first. One warp brings queries and keys with the copy engine, one
// brings values, in rings of stages of 128 keys, out of the cache's blocks in pieces of 64 rows. Two or three
// warpgroups have 64 queries each (consume.cuh): both products are wgmma, scores stay in registers and become the
// second's operand there. A tile's weights are made while the tile before is multiplied with its values, and while
// other warpgroups, who take turns, have the tensor cores.
//
// Reference: anabranch::reference::attention. Architecture: 9.0a (TMA, wgmma, setmaxnreg). Alignment: 16 bytes; heads
// and strides multiples of 8.
//
// Bounds. A step of 128 queries and 128 keys, D = 128: 8.4 MFLOP, 2,048 clocks of wgmma on a multiprocessor; 16,384
// exponentials, 1,024 clocks of the special-function units; 64 KiB from the second-level cache, 32 bytes a clock.

#include "attention/consume.cuh"
#include "attention/plan.cuh"
#include "attention/produce.cuh"
#include "common/launch.cuh"
#include "common/tensor_map.cuh"
#include "ptx/grid_dependency.cuh"

namespace anabranch::attention {
namespace hopper {
namespace {

// Registers a thread: the block begins with 64 Ki of them over all its threads, and the producers leave most of theirs
// to the consumers.
template <class Tile>
constexpr int kProducerRegisters = Tile::kGroups == 2 ? 40 : 32;
template <class Tile>
constexpr int kConsumerRegisters = Tile::kGroups == 2 ? 232 : 160;

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1) attend(const __grid_constant__ HopperArgs hopper) {
  extern __shared__ __align__(1024) char shared[];
  const Pipeline<Tile> pipeline(shared);
  if (threadIdx.x == 0) {
    pipeline.init();
    ptx::prefetch_tensor_map(&hopper.q);
    ptx::prefetch_tensor_map(&hopper.keys);
    ptx::prefetch_tensor_map(&hopper.values);
  }
  ptx::launch_dependents();
  ptx::wait_for_prerequisites();
  __syncthreads();
  if (threadIdx.x < 128) {
    ptx::register_dealloc<kProducerRegisters<Tile>>();
    if (threadIdx.x < kWarpSize) {
      load_keys<Tile>(hopper, pipeline);
    } else if (threadIdx.x < 2 * kWarpSize) {
      load_values<Tile>(hopper, pipeline);
    }
  } else {
    ptx::register_alloc<kConsumerRegisters<Tile>>();
    consume<Tile>(hopper.args, pipeline);
  }
}

template <class Tile>
AnabranchStatus launch(HopperArgs& hopper, uint64_t items, cudaStream_t stream) {
  const Args& args = hopper.args;
  const auto map = [](CUtensorMap* made, const void* data, uint64_t dim, uint64_t heads, uint64_t stride,
                      uint64_t rows) {
    return make_map<3>(made, data, {dim, heads, rows}, {2 * dim, 2 * stride}, {64, 1, kPieceRows});
  };
  const uint64_t heads = args.num_heads;
  const uint64_t rows = uint64_t{args.num_blocks} << args.block_shift;
  ANABRANCH_TRY(map(&hopper.q, args.q, args.key_dim, heads, heads * args.key_dim, args.num_tokens));
  ANABRANCH_TRY(map(&hopper.keys, args.keys, args.key_dim, args.num_kv_heads, args.key_stride, rows));
  ANABRANCH_TRY(map(&hopper.values, args.values, args.value_dim, args.num_kv_heads, args.value_stride, rows));
  if (hopper.next_item != nullptr) ANABRANCH_TRY(checked(cudaMemsetAsync(hopper.next_item, 0, 4, stream)));

  int blocks = 0;
  ANABRANCH_TRY(checked(multiprocessors(&blocks)));
  const auto kernel = attend<Tile>;
  ANABRANCH_TRY(checked(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Tile::kSharedBytes)));
  cudaLaunchConfig_t config = {};
  config.gridDim = hopper.next_item != nullptr ? static_cast<uint32_t>(blocks) : static_cast<uint32_t>(items);
  config.blockDim = Tile::kThreads;
  config.dynamicSmemBytes = Tile::kSharedBytes;
  config.stream = stream;
  return launch_overlapping(kernel, config, hopper);
}

}  // namespace
}  // namespace hopper

bool is_there_sm90() {
  cudaFuncAttributes attributes = {};
  return checked(cudaFuncGetAttributes(&attributes, hopper::attend<Hopper128>)) == ANABRANCH_STATUS_OK;
}

AnabranchStatus launch_hopper(Kernel kernel, const Args& args, uint64_t items, uint32_t* next_item,
                              cudaStream_t stream) {
  hopper::HopperArgs hopper = {};
  hopper.args = args;
  hopper.next_item = next_item;
  switch (kernel) {
    case Kernel::kHopper64:
      return hopper::launch<Hopper64>(hopper, items, stream);
    case Kernel::kHopper128:
      return hopper::launch<Hopper128>(hopper, items, stream);
    case Kernel::kHopper192:
      return hopper::launch<Hopper192>(hopper, items, stream);
    default:
      return ANABRANCH_STATUS_UNSUPPORTED;
  }
}

}  // namespace anabranch::attention
