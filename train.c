// train.c trains a GPT from any text file: every layer forward and backward by hand, in plain C.
// What is not here is not needed: libc, libm and pthreads are all it stands on.
//
// The whole model, x[n,:] being one token's row of C numbers:
//
//   x = wte[token] + wpe[position]                           embedding
//   for each of L blocks:
//     x = x + attention(layernorm(x) Wqkv) Wproj             tokens look at earlier tokens
//     x = x + gelu(layernorm(x) Wfc) Wproj                   each token thinks for itself
//   logits = layernorm(x) wte^T                              the head; wte is used twice: "tied"
//   loss = mean over tokens of -log softmax(logits)[next token]
//   backward: the same lines from bottom to top, each giving d loss / d its inputs
//   update: w -= learning_rate * what an optimizer makes of the gradient
//
// Letters: B sequences of T tokens, N = B*T rows, C channels, H heads of D = C/H channels,
// L layers, V words in the vocabulary (256: a token is a byte), O outputs of a linear layer.
// dx is the gradient of the loss with respect to x, and has x's shape.
//
// Read in this order: forward() and backward() in room 5, then the layers in room 3, one pair at a
// time beside ./test_gradients, then train() in room 9. Rooms: 1 helpers, 2 threads, 3 layers,
// 4 model, 5 forward and backward, 6 optimizers, 7 data, 8 checkpoint, 9 training, 10 options and
// main. train_gpu.cu has the same rooms: it implements 2, 3 and 6 as CUDA, and includes the rest.
//
//   make run                              the default text, two minutes, then a sample
//   ./train shakespeare.txt --n_layer 6   any text; ./train --help lists the options

#include <assert.h>
#include <ctype.h>
#include <errno.h>
#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

// ---- 1. Helpers -------------------------------------------------------------------------------

#ifndef REAL
#define REAL float   // -DREAL=double for the gradient checker
#endif
typedef REAL real;

// A value and the gradient of the loss with respect to it, of the same shape, row-major. Forward
// fills data, backward fills grad. On a GPU both point to device memory.
typedef struct { real *data, *grad; } Tensor;
typedef struct { Tensor weight, bias; } Affine;   // the parameters of a linear layer or a layernorm

#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))

#ifndef PROGRAM
#define PROGRAM "train"
#endif
static const char *program = PROGRAM;   // whose messages these are
static int line_is_open;   // on a terminal: the live line waits to be written over

// The one way out on an error: what was found, what was expected, what to do.
__attribute__((noreturn, format(printf, 1, 2)))
static void die(const char *format, ...) {
  va_list args;
  va_start(args, format);
  if (line_is_open) printf("\n");
  fflush(stdout);
  fprintf(stderr, "%s: ", program);
  vfprintf(stderr, format, args);
  fprintf(stderr, "\n");
  va_end(args);
  exit(1);
}

// Memory of the host, or the end of the program: realloc, and with NULL a malloc.
static void *host_alloc(void *p, size_t bytes) {
  p = realloc(p, MAX(bytes, 1));
  if (!p) die("no memory for %.1f MB: take a smaller model or text", bytes / 1e6);
  return p;
}

#ifndef DEVICE
#define DEVICE   // in CUDA, what also runs inside kernels: __host__ __device__
#endif
DEVICE static inline real sqrt_(real x) {   // sqrtf for float: sqrt would compute in double
  return sizeof(real) == sizeof(float) ? (real)sqrtf((float)x) : (real)sqrt((double)x);
}

static double seconds(void) {   // since some fixed moment
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec + 1e-9 * now.tv_nsec;
}

// Random numbers without a state: a hash of (seed, index), SplitMix64 (Steele et al. 2014). Any
// number of the sequence can be had at once, so a resumed run needs no generator saved.
static uint64_t random_bits(uint64_t seed, uint64_t index) {
  uint64_t z = seed * 0xd1342543de82ef95u + (index + 1) * 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

static double random_uniform(uint64_t seed, uint64_t index) {   // in [0, 1)
  return (random_bits(seed, index) >> 11) * 0x1p-53;
}

static double random_normal(uint64_t seed, uint64_t index) {   // Box and Muller 1958
  double u = 1 - random_uniform(seed, 2*index), v = random_uniform(seed, 2*index + 1);
  return sqrt(-2 * log(u)) * cos(6.283185307179586 * v);
}

// ---- The seam ---------------------------------------------------------------------------------
// All that touches numbers, or the memory they are in, is one of the functions below. train.c has
// them for the CPU, train_gpu.cu as CUDA kernels; whatever calls them exists once, in this file.
// Arguments are listed output first. Forward and backward of a layer take the same ones, so
// backward() is forward() read from bottom to top. Who writes a gradient how:
//   - parameters: backward adds (+=). They are zeroed once per update, and that alone is what makes
//     several micro-batches one update;
//   - activations have one reader, whose backward sets (=) the gradient. But the stream x is read
//     by a layernorm and by a residual: the residual sets dx, and the layernorm, which comes later
//     in backward, adds to it.

typedef struct { double loss, hits, norm2; } Stats;   // sums over the tokens of an update; |grad|^2

enum Optimizer { SGD, MOMENTUM, ADAGRAD, ADADELTA, RMSPROP, ADAM, ADAMW, N_OPTIMIZERS };
static const char *const OPTIMIZER[N_OPTIMIZERS] = {
  "sgd", "momentum", "adagrad", "adadelta", "rmsprop", "adam", "adamw"};
typedef struct {           // what an update needs beside the numbers themselves
  int optimizer;           // enum Optimizer
  real learning_rate, beta1, beta2, weight_decay, grad_clip;
  real unbias_m, unbias_v; // Adam's 1 / (1 - beta^step): its memories start at zero
} Update;

// Room 2: where numbers live, and who works. Sizes are in bytes; no memory is an error that ends
// the program. launch() runs work(argument) on every thread. launch_again() does the same, and
// promises that this work on this argument is the same calls with the same values each time, so
// that a GPU may record it once and replay it.
static const char *device_start(int threads);      // returns the device in words
static void device_precision(const char *name);    // of matmul: "fp32", or "tf32" on a GPU
static double device_memory(void);                 // how many bytes there are; 0: unknown
static void *device_alloc(size_t bytes);           // zeroed
static void device_free(void *p);
static void copy_in(void *device, const void *host, size_t bytes);
static void copy_out(void *host, const void *device, size_t bytes);
static void launch(void (*work)(void *), void *argument);
static void launch_again(void (*work)(void *), void *argument);

// Room 3. Shapes: out, x, f (N,C); wte (V,C); wpe (T,C); stats (N,2); y (N,O); weight (C,O);
// qkv (N,3C); lse (B,H,T); logits (N,V); loss, hit, row_lse (N). A target is in 0..V-1.
static void zero(real *x, long n);
static void fill(real *x, long n, real value);
static void embedding_forward(Tensor out, const int *token, Tensor wte, Tensor wpe,
                              int B, int T, int C);
static void embedding_backward(Tensor out, const int *token, Tensor wte, Tensor wpe,
                               int B, int T, int C);
static void layernorm_forward(Tensor out, Tensor stats, Tensor x, Affine p, int N, int C);
static void layernorm_backward(Tensor out, Tensor stats, Tensor x, Affine p, int N, int C);
static void linear_forward(Tensor y, Tensor x, Affine p, int N, int C, int O);
static void linear_backward(Tensor y, Tensor x, Affine p, int N, int C, int O);
static void attention_forward(Tensor out, Tensor lse, Tensor qkv, int B, int T, int C, int H);
static void attention_backward(Tensor out, Tensor lse, Tensor qkv, int B, int T, int C, int H);
static void gelu_forward(Tensor y, Tensor x, int N, int C);
static void gelu_backward(Tensor y, Tensor x, int N, int C);
static void residual_forward(Tensor out, Tensor x, Tensor f, int N, int C);
static void residual_backward(Tensor out, Tensor x, Tensor f, int N, int C);
static void head_forward(Tensor logits, Tensor x, Tensor wte, int N, int C, int V);
static void head_backward(Tensor logits, Tensor x, Tensor wte, int N, int C, int V);
static void crossentropy_forward(Tensor loss, Tensor hit, Tensor row_lse, Tensor logits,
                                 const int *target, int N, int V);
static void crossentropy_backward(Tensor loss, Tensor hit, Tensor row_lse, Tensor logits,
                                  const int *target, int N, int V);
// No GPT ends in a squared error, but the regression in test_gradients.c does.
__attribute__((unused))
static void squared_error_forward(Tensor loss, Tensor y, const real *target, int N, int O);
__attribute__((unused))
static void squared_error_backward(Tensor loss, Tensor y, const real *target, int N, int O);

// Room 6. n numbers each, a thread taking CHUNK of them at a time; partial is scratch for chunks(n)
// doubles.
enum { CHUNK = 4096 };
static long chunks(long n) { return (n + CHUNK - 1) / CHUNK; }
static void add_loss(Stats *stats, Tensor loss, Tensor hit, int N);
static void keep_stats(Stats *kept, Stats *current);
static void gradient_norm(Stats *stats, double *partial, const real *grad, long n);
static void optimizer_update(Tensor w, real *m, real *v, long n, Update u, const Stats *stats);

// For --profile. lap() is the last line of a function that takes time: all the time since the lap
// before it was this function's, in which it did so many operations, or moved so many bytes. (No
// part of the mathematics: readers may skip it everywhere.) profile_add() is in room 9.
static int profiling;
static void lap(const char *name, double flop, double bytes);
static void profile_add(const char *name, double seconds, double flop, double bytes);

#ifndef GPU
// ---- 2. Threads -------------------------------------------------------------------------------
// One program, every thread: launch() makes all threads run the same function, say forward(), and
// in each parallel_for they share the iterations, then wait for each other. The rules:
//   - code outside a parallel_for runs on every thread, so it may only set locals;
//   - never return from a parallel_for, nest it, or let only some threads reach it;
//   - each iteration owns what it writes: no two write the same word, so there are no locks, and
//     every sum is added in the same order, whoever adds it: results are bit for bit the same on
//     any number of threads.

static int n_threads = 1;
static __thread int thread_id;
static struct {            // on cache lines of their own: one is written while the other is watched
  int arrived; char pad1[60];
  int phase; char pad2[60];
} gate;

// Waits until all threads are here. The wait spins first (the others are microseconds away), then
// lets others run, then sleeps: between two launches the threads cost nothing.
static void barrier(void) {
  int phase = __atomic_load_n(&gate.phase, __ATOMIC_RELAXED);
  if (__atomic_add_fetch(&gate.arrived, 1, __ATOMIC_ACQ_REL) == n_threads) {
    __atomic_store_n(&gate.arrived, 0, __ATOMIC_RELAXED);
    __atomic_store_n(&gate.phase, phase + 1, __ATOMIC_RELEASE);   // opens the gate
    return;
  }
  struct timespec nap = {0, 50000};
  for (int spins = 0; __atomic_load_n(&gate.phase, __ATOMIC_ACQUIRE) == phase; spins++)
    if (spins > 20000) nanosleep(&nap, NULL);
    else if (spins > 2000) sched_yield();
}

// for (i = 0; i < n; i++), shared among the threads; a barrier at the end. The outer loop runs once
// and its third part is the barrier: so it is reached after a break, too.
#define parallel_for(i, n)                                                                  \
  for (int once_ = 1; once_; once_ = 0, barrier())                                          \
    for (long i = (long)(n) * thread_id / n_threads,                                        \
              end_ = (long)(n) * (thread_id + 1) / n_threads; i < end_; i++)

static void (*launched)(void *);   // what all threads run now
static void *its_argument;

static void *worker(void *id) {
  for (thread_id = (int)(intptr_t)id; ; barrier()) {   // that barrier: all have done it
    barrier();                                         // this one: something is launched
    launched(its_argument);
  }
  return NULL;
}

static const char *device_start(int threads) {
  n_threads = threads;
  for (int i = 1; i < threads; i++) {
    pthread_t thread;
    if (pthread_create(&thread, NULL, worker, (void *)(intptr_t)i))
      die("the system gave %d threads, asked for %d: lower --threads", i, threads);
    pthread_detach(thread);
  }
  return "CPU";
}

static void device_precision(const char *name) {
  if (strcmp(name, "fp32")) die("--precision %s: the CPU has fp32, ./train_gpu also tf32", name);
}

static void launch(void (*work)(void *), void *argument) {
  launched = work; its_argument = argument;
  barrier();
  work(argument);
  barrier();
}

static void launch_again(void (*work)(void *), void *argument) { launch(work, argument); }

static double device_memory(void) {
  return (double)sysconf(_SC_PHYS_PAGES) * sysconf(_SC_PAGESIZE);
}

static void *device_alloc(size_t bytes) {
  void *p;
  if (posix_memalign(&p, 64, MAX(bytes, 1)))
    die("no memory for %.1f MB: lower --batch_size, --block_size, --n_embd or --n_layer",
        bytes / 1e6);
  memset(p, 0, bytes);
  return p;
}
static void device_free(void *p) { free(p); }
static void copy_in(void *device, const void *host, size_t bytes) { memcpy(device, host, bytes); }
static void copy_out(void *host, const void *device, size_t bytes) { memcpy(host, device, bytes); }

static void lap(const char *name, double flop, double bytes) {
  static double last;
  if (!profiling || thread_id != 0) return;
  double now = seconds();
  if (name) profile_add(name, now - last, flop, bytes);   // no name: the clock starts
  last = now;
}

// ---- 3. Layers --------------------------------------------------------------------------------

// The matmul. C = A B, (M,N) = (M,K) (K,N): three quarters of training's time go here, so this is
// the one place, with attention, that is written for speed. From the top of the ladder down:
//   1. The naive three loops load two numbers for each multiply-add, and wait for memory.
//   2. A tile of C, ROWS x 2 vectors, stays in registers while K products are added to it: then
//      a step of k loads ROWS numbers of A and 2 vectors of B for 2*ROWS vector multiply-adds.
//   3. A tile walks down the rows of A against one panel of B, DEPTH x COLUMNS, which stays in the
//      core's own cache. The panel is a packed copy of B: consecutive whatever B's strides are, so
//      that a transposed B costs a strided walk once, not in every tile. A is read where it is,
//      but if it is transposed, then it is packed, too, in panels of ROWS rows.
//   4. C is cut into jobs of some rows x some panels, shared among the threads.
// An element of C is always the same sum in the same order, wherever the cuts are.
// vec is as wide as the machine's registers: the compiler makes AVX-512, AVX2 or NEON of it.

#if defined __AVX512F__
enum { VECTOR_BYTES = 64, ROWS = 12 };   // 32 registers: 12 x 2 sums, 2 of B, 1 of A
#elif defined __AVX__
enum { VECTOR_BYTES = 32, ROWS = 6 };    // 16 registers: 6 x 2 sums, 2 of B, 1 of A
#elif defined __aarch64__
enum { VECTOR_BYTES = 16, ROWS = 8 };    // 32 registers of NEON
#else
enum { VECTOR_BYTES = 16, ROWS = 4 };    // 16 registers of SSE2, or whatever there is
#endif
typedef real vec __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(real)), may_alias));
enum {
  VECTOR = VECTOR_BYTES / sizeof(real), COLUMNS = 2 * VECTOR,   // of a tile
  DEPTH = 2048 / sizeof(real),   // of a panel of B: 512 floats x 32 columns are 64 KB
  LINE = 64 / sizeof(real),      // of the cache
  AHEAD = 4096 / sizeof(real),   // a panel is asked for so many numbers before they are needed
  BLOCK = 384                    // rows of a job at most, a multiple of ROWS: of A 768 KB
};
#define UNROLL _Pragma("GCC unroll 16")   // keeps the sums of a tile in registers

// A matrix as it lies in memory: element (i,j) is at[i*row + j*column]. The transpose is the same
// memory with the strides exchanged.
typedef struct { const real *at; long row, column; } Matrix;
static Matrix rows_of(const real *at, long width) { Matrix m = {at, width, 1}; return m; }
static Matrix transpose(Matrix m) { Matrix t = {m.at, m.column, m.row}; return t; }
static Matrix part_of(Matrix m, long i, long j) { m.at += i*m.row + j*m.column; return m; }

// Copies the depth x columns matrix m into a panel of depth x width, padded with zeros.
__attribute__((always_inline))
static inline void pack(real *panel, int width, Matrix m, int depth, int columns) {
  int k = 0;
  if (columns == width && m.column == 1)
    for (; k < depth; k++) memcpy(panel + k*width, m.at + k*m.row, width * sizeof(real));
  if (columns == width && m.row == 1)
    for (; k + LINE <= depth; k += LINE)          // a cache line of each of m's columns at a time
      for (int j = 0; j < width; j++) {
        __builtin_prefetch(m.at + k + (j + width)*m.column);   // the next panel's
        for (int i = 0; i < LINE; i++) panel[(k + i)*width + j] = m.at[k + i + j*m.column];
      }
  for (; k < depth; k++)
    for (int j = 0; j < width; j++)
      panel[k*width + j] = j < columns ? m.at[k*m.row + j*m.column] : 0;
}

// c[i,j] = (add ? c[i,j] : bias ? bias[j] : 0) + sum_k a[i,k] panel[k,j], for one tile of C of
// rows <= most <= ROWS. `most` is a constant in each caller: then its sums are kept in registers.
__attribute__((always_inline))
static inline void tile_of(const int most, real *c, long c_row, Matrix a, const real *panel,
                           int rows, int columns, int depth, int add, const real *bias) {
  static const real zeros[COLUMNS] = {0};
  vec sum[ROWS][2];
  const real *row[ROWS];
  UNROLL for (int i = 0; i < most; i++) {
    row[i] = a.at + MIN(i, rows - 1)*a.row;       // rows that are not there repeat the last
    sum[i][0] = sum[i][1] = (vec){0};
  }
  for (int k = 0; k < depth; k++, panel += COLUMNS) {
    for (int j = 0; j < COLUMNS; j += LINE)       // of use where a panel is far: in generate.c
      __builtin_prefetch(panel + AHEAD + j);
    vec b0 = *(const vec *)panel, b1 = *(const vec *)(panel + VECTOR);
    UNROLL for (int i = 0; i < most; i++) {
      real x = row[i][k*a.column];
      sum[i][0] += x * b0;
      sum[i][1] += x * b1;
    }
  }
  UNROLL for (int i = 0; i < most; i++) {
    if (i == rows) break;
    real *y = c + i*c_row, s[COLUMNS];
    const real *from = add ? y : bias ? bias : zeros;
    if (columns == COLUMNS) {                     // by far the most: two whole vectors
      vec y0 = sum[i][0] + *(const vec *)from, y1 = sum[i][1] + *(const vec *)(from + VECTOR);
      *(vec *)y = y0;
      *(vec *)(y + VECTOR) = y1;
    } else {
      memcpy(s, sum[i], sizeof s);
      for (int j = 0; j < columns; j++) y[j] = s[j] + from[j];
    }
  }
}

// A function of its own on purpose: inlined, GCC runs out of registers and spills the sums.
__attribute__((noinline))
static void tile(real *c, long c_row, Matrix a, const real *panel, int rows, int columns, int depth,
                 int add, const real *bias) {
  tile_of(ROWS, c, c_row, a, panel, rows, columns, depth, add, bias);
}

// C = A B + bias, or C += A B, by one thread; C is (M,N) with rows c_row apart, and M <= BLOCK.
static void matmul_job(real *c, long c_row, Matrix a, Matrix b, int M, int N, int K, int add,
                       const real *bias) {
  static __thread real a_panel[BLOCK * DEPTH] __attribute__((aligned(64)));
  static __thread real b_panel[DEPTH * COLUMNS] __attribute__((aligned(64)));
  assert(M <= BLOCK);
  for (int k = 0; k < K; k += DEPTH) {
    int depth = MIN(DEPTH, K - k);
    if (a.column != 1)
      for (int i = 0; i < M; i += ROWS)
        pack(a_panel + i*depth, ROWS, part_of(transpose(a), k, i), depth, MIN(ROWS, M - i));
    Matrix packed = {NULL, 1, ROWS};              // (i,k) of a tile's rows, as pack() left them
    for (int j = 0; j < N; j += COLUMNS) {
      pack(b_panel, COLUMNS, part_of(b, k, j), depth, MIN(COLUMNS, N - j));
      for (int i = 0; i < M; i += ROWS) {
        packed.at = a_panel + i*depth;
        tile(c + i*c_row + j, c_row, a.column == 1 ? part_of(a, i, k) : packed, b_panel,
             MIN(ROWS, M - i), MIN(COLUMNS, N - j), depth, add || k > 0, bias ? bias + j : NULL);
      }
    }
  }
}

// The same by all threads, for any M. C is cut into blocks of rows, of even height, and each into
// its panels; a thread takes panels that follow each other, and does those of a block in one job:
// so a transposed A is packed once by each thread, not for every panel.
static void matmul(real *c, long c_row, Matrix a, Matrix b, int M, int N, int K, int add,
                   const real *bias) {
  int panels = (N + COLUMNS - 1) / COLUMNS, tiles = (M + ROWS - 1) / ROWS;
  int blocks = (M + BLOCK - 1) / BLOCK;           // more if there are not panels for all threads
  blocks = MAX(blocks, MIN(tiles, (n_threads + panels - 1) / MAX(panels, 1)));
  parallel_for (part, n_threads) {
    long begin = (long)blocks * panels * part / n_threads;
    long end = (long)blocks * panels * (part + 1) / n_threads;
    for (long from = begin, to; from < end; from = to) {
      long block = from / panels;
      to = MIN(end, (block + 1) * panels);
      int i = tiles * block / blocks * ROWS, i1 = tiles * (block + 1) / blocks * ROWS;
      int j = from % panels * COLUMNS, j1 = j + (to - from) * COLUMNS;
      matmul_job(c + i*c_row + j, c_row, part_of(a, i, 0), part_of(b, 0, j), MIN(M, i1) - i,
                 MIN(N, j1) - j, K, add, bias ? bias + j : NULL);
    }
  }
}

// Sums of a row. C forbids the compiler to reorder a sum, so a plain loop adds one number at a
// time; LANES partial sums say in which order to add, and make it a vector addition.
enum { LANES = 16 };
static real add_lanes(const real *lane) {
  real sum = 0;
  for (int i = 0; i < LANES; i++) sum += lane[i];
  return sum;
}
static real dot(const real *x, const real *y, int n) {   // sum_i x[i] y[i]
  real lane[LANES] = {0}, rest = 0;
  int i = 0;
  for (; i + LANES <= n; i += LANES)
    for (int j = 0; j < LANES; j++) lane[j] += x[i + j] * y[i + j];
  for (; i < n; i++) rest += x[i] * y[i];
  return add_lanes(lane) + rest;
}
static real sum_of(const real *x, int n) {
  real lane[LANES] = {0}, rest = 0;
  int i = 0;
  for (; i + LANES <= n; i += LANES)
    for (int j = 0; j < LANES; j++) lane[j] += x[i + j];
  for (; i < n; i++) rest += x[i];
  return add_lanes(lane) + rest;
}
static real max_of(const real *x, int n) {
  real lane[LANES], max = x[0];
  int i = 0;
  for (int j = 0; j < LANES; j++) lane[j] = max;
  for (; i + LANES <= n; i += LANES)
    for (int j = 0; j < LANES; j++) lane[j] = x[i + j] > lane[j] ? x[i + j] : lane[j];
  for (int j = 0; j < LANES; j++) max = lane[j] > max ? lane[j] : max;
  for (; i < n; i++) max = x[i] > max ? x[i] : max;
  return max;
}

// exp(x) in float, 1 ulp, in a form that the compiler turns into vector instructions (libm's is a
// call): x = n ln 2 + r with |r| <= ln 2 / 2, so e^x = 2^n e^r, and e^r is a polynomial (Cephes).
// 2^n is made by putting n where a float keeps its exponent. x is held within -87 and 88, so there
// is no infinity; the comparison is one of integers, since those of floats do not vectorise here.
static inline real exp_(real x) {
  if (sizeof(real) == sizeof(double)) return (real)exp((double)x);
  float y = (float)x;
  uint32_t bits;
  memcpy(&bits, &y, 4);
  bits = bits > 0xc2ae0000u ? 0xc2ae0000u : bits;   // negative floats, as integers: from -87 on
  int32_t upper = (int32_t)bits;
  upper = upper > 0x42b00000 ? 0x42b00000 : upper;  // 88
  memcpy(&y, &upper, 4);
  int32_t n = (int32_t)(y * 1.44269504f + 127.5f);
  float shift = (float)(n - 127), r = y - shift * 0.693359375f - shift * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p*r + 1.3981999507e-3f;
  p = p*r + 8.3334519073e-3f;
  p = p*r + 4.1665795894e-2f;
  p = p*r + 1.6666665459e-1f;
  p = p*r + 5.0000001201e-1f;
  p = p*r*r + r + 1;
  n <<= 23;
  memcpy(&y, &n, 4);
  return p * y;
}

// Before a loop whose iterations do not depend on each other, even where two names are one memory:
// the compiler need not check, and vectorises.
#ifdef __clang__
#define INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define INDEPENDENT _Pragma("GCC ivdep")
#endif

// x[i] = value. Gradients of parameters are zeroed once per update, since backward adds to them.
static void fill(real *x, long n, real value) {
  parallel_for (chunk, chunks(n))
    for (long i = chunk*CHUNK; i < MIN(n, (chunk + 1)*CHUNK); i++) x[i] = value;
  lap("fill", 0, n * sizeof(real));
}
static void zero(real *x, long n) { fill(x, n, 0); }

// embedding: out[n,c] = wte[token[n],c] + wpe[t,c], with n = b T + t
static void embedding_forward(Tensor out, const int *token, Tensor wte, Tensor wpe,
                              int B, int T, int C) {
  parallel_for (n, B*T) {
    const real *word = wte.data + (long)token[n]*C, *position = wpe.data + n%T*C;
    real *out_n = out.data + n*C;
    for (int c = 0; c < C; c++) out_n[c] = word[c] + position[c];
  }
  lap("embedding_forward", 0, 3.0*B*T*C * sizeof(real));
}

static void embedding_backward(Tensor out, const int *token, Tensor wte, Tensor wpe,
                               int B, int T, int C) {
  // dwte[v,c] += sum over the n that hold token v of dout[n,c]: a thread owns some channels c, as
  // two rows n may hold the same token
  parallel_for (block, (C + LANES - 1) / LANES)
    for (int n = 0; n < B*T; n++) {
      const real *dout_n = out.grad + (long)n*C;
      real *dword = wte.grad + (long)token[n]*C;
      for (int c = block*LANES; c < MIN(C, (block + 1)*LANES); c++) dword[c] += dout_n[c];
    }
  // dwpe[t,c] += sum_b dout[b T + t,c]
  parallel_for (t, T)
    for (int b = 0; b < B; b++) {
      const real *dout_n = out.grad + ((long)b*T + t)*C;
      real *dposition = wpe.grad + t*C;
      for (int c = 0; c < C; c++) dposition[c] += dout_n[c];
    }
  lap("embedding_backward", 0, 5.0*B*T*C * sizeof(real));
}

// layernorm: out = xhat w + b, xhat[n,c] = (x[n,c] - mean[n]) rstd[n]; mean and variance over c,
// rstd = 1 / sqrt(variance + 1e-5). stats[n] keeps mean and rstd for backward.
static void layernorm_forward(Tensor out, Tensor stats, Tensor x, Affine p, int N, int C) {
  const real *w = p.weight.data, *b = p.bias.data;
  parallel_for (n, N) {
    const real *x_n = x.data + n*C;
    real *out_n = out.data + n*C, mean = sum_of(x_n, C) / C;
    for (int c = 0; c < C; c++) out_n[c] = x_n[c] - mean;
    real rstd = 1 / sqrt_(dot(out_n, out_n, C) / C + (real)1e-5);
    for (int c = 0; c < C; c++) out_n[c] = out_n[c] * rstd * w[c] + b[c];
    stats.data[2*n] = mean;
    stats.data[2*n + 1] = rstd;
  }
  lap("layernorm_forward", 0, 2.0*N*C * sizeof(real));
}

static void layernorm_backward(Tensor out, Tensor stats, Tensor x, Affine p, int N, int C) {
  // g = dout w; dx[n,c] += rstd (g - avg_c(g) - xhat avg_c(g xhat)): what moves all of a row, or
  // stretches it, is taken out again by the normalisation
  parallel_for (n, N) {
    const real *x_n = x.data + n*C, *dout_n = out.grad + n*C, *w = p.weight.data;
    real *dx_n = x.grad + n*C, mean = stats.data[2*n], rstd = stats.data[2*n + 1];
    real g[LANES] = {0}, g_xhat[LANES] = {0};
    int c = 0;
    for (; c + LANES <= C; c += LANES)
      for (int j = 0; j < LANES; j++) {
        g[j] += dout_n[c + j] * w[c + j];
        g_xhat[j] += dout_n[c + j] * w[c + j] * ((x_n[c + j] - mean) * rstd);
      }
    for (; c < C; c++) {
      g[0] += dout_n[c] * w[c];
      g_xhat[0] += dout_n[c] * w[c] * ((x_n[c] - mean) * rstd);
    }
    real avg_g = add_lanes(g) / C, avg_g_xhat = add_lanes(g_xhat) / C;
    for (c = 0; c < C; c++)
      dx_n[c] += rstd * (dout_n[c] * w[c] - avg_g - (x_n[c] - mean) * rstd * avg_g_xhat);
  }
  // dw[c] += sum_n dout[n,c] xhat[n,c]; db[c] += sum_n dout[n,c]
  parallel_for (block, (C + LANES - 1) / LANES) {
    real dw[LANES] = {0}, db[LANES] = {0};
    int c = block*LANES, width = MIN(LANES, C - c);
    for (int n = 0; n < N; n++) {
      const real *x_n = x.data + (long)n*C + c, *dout_n = out.grad + (long)n*C + c;
      real mean = stats.data[2*n], rstd = stats.data[2*n + 1];
      for (int j = 0; j < width; j++) {
        dw[j] += dout_n[j] * ((x_n[j] - mean) * rstd);
        db[j] += dout_n[j];
      }
    }
    for (int j = 0; j < width; j++) {
      p.weight.grad[c + j] += dw[j];
      p.bias.grad[c + j] += db[j];
    }
  }
  lap("layernorm_backward", 0, 6.0*N*C * sizeof(real));
}

// linear: y[n,o] = sum_c x[n,c] w[c,o] + b[o]
static void linear_forward(Tensor y, Tensor x, Affine p, int N, int C, int O) {
  matmul(y.data, O, rows_of(x.data, C), rows_of(p.weight.data, O), N, O, C, 0, p.bias.data);
  lap("linear_forward", 2.0*N*C*O, 0);
}

static void linear_backward(Tensor y, Tensor x, Affine p, int N, int C, int O) {
  // dx[n,c] = sum_o dy[n,o] w[c,o]
  matmul(x.grad, C, rows_of(y.grad, O), transpose(rows_of(p.weight.data, O)), N, C, O, 0, NULL);
  // dw[c,o] += sum_n x[n,c] dy[n,o]
  matmul(p.weight.grad, O, transpose(rows_of(x.data, C)), rows_of(y.grad, O), C, O, N, 1, NULL);
  // db[o] += sum_n dy[n,o]
  parallel_for (part, n_threads) {                // a thread owns some columns o
    int from = (int)(O * part / n_threads), to = (int)(O * (part + 1) / n_threads);
    for (int n = 0; n < N; n++)
      INDEPENDENT for (int o = from; o < to; o++) p.bias.grad[o] += y.grad[(long)n*O + o];
  }
  lap("linear_backward", 4.0*N*C*O, 0);
}

// attention, for each sequence and head, with q, k, v (T,D) the head's columns of qkv:
//   z[t,s] = q[t].k[s] / sqrt(D); att[t,s] = softmax over s <= t of z; out[t] = sum_s att[t,s] v[s]
// att is never whole in memory. Keys come in tiles of SIDE, and each tile's part of the softmax is
// taken with the maximum so far; when a later tile has a larger one, what was summed is rescaled
// (Milakov and Gimelshein 2018; Dao et al. 2022). lse[b,h,t] = log sum_s exp(z[t,s]) stays for
// backward, which has att again from it: att[t,s] = exp(z[t,s] - lse[t]).
enum { SIDE = 64 };   // of a tile of att

// One row of a tile: weight[s] = exp((weight[s] - max) scale) for s < seen, else 0; returns their
// sum. weight comes in as q[t].k[s], and the 1/sqrt(D) that makes it z is in scale: so max is not
// scaled either, and backward divides lse by it.
static real softmax_weights(real *weight, int seen, int width, real max, real scale) {
  for (int s = 0; s < seen; s++) weight[s] = exp_((weight[s] - max) * scale);
  for (int s = seen; s < width; s++) weight[s] = 0;
  return sum_of(weight, width);
}

static void attention_forward(Tensor out, Tensor lse, Tensor qkv, int B, int T, int C, int H) {
  int D = C / H;
  real scale = 1 / sqrt_(D);
  parallel_for (bh, B*H) {
    const real *q = qkv.data + bh/H*T*3*C + bh%H*D, *k = q + C, *v = k + C;   // rows 3C apart
    real *o = out.data + bh/H*T*C + bh%H*D, att[SIDE*SIDE], max[SIDE], sum[SIDE];
    for (long i = 0; i < T; i += SIDE)                      // queries i..i+rows-1
      for (long j = 0; j <= i; j += SIDE) {                 // keys j..j+columns-1, none after i
        int rows = (int)MIN((long)SIDE, T - i), columns = (int)MIN((long)SIDE, T - j);
        matmul_job(att, SIDE, rows_of(q + i*3*C, 3*C), transpose(rows_of(k + j*3*C, 3*C)),
                   rows, columns, D, 0, NULL);
        for (int t = 0; t < rows; t++) {
          int seen = MIN(columns, i + t - j + 1);           // s <= t
          real tile_max = max_of(att + t*SIDE, seen), *o_t = o + (i + t)*C;
          if (j == 0) max[t] = tile_max, sum[t] = 0;
          if (tile_max > max[t]) {                          // what was summed with the old maximum
            real rescale = exp_((max[t] - tile_max) * scale);
            for (int d = 0; d < D; d++) o_t[d] *= rescale;
            sum[t] *= rescale;
            max[t] = tile_max;
          }
          sum[t] += softmax_weights(att + t*SIDE, seen, columns, max[t], scale);
        }
        matmul_job(o + i*C, C, rows_of(att, SIDE), rows_of(v + j*3*C, 3*C),
                   rows, D, columns, j > 0, NULL);
        for (int t = 0; j == i && t < rows; t++) {          // that was the last tile of the row
          for (int d = 0; d < D; d++) o[(i + t)*C + d] /= sum[t];
          lse.data[bh*T + i + t] = max[t] * scale + (real)log(sum[t]);
        }
      }
  }
  lap("attention_forward", 2.0*B*T*T*C, 0);
}

static void attention_backward(Tensor out, Tensor lse, Tensor qkv, int B, int T, int C, int H) {
  // datt[t,s] = dout[t].v[s]; dz[t,s] = att[t,s] (datt[t,s] - dout[t].out[t])
  // dv[s] = sum_t att[t,s] dout[t]; dq[t] = sum_s dz[t,s] k[s] / sqrt(D); dk[s] likewise with q[t]
  int D = C / H;
  real scale = 1 / sqrt_(D);
  parallel_for (bh, B*H) {
    const real *q = qkv.data + bh/H*T*3*C + bh%H*D, *k = q + C, *v = k + C;
    real *dq = qkv.grad + bh/H*T*3*C + bh%H*D, *dk = dq + C, *dv = dk + C;
    const real *o = out.data + bh/H*T*C + bh%H*D, *dout = out.grad + bh/H*T*C + bh%H*D;
    real att[SIDE*SIDE], dz[SIDE*SIDE];
    for (long i = 0; i < T; i += SIDE)                      // queries i.., keys j.., as in forward
      for (long j = 0; j <= i; j += SIDE) {
        int rows = (int)MIN((long)SIDE, T - i), columns = (int)MIN((long)SIDE, T - j);
        Matrix q_i = rows_of(q + i*3*C, 3*C), k_j = rows_of(k + j*3*C, 3*C);
        Matrix dout_i = rows_of(dout + i*C, C), v_j = rows_of(v + j*3*C, 3*C);
        matmul_job(att, SIDE, q_i, transpose(k_j), rows, columns, D, 0, NULL);
        matmul_job(dz, SIDE, dout_i, transpose(v_j), rows, columns, D, 0, NULL);   // datt so far
        for (int t = 0; t < rows; t++) {
          real *att_t = att + t*SIDE, *dz_t = dz + t*SIDE, lse_t = lse.data[bh*T + i + t] / scale;
          real expected = dot(dout + (i + t)*C, o + (i + t)*C, D);   // sum_s att[t,s] datt[t,s]
          softmax_weights(att_t, MIN(columns, i + t - j + 1), columns, lse_t, scale);
          for (int s = 0; s < columns; s++) dz_t[s] = att_t[s] * (dz_t[s] - expected) * scale;
        }
        // The first tile that reaches a row of dq, dk or dv sets it, the others add
        int first = i == j;   // the first queries that see these keys
        matmul_job(dv + j*3*C, 3*C, transpose(rows_of(att, SIDE)), dout_i,
                   columns, D, rows, !first, NULL);
        matmul_job(dq + i*3*C, 3*C, rows_of(dz, SIDE), k_j, rows, D, columns, j > 0, NULL);
        matmul_job(dk + j*3*C, 3*C, transpose(rows_of(dz, SIDE)), q_i,
                   columns, D, rows, !first, NULL);
      }
  }
  lap("attention_backward", 5.0*B*T*T*C, 0);
}

// gelu: y = x (1 + h) / 2, h = tanh(u), u = sqrt(2/pi) (x + 0.044715 x^3) (Hendrycks, Gimpel 2016).
// tanh from exp_, which vectorises: tanh(u) = 1 - 2 / (e^2u + 1), safe for any u.
static inline real tanh_(real u) { return 1 - 2 / (exp_(2*u) + 1); }
#define GELU_A (real)0.7978845608028654   // sqrt(2/pi)
#define GELU_B (real)0.044715

static void gelu_forward(Tensor y, Tensor x, int N, int C) {
  parallel_for (n, N) {
    const real *x_n = x.data + n*C;
    real *y_n = y.data + n*C;
    for (int c = 0; c < C; c++) {
      real h = tanh_(GELU_A * (x_n[c] + GELU_B * x_n[c] * x_n[c] * x_n[c]));
      y_n[c] = x_n[c] * (1 + h) / 2;
    }
  }
  lap("gelu_forward", 0, 2.0*N*C * sizeof(real));
}

static void gelu_backward(Tensor y, Tensor x, int N, int C) {
  // dx = dy ((1 + h)/2 + x (1 - h^2)/2 du/dx), du/dx = sqrt(2/pi) (1 + 3*0.044715 x^2)
  parallel_for (n, N) {
    const real *x_n = x.data + n*C, *dy_n = y.grad + n*C;
    real *dx_n = x.grad + n*C;                              // may be dy_n itself
    INDEPENDENT for (int c = 0; c < C; c++) {
      real h = tanh_(GELU_A * (x_n[c] + GELU_B * x_n[c] * x_n[c] * x_n[c]));
      real du = GELU_A * (1 + 3 * GELU_B * x_n[c] * x_n[c]);
      dx_n[c] = dy_n[c] * ((1 + h) / 2 + x_n[c] * (1 - h*h) / 2 * du);
    }
  }
  lap("gelu_backward", 0, 3.0*N*C * sizeof(real));
}

// residual: out = x + f
static void residual_forward(Tensor out, Tensor x, Tensor f, int N, int C) {
  parallel_for (n, N)
    for (int c = 0; c < C; c++) out.data[n*C + c] = x.data[n*C + c] + f.data[n*C + c];
  lap("residual_forward", 0, 3.0*N*C * sizeof(real));
}

static void residual_backward(Tensor out, Tensor x, Tensor f, int N, int C) {
  // dx = dout; df = dout. In the model the three share one buffer, and there is nothing to move.
  if (x.grad != out.grad)
    parallel_for (n, N) memcpy(x.grad + n*C, out.grad + n*C, C * sizeof(real));
  if (f.grad != out.grad)
    parallel_for (n, N) memcpy(f.grad + n*C, out.grad + n*C, C * sizeof(real));
  lap("residual_backward", 0, 0);
}

// head: logits[n,v] = sum_c x[n,c] wte[v,c]: how much a row looks like each word's embedding
static void head_forward(Tensor logits, Tensor x, Tensor wte, int N, int C, int V) {
  matmul(logits.data, V, rows_of(x.data, C), transpose(rows_of(wte.data, C)), N, V, C, 0, NULL);
  lap("head_forward", 2.0*N*C*V, 0);
}

static void head_backward(Tensor logits, Tensor x, Tensor wte, int N, int C, int V) {
  // dx[n,c] = sum_v dlogits[n,v] wte[v,c]
  matmul(x.grad, C, rows_of(logits.grad, V), rows_of(wte.data, C), N, C, V, 0, NULL);
  // dwte[v,c] += sum_n dlogits[n,v] x[n,c]
  matmul(wte.grad, C, transpose(rows_of(logits.grad, V)), rows_of(x.data, C), V, C, N, 1, NULL);
  lap("head_backward", 4.0*N*C*V, 0);
}

// softmax cross-entropy: loss[n] = -log p[n,target[n]], p[n,v] = exp(logits[n,v] - row_lse[n]),
// row_lse[n] = log sum_v exp(logits[n,v]). hit[n] = 1 if the target has the largest logit, else 0.
static void crossentropy_forward(Tensor loss, Tensor hit, Tensor row_lse, Tensor logits,
                                 const int *target, int N, int V) {
  parallel_for (n, N) {
    const real *logits_n = logits.data + n*V;
    real max = max_of(logits_n, V), lane[LANES] = {0}, rest = 0;   // minus max: no overflow
    int v = 0;
    for (; v + LANES <= V; v += LANES)
      for (int j = 0; j < LANES; j++) lane[j] += exp_(logits_n[v + j] - max);
    for (; v < V; v++) rest += exp_(logits_n[v] - max);
    row_lse.data[n] = max + (real)log(add_lanes(lane) + rest);
    loss.data[n] = row_lse.data[n] - logits_n[target[n]];
    hit.data[n] = logits_n[target[n]] == max;
  }
  lap("crossentropy_forward", 0, 2.0*N*V * sizeof(real));
}

static void crossentropy_backward(Tensor loss, Tensor hit, Tensor row_lse, Tensor logits,
                                  const int *target, int N, int V) {
  (void)hit;   // counted, not learned from
  // dlogits[n,v] = dloss[n] (p[n,v] - [v == target[n]])
  parallel_for (n, N) {
    const real *logits_n = logits.data + n*V;
    real *dlogits_n = logits.grad + n*V;                    // may be logits_n itself
    real lse = row_lse.data[n], dloss = loss.grad[n];
    INDEPENDENT for (int v = 0; v < V; v++) dlogits_n[v] = dloss * exp_(logits_n[v] - lse);
    dlogits_n[target[n]] -= dloss;
  }
  lap("crossentropy_backward", 0, 2.0*N*V * sizeof(real));
}

// mean squared error: loss[n] = avg_o (y[n,o] - target[n,o])^2
static void squared_error_forward(Tensor loss, Tensor y, const real *target, int N, int O) {
  parallel_for (n, N) {
    real sum = 0;
    for (int o = 0; o < O; o++) {
      real error = y.data[n*O + o] - target[n*O + o];
      sum += error * error;
    }
    loss.data[n] = sum / O;
  }
  lap("squared_error_forward", 0, 2.0*N*O * sizeof(real));
}

static void squared_error_backward(Tensor loss, Tensor y, const real *target, int N, int O) {
  // dy[n,o] = dloss[n] 2 (y[n,o] - target[n,o]) / O
  parallel_for (n, N)
    for (int o = 0; o < O; o++)
      y.grad[n*O + o] = loss.grad[n] * 2 * (y.data[n*O + o] - target[n*O + o]) / O;
  lap("squared_error_backward", 0, 3.0*N*O * sizeof(real));
}
#endif   // GPU

// ---- 4. Model ---------------------------------------------------------------------------------

typedef struct { int n_layer, n_head, n_embd, block_size, vocab_size; } Config;   // L H C T V

typedef struct {                       // a block's parameters
  Affine ln_1, c_attn, attn_proj, ln_2, c_fc, mlp_proj;
} Block;

typedef struct {                       // a block's activations, in the order they are made
  Tensor ln_1, ln_1_stats, qkv, attn, lse, attn_proj, x_mid;
  Tensor ln_2, ln_2_stats, fc, gelu, mlp_proj, x;
} Acts;

// Where the data or the gradient of an activation lies. Forward keeps what backward will read; the
// gradients inside a block are read at once by the layer below, so all blocks share theirs.
enum Memory {
  NONE, OWN, IN_PLACE,                 // not needed; its own; where its data is
  STREAM, PROJ, LN_1, QKV, ATTN, LN_2, MLP, N_MEMORIES   // shared by all that name it
};

// Every tensor of the model once: layout() writes these lists, and allocation, initialisation,
// checkpoints and the gradient checker walk them.
typedef struct {
  char name[40];
  int rows, cols;                      // cols 0: a vector
  Tensor *tensor;
  enum Memory data, grad;
} Entry;

typedef struct {
  Config config;
  int rows;                            // the most tokens a micro-batch may have: B*T
  Tensor wte, wpe;
  Block *block;                        // [n_layer]
  Affine ln_f;
  Tensor embedding;                    // the x that enters the first block
  Acts *act;                           // [n_layer]
  Tensor x_f, x_f_stats, logits, row_lse, loss, hit;
  Entry *parameter, *activation;       // the lists, and how long they are
  int n_parameters, n_activations;
  // All parameters, n_weights with padding. The n_matrices numbers of matrices come first, so that
  // weight decay, which is for them alone, is for one range
  Tensor weights;
  long n_matrices, n_weights;
  long count;                          // numbers in all parameters, without padding
  int training, separate;              // see model_plan()
  real *moment[2];                     // the optimizer's memories m and v, laid out like weights
  real *memory;                        // of the activations, n_memory numbers
  long n_memory;
  int *token, *target;                 // [rows], of the micro-batch
  double *partial;                     // scratch of gradient_norm
  Stats *stats;                        // [N_STATS]
} Model;

// Places in stats: the update under way, an evaluation, and the last STATS_KEPT updates, for the
// host to look at when it likes.
enum { CURRENT, EVALUATION, KEPT, STATS_KEPT = 64, N_STATS = KEPT + STATS_KEPT };

static void add_entry(Entry **list, int *n, Tensor *tensor, int rows, int cols, enum Memory data,
                      enum Memory grad, const char *format, int layer) {
  *list = (Entry *)host_alloc(*list, (*n + 1) * sizeof(Entry));
  Entry *e = &(*list)[(*n)++];
  e->rows = rows; e->cols = cols; e->tensor = tensor; e->data = data; e->grad = grad;
  snprintf(e->name, sizeof e->name, format, layer);
}

static void add_parameter(Model *m, Tensor *t, int rows, int cols, const char *name, int layer) {
  add_entry(&m->parameter, &m->n_parameters, t, rows, cols, OWN, OWN, name, layer);
}

static void add_affine(Model *m, Affine *p, int rows, int cols, const char *name, int layer) {
  char full[40];
  snprintf(full, sizeof full, "%s.weight", name);
  add_parameter(m, &p->weight, rows, cols, full, layer);
  snprintf(full, sizeof full, "%s.bias", name);
  add_parameter(m, &p->bias, cols ? cols : rows, 0, full, layer);
}

static void add_activation(Model *m, Tensor *t, int cols, enum Memory data, enum Memory grad,
                           const char *name, int layer) {
  add_entry(&m->activation, &m->n_activations, t, m->rows, cols, data, grad, name, layer);
}

// Parameters have the names and shapes of Hugging Face's GPT-2, less the prefix "transformer.".
static void layout(Model *m) {
  int H = m->config.n_head, C = m->config.n_embd, V = m->config.vocab_size;
  add_parameter(m, &m->wte, V, C, "wte.weight", 0);
  add_parameter(m, &m->wpe, m->config.block_size, C, "wpe.weight", 0);
  add_activation(m, &m->embedding, C, OWN, STREAM, "embedding", 0);
  for (int l = 0; l < m->config.n_layer; l++) {
    Block *p = &m->block[l];
    add_affine(m, &p->ln_1, C, 0, "h.%d.ln_1", l);
    add_affine(m, &p->c_attn, C, 3*C, "h.%d.attn.c_attn", l);
    add_affine(m, &p->attn_proj, C, C, "h.%d.attn.c_proj", l);
    add_affine(m, &p->ln_2, C, 0, "h.%d.ln_2", l);
    add_affine(m, &p->c_fc, C, 4*C, "h.%d.mlp.c_fc", l);
    add_affine(m, &p->mlp_proj, 4*C, C, "h.%d.mlp.c_proj", l);
    Acts *a = &m->act[l];
    add_activation(m, &a->ln_1, C, OWN, LN_1, "h.%d.ln_1.out", l);
    add_activation(m, &a->ln_1_stats, 2, OWN, NONE, "h.%d.ln_1.stats", l);
    add_activation(m, &a->qkv, 3*C, OWN, QKV, "h.%d.attn.qkv", l);
    add_activation(m, &a->attn, C, OWN, ATTN, "h.%d.attn.out", l);
    add_activation(m, &a->lse, H, OWN, NONE, "h.%d.attn.lse", l);
    add_activation(m, &a->attn_proj, C, PROJ, STREAM, "h.%d.attn.proj", l);
    add_activation(m, &a->x_mid, C, OWN, STREAM, "h.%d.x_mid", l);
    add_activation(m, &a->ln_2, C, OWN, LN_2, "h.%d.ln_2.out", l);
    add_activation(m, &a->ln_2_stats, 2, OWN, NONE, "h.%d.ln_2.stats", l);
    add_activation(m, &a->fc, 4*C, OWN, MLP, "h.%d.mlp.fc", l);
    add_activation(m, &a->gelu, 4*C, OWN, MLP, "h.%d.mlp.gelu", l);
    add_activation(m, &a->mlp_proj, C, PROJ, STREAM, "h.%d.mlp.proj", l);
    add_activation(m, &a->x, C, OWN, STREAM, "h.%d.x", l);
  }
  add_affine(m, &m->ln_f, C, 0, "ln_f", 0);
  add_activation(m, &m->x_f, C, OWN, OWN, "ln_f.out", 0);
  add_activation(m, &m->x_f_stats, 2, OWN, NONE, "ln_f.stats", 0);
  add_activation(m, &m->logits, V, OWN, IN_PLACE, "logits", 0);
  add_activation(m, &m->row_lse, 0, OWN, NONE, "row_lse", 0);
  add_activation(m, &m->loss, 0, OWN, OWN, "loss", 0);
  add_activation(m, &m->hit, 0, OWN, NONE, "hit", 0);
}

static long count_of(int rows, int cols) { return (long)rows * (cols ? cols : 1); }
static long entry_count(const Entry *e) { return count_of(e->rows, e->cols); }
static long padded(long n) { return (n + 15) / 16 * 16; }   // a tensor starts on a cache line

// memory + at; NULL while there is no memory yet, and model_plan() only counts how much it will be.
static real *place(real *memory, long at) { return memory ? memory + at : NULL; }

// Places each parameter in m->weights: twice the same walk, first matrices, then vectors.
static void place_parameters(Model *m) {
  m->n_weights = m->count = 0;
  for (int vectors = 0; vectors < 2; vectors++) {
    for (int i = 0; i < m->n_parameters; i++) {
      Entry *e = &m->parameter[i];
      if ((e->cols == 0) != vectors) continue;
      e->tensor->data = place(m->weights.data, m->n_weights);
      e->tensor->grad = place(m->weights.grad, m->n_weights);
      m->n_weights += padded(entry_count(e));
      m->count += entry_count(e);
    }
    if (!vectors) m->n_matrices = m->n_weights;
  }
}

// Places each activation, and its gradient if there is training, in m->memory. What is shared gets
// its place when it is met first, and has one size wherever it is met.
static void place_activations(Model *m) {
  long shared[N_MEMORIES], total = 0;
  for (int i = 0; i < N_MEMORIES; i++) shared[i] = -1;
  for (int i = 0; i < m->n_activations; i++) {
    Entry *e = &m->activation[i];
    long data_at = 0;
    for (int grad = 0; grad < 2; grad++) {
      enum Memory where = grad ? e->grad : e->data;
      if (where == NONE || (grad && !m->training)) continue;
      if (where >= IN_PLACE && m->separate) where = OWN;
      long at = where == IN_PLACE ? data_at : where == OWN ? -1 : shared[where];
      if (at < 0) at = total, total += padded(entry_count(e));
      if (where > IN_PLACE) shared[where] = at;
      if (grad) e->tensor->grad = place(m->memory, at);
      else e->tensor->data = place(m->memory, data_at = at);
    }
  }
  m->n_memory = total;
}

// Describes a model of this shape, that will be given at most `rows` tokens at once: its lists and
// sizes. No device memory is taken before model_allocate(). A model not for training has no
// gradients and no optimizer's memory; with separate, no two tensors share memory.
static void model_plan(Model *m, Config config, int rows, int training, int separate) {
  memset(m, 0, sizeof *m);
  m->config = config; m->rows = rows; m->training = training; m->separate = separate;
  m->block = (Block *)calloc(config.n_layer, sizeof(Block));
  m->act = (Acts *)calloc(config.n_layer, sizeof(Acts));
  if (!m->block || !m->act) die("no memory for %d layers: lower --n_layer", config.n_layer);
  layout(m);
  place_parameters(m);
  place_activations(m);
}

static double model_bytes(const Model *m) {   // of device memory
  return sizeof(real) * ((m->training ? 4.0 : 1.0) * m->n_weights + m->n_memory)
       + 2.0 * sizeof(int) * m->rows + sizeof(double) * chunks(m->n_weights);
}

static void model_allocate(Model *m) {
  size_t bytes = m->n_weights * sizeof(real);
  m->weights.data = (real *)device_alloc(bytes);
  if (m->training) {
    m->weights.grad = (real *)device_alloc(bytes);
    for (int i = 0; i < 2; i++) m->moment[i] = (real *)device_alloc(bytes);
  }
  m->memory = (real *)device_alloc(m->n_memory * sizeof(real));
  m->token = (int *)device_alloc(m->rows * sizeof(int));
  m->target = (int *)device_alloc(m->rows * sizeof(int));
  m->partial = (double *)device_alloc(chunks(m->n_weights) * sizeof(double));
  m->stats = (Stats *)device_alloc(N_STATS * sizeof(Stats));
  place_parameters(m);
  place_activations(m);
}

static void model_free(Model *m) {
  device_free(m->weights.data); device_free(m->weights.grad);
  device_free(m->moment[0]); device_free(m->moment[1]);
  device_free(m->memory); device_free(m->token); device_free(m->target);
  device_free(m->partial); device_free(m->stats);
  free(m->block); free(m->act); free(m->parameter); free(m->activation);
}

// GPT-2's initialisation: matrices normal with deviation 0.02, those that write to the stream
// 0.02 / sqrt(2L), since 2L of them are added up there; layernorm weights 1, biases 0.
static void model_init(Model *m, uint64_t seed) {
  for (int i = 0; i < m->n_parameters; i++) {
    Entry *e = &m->parameter[i];
    long n = entry_count(e);
    real *w = (real *)host_alloc(NULL, n * sizeof(real));
    double scale = 0.02;
    if (strstr(e->name, "c_proj")) scale /= sqrt(2.0 * m->config.n_layer);
    for (long j = 0; j < n; j++)
      w[j] = e->cols ? (real)(scale * random_normal(random_bits(seed, i), j))
                     : (real)(strstr(e->name, "weight") ? 1 : 0);
    copy_in(e->tensor->data, w, n * sizeof(real));
    free(w);
  }
}

// ---- 5. Forward and backward ------------------------------------------------------------------

// The loss of each of B*T tokens, given m->token and m->target: in m->loss and m->hit.
static void forward(Model *m, int B, int T) {
  int N = B*T, H = m->config.n_head, C = m->config.n_embd, V = m->config.vocab_size;
  embedding_forward(m->embedding, m->token, m->wte, m->wpe, B, T, C);
  Tensor x = m->embedding;
  for (int l = 0; l < m->config.n_layer; l++) {
    Block *p = &m->block[l];
    Acts *a = &m->act[l];
    layernorm_forward(a->ln_1, a->ln_1_stats, x, p->ln_1, N, C);
    linear_forward(a->qkv, a->ln_1, p->c_attn, N, C, 3*C);
    attention_forward(a->attn, a->lse, a->qkv, B, T, C, H);
    linear_forward(a->attn_proj, a->attn, p->attn_proj, N, C, C);
    residual_forward(a->x_mid, x, a->attn_proj, N, C);
    layernorm_forward(a->ln_2, a->ln_2_stats, a->x_mid, p->ln_2, N, C);
    linear_forward(a->fc, a->ln_2, p->c_fc, N, C, 4*C);
    gelu_forward(a->gelu, a->fc, N, 4*C);
    linear_forward(a->mlp_proj, a->gelu, p->mlp_proj, N, 4*C, C);
    residual_forward(a->x, a->x_mid, a->mlp_proj, N, C);
    x = a->x;
  }
  layernorm_forward(m->x_f, m->x_f_stats, x, m->ln_f, N, C);
  head_forward(m->logits, m->x_f, m->wte, N, C, V);
  crossentropy_forward(m->loss, m->hit, m->row_lse, m->logits, m->target, N, V);
}

// After forward(): adds the gradient of dloss * sum_n loss[n] to the gradients of the parameters.
static void backward(Model *m, int B, int T, real dloss) {
  int N = B*T, H = m->config.n_head, C = m->config.n_embd, V = m->config.vocab_size;
  fill(m->loss.grad, N, dloss);
  crossentropy_backward(m->loss, m->hit, m->row_lse, m->logits, m->target, N, V);
  head_backward(m->logits, m->x_f, m->wte, N, C, V);
  Tensor x = m->config.n_layer ? m->act[m->config.n_layer - 1].x : m->embedding;
  zero(x.grad, (long)N*C);             // its only reader is a layernorm, and those add
  layernorm_backward(m->x_f, m->x_f_stats, x, m->ln_f, N, C);
  for (int l = m->config.n_layer - 1; l >= 0; l--) {
    Block *p = &m->block[l];
    Acts *a = &m->act[l];
    x = l > 0 ? m->act[l - 1].x : m->embedding;
    residual_backward(a->x, a->x_mid, a->mlp_proj, N, C);
    linear_backward(a->mlp_proj, a->gelu, p->mlp_proj, N, 4*C, C);
    gelu_backward(a->gelu, a->fc, N, 4*C);
    linear_backward(a->fc, a->ln_2, p->c_fc, N, C, 4*C);
    layernorm_backward(a->ln_2, a->ln_2_stats, a->x_mid, p->ln_2, N, C);
    residual_backward(a->x_mid, x, a->attn_proj, N, C);
    linear_backward(a->attn_proj, a->attn, p->attn_proj, N, C, C);
    attention_backward(a->attn, a->lse, a->qkv, B, T, C, H);
    linear_backward(a->qkv, a->ln_1, p->c_attn, N, C, 3*C);
    layernorm_backward(a->ln_1, a->ln_1_stats, x, p->ln_1, N, C);
  }
  embedding_backward(m->embedding, m->token, m->wte, m->wpe, B, T, C);
}

// What launch() takes: a function of one argument, which all threads run.
typedef struct { Model *model; int B, T; real dloss; } MicroBatch;

static void forward_only(void *argument) {
  MicroBatch *b = (MicroBatch *)argument;
  forward(b->model, b->B, b->T);
}

static void forward_counted(void *argument) {   // adds the losses to those of the evaluation
  MicroBatch *b = (MicroBatch *)argument;
  forward(b->model, b->B, b->T);
  add_loss(b->model->stats + EVALUATION, b->model->loss, b->model->hit, b->B * b->T);
}

static void micro_batch(void *argument) {       // adds to the gradients
  MicroBatch *b = (MicroBatch *)argument;
  forward(b->model, b->B, b->T);
  add_loss(b->model->stats + CURRENT, b->model->loss, b->model->hit, b->B * b->T);
  backward(b->model, b->B, b->T, b->dloss);
}

// Floating-point operations of one forward and backward pass over N tokens in sequences of T: the
// matmuls, with 2 a multiply-add, 12 C^2 the weights of a block, and the causal half of attention.
// Backward is two matmuls for each one of forward, hence the 3.
static double model_flop(const Model *m, double N, double T) {
  double L = m->config.n_layer, C = m->config.n_embd, V = m->config.vocab_size;
  return 3 * N * (L * (2*12*C*C + 2*T*C) + 2*V*C);
}

// ---- 6. Optimizers ----------------------------------------------------------------------------

// How far one weight moves against its gradient g; m and v are its two memories, zero at first.
DEVICE static inline real step_of(int optimizer, real g, real *m, real *v, Update u) {
  real lr = u.learning_rate, b1 = u.beta1, b2 = u.beta2, tiny = (real)1e-8, move;
  switch (optimizer) {
  case SGD:                                           // Robbins and Monro 1951
    return lr * g;
  case MOMENTUM:                                      // Polyak 1964
    *m = b1 * *m + g;
    return lr * *m;
  case ADAGRAD:                                       // Duchi, Hazan and Singer 2011
    *v += g*g;
    return lr * g / (sqrt_(*v) + tiny);
  case ADADELTA:                                      // Zeiler 2012; m: the squares of the moves
    *v = b2 * *v + (1 - b2) * g*g;
    move = sqrt_(*m + (real)1e-6) / sqrt_(*v + (real)1e-6) * g;
    *m = b2 * *m + (1 - b2) * move*move;
    return lr * move;
  case RMSPROP:                                       // Tieleman and Hinton 2012
    *v = b2 * *v + (1 - b2) * g*g;
    return lr * g / (sqrt_(*v) + tiny);
  default:                                            // ADAM, ADAMW: Kingma and Ba 2015
    *m = b1 * *m + (1 - b1) * g;
    *v = b2 * *v + (1 - b2) * g*g;
    return lr * (*m * u.unbias_m) / (sqrt_(*v * u.unbias_v) + tiny);
  }
}

// Weight decay: part of the gradient, but in AdamW apart from it (Loshchilov and Hutter 2019).
DEVICE static inline void update_weight(int optimizer, real *w, real g, real *m, real *v,
                                        Update u) {
  if (optimizer == ADAMW) *w -= u.learning_rate * u.weight_decay * *w;
  else g += u.weight_decay * *w;
  *w -= step_of(optimizer, g, m, v, u);
}

// The factor that brings the gradient's norm down to grad_clip, 1 if it is below (or clip is 0).
DEVICE static inline real clip_factor(const Stats *stats, real grad_clip) {
  double norm = sqrt(stats->norm2);
  return (real)(grad_clip > 0 && norm > grad_clip ? grad_clip / norm : 1);
}

#ifndef GPU
// stats += the sums of N losses and hits, in double: one thread sums each
static void add_loss(Stats *stats, Tensor loss, Tensor hit, int N) {
  parallel_for (k, 2) {
    double sum = 0, *total = k ? &stats->hits : &stats->loss;
    for (int n = 0; n < N; n++) sum += k ? hit.data[n] : loss.data[n];
    *total += sum;
  }
  lap("add_loss", 0, 2.0*N * sizeof(real));
}

// kept = current, and current starts anew: so the host need not stop and look after each update
static void keep_stats(Stats *kept, Stats *current) {
  parallel_for (one, 1) {
    Stats none = {0, 0, 0};
    kept[one] = *current;
    *current = none;
  }
}

// stats->norm2 = sum_i grad[i]^2: of chunks first, so that the order does not depend on the threads
static void gradient_norm(Stats *stats, double *partial, const real *grad, long n) {
  parallel_for (chunk, chunks(n)) {
    double lane[LANES] = {0};
    long i = chunk*CHUNK, end = MIN(n, i + CHUNK);
    for (; i + LANES <= end; i += LANES)
      for (int j = 0; j < LANES; j++) lane[j] += (double)grad[i + j] * grad[i + j];
    for (; i < end; i++) lane[0] += (double)grad[i] * grad[i];
    partial[chunk] = 0;
    for (int j = 0; j < LANES; j++) partial[chunk] += lane[j];
  }
  parallel_for (one, 1) {
    double sum = 0;
    for (long chunk = 0; chunk < chunks(n); chunk++) sum += partial[chunk];
    stats[one].norm2 = sum;
  }
  lap("gradient_norm", 0, 1.0*n * sizeof(real));
}

// w, m and v after one update with the clipped gradient
static void optimizer_update(Tensor w, real *m, real *v, long n, Update u, const Stats *stats) {
  real clip = clip_factor(stats, u.grad_clip);
  parallel_for (chunk, chunks(n)) {
    long begin = chunk*CHUNK, end = MIN(n, begin + CHUNK);
    // A loop for each optimizer, in which the choice is a constant: so the loop vectorises
#define UPDATE_WITH(name)                                                       \
    case name:                                                                  \
      for (long i = begin; i < end; i++)                                        \
        update_weight(name, &w.data[i], clip * w.grad[i], &m[i], &v[i], u);     \
      break;
    switch (u.optimizer) {
      UPDATE_WITH(SGD) UPDATE_WITH(MOMENTUM) UPDATE_WITH(ADAGRAD) UPDATE_WITH(ADADELTA)
      UPDATE_WITH(RMSPROP) UPDATE_WITH(ADAM) UPDATE_WITH(ADAMW)
    }
  }
  lap("optimizer_update", 0, 7.0*n * sizeof(real));
}
#endif   // GPU

// ---- 7. Data ----------------------------------------------------------------------------------
// A token is a byte, so any file is a text. The first 90 % of it train, the rest validates.

typedef struct {
  const char *path;
  unsigned char *byte;
  long size, train_size;
  uint64_t hash;           // of the bytes: a run that is resumed must have the same text
  double floor;            // nats per byte of validation that no model can pass; NaN: unknown
} Text;

// All of a file, in memory that the caller frees; the byte after the last is 0. A file that cannot
// be read is an error that ends the program.
static char *read_file(const char *path, long *size) {
  struct stat info;
  FILE *file = fopen(path, "rb");
  if (!file) die("%s: %s", path, strerror(errno));
  if (!fstat(fileno(file), &info) && S_ISDIR(info.st_mode))
    die("%s is a directory: name a file", path);
  long room = 1 << 16, n = 0;
  char *all = NULL;
  for (size_t got = 1; got > 0; n += got) {
    if (!all || n + 1 >= room) all = (char *)host_alloc(all, room *= 2);
    got = fread(all + n, 1, room - 1 - n, file);
  }
  if (ferror(file)) die("%s: %s", path, strerror(errno));
  fclose(file);
  all[n] = 0;
  *size = n;
  return all;
}

// data/tales.c writes, beside a text, its entropy: the floor. The file is believed only if it
// speaks of a text of this size.
static void read_floor(Text *text) {
  char path[4096], key[64];
  double value, bytes = 0, val = NAN;
  snprintf(path, sizeof path, "%s.floor", text->path);
  FILE *file = fopen(path, "r");
  if (!file) return;
  while (fscanf(file, "%63s %lf", key, &value) == 2) {
    if (!strcmp(key, "bytes")) bytes = value;
    if (!strcmp(key, "val_nats_per_byte")) val = value;
  }
  fclose(file);
  if (bytes == text->size) text->floor = val;
}

static Text text_open(const char *path, int vocab_size) {
  Text text = {path, NULL, 0, 0, 0xcbf29ce484222325u, NAN};
  text.byte = (unsigned char *)read_file(path, &text.size);
  text.train_size = text.size * 9 / 10;
  for (long i = 0; i < text.size; i++) {
    if (text.byte[i] >= vocab_size)
      die("%s: byte %ld is %d, but the vocabulary has %d words: --vocab_size 256 takes any text",
          path, i, text.byte[i], vocab_size);
    text.hash = (text.hash ^ text.byte[i]) * 0x100000001b3u;   // FNV-1a
  }
  read_floor(&text);
  return text;
}

// B windows of T tokens go to the device, with the tokens that follow them as targets.
static void load_windows(Model *m, const unsigned char *byte, const long *start, int B, int T) {
  static int *token, room;
  if (B*T > room) token = (int *)host_alloc(token, 2 * (room = B*T) * sizeof(int));
  int *target = token + B*T;
  for (int b = 0; b < B; b++)
    for (int t = 0; t < T; t++) {
      token[b*T + t] = byte[start[b] + t];
      target[b*T + t] = byte[start[b] + t + 1];
    }
  copy_in(m->token, token, B*T * sizeof(int));
  copy_in(m->target, target, B*T * sizeof(int));
}

#define BATCHES 0xffffffffffffaaaau   // makes the seed of batches another than that of weights

// The windows of micro-batch number `index` of a training run: they depend on the seed and the
// number alone, so that a resumed run, or another arm of a comparison, sees the same text.
static void load_micro_batch(Model *m, const Text *text, uint64_t seed, uint64_t index, int B,
                             int T) {
  long *start = (long *)host_alloc(NULL, B * sizeof(long));
  for (int b = 0; b < B; b++)
    start[b] = random_bits(seed ^ BATCHES, index * B + b) % (text->train_size - T);
  load_windows(m, text->byte, start, B, T);
  free(start);
}

typedef struct { double loss, accuracy; } Score;   // nats per token; the share of hits

// The mean over all consecutive windows of T tokens in bytes begin..end-1, targets shifted by one;
// a last partial window is dropped. At least one window must fit.
static Score evaluate(Model *m, const Text *text, long begin, long end, int T) {
  MicroBatch batch = {m, 0, T, 0};
  Stats sum = {0, 0, 0};
  copy_in(m->stats + EVALUATION, &sum, sizeof sum);
  long windows = (end - begin - 1) / T, most = m->rows / T;
  long *start = (long *)host_alloc(NULL, most * sizeof(long));
  double started = seconds(), shown = started;
  for (long w = 0; w < windows; w += batch.B) {
    batch.B = (int)MIN(most, windows - w);
    for (int b = 0; b < batch.B; b++) start[b] = begin + (w + b) * T;
    load_windows(m, text->byte, start, batch.B, T);
    launch(forward_counted, &batch);
    if (isatty(2) && seconds() > shown + 0.2) {
      shown = seconds();
      fprintf(stderr, "\r  evaluating: %ld of %ld windows, %.0f s left  ", w + batch.B,
              windows, (shown - started) * (windows - w - batch.B) / (w + batch.B));
    }
  }
  if (shown > started) fprintf(stderr, "\r%60s\r", "");
  free(start);
  copy_out(&sum, m->stats + EVALUATION, sizeof sum);
  Score score = {sum.loss / ((double)windows * T), sum.hits / ((double)windows * T)};
  return score;
}

// ---- 8. Checkpoint ----------------------------------------------------------------------------
// A folder that Hugging Face opens: model.safetensors and config.json; and state.safetensors, which
// is all that --resume needs, weights included, so that renaming that one file is the moment at
// which a save happens. Every file is written under a temporary name, brought to the disk, renamed:
// whatever interrupts a save, the file that was there stays whole.

typedef struct { char *at; long size, room; } String;   // a text that grows

__attribute__((format(printf, 2, 3)))
static void append(String *s, const char *format, ...) {
  for (;;) {
    va_list args;
    va_start(args, format);
    long n = vsnprintf(s->at ? s->at + s->size : NULL, s->room - s->size, format, args);
    va_end(args);
    if (n < s->room - s->size) { s->size += n; return; }
    s->at = (char *)host_alloc(s->at, s->room = 2*s->room + n + 1);
  }
}

typedef struct { char path[4096], tmp[4096 + 8]; FILE *file; } Output;

static void output_failed(Output *out) {
  int error = errno;
  unlink(out->tmp);
  die("%s cannot be written: %s; what was there before is kept", out->path, strerror(error));
}

static Output output_open(const char *path) {
  Output out;
  if (snprintf(out.path, sizeof out.path, "%s", path) >= (int)sizeof out.path)
    die("a path of over %d bytes", (int)sizeof out.path - 1);
  snprintf(out.tmp, sizeof out.tmp, "%s.tmp", path);
  out.file = fopen(out.tmp, "wb");
  if (!out.file) output_failed(&out);
  return out;
}

static void output_write(Output *out, const void *p, size_t bytes) {
  if (fwrite(p, 1, bytes, out->file) != bytes) output_failed(out);
}

static void output_close(Output *out) {   // only now does the file appear under its name
  if (fflush(out->file) || fsync(fileno(out->file))) output_failed(out);
  if (fclose(out->file) || rename(out->tmp, out->path)) output_failed(out);
}

static void join(char *path, const char *folder, const char *name) {   // path has 4096 bytes
  if (snprintf(path, 4096, "%s/%s", folder, name) >= 4096) die("a path of over 4095 bytes");
}

static void write_text_file(const char *folder, const char *name, const String *text) {
  char path[4096];
  join(path, folder, name);
  Output out = output_open(path);
  output_write(&out, text->at, text->size);
  output_close(&out);
}

// safetensors: 8 bytes N, little-endian; N bytes of JSON, {"name": {"dtype", "shape",
// "data_offsets"}, ...}; then the numbers, packed. Numbers on the device are written, or read,
// through a host buffer, a tensor at a time.
typedef struct { const char *prefix, *name; int rows, cols; const real *data; } Numbers;

// metadata is JSON, an object of strings. Numbers' data is on the device; cols 0: a vector.
static void safetensors_write(const char *path, const Numbers *list, int n, const char *metadata) {
  String header = {NULL, 0, 0};
  long at = 0, most = 1;
  append(&header, "{\"__metadata__\":%s", metadata);
  for (int i = 0; i < n; i++) {
    long bytes = count_of(list[i].rows, list[i].cols) * sizeof(real);
    append(&header, ",\"%s%s\":{\"dtype\":\"%s\",\"shape\":[%d", list[i].prefix, list[i].name,
           sizeof(real) == 4 ? "F32" : "F64", list[i].rows);
    if (list[i].cols) append(&header, ",%d", list[i].cols);
    append(&header, "],\"data_offsets\":[%ld,%ld]}", at, at + bytes);
    at += bytes;
    most = MAX(most, bytes);
  }
  append(&header, "}");
  while (header.size % 8) append(&header, " ");           // so that the numbers are aligned
  unsigned char length[8];
  for (int i = 0; i < 8; i++) length[i] = (unsigned char)((uint64_t)header.size >> 8*i);
  void *buffer = host_alloc(NULL, most);
  Output out = output_open(path);
  output_write(&out, length, 8);
  output_write(&out, header.at, header.size);
  for (int i = 0; i < n; i++) {
    long bytes = count_of(list[i].rows, list[i].cols) * sizeof(real);
    copy_out(buffer, list[i].data, bytes);
    output_write(&out, buffer, bytes);
  }
  output_close(&out);
  free(buffer);
  free(header.at);
}

// A reader of JSON that trusts nothing: at every byte it knows what may come, and says where it
// found something else.
typedef struct {
  const char *path, *begin, *at, *end;
  int first;               // in an object or array of which no member has been read yet
} Json;
static Json json_of(const char *path, const char *text, long size) {
  Json j = {path, text, text, text + size, 0};
  return j;
}

__attribute__((noreturn))
static void json_error(Json *j, const char *expected) {
  die("%s: at byte %ld of its JSON, expected %s, found %s: damaged, or not such a file?", j->path,
      (long)(j->at - j->begin), expected, j->at < j->end ? "something else" : "the end");
}
static char json_peek(Json *j) {   // the next byte that is not space; 0 at the end
  while (j->at < j->end && strchr(" \t\n\r", *j->at) && *j->at) j->at++;
  return j->at < j->end ? *j->at : 0;
}
static void json_expect(Json *j, char c) {
  char expected[] = {'\'', c, '\'', 0};
  if (json_peek(j) != c) json_error(j, expected);
  j->at++;
  j->first = c == '{' || c == '[';
}
// for (json_expect(j, '{'); json_more(j, '}'); ) goes through the members; likewise with [ ].
static int json_more(Json *j, char close) {
  int more = json_peek(j) != close;
  if (!more) j->at++;
  else if (!j->first) json_expect(j, ',');
  j->first = 0;
  return more;
}
// A string as it stands between its quotes; escapes are checked for form but not decoded, and names
// are compared as they stand. The result lies in the text itself: begin and length.
typedef struct { const char *at; long size; } Span;
static Span json_string(Json *j) {
  json_expect(j, '"');
  Span s = {j->at, 0};
  for (; j->at < j->end && *j->at != '"'; j->at++) {
    if ((unsigned char)*j->at < 32) json_error(j, "no control character inside a string");
    if (*j->at == '\\' && ++j->at == j->end) break;
  }
  s.size = j->at - s.at;
  json_expect(j, '"');
  return s;
}
static Span json_key(Json *j) {   // of a member of an object, and the colon
  Span s = json_string(j);
  json_expect(j, ':');
  return s;
}
static long json_integer(Json *j) {   // 0 or more
  long n = 0, digits = 0;
  for (json_peek(j); j->at < j->end && isdigit((unsigned char)*j->at); j->at++, digits++)
    if (n > (INT64_MAX - 9) / 10) json_error(j, "a smaller number");
    else n = 10*n + (*j->at - '0');
  if (!digits) json_error(j, "a whole number, 0 or more");
  return n;
}
static void json_skip(Json *j, int depth) {   // any value
  char c = json_peek(j);
  if (depth > 64) json_error(j, "less nesting");
  if (c == '"') json_string(j);
  else if (c == '{') {
    for (json_expect(j, '{'); json_more(j, '}'); json_skip(j, depth + 1)) json_key(j);
  } else if (c == '[') {
    for (json_expect(j, '['); json_more(j, ']'); ) json_skip(j, depth + 1);
  } else {
    const char *start = j->at;
    while (j->at < j->end && (isalnum((unsigned char)*j->at) || strchr("+-.", *j->at)) && *j->at)
      j->at++;
    if (j->at == start) json_error(j, "a value");
  }
}
static int span_is(Span s, const char *text) {
  return s.size == (long)strlen(text) && !memcmp(s.at, text, s.size);
}

typedef struct { Span name; char dtype[8]; int dims; long shape[8], begin, end; } Saved;
typedef struct {
  const char *path;
  FILE *file;
  char *header;
  long data_at;            // where in the file the numbers start
  Saved *tensor;           // sorted by name
  int n;
  Span metadata;           // the text of the object, empty if there is none
} Safetensors;

static int dtype_size(const char *dtype) {
  static const struct { const char *name; int size; } known[] = {
    {"F64", 8}, {"F32", 4}, {"F16", 2}, {"BF16", 2}, {"I64", 8}, {"I32", 4}, {"I16", 2}, {"I8", 1},
    {"U8", 1}, {"BOOL", 1}, {"U16", 2}, {"U32", 4}, {"U64", 8}};
  for (size_t i = 0; i < sizeof known / sizeof *known; i++)
    if (!strcmp(dtype, known[i].name)) return known[i].size;
  return 0;
}

// {"dtype": .., "shape": [..], "data_offsets": [.., ..]}
static Saved read_saved(Json *j, Span name) {
  Saved s = {name, "", 0, {0}, -1, -1};
  int have = 0;
  for (json_expect(j, '{'); json_more(j, '}'); ) {
    Span key = json_key(j);
    if (span_is(key, "dtype")) {
      Span dtype = json_string(j);
      snprintf(s.dtype, sizeof s.dtype, "%.*s", (int)MIN(dtype.size, 7), dtype.at);
      have |= 1;
    } else if (span_is(key, "shape")) {
      for (s.dims = 0, json_expect(j, '['); json_more(j, ']'); s.dims++) {
        if (s.dims == 8) json_error(j, "a shape of at most 8 dimensions");
        s.shape[s.dims] = json_integer(j);
      }
      have |= 2;
    } else if (span_is(key, "data_offsets")) {
      json_expect(j, '[');
      s.begin = json_integer(j);
      json_expect(j, ',');
      s.end = json_integer(j);
      json_expect(j, ']');
      have |= 4;
    } else json_error(j, "\"dtype\", \"shape\" or \"data_offsets\"");
  }
  if (have != 7) json_error(j, "dtype, shape and data_offsets before this");
  return s;
}

static int by_name(const void *a, const void *b) {
  const Saved *x = (const Saved *)a, *y = (const Saved *)b;
  int order = memcmp(x->name.at, y->name.at, MIN(x->name.size, y->name.size));
  return order ? order : (x->name.size > y->name.size) - (x->name.size < y->name.size);
}
static int by_place(const void *a, const void *b) {
  const Saved *x = (const Saved *)a, *y = (const Saved *)b;
  long order = x->begin != y->begin ? x->begin - y->begin : x->end - y->end;
  return (order > 0) - (order < 0);
}

// The tensors must be packed: no holes, no overlaps, nothing after the last, each as long as its
// shape says. Then no offset can point outside the file.
static void check_saved(Safetensors *st, long file_size) {
  long at = 0;
  if (st->n == 0) die("%s has no tensor at all: is it a GPT-2?", st->path);
  qsort(st->tensor, st->n, sizeof(Saved), by_place);
  for (int i = 0; i < st->n; i++) {
    Saved *s = &st->tensor[i];
    long bytes = dtype_size(s->dtype);
    int name = (int)MIN(s->name.size, 80);
    if (!bytes) die("%s: %.*s has unknown dtype %s", st->path, name, s->name.at, s->dtype);
    for (int d = 0; d < s->dims; d++) {
      if (s->shape[d] && bytes > file_size / s->shape[d])
        die("%s: the shape of %.*s is larger than the file", st->path, name, s->name.at);
      bytes *= s->shape[d];
    }
    if (s->begin != at || s->end - s->begin != bytes)
      die("%s: %.*s should take %ld bytes from %ld on, its data_offsets say %ld to %ld: damaged?",
          st->path, name, s->name.at, bytes, at, s->begin, s->end);
    at = s->end;
  }
  if (st->data_at + at != file_size)
    die("%s: its header speaks of %ld bytes, the file has %ld: %s", st->path, st->data_at + at,
        file_size, file_size < st->data_at + at ? "truncated?" : "damaged?");
  qsort(st->tensor, st->n, sizeof(Saved), by_name);
  for (int i = 1; i < st->n; i++)
    if (!by_name(&st->tensor[i - 1], &st->tensor[i]))
      die("%s: two tensors are called %.*s", st->path, (int)MIN(st->tensor[i].name.size, 80),
          st->tensor[i].name.at);
}

// Opens a file and checks its header; any fault in it ends the program with a line that names it.
static Safetensors safetensors_open(const char *path) {
  Safetensors st = {path, fopen(path, "rb"), NULL, 0, NULL, 0, {"", 0}};
  struct stat info;
  if (!st.file) die("%s: %s", path, strerror(errno));
  if (fstat(fileno(st.file), &info) || !S_ISREG(info.st_mode)) die("%s is not a file", path);
  unsigned char length[8];
  uint64_t size = 0;
  if (fread(length, 1, 8, st.file) != 8) die("%s: %ld bytes, not even a header: truncated?", path,
                                             (long)info.st_size);
  for (int i = 0; i < 8; i++) size |= (uint64_t)length[i] << 8*i;
  if (size > 100000000 || (long)size > info.st_size - 8)
    die("%s: its header should have %llu bytes, the file has %ld: truncated, or not safetensors?",
        path, (unsigned long long)size, (long)info.st_size);
  st.header = (char *)host_alloc(NULL, size + 1);
  if (fread(st.header, 1, size, st.file) != size) die("%s: its header cannot be read", path);
  st.data_at = 8 + (long)size;
  Json j = json_of(path, st.header, (long)size);
  int room = 0;
  if (!size || *st.header != '{') json_error(&j, "'{'");
  for (json_expect(&j, '{'); json_more(&j, '}'); ) {
    Span name = json_key(&j);
    if (!span_is(name, "__metadata__")) {
      if (st.n == room)
        st.tensor = (Saved *)host_alloc(st.tensor, (room = 2*room + 64) * sizeof(Saved));
      st.tensor[st.n++] = read_saved(&j, name);
      continue;
    }
    if (st.metadata.size) json_error(&j, "__metadata__ once");
    json_peek(&j);
    st.metadata.at = j.at;
    for (json_expect(&j, '{'); json_more(&j, '}'); json_string(&j)) json_key(&j);
    st.metadata.size = j.at - st.metadata.at;
  }
  while (j.at < j.end && *j.at == ' ') j.at++;
  if (j.at < j.end) json_error(&j, "only spaces after the last '}'");
  check_saved(&st, (long)info.st_size);
  return st;
}

static void safetensors_close(Safetensors *st) {
  fclose(st->file);
  free(st->header);
  free(st->tensor);
}

static const Saved *safetensors_find(const Safetensors *st, const char *prefix, const char *name) {
  char full[128];
  snprintf(full, sizeof full, "%s%s", prefix, name);
  Saved wanted = {{full, (long)strlen(full)}, "", 0, {0}, 0, 0};
  if (!st->n) return NULL;
  return (const Saved *)bsearch(&wanted, st->tensor, st->n, sizeof(Saved), by_name);
}

static double half_to_double(unsigned bits) {   // IEEE binary16
  int exponent = bits >> 10 & 31, fraction = bits & 1023;
  double x = exponent == 0 ? ldexp(fraction, -24)
           : exponent == 31 ? (fraction ? NAN : INFINITY) : ldexp(1024 + fraction, exponent - 25);
  return bits >> 15 ? -x : x;
}

// Reads a floating-point tensor of any precision into numbers on the host; the caller frees them.
static real *safetensors_read(const Safetensors *st, const Saved *s) {
  int size = dtype_size(s->dtype), name = (int)MIN(s->name.size, 80);
  long n = (s->end - s->begin) / size;
  unsigned char *raw = (unsigned char *)host_alloc(NULL, n * size);
  real *numbers = (real *)host_alloc(NULL, n * sizeof(real));
  if (fseek(st->file, st->data_at + s->begin, SEEK_SET) ||
      (long)fread(raw, size, n, st->file) != n)
    die("%s: %.*s cannot be read: truncated?", st->path, name, s->name.at);
  for (long i = 0; i < n; i++) {
    double d; float f; uint16_t h; uint32_t w;
    if (!strcmp(s->dtype, "F32")) memcpy(&f, raw + 4*i, 4), numbers[i] = (real)f;
    else if (!strcmp(s->dtype, "F64")) memcpy(&d, raw + 8*i, 8), numbers[i] = (real)d;
    else if (!strcmp(s->dtype, "F16"))
      memcpy(&h, raw + 2*i, 2), numbers[i] = (real)half_to_double(h);
    else if (!strcmp(s->dtype, "BF16"))                   // the upper half of a float
      memcpy(&h, raw + 2*i, 2), w = (uint32_t)h << 16, memcpy(&f, &w, 4), numbers[i] = (real)f;
    else die("%s: %.*s is %s, not F32, F64, F16 or BF16", st->path, name, s->name.at, s->dtype);
  }
  free(raw);
  return numbers;
}

// Reads a tensor that must be there, with this shape, to the device.
static void read_tensor(const Safetensors *st, const char *prefix, const char *name, int rows,
                        int cols, real *device) {
  const Saved *s = safetensors_find(st, prefix, name);
  if (!s) die("%s has no tensor %s%s: is it a GPT-2?", st->path, prefix, name);
  if (s->dims != (cols ? 2 : 1) || s->shape[0] != rows || (cols && s->shape[1] != cols)) {
    char found[100] = "";
    for (int d = 0; d < s->dims; d++)
      snprintf(found + strlen(found), sizeof found - strlen(found), "%s%ld", d ? "," : "",
               s->shape[d]);
    die("%s: %s has shape [%s], expected [%d%s%.0d]", st->path, name, found, rows,
        cols ? "," : "", cols);
  }
  real *numbers = safetensors_read(st, s);
  copy_in(device, numbers, count_of(rows, cols) * sizeof(real));
  free(numbers);
}

// The shape of a model from folder/config.json. What this program does not do is an error.
static Config read_config(const char *folder) {
  Config c = {0, 0, 0, 0, 0};
  const struct { const char *key; int *value, most; } wanted[] = {
    {"n_layer", &c.n_layer, 1000}, {"n_head", &c.n_head, 1000}, {"n_embd", &c.n_embd, 65536},
    {"n_positions", &c.block_size, 1048576}, {"vocab_size", &c.vocab_size, 10000000}};
  char path[4096];
  long size;
  join(path, folder, "config.json");
  char *text = read_file(path, &size);
  Json j = json_of(path, text, size);
  for (json_expect(&j, '{'); json_more(&j, '}'); ) {
    Span key = json_key(&j);
    int i = 0, quoted = json_peek(&j) == '"';
    while (i < 5 && !span_is(key, wanted[i].key)) i++;
    if (i < 5) {
      long value = json_integer(&j);
      if (value < 1 || value > wanted[i].most)
        die("%s: %s is %ld, expected 1 to %d", path, wanted[i].key, value, wanted[i].most);
      *wanted[i].value = (int)value;
    } else if (span_is(key, "activation_function") && quoted) {
      Span name = json_string(&j);
      if (!span_is(name, "gelu_new"))
        die("%s: activation_function is %.*s, this program has gelu_new only", path,
            (int)MIN(name.size, 80), name.at);
    } else if (span_is(key, "layer_norm_epsilon") && fabs(strtod(j.at, NULL) - 1e-5) > 1e-9) {
      die("%s: layer_norm_epsilon is %g, this program has 1e-5 only", path, strtod(j.at, NULL));
    } else json_skip(&j, 0);
  }
  if (json_peek(&j) || j.at < j.end) json_error(&j, "nothing after the last '}'");
  for (int i = 0; i < 5; i++)
    if (!*wanted[i].value) die("%s has no %s: is it of a GPT-2?", path, wanted[i].key);
  if (c.n_embd % c.n_head)
    die("%s: n_embd %d is not divisible by n_head %d", path, c.n_embd, c.n_head);
  free(text);
  return c;
}

static void write_config(const char *folder, Config c) {
  String s = {NULL, 0, 0};
  append(&s, "{\n  \"model_type\": \"gpt2\",\n  \"architectures\": [\"GPT2LMHeadModel\"],\n"
         "  \"vocab_size\": %d,\n  \"n_positions\": %d,\n  \"n_embd\": %d,\n  \"n_layer\": %d,\n"
         "  \"n_head\": %d,\n", c.vocab_size, c.block_size, c.n_embd, c.n_layer, c.n_head);
  append(&s, "  \"n_inner\": null,\n  \"activation_function\": \"gelu_new\",\n"
         "  \"layer_norm_epsilon\": 1e-05,\n  \"resid_pdrop\": 0.0,\n  \"embd_pdrop\": 0.0,\n"
         "  \"attn_pdrop\": 0.0,\n  \"initializer_range\": 0.02,\n"
         "  \"tie_word_embeddings\": true,\n  \"bos_token_id\": null,\n"
         "  \"eos_token_id\": null\n}\n");
  write_text_file(folder, "config.json", &s);
  free(s.at);
}

// The weights of folder/model.safetensors. The hub's own files have no prefix, and masks besides
// the weights: what is not asked for is left alone.
static void read_weights(Model *m, const char *folder) {
  char path[4096];
  join(path, folder, "model.safetensors");
  Safetensors st = safetensors_open(path);
  const char *prefix = safetensors_find(&st, "", "wte.weight") ? "" : "transformer.";
  for (int i = 0; i < m->n_parameters; i++) {
    Entry *e = &m->parameter[i];
    read_tensor(&st, prefix, e->name, e->rows, e->cols, e->tensor->data);
  }
  safetensors_close(&st);
}

static const char *const PART[] = {"transformer.", "m.", "v."};   // of state.safetensors

// One of the three blocks of numbers that an update changes: the weights, and the moments.
static real *part_of_state(Model *m, int part, const Entry *e) {
  real *base = part ? m->moment[part - 1] : m->weights.data;
  return base + (e->tensor->data - m->weights.data);
}

static void save_model(Model *m, const char *folder, const char *state_metadata) {
  Numbers *list = (Numbers *)host_alloc(NULL, 3 * m->n_parameters * sizeof(Numbers));
  for (int part = 0; part < 3; part++)
    for (int i = 0; i < m->n_parameters; i++) {
      Entry *e = &m->parameter[i];
      Numbers *n = &list[part * m->n_parameters + i];
      n->prefix = PART[part]; n->name = e->name; n->rows = e->rows; n->cols = e->cols;
      n->data = part_of_state(m, part, e);
    }
  char path[4096];
  write_config(folder, m->config);
  join(path, folder, "model.safetensors");
  safetensors_write(path, list, m->n_parameters, "{\"format\":\"pt\"}");
  join(path, folder, "state.safetensors");
  safetensors_write(path, list, 3 * m->n_parameters, state_metadata);
  free(list);
}

static void read_state(Model *m, const Safetensors *st) {
  for (int part = 0; part < 3; part++)
    for (int i = 0; i < m->n_parameters; i++) {
      Entry *e = &m->parameter[i];
      read_tensor(st, PART[part], e->name, e->rows, e->cols, part_of_state(m, part, e));
    }
}

// ---- 9. Training ------------------------------------------------------------------------------
// In this order: an update; samples; log and plot; saving and resuming; what a person sees; at the
// end the loop, train(). A reader in a hurry needs update() and train().

static struct {
  const char *text, *out, *init, *optimizer, *precision;
  int n_layer, n_head, n_embd, block_size, batch_size, accumulate, max_steps, vocab_size, warmup;
  int eval_interval, seed, threads, resume, compare, eval, profile;
  double learning_rate, min_lr, weight_decay, beta1, beta2, grad_clip;
} opt;   // each has the name of its option: room 10

// A model in training. Usually there is one; --compare has two, that see the same tokens.
typedef struct {
  const char *name;
  Model model;
  MicroBatch batch;        // stays where it is, so that launch_again() can replay it
  int accumulate;          // micro-batches per update
  long updates;
  double seconds;          // in training: no evaluation, no saving
  long looked_at;          // updates whose loss the host has seen
  double since;            // when it began with those that it has not
  double loss, accuracy, norm;   // of the last that was looked at
  Score val;
  double val_at_equal_updates;   // the loss, when single-step has made as many as multi-step will
} Arm;

typedef struct {           // of log.csv
  int arm;
  long update, tokens;
  double train_loss, train_accuracy, grad_norm, learning_rate, val_loss, val_accuracy;
  double step_seconds, seconds;   // of this update; of all so far, without evaluation and saving
} Row;                     // val: NaN if there was no evaluation

static struct {
  Text text;
  Arm arm[2];
  int arms;
  long rounds;             // a round gives each arm the same micro-batches; usually it is a step
  int round_size;          // micro-batches of a round
  Row *row;
  long rows, room;
  long saved;              // the update after which --resume began: it need not be saved again
  double shown;            // when the live line was
  int on_terminal;
} run;

// Linear warmup, then half a cosine down to min_lr. When arms are compared a step is a micro-batch,
// so that both have the same rate at the same token.
static double learning_rate(const Arm *arm, long updates) {   // updates: how many there were before
  double step = (double)updates * (run.arms == 2 ? arm->accumulate : 1);
  double low = MIN(opt.min_lr, opt.learning_rate);
  if (step < opt.warmup) return opt.learning_rate * (step + 1) / (opt.warmup + 1);
  if (step >= opt.max_steps) return low;
  double done = (step - opt.warmup) / (opt.max_steps - opt.warmup);
  return low + (opt.learning_rate - low) * (1 + cos(3.141592653589793 * done)) / 2;
}

typedef struct { Model *model; Update u; int slot; } UpdateStep;

static void update_step(void *argument) {   // from the gradients, which it zeroes for the next
  UpdateStep *s = (UpdateStep *)argument;
  Model *m = s->model;
  Tensor vectors = {m->weights.data + m->n_matrices, m->weights.grad + m->n_matrices};
  Update no_decay = s->u;
  no_decay.weight_decay = 0;
  gradient_norm(m->stats + CURRENT, m->partial, m->weights.grad, m->n_weights);
  optimizer_update(m->weights, m->moment[0], m->moment[1], m->n_matrices, s->u, m->stats + CURRENT);
  optimizer_update(vectors, m->moment[0] + m->n_matrices, m->moment[1] + m->n_matrices,
                   m->n_weights - m->n_matrices, no_decay, m->stats + CURRENT);
  keep_stats(m->stats + KEPT + s->slot, m->stats + CURRENT);
  zero(m->weights.grad, m->n_weights);
}

static Update update_values(long updates, double rate) {
  Update u;
  memset(&u, 0, sizeof u);
  for (u.optimizer = 0; strcmp(opt.optimizer, OPTIMIZER[u.optimizer]); ) u.optimizer++;
  u.learning_rate = (real)rate; u.weight_decay = (real)opt.weight_decay;
  u.beta1 = (real)opt.beta1; u.beta2 = (real)opt.beta2; u.grad_clip = (real)opt.grad_clip;
  u.unbias_m = (real)(1 / (1 - pow(opt.beta1, updates + 1)));
  u.unbias_v = (real)(1 / (1 - pow(opt.beta2, updates + 1)));
  return u;
}

// One update: accumulate micro-batches forward and backward, their gradients added, then the
// optimizer. The loss is a sum over tokens divided by the tokens of the whole update, so this is
// one batch that is accumulate times as large.
static void update(Arm *arm, double rate) {
  int B = opt.batch_size, T = opt.block_size;
  MicroBatch batch = {&arm->model, B, T, (real)(1.0 / ((double)arm->accumulate * B * T))};
  arm->batch = batch;
  for (int k = 0; k < arm->accumulate; k++) {
    load_micro_batch(&arm->model, &run.text, opt.seed, arm->updates * arm->accumulate + k, B, T);
    launch_again(micro_batch, &arm->batch);
  }
  UpdateStep step = {&arm->model, update_values(arm->updates, rate),
                     (int)(arm->updates % STATS_KEPT)};
  launch(update_step, &step);
  arm->updates++;
}

static void add_row(Row row) {
  if (run.rows == run.room)
    run.row = (Row *)host_alloc(run.row, (run.room = 2*run.room + 1024) * sizeof(Row));
  run.row[run.rows++] = row;
}

static long update_tokens(const Arm *arm) {   // that one update sees
  return (long)arm->accumulate * opt.batch_size * opt.block_size;
}
static long tokens_of(const Arm *arm) { return arm->updates * update_tokens(arm); }   // so far

// A row for each update that the host has not looked at yet.
static void read_stats(Arm *arm) {
  Stats kept[STATS_KEPT];
  copy_out(kept, arm->model.stats + KEPT, sizeof kept);   // a GPU must finish before time is taken
  double each = (seconds() - arm->since) / (arm->updates - arm->looked_at);
  long tokens = update_tokens(arm);
  for (long u = arm->looked_at; u < arm->updates; u++) {
    Stats *s = &kept[u % STATS_KEPT];
    arm->loss = s->loss / tokens;
    arm->accuracy = s->hits / tokens;
    arm->norm = sqrt(s->norm2);
    arm->seconds += each;
    if (!isfinite(arm->loss) || !isfinite(arm->norm))
      die("step %ld: the loss is %g, the gradient's norm %g: the last good checkpoint is kept; "
          "lower --learning_rate, or set --grad_clip", u + 1, arm->loss, arm->norm);
    Row row = {(int)(arm - run.arm), u + 1, (u + 1) * tokens, arm->loss, arm->accuracy, arm->norm,
               learning_rate(arm, u), NAN, NAN, each, arm->seconds};
    add_row(row);
  }
  arm->looked_at = arm->updates;
}

// ---- Samples

// The number of bytes of the UTF-8 character at p, of which n bytes are there: 1 to 4; 0 if what is
// there is the beginning of one; -1 if it is none.
static int utf8_length(const unsigned char *p, long n) {
  int length = p[0] < 0x80 ? 1 : p[0] < 0xc2 ? -1 : p[0] < 0xe0 ? 2 : p[0] < 0xf0 ? 3
             : p[0] < 0xf5 ? 4 : -1;
  for (int i = 1; i < MIN(length, n); i++) {
    int low = i > 1 ? 0x80 : p[0] == 0xe0 ? 0xa0 : p[0] == 0xf0 ? 0x90 : 0x80;   // no overlong form
    int high = i > 1 ? 0xbf : p[0] == 0xed ? 0x9f : p[0] == 0xf4 ? 0x8f : 0xbf;  // no surrogate
    if (p[i] < low || p[i] > high) return -1;
  }
  return length > n ? 0 : length;
}

// Prints bytes as text: whole characters; U+FFFD for what is none, and for control characters,
// which could do anything to a terminal. Returns how many bytes were printed: a character that is
// cut at the end is left for the next call, unless this is the last.
static long print_text(const unsigned char *p, long n, int last) {
  long i = 0;
  while (i < n) {
    int length = utf8_length(p + i, n - i);
    if (length == 0 && !last) break;
    int control = length == 1 && p[i] < 32 && !strchr("\n\t", p[i]);
    if (length < 1 || control || p[i] == 127 || !p[i]) fputs("\xef\xbf\xbd", stdout), i++;
    else fwrite(p + i, 1, length, stdout), i += length;
  }
  fflush(stdout);
  return i;
}

// A few lines that the model writes after a line break: bytes drawn from softmax(logits / 0.8).
// The whole context is computed again for each byte; generate.c does better.
static void print_sample(Model *m, long seed) {
  unsigned char text[512] = "\n";
  int T = m->config.block_size, V = m->config.vocab_size, words = MIN(V, 256);
  int n = (int)MIN(240, MAX(40, 5e10 / (model_flop(m, T, T) / 3)));   // shorter if that is slow
  real *logits = (real *)host_alloc(NULL, V * sizeof(real));
  for (int i = 1; i <= n; i++) {
    int start = MAX(0, i - T);
    MicroBatch f = {m, 1, i - start, 0};
    int token[512];
    for (int t = 0; t < f.T; t++) token[t] = MIN(text[start + t], V - 1);
    copy_in(m->token, token, f.T * sizeof(int));
    launch(forward_only, &f);
    copy_out(logits, m->logits.data + (long)(f.T - 1) * V, V * sizeof(real));
    double sum = 0, max = logits[0], draw = random_uniform(seed, i);
    for (int v = 0; v < words; v++) max = MAX(max, logits[v]);
    for (int v = 0; v < words; v++) sum += logits[v] = (real)exp((logits[v] - max) / 0.8);
    int v = 0;
    for (draw *= sum; v < words - 1 && draw >= logits[v]; v++) draw -= logits[v];
    text[i] = (unsigned char)v;
  }
  printf("  | ");
  for (int i = 1, from = 1; i <= n; i++)          // each line behind a bar
    if (text[i] == '\n' || i == n) {
      print_text(text + from, i - from, 1);
      printf(i < n ? "\n  | " : "\n");
      from = i + 1;
    }
  free(logits);
}

// ---- log.csv and loss.svg

static void write_log(void) {
  String s = {NULL, 0, 0};
  append(&s, "arm,update,tokens,train_loss,train_accuracy,grad_norm,learning_rate,val_loss,"
         "val_accuracy,step_seconds,seconds\n");
  for (long i = 0; i < run.rows; i++) {
    Row *r = &run.row[i];
    append(&s, "%s,%ld,%ld,%.6f,%.6f,%.6f,%.6g,", run.arm[r->arm].name, r->update, r->tokens,
           r->train_loss, r->train_accuracy, r->grad_norm, r->learning_rate);
    if (isfinite(r->val_loss)) append(&s, "%.6f,%.6f", r->val_loss, r->val_accuracy);
    else append(&s, ",");
    append(&s, ",%.6f,%.3f\n", r->step_seconds, r->seconds);
  }
  write_text_file(opt.out, "log.csv", &s);
  free(s.at);
}

// The rows of a log up to an update, when a run is resumed. A log that is not there, or is of
// something else, costs the beginning of the curve and nothing more.
static void read_log(Arm *arm, long last) {
  char path[4096], line[512];
  size_t name = strlen(arm->name);
  join(path, opt.out, "log.csv");
  FILE *file = fopen(path, "r");
  while (file && fgets(line, sizeof line, file)) {
    double value[11];
    int fields = 0;
    for (char *p = line; p && fields < 11; p = strchr(p, ','), p += p != NULL)
      value[fields++] = *p == ',' || *p == '\n' ? NAN : strtod(p, NULL);
    if (fields < 11 || strncmp(line, arm->name, name) || line[name] != ',') continue;
    if (!(value[1] >= 0 && value[1] <= last)) continue;
    Row row = {(int)(arm - run.arm), (long)value[1], (long)value[2], value[3], value[4], value[5],
               value[6], value[7], value[8], value[9], value[10]};
    add_row(row);
    arm->seconds = row.seconds;
    arm->loss = row.train_loss;
  }
  if (file) fclose(file);
}

// loss.svg: training and validation loss of each arm over the tokens seen, and the floor.
typedef struct { double x0, x1, y0, y1; } Axes;   // the values at the edges of the plot
enum { WIDTH = 880, HEIGHT = 500, LEFT = 64, RIGHT = 190, TOP = 52, BOTTOM = 56 };   // pixels
static double plot_x(Axes a, double x) {
  return LEFT + (x - a.x0) / (a.x1 - a.x0) * (WIDTH - LEFT - RIGHT);
}
static double plot_y(Axes a, double y) {
  return TOP + (a.y1 - y) / (a.y1 - a.y0) * (HEIGHT - TOP - BOTTOM);
}

static double nice_step(double range) {   // 1, 2 or 5 times a power of ten: 4 to 10 to the range
  double power = pow(10, floor(log10(range)));
  return range / power >= 5 ? power : range / power >= 2 ? power / 2 : power / 5;
}

static void svg_text(String *s, double x, double y, const char *style, const char *text) {
  append(s, "<text x=\"%.1f\" y=\"%.1f\" %s>%s</text>\n", x, y, style, text);
}

// The curve of an arm: each point is the mean of the values that fall on its two pixels' width, so
// that a long run is no thicker than a short one. Returns the last value, NaN if there is none.
static double svg_curve(String *s, Axes a, int arm, int val, const char *style) {
  double last = NAN, sum = 0, n = 0, at = -1;
  append(s, "<polyline fill=\"none\" %s points=\"", style);
  for (long i = 0; i <= run.rows; i++) {
    Row *r = i < run.rows ? &run.row[i] : NULL;
    if (r && (r->arm != arm || !isfinite(val ? r->val_loss : r->train_loss))) continue;
    double x = r ? floor(plot_x(a, r->tokens) / 2) * 2 : -2;
    if (n && x != at) append(s, "%.1f,%.1f ", at, plot_y(a, last = sum / n));
    if (x != at) sum = n = 0, at = x;
    if (r) sum += val ? r->val_loss : r->train_loss, n++;
  }
  append(s, "\"/>\n");
  return last;
}

static void svg_axes(String *s, Axes a) {
  char label[64];
  double step = nice_step(a.y1 - a.y0);
  for (double y = ceil(a.y0 / step) * step; y <= a.y1 + 1e-9; y += step) {
    append(s, "<path d=\"M%d %.1fH%d\" stroke=\"#e4e4e4\"/>\n", LEFT, plot_y(a, y), WIDTH - RIGHT);
    snprintf(label, sizeof label, "%.*f", step < 0.1 ? 2 : 1, y);
    svg_text(s, LEFT - 8, plot_y(a, y) + 4, "text-anchor=\"end\"", label);
  }
  step = nice_step(a.x1 - a.x0);
  double unit = a.x1 >= 2e6 ? 1e6 : a.x1 >= 2e3 ? 1e3 : 1;
  for (double x = 0; x <= a.x1 * (1 + 1e-9); x += step) {
    snprintf(label, sizeof label, "%g%s", x / unit, x == 0 ? "" : unit == 1e6 ? " M"
             : unit == 1e3 ? " K" : "");
    append(s, "<path d=\"M%.1f %dv5\" stroke=\"#888\"/>\n", plot_x(a, x), HEIGHT - BOTTOM);
    svg_text(s, plot_x(a, x), HEIGHT - BOTTOM + 20, "text-anchor=\"middle\"", label);
  }
  append(s, "<path d=\"M%d %dV%dH%d\" fill=\"none\" stroke=\"#888\"/>\n", LEFT, TOP,
         HEIGHT - BOTTOM, WIDTH - RIGHT);
  svg_text(s, (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 14, "text-anchor=\"middle\"", "tokens seen");
  append(s, "<text transform=\"translate(18 %d) rotate(-90)\" text-anchor=\"middle\">"
         "loss, nats per token</text>\n", (TOP + HEIGHT - BOTTOM) / 2);
}

static void write_plot(void) {
  static const char *const color[] = {"#1f77b4", "#d1495b"};
  Axes a = {0, 1, INFINITY, -INFINITY};
  for (long i = 0; i < run.rows; i++) {
    a.x1 = MAX(a.x1, run.row[i].tokens);
    a.y0 = fmin(a.y0, fmin(run.row[i].val_loss, run.row[i].train_loss));   // which pass over NaN
    a.y1 = fmax(a.y1, fmax(run.row[i].val_loss, run.row[i].train_loss));
  }
  a.y0 = fmin(a.y0, run.text.floor);
  if (!(a.y1 > a.y0)) return;
  a.y0 = MAX(0, a.y0 - 0.05 * (a.y1 - a.y0));
  String s = {NULL, 0, 0};
  append(&s, "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 %d %d\" "
         "font-family=\"Helvetica, Arial, sans-serif\" font-size=\"13\" fill=\"#333\">\n"
         "<rect width=\"%d\" height=\"%d\" fill=\"white\"/>\n", WIDTH, HEIGHT, WIDTH, HEIGHT);
  char title[256], style[128], label[160];
  snprintf(title, sizeof title, "%d layers, %d heads, %d channels, context %d, %s", opt.n_layer,
           opt.n_head, opt.n_embd, opt.block_size, opt.optimizer);
  svg_text(&s, LEFT, 28, "font-size=\"16\"", title);
  svg_axes(&s, a);
  if (isfinite(run.text.floor)) {
    append(&s, "<path d=\"M%d %.1fH%d\" stroke=\"#555\" stroke-dasharray=\"5 4\"/>\n", LEFT,
           plot_y(a, run.text.floor), WIDTH - RIGHT);
    snprintf(label, sizeof label, "floor %.3f", run.text.floor);
    svg_text(&s, WIDTH - RIGHT + 8, plot_y(a, run.text.floor) + 4, "fill=\"#555\"", label);
  }
  for (int arm = 0; arm < run.arms; arm++) {      // thin: training; thick: validation
    snprintf(style, sizeof style, "stroke=\"%s\" stroke-width=\"1\" opacity=\"0.45\"", color[arm]);
    svg_curve(&s, a, arm, 0, style);
    snprintf(style, sizeof style, "stroke=\"%s\" stroke-width=\"2.5\"", color[arm]);
    double val = svg_curve(&s, a, arm, 1, style);
    for (long i = 0; i < run.rows; i++)           // and a dot for each evaluation
      if (run.row[i].arm == arm && isfinite(run.row[i].val_loss))
        append(&s, "<circle cx=\"%.1f\" cy=\"%.1f\" r=\"3.5\" fill=\"%s\"/>\n",
               plot_x(a, run.row[i].tokens), plot_y(a, run.row[i].val_loss), color[arm]);
    snprintf(label, sizeof label, "%s%svalidation %.3f", run.arms == 2 ? run.arm[arm].name : "",
             run.arms == 2 ? ", " : "", val);
    snprintf(style, sizeof style, "fill=\"%s\" font-weight=\"bold\"", color[arm]);
    svg_text(&s, WIDTH - RIGHT + 8, TOP + 14 + 44*arm, style, label);
    snprintf(label, sizeof label, "thin: training %.3f", run.arm[arm].loss);
    snprintf(style, sizeof style, "fill=\"%s\" opacity=\"0.8\"", color[arm]);
    svg_text(&s, WIDTH - RIGHT + 8, TOP + 32 + 44*arm, style, label);
  }
  append(&s, "</svg>\n");
  write_text_file(opt.out, "loss.svg", &s);
  free(s.at);
}

// ---- Saving, resuming, evaluating

// A string of JSON: quotes, backslashes and control characters escaped.
static void append_json(String *s, const char *text) {
  append(s, "\"");
  const unsigned char *p = (const unsigned char *)text, *end = p + strlen(text);
  while (p < end) {                                // what is not UTF-8 is escaped, byte by byte
    int length = utf8_length(p, end - p);
    if (*p == '"' || *p == '\\') append(s, "\\%c", *p++);
    else if (*p < 32 || length < 1) append(s, "\\u%04x", *p++);
    else append(s, "%.*s", length, p), p += length;
  }
  append(s, "\"");
}

static void append_options(String *metadata);    // room 10: ,"name":"value" for each

static void weights_norm(void *argument) {
  Model *m = (Model *)argument;
  gradient_norm(m->stats + EVALUATION, m->partial, m->weights.data, m->n_weights);
}

static void save(Arm *arm) {
  Stats weights;                                 // the last update may have been one too many
  launch(weights_norm, &arm->model);
  copy_out(&weights, arm->model.stats + EVALUATION, sizeof weights);
  if (!isfinite(weights.norm2))
    die("step %ld: a weight became inf or nan: the last good checkpoint is kept; lower "
        "--learning_rate", arm->updates);
  String s = {NULL, 0, 0};
  append(&s, "{\"format\":\"pt\",\"step\":\"%ld\",\"text_hash\":\"%016llx\",\"val\":\"%a %a\"",
         arm->updates, (unsigned long long)run.text.hash, arm->val.loss, arm->val.accuracy);
  append_options(&s);
  append(&s, "}");
  save_model(&arm->model, opt.out, s.at);
  free(s.at);
}

// The value of a key in the metadata, in a buffer of 4096 bytes; 0 if it is not there.
static int metadata_value(const Safetensors *st, const char *key, char *value) {
  Json j = json_of(st->path, st->metadata.at, st->metadata.size);
  if (!st->metadata.size) return 0;
  for (json_expect(&j, '{'); json_more(&j, '}'); ) {
    Span name = json_key(&j), text = json_string(&j);
    if (!span_is(name, key)) continue;
    long n = 0;
    for (long i = 0; i < text.size && n < 4095; i++)
      if (text.at[i] != '\\') value[n++] = text.at[i];
      else if (text.at[++i] != 'u') value[n++] = text.at[i];
      else value[n++] = (char)strtol(text.at + i + 1, NULL, 16), i += 4;
    value[n] = 0;
    return 1;
  }
  return 0;
}

static void resume(Arm *arm, const Safetensors *st) {
  char step[4096], hash[4096], val[4096];
  if (!metadata_value(st, "step", step) || !metadata_value(st, "text_hash", hash) ||
      !metadata_value(st, "val", val) ||
      sscanf(val, "%la %la", &arm->val.loss, &arm->val.accuracy) != 2)
    die("%s is not a saved state of this program", st->path);
  if (strtoull(hash, NULL, 16) != run.text.hash)
    die("%s was saved in training on another text than %s, or that has changed: give the same one, "
        "or start anew from the weights with --init %s --out another", st->path, run.text.path,
        opt.out);
  char *end;
  arm->updates = strtol(step, &end, 10);
  if (end == step || *end || arm->updates < 0 || arm->updates >= 1000000000)
    die("%s: its step is %.40s, expected a whole number below 1e9", st->path, step);
  arm->looked_at = run.saved = arm->updates;
  read_state(&arm->model, st);
  read_log(arm, arm->updates);
}

static void evaluate_arm(Arm *arm) {
  arm->val = evaluate(&arm->model, &run.text, run.text.train_size, run.text.size, opt.block_size);
  if (!isfinite(arm->val.loss))
    die("step %ld: the validation loss is %g: the last good checkpoint is kept; lower "
        "--learning_rate", arm->updates, arm->val.loss);
  for (long i = run.rows - 1; i >= 0; i--)         // in the row of the last update
    if (run.row[i].arm == arm - run.arm && run.row[i].update == arm->updates) {
      run.row[i].val_loss = arm->val.loss;
      run.row[i].val_accuracy = arm->val.accuracy;
      return;
    }
  Row row = {(int)(arm - run.arm), arm->updates, tokens_of(arm), NAN, NAN, NAN, NAN, arm->val.loss,
             arm->val.accuracy, NAN, arm->seconds};
  add_row(row);                                    // before the first update
}

// ---- What a person sees

static void human(char *out, double x, const char *unit) {   // 834304 -> "834.3 K"; 32 bytes
  const char *prefix[] = {"", " K", " M", " G", " T"};
  int p = 0;
  while (p < 4 && x >= 1000) x /= 1000, p++;
  snprintf(out, 32, p ? "%.*f%s%s" : "%.*f%s %s", p ? (x < 10 ? 2 : x < 100 ? 1 : 0) : 0, x,
           prefix[p], unit);
}

static void print_header(const char *device) {
  const Model *m = &run.arm[0].model;
  double batch = update_tokens(&run.arm[0]), all = batch * opt.max_steps;
  char count[32], bytes[32], tokens[32], flop[32];
  human(count, m->count, "");
  human(bytes, run.arms * model_bytes(m), "B");
  human(tokens, all, "");
  human(flop, model_flop(m, batch, opt.block_size), "FLOP");
  printf("model   %s parameters: %d layers, %d heads, %d channels, context %d, vocabulary %d\n",
         count, opt.n_layer, opt.n_head, opt.n_embd, opt.block_size, opt.vocab_size);
  printf("text    %s: %ld bytes, %ld to train, %ld to validate", opt.text, run.text.size,
         run.text.train_size, run.text.size - run.text.train_size);
  if (isfinite(run.text.floor)) printf("; floor %.4f nats per byte", run.text.floor);
  printf("\nsteps   %d of %s, %.0f tokens (%d x %d x %d), %s each; %s tokens, %.1f passes\n",
         opt.max_steps, opt.optimizer, batch, run.arm[0].accumulate, opt.batch_size,
         opt.block_size, flop, tokens, all / run.text.train_size);
  printf("device  %s, threads %d, memory %s; results go to %s/\n", device, opt.threads, bytes,
         opt.out);
  fflush(stdout);
}

static void time_text(char *out, double t) {   // 1:02:03 or 2:03; out has 32 bytes
  long s = t > 0 && t < 1e9 ? (long)(t + 0.5) : 0;
  if (s >= 3600) snprintf(out, 32, "%ld:%02ld:%02ld", s / 3600, s / 60 % 60, s % 60);
  else snprintf(out, 32, "%ld:%02ld", s / 60, s % 60);
}

static double seconds_left(void) {
  const Arm *last = &run.arm[run.arms - 1];        // a round is one update of it
  double took = run.arm[0].seconds + run.arm[1].seconds;
  return last->updates ? took / last->updates * (run.rounds - last->updates) : 0;
}

static void print_progress(const Arm *arm, const char *end) {
  char left[32];
  int digits = snprintf(NULL, 0, "%d", opt.max_steps);
  printf("step %*ld/%d | ", digits, arm->updates, opt.max_steps);
  if (arm->updates) printf("train %.4f | ", arm->loss);
  if (isfinite(arm->val.loss)) printf("val %.4f", arm->val.loss);
  if (arm->seconds > 0) {
    time_text(left, seconds_left());
    printf(" | %.0f tokens/s | %s left", tokens_of(arm) / arm->seconds, left);
  }
  printf("%s", end);
  fflush(stdout);
}

// After an update: on a terminal one line that changes, elsewhere a line now and then.
static void show(const Arm *arm) {
  if (run.on_terminal) {
    if (seconds() < run.shown + 0.2) return;
    run.shown = seconds();
    line_is_open = 1;
    printf("\r\033[?7l");                         // a narrow terminal cuts it, and does not wrap
    print_progress(arm, "\033[K\033[?7h");
  } else if (run.arms == 1 && arm->updates % MAX(1, (opt.eval_interval ? opt.eval_interval / 5
                                                     : opt.max_steps / 10)) == 0)
    print_progress(arm, "\n");
}

// ---- Single-step against multi-step: --compare K

static void print_compare_head(void) {
  printf("\n%10s | single-step: an update per micro-batch      | multi-step: an update per %d\n"
         "%10s | %7s %7s %7s %5s %7s %5s | %7s %7s %7s %5s %7s %5s\n", "", opt.compare, "tokens",
         "updates", "train", "val", "acc", "|grad|", "s",
         "updates", "train", "val", "acc", "|grad|", "s");
}

static void print_compare_row(void) {
  if (run.on_terminal) printf("\r\033[K");
  printf("%10ld", tokens_of(&run.arm[0]));
  for (int i = 0; i < 2; i++) {
    Arm *a = &run.arm[i];
    printf(" | %7ld ", a->updates);
    if (a->updates) printf("%7.4f", a->loss);
    else printf("%7s", "-");
    printf(" %7.4f %4.1f%% %7.3f %5.1f", a->val.loss, 100 * a->val.accuracy, a->norm, a->seconds);
  }
  printf("\n");
  fflush(stdout);
}

// The validation loss of an arm after so many seconds of training, between two evaluations in
// proportion.
static double val_at_time(int arm, double t) {
  double before = NAN, t_before = 0;
  for (long i = 0; i < run.rows; i++) {
    Row *r = &run.row[i];
    if (r->arm != arm || !isfinite(r->val_loss)) continue;
    if (r->seconds >= t && isfinite(before) && r->seconds > t_before)
      return before + (r->val_loss - before) * (t - t_before) / (r->seconds - t_before);
    before = r->val_loss;
    t_before = r->seconds;
  }
  return before;
}

static const char *ahead(double single, double multi) {
  return single < multi ? "single-step is ahead" : multi < single ? "multi-step is ahead"
                                                                  : "neither is ahead";
}

static void print_verdict(void) {
  Arm *s = &run.arm[0], *m = &run.arm[1];
  double t = MIN(s->seconds, m->seconds), s_time = val_at_time(0, t), m_time = val_at_time(1, t);
  double s_equal = s->val_at_equal_updates;
  printf("\nAt equal tokens (%ld each), single-step made %ld updates and has validation loss %.4f, "
         "multi-step made %ld and has %.4f: %s by %.4f. ", tokens_of(s), s->updates, s->val.loss,
         m->updates, m->val.loss, ahead(s->val.loss, m->val.loss), fabs(s->val.loss - m->val.loss));
  printf("At equal updates (%ld each), single-step had seen 1/%d of the tokens and had %.4f, "
         "multi-step %.4f: %s by %.4f. ", m->updates, opt.compare, s_equal, m->val.loss,
         ahead(s_equal, m->val.loss), fabs(s_equal - m->val.loss));
  printf("At equal time (%.1f s of training each), single-step had %.4f, multi-step %.4f: %s by "
         "%.4f; a token cost %.2f and %.2f us. ", t, s_time, m_time, ahead(s_time, m_time),
         fabs(s_time - m_time), s->seconds / tokens_of(s) * 1e6, m->seconds / tokens_of(m) * 1e6);
  printf("Both arms had the same start, tokens, and learning rate at each token; one seed is one "
         "sample, so differences as small as those between seeds mean nothing.\n\n");
}

// ---- Where the time went: --profile

static struct { const char *name; long calls; double seconds, flop, bytes; } profile[64];

static void profile_add(const char *name, double seconds, double flop, double bytes) {
  int i = 0;
  while (i < 63 && profile[i].name && strcmp(profile[i].name, name)) i++;
  profile[i].name = name;
  profile[i].calls++;
  profile[i].seconds += seconds; profile[i].flop += flop; profile[i].bytes += bytes;
}

static void print_profile(void) {
  double all = 0;
  for (int i = 0; profile[i].name; i++) all += profile[i].seconds;
  if (!profiling || !all) return;
  printf("\n%-24s %9s %10s %7s %10s %8s\n", "layer", "calls", "ms", "share", "GFLOP/s", "GB/s");
  for (int i = 0; profile[i].name; i++) {
    double s = profile[i].seconds;
    printf("%-24s %9ld %10.2f %6.1f%%", profile[i].name, profile[i].calls, s * 1e3, 100 * s / all);
    if (profile[i].flop) printf(" %10.1f", profile[i].flop / s * 1e-9);
    else printf(" %10s", "");
    if (profile[i].bytes) printf(" %8.1f", profile[i].bytes / s * 1e-9);
    printf("\n");
  }
  printf("%-24s %9s %10.2f %6.1f%%\n\n", "all layers", "", all * 1e3, 100.0);
}

// ---- The training loop

static volatile sig_atomic_t interrupted;
static void on_interrupt(int signal_number) {
  (void)signal_number;
  if (interrupted) _exit(130);   // the second Ctrl-C
  interrupted = 1;
}

static void check_memory(double needed) {   // before any is taken: some systems promise too much
  double there = device_memory();
  if (there && needed > there)
    die("the model and its batch need %.1f GB, the machine has %.1f GB: lower --batch_size, "
        "--block_size, --n_embd or --n_layer", needed / 1e9, there / 1e9);
}

// What is counted in an int: the tokens of a micro-batch, and a row of one sequence's q, k and v.
static void check_sizes(Config c, int batch_size) {
  if ((double)batch_size * c.block_size > 5e8 || 4.0 * c.block_size * c.n_embd > 2e9)
    die("%d sequences of %d tokens with %d channels are too many at once: lower --batch_size, "
        "--block_size or --n_embd", batch_size, c.block_size, c.n_embd);
}

static void prepare(Safetensors *state) {
  Config config = {opt.n_layer, opt.n_head, opt.n_embd, opt.block_size, opt.vocab_size};
  check_sizes(config, opt.batch_size);
  const char *device = device_start(opt.threads);
  device_precision(opt.precision);
  run.on_terminal = isatty(1);
  run.arms = opt.compare ? 2 : 1;
  run.arm[0].name = opt.compare ? "single" : "train";
  run.arm[1].name = "multi";
  run.arm[0].accumulate = opt.compare ? 1 : opt.accumulate;
  run.arm[1].accumulate = opt.compare;
  run.round_size = run.arm[run.arms - 1].accumulate;
  run.rounds = opt.max_steps / (opt.compare ? opt.compare : 1);
  for (int i = 0; i < run.arms; i++)
    model_plan(&run.arm[i].model, config, opt.batch_size * opt.block_size, 1, 0);
  check_memory(run.arms * model_bytes(&run.arm[0].model));
  print_header(device);
  for (int i = 0; i < run.arms; i++) {
    Model *m = &run.arm[i].model;
    run.arm[i].loss = run.arm[i].val.loss = run.arm[i].val.accuracy = NAN;   // not known yet
    model_allocate(m);
    if (opt.init) read_weights(m, opt.init);
    else if (!state) model_init(m, opt.seed);
  }
  if (state) resume(&run.arm[0], state);
}

static void evaluate_and_save(int final) {
  for (int i = 0; i < run.arms; i++) evaluate_arm(&run.arm[i]);
  if (run.on_terminal) printf("\r\033[K");
  line_is_open = 0;
  if (run.arms == 2) print_compare_row();
  else {
    print_progress(&run.arm[0], "\n");
    print_sample(&run.arm[0].model, run.arm[0].updates);
  }
  // The log before the state: rows of updates that were then not saved are dropped by --resume,
  // while rows that are not there would leave a gap in the curve
  if (run.arm[0].updates || final) write_log(), write_plot();
  if (run.arms == 1 && run.arm[0].updates > run.saved) save(&run.arm[0]);
}

// The updates of one arm in a round, and a look at what came of them when it is time: always on a
// CPU, where it costs nothing; on a GPU looking means waiting, so it is done every STEPS_AHEAD.
#ifndef STEPS_AHEAD
#define STEPS_AHEAD 1
#endif
static void train_arm(Arm *arm, int evaluation_follows) {
  for (int k = arm->accumulate; k <= run.round_size; k += arm->accumulate) {
    if (arm->looked_at == arm->updates) arm->since = seconds();
    update(arm, learning_rate(arm, arm->updates));
    int last = k == run.round_size && (evaluation_follows || run.arms == 2);
    if (arm->updates - arm->looked_at >= STEPS_AHEAD || last || interrupted) {
      read_stats(arm);
      if (run.on_terminal || !evaluation_follows || k < run.round_size) show(arm);
    }
    if (run.arms == 2 && arm == run.arm && arm->updates == run.rounds) {
      evaluate_arm(arm);
      arm->val_at_equal_updates = arm->val.loss;
    }
  }
}

static int by_value(const void *a, const void *b) {
  double x = *(const double *)a, y = *(const double *)b;
  return (x > y) - (x < y);
}

static double median(double *t, long n) {   // sorts them
  qsort(t, n, sizeof(double), by_value);
  return n ? t[n / 2] : NAN;
}

static double median_step(int arm) {   // seconds of an update; NaN if there was none
  long n = 0;
  double *t = (double *)host_alloc(NULL, run.rows * sizeof(double));
  for (long i = 0; i < run.rows; i++)
    if (run.row[i].arm == arm && run.row[i].update) t[n++] = run.row[i].step_seconds;
  double seconds = median(t, n);
  free(t);
  return seconds;
}

static void print_last_line(void) {
  Arm *arm = &run.arm[0];
  double tokens = update_tokens(arm), t = median_step(0);
  printf("step %ld | train %.4f | val %.4f | %.2f ms/step | %.0f tokens/s | %.1f GFLOP/s | "
         "threads %d\n", arm->updates, arm->loss, arm->val.loss, t * 1e3, tokens / t,
         model_flop(&arm->model, tokens, opt.block_size) / t * 1e-9, opt.threads);
}

// Trains, from the start or from a saved state. Returns the exit code: 130 after Ctrl-C.
static int train(Safetensors *state) {
  prepare(state);
  signal(SIGINT, on_interrupt);
  signal(SIGTERM, on_interrupt);
  if (run.arms == 2) print_compare_head();
  lap(NULL, 0, 0);
  int every = opt.compare ? MAX(1, opt.eval_interval / opt.compare) : opt.eval_interval;
  for (long round = run.arm[0].updates; !interrupted; round++) {
    int done = round >= run.rounds;
    if (every && (done || round % every == 0)) evaluate_and_save(done);
    if (done) break;
    for (int i = 0; i < run.arms; i++)
      train_arm(&run.arm[i], round + 1 == run.rounds || (every && (round + 1) % every == 0));
  }
  for (int i = 0; i < run.arms; i++)
    if (run.arm[i].looked_at < run.arm[i].updates) read_stats(&run.arm[i]);
  // What no evaluation has saved
  if (run.arms == 1 && (interrupted || !every || !opt.max_steps)) save(&run.arm[0]);
  if (interrupted || !every) write_log(), write_plot();
  if (interrupted) {
    printf("\nstopped after step %ld%s\n", run.arm[0].updates,
           run.arms == 1 ? ", which is saved: go on with --resume" : "");
    return 130;
  }
  if (run.arms == 2) print_verdict();
  print_profile();
  print_last_line();
  for (int i = 0; i < run.arms; i++) model_free(&run.arm[i].model);
  return 0;
}

// --eval: the loss of all of TEXT under the model in --out.
static int evaluate_text(Config config) {
  int T = opt.block_size;                          // the model's, or a shorter window
  check_sizes(config, opt.batch_size);
  device_start(opt.threads);
  device_precision(opt.precision);
  Model m;
  Text text = text_open(opt.text, config.vocab_size);
  model_plan(&m, config, opt.batch_size * T, 0, 0);
  if (text.size < T + 1)
    die("%s has %ld bytes, a window takes %d: lower --block_size", opt.text, text.size, T + 1);
  check_memory(model_bytes(&m));
  model_allocate(&m);
  read_weights(&m, opt.out);
  Score score = evaluate(&m, &text, 0, text.size, T);
  printf("text %s: %ld windows of %d tokens\nperplexity %.4f\nbits per byte %.6f\naccuracy %.4f\n"
         "loss %.6f\n", opt.text, (text.size - 1) / T, T, exp(score.loss), score.loss / log(2),
         score.accuracy, score.loss);
  model_free(&m);
  return 0;
}

// ---- 10. Options and main ---------------------------------------------------------------------

// One row an option: the parser, --help and the saved state all read this table.
enum Kind { FLAG, INTEGER, NUMBER, TEXT };
typedef struct {
  const char *name;
  enum Kind kind;
  void *value;             // int, int, double or const char *
  const char *initial;     // as it would be typed; NULL: none
  double low, high;
  int saved;               // 1: part of the state; 2: and cannot change when a run is resumed
  const char *help;
  int given;
} Option;

static Option train_options[] = {
  {"out", TEXT, &opt.out, "run", 0, 0, 0, "folder of the checkpoint, log.csv and loss.svg", 0},
  {"n_layer", INTEGER, &opt.n_layer, "4", 1, 1000, 2, "layers", 0},
  {"n_head", INTEGER, &opt.n_head, "4", 1, 1000, 2, "heads of attention; they divide n_embd", 0},
  {"n_embd", INTEGER, &opt.n_embd, "128", 1, 65536, 2, "channels", 0},
  {"block_size", INTEGER, &opt.block_size, "64", 1, 1048576, 2, "context, in tokens", 0},
  {"batch_size", INTEGER, &opt.batch_size, "12", 1, 65536, 1, "sequences in a micro-batch", 0},
  {"accumulate", INTEGER, &opt.accumulate, "1", 1, 1000000, 1, "micro-batches in an update", 0},
  {"max_steps", INTEGER, &opt.max_steps, "2000", 0, 1e9, 1, "updates", 0},
  {"optimizer", TEXT, &opt.optimizer, "adamw", 0, 0, 2,
   "sgd, momentum, adagrad, adadelta, rmsprop, adam or adamw", 0},
  {"vocab_size", INTEGER, &opt.vocab_size, "256", 1, 1e7, 2,
   "words; over 256 only to time a larger head", 0},
  {"learning_rate", NUMBER, &opt.learning_rate, "1e-3", 0, 1e6, 1, "at its highest", 0},
  {"min_lr", NUMBER, &opt.min_lr, "1e-4", 0, 1e6, 1, "at the end of its cosine decay", 0},
  {"warmup", INTEGER, &opt.warmup, "100", 0, 1e9, 1, "updates of linear warmup", 0},
  {"weight_decay", NUMBER, &opt.weight_decay, "0.1", 0, 1e3, 1, "of matrices", 0},
  {"beta1", NUMBER, &opt.beta1, "0.9", 0, 0.999999, 1, "memory of adam's mean, and momentum's", 0},
  {"beta2", NUMBER, &opt.beta2, "0.99", 0, 0.999999, 1,
   "memory of adam's squares, rmsprop's and adadelta's", 0},
  {"grad_clip", NUMBER, &opt.grad_clip, "1.0", 0, 1e9, 1, "largest norm of a gradient; 0: any", 0},
  {"eval_interval", INTEGER, &opt.eval_interval, "250", 0, 1e9, 1,
   "updates from one evaluation, with sample and save, to the next; 0: save at the end only", 0},
  {"seed", INTEGER, &opt.seed, "1337", 0, 2147483647, 1, "of weights and batches", 0},
  {"threads", INTEGER, &opt.threads, NULL, 1, 1024, 0, "threads (all cores if not given)", 0},
  {"precision", TEXT, &opt.precision, "fp32", 0, 0, 1, "of matmul: fp32; on a GPU also tf32", 0},
  {"resume", FLAG, &opt.resume, NULL, 0, 0, 0, "go on from the last save in --out", 0},
  {"init", TEXT, &opt.init, NULL, 0, 0, 0, "start from the weights of a GPT-2 folder", 0},
  {"compare", INTEGER, &opt.compare, NULL, 2, 1000000, 0,
   "train twice: an update per micro-batch, and one per this many, side by side", 0},
  {"eval", FLAG, &opt.eval, NULL, 0, 0, 0, "print the loss of all of TEXT under --out, and end", 0},
  {"profile", FLAG, &opt.profile, NULL, 0, 0, 0, "print where the time went, at the end", 0},
  {NULL, FLAG, NULL, NULL, 0, 0, 0, NULL, 0}};

// The least number of letters to insert, delete or change to make b of a (Levenshtein 1966).
static int edit_distance(const char *a, const char *b) {
  int row[64], m = (int)MIN(strlen(b), 63);
  for (int j = 0; j <= m; j++) row[j] = j;
  for (int i = 1; a[i - 1]; i++) {
    int diagonal = row[0];
    row[0] = i;
    for (int j = 1; j <= m; j++) {
      int change = diagonal + (a[i - 1] != b[j - 1]);
      diagonal = row[j];
      row[j] = MIN(change, MIN(row[j], row[j - 1]) + 1);
    }
  }
  return row[m];
}

static void set_option(Option *o, const char *text) {
  char *end = NULL;
  if (o->kind == FLAG) { *(int *)o->value = 1; return; }
  if (o->kind == TEXT) { *(const char **)o->value = text; return; }
  double x = strtod(text, &end);
  if (end == text || *end || !(x >= o->low && x <= o->high) ||
      (o->kind == INTEGER && x != floor(x)))
    die("--%s %s: expected a %snumber from %g to %g", o->name, text,
        o->kind == INTEGER ? "whole " : "", o->low, o->high);
  if (o->kind == INTEGER) *(int *)o->value = (int)x;
  else *(double *)o->value = x;
}

// The exit code of a program whose output is what it was asked for: 1 if that could not be written.
static int finish(int code) {
  if (fflush(stdout) || ferror(stdout)) die("standard output cannot be written");
  return code;
}

static void print_help(const Option *table, const char *usage) {
  printf("%s\n", usage);
  for (const Option *o = table; o->name; o++) {
    char name[64];
    snprintf(name, sizeof name, "--%s %s", o->name, o->kind == FLAG ? "" : o->initial ? o->initial
             : o->kind == TEXT ? "TEXT" : "N");
    printf("  %-24s %s", name, o->help);
    if (o->kind == INTEGER || o->kind == NUMBER) printf(" (%g to %g)", o->low, o->high);
    printf("\n");
  }
}

// Sets the options of a table from the command line; --help prints them and ends the program.
// What is no option is stored in words[0..most-1]; returns how many there were.
static int parse_options(Option *table, int argc, char **argv, const char *usage,
                         const char **words, int most) {
  int n = 0;
  for (Option *o = table; o->name; o++)
    if (o->initial) set_option(o, o->initial);
  for (int i = 1; i < argc; i++) {
    if (argv[i][0] != '-') {
      if (n == most) die("%s: one word too many; --help shows what is expected", argv[i]);
      words[n++] = argv[i];
      continue;
    }
    if (!strcmp(argv[i], "--help")) { print_help(table, usage); exit(finish(0)); }
    char name[64];
    const char *value = strchr(argv[i], '='), *word = argv[i] + (argv[i][1] == '-' ? 2 : 1);
    snprintf(name, sizeof name, "%.*s", value ? (int)MIN(value - word, 63) : 63, word);
    Option *o = table, *near = table;
    for (; o->name && strcmp(o->name, name); o++)
      if (edit_distance(name, o->name) < edit_distance(name, near->name)) near = o;
    if (!o->name || argv[i][1] != '-')
      die("%s is no option; the nearest is --%s, --help lists all", argv[i],
          o->name ? o->name : near->name);
    if (o->kind == FLAG && value) die("--%s takes no value, it was given %s", name, value + 1);
    if (o->kind != FLAG && !value && ++i == argc) die("--%s needs a value", name);
    set_option(o, value ? value + 1 : argv[i]);
    o->given = 1;
  }
  return n;
}

// The value of an option as it would be typed; room has 32 bytes.
static const char *option_text(const Option *o, char *room) {
  if (o->kind == TEXT) return *(const char **)o->value;
  if (o->kind == NUMBER) snprintf(room, 32, "%.17g", *(double *)o->value);
  else snprintf(room, 32, "%d", *(int *)o->value);
  return room;
}

static void append_options(String *s) {
  char room[32];
  append(s, ",\"text\":");
  append_json(s, opt.text);
  for (Option *o = train_options; o->name; o++) {
    if (!o->saved) continue;
    append(s, ",\"%s\":", o->name);
    append_json(s, option_text(o, room));
  }
}

#ifndef NO_MAIN
// The options of the run that was saved hold unless others are given now; sizes cannot change.
static void read_options(const Safetensors *st) {
  char value[4096], room[32];
  for (Option *o = train_options; o->name; o++) {
    if (!o->saved || !metadata_value(st, o->name, value)) continue;
    const char *now = option_text(o, room);
    if (o->given && o->saved == 2 && strcmp(now, value))
      die("--resume with --%s %s, but %s has %s: leave the option out, or start anew without "
          "--resume", o->name, now, st->path, value);
    if (!o->given) set_option(o, o->kind == TEXT ? strdup(value) : value);
  }
  if (!opt.text && metadata_value(st, "text", value)) opt.text = strdup(value);
}

static Option *option_named(const char *name) {   // one that there is
  Option *o = train_options;
  while (strcmp(o->name, name)) o++;
  return o;
}

static void use_config(Config c, const char *folder) {   // its sizes, unless others were asked for
  const struct { const char *name; int value; } sizes[] = {
    {"n_layer", c.n_layer}, {"n_head", c.n_head}, {"n_embd", c.n_embd},
    {"block_size", c.block_size}, {"vocab_size", c.vocab_size}};
  for (int i = 0; i < 5; i++) {
    Option *o = option_named(sizes[i].name);
    int *value = (int *)o->value;
    if (o->given && *value != sizes[i].value)
      die("--%s %d, but the model in %s has %d: leave the option out", o->name, *value, folder,
          sizes[i].value);
    *value = sizes[i].value;
  }
}

static void check_options(void) {
  int known = 0;
  for (int i = 0; i < N_OPTIMIZERS; i++) known |= !strcmp(opt.optimizer, OPTIMIZER[i]);
  if (!known)
    die("--optimizer %s: expected %s", opt.optimizer, option_named("optimizer")->help);
  if (opt.n_embd % opt.n_head)
    die("--n_embd %d is not divisible by --n_head %d: each head needs as many channels", opt.n_embd,
        opt.n_head);
  if (opt.compare && (opt.resume || opt.accumulate > 1))
    die("--compare accumulates by itself and is not resumed: leave out --accumulate and --resume");
  if (opt.compare && opt.max_steps < opt.compare)
    die("--compare %d needs at least that many --max_steps, not %d", opt.compare, opt.max_steps);
  if (opt.compare && !opt.eval_interval)
    die("--compare compares validation losses: --eval_interval 0 leaves none");
  if (opt.compare) opt.max_steps -= opt.max_steps % opt.compare;
  if (opt.resume && opt.init) die("--resume goes on, --init starts: leave one out");
}

static void check_text(void) {
  run.text = text_open(opt.text, opt.vocab_size);
  long least = MIN(run.text.train_size, run.text.size - run.text.train_size), T = opt.block_size;
  if (least < T + 1)
    die("%s has %ld bytes, %ld to train and %ld to validate, but a window takes %ld: use a longer "
        "text or a smaller --block_size", opt.text, run.text.size, run.text.train_size,
        run.text.size - run.text.train_size, T + 1);
}

static void make_folder(const char *path) {       // that can be written in
  if (mkdir(path, 0777) && errno != EEXIST)
    die("--out %s cannot be made: %s", path, strerror(errno));
  char probe[4096];
  join(probe, path, "probe.tmp");
  FILE *file = fopen(probe, "wb");
  if (!file) die("--out %s cannot be written in: %s", path, strerror(errno));
  fclose(file);
  unlink(probe);
}

static const char USAGE[] =
  "usage: train [TEXT] [options]\n\n"
  "Trains a GPT on a text: any file, a token is a byte. TEXT is data/tales.txt if not given.\n"
  "An option is written --name value or --name=value; shown with the value it has if not given.\n";

int main(int argc, char **argv) {
  opt.threads = (int)MAX(1, MIN(1024, sysconf(_SC_NPROCESSORS_ONLN)));
  parse_options(train_options, argc, argv, USAGE, &opt.text, 1);
  profiling = opt.profile;
  char path[4096];
  Safetensors state;
  if (opt.resume) {
    join(path, opt.out, "state.safetensors");
    state = safetensors_open(path);
    read_options(&state);
  }
  if (!opt.text) opt.text = "data/tales.txt";
  if (opt.eval) {
    Config config = read_config(opt.out);
    if (!option_named("block_size")->given) opt.block_size = config.block_size;
    if (opt.block_size > config.block_size)
      die("--block_size %d, but the model in %s has %d", opt.block_size, opt.out,
          config.block_size);
    return finish(evaluate_text(config));
  }
  if (opt.init) use_config(read_config(opt.init), opt.init);
  check_options();
  check_text();
  make_folder(opt.out);
  return finish(train(opt.resume ? &state : NULL));
}
#endif   // NO_MAIN
