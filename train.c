// train.c trains GPT-2 on any text file, on a CPU. The forward and backward pass of every layer is
// written out by hand, in plain C. Its only dependencies are libc, libm and pthreads. (It uses some
// GNU extensions, which clang has, too: ({ ... }), a block whose last line is its value; __thread,
// a variable of each thread's own; vector types and __builtin_prefetch, in the matmul; __atomic
// functions, in the barrier; __attribute__; and pragmas, in the form _Pragma("...").)
//
// The whole model, where x[n,:] is the row of C numbers that stands for token n:
//
//   x = wte[token] + wpe[position]                           embedding
//   for each of L Transformer blocks:
//     x = x + attention(layernorm(x) Wqkv) Wattn_proj        each token looks at earlier tokens
//     x = x + gelu(layernorm(x) Wfc) Wmlp_proj               each token is processed by itself
//   logits = layernorm(x) wte^T                              language-model head, tied to wte
//   loss = mean over tokens of -log softmax(logits)[next token]
//   backward: the same lines from bottom to top; each computes the gradients of its inputs
//   update: w -= learning_rate * d, where an optimizer computes d from dw, the gradient of w
//
// (Left out: each layernorm has a weight and a bias, and each product with a W adds a bias.)
//
// Letters: B sequences of T tokens make N = B*T rows; C channels; H attention heads of D = C/H
// channels; L blocks; V vocabulary entries (256: a token is a byte); O outputs of a linear layer.
// dx is the gradient of the loss with respect to x, and has the shape of x.
//
// The file is written to be read from the top. You can stop after any part:
//
//   the lesson      1 types and the layer interface   2 the model   3 forward and backward
//                   4 optimizers, one update, the training loop
//   the layers      5 from residual to attention
//   the machinery   6 matmul, sums, exp, the fast attention   7 threads and memory
//   the plumbing    8 data   9 checkpoint   10 log, plot, console   11 options and main
//
// train_gpu.cu has the same sections: it implements 5 to 7, and the optimizer of section 4, as CUDA
// kernels, and includes this file for the rest. test_gradients.c checks the gradients of both.
//
//   make run                              trains on the default text, then writes a sample
//   ./train shakespeare.txt --n_layer 6   any text; ./train --help lists the options

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <tgmath.h>   // sqrt(x) is sqrtf(x) if x is a float
#include <time.h>
#include <unistd.h>

#if defined __BYTE_ORDER__ && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "checkpoints are little-endian, and this program writes numbers as they are in memory"
#endif

// ---- 1. Types and the layer interface ---------------------------------------------------------

#ifndef REAL
#define REAL float   // the gradient checker sets it to double
#endif
typedef REAL real;
#ifndef LOWER
#define LOWER "--batch_size, --block_size, --n_embd or --n_layer"   // said if memory is short
#endif
#ifndef DEVICE
#define DEVICE       // marks functions that train_gpu.cu also calls from kernels
#endif

// A value and the gradient of the loss with respect to it: two arrays of the same shape, row-major.
// The forward pass fills data, the backward pass grad. On a GPU both are in device memory.
typedef struct { real *data, *grad; } Tensor;
typedef struct { Tensor weight, bias; } WeightBias;   // of a linear layer, or of a layernorm

// A matrix inside an array: element (i,j) is at[i*down + j*right]. Transposing exchanges these two
// strides and moves nothing.
typedef struct { real *at; long down, right; } Matrix;
// A row-major matrix: the next row begins `width` numbers further on.
DEVICE static inline Matrix rows_of(real *at, long width) {
  Matrix m = {at, width, 1};
  return m;
}
DEVICE static inline Matrix transpose(Matrix m) {
  Matrix t = {m.at, m.right, m.down};
  return t;
}

// The layer interface. Apart from optimizer_step() in section 4, only these functions, and what
// they are made of (below), compute with tensors. These functions exist twice: in this file for the
// CPU, in train_gpu.cu as CUDA kernels. linear and lm_head, which only call matmul() and
// add_columns(), exist once, as does all other code.
//
// The output is the first argument. The forward and the backward pass of a layer take the same
// arguments, so that backward() is forward() read from bottom to top. A backward pass either sets
// the gradient of an input (=) or adds to it (+=):
//
//   parameters    += always, because gradients accumulate over micro-batches, and over the two
//                    uses of wte
//   activations   =  as a rule, because an activation has one reader, so its gradient one writer
//   x             =  by residual_backward, then += by layernorm_backward, which runs later: x, the
//                    residual stream, is read by a layernorm and by a residual connection. Only
//                    the last x has no residual reader: backward() sets its gradient to 0 first
//
// Shapes: out, x, f (N,C); wte (V,C); wpe (T,C); qkv (N,3C); logits (N,V); token, target, loss,
// correct, row_lse (N); lse (B,H,T). linear: y (N,O), weight (C,O), bias (O). layernorm: weight and
// bias (C); mean_rstd (N,2), the mean and 1/standard deviation of each row. gelu: y (N,C); the
// model calls it with 4C for C. lse and row_lse are logarithms of sums of exponentials. mean_rstd,
// lse, row_lse and correct have no gradient. Tokens and targets are 0..V-1.
#define LAYER_INTERFACE(name, ...)                                                                 \
  static void name##_forward(__VA_ARGS__);                                                         \
  static void name##_backward(__VA_ARGS__)
LAYER_INTERFACE(residual, Tensor out, Tensor x, Tensor f, int N, int C);
LAYER_INTERFACE(gelu, Tensor y, Tensor x, int N, int C);
LAYER_INTERFACE(embedding, Tensor out, const int *token, Tensor wte, Tensor wpe, int B, int T,
                int C);
LAYER_INTERFACE(linear, Tensor y, Tensor x, WeightBias p, int N, int C, int O);
LAYER_INTERFACE(lm_head, Tensor logits, Tensor x, Tensor wte, int N, int C, int V);
LAYER_INTERFACE(layernorm, Tensor out, Tensor mean_rstd, Tensor x, WeightBias p, int N, int C);
LAYER_INTERFACE(crossentropy, Tensor loss, Tensor correct, Tensor row_lse, Tensor logits,
                const int *target, int N, int V);
LAYER_INTERFACE(attention, Tensor out, Tensor lse, Tensor qkv, int B, int T, int C, int H);

// What layers are made of. matmul multiplies an (M,K) by a (K,N) matrix (the letters of BLAS: here
// N is not B*T). mode SET: c = a b + bias, where bias may be NULL; ADD: c += a b, and bias is
// ignored. c.right must be 1, and so must one of the two strides of a, and of b.
enum { SET, ADD };
static void matmul(Matrix c, Matrix a, Matrix b, int M, int N, int K, int mode, const real *bias);
static void add_columns(real *sum, const real *x, int N, int O);   // sum[o] += sum_n x[n,o]
static void fill(real *x, long n, real value);

// What is reported of an update or an evaluation: sums over its tokens, and the squared norm of the
// gradient. In double, because many terms are added.
typedef struct { double loss, correct, grad_norm2; } LossSums;
// sums->loss += sum_n loss[n], and likewise correct
static void add_loss(LossSums *sums, Tensor loss, Tensor correct, int N);
// *result = sum_i x[i]^2; partial has room for chunks(n) numbers (section 4)
static void squared_norm(double *result, double *partial, const real *x, long n);

// The device and its memory; on the CPU that is ordinary memory. Sizes are in bytes. If there is no
// device, or no memory, the program ends. device_start returns the device's name; precision is that
// of matmul: "fp32", or "bf16" on a GPU.
static const char *device_start(int threads, const char *precision);
static void *device_alloc(size_t bytes);           // zeroed
static void copy_in(void *device, const void *host, size_t bytes);
static void copy_out(void *host, const void *device, size_t bytes);
static double device_bytes;                        // total allocated by device_alloc()

// launch() calls work(argument) on every thread and returns when all are done. (On a GPU it queues
// kernels and returns at once; copy_out() waits for them.) The functions from residual_forward to
// squared_norm, and optimizer_step(), must be called inside a launch, since all threads share their
// work. launch_recorded() does the same, but a GPU records the kernels and replays them when the
// argument has the same bytes again. So what differs between micro-batches, like their tokens, must
// be in device memory.
static void launch(void (*work)(void *), void *argument);
#ifdef GPU
static void launch_recorded(void (*work)(void *), void *argument, size_t bytes);
#else
#define launch_recorded(work, argument, bytes) launch(work, argument)

// On the CPU all threads run the same function, for example forward(), and share the iterations of
// each parallel_for: thread 0 of 2 takes the first half, thread 1 the second, then each waits until
// the other has finished. Rules:
//   - Code outside of a parallel_for runs on every thread, so it may set local variables only.
//   - Every thread must reach the same parallel_fors. Do not nest them, and do not `return` from
//     one: that thread would skip the barrier at its end, take its next barrier for this one, and
//     the threads would never be in step again. `continue` is safe, and `break` ends the thread's
//     own share.
//   - An iteration owns what it writes: no two iterations write the same number. So nothing needs a
//     lock, and each sum is added in one order: results are bit for bit the same on any number of
//     threads.
// parallel_for (part, n_threads) gives each thread one iteration, and parallel_for (one, 1) runs
// its body on a single thread. In the macro, the outer loop runs once and ends with the barrier;
// the inner loop is this thread's share.
static int n_threads = 1;
static __thread int thread_id;
static void barrier(const char *function);         // see section 7
#define parallel_for(i, n)                                                                         \
  for (int once_ = 1; once_; once_ = 0, barrier(__func__))                                         \
    for (long i = (long)(n) * thread_id / n_threads,                                               \
              end_ = (long)(n) * (thread_id + 1) / n_threads; i < end_; i++)

// SUM(real, c, C, x[c]) is the sum of x[c] over c = 0..C-1. Floating-point addition is not
// associative, so the compiler may not reorder a sum, and a plain loop adds one number at a time.
// Here number c is added to partial sum c % LANES: these do not depend on each other, so the
// compiler makes vector additions of them.
enum { LANES = 16 };
#define SUM(type, i, n, expression) ({                                                             \
  type lane_[LANES] = {0}, sum_ = 0;                                                               \
  int n_ = (int)(n), at_ = 0;                                                                      \
  for (; at_ + LANES <= n_; at_ += LANES)                                                          \
    for (int j_ = 0; j_ < LANES; j_++) { int i = at_ + j_; lane_[j_] += (expression); }            \
  for (int i = at_; i < n_; i++) sum_ += (expression);                                             \
  for (int j_ = 0; j_ < LANES; j_++) sum_ += lane_[j_];                                            \
  sum_; })
#endif

#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))

// Helpers, defined in section 7. host_alloc is a realloc that exits on failure; with p NULL the
// memory is zeroed. The random functions return number `index` of a sequence that `seed` selects:
// 64 bits, uniform in [0,1), normal with mean 0 and variance 1.
__attribute__((noreturn, format(printf, 1, 2)))
static void die(const char *format, ...);          // prints one line on stderr, exits with code 1
static void *host_alloc(void *p, size_t bytes);
static double seconds(void);                       // a clock that never goes back
static uint64_t random_bits(uint64_t seed, uint64_t index);
static double random_uniform(uint64_t seed, uint64_t index);
static double random_normal(uint64_t seed, uint64_t index);

// ---- 2. The model -----------------------------------------------------------------------------

// L, H, C, T, V. block_size, nanoGPT's name, is the length of a sequence, not the size of a Block.
typedef struct { int n_layer, n_head, n_embd, block_size, vocab_size; } Config;

// The parameters of one Transformer block, by GPT-2's names: ln is a layernorm, c_attn has Wqkv,
// attn_proj Wattn_proj, c_fc Wfc, and mlp_proj Wmlp_proj.
typedef struct {
  WeightBias ln_1, c_attn, attn_proj, ln_2, c_fc, mlp_proj;
} Block;

typedef struct {                       // a block's, in the order in which they are computed
  Tensor ln_1, ln_1_mean_rstd, qkv, attn, lse, attn_proj, x_mid;
  Tensor ln_2, ln_2_mean_rstd, fc, gelu, mlp_proj, x;
} Activations;

// An entry in one of a Model's two lists, parameters and activations; see layout() in section 7.
// Allocation, initialisation, checkpoints and the gradient checker walk these lists.
typedef struct {
  char name[40];
  Tensor *tensor;
  int rows, cols;                      // cols 0: a vector
  double mean, std;                    // of the initial values of a parameter
  long data_at, grad_at;               // offsets in the Model's memory; -1: there is no gradient.
                                       //   Of a parameter: in its weights, data_at for both
} Entry;

typedef struct {
  Config config;
  int max_tokens;                      // of a micro-batch: B*T is at most this
  int training;                        // 0: there are no gradients
  int unshared;                        // 1: each tensor has memory of its own, for the checker
  Tensor wte, wpe;
  Block *block;                        // [n_layer]
  WeightBias ln_f;
  Tensor embedding;                    // the x that enters the first block
  Activations *act;                    // [n_layer]
  Tensor x_f, x_f_mean_rstd, logits, row_lse, loss, correct;
  // what forward() calls: attention_forward(), or generate.c's, which caches keys and values
  void (*attention)(Tensor out, Tensor lse, Tensor qkv, int B, int T, int C, int H);

  Entry *parameter, *activation;       // the lists
  int n_parameter_tensors, n_activation_tensors;
  Tensor weights;                      // all parameters, one after the other: first the matrices,
                                       //   then the vectors, since only matrices decay
  long n_in_matrices, n_in_vectors, n_weights;   // numbers in the matrices, the vectors, both
  real *memory;                        // all activations and their gradients
  long n_memory;                       // numbers in it
  long n_parameters;                   // numbers in all parameters, without padding
  int *token, *target;                 // [max_tokens], of the current micro-batch
  LossSums *sums;
  double *partial;                     // scratch of squared_norm()
} Model;

// ---- 3. Forward and backward ------------------------------------------------------------------

// Computes m->loss, the loss of each of B*T tokens, from m->token and m->target.
static void forward(Model *m, int B, int T) {
  int N = B*T, H = m->config.n_head, C = m->config.n_embd, V = m->config.vocab_size;
  embedding_forward(m->embedding, m->token, m->wte, m->wpe, B, T, C);
  Tensor x = m->embedding;
  for (int l = 0; l < m->config.n_layer; l++) {
    Block *p = &m->block[l];
    Activations *a = &m->act[l];
    layernorm_forward(a->ln_1, a->ln_1_mean_rstd, x, p->ln_1, N, C);
    linear_forward(a->qkv, a->ln_1, p->c_attn, N, C, 3*C);
    m->attention(a->attn, a->lse, a->qkv, B, T, C, H);   // attention_forward
    linear_forward(a->attn_proj, a->attn, p->attn_proj, N, C, C);
    residual_forward(a->x_mid, x, a->attn_proj, N, C);
    layernorm_forward(a->ln_2, a->ln_2_mean_rstd, a->x_mid, p->ln_2, N, C);
    linear_forward(a->fc, a->ln_2, p->c_fc, N, C, 4*C);
    gelu_forward(a->gelu, a->fc, N, 4*C);
    linear_forward(a->mlp_proj, a->gelu, p->mlp_proj, N, 4*C, C);
    residual_forward(a->x, a->x_mid, a->mlp_proj, N, C);
    x = a->x;
  }
  layernorm_forward(m->x_f, m->x_f_mean_rstd, x, m->ln_f, N, C);
  lm_head_forward(m->logits, m->x_f, m->wte, N, C, V);
  crossentropy_forward(m->loss, m->correct, m->row_lse, m->logits, m->target, N, V);
}

// Adds the gradient of dloss * sum_n loss[n] to those of the parameters. Each call needs a
// forward() before it, because the gradient of the logits overwrites them.
static void backward(Model *m, int B, int T, real dloss) {
  int N = B*T, H = m->config.n_head, C = m->config.n_embd, V = m->config.vocab_size;
  fill(m->loss.grad, N, dloss);
  crossentropy_backward(m->loss, m->correct, m->row_lse, m->logits, m->target, N, V);
  lm_head_backward(m->logits, m->x_f, m->wte, N, C, V);
  Tensor x = m->act[m->config.n_layer - 1].x;   // of the last block
  fill(x.grad, (long)N*C, 0);          // ln_f is its only reader, and layernorm_backward adds
  layernorm_backward(m->x_f, m->x_f_mean_rstd, x, m->ln_f, N, C);
  for (int l = m->config.n_layer - 1; l >= 0; l--) {
    Block *p = &m->block[l];
    Activations *a = &m->act[l];
    x = l > 0 ? m->act[l - 1].x : m->embedding;
    residual_backward(a->x, a->x_mid, a->mlp_proj, N, C);
    linear_backward(a->mlp_proj, a->gelu, p->mlp_proj, N, 4*C, C);
    gelu_backward(a->gelu, a->fc, N, 4*C);
    linear_backward(a->fc, a->ln_2, p->c_fc, N, C, 4*C);
    layernorm_backward(a->ln_2, a->ln_2_mean_rstd, a->x_mid, p->ln_2, N, C);
    residual_backward(a->x_mid, x, a->attn_proj, N, C);
    linear_backward(a->attn_proj, a->attn, p->attn_proj, N, C, C);
    attention_backward(a->attn, a->lse, a->qkv, B, T, C, H);
    linear_backward(a->qkv, a->ln_1, p->c_attn, N, C, 3*C);
    layernorm_backward(a->ln_1, a->ln_1_mean_rstd, x, p->ln_1, N, C);
  }
  embedding_backward(m->embedding, m->token, m->wte, m->wpe, B, T, C);
}

// The work of one launch: forward, the losses added to m->sums, and backward unless dloss is 0.
// (This struct must have no padding, whose bytes are undefined: launch_recorded() compares bytes.)
typedef struct { Model *model; int B, T; double dloss; } MicroBatch;

static void run_micro_batch(void *argument) {
  MicroBatch *b = (MicroBatch *)argument;
  Model *m = b->model;
  forward(m, b->B, b->T);
  add_loss(m->sums, m->loss, m->correct, b->B * b->T);
  if (b->dloss != 0) backward(m, b->B, b->T, (real)b->dloss);
}

static void zero_gradients(void *model) {
  Model *m = (Model *)model;
  fill(m->weights.grad, m->n_weights, 0);
}

// ---- 4. Optimizers, one update, the training loop ---------------------------------------------

// A row for each optimizer: its name; its default learning rate; its kind of weight decay; and a
// formula for the step d that is subtracted from a weight with gradient g: w -= learning_rate * d.
// m and v are its state, two numbers for each weight, initially 0. Weight decay is COUPLED, g +=
// weight_decay * w before the formula, or DECOUPLED, w -= learning_rate * weight_decay * w
// (Loshchilov and Hutter 2019).
//
// A new row adds an optimizer everywhere, because OPTIMIZERS(ROW) writes ROW(sgd, 1e-1, ..)
// ROW(momentum, 1e-2, ..) and so on, for any macro ROW: with NAME that becomes an enum, with
// TABLE_ROW a table, with CASE and LOOP the cases of a switch.
#define OPTIMIZERS(ROW)                                                                            \
  ROW(sgd,      1e-1, COUPLED,   d = g)                                  /* Robbins, Monro 1951 */ \
  ROW(momentum, 1e-2, COUPLED,   m = beta1*m + g;  d = m)                /* Polyak 1964 */         \
  ROW(adagrad,  1e-2, COUPLED,   v += g*g;  d = g / (sqrt(v) + eps))    /* Duchi et al. 2011 */   \
  ROW(adadelta, 1,    COUPLED,   v = beta2*v + (1 - beta2)*g*g;          /* Zeiler 2012 */         \
      d = sqrt(m + (real)1e-6) / sqrt(v + (real)1e-6) * g;  m = beta2*m + (1 - beta2)*d*d)       \
  ROW(rmsprop,  1e-3, COUPLED,   v = beta2*v + (1 - beta2)*g*g;          /* Hinton 2012 */         \
      d = g / (sqrt(v) + eps))                                                                    \
  ROW(adam,     1e-3, COUPLED,   ADAM)                                   /* Kingma, Ba 2015 */     \
  ROW(adamw,    1e-3, DECOUPLED, ADAM)
#define ADAM                                                                                       \
  m = beta1*m + (1 - beta1)*g;  v = beta2*v + (1 - beta2)*g*g;                                     \
  d = m * o.m_correction / (sqrt(v * o.v_correction) + eps)

#define NAME(name, ...) name,
enum { OPTIMIZERS(NAME) N_OPTIMIZERS };
enum { COUPLED, DECOUPLED };
#define TABLE_ROW(name, rate, decay, formula) {#name, rate, decay},
static const struct { const char *name; double learning_rate; int decay; } optimizers[] = {
  OPTIMIZERS(TABLE_ROW)};

static int optimizer_named(const char *name) {
  for (int i = 0; i < N_OPTIMIZERS; i++)
    if (!strcmp(optimizers[i].name, name)) return i;
  die("--optimizer %s is unknown; --help lists them", name);
}

typedef struct {
  int kind;                            // sgd, momentum, ...
  real learning_rate, beta1, beta2, weight_decay, grad_clip;
  real m_correction, v_correction;     // Adam's bias correction, 1 / (1 - beta^update), with beta1
                                       //   and beta2
} OptimizerConfig;

// Moves one weight. Where `kind` is a constant, the compiler keeps only the code of its row.
DEVICE static inline void update_weight(int kind, real *weight, real g, real *m_state,
                                        real *v_state, OptimizerConfig o) {
  const real beta1 = o.beta1, beta2 = o.beta2, eps = (real)1e-8;
  real w = *weight, m = *m_state, v = *v_state, d = 0;
  switch (kind) {
#define CASE(name, rate, decay, formula)                                                           \
  case name:                                                                                       \
    if (decay == COUPLED) g += o.weight_decay * w;                                                 \
    else w -= o.learning_rate * o.weight_decay * w;                                                \
    formula;                                                                                       \
    break;
  OPTIMIZERS(CASE)
  }
  *weight = w - o.learning_rate * d;
  *m_state = m;
  *v_state = v;
}

// The factor that reduces the norm of the gradient to grad_clip; 1 if the norm is smaller already,
// or if grad_clip is 0.
DEVICE static inline real clip_factor(double norm2, real grad_clip) {
  double norm = sqrt(norm2);
  return (real)(grad_clip > 0 && norm > grad_clip ? grad_clip / norm : 1);
}

// fill(), squared_norm() and optimizers work on chunks of CHUNK numbers.
enum { CHUNK = 4096 };
static long chunks(long n) { return (n + CHUNK - 1) / CHUNK; }

static void optimizer_step(Tensor w, real *m, real *v, long begin, long end, OptimizerConfig o,
                           const LossSums *sums);   // of weights begin..end-1

#ifndef GPU
static void optimizer_step(Tensor w, real *m, real *v, long begin, long end, OptimizerConfig o,
                           const LossSums *sums) {
  real clip = clip_factor(sums->grad_norm2, o.grad_clip);
  parallel_for (chunk, chunks(end - begin)) {
    long from = begin + chunk*CHUNK, to = MIN(end, from + CHUNK);
    switch (o.kind) {                  // a loop for each optimizer, so that it can be vectorised
#define LOOP(name, ...)                                                                            \
    case name:                                                                                     \
      for (long i = from; i < to; i++)                                                             \
        update_weight(name, &w.data[i], clip * w.grad[i], &m[i], &v[i], o);                        \
      break;
    OPTIMIZERS(LOOP)
    }
  }
}
#endif

// The command line options. Section 11 has their defaults and ranges.
static struct {
  Config config;
  const char *text, *out, *init, *optimizer, *precision;
  int batch_size, accumulate, max_steps, warmup, eval_interval, seed, threads;
  int resume, compare, eval, profile;
  double learning_rate, min_lr, weight_decay, beta1, beta2, grad_clip;
} opt;

// The loss in nats per token (the logarithm is natural), and the fraction of the tokens whose
// target had the largest logit.
typedef struct { double loss, accuracy; } Evaluation;

typedef struct {                       // a model in training, and how far it has come
  const char *name;
  Model model;
  real *moment_m, *moment_v;           // the optimizer's state, laid out like model.weights
  OptimizerConfig optimizer;           // of the current update
  int accumulate;                      // micro-batches in an update
  long updates, tokens;                // so far
  double seconds;                      // of training so far, without evaluation
  long first_update;                   // `updates` and `seconds` when this program began: not 0
  double first_seconds;                //   after --resume
  long saved_update;                   // `updates` at the last save
  double loss, accuracy, grad_norm, step_seconds;   // of the last update
  Evaluation val;                      // the last one, on the validation text
} Trainer;

// There is one Trainer. --compare K has two: trainer[0] makes an update from each micro-batch,
// trainer[1] one from K accumulated micro-batches. Both see the same tokens.
static Trainer trainer[2];
static int n_trainers;

// What update() and train() call, defined in sections 8 to 11.
static void load_micro_batch(Model *m, long index);    // B windows of the text, and their targets
static void log_update(const Trainer *t);              // a row of log.csv
static void evaluate_and_save(void);                   // on the validation text; prints a line
static void show_progress(void);                       // with the time left, on a terminal
static int finish_training(void);                      // saves, prints the last lines
static volatile sig_atomic_t interrupted;              // by Ctrl-C

// The learning rate of the next update: linear warmup, then half a cosine down to min_lr. --compare
// counts micro-batches, not updates, so that both trainers have the same rate at the same token.
static double learning_rate(const Trainer *t) {
  double step = (double)t->updates * (n_trainers == 2 ? t->accumulate : 1);
  double low = MIN(opt.min_lr, opt.learning_rate);   // a rate below min_lr stays as it is
  if (step < opt.warmup) return opt.learning_rate * (step + 1) / (opt.warmup + 1);
  if (step >= opt.max_steps) return low;
  double done = (step - opt.warmup) / (opt.max_steps - opt.warmup);
  return low + (opt.learning_rate - low) * (1 + cos(3.141592653589793 * done)) / 2;
}

static OptimizerConfig optimizer_config(const Trainer *t) {
  OptimizerConfig o;
  o.kind = optimizer_named(opt.optimizer);
  o.learning_rate = (real)learning_rate(t);
  o.beta1 = (real)opt.beta1; o.beta2 = (real)opt.beta2;
  o.weight_decay = (real)opt.weight_decay; o.grad_clip = (real)opt.grad_clip;
  o.m_correction = (real)(1 / (1 - pow(opt.beta1, t->updates + 1)));
  o.v_correction = (real)(1 / (1 - pow(opt.beta2, t->updates + 1)));
  return o;
}

// The last part of an update: the norm for clipping, then the optimizer. Weight decay is for
// matrices only; they are weights 0..n_in_matrices-1, the vectors follow.
static void apply_gradients(void *argument) {
  Trainer *t = (Trainer *)argument;
  Model *m = &t->model;
  OptimizerConfig decay = t->optimizer, no_decay = t->optimizer;
  no_decay.weight_decay = 0;
  squared_norm(&m->sums->grad_norm2, m->partial, m->weights.grad, m->n_weights);
  optimizer_step(m->weights, t->moment_m, t->moment_v, 0, m->n_in_matrices, decay, m->sums);
  optimizer_step(m->weights, t->moment_m, t->moment_v, m->n_in_matrices, m->n_weights, no_decay,
                 m->sums);
}

// One update: the gradients of `accumulate` micro-batches are added, then each weight moves once.
// The loss that is differentiated is a sum over all tokens of the update, times 1 / (their number).
// The derivative of a sum is the sum of the derivatives, so the added gradients equal the gradient
// of one batch that is `accumulate` times as large. The factor is dloss, with which backward()
// starts. Cross-entropy cannot take the mean itself: it sees one micro-batch, and does not know how
// many tokens the update has.
static void update(Trainer *t) {
  Model *m = &t->model;
  int B = opt.batch_size, T = opt.config.block_size;
  double tokens = (double)t->accumulate * B * T, started = seconds();
  LossSums sums = {0, 0, 0};
  copy_in(m->sums, &sums, sizeof sums);
  launch(zero_gradients, m);           // else the last update's gradients would be added, too
  MicroBatch batch = {m, B, T, 1 / tokens};
  for (int k = 0; k < t->accumulate; k++) {
    load_micro_batch(m, t->updates * t->accumulate + k);
    launch_recorded(run_micro_batch, &batch, sizeof batch);
  }
  t->optimizer = optimizer_config(t);
  launch(apply_gradients, t);          // not recorded: the learning rate is another each time
  copy_out(&sums, m->sums, sizeof sums);   // waits until a GPU has finished
  t->updates++;
  t->tokens += (long)tokens;
  t->loss = sums.loss / tokens;
  t->accuracy = sums.correct / tokens;
  t->grad_norm = sqrt(sums.grad_norm2);
  t->step_seconds = seconds() - started;
  t->seconds += t->step_seconds;
  if (!isfinite(t->loss) || !isfinite(t->grad_norm))
    die("step %ld: the loss is %g, the norm of the gradient %g: the last checkpoint is kept; lower "
        "--learning_rate, or set --grad_clip", t->updates, t->loss, t->grad_norm);
  log_update(t);
}

// The training loop. It evaluates, and saves what has changed, after each number of updates that
// --eval_interval divides, 0 included, and after the last one. With --eval_interval 0 it only
// saves, at the end. --compare rounds the interval to whole updates of trainer[1], evaluates at
// least first and last, and saves the log and the plot only. Ctrl-C ends the loop, with a save.
// Returns the exit code of the program.
static int train(void) {
  Trainer *t = &trainer[0];
  int every = opt.eval_interval;
  if (opt.compare)                       // when trainer[1] has seen the same tokens
    every = every ? MAX(1, every / opt.compare) * opt.compare : MAX(1, opt.max_steps);
  for (;;) {
    int finished = t->updates >= opt.max_steps;
    if (every && (finished || (!interrupted && t->updates % every == 0))) evaluate_and_save();
    if (finished || interrupted) break;
    update(t);
    if (opt.compare && t->updates % opt.compare == 0) update(&trainer[1]);
    show_progress();
  }
  return finish_training();
}

// ---- 5. Layers, from simple to hard -----------------------------------------------------------
// Above each pair of functions stands the equation of the forward pass, above each loop of the
// backward pass the derivative that it computes (for attention, all equations come first). x_n is
// row n of x.

#define GELU_A (real)0.7978845608028654   // sqrt(2/pi)
#define GELU_B (real)0.044715
#ifndef PLAIN
#define PLAIN 0   // make EXTRA=-DPLAIN=1: the plain matmul and attention in place of the fast ones
#endif
static void profile_flop(double flop);   // adds to the last loop or kernel that was profiled

#ifndef GPU
// Defined in section 6: exp and tanh, the largest of n numbers.
static inline real exp_(real x), tanh_(real x);
static real max_of(const real *x, int n);

// Before a loop whose iterations do not depend on each other, even if two pointers are equal: the
// compiler can vectorise it without a check.
#ifdef __clang__
#define INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define INDEPENDENT _Pragma("GCC ivdep")
#endif

// Where a sum runs over rows, an iteration owns a strip of WIDE columns: wide enough for several
// cache lines, and for several vector additions that need not wait for one another.
enum { WIDE = 64 };
static int column_strips(int columns) { return (columns + WIDE - 1) / WIDE; }

// residual: out = x + f
static void residual_forward(Tensor out, Tensor x, Tensor f, int N, int C) {
  parallel_for (n, N)
    for (int c = 0; c < C; c++) out.data[n*C + c] = x.data[n*C + c] + f.data[n*C + c];
}

static void residual_backward(Tensor out, Tensor x, Tensor f, int N, int C) {
  // dx = dout, df = dout. In the model the three gradients share memory, and nothing is left to do.
  if (x.grad != out.grad)
    parallel_for (n, N) memcpy(x.grad + n*C, out.grad + n*C, C * sizeof(real));
  if (f.grad != out.grad)
    parallel_for (n, N) memcpy(f.grad + n*C, out.grad + n*C, C * sizeof(real));
}

// gelu: y = x (1 + h) / 2, h = tanh(u), u = a (x + b x^3), a = sqrt(2/pi), b = 0.044715
// (Hendrycks and Gimpel 2016)
static void gelu_forward(Tensor y, Tensor x, int N, int C) {
  parallel_for (n, N) {
    const real *x_n = x.data + n*C;
    real *y_n = y.data + n*C;
    for (int c = 0; c < C; c++) {
      real h = tanh_(GELU_A * (x_n[c] + GELU_B * x_n[c] * x_n[c] * x_n[c]));
      y_n[c] = x_n[c] * (1 + h) / 2;
    }
  }
}

static void gelu_backward(Tensor y, Tensor x, int N, int C) {
  // dx = dy ((1 + h)/2 + x (1 - h^2)/2 du/dx), du/dx = a (1 + 3 b x^2)
  parallel_for (n, N) {
    const real *x_n = x.data + n*C, *dy_n = y.grad + n*C;
    real *dx_n = x.grad + n*C;                   // in the model this is dy_n itself
    INDEPENDENT for (int c = 0; c < C; c++) {
      real h = tanh_(GELU_A * (x_n[c] + GELU_B * x_n[c] * x_n[c] * x_n[c]));
      real du_dx = GELU_A * (1 + 3 * GELU_B * x_n[c] * x_n[c]);
      dx_n[c] = dy_n[c] * ((1 + h) / 2 + x_n[c] * (1 - h*h) / 2 * du_dx);
    }
  }
}

// embedding: out[n,c] = wte[token[n],c] + wpe[t,c], where n = b*T + t
static void embedding_forward(Tensor out, const int *token, Tensor wte, Tensor wpe,
                              int B, int T, int C) {
  parallel_for (n, B*T) {
    const real *token_row = wte.data + (long)token[n]*C, *position_row = wpe.data + (n % T)*C;
    real *out_n = out.data + n*C;
    for (int c = 0; c < C; c++) out_n[c] = token_row[c] + position_row[c];
  }
}

static void embedding_backward(Tensor out, const int *token, Tensor wte, Tensor wpe,
                               int B, int T, int C) {
  // dwte[v,c] += the sum of dout[n,c] over all n with token[n] == v. Two rows may have the same
  // token, so a thread owns columns of wte, not rows of out.
  parallel_for (strip, column_strips(C))
    for (int n = 0; n < B*T; n++) {
      const real *dout_n = out.grad + (long)n*C;
      real *dtoken_row = wte.grad + (long)token[n]*C;
      for (int c = strip*WIDE; c < MIN(C, (strip + 1)*WIDE); c++) dtoken_row[c] += dout_n[c];
    }
  // dwpe[t,c] += sum_b dout[b*T + t,c]
  parallel_for (t, T)
    for (int b = 0; b < B; b++) {
      const real *dout_n = out.grad + ((long)b*T + t)*C;
      real *dposition_row = wpe.grad + t*C;
      for (int c = 0; c < C; c++) dposition_row[c] += dout_n[c];
    }
}
#endif

// linear: y[n,o] = sum_c x[n,c] w[c,o] + b[o]
static void linear_forward(Tensor y, Tensor x, WeightBias p, int N, int C, int O) {
  matmul(rows_of(y.data, O), rows_of(x.data, C), rows_of(p.weight.data, O), N, O, C, SET,
         p.bias.data);
}

static void linear_backward(Tensor y, Tensor x, WeightBias p, int N, int C, int O) {
  Matrix dy = rows_of(y.grad, O), w = rows_of(p.weight.data, O);
  // dx[n,c] = sum_o dy[n,o] w[c,o]
  matmul(rows_of(x.grad, C), dy, transpose(w), N, C, O, SET, NULL);
  // dw[c,o] += sum_n x[n,c] dy[n,o]. Threads share the elements of dw, never the sum over n, so its
  // order is the same for any number of threads.
  matmul(rows_of(p.weight.grad, O), transpose(rows_of(x.data, C)), dy, C, O, N, ADD, NULL);
  // db[o] += sum_n dy[n,o]
  add_columns(p.bias.grad, y.grad, N, O);
}

// lm_head, the language-model head: logits[n,v] = sum_c x[n,c] wte[v,c]. The logit of v is large
// where x_n resembles the embedding of v.
static void lm_head_forward(Tensor logits, Tensor x, Tensor wte, int N, int C, int V) {
  matmul(rows_of(logits.data, V), rows_of(x.data, C), transpose(rows_of(wte.data, C)), N, V, C, SET,
         NULL);
}

static void lm_head_backward(Tensor logits, Tensor x, Tensor wte, int N, int C, int V) {
  Matrix dlogits = rows_of(logits.grad, V);
  // dx[n,c] = sum_v dlogits[n,v] wte[v,c]
  matmul(rows_of(x.grad, C), dlogits, rows_of(wte.data, C), N, C, V, SET, NULL);
  // dwte[v,c] += sum_n dlogits[n,v] x[n,c]
  matmul(rows_of(wte.grad, C), transpose(dlogits), rows_of(x.data, C), V, C, N, ADD, NULL);
}

#ifndef GPU
// layernorm: out[n,c] = xhat[n,c] w[c] + b[c], xhat[n,c] = (x[n,c] - mean[n]) rstd[n], with the
// mean and the variance of row n and rstd = 1 / sqrt(variance + 1e-5). backward reads mean and
// rstd.
static void layernorm_forward(Tensor out, Tensor mean_rstd, Tensor x, WeightBias p, int N, int C) {
  const real *w = p.weight.data, *b = p.bias.data;
  parallel_for (n, N) {
    const real *x_n = x.data + n*C;
    real *out_n = out.data + n*C;
    real mean = SUM(real, c, C, x_n[c]) / C;
    real variance = SUM(real, c, C, (x_n[c] - mean) * (x_n[c] - mean)) / C;
    real rstd = 1 / sqrt(variance + (real)1e-5);
    for (int c = 0; c < C; c++) out_n[c] = (x_n[c] - mean) * rstd * w[c] + b[c];
    mean_rstd.data[2*n] = mean;
    mean_rstd.data[2*n + 1] = rstd;
  }
}

static void layernorm_backward(Tensor out, Tensor mean_rstd, Tensor x, WeightBias p, int N, int C) {
  // g[n,c] = dout[n,c] w[c]; dx[n,c] += rstd (g - avg_c(g) - xhat avg_c(g xhat)), where avg_c is
  // the mean over c. Adding a constant to a row of x does not change out, nor (but for the 1e-5)
  // does scaling x - mean: so what is added to dx has no component along (1,..,1), nor along xhat.
  parallel_for (n, N) {
    const real *x_n = x.data + n*C, *dout_n = out.grad + n*C, *w = p.weight.data;
    real *dx_n = x.grad + n*C, mean = mean_rstd.data[2*n], rstd = mean_rstd.data[2*n + 1];
    real avg_g = SUM(real, c, C, dout_n[c] * w[c]) / C;
    real avg_g_xhat = SUM(real, c, C, dout_n[c] * w[c] * ((x_n[c] - mean) * rstd)) / C;
    for (int c = 0; c < C; c++)
      dx_n[c] += rstd * (dout_n[c] * w[c] - avg_g - (x_n[c] - mean) * rstd * avg_g_xhat);
  }
  // dw[c] += sum_n dout[n,c] xhat[n,c]
  parallel_for (strip, column_strips(C)) {
    real dw[WIDE] = {0};
    int c = strip*WIDE, width = MIN(WIDE, C - c);
    for (int n = 0; n < N; n++) {
      const real *x_n = x.data + (long)n*C + c, *dout_n = out.grad + (long)n*C + c;
      real mean = mean_rstd.data[2*n], rstd = mean_rstd.data[2*n + 1];
      for (int j = 0; j < width; j++) dw[j] += dout_n[j] * ((x_n[j] - mean) * rstd);
    }
    for (int j = 0; j < width; j++) p.weight.grad[c + j] += dw[j];
  }
  // db[c] += sum_n dout[n,c]
  add_columns(p.bias.grad, out.grad, N, C);
}

// softmax cross-entropy: loss[n] = -log p[n,target[n]], p[n,v] = exp(logits[n,v] - row_lse[n]),
// row_lse[n] = log sum_v exp(logits[n,v]). correct[n] is 1 if the target has the largest logit; of
// several that are equal, the first counts.
static void crossentropy_forward(Tensor loss, Tensor correct, Tensor row_lse, Tensor logits,
                                 const int *target, int N, int V) {
  parallel_for (n, N) {
    const real *logits_n = logits.data + n*V;
    real max = max_of(logits_n, V);              // subtracted, so that exp cannot overflow
    row_lse.data[n] = max + log(SUM(real, v, V, exp_(logits_n[v] - max)));
    loss.data[n] = row_lse.data[n] - logits_n[target[n]];
    int first = 0;
    while (logits_n[first] < max) first++;
    correct.data[n] = first == target[n];
  }
}

static void crossentropy_backward(Tensor loss, Tensor correct, Tensor row_lse, Tensor logits,
                                  const int *target, int N, int V) {
  (void)correct;   // a count, for the log: no gradient goes through it
  // dlogits[n,v] = dloss[n] (p[n,v] - [v == target[n]])
  parallel_for (n, N) {
    const real *logits_n = logits.data + n*V;
    real *dlogits_n = logits.grad + n*V;         // in the model this is logits_n itself
    real lse = row_lse.data[n], dloss = loss.grad[n];
    INDEPENDENT for (int v = 0; v < V; v++) dlogits_n[v] = dloss * exp_(logits_n[v] - lse);
    dlogits_n[target[n]] -= dloss;
  }
}

// attention, in each sequence b and head h:
//   z[t,s] = q[t].k[s] / sqrt(D);  att[t,s] = softmax of z[t,:] over s <= t;
//   out[t] = sum_s att[t,s] v[s];  lse[t] = log sum_s exp(z[t,s]); att[t,s] = exp(z[t,s] - lse[t])
// backward:
//   datt[t,s] = dout[t].v[s];      dz[t,s] = att[t,s] (datt[t,s] - dout[t].out[t])
//   dv[s] = sum_t att[t,s] dout[t];  dq[t] = sum_s dz[t,s] k[s] / sqrt(D);
//   dk[s] = sum_t dz[t,s] q[t] / sqrt(D)                     each sum over the pairs with s <= t
// (dout[t].out[t] is sum_s att[t,s] datt[t,s]: the derivative of softmax needs this sum.) att is
// not kept: backward computes it again from lse, T numbers a head instead of T*T. A row of qkv has
// the queries of all heads, then the keys, then the values, D numbers each:
//
//   | q of h 0 | q of h 1 | ... | k of h 0 | k of h 1 | ... | v of h 0 | v of h 1 | ... |
//   0          D                C                           2C                          3C

// One head of one sequence: where its numbers of token 0 are. From token to token q, k and v move
// on by 3C, out by C, lse by 1.
typedef struct { real *q, *k, *v, *out, *lse; } Head;

static Head head_of(real *qkv, real *out, real *lse, long bh, int T, int C, int H) {
  long b = bh / H, h = bh % H, D = C / H;
  real *q = qkv + b*T*3*C + h*D;
  Head head = {q, q + C, q + 2*C, out + b*T*C + h*D, lse + bh*T};
  return head;
}

static real z_of(const real *q, const real *k, int D) {   // z[t,s], from q[t] and k[s]
  return SUM(real, d, D, q[d] * k[d]) / sqrt((real)D);
}

// The plain form: for each query a loop over the keys. The fast form, at the end of section 6,
// gives the same for finite numbers, but for rounding.
static void attention_plain_forward(Tensor out, Tensor lse, Tensor qkv, int B, int T, int C,
                                    int H) {
  int D = C / H, row = 3*C;
  parallel_for (bh, B*H) {
    Head a = head_of(qkv.data, out.data, lse.data, bh, T, C, H);
    for (long t = 0; t < T; t++) {
      real max = -INFINITY, sum = 0, *out_t = a.out + t*C;
      for (long s = 0; s <= t; s++) {
        real z = z_of(a.q + t*row, a.k + s*row, D);
        max = MAX(max, z);
      }
      for (int d = 0; d < D; d++) out_t[d] = 0;
      for (long s = 0; s <= t; s++) {
        real weight = exp_(z_of(a.q + t*row, a.k + s*row, D) - max);   // att[t,s] * sum
        for (int d = 0; d < D; d++) out_t[d] += weight * a.v[s*row + d];
        sum += weight;
      }
      for (int d = 0; d < D; d++) out_t[d] /= sum;
      a.lse[t] = max + log(sum);
    }
  }
  profile_flop(2.0*B*T*T*C);
}

static void attention_plain_backward(Tensor out, Tensor lse, Tensor qkv, int B, int T, int C,
                                     int H) {
  int D = C / H, row = 3*C;
  parallel_for (bh, B*H) {
    Head a = head_of(qkv.data, out.data, lse.data, bh, T, C, H);
    Head g = head_of(qkv.grad, out.grad, lse.data, bh, T, C, H);   // the gradients
    for (long t = 0; t < T; t++)
      for (int d = 0; d < D; d++) g.q[t*row + d] = g.k[t*row + d] = g.v[t*row + d] = 0;
    for (long t = 0; t < T; t++) {
      real dout_dot_out = SUM(real, d, D, g.out[t*C + d] * a.out[t*C + d]);
      for (long s = 0; s <= t; s++) {
        real datt = SUM(real, d, D, g.out[t*C + d] * a.v[s*row + d]);
        real att = exp_(z_of(a.q + t*row, a.k + s*row, D) - a.lse[t]);
        real dz = att * (datt - dout_dot_out) / sqrt((real)D);   // dz of above / sqrt(D)
        for (int d = 0; d < D; d++) {
          g.v[s*row + d] += att * g.out[t*C + d];
          g.q[t*row + d] += dz * a.k[s*row + d];
          g.k[s*row + d] += dz * a.q[t*row + d];
        }
      }
    }
  }
  profile_flop(5.0*B*T*T*C);
}

// ---- 6. Matmul, sums, exp and the fast attention ----------------------------------------------
// The matmul takes three quarters of the time of a training step, so most of what is complicated
// here is spent on it. First the six lines that it replaces, which compute the same:

static void matmul_plain(Matrix c, Matrix a, Matrix b, int M, int N, int K, int mode,
                         const real *bias) {
  parallel_for (i, M)
    for (int j = 0; j < N; j++) {
      real sum = 0, *y = c.at + i*c.down + j;
      for (int k = 0; k < K; k++) sum += a.at[i*a.down + k*a.right] * b.at[k*b.down + j*b.right];
      *y = sum + (mode == ADD ? *y : bias ? bias[j] : 0);
    }
  profile_flop(2.0 * M * N * K);
}

// Its inner loop loads two numbers for each multiply-add; unless b is transposed, those of b lie in
// different cache lines. Three steps make it fast. The picture is for 4 x 4 matrices and tiles of
// 2 x 2:
//
//            panel 0   panel 1      packed: panel 0                    panel 1
//            b00 b01 | b02 b03      b00 b01 b10 b11 b20 b21 b30 b31    b02 b03 b12 b13 ...
//            b10 b11 | b12 b13
//            b20 b21 | b22 b23
//            b30 b31 | b32 b33
//                                   for (k = 0; k < 4; k++)            the tile at the upper left
//   a00..a03 c00 c01   c02 c03        c00 += a0k * bk0, c01 += a0k * bk1
//   a10..a13 c10 c11   c12 c13        c10 += a1k * bk0, c11 += a1k * bk1
//
//   1. A tile of C stays in registers while k runs over up to DEPTH terms. Real tiles have ROWS
//      rows and two vectors of columns. A step of k loads 2 vectors of B and ROWS numbers of A for
//      2*ROWS vector multiply-adds: the more sums, the fewer loads for each. Besides, a core can
//      start two multiply-adds in a cycle but needs 4 cycles for each: 8 or more independent sums
//      keep it busy. The limit is the number of registers: 12 rows of 2 vectors take 27 of 32. (14
//      rows would just fit, but were measured to be 3 % slower.)
//   2. B is packed: a panel of DEPTH x COLUMNS numbers is copied so that they are consecutive in
//      the order in which the tile reads them, whatever the strides of B. Then ROWS rows of A at a
//      time, which stay in the L1 cache, pass by a block of panels, which stays in the L2 cache. A
//      is read in place. But where A is a transposed matrix, the numbers of a row are a whole
//      stride apart, one cache line each: so BLOCK_ROWS rows, which are whole cache lines, are
//      packed like B, and the tiles of all panels of the block read the copy.
//   3. C is cut into a grid of parts, one for each thread; matmul() estimates which grid is
//      fastest. With many rows that is a cut by rows. Then a thread also finds its rows of A in its
//      own cache, since other functions, which share their work by rows, wrote them there.
//
// For M 2048, N 1152, K 384, in GFLOP/s, on a core of an Intel server that can do 245: the six
// lines do 2; tiles 148, where the rows of B are contiguous; with B packed, 209 for any B. Where A
// is transposed, tiles do 114 in place, and 192 with the copy. Each element of C is the same sum in
// the same order, wherever C is cut.
//
// vec is as wide as a register of the machine: AVX-512, AVX2, NEON or SSE2.
#if defined __AVX512F__
enum { VECTOR_BYTES = 64, ROWS = 12 };   // of 32 registers: 12 x 2 sums, 2 of B, 1 of A
#elif defined __AVX__
enum { VECTOR_BYTES = 32, ROWS = 6 };    // of 16 registers: 6 x 2 sums, 2 of B, 1 of A
#elif defined __aarch64__
enum { VECTOR_BYTES = 16, ROWS = 8 };    // of 32 registers of NEON: 8 x 2 sums, 2 of B, 8 of A
#else
enum { VECTOR_BYTES = 16, ROWS = 4 };    // of 16 registers of SSE2, or whatever there is
#endif
typedef real vec __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(real)), may_alias));
typedef real vec8 __attribute__((vector_size(8*sizeof(real)), aligned(sizeof(real)), may_alias));
enum {
  VECTOR = VECTOR_BYTES / sizeof(real),  // numbers in a vec
  COLUMNS = 2*VECTOR,
  CACHE_LINE = 64 / sizeof(real),        // numbers in one
  DEPTH = 1536 / sizeof(real),           // 384 floats
  BLOCK_COLUMNS = 512,                   // of B: x 384 floats are 768 KB
  BLOCK_ROWS = 8*ROWS                    // of A: 96 x 384 floats are 144 KB
};
#ifdef __clang__
#define UNROLL _Pragma("clang loop unroll(full)")   // keeps the sums of a tile in registers
#define NOT_UNROLLED
#else
#define UNROLL _Pragma("GCC unroll 16")
#define NOT_UNROLLED _Pragma("GCC unroll 1")        // else GCC unrolls, and then cannot vectorise
#endif

static Matrix part_of(Matrix m, long i, long j) { m.at += i*m.down + j*m.right; return m; }
static int padded(int columns) { return (columns + COLUMNS - 1) / COLUMNS * COLUMNS; }

// Packs a matrix of depth x columns into panels of depth x width, one after the other; the last is
// padded with zeros. Where rows are contiguous, they are read as they lie in memory, and spread
// over the panels. Of a transposed matrix 8 columns are read at a time: each is contiguous, and the
// processor reads ahead in as many places as that, but not in 32. The last loop takes what is left:
// a panel that is not full, or all panels if 8 does not divide their width.
__attribute__((always_inline))
static inline void pack(real *panels, Matrix m, int depth, int columns, const int width) {
  int whole = (m.right == 1 || width % 8 == 0) ? columns / width * width : 0;
  if (m.right == 1)
    for (int k = 0; k < depth; k++)
      for (int j = 0; j < whole; j += width) {
        const real *x = m.at + k*m.down + j;
        const real *ahead = x + 8*m.down;        // 8 rows
        __builtin_prefetch(ahead), __builtin_prefetch(ahead + width - 1);
        memcpy(panels + (long)j*depth + k*width, x, width * sizeof(real));
      }
  else
    for (int j = 0; j < whole; j += 8) {
      real *panel = panels + (long)(j - j % width)*depth + j % width;
      const real *x0 = m.at + j*m.right, *x1 = x0 + m.right, *x2 = x1 + m.right;
      const real *x3 = x2 + m.right, *x4 = x3 + m.right, *x5 = x4 + m.right;
      const real *x6 = x5 + m.right, *x7 = x6 + m.right;
      for (long k = 0, i = 0; k < depth; k++, i += m.down)
        *(vec8 *)(panel + k*width) = (vec8){x0[i], x1[i], x2[i], x3[i], x4[i], x5[i], x6[i], x7[i]};
    }
  for (int j = whole; j < columns; j += width)
    for (int k = 0; k < depth; k++)
      for (int i = 0; i < width; i++)
        panels[(long)j*depth + k*width + i] =
          j + i < columns ? m.at[k*m.down + (j + i)*m.right] : 0;
}

// One tile: c[i,j] = sum_k a[i,k] panel[k,j] + (c[i,j] if mode is ADD, else bias[j] or 0), for
// rows <= most <= ROWS. `most` and `whole`, which says that rows == most, are constants in each
// call: so the loops unroll, and the sums stay in registers. C is needed at the end, and fetched at
// the beginning, which makes a matmul 5 % faster: a store, too, waits for its cache line. The panel
// is fetched 32 steps ahead: so generate.c, which packs once, reads its weights a quarter faster.
__attribute__((always_inline))
static inline void tile_of(const int most, const int whole, Matrix c, Matrix a, const real *panel,
                           int rows, int columns, int depth, int mode, const real *bias) {
  static const real zeros[COLUMNS] = {0};
  vec sum[ROWS][2];
  const real *a_row[ROWS];
  UNROLL for (int i = 0; i < most; i++) {
    a_row[i] = a.at + (whole ? i : MIN(i, rows - 1))*a.down;   // missing rows repeat the last
    sum[i][0] = sum[i][1] = (vec){0};
  }
  for (int i = 0; i < rows; i++)
    for (int j = 0; j < columns; j += CACHE_LINE) __builtin_prefetch(c.at + i*c.down + j, 1);
  for (int k = 0; k < depth; k++, panel += COLUMNS) {
    for (int j = 0; j < COLUMNS; j += CACHE_LINE) __builtin_prefetch(panel + 32*COLUMNS + j);
    vec b0 = *(const vec *)panel, b1 = *(const vec *)(panel + VECTOR);
    UNROLL for (int i = 0; i < most; i++) {
      real x = a_row[i][k*a.right];
      sum[i][0] += x * b0;
      sum[i][1] += x * b1;
    }
  }
  UNROLL for (int i = 0; i < most; i++) {
    if (i >= rows) continue;             // with `break`, clang would not unroll
    real *y = c.at + i*c.down;
    const real *from = mode == ADD ? y : bias ? bias : zeros;
    if (columns == COLUMNS) {                    // the usual case: two whole vectors
      vec y0 = sum[i][0] + *(const vec *)from, y1 = sum[i][1] + *(const vec *)(from + VECTOR);
      *(vec *)y = y0;
      *(vec *)(y + VECTOR) = y1;
    } else {
      real s[COLUMNS];
      memcpy(s, sum[i], sizeof s);
      for (int j = 0; j < columns; j++) y[j] = s[j] + from[j];
    }
  }
}

// tile() is a function of its own on purpose: if it is inlined into the loops around it, GCC runs
// out of registers and spills the sums. A stride that is the constant 1 needs no register, so there
// are forms for A in place, with up to 4, 8 or ROWS rows (generate.c has few); and for A
// transposed: with ROWS rows, which are neighbours, so that one pointer serves for all, or fewer.
enum { FEW = 4 };
__attribute__((noinline))
static void tile(Matrix c, Matrix a, const real *panel, int rows, int columns, int depth, int mode,
                 const real *bias) {
  Matrix in_place = {a.at, a.down, 1}, transposed = {a.at, 1, a.right};
  if (a.right == 1 && rows <= FEW)
    tile_of(FEW, 0, c, in_place, panel, rows, columns, depth, mode, bias);
  else if (a.right == 1 && rows <= 2*FEW)
    tile_of(MIN(2*FEW, ROWS), 0, c, in_place, panel, rows, columns, depth, mode, bias);
  else if (a.right == 1) tile_of(ROWS, 0, c, in_place, panel, rows, columns, depth, mode, bias);
  else if (rows == ROWS) tile_of(ROWS, 1, c, transposed, panel, rows, columns, depth, mode, bias);
  else tile_of(ROWS, 0, c, transposed, panel, rows, columns, depth, mode, bias);
}

// Not inlined, for the sake of registers, like tile().
__attribute__((noinline))
static void pack_columns(real *panels, Matrix b, int depth, int columns) {
  pack(panels, b, depth, columns, COLUMNS);
}
__attribute__((noinline))
static void pack_rows(real *panels, Matrix a, int depth, int rows) {
  pack(panels, transpose(a), depth, rows, ROWS);
}

// The matmul of one thread with a B that has been packed. height is the depth with which it was: so
// the panel of columns from j on is at panels + j*height. For rows k to k + K of B only, pass
// panels + k*COLUMNS.
static void multiply_packed(Matrix c, Matrix a, const real *panels, long height, int M, int N,
                            int K, int mode, const real *bias) {
  for (int j = 0; j < N; j += COLUMNS)
    for (int i = 0; i < M; i += ROWS)
      tile(part_of(c, i, j), part_of(a, i, 0), panels + j*height, MIN(ROWS, M - i),
           MIN(COLUMNS, N - j), K, mode, bias ? bias + j : NULL);
}

// n numbers that the thread may use until it calls this again. multiply() does; multiply_packed()
// does not.
static real *scratch(long n) {
  static __thread real *memory;
  static __thread long size;
  if (n > size) {
    memory = (real *)host_alloc(memory, (n + CACHE_LINE) * sizeof(real));
    size = n;
  }
  return (real *)(((uintptr_t)memory + 63) / 64 * 64);
}

// The matmul of one thread, in blocks of DEPTH x BLOCK_COLUMNS of B.
static void multiply(Matrix c, Matrix a, Matrix b, int M, int N, int K, int mode,
                     const real *bias) {
  real *panels = scratch(DEPTH * (BLOCK_COLUMNS + BLOCK_ROWS));
  real *copies = panels + DEPTH*BLOCK_COLUMNS;
  for (int k = 0; k < K; k += DEPTH)
    for (int j = 0; j < N; j += BLOCK_COLUMNS) {
      int depth = MIN(DEPTH, K - k), columns = MIN(BLOCK_COLUMNS, N - j);
      pack_columns(panels, part_of(b, k, j), depth, columns);
      for (int i = 0; i < M; i += ROWS) {
        Matrix a_part = part_of(a, i, k);
        if (a.right != 1) {
          if (i % BLOCK_ROWS == 0)
            pack_rows(copies, a_part, depth, MIN(BLOCK_ROWS, M - i));
          a_part = transpose(rows_of(copies + i % BLOCK_ROWS * depth, ROWS));
        }
        multiply_packed(part_of(c, i, j), a_part, panels, depth, MIN(ROWS, M - i), columns, depth,
                        k > 0 ? ADD : mode, bias ? bias + j : NULL);
      }
    }
}

// Matrices that have been packed in advance: generate.c does that with the weights, once; training
// never does.
static struct Packed { Matrix b; const real *panels; } *packed;
static int n_packed;

// The matmul of all threads. They cut C into a grid of parts, as equal as whole tiles can be: for 6
// threads 1 x 6, 2 x 3, 3 x 2 or 6 x 1, whichever takes least time. If a thread has t rows of tiles
// and p panels, and a tile takes the time 1, then the tiles take t*p, packing about 2*p, and to
// fetch the rows of A about t. The sum is (t + 2)(p + 1) - 2.
static void matmul(Matrix c, Matrix a, Matrix b, int M, int N, int K, int mode, const real *bias) {
  if (PLAIN) { matmul_plain(c, a, b, M, N, K, mode, bias); return; }
  long tiles = (M + ROWS - 1) / ROWS, panels = (N + COLUMNS - 1) / COLUMNS, least = LONG_MAX;
  int down = 1, right = 1;                       // the grid
  for (int n = 1; n <= n_threads; n++) {
    int others = n_threads / n;
    if (n * others < n_threads) continue;
    long time = ((tiles + n - 1) / n + 2) * ((panels + others - 1) / others + 1);
    if (time < least) least = time, down = n, right = others;
  }
  const real *packed_b = NULL;
  for (int i = 0; i < n_packed; i++)
    if (!memcmp(&packed[i].b, &b, sizeof b)) packed_b = packed[i].panels;
  parallel_for (part, n_threads) {
    long y = part / right, x = part % right;
    int i = tiles * y / down * ROWS, i1 = MIN(M, tiles * (y + 1) / down * ROWS);
    int j = panels * x / right * COLUMNS, j1 = MIN(N, panels * (x + 1) / right * COLUMNS);
    Matrix c_part = part_of(c, i, j), a_part = part_of(a, i, 0), b_part = part_of(b, 0, j);
    const real *bias_part = bias ? bias + j : NULL;
    if (packed_b)
      multiply_packed(c_part, a_part, packed_b + (long)j*K, K, i1 - i, j1 - j, K, mode, bias_part);
    else multiply(c_part, a_part, b_part, i1 - i, j1 - j, K, mode, bias_part);
  }
  profile_flop(2.0 * M * N * K);
}

static void add_columns(real *sum, const real *x, int N, int O) {
  parallel_for (strip, column_strips(O)) {
    int o = strip*WIDE, width = MIN(WIDE, O - o);
    real part[WIDE] = {0};
    for (int n = 0; n < N; n++)
      for (int j = 0; j < width; j++) part[j] += x[(long)n*O + o + j];
    for (int j = 0; j < width; j++) sum[o + j] += part[j];
  }
}

static void fill(real *x, long n, real value) {
  parallel_for (chunk, chunks(n))
    for (long i = chunk*CHUNK; i < MIN(n, (chunk + 1)*CHUNK); i++) x[i] = value;
}

static real max_of(const real *x, int n) {
  real lane[LANES], max = x[0];
  int i = 0;
  for (int j = 0; j < LANES; j++) lane[j] = max;
  for (; i + LANES <= n; i += LANES)
    NOT_UNROLLED
    for (int j = 0; j < LANES; j++) lane[j] = x[i + j] > lane[j] ? x[i + j] : lane[j];
  for (int j = 0; j < LANES; j++) max = lane[j] > max ? lane[j] : max;
  for (; i < n; i++) max = x[i] > max ? x[i] : max;
  return max;
}

// sums->loss += sum_n loss[n], and likewise correct: a thread for each
static void add_loss(LossSums *sums, Tensor loss, Tensor correct, int N) {
  parallel_for (k, 2) {
    double sum = 0;
    for (int n = 0; n < N; n++) sum += k ? correct.data[n] : loss.data[n];
    *(k ? &sums->correct : &sums->loss) += sum;
  }
}

// *result = sum_i x[i]^2. The chunks are summed first, so that the order does not depend on the
// number of threads.
static void squared_norm(double *result, double *partial, const real *x, long n) {
  parallel_for (chunk, chunks(n)) {
    const real *from = x + chunk*CHUNK;
    partial[chunk] = SUM(double, i, MIN((long)CHUNK, n - chunk*CHUNK), (double)from[i] * from[i]);
  }
  parallel_for (one, 1) {                        // work for one thread
    double sum = 0;
    for (long chunk = 0; chunk < chunks(n); chunk++) sum += partial[chunk];
    result[one] = sum;
  }
}

// exp(x) in float, to 1 unit in the last place, in a form that the compiler can vectorise (libm's
// is a call). Write x = n ln 2 + r with |r| <= ln 2 / 2; then exp(x) = 2^n exp(r), and exp(r) is a
// polynomial (Cephes). For x = 3: n = 4, r = 0.2274, exp(r) = 1.2553, times 2^4 = 20.085.
// A float from 2^23 to 2^24 has no bits for a fraction, so adding ROUND, in the middle, rounds to a
// whole number, which then stands in the low bits. The bits of a float are sign, exponent + 127,
// fraction: so n + 127, shifted to the exponent, is 2^n. x is clamped to -87 .. 88, where 2^n
// exists (so exp_(-1000) is 1.6e-38, not 0); NaN stays.
static inline real exp_(real x) {
  if (sizeof(real) == sizeof(double)) return exp(x);
  const float ROUND = 0x1.8p23f;
  const int32_t BITS_OF_ROUND = 0x4b400000;
  float y = x < -87 ? -87 : (float)x;
  y = y > 88 ? 88 : y;
  float sum = y * 1.44269504f + ROUND;
  int32_t n;
  memcpy(&n, &sum, 4);
  n -= BITS_OF_ROUND;
  // ln 2 in two parts: the first has few bits, so that n times it is exact
  float r = y - n * 0.693359375f - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p*r + 1.3981999507e-3f;
  p = p*r + 8.3334519073e-3f;
  p = p*r + 4.1665795894e-2f;
  p = p*r + 1.6666665459e-1f;
  p = p*r + 5.0000001201e-1f;
  p = p*r*r + r + 1;
  uint32_t exponent = (uint32_t)(n + 127) << 23;
  memcpy(&y, &exponent, 4);
  return p * y;
}

static inline real tanh_(real u) { return 1 - 2 / (exp_(2*u) + 1); }   // for any u, and NaN

// ---- The fast attention: COLUMNS queries at a time, its products by the tiles of the matmul.
// Scores are computed transposed: a row of att has those of one key with each of the queries. So
// the maximum and the sum over keys, one for each query, take whole vectors, and nothing has to be
// added up inside a vector. With COLUMNS = 2:
//
//   queries   0 1   2 3   4 5
//   key 0     x x   x x   x x       x: exp(z[t,s] - max[t]), which is att[t,s] times the sum of all
//   key 1     0 x   x x   x x       x of query t. What a query does not see is 0. No product goes
//   key 2           x x   x x       further than to the last key that one of its queries sees.
//   key 3           0 x   x x
//   key 4                 x x       (0 times infinity is NaN: an infinite value would reach earlier
//   key 5                 0 x       queries, too, unlike in the plain form.)

static void attention_forward(Tensor out, Tensor lse, Tensor qkv, int B, int T, int C, int H) {
  if (PLAIN) { attention_plain_forward(out, lse, qkv, B, T, C, H); return; }
  int D = C / H;
  long row = 3L*C;                               // from token to token in qkv
  real scale = 1 / sqrt((real)D);
  parallel_for (bh, B*H) {
    Head a = head_of(qkv.data, out.data, lse.data, bh, T, C, H);
    real *att = scratch((long)T*COLUMNS + (long)D*padded(T) + (long)T*padded(D));
    real *qT_panels = att + (long)T*COLUMNS, *v_panels = qT_panels + (long)D*padded(T);
    pack_columns(qT_panels, transpose(rows_of(a.q, row)), D, T);
    pack_columns(v_panels, rows_of(a.v, row), T, D);
    for (int i = 0; i < T; i += COLUMNS) {       // queries from i on; t is relative to i
      int queries = MIN(COLUMNS, T - i), keys = i + queries;
      real max[COLUMNS], sum[COLUMNS];           // of each query
      // att: first q.k, then x of the picture
      multiply_packed(rows_of(att, COLUMNS), rows_of(a.k, row), qT_panels + (long)i*D, D, keys,
                      COLUMNS, D, SET, NULL);
      for (int t = 0; t < COLUMNS; t++) max[t] = -INFINITY, sum[t] = 0;
      for (int s = 0; s < keys; s++)
        NOT_UNROLLED
        for (int t = 0; t < COLUMNS; t++) {
          real z = att[s*COLUMNS + t] * scale;
          max[t] = s <= i + t && z > max[t] ? z : max[t];
        }
      for (int s = 0; s < keys; s++)
        NOT_UNROLLED
        for (int t = 0; t < COLUMNS; t++) {      // max, so that exp cannot overflow
          real x = exp_(att[s*COLUMNS + t] * scale - max[t]);
          sum[t] += att[s*COLUMNS + t] = s <= i + t ? x : 0;
        }
      for (int t = 0; t < queries; t++) a.lse[i + t] = max[t] + log(sum[t]);
      for (int t = 0; t < queries; t += ROWS) {
        int rows = MIN(ROWS, queries - t);
        multiply_packed(rows_of(a.out + (long)(i + t)*C, C), transpose(rows_of(att + t, COLUMNS)),
                        v_panels, T, rows, D, i + t + rows, SET, NULL);
      }
      for (int t = 0; t < queries; t++)
        for (int d = 0; d < D; d++) a.out[(long)(i + t)*C + d] *= 1 / sum[t];
    }
  }
  profile_flop(2.0*B*T*T*C);
}

// For backward a block of queries meets a block of keys, so that att and dz of the two, and what is
// packed, fit into the core's cache. Five products. For ROWS queries at a time:
//   att from q k^T;  datt = dout v^T;  dq = or += dz k
// then for ROWS keys at a time, with all queries of the block that see one of them:
//   dv = or += att^T dout;  dk = or += dz^T q
// The first block that reaches a row sets it, later ones add. For dq that is the first block of
// keys; for a group of keys, the block with the first query that sees one of them.
// Here t is relative to i, s to j, and dz has been divided by sqrt(D). t0 and s are multiples of
// ROWS, and so is the first query that sees a group of keys: for this query and later ones, att and
// dz were computed up to the last key of the group, 0 where it is not seen.
enum {
  QUERIES = 96, KEYS = 256,
  STRIDE = KEYS + CACHE_LINE   // from row to row of att and dz, an odd number of cache lines: rows
};                             // a power of 2 apart would share few places in the cache
static_assert(QUERIES % ROWS == 0 && KEYS % COLUMNS == 0 && BLOCK_COLUMNS % COLUMNS == 0, "blocks");

static void attention_backward(Tensor out, Tensor lse, Tensor qkv, int B, int T, int C, int H) {
  if (PLAIN) { attention_plain_backward(out, lse, qkv, B, T, C, H); return; }
  int D = C / H;
  long row = 3L*C, size = (long)KEYS*padded(D);   // of a packed operand, at most
  real scale = 1 / sqrt((real)D);
  parallel_for (bh, B*H) {
    Head a = head_of(qkv.data, out.data, lse.data, bh, T, C, H);
    Head g = head_of(qkv.grad, out.grad, lse.data, bh, T, C, H);
    real *att = scratch(2L*QUERIES*STRIDE + 5*size + T), *dz = att + QUERIES*STRIDE;
    real *k_panels = dz + QUERIES*STRIDE, *kT_panels = k_panels + size;
    real *vT_panels = kT_panels + size, *q_panels = vT_panels + size;
    real *dout_panels = q_panels + size, *dout_dot_out = dout_panels + size;
    for (long t = 0; t < T; t++)
      dout_dot_out[t] = SUM(real, d, D, g.out[t*C + d] * a.out[t*C + d]);
    for (long j = 0; j < T; j += KEYS) {         // keys from j on
      int keys = MIN((long)KEYS, T - j);
      Matrix k = rows_of(a.k + j*row, row), v = rows_of(a.v + j*row, row);
      pack_columns(k_panels, k, keys, D);
      pack_columns(kT_panels, transpose(k), D, keys);
      pack_columns(vT_panels, transpose(v), D, keys);
      for (long i = j; i < T; i += QUERIES) {    // queries from i on
        int queries = MIN((long)QUERIES, T - i);
        int keys_seen = MIN((long)keys, i + queries - j);   // by any query of the block
        Matrix q = rows_of(a.q + i*row, row), dout = rows_of(g.out + i*C, C);
        pack_columns(q_panels, q, queries, D);
        pack_columns(dout_panels, dout, queries, D);
        for (int t0 = 0; t0 < queries; t0 += ROWS) {   // att and dz, and from them dq
          int rows = MIN(ROWS, queries - t0), seen = MIN((long)keys, i + t0 + rows - j);
          Matrix att_t0 = rows_of(att + t0*STRIDE, STRIDE), dz_t0 = rows_of(dz + t0*STRIDE, STRIDE);
          Matrix dq = rows_of(g.q + (i + t0)*row, row);
          int width = padded(seen);              // whole tiles
          multiply_packed(att_t0, part_of(q, t0, 0), kT_panels, D, rows, width, D, SET, NULL);
          multiply_packed(dz_t0, part_of(dout, t0, 0), vT_panels, D, rows, width, D, SET, NULL);
          for (int t = t0; t < t0 + rows; t++) {
            real *att_t = att + t*STRIDE, *dz_t = dz + t*STRIDE;
            real lse_t = a.lse[i + t], dot = dout_dot_out[i + t];
            for (int s = 0; s < width; s++) {    // att had q.k until now, dz had datt
              att_t[s] = j + s <= i + t ? exp_(att_t[s] * scale - lse_t) : 0;
              dz_t[s] = att_t[s] * (dz_t[s] - dot) * scale;
            }
          }
          multiply_packed(dq, dz_t0, k_panels, keys, rows, D, seen, j > 0 ? ADD : SET, NULL);
        }
        for (int s = 0; s < keys_seen; s += ROWS) {   // dk and dv of ROWS keys
          int rows = MIN(ROWS, keys_seen - s);
          int t = MAX(0, j + s - i);             // the first query that sees the first of them
          int mode = j + s < i ? ADD : SET;      // have queries before i seen them?
          Matrix att_s = transpose(rows_of(att + t*STRIDE + s, STRIDE));
          Matrix dz_s = transpose(rows_of(dz + t*STRIDE + s, STRIDE));
          multiply_packed(rows_of(g.v + (j + s)*row, row), att_s, dout_panels + t*COLUMNS, queries,
                          rows, D, queries - t, mode, NULL);
          multiply_packed(rows_of(g.k + (j + s)*row, row), dz_s, q_panels + t*COLUMNS, queries,
                          rows, D, queries - t, mode, NULL);
        }
      }
    }
  }
  profile_flop(5.0*B*T*T*C);
}

// ---- 7. Threads and memory --------------------------------------------------------------------

// Waits until all threads have come here: the last one to arrive changes `phase`, for which the
// others wait. It spins first, since the others are microseconds away; then it lets other threads
// run; then it sleeps, so that idle threads cost little. RELEASE and ACQUIRE say that what a
// thread wrote before the barrier is seen by all after it.
static struct {            // padded to separate cache lines, against false sharing
  int arrived; char pad1[60];
  unsigned phase; char pad2[60];
} gate;

static void profile_mark(const char *function);

static void barrier(const char *function) {
  unsigned phase = __atomic_load_n(&gate.phase, __ATOMIC_RELAXED);
  if (__atomic_add_fetch(&gate.arrived, 1, __ATOMIC_ACQ_REL) == n_threads) {
    __atomic_store_n(&gate.arrived, 0, __ATOMIC_RELAXED);
    __atomic_store_n(&gate.phase, phase + 1, __ATOMIC_RELEASE);   // opens the gate
  } else {
    struct timespec nap = {0, 50000};
    for (int spins = 0; __atomic_load_n(&gate.phase, __ATOMIC_ACQUIRE) == phase; spins++)
      if (spins > 20000) nanosleep(&nap, NULL);
      else if (spins > 2000) sched_yield();
  }
  if (opt.profile && thread_id == 0) profile_mark(function);
}

static void (*launched_work)(void *);
static void *launched_argument;

static void *worker(void *id) {
  thread_id = (int)(intptr_t)id;
  for (;;) {
    barrier(NULL);                               // until something is launched
    launched_work(launched_argument);
    barrier(NULL);                               // until all have finished
  }
  return NULL;                                   // never
}

static const char *device_start(int threads, const char *precision) {
  if (strcmp(precision, "fp32"))
    die("--precision %s: expected fp32 (./train_gpu also has bf16)", precision);
  int running = n_threads;                       // by an earlier call; threads are only added
  assert(threads >= running);
  n_threads = threads;
  for (int i = running; i < threads; i++) {
    pthread_t thread;
    if (pthread_create(&thread, NULL, worker, (void *)(intptr_t)i))
      die("--threads %d, but the system allows only %d: lower it", threads, i);
    pthread_detach(thread);
  }
  return "CPU";
}

static void launch(void (*work)(void *), void *argument) {
  launched_work = work; launched_argument = argument;
  barrier(NULL);
  work(argument);
  barrier(NULL);
}

// Asks Linux for pages of 2 MB instead of 4 KB: a core's TLB, its cache of page addresses, is
// small, and a tile of the matmul touches a page in each of its rows. Measured: 0 to 4 % of a step.
static void *device_alloc(size_t bytes) {
  enum { BIG_PAGE = 1 << 21 };
  double installed = (double)sysconf(_SC_PHYS_PAGES) * sysconf(_SC_PAGESIZE);
  void *p = NULL;
  device_bytes += bytes;
  if (device_bytes > installed ||
      posix_memalign(&p, bytes < BIG_PAGE ? 64 : BIG_PAGE, MAX(bytes, 1)))
    die("cannot allocate %.1f MB of memory (the machine has %.1f MB): lower " LOWER,
        device_bytes / 1e6, installed / 1e6);
#ifdef MADV_HUGEPAGE
  if (bytes >= BIG_PAGE) madvise(p, bytes, MADV_HUGEPAGE);
#endif
  memset(p, 0, bytes);
  return p;
}
static void copy_in(void *device, const void *host, size_t bytes) { memcpy(device, host, bytes); }
static void copy_out(void *host, const void *device, size_t bytes) { memcpy(host, device, bytes); }
#endif   // GPU

// ---- Helpers, for the host

#ifndef PROGRAM
#define PROGRAM "train"                          // the name in its messages
#endif
static int line_is_open;                         // by show(): a message must start on a new line

static void die(const char *format, ...) {
  char message[9000];                            // room for two paths
  va_list args;
  va_start(args, format);
  vsnprintf(message, sizeof message, format, args);
  va_end(args);
  for (char *c = message; *c; c++)               // control characters from a file
    if ((unsigned char)*c < 32 || *c == 127) *c = '?';
  fflush(stdout);
  fprintf(stderr, "%s" PROGRAM ": %s\n", line_is_open ? "\n" : "", message);
  exit(1);
}

// A line on stderr that replaces itself, at most five times a second; nothing if stderr is not a
// terminal. NULL clears it.
__attribute__((format(printf, 1, 2)))
static void show(const char *format, ...) {
  static double shown;
  if (format && (!isatty(2) || seconds() < shown + 0.2)) return;
  if (line_is_open) fprintf(stderr, "\r\033[K");
  line_is_open = format != NULL;
  if (!format) return;
  shown = seconds();
  va_list args;
  va_start(args, format);
  fprintf(stderr, "\033[?7l");                   // a narrow terminal cuts the line
  vfprintf(stderr, format, args);
  fprintf(stderr, "\033[?7h");
  va_end(args);
}

static void *host_alloc(void *p, size_t bytes) {
  p = p ? realloc(p, MAX(bytes, 1)) : calloc(MAX(bytes, 1), 1);
  if (!p) die("no memory for %.1f MB: use a smaller model or text", bytes / 1e6);
  return p;
}

static double seconds(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec + 1e-9 * now.tv_nsec;
}

// A hash of (seed, index), SplitMix64 (Steele et al. 2014). Any number of the sequence can be
// computed at any time, so a resumed run needs no saved generator.
static uint64_t random_bits(uint64_t seed, uint64_t index) {
  uint64_t z = seed * 0xd1342543de82ef95u + (index + 1) * 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

static double random_uniform(uint64_t seed, uint64_t index) {
  return (random_bits(seed, index) >> 11) * 0x1p-53;
}

static double random_normal(uint64_t seed, uint64_t index) {   // Box and Muller 1958
  double u = 1 - random_uniform(seed, 2*index), v = random_uniform(seed, 2*index + 1);
  return sqrt(-2 * log(u)) * cos(6.283185307179586 * v);
}

// ---- The tensors of a model, and their memory

// Where an activation's data, or its gradient, is stored. The data are kept until the backward pass
// has read them. A gradient is needed only until the layer below has read it: so all blocks share a
// few gradient buffers. In the order of the backward pass, from the top of a block down:
//
//   activation  shape   data    gradient   why the gradient may be there
//   x           (N,C)   OWN     RESIDUAL   x = x_mid + mlp_proj: the gradients of these two are
//   mlp_proj    (N,C)   PROJ    RESIDUAL     that of x, so they share its buffer, nothing is copied
//   gelu        (N,4C)  OWN     MLP
//   fc          (N,4C)  OWN     MLP        gelu_backward works in place
//   ln_2        (N,C)   OWN     BRANCH
//   x_mid       (N,C)   OWN     RESIDUAL   layernorm_backward adds; mlp_proj's was read before that
//   attn_proj   (N,C)   PROJ    RESIDUAL   likewise: read before the layernorm below adds
//   attn        (N,C)   OWN     BRANCH     free again: layernorm_backward has read ln_2's gradient
//   qkv         (N,3C)  OWN     QKV
//   ln_1        (N,C)   OWN     BRANCH     free again: attention_backward has read attn's gradient
//
// Outside of the blocks: embedding is OWN, RESIDUAL; x_f is OWN, BRANCH; loss is OWN, OWN; the
// gradient of logits, the largest activation, overwrites its data (IN_PLACE). mean_rstd, lse,
// row_lse and correct are OWN, NONE.
// PROJ is read once, by the next residual_forward, so all blocks can share it. The backward pass
// reads all other data again, except for loss and correct, which are for add_loss().
enum Place {
  NONE,                                // not needed
  OWN,                                 // memory of its own
  IN_PLACE,                            // a gradient that overwrites its data
  RESIDUAL, PROJ, BRANCH, QKV, MLP,    // a buffer that all tensors with this place share
  N_PLACES
};

static long entry_count(const Entry *e) { return (long)e->rows * MAX(e->cols, 1); }

// Reserves memory for an entry at offset *end, which moves on; returns the offset. Each tensor
// begins on a cache line: 16 floats.
static long place(const Entry *e, long *end) {
  long at = *end;
  *end += (entry_count(e) + 15) / 16 * 16;
  return at;
}

static long shared_at[N_PLACES];       // of the model that is laid out now; -1: not reserved yet

// The same for an activation, or its gradient; -1 for NONE. The first tensor with a shared place
// reserves the buffer: all that share it have the same size.
static long place_activation(Model *m, const Entry *e, enum Place where) {
  if (where == NONE) return -1;
  if (where == OWN || m->unshared) return place(e, &m->n_memory);
  if (shared_at[where] < 0) shared_at[where] = place(e, &m->n_memory);
  return shared_at[where];
}

static Entry *add_entry(Entry **list, int *n, Tensor *tensor, int rows, int cols,
                        const char *format, int layer) {
  *list = (Entry *)host_alloc(*list, (*n + 1) * sizeof(Entry));
  Entry *e = &(*list)[(*n)++];
  memset(e, 0, sizeof *e);
  e->tensor = tensor; e->rows = rows; e->cols = cols;
  snprintf(e->name, sizeof e->name, format, layer);
  return e;
}

static void add_parameter(Model *m, Tensor *t, int rows, int cols, double mean, double std,
                          const char *name, int layer) {
  Entry *e = add_entry(&m->parameter, &m->n_parameter_tensors, t, rows, cols, name, layer);
  e->mean = mean; e->std = std;
  // counted from the first matrix, or the first vector; model_layout() adds what is before that
  e->data_at = place(e, cols ? &m->n_in_matrices : &m->n_in_vectors);
  m->n_parameters += entry_count(e);
}

// A weight (rows,cols) and its bias. cols 0: a vector of weights and one of biases.
static void add_weight_bias(Model *m, WeightBias *p, int rows, int cols, double mean, double std,
                            const char *name, int layer) {
  char full[40];
  snprintf(full, sizeof full, "%s.weight", name);
  add_parameter(m, &p->weight, rows, cols, mean, std, full, layer);
  snprintf(full, sizeof full, "%s.bias", name);
  add_parameter(m, &p->bias, cols ? cols : rows, 0, 0, 0, full, layer);
}

static void add_activation(Model *m, Tensor *t, int cols, enum Place data, enum Place grad,
                           const char *name, int layer) {
  Entry *e = add_entry(&m->activation, &m->n_activation_tensors, t, m->max_tokens, cols, name,
                       layer);
  e->data_at = place_activation(m, e, data);
  if (!m->training) grad = NONE;
  e->grad_at = grad == IN_PLACE && !m->unshared ? e->data_at : place_activation(m, e, grad);
}

// Lists every tensor of the model. Parameters have the names, shapes and initial values of GPT-2 in
// Hugging Face's library, without the prefix "transformer.": a matrix is normal with standard
// deviation std, a layernorm's weight is 1, a bias 0.
static void layout(Model *m) {
  int H = m->config.n_head, C = m->config.n_embd, V = m->config.vocab_size;
  double std = 0.02;
  double proj_std = std / sqrt(2.0 * m->config.n_layer);   // since 2L of these add up in x
  add_parameter(m, &m->wte, V, C, 0, std, "wte.weight", 0);
  add_parameter(m, &m->wpe, m->config.block_size, C, 0, std, "wpe.weight", 0);
  add_activation(m, &m->embedding, C, OWN, RESIDUAL, "embedding", 0);
  for (int l = 0; l < m->config.n_layer; l++) {
    Block *p = &m->block[l];
    add_weight_bias(m, &p->ln_1, C, 0, 1, 0, "h.%d.ln_1", l);
    add_weight_bias(m, &p->c_attn, C, 3*C, 0, std, "h.%d.attn.c_attn", l);
    add_weight_bias(m, &p->attn_proj, C, C, 0, proj_std, "h.%d.attn.c_proj", l);
    add_weight_bias(m, &p->ln_2, C, 0, 1, 0, "h.%d.ln_2", l);
    add_weight_bias(m, &p->c_fc, C, 4*C, 0, std, "h.%d.mlp.c_fc", l);
    add_weight_bias(m, &p->mlp_proj, 4*C, C, 0, proj_std, "h.%d.mlp.c_proj", l);
    Activations *a = &m->act[l];
    add_activation(m, &a->ln_1, C, OWN, BRANCH, "h.%d.ln_1.out", l);
    add_activation(m, &a->ln_1_mean_rstd, 2, OWN, NONE, "h.%d.ln_1.mean_rstd", l);
    add_activation(m, &a->qkv, 3*C, OWN, QKV, "h.%d.attn.qkv", l);
    add_activation(m, &a->attn, C, OWN, BRANCH, "h.%d.attn.out", l);
    add_activation(m, &a->lse, H, OWN, NONE, "h.%d.attn.lse", l);   // in the order (B,H,T)
    add_activation(m, &a->attn_proj, C, PROJ, RESIDUAL, "h.%d.attn.proj", l);
    add_activation(m, &a->x_mid, C, OWN, RESIDUAL, "h.%d.x_mid", l);
    add_activation(m, &a->ln_2, C, OWN, BRANCH, "h.%d.ln_2.out", l);
    add_activation(m, &a->ln_2_mean_rstd, 2, OWN, NONE, "h.%d.ln_2.mean_rstd", l);
    add_activation(m, &a->fc, 4*C, OWN, MLP, "h.%d.mlp.fc", l);
    add_activation(m, &a->gelu, 4*C, OWN, MLP, "h.%d.mlp.gelu", l);
    add_activation(m, &a->mlp_proj, C, PROJ, RESIDUAL, "h.%d.mlp.proj", l);
    add_activation(m, &a->x, C, OWN, RESIDUAL, "h.%d.x", l);
  }
  add_weight_bias(m, &m->ln_f, C, 0, 1, 0, "ln_f", 0);
  add_activation(m, &m->x_f, C, OWN, BRANCH, "ln_f.out", 0);
  add_activation(m, &m->x_f_mean_rstd, 2, OWN, NONE, "ln_f.mean_rstd", 0);
  add_activation(m, &m->logits, V, OWN, IN_PLACE, "logits", 0);
  add_activation(m, &m->row_lse, 0, OWN, NONE, "row_lse", 0);
  add_activation(m, &m->loss, 0, OWN, OWN, "loss", 0);
  add_activation(m, &m->correct, 0, OWN, NONE, "correct", 0);
}

// Describes a model for micro-batches of up to max_tokens tokens; takes no device memory yet.
static void model_layout(Model *m, Config config, long max_tokens, int training, int unshared) {
  if (4.0 * config.block_size * config.n_embd > 2e9 || max_tokens > 500000000)
    die("a micro-batch of %ld tokens, in sequences of %d, with %d channels is too large: lower "
        "--batch_size, --block_size or --n_embd", max_tokens, config.block_size, config.n_embd);
  memset(m, 0, sizeof *m);
  m->config = config; m->max_tokens = (int)max_tokens;
  m->training = training; m->unshared = unshared;
  m->attention = attention_forward;
  m->block = (Block *)host_alloc(NULL, config.n_layer * sizeof(Block));
  m->act = (Activations *)host_alloc(NULL, config.n_layer * sizeof(Activations));
  memset(shared_at, -1, sizeof shared_at);
  layout(m);
  m->n_weights = m->n_in_matrices + m->n_in_vectors;
  for (Entry *e = m->parameter; e < m->parameter + m->n_parameter_tensors; e++)
    if (!e->cols) e->data_at += m->n_in_matrices;             // the vectors follow the matrices
}

static void model_allocate(Model *m) {
  m->weights.data = (real *)device_alloc(m->n_weights * sizeof(real));
  if (m->training) m->weights.grad = (real *)device_alloc(m->n_weights * sizeof(real));
  m->memory = (real *)device_alloc(m->n_memory * sizeof(real));
  m->token = (int *)device_alloc(m->max_tokens * sizeof(int));
  m->target = (int *)device_alloc(m->max_tokens * sizeof(int));
  m->sums = (LossSums *)device_alloc(sizeof(LossSums));
  m->partial = (double *)device_alloc(chunks(m->n_weights) * sizeof(double));
  for (Entry *e = m->parameter; e < m->parameter + m->n_parameter_tensors; e++) {
    e->tensor->data = m->weights.data + e->data_at;
    e->tensor->grad = m->training ? m->weights.grad + e->data_at : NULL;
  }
  for (Entry *e = m->activation; e < m->activation + m->n_activation_tensors; e++) {
    e->tensor->data = m->memory + e->data_at;
    e->tensor->grad = e->grad_at < 0 ? NULL : m->memory + e->grad_at;
  }
}

static void model_init(Model *m, uint64_t seed) {   // random weights
  for (int i = 0; i < m->n_parameter_tensors; i++) {
    Entry *e = &m->parameter[i];
    real *w = (real *)host_alloc(NULL, entry_count(e) * sizeof(real));
    for (long j = 0; j < entry_count(e); j++)
      w[j] = (real)(e->mean + e->std * random_normal(random_bits(seed, i), j));
    copy_in(e->tensor->data, w, entry_count(e) * sizeof(real));
    free(w);
  }
}

// Floating-point operations of forward and backward over N tokens in sequences of T. A multiply-add
// counts as 2. For each token each number of a matrix takes part in one (except those of wpe, which
// are added), and in each block so do C channels of T/2 keys and of T/2 values on average. The
// backward pass has two products for each one of the forward pass, hence the 3.
static double model_flop(const Model *m, double N, double T) {
  double n_multiplied = 0;
  for (int i = 0; i < m->n_parameter_tensors; i++)
    if (m->parameter[i].cols && m->parameter[i].tensor != &m->wpe)
      n_multiplied += entry_count(&m->parameter[i]);
  return 3 * N * 2 * (n_multiplied + T * m->config.n_embd * m->config.n_layer);
}

// ===============================================================================================
// Lesson, layers and machinery end here. The rest is plumbing: texts, checkpoints, log and plot,
// options.
// ===============================================================================================

// ---- 8. Data ----------------------------------------------------------------------------------
// A token is a byte, so any file is a text. Its first 90 % are for training, the rest for
// validation.

static struct {
  const char *path;
  unsigned char *byte;
  long size, train_size;
  uint64_t hash;           // of the bytes: --resume wants the same text
  double floor;            // the lowest possible loss of the validation part; NaN: not known
} text;

// The contents of a file and a 0 after it, in memory that the caller frees.
static char *read_file(const char *path, long *size) {
  FILE *file = fopen(path, "rb");
  long capacity = 1 << 16;
  char *all = NULL;
  if (!file) die("%s: %s", path, strerror(errno));
  *size = 0;
  for (size_t got = 1; got > 0; *size += got) {
    if (!all || *size + 1 >= capacity) all = (char *)host_alloc(all, capacity *= 2);
    got = fread(all + *size, 1, capacity - 1 - *size, file);
  }
  if (ferror(file)) die("%s: %s", path, strerror(errno));   // a directory, for example
  fclose(file);
  all[*size] = 0;
  return all;
}

// data/tales.c writes the entropy of its text into a file beside it. The file is ignored unless it
// records the size of this text.
static double read_floor(void) {
  char path[4096], key[64];
  double value, bytes = 0, floor = NAN;
  snprintf(path, sizeof path, "%s.floor", text.path);
  FILE *file = fopen(path, "r");
  while (file && fscanf(file, "%63s %lf", key, &value) == 2) {
    if (!strcmp(key, "bytes")) bytes = value;
    if (!strcmp(key, "val_nats_per_byte")) floor = value;
  }
  if (file) fclose(file);
  return bytes == text.size ? floor : NAN;
}

static void text_open(const char *path) {
  text.path = path;
  text.byte = (unsigned char *)read_file(path, &text.size);
  text.train_size = text.size * 9 / 10;
  text.floor = read_floor();
  text.hash = 0xcbf29ce484222325u;
  for (long i = 0; i < text.size; i++) {
    if (text.byte[i] >= opt.config.vocab_size)
      die("%s: byte %ld is %d, but the vocabulary has %d entries: use --vocab_size 256", path, i,
          text.byte[i], opt.config.vocab_size);
    text.hash = (text.hash ^ text.byte[i]) * 0x100000001b3u;   // FNV-1a
  }
}

// Copies B windows of T tokens to the device. The target of a token is the one after it.
static void load_windows(Model *m, const unsigned char *byte, const long *start, int B, int T) {
  int *token = (int *)host_alloc(NULL, 2L*B*T * sizeof(int)), *target = token + B*T;
  for (int n = 0; n < B*T; n++) {
    token[n] = byte[start[n / T] + n % T];
    target[n] = byte[start[n / T] + n % T + 1];
  }
  copy_in(m->token, token, B*T * sizeof(int));
  copy_in(m->target, target, B*T * sizeof(int));
  free(token);
}

// Loads micro-batch number `index` of a run. Its windows are a function of --seed and the index, so
// a resumed run, or the other trainer of --compare, sees the same text.
static void load_micro_batch(Model *m, long index) {
  int B = opt.batch_size, T = opt.config.block_size;
  uint64_t seed = opt.seed ^ 0xffffffffffffaaaau;   // not that of the weights
  long *start = (long *)host_alloc(NULL, B * sizeof(long));
  for (int b = 0; b < B; b++)
    start[b] = random_bits(seed, (uint64_t)index * B + b) % (text.train_size - T);
  load_windows(m, text.byte, start, B, T);
  free(start);
}

// The mean loss over all consecutive windows in bytes begin..end-1. A last window that is not full
// is dropped; there must be one that is. Worthless if it is interrupted.
static Evaluation evaluate(Model *m, long begin, long end) {
  int T = opt.config.block_size, at_once = m->max_tokens / T;
  long windows = (end - begin - 1) / T, *start = (long *)host_alloc(NULL, at_once * sizeof(long));
  MicroBatch batch = {m, 0, T, 0};
  LossSums sums = {0, 0, 0};
  double started = seconds(), tokens = (double)windows * T;
  copy_in(m->sums, &sums, sizeof sums);
  for (long w = 0; w < windows && !interrupted; ) {
    batch.B = (int)MIN(at_once, windows - w);
    for (int b = 0; b < batch.B; b++) start[b] = begin + (w + b) * T;
    load_windows(m, text.byte, start, batch.B, T);
    launch_recorded(run_micro_batch, &batch, sizeof batch);
    w += batch.B;
    show("evaluating: %ld of %ld windows, %.0f s left", w, windows,
         (seconds() - started) * (windows - w) / w);
  }
  free(start);
  copy_out(&sums, m->sums, sizeof sums);
  Evaluation result = {sums.loss / tokens, sums.correct / tokens};
  return result;
}

// ---- 9. Checkpoint ----------------------------------------------------------------------------
// The folder of a run has state.safetensors, which has all that --resume needs; model.safetensors,
// config.json and two files for a tokenizer, which Hugging Face's library opens; log.csv and
// loss.svg (section 10); and .lock, an empty file. A save writes the log and the plot, then
// state.safetensors, whose rename is the moment of the save, then what is derived from it.
// generate.c reads model.safetensors and config.json. --compare writes only log.csv and loss.svg.

// An option is a row of the table in section 11; name is NULL after the last one. Sizes of the
// model have a json name: their key in config.json.
enum { SWITCH, INTEGER, NUMBER, TEXT };          // fields of int, int, double, const char *
enum { IN_STATE = 1, FIXED };                    // FIXED: saved, and --resume cannot change it
typedef struct {
  const char *name, *json;
  int kind;
  void *value;
  const char *initial;                           // the default, as it would be typed, or NULL
  double low, high;
  int saved;
  const char *help;
  int given;                                     // on the command line, or by --resume
  long stored;                                   // in the config.json that was read last
} Option;
extern Option train_options[];
#define JSON_SPACE " \t\r\n"
#define for_sizes(o) for (Option *o = train_options; o->name; o++) if (o->json)

static const char *option_text(const Option *o) {   // its value, as it would be typed,
  static char number[32];                        //   valid until the next call
  if (o->kind == TEXT) return *(const char **)o->value;
  if (o->kind == NUMBER) snprintf(number, sizeof number, "%.17g", *(double *)o->value);
  else snprintf(number, sizeof number, "%d", *(int *)o->value);
  return number;
}

static const char *path_of(const char *folder, const char *name) {   // valid until the next call
  static char path[4096];
  if (snprintf(path, sizeof path, folder ? "%s/%s" : "%s%s", folder ? folder : "", name) >= 4096)
    die("the path %.40s... is too long", path);
  return path;
}

// A file is written under a temporary name, flushed to the disk, then renamed: whatever interrupts
// this, the file that was there before stays whole. One is open at a time.
static struct { char path[4096], temporary[4096 + 8]; FILE *file; } output;

__attribute__((noreturn))
static void output_failed(void) {
  int error = errno;
  if (output.file) unlink(output.temporary);
  die("%s cannot be written: %s", output.path, strerror(error));
}

// Sets output.path. If a file is there already, it must be a regular file, and not the text. folder
// may be NULL.
static void output_check(const char *folder, const char *name) {
  struct stat info, other;
  snprintf(output.path, sizeof output.path, "%s", path_of(folder, name));
  if (lstat(output.path, &info)) return;
  if (!S_ISREG(info.st_mode)) die("%s cannot be written: it is not a regular file", output.path);
  if (text.path && !stat(text.path, &other) && info.st_dev == other.st_dev &&
      info.st_ino == other.st_ino)
    die("%s is the text, and would be overwritten: use another --out", output.path);
}

static FILE *output_open(const char *folder, const char *name) {
  output.file = NULL;
  output_check(folder, name);
  snprintf(output.temporary, sizeof output.temporary, "%s.tmp", output.path);
  unlink(output.temporary);                               // of a run that was killed
  int fd = open(output.temporary, O_WRONLY | O_CREAT | O_EXCL, 0666);   // follows no link
  if (fd >= 0 && !(output.file = fdopen(fd, "wb"))) unlink(output.temporary);
  if (!output.file) output_failed();
  return output.file;
}

static void output_write(const void *p, size_t bytes) {
  if (fwrite(p, 1, bytes, output.file) != bytes) output_failed();
}

static void output_close(void) {
  if (fflush(output.file) || ferror(output.file) || fsync(fileno(output.file))) output_failed();
  if (fclose(output.file) || rename(output.temporary, output.path)) output_failed();
}

// Makes --out and the folders above it, locks it until the program ends, and finds out now, not
// after hours, whether it can be written in.
static void open_folder(void) {
  static const char *const names[] = {"log.csv", "loss.svg", "state.safetensors",
                                      "model.safetensors", "config.json", "tokenizer.json",
                                      "tokenizer_config.json"};
  char path[4096];
  struct flock lock;
  if (!*opt.out) die("--out needs the name of a folder");
  strcpy(path, path_of(opt.out, ".lock"));
  for (char *slash = strchr(path + 1, '/'); slash; slash = strchr(slash + 1, '/')) {
    *slash = 0;
    if (mkdir(path, 0777) && errno != EEXIST)
      die("--out %s cannot be made: %s", opt.out, strerror(errno));
    *slash = '/';
  }
  int fd = open(path, O_RDWR | O_CREAT | O_NOFOLLOW, 0666);
  if (fd < 0) die("--out %s cannot be written in: %s", opt.out, strerror(errno));
  memset(&lock, 0, sizeof lock);
  lock.l_type = F_WRLCK;
  // If another process has the lock, says which. Where files cannot be locked, goes on without.
  if (fcntl(fd, F_SETLK, &lock) && !fcntl(fd, F_GETLK, &lock) && lock.l_type != F_UNLCK)
    die("--out %s: process %ld is training there: wait until it ends, or use another folder",
        opt.out, (long)lock.l_pid);
  if (access(opt.out, W_OK)) die("--out %s cannot be written in: %s", opt.out, strerror(errno));
  for (size_t i = 0; i < sizeof names / sizeof *names; i++) output_check(opt.out, names[i]);
}

// safetensors: 8 bytes with the length of the header, little-endian; the header, JSON; the numbers:
// {"__metadata__":{..},"NAME":{"dtype":"F32","shape":[a,b],"data_offsets":[begin,end]},..}

typedef struct { const char *prefix, *name; int rows, cols; const real *data; } NamedTensor;

// Writes tensors that are on the device (cols 0: a vector). write_metadata, or NULL, writes
// ,"key":"value" for each of its entries.
static void write_safetensors(const char *folder, const char *file_name, const NamedTensor *list,
                              int n, void (*write_metadata)(FILE *)) {
  FILE *f = output_open(folder, file_name);
  long at = 0, bytes = 0;
  uint64_t header = 0;
  output_write(&header, 8);                               // filled in at the end
  fprintf(f, "{\"__metadata__\":{\"format\":\"pt\"");
  if (write_metadata) write_metadata(f);
  fprintf(f, "}");
  for (const NamedTensor *t = list; t < list + n; t++, at += bytes) {
    bytes = (long)t->rows * MAX(t->cols, 1) * sizeof(real);
    fprintf(f, ",\"%s%s\":{\"dtype\":\"%s\",\"shape\":[%d", t->prefix, t->name,
            sizeof(real) == 4 ? "F32" : "F64", t->rows);
    if (t->cols) fprintf(f, ",%d", t->cols);
    fprintf(f, "],\"data_offsets\":[%ld,%ld]}", at, at + bytes);
  }
  fprintf(f, "}");
  while (ftell(f) % 8) fprintf(f, " ");                   // so that the numbers are aligned
  header = ftell(f) - 8;
  for (const NamedTensor *t = list; t < list + n; t++) {
    bytes = (long)t->rows * MAX(t->cols, 1) * sizeof(real);
    real *numbers = (real *)host_alloc(NULL, bytes);
    copy_out(numbers, t->data, bytes);
    for (long i = 0; i < bytes / (long)sizeof(real); i++)
      if (!isfinite(numbers[i])) {               // the last update may have diverged
        unlink(output.temporary);
        die("%s%s has inf or nan: the last checkpoint is kept; lower --learning_rate", t->prefix,
            t->name);
      }
    output_write(numbers, bytes);
    free(numbers);
  }
  if (fseek(f, 0, SEEK_SET)) output_failed();
  output_write(&header, 8);
  output_close();
}

// JSON is read by searching for keys. Inside a JSON string a quote is escaped, so the text "key":
// stands only where a member has this key. What follows it is checked where it is used.

// Returns what follows "prefix+key": in s, or "" if the key is not there.
static const char *json_find(const char *s, const char *prefix, const char *key) {
  char quoted[160];
  snprintf(quoted, sizeof quoted, "\"%s%s\"", prefix, key);
  while ((s = strstr(s, quoted))) {
    s += strlen(quoted);
    s += strspn(s, JSON_SPACE);
    if (*s == ':') return s + 1 + strspn(s + 1, JSON_SPACE);
  }
  return "";
}

// Reads [a,b,..] or a: whole numbers, at most `most`. Returns how many; -1: it is something else.
static int json_integers(const char *s, long *x, int most) {
  int array = *s == '[', n = 0;
  for (s += array; n < most; s++) {
    s += strspn(s, JSON_SPACE);
    if (array && n == 0 && *s == ']') return 0;
    size_t digits = strspn(s, "0123456789");
    if (digits == 0 || digits > (sizeof(long) == 8 ? 18 : 9)) return -1;
    x[n++] = strtol(s, NULL, 10);
    s += digits;
    s += strspn(s, JSON_SPACE);
    if (*s == (array ? ']' : '}') || (!array && *s == ',')) return n;
    if (*s != ',') return -1;
  }
  return -1;
}

// Copies a string, at most size - 1 bytes, and decodes the escapes that write_string() writes.
// Returns 0 if there is none.
static int json_string(const char *s, char *out, size_t size) {
  size_t n = 0;
  if (*s != '"') return 0;
  for (s++; *s && *s != '"' && n < size - 1; n++) {
    unsigned code;
    char hex[3] = {0};
    if (!strncmp(s, "\\u00", 4)) strncpy(hex, s + 4, 2);
    int escaped = sscanf(hex, "%2x", &code) == 1;
    out[n] = escaped ? (char)code : *s;
    s += escaped ? 4 + strlen(hex) : 1;
  }
  out[n] = 0;
  return 1;
}

typedef struct Safetensors {                     // a file that is open
  char path[4096], *header;
  FILE *file;
  long begin, bytes;                             // where its numbers begin, how many bytes they are
  struct Safetensors *next;                      // another file of the same model, or NULL
} Safetensors;
typedef struct {
  const Safetensors *st;                         // the file that it is in
  char dtype[8];
  int size, dims;                                // bytes of a number
  long shape[8], offset[2];
} StoredTensor;

// Reads a tensor's entry in the header, {..} at s. Its data_offsets must be as far apart as dtype
// and shape say.
static StoredTensor read_entry(const Safetensors *st, const char *s) {
  StoredTensor t;
  char entry[400] = "";
  size_t length = strcspn(s, "}") + 1;
  memset(&t, 0, sizeof t);
  t.st = st;
  if (*s == '{' && length < sizeof entry) memcpy(entry, s, length);
  json_string(json_find(entry, "", "dtype"), t.dtype, sizeof t.dtype);
  t.size = !strcmp(t.dtype, "BOOL") ? 1 : atoi(t.dtype + strcspn(t.dtype, "0123456789")) / 8;
  t.dims = json_integers(json_find(entry, "", "shape"), t.shape, 8);
  int offsets = json_integers(json_find(entry, "", "data_offsets"), t.offset, 2), d = 0;
  long bytes = t.size;
  for (; d < t.dims && bytes <= LONG_MAX / MAX(t.shape[d], 1); d++) bytes *= t.shape[d];
  if (t.size < 1 || d != t.dims || offsets != 2 || t.offset[1] - t.offset[0] != bytes)
    die("%s: dtype, shape and data_offsets do not fit together: %.100s", st->path, s);
  return t;
}

static int by_offset(const void *a, const void *b) {   // by begin; if that is equal, by end
  const long *x = (const long *)a, *y = (const long *)b;
  int k = x[0] == y[0];
  return (x[k] > y[k]) - (x[k] < y[k]);
}

// The tensors must fill the file: no holes, no overlaps, nothing after the last.
static void check_offsets(const Safetensors *st) {
  long (*range)[2] = NULL, n = 0, at = 0;
  const char *s = json_find(st->header, "", "data_offsets");
  for (; *s; s = json_find(s + strcspn(s, "}"), "", "data_offsets"), n++) {
    const char *entry = s;                       // go back to where it begins
    while (entry > st->header && *entry != '{') entry--;
    if (n % 256 == 0) range = (long (*)[2])host_alloc(range, (n + 256) * sizeof *range);
    memcpy(range[n], read_entry(st, entry).offset, sizeof *range);
  }
  if (n == 0) die("%s has no tensors: is it a GPT-2?", st->path);
  qsort(range, n, sizeof *range, by_offset);
  for (long i = 0; i < n; at = range[i++][1])
    if (range[i][0] != at)
      die("%s: a tensor begins at byte %ld of the numbers, expected %ld: damaged?", st->path,
          range[i][0], at);
  if (at != st->bytes)
    die("%s: its header describes %ld bytes of numbers, there are %ld: %s?", st->path, at,
        st->bytes, st->bytes < at ? "truncated" : "damaged");
  free(range);
}

// Opens a file and checks its header; any fault ends the program.
static Safetensors *safetensors_open(const char *folder, const char *name, Safetensors *next) {
  Safetensors *st = (Safetensors *)host_alloc(NULL, sizeof *st);
  struct stat info;
  uint64_t size = 0;
  strcpy(st->path, path_of(folder, name));
  st->next = next;
  if (stat(st->path, &info)) die("%s: %s", st->path, strerror(errno));
  if (!S_ISREG(info.st_mode)) die("%s is not a file", st->path);   // to open a pipe would wait
  if (!(st->file = fopen(st->path, "rb"))) die("%s: %s", st->path, strerror(errno));
  if (fread(&size, 1, 8, st->file) != 8) die("%s is truncated", st->path);
  if (size > 100000000 || (long)size > (long)info.st_size - 8)
    die("%s: its header should have %llu bytes, the file has %ld: truncated, or not safetensors?",
        st->path, (unsigned long long)size, (long)info.st_size);
  st->header = (char *)host_alloc(NULL, size + 1);   // with a 0 at the end
  if (fread(st->header, 1, size, st->file) != size) die("%s: %s", st->path, strerror(errno));
  st->begin = 8 + (long)size;
  st->bytes = (long)info.st_size - st->begin;
  check_offsets(st);
  return st;
}

static void safetensors_close(Safetensors *st) {   // a file keeps its disk space while it is open
  for (Safetensors *next; st; st = next) {
    next = st->next;
    fclose(st->file);
    free(st->header);
    free(st);
  }
}

// Finds a tensor; returns 0 if it is not there.
static int find_tensor(const Safetensors *st, const char *prefix, const char *name,
                       StoredTensor *t) {
  const char *s = json_find(st->header, prefix, name);
  if (!*s) return st->next ? find_tensor(st->next, prefix, name, t) : 0;
  if (*json_find(s, prefix, name) || (st->next && find_tensor(st->next, prefix, name, t)))
    die("%s has two tensors %s", st->path, name);
  *t = read_entry(st, s);
  return 1;
}

// Opens the weights in a folder: model.safetensors, or the files that model.safetensors.index.json
// names if a large model was saved in several: {"weight_map":{"NAME":"FILE",..},..}
static Safetensors *open_weights(const char *folder) {
  char name[256];
  long size;
  Safetensors *list = NULL, *f;
  if (!access(path_of(folder, "model.safetensors"), F_OK))
    return safetensors_open(folder, "model.safetensors", NULL);
  if (access(path_of(folder, "model.safetensors.index.json"), F_OK)) {
    if (!access(path_of(folder, "pytorch_model.bin"), F_OK) ||
        !access(path_of(folder, "pytorch_model.bin.index.json"), F_OK))
      die("%s has pytorch_model.bin, which only Python can read; convert it: GPT2LMHeadModel."
          "from_pretrained(FOLDER).save_pretrained(FOLDER, safe_serialization=True)", folder);
    die("%s: %s", path_of(folder, "model.safetensors"), strerror(ENOENT));
  }
  char *index = read_file(path_of(folder, "model.safetensors.index.json"), &size);
  const char *s = json_find(index, "", "weight_map"), *end = s + strcspn(s, "}");
  for (; (s = strchr(s, ':')) && s < end; s++) {   // each value names a file
    if (!json_string(s + 1 + strspn(s + 1, JSON_SPACE), name, sizeof name)) continue;
    for (f = list; f && strcmp(f->path, path_of(folder, name)); ) f = f->next;
    if (f) continue;
    if (strchr(name, '/')) die("%s: a file of weights is %s, outside of it", folder, name);
    list = safetensors_open(folder, name, list);
  }
  if (!list) die("%s: model.safetensors.index.json names no files", folder);
  free(index);
  return list;
}

static double decode(const char *dtype, const char *at) {   // F64, F32, F16 or BF16
  double d; float f; uint16_t h; uint32_t w;
  if (!strcmp(dtype, "F64")) { memcpy(&d, at, 8); return d; }
  if (!strcmp(dtype, "F32")) { memcpy(&f, at, 4); return f; }
  memcpy(&h, at, 2);
  if (*dtype == 'B') { w = (uint32_t)h << 16; memcpy(&f, &w, 4); return f; }
  int exponent = h >> 10 & 31, fraction = h & 1023;       // F16, IEEE binary16
  d = exponent == 0 ? ldexp(fraction, -24)
    : exponent == 31 ? (fraction ? NAN : INFINITY) : ldexp(1024 + fraction, exponent - 25);
  return h >> 15 ? -d : d;
}

// Reads the first n numbers of a tensor.
static void read_numbers(const StoredTensor *t, real *x, long n) {
  const Safetensors *st = t->st;
  if (strcmp(t->dtype, "F32") && strcmp(t->dtype, "F64") && strcmp(t->dtype, "F16") &&
      strcmp(t->dtype, "BF16"))
    die("%s: a tensor is %s, not F32, F64, F16 or BF16", st->path, t->dtype);
  char *raw = (char *)host_alloc(NULL, n * t->size);
  if (fseek(st->file, st->begin + t->offset[0], SEEK_SET) ||
      fread(raw, t->size, n, st->file) != (size_t)n)
    die("%s cannot be read: %s", st->path, strerror(errno));
  for (long i = 0; i < n; i++) x[i] = (real)decode(t->dtype, raw + i * t->size);
  free(raw);
}

// Reads all parameters of a model to base, which is laid out like m->weights; with base NULL only
// checks that they are there in their shapes. Of a longer wpe the first positions are taken.
static void read_parameters(const Model *m, const Safetensors *st, const char *prefix, real *base) {
  for (const Entry *e = m->parameter; e < m->parameter + m->n_parameter_tensors; e++) {
    StoredTensor t;
    if (!find_tensor(st, prefix, e->name, &t))
      die("%s has no tensor %s%s: is it a GPT-2?", st->path, prefix, e->name);
    int longer = !strcmp(e->name, "wpe.weight") && t.shape[0] > e->rows;
    if (t.dims != (e->cols ? 2 : 1) || (t.shape[0] != e->rows && !longer) ||
        (e->cols && t.shape[1] != e->cols))
      die("%s: %s has the shape [%ld,%ld], expected [%d,%d] (0: no such dimension)", st->path,
          e->name, t.shape[0], t.shape[1], e->rows, e->cols);
    if (!base) continue;
    real *x = (real *)host_alloc(NULL, entry_count(e) * sizeof(real));
    read_numbers(&t, x, entry_count(e));
    copy_in(base + e->data_at, x, entry_count(e) * sizeof(real));
    free(x);
  }
}

// ---- The folder of a model

// What config.json says besides the sizes. required: the program supports no other value, and
// refuses a file that has one. (A missing key means GPT-2's default, which is the same.)
static const struct { const char *key, *value; int required; } hf_config[] = {
  {"model_type", "\"gpt2\"", 1}, {"activation_function", "\"gelu_new\"", 1},
  {"layer_norm_epsilon", "1e-05", 1}, {"tie_word_embeddings", "true", 1},
  {"scale_attn_weights", "true", 1}, {"scale_attn_by_inverse_layer_idx", "false", 1},
  {"reorder_and_upcast_attn", "false", 1}, {"add_cross_attention", "false", 1},
  {"architectures", "[\"GPT2LMHeadModel\"]", 0}, {"n_inner", "null", 0},
  {"loss_type", "\"ForCausalLM\"", 0},
  {"resid_pdrop", "0.0", 0}, {"embd_pdrop", "0.0", 0}, {"attn_pdrop", "0.0", 0},
  {"initializer_range", "0.02", 0}, {"bos_token_id", "null", 0}, {"eos_token_id", "null", 0}};
enum { N_HF_CONFIG = sizeof hf_config / sizeof *hf_config };

// Reads the sizes of the model in a folder into opt.config. A size that was given as an option must
// be the same; but --block_size may be smaller.
static void read_config(const char *folder) {
  char path[4096];
  long size;
  strcpy(path, path_of(folder, "config.json"));
  char *json = read_file(path, &size);
  for (int i = 0; i < N_HF_CONFIG; i++) {
    const char *key = hf_config[i].key, *value = hf_config[i].value;
    const char *found = json_find(json, "", key);
    size_t length = strcspn(found, ",}" JSON_SPACE);
    double number = strtod(value, NULL);                   // 0 if it is none
    int same = number ? strtod(found, NULL) == number
                      : length == strlen(value) && !memcmp(found, value, length);
    if (hf_config[i].required && *found && !same)
      die("%s: %s is %.*s, but this program supports only %s", path, key, (int)MIN(length, 40u),
          found, value);
  }
  for_sizes (o) {
    int *now = (int *)o->value;
    if (json_integers(json_find(json, "", o->json), &o->stored, 1) != 1)
      die("%s has no %s that is a whole number: is this the config of a GPT-2?", path, o->json);
    if (o->stored < o->low || o->stored > o->high)
      die("%s: %s is %ld, expected %g to %g", path, o->json, o->stored, o->low, o->high);
    if (o->given && *now != o->stored && (now != &opt.config.block_size || *now > o->stored))
      die("--%s %d, but the model in %s has %ld: leave the option out", o->name, *now, folder,
          o->stored);
    if (!o->given) *now = (int)o->stored;
  }
  if (opt.config.n_embd % opt.config.n_head)
    die("%s: n_embd %d is not divisible by n_head %d", path, opt.config.n_embd, opt.config.n_head);
  free(json);
}

static int metadata(const Safetensors *st, const char *key, char *value) {   // of 4096 bytes
  return json_string(json_find(json_find(st->header, "", "__metadata__"), "", key), value, 4096);
}

static void write_string(FILE *f, const char *key, const char *value) {   // ,"key":"value"
  fprintf(f, ",\"%s\":\"", key);
  for (const unsigned char *p = (const unsigned char *)value; *p; p++)
    fprintf(f, *p < 32 || *p > 126 || *p == '"' || *p == '\\' ? "\\u%04x" : "%c", *p);
  fprintf(f, "\"");
}

static void write_sizes(FILE *f) {
  for_sizes (o) write_string(f, o->name, option_text(o));
}

static void write_state(FILE *f) {   // all that --resume needs besides the tensors
  for (Option *o = train_options; o->name; o++)
    if (o->saved) write_string(f, o->name, option_text(o));
  write_string(f, "text", text.path);
  fprintf(f, ",\"step\":\"%ld\",\"tokens\":\"%ld\",\"text_hash\":\"%016llx\"", trainer[0].updates,
          trainer[0].tokens, (unsigned long long)text.hash);
}

// The parts of state.safetensors: the weights, and the state of the optimizer.
static const char *const part_prefix[] = {"transformer.", "m.", "v."};

// Writes the weights (parts = 1), or the weights and the optimizer's state (3), to a file.
static void write_parts(const Trainer *t, const char *file_name, int parts,
                        void (*write_metadata)(FILE *)) {
  const Model *m = &t->model;
  const real *base[] = {m->weights.data, t->moment_m, t->moment_v};
  int n = m->n_parameter_tensors;
  NamedTensor *list = (NamedTensor *)host_alloc(NULL, parts*n * sizeof(NamedTensor));
  for (int i = 0; i < parts*n; i++) {
    Entry *e = &m->parameter[i % n];
    NamedTensor named = {part_prefix[i / n], e->name, e->rows, e->cols, base[i / n] + e->data_at};
    list[i] = named;
  }
  write_safetensors(opt.out, file_name, list, parts*n, write_metadata);
  free(list);
}

static void write_config(FILE *f) {
  fprintf(f, "{");
  for_sizes (o) fprintf(f, "\n  \"%s\": %d,", o->json, *(int *)o->value);
  for (int i = 0; i < N_HF_CONFIG; i++)
    fprintf(f, "\n  \"%s\": %s%s", hf_config[i].key, hf_config[i].value,
            i < N_HF_CONFIG - 1 ? "," : "\n}\n");
}

// For Hugging Face's library: a token is a byte. In its "ByteLevel" alphabet, a byte that is a
// visible character (33-126, 161-172, 174-255) stands for itself, and the 68 others, in rising
// order, are the characters from number 256 on.
static void write_tokenizer(FILE *f) {
  fprintf(f, "{\"version\": \"1.0\", \"added_tokens\": [], \"normalizer\": null,\n"
          "\"pre_tokenizer\": {\"type\": \"ByteLevel\", \"add_prefix_space\": false,"
          " \"trim_offsets\": true, \"use_regex\": false},\n\"post_processor\": null,\n"
          "\"decoder\": {\"type\": \"ByteLevel\", \"add_prefix_space\": true,"
          " \"trim_offsets\": true, \"use_regex\": true},\n"
          "\"model\": {\"type\": \"BPE\", \"unk_token\": null, \"merges\": [], \"vocab\": {");
  for (int b = 0, other = 256; b < 256; b++) {
    int visible = (b > 32 && b < 127) || (b > 160 && b != 173);
    fprintf(f, "%s\"\\u%04x\": %d", b ? ", " : "\n", visible ? b : other++, b);
  }
  fprintf(f, "}}}\n");
}

static void write_tokenizer_config(FILE *f) {
  fprintf(f, "{\"tokenizer_class\": \"PreTrainedTokenizerFast\", \"model_max_length\": %d,"
          " \"clean_up_tokenization_spaces\": false}\n", opt.config.block_size);
}

// Writes a small file, unless it is there with the same text. If there is a config.json of another
// model, that model's other files are removed first: the two never stand side by side.
static void write_if_changed(const char *name, void (*write)(FILE *)) {
  static const char *const others[] = {"model.safetensors", "model.safetensors.index.json",
                                       "tokenizer.json", "tokenizer_config.json"};
  char *now = NULL, *old = NULL;
  size_t size = 0;
  long old_size = -1;
  FILE *memory = open_memstream(&now, &size);
  if (memory) write(memory);
  if (!memory || ferror(memory) || fclose(memory)) die("no memory for %s", name);
  if (!access(path_of(opt.out, name), F_OK)) old = read_file(path_of(opt.out, name), &old_size);
  if (old_size != (long)size || memcmp(old, now, size)) {
    if (write == write_config)
      for (int i = 0; i < 4; i++) unlink(path_of(opt.out, others[i]));
    output_open(opt.out, name);
    output_write(now, size);
    output_close();
  }
  free(now);
  free(old);
}

// Writes the files that Hugging Face's library opens.
static void save_model(const Trainer *t) {
  write_if_changed("config.json", write_config);
  if (opt.config.vocab_size == 256) {            // else tokens are not, or not only, bytes
    write_if_changed("tokenizer.json", write_tokenizer);
    write_if_changed("tokenizer_config.json", write_tokenizer_config);
  }
  write_parts(t, "model.safetensors", 1, write_sizes);
}

// A file may also have the weight of the head: it must be wte, as the head has no other here.
static void check_tied(const Model *m, const StoredTensor *head) {
  const Entry *wte = &m->parameter[0];
  long n = entry_count(wte);
  real *x = (real *)host_alloc(NULL, 2*n * sizeof(real));
  int same = head->dims == 2 && head->shape[0] == wte->rows && head->shape[1] == wte->cols;
  if (same) read_numbers(head, x, n);
  copy_out(x + n, wte->tensor->data, n * sizeof(real));
  if (!same || memcmp(x, x + n, n * sizeof(real)))
    die("%s: lm_head.weight is not equal to wte.weight, but this program supports only a head that "
        "is tied to wte", head->st->path);
  free(x);
}

// Allocates a model that model_layout() has described, and reads its weights. The files of the
// Hugging Face hub have no prefix, and masks besides the weights, which are ignored.
static void model_load(Model *m, const char *folder) {
  char value[4096];
  Safetensors *st = open_weights(folder);
  for_sizes (o)
    if (metadata(st, o->name, value) && atol(value) != o->stored)
      die("%s was saved with %s %.20s, but config.json says %ld: are they of two models?", st->path,
          o->name, value, o->stored);
  StoredTensor t;
  const char *prefix = find_tensor(st, "", "wte.weight", &t) ? "" : "transformer.";
  char next_layer[64];
  snprintf(next_layer, sizeof next_layer, "h.%d.ln_1.weight", m->config.n_layer);
  if (find_tensor(st, prefix, next_layer, &t))
    die("%s has more layers than config.json says: are they of two models?", st->path);
  read_parameters(m, st, prefix, NULL);
  model_allocate(m);
  read_parameters(m, st, prefix, m->weights.data);
  if (find_tensor(st, "", "lm_head.weight", &t)) check_tied(m, &t);
  safetensors_close(st);
}

// ---- 10. Log, plot, console -------------------------------------------------------------------

enum { UPDATE, TOKENS, TRAIN_LOSS, TRAIN_ACCURACY, GRAD_NORM, LEARNING_RATE, VAL_LOSS, VAL_ACCURACY,
       STEP_SECONDS, SECONDS, N_COLUMNS };
static const char LOG_HEADER[] = "trainer,update,tokens,train_loss,train_accuracy,grad_norm,"
                                 "learning_rate,val_loss,val_accuracy,step_seconds,seconds\n";
typedef struct { int trainer; double x[N_COLUMNS]; } LogRow;   // NaN where a number is not known
static LogRow *log_row;
static long log_rows;

static LogRow *add_log_row(const Trainer *t) {
  if (log_rows % 1024 == 0)
    log_row = (LogRow *)host_alloc(log_row, (log_rows + 1024) * sizeof(LogRow));
  LogRow *r = &log_row[log_rows++];
  r->trainer = (int)(t - trainer);
  for (int i = 0; i < N_COLUMNS; i++) r->x[i] = NAN;
  r->x[UPDATE] = t->updates; r->x[TOKENS] = t->tokens; r->x[SECONDS] = t->seconds;
  return r;
}

static void log_update(const Trainer *t) {
  LogRow *r = add_log_row(t);
  r->x[TRAIN_LOSS] = t->loss; r->x[TRAIN_ACCURACY] = t->accuracy; r->x[GRAD_NORM] = t->grad_norm;
  r->x[LEARNING_RATE] = t->optimizer.learning_rate; r->x[STEP_SECONDS] = t->step_seconds;
}

// In the row of the last update. Returns whether it had none.
static int log_evaluation(const Trainer *t) {
  long i = log_rows - 1;
  while (i >= 0 && (log_row[i].trainer != t - trainer || log_row[i].x[UPDATE] != t->updates)) i--;
  LogRow *r = i < 0 ? add_log_row(t) : &log_row[i];   // or a row before the first update
  int is_new = !isfinite(r->x[VAL_LOSS]);
  r->x[VAL_LOSS] = t->val.loss; r->x[VAL_ACCURACY] = t->val.accuracy;
  return is_new;
}

static void write_log(void) {
  FILE *f = output_open(opt.out, "log.csv");
  fputs(LOG_HEADER, f);
  for (LogRow *r = log_row; r < log_row + log_rows; r++) {
    fputs(trainer[r->trainer].name, f);
    for (int i = 0; i < N_COLUMNS; i++)
      fprintf(f, !isfinite(r->x[i]) ? "," : i <= TOKENS ? ",%.0f" : i == LEARNING_RATE ? ",%.6g"
              : ",%.6f", r->x[i]);
    fputs("\n", f);
  }
  output_close();
}

// Reads the rows up to the update that is resumed. If the log is missing or damaged, only the
// beginning of the curve and the seconds of training before it are lost.
static void read_log(Trainer *t) {
  char line[512];
  FILE *file = fopen(path_of(opt.out, "log.csv"), "r");
  while (file && fgets(line, sizeof line, file)) {
    double x[N_COLUMNS];
    int n = 0;
    size_t name = strlen(t->name);
    if (strncmp(line, t->name, name) || line[name] != ',') continue;
    for (char *p = strchr(line, ','); p && n < N_COLUMNS; p = strchr(p + 1, ','))
      x[n++] = strchr(",\n", p[1]) ? NAN : strtod(p + 1, NULL);
    if (n < N_COLUMNS || !(x[UPDATE] >= 0 && x[UPDATE] <= t->updates)) continue;
    memcpy(add_log_row(t)->x, x, sizeof x);
    if (isfinite(x[SECONDS])) t->seconds = x[SECONDS];
    t->loss = x[TRAIN_LOSS];
  }
  if (file) fclose(file);
}

static void svg_begin(FILE *f, int width, int height) {
  fprintf(f, "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 %d %d\" "
          "font-family=\"Helvetica, Arial, sans-serif\" font-size=\"13\" fill=\"#333\">\n"
          "<rect width=\"%d\" height=\"%d\" fill=\"white\"/>\n", width, height, width, height);
}

__attribute__((format(printf, 5, 6)))
static void svg_text(FILE *f, double x, double y, const char *style, const char *format, ...) {
  va_list args;
  va_start(args, format);
  fprintf(f, "<text x=\"%.1f\" y=\"%.1f\" %s>", x, y, style);
  vfprintf(f, format, args);
  fprintf(f, "</text>\n");
  va_end(args);
}

// loss.svg: training (thin) and validation loss of each trainer over the tokens seen, and the
// floor.
enum { LEFT = 64, RIGHT = 700, TOP = 44, BOTTOM = 444, LINES = 5 };   // pixels; grid lines
static struct { double x1, y0, y1; } axes;       // x from 0 to x1, y from y0 to y1

static double plot_x(double x) { return LEFT + x / axes.x1 * (RIGHT - LEFT); }
static double plot_y(double y) {
  return BOTTOM - (y - axes.y0) / (axes.y1 - axes.y0) * (BOTTOM - TOP);
}

// A curve: each point is the mean of `every` losses of a trainer.
static void svg_curve(FILE *f, int which, int column, long every, const char *style) {
  double sum = 0;
  long n = 0;
  fprintf(f, "<polyline fill=\"none\" %s points=\"", style);
  for (LogRow *r = log_row; r < log_row + log_rows; r++) {
    if (r->trainer != which || !isfinite(r->x[column])) continue;
    sum += r->x[column];
    if (++n % every) continue;
    fprintf(f, "%.1f,%.1f ", plot_x(r->x[TOKENS]), plot_y(sum / every));
    sum = 0;
  }
  fprintf(f, "\"/>\n");
}

static void write_plot(void) {
  static const char *const color[] = {"#1f77b4", "#d1495b"};
  axes.x1 = 1; axes.y0 = text.floor; axes.y1 = -INFINITY;
  for (LogRow *r = log_row; r < log_row + log_rows; r++) {     // fmin and fmax ignore NaN
    axes.x1 = fmax(axes.x1, r->x[TOKENS]);
    axes.y0 = fmin(axes.y0, fmin(r->x[TRAIN_LOSS], r->x[VAL_LOSS]));
    axes.y1 = fmax(axes.y1, fmax(r->x[TRAIN_LOSS], r->x[VAL_LOSS]));
  }
  if (!isfinite(axes.y1)) return;                              // there is nothing to draw
  axes.y0 = floor(2 * axes.y0) / 2; axes.y1 = floor(2 * axes.y1 + 1) / 2;
  FILE *f = output_open(opt.out, "loss.svg");
  svg_begin(f, 880, 500);
  svg_text(f, LEFT, 26, "font-size=\"16\"", "loss in nats per token: %d layers, %d heads, %d "
           "channels, context %d, %s", opt.config.n_layer, opt.config.n_head, opt.config.n_embd,
           opt.config.block_size, opt.optimizer);
  for (int i = 0; i <= LINES; i++) {
    double x = axes.x1 * i / LINES, y = axes.y0 + (axes.y1 - axes.y0) * i / LINES;
    fprintf(f, "<path d=\"M%d %.1fH%d\" stroke=\"#ddd\"/>\n", LEFT, plot_y(y), RIGHT);
    svg_text(f, LEFT - 8, plot_y(y) + 4, "text-anchor=\"end\"", "%.2f", y);
    svg_text(f, plot_x(x), BOTTOM + 20, "text-anchor=\"middle\"", i < LINES ? "%.0f"
             : "%.0f tokens", x);
  }
  if (isfinite(text.floor)) {
    double y = plot_y(text.floor);
    fprintf(f, "<path d=\"M%d %.1fH%d\" stroke=\"#555\" stroke-dasharray=\"5 4\"/>\n", LEFT, y,
            RIGHT);
    svg_text(f, RIGHT + 8, y + 4, "", "floor %.3f", text.floor);
  }
  for (int i = 0; i < n_trainers; i++) {
    char style[80];
    snprintf(style, sizeof style, "stroke=\"%s\" opacity=\"0.5\"", color[i]);
    svg_curve(f, i, TRAIN_LOSS, log_rows / 500 + 1, style);   // about 500 points
    snprintf(style, sizeof style, "stroke=\"%s\" stroke-width=\"3\"", color[i]);
    svg_curve(f, i, VAL_LOSS, 1, style);
    snprintf(style, sizeof style, "fill=\"%s\" font-weight=\"bold\"", color[i]);
    svg_text(f, RIGHT + 8, TOP + 10 + 36*i, style, "%s", trainer[i].name);
    if (isfinite(trainer[i].val.loss))
      svg_text(f, RIGHT + 8, TOP + 26 + 36*i, style, "validation %.3f", trainer[i].val.loss);
  }
  fprintf(f, "</svg>\n");
  output_close();
}

// ---- What is printed

static const char *decimal(double x, int digits, char *out) {   // "-" if it is not known; 32 bytes
  snprintf(out, 32, isfinite(x) ? "%.*f" : "-", digits, x);
  return out;
}

static double update_tokens(const Trainer *t) {
  return (double)t->accumulate * opt.batch_size * opt.config.block_size;
}

static void print_header(const char *device) {
  Config c = opt.config;
  Trainer *t = &trainer[0];
  double tokens = update_tokens(t);
  printf("model   %ld parameters: %d layers, %d heads, %d channels, context %d, vocabulary %d\n",
         t->model.n_parameters, c.n_layer, c.n_head, c.n_embd, c.block_size, c.vocab_size);
  printf("text    %s: %ld bytes, %ld to train, %ld to validate", text.path, text.size,
         text.train_size, text.size - text.train_size);
  if (isfinite(text.floor)) printf("; floor %.4f nats per byte", text.floor);
  printf("\nsteps   %d of %s, %.0f tokens (%d x %d x %d) and %.2f GFLOP each; %.1f passes\n",
         opt.max_steps, opt.optimizer, tokens, t->accumulate, opt.batch_size, c.block_size,
         model_flop(&t->model, tokens, c.block_size) * 1e-9,
         tokens * opt.max_steps / text.train_size);
  printf("device  %s, threads %d, memory %.1f MB; results go to %s/\n", device, opt.threads,
         device_bytes / 1e6, opt.out);
  fflush(stdout);
}

static const char *progress(void) {
  static char line[256];
  Trainer *t = &trainer[0];
  char loss[32], val[32];
  double done = t->updates - t->first_update, took = t->seconds - t->first_seconds;
  double left = (took + trainer[1].seconds) / done * (opt.max_steps - t->updates);
  int n = snprintf(line, sizeof line, "step %*ld/%d | train %s | val %s",
                   snprintf(NULL, 0, "%d", opt.max_steps),   // the width
                   t->updates, opt.max_steps,
                   decimal(t->loss, 4, loss), decimal(t->val.loss, 4, val));
  if (done > 0)
    snprintf(line + n, sizeof line - n, " | %.0f tokens/s | %.0f:%02.0f left",
             done * update_tokens(t) / took, floor(left / 60), floor(fmod(left, 60)));
  return line;
}

static void show_progress(void) { show("%s", progress()); }

// --compare: a row of the table, with its head before the first
static void print_compare_row(void) {
  if (trainer[0].updates == 0)
    printf("\n%10s | single-step: an update per micro-batch      | multi-step: an update per %d\n"
           "%10s | %7s %7s %7s %5s %7s %5s | %7s %7s %7s %5s %7s %5s\n", "", opt.compare, "tokens",
           "updates", "train", "val", "acc", "|grad|", "s",
           "updates", "train", "val", "acc", "|grad|", "s");
  printf("%10ld", trainer[0].tokens);
  for (Trainer *t = trainer; t < trainer + 2; t++) {
    char loss[32];
    printf(" | %7ld %7s %7.4f %4.1f%% %7.3f %5.1f", t->updates, decimal(t->loss, 4, loss),
           t->val.loss, 100 * t->val.accuracy, t->grad_norm, t->seconds);
  }
  printf("\n");
}

// The validation loss of a trainer where a column of the log reaches `at`, interpolated between two
// evaluations.
static double val_at(int which, int column, double at) {
  const double *before = NULL;
  for (LogRow *r = log_row; r < log_row + log_rows; r++) {
    if (r->trainer != which || !isfinite(r->x[VAL_LOSS])) continue;
    double part = before ? (at - before[column]) / (r->x[column] - before[column]) : 0;
    if (r->x[column] >= at && before)
      return before[VAL_LOSS] + part * (r->x[VAL_LOSS] - before[VAL_LOSS]);
    before = r->x;
  }
  return before[VAL_LOSS];
}

static void print_verdict(const char *what, int column, double single_end, double multi_end) {
  double at = MIN(single_end, multi_end);
  double single = val_at(0, column, at), multi = val_at(1, column, at);
  printf("at equal %s (%.*f each): single-step %.4f, multi-step %.4f, %s ahead by %.4f\n", what,
         column == SECONDS ? 1 : 0, at, single, multi,
         single < multi ? "single-step" : "multi-step", fabs(single - multi));
}

// --profile: where the time goes
static struct Profile { char name[40]; long calls; double seconds, flop, bytes; } profile[64];
static struct Profile *profiled = profile;       // the last one that was added to
static const char *profile_share(const struct Profile *p);

static void profile_add(const char *name, double seconds) {
  for (profiled = profile; profiled < profile + 62 && *profiled->name; profiled++)
    if (!strcmp(profiled->name, name)) break;
  snprintf(profiled->name, sizeof profiled->name, "%s", name);
  profiled->calls++;
  profiled->seconds += seconds;
}

#ifndef GPU
// Called after each barrier. `function` is that of the parallel_for which ended there: the time
// since the last call is charged to it. The barriers of launch() pass NULL: their time is no
// function's.
static void profile_mark(const char *function) {
  static double last;
  double now = seconds();
  if (function) profile_add(function, now - last);
  last = now;
}

// In the CUDA program, what share of the GPU's peak that was
static const char *profile_share(const struct Profile *p) { (void)p; return ""; }
#endif

static void profile_flop(double flop) {
#ifndef GPU
  if (thread_id) return;
#endif
  profiled->flop += flop;
}

static void print_profile(void) {
  double all = 0;
  for (struct Profile *p = profile; *p->name; p++) all += p->seconds;
  printf("\n%-28s %9s %10s %7s %10s\n", "function", "calls", "ms", "share", "GFLOP/s");
  for (struct Profile *p = profile; *p->name; p++) {
    char gflop[32];
    printf("%-28s %9ld %10.2f %6.1f%% %10s%s\n", p->name, p->calls, p->seconds * 1e3,
           100 * p->seconds / all, p->flop ? decimal(p->flop / p->seconds * 1e-9, 1, gflop) : "",
           profile_share(p));
  }
  printf("%-28s %9s %10.2f %6.1f%%\n\n", "all", "", all * 1e3, 100.0);
}

static int by_value(const void *a, const void *b) {
  double x = *(const double *)a, y = *(const double *)b;
  return (x > y) - (x < y);
}
static double median(double *x, long n) {        // sorts x; NaN if n is 0
  qsort(x, n, sizeof *x, by_value);
  return n ? x[n / 2] : NAN;
}

static void print_last_line(void) {
  const Trainer *t = &trainer[0];
  char loss[32], val[32], ms[32], rate[32], gflop[32];
  double *took = (double *)host_alloc(NULL, log_rows * sizeof *took), tokens = update_tokens(t);
  long n = 0;
  for (LogRow *r = log_row; r < log_row + log_rows; r++)
    if (r->trainer == 0 && r->x[UPDATE] > t->first_update) took[n++] = r->x[STEP_SECONDS];
  double step = median(took, n);
  printf("step %ld | train %s | val %s | %s ms/step | %s tokens/s | %s GFLOP/s | threads %d\n",
         t->updates, decimal(t->loss, 4, loss), decimal(t->val.loss, 4, val),
         decimal(step * 1e3, 2, ms), decimal(tokens / step, 0, rate),
         decimal(model_flop(&t->model, tokens, opt.config.block_size) / step * 1e-9, 1, gflop),
         opt.threads);
  free(took);
}

// ---- What train() calls

static void on_signal(int number) {
  (void)number;
  if (interrupted) _exit(130);                   // the second Ctrl-C
  interrupted = 1;
}

// The log goes first: --resume drops rows after the saved update, but it cannot make up rows.
static void save_run(void) {
  write_log();
  write_plot();
  if (!opt.compare) {
    write_parts(&trainer[0], "state.safetensors", 3, write_state);
    save_model(&trainer[0]);
  }
  trainer[0].saved_update = trainer[0].updates;
}

// Continues from a saved state: `st` is open, and its options have been read.
static void resume(Trainer *t, Safetensors *st) {
  char step[4096], hash[4096], tokens[4096], *end;
  if (!metadata(st, "step", step) || !metadata(st, "text_hash", hash) ||
      !metadata(st, "tokens", tokens))
    die("%s is not a saved state of this program", st->path);
  if (strtoull(hash, NULL, 16) != text.hash)
    die("%s was saved in training on another text than %s: name that text, or start from the "
        "weights with --init %s and another --out", st->path, text.path, opt.out);
  t->updates = strtol(step, &end, 10);
  if (end == step || *end || t->updates < 0 || t->updates >= 1000000000)
    die("%s: its step is %.40s, expected a whole number below 1e9", st->path, step);
  t->tokens = strtol(tokens, NULL, 10);
  if (t->tokens < 0 || t->tokens > LONG_MAX / 2)
    die("%s: its count of tokens is %.40s", st->path, tokens);
  real *part[] = {t->model.weights.data, t->moment_m, t->moment_v};
  for (int i = 0; i < 3; i++) read_parameters(&t->model, st, part_prefix[i], part[i]);
  safetensors_close(st);
  read_log(t);
  t->first_update = t->saved_update = t->updates;
  t->first_seconds = t->seconds;
  save_model(t);                                 // a save may have been killed after the state
}

static int cut_short;                            // the last evaluation was interrupted

static void evaluate_and_save(void) {
  int is_new = trainer[0].updates != trainer[0].saved_update;
  for (Trainer *t = trainer; t < trainer + n_trainers; t++) {
    Evaluation val = evaluate(&t->model, text.train_size, text.size);
    if (interrupted) { cut_short = 1; return; }  // finish_training() saves
    t->val = val;
    if (!isfinite(t->val.loss))
      die("step %ld: the validation loss is %g: the last checkpoint is kept; lower "
          "--learning_rate", t->updates, t->val.loss);
    is_new |= log_evaluation(t) && t->updates > 0;
  }
  show(NULL);
  if (opt.compare) print_compare_row();
  else printf("%s\n", progress());
  fflush(stdout);
  if (is_new) save_run();
}

static int finish_training(void) {
  Trainer *t = &trainer[0];
  if (t->updates != t->saved_update || (!t->updates && !interrupted)) save_run();
  show(NULL);
  if (interrupted && (t->updates < opt.max_steps || cut_short)) {
    printf("\nstopped after step %ld%s\n", t->updates,
           opt.compare || !t->updates ? "" : ", which is saved: continue with --resume");
    return 130;
  }
  if (opt.compare) {
    Trainer *multi = &trainer[1];
    printf("\n");
    print_verdict("tokens", TOKENS, t->tokens, multi->tokens);
    print_verdict("updates", UPDATE, t->updates, multi->updates);
    print_verdict("seconds of training", SECONDS, t->seconds, multi->seconds);
    printf("Both had the same start, the same tokens and the same learning rate at each token. One "
           "seed is one\nsample: a difference as small as that between seeds means nothing.\n\n");
  }
  if (opt.profile) print_profile();
  print_last_line();
  return 0;
}

// ---- 11. Options and main ---------------------------------------------------------------------

// One row per option; Option is declared in section 9. The name of an option is that of its field.
#define SIZE(name, json, initial, low, high, help)                                                 \
  {#name, json, INTEGER, &opt.config.name, initial, low, high, FIXED, help, 0, 0}
#define INT(group, name, initial, low, high, saved, help)                                          \
  {#name, NULL, INTEGER, &group.name, initial, low, high, saved, help, 0, 0}
#define NUM(group, name, initial, low, high, saved, help)                                          \
  {#name, NULL, NUMBER, &group.name, initial, low, high, saved, help, 0, 0}
#define WORD(group, name, initial, saved, help)                                                    \
  {#name, NULL, TEXT, &group.name, initial, 0, 0, saved, help, 0, 0}
#define FLAG(group, name, help) {#name, NULL, SWITCH, &group.name, NULL, 0, 0, 0, help, 0, 0}
#define END_OF_OPTIONS {NULL, NULL, SWITCH, NULL, NULL, 0, 0, 0, NULL, 0, 0}

Option train_options[] = {
  WORD(opt, out, "run", 0, "folder of the checkpoint, log.csv and loss.svg"),
  SIZE(n_layer, "n_layer", "4", 1, 1000, "Transformer blocks"),
  SIZE(n_head, "n_head", "4", 1, 1000, "attention heads; n_embd must be divisible by this"),
  SIZE(n_embd, "n_embd", "128", 1, 65536, "channels"),
  SIZE(block_size, "n_positions", "64", 1, 1048576, "context length in tokens"),
  INT(opt, batch_size, "12", 1, 65536, IN_STATE, "sequences in a micro-batch"),
  INT(opt, accumulate, "1", 1, 1000000, IN_STATE, "micro-batches in an update"),
  INT(opt, max_steps, "2000", 0, 1e9, IN_STATE, "updates"),
  WORD(opt, optimizer, "adamw", FIXED, ""),
  SIZE(vocab_size, "vocab_size", "256", 1, 1e7,
       "vocabulary entries; more than 256 only to time a larger head"),
  NUM(opt, learning_rate, NULL, 0, 1e6, IN_STATE, "the highest; default: that of the optimizer"),
  NUM(opt, min_lr, NULL, 0, 1e6, IN_STATE, "at the end of the cosine; default: a tenth of that"),
  INT(opt, warmup, "100", 0, 1e9, IN_STATE, "updates of linear warmup"),
  NUM(opt, weight_decay, NULL, 0, 1e3, IN_STATE,
      "for matrices only; default: 0.1 of adamw, 0 of the others, where it would be coupled"),
  NUM(opt, beta1, "0.9", 0, 0.999999, IN_STATE, "decay of the optimizer's m"),
  NUM(opt, beta2, "0.99", 0, 0.999999, IN_STATE, "decay of the optimizer's v"),
  NUM(opt, grad_clip, "1.0", 0, 1e9, IN_STATE, "largest norm of the gradient; 0: no limit"),
  INT(opt, eval_interval, "250", 0, 1e9, IN_STATE,
      "updates between evaluations, each with a save; 0: only save, at the end"),
  INT(opt, seed, "1337", 0, 2147483647, IN_STATE, "of the initial weights and the batches"),
  INT(opt, threads, NULL, 1, 1024, 0, "default: all cores"),
  WORD(opt, precision, "fp32", IN_STATE, "of matmul: fp32; on a GPU also bf16"),
  FLAG(opt, resume, "continue from the last save in --out"),
  WORD(opt, init, NULL, 0, "start from the weights in this folder, ours or another GPT-2's"),
  INT(opt, compare, NULL, 2, 1000000, 0,
      "train two models side by side: an update per micro-batch, and one per this many"),
  FLAG(opt, eval, "print the loss of all of TEXT under the model in --out, and end"),
  FLAG(opt, profile, "print at the end where the time went"),
  END_OF_OPTIONS};

static void set_option(Option *o, const char *value) {
  char *end = NULL;
  if (o->kind == SWITCH) { *(int *)o->value = 1; return; }
  if (o->kind == TEXT) { *(const char **)o->value = value; return; }
  double x = strtod(value, &end);
  if (end == value || *end || !(x >= o->low && x <= o->high) ||
      (o->kind == INTEGER && x != floor(x)))
    die("--%s %s: expected a %snumber from %g to %g", o->name, value,
        o->kind == INTEGER ? "whole " : "", o->low, o->high);
  if (o->kind == INTEGER) *(int *)o->value = (int)x;
  else *(double *)o->value = x;
}

static Option *option_of(void *value) {          // the row of ./train's table with this field
  Option *o = train_options;
  while (o->value != value) o++;
  return o;
}

// Returns the exit code, after making sure that all output was written; ends the program if not.
static int finish(int code) {
  if (fflush(stdout) || ferror(stdout)) die("standard output cannot be written");
  return code;
}

static void print_help(const Option *table, const char *usage) {
  printf("%s\n", usage);
  for (const Option *o = table; o->name; o++) {
    char name[64];
    snprintf(name, sizeof name, "--%s %s", o->name, o->kind == SWITCH ? "" : o->initial ? o->initial
             : o->kind == TEXT ? "TEXT" : "N");
    printf("  %-24s %s", name, o->help);
    if (o->kind == INTEGER || o->kind == NUMBER) printf(" (%g to %g)", o->low, o->high);
    if (o->value == &opt.optimizer)
      for (int i = 0; i < N_OPTIMIZERS; i++)
        printf("%s%s (rate %g)", i ? ", " : "", optimizers[i].name, optimizers[i].learning_rate);
    printf("\n");
  }
}

// Sets the options of a table from the command line; --help prints them and ends the program. The
// other arguments go to words[0..capacity-1]; returns how many there were. Each program calls this
// first, so it also prepares the process: a write that fails must return an error, not kill the
// program.
static int parse_options(Option *table, int argc, char **argv, const char *usage,
                         const char **words, int capacity) {
  int n = 0;
  signal(SIGXFSZ, SIG_IGN);            // the write to a file that may not grow fails, and says so
  for (int fd = 0; fd < 3; fd++)       // else a file would be opened as standard output
    if (fcntl(fd, F_GETFD) < 0) open("/dev/null", O_RDONLY);
  for (Option *o = table; o->name; o++)
    if (o->initial) set_option(o, o->initial);
  for (int i = 1; i < argc; i++) {
    if (argv[i][0] != '-') {
      if (n == capacity) die("%s: unexpected argument; see --help", argv[i]);
      words[n++] = argv[i];
      continue;
    }
    if (!strcmp(argv[i], "--help")) { print_help(table, usage); exit(finish(0)); }
    const char *name = argv[i] + 1 + (argv[i][1] == '-'), *value = strchr(argv[i], '=');
    size_t length = value ? (size_t)(value - name) : strlen(name);
    Option *o = table;
    while (o->name && (strlen(o->name) != length || memcmp(o->name, name, length))) o++;
    if (!o->name || argv[i][1] != '-') die("unknown option %s; see --help", argv[i]);
    if (o->kind == SWITCH && value) die("--%s takes no value", o->name);
    if (o->kind != SWITCH && !value && ++i == argc) die("--%s needs a value", o->name);
    set_option(o, value ? value + 1 : argv[i]);
    o->given = 1;
  }
  return n;
}

#ifndef NO_MAIN
static const char *copy_of(const char *s) {
  return (const char *)memcpy(host_alloc(NULL, strlen(s) + 1), s, strlen(s) + 1);
}

// Which options exclude each other.
static void check_modes(void) {
  if (opt.compare && (opt.resume || opt.accumulate > 1))
    die("--compare sets --accumulate itself and cannot be resumed: leave out --accumulate and "
        "--resume");
  if (opt.resume && opt.init) die("--resume continues, --init starts: leave one out");
  if (opt.eval && (opt.resume || opt.init || opt.compare))
    die("--eval trains nothing: leave out --resume, --init and --compare");
}

// --resume: the saved options hold unless they are given again; sizes and optimizer cannot change.
static void read_options(const Safetensors *st) {
  char value[4096];
  for (Option *o = train_options; o->name; o++) {
    if (!o->saved || !metadata(st, o->name, value)) continue;
    const char *now = option_text(o);
    if (o->given && o->saved == FIXED && strcmp(now, value))
      die("--resume with --%s %s, but %s has %s: leave the option out, or start anew without "
          "--resume", o->name, now, st->path, value);
    if (!o->given) set_option(o, o->kind == TEXT ? copy_of(value) : value);
    o->given = 1;
  }
  if (!opt.text && metadata(st, "text", value)) opt.text = copy_of(value);
}

static void check_options(void) {
  Config c = opt.config;
  int kind = optimizer_named(opt.optimizer);
  if (!option_of(&opt.learning_rate)->given) opt.learning_rate = optimizers[kind].learning_rate;
  if (!option_of(&opt.weight_decay)->given)
    opt.weight_decay = optimizers[kind].decay == DECOUPLED ? 0.1 : 0;
  if (!option_of(&opt.min_lr)->given) opt.min_lr = opt.learning_rate / 10;
  if (c.n_embd % c.n_head)
    die("--n_embd %d is not divisible by --n_head %d", c.n_embd, c.n_head);
  if (opt.compare && opt.max_steps < opt.compare)
    die("--compare %d needs at least as many --max_steps, not %d", opt.compare, opt.max_steps);
  if (opt.compare) opt.max_steps -= opt.max_steps % opt.compare;
}

static void check_text(long part) {              // the smallest part that windows are taken from
  if (part <= opt.config.block_size)
    die("%s has %ld bytes, %ld to train and %ld to validate, but a window takes %d: use a longer "
        "text or a smaller --block_size", text.path, text.size, text.train_size,
        text.size - text.train_size, opt.config.block_size + 1);
}

// Creates the model or models, from random weights, those of --init, or the saved state.
static void open_trainers(Safetensors *state) {
  const char *device = device_start(opt.threads, opt.precision);
  n_trainers = opt.compare ? 2 : 1;
  trainer[0].name = opt.compare ? "single-step" : "train";
  trainer[1].name = "multi-step";
  trainer[0].accumulate = opt.accumulate;
  trainer[1].accumulate = opt.compare;
  for (Trainer *t = trainer; t < trainer + n_trainers; t++) {
    Model *m = &t->model;
    t->loss = t->val.loss = t->val.accuracy = NAN;       // not known yet
    model_layout(m, opt.config, (long)opt.batch_size * opt.config.block_size, 1, 0);
    if (state) read_parameters(m, state, "transformer.", NULL);   // are they there?
    if (opt.init) model_load(m, opt.init);
    else model_allocate(m);
    t->moment_m = (real *)device_alloc(m->n_weights * sizeof(real));
    t->moment_v = (real *)device_alloc(m->n_weights * sizeof(real));
    if (!opt.init && !state) model_init(m, opt.seed);
  }
  if (state) resume(&trainer[0], state);
  print_header(device);
}

// --eval: the loss of all of TEXT.
static void evaluate_text(void) {
  static Model m;
  device_start(opt.threads, opt.precision);
  model_layout(&m, opt.config, (long)opt.batch_size * opt.config.block_size, 0, 0);
  model_load(&m, opt.out);
  Evaluation e = evaluate(&m, 0, text.size);
  show(NULL);
  if (!isfinite(e.loss)) die("the loss is %g: are the weights damaged?", e.loss);
  printf("text %s: %ld windows of %d tokens\nperplexity %.4f\nbits per byte %.6f\naccuracy %.4f\n"
         "loss %.6f\n", text.path, (text.size - 1) / opt.config.block_size, opt.config.block_size,
         exp(e.loss), e.loss / log(2), e.accuracy, e.loss);
}

static const char USAGE[] =
  "usage: train [TEXT] [options]\n\n"
  "Trains a GPT on a text, which can be any file: a token is a byte. Default: data/tales.txt.\n"
  "Write an option as --name value or --name=value. Here each stands with its default.\n";

int main(int argc, char **argv) {
  Safetensors *state = NULL;
  opt.threads = (int)MAX(1, MIN(1024, sysconf(_SC_NPROCESSORS_ONLN)));
  parse_options(train_options, argc, argv, USAGE, &opt.text, 1);
  check_modes();
  if (opt.resume) {
    if (!access(opt.out, F_OK)) open_folder();   // locked before its state is read
    state = safetensors_open(opt.out, "state.safetensors", NULL);
    read_options(state);
  }
  if (opt.eval || opt.init) read_config(opt.eval ? opt.out : opt.init);
  if (opt.config.vocab_size > 256 && !opt.resume && !option_of(&opt.config.vocab_size)->given)
    die("%s has %d vocabulary entries, but here a token is a byte: if its tokens are words, it "
        "would read nonsense. Confirm with --vocab_size %d", opt.eval ? opt.out : opt.init,
        opt.config.vocab_size, opt.config.vocab_size);
  check_options();
  text_open(opt.text ? opt.text : "data/tales.txt");
  if (opt.eval) {
    check_text(text.size);
    evaluate_text();
    return finish(0);
  }
  check_text(MIN(text.train_size, text.size - text.train_size));
  if (!opt.resume) open_folder();
  signal(SIGINT, on_signal);
  signal(SIGTERM, on_signal);
  if (signal(SIGHUP, on_signal) == SIG_IGN) signal(SIGHUP, SIG_IGN);   // under nohup
  open_trainers(state);
  return finish(train());
}
#endif   // NO_MAIN
