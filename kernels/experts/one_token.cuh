// The door of one_token_sm90.cu.
#pragma once

#include <cuda_runtime.h>

#include "anabranch.h"
#include "experts/args.cuh"

namespace anabranch::experts {

// Launches a single token's products and their sum, with a configuration that `choose` made for it. Of `args` it takes
// x, ids, weights, h, out, sizes, `next_item`, and `gated`, of a word for each block.
AnabranchStatus launch_one_token(const Config& config, const Args& args, const void* gate_up, const void* down,
                                 cudaStream_t stream);

}  // namespace anabranch::experts
