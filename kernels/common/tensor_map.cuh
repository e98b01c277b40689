// Host side of the copy engine: maps of tensors in memory (sm_90).
#pragma once

#include <cuda.h>

#include "common/launch.cuh"

namespace anabranch {

// The driver's function that makes tensor maps, found at run time: nothing links to the driver.
using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                            const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                            CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

inline AnabranchStatus encoder(Encode* encode) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
  ANABRANCH_TRY(
      checked(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found)));
  if (found != cudaDriverEntryPointSuccess) return ANABRANCH_STATUS_UNSUPPORTED;
  *encode = reinterpret_cast<Encode>(function);
  return ANABRANCH_STATUS_OK;
}

// A bf16 tensor of kRank dimensions, the innermost first, in boxes of 64 columns; strides in bytes, from the second
// dimension on. The second-level cache is left to fetch what it is asked for: told to fetch 256 bytes at a time, it
// delivers 4.33 instead of 4.69 TB/s of an H200's memory.
template <uint32_t kRank>
AnabranchStatus make_map(CUtensorMap* map, const void* data, const cuuint64_t (&sizes)[kRank],
                         const cuuint64_t (&strides)[kRank - 1], const cuuint32_t (&box)[kRank]) {
  Encode encode = nullptr;
  ANABRANCH_TRY(encoder(&encode));
  const cuuint32_t steps[5] = {1, 1, 1, 1, 1};
  const CUresult made = encode(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, kRank, const_cast<void*>(data), sizes, strides,
                               box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                               CU_TENSOR_MAP_L2_PROMOTION_NONE, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return made == CUDA_SUCCESS ? ANABRANCH_STATUS_OK : ANABRANCH_STATUS_SETTING;
}

}  // namespace anabranch
