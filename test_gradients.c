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
// (the emulator goes here: #if defined KERNELS && !defined __CUDACC__ ... #endif)

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
  int optimizer, recipe, separate;
  double learning_rate, weight_decay, grad_clip;
  double *weights;                        // before; then after
  double *grad, *dembedding;              // of the last update, of the last piece; may be NULL
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
  const double h = 1.0 / 1024;
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
  const char *name[] = {"B", "T", "B T", "C", "H", "C/H", "sqrt(C/H)", "V", "O", "2"};
  double value[] = {(double)s->B, (double)s->T, (double)s->B * s->T, (double)s->C, (double)s->H,
                    (double)s->C / s->H, sqrt((double)s->C / s->H), (double)s->V, (double)s->O, 2};
  for (int i = 0; i < 10; i++) {
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
  else if (count > 1 && residual <= close * MAX(1, fabs(k))) say_factor(k, c->shape);
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
  int third = c->cols / 3, qkv = strstr(c->tensor, "qkv") || strstr(c->tensor, "c_attn");
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
  printf("%-21s %-11s %7s  %-10s %-9s %14s %14s\n", "layer", "tensor", "numbers", "worst err.",
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
  int ok = count_verdict(error <= c.bar, c.layer, c.tensor);
  char at[32];
  snprintf(at, sizeof at, c.cols > 1 ? "[%ld,%ld]" : "[%ld]", worst / c.cols, worst % c.cols);
  printf("%-21s %-11s %7ld  %-10.1e %-9s %14.6e %14.6e  %s\n", c.layer, c.tensor, n, error, at,
         c.got[worst], c.want[worst], ok ? "ok" : "FAIL");
  if (!ok) diagnose(&c, size);
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

// ---- 2. Layers --------------------------------------------------------------------------------
// A layer is registered with LAYER(name, stress, plain, (arguments), tensors): the arguments that
// name_forward and name_backward take; their tensors, t[0] the output first, and what happens to
// each; a plain forward to compare with, or NULL. Row 1 of the first input is shifted by `stress`,
// row 2 has it added and subtracted in turn: large means, saturated functions.

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
                               {__VA_ARGS__}};                                                     \
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
LAYER(layernorm, 1000, layernorm_plain, (t[0], t[1], t[2], affine(t[3], t[4]), N, C),
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

static double check_forward(Case *c, Comparison row) {
  double *got = numbers(count_in(c, 0)), *x[MOST_TENSORS];
  launch(c->layer->forward, c);
  get(got, c->t[0].data, count_in(c, 0));
  if (!c->layer->plain) { free(got); return 0; }
  for (int i = 0; i < c->n_tensors; i++) x[i] = c->data[i];
  x[0] = numbers(count_in(c, 0));
  c->layer->plain(c->s, x, c->host_ids);
  row.tensor = c->layer->role[0].name;
  row.rows = rows_in(c, 0); row.cols = cols_in(c, 0);
  row.got = got; row.want = x[0];
  row.bar = 1e-11;
  double error = judge(row);
  free(got); free(x[0]);
  return error;
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
static void check_directions(Case *c, int i, const double *got, Comparison row) {
  long n = count_in(c, i), begin = 0, end = n;
  double *direction = numbers(n);
  for (long j = 0; j < n; j++) direction[j] = random_normal(400 + i, j);
  Slope all = slope_in(c, i, got, direction, 0, n), half = all;
  double size = MAX(norm_of(got, n), fabs(all.found));
  double error = fabs(all.promised - all.found) / size;
  int ok = count_verdict(error <= row.bar, row.layer, row.tensor);
  printf("%-21s %-11s %7ld  %-10.1e %-9s %14.6e %14.6e  %s\n", row.layer, row.tensor, n, error,
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
}

static void check_elements(Case *c, int i, const double *got, Comparison row) {
  long n = count_in(c, i);
  double *want = numbers(n);
  for (long j = 0; j < n; j++) want[j] = slope(function_of(c), c->t[i].data + j, 1, NULL);
  row.got = got; row.want = want;
  row.before = c->layer->role[i].duty == ADDS ? c->grad[i] : NULL;
  judge(row);
  free(want);
}

static void check_layer(const Layer *layer, Shape s, int every_element) {
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
    if (every_element) check_elements(c, i, got, row);
    else check_directions(c, i, got, row);
    free(got);
  }
  free_case(c);
}

// Sizes that no tile, vector or block divides; and sizes beyond one of each, in every direction.
static const Shape SMALL = {3, 7, 24, 3, 29, 10}, LARGE = {3, 135, 150, 3, 301, 77};

static void check_layers(char **names, int n_names) {
  printf("Layers. Every number of every input is moved (B 3, T 7, C 24, H 3, V 29, O 10); in sizes\n"
         "beyond a tile (B 3, T 135, C 150, H 3, V 301, O 77) all at once, along a random slope.\n");
  heading("backward", "finite diff.");
  for (int i = 0; i < n_layers; i++) {
    int asked = !n_names;
    for (int k = 0; k < n_names; k++) asked |= !strcmp(names[k], layers[i]->name);
    if (!asked) continue;
    check_layer(layers[i], SMALL, 1);
    check_layer(layers[i], LARGE, 0);
  }
}

// ---- 8. Main ----------------------------------------------------------------------------------
#ifndef LEND
int main(int argc, char **argv) {
  program = "test_gradients";
  device_start(1);
  check_layers(argv + 1, argc - 1);
  printf("%d passed, %d failed\n", passed, failed);
  return failed > 0;
}
#endif
