// Hand-overs between blocks: words of 32 bits of data and the epoch that they are of. Who wants them reads until the
// epoch is right, so that data and signal are one trip through memory (as NCCL's LL protocol has it).
#pragma once

#include <cstdint>

#include "decode_step/args.cuh"
#include "ptx/gpu_scope.cuh"

namespace anabranch::decode_step {

__device__ __forceinline__ Word word_of(uint32_t data, uint32_t epoch) {
  return static_cast<Word>(epoch) << 32 | data;
}

__device__ __forceinline__ void publish(Word* word, uint32_t data, uint32_t epoch) {
  ptx::st_relaxed(word, word_of(data, epoch));
}

__device__ __forceinline__ void publish(Word* word, float data, uint32_t epoch) {
  publish(word, __float_as_uint(data), epoch);
}

// Two neighbours, the first of an even number.
__device__ __forceinline__ void publish(Word* words, float first, float second, uint32_t epoch) {
  ptx::st_relaxed_2(words, word_of(__float_as_uint(first), epoch), word_of(__float_as_uint(second), epoch));
}

struct Two {
  uint32_t first;
  uint32_t second;
};

// Two neighbours once both are there.
__device__ __forceinline__ Two receive_two(const Word* words, uint32_t epoch) {
  Word a;
  Word b;
  do {
    ptx::ld_relaxed_2(words, a, b);
  } while (static_cast<uint32_t>(a >> 32) != epoch || static_cast<uint32_t>(b >> 32) != epoch);
  return {static_cast<uint32_t>(a), static_cast<uint32_t>(b)};
}

// The same after a first look, at `a` and `b`.
__device__ __forceinline__ Two received(const Word* words, Word a, Word b, uint32_t epoch) {
  const bool there = static_cast<uint32_t>(a >> 32) == epoch && static_cast<uint32_t>(b >> 32) == epoch;
  return there ? Two{static_cast<uint32_t>(a), static_cast<uint32_t>(b)} : receive_two(words, epoch);
}

// Calls take(i, data of the two words from words_of(i) on) for i below `pairs`, several reads at a time. Whole blocks
// share them.
template <uint32_t kBatch, class WordsOf, class Take>
__device__ __forceinline__ void receive_each(const WordsOf& words_of, uint32_t pairs, uint32_t epoch,
                                             const Take& take) {
#pragma unroll 1
  for (uint32_t base = threadIdx.x; base < pairs; base += kBatch * kThreads) {
    Word a[kBatch];
    Word b[kBatch];
#pragma unroll
    for (uint32_t i = 0; i < kBatch; ++i) {
      const uint32_t at = base + i * kThreads;
      if (at < pairs) ptx::ld_relaxed_2(words_of(at), a[i], b[i]);
    }
#pragma unroll
    for (uint32_t i = 0; i < kBatch; ++i) {
      const uint32_t at = base + i * kThreads;
      if (at < pairs) take(at, received(words_of(at), a[i], b[i], epoch));
    }
  }
}

// The same of words that follow one another.
template <uint32_t kBatch, class Take>
__device__ __forceinline__ void receive_pairs(const Word* words, uint32_t pairs, uint32_t epoch, const Take& take) {
  receive_each<kBatch>([=](uint32_t pair) { return words + 2 * pair; }, pairs, epoch, take);
}

}  // namespace anabranch::decode_step
