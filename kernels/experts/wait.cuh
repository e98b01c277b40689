// Waiting for a barrier in shared memory.
#pragma once

#include "ptx/mbarrier.cuh"

namespace anabranch::experts {

// Until the phase of this parity is over.
__device__ __forceinline__ void wait(uint32_t barrier, uint32_t parity) {
  while (!ptx::mbarrier_try_wait(barrier, parity)) {
  }
}

}  // namespace anabranch::experts
