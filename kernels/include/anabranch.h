// The only door to the kernels: plain C structs, one launcher per operation, and a query for the
// workspace of an operation that needs one.
//
// Rules of every launcher. It allocates nothing, waits for nothing and prints nothing; all work goes to the given
// stream, so that a call can be captured in a CUDA graph. Pointers are device pointers unless said otherwise, aligned
// to their element. It checks what it is given and returns a status; nothing is launched when that is not OK. The
// context of the stream is current on the calling thread. Shapes are row-major; T, E, K are tokens, experts, experts
// per token.
//
// The same header is that of the C library, libanabranch, which has everything declared here: the launchers, and from
// `---- plan ----` on what makes a layer's life easier. docs/embedding.md says how to build, link and use it.
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
  // Memory, a stream or a plan belongs to another GPU than the call runs on, or to none.
  ANABRANCH_STATUS_PLACE = 6,
  // There is no GPU that can be used: no driver, none of that number, or one that is too old.
  ANABRANCH_STATUS_NO_GPU = 7,
  // A mistake in this library.
  ANABRANCH_STATUS_INTERNAL = 8,
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

// The gate product: logits[t, e] = sum_i x[t, i] gate[e, i] + bias[e], what a router judges by.
typedef struct AnabranchRouterLogitsParams {
  // T, below 2^31.
  uint64_t num_tokens;
  // E, 1 to 1024.
  uint32_t num_experts;
  // d, a multiple of 8, 8 to 2^30.
  uint32_t hidden_size;
  // [T, d] bf16, aligned to 16.
  const void* x;
  // [E, d] bf16, aligned to 16.
  const void* gate;
  // [E] or null.
  const float* bias;
  // [T, E]
  float* logits;
} AnabranchRouterLogitsParams;

AnabranchStatus anabranch_router_logits(const AnabranchRouterLogitsParams* params, AnabranchStream stream);

// ---- permute ----

// Sorts (token, slot) pairs by expert, stable: ascending token within an expert.
typedef struct AnabranchPermuteParams {
  // T, with T * K below 2^31.
  uint64_t num_tokens;
  // K, 1 to 32.
  uint32_t topk;
  // E, 1 to 1024.
  uint32_t num_experts;
  // [T, K]; a pair whose id is not an expert's (-1: unused or dropped) goes nowhere.
  const int32_t* topk_ids;
  // [E + 1]: expert e has the permuted rows offsets[e] to offsets[e + 1] - 1.
  uint32_t* expert_offsets;
  // [T * K]: the pair, token * K + slot, of each permuted row; 2^32 - 1 from row offsets[E] on.
  uint32_t* slots;
  // [T, K]: the permuted row of each pair, or -1.
  int32_t* inverse;
  void* workspace;
  uint64_t workspace_bytes;
} AnabranchPermuteParams;

// Bytes of workspace, aligned to 4, that anabranch_permute needs for up to num_tokens tokens. `bytes` is a host
// pointer.
AnabranchStatus anabranch_permute_workspace(uint64_t num_tokens, uint32_t topk, uint32_t num_experts, uint64_t* bytes);

// `params` is a host pointer, read before this returns; so it is in every launcher.
AnabranchStatus anabranch_permute(const AnabranchPermuteParams* params, AnabranchStream stream);

// Rows of x in permuted order.
typedef struct AnabranchPermuteRowsParams {
  uint64_t num_tokens;
  // R: rows of out.
  uint64_t num_rows;
  uint32_t topk;
  // d, a multiple of 8.
  uint32_t hidden_size;
  // [T, d] bf16, aligned to 16.
  const void* x;
  // [R], as anabranch_permute writes them.
  const uint32_t* slots;
  // [R, d] bf16, aligned to 16; zeros in a row whose slot is no token's.
  void* out;
} AnabranchPermuteRowsParams;

AnabranchStatus anabranch_permute_rows(const AnabranchPermuteRowsParams* params, AnabranchStream stream);

// ---- combine ----

// out[t] = sum_k topk_weights[t, k] * y[inverse[t, k]] + sigmoid(shared_gate[t]) * shared[t]
typedef struct AnabranchCombineParams {
  uint64_t num_tokens;
  // R, at most 2^31 - 1: rows of y. A pair whose row is not one of them adds nothing.
  uint64_t num_rows;
  // K, 1 to 32.
  uint32_t topk;
  // d, a multiple of 8.
  uint32_t hidden_size;
  // [R, d] bf16, aligned to 16.
  const void* y;
  // [T, K]
  const int32_t* inverse;
  // [T, K]
  const float* topk_weights;
  // [T, d] bf16, aligned to 16, or null.
  const void* shared;
  // [T]: logits of the shared experts' gate, or null for a factor of one.
  const float* shared_gate;
  // [T, d], aligned to 16, bf16 or f32.
  void* out;
  AnabranchDtype out_dtype;
} AnabranchCombineParams;

AnabranchStatus anabranch_combine(const AnabranchCombineParams* params, AnabranchStream stream);

// ---- block: what stands between the products of a transformer block ----

// out = x / sqrt(mean(x^2) + eps) * weight over rows of `width`, in float32; x += delta before, where delta is given,
// and what is normed is the sum as bf16 holds it. A token has num_heads rows, one after another; the next token's begin
// x_stride (out_stride) elements on. out may be x.
typedef struct AnabranchRmsNormParams {
  uint64_t num_tokens;
  uint32_t num_heads;
  // A multiple of 8, at most 65,536.
  uint32_t width;
  // [T, num_heads, width] bf16 with rows aligned to 16; written only where delta is given.
  void* x;
  // Elements, a multiple of 8, at least num_heads * width.
  uint64_t x_stride;
  // [T, num_heads, width] bf16, strided as x and aligned to 16, or null.
  const void* delta;
  // [width], bf16 or f32, aligned to 16.
  const void* weight;
  AnabranchDtype weight_dtype;
  float eps;
  // [T, num_heads, width] bf16 with rows aligned to 16.
  void* out;
  uint64_t out_stride;
} AnabranchRmsNormParams;

AnabranchStatus anabranch_rms_norm(const AnabranchRmsNormParams* params, AnabranchStream stream);

typedef enum AnabranchRopeLayout {
  // Element i turns with i + rotary_dim / 2.
  ANABRANCH_ROPE_LAYOUT_HALF = 0,
  // Element 2 i turns with 2 i + 1.
  ANABRANCH_ROPE_LAYOUT_INTERLEAVED = 1,
} AnabranchRopeLayout;

// Heads of every token: bf16, a token's heads one after another, the next token's `stride` elements on. No heads: the
// pointer may be null.
typedef struct AnabranchHeads {
  void* data;
  uint64_t stride;
  uint32_t num_heads;
  uint32_t head_dim;
  // The first element of a head that is rotated.
  uint32_t first;
} AnabranchHeads;

// The RMS norm of the first `width` elements of every head: all of them, or the latent before a rotated part. Without a
// weight, none.
typedef struct AnabranchHeadNorm {
  // [width]
  const float* weight;
  // At most head_dim, and at most 512.
  uint32_t width;
  float eps;
} AnabranchHeadNorm;

// Rotates q in place and writes rotated keys, and values as they are, into a cache. Before that q and k are normed, and
// what bf16 holds of that, and v, is clamped to [-clip, clip].
typedef struct AnabranchRopeParams {
  uint64_t num_tokens;
  AnabranchRopeLayout layout;
  // Even; `first + rotary_dim` is at most head_dim.
  uint32_t rotary_dim;
  // [rotary_dim / 2]: radians a position.
  const float* frequencies;
  // Multiplies cos and sin.
  float attention_factor;
  // Positive; infinity for no clamp.
  float clip;
  // [T]
  const int32_t* positions;
  // Rotated in place.
  AnabranchHeads q;
  // Read only.
  AnabranchHeads k;
  // Read only; `first` is not looked at.
  AnabranchHeads v;
  AnabranchHeadNorm q_norm;
  AnabranchHeadNorm k_norm;
  // [T]: the cache's row of each token; outside of the cache, its keys and values are not written. No two tokens share
  // one.
  const int32_t* cache_rows;
  uint64_t num_cache_rows;
  // [num_cache_rows, k.num_heads, k.head_dim] and [num_cache_rows, v.num_heads, v.head_dim] bf16.
  void* k_cache;
  void* v_cache;
} AnabranchRopeParams;

AnabranchStatus anabranch_rope(const AnabranchRopeParams* params, AnabranchStream stream);

// out[t] = table[ids[t]]
typedef struct AnabranchEmbeddingParams {
  uint64_t num_tokens;
  // At most 2^31.
  uint64_t vocab_size;
  // d, a multiple of 8.
  uint32_t hidden_size;
  // [vocab_size, d] bf16, aligned to 16.
  const void* table;
  // [T]
  const uint32_t* ids;
  // [T, d] bf16, aligned to 16; NaN in a row whose id is not below vocab_size.
  void* out;
} AnabranchEmbeddingParams;

AnabranchStatus anabranch_embedding(const AnabranchEmbeddingParams* params, AnabranchStream stream);

// x += y, in float32, rounded once.
typedef struct AnabranchAddParams {
  uint64_t num_elements;
  // bf16, aligned to 2; any number of elements.
  void* x;
  const void* y;
} AnabranchAddParams;

AnabranchStatus anabranch_add(const AnabranchAddParams* params, AnabranchStream stream);

// ---- sampling ----

// ids[b] = the first of the largest logits[b, :]
typedef struct AnabranchArgmaxParams {
  // B, with B * ceil(V / 8192) below 2^31.
  uint64_t num_rows;
  // V, 1 to 2^31 - 1.
  uint64_t vocab_size;
  // [B, V], bf16 or f32.
  const void* logits;
  AnabranchDtype logits_dtype;
  // [B]; -1 where a logit is NaN or plus infinity, or all are minus infinity: there is nothing to choose by.
  int32_t* ids;
  // Aligned to 8.
  void* workspace;
  uint64_t workspace_bytes;
} AnabranchArgmaxParams;

// Bytes of workspace that anabranch_argmax needs for up to num_rows rows. `bytes` is a host pointer.
AnabranchStatus anabranch_argmax_workspace(uint64_t num_rows, uint64_t vocab_size, uint64_t* bytes);

AnabranchStatus anabranch_argmax(const AnabranchArgmaxParams* params, AnabranchStream stream);

// How one row is drawn from, as it lies in device memory: 32 bytes.
typedef struct AnabranchSampleRow {
  // In [0, 1): where in the distribution to draw. Not read if the temperature is 0.
  double u;
  // At least 0; 0 for the most probable token.
  float temperature;
  // 0 for no limit.
  uint32_t top_k;
  // Above 0, at most 1.
  float top_p;
  // At least 0, below 1.
  float min_p;
  // Above 0; 1 for none.
  float repetition_penalty;
  // Whatever it is.
  uint32_t unused;
} AnabranchSampleRow;

// Draws ids[b] from logits[b, :] after repetition penalty, temperature, top-k, top-p and min-p, in this order.
typedef struct AnabranchSampleParams {
  // B, below 2^31.
  uint64_t num_rows;
  // V, 1 to 2^22.
  uint64_t vocab_size;
  // [B, V], bf16 or f32.
  const void* logits;
  AnabranchDtype logits_dtype;
  // [B], aligned to 8. A captured call draws by whatever lies there when it is replayed.
  const AnabranchSampleRow* rows;
  // [B, ceil(V / 32)]: bit i % 32 of word i / 32 is set if token i was seen; the drawn one's is set. Null only if no
  // row has a penalty.
  uint32_t* seen;
  // [B]; -1 where a logit is NaN or plus infinity, where all are minus infinity, and where the row's settings are out
  // of range, which nobody but the kernel sees.
  int32_t* ids;
} AnabranchSampleParams;

AnabranchStatus anabranch_sample(const AnabranchSampleParams* params, AnabranchStream stream);
// ---- grouped_gemm ----

// What becomes of a product x W^T before it is rounded and stored.
typedef enum AnabranchEpilogue {
  // Nothing, or + bias.
  ANABRANCH_EPILOGUE_LINEAR = 0,
  // max(0, .), after + bias where there is one.
  ANABRANCH_EPILOGUE_RELU = 1,
  // The exact GELU, after + bias where there is one.
  ANABRANCH_EPILOGUE_GELU = 2,
  // silu(gate) * up of x W^T, after + bias where there is one: weights and bias hold the gate's rows, then as many of
  // up.
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
  // [E, n], with ANABRANCH_EPILOGUE_SWIGLU [E, 2 n], or null; on 8 bytes.
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

// ---- linear ----

// A dense product of few tokens: y = x W^T + b, or silu(gate) * up. With more tokens it is a grouped GEMM of one
// expert.
typedef struct AnabranchLinearParams {
  // T: see anabranch_linear_takes.
  uint64_t num_tokens;
  // d, columns of x: a multiple of 8, 8 to 2^30.
  uint32_t in_features;
  // n, columns of y: a multiple of 8, 8 to 2^30.
  uint32_t out_features;
  // ANABRANCH_EPILOGUE_LINEAR or ANABRANCH_EPILOGUE_SWIGLU.
  AnabranchEpilogue epilogue;
  // ANABRANCH_DTYPE_BF16 or ANABRANCH_DTYPE_F32.
  AnabranchDtype y_dtype;
  // [T, d] bf16, on 16 bytes.
  const void* x;
  // [n, d] bf16, with ANABRANCH_EPILOGUE_SWIGLU [2 n, d]; on 16 bytes.
  const void* weights;
  // [n] or null.
  const float* bias;
  // [T, n], on 4 bytes; overlaps nothing that is read.
  void* y;
  // [d], on 16 bytes: what is multiplied is the RMS norm of x + delta, rounded to bf16 as the sum is before it. Null:
  // x.
  const float* norm_weight;
  // Not negative.
  float norm_eps;
  // [T, d] bf16, on 16 bytes, or null; only with norm_weight.
  const void* delta;
  // [T, d] bf16, on 16 bytes, or null: x + delta is written there, which is not x; only with norm_weight.
  void* sum;
  // Not 0: no launch of this stream that may still run writes the weights, which are then read before these launches
  // have ended. A model's weights once the stream was waited for after loading, for example.
  uint32_t weights_settled;
} AnabranchLinearParams;

// Whether anabranch_linear takes so many tokens of this width on the current device. On Hopper (9.0) it does up to 64.
// Elsewhere, and with norm_weight (`norms` not 0), up to 4, and up to 8 of weights below 32 MiB, fewer where x would
// not fit into a block's memory: with more tokens rms_norm comes first, then this without norm_weight where it takes
// them, else a grouped GEMM. weight_rows: n, or 2 n with SwiGLU, below 2^32. `takes` is a host pointer.
AnabranchStatus anabranch_linear_takes(uint64_t num_tokens, uint32_t in_features, uint64_t weight_rows, uint32_t norms,
                                       uint32_t* takes);

// Multiplies. `params` is a host pointer, read before this returns.
AnabranchStatus anabranch_linear(const AnabranchLinearParams* params, AnabranchStream stream);

// ---- attention ----

// Causal attention of the newest tokens of several sequences over a cache of keys and values.
//
// Sequence b has the tokens q_offsets[b] to q_offsets[b + 1] - 1 of q, T_b of them, which are its last ones, and
// kv_lengths[b] = S_b keys, those of these tokens included. The cache is made of blocks, and a sequence has a table of
// those that are its own: position s lies in block block_table[table_starts[b] + s / block_size], in row s %
// block_size. Sequences may share blocks; a sequence whose rows all follow each other is one block. Query i sees
// positions 0 to S_b - T_b + i. Query head h reads key head h * num_kv_heads / num_heads.
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
  // num_blocks blocks of block_size rows of bf16, aligned to 16, of which the first num_kv_heads * key_dim (value_dim)
  // elements are read. One cache may be both, as latent attention has it.
  const void* keys;
  const void* values;
  // num_blocks * block_size is below 2^31.
  uint64_t num_blocks;
  // A power of two, at least 64.
  uint64_t block_size;
  // Elements from a row to the next: multiples of 8 below 2^31.
  uint64_t key_stride;
  uint64_t value_stride;
  // [B + 1], ascending, the last at most T. Rows of out from there on are not written.
  const uint32_t* q_offsets;
  // [B]; a row that sees no key is NaN.
  const uint32_t* kv_lengths;
  // [table_len], below 2^31: the tables of all sequences. What lies past the tables is not read.
  const uint32_t* block_table;
  uint64_t table_len;
  // [B]: where each sequence's table begins. A table that passes table_len ends there, and its sequence with it.
  const uint32_t* table_starts;
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

// ---- random, checksum: to fill and to read memory as fast as it goes ----

// Reproducible noise of mean 0, about normally distributed: an element hangs on the seed and its place alone.
typedef struct AnabranchRandomParams {
  uint64_t num_elements;
  uint64_t seed;
  // The standard deviation.
  float scale;
  // bf16 or f32.
  AnabranchDtype out_dtype;
  // Aligned to 16.
  void* out;
} AnabranchRandomParams;

AnabranchStatus anabranch_random(const AnabranchRandomParams* params, AnabranchStream stream);

// The exclusive or of all words.
typedef struct AnabranchChecksumParams {
  uint64_t num_words;
  // Aligned to 16.
  const uint32_t* x;
  // One word.
  uint32_t* out;
} AnabranchChecksumParams;

AnabranchStatus anabranch_checksum(const AnabranchChecksumParams* params, AnabranchStream stream);

// ---- moe_layer ----

// Which code path runs.
typedef enum AnabranchArch {
  // The newest that the device and the shape allow.
  ANABRANCH_ARCH_AUTO = 0,
  // mma.sync: every device from 8.0 on, every shape.
  ANABRANCH_ARCH_SM80 = 1,
  // TMA and wgmma: compute capability 9.0.
  ANABRANCH_ARCH_SM90 = 2,
} AnabranchArch;

// A mixture-of-experts layer of SwiGLU experts, bf16.
typedef struct AnabranchMoeShape {
  // E routed experts, K of them a token. E + num_shared is at most 1024, K + num_shared at most 32.
  AnabranchRouting routing;
  // S: experts of the same width that every token visits, with weight 1 (or sigmoid(shared_gate)). A shared expert of
  // width m n is m of them.
  uint32_t num_shared;
  // d, a multiple of 8.
  uint32_t hidden_size;
  // n, a multiple of 8.
  uint32_t intermediate_size;
  AnabranchArch arch;
} AnabranchMoeShape;

// out[t] = sum_k topk_weights[t, k] E_k(x[t]) + g[t] sum_s S_s(x[t]),  E(x) = (silu(x W_gate^T) * (x W_up^T)) W_down^T
typedef struct AnabranchMoeLayerParams {
  AnabranchMoeShape shape;
  // T; T * (K + S) is below 2^31.
  uint64_t num_tokens;
  // [T, d] bf16, aligned to 16.
  const void* x;
  // [T, E], what the router is to judge by; or null, and topk_ids and topk_weights are given.
  const float* logits;
  // [E], steers selection only, or null.
  const float* selection_bias;
  // [T]: logits of the shared experts' gate, or null for a factor of one.
  const float* shared_gate;
  // [E + S, 2 n, d] bf16: gate rows, then up rows of every expert, shared ones last; aligned to 16.
  const void* gate_up;
  // [E + S, d, n] bf16, aligned to 16.
  const void* down;
  // [T, K]: written where logits are given (either may then be null), else read. An id that is not an expert's (-1)
  // adds nothing.
  int32_t* topk_ids;
  float* topk_weights;
  // [T, d] bf16, aligned to 16.
  void* out;
  // Aligned to 256. What it holds before does not matter.
  void* workspace;
  uint64_t workspace_bytes;
} AnabranchMoeLayerParams;

// What anabranch_moe_layer does with a shape: chosen by a pure function of it and the device.
typedef struct AnabranchMoePlan {
  // ANABRANCH_ARCH_SM80 or ANABRANCH_ARCH_SM90.
  AnabranchArch arch;
  // Rows of weights, and most tokens, that a tile of the expert products has; of the first product with sm_80.
  uint32_t tile_rows;
  uint32_t tile_tokens;
  // Tiles of weights and tokens on their way to shared memory at a time.
  uint32_t stages;
  // Blocks of the expert products' launch.
  uint32_t blocks;
  // Kernels from logits to output.
  uint32_t launches;
  uint64_t workspace_bytes;
} AnabranchMoePlan;

// Plans for up to num_tokens tokens on the current device. Both pointers are the host's. The workspace of more tokens
// does for fewer.
AnabranchStatus anabranch_moe_plan(const AnabranchMoeShape* shape, uint64_t num_tokens, AnabranchMoePlan* plan);

// Runs the layer.
AnabranchStatus anabranch_moe_layer(const AnabranchMoeLayerParams* params, AnabranchStream stream);

// A transformer's block from its residual stream to what its experts add to it:
//
//   residual += delta (optional);   x = RMS norm of residual;   logits = x gate^T;   out = the layer of x by logits
//
// as anabranch_rms_norm, anabranch_router_logits and anabranch_moe_layer do it one after another. With up to 8 tokens
// and 256 experts on 9.0 all that precedes the expert products is one launch.
typedef struct AnabranchMoeBlockParams {
  AnabranchMoeShape shape;
  // T, as in AnabranchMoeLayerParams.
  uint64_t num_tokens;
  // [T, d] bf16, aligned to 16; written where there is a delta.
  void* residual;
  // [T, d] bf16, aligned to 16, or null.
  const void* delta;
  // [d], aligned to 16.
  const float* norm_weight;
  // Not negative.
  float norm_eps;
  // [E, d] bf16, aligned to 16.
  const void* gate;
  // [E], steers selection only, or null.
  const float* selection_bias;
  // As in AnabranchMoeLayerParams; shared experts have weight one.
  const void* gate_up;
  const void* down;
  // [T, d] bf16, aligned to 16: written.
  void* x;
  // [T, E], aligned to 16: written.
  float* logits;
  // [T, K]: written; either may be null.
  int32_t* topk_ids;
  float* topk_weights;
  // As in AnabranchMoeLayerParams.
  void* out;
  void* workspace;
  uint64_t workspace_bytes;
} AnabranchMoeBlockParams;

AnabranchStatus anabranch_moe_block(const AnabranchMoeBlockParams* params, AnabranchStream stream);

// ---- decode_step: all layers of one token ----

// Most layers of a decode step.
#define ANABRANCH_DECODE_LAYERS 96

// A layer's weights and cache; matrices are bf16; everything is aligned to 16. H heads of queries, G of
// keys. In latent attention a query of q_dim elements becomes, by `absorb`, one of key_dim that attends to the cached
// rows, whose first value_dim elements are the values, and what comes out goes through `expand`.
typedef struct AnabranchDecodeLayer {
  // [d].
  const float* attention_norm;
  // Queries, keys, values: [(H + 2 G) key_dim, d]. Latent: queries, [H q_dim, d].
  const void* q;
  // Latent: [key_dim, d]. Else null.
  const void* kv;
  // Of each head, [key_dim], or null. Latent: k_norm is the latent's, [value_dim].
  const float* q_norm;
  const float* k_norm;
  // Latent: [H, key_dim, q_dim] and [H, o_dim, value_dim]. Else null.
  const void* absorb;
  const void* expand;
  // [d, H o_dim].
  const void* output;
  // [rows, G, key_dim] and [rows, G, value_dim]; latent: [rows, key_dim] and null.
  void* k_cache;
  void* v_cache;
  // [d].
  const float* feed_forward_norm;
  // [E, d]; null in a layer without experts.
  const void* gate;
  // [E], steers selection only, or null.
  const float* selection_bias;
  // [E + S, 2 n, d] and [E + S, d, n], as anabranch_moe_layer has them; without experts [2 n, d] and [d, n].
  const void* gate_up;
  const void* down;
} AnabranchDecodeLayer;

// What all layers share.
typedef struct AnabranchDecodeShape {
  // At most ANABRANCH_DECODE_LAYERS.
  uint32_t num_layers;
  // d, a multiple of 8, at most 4096.
  uint32_t hidden_size;
  float norm_eps;
  // H and G; H is at most 16 G. Latent: G = 1.
  uint32_t num_heads;
  uint32_t num_kv_heads;
  // Multiples of 16 and of 8; at most 128, latent: 576 and 512.
  uint32_t key_dim;
  uint32_t value_dim;
  // Latent: elements of a projected query head and of a head's output, multiples of 8. Else 0.
  uint32_t q_dim;
  uint32_t o_dim;
  float scale;
  // Of q_norm and k_norm.
  float head_norm_eps;
  AnabranchRopeLayout layout;
  // Elements of a head that are rotated, and the first of them; latent: from value_dim to the head's end.
  uint32_t rotary_dim;
  uint32_t rotary_first;
  float attention_factor;
  // Of layers with experts; E is even and at most 256. Without such layers, num_experts is 0.
  AnabranchRouting routing;
  // S: every token visits them with weight one.
  uint32_t num_shared;
  // n of an expert, and of a layer without experts (0 if there is none); multiples of 8.
  uint32_t intermediate_size;
  uint32_t dense_size;
} AnabranchDecodeShape;

// One token through all layers, in one launch:
//
//   x += attention(norm(x));   x += feed_forward(norm(x));   and so for every layer
//
// Attention reads and writes one sequence's paged cache, as anabranch_attention and anabranch_rope do. Sums and the
// residual stream between layers are float32; an expert's weight is applied to its h. Reads every active weight once.
typedef struct AnabranchDecodeStepParams {
  AnabranchDecodeShape shape;
  // [num_layers], the host's; read before the call returns.
  const AnabranchDecodeLayer* layers;
  // [rotary_dim / 2].
  const float* frequencies;
  // On the device, one word each: the token's position, its row of every layer's cache (outside of it, nothing is
  // written), the sequence's length with it, and where its table begins.
  const int32_t* position;
  const int32_t* cache_row;
  const uint32_t* kv_length;
  const uint32_t* table_start;
  // [table_len]: blocks of block_size rows, a power of two of at least 64.
  const uint32_t* block_table;
  uint64_t table_len;
  uint32_t block_size;
  uint64_t cache_rows;
  // [d] bf16, aligned to 16: the residual stream, in place.
  void* x;
  // Aligned to 256. Zero before the first launch, and left alone between launches, one after another.
  void* workspace;
  uint64_t workspace_bytes;
} AnabranchDecodeStepParams;

// Whether the current device, of compute capability 9.0, does such steps: every block of the launch has a
// multiprocessor. `bytes` is the workspace. All pointers are the host's.
AnabranchStatus anabranch_decode_step_takes(const AnabranchDecodeShape* shape, uint32_t* takes, uint64_t* bytes);

// `params` is a host pointer, read before this returns. A cooperative launch: it begins when the whole GPU is free.
AnabranchStatus anabranch_decode_step(const AnabranchDecodeStepParams* params, AnabranchStream stream);

// ---- plan: only in the C library ----
//
// A plan is a layer's shape, checked once, for one GPU. It does not change once made: any number of threads may use one
// at the same time, each with a workspace and a stream of its own.

// What this header describes. It changes when a program that was built with another header would no longer work.
#define ANABRANCH_ABI_VERSION 1

// ANABRANCH_ABI_VERSION of the library that was loaded.
int32_t anabranch_abi_version(void);

// Why this thread's last call that did not return ANABRANCH_STATUS_OK, of whichever function, did not: a sentence that
// names the argument. Empty before the first; valid until the next such call of the thread.
const char* anabranch_last_error(void);

typedef struct AnabranchPlan AnabranchPlan;

// Plans a layer for up to most_tokens tokens a call on the current device. All pointers are the host's. Where
// `shape->arch` is ANABRANCH_ARCH_AUTO, the environment variable ANABRANCH_ARCH (auto, sm80, sm90) is heeded.
AnabranchStatus anabranch_plan_create(const AnabranchMoeShape* shape, uint64_t most_tokens, AnabranchPlan** plan);

// Null is allowed. No other thread may be using the plan; work that was launched may still run.
void anabranch_plan_destroy(AnabranchPlan* plan);

// Bytes of workspace of a call of up to num_tokens tokens, at most as many as were planned for.
AnabranchStatus anabranch_plan_workspace(const AnabranchPlan* plan, uint64_t num_tokens, uint64_t* bytes);

// What a call of num_tokens tokens does, in a few lines of text, zero-terminated. `text` has text_bytes bytes; the text
// is cut where they do not suffice, and 1,024 always do.
AnabranchStatus anabranch_plan_describe(const AnabranchPlan* plan, uint64_t num_tokens, char* text,
                                        uint64_t text_bytes);

// One call of a planned layer: the fields of AnabranchMoeLayerParams, without the shape.
typedef struct AnabranchForwardParams {
  // T, at most as many as were planned for.
  uint64_t num_tokens;
  // [T, d] bf16, aligned to 16.
  const void* x;
  // [T, E], or null, and topk_ids and topk_weights are given.
  const float* logits;
  // [E] or null.
  const float* selection_bias;
  // [T]: logits of the shared experts' gate, or null.
  const float* shared_gate;
  // [E + S, 2 n, d] bf16, aligned to 16.
  const void* gate_up;
  // [E + S, d, n] bf16, aligned to 16.
  const void* down;
  // [T, K]: written where logits are given (either may then be null), else read.
  int32_t* topk_ids;
  float* topk_weights;
  // [T, d] bf16, aligned to 16.
  void* out;
  // Aligned to 256.
  void* workspace;
  uint64_t workspace_bytes;
  // Not 0: asks the driver first whether every pointer is memory of the plan's GPU, some microseconds in all. Else such
  // a mistake ends the context, later.
  uint32_t check_memory;
} AnabranchForwardParams;

// Runs the layer. The plan's device is current on the calling thread.
AnabranchStatus anabranch_plan_forward(const AnabranchPlan* plan, const AnabranchForwardParams* params,
                                       AnabranchStream stream);

#ifdef __cplusplus
}
#endif

#endif  // ANABRANCH_H
