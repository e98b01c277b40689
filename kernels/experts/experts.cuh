// The door of experts/ for the host side of other folders.
#pragma once

#include <cuda_runtime.h>

#include "anabranch.h"
#include "experts/args.cuh"

namespace anabranch::experts {

// Whether this build's code for 9.0a can run on the current device. It cannot where the driver is told to compile from
// PTX, of which there is none.
bool is_there_sm90();

// Launches the expert products, and with few tokens (`config.alone`) the permutation and the combine. Everything but
// the tensor maps and what follows from `config` is set in `args`, whose progress is zero when the kernel begins.
AnabranchStatus launch_sm90(const Config& config, Args args, const void* gate_up, const void* down,
                            cudaStream_t stream);

}  // namespace anabranch::experts
