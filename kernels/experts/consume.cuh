// The consumers: warpgroups that multiply and store. Each has kHeight blocks of 64 rows of a stage's weights, and all
// of its tokens.
#pragma once

#include "experts/epilogue.cuh"
#include "experts/produce.cuh"
#include "ptx/wgmma.cuh"

namespace anabranch::experts {

// sums = weights * tokens^T over an item's whole depth. A step's products may still run while the next one's are
// issued.
template <int kN, uint32_t kHeight>
__device__ __forceinline__ void multiply(const Pipeline& pipeline, const Args& args, uint32_t steps,
                                         uint32_t weights_at, uint32_t tokens_at, Position& stage,
                                         float (&sums)[kHeight][kN / 2]) {
  constexpr uint32_t kBlockBytes = kBlockRows * kRowBytes;
  const bool signals = threadIdx.x % 128 == 0;
  uint32_t done = 0;
  for (uint32_t step = 0; step < steps; ++step) {
    wait(pipeline.full + 8 * stage.index, stage.parity);
    // Gathered by ordinary copies, read by the asynchronous proxy.
    ptx::fence_proxy_async();
    const uint32_t at = pipeline.stages + stage.index * pipeline.stage_bytes;
    const uint64_t a = ptx::wgmma_descriptor(at + weights_at);
    const uint64_t b = ptx::wgmma_descriptor(at + tokens_at);
    ptx::wgmma_fence();
#pragma unroll
    for (uint32_t slice = 0; slice < kDepth / 16; ++slice) {
#pragma unroll
      for (uint32_t block = 0; block < kHeight; ++block) {
        // In a descriptor addresses count 16 bytes.
        ptx::wgmma_bf16<kN>(sums[block], a + block * (kBlockBytes / 16) + slice * 2, b + slice * 2);
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

// How a kernel's tiles are shared out: kGroups warpgroups, each kHeight blocks of 64 rows of weights, kMost tokens.
template <uint32_t kGroups_, uint32_t kHeight_, int kMost_>
struct Tile {
  static constexpr uint32_t kGroups = kGroups_;
  static constexpr uint32_t kHeight = kHeight_;
  static constexpr int kMost = kMost_;
  static constexpr uint32_t kRows = kGroups * kHeight * kBlockRows;
};

template <class Shape, int kN>
__device__ __forceinline__ void run_item(const Pipeline& pipeline, const Args& args, const Item& item, uint32_t part,
                                         uint32_t group, Position& stage) {
  // Set: where a product read what nothing wrote, the compiler would keep these registers through all other shapes.
  float sums[Shape::kHeight][kN / 2] = {};
  multiply<kN, Shape::kHeight>(pipeline, args, steps_of(args, item.phase),
                               group * Shape::kHeight * kBlockRows * kRowBytes, Shape::kRows * kRowBytes, stage, sums);
#pragma unroll
  for (uint32_t block = 0; block < Shape::kHeight; ++block) {
    if (item.phase == 0) {
      store_gated<kN>(args, item, sums[block], (part + block) * (kBlockRows / 2));
    } else {
      store_down<kN>(args, item, sums[block], (part + block) * kBlockRows);
    }
  }
}

// An item in the narrowest product that holds its tokens.
template <class Shape, int kN>
__device__ __forceinline__ void run_narrowest(const Pipeline& pipeline, const Args& args, const Item& item,
                                              uint32_t part, uint32_t group, Position& stage) {
  if constexpr (kN < Shape::kMost) {
    if (item.rows > kN) {
      return run_narrowest<Shape, kN == 8 ? 16 : kN + 16>(pipeline, args, item, part, group, stage);
    }
  }
  run_item<Shape, kN>(pipeline, args, item, part, group, stage);
}

template <class Shape>
__device__ __forceinline__ void consume(const Args& args, const Schedule& schedule, const Pipeline& pipeline) {
  const uint32_t group = threadIdx.x / 128 - 1;
  const bool signals = threadIdx.x % 128 == 0;
  Position stage;
  Position queue;
  while (true) {
    wait(pipeline.item_full + 8 * queue.index, queue.parity);
    const Item item = pipeline.items[queue.index];
    ptx::named_barrier(kGroupBarrier + group, 128);
    if (signals) ptx::mbarrier_arrive(pipeline.item_empty + 8 * queue.index);
    queue.advance(kQueue);
    if (item.phase == kNoItem) return;

    const uint32_t part = (item.weight_tile * Shape::kGroups + group) * Shape::kHeight;
    run_narrowest<Shape, 8>(pipeline, args, item, part, group, stage);

    ptx::named_barrier(kGroupBarrier + group, 128);
    if (item.phase == 0) {
      if (signals) ptx::red_release_add(args.gated + item.token_tile, 1);
    } else if (args.out != nullptr) {
      if (signals) {
        const uint32_t before = ptx::atom_acq_rel_add(args.summed + part / Shape::kHeight, 1);
        pipeline.last[group] = before + 1 == schedule.tiles() ? 1 : 0;
      }
      ptx::named_barrier(kGroupBarrier + group, 128);
      if (pipeline.last[group] != 0) {
        for (uint32_t block = 0; block < Shape::kHeight; ++block) combine_columns(args, (part + block) * kBlockRows);
      }
    }
  }
}

}  // namespace anabranch::experts
