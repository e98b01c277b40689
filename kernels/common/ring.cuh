// Rings of stages in shared memory, which roles of a block hand to each other by barriers (sm_90).
#pragma once

#include "ptx/mbarrier.cuh"

namespace anabranch {

// Until the phase of this parity is over.
__device__ __forceinline__ void wait(uint32_t barrier, uint32_t parity) {
  while (!ptx::mbarrier_try_wait(barrier, parity)) {
  }
}

// Where a role is in a ring of stages: which one, and how often it has been around, by parity.
struct Position {
  uint32_t index = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance(uint32_t length) {
    if (++index == length) {
      index = 0;
      parity ^= 1;
    }
  }
};

}  // namespace anabranch
