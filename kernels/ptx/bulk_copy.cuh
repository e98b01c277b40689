// The copy engine's plain copies (sm_90), one instruction a function.
#pragma once

#include <cstdint>

namespace anabranch::ptx {

// `bytes` bytes, a multiple of 16, from global to shared memory, both on 16 bytes; they complete `barrier`.
__device__ __forceinline__ void bulk_copy(uint32_t shared, const void* global, uint32_t bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared),
               "l"(global), "r"(bytes), "r"(barrier)
               : "memory");
}

}  // namespace anabranch::ptx
