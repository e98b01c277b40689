// Matrix products of a warp (sm_80), one instruction a function.
#pragma once

#include <cstdint>

namespace anabranch::ptx {

// c[16, 8] += a[16, 16] b[16, 8], bf16 with float32 sums. Lane l holds of c the elements (l / 4, 2 (l % 4)), the next,
// and both again eight rows below.
__device__ __forceinline__ void mma_m16n8k16_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

}  // namespace anabranch::ptx
