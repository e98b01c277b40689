// A mixture-of-experts layer from C: planned once, run on memory from cudaMalloc, checked against a loop on the CPU,
// run again from single operations, and captured in a CUDA graph that is replayed with other logits.
//
//   gcc moe_layer.c $(pkg-config --cflags --libs anabranch) -lcudart -lm && ./a.out
#include <anabranch.h>
#include <cuda_runtime_api.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { T = 5, E = 8, K = 2, D = 256, N = 128 };

#define CUDA(call)                                                    \
  do {                                                                \
    cudaError_t error_ = (call);                                      \
    if (error_ != cudaSuccess) {                                      \
      fprintf(stderr, "%s: %s\n", #call, cudaGetErrorString(error_)); \
      exit(1);                                                        \
    }                                                                 \
  } while (0)

#define ANABRANCH(call)                                \
  do {                                                 \
    if ((call) != ANABRANCH_STATUS_OK) {               \
      fprintf(stderr, "%s\n", anabranch_last_error()); \
      exit(1);                                         \
    }                                                  \
  } while (0)

// bf16 is the upper half of a float, rounded to nearest, ties to even.
static uint16_t to_bf16(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static float from_bf16(uint16_t half) {
  uint32_t bits = (uint32_t)half << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// Uniform in [-size, size).
static float noise(float size) {
  static uint64_t state = 2026;
  state = state * 6364136223846793005u + 1442695040888963407u;
  return size * ((float)(state >> 40) / (1 << 23) - 1.0f);
}

static uint16_t x[T * D], gate_up[E * 2 * N * D], down[E * D * N];
static float logits[T * E], expected[T * D];

static void fill_bf16(uint16_t* values, int count, float size) {
  for (int i = 0; i < count; i++) values[i] = to_bf16(noise(size));
}

static void fill_logits(void) {
  for (int i = 0; i < T * E; i++) logits[i] = noise(2);
}

static float dot(const uint16_t* a, const uint16_t* b, int length) {
  float sum = 0;
  for (int i = 0; i < length; i++) sum += from_bf16(a[i]) * from_bf16(b[i]);
  return sum;
}

// E(x) of one expert, times a weight, added to out. h is bf16 between the two products.
static void add_expert(int expert, float weight, const uint16_t* token, float* out) {
  const uint16_t* gate = &gate_up[expert * 2 * N * D];
  const uint16_t* up = gate + N * D;
  uint16_t h[N];
  for (int i = 0; i < N; i++) {
    float gated = dot(&gate[i * D], token, D);
    h[i] = to_bf16(gated / (1 + expf(-gated)) * dot(&up[i * D], token, D));
  }
  for (int i = 0; i < D; i++) out[i] += weight * dot(&down[(expert * D + i) * N], h, N);
}

// Mixtral's rule: softmax, the two best, divided by their sum.
static void layer_on_cpu(void) {
  memset(expected, 0, sizeof expected);
  for (int t = 0; t < T; t++) {
    const float* of = &logits[t * E];
    int first = 0, second = 1;
    for (int e = 1; e < E; e++) {
      if (of[e] > of[first]) first = e;
    }
    if (first == second) second = 0;
    for (int e = 0; e < E; e++) {
      if (e != first && of[e] > of[second]) second = e;
    }
    float weight = 1 / (1 + expf(of[second] - of[first]));
    add_expert(first, weight, &x[t * D], &expected[t * D]);
    add_expert(second, 1 - weight, &x[t * D], &expected[t * D]);
  }
}

// The relative Frobenius error of what the GPU wrote.
static int check(const char* what, const void* device_out) {
  uint16_t out[T * D];
  CUDA(cudaMemcpy(out, device_out, sizeof out, cudaMemcpyDeviceToHost));
  double difference = 0, norm = 0;
  for (int i = 0; i < T * D; i++) {
    double off = from_bf16(out[i]) - expected[i];
    difference += off * off;
    norm += (double)expected[i] * expected[i];
  }
  double error = sqrt(difference / norm);
  int good = error < 5e-3;  // a NaN is not good
  printf("%-20s relative error %.1e  %s\n", what, error, good ? "ok" : "WRONG");
  return good;
}

static void* on_gpu(const void* host, size_t bytes) {
  void* device = NULL;
  CUDA(cudaMalloc(&device, bytes));
  if (host != NULL) CUDA(cudaMemcpy(device, host, bytes, cudaMemcpyHostToDevice));
  return device;
}

// The layer from its parts: router, permute, two grouped products, combine. `call` has its inputs and output.
static void run_operations(const AnabranchRouting* routing, const AnabranchForwardParams* call, cudaStream_t stream) {
  uint64_t router_bytes, permute_bytes;
  ANABRANCH(anabranch_router_workspace(routing, T, &router_bytes));
  ANABRANCH(anabranch_permute_workspace(T, K, E, &permute_bytes));
  int32_t* topk_ids = on_gpu(NULL, sizeof(int32_t) * T * K);
  float* topk_weights = on_gpu(NULL, sizeof(float) * T * K);
  uint32_t* counts = on_gpu(NULL, sizeof(uint32_t) * E);
  uint32_t* offsets = on_gpu(NULL, sizeof(uint32_t) * (E + 1));
  uint32_t* slots = on_gpu(NULL, sizeof(uint32_t) * T * K);
  int32_t* inverse = on_gpu(NULL, sizeof(int32_t) * T * K);
  void* h = on_gpu(NULL, sizeof(uint16_t) * T * K * N);
  void* y = on_gpu(NULL, sizeof(uint16_t) * T * K * D);
  void* workspace = on_gpu(NULL, router_bytes + permute_bytes + 1);  // one after the other: they may share it

  AnabranchRouterParams router = {.routing = *routing,
                                  .num_tokens = T,
                                  .logits = call->logits,
                                  .topk_ids = topk_ids,
                                  .topk_weights = topk_weights,
                                  .expert_counts = counts,
                                  .workspace = workspace,
                                  .workspace_bytes = router_bytes};
  ANABRANCH(anabranch_router(&router, stream));
  AnabranchPermuteParams permute = {.num_tokens = T,
                                    .topk = K,
                                    .num_experts = E,
                                    .topk_ids = topk_ids,
                                    .expert_offsets = offsets,
                                    .slots = slots,
                                    .inverse = inverse,
                                    .workspace = workspace,
                                    .workspace_bytes = permute_bytes};
  ANABRANCH(anabranch_permute(&permute, stream));
  AnabranchGroupedGemmParams first = {.num_rows = T * K,
                                      .num_tokens = T,
                                      .num_experts = E,
                                      .topk = K,
                                      .in_features = D,
                                      .out_features = N,
                                      .epilogue = ANABRANCH_EPILOGUE_SWIGLU,
                                      .y_dtype = ANABRANCH_DTYPE_BF16,
                                      .x = call->x,
                                      .weights = call->gate_up,
                                      .expert_offsets = offsets,
                                      .row_slots = slots,
                                      .y = h};
  ANABRANCH(anabranch_grouped_gemm(&first, stream));
  AnabranchGroupedGemmParams second = {.num_rows = T * K,
                                       .num_tokens = T * K,
                                       .num_experts = E,
                                       .in_features = N,
                                       .out_features = D,
                                       .epilogue = ANABRANCH_EPILOGUE_LINEAR,
                                       .y_dtype = ANABRANCH_DTYPE_BF16,
                                       .x = h,
                                       .weights = call->down,
                                       .expert_offsets = offsets,
                                       .y = y};
  ANABRANCH(anabranch_grouped_gemm(&second, stream));
  AnabranchCombineParams combine = {.num_tokens = T,
                                    .num_rows = T * K,
                                    .topk = K,
                                    .hidden_size = D,
                                    .y = y,
                                    .inverse = inverse,
                                    .topk_weights = topk_weights,
                                    .out = call->out,
                                    .out_dtype = ANABRANCH_DTYPE_BF16};
  ANABRANCH(anabranch_combine(&combine, stream));

  CUDA(cudaStreamSynchronize(stream));
  void* all[] = {topk_ids, topk_weights, counts, offsets, slots, inverse, h, y, workspace};
  for (size_t i = 0; i < sizeof all / sizeof *all; i++) CUDA(cudaFree(all[i]));
}

int main(void) {
  if (anabranch_abi_version() != ANABRANCH_ABI_VERSION) {
    fprintf(stderr, "built for ABI %d, but the library has %d\n", ANABRANCH_ABI_VERSION, anabranch_abi_version());
    return 1;
  }
  fill_bf16(x, T * D, 1);
  fill_bf16(gate_up, E * 2 * N * D, 0.1f);
  fill_bf16(down, E * D * N, 0.1f);
  fill_logits();
  layer_on_cpu();

  AnabranchMoeShape shape = {.routing = {.num_experts = E,
                                         .topk = K,
                                         .score = ANABRANCH_SCORE_SOFTMAX,
                                         .renormalize = ANABRANCH_RENORMALIZE_SUM,
                                         .scale = 1},
                             .hidden_size = D,
                             .intermediate_size = N};
  AnabranchPlan* plan;
  uint64_t bytes;
  char text[1024];
  ANABRANCH(anabranch_plan_create(&shape, T, &plan));
  ANABRANCH(anabranch_plan_workspace(plan, T, &bytes));
  ANABRANCH(anabranch_plan_describe(plan, T, text, sizeof text));
  printf("%s\n", text);

  float* device_logits = on_gpu(logits, sizeof logits);
  AnabranchForwardParams call = {.num_tokens = T,
                                 .x = on_gpu(x, sizeof x),
                                 .logits = device_logits,
                                 .gate_up = on_gpu(gate_up, sizeof gate_up),
                                 .down = on_gpu(down, sizeof down),
                                 .out = on_gpu(NULL, sizeof x),
                                 .workspace = on_gpu(NULL, bytes),
                                 .workspace_bytes = bytes,
                                 .check_memory = 1};
  cudaStream_t stream;
  CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  ANABRANCH(anabranch_plan_forward(plan, &call, stream));
  CUDA(cudaStreamSynchronize(stream));
  int good = check("layer", call.out);

  CUDA(cudaMemset(call.out, 0xff, sizeof x));
  run_operations(&shape.routing, &call, stream);
  good &= check("single operations", call.out);

  // Everything was launched once before the capture, as CUDA wants it: kernels are loaded when they are first used.
  cudaGraph_t graph;
  cudaGraphExec_t replay;
  call.check_memory = 0;
  CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  ANABRANCH(anabranch_plan_forward(plan, &call, stream));
  CUDA(cudaStreamEndCapture(stream, &graph));
  CUDA(cudaGraphInstantiate(&replay, graph, 0));
  fill_logits();
  layer_on_cpu();
  CUDA(cudaMemcpy(device_logits, logits, sizeof logits, cudaMemcpyHostToDevice));
  CUDA(cudaMemset(call.out, 0xff, sizeof x));
  CUDA(cudaDeviceSynchronize());
  CUDA(cudaGraphLaunch(replay, stream));
  CUDA(cudaStreamSynchronize(stream));
  good &= check("graph, other logits", call.out);

  CUDA(cudaGraphExecDestroy(replay));
  CUDA(cudaGraphDestroy(graph));
  CUDA(cudaStreamDestroy(stream));
  anabranch_plan_destroy(plan);
  const void* all[] = {call.x, call.logits, call.gate_up, call.down, call.out, call.workspace};
  for (size_t i = 0; i < sizeof all / sizeof *all; i++) CUDA(cudaFree((void*)all[i]));
  return good ? 0 : 1;
}
