// The host's door to front.cu.
#pragma once

#include "common/launch.cuh"
#include "moe_layer/workspace.cuh"

namespace anabranch::moe_layer {

// Routes and sorts a few tokens, into what `workspace` points to, and clears its progress.
AnabranchStatus launch_front(const AnabranchMoeLayerParams& params, const Sizes& sizes, const Workspace& workspace,
                             uint64_t progress_words, cudaStream_t stream);

}  // namespace anabranch::moe_layer
