// The consumers: warpgroups that multiply and store. Each has kHeight blocks of 64 rows of a stage's weights, and all
// of its tokens.
#pragma once

#include "experts/epilogue.cuh"
#include "experts/produce.cuh"
#include "ptx/wgmma.cuh"

namespace anabranch::experts {

// sums = weights * tokens^T over an item's whole depth. A step's products may still run while the next one's are
// issued.
template <class Shape, int kN>
__device__ __forceinline__ void multiply(const Pipeline<Shape>& pipeline, const Args& args, uint32_t steps,
                                         uint32_t group, Position& stage, float (&sums)[Shape::kHeight][kN / 2]) {
  constexpr uint32_t kBlockBytes = kBlockRows * kRowBytes;
  const bool signals = threadIdx.x % 128 == 0;
  uint32_t done = 0;
  for (uint32_t step = 0; step < steps; ++step) {
    wait(pipeline.full + 8 * stage.index, stage.parity);
    const uint32_t at = pipeline.stages + stage.index * pipeline.stage_bytes;
    ptx::wgmma_fence();
#pragma unroll
    for (uint32_t panel = 0; panel < Shape::kPanels; ++panel) {
      const uint64_t a = ptx::wgmma_descriptor(at + panel * Shape::kPanelBytes + group * Shape::kHeight * kBlockBytes);
      const uint64_t b = ptx::wgmma_descriptor(at + Shape::kPanels * Shape::kPanelBytes + panel * pipeline.panel_bytes);
#pragma unroll
      for (uint32_t slice = 0; slice < kDepth / 16; ++slice) {
#pragma unroll
        for (uint32_t block = 0; block < Shape::kHeight; ++block) {
          // In a descriptor addresses count 16 bytes.
          ptx::wgmma_bf16<kN>(sums[block], a + block * (kBlockBytes / 16) + slice * 2, b + slice * 2);
        }
      }
    }
    ptx::wgmma_commit();
    if (step > 0) {
      ptx::wgmma_wait<1>();
      if (signals) ptx::mbarrier_arrive(pipeline.empty + 8 * done);
    }
    done = stage.index;
    stage.advance(args.stages);
  }
  ptx::wgmma_wait<0>();
  if (signals) ptx::mbarrier_arrive(pipeline.empty + 8 * done);
}

template <class Shape, int kN>
__device__ __forceinline__ void run_item(const Pipeline<Shape>& pipeline, const Args& args, const Item& item,
                                         uint32_t group, Position& stage) {
  // Set: where a product read what nothing wrote, the compiler would keep these registers through all other shapes.
  float sums[Shape::kHeight][kN / 2] = {};
  multiply<Shape, kN>(pipeline, args, steps_of<Shape>(args, item), group, stage, sums);
  const uint32_t part = (item.weight_tile * Shape::kGroups + group) * Shape::kHeight;
  const uint32_t out = pipeline.outs + group * kOutBytes;
  const uint32_t barrier = kGroupBarrier + group;
  if (item.phase == kGate) {
    store_gated<kN, Shape::kHeight>(args, item, sums, part * (kBlockRows / 2), out, barrier);
  } else {
#pragma unroll
    for (uint32_t block = 0; block < Shape::kHeight; ++block) {
      store_down<kN>(args, item, sums[block], (part + block) * kBlockRows, out, barrier);
    }
  }
}

// An item in the narrowest product that holds its tokens.
template <class Shape, int kN>
__device__ __forceinline__ void run_narrowest(const Pipeline<Shape>& pipeline, const Args& args, const Item& item,
                                              uint32_t group, Position& stage) {
  if constexpr (kN < Shape::kMost) {
    if (item.rows > kN) {
      return run_narrowest<Shape, kN == 8 ? 16 : kN + 16>(pipeline, args, item, group, stage);
    }
  }
  run_item<Shape, kN>(pipeline, args, item, group, stage);
}

template <class Shape>
__device__ __forceinline__ void consume(const Args& args, const Pipeline<Shape>& pipeline) {
  const uint32_t group = threadIdx.x / 128 - 1;
  const bool signals = threadIdx.x % 128 == 0;
  Position stage;
  Position queue;
  while (true) {
    wait(pipeline.item_full + 8 * queue.index, queue.parity);
    const Item item = pipeline.items[queue.index];
    ptx::mbarrier_arrive(pipeline.item_empty + 8 * queue.index);
    queue.advance(kQueue);
    if (item.phase == kNoItem) return;

    if (Shape::kMayBeAlone && item.phase == kSum) {
      // 64 columns of a few tokens for each warpgroup; kHeight times 64 columns are a part of the second product.
      const uint32_t unit = item.weight_tile * Shape::kGroups + group;
      const uint32_t blocks = (args.hidden - 1) / kBlockRows + 1;
      const uint32_t block = unit % blocks;
      combine_columns(args, pipeline.inverse, block * kBlockRows, unit / blocks * kSumTokens, [&] {
        if (signals) {
          while (ptx::ld_acquire(args.summed + block / Shape::kHeight) < item.token_tile) {
          }
        }
        ptx::named_barrier(kGroupBarrier + group, 128);
      });
      continue;
    }

    run_narrowest<Shape, 8>(pipeline, args, item, group, stage);

    // The second product's tokens are read by the copy engine.
    if (item.phase == kGate) ptx::fence_global_proxy();
    ptx::named_barrier(kGroupBarrier + group, 128);
    if (signals) {
      if (item.phase == kGate) {
        ptx::red_release_add(args.gated + item.token_tile, 1);
      } else if (Shape::kMayBeAlone && args.sum_tiles > 0) {
        ptx::red_release_add(args.summed + item.weight_tile * Shape::kGroups + group, 1);
      }
    }
  }
}

}  // namespace anabranch::experts
