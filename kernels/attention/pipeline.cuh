// How the roles of a block of the Hopper kernel hand items, queries, keys and values to each other.
#pragma once

#include <cuda.h>

#include "attention/hopper.cuh"
#include "common/ring.cuh"
#include "common/warp.cuh"

namespace anabranch::attention::hopper {

struct HopperArgs {
  Args args;
  CUtensorMap q;       // [T, H, Dk] in boxes of 64 rows of one head, 64 columns
  CUtensorMap keys;    // [rows, H_kv, Dk], likewise
  CUtensorMap values;  // [rows, H_kv, Dv], likewise
  uint32_t* next_item;
};

// Rows of a copy: of a block of the cache, a part.
constexpr uint32_t kPieceRows = kLeastBlock;
constexpr uint32_t kPieceBytes = kPieceRows * 128;

// A tile of queries of one head; without rows, the end.
struct Item {
  uint32_t first_row;  // of q and out
  uint32_t rows;
  uint32_t head;
  uint32_t kv_head;
  uint32_t table;   // of the sequence
  uint32_t keys;    // that the last query sees
  int32_t visible;  // Sequence::visible of the first query
  uint32_t tiles;   // of keys
};
static_assert(sizeof(Item) == 32);

// Items that are announced before they are worked on.
constexpr uint32_t kQueue = 2;

// Shared memory, by 32-bit address; everything begins on 1024 bytes, as the swizzle wants, but barriers and items.
template <class Tile>
struct Pipeline {
  char* memory;
  uint32_t q;

  __device__ __forceinline__ explicit Pipeline(char* shared)
      : memory(shared), q(static_cast<uint32_t>(__cvta_generic_to_shared(shared))) {}

  static constexpr uint32_t kValuesAt = Tile::kQueryBytes + Tile::kStages * Tile::kKeyBytes;
  static constexpr uint32_t kItemsAt = kValuesAt + Tile::kStages * Tile::kValueBytes;
  static constexpr uint32_t kBarriersAt = kItemsAt + kQueue * sizeof(Item);
  static constexpr uint32_t kBarriers = 3 + 2 * kQueue + 4 * Tile::kStages;
  static_assert(kBarriersAt + 8 * kBarriers <= Tile::kSharedBytes);

  __device__ __forceinline__ uint32_t keys(uint32_t stage) const {
    return q + Tile::kQueryBytes + stage * Tile::kKeyBytes;
  }
  __device__ __forceinline__ uint32_t values(uint32_t stage) const { return q + kValuesAt + stage * Tile::kValueBytes; }
  __device__ __forceinline__ char* values_memory(uint32_t stage) const {
    return memory + kValuesAt + stage * Tile::kValueBytes;
  }
  __device__ __forceinline__ Item& item(uint32_t place) const {
    return reinterpret_cast<Item*>(memory + kItemsAt)[place];
  }

  // Queries are there; no product will read them any more.
  __device__ __forceinline__ uint32_t q_full() const { return barrier(0); }
  __device__ __forceinline__ uint32_t q_empty() const { return barrier(1); }
  // What there is of a sequence's last values has come.
  __device__ __forceinline__ uint32_t tail() const { return barrier(2); }
  __device__ __forceinline__ uint32_t item_full(uint32_t place) const { return barrier(3 + place); }
  // Every thread that reads it has.
  __device__ __forceinline__ uint32_t item_empty(uint32_t place) const { return barrier(3 + kQueue + place); }
  __device__ __forceinline__ uint32_t keys_full(uint32_t stage) const { return ring(0, stage); }
  __device__ __forceinline__ uint32_t keys_empty(uint32_t stage) const { return ring(1, stage); }
  __device__ __forceinline__ uint32_t values_full(uint32_t stage) const { return ring(2, stage); }
  __device__ __forceinline__ uint32_t values_empty(uint32_t stage) const { return ring(3, stage); }

  // One thread calls, before anybody waits.
  __device__ __forceinline__ void init() const {
    ptx::mbarrier_init(q_full(), 1);
    ptx::mbarrier_init(q_empty(), Tile::kGroups);
    ptx::mbarrier_init(tail(), 1);
    for (uint32_t place = 0; place < kQueue; ++place) {
      ptx::mbarrier_init(item_full(place), 1);
      // The warp that loads values, and the consumers.
      ptx::mbarrier_init(item_empty(place), kWarpSize + 128 * Tile::kGroups);
    }
    for (uint32_t stage = 0; stage < Tile::kStages; ++stage) {
      ptx::mbarrier_init(keys_full(stage), 1);
      ptx::mbarrier_init(keys_empty(stage), Tile::kGroups);
      ptx::mbarrier_init(values_full(stage), 1);
      ptx::mbarrier_init(values_empty(stage), Tile::kGroups);
    }
    ptx::fence_mbarrier_init();
  }

 private:
  __device__ __forceinline__ uint32_t barrier(uint32_t number) const { return q + kBarriersAt + 8 * number; }
  __device__ __forceinline__ uint32_t ring(uint32_t which, uint32_t stage) const {
    return barrier(3 + 2 * kQueue + which * Tile::kStages + stage);
  }
};

// The next item, for a thread of a role that is told of items.
template <class Tile>
__device__ __forceinline__ Item take_item(const Pipeline<Tile>& pipeline, Position& queue) {
  wait(pipeline.item_full(queue.index), queue.parity);
  const Item item = pipeline.item(queue.index);
  ptx::mbarrier_arrive(pipeline.item_empty(queue.index));
  queue.advance(kQueue);
  return item;
}

}  // namespace anabranch::attention::hopper
