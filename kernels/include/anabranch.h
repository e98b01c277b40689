// The only door to the kernels: plain C structs, one launcher per operation, and a query for the
// workspace of an operation that needs one.
//
// Rules of every launcher. It allocates nothing, waits for nothing and prints nothing; all work goes to the given
// stream, so that a call can be captured in a CUDA graph. Pointers are device pointers unless said otherwise, aligned
// to their element. It checks what it is given and returns a status; nothing is launched when that is not OK. The
// context of the stream is current on the calling thread. Shapes are row-major; T, E, K are tokens, experts, experts
// per token.
//
// Only <stdint.h> is included and neither bool nor size_t is used: bindings are made without a compiler's own headers.
#ifndef ANABRANCH_H
#define ANABRANCH_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// What a launcher answers. ANABRANCH_STATUS_CUDA + e stands for the CUDA runtime's error e.
typedef enum AnabranchStatus {
  ANABRANCH_STATUS_OK = 0,
  // A pointer that is needed is null, or one that must be null is not.
  ANABRANCH_STATUS_POINTER = 1,
  // A pointer is not aligned.
  ANABRANCH_STATUS_ALIGNMENT = 2,
  // A size or setting is out of range or contradicts another.
  ANABRANCH_STATUS_SETTING = 3,
  // The workspace is smaller than the query says.
  ANABRANCH_STATUS_WORKSPACE = 4,
  // No kernel for this data type, shape or architecture.
  ANABRANCH_STATUS_UNSUPPORTED = 5,
  ANABRANCH_STATUS_CUDA = 1000,
} AnabranchStatus;

// How an array's elements are stored.
typedef enum AnabranchDtype {
  ANABRANCH_DTYPE_F32 = 0,
  ANABRANCH_DTYPE_F16 = 1,
  ANABRANCH_DTYPE_BF16 = 2,
  ANABRANCH_DTYPE_F8_E4M3 = 3,
} AnabranchDtype;

// The caller's stream: a cudaStream_t or CUstream.
typedef struct CUstream_st* AnabranchStream;

// A sentence on a status, in static memory.
const char* anabranch_status_text(AnabranchStatus status);

// Version of the CUDA runtime inside this library: 1000 * major + 10 * minor. The driver must be as new in its major.
int32_t anabranch_runtime_version(void);

// ---- router ----

typedef enum AnabranchScore {
  ANABRANCH_SCORE_SOFTMAX = 0,
  ANABRANCH_SCORE_SIGMOID = 1,
  ANABRANCH_SCORE_TOPK_SOFTMAX = 2,
} AnabranchScore;

typedef enum AnabranchRenormalize {
  ANABRANCH_RENORMALIZE_NONE = 0,
  ANABRANCH_RENORMALIZE_SUM = 1,
} AnabranchRenormalize;

typedef enum AnabranchGroupScore {
  ANABRANCH_GROUP_SCORE_MAX = 0,
  ANABRANCH_GROUP_SCORE_TOP2_SUM = 1,
} AnabranchGroupScore;

typedef enum AnabranchAdaptive {
  ANABRANCH_ADAPTIVE_FIXED = 0,
  ANABRANCH_ADAPTIVE_COMPLEXITY = 1,
  ANABRANCH_ADAPTIVE_ENTROPY = 2,
} AnabranchAdaptive;

// A router's rule: how logits become expert ids and weights.
typedef struct AnabranchRouting {
  // E, 1 to 1024.
  uint32_t num_experts;
  // K, 1 to 32, at most E.
  uint32_t topk;
  AnabranchScore score;
  AnabranchRenormalize renormalize;
  // Applied to the weights last.
  float scale;
  // Equal, contiguous groups of experts that divide E; 0 for no limit.
  uint32_t n_group;
  // Groups a token may choose from, 1 to n_group.
  uint32_t topk_group;
  AnabranchGroupScore group_score;
  AnabranchAdaptive adaptive;
  // Tokens an expert accepts; 0 if nothing is dropped.
  uint64_t expert_capacity;
} AnabranchRouting;

// From logits to expert ids, weights and counts.
typedef struct AnabranchRouterParams {
  AnabranchRouting routing;
  // T; T * K is below 2^31.
  uint64_t num_tokens;
  // [T, E]
  const float* logits;
  // [E], steers selection only, or null.
  const float* selection_bias;
  // [T] in [0, 1] with ANABRANCH_ADAPTIVE_COMPLEXITY, else null.
  const float* complexity;
  // [T, K], descending by selection score; -1 where a slot is unused or the token was dropped.
  int32_t* topk_ids;
  // [T, K]; 0 where the id is -1.
  float* topk_weights;
  // [E]: tokens per expert, dropped ones not counted.
  uint32_t* expert_counts;
  void* workspace;
  uint64_t workspace_bytes;
} AnabranchRouterParams;

// Bytes of workspace that anabranch_router needs for up to num_tokens tokens. `routing` and `bytes` are host pointers.
AnabranchStatus anabranch_router_workspace(const AnabranchRouting* routing, uint64_t num_tokens, uint64_t* bytes);

// Routes every token. `params` is a host pointer, read before this returns.
AnabranchStatus anabranch_router(const AnabranchRouterParams* params, AnabranchStream stream);

// ---- grouped_gemm ----

// What becomes of a product x W^T before it is rounded and stored.
typedef enum AnabranchEpilogue {
  // Nothing, or + bias.
  ANABRANCH_EPILOGUE_LINEAR = 0,
  // max(0, .), after + bias where there is one.
  ANABRANCH_EPILOGUE_RELU = 1,
  // The exact GELU, after + bias where there is one.
  ANABRANCH_EPILOGUE_GELU = 2,
  // silu(x W_gate^T) * (x W_up^T): weights hold the gate's rows, then as many of up. No bias.
  ANABRANCH_EPILOGUE_SWIGLU = 3,
} AnabranchEpilogue;

// Rows of x, and of weights, that a block multiplies at a time. It changes no bit of a result.
typedef enum AnabranchTile {
  // Chosen from the shape.
  ANABRANCH_TILE_AUTO = 0,
  ANABRANCH_TILE_16X64 = 1,
  ANABRANCH_TILE_32X128 = 2,
  ANABRANCH_TILE_64X128 = 3,
  ANABRANCH_TILE_128X128 = 4,
  ANABRANCH_TILE_128X256 = 5,
} AnabranchTile;

// Every expert's product with its own rows: y[r] = epilogue(x[source(r)] W_e^T) for expert_offsets[e] <= r <
// expert_offsets[e + 1]. One expert without offsets is a plain product.
typedef struct AnabranchGroupedGemmParams {
  // R, rows of y, below 2^31. Rows from expert_offsets[E] on are neither computed nor written.
  uint64_t num_rows;
  // T, rows of x: as many as y without row_slots.
  uint64_t num_tokens;
  // E, 1 to 1024.
  uint32_t num_experts;
  // K, 1 to 32 with row_slots, else 0.
  uint32_t topk;
  // d, columns of x: a multiple of 8, 8 to 2^30.
  uint32_t in_features;
  // n, columns of y: a multiple of 8, 8 to 2^30.
  uint32_t out_features;
  AnabranchEpilogue epilogue;
  AnabranchTile tile;
  // ANABRANCH_DTYPE_BF16 or ANABRANCH_DTYPE_F32.
  AnabranchDtype y_dtype;
  // [T, d] bf16, on 16 bytes.
  const void* x;
  // [E, n, d] bf16, with ANABRANCH_EPILOGUE_SWIGLU [E, 2 n, d]; on 16 bytes.
  const void* weights;
  // [E, n] or null, on 8 bytes.
  const float* bias;
  // [E + 1], ascending, the last at most R. Null with one expert that has all rows.
  const uint32_t* expert_offsets;
  // [R]: row r of y is made from row row_slots[r] / K of x. Null where x is in y's order.
  const uint32_t* row_slots;
  // [R, n], on 16 bytes; overlaps nothing that is read.
  void* y;
} AnabranchGroupedGemmParams;

// Multiplies. `params` is a host pointer, read before this returns.
AnabranchStatus anabranch_grouped_gemm(const AnabranchGroupedGemmParams* params, AnabranchStream stream);

#ifdef __cplusplus
}
#endif

#endif  // ANABRANCH_H
