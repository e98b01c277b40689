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

// Whether a kernel, as it was loaded for the current device, may start while the one before it in the stream still
// runs: its code waits where it must only if it was compiled for 9.0 or newer, and code for 8.0 may run on newer
// devices.
template <typename Kernel>
cudaError_t can_overlap(Kernel* kernel, bool* answer) {
  cudaFuncAttributes attributes = {};
  const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
  *answer = attributes.ptxVersion >= 90;
  return error;
}

// Launches a kernel so that it may start while the one before it in the stream still runs, where the device's code can
// do that: the kernel waits for the one before (ptx::wait_for_prerequisites) before it reads or writes anything. The
// configuration may have one more attribute.
template <typename... Parameters, typename... Arguments>
AnabranchStatus launch_overlapping(void (*kernel)(Parameters...), cudaLaunchConfig_t config,
                                   const Arguments&... arguments) {
  bool can = false;
  const AnabranchStatus asked = checked(can_overlap(kernel, &can));
  if (asked != ANABRANCH_STATUS_OK) return asked;
  cudaLaunchAttribute attributes[2] = {};
  if (config.numAttrs > 0) attributes[0] = config.attrs[0];
  cudaLaunchAttribute& overlap = attributes[config.numAttrs];
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = attributes;
  config.numAttrs += can ? 1 : 0;
  return checked(cudaLaunchKernelEx(&config, kernel, arguments...));
}

}  // namespace anabranch

// Returns from the launcher unless the expression, a status, is OK.
#define ANABRANCH_TRY(expression)                                                 \
  do {                                                                            \
    const AnabranchStatus anabranch_try_status = (expression);                    \
    if (anabranch_try_status != ANABRANCH_STATUS_OK) return anabranch_try_status; \
  } while (0)
