// Fragments of matrices to shared memory (sm_90), one instruction a function.
#pragma once

#include <cstdint>

namespace anabranch::ptx {

// 8 x 8 matrices of 16-bit elements, each transposed: of matrix i lane l holds the elements (l / 4, 2 (l % 4)) and the
// next; column c of matrix i becomes the 16 bytes at the address that lane 8 i + c gives.
__device__ __forceinline__ void stmatrix_trans(uint32_t shared, const uint32_t (&r)[1]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x1.trans.shared.b16 [%0], {%1};" ::"r"(shared), "r"(r[0]) : "memory");
}

__device__ __forceinline__ void stmatrix_trans(uint32_t shared, const uint32_t (&r)[2]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(shared), "r"(r[0]), "r"(r[1])
               : "memory");
}

__device__ __forceinline__ void stmatrix_trans(uint32_t shared, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared), "r"(r[0]),
               "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}

}  // namespace anabranch::ptx
