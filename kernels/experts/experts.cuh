// The door of experts/ for the host side of other folders.
#pragma once

#include <cuda_runtime.h>

#include "anabranch.h"
#include "experts/args.cuh"

namespace anabranch::experts {

// Launches the expert products, and with few tokens (`config.alone`) the permutation and the combine. Everything but
// the tensor maps and what follows from `config` is set in `args`, whose progress is zero when the kernel begins.
AnabranchStatus launch_sm90(const Config& config, Args args, const void* gate_up, const void* down,
                            cudaStream_t stream);

}  // namespace anabranch::experts
