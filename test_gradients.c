// test_gradients.c proves every gradient in train.c, and shows what an update is.
//
// A derivative is a limit, so a program can be asked: move one number by h, and see how far the
// loss moves. That takes no calculus, and knows nothing of how backward() got its answer:
//
//   df/dx = (8 (f(x+h) - f(x-h)) - (f(x+2h) - f(x-2h))) / 12h      but for h^4, and rounding / h
//
// In double both are near 1e-12, so a gradient that is right agrees to 1e-8 of its tensor's size in
// every element, and one that is wrong in any term, row or edge does not: there is nothing to
// excuse with a tolerance. That proves backward to belong to forward; so each forward is compared
// with a plain one as well. Then: the whole model; float beside double; several micro-batches
// against one batch; optimizers against their formulas; and a model small enough to solve by hand.
//
//   ./test_gradients                     everything; ends with `N passed, N failed`
//   ./test_gradients layernorm gelu      these layers alone; --help lists them
//   ./test_gradients --save mine.safetensors, --against theirs.safetensors     section 7
//
// To check a layer of your own write its forward and backward, as in room 3 of train.c, and
// register it with LAYER() in section 2.
//
// One source, several builds, linked into one program: the one with main() computes in double; one
// with -DLEND=name only lends a Backend of that name, to compare with.
//   ./test_gradients      = main, + LEND=c_float REAL=float
//   ./test_gradients_gpu  = main with KERNELS, + LEND=c_double, + LEND=gpu_float REAL=float KERNELS
// KERNELS is the file to include for train.c: train_gpu.cu, or that with its launches rewritten for
// the emulator in section 0 (then compiled as C++).

#ifndef REAL
#define REAL double
#endif
#define NO_MAIN   // train.c's

// ---- 0. CUDA with no GPU ----------------------------------------------------------------------
#if defined KERNELS && !defined __CUDACC__
// What a GPU does, in 200 lines, so that any machine can check and debug kernels. A launch names a
// grid of blocks and the threads of a block; all run the same function and differ in threadIdx and
// blockIdx alone. Blocks know nothing of each other. The threads of a block share what is declared
// __shared__, and wait for each other at __syncthreads(). 32 threads in a row are a warp: they can
// show each other numbers (shuffle, ballot).
// Here a thread is a fiber: a stack, and a place where it goes on. One CPU thread runs them all,
// one after the other, and changes from one to the next where they wait. What goes wrong on a GPU
// once in a while is made to go wrong here each time:
//   - blocks, and between barriers the threads of a block, run in random order: GPU_SEED=n;
//   - device memory and shared memory are full of NaNs, until something is written there;
//   - a barrier that not all threads reach, or a host pointer in a kernel, ends the program;
//   - -fsanitize=address sees an index beyond an array, or device memory touched by the host;
//   - -fsanitize=thread (`make race`) sees two threads at one word with no barrier between.
#define EMULATED
#pragma GCC diagnostic ignored "-Wunused-function"
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <functional>
#include <map>
#include <vector>

#ifndef __has_feature
#define __has_feature(x) 0
#endif
#if defined __SANITIZE_THREAD__ || __has_feature(thread_sanitizer)
#include <sanitizer/tsan_interface.h>
#define TSAN(...) __VA_ARGS__
extern "C" void __tsan_java_init(uintptr_t, uintptr_t), __tsan_java_alloc(uintptr_t, uintptr_t),
                __tsan_java_free(uintptr_t, uintptr_t);
#else
#define TSAN(...)
#endif
#if defined __SANITIZE_ADDRESS__ || __has_feature(address_sanitizer)
#include <sanitizer/asan_interface.h>
#define ASAN(...) __VA_ARGS__
#else
#define ASAN(...)
#endif
#ifdef __clang__   // the GPU's own work, which the sanitizers should not take for the kernels'
#define UNSEEN __attribute__((noinline, unused, disable_sanitizer_instrumentation)) static
#else
#define UNSEEN \
  __attribute__((noinline, unused, no_sanitize("address", "thread", "undefined"))) static
#endif

// ---- The language
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
struct uint3 { unsigned x, y, z; };
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
static uint3 threadIdx, blockIdx;        // of the fiber that runs now
static dim3 blockDim, gridDim;

// One block runs at a time, so a shared array can be a static one. They lie together, to be filled
// with NaNs for each launch; but not for the address sanitizer, which guards only lone arrays.
#if ASAN(1) + 0
#define __shared__ static
static char shared_begin[1], *shared_end = shared_begin;
#elif defined __APPLE__
#define __shared__ __attribute__((used, aligned(16), section("__DATA,gpu_shared"))) static
extern char shared_begin[] __asm("section$start$__DATA$gpu_shared");
extern char shared_end[] __asm("section$end$__DATA$gpu_shared");
#else
#define __shared__ __attribute__((used, aligned(16), section("gpu_shared"))) static
extern char shared_begin[] __asm("__start_gpu_shared"), shared_end[] __asm("__stop_gpu_shared");
#endif

// ---- Fibers. To change from one to another: push what a function must not change (the ABI says
// which registers), save this stack pointer, take the other one, pop, return there.
extern "C" void change_fiber(void **save, void *to) __asm("gpu_change_fiber");
#ifdef __x86_64__
enum { FRAME = 8, RETURN_TO = 6 };       // words of a new fiber's stack; which one is the address
__asm(".text\n.p2align 4\ngpu_change_fiber:\n"
      "push %rbp\n push %rbx\n push %r12\n push %r13\n push %r14\n push %r15\n"
      "mov %rsp, (%rdi)\n mov %rsi, %rsp\n"
      "pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbx\n pop %rbp\n ret\n");
#elif defined __aarch64__
enum { FRAME = 20, RETURN_TO = 11 };
#define PAIRS(op) \
  op " x19, x20, [sp]\n" op " x21, x22, [sp, 16]\n" op " x23, x24, [sp, 32]\n"     \
  op " x25, x26, [sp, 48]\n" op " x27, x28, [sp, 64]\n" op " x29, x30, [sp, 80]\n" \
  op " d8, d9, [sp, 96]\n" op " d10, d11, [sp, 112]\n" op " d12, d13, [sp, 128]\n" \
  op " d14, d15, [sp, 144]\n"
__asm(".text\n.p2align 4\ngpu_change_fiber:\n sub sp, sp, 160\n" PAIRS("stp")
      "mov x9, sp\n str x9, [x0]\n mov sp, x1\n" PAIRS("ldp") "add sp, sp, 160\n ret\n");
#else
#error "The CUDA emulator knows x86-64 and arm64: add change_fiber() for this machine"
#endif

// ---- A block of threads
enum { MOST_THREADS = 1024, STACK = (128 << 10) + 832 };   // 832: tops lie in other cache sets
struct Barrier { int arrived, phase; char order[2]; };
struct Thread {
  uint3 index;
  int id, phase, line, turn;
  const char *at;                        // what it waits for, or did last
  Barrier *barrier;
  bool returned;
  void *stack;
};
static Thread thread[MOST_THREADS], *self;
static Barrier block_barrier, warp_barrier[MOST_THREADS / 32];
typedef uint32_t __attribute__((may_alias)) Word;
static Word shown[MOST_THREADS / 32][2][32][6];   // what the lanes of a warp show: up to 6 words
static struct {
  const char *kernel;
  const std::function<void()> *body;
  int threads, set;
  void *scheduler;
  char *stacks, begin, end;
  uint64_t random;
} gpu;
TSAN(static void *host_fiber, *fiber[2][MOST_THREADS];)

UNSEEN void gpu_die(const char *what, const Thread *a, const Thread *b) {
  fprintf(stderr, "kernel %s, block (%u,%u,%u): %s\n", gpu.kernel, blockIdx.x, blockIdx.y,
          blockIdx.z, what);
  for (const Thread *t = a; t; t = t == a ? b : NULL)
    fprintf(stderr, "  thread %d %s %s, line %d\n", t->id,
            t->returned ? "has returned; it was last at" : "is at", t->at, t->line);
  exit(1);
}

// Where a fiber begins
UNSEEN void thread_main(void) {
  TSAN(__tsan_acquire(&gpu.begin);)
  (*gpu.body)();
  TSAN(__tsan_release(&gpu.end);)
  self->returned = true;
  change_fiber(&self->stack, gpu.scheduler);
}

// Waits until n threads are here. What a thread did before a barrier of memory, those that leave it
// see: that is the order that the thread sanitizer is told of. Two of them in turn, since a thread
// may leave late, when others are at the next barrier already.
UNSEEN void wait_at(Barrier *b, int n, bool memory, const char *what, int line) {
  Thread *t = self;
  char *order = &b->order[b->phase & 1];
  (void)order; (void)memory;
  t->at = what; t->line = line; t->phase = b->phase; t->barrier = b;
  TSAN(if (memory) __tsan_release(order);)
  if (++b->arrived == n) {
    for (int i = 0; i < gpu.threads; i++)
      if (thread[i].barrier == b && thread[i].line != line)
        gpu_die("threads wait for each other in different lines", &thread[i], t);
    b->arrived = 0;
    b->phase++;
  } else change_fiber(&t->stack, gpu.scheduler);
  t->barrier = NULL;
  TSAN(if (memory) __tsan_acquire(order);)
}

UNSEEN void shuffle(int *order, int n) {   // Fisher and Yates; in order if there is no seed
  for (int i = 0; i < n; i++) order[i] = i;
  for (int i = n - 1; i > 0 && gpu.random; i--) {
    gpu.random = gpu.random * 6364136223846793005u + 1442695040888963407u;
    int j = (gpu.random >> 33) % (i + 1), swap = order[i];
    order[i] = order[j]; order[j] = swap;
  }
}

UNSEEN void start_thread(int i) {
  Thread *t = &thread[i];
  memset((void *)t, 0, sizeof *t);
  t->id = i; t->at = "its start";
  t->index.x = i % blockDim.x; t->index.y = i / blockDim.x % blockDim.y;
  t->index.z = i / blockDim.x / blockDim.y;
  void **top = (void **)(gpu.stacks + (size_t)(gpu.set * MOST_THREADS + i + 1) * STACK);
  memset(top - FRAME, 0, FRAME * sizeof *top);
  top[RETURN_TO - FRAME] = (void *)thread_main;
  t->stack = top - FRAME;
  TSAN(if (!fiber[gpu.set][i]) {
    char name[40];
    snprintf(name, sizeof name, "thread %d of a block", i);
    fiber[gpu.set][i] = __tsan_create_fiber(0);
    __tsan_set_fiber_name(fiber[gpu.set][i], name);
  })
}

// Runs a block: in rounds, in each of which every thread that does not wait runs until it does.
UNSEEN void run_block(void) {
  static int order[MOST_THREADS];
  TSAN(__tsan_java_alloc((uintptr_t)shared_begin, shared_end - shared_begin);   // forget the last
       __tsan_java_free((uintptr_t)shared_begin, shared_end - shared_begin);)   // block's accesses
  TSAN(__tsan_release(&gpu.begin);)
  for (int i = 0; i < gpu.threads; i++) start_thread(i);
  for (int left = gpu.threads, ran; left > 0; ) {
    ran = 0;
    shuffle(order, gpu.threads);
    for (int i = 0; i < gpu.threads; i++) {
      Thread *t = &thread[order[i]];
      if (t->returned || (t->barrier && t->barrier->phase == t->phase)) continue;
      self = t;
      threadIdx.x = t->index.x; threadIdx.y = t->index.y; threadIdx.z = t->index.z;
      TSAN(__tsan_switch_to_fiber(fiber[gpu.set][t->id], __tsan_switch_to_fiber_no_sync);)
      change_fiber(&gpu.scheduler, t->stack);
      TSAN(__tsan_switch_to_fiber(host_fiber, __tsan_switch_to_fiber_no_sync);)
      ran++;
      left -= t->returned;
    }
    if (ran) continue;
    Thread *waits = thread, *other = thread;
    while (waits->returned) waits++;
    while (other->barrier == waits->barrier
           || (waits->barrier != &block_barrier && other->id / 32 != waits->id / 32)) other++;
    gpu_die("a thread waits for one that does not come", waits, other);
  }
  self = NULL;
  gpu.set ^= 1;   // the next block's fibers are others: nothing orders the two for the sanitizer
}

// ---- Device memory
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorMemoryAllocation };
enum cudaMemcpyKind {
  cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice
};
static const char *cudaGetErrorString(cudaError_t e) {
  return e == cudaErrorInvalidValue ? "invalid argument" : e ? "out of memory" : "no error";
}
static std::map<uintptr_t, size_t> device_memory_map;   // where each piece begins, and its bytes

static bool on_device(const void *p, size_t n) {
  auto after = device_memory_map.upper_bound((uintptr_t)p);
  if (after == device_memory_map.begin()) return false;
  --after;
  return (uintptr_t)p + n <= after->first + after->second;
}
static void show_memory(bool show) {     // the host may touch it only through the calls below
  (void)show;
  ASAN(for (auto &m : device_memory_map)
    if (show) __asan_unpoison_memory_region((void *)m.first, m.second);
    else __asan_poison_memory_region((void *)m.first, m.second);)
}
template <class T> static cudaError_t cudaMalloc(T **p, size_t n) {
  *p = (T *)malloc(n);
  if (!*p) return cudaErrorMemoryAllocation;
  memset((void *)*p, 0xff, n);
  device_memory_map[(uintptr_t)*p] = n;
  show_memory(false);
  return cudaSuccess;
}
static cudaError_t cudaFree(void *p) {
  if (!p) return cudaSuccess;
  show_memory(true);
  bool known = device_memory_map.erase((uintptr_t)p);
  if (known) free(p);
  show_memory(false);
  return known ? cudaSuccess : cudaErrorInvalidValue;
}

// ---- Streams and graphs. A stream does at once what it is asked; in a recording it only notes it.
typedef std::vector<std::function<void()>> *cudaGraph_t, *cudaGraphExec_t;
static cudaGraph_t recorded;
typedef char *cudaStream_t;
typedef double *cudaEvent_t;
static void enqueue(const std::function<void()> &work) {
  if (recorded) return recorded->push_back(work);
  show_memory(true);
  work();
  show_memory(false);
}
static cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t n, cudaMemcpyKind kind,
                                   cudaStream_t) {
  if (on_device(to, n) != (kind & 1) || on_device(from, n) != kind >> 1)
    return cudaErrorInvalidValue;
  enqueue([=] { memcpy(to, from, n); });
  return cudaSuccess;
}
static cudaError_t cudaMemsetAsync(void *p, int value, size_t n, cudaStream_t) {
  if (!on_device(p, n)) return cudaErrorInvalidValue;
  enqueue([=] { memset(p, value, n); });
  return cudaSuccess;
}

// ---- Launches: a sed in the Makefile turns kernel<<<grid, block, 0, stream>>>(x) into
// LAUNCH(kernel, grid, block, 0, stream)(x)
UNSEEN void run_grid(const char *kernel, dim3 grid, dim3 block, const std::function<void()> *body) {
  int n = grid.x * grid.y * grid.z;
  gpu.kernel = kernel; gpu.body = body; gpu.threads = block.x * block.y * block.z;
  gridDim.x = grid.x; gridDim.y = grid.y; gridDim.z = grid.z;
  blockDim.x = block.x; blockDim.y = block.y; blockDim.z = block.z;
  if (n < 1 || grid.y > 65535 || grid.z > 65535 || gpu.threads < 1 || gpu.threads > MOST_THREADS
      || gpu.threads % 32)
    gpu_die("a grid that is empty or too large, or a block not of warps", 0, 0);
  if (!gpu.stacks) {
    const char *seed = getenv("GPU_SEED");
    gpu.random = seed ? strtoull(seed, NULL, 10) : 0;
    gpu.stacks = (char *)mmap(NULL, 2l * MOST_THREADS * STACK, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANON | MAP_NORESERVE, -1, 0);
    TSAN(__tsan_java_init((uintptr_t)shared_begin, shared_end - shared_begin);)
  }
  TSAN(host_fiber = __tsan_get_current_fiber();)
  int *order = (int *)malloc(n * sizeof *order);
  shuffle(order, n);
  memset(shared_begin, 0xff, shared_end - shared_begin);
  for (int i = 0; i < n; i++) {
    blockIdx.x = order[i] % grid.x;
    blockIdx.y = order[i] / grid.x % grid.y;
    blockIdx.z = order[i] / grid.x / grid.y;
    run_block();
  }
  free(order);
  TSAN(__tsan_acquire(&gpu.end);)
}

namespace {   // one emulator for each file compiled: its templates are its own
template <class T> static void check_pointer(const char *kernel, T *p) {
  if (!p || on_device(p, 0)) return;
  fprintf(stderr, "kernel %s is given a pointer to the host's memory\n", kernel);
  exit(1);
}
template <class T> static void check_pointer(const char *, const T &) {}
template <class... P> struct Launch {
  const char *name;
  void (*kernel)(P...);
  dim3 grid, block;
  void operator()(P... p) const {
    int checked[] = {0, (check_pointer(name, p), 0)...};
    (void)checked;
    Launch l = *this;
    std::function<void()> body = [l, p...] { l.kernel(p...); };
    enqueue([l, body] { run_grid(l.name, l.grid, l.block, &body); });
  }
};
}
template <class... P>
static Launch<P...> launch_of(const char *name, void (*kernel)(P...), dim3 grid, dim3 block, int,
                              cudaStream_t) {
  return Launch<P...>{name, kernel, grid, block};
}
#define LAUNCH(kernel, ...) launch_of(#kernel, kernel, __VA_ARGS__)

// ---- In kernels. Who calls is known by the line.
#define LINE int line = __builtin_LINE()
static inline void __syncthreads(LINE) {
  wait_at(&block_barrier, gpu.threads, true, "__syncthreads()", line);
}
// Every lane shows n words, and sees those of its warp. That orders no memory.
UNSEEN Word (*show_warp(const void *words, int n, const char *what, int line))[6] {
  Word (*lanes)[6] = shown[self->id / 32][self->turn ^= 1];
  for (int i = 0; i < n; i++) lanes[self->id % 32][i] = ((const Word *)words)[i];
  wait_at(&warp_barrier[self->id / 32], 32, false, what, line);
  return lanes;
}
template <class T> UNSEEN T __shfl_xor_sync(unsigned, T x, int flip, LINE) {
  Word (*lanes)[6] = show_warp(&x, sizeof x / 4, "__shfl_xor_sync()", line);
  for (unsigned i = 0; i < sizeof x / 4; i++) ((Word *)&x)[i] = lanes[self->id % 32 ^ flip][i];
  return x;
}
UNSEEN unsigned __ballot_sync(unsigned, int vote, LINE) {
  Word (*lanes)[6] = show_warp(&vote, 1, "__ballot_sync()", line);
  unsigned votes = 0;
  for (int i = 0; i < 32; i++) votes |= (unsigned)(lanes[i][0] != 0) << i;
  return votes;
}
static inline int __popc(unsigned x) { return __builtin_popcount(x); }

// The tensor core's instruction, see mma_tf32(): it looks at 19 bits of each float.
UNSEEN float tf32_of(Word bits) {
  union { uint32_t bits; float x; } u = {bits & ~0x1fffu};
  return u.x;
}
template <class T> UNSEEN void emulate_mma(T *c, const T *a, const T *b, LINE) {
  float mine[6] = {(float)a[0], (float)a[1], (float)a[2], (float)a[3], (float)b[0], (float)b[1]};
  Word (*lanes)[6] = show_warp(mine, 6, "mma", line);
  for (int i = 0; i < 4; i++)
    for (int k = 0; k < 8; k++) {
      int lane = self->id % 32, row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
      c[i] += tf32_of(lanes[row % 8 * 4 + k % 4][row / 8 + k / 4 * 2])
            * tf32_of(lanes[column * 4 + k % 4][4 + k / 4]);
    }
}

// ---- The rest of the runtime library that train_gpu.cu calls
enum { cudaStreamNonBlocking, cudaEventDisableTiming, cudaStreamCaptureModeThreadLocal };
struct cudaDeviceProp {
  char name[256];
  int multiProcessorCount, major, minor;
  size_t totalGlobalMem;
};
struct cudaFuncAttributes { int unused; };
#define CALL static inline cudaError_t
CALL cudaGetLastError(void) { return cudaSuccess; }
CALL cudaGetDeviceCount(int *n) { *n = 1; return cudaSuccess; }
CALL cudaSetDevice(int) { return cudaSuccess; }
CALL cudaGetDeviceProperties(cudaDeviceProp *p, int) {
  *p = {"an emulated GPU", 2, 8, 0, 64 << 20};   // so small a GPU that small matrices occupy it
  return cudaSuccess;
}
CALL cudaFuncGetAttributes(cudaFuncAttributes *, const void *) { return cudaSuccess; }
CALL cudaMemGetInfo(size_t *left, size_t *all) {
  *left = *all = (size_t)1 << 34;
  return cudaSuccess;
}
CALL cudaMallocHost(void **p, size_t n) { *p = malloc(n); return cudaSuccess; }
CALL cudaStreamCreateWithFlags(cudaStream_t *s, int) {
  static char one;
  *s = &one;
  return cudaSuccess;
}
CALL cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
CALL cudaEventCreate(cudaEvent_t *e) { static double time; *e = &time; return cudaSuccess; }
CALL cudaEventCreateWithFlags(cudaEvent_t *e, int) { return cudaEventCreate(e); }
CALL cudaEventRecord(cudaEvent_t, cudaStream_t) { return cudaSuccess; }
CALL cudaEventSynchronize(cudaEvent_t) { return cudaSuccess; }
CALL cudaEventElapsedTime(float *ms, cudaEvent_t, cudaEvent_t) { *ms = 0; return cudaSuccess; }
CALL cudaStreamBeginCapture(cudaStream_t, int) {
  recorded = new std::vector<std::function<void()>>;
  return cudaSuccess;
}
CALL cudaStreamEndCapture(cudaStream_t, cudaGraph_t *g) {
  *g = recorded;
  recorded = NULL;
  return cudaSuccess;
}
CALL cudaGraphInstantiateWithFlags(cudaGraphExec_t *x, cudaGraph_t g, int) {
  *x = new std::vector<std::function<void()>>(*g);
  return cudaSuccess;
}
CALL cudaGraphDestroy(cudaGraph_t g) { delete g; return cudaSuccess; }
CALL cudaGraphExecDestroy(cudaGraphExec_t x) { delete x; return cudaSuccess; }
CALL cudaGraphLaunch(cudaGraphExec_t x, cudaStream_t) {
  for (auto &work : *x) enqueue(work);
  return cudaSuccess;
}
#endif   // KERNELS with no CUDA

#pragma GCC diagnostic ignored "-Wunused-function"   // each build uses its part of what is included
#ifdef KERNELS
#include KERNELS
#else
#include "train.c"
#endif

// A training run in numbers that all backends share. Weights and gradients are packed in the order
// of the model's list of parameters.
enum Recipe {   // how micro-batches become an update; all but the first are mistakes people made
  SUM_OF_TOKENS, MEAN_OF_MEANS, NOT_DIVIDED, NOT_ZEROED, CLIP_EACH, COUNT_EACH, N_RECIPES
};
enum { MOST_MICRO = 64 };
typedef struct { int B, T, at; } Piece;   // a micro-batch: B sequences of T tokens, from place `at`
typedef struct {
  Config config;
  Piece piece[MOST_MICRO];
  int updates, accumulate;                // each update takes the next `accumulate` pieces
  int optimizer, recipe, separate, tf32;
  double learning_rate, weight_decay, grad_clip;
  long n;                                 // how many weights
  double *weights;                        // before; then after
  double *grad;                           // of the last update
  double loss[MOST_MICRO], norm[MOST_MICRO], change[MOST_MICRO];   // after each piece
} Trial;
typedef struct { const char *name; void (*run)(Trial *); } Backend;

#ifdef __cplusplus
extern "C" {
#endif
extern const Backend c_float, c_double, gpu_float;
#ifdef __cplusplus
}
#endif
#ifdef KERNELS
#define IN_FLOAT &gpu_float
#else
#define IN_FLOAT &c_float
#endif

// ---- 1. Finite differences --------------------------------------------------------------------

static double *numbers(long n) {
  double *x = (double *)calloc(MAX(n, 1), sizeof(double));
  if (!x) die("no memory for %ld numbers", n);
  return x;
}

static real *staging(long n) {   // between host and device, where numbers are real
  static real *buffer;
  static long room;
  if (n > room) {
    buffer = (real *)realloc(buffer, (room = 2*n) * sizeof(real));
    if (!buffer) die("no memory for %ld numbers", n);
  }
  return buffer;
}

static void put(real *device, const double *x, long n) {
  real *buffer = staging(n);
  for (long i = 0; i < n; i++) buffer[i] = (real)x[i];
  copy_in(device, buffer, n * sizeof(real));
}

static void get(double *x, const real *device, long n) {
  real *buffer = staging(n);
  copy_out(buffer, device, n * sizeof(real));
  for (long i = 0; i < n; i++) x[i] = buffer[i];
}

static double norm_of(const double *x, long n) {
  long double sum = 0;
  for (long i = 0; i < n; i++) sum += (long double)x[i] * x[i];
  return (double)sqrtl(sum);
}

static double distance(const double *x, const double *y, long n) {   // |x - y| / |y|
  long double sum = 0;
  for (long i = 0; i < n; i++) sum += ((long double)x[i] - y[i]) * ((long double)x[i] - y[i]);
  return (double)sqrtl(sum) / norm_of(y, n);
}

static double angle(const double *x, const double *y, long n) {   // in degrees
  long double dot = 0;
  for (long i = 0; i < n; i++) dot += (long double)x[i] * y[i];
  double cosine = (double)(dot / ((long double)norm_of(x, n) * norm_of(y, n)));
  return acos(MAX(-1.0, MIN(1.0, cosine))) * 57.29577951308232;
}

// What is differentiated: f = sum_i upstream[i] out[i], once work(argument) has filled out.
typedef struct {
  void (*work)(void *);
  void *argument;
  const real *out;
  const double *upstream;
  long n;
} Function;

// df / dx along a direction, for the n numbers at x on the device. No direction: along all of them.
// The differences are taken before the sum, so that what does not depend on x leaves no rounding.
static double slope(Function f, real *x, long n, const double *direction) {
  const double h = 1.0 / 2048;
  double *was = numbers(n), *moved = numbers(n), *out[2] = {numbers(f.n), numbers(f.n)};
  long double difference[3] = {0, 0, 0};
  get(was, x, n);
  for (int k = 1; k <= 2; k++) {
    for (int side = 0; side < 2; side++) {
      for (long i = 0; i < n; i++)
        moved[i] = was[i] + (side ? -k : k) * h * (direction ? direction[i] : 1);
      put(x, moved, n);
      launch(f.work, f.argument);
      get(out[side], f.out, f.n);
    }
    for (long i = 0; i < f.n; i++)
      difference[k] += (long double)f.upstream[i] * (out[0][i] - out[1][i]);
  }
  put(x, was, n);
  free(was); free(moved); free(out[0]); free(out[1]);
  return (double)((8 * difference[1] - difference[2]) / (12 * h));
}

// ---- The verdict ------------------------------------------------------------------------------

typedef struct { int B, T, C, H, V, O; } Shape;
typedef struct {
  const char *layer, *tensor;
  int rows, cols;
  const double *got, *want;
  const double *before;         // what a gradient that adds found there (it is not in got), or NULL
  const Shape *shape;           // or NULL
  double bar;                   // the largest error allowed, relative to the size of want
} Comparison;

static int passed, failed;
static double worst_absolute;   // |got - want| since it was last set to 0
static int brief;               // no diagnosis
static const double BAR = 1e-8;
static char first_failure[80];

static double size_of_numbers(const double *x, long n) { return norm_of(x, n) / sqrt((double)n); }

// The error of element i, relative to the root mean square of the tensor: a tensor of small numbers
// is held to their own size, and a zero among large ones to what rounding could make of it.
static double error_at(const Comparison *c, double size, long i) {
  double error = fabs(c->got[i] - c->want[i]);
  return error == 0 ? 0 : error <= INFINITY ? error / size : INFINITY;
}

static void say_factor(double k, const Shape *s) {
  printf("off by the factor %.6g", k);
  if (!s) return;
  const char *name[] = {"B", "T", "B T", "C", "H", "C/H", "sqrt(C/H)", "V", "O"};
  double value[] = {(double)s->B, (double)s->T, (double)s->B * s->T, (double)s->C, (double)s->H,
                    (double)s->C / s->H, sqrt((double)s->C / s->H), (double)s->V, (double)s->O};
  for (int i = 0; i < 9; i++) {
    if (value[i] == 1) continue;
    if (fabs(k / value[i] - 1) < 1e-6) { printf(", which is %s", name[i]); break; }
    if (fabs(k * value[i] - 1) < 1e-6) { printf(", which is 1/(%s)", name[i]); break; }
  }
}

// What the elements of a set have in common, as a sentence; returns 0 if it is nothing simple.
static int say_how(const Comparison *c, const char *in_set, double size) {
  long n = (long)c->rows * c->cols, count = 0, nan = 0, zeros = 0, overwritten = 0;
  double gw = 0, ww = 0, residual = 0, close = 1e-6 * size;
  for (long i = 0; i < n; i++) {
    if (!in_set[i]) continue;
    count++;
    nan += isnan(c->got[i]) != 0;
    zeros += fabs(c->got[i]) <= close;
    overwritten += c->before && fabs(c->got[i] + c->before[i] - c->want[i]) <= close;
    gw += c->got[i] * c->want[i];
    ww += c->want[i] * c->want[i];
  }
  double k = gw / ww;
  for (long i = 0; i < n; i++)
    if (in_set[i]) residual = MAX(residual, fabs(c->got[i] - k * c->want[i]));
  if (nan == count)
    printf("NaN: never written, or added (+=) to where it must be set (=)");
  else if (nan > 0) printf("%ld of %ld are NaN, as if never written", nan, count);
  else if (overwritten == count) printf("set (=) where it must be added (+=) to what was there");
  else if (zeros == count) printf("zero: this part of the gradient is missing");
  else if (residual <= close * MAX(1, fabs(k)) && fabs(k + 1) < 1e-6) printf("the sign is flipped");
  else if (count > 1 && residual <= close * MAX(1, fabs(k)) && fabs(k - 1) > 1e-4)
    say_factor(k, c->shape);
  else return 0;
  return 1;
}

// Is got - want the same number along each row (or each column) of the set? A lost mean looks so.
static int constant_along(const Comparison *c, const char *in_set, double size, int rows) {
  int lines = rows ? c->rows : c->cols, length = rows ? c->cols : c->rows, seen = 0;
  for (int i = 0; i < lines; i++) {
    double low = INFINITY, high = -INFINITY;
    for (int j = 0; j < length; j++) {
      long at = rows ? (long)i * c->cols + j : (long)j * c->cols + i;
      if (!in_set[at]) continue;
      low = MIN(low, c->got[at] - c->want[at]);
      high = MAX(high, c->got[at] - c->want[at]);
      seen++;
    }
    if (!(high - low <= 1e-6 * size) && high >= low) return 0;
  }
  return seen > 2 * lines;
}

// Where the wrong elements are, if that is a simple place.
static void say_where(const Comparison *c, const char *wrong) {
  int r0 = c->rows, r1 = -1, c0 = c->cols, c1 = -1, T = c->shape ? c->shape->T : 0, count = 0;
  int in_sequences = T && c->rows == c->shape->B * T, diagonal = 1, b0 = c->rows, b1 = -1;
  int t0 = T, t1 = -1;
  for (int i = 0; i < c->rows; i++)
    for (int j = 0; j < c->cols; j++)
      if (wrong[(long)i * c->cols + j]) {
        r0 = MIN(r0, i); r1 = MAX(r1, i); c0 = MIN(c0, j); c1 = MAX(c1, j);
        if (in_sequences) {
          t0 = MIN(t0, i % T); t1 = MAX(t1, i % T); b0 = MIN(b0, i / T); b1 = MAX(b1, i / T);
        }
        diagonal &= i == j;
        count++;
      }
  int third = c->cols / 3, qkv = strstr(c->tensor, "qkv") || strstr(c->layer, "c_attn");
  if (count == 1) printf("only [%d,%d]: ", r0, c0);
  else if (r0 == r1 && c->rows > 1) printf("only row %d: ", r0);
  else if (c0 == c1 && c->cols > 1) printf("only column %d: ", c0);
  else if (diagonal) printf("only the diagonal: ");
  else if (qkv && c->cols > 1 && c0 / third == c1 / third)
    printf("only the %c columns, %d to %d: ", "QKV"[c0 / third], c0, c1);
  else if (qkv && c->cols > 1 && c0 >= third) printf("only the K and V columns: ");
  else if (qkv && c->cols > 1 && c1 < 2*third) printf("only the Q and K columns: ");
  else if (c0 > 0 || c1 < c->cols - 1) printf("only columns %d to %d: ", c0, c1);
  else if (in_sequences && t1 < T - 1) printf("only positions up to %d of a sequence: ", t1);
  else if (in_sequences && t0 > 0) printf("only positions from %d of a sequence on: ", t0);
  else if (in_sequences && b0 > 0) printf("only sequences from %d on: ", b0);
  else if (in_sequences && b1 < c->shape->B - 1) printf("only sequences up to %d: ", b1);
  else if (r0 > 0 || r1 < c->rows - 1) printf("only rows %d to %d: ", r0, r1);
  else if (count == c->rows * c->cols) printf("everywhere: ");
  else printf("%d of %d elements: ", count, c->rows * c->cols);
}

static void diagnose(const Comparison *c, double size) {
  long n = (long)c->rows * c->cols;
  char *all = (char *)malloc(n), *wrong = (char *)malloc(n);
  if (!all || !wrong) die("no memory for %ld marks", n);
  memset(all, 1, n);
  for (long i = 0; i < n; i++) wrong[i] = !(error_at(c, size, i) <= c->bar);
  printf("    ");
  if (!say_how(c, all, size)) {
    say_where(c, wrong);
    if (!say_how(c, wrong, size)) {
      if (c->cols > 1 && constant_along(c, wrong, size, 1))
        printf("each row is off by a constant of its own: is the term with a row's mean missing?");
      else if (c->rows > 1 && c->cols > 1 && constant_along(c, wrong, size, 0))
        printf("each column is off by a constant of its own");
      else printf("no simple pattern");
    }
  }
  printf("\n    worst:");
  for (int k = 0; k < 3; k++) {        // the three largest errors
    long worst = -1;
    for (long i = 0; i < n; i++)
      if (wrong[i] && (worst < 0 || error_at(c, size, i) > error_at(c, size, worst))) worst = i;
    if (worst < 0) break;
    printf("  [%ld,%ld] %.6g, not %.6g", worst / c->cols, worst % c->cols, c->got[worst],
           c->want[worst]);
    wrong[worst] = 0;
  }
  printf("\n");
  free(all); free(wrong);
}

static void heading(const char *got, const char *want) {
  printf("%-22s %-10s %7s  %-10s %-9s %14.14s %14s\n", "layer", "tensor", "numbers", "worst err.",
         "at", got, want);
}

static int count_verdict(int ok, const char *layer, const char *tensor) {
  ok ? passed++ : failed++;
  if (!ok && !*first_failure)
    snprintf(first_failure, sizeof first_failure, "%s %s", layer, tensor);
  return ok;
}

// A row of the table, and the diagnosis if it failed. Returns the worst relative error.
static double judge(Comparison c) {
  long n = (long)c.rows * c.cols, worst = 0;
  double size = size_of_numbers(c.want, n), error = 0;
  for (long i = 0; i < n; i++)
    if (error_at(&c, size, i) > error) error = error_at(&c, size, worst = i);
  for (long i = 0; i < n; i++)
    if (!(fabs(c.got[i] - c.want[i]) <= worst_absolute))
      worst_absolute = isnan(c.got[i]) ? INFINITY : fabs(c.got[i] - c.want[i]);
  int ok = count_verdict(error <= c.bar, c.layer, c.tensor);
  char at[32];
  snprintf(at, sizeof at, c.cols > 1 ? "[%ld,%ld]" : "[%ld]", worst / c.cols, worst % c.cols);
  printf("%-22s %-10s %7ld  %-10.1e %-9s %14.6e %14.6e  %s\n", c.layer, c.tensor, n, error, at,
         c.got[worst], c.want[worst], ok ? "ok" : "FAIL");
  if (!ok && !brief) diagnose(&c, size);
  return error;
}

// A row of its own kind: what was measured, whether that is as it must be.
__attribute__((format(printf, 3, 4)))
static int judge_that(int ok, const char *what, const char *format, ...) {
  va_list args;
  va_start(args, format);
  printf("%-46s ", what);
  vprintf(format, args);
  printf("  %s\n", ok ? "ok" : "FAIL");
  va_end(args);
  return count_verdict(ok, what, "");
}

// A program that ends in the middle, by die(), exit() or a crash, still says of what: the layer.
static const char *checking;

static void broke_off(void) {
  if (!checking) return;
#ifdef EMULATED
  if (self) printf("in thread %d of kernel %s\n", self->id, gpu.kernel);
#endif
  printf("%s: the program broke off here\n", checking);
  printf("the first failure: %s\n", *first_failure ? first_failure : checking);
  printf("%d passed, %d failed\n", passed, failed + 1);
  fflush(stdout);
  checking = NULL;
}

static void crashed(int number) {
  printf("signal %d: %s\n", number, strsignal(number));
  broke_off();
  _exit(1);
}

static void watch_for_crashes(void) {
  setvbuf(stdout, NULL, _IOLBF, 1 << 16);   // so that no row is lost, nor half of one
  atexit(broke_off);
  signal(SIGSEGV, crashed); signal(SIGBUS, crashed);
  signal(SIGFPE, crashed); signal(SIGABRT, crashed); signal(SIGILL, crashed);
}

// ---- 2. Layers --------------------------------------------------------------------------------
// A layer is registered with LAYER(name, stress, plain, (arguments), tensors): the arguments that
// name_forward and name_backward take; their tensors, t[0] the output first, and what happens to
// each; a plain forward to compare with (it may fill stashes, too), or NULL. Row 1 of the first
// input is shifted by `stress`, row 2 has it added and subtracted in turn: large means, saturated
// functions.

enum Duty {
  OUTPUT,     // written by forward; the gradient comes from above
  STASH,      // written by forward, for backward; has no gradient
  SETS,       // an input whose gradient backward sets (=): filled with NaN before, to be sure
  ADDS,       // an input whose gradient backward adds to (+=): random before, and still in the sum
  GIVEN       // an input without a gradient
};
enum { MOST_TENSORS = 8, GUARD = 16 };

// rows and cols: letters of Shape, 'N' for B T, 'Q' for 3C; or a small number as it is
typedef struct { const char *name; int rows, cols; enum Duty duty; } Role;
typedef struct {
  const char *name;
  void (*forward)(void *), (*backward)(void *);   // of a Case
  void (*plain)(Shape s, double **x, const int *ids);
  double stress;
  Role role[MOST_TENSORS];
  double worst;        // of the relative errors found; -1: not checked
} Layer;

typedef struct {
  const Layer *layer;
  Shape s;
  int n_tensors;
  Tensor t[MOST_TENSORS];                              // on the device, each with a GUARD behind
  double *data[MOST_TENSORS], *grad[MOST_TENSORS];     // what was put there
  int *host_ids, *ids;                                 // N integers in 0..V-1
} Case;

static Layer *layers[32];
static int n_layers;

static Affine affine(Tensor weight, Tensor bias) { Affine p = {weight, bias}; return p; }

#define CASE_NAMES                                                                                 \
  const Case *case_ = (const Case *)argument;                                                      \
  const Shape *s_ = &case_->s;                                                                     \
  __attribute__((unused)) const Tensor *t = case_->t;                                              \
  __attribute__((unused)) const int *ids = case_->ids;                                             \
  __attribute__((unused)) int B = s_->B, T = s_->T, C = s_->C, H = s_->H, V = s_->V, O = s_->O,    \
                              N = B*T;
#define LAYER(name, stress, plain, arguments, ...)                                                 \
  static void name##_forward_case(void *argument) { CASE_NAMES name##_forward arguments; }         \
  static void name##_backward_case(void *argument) { CASE_NAMES name##_backward arguments; }       \
  static Layer name##_layer = {#name, name##_forward_case, name##_backward_case, plain, stress,    \
                               {__VA_ARGS__}, -1};                                                 \
  __attribute__((constructor)) static void name##_register(void) {                                 \
    layers[n_layers++] = &name##_layer;                                                            \
  }

static void embedding_plain(Shape s, double **x, const int *ids) {
  for (int n = 0; n < s.B * s.T; n++)
    for (int c = 0; c < s.C; c++)
      x[0][n*s.C + c] = x[1][ids[n]*s.C + c] + x[2][n%s.T*s.C + c];
}
LAYER(embedding, 0, embedding_plain, (t[0], ids, t[1], t[2], B, T, C),
      {"out", 'N', 'C', OUTPUT}, {"wte", 'V', 'C', ADDS}, {"wpe", 'T', 'C', ADDS})

static void layernorm_plain(Shape s, double **x, const int *ids) {
  (void)ids;
  for (int n = 0; n < s.B * s.T; n++) {
    long double mean = 0, variance = 0;
    for (int c = 0; c < s.C; c++) mean += x[2][n*s.C + c] / s.C;
    for (int c = 0; c < s.C; c++) variance += powl(x[2][n*s.C + c] - mean, 2) / s.C;
    for (int c = 0; c < s.C; c++)
      x[0][n*s.C + c] = (double)((x[2][n*s.C + c] - mean) / sqrtl(variance + 1e-5L)) * x[3][c]
                      + x[4][c];
  }
}
LAYER(layernorm, 100, layernorm_plain, (t[0], t[1], t[2], affine(t[3], t[4]), N, C),
      {"out", 'N', 'C', OUTPUT}, {"stats", 'N', 2, STASH}, {"x", 'N', 'C', ADDS},
      {"weight", 'C', 1, ADDS}, {"bias", 'C', 1, ADDS})

static void linear_plain(Shape s, double **x, const int *ids) {
  (void)ids;
  for (int n = 0; n < s.B * s.T; n++)
    for (int o = 0; o < s.O; o++) {
      x[0][n*s.O + o] = x[3][o];
      for (int c = 0; c < s.C; c++) x[0][n*s.O + o] += x[1][n*s.C + c] * x[2][c*s.O + o];
    }
}
LAYER(linear, 0, linear_plain, (t[0], t[1], affine(t[2], t[3]), N, C, O),
      {"y", 'N', 'O', OUTPUT}, {"x", 'N', 'C', SETS}, {"weight", 'C', 'O', ADDS},
      {"bias", 'O', 1, ADDS})

static void attention_plain(Shape s, double **x, const int *ids) {
  (void)ids;
  int D = s.C / s.H;
  double *p = numbers(s.T);
  for (int b = 0; b < s.B; b++)
    for (int h = 0; h < s.H; h++)
      for (int t = 0; t < s.T; t++) {
        const double *q = x[2] + (b*s.T + t)*3*s.C + h*D, *k = x[2] + b*s.T*3*s.C + h*D + s.C;
        double sum = 0, *out = x[0] + (b*s.T + t)*s.C + h*D;
        for (int i = 0; i <= t; i++) {
          double z = 0;
          for (int d = 0; d < D; d++) z += q[d] * k[i*3*s.C + d];
          sum += p[i] = exp(z / sqrt(D));
        }
        for (int d = 0; d < D; d++) out[d] = 0;
        for (int i = 0; i <= t; i++)
          for (int d = 0; d < D; d++) out[d] += p[i] / sum * k[i*3*s.C + s.C + d];
      }
  free(p);
}
LAYER(attention, 0, attention_plain, (t[0], t[1], t[2], B, T, C, H),
      {"out", 'N', 'C', OUTPUT}, {"lse", 'N', 'H', STASH}, {"qkv", 'N', 'Q', SETS})

static void gelu_plain(Shape s, double **x, const int *ids) {
  (void)ids;
  for (int i = 0; i < s.B * s.T * s.C; i++)
    x[0][i] = x[1][i] * 0.5 * (1 + tanh(sqrt(2 / acos(-1)) * (x[1][i] + 0.044715*pow(x[1][i], 3))));
}
LAYER(gelu, 8, gelu_plain, (t[0], t[1], N, C), {"y", 'N', 'C', OUTPUT}, {"x", 'N', 'C', SETS})

static void residual_plain(Shape s, double **x, const int *ids) {
  (void)ids;
  for (int i = 0; i < s.B * s.T * s.C; i++) x[0][i] = x[1][i] + x[2][i];
}
LAYER(residual, 0, residual_plain, (t[0], t[1], t[2], N, C),
      {"out", 'N', 'C', OUTPUT}, {"x", 'N', 'C', SETS}, {"f", 'N', 'C', SETS})

static void head_plain(Shape s, double **x, const int *ids) {
  (void)ids;
  for (int n = 0; n < s.B * s.T; n++)
    for (int v = 0; v < s.V; v++) {
      x[0][n*s.V + v] = 0;
      for (int c = 0; c < s.C; c++) x[0][n*s.V + v] += x[1][n*s.C + c] * x[2][v*s.C + c];
    }
}
LAYER(head, 0, head_plain, (t[0], t[1], t[2], N, C, V),
      {"logits", 'N', 'V', OUTPUT}, {"x", 'N', 'C', SETS}, {"wte", 'V', 'C', ADDS})

static void crossentropy_plain(Shape s, double **x, const int *ids) {
  for (int n = 0; n < s.B * s.T; n++) {
    const double *logits = x[3] + n*s.V;
    long double sum = 0;
    double max = -INFINITY;
    for (int v = 0; v < s.V; v++) max = MAX(max, logits[v]);
    for (int v = 0; v < s.V; v++) sum += expl((long double)logits[v] - max);
    x[0][n] = (double)(max - logits[ids[n]] + logl(sum));
    x[1][n] = logits[ids[n]] == max;
    x[2][n] = (double)(max + logl(sum));
  }
}
LAYER(crossentropy, 1000, crossentropy_plain, (t[0], t[1], t[2], t[3], ids, N, V),
      {"loss", 'N', 1, OUTPUT}, {"hit", 'N', 1, STASH}, {"row_lse", 'N', 1, STASH},
      {"logits", 'N', 'V', SETS})

static void squared_error_plain(Shape s, double **x, const int *ids) {
  (void)ids;
  for (int n = 0; n < s.B * s.T; n++) {
    x[0][n] = 0;
    for (int o = 0; o < s.O; o++)
      x[0][n] += pow(x[1][n*s.O + o] - x[2][n*s.O + o], 2) / s.O;
  }
}
LAYER(squared_error, 0, squared_error_plain, (t[0], t[1], t[2].data, N, O),
      {"loss", 'N', 1, OUTPUT}, {"y", 'N', 'O', SETS}, {"target", 'N', 'O', GIVEN})

// ---- Checking a layer ----

static int extent(Shape s, int letter) {
  switch (letter) {
  case 'B': return s.B;
  case 'T': return s.T;
  case 'C': return s.C;
  case 'H': return s.H;
  case 'V': return s.V;
  case 'O': return s.O;
  case 'N': return s.B * s.T;
  case 'Q': return 3 * s.C;
  default: return letter;
  }
}
static int rows_in(const Case *c, int i) { return extent(c->s, c->layer->role[i].rows); }
static int cols_in(const Case *c, int i) { return extent(c->s, c->layer->role[i].cols); }
static long count_in(const Case *c, int i) { return (long)rows_in(c, i) * cols_in(c, i); }

static const double GUARD_VALUE = 12345;
static real *guarded(const double *x, long n) {   // on the device; no layer may touch the guard
  double guard[GUARD];
  real *p = (real *)device_alloc((n + GUARD) * sizeof(real));
  for (int i = 0; i < GUARD; i++) guard[i] = GUARD_VALUE;
  put(p, x, n);
  put(p + n, guard, GUARD);
  return p;
}

static void make_data(Case *c, int i, double stress) {
  enum Duty duty = c->layer->role[i].duty;
  long n = count_in(c, i), cols = cols_in(c, i);
  c->data[i] = numbers(n);
  c->grad[i] = numbers(n);
  for (long j = 0; j < n; j++) {
    c->data[i][j] = duty == OUTPUT || duty == STASH ? NAN : random_normal(100 + i, j);
    c->grad[i][j] = duty == SETS ? NAN : random_normal(200 + i, j);
    if (j / cols == 1) c->data[i][j] += stress;
    if (j / cols == 2) c->data[i][j] += j % 2 ? stress : -stress;
  }
  c->t[i].data = guarded(c->data[i], n);
  c->t[i].grad = duty == STASH || duty == GIVEN ? NULL : guarded(c->grad[i], n);
}

static Case *make_case(const Layer *layer, Shape s) {
  Case *c = (Case *)calloc(1, sizeof(Case));
  if (!c) die("no memory for a test of %s", layer->name);
  c->layer = layer;
  c->s = s;
  int N = s.B * s.T, stressed = 0;
  for (; c->n_tensors < MOST_TENSORS && layer->role[c->n_tensors].name; c->n_tensors++) {
    int input = layer->role[c->n_tensors].duty >= SETS;
    make_data(c, c->n_tensors, input && !stressed ? layer->stress : 0);
    stressed |= input;
  }
  c->host_ids = (int *)malloc(N * sizeof(int));
  c->ids = (int *)device_alloc(N * sizeof(int));
  if (!c->host_ids) die("no memory for %d tokens", N);
  for (int n = 0; n < N; n++) c->host_ids[n] = (int)(random_bits(300, n) % s.V);
  c->host_ids[1] = c->host_ids[0];   // a token twice, side by side
  copy_in(c->ids, c->host_ids, N * sizeof(int));
  return c;
}

static void free_case(Case *c) {
  for (int i = 0; i < c->n_tensors; i++) {
    device_free(c->t[i].data);
    if (c->t[i].grad) device_free(c->t[i].grad);
    free(c->data[i]); free(c->grad[i]);
  }
  device_free(c->ids);
  free(c->host_ids); free(c);
}

// Neither forward nor backward may write to what they only read, or beyond the end of a tensor.
static void check_untouched(const Case *c) {
  char what[80];
  snprintf(what, sizeof what, "%s: memory that is not its own", c->layer->name);
  const char *touched = NULL;
  for (int i = 0; i < c->n_tensors; i++)
    for (int grad = 0; grad < 2; grad++) {
      enum Duty duty = c->layer->role[i].duty;
      const real *device = grad ? c->t[i].grad : c->t[i].data;
      long n = count_in(c, i);
      if (!device) continue;
      double *now = numbers(n + GUARD);
      get(now, device, n + GUARD);
      int written = grad ? duty == SETS || duty == ADDS : duty == OUTPUT || duty == STASH;
      if (!written && memcmp(now, grad ? c->grad[i] : c->data[i], n * sizeof(double)))
        touched = c->layer->role[i].name;
      for (int j = 0; j < GUARD; j++)
        if (now[n + j] != GUARD_VALUE) touched = c->layer->role[i].name;
      free(now);
    }
  if (touched) judge_that(0, what, "%s, or what lies behind it, was changed", touched);
}

// The output beside that of the plain forward; a stash too, if the plain one says what is in it.
static void check_forward(Case *c, Comparison row) {
  double *want[MOST_TENSORS];
  launch(c->layer->forward, c);
  if (!c->layer->plain) return;
  for (int i = 0; i < c->n_tensors; i++) {        // c->data of what forward writes are NaNs
    want[i] = numbers(count_in(c, i));
    memcpy(want[i], c->data[i], count_in(c, i) * sizeof(double));
  }
  c->layer->plain(c->s, want, c->host_ids);
  for (int i = 0; i < c->n_tensors; i++) {
    enum Duty duty = c->layer->role[i].duty;
    if (duty == OUTPUT || (duty == STASH && !isnan(want[i][0]))) {
      double *got = numbers(count_in(c, i));
      get(got, c->t[i].data, count_in(c, i));
      row.tensor = c->layer->role[i].name;
      row.rows = rows_in(c, i); row.cols = cols_in(c, i);
      row.got = got; row.want = want[i];
      row.bar = 1e-11;
      judge(row);
      free(got);
    }
    free(want[i]);
  }
}

static Function function_of(Case *c) {
  Function f = {c->layer->forward, c, c->t[0].data, c->grad[0], count_in(c, 0)};
  return f;
}

// What the gradient promises for the numbers begin..end-1 along a direction, and what is found.
typedef struct { double promised, found; } Slope;
static Slope slope_in(Case *c, int i, const double *got, const double *direction, long begin,
                      long end) {
  long double sum = 0;
  for (long j = begin; j < end; j++) sum += (long double)got[j] * direction[j];
  Slope s = {(double)sum, slope(function_of(c), c->t[i].data + begin, end - begin,
                                direction + begin)};
  return s;
}

static int differs_less(Slope a, Slope b) {   // false if a is NaN
  return fabs(a.promised - a.found) < fabs(b.promised - b.found) || isnan(b.promised);
}

// A tensor too large to move every number: all are moved at once, along a random direction. If the
// slope is not the one that the gradient promises, half of them are moved, and a half of that half,
// always the half that differs more: a wrong element is found in few steps.
static double check_directions(Case *c, int i, const double *got, Comparison row) {
  long n = count_in(c, i), begin = 0, end = n;
  double *direction = numbers(n);
  for (long j = 0; j < n; j++) direction[j] = random_normal(400 + i, j);
  Slope all = slope_in(c, i, got, direction, 0, n), half = all;
  double size = MAX(norm_of(got, n), fabs(all.found));
  double error = fabs(all.promised - all.found) / size;
  int ok = count_verdict(error <= row.bar, row.layer, row.tensor);
  printf("%-22s %-10s %7ld  %-10.1e %-9s %14.6e %14.6e  %s\n", row.layer, row.tensor, n, error,
         "a slope", all.promised, all.found, ok ? "ok" : "FAIL");
  while (!ok && end - begin > 1) {
    long middle = (begin + end) / 2;
    half = slope_in(c, i, got, direction, begin, middle);
    Slope other = slope_in(c, i, got, direction, middle, end);
    if (differs_less(half, other)) half = other, begin = middle;
    else end = middle;
  }
  if (!ok)
    printf("    a wrong one is [%ld,%ld]: %.6g, not %.6g\n", begin / row.cols, begin % row.cols,
           got[begin], half.found / direction[begin]);
  free(direction);
  return error;
}

static double check_elements(Case *c, int i, const double *got, Comparison row) {
  long n = count_in(c, i);
  double *want = numbers(n);
  for (long j = 0; j < n; j++) want[j] = slope(function_of(c), c->t[i].data + j, 1, NULL);
  row.got = got; row.want = want;
  row.before = c->layer->role[i].duty == ADDS ? c->grad[i] : NULL;
  double error = judge(row);
  free(want);
  return error;
}

static void check_layer(Layer *layer, Shape s, int every_element) {
  Case *c = make_case(layer, s);
  Comparison row = {layer->name, NULL, 0, 0, NULL, NULL, NULL, &c->s, BAR};
  check_forward(c, row);
  launch(layer->backward, c);
  check_untouched(c);
  for (int i = 0; i < c->n_tensors; i++) {
    enum Duty duty = layer->role[i].duty;
    if (duty != SETS && duty != ADDS) continue;
    double *got = numbers(count_in(c, i));
    char name[40];
    snprintf(name, sizeof name, "d %s", layer->role[i].name);
    row.tensor = name;
    row.rows = rows_in(c, i); row.cols = cols_in(c, i);
    get(got, c->t[i].grad, count_in(c, i));
    for (long j = 0; duty == ADDS && j < count_in(c, i); j++) got[j] -= c->grad[i][j];
    double error = (every_element ? check_elements : check_directions)(c, i, got, row);
    layer->worst = MAX(layer->worst, error);
    free(got);
  }
  free_case(c);
}

// Sizes that no tile, vector or block divides; and sizes beyond one of each, in every direction.
static const Shape SMALL = {3, 7, 24, 3, 29, 10}, LARGE = {3, 135, 150, 3, 301, 77};
// Sums of over 512 terms for few results: over channels, over rows. A GPU cuts these into slices.
static const Shape WIDE = {3, 7, 525, 3, 29, 10}, LONG = {5, 121, 24, 3, 29, 10};

static int is_matmul(const Layer *layer) {
  return !strcmp(layer->name, "linear") || !strcmp(layer->name, "head");
}

#ifndef MOVE_EACH
#define MOVE_EACH 1   // 0: a slope here too, for `make race`, which has time for few
#endif
static void check_layers(const char **names, int n_names) {
  printf("Layers. Every number of every input is moved (B 3, T 7, C 24, H 3, V 29, O 10); beyond\n"
         "a tile (B 3, T 135, C 150, H 3, V 301, O 77) all at once, in a random direction.\n");
  heading("backward", "finite diff.");
  for (int i = 0; i < n_layers; i++) {
    int asked = !n_names;
    for (int k = 0; k < n_names; k++) asked |= !strcmp(names[k], layers[i]->name);
    if (!asked) continue;
    checking = layers[i]->name;
    check_layer(layers[i], SMALL, MOVE_EACH);
    check_layer(layers[i], LARGE, 0);
    if (is_matmul(layers[i])) check_layer(layers[i], WIDE, 0), check_layer(layers[i], LONG, 0);
  }
}

// ---- Sums over all: losses, hits, the gradient's norm. Longer than a block or a CHUNK; what adds
// finds something there.

typedef struct { Tensor loss, hit; Stats *stats; double *partial; int n; } Sums;

static void sums_twice(void *argument) {
  Sums *s = (Sums *)argument;
  add_loss(s->stats, s->loss, s->hit, s->n);
  add_loss(s->stats, s->loss, s->hit, s->n);
  gradient_norm(s->stats, s->partial, s->loss.data, s->n);
  gradient_norm(s->stats, s->partial, s->loss.data, s->n);
  keep_stats(s->stats + 1, s->stats);
  add_loss(s->stats, s->loss, s->hit, s->n);
}

static void check_sums(void) {
  const int n = 3*CHUNK + 77, chunks_of_n = 4;
  double *loss = numbers(n), *hit = numbers(n), sums[3] = {0, 0, 0}, apart = 0;
  Stats before[2] = {{3, 5, 7}, {NAN, NAN, NAN}}, after[2];
  Tensor none = {NULL, NULL};
  Sums s = {none, none, (Stats *)device_alloc(sizeof before),
            (double *)device_alloc(chunks_of_n * sizeof(double)), n};
  for (int i = 0; i < n; i++) {
    loss[i] = (float)random_normal(700, i), hit[i] = random_bits(701, i) % 3 == 0;
    sums[0] += loss[i]; sums[1] += hit[i]; sums[2] += loss[i] * loss[i];
  }
  s.loss.data = guarded(loss, n);
  s.hit.data = guarded(hit, n);
  copy_in(s.stats, before, sizeof before);
  launch(sums_twice, &s);
  copy_out(after, s.stats, sizeof after);
  double got[] = {after[1].loss, after[1].hits, after[1].norm2, after[0].loss, after[0].hits};
  double want[] = {3 + 2*sums[0], 5 + 2*sums[1], sums[2], sums[0], sums[1]};
  for (int i = 0; i < 5; i++) {
    double error = fabs(got[i] / want[i] - 1);
    apart = error <= apart ? apart : error;   // a NaN is the worst
  }
  judge_that(apart < 1e-11, "add_loss, gradient_norm, keep_stats", "%.1e from plain sums", apart);
  device_free(s.loss.data); device_free(s.hit.data);
  device_free(s.stats); device_free(s.partial);
  free(loss); free(hit);
}

// ---- 3. The whole model -----------------------------------------------------------------------
// A GPT of 4000 parameters on a text of 29 letters, with weights so large that each layer matters.

static const char POEM[] =   // Longfellow 1838
  "tell me not, in mournful numbers, life is but an empty dream. for the soul is dead that "
  "slumbers, and things are not what they seem. life is real, life is earnest, and the grave "
  "is not its goal. dust thou art, to dust returnest, was not spoken of the soul. ";
enum { LETTERS = 29, POEM_SIZE = sizeof POEM - 1 };
static const Config TINY = {2, 3, 12, 8, LETTERS};   // L 2, H 3, C 12, T up to 8, V 29

static unsigned char letter_at(int i) {
  const char *order = "abcdefghijklmnopqrstuvwxyz ,.";
  return (unsigned char)(strchr(order, POEM[i % POEM_SIZE]) - order);
}

// The tokens of a micro-batch go to the device, each with the next one as its target.
static void load_piece(Model *m, Piece p) {
  unsigned char text[2 * POEM_SIZE];
  long start[64];
  assert(p.B <= 64 && p.at + p.B * p.T < (int)sizeof text);
  for (int i = 0; i < (int)sizeof text; i++) text[i] = letter_at(i);
  for (int b = 0; b < p.B; b++) start[b] = p.at + b * p.T;
  load_windows(m, text, start, p.B, p.T);
}

static void put_parameters(Model *m, const double *packed) {
  for (int i = 0; i < m->n_parameters; packed += entry_count(&m->parameter[i++]))
    put(m->parameter[i].tensor->data, packed, entry_count(&m->parameter[i]));
}

static void get_parameters(double *packed, const Model *m, int grad) {
  for (int i = 0; i < m->n_parameters; packed += entry_count(&m->parameter[i++])) {
    Tensor *t = m->parameter[i].tensor;
    get(packed, grad ? t->grad : t->data, entry_count(&m->parameter[i]));
  }
}

static double *random_parameters(const Model *m) {   // packed
  double *all = numbers(m->count), *w = all;
  for (int i = 0; i < m->n_parameters; i++) {
    const Entry *e = &m->parameter[i];
    int one = !e->cols && strstr(e->name, "weight");     // of a layernorm: around 1
    double scale = e->name[0] == 'w' ? 1 : 0.3;          // wte and wpe
    for (long j = 0; j < entry_count(e); j++) *w++ = one + scale * random_normal(500 + i, j);
  }
  return all;
}

static void zero_gradients(void *model) {
  zero(((Model *)model)->weights.grad, ((Model *)model)->n_weights);
}

static void poison(void *model) {   // what is read before it is written shows as NaN
  fill(((Model *)model)->memory, ((Model *)model)->n_memory, (real)NAN);
}

static void open_model(Model *m, Config config, int rows, int separate) {
  model_plan(m, config, rows, 1, separate);
  model_allocate(m);
  launch(poison, m);
}

// The layers between a tensor's gradient and that of the next in backward order.
static const char *suspects(const char *name) {
  const char *table[][2] = {
    {"ln_f", "crossentropy_backward, dx of head_backward, or layernorm_backward"},
    {"mlp.c_proj", "dx of layernorm_backward above, residual_backward, or dw of linear_backward"},
    {"mlp.c_fc", "dx of linear_backward above, gelu_backward, or dw of linear_backward"},
    {"ln_2", "dx of linear_backward above, or dw of layernorm_backward"},
    {"attn.c_proj", "dx of layernorm_backward above, residual_backward, or dw of linear_backward"},
    {"attn.c_attn", "dx of linear_backward above, attention_backward, or dw of linear_backward"},
    {"ln_1", "dx of linear_backward above, or dw of layernorm_backward"},
    {"wpe", "dx of layernorm_backward above, residual_backward, or embedding_backward"},
    {"wte", "embedding_backward, or dwte of head_backward: both add to it, since it is tied"}};
  for (int i = 0; i < 9; i++) if (strstr(name, table[i][0])) return table[i][1];
  return "";
}

// Says which layer is guilty. right[i]: parameter i's gradient is right; layer: what failed alone.
static void accuse(const Model *m, const char *right, const char *layer) {
  const char *above = NULL, *guilty = NULL;
  int only_wte = 1;
  for (int i = m->n_parameters - 1; i >= 0 && !guilty; i--) {   // wpe and wte come last in backward
    if (right[i]) above = m->parameter[i].name;
    else guilty = m->parameter[i].name;
  }
  for (int i = 1; i < m->n_parameters; i++) only_wte &= right[i];
  if (!guilty) return;
  if (only_wte) printf("  All are right but %s", guilty);
  else if (above) printf("  In backward order %s is right, then %s is wrong", above, guilty);
  else printf("  %s, the first in backward order, is wrong", guilty);
  printf(": look at\n  %s", suspects(guilty));
  printf(*layer ? ". (Alone, %s failed first.)\n" : ".\n", layer);
}

typedef struct { Model m; MicroBatch batch; Piece piece; double *upstream; } Whole;

static Function loss_of(Whole *w) {
  Function f = {forward_only, &w->batch, w->m.loss.data, w->upstream, w->batch.B * w->batch.T};
  return f;
}

static void open_whole(Whole *w, Piece piece, int separate) {
  int N = piece.B * piece.T;
  open_model(&w->m, TINY, N, separate);
  double *weights = random_parameters(&w->m);
  put_parameters(&w->m, weights);
  free(weights);
  load_piece(&w->m, piece);
  MicroBatch batch = {&w->m, piece.B, piece.T, (real)1 / N};
  w->batch = batch;
  w->piece = piece;
  w->upstream = numbers(N);
  for (int n = 0; n < N; n++) w->upstream[n] = 1.0 / N;
}

static void close_whole(Whole *w) {
  model_free(&w->m);
  free(w->upstream);
}

// In the emulator a forward pass takes a thousand times as long, so there each tensor is moved as a
// whole, and its elements are compared with train.c's, which are proven one by one.
#ifdef KERNELS
enum { EVERY_ELEMENT = 0 };
#else
enum { EVERY_ELEMENT = 1 };
#endif

static double check_parameter(Whole *w, int i, const double *got) {
  Entry *e = &w->m.parameter[i];
  long n = entry_count(e);
  Shape shape = {w->piece.B, w->piece.T, TINY.n_embd, TINY.n_head, LETTERS, 0};
  Comparison row = {e->name, "", e->rows, MAX(1, e->cols), NULL, NULL, NULL, &shape, BAR};
  double *want = numbers(n), error, found, promised[1] = {0};
  if (EVERY_ELEMENT) {
    for (long j = 0; j < n; j++) want[j] = slope(loss_of(w), e->tensor->data + j, 1, NULL);
    row.got = got; row.want = want;
    error = judge(row);
  } else {
    for (long j = 0; j < n; j++) promised[0] += got[j] * (want[j] = random_normal(600 + i, j));
    found = slope(loss_of(w), e->tensor->data, n, want);
    row.tensor = "slope"; row.rows = row.cols = 1;
    row.got = promised; row.want = &found;
    error = judge(row);
  }
  free(want);
  return error;
}

// d loss / d embedding: in a batch of one sequence, moving wpe[t] moves embedding[t] and no other.
// The gradient is that of the whole batch: if sequences leaked into each other, it would show.
static void check_embedding(Whole *w, const double *got) {
  int B = w->piece.B, T = w->piece.T, C = TINY.n_embd;
  double *want = numbers((long)B * T * C);
  w->batch.B = 1;
  for (int b = 0; b < B; b++) {
    Piece alone = {1, T, w->piece.at + b * T};
    load_piece(&w->m, alone);
    for (int i = 0; i < T * C; i++)
      want[b * T * C + i] = slope(loss_of(w), w->m.wpe.data + i, 1, NULL);
  }
  Shape shape = {B, T, C, TINY.n_head, LETTERS, 0};
  Comparison row = {"embedding", "", B * T, C, got, want, NULL, &shape, BAR};
  judge(row);
  free(want);
}

static void check_model(void) {
  Piece piece = {3, 7, 5};
  Whole shared, separate;
  char layer[sizeof first_failure];
  memcpy(layer, first_failure, sizeof layer);
  open_whole(&shared, piece, 0);
  open_whole(&separate, piece, 1);
  Model *m = &separate.m;
  long N = (long)piece.B * piece.T, n = m->count, embedded = N * TINY.n_embd;
  double *grad = numbers(n), *other = numbers(n), *dembedding = numbers(embedded);
  Stats stats;
  launch(micro_batch, &shared.batch);
  launch(micro_batch, &separate.batch);
  get_parameters(other, &shared.m, 1);
  get_parameters(grad, m, 1);
  get(dembedding, m->embedding.grad, embedded);
  printf("\nThe whole model: L %d, H %d, C %d, T %d, V %d, B %d, each gradient through all"
         " layers\n", TINY.n_layer, TINY.n_head, TINY.n_embd, piece.T, LETTERS, piece.B);
  heading("backward", "finite diff.");
  char *right = (char *)malloc(m->n_parameters);
  worst_absolute = 0;
  brief = *layer != 0;   // the layer alone has been diagnosed: here it spreads
  if (!right) die("no memory for %d verdicts", m->n_parameters);
  for (long i = 0, at = 0; i < m->n_parameters; at += entry_count(&m->parameter[i++])) {
    int before = failed;
    check_parameter(&separate, (int)i, grad + at);
    right[i] = failed == before;
  }
  printf("An absolute tolerance of 2e-2 %s here: the worst is %.1e\n",
         worst_absolute <= 0.02 ? "passes" : "fails", worst_absolute);
  check_embedding(&separate, dembedding);
  accuse(m, right, layer);
  brief = 0;
  judge_that(!memcmp(grad, other, n * sizeof(double)), "with memory shared between activations",
             "the same gradients, bit for bit: %ld numbers", n);
  copy_out(&stats, shared.m.stats + CURRENT, sizeof stats);
  double *loss = numbers(N), sum = 0;
  get(loss, shared.m.loss.data, N);
  for (int i = 0; i < N; i++) sum += loss[i];
  judge_that(fabs(stats.loss / sum - 1) < 1e-14, "add_loss", "%.12f nats a token", stats.loss / N);
  close_whole(&shared); close_whole(&separate);
  free(grad); free(other); free(dembedding); free(right); free(loss);
}

// ---- Trials: short training runs, told in numbers ----

static double divisor(const Trial *t, const Piece *piece, int k) {   // of the loss of piece k
  long tokens = 0, own = (long)piece[k].B * piece[k].T;
  for (int i = 0; i < t->accumulate; i++) tokens += (long)piece[i].B * piece[i].T;
  switch (t->recipe) {
  case MEAN_OF_MEANS: return (double)own * t->accumulate;
  case NOT_DIVIDED: return (double)own;
  default: return (double)tokens;   // one mean, over all tokens of the update
  }
}

// Adds a piece's gradient to grad, scaled down to its share of the norm: the recipe CLIP_EACH.
static void clip_alone(Model *m, double *grad, double limit) {
  double *own = numbers(m->count);
  get_parameters(own, m, 1);
  double norm = norm_of(own, m->count), factor = norm > limit ? limit / norm : 1;
  for (long i = 0; i < m->count; i++) grad[i] += factor * own[i];
  launch(zero_gradients, m);
  free(own);
}

static void put_gradients(Model *m, const double *packed) {
  for (int i = 0; i < m->n_parameters; packed += entry_count(&m->parameter[i++]))
    put(m->parameter[i].tensor->grad, packed, entry_count(&m->parameter[i]));
}

// Accumulates the pieces of update u; grad holds their sum afterwards.
static void accumulate(Trial *t, Model *m, int u, double *grad) {
  const Piece *piece = t->piece + u * t->accumulate;
  if (t->recipe == CLIP_EACH) memset(grad, 0, m->count * sizeof(double));
  for (int k = 0; k < t->accumulate; k++) {
    int N = piece[k].B * piece[k].T, step = u * t->accumulate + k;
    MicroBatch batch = {m, piece[k].B, piece[k].T, (real)(1 / divisor(t, piece, k))};
    load_piece(m, piece[k]);
    launch(micro_batch, &batch);
    double *loss = numbers(N);
    get(loss, m->loss.data, N);
    for (int n = 0; n < N; n++) t->loss[step] += loss[n] / N;
    free(loss);
    if (t->recipe == CLIP_EACH) clip_alone(m, grad, t->grad_clip / t->accumulate);
    else get_parameters(grad, m, 1);
    t->norm[step] = norm_of(grad, m->count);
  }
  if (t->recipe == CLIP_EACH) put_gradients(m, grad);
}

static void play(Trial *t) {
  Model m;
  int rows = 0;
  for (int k = 0; k < t->updates * t->accumulate; k++)
    rows = MAX(rows, t->piece[k].B * t->piece[k].T), t->loss[k] = t->change[k] = 0;
  open_model(&m, t->config, rows, t->separate);
  put_parameters(&m, t->weights);
  device_precision(t->tf32 ? "tf32" : "fp32");
  double *grad = numbers(m.count), *before = numbers(m.count);
  opt.optimizer = OPTIMIZER[t->optimizer];
  opt.beta1 = 0.9; opt.beta2 = 0.99;
  opt.weight_decay = t->weight_decay; opt.grad_clip = t->grad_clip;
  for (int u = 0; u < t->updates; u++) {
    int counted = t->recipe == COUNT_EACH ? (u + 1) * t->accumulate - 1 : u;
    accumulate(t, &m, u, grad);
    UpdateStep step = {&m, update_values(counted, t->learning_rate), 0};
    memcpy(before, t->weights, m.count * sizeof(double));
    launch(update_step, &step);
    get_parameters(t->weights, &m, 0);
    if (t->recipe == NOT_ZEROED) put_gradients(&m, grad);
    for (long i = 0; i < m.count; i++) before[i] = t->weights[i] - before[i];
    t->change[(u + 1) * t->accumulate - 1] = norm_of(before, m.count);
  }
  memcpy(t->grad, grad, m.count * sizeof(double));
  device_precision("fp32");
  free(grad); free(before);
  model_free(&m);
}

#ifdef LEND
static void run_here(Trial *t) {
  static int started;
  if (!started++) device_start(1);
  play(t);
}
#define TEXT_OF(name) #name
#define NAME_OF(name) TEXT_OF(name)
const Backend LEND = {NAME_OF(LEND), run_here};
#else   // to the end of the file: what is done with all backends, and main

static Model lists_of(Config config) {   // what a model's parameters are; it has no memory
  Model m;
  model_plan(&m, config, 1, 0, 0);
  return m;
}

static void free_lists(Model *m) {
  free(m->block); free(m->act); free(m->parameter); free(m->activation);
}

static Trial new_trial(Config config, int optimizer, double learning_rate) {
  Trial t;
  Model m = lists_of(config);
  memset(&t, 0, sizeof t);
  t.config = config; t.optimizer = optimizer; t.learning_rate = learning_rate;
  t.updates = t.accumulate = 1;
  t.n = m.count;
  t.weights = random_parameters(&m);
  t.grad = numbers(t.n);
  free_lists(&m);
  return t;
}

static void free_trial(Trial *t) { free(t->weights); free(t->grad); }

// ---- 4. Float and double, and other machines --------------------------------------------------
// Each number of a float is rounded to 24 bits, 6e-8 of its size, and so is each result. Errors
// that have no common cause add up like the steps of a random walk: a gradient at the end of L
// layers, each with sums of K terms, is off by about 6e-8 sqrt(L K) of its tensor's size, and the
// worst of thousands by some times that.

static void compare_backend(const Backend *other, Config config, Piece piece, int tf32, double bar,
                            const char *why) {
  Trial mine = new_trial(config, SGD, 0.1), theirs = new_trial(config, SGD, 0.1);
  mine.piece[0] = theirs.piece[0] = piece;
  theirs.tf32 = tf32;
  play(&mine);
  other->run(&theirs);
  printf("\nThe same gradients by %s: %s\n", other->name, why);
  heading(other->name, "here");
  Model m = lists_of(config);
  Shape shape = {piece.B, piece.T, config.n_embd, config.n_head, LETTERS, 0};
  for (long i = 0, at = 0; i < m.n_parameters; at += entry_count(&m.parameter[i++])) {
    const Entry *e = &m.parameter[i];
    Comparison row = {e->name, "", e->rows, MAX(1, e->cols), theirs.grad + at, mine.grad + at, NULL,
                      &shape, bar};
    judge(row);
  }
  free_lists(&m);
  free_trial(&mine); free_trial(&theirs);
}

static double loss_by(const Backend *backend, Trial t, const double *weights, long i, double h) {
  t.weights = numbers(t.n);
  memcpy(t.weights, weights, t.n * sizeof(double));
  t.weights[i] += h;
  backend->run(&t);
  free(t.weights);
  return t.loss[0];
}

// Central differences in float, for h from 1 to 1e-5: too large a step is not the limit, and with a
// small one the loss moves by less than its own rounding. The best of them would fail a right
// gradient, or need a tolerance that lets a wrong one pass.
static void show_float_differences(const Backend *backend) {
  Trial t = new_trial(TINY, SGD, 0);
  Piece piece = {3, 7, 5};
  const long at = 5 * TINY.n_embd + 3, step = 7;   // some numbers of wte, from [5,3] on
  double best = INFINITY, h = 1;
  t.piece[0] = piece;
  play(&t);
  printf("\nWhy not in float: (f(x+h) - f(x-h)) / 2h for %d numbers of wte, by %s\n", 8,
         backend->name);
  for (; h > 5e-6; h /= 10) {
    double error = 0, size = 0;
    for (int k = 0; k < 8; k++) {
      long i = at + k * step;
      double want = t.grad[i], found = (loss_by(backend, t, t.weights, i, h) -
                                        loss_by(backend, t, t.weights, i, -h)) / (2 * h);
      error += (found - want) * (found - want);
      size += want * want;
    }
    printf("  h %-7.0e error %.1e\n", h, sqrt(error / size));
    best = MIN(best, sqrt(error / size));
  }
  judge_that(best > 1e3 * BAR, "fails for a gradient that is right",
             "the best is %.1e, the bar %.0e", best, BAR);
  free_trial(&t);
}

// Tensor cores see 10 of a float's 23 bits: a number is off by up to 2^-11 of its size, by 0.42 of
// that in root mean square; a product of two by 0.6 of it. K such errors add up like the steps of
// a random walk, but so do the K terms: relative to the sum's size it is 0.6 * 2^-11 for any K, and
// the worst of thousands is 3 to 6 times that. A number in the wrong lane is off by all that it is.
#ifdef KERNELS
static double check_product(Layer *layer, Shape s, double bar) {
  Case *c = make_case(layer, s);
  Comparison row = {layer->name, NULL, 0, 0, NULL, NULL, NULL, &c->s, bar};
  double *result[2][MOST_TENSORS], least = INFINITY;
  char name[40];
  for (int tf32 = 0; tf32 < 2; tf32++) {
    device_precision(tf32 ? "tf32" : "fp32");
    launch(layer->forward, c);
    launch(layer->backward, c);
    for (int i = 0; i < c->n_tensors; i++) {
      long n = count_in(c, i);
      int adds = layer->role[i].duty == ADDS;
      get(result[tf32][i] = numbers(n), i ? c->t[i].grad : c->t[i].data, n);
      for (long j = 0; adds && j < n; j++) result[tf32][i][j] -= c->grad[i][j];
      if (adds) put(c->t[i].grad, c->grad[i], n);
    }
  }
  device_precision("fp32");
  for (int i = 0; i < c->n_tensors; i++) {
    row.rows = rows_in(c, i); row.cols = cols_in(c, i);
    snprintf(name, sizeof name, i ? "d %s" : "%s", layer->role[i].name);
    row.tensor = name; row.got = result[1][i]; row.want = result[0][i];
    double error = row.cols > 1 ? judge(row) : least;   // a bias is no product
    least = MIN(least, error);
    free(result[0][i]); free(result[1][i]);
  }
  free_case(c);
  return least;
}

static void check_tf32(void) {
  const double expected = 0.6 * 0x1p-11;
  const Config config = {1, 3, 36, 48, LETTERS};   // 135 rows, 144 columns: beyond a tile of 128
  Piece piece = {3, 45, 5};
  double least = INFINITY;
  compare_backend(IN_FLOAT, config, piece, 0, 3e-5, "beyond a tile");
  if (compute_capability < 80) {
    printf("\nThis GPU has no tensor cores for tf32, which is not checked\n");
    return;
  }
  printf("\nMatmuls in tf32 against double: expect 0.6 * 2^-11 = %.1e, 3 to 6 times that\n"
         "at worst\n", expected);
  heading("tf32", "double");
  for (int i = 0; i < n_layers; i++) {
    if (!is_matmul(layers[i])) continue;
    double small = check_product(layers[i], SMALL, 8 * expected);
    double large = check_product(layers[i], LARGE, 8 * expected);
    least = MIN(least, MIN(small, large));
  }
  judge_that(least > expected, "that was tf32", "the worst of each is %.1e or more", least);
  compare_backend(IN_FLOAT, config, piece, 1, 0.05, "in tf32; 2^13 times the errors in float");
}
#endif

static void check_float_and_double(void) {
  const Piece piece = {3, 7, 5};
#ifdef KERNELS
  compare_backend(&c_double, TINY, piece, 0, 1e-10,
                  "train.c, in double; only the order of sums differs");
#endif
  char why[120];
  double roundings = 12.0 * TINY.n_layer + 4, terms = 4 * TINY.n_embd;
  double expected = 0x1p-24 * sqrt(roundings * terms);
  snprintf(why, sizeof why, "expect 6e-8 sqrt(%g layers x %g terms) = %.0e, or some times that",
           roundings, terms, expected);
  compare_backend(IN_FLOAT, TINY, piece, 0, 10 * expected, why);
#ifdef KERNELS
  check_tf32();
#endif
  show_float_differences(IN_FLOAT);
}

// ---- 5. Single-step and multi-step ------------------------------------------------------------
// K micro-batches, forward and backward, then one update; or an update after each. What of it is
// arithmetic is checked, what is a matter of experience is shown.

static void one_backend(Trial *t) { play(t); }
static const Backend here = {"double", one_backend};

// The start of the poem as K equal pieces, and as the one batch that they are.
enum { PIECES = 4, PIECE_B = 2, PIECE_T = 7, UPDATES = 3 };
static Trial equal_pieces(int optimizer, int pieces, int B, double learning_rate) {
  Trial t = new_trial(TINY, optimizer, learning_rate);
  t.accumulate = pieces;
  t.updates = UPDATES;
  t.weight_decay = 0.1; t.grad_clip = 1;
  for (int k = 0; k < pieces * UPDATES; k++) {
    Piece piece = {B, PIECE_T, k * B * PIECE_T};
    t.piece[k] = piece;
  }
  return t;
}

// Softmax does not see what is added to all scores alike, so the gradient of a bias of K is zero.
// What rounding leaves of it is noise, and optimizers that divide by the gradient's size make
// steps of the noise: these biases are not compared.
static void blank_key_biases(double *packed) {
  Model m = lists_of(TINY);
  for (long i = 0, at = 0; i < m.n_parameters; at += entry_count(&m.parameter[i++]))
    if (strstr(m.parameter[i].name, "c_attn.bias"))
      for (int c = TINY.n_embd; c < 2 * TINY.n_embd; c++) packed[at + c] = 0;
  free_lists(&m);
}

static int optimizer_rate(int optimizer, double *rate) {
  const double rates[] = {0.1, 0.1, 0.01, 1, 0.01, 0.01, 0.01};
  *rate = rates[optimizer];
  return optimizer;
}

typedef struct { double gradient, weights; } Difference;

static Difference pieces_against_batch(const Backend *backend, int optimizer) {
  double rate;
  optimizer_rate(optimizer, &rate);
  Trial pieces = equal_pieces(optimizer, PIECES, PIECE_B, rate);
  Trial batch = equal_pieces(optimizer, 1, PIECES * PIECE_B, rate);
  backend->run(&pieces);
  backend->run(&batch);
  blank_key_biases(pieces.weights); blank_key_biases(batch.weights);
  Difference d = {distance(pieces.grad, batch.grad, batch.n),
                  distance(pieces.weights, batch.weights, batch.n)};
  free_trial(&pieces); free_trial(&batch);
  return d;
}

static void open_arm(Arm *arm, int pieces, const double *weights) {
  if (!arm->model.parameter) open_model(&arm->model, TINY, PIECES * PIECE_B * PIECE_T, 0);
  Model *m = &arm->model;
  double *zeros = numbers(m->n_weights);
  put_parameters(m, weights);
  put(m->weights.grad, zeros, m->n_weights);
  for (int i = 0; i < 2; i++) put(m->moment[i], zeros, m->n_weights);
  arm->accumulate = pieces;
  arm->updates = 0;
  free(zeros);
}

// The same with update() of train.c itself, which draws its windows: K times B of them, or once KB,
// are the same ones. So both arms see the same tokens, and must take the same steps.
static double arms_apart(int optimizer) {
  static unsigned char text[POEM_SIZE];
  for (int i = 0; i < POEM_SIZE; i++) text[i] = letter_at(i);
  run.text.byte = text;
  run.text.size = run.text.train_size = POEM_SIZE;
  Trial t = equal_pieces(optimizer, 1, 1, 0);
  Stats stats[2];
  double rate, *weights[2] = {numbers(t.n), numbers(t.n)};
  opt.optimizer = OPTIMIZER[optimizer_rate(optimizer, &rate)];
  opt.beta1 = 0.9; opt.beta2 = 0.99; opt.weight_decay = 0.1; opt.grad_clip = 1;
  opt.block_size = PIECE_T; opt.seed = 1;
  for (int i = 0; i < 2; i++) {
    Arm *arm = &run.arm[i];
    open_arm(arm, i ? 1 : PIECES, t.weights);
    opt.batch_size = i ? PIECES * PIECE_B : PIECE_B;
    for (int u = 0; u < UPDATES; u++) update(arm, rate);
    get_parameters(weights[i], &arm->model, 0);
    blank_key_biases(weights[i]);
    copy_out(&stats[i], arm->model.stats + KEPT + UPDATES - 1, sizeof(Stats));
  }
  double apart = distance(weights[0], weights[1], t.n);
  apart = MAX(apart, fabs(stats[0].loss / stats[1].loss - 1));
  apart = MAX(apart, fabs(stats[0].norm2 / stats[1].norm2 - 1));
  free(weights[0]); free(weights[1]); free_trial(&t);
  return apart;
}

static void check_accumulation(const Backend *in_float) {
  printf("\nSingle-step and multi-step. a: %d micro-batches of %d x %d tokens, or one of %d x %d:\n"
         "how far apart, after %d updates, the last gradient and the weights are\n",
         PIECES, PIECE_B, PIECE_T, PIECES * PIECE_B, PIECE_T, UPDATES);
  printf("%-10s %-20s %-20s %s\n", "", "double", in_float->name, "train()'s own update()");
  printf("%-10s %-9s %-10s %-9s %-10s %s\n", "optimizer", "gradient", "weights", "gradient",
         "weights", "all");
  for (int i = 0; i < N_OPTIMIZERS; i++) {
    Difference d = pieces_against_batch(&here, i), f = pieces_against_batch(in_float, i);
    double apart = arms_apart(i);
    int ok = d.gradient < 1e-12 && d.weights < 1e-12 && f.gradient < 2e-6 && f.weights < 1e-6 &&
             apart < 1e-12;
    printf("%-10s %-9.1e %-10.1e %-9.1e %-10.1e %-9.1e  %s\n", OPTIMIZER[i], d.gradient, d.weights,
           f.gradient, f.weights, apart, ok ? "ok" : "FAIL");
    count_verdict(ok, "accumulation", OPTIMIZER[i]);
  }
}

// ---- b. Wrong recipes ----

static Trial unequal_pieces(int recipe, int optimizer, double clip) {
  double rate;
  optimizer_rate(optimizer, &rate);
  Trial t = new_trial(TINY, optimizer, rate);
  const Piece pieces[] = {{5, 7, 0}, {1, 7, 35}, {2, 3, 42}, {1, 2, 48},
                          {3, 7, 50}, {1, 2, 71}, {1, 7, 73}, {4, 3, 80}};
  t.accumulate = 4; t.updates = 2;
  t.recipe = recipe; t.grad_clip = clip;
  memcpy(t.piece, pieces, sizeof pieces);
  return t;
}

// The same tokens, each sequence alone: then nothing can be unequal but the lengths of sequences.
static Trial sequences_alone(const Trial *pieces) {
  Trial t = new_trial(TINY, pieces->optimizer, pieces->learning_rate);
  int n = 0;
  t.grad_clip = pieces->grad_clip;
  t.updates = pieces->updates;
  for (int k = 0; k < pieces->updates * pieces->accumulate; k++)
    for (int b = 0; b < pieces->piece[k].B; b++) {
      Piece p = {1, pieces->piece[k].T, pieces->piece[k].at + b * pieces->piece[k].T};
      t.piece[n++] = p;
    }
  t.accumulate = n / t.updates;
  return t;
}

// The weights' change over a trial, which it leaves in t->weights.
static double *play_for_change(Trial *t) {
  double *before = numbers(t->n);
  memcpy(before, t->weights, t->n * sizeof(double));
  play(t);
  for (long i = 0; i < t->n; i++) t->weights[i] -= before[i];
  free(before);
  return t->weights;
}

typedef struct { double off, angle; } Outcome;   // how a recipe's change differs from the right
static Outcome try_recipe(int recipe, int optimizer, int alone) {
  double clip = recipe == CLIP_EACH ? 0.5 : 0;
  Trial right = unequal_pieces(SUM_OF_TOKENS, optimizer, clip);
  Trial other = unequal_pieces(recipe, optimizer, clip);
  if (alone) {
    Trial split = sequences_alone(&other);
    free_trial(&other);
    other = split;
  }
  double *x = play_for_change(&other), *y = play_for_change(&right);
  Outcome found = {distance(x, y, right.n), angle(x, y, right.n)};
  free_trial(&right); free_trial(&other);
  return found;
}

static void check_recipes(void) {
  const char *what[N_RECIPES] = {
    "a sum over tokens / all tokens of the update", "mean of the micro-batches' means",
    "means added, not divided by their number", "gradients not zeroed after the first update",
    "each micro-batch clipped, not the sum", "Adam's step counted per micro-batch"};
  printf("\nb: wrong recipes. 2 updates, each of 4 unequal micro-batches (5x7, 1x7, 2x3, ...):\n"
         "how far the change of the weights is from the right one, and at what angle\n"
         "%-46s %-8s %-10s %-8s %s\n", "", "SGD", "angle", "AdamW", "angle");
  for (int recipe = -1; recipe < N_RECIPES; recipe++) {
    int right = recipe <= SUM_OF_TOKENS;
    Outcome sgd = try_recipe(MAX(0, recipe), SGD, recipe < 0);
    Outcome adamw = try_recipe(MAX(0, recipe), ADAMW, recipe < 0);
    int ok = right ? sgd.off < 1e-12 && adamw.off < 1e-9 : MAX(sgd.off, adamw.off) > 0.01;
    const char *name = recipe < 0 ? "right: all 18 sequences one by one" : what[recipe];
    printf("%-46s %-8.1e %5.1f deg  %-8.1e %5.1f deg  %s\n", name, sgd.off, sgd.angle, adamw.off,
           adamw.angle, ok ? right ? "ok" : "wrong, as it should be" : "FAIL");
    count_verdict(ok, "recipe", name);
  }
}

// ---- c. Step by step, and d. the ladder ----

static Trial single_steps(int optimizer, double learning_rate, int pieces) {
  Trial t = equal_pieces(optimizer, 1, PIECE_B, learning_rate);
  t.updates = pieces;
  t.weight_decay = t.grad_clip = 0;
  for (int k = 0; k < pieces; k++) t.piece[k].at = k * PIECE_B * PIECE_T;
  for (int k = 0; k < pieces; k++) t.piece[k].B = PIECE_B, t.piece[k].T = PIECE_T;
  return t;
}

static Trial accumulated_step(int optimizer, double learning_rate, int pieces) {
  Trial t = single_steps(optimizer, pieces * learning_rate, pieces);
  t.updates = 1;
  t.accumulate = pieces;
  return t;
}

static void show_steps(int optimizer) {
  double rate;
  optimizer_rate(optimizer, &rate);
  Trial one = single_steps(optimizer, rate, PIECES);
  Trial all = accumulated_step(optimizer, rate, PIECES);
  double *x = play_for_change(&one), *y = play_for_change(&all);
  printf("%s: learning rate %g            | learning rate %g x %d\n", OPTIMIZER[optimizer], rate,
         rate, PIECES);
  printf("  micro-batch   loss  |gradient|  |change|  |   loss  |gradient so far|  |change|\n");
  for (int k = 0; k < PIECES; k++)
    printf("  %-11d %6.3f  %10.4f  %8.4f  | %6.3f  %17.4f  %8.4f\n", k + 1, one.loss[k],
           one.norm[k], one.change[k], all.loss[k], all.norm[k], all.change[k]);
  printf("  in total                        %8.4f  |                            %8.4f, %.1f degrees"
         " apart\n", norm_of(x, one.n), norm_of(y, all.n), angle(x, y, one.n));
  free_trial(&one); free_trial(&all);
}

static void show_all_steps(void) {
  printf("\nc: step by step. Left: %d updates, one after each micro-batch; right: their gradients\n"
         "added, then one update with %d times the rate: all see the weights of the start.\n",
         PIECES, PIECES);
  show_steps(SGD);
  show_steps(ADAMW);
  printf("every optimizer: |change| of %d steps, of one, and the angle between\n", PIECES);
  for (int i = 0; i < N_OPTIMIZERS; i++) {
    double rate;
    optimizer_rate(i, &rate);
    Trial one = single_steps(i, rate, PIECES), all = accumulated_step(i, rate, PIECES);
    double *x = play_for_change(&one), *y = play_for_change(&all);
    printf("  %-10s rate %-5g %9.4f %9.4f %6.1f degrees\n", OPTIMIZER[i], rate, norm_of(x, one.n),
           norm_of(y, all.n), angle(x, y, one.n));
    free_trial(&one); free_trial(&all);
  }
}

// K steps of SGD move by rate (g_1 + ... + g_K), each g at another place; one step by the same sum
// with each g at the start. A g changes by rate x something from step to step: so the moves differ
// by rate^2 x something, and are the same in the limit.
static void check_ladder(void) {
  printf("\nd: the ladder. %d steps of SGD against one of %d times the rate: when the rate falls\n"
         "by 10, so does a step, and the difference falls by 100\n"
         "  rate     |change|    |difference|  order\n",
         PIECES, PIECES);
  double last = NAN, order = NAN, rate = 0.1;
  for (int i = 0; i < 5; i++, rate /= 10) {
    Trial one = single_steps(SGD, rate, PIECES), all = accumulated_step(SGD, rate, PIECES);
    double *x = play_for_change(&one), *y = play_for_change(&all);
    double change = norm_of(y, all.n), difference = distance(x, y, all.n) * change;
    order = log10(last / difference);
    printf("  %-8.0e %.3e   %.3e     ", rate, change, difference);
    printf(i ? "%.3f\n" : "\n", order);
    last = difference;
    free_trial(&one); free_trial(&all);
  }
  judge_that(fabs(order - 2) < 0.01, "order of convergence", "%.4f, expected 2", order);
}

// ---- e. Every optimizer against its formula ----

// One update by the book, from the mean gradient; w, m and v as the formulas of the papers have it.
static void plain_update(int optimizer, double *w, double g, double *m, double *v, double rate,
                         double decay, int step) {
  const double b1 = 0.9, b2 = 0.99;
  if (optimizer == ADAMW) *w = *w * (1 - rate * decay);
  else g = g + decay * *w;
  if (optimizer == SGD) *w = *w - rate * g;
  if (optimizer == MOMENTUM) *m = b1 * *m + g, *w = *w - rate * *m;
  if (optimizer == ADAGRAD) *v = *v + g*g, *w = *w - rate * g / (sqrt(*v) + 1e-8);
  if (optimizer == RMSPROP) *v = b2 * *v + (1 - b2) * g*g, *w = *w - rate * g / (sqrt(*v) + 1e-8);
  if (optimizer == ADADELTA) {
    *v = b2 * *v + (1 - b2) * g*g;
    double move = sqrt(*m + 1e-6) / sqrt(*v + 1e-6) * g;
    *m = b2 * *m + (1 - b2) * move*move;
    *w = *w - rate * move;
  }
  if (optimizer == ADAM || optimizer == ADAMW) {
    *m = b1 * *m + (1 - b1) * g;
    *v = b2 * *v + (1 - b2) * g*g;
    double m_hat = *m / (1 - pow(b1, step)), v_hat = *v / (1 - pow(b2, step));
    *w = *w - rate * m_hat / (sqrt(v_hat) + 1e-8);
  }
}

static void plain_step(const Model *lists, Trial *t, double *w, double *m, double *v, int step) {
  double norm = norm_of(t->grad, t->n), clip = norm > t->grad_clip ? t->grad_clip / norm : 1;
  for (long i = 0, at = 0; i < lists->n_parameters; i++) {
    const Entry *e = &lists->parameter[i];
    double decay = e->cols ? t->weight_decay : 0;   // matrices alone
    for (long end = at + entry_count(e); at < end; at++)
      plain_update(t->optimizer, &w[at], clip * t->grad[at], &m[at], &v[at], t->learning_rate,
                   decay, step);
  }
}

// Trials of 1, 2, ... updates: each gives the gradient of its last, from which the formula is
// worked out beside it. The gradient is clipped, and longer than a CHUNK.
static double apart_from_formula(int optimizer) {
  const Config config = {1, 3, 30, 8, LETTERS};
  Model lists = lists_of(config);
  Trial start = new_trial(config, optimizer, 0);
  double *w = start.weights, *m = numbers(start.n), *v = numbers(start.n), apart = 0;
  double *first = numbers(start.n);
  memcpy(first, w, start.n * sizeof(double));
  for (int u = 1; u <= 4; u++) {
    Trial t = new_trial(config, optimizer_rate(optimizer, &start.learning_rate), 0);
    t.learning_rate = start.learning_rate;
    t.updates = u;
    t.weight_decay = 0.1; t.grad_clip = 1;
    for (int k = 0; k < u; k++) {
      Piece piece = {2, 7, 11 * k};
      t.piece[k] = piece;
    }
    play(&t);
    plain_step(&lists, &t, w, m, v, u);
    double change = 0, off = 0;
    for (long i = 0; i < t.n; i++) {
      change = MAX(change, fabs(w[i] - first[i]));
      off = fabs(w[i] - t.weights[i]) <= off ? off : fabs(w[i] - t.weights[i]);
    }
    apart = off / change <= apart ? apart : off / change;
    free_trial(&t);
  }
  free(m); free(v); free(first);
  free_trial(&start);
  free_lists(&lists);
  return apart;
}

static void check_optimizers(void) {
  printf("\ne: every optimizer, 4 updates with clipping and decay, against its formula:\n"
         "the worst weight, relative to the largest change\n");
  for (int i = 0; i < N_OPTIMIZERS; i++) {
    double apart = apart_from_formula(i);
    judge_that(apart < 1e-9, OPTIMIZER[i], "%.1e", apart);
  }
}

// ---- Threads ----
// A sum in another order has another rounding, and a number two threads write has either value: so
// if the bits are the same on any number of threads, then each number has one owner.

static uint64_t training_bits(void) {   // a hash of the weights after some updates
  const Config config = {1, 3, 60, 72, LETTERS};
  Trial t = new_trial(config, ADAMW, 0.01);
  t.accumulate = t.updates = 2;
  for (int k = 0; k < 4; k++) {
    Piece piece = {3, 70, 10 * k};
    t.piece[k] = piece;
  }
  play(&t);
  uint64_t hash = 0;
  for (long i = 0; i < 2 * t.n; i++) {
    uint64_t bits;
    memcpy(&bits, i < t.n ? &t.weights[i] : &t.grad[i - t.n], 8);
    hash = random_bits(hash ^ bits, i);
  }
  free_trial(&t);
  return hash;
}

static void check_threads(const char *self) {
  const int threads[] = {1, 2, 5};
  char command[4200], line[64], all[200] = "";
  unsigned long long first = 0, bits = 0;
  int same = 1;
  for (int i = 0; i < 3; i++) {
    snprintf(command, sizeof command, "'%s' --hash --threads %d", self, threads[i]);
    FILE *child = popen(command, "r");
    if (!child || !fgets(line, sizeof line, child) || sscanf(line, "%llx", &bits) != 1) same = 0;
    if (child && pclose(child)) same = 0;
    if (i == 0) first = bits;
    same &= bits == first;
    snprintf(all + strlen(all), sizeof all - strlen(all), "%016llx ", bits);
  }
  printf("\nThreads: gradients and weights after 2 updates, as a hash of their bits\n");
  judge_that(same, "on 1, 2 and 5 threads", "%s", all);
}

// ---- 6. A model small enough to solve by hand -------------------------------------------------
// price = weight area + bias, mean squared error, by the same layers. The loss is a quadratic: so
// its gradient is linear, its second derivatives are constant, and one Newton step,
//   (weight, bias) -= H^-1 gradient,
// from anywhere is the answer. H is had from gradients: moving a parameter by 1 changes the
// gradient by a column of H, exactly.

enum { HOUSES = 8 };
// In 100 m^2, and in 100 000 of some currency.
static const double AREA[HOUSES] = {0.5, 1.4, 0.8, 1.9, 1.6, 0.7, 1.1, 1.0};
static const double PRICE[HOUSES] = {1.32, 3.29, 2.05, 4.41, 3.88, 1.71, 2.76, 2.38};

typedef struct {
  Affine p;                     // weight.data[0], bias.data is the number after it
  Tensor x, y, loss;            // of all houses
  real *target;
  int first, n;                 // the houses of this micro-batch
  double dloss;
  Update update;
  Stats *stats;
} Houses;

static Tensor from_row(Tensor t, int n) { Tensor u = {t.data + n, t.grad + n}; return u; }

static void houses_gradient(void *argument) {   // adds that of n houses from the first on
  Houses *h = (Houses *)argument;
  Tensor x = from_row(h->x, h->first), y = from_row(h->y, h->first);
  Tensor loss = from_row(h->loss, h->first);
  linear_forward(y, x, h->p, h->n, 1, 1);
  squared_error_forward(loss, y, h->target + h->first, h->n, 1);
  fill(loss.grad, h->n, (real)h->dloss);
  squared_error_backward(loss, y, h->target + h->first, h->n, 1);
  linear_backward(y, x, h->p, h->n, 1, 1);
}

static void houses_update(void *argument) {
  Houses *h = (Houses *)argument;
  optimizer_update(h->p.weight, NULL, NULL, 2, h->update, h->stats);
  zero(h->p.weight.grad, 2);
}

static Tensor new_tensor(int n) {
  Tensor t = {(real *)device_alloc(n * sizeof(real)), (real *)device_alloc(n * sizeof(real))};
  return t;
}

static Houses open_houses(void) {
  Houses h;
  memset(&h, 0, sizeof h);
  h.p.weight = new_tensor(2);
  h.p.bias = from_row(h.p.weight, 1);
  h.x = new_tensor(HOUSES); h.y = new_tensor(HOUSES); h.loss = new_tensor(HOUSES);
  h.target = (real *)device_alloc(HOUSES * sizeof(real));
  h.stats = (Stats *)device_alloc(sizeof(Stats));
  put(h.x.data, AREA, HOUSES);
  put(h.target, PRICE, HOUSES);
  h.update.optimizer = SGD;
  return h;
}

static void close_houses(Houses *h) {
  Tensor all[] = {h->p.weight, h->x, h->y, h->loss};
  for (int i = 0; i < 4; i++) device_free(all[i].data), device_free(all[i].grad);
  device_free(h->target);
  device_free(h->stats);
}

// The gradient of the mean over all houses at some weight and bias; returns the loss.
static double gradient_at(Houses *h, const double *parameters, double *grad) {
  double zeros[2] = {0, 0}, each[HOUSES], loss = 0;
  put(h->p.weight.data, parameters, 2);
  put(h->p.weight.grad, zeros, 2);
  h->first = 0; h->n = HOUSES; h->dloss = 1.0 / HOUSES;
  launch(houses_gradient, h);
  get(grad, h->p.weight.grad, 2);
  get(each, h->loss.data, HOUSES);
  put(h->p.weight.grad, zeros, 2);
  for (int n = 0; n < HOUSES; n++) loss += each[n] / HOUSES;
  return loss;
}

static void newton_step(Houses *h, double *p) {
  double g[2], column[2][2];
  gradient_at(h, p, g);
  for (int i = 0; i < 2; i++) {
    double moved[2] = {p[0] + (i == 0), p[1] + (i == 1)};
    gradient_at(h, moved, column[i]);
    for (int j = 0; j < 2; j++) column[i][j] -= g[j];
  }
  double det = column[0][0] * column[1][1] - column[0][1] * column[1][0];
  p[0] -= (column[1][1] * g[0] - column[1][0] * g[1]) / det;
  p[1] -= (column[0][0] * g[1] - column[0][1] * g[0]) / det;
}

typedef struct { long updates; double p[2], loss; } Solution;

// Updates after each `per_update` houses, in micro-batches of `at_once`, until the loss is within
// 1e-6 of the least.
static Solution descend(Houses *h, int at_once, int per_update, double rate, double least) {
  Solution s = {0, {0, 0}, 0};
  double grad[2];
  h->update.learning_rate = (real)rate;
  for (s.loss = 1e9; s.updates < 20000 && s.loss >= least + 1e-6; ) {   // false for NaN
    gradient_at(h, s.p, grad);   // leaves the parameters on the device
    h->dloss = 1.0 / per_update;
    h->n = at_once;
    for (int n = 0; n < HOUSES; n += per_update, s.updates++) {
      for (h->first = n; h->first < n + per_update; h->first += at_once) launch(houses_gradient, h);
      launch(houses_update, h);
    }
    get(s.p, h->p.weight.data, 2);
    s.loss = gradient_at(h, s.p, grad);
  }
  return s;
}

static void print_solution(const char *name, Solution s, double passes) {
  printf("  %-44s %8.4f %8.4f  %.8f %8ld %7g\n", name, s.p[0], s.p[1], s.loss, s.updates, passes);
}

// For the Transformer: how the gradient changes along a line. In a quadratic twice as far is twice
// the change, at any distance.
static double twice_as_far(double distance_moved) {
  double *g[3], sum[2] = {0, 0};
  Piece piece = {3, 7, 5};
  for (int k = 0; k < 3; k++) {
    Trial t = new_trial(TINY, SGD, 0);
    t.piece[0] = piece;
    for (long i = 0; k && i < t.n; i++)
      t.weights[i] -= k * distance_moved * g[0][i] / norm_of(g[0], t.n);
    play(&t);
    g[k] = t.grad;
    free(t.weights);
    for (long i = 0; k && i < t.n; i++) sum[k - 1] += pow(g[k][i] - g[0][i], 2);
  }
  for (int k = 0; k < 3; k++) free(g[k]);
  return sqrt(sum[1] / sum[0]);
}

static void check_regression(void) {
  Houses h = open_houses();
  double sx = 0, sy = 0, sxx = 0, sxy = 0, n = HOUSES, grad[2];
  for (int i = 0; i < HOUSES; i++)
    sx += AREA[i], sy += PRICE[i], sxx += AREA[i] * AREA[i], sxy += AREA[i] * PRICE[i];
  double weight = (n * sxy - sx * sy) / (n * sxx - sx * sx);   // the normal equations
  double best[2] = {weight, (sy - weight * sx) / n}, least = gradient_at(&h, best, grad);
  printf("\nA model small enough to solve by hand: price = weight area + bias, %d houses; until\n"
         "the loss is within 1e-6 of the least\n  %-44s %8s %8s  %-10s %8s %7s\n", HOUSES, "",
         "weight", "bias", "loss", "updates", "passes");
  Solution all[4];
  all[0] = descend(&h, 1, 1, 0.008, least);
  all[1] = descend(&h, 1, 4, 0.01, least);
  all[2] = descend(&h, HOUSES, HOUSES, 0.3, least);
  Solution newton = {1, {0, 0}, 0};
  newton_step(&h, newton.p);
  newton.loss = gradient_at(&h, newton.p, grad);
  all[3] = newton;
  print_solution("an update per house, rate 0.008", all[0], (double)all[0].updates / HOUSES);
  print_solution("4 houses accumulated, one update, rate 0.01", all[1],
                 (double)all[1].updates * 4 / HOUSES);
  print_solution("full batch, rate 0.3", all[2], (double)all[2].updates);
  print_solution("one-shot: a Newton step", all[3], 3);
  Solution book = {0, {best[0], best[1]}, least};
  print_solution("the normal equations", book, 1);
  double worst = 0;
  for (int i = 0; i < 4; i++)
    worst = all[i].loss - least <= worst ? worst : all[i].loss - least;   // a NaN is the worst
  judge_that(worst < 1e-6, "all four meet", "loss within %.1e of the least", worst);
  double off = hypot(newton.p[0] - best[0], newton.p[1] - best[1]);
  judge_that(off < 1e-12, "one Newton step is the answer", "%.1e from the normal equations", off);
  double near = twice_as_far(1e-4), far = twice_as_far(1);
  printf("No such step exists for the Transformer: softmax, GELU and products of weights make its\n"
         "loss no quadratic, and what Newton's step relies on holds only near by. When a\n"
         "quadratic's weights move twice as far, its gradient changes by twice as much, however\n"
         "far that is; the Transformer's, for 1e-4 and 2e-4, by %.4f times; for 1 and 2 by %.4f.\n",
         near, far);
  judge_that(fabs(near - 2) < 0.01 && fabs(far - 2) > 0.05,
             "the Transformer's loss is no quadratic", "%.4f is not 2", far);
  close_houses(&h);
}

// ---- 7. Somebody else's numbers ---------------------------------------------------------------
// --save writes all there is to know of one step of the tiny model, in double: tokens and targets
// (B,T), as numbers; every parameter, under its name in Hugging Face's GPT-2; every activation
// (N,..) as layout() calls it, `loss` being that of each token; grad.NAME of the mean loss for all
// of them; and updated.NAME: each parameter after SGD with rate 0.1. Any program can start from the
// same tokens and parameters, and write what it found under these names; --against compares what is
// in such a file, and does not mind what is not.

enum { MOST_SAVED = 400 };
typedef struct {
  Whole before, after;          // the update
  real *tokens[2];
  Numbers list[MOST_SAVED];
  int n;
} Snapshot;

static void add_numbers(Snapshot *s, const char *prefix, const char *name, int rows, int cols,
                        const real *data) {
  assert(s->n < MOST_SAVED);
  Numbers x = {prefix, name, rows, cols, data};
  if (data) s->list[s->n++] = x;
}

static void add_tokens(Snapshot *s, int which, const char *name, const int *device, Piece p) {
  int tokens[64];
  double as_numbers[64];
  copy_out(tokens, device, p.B * p.T * sizeof(int));
  for (int i = 0; i < p.B * p.T; i++) as_numbers[i] = tokens[i];
  s->tokens[which] = (real *)device_alloc(p.B * p.T * sizeof(real));
  put(s->tokens[which], as_numbers, p.B * p.T);
  add_numbers(s, "", name, p.B, p.T, s->tokens[which]);
}

static void open_snapshot(Snapshot *s) {
  Piece piece = {3, 7, 5};
  memset(s, 0, sizeof *s);
  open_whole(&s->before, piece, 1);
  open_whole(&s->after, piece, 1);
  Model *m = &s->before.m, *after = &s->after.m;
  launch(micro_batch, &s->before.batch);
  launch(micro_batch, &s->after.batch);
  opt.optimizer = OPTIMIZER[SGD];
  opt.weight_decay = opt.grad_clip = 0;
  UpdateStep step = {after, update_values(0, 0.1), 0};
  launch(update_step, &step);
  add_tokens(s, 0, "tokens", m->token, piece);
  add_tokens(s, 1, "targets", m->target, piece);
  for (int i = 0; i < m->n_parameters + m->n_activations; i++) {
    int own = i < m->n_parameters;
    Entry *e = own ? &m->parameter[i] : &m->activation[i - m->n_parameters];
    add_numbers(s, "", e->name, e->rows, e->cols, e->tensor->data);
    add_numbers(s, "grad.", e->name, e->rows, e->cols, e->tensor->grad);
    if (own)
      add_numbers(s, "updated.", e->name, e->rows, e->cols, after->parameter[i].tensor->data);
  }
}

static void close_snapshot(Snapshot *s) {
  close_whole(&s->before);
  close_whole(&s->after);
  for (int i = 0; i < 2; i++) device_free(s->tokens[i]);
}

static void save_snapshot(const char *path) {
  Snapshot s;
  open_snapshot(&s);
  safetensors_write(path, s.list, s.n, "{\"format\":\"pt\"}");
  printf("%s: %d tensors of a step of L %d, H %d, C %d, V %d, on %d sequences of %d tokens\n",
         path, s.n, TINY.n_layer, TINY.n_head, TINY.n_embd, LETTERS, 3, 7);
  close_snapshot(&s);
}

static double bar_for(const char *dtype) {   // what rounding to this precision excuses
  return !strcmp(dtype, "F64") ? BAR : !strcmp(dtype, "F32") ? 1e-4 : !strcmp(dtype, "F16") ? 0.02
       : 0.1;
}

static void compare_saved(const Safetensors *theirs, const Saved *saved, const Numbers *mine) {
  char name[80];
  long n = (long)mine->rows * MAX(1, mine->cols), their_n = 1;
  Shape shape = {3, 7, TINY.n_embd, TINY.n_head, LETTERS, 0};
  for (int d = 0; d < saved->dims; d++) their_n *= saved->shape[d];
  snprintf(name, sizeof name, "%s%s", mine->prefix, mine->name);
  if (their_n != n) {
    judge_that(0, name, "has %ld numbers, expected %ld", their_n, n);
    return;
  }
  real *read = safetensors_read(theirs, saved);
  double *got = numbers(n), *want = numbers(n);
  for (long i = 0; i < n; i++) got[i] = read[i];
  get(want, mine->data, n);
  Comparison row = {name, saved->dtype, mine->rows, MAX(1, mine->cols), got, want, NULL, &shape,
                    bar_for(saved->dtype)};
  judge(row);
  free(read); free(got); free(want);
}

static void check_against(const char *path) {
  Snapshot s;
  Safetensors theirs = safetensors_open(path);
  int known = 0;
  open_snapshot(&s);
  heading(path, "here");
  for (int i = 0; i < s.n; i++) {
    const Saved *saved = safetensors_find(&theirs, s.list[i].prefix, s.list[i].name);
    if (saved) compare_saved(&theirs, saved, &s.list[i]), known++;
  }
  if (known < theirs.n)
    printf("%d tensors have names that --save does not use, and were not looked at\n",
           theirs.n - known);
  if (!known) judge_that(0, path, "has no tensor under a name that --save uses");
  close_snapshot(&s);
  safetensors_close(&theirs);
}

// ---- 8. Main ----------------------------------------------------------------------------------

static struct { int threads, hash; const char *save, *against; } asked;
static Option options[] = {
  {"threads", INTEGER, &asked.threads, "1", 1, 1024, 0, "threads; results do not depend on it", 0},
  {"save", TEXT, &asked.save, NULL, 0, 0, 0, "write a step of a tiny model as safetensors", 0},
  {"against", TEXT, &asked.against, NULL, 0, 0, 0, "compare it with somebody else's file", 0},
  {"hash", FLAG, &asked.hash, NULL, 0, 0, 0, "print a hash of some updates", 0},
  {NULL, FLAG, NULL, NULL, 0, 0, 0, NULL, 0}};

// The layers that were named, as they are in the table; a name that is in none is an error.
static void check_names(const char **names, int n) {
  for (int i = 0; i < n; i++) {
    int near = 0, found = 0;
    for (int k = 0; k < n_layers; k++) {
      found |= !strcmp(names[i], layers[k]->name);
      if (edit_distance(names[i], layers[k]->name) < edit_distance(names[i], layers[near]->name))
        near = k;
    }
    if (!found) die("%s is no layer; the nearest is %s, --help lists all", names[i],
                    layers[near]->name);
  }
}

static void print_summary(double started) {
  printf("\nworst relative errors:\n");
  for (int i = 0; i < n_layers; i++)
    if (layers[i]->worst >= 0) printf("  %-16s %.1e\n", layers[i]->name, layers[i]->worst);
  printf("%.1f s\n", seconds() - started);
  checking = NULL;
  if (failed) printf("the first failure: %s\n", first_failure);
  printf("%d passed, %d failed\n", passed, failed);
}

int main(int argc, char **argv) {
  const char *names[32];
  String usage = {NULL, 0, 0};
  double started = seconds();
  program = "test_gradients";
  append(&usage, "usage: test_gradients [LAYER...] [options]\n\nChecks every gradient,"
         " or those of the layers that are named:\n ");
  for (int i = 0; i < n_layers; i++) append(&usage, " %s", layers[i]->name);
  append(&usage, "\n");
  int n = parse_options(options, argc, argv, usage.at, names, 32);
  check_names(names, n);
  device_start(asked.threads);
  if (asked.hash) {
    printf("%016llx\n", (unsigned long long)training_bits());
    return 0;
  }
  if (asked.save) {
    save_snapshot(asked.save);
    return 0;
  }
  if (asked.against) {
    check_against(asked.against);
    printf("%d passed, %d failed\n", passed, failed);
    return failed > 0;
  }
  watch_for_crashes();
  check_layers(names, n);
  checking = "the whole model";
  if (!n) check_sums();
  if (!MOVE_EACH) {          // the search for races: each kernel has run, now some updates
    if (!n) printf("%016llx\n", (unsigned long long)training_bits());
    print_summary(started);
    return failed > 0;
  }
  if (!n) check_model();
  if (failed) printf("\nWhat follows is left out: it stands on gradients, and some are wrong.\n");
  else if (!n) {
    check_float_and_double();
    check_accumulation(IN_FLOAT);
    check_recipes();
    show_all_steps();
    check_ladder();
    check_optimizers();
    check_threads(argv[0]);
    check_regression();
  }
  print_summary(started);
  return failed > 0;
}
#endif   // LEND
