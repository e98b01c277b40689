// Host side of a launch: statuses and the device's facts.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "anabranch.h"

namespace anabranch {

inline AnabranchStatus status_of(cudaError_t error) {
  return error == cudaSuccess ? ANABRANCH_STATUS_OK
                              : static_cast<AnabranchStatus>(ANABRANCH_STATUS_CUDA + static_cast<int>(error));
}

// What a runtime call answered. The runtime also keeps a failure for the next caller to trip over: it is taken back
// here, so that an error is reported once, by the operation that met it.
inline AnabranchStatus checked(cudaError_t error) {
  if (error != cudaSuccess) static_cast<void>(cudaGetLastError());
  return status_of(error);
}

inline bool is_aligned(const void* pointer, uint64_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

// Multiprocessors of the current device.
inline cudaError_t multiprocessors(int* count) {
  int device = 0;
  const cudaError_t error = cudaGetDevice(&device);
  return error == cudaSuccess ? cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, device) : error;
}

}  // namespace anabranch

// Returns from the launcher unless the expression, a status, is OK.
#define ANABRANCH_TRY(expression)                                                 \
  do {                                                                            \
    const AnabranchStatus anabranch_try_status = (expression);                    \
    if (anabranch_try_status != ANABRANCH_STATUS_OK) return anabranch_try_status; \
  } while (0)
