// Floats as unsigned integers of the same order, for the warp's integer reductions.
#pragma once

#include <cstdint>

namespace anabranch {

// The key of a float that is not NaN: x < y exactly where key(x) < key(y), and -0 has the key of +0. No key is 0, which
// is left for "nothing".
__device__ __forceinline__ uint32_t ordered_key(float x) {
  const uint32_t bits = __float_as_uint(__fadd_rn(x, 0.0f));
  return bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u);
}

__device__ __forceinline__ float from_ordered_key(uint32_t key) {
  return __uint_as_float(key & 0x80000000u ? key ^ 0x80000000u : ~key);
}

}  // namespace anabranch
