// The host's door to gate_sm90.cu.
#pragma once

#include "common/launch.cuh"
#include "moe_layer/workspace.cuh"

namespace anabranch::moe_layer {

// Whether one launch does all that comes before the experts of a block.
bool takes_gate(const AnabranchMoeShape& shape, uint64_t num_tokens, int shared_bytes);

// That launch: residual addition, norm and gate product to the block's x and logits, which are those of `layer`, and
// from there what launch_front does.
AnabranchStatus launch_gate(const AnabranchMoeBlockParams& block, const AnabranchMoeLayerParams& layer,
                            const Sizes& sizes, const Workspace& workspace, uint64_t progress_words,
                            cudaStream_t stream);

}  // namespace anabranch::moe_layer
