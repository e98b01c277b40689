// What the grouped GEMM's kernels are given, worked out once on the host.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

namespace anabranch::grouped_gemm {

// What becomes of a product before it is stored. One kernel each, so that the error function's code burdens nobody
// else.
enum class Epilogue {
  kLinear,     // + bias, where there is one
  kActivated,  // + bias, then ReLU or GELU
  kSwiGlu,     // + bias, where there is one, then silu(gate) * up
};

struct Args {
  const __nv_bfloat16* x;        // [x_rows, depth]
  const __nv_bfloat16* weights;  // [experts, columns or 2 columns, depth]
  const float* bias;             // [experts, columns or 2 columns] or null
  const uint32_t* offsets;       // [experts + 1]; null for one expert that has all rows
  const uint32_t* slots;         // [rows] or null: row r of the product is row slots[r] / topk of x, else row r
  void* y;                       // [rows, columns]
  uint32_t rows;                 // most rows; offsets tell how many there are
  uint32_t x_rows;
  uint32_t experts;
  uint32_t topk;
  uint32_t depth;
  uint32_t columns;       // of y
  uint32_t column_tiles;  // tiles across y
  uint32_t most_tiles;    // that ascending offsets can make
  bool wide_y;            // y is float32, else bf16
  bool gelu;              // of an activated epilogue, else ReLU
};

}  // namespace anabranch::grouped_gemm
