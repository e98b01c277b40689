// The host's door to front.cu.
#pragma once

#include "common/launch.cuh"
#include "moe_layer/workspace.cuh"

namespace anabranch::moe_layer {

// Routes every token, or takes the routing given, into pairs of `workspace`, and clears its progress.
AnabranchStatus launch_front(const AnabranchMoeLayerParams& params, const Sizes& sizes, const Workspace& workspace,
                             uint64_t progress_words, cudaStream_t stream);

}  // namespace anabranch::moe_layer
