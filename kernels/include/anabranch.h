// The only door to the kernels: plain C structs, one launcher per operation, one workspace query per operation.
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

// ---- attention ----

// Causal attention of the newest tokens of several sequences over a cache of keys and values.
//
// Sequence b has the tokens q_offsets[b] to q_offsets[b + 1] - 1 of q, T_b of them, which are its last ones, and
// kv_lengths[b] = S_b keys, those of these tokens included. Position s lies in row kv_rows[b] + s of the cache. Query i
// sees positions 0 to S_b - T_b + i. Query head h reads key head h * num_kv_heads / num_heads.
typedef struct AnabranchAttentionParams {
  // T, rows of q and out; T * num_heads is below 2^31.
  uint64_t num_tokens;
  // B, below 2^31; some may have no tokens.
  uint32_t num_sequences;
  // A multiple of num_kv_heads.
  uint32_t num_heads;
  uint32_t num_kv_heads;
  // Elements of a query and key head: a multiple of 8, up to 192, and up to 576 where `values` is `keys`, there is one
  // key head and value_dim is no more than this.
  uint32_t key_dim;
  // Elements of a value head: a multiple of 8, up to 128, and up to 512 under the same conditions.
  uint32_t value_dim;
  // Multiplies the scores; positive.
  float scale;
  // The most tokens of a sequence: those past it are not computed.
  uint32_t max_q_len;
  // The most keys of a sequence, as far as the host knows. It decides how the work is split, not the result's meaning.
  uint32_t max_kv_len;
  // [T, num_heads * key_dim] bf16, rotated; aligned to 16.
  const void* q;
  // cache_rows rows of bf16, aligned to 16, of which the first num_kv_heads * key_dim (value_dim) elements are read.
  // One cache may be both, as latent attention has it.
  const void* keys;
  const void* values;
  uint64_t cache_rows;
  // Elements from a row to the next: multiples of 8 below 2^31.
  uint64_t key_stride;
  uint64_t value_stride;
  // [B + 1], ascending, the last at most T. Rows of out from there on are not written.
  const uint32_t* q_offsets;
  // [B]; a row that sees no key is NaN.
  const uint32_t* kv_lengths;
  // [B]
  const uint32_t* kv_rows;
  // [T, num_heads * value_dim] bf16, aligned to 16.
  void* out;
  // Aligned to 16.
  void* workspace;
  uint64_t workspace_bytes;
} AnabranchAttentionParams;

// Bytes of workspace that anabranch_attention needs for these sizes on the current device. Of `params`, a host pointer
// as `bytes` is, the device pointers are only compared: whether `values` is `keys` matters.
AnabranchStatus anabranch_attention_workspace(const AnabranchAttentionParams* params, uint64_t* bytes);

// `params` is a host pointer, read before this returns.
AnabranchStatus anabranch_attention(const AnabranchAttentionParams* params, AnabranchStream stream);

#ifdef __cplusplus
}
#endif

#endif  // ANABRANCH_H
