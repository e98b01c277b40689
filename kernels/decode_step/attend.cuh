// Attention of one token within a decode step: its heads' norm and rotation, the new key and value into the cache, and
// the sums over all keys. A block has a key head and some tiles of its keys, the first of which are on their way while
// the queries are still being worked out. Where blocks share a key head, each merges a slice of its sums.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/bf16.cuh"
#include "common/norm.cuh"
#include "common/ring.cuh"
#include "common/turn.cuh"
#include "decode_step/args.cuh"
#include "decode_step/parts.cuh"
#include "decode_step/words.cuh"
#include "ptx/bulk_copy.cuh"
#include "ptx/ldmatrix.cuh"
#include "ptx/ldmatrix_trans.cuh"
#include "ptx/math.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/mma.cuh"
#include "ptx/warpgroup.cuh"

namespace anabranch::decode_step {

struct Angles {
  float cos[kMaxRotated];
  float sin[kMaxRotated];
};

// A block's part of the attention: a key head, and some tiles of its keys.
struct AttendPlan {
  attention::SequenceKeys sequence;
  uint32_t tiles;   // of all keys,
  uint32_t splits;  // which so many blocks share
  uint32_t head;
  uint32_t split;
  uint32_t first;  // of this block's tiles,
  uint32_t end;    // and past the last
  uint32_t row;    // of the cache, where the new key goes
  bool works;

  AttendPlan() = default;
  __device__ AttendPlan(const attention::Args& args, uint32_t row_of_key, uint32_t keys, bool merges_anyway)
      : sequence(args, 0), row(row_of_key) {
    tiles = (sequence.keys + keys - 1) / keys;
    const uint32_t most = gridDim.x / args.num_kv_heads;
    // Two tiles take no longer than a merge.
    const uint32_t each = tiles <= 2 && !merges_anyway ? tiles : (tiles + most - 1) / most;
    splits = tiles == 0 ? 1 : (tiles + each - 1) / each;
    head = blockIdx.x / splits;
    split = blockIdx.x - head * splits;
    first = split * each;
    end = min(tiles, first + each);
    works = head < args.num_kv_heads;
  }
};

// Static shared memory of attention.
struct AttendShared {
  AttendPlan plan;
  Angles angles;
  float maximum[kRows];  // of the rows' scores so far
  float sum[kRows];      // of their weights
  float correction[kRows];
  alignas(8) uint64_t there[2];  // barriers: a stage's keys and values have been copied
};

// A head's elements as they come: `from` floats in shared memory, normed where there is a weight.
struct Fresh {
  const float* from;
  const float* weight;
  uint32_t width;  // of the norm
  float scale;

  __device__ __forceinline__ float read(uint32_t at) const {
    const float x = from[at];
    return weight != nullptr && at < width ? x * scale * weight[at] : x;
  }
};

template <bool kLatent>
class Attend {
  using Tile = TileOf<kLatent>;
  static constexpr uint32_t kKeys = Tile::kKeys;
  static constexpr uint32_t kStages = Tile::kStages;
  // Tiles of eight keys that are scored at a time, and parts that a score's elements are cut into.
  static constexpr uint32_t kScored = kKeys / 8;
  static constexpr uint32_t kParts = kWarps / kScored;
  // Copies that bring a tile, a row each.
  static constexpr uint32_t kCopies = kLatent ? kKeys : 2 * kKeys;
  static_assert(kStages * kCopies <= kThreads);
  // Tiles of eight elements of the values that a warp sums at most.
  static constexpr uint32_t kSummed = ((kLatent ? 512 : 128) / 8 + kWarps - 1) / kWarps;

 public:
  __device__ __forceinline__ Attend(const Args& args, const Places& places, char* arena, AttendShared& shared)
      : args_(args), a_(args.attention), places_(places), arena_(arena), shared_(shared) {
    if (threadIdx.x == 0) shared_.plan = AttendPlan(a_, static_cast<uint32_t>(*args_.cache_row), kKeys, kLatent);
    __syncthreads();
    copied_row_ = 0;
    copies_ = plan().works && threadIdx.x < kStages * kCopies &&
              row_to_copy(plan().first + threadIdx.x / kCopies, copied_row_);
  }

  // Once, before the first layer.
  __device__ __forceinline__ void prepare() {
    const float position = static_cast<float>(*args_.position);
#pragma unroll 1
    for (uint32_t pair = threadIdx.x; pair < args_.heads.pairs; pair += kThreads) {
      float sin;
      float cos;
      cos_sin(position * args_.heads.frequencies[pair], cos, sin);
      shared_.angles.cos[pair] = cos * args_.heads.attention_factor;
      shared_.angles.sin[pair] = sin * args_.heads.attention_factor;
    }
    if (threadIdx.x == 0) {
#pragma unroll 1
      for (uint32_t stage = 0; stage < kStages; ++stage) ptx::mbarrier_init(barrier(stage), 1);
      ptx::fence_mbarrier_init();
    }
  }

  // Asks for the first tiles of keys and values. Whole blocks call it, when nobody reads what lies in their place.
  __device__ __forceinline__ void begin(const AnabranchDecodeLayer& layer) {
    if (!plan().works) return;
    if (threadIdx.x < kStages && plan().first + threadIdx.x < plan().end) expect(layer, plan().first + threadIdx.x);
    if (copies_) copy(layer, plan().first + threadIdx.x / kCopies, copied_row_);
  }

  // From projected words to attended ones. Whole blocks call it.
  __device__ __forceinline__ void run(const AnabranchDecodeLayer& layer, uint32_t epoch) {
    if (!plan().works) return;
    receive_heads(epoch);
    if (plan().first < plan().end) wait(barrier(0), parity_ & 1);
    __syncthreads();
    prepare_heads(layer);
    float sums[kSummed][4] = {};
    if (threadIdx.x < kRows) {
      shared_.maximum[threadIdx.x] = -INFINITY;
      shared_.sum[threadIdx.x] = 0.0f;
    }
#pragma unroll 1
    for (uint32_t tile = plan().first; tile < plan().end; ++tile) {
      const uint32_t stage = (tile - plan().first) % kStages;
      wait(barrier(stage), parity_ >> stage & 1);
      parity_ ^= 1u << stage;
      __syncthreads();
      if (tile + 1 == plan().tiles) {
        finish_tile(stage, tile);
        __syncthreads();
      }
      score(stage);
      __syncthreads();
      weigh(tile);
      __syncthreads();
      add_values(sums, stage);
      if (tile + kStages < plan().end) {
        __syncthreads();
        if (threadIdx.x == 0) expect(layer, tile + kStages);
        uint64_t row;
        if (threadIdx.x < kCopies && row_to_copy(tile + kStages, row)) copy(layer, tile + kStages, row);
      }
    }
    __syncthreads();
    if (kLatent || plan().splits > 1) {
      write_parts(sums, epoch);
      if constexpr (!kLatent) merge(epoch);
    } else {
      write(sums, epoch);
    }
    // What comes next to this place is others' vectors.
    __syncthreads();
  }

  // Attended vectors of some heads, all of one key head, to shared memory. Whole blocks call it, after `run`.
  __device__ __forceinline__ void receive_sums(uint32_t first, uint32_t heads, uint32_t place, uint32_t pitch,
                                               uint32_t epoch) {
    const Parts parts = this->parts(epoch);
    const uint32_t half = a_.value_dim / 2;
    const Word* const words = args_.words.parts + first * a_.value_dim;
    Parts::Batch batch;
    if (threadIdx.x < heads * half) parts.ask(batch, words + 2 * threadIdx.x, 0);
    parts.receive_factors(0, first, heads);
#pragma unroll 1
    for (uint32_t pair = threadIdx.x; pair < heads * half; pair += kThreads) {
      if (pair >= kThreads) parts.ask(batch, words + 2 * pair, 0);
      const uint32_t head = pair / half;
      const float2 sum = parts.sum(batch, words + 2 * pair, head, heads);
      *at<uint32_t>(place + (first + head) * pitch + (pair - head * half) * 4) = ptx::cvt_bf16x2(sum.x, sum.y);
    }
  }

 private:
  __device__ __forceinline__ const AttendPlan& plan() const { return shared_.plan; }
  __device__ __forceinline__ uint32_t key_pitch() const { return pitch_of(a_.key_dim); }
  __device__ __forceinline__ uint32_t value_pitch() const { return pitch_of(kLatent ? a_.key_dim : a_.value_dim); }
  __device__ __forceinline__ uint32_t barrier(uint32_t stage) const {
    return static_cast<uint32_t>(__cvta_generic_to_shared(&shared_.there[stage]));
  }
  __device__ __forceinline__ uint32_t address(uint32_t place) const {
    return static_cast<uint32_t>(__cvta_generic_to_shared(arena_)) + place;
  }
  template <class T>
  __device__ __forceinline__ T* at(uint32_t place) const {
    return reinterpret_cast<T*>(arena_ + place);
  }
  __device__ __forceinline__ uint32_t key_row(uint32_t stage, uint32_t row) const {
    return places_.keys + (stage * kKeys + row) * key_pitch();
  }
  __device__ __forceinline__ uint32_t value_row(uint32_t stage, uint32_t row) const {
    return kLatent ? key_row(stage, row) : places_.values + (stage * kKeys + row) * value_pitch();
  }
  __device__ __forceinline__ bool has_new() const { return plan().end == plan().tiles && plan().tiles > 0; }
  // The new key and value, in bf16 until their tile is there, follow the queries.
  __device__ __forceinline__ uint32_t query_row(uint32_t row) const { return places_.query + row * key_pitch(); }
  __device__ __forceinline__ float* fresh_key() const {
    return at<float>(places_.fresh) + a_.group * Places::fresh_dim<kLatent>(args_);
  }

  __device__ __forceinline__ uint32_t k_norm_width() const { return kLatent ? a_.value_dim : a_.key_dim; }
  __device__ __forceinline__ uint32_t norm_place(uint32_t which) const {
    return places_.norms + which * a_.key_dim * 4;
  }
  __device__ __forceinline__ const float* norm_of(const float* weight, uint32_t which) const {
    return weight == nullptr ? nullptr : at<float>(norm_place(which));
  }

  // Keys of a tile that are in the cache; the new one is not.
  __device__ __forceinline__ uint32_t stored(uint32_t tile) const {
    const uint32_t first = tile * kKeys;
    const uint32_t keys = plan().sequence.keys - 1;
    return first < keys ? min(kKeys, keys - first) : 0;
  }

  // Announces what will be copied of a tile. The norms' weights come with the first one.
  __device__ __forceinline__ void expect(const AnabranchDecodeLayer& layer, uint32_t tile) {
    const uint32_t there = barrier((tile - plan().first) % kStages);
    const uint32_t q_bytes = tile == plan().first && layer.q_norm != nullptr ? a_.key_dim * 4 : 0;
    const uint32_t k_bytes = tile == plan().first && layer.k_norm != nullptr ? k_norm_width() * 4 : 0;
    const uint32_t row_bytes = (a_.key_dim + (kLatent ? 0 : a_.value_dim)) * 2;
    ptx::mbarrier_arrive_expect(there, stored(tile) * row_bytes + q_bytes + k_bytes);
    if (q_bytes > 0) ptx::bulk_copy(address(norm_place(0)), layer.q_norm, q_bytes, there);
    if (k_bytes > 0) ptx::bulk_copy(address(norm_place(1)), layer.k_norm, k_bytes, there);
  }

  // The cache's row that this thread copies of a tile, if it copies one.
  __device__ __forceinline__ bool row_to_copy(uint32_t tile, uint64_t& row) const {
    const uint32_t of_tile = threadIdx.x % kCopies % kKeys;
    if (tile >= plan().end || of_tile >= stored(tile)) return false;
    const uint32_t position = tile * kKeys + of_tile;
    row = attention::cache_row(a_, plan().sequence.block(a_, position), position);
    return true;
  }

  // This thread's copy of a tile: a key or a value.
  __device__ __forceinline__ void copy(const AnabranchDecodeLayer& layer, uint32_t tile, uint64_t row) {
    const uint32_t of_tile = threadIdx.x % kCopies;
    const uint32_t stage = (tile - plan().first) % kStages;
    if (of_tile < kKeys) {
      const uint16_t* const keys = static_cast<const uint16_t*>(layer.k_cache);
      ptx::bulk_copy(address(key_row(stage, of_tile)), keys + row * a_.key_stride + plan().head * a_.key_dim,
                     a_.key_dim * 2, barrier(stage));
    } else {
      const uint16_t* const values = static_cast<const uint16_t*>(layer.v_cache);
      ptx::bulk_copy(address(value_row(stage, of_tile - kKeys)),
                     values + row * a_.value_stride + plan().head * a_.value_dim, a_.value_dim * 2, barrier(stage));
    }
  }

  // Queries of the group, and where they are this block's, the new key and value: all in one look.
  __device__ __forceinline__ void receive_heads(uint32_t epoch) {
    float* const fresh = at<float>(places_.fresh);
    const uint32_t queries = a_.group * a_.key_dim;
    const uint32_t first = plan().head * queries;
    // Pairs of words: of the queries, and of the new key and value.
    const uint32_t of_queries = kLatent ? queries / 4 : queries / 2;
    const uint32_t of_key = has_new() ? a_.key_dim / 2 : 0;
    const uint32_t of_value = has_new() && !kLatent ? a_.value_dim / 2 : 0;
    const uint32_t key = kLatent ? a_.num_heads * args_.q_dim : (a_.num_heads + plan().head) * a_.key_dim;
    const uint32_t value = (a_.num_heads + a_.num_kv_heads) * a_.key_dim + plan().head * a_.value_dim;
    const Word* const query_words = kLatent ? args_.words.absorbed : args_.words.projected + first;
    const auto words_of = [&](uint32_t pair) -> const Word* {
      if (pair < of_queries) return query_words + 2 * pair;
      pair -= of_queries;
      return args_.words.projected + (pair < of_key ? key + 2 * pair : value + 2 * (pair - of_key));
    };
    const auto take = [&](uint32_t pair, Two two) {
      if (kLatent && pair < of_queries) {
        const uint32_t row = 4 * pair / a_.key_dim;
        const uint32_t element = 4 * pair - row * a_.key_dim;
        const uint32_t rotated = args_.heads.first;
        if (element < rotated) {
          *reinterpret_cast<uint2*>(arena_ + query_row(row) + element * 2) = make_uint2(two.first, two.second);
        } else {
          *reinterpret_cast<float4*>(fresh + row * Places::fresh_dim<kLatent>(args_) + element - rotated) =
              make_float4(__uint_as_float(two.first << 16), __uint_as_float(two.first & 0xffff0000u),
                          __uint_as_float(two.second << 16), __uint_as_float(two.second & 0xffff0000u));
        }
        return;
      }
      // Queries, key and value follow one another.
      float* const to = kLatent ? fresh_key() + 2 * (pair - of_queries) : fresh + 2 * pair;
      *reinterpret_cast<float2*>(to) = make_float2(__uint_as_float(two.first), __uint_as_float(two.second));
    };
    receive_each<kLatent ? 5 : 3>(words_of, of_queries + of_key + of_value, epoch, take);
    // Rows of the tile that are no head's.
    const uint32_t vectors = key_pitch() / 16;
#pragma unroll 1
    for (uint32_t i = a_.group * vectors + threadIdx.x; i < kRows * vectors; i += kThreads) {
      *at<uint4>(places_.query + i * 16) = uint4{};
    }
  }

  // Norm and rotation, a warp a head.
  __device__ __forceinline__ void prepare_heads(const AnabranchDecodeLayer& layer) {
    const uint32_t warp = threadIdx.x / kWarpSize;
    const uint32_t lane = threadIdx.x % kWarpSize;
    const uint32_t fresh_dim = Places::fresh_dim<kLatent>(args_);
    const uint32_t row = static_cast<uint32_t>(*args_.cache_row);
    const bool cached = row < a_.num_blocks << a_.block_shift;
#pragma unroll 1
    for (uint32_t head = warp; head < a_.group; head += kWarps) {
      Fresh from = {at<float>(places_.fresh) + head * fresh_dim, norm_of(layer.q_norm, 0), a_.key_dim, 0.0f};
      if constexpr (kLatent) {
        // What is not rotated is in its place.
        rotate(from, args_.heads.first, 0, at<uint16_t>(query_row(head)), nullptr);
      } else {
        from.scale = norm_scale(from);
        rotate(from, 0, a_.key_dim, at<uint16_t>(query_row(head)), nullptr);
      }
    }
    if (!has_new()) return;
    if (warp == a_.group % kWarps) {
      Fresh from = {fresh_key(), norm_of(layer.k_norm, 1), k_norm_width(), 0.0f};
      from.scale = norm_scale(from);
      uint16_t* const cache = static_cast<uint16_t*>(layer.k_cache);
      rotate(from, 0, a_.key_dim, at<uint16_t>(query_row(kRows)),
             cached ? cache + uint64_t{row} * a_.key_stride + plan().head * a_.key_dim : nullptr);
    }
    if constexpr (!kLatent) {
      if (warp == (a_.group + 1) % kWarps) {
        const float* const from = fresh_key() + a_.key_dim;
        uint16_t* const to = at<uint16_t>(query_row(kRows + 1));
        uint16_t* const cache =
            static_cast<uint16_t*>(layer.v_cache) + uint64_t{row} * a_.value_stride + plan().head * a_.value_dim;
#pragma unroll 1
        for (uint32_t i = lane; i < a_.value_dim; i += kWarpSize) {
          to[i] = float_to_bf16(from[i]);
          if (cached) cache[i] = to[i];
        }
      }
    }
  }

  __device__ __forceinline__ float norm_scale(const Fresh& head) const {
    if (head.weight == nullptr) return 1.0f;
    float sum = 0.0f;
#pragma unroll 1
    for (uint32_t i = threadIdx.x % kWarpSize; i < head.width; i += kWarpSize) {
      sum = fmaf(head.from[i], head.from[i], sum);
    }
    return anabranch::norm_scale(warp_sum(sum), static_cast<float>(head.width), args_.heads.eps);
  }

  // A head whose elements from `base` on are in `from`: `dim` of them, or those that are rotated alone, to shared
  // memory and, where there is one, to the cache.
  __device__ __forceinline__ void rotate(const Fresh& from, uint32_t base, uint32_t dim, uint16_t* to,
                                         uint16_t* cache) const {
    const Heads& heads = args_.heads;
    const uint32_t first = heads.first - base;
    const uint32_t end = dim == 0 ? heads.pairs : dim - heads.pairs;
    const auto store = [&](uint32_t element, float x) {
      to[base + element] = float_to_bf16(x);
      if (cache != nullptr) cache[base + element] = float_to_bf16(x);
    };
#pragma unroll 1
    for (uint32_t item = threadIdx.x % kWarpSize; item < end; item += kWarpSize) {
      if (item < heads.pairs) {
        const uint32_t i = first + (heads.interleaved ? 2 * item : item);
        const uint32_t j = i + (heads.interleaved ? 1 : heads.pairs);
        float x = from.read(i);
        float y = from.read(j);
        turn(x, y, shared_.angles.cos[item], shared_.angles.sin[item]);
        store(i, x);
        store(j, y);
      } else {
        const uint32_t column = item - heads.pairs;
        const uint32_t element = column + (column < first ? 0 : 2 * heads.pairs);
        store(element, from.read(element));
      }
    }
  }

  // The last tile: the new key and value take their rows, and values past the end are zeros, which their weights are
  // too.
  __device__ __forceinline__ void finish_tile(uint32_t stage, uint32_t tile) {
    const uint32_t last = plan().sequence.keys - 1 - tile * kKeys;
    const auto fill = [&](uint32_t place, uint32_t pitch, uint32_t bytes, uint32_t from) {
      const uint32_t vectors = bytes / 16;
#pragma unroll 1
      for (uint32_t i = threadIdx.x; i < (kKeys - last) * vectors; i += kThreads) {
        const uint32_t row = i / vectors;
        const uint32_t at_vector = (i - row * vectors) * 16;
        *at<uint4>(place + row * pitch + at_vector) = row == 0 ? *at<uint4>(from + at_vector) : uint4{};
      }
    };
    fill(key_row(stage, last), key_pitch(), a_.key_dim * 2, query_row(kRows));
    if constexpr (!kLatent) fill(value_row(stage, last), value_pitch(), a_.value_dim * 2, query_row(kRows + 1));
  }

  // Scores of 16 rows and a tile's keys, a part of the elements each.
  __device__ __forceinline__ void score(uint32_t stage) {
    const uint32_t warp = threadIdx.x / kWarpSize;
    const uint32_t lane = threadIdx.x % kWarpSize;
    const uint32_t part = warp / kScored;
    const uint32_t keys = warp % kScored * 8;
    if (part >= kParts) return;
    const uint32_t steps = a_.key_dim / 16;
    float c[4] = {};
    const uint32_t q = address(query_row(lane % 16)) + lane / 16 * 16;
    const uint32_t k = address(key_row(stage, keys + lane % 8)) + lane / 8 % 2 * 16;
#pragma unroll 1
    for (uint32_t step = part * steps / kParts; step < (part + 1) * steps / kParts; ++step) {
      uint32_t a[4];
      uint32_t b[4];
      ptx::ldmatrix_x4(a[0], a[1], a[2], a[3], q + step * 32);
      ptx::ldmatrix_x4(b[0], b[1], b[2], b[3], k + step * 32);
      ptx::mma_m16n8k16_bf16(c, a, {b[0], b[1]});
    }
    float* const scores = at<float>(places_.scores) + part * kRows * kKeys;
    const uint32_t column = keys + lane % 4 * 2;
    *reinterpret_cast<float2*>(scores + lane / 4 * kKeys + column) = make_float2(c[0], c[1]);
    *reinterpret_cast<float2*>(scores + (lane / 4 + 8) * kKeys + column) = make_float2(c[2], c[3]);
  }

  // Weights of a tile's keys, a warp a row.
  __device__ __forceinline__ void weigh(uint32_t tile) {
#pragma unroll 1
    for (uint32_t row = threadIdx.x / kWarpSize; row < kRows; row += kWarps) weigh_row(tile, row);
  }

  __device__ __forceinline__ void weigh_row(uint32_t tile, uint32_t row) {
    const uint32_t lane = threadIdx.x % kWarpSize;
    constexpr uint32_t kEach = kKeys / kWarpSize;
    uint16_t* const weights = at<uint16_t>(places_.weights) + row * (kKeys + 8);
    if (row >= a_.group) {
#pragma unroll
      for (uint32_t i = 0; i < kEach; ++i) weights[lane + i * kWarpSize] = 0;
      if (lane == 0) shared_.correction[row] = 1.0f;
      return;
    }
    float score[kEach];
    float largest = -INFINITY;
#pragma unroll
    for (uint32_t i = 0; i < kEach; ++i) {
      const uint32_t key = lane + i * kWarpSize;
      const float* const scores = at<float>(places_.scores) + row * kKeys + key;
      float sum = 0.0f;
#pragma unroll
      for (uint32_t part = 0; part < kParts; ++part) sum += scores[part * kRows * kKeys];
      score[i] = tile * kKeys + key < plan().sequence.keys ? sum * a_.scale_log2 : -INFINITY;
      largest = fmaxf(largest, score[i]);
    }
    const float before = shared_.maximum[row];
    const float maximum = fmaxf(before, warp_max(largest));
    // Where there is nothing but minus infinity so far, its weight is zero.
    const float base = maximum == -INFINITY ? 0.0f : maximum;
    float sum = 0.0f;
#pragma unroll
    for (uint32_t i = 0; i < kEach; ++i) {
      const float weight = ptx::ex2_approx(score[i] - base);
      sum += weight;
      weights[lane + i * kWarpSize] = float_to_bf16(weight);
    }
    sum = warp_sum(sum);
    // All lanes have read the maximum.
    __syncwarp();
    if (lane == 0) {
      const float correction = ptx::ex2_approx(before - base);
      shared_.maximum[row] = maximum;
      shared_.sum[row] = shared_.sum[row] * correction + sum;
      shared_.correction[row] = correction;
    }
  }

  // Sums of 16 rows, every kWarps-th eight elements of the values.
  __device__ __forceinline__ void add_values(float (&sums)[kSummed][4], uint32_t stage) {
    const uint32_t warp = threadIdx.x / kWarpSize;
    const uint32_t lane = threadIdx.x % kWarpSize;
    const float low = shared_.correction[lane / 4];
    const float high = shared_.correction[lane / 4 + 8];
    const uint32_t p = address(places_.weights) + lane % 16 * (kKeys + 8) * 2 + lane / 16 * 16;
    const uint32_t v = address(value_row(stage, lane));
#pragma unroll
    for (uint32_t i = 0; i < kSummed; ++i) {
      const uint32_t tile = warp + i * kWarps;
      if (tile * 8 >= a_.value_dim) break;
      float (&c)[4] = sums[i];
      c[0] *= low, c[1] *= low, c[2] *= high, c[3] *= high;
#pragma unroll
      for (uint32_t keys = 0; keys < kKeys; keys += 32) {
        uint32_t a[4];
        uint32_t b[4];
        ptx::ldmatrix_x4_trans(b[0], b[1], b[2], b[3], v + keys * value_pitch() + tile * 16);
        ptx::ldmatrix_x4(a[0], a[1], a[2], a[3], p + keys * 2);
        ptx::mma_m16n8k16_bf16(c, a, {b[0], b[1]});
        ptx::ldmatrix_x4(a[0], a[1], a[2], a[3], p + keys * 2 + 32);
        ptx::mma_m16n8k16_bf16(c, a, {b[2], b[3]});
      }
    }
  }

  // Calls to(row, element, two sums) for this thread's sums of heads.
  template <class To>
  __device__ __forceinline__ void each_two(const float (&sums)[kSummed][4], const To& to) const {
    const uint32_t warp = threadIdx.x / kWarpSize;
    const uint32_t lane = threadIdx.x % kWarpSize;
#pragma unroll
    for (uint32_t i = 0; i < kSummed; ++i) {
      const uint32_t tile = warp + i * kWarps;
      if (tile * 8 >= a_.value_dim) break;
      const uint32_t element = tile * 8 + lane % 4 * 2;
      if (lane / 4 < a_.group) to(lane / 4, element, sums[i][0], sums[i][1]);
      if (lane / 4 + 8 < a_.group) to(lane / 4 + 8, element, sums[i][2], sums[i][3]);
    }
  }

  __device__ __forceinline__ void write(const float (&sums)[kSummed][4], uint32_t epoch) {
    Word* const words = args_.words.attended + plan().head * a_.group * a_.value_dim / 2;
    each_two(sums, [&](uint32_t row, uint32_t element, float x, float y) {
      const float sum = shared_.sum[row];
      const float factor = sum == 0.0f ? 0.0f : 1.0f / sum;
      publish(words + (row * a_.value_dim + element) / 2, ptx::cvt_bf16x2(x * factor, y * factor), epoch);
    });
  }

  __device__ __forceinline__ void write_parts(const float (&sums)[kSummed][4], uint32_t epoch) {
    Word* const parts = args_.words.parts + uint64_t{blockIdx.x} * kRows * a_.value_dim;
    each_two(sums, [&](uint32_t row, uint32_t element, float x, float y) {
      publish(parts + row * a_.value_dim + element, x, y, epoch);
    });
    if (threadIdx.x < a_.group) {
      publish(args_.words.statistics + (blockIdx.x * kRows + threadIdx.x) * 2, shared_.maximum[threadIdx.x],
              shared_.sum[threadIdx.x], epoch);
    }
  }

  __device__ __forceinline__ Parts parts(uint32_t epoch) const {
    return {args_.words, a_.value_dim, plan().splits, at<float>(places_.keys), epoch};
  }

  // This block's slice of its key head's sums, from all blocks that have a part of them.
  __device__ __forceinline__ void merge(uint32_t epoch) {
    const Parts parts = this->parts(epoch);
    const uint32_t block = plan().head * plan().splits;
    const uint32_t half = a_.value_dim / 2;
    const uint32_t pairs = a_.group * half;
    const Word* const words = args_.words.parts + block * parts.pitch();
    const uint32_t start = plan().split * pairs / plan().splits + threadIdx.x;
    const uint32_t end = (plan().split + 1) * pairs / plan().splits;
    Parts::Batch batch;
    if (start < end) parts.ask(batch, words + 2 * start, 0);
    parts.receive_factors(block, 0, a_.group);
#pragma unroll 1
    for (uint32_t pair = start; pair < end; pair += kThreads) {
      if (pair > start) parts.ask(batch, words + 2 * pair, 0);
      const float2 sum = parts.sum(batch, words + 2 * pair, pair / half, a_.group);
      publish(args_.words.attended + plan().head * pairs + pair, ptx::cvt_bf16x2(sum.x, sum.y), epoch);
    }
  }

  const Args& args_;
  const attention::Args& a_;
  const Places& places_;
  char* const arena_;
  AttendShared& shared_;
  uint32_t parity_ = 0;
  // This thread's copy of the first tiles, which is the same in all layers.
  uint64_t copied_row_;
  bool copies_;
};

}  // namespace anabranch::decode_step
