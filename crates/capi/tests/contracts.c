// What the C library refuses, and how it says so. Without a GPU only what needs none is checked;
// ANABRANCH_REQUIRE_GPU=1 makes that a failure.
#include <anabranch.h>
#include <cuda_runtime_api.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int passed, failed;

static void report(int good, int line, const char* what) {
  if (good) {
    passed++;
    return;
  }
  failed++;
  printf("line %d: %s; last error \"%s\"\n", line, what, anabranch_last_error());
}

#define CHECK(condition) report((condition), __LINE__, #condition)
// The status, and words that the sentence must hold.
#define REFUSED(call, want, words) \
  report((call) == (want) && strstr(anabranch_last_error(), (words)) != NULL, __LINE__, #call " -> " #want ", " words)

enum { T = 33, E = 8, K = 2, D = 128, N = 64, THREADS = 4, ROUNDS = 50 };

static AnabranchMoeShape shape_of(void) {
  AnabranchMoeShape shape = {
      .routing = {.num_experts = E, .topk = K, .renormalize = ANABRANCH_RENORMALIZE_SUM, .scale = 1},
      .hidden_size = D,
      .intermediate_size = N};
  return shape;
}

static void without_gpu(void) {
  CHECK(strcmp(anabranch_last_error(), "") == 0);
  CHECK(anabranch_abi_version() == ANABRANCH_ABI_VERSION);
  CHECK(anabranch_runtime_version() >= 12080);
  CHECK(strcmp(anabranch_status_text(ANABRANCH_STATUS_OK), "no error") == 0);
  for (int status = 1; status <= ANABRANCH_STATUS_INTERNAL; status++) {
    CHECK(strcmp(anabranch_status_text((AnabranchStatus)status), "unknown status") != 0);
  }

  AnabranchMoeShape shape = shape_of();
  AnabranchPlan* plan = (AnabranchPlan*)&shape;
  uint64_t bytes = 0;
  char text[16];
  REFUSED(anabranch_plan_create(NULL, T, &plan), ANABRANCH_STATUS_POINTER, "anabranch_plan_create: shape is null");
  CHECK(plan == NULL);
  REFUSED(anabranch_plan_create(&shape, T, NULL), ANABRANCH_STATUS_POINTER, "plan is null");
  shape.routing.topk = 9;
  REFUSED(anabranch_plan_create(&shape, T, &plan), ANABRANCH_STATUS_SETTING, "topk must be 1 to 8 with 8 experts");
  shape = shape_of();
  shape.routing.score = (AnabranchScore)7;
  REFUSED(anabranch_plan_create(&shape, T, &plan), ANABRANCH_STATUS_SETTING, "score");
  shape = shape_of();
  shape.arch = (AnabranchArch)9;
  REFUSED(anabranch_plan_create(&shape, T, &plan), ANABRANCH_STATUS_UNSUPPORTED, "arch");
  REFUSED(anabranch_plan_workspace(NULL, T, &bytes), ANABRANCH_STATUS_POINTER, "plan is null");
  REFUSED(anabranch_plan_describe(NULL, T, text, sizeof text), ANABRANCH_STATUS_POINTER, "plan is null");
  REFUSED(anabranch_plan_forward(NULL, NULL, NULL), ANABRANCH_STATUS_POINTER, "plan is null");
  anabranch_plan_destroy(NULL);

  AnabranchRouting routing = shape_of().routing;
  CHECK(anabranch_router_workspace(&routing, T, &bytes) == ANABRANCH_STATUS_OK);
  routing.num_experts = 2000;
  REFUSED(anabranch_router_workspace(&routing, T, &bytes), ANABRANCH_STATUS_SETTING, "num_experts must be 1 to 1024");
  REFUSED(anabranch_router(NULL, NULL), ANABRANCH_STATUS_POINTER, "anabranch_router: params is null");
  AnabranchRouterParams router = {.routing = shape_of().routing, .num_tokens = T, .logits = (const float*)64};
  REFUSED(anabranch_router(&router, NULL), ANABRANCH_STATUS_POINTER, "topk_ids, topk_weights, expert_counts");
  AnabranchCombineParams combine = {.num_tokens = T,
                                    .num_rows = T,
                                    .topk = K,
                                    .hidden_size = D,
                                    .out_dtype = ANABRANCH_DTYPE_BF16,
                                    .y = (void*)8,
                                    .inverse = (int32_t*)16,
                                    .topk_weights = (float*)16,
                                    .out = (void*)16};
  REFUSED(anabranch_combine(&combine, NULL), ANABRANCH_STATUS_ALIGNMENT, "y to 16");
}

static void* on_gpu(size_t bytes) {
  void* device = NULL;
  if (cudaMalloc(&device, bytes) != cudaSuccess || cudaMemset(device, 0, bytes) != cudaSuccess) {
    printf("no memory on the GPU\n");
    exit(1);
  }
  return device;
}

// bf16 or float noise of a seed.
static void fill(void* device, uint64_t elements, AnabranchDtype dtype, uint64_t seed) {
  AnabranchRandomParams random = {
      .num_elements = elements, .seed = seed, .scale = 0.3f, .out_dtype = dtype, .out = device};
  CHECK(anabranch_random(&random, NULL) == ANABRANCH_STATUS_OK);
}

typedef struct Shared {
  const AnabranchPlan* plan;
  AnabranchForwardParams call;
  uint16_t expected[T * D];
} Shared;

// A thread that shares the plan and has workspace, output and stream of its own. It answers how often it was wrong.
static void* run_thread(void* argument) {
  const Shared* shared = argument;
  AnabranchForwardParams call = shared->call;
  intptr_t wrong = 0;
  cudaStream_t stream;
  if (cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking) != cudaSuccess) return (void*)-1;
  call.workspace = on_gpu(call.workspace_bytes);
  call.out = on_gpu(sizeof shared->expected);
  cudaDeviceSynchronize();
  for (int round = 0; round < ROUNDS; round++) {
    uint16_t out[T * D] = {0};
    AnabranchForwardParams bad = call;
    bad.x = NULL;
    wrong += anabranch_plan_forward(shared->plan, &bad, stream) != ANABRANCH_STATUS_POINTER;
    wrong += strstr(anabranch_last_error(), "x must not be null") == NULL;
    wrong += anabranch_plan_forward(shared->plan, &call, stream) != ANABRANCH_STATUS_OK;
    wrong += cudaMemcpyAsync(out, call.out, sizeof out, cudaMemcpyDeviceToHost, stream) != cudaSuccess;
    wrong += cudaStreamSynchronize(stream) != cudaSuccess;
    wrong += memcmp(out, shared->expected, sizeof out) != 0;
  }
  cudaStreamDestroy(stream);
  cudaFree(call.workspace);
  cudaFree(call.out);
  return (void*)wrong;
}

static void with_gpu(void) {
  AnabranchMoeShape shape = shape_of();
  AnabranchPlan* plan = NULL;
  uint64_t bytes = 0;
  shape.hidden_size = 12;
  REFUSED(anabranch_plan_create(&shape, T, &plan), ANABRANCH_STATUS_SETTING, "hidden_size");
  shape = shape_of();
  shape.num_shared = 31;
  REFUSED(anabranch_plan_create(&shape, T, &plan), ANABRANCH_STATUS_SETTING, "num_shared");
  shape = shape_of();
  CHECK(anabranch_plan_create(&shape, T, &plan) == ANABRANCH_STATUS_OK && plan != NULL);
  if (plan == NULL) return;
  CHECK(anabranch_plan_workspace(plan, T, &bytes) == ANABRANCH_STATUS_OK && bytes > 0);
  REFUSED(anabranch_plan_workspace(plan, T + 1, &bytes), ANABRANCH_STATUS_SETTING, "at most 33, as planned");
  REFUSED(anabranch_plan_workspace(plan, T, NULL), ANABRANCH_STATUS_POINTER, "bytes is null");
  char text[1024];
  CHECK(anabranch_plan_describe(plan, T, text, sizeof text) == ANABRANCH_STATUS_OK);
  CHECK(strstr(text, "2 of 8 experts, hidden 128, width 64, 33 tokens") != NULL);
  CHECK(anabranch_plan_describe(plan, T, text, 4) == ANABRANCH_STATUS_OK && strcmp(text, "moe") == 0);
  REFUSED(anabranch_plan_describe(plan, T, text, 0), ANABRANCH_STATUS_SETTING, "text_bytes");

  static Shared shared;
  AnabranchForwardParams* call = &shared.call;
  call->num_tokens = T;
  call->workspace_bytes = bytes;
  call->check_memory = 1;
  float* logits = on_gpu(4 * T * E);
  void* x = on_gpu(2 * T * D);
  void* gate_up = on_gpu(2 * E * 2 * N * D);
  void* down = on_gpu(2 * E * D * N);
  fill(logits, T * E, ANABRANCH_DTYPE_F32, 1);
  fill(x, T * D, ANABRANCH_DTYPE_BF16, 2);
  fill(gate_up, E * 2 * N * D, ANABRANCH_DTYPE_BF16, 3);
  fill(down, E * D * N, ANABRANCH_DTYPE_BF16, 4);
  call->logits = logits;
  call->x = x;
  call->gate_up = gate_up;
  call->down = down;
  call->out = on_gpu(sizeof shared.expected);
  call->workspace = on_gpu(bytes);
  CHECK(cudaDeviceSynchronize() == cudaSuccess);

  // Each refused, nothing launched: the output keeps what it holds.
  cudaMemset(call->out, 0x5a, sizeof shared.expected);
  AnabranchForwardParams bad = *call;
  bad.num_tokens = T + 1;
  REFUSED(anabranch_plan_forward(plan, &bad, NULL), ANABRANCH_STATUS_SETTING, "num_tokens must be at most 33");
  bad = *call;
  bad.gate_up = NULL;
  bad.out = NULL;
  REFUSED(anabranch_plan_forward(plan, &bad, NULL), ANABRANCH_STATUS_POINTER, "gate_up, out must not be null");
  bad = *call;
  bad.logits = NULL;
  REFUSED(anabranch_plan_forward(plan, &bad, NULL), ANABRANCH_STATUS_POINTER, "topk_ids, topk_weights");
  bad = *call;
  bad.x = (const char*)call->x + 2;
  REFUSED(anabranch_plan_forward(plan, &bad, NULL), ANABRANCH_STATUS_ALIGNMENT, "x to 16");
  bad = *call;
  bad.shared_gate = logits;
  REFUSED(anabranch_plan_forward(plan, &bad, NULL), ANABRANCH_STATUS_POINTER, "shared_gate");
  bad = *call;
  bad.workspace_bytes = bytes - 1;
  REFUSED(anabranch_plan_forward(plan, &bad, NULL), ANABRANCH_STATUS_WORKSPACE, "anabranch_plan_workspace");
  static uint16_t on_host[T * D + 8];
  bad = *call;
  bad.x = (const void*)(((uintptr_t)on_host + 15) / 16 * 16);
  REFUSED(anabranch_plan_forward(plan, &bad, NULL), ANABRANCH_STATUS_PLACE, "x is not memory of a GPU");
  uint16_t kept[T * D];
  CHECK(cudaMemcpy(kept, call->out, sizeof kept, cudaMemcpyDeviceToHost) == cudaSuccess);
  int untouched = 1;
  for (int i = 0; i < T * D; i++) untouched &= kept[i] == 0x5a5a;
  CHECK(untouched);

  int devices = 0;
  if (cudaGetDeviceCount(&devices) == cudaSuccess && devices > 1) {
    cudaStream_t elsewhere;
    cudaSetDevice(1);
    REFUSED(anabranch_plan_forward(plan, call, NULL), ANABRANCH_STATUS_PLACE, "GPU 1 is current");
    cudaStreamCreate(&elsewhere);
    cudaSetDevice(0);
    REFUSED(anabranch_plan_forward(plan, call, elsewhere), ANABRANCH_STATUS_PLACE, "the stream is on GPU 1");
    cudaStreamDestroy(elsewhere);
  }

  // No tokens, no work. Then one plan used by several threads at once: all get the bits that one alone gets.
  bad = *call;
  bad.num_tokens = 0;
  CHECK(anabranch_plan_forward(plan, &bad, NULL) == ANABRANCH_STATUS_OK);
  CHECK(anabranch_plan_forward(plan, call, NULL) == ANABRANCH_STATUS_OK);
  CHECK(cudaMemcpy(shared.expected, call->out, sizeof kept, cudaMemcpyDeviceToHost) == cudaSuccess);
  CHECK(memcmp(shared.expected, kept, sizeof kept) != 0);
  shared.plan = plan;
  pthread_t threads[THREADS];
  for (int i = 0; i < THREADS; i++) CHECK(pthread_create(&threads[i], NULL, run_thread, &shared) == 0);
  for (int i = 0; i < THREADS; i++) {
    void* wrong = NULL;
    CHECK(pthread_join(threads[i], &wrong) == 0 && wrong == NULL);
  }
  anabranch_plan_destroy(plan);
}

int main(void) {
  without_gpu();
  const char* required = getenv("ANABRANCH_REQUIRE_GPU");
  AnabranchMoeShape shape = shape_of();
  AnabranchPlan* plan = NULL;
  AnabranchStatus status = anabranch_plan_create(&shape, T, &plan);
  anabranch_plan_destroy(plan);
  if (status != ANABRANCH_STATUS_NO_GPU) {
    with_gpu();
  } else {
    CHECK(strstr(anabranch_last_error(), "no usable CUDA GPU") != NULL);
    printf("%s; what needs one is not checked\n", anabranch_last_error());
    if (required != NULL && strcmp(required, "1") == 0) failed++;
  }
  printf("%d passed, %d failed\n", passed, failed);
  return failed == 0 ? 0 : 1;
}
