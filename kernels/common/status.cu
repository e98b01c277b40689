// Statuses in words, and the runtime's version.

#include "common/launch.cuh"

extern "C" const char* anabranch_status_text(AnabranchStatus status) {
  switch (status) {
    case ANABRANCH_STATUS_OK:
      return "no error";
    case ANABRANCH_STATUS_POINTER:
      return "a pointer is missing, or given where none belongs";
    case ANABRANCH_STATUS_ALIGNMENT:
      return "a pointer is not aligned";
    case ANABRANCH_STATUS_SETTING:
      return "a size or setting is out of range or contradicts another";
    case ANABRANCH_STATUS_WORKSPACE:
      return "the workspace is too small";
    case ANABRANCH_STATUS_UNSUPPORTED:
      return "there is no kernel for this data type, shape or architecture";
    case ANABRANCH_STATUS_PLACE:
      return "memory, the stream or the plan belongs to another GPU, or to none";
    case ANABRANCH_STATUS_NO_GPU:
      return "there is no GPU that can be used";
    case ANABRANCH_STATUS_INTERNAL:
      return "a mistake in this library";
    default:
      break;
  }
  if (status < ANABRANCH_STATUS_CUDA) return "unknown status";
  return cudaGetErrorString(static_cast<cudaError_t>(status - ANABRANCH_STATUS_CUDA));
}

extern "C" int32_t anabranch_runtime_version(void) {
  return CUDART_VERSION;
}
