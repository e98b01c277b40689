// The sampling's kernel: one block a row.
//
// Every filter keeps a first part of the tokens in the order of falling logits, equal ones by id, and so does the draw:
// each is "the first token at which a running sum reaches a target", of ones (top-k) or of probabilities (top-p, the
// draw). That token is found without a sort, from coarse to fine: a histogram over the distance to the best logit, then
// over the bits of the logit within the bin where the target lies, then by id among equals. Probabilities are integers,
// relative to the best token's 2^40: their sums do not depend on the order of the atomics.
#pragma once

#include <cstdint>

#include "anabranch.h"
#include "ptx/grid_dependency.cuh"
#include "sampling/candidate.cuh"

namespace anabranch::sampling {

constexpr uint32_t kDrawThreads = 1024;
constexpr uint32_t kDrawWarps = kDrawThreads / kWarpSize;
constexpr uint32_t kBins = 2048;
// Bins for a factor of e in probability: all of them reach to where the integers are 0, past e^-28.
constexpr float kBinsPerUnit = 64.0f;
constexpr float kOne = 1099511627776.0f;  // 2^40

static_assert(sizeof(AnabranchSampleRow) == 32 && alignof(AnabranchSampleRow) == 8, "callers upload arrays of it");

struct DrawArgs {
  const void* logits;              // [B, V]
  const AnabranchSampleRow* rows;  // [B]
  uint32_t* seen;                  // [B, words] or null
  int32_t* ids;                    // [B]
  uint32_t vocab_size;
  uint32_t words;
};

// Whether a row may be drawn from by these settings. No number at all is in no range.
__device__ __forceinline__ bool holds(const AnabranchSampleRow& row, bool knows_seen) {
  const bool temperature = row.temperature >= 0.0f && row.temperature < INFINITY;
  const bool filters = row.top_p > 0.0f && row.top_p <= 1.0f && row.min_p >= 0.0f && row.min_p < 1.0f;
  const bool penalty = row.repetition_penalty > 0.0f && row.repetition_penalty < INFINITY;
  return temperature && filters && penalty && (row.repetition_penalty == 1.0f || knows_seen);
}

// The tokens kept so far: those whose logit's key is above, and of equal ones those up to an id.
struct Bound {
  uint32_t key;
  uint32_t id;
  __device__ __forceinline__ bool keeps(uint32_t other, uint32_t other_id) const {
    return other > key || (other == key && other_id <= id);
  }
};

struct DrawShared {
  unsigned long long bins[kBins];
  unsigned long long of_warp[kDrawWarps];
  uint32_t counts[kDrawWarps];
  // What the first warp found: the bin where the target lies, and what is still to reach within it.
  unsigned long long need;
  uint32_t bin;
  uint32_t id;
};

enum class Measure { kCount, kMass, kMassAboveMinP };

template <typename Logits>
struct Row {
  const void* logits;
  uint64_t start;
  uint32_t vocab_size;
  // Null without a penalty.
  const uint32_t* seen;
  float penalty;
  float temperature;
  float min_p;
  float best;

  // The logit after the penalty.
  __device__ __forceinline__ float logit(uint32_t id) const {
    float z = Logits::read(logits, start + id);
    if (seen != nullptr && (seen[id / 32] >> id % 32 & 1) != 0) z = z > 0.0f ? z / penalty : z * penalty;
    return z;
  }

  // How far below the best, in units of the temperature.
  __device__ __forceinline__ float distance(float z) const { return (best - z) / temperature; }

  __device__ __forceinline__ uint64_t measure(Measure kind, float z) const {
    // What cannot be drawn need not be counted: often most of a row, in one bin.
    if (kind == Measure::kCount) return z > -INFINITY ? 1 : 0;
    const float probability = expf(-distance(z));
    if (kind == Measure::kMassAboveMinP && !(probability >= min_p)) return 0;
    return __float2ull_rd(probability * kOne);
  }
};

// The first bin at which the running sum reaches the target, which `target_of` makes from the sum of all bins. Uses the
// first warp; all threads see the result.
template <typename Target>
__device__ __forceinline__ void find_bin(DrawShared& shared, Target target_of) {
  __syncthreads();
  if (threadIdx.x < kWarpSize) {
    constexpr uint32_t kOwn = kBins / kWarpSize;
    const uint32_t lane = threadIdx.x;
    unsigned long long own = 0;
    for (uint32_t i = 0; i < kOwn; ++i) own += shared.bins[lane * kOwn + i];
    unsigned long long inclusive = own;
#pragma unroll
    for (uint32_t step = 1; step < kWarpSize; step *= 2) {
      const unsigned long long below = __shfl_up_sync(kFullWarp, inclusive, step);
      if (lane >= step) inclusive += below;
    }
    const unsigned long long total = __shfl_sync(kFullWarp, inclusive, kWarpSize - 1);
    const unsigned long long target = target_of(total);
    // One lane's bins hold the target: 1 to total.
    unsigned long long sum = inclusive - own;
    if (sum < target && target <= inclusive) {
      uint32_t bin = lane * kOwn;
      while (sum + shared.bins[bin] < target) sum += shared.bins[bin++];
      shared.bin = bin;
      shared.need = target - sum;
    }
  }
  __syncthreads();
}

__device__ __forceinline__ void clear_bins(DrawShared& shared) {
  __syncthreads();
  for (uint32_t bin = threadIdx.x; bin < kBins; bin += kDrawThreads) shared.bins[bin] = 0;
  __syncthreads();
}

// Of the kept tokens with this key, the id of number `ordinal`, counted from 1.
template <typename Logits>
__device__ __forceinline__ uint32_t id_among_equals(DrawShared& shared, const Row<Logits>& row, const Bound& bound,
                                                    uint32_t key, uint64_t ordinal) {
  const uint32_t lane = threadIdx.x % kWarpSize;
  const uint32_t warp = threadIdx.x / kWarpSize;
  uint64_t earlier = 0;
#pragma unroll 1
  for (uint32_t base = 0; base < row.vocab_size; base += kDrawThreads) {
    const uint32_t id = base + threadIdx.x;
    const bool equal = id < row.vocab_size && ordered_key(row.logit(id)) == key && bound.keeps(key, id);
    if (!__syncthreads_or(equal)) continue;
    const uint32_t equals = __ballot_sync(kFullWarp, equal);
    if (lane == 0) shared.counts[warp] = __popc(equals);
    __syncthreads();
    uint64_t before = earlier;
    for (uint32_t i = 0; i < kDrawWarps; ++i) {
      if (i < warp) before += shared.counts[i];
      earlier += shared.counts[i];
    }
    before += __popc(equals & ((1u << lane) - 1));
    if (equal && before + 1 == ordinal) shared.id = id;
    if (earlier >= ordinal) break;
  }
  __syncthreads();
  return shared.id;
}

// The first token, among those that `bound` keeps, at which the running sum of the measure reaches the target.
template <typename Logits, typename Target>
__device__ __forceinline__ Bound reach(DrawShared& shared, const Row<Logits>& row, const Bound& bound, Measure kind,
                                       Target target_of) {
  const uint32_t vocab_size = row.vocab_size;
  const auto bin_of = [&](float z) {
    return static_cast<uint32_t>(fminf(row.distance(z) * kBinsPerUnit, static_cast<float>(kBins - 1)));
  };
  clear_bins(shared);
#pragma unroll 2
  for (uint32_t id = threadIdx.x; id < vocab_size; id += kDrawThreads) {
    const float z = row.logit(id);
    if (bound.keeps(ordered_key(z), id)) {
      const uint64_t measure = row.measure(kind, z);
      if (measure != 0) atomicAdd(shared.bins + bin_of(z), static_cast<unsigned long long>(measure));
    }
  }
  find_bin(shared, target_of);
  const uint32_t coarse = shared.bin;

  // 11, 11 and 10 bits of the key, the largest first: bins are in falling order.
  uint32_t key = 0;
  uint32_t mask = 0;
#pragma unroll 1
  for (uint32_t level = 0; level < 3; ++level) {
    const uint32_t shift = level == 0 ? 21 : level == 1 ? 10 : 0;
    const uint32_t most = level == 2 ? 1023 : 2047;
    const unsigned long long need = shared.need;
    clear_bins(shared);
#pragma unroll 2
    for (uint32_t id = threadIdx.x; id < vocab_size; id += kDrawThreads) {
      const float z = row.logit(id);
      const uint32_t other = ordered_key(z);
      if ((other & mask) == key && bin_of(z) == coarse && bound.keeps(other, id)) {
        const uint64_t measure = row.measure(kind, z);
        const uint32_t bin = most - (other >> shift & most);
        if (measure != 0) atomicAdd(shared.bins + bin, static_cast<unsigned long long>(measure));
      }
    }
    find_bin(shared, [need](unsigned long long) { return need; });
    key |= (most - shared.bin) << shift;
    mask |= most << shift;
  }
  // Equals have equal measures.
  const uint64_t each = row.measure(kind, from_ordered_key(key));
  const uint64_t ordinal = (shared.need - 1) / each + 1;
  return {key, id_among_equals(shared, row, bound, key, ordinal)};
}

template <typename Logits>
__global__ void __launch_bounds__(kDrawThreads) draw(const __grid_constant__ DrawArgs args) {
  ptx::launch_dependents();
  ptx::wait_for_prerequisites();
  __shared__ DrawShared shared;
  const uint32_t vocab_size = args.vocab_size;
  const AnabranchSampleRow settings = args.rows[blockIdx.x];
  uint32_t* const seen = args.seen == nullptr ? nullptr : args.seen + uint64_t{blockIdx.x} * args.words;
  if (!holds(settings, seen != nullptr)) {
    if (threadIdx.x == 0) args.ids[blockIdx.x] = -1;
    return;
  }
  Row<Logits> row = {};
  row.logits = args.logits;
  row.start = uint64_t{blockIdx.x} * vocab_size;
  row.vocab_size = vocab_size;
  row.seen = settings.repetition_penalty == 1.0f ? nullptr : seen;
  row.penalty = settings.repetition_penalty;
  row.temperature = settings.temperature;
  row.min_p = settings.min_p;

  uint64_t best = 0;
#pragma unroll 4
  for (uint32_t id = threadIdx.x; id < vocab_size; id += kDrawThreads)
    best = larger(best, candidate(row.logit(id), id));
  best = warp_largest(best);
  if (threadIdx.x % kWarpSize == 0) shared.of_warp[threadIdx.x / kWarpSize] = best;
  __syncthreads();
  best = 0;
  for (uint32_t warp = 0; warp < kDrawWarps; ++warp) best = larger(best, shared.of_warp[warp]);

  int32_t chosen = id_of(best);
  if (chosen >= 0 && settings.temperature > 0.0f) {
    row.best = from_ordered_key(static_cast<uint32_t>(best >> 32));
    Bound bound = {0, 0xffffffffu};
    if (settings.top_k != 0 && settings.top_k < vocab_size) {
      const unsigned long long top_k = settings.top_k;
      bound = reach(shared, row, bound, Measure::kCount,
                    [top_k](unsigned long long total) { return top_k < total ? top_k : total; });
    }
    if (settings.top_p < 1.0f) {
      const double top_p = settings.top_p;
      bound = reach(shared, row, bound, Measure::kMass, [top_p](unsigned long long total) {
        const unsigned long long mass = __double2ull_ru(top_p * static_cast<double>(total));
        return mass < 1 ? 1 : mass < total ? mass : total;
      });
    }
    const double u = settings.u;
    const Bound drawn = reach(shared, row, bound, Measure::kMassAboveMinP, [u](unsigned long long total) {
      // A u that is negative or no number draws the first, one above all the last.
      const unsigned long long mass = u > 0.0 ? __double2ull_rd(u * static_cast<double>(total)) + 1 : 1;
      return mass < total ? mass : total;
    });
    chosen = static_cast<int32_t>(drawn.id);
  }
  if (threadIdx.x != 0) return;
  args.ids[blockIdx.x] = chosen;
  if (seen != nullptr && chosen >= 0) seen[chosen / 32] |= 1u << chosen % 32;
}

}  // namespace anabranch::sampling
