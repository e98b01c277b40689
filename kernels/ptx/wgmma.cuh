// Matrix products of a warpgroup, the second operand in shared memory (sm_90a), one instruction a function.
#pragma once

#include <cstdint>

namespace anabranch::ptx {

// Registers are given to the compiler's care before a group of products.
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until at most kPending groups, the newest, are under way.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// To the compiler a product is over once it is issued: after a wait, this keeps it from using the result before.
template <uint32_t kCount>
__device__ __forceinline__ void wgmma_settle(float (&d)[kCount]) {
#pragma unroll
  for (uint32_t i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// A matrix of bf16 in shared memory, K-major: rows of 128 bytes in groups of eight, 16-byte chunks of a row exchanged
// by the row's number within its group (128-byte swizzle). `address` is a shared one, its group on 1024 bytes.
__device__ __forceinline__ uint64_t wgmma_descriptor(uint32_t address) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  constexpr uint64_t kGroupStride = uint64_t{1024 >> 4} << 32;
  constexpr uint64_t kUnused = uint64_t{1} << 16;
  return kSwizzle128 | kGroupStride | kUnused | ((address & 0x3ffff) >> 4);
}

// A matrix of bf16 in shared memory whose rows run along K, as a second operand (MN-major): panels of 64 columns,
// `panel_bytes` apart, each with the rows and the swizzle of above. Sixteen rows further is 2,048 bytes further.
__device__ __forceinline__ uint64_t wgmma_descriptor_rows(uint32_t address, uint32_t panel_bytes) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  constexpr uint64_t kGroupStride = uint64_t{1024 >> 4} << 32;
  return kSwizzle128 | kGroupStride | uint64_t{panel_bytes >> 4} << 16 | ((address & 0x3ffff) >> 4);
}

// d[64, kN] += a[64, 16] b[kN, 16]^T. Thread t of the warpgroup holds for every eight columns, 8 j
// to 8 j + 7, the elements (16 (t / 32) + t % 32 / 4, 8 j + 2 (t % 4)), the next, and both again eight rows below.
template <int kN>
__device__ __forceinline__ void wgmma_bf16(float (&d)[kN / 2], uint64_t a, uint64_t b);

// The same, whatever d held before.
template <int kN>
__device__ __forceinline__ void wgmma_bf16_first(float (&d)[kN / 2], uint64_t a, uint64_t b);

// d[64, kN] += a[64, 16] b[16, kN], b by wgmma_descriptor_rows. A register of a has two neighbours of a row; thread t
// holds those that it would of d's first sixteen columns, in the same order.
template <int kN>
__device__ __forceinline__ void wgmma_bf16_rows(float (&d)[kN / 2], const uint32_t (&a)[4], uint64_t b);

// clang-format off
#define ANABRANCH_REGISTERS_0 "%0, %1, %2, %3, %4, %5, %6, %7"
#define ANABRANCH_REGISTERS_1 "%8, %9, %10, %11, %12, %13, %14, %15"
#define ANABRANCH_REGISTERS_2 "%16, %17, %18, %19, %20, %21, %22, %23"
#define ANABRANCH_REGISTERS_3 "%24, %25, %26, %27, %28, %29, %30, %31"
#define ANABRANCH_REGISTERS_4 "%32, %33, %34, %35, %36, %37, %38, %39"
#define ANABRANCH_REGISTERS_5 "%40, %41, %42, %43, %44, %45, %46, %47"
#define ANABRANCH_REGISTERS_6 "%48, %49, %50, %51, %52, %53, %54, %55"
#define ANABRANCH_REGISTERS_7 "%56, %57, %58, %59, %60, %61, %62, %63"
#define ANABRANCH_REGISTERS_8 "%64, %65, %66, %67, %68, %69, %70, %71"
#define ANABRANCH_REGISTERS_9 "%72, %73, %74, %75, %76, %77, %78, %79"
#define ANABRANCH_REGISTERS_10 "%80, %81, %82, %83, %84, %85, %86, %87"
#define ANABRANCH_REGISTERS_11 "%88, %89, %90, %91, %92, %93, %94, %95"
#define ANABRANCH_REGISTERS_12 "%96, %97, %98, %99, %100, %101, %102, %103"
#define ANABRANCH_REGISTERS_13 "%104, %105, %106, %107, %108, %109, %110, %111"
#define ANABRANCH_REGISTERS_14 "%112, %113, %114, %115, %116, %117, %118, %119"
#define ANABRANCH_REGISTERS_15 "%120, %121, %122, %123, %124, %125, %126, %127"
#define ANABRANCH_SUMS_0 "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
#define ANABRANCH_SUMS_1 "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
#define ANABRANCH_SUMS_2 "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23])
#define ANABRANCH_SUMS_3 "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
#define ANABRANCH_SUMS_4 "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39])
#define ANABRANCH_SUMS_5 "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47])
#define ANABRANCH_SUMS_6 "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55])
#define ANABRANCH_SUMS_7 "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
#define ANABRANCH_SUMS_8 "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67]), "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), "+f"(d[71])
#define ANABRANCH_SUMS_9 "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75]), "+f"(d[76]), "+f"(d[77]), "+f"(d[78]), "+f"(d[79])
#define ANABRANCH_SUMS_10 "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83]), "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87])
#define ANABRANCH_SUMS_11 "+f"(d[88]), "+f"(d[89]), "+f"(d[90]), "+f"(d[91]), "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95])
#define ANABRANCH_SUMS_12 "+f"(d[96]), "+f"(d[97]), "+f"(d[98]), "+f"(d[99]), "+f"(d[100]), "+f"(d[101]), "+f"(d[102]), "+f"(d[103])
#define ANABRANCH_SUMS_13 "+f"(d[104]), "+f"(d[105]), "+f"(d[106]), "+f"(d[107]), "+f"(d[108]), "+f"(d[109]), "+f"(d[110]), "+f"(d[111])
#define ANABRANCH_SUMS_14 "+f"(d[112]), "+f"(d[113]), "+f"(d[114]), "+f"(d[115]), "+f"(d[116]), "+f"(d[117]), "+f"(d[118]), "+f"(d[119])
#define ANABRANCH_SUMS_15 "+f"(d[120]), "+f"(d[121]), "+f"(d[122]), "+f"(d[123]), "+f"(d[124]), "+f"(d[125]), "+f"(d[126]), "+f"(d[127])

#define ANABRANCH_WGMMA(N, REGISTERS, A, B, ...)                                                          \
  template <>                                                                                                \
  __device__ __forceinline__ void wgmma_bf16<N>(float (&d)[N / 2], uint64_t a, uint64_t b) {       \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" REGISTERS "}, " A ", " B ", 1, " \
                 "1, 1, 0, 0;"                                                                                \
                 : __VA_ARGS__                                                                               \
                 : "l"(a), "l"(b));                                                                          \
  }

ANABRANCH_WGMMA(8, "%0, %1, %2, %3", "%4", "%5", "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]))
ANABRANCH_WGMMA(16, ANABRANCH_REGISTERS_0, "%8", "%9", ANABRANCH_SUMS_0)
ANABRANCH_WGMMA(32, ANABRANCH_REGISTERS_0 ", " ANABRANCH_REGISTERS_1, "%16", "%17", ANABRANCH_SUMS_0, ANABRANCH_SUMS_1)
ANABRANCH_WGMMA(48, ANABRANCH_REGISTERS_0 ", " ANABRANCH_REGISTERS_1 ", " ANABRANCH_REGISTERS_2, "%24", "%25", ANABRANCH_SUMS_0, ANABRANCH_SUMS_1, ANABRANCH_SUMS_2)
ANABRANCH_WGMMA(64, ANABRANCH_REGISTERS_0 ", " ANABRANCH_REGISTERS_1 ", " ANABRANCH_REGISTERS_2 ", " ANABRANCH_REGISTERS_3, "%32", "%33", ANABRANCH_SUMS_0, ANABRANCH_SUMS_1, ANABRANCH_SUMS_2, ANABRANCH_SUMS_3)
ANABRANCH_WGMMA(80, ANABRANCH_REGISTERS_0 ", " ANABRANCH_REGISTERS_1 ", " ANABRANCH_REGISTERS_2 ", " ANABRANCH_REGISTERS_3 ", " ANABRANCH_REGISTERS_4, "%40", "%41", ANABRANCH_SUMS_0, ANABRANCH_SUMS_1, ANABRANCH_SUMS_2, ANABRANCH_SUMS_3, ANABRANCH_SUMS_4)
ANABRANCH_WGMMA(96, ANABRANCH_REGISTERS_0 ", " ANABRANCH_REGISTERS_1 ", " ANABRANCH_REGISTERS_2 ", " ANABRANCH_REGISTERS_3 ", " ANABRANCH_REGISTERS_4 ", " ANABRANCH_REGISTERS_5, "%48", "%49", ANABRANCH_SUMS_0, ANABRANCH_SUMS_1, ANABRANCH_SUMS_2, ANABRANCH_SUMS_3, ANABRANCH_SUMS_4, ANABRANCH_SUMS_5)
ANABRANCH_WGMMA(112, ANABRANCH_REGISTERS_0 ", " ANABRANCH_REGISTERS_1 ", " ANABRANCH_REGISTERS_2 ", " ANABRANCH_REGISTERS_3 ", " ANABRANCH_REGISTERS_4 ", " ANABRANCH_REGISTERS_5 ", " ANABRANCH_REGISTERS_6, "%56", "%57", ANABRANCH_SUMS_0, ANABRANCH_SUMS_1, ANABRANCH_SUMS_2, ANABRANCH_SUMS_3, ANABRANCH_SUMS_4, ANABRANCH_SUMS_5, ANABRANCH_SUMS_6)
ANABRANCH_WGMMA(128, ANABRANCH_REGISTERS_0 ", " ANABRANCH_REGISTERS_1 ", " ANABRANCH_REGISTERS_2 ", " ANABRANCH_REGISTERS_3 ", " ANABRANCH_REGISTERS_4 ", " ANABRANCH_REGISTERS_5 ", " ANABRANCH_REGISTERS_6 ", " ANABRANCH_REGISTERS_7, "%64", "%65", ANABRANCH_SUMS_0, ANABRANCH_SUMS_1, ANABRANCH_SUMS_2, ANABRANCH_SUMS_3, ANABRANCH_SUMS_4, ANABRANCH_SUMS_5, ANABRANCH_SUMS_6, ANABRANCH_SUMS_7)
ANABRANCH_WGMMA(144, ANABRANCH_REGISTERS_0 ", " ANABRANCH_REGISTERS_1 ", " ANABRANCH_REGISTERS_2 ", " ANABRANCH_REGISTERS_3 ", " ANABRANCH_REGISTERS_4 ", " ANABRANCH_REGISTERS_5 ", " ANABRANCH_REGISTERS_6 ", " ANABRANCH_REGISTERS_7 ", " ANABRANCH_REGISTERS_8, "%72", "%73", ANABRANCH_SUMS_0, ANABRANCH_SUMS_1, ANABRANCH_SUMS_2, ANABRANCH_SUMS_3, ANABRANCH_SUMS_4, ANABRANCH_SUMS_5, ANABRANCH_SUMS_6, ANABRANCH_SUMS_7, ANABRANCH_SUMS_8)
ANABRANCH_WGMMA(160, ANABRANCH_REGISTERS_0 ", " ANABRANCH_REGISTERS_1 ", " ANABRANCH_REGISTERS_2 ", " ANABRANCH_REGISTERS_3 ", " ANABRANCH_REGISTERS_4 ", " ANABRANCH_REGISTERS_5 ", " ANABRANCH_REGISTERS_6 ", " ANABRANCH_REGISTERS_7 ", " ANABRANCH_REGISTERS_8 ", " ANABRANCH_REGISTERS_9, "%80", "%81", ANABRANCH_SUMS_0, ANABRANCH_SUMS_1, ANABRANCH_SUMS_2, ANABRANCH_SUMS_3, ANABRANCH_SUMS_4, ANABRANCH_SUMS_5, ANABRANCH_SUMS_6, ANABRANCH_SUMS_7, ANABRANCH_SUMS_8, ANABRANCH_SUMS_9)
ANABRANCH_WGMMA(176, ANABRANCH_REGISTERS_0 ", " ANABRANCH_REGISTERS_1 ", " ANABRANCH_REGISTERS_2 ", " ANABRANCH_REGISTERS_3 ", " ANABRANCH_REGISTERS_4 ", " ANABRANCH_REGISTERS_5 ", " ANABRANCH_REGISTERS_6 ", " ANABRANCH_REGISTERS_7 ", " ANABRANCH_REGISTERS_8 ", " ANABRANCH_REGISTERS_9 ", " ANABRANCH_REGISTERS_10, "%88", "%89", ANABRANCH_SUMS_0, ANABRANCH_SUMS_1, ANABRANCH_SUMS_2, ANABRANCH_SUMS_3, ANABRANCH_SUMS_4, ANABRANCH_SUMS_5, ANABRANCH_SUMS_6, ANABRANCH_SUMS_7, ANABRANCH_SUMS_8, ANABRANCH_SUMS_9, ANABRANCH_SUMS_10)
ANABRANCH_WGMMA(192, ANABRANCH_REGISTERS_0 ", " ANABRANCH_REGISTERS_1 ", " ANABRANCH_REGISTERS_2 ", " ANABRANCH_REGISTERS_3 ", " ANABRANCH_REGISTERS_4 ", " ANABRANCH_REGISTERS_5 ", " ANABRANCH_REGISTERS_6 ", " ANABRANCH_REGISTERS_7 ", " ANABRANCH_REGISTERS_8 ", " ANABRANCH_REGISTERS_9 ", " ANABRANCH_REGISTERS_10 ", " ANABRANCH_REGISTERS_11, "%96", "%97", ANABRANCH_SUMS_0, ANABRANCH_SUMS_1, ANABRANCH_SUMS_2, ANABRANCH_SUMS_3, ANABRANCH_SUMS_4, ANABRANCH_SUMS_5, ANABRANCH_SUMS_6, ANABRANCH_SUMS_7, ANABRANCH_SUMS_8, ANABRANCH_SUMS_9, ANABRANCH_SUMS_10, ANABRANCH_SUMS_11)
ANABRANCH_WGMMA(208, ANABRANCH_REGISTERS_0 ", " ANABRANCH_REGISTERS_1 ", " ANABRANCH_REGISTERS_2 ", " ANABRANCH_REGISTERS_3 ", " ANABRANCH_REGISTERS_4 ", " ANABRANCH_REGISTERS_5 ", " ANABRANCH_REGISTERS_6 ", " ANABRANCH_REGISTERS_7 ", " ANABRANCH_REGISTERS_8 ", " ANABRANCH_REGISTERS_9 ", " ANABRANCH_REGISTERS_10 ", " ANABRANCH_REGISTERS_11 ", " ANABRANCH_REGISTERS_12, "%104", "%105", ANABRANCH_SUMS_0, ANABRANCH_SUMS_1, ANABRANCH_SUMS_2, ANABRANCH_SUMS_3, ANABRANCH_SUMS_4, ANABRANCH_SUMS_5, ANABRANCH_SUMS_6, ANABRANCH_SUMS_7, ANABRANCH_SUMS_8, ANABRANCH_SUMS_9, ANABRANCH_SUMS_10, ANABRANCH_SUMS_11, ANABRANCH_SUMS_12)
ANABRANCH_WGMMA(224, ANABRANCH_REGISTERS_0 ", " ANABRANCH_REGISTERS_1 ", " ANABRANCH_REGISTERS_2 ", " ANABRANCH_REGISTERS_3 ", " ANABRANCH_REGISTERS_4 ", " ANABRANCH_REGISTERS_5 ", " ANABRANCH_REGISTERS_6 ", " ANABRANCH_REGISTERS_7 ", " ANABRANCH_REGISTERS_8 ", " ANABRANCH_REGISTERS_9 ", " ANABRANCH_REGISTERS_10 ", " ANABRANCH_REGISTERS_11 ", " ANABRANCH_REGISTERS_12 ", " ANABRANCH_REGISTERS_13, "%112", "%113", ANABRANCH_SUMS_0, ANABRANCH_SUMS_1, ANABRANCH_SUMS_2, ANABRANCH_SUMS_3, ANABRANCH_SUMS_4, ANABRANCH_SUMS_5, ANABRANCH_SUMS_6, ANABRANCH_SUMS_7, ANABRANCH_SUMS_8, ANABRANCH_SUMS_9, ANABRANCH_SUMS_10, ANABRANCH_SUMS_11, ANABRANCH_SUMS_12, ANABRANCH_SUMS_13)
ANABRANCH_WGMMA(240, ANABRANCH_REGISTERS_0 ", " ANABRANCH_REGISTERS_1 ", " ANABRANCH_REGISTERS_2 ", " ANABRANCH_REGISTERS_3 ", " ANABRANCH_REGISTERS_4 ", " ANABRANCH_REGISTERS_5 ", " ANABRANCH_REGISTERS_6 ", " ANABRANCH_REGISTERS_7 ", " ANABRANCH_REGISTERS_8 ", " ANABRANCH_REGISTERS_9 ", " ANABRANCH_REGISTERS_10 ", " ANABRANCH_REGISTERS_11 ", " ANABRANCH_REGISTERS_12 ", " ANABRANCH_REGISTERS_13 ", " ANABRANCH_REGISTERS_14, "%120", "%121", ANABRANCH_SUMS_0, ANABRANCH_SUMS_1, ANABRANCH_SUMS_2, ANABRANCH_SUMS_3, ANABRANCH_SUMS_4, ANABRANCH_SUMS_5, ANABRANCH_SUMS_6, ANABRANCH_SUMS_7, ANABRANCH_SUMS_8, ANABRANCH_SUMS_9, ANABRANCH_SUMS_10, ANABRANCH_SUMS_11, ANABRANCH_SUMS_12, ANABRANCH_SUMS_13, ANABRANCH_SUMS_14)
ANABRANCH_WGMMA(256, ANABRANCH_REGISTERS_0 ", " ANABRANCH_REGISTERS_1 ", " ANABRANCH_REGISTERS_2 ", " ANABRANCH_REGISTERS_3 ", " ANABRANCH_REGISTERS_4 ", " ANABRANCH_REGISTERS_5 ", " ANABRANCH_REGISTERS_6 ", " ANABRANCH_REGISTERS_7 ", " ANABRANCH_REGISTERS_8 ", " ANABRANCH_REGISTERS_9 ", " ANABRANCH_REGISTERS_10 ", " ANABRANCH_REGISTERS_11 ", " ANABRANCH_REGISTERS_12 ", " ANABRANCH_REGISTERS_13 ", " ANABRANCH_REGISTERS_14 ", " ANABRANCH_REGISTERS_15, "%128", "%129", ANABRANCH_SUMS_0, ANABRANCH_SUMS_1, ANABRANCH_SUMS_2, ANABRANCH_SUMS_3, ANABRANCH_SUMS_4, ANABRANCH_SUMS_5, ANABRANCH_SUMS_6, ANABRANCH_SUMS_7, ANABRANCH_SUMS_8, ANABRANCH_SUMS_9, ANABRANCH_SUMS_10, ANABRANCH_SUMS_11, ANABRANCH_SUMS_12, ANABRANCH_SUMS_13, ANABRANCH_SUMS_14, ANABRANCH_SUMS_15)

#define ANABRANCH_NEW_0 "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3]), "=f"(d[4]), "=f"(d[5]), "=f"(d[6]), "=f"(d[7])
#define ANABRANCH_NEW_1 "=f"(d[8]), "=f"(d[9]), "=f"(d[10]), "=f"(d[11]), "=f"(d[12]), "=f"(d[13]), "=f"(d[14]), "=f"(d[15])
#define ANABRANCH_NEW_2 "=f"(d[16]), "=f"(d[17]), "=f"(d[18]), "=f"(d[19]), "=f"(d[20]), "=f"(d[21]), "=f"(d[22]), "=f"(d[23])
#define ANABRANCH_NEW_3 "=f"(d[24]), "=f"(d[25]), "=f"(d[26]), "=f"(d[27]), "=f"(d[28]), "=f"(d[29]), "=f"(d[30]), "=f"(d[31])
#define ANABRANCH_NEW_4 "=f"(d[32]), "=f"(d[33]), "=f"(d[34]), "=f"(d[35]), "=f"(d[36]), "=f"(d[37]), "=f"(d[38]), "=f"(d[39])
#define ANABRANCH_NEW_5 "=f"(d[40]), "=f"(d[41]), "=f"(d[42]), "=f"(d[43]), "=f"(d[44]), "=f"(d[45]), "=f"(d[46]), "=f"(d[47])
#define ANABRANCH_NEW_6 "=f"(d[48]), "=f"(d[49]), "=f"(d[50]), "=f"(d[51]), "=f"(d[52]), "=f"(d[53]), "=f"(d[54]), "=f"(d[55])
#define ANABRANCH_NEW_7 "=f"(d[56]), "=f"(d[57]), "=f"(d[58]), "=f"(d[59]), "=f"(d[60]), "=f"(d[61]), "=f"(d[62]), "=f"(d[63])

#define ANABRANCH_WGMMA_FIRST(N, REGISTERS, A, B, ...)                                                    \
  template <>                                                                                                \
  __device__ __forceinline__ void wgmma_bf16_first<N>(float (&d)[N / 2], uint64_t a, uint64_t b) { \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" REGISTERS "}, " A ", " B ", 0, " \
                 "1, 1, 0, 0;"                                                                                \
                 : __VA_ARGS__                                                                               \
                 : "l"(a), "l"(b));                                                                          \
  }

ANABRANCH_WGMMA_FIRST(128, ANABRANCH_REGISTERS_0 ", " ANABRANCH_REGISTERS_1 ", " ANABRANCH_REGISTERS_2 ", " ANABRANCH_REGISTERS_3 ", " ANABRANCH_REGISTERS_4 ", " ANABRANCH_REGISTERS_5 ", " ANABRANCH_REGISTERS_6 ", " ANABRANCH_REGISTERS_7, "%64", "%65", ANABRANCH_NEW_0, ANABRANCH_NEW_1, ANABRANCH_NEW_2, ANABRANCH_NEW_3, ANABRANCH_NEW_4, ANABRANCH_NEW_5, ANABRANCH_NEW_6, ANABRANCH_NEW_7)

#define ANABRANCH_WGMMA_ROWS(N, REGISTERS, A, B, ...)                                                     \
  template <>                                                                                                \
  __device__ __forceinline__ void wgmma_bf16_rows<N>(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b) { \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" REGISTERS "}, {" A "}, " B ", 1, " \
                 "1, 1, 1;"                                                                                   \
                 : __VA_ARGS__                                                                               \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                      \
  }

ANABRANCH_WGMMA_ROWS(64, ANABRANCH_REGISTERS_0 ", " ANABRANCH_REGISTERS_1 ", " ANABRANCH_REGISTERS_2 ", " ANABRANCH_REGISTERS_3, "%32, %33, %34, %35", "%36", ANABRANCH_SUMS_0, ANABRANCH_SUMS_1, ANABRANCH_SUMS_2, ANABRANCH_SUMS_3)
ANABRANCH_WGMMA_ROWS(128, ANABRANCH_REGISTERS_0 ", " ANABRANCH_REGISTERS_1 ", " ANABRANCH_REGISTERS_2 ", " ANABRANCH_REGISTERS_3 ", " ANABRANCH_REGISTERS_4 ", " ANABRANCH_REGISTERS_5 ", " ANABRANCH_REGISTERS_6 ", " ANABRANCH_REGISTERS_7, "%64, %65, %66, %67", "%68", ANABRANCH_SUMS_0, ANABRANCH_SUMS_1, ANABRANCH_SUMS_2, ANABRANCH_SUMS_3, ANABRANCH_SUMS_4, ANABRANCH_SUMS_5, ANABRANCH_SUMS_6, ANABRANCH_SUMS_7)

#undef ANABRANCH_WGMMA
#undef ANABRANCH_WGMMA_FIRST
#undef ANABRANCH_WGMMA_ROWS
#undef ANABRANCH_NEW_0
#undef ANABRANCH_NEW_1
#undef ANABRANCH_NEW_2
#undef ANABRANCH_NEW_3
#undef ANABRANCH_NEW_4
#undef ANABRANCH_NEW_5
#undef ANABRANCH_NEW_6
#undef ANABRANCH_NEW_7
#undef ANABRANCH_REGISTERS_0
#undef ANABRANCH_SUMS_0
#undef ANABRANCH_REGISTERS_1
#undef ANABRANCH_SUMS_1
#undef ANABRANCH_REGISTERS_2
#undef ANABRANCH_SUMS_2
#undef ANABRANCH_REGISTERS_3
#undef ANABRANCH_SUMS_3
#undef ANABRANCH_REGISTERS_4
#undef ANABRANCH_SUMS_4
#undef ANABRANCH_REGISTERS_5
#undef ANABRANCH_SUMS_5
#undef ANABRANCH_REGISTERS_6
#undef ANABRANCH_SUMS_6
#undef ANABRANCH_REGISTERS_7
#undef ANABRANCH_SUMS_7
#undef ANABRANCH_REGISTERS_8
#undef ANABRANCH_SUMS_8
#undef ANABRANCH_REGISTERS_9
#undef ANABRANCH_SUMS_9
#undef ANABRANCH_REGISTERS_10
#undef ANABRANCH_SUMS_10
#undef ANABRANCH_REGISTERS_11
#undef ANABRANCH_SUMS_11
#undef ANABRANCH_REGISTERS_12
#undef ANABRANCH_SUMS_12
#undef ANABRANCH_REGISTERS_13
#undef ANABRANCH_SUMS_13
#undef ANABRANCH_REGISTERS_14
#undef ANABRANCH_SUMS_14
#undef ANABRANCH_REGISTERS_15
#undef ANABRANCH_SUMS_15
// clang-format on

}  // namespace anabranch::ptx
