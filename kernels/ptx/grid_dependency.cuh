// Programmatic dependent launch, one instruction a function. Code for older architectures than 9.0 has none: its
// launches must not ask for the overlap.
#pragma once

namespace anabranch::ptx {

// Lets the next kernel of the stream start, if it was launched to overlap with this one.
__device__ __forceinline__ void launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// Waits until the kernels that this one overlaps with have finished and their writes are seen.
__device__ __forceinline__ void wait_for_prerequisites() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace anabranch::ptx
