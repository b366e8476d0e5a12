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
#include <fcntl.h>
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

static const char *program = "train";

// The one way out on an error: what was found, what was expected, what to do.
__attribute__((noreturn, format(printf, 1, 2)))
static void die(const char *format, ...) {
  va_list args;
  va_start(args, format);
  fflush(stdout);
  fprintf(stderr, "%s: ", program);
  vfprintf(stderr, format, args);
  fprintf(stderr, "\n");
  va_end(args);
  exit(1);
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
//   - activations have one reader, whose backward sets (=) the gradient. But the stream x is read by
//     a layernorm and by a residual: the residual sets dx, and the layernorm, which comes later in
//     backward, adds to it.

typedef struct { double loss, hits, norm2; } Stats;   // sums over the tokens of an update; |grad|^2

enum Optimizer { SGD, MOMENTUM, ADAGRAD, ADADELTA, RMSPROP, ADAM, ADAMW, N_OPTIMIZERS };
typedef struct {           // what an update needs beside the numbers themselves
  int optimizer;           // enum Optimizer
  real learning_rate, beta1, beta2, weight_decay, grad_clip;
  real unbias_m, unbias_v; // Adam's 1 / (1 - beta^step): its memories start at zero
} Update;

// Room 2: where numbers live, and who works. Sizes are in bytes; no memory is an error that ends
// the program. launch() runs work(argument) on every thread, or records and replays its kernels.
static const char *device_start(int threads);      // returns the device in words
static void *device_alloc(size_t bytes);
static void device_free(void *p);
static void copy_in(void *device, const void *host, size_t bytes);
static void copy_out(void *host, const void *device, size_t bytes);
static void launch(void (*work)(void *), void *argument);

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
static void squared_error_forward(Tensor loss, Tensor y, const real *target, int N, int O);
static void squared_error_backward(Tensor loss, Tensor y, const real *target, int N, int O);

// Room 6. n numbers each; partial is scratch for (n + CHUNK - 1) / CHUNK doubles.
enum { CHUNK = 4096 };
static void add_loss(Stats *stats, Tensor loss, Tensor hit, int N);
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

static void (*job)(void *);
static void *job_argument;

static void *worker(void *id) {
  for (thread_id = (int)(intptr_t)id; ; barrier()) {   // that barrier: the job is done
    barrier();                                         // this one: there is a job
    job(job_argument);
  }
  return NULL;
}

static void launch(void (*work)(void *), void *argument) {
  job = work; job_argument = argument;
  barrier();
  work(argument);
  barrier();
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

// The matmul. C = A B, (M,N) = (M,K) (K,N): 95 % of the time of training is spent here, so this is
// the one place, with attention, that is written for speed. From the top of the ladder down:
//   1. The naive three loops load two numbers for each multiply-add, and wait for memory.
//   2. A tile of C, ROWS x 2 vectors, stays in registers while K products are added to it: then
//      a step of k loads ROWS numbers of A and 2 vectors of B for 2*ROWS vector multiply-adds.
//   3. A tile walks down the rows of A against one panel of B, DEPTH x COLUMNS, which stays in the
//      innermost cache. The panel is a packed copy of B: consecutive whatever B's strides are, so
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
  DEPTH = 1024 / sizeof(real),   // of a panel of B: 256 floats x 32 columns are 32 KB
  BLOCK = 384                    // rows of a job: 384 x 256 floats of A are 384 KB
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
    for (; k + 16 <= depth; k += 16)              // a cache line of each of m's columns at a time
      for (int j = 0; j < width; j++) {
        __builtin_prefetch(m.at + k + (j + width)*m.column);   // the next panel's
        for (int i = 0; i < 16; i++) panel[(k + i)*width + j] = m.at[k + i + j*m.column];
      }
  for (; k < depth; k++)
    for (int j = 0; j < width; j++)
      panel[k*width + j] = j < columns ? m.at[k*m.row + j*m.column] : 0;
}

// c[i,j] = (add ? c[i,j] : bias ? bias[j] : 0) + sum_k a[i,k] panel[k,j], for one tile of C.
// A function of its own on purpose: inlined, GCC runs out of registers and spills the sums.
__attribute__((noinline))
static void tile(real *c, long c_row, Matrix a, const real *panel, int rows, int columns, int depth,
                 int add, const real *bias) {
  vec sum[ROWS][2];
  const real *row[ROWS];
  UNROLL for (int i = 0; i < ROWS; i++) {
    row[i] = a.at + MIN(i, rows - 1)*a.row;       // rows that are not there repeat the last
    sum[i][0] = sum[i][1] = (vec){0};
  }
  for (int k = 0; k < depth; k++, panel += COLUMNS) {
    vec b0 = *(const vec *)panel, b1 = *(const vec *)(panel + VECTOR);
    UNROLL for (int i = 0; i < ROWS; i++) {
      real x = row[i][k*a.column];
      sum[i][0] += x * b0;
      sum[i][1] += x * b1;
    }
  }
  UNROLL for (int i = 0; i < ROWS; i++) {
    if (i == rows) break;
    real *y = c + i*c_row, s[COLUMNS];
    memcpy(s, sum[i], sizeof s);
    for (int j = 0; j < columns; j++) y[j] = s[j] + (add ? y[j] : bias ? bias[j] : 0);
  }
}

// C = A B + bias, or C += A B, by one thread; C is (M,N) with rows c_row apart, and M <= BLOCK.
static void matmul_job(real *c, long c_row, Matrix a, Matrix b, int M, int N, int K, int add,
                       const real *bias) {
  static __thread real a_panel[(BLOCK + ROWS) * DEPTH] __attribute__((aligned(64)));
  static __thread real b_panel[DEPTH * COLUMNS] __attribute__((aligned(64)));
  assert(M <= BLOCK);
  for (int k = 0; k < K; k += DEPTH) {
    int depth = MIN(DEPTH, K - k);
    if (a.column != 1)
      for (int i = 0; i < M; i += ROWS)
        pack(a_panel + i*depth, ROWS, part_of(transpose(a), k, i), depth, MIN(ROWS, M - i));
    Matrix packed = {NULL, 1, ROWS};              // element (i,k) of a panel
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

// The same by all threads, for any M.
static void matmul(real *c, long c_row, Matrix a, Matrix b, int M, int N, int K, int add,
                   const real *bias) {
  int panels = (N + COLUMNS - 1) / COLUMNS, tiles = (M + ROWS - 1) / ROWS;
  int blocks = (M + BLOCK - 1) / BLOCK;           // C is cut evenly into blocks x groups jobs,
  int groups = MIN(panels, (8*n_threads + blocks - 1) / blocks);   // some for every thread
  parallel_for (job, (long)blocks * groups) {
    int i = tiles * (job / groups) / blocks * ROWS, i1 = tiles * (job / groups + 1) / blocks * ROWS;
    int j = panels * (job % groups) / groups * COLUMNS;
    int j1 = panels * (job % groups + 1) / groups * COLUMNS;
    matmul_job(c + i*c_row + j, c_row, part_of(a, i, 0), part_of(b, 0, j), MIN(M, i1) - i,
               MIN(N, j1) - j, K, add, bias ? bias + j : NULL);
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

// x[i] = value. Gradients of parameters are zeroed once per update, since backward adds to them.
static void fill(real *x, long n, real value) {
  parallel_for (chunk, (n + CHUNK - 1) / CHUNK)
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
  parallel_for (block, (O + LANES - 1) / LANES) {
    real db[LANES] = {0};
    int o = block*LANES, width = MIN(LANES, O - o);
    for (int n = 0; n < N; n++)
      for (int j = 0; j < width; j++) db[j] += y.grad[(long)n*O + o + j];
    for (int j = 0; j < width; j++) p.bias.grad[o + j] += db[j];
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

// One row of a tile: weight[s] = exp((z[s] - max) scale) for s < seen, else 0; returns their sum.
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
    for (int i = 0; i < T; i += SIDE)                       // queries i..i+rows-1
      for (int j = 0; j <= i; j += SIDE) {                  // keys j..j+columns-1, none after i
        int rows = MIN(SIDE, T - i), columns = MIN(SIDE, T - j);
        matmul_job(att, SIDE, rows_of(q + i*3*C, 3*C), transpose(rows_of(k + j*3*C, 3*C)),
                     rows, columns, D, 0, NULL);
        for (int t = 0; t < rows; t++) {
          int seen = MIN(columns, i + t - j + 1);           // s <= t
          real tile_max = max_of(att + t*SIDE, seen), *o_t = o + (i + t)*(long)C;
          if (j == 0) max[t] = tile_max, sum[t] = 0;
          if (tile_max > max[t]) {                          // what was summed with the old maximum
            real rescale = exp_((max[t] - tile_max) * scale);
            for (int d = 0; d < D; d++) o_t[d] *= rescale;
            sum[t] *= rescale;
            max[t] = tile_max;
          }
          sum[t] += softmax_weights(att + t*SIDE, seen, columns, max[t], scale);
        }
        matmul_job(o + i*(long)C, C, rows_of(att, SIDE), rows_of(v + j*3*C, 3*C),
                     rows, D, columns, j > 0, NULL);
        for (int t = 0; j == i && t < rows; t++) {          // that was the last tile of the row
          for (int d = 0; d < D; d++) o[(i + t)*(long)C + d] /= sum[t];
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
    for (int i = 0; i < T; i += SIDE)                       // queries i.., keys j.., as in forward
      for (int j = 0; j <= i; j += SIDE) {
        int rows = MIN(SIDE, T - i), columns = MIN(SIDE, T - j);
        Matrix q_i = rows_of(q + i*3*C, 3*C), k_j = rows_of(k + j*3*C, 3*C);
        Matrix dout_i = rows_of(dout + i*(long)C, C), v_j = rows_of(v + j*3*C, 3*C);
        matmul_job(att, SIDE, q_i, transpose(k_j), rows, columns, D, 0, NULL);
        matmul_job(dz, SIDE, dout_i, transpose(v_j), rows, columns, D, 0, NULL);   // datt so far
        for (int t = 0; t < rows; t++) {
          real *att_t = att + t*SIDE, *dz_t = dz + t*SIDE, lse_t = lse.data[bh*T + i + t] / scale;
          real expected = dot(dout + (i + t)*(long)C, o + (i + t)*(long)C, D);
          softmax_weights(att_t, MIN(columns, i + t - j + 1), columns, lse_t, scale);
          for (int s = 0; s < columns; s++) dz_t[s] = att_t[s] * (dz_t[s] - expected) * scale;
        }
        // The first tile that reaches a row of dq, dk or dv sets it, the others add
        int first = i == j;   // the first queries that see these keys
        matmul_job(dv + j*3*C, 3*C, transpose(rows_of(att, SIDE)), dout_i,
                     columns, D, rows, !first, NULL);
        matmul_job(dq + i*3*C, 3*C, rows_of(dz, SIDE), k_j, rows, D, columns, j > 0, NULL);
        matmul_job(dk + j*3*C, 3*C, transpose(rows_of(dz, SIDE)), q_i, columns, D, rows, !first, NULL);
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
    for (int c = 0; c < C; c++) {
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
    for (int v = 0; v < V; v++) dlogits_n[v] = dloss * exp_(logits_n[v] - lse);
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
  Tensor ln_1, ln_1_stats, qkv, attn, lse, attn_proj, x_mid, ln_2, ln_2_stats, fc, gelu, mlp_proj, x;
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
  Tensor weights;                      // all parameters: matrices first, so that weight decay, which
  long n_matrices, n_weights;          // is for matrices, is for one range of them (with padding)
  long count;                          // parameters, without padding
  int training, separate;              // see model_plan()
  real *moment[2];                     // the optimizer's memories m and v, laid out like weights
  real *memory;                        // of the activations, n_memory numbers
  long n_memory;
  int *token, *target;                 // [rows], of the micro-batch
  double *partial;                     // scratch of gradient_norm
  Stats *stats;                        // [N_STATS + 1]: of the last updates, and of evaluation
} Model;
enum { N_STATS = 64 };

static void add_entry(Entry **list, int *n, Tensor *tensor, int rows, int cols, enum Memory data,
                      enum Memory grad, const char *format, int layer) {
  *list = (Entry *)realloc(*list, (*n + 1) * sizeof(Entry));
  if (!*list) die("no memory for a list of %d tensors: lower --n_layer", *n + 1);
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

static long entry_count(const Entry *e) { return (long)e->rows * (e->cols ? e->cols : 1); }
static long padded(long n) { return (n + 15) / 16 * 16; }   // a tensor starts on a cache line

// A place among memory that may not be there yet, when all that is asked is how much it will be.
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

// Places each activation, and its gradient if there is training, in m->memory.
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

static long chunks(long n) { return (n + CHUNK - 1) / CHUNK; }

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
  m->stats = (Stats *)device_alloc((N_STATS + 1) * sizeof(Stats));
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
    real *w = (real *)malloc(n * sizeof(real));
    if (!w) die("no memory to make %s (%ld numbers): lower --n_embd", e->name, n);
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

// Floating-point operations of one forward and backward pass over N tokens in sequences of T: the
// matmuls, with 2 a multiply-add and the causal half of attention. Backward is two matmuls for
// each one of forward, hence the 3.
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
DEVICE static inline void update_weight(int optimizer, real *w, real g, real *m, real *v, Update u) {
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
    stats->norm2 = one;
    for (long chunk = 0; chunk < chunks(n); chunk++) stats->norm2 += partial[chunk];
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
