// Fragments of transposed matrices from shared memory (sm_75), one instruction a function.
#pragma once

#include <cstdint>

namespace anabranch::ptx {

// Four 8 x 8 matrices of 16-bit elements, each transposed: lane l gives the address of row l % 8 of matrix l / 8, on 16
// bytes, and receives from each matrix the elements (2 (l % 4), l / 4) and the one a row below.
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t& r0, uint32_t& r1, uint32_t& r2, uint32_t& r3,
                                                  uint32_t shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r0), "=r"(r1), "=r"(r2), "=r"(r3)
               : "r"(shared)
               : "memory");
}

}  // namespace anabranch::ptx
