// Tiles of attention of many queries on Hopper: sizes only, for the plan and the kernel.
#pragma once

#include "attention/args.cuh"

namespace anabranch::attention {

// A block takes 64 queries of one head for each of its consumer warpgroups. Matrices lie in shared memory in panels of
// 64 columns, whose rows are 128 bytes.
template <uint32_t kKeyDim_, uint32_t kValueDim_, uint32_t kGroups_, uint32_t kStages_, bool kTakesTurns_>
struct HopperTile {
  static constexpr uint32_t kKeyDim = kKeyDim_;
  static constexpr uint32_t kValueDim = kValueDim_;
  static constexpr uint32_t kGroups = kGroups_;
  static constexpr uint32_t kStages = kStages_;
  // Whether warpgroups issue their products in turn, so that one's softmax meets the others' products.
  static constexpr bool kTakesTurns = kTakesTurns_;
  static constexpr uint32_t kThreads = 128 * (kGroups + 1);
  static constexpr uint32_t kGroupRows = 64;
  static constexpr uint32_t kRows = kGroupRows * kGroups;
  static constexpr uint32_t kKeys = 128;
  static constexpr uint32_t kKeyPanels = kKeyDim / 64;
  static constexpr uint32_t kValuePanels = kValueDim / 64;
  static constexpr uint32_t kQueryPanelBytes = kRows * 128;
  static constexpr uint32_t kPanelBytes = kKeys * 128;
  static constexpr uint32_t kQueryBytes = kKeyPanels * kQueryPanelBytes;
  // Of a stage.
  static constexpr uint32_t kKeyBytes = kKeyPanels * kPanelBytes;
  static constexpr uint32_t kValueBytes = kValuePanels * kPanelBytes;
  // Barriers and items.
  static constexpr uint32_t kControlBytes = 256;
  static constexpr uint32_t kSharedBytes = kQueryBytes + kStages * (kKeyBytes + kValueBytes) + kControlBytes;
  static_assert(kKeyDim % 64 == 0 && kValueDim % 64 == 0 && kKeys % kLeastBlock == 0);
  static_assert(kSharedBytes <= 232448, "what a block of 9.0 may have");
};

// Sizes between these are padded with zeros by the copy engine. Two warpgroups have registers for values of 128.
using Hopper64 = HopperTile<64, 64, 3, 4, true>;
using Hopper128 = HopperTile<128, 128, 2, 3, true>;
using Hopper192 = HopperTile<192, 128, 2, 2, true>;

}  // namespace anabranch::attention
