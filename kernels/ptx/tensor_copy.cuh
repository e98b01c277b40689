// The copy engine's tensor copies (sm_90), one instruction a function.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace anabranch::ptx {

__device__ __forceinline__ void prefetch_tensor_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// A box of a tensor of five dimensions to shared memory; its bytes complete `barrier`.
__device__ __forceinline__ void tensor_copy_5d(uint32_t shared, const CUtensorMap* map, uint32_t barrier, uint32_t c0,
                                               uint32_t c1, uint32_t c2, uint32_t c3, uint32_t c4) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6, "
      "%7}], [%2];" ::"r"(shared),
      "l"(map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
      : "memory");
}

// The same of three dimensions.
__device__ __forceinline__ void tensor_copy_3d(uint32_t shared, const CUtensorMap* map, uint32_t barrier, uint32_t c0,
                                               uint32_t c1, uint32_t c2) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], "
      "[%2];" ::"r"(shared),
      "l"(map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2)
      : "memory");
}

// And of two.
__device__ __forceinline__ void tensor_copy_2d(uint32_t shared, const CUtensorMap* map, uint32_t barrier, uint32_t c0,
                                               uint32_t c1) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::
          "r"(shared),
      "l"(map), "r"(barrier), "r"(c0), "r"(c1)
      : "memory");
}

}  // namespace anabranch::ptx
