// The door of tiles_sm90.cu, and what it takes.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "anabranch.h"

namespace anabranch::linear {

// Most tokens of a product by tiles, and the width of the widest instruction that it is compiled for.
constexpr uint64_t kMostTileTokens = 64;

// Whether the current device has the kernel.
bool is_there_sm90();

// Launches a product of up to kMostTileTokens tokens without a norm. The parameters have been checked.
AnabranchStatus launch_tiles(const AnabranchLinearParams& params, cudaStream_t stream);

}  // namespace anabranch::linear
