// test_gradients.c proves every gradient of train.c and train_gpu.cu, and shows what an update
// does.
//
// A derivative is a limit, so a program can measure it: move one number x by h, and see how far the
// loss f moves. That needs no calculus, and no knowledge of how backward computes its answer:
//
//   df/dx = (8 (f(x+h) - f(x-h)) - (f(x+2h) - f(x-2h))) / (12 h), with errors of the order of h^4
//   and of (rounding error) / h
//
// In double both errors are about 1e-12. So a right gradient agrees to 1e-8 of its tensor's size in
// every element, and one that is wrong in a term, a row or an edge does not: the tolerance can be
// tight. f is a plain version of the layer, a few lines in double, with which the layer's forward
// pass is compared, too.
//
//   ./test_gradients                     everything; ends with `N passed, N failed`
//   ./test_gradients layernorm gelu      these layers; --help lists them
//   ./test_gradients --save FILE, --against FILE     section 6
//
// `make test` builds five programs from this file: in double and in float with train.c, in double
// with its plain matmul and attention, and in double and in float with the kernels of train_gpu.cu.
// Finite differences in float would be off by 1e-7 / h, so they are taken of plain versions in
// double. The float and the GPU programs also compare a training step of a small model, tensor by
// tensor, with what the first program has saved.
//
// Sections: 1 finite differences and the verdict, 2 layers, 3 the whole model, optimizers, matmul,
// 4 single-step and multi-step, 5 a model small enough to solve by hand, 6 somebody else's numbers,
// 7 main, 8 CUDA without a GPU. README.md shows how to check a layer of your own.

// To check kernels without nvcc, this file includes itself once: the inner copy compiles only its
// end, section 8, which defines EMULATOR_IS_HERE; then the outer copy compiles the rest.
#if defined KERNELS && !defined __CUDACC__ && !defined EMULATED
#define EMULATED
#include "test_gradients.c"
#endif
#if !defined EMULATED || defined EMULATOR_IS_HERE

#ifndef REAL
#define REAL double
#endif
#include <assert.h>
#define NO_MAIN                          // train.c's
#define PROGRAM "test_gradients"
#define LOWER "--shape"                  // what takes memory
#ifndef SEARCH_FOR_RACES
#define SEARCH_FOR_RACES 0
#endif
#pragma GCC diagnostic ignored "-Wunused-function"   // each program uses its part of train.c
#pragma GCC diagnostic ignored "-Wunused-parameter"  // layers have arguments in common
#ifdef KERNELS
#include KERNELS                         // train_gpu.cu, as the Makefile prepares it
#else
#include "train.c"
#endif

// ---- 1. Finite differences and the verdict ----------------------------------------------------

typedef struct { int B, T, C, H, V, O; } Shape;
enum { IS_DOUBLE = sizeof(real) == sizeof(double) };

static double *new_doubles(long n) {   // zeros; few are freed, since this program soon ends
  return (double *)host_alloc(NULL, n * sizeof(double));
}

// Between the host, where numbers are double, and the device, where they are real.
static void put(real *device, const double *x, long n) {
  real *buffer = (real *)host_alloc(NULL, n * sizeof(real));
  for (long i = 0; i < n; i++) buffer[i] = (real)x[i];
  copy_in(device, buffer, n * sizeof(real));
  free(buffer);
}

static void get(double *x, const real *device, long n) {
  real *buffer = (real *)host_alloc(NULL, n * sizeof(real));
  copy_out(buffer, device, n * sizeof(real));
  for (long i = 0; i < n; i++) x[i] = buffer[i];
  free(buffer);
}

static real *on_device(const double *x, long n) {
  real *p = (real *)device_alloc(n * sizeof(real));
  put(p, x, n);
  return p;
}

static double larger(double worst, double error) {   // unlike fmax, keeps a NaN
  return error <= worst || isnan(worst) ? worst : error;
}

static long double dot(const double *x, const double *y, long n) {
  long double sum = 0;
  for (long i = 0; i < n; i++) sum += (long double)x[i] * y[i];
  return sum;
}

static double norm_of(const double *x, long n) { return (double)sqrtl(dot(x, x, n)); }

static double distance(const double *x, const double *y, long n) {   // |x - y| / |y|
  long double sum = 0;
  for (long i = 0; i < n; i++) sum += ((long double)x[i] - y[i]) * ((long double)x[i] - y[i]);
  return (double)sqrtl(sum) / norm_of(y, n);
}

static double angle(const double *x, const double *y, long n) {   // in degrees
  double cosine = (double)(dot(x, y, n) / ((long double)norm_of(x, n) * norm_of(y, n)));
  return acos(MAX(-1.0, MIN(1.0, cosine))) * (180 / acos(-1));
}

// What is differentiated: f = sum_i upstream[i] out[i], after evaluate(argument) has computed
// out[].
typedef struct {
  void (*evaluate)(void *argument, double *out);
  void *argument;
  const double *upstream;
  long n;                                // length of out
} Function;

// df / dt for x[i] + t direction[i], at t = 0; if direction is NULL, it is 1 for all i. The
// differences are taken before the sum, so what does not depend on x leaves no rounding error.
static double slope(Function f, double *x, long n, const double *direction) {
  const double h = 1.0 / 2048;
  double *before = new_doubles(n), *out[2] = {new_doubles(f.n), new_doubles(f.n)};
  long double difference[3] = {0, 0, 0};
  memcpy(before, x, n * sizeof(double));
  for (int k = 1; k <= 2; k++) {
    for (int side = 0; side < 2; side++) {
      for (long i = 0; i < n; i++)
        x[i] = before[i] + (side ? -k : k) * h * (direction ? direction[i] : 1);
      f.evaluate(f.argument, out[side]);
    }
    for (long i = 0; i < f.n; i++)
      difference[k] += (long double)f.upstream[i] * ((long double)out[0][i] - out[1][i]);
  }
  memcpy(x, before, n * sizeof(double));
  free(before); free(out[0]); free(out[1]);
  return (double)((8 * difference[1] - difference[2]) / (12 * h));
}

// ---- The verdict: a row of the table for each comparison, and what is wrong in words. On a first
// reading, skip what is called say_ or only serves it, and go on at compare().

typedef struct {
  const char *layer, *tensor;
  int rows, cols;
  const double *got, *want;
  const double *before;         // of a gradient that is added to: the value before; not in got
  const Shape *shape;           // or NULL
  double bar;                   // the largest error allowed, relative to the size of want
  const double *x, *dout;       // the layer's input and the gradient given to it, if they have the
                                //   shape of got; or NULL
} Comparison;

static int passed, failed;
static double worst_absolute;   // |got - want| since it was last set to 0
static int brief;               // no diagnosis
static enum { ALL_ROWS, FAILURES, NO_ROWS } shown_rows;
static const double BAR = IS_DOUBLE ? 1e-8 : 1e-4;
static char first_failure[80];

// The error of element i, relative to the root mean square of the tensor; 0 where got and want are
// equal (0/0 otherwise), INFINITY where got is NaN.
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

// A term that an error may consist of, for element i. For gelu, h = tanh(u) and u = a (x + b x^3).
static double term_at(const Comparison *c, char term, long i) {
  double x = c->x ? c->x[i] : NAN, dout = c->dout ? c->dout[i] : NAN;
  double a = sqrt(2 / acos(-1)), b = 0.044715, h = tanh(a * (x + b * x*x*x));
  switch (term) {
  case '1': return 1;
  case 'w': return c->want[i];
  case 'x': return x;
  case 'd': return dout;
  case 'D': return c->want[i] / dout;
  case 'A': return dout * (1 + h) / 2;
  case 'B': return dout * x * (1 - h*h) / 2 * a;
  case 'C': default: return dout * x * (1 - h*h) / 2 * a * 3*b * x*x;
  }
}

// Is the error got - want, in each line, a sum of multiples of one or two terms? (Least squares, by
// Gram-Schmidt.) A line is a row 'r', a column 'c', or the whole tensor 'a'. factor[0] and
// factor[1]: how many times got has the first term, in the first line and in the last; 1 is right.
static int fits(const Comparison *c, const char *wrong, double size, char line, const char *terms,
                double *factor) {
  long rows = c->rows, cols = c->cols, n = rows * cols, seen = 0;
  long lines = line == 'r' ? rows : line == 'c' ? cols : 1, length = n / lines, used = 0;
  double *e = new_doubles(n), *z[2] = {new_doubles(n), new_doubles(n)};
  int ok = 1, k = (int)strlen(terms);
  for (long l = 0; l < lines && ok; l++) {
    long m = 0;
    for (long j = 0; j < length; j++) {
      long i = line == 'c' ? j*cols + l : l*length + j;
      if (!wrong[i]) continue;
      for (int t = 0; t < k; t++) z[t][m] = term_at(c, terms[t], i);
      e[m++] = c->got[i] - c->want[i];
    }
    for (int t = 0; t < k && m > 0; t++) {
      double along = t ? (double)(dot(z[1], z[0], m) / dot(z[0], z[0], m)) : 0;
      for (long j = 0; j < m; j++) z[t][j] -= along * z[0][j];
      double f = (double)(dot(e, z[t], m) / dot(z[t], z[t], m));
      for (long j = 0; j < m; j++) e[j] -= f * z[t][j];
      if (t == 0) factor[1] = fabs(1 + f) < 1e-6 ? 0 : 1 + f;   // got has (1 + f) of the term
      if (t == 0 && !used) factor[0] = factor[1];
    }
    for (long j = 0; j < m; j++) ok &= fabs(e[j]) <= MAX(1e-6, c->bar) * size;
    seen += m;
    used += m > 0;
  }
  free(e); free(z[0]); free(z[1]);
  return ok && seen > 2 * k * used;      // fewer numbers would fit anything
}

// What the elements of a set have in common, as a sentence; returns 0 if it is nothing simple.
static int say_how(const Comparison *c, const char *in_set, double size) {
  long n = (long)c->rows * c->cols, count = 0, nan = 0, zeros = 0, overwritten = 0, flipped = 0;
  double close = MAX(1e-6, c->bar) * size, factor[2];
  for (long i = 0; i < n; i++) {
    if (!in_set[i]) continue;
    count++;
    nan += isnan(c->got[i]) != 0;
    zeros += fabs(c->got[i]) <= close;
    flipped += fabs(c->got[i] + c->want[i]) <= close;
    overwritten += c->before && fabs(c->got[i] + c->before[i] - c->want[i]) <= close;
  }
  if (nan == count)
    printf("NaN: never written, or added (+=) to where it must be set (=)");
  else if (nan > 0)
    printf("%ld of %ld are NaN, as if never written, or read beyond an array", nan, count);
  else if (overwritten == count) printf("set (=) where it must be added (+=) to what was there");
  else if (zeros == count) printf("zero: this part is missing");
  else if (flipped == count) printf("the sign is flipped");
  else if (!fits(c, in_set, size, 'a', "w", factor) || fabs(factor[0] - 1) < 1e-4) return 0;
  else say_factor(factor[0], c->shape);
  return 1;
}

// Names the terms that make up the error, which is in `set`: all elements, or else the wrong ones.
static int say_terms(const Comparison *c, const char *set, double size, int is_all) {
  const char *known[][3] = {
    {"r", "1", "each row is off by a constant of its own: is the term with a row's mean missing?"},
    {"c", "1", "each column is off by a constant of its own"},
    {"r", "w", "each row is off by a factor of its own, %.6g to %.6g: rstd, or dloss of the row?"},
    {"c", "w", "each column is off by a factor of its own, %.6g to %.6g: w?"},
    {"r", "x", "each row is off by a multiple of x: look at the term with x"},
    {"r", "1x", "each row is off by a constant and a multiple of x: look at the term with xhat"},
    {"r", "1d", "each row is off by a constant and a multiple of dout: look at the term with dout"},
    {"a", "A", "all is right but dy (1 + h)/2, which comes in with the factor %.6g"},
    {"a", "B", "all is right but the part of du/dx that comes from x, with the factor %.6g"},
    {"a", "C", "all is right but the part of du/dx that comes from x^3, with the factor %.6g"},
    {"a", "BC", "dy (1 + h)/2 is right, dy x (1 - h^2)/2 du/dx is not: its factors are wrong"},
    {"a", "Dw", "the factor dout is missing"}};
  double factor[2];
  for (int i = 0; i < 12; i++)
    if ((*known[i][0] == 'a') == is_all && (is_all || (c->rows > 1 && c->cols > 1))
        && fits(c, set, size, *known[i][0], known[i][1], factor)) {
      printf(known[i][2], factor[0], factor[1]);
      return 1;
    }
  return 0;
}

// 0: no. 1: each row has at most one wrong element. 2: and that has the row's largest derivative:
// in softmax with cross-entropy, the target's.
static int one_a_row(const Comparison *c, const char *wrong) {
  int largest = 1, rows = 0;
  for (long at = 0; at < (long)c->rows * c->cols; at += c->cols) {
    long one = -1, most = at;
    for (long i = at; i < at + c->cols; i++) {
      if (wrong[i] && one >= 0) return 0;
      if (wrong[i]) one = i;
      if (fabs(c->want[i]) > fabs(c->want[most])) most = i;
    }
    rows += one >= 0;
    largest &= one < 0 || one == most;
  }
  return rows < 2 || c->cols < 2 ? 0 : 1 + largest;
}

// Is x the matrix that c wants, or that with rows and columns exchanged?
static int is_wanted(const double *x, const Comparison *c, int transposed) {
  long n = (long)c->rows * c->cols;
  double limit = c->bar * norm_of(c->want, n) / sqrt((double)n);
  for (long i = 0; i < n; i++)
    if (!(fabs(x[transposed ? i % c->cols * c->rows + i / c->cols : i] - c->want[i]) <= limit))
      return 0;
  return n > 1 && (!transposed || (c->rows > 1 && c->cols > 1));
}

// Have most wrong rows (or columns) of got the numbers of another one, or these and a constant?
static int say_moved(const Comparison *c, const char *wrong, double size, int rows) {
  int lines = rows ? c->rows : c->cols, length = rows ? c->cols : c->rows, first = -1, from = 0;
  int down = rows ? length : 1, right = rows ? 1 : lines, shifted = 0, found = 0, lost = 0;
  for (int i = 0; i < lines && length > 2; i++) {
    int k = -1, differ = 0;
    double shift = 0;
    for (int j = 0; j < length; j++) differ |= wrong[i*down + j*right];
    while (differ && ++k < lines) {
      shift = c->got[i*down] - c->want[k*down];
      differ = k == i;
      for (int j = 1; j < length && !differ; j++)
        differ = !(fabs(c->got[i*down + j*right] - c->want[k*down + j*right] - shift)
                   <= 2 * c->bar * size);
    }
    lost += differ;
    if (differ || k < 0) continue;       // no such line, or nothing wrong in this one
    if (found++ == 0) first = i, from = k;
    shifted |= fabs(shift) > c->bar * size;
  }
  if (found <= lost) return 0;
  const char *line = rows ? "row" : "column";
  printf("right numbers in the wrong place: %s %d has those of %s %d%s", line, first, line, from,
         shifted ? ", and a constant" : "");
  return 1;
}

// The comparisons before this one. Those of the same layer, or model, have the same shape.
static struct { Comparison c; char name[80]; int ok; } earlier[32];
static int n_earlier;

// Are these the numbers of another tensor, or transposed? Or were this one's found elsewhere?
static int say_whose(const Comparison *c, int ok) {
  int n = n_earlier++, said = 0, t = 0;
  earlier[n % 32].c = *c;
  earlier[n % 32].ok = ok;
  snprintf(earlier[n % 32].name, 80, "%s%s%s", c->layer, *c->tensor ? " " : "", c->tensor);
  if (!ok && is_wanted(c->got, c, 1))
    said = printf("    right, but transposed (weights of GPT-2 are (inputs, outputs), those of "
                  "nn.Linear not)\n");
  for (int k = MAX(0, n - 31); k < n && !said; k++) {
    const Comparison *d = &earlier[k % 32].c;
    if (!c->shape || d->shape != c->shape || d->rows * d->cols != c->rows * c->cols) continue;
    for (t = 0; t < 2 && !ok && !said; t++)
      if (is_wanted(c->got, d, t))
        said = printf("    these are the numbers of %s%s\n", earlier[k % 32].name,
                      t ? ", transposed" : "");
    for (t = 0; t < 2 && !earlier[k % 32].ok && !said; t++)
      if (is_wanted(d->got, c, t))
        said = printf("    the numbers of this one%s are in %s\n", t ? ", transposed," : "",
                      earlier[k % 32].name);
  }
  return said;
}

// Where the wrong elements are, if that is a simple place: rows r0 to r1, columns c0 to c1,
// sequences b0 to b1, positions t0 to t1.
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
  else if (one_a_row(c, wrong))
    printf(one_a_row(c, wrong) == 2 && strstr(c->tensor, "logits")
           ? "only the target's element of a row: " : "only one element of a row: ");
  else if (qkv && c->cols > 1 && c0 / third == c1 / third)
    printf("only the %c columns, %d to %d: ", "QKV"[c0 / third], c0, c1);
  else if (qkv && c->cols > 1 && c0 >= third) printf("only the K and V columns: ");
  else if (qkv && c->cols > 1 && c1 < 2*third) printf("only the Q and K columns: ");
  else if (c0 > 0 || c1 < c->cols - 1) printf("only columns %d to %d: ", c0, c1);
  else if (in_sequences && t1 < T - 1) printf("only positions up to %d of a sequence: ", t1);
  else if (in_sequences && t0 > 0)
    printf("only positions from %d of a sequence on%s: ", t0,
           t0 % 32 ? "" : " (where a tile begins)");
  else if (in_sequences && b0 > 0) printf("only sequences from %d on: ", b0);
  else if (in_sequences && b1 < c->shape->B - 1) printf("only sequences up to %d: ", b1);
  else if (r0 > 0 || r1 < c->rows - 1) printf("only rows %d to %d: ", r0, r1);
  else if (count == c->rows * c->cols) printf("everywhere: ");
  else printf("%d of %d elements: ", count, c->rows * c->cols);
}

static void diagnose(const Comparison *c, double size) {
  long n = (long)c->rows * c->cols;
  char *all = (char *)host_alloc(NULL, n), *wrong = (char *)host_alloc(NULL, n);
  memset(all, 1, n);
  for (long i = 0; i < n; i++) wrong[i] = !(error_at(c, size, i) <= c->bar);
  printf("    ");
  if (!say_how(c, all, size) && !say_terms(c, all, size, 1)) {
    say_where(c, wrong);
    if (!say_how(c, wrong, size) && !say_moved(c, wrong, size, 0) && !say_moved(c, wrong, size, 1)
        && !say_terms(c, wrong, size, 0)) printf("no simple pattern");
  }
  printf("\n    worst:");
  for (int k = 0; k < 3; k++) {        // the three largest errors
    long worst = -1;
    for (long i = 0; i < n; i++)
      if (wrong[i] && (worst < 0 || error_at(c, size, i) > error_at(c, size, worst))) worst = i;
    if (worst < 0) break;
    printf("  [%ld,%ld] %.6g, not %.6g", worst / c->cols, worst % c->cols, c->got[worst],
           c->want[worst]);
    if (c->x && c->dout)
      printf(", for x %.5g, dout %.5g%s", c->x[worst], c->dout[worst], k < 2 ? "\n          " : "");
    wrong[worst] = 0;
  }
  printf("\n");
}

static void heading(const char *got, const char *want) {
  printf("%-22s %-11s %7s  %-10s %-9s %14.14s %14s\n", "layer", "tensor", "numbers", "worst err.",
         "at", got, want);
}

static int count_verdict(int ok, const char *layer, const char *tensor) {
  ok ? passed++ : failed++;
  if (!ok && !*first_failure)
    snprintf(first_failure, sizeof first_failure, "%s %s", layer, tensor);
  return ok;
}

// A row of the table, and the diagnosis if it failed. Returns the worst relative error.
static double compare(Comparison c) {
  long n = (long)c.rows * c.cols, worst = 0;
  double size = norm_of(c.want, n) / sqrt((double)n), error = 0;
  for (long i = 0; i < n; i++)
    if (error_at(&c, size, i) > error) error = error_at(&c, size, worst = i);
  for (long i = 0; i < n; i++)
    if (!(fabs(c.got[i] - c.want[i]) <= worst_absolute))
      worst_absolute = isnan(c.got[i]) ? INFINITY : fabs(c.got[i] - c.want[i]);
  int ok = count_verdict(error <= c.bar, c.layer, c.tensor);
  char at[48];
  snprintf(at, sizeof at, c.cols > 1 ? "[%ld,%ld]" : "[%ld]", worst / c.cols, worst % c.cols);
  if (shown_rows == ALL_ROWS || (shown_rows == FAILURES && !ok))
    printf("%-22s %-11s %7ld  %-10.1e %-9s %14.6e %14.6e  %s\n", c.layer, c.tensor, n, error, at,
           c.got[worst], c.want[worst], ok ? "ok" : "FAIL");
  if (!ok && shown_rows == FAILURES)
    printf("    at B %d, T %d, C %d, H %d, V %d, O %d\n", c.shape->B, c.shape->T, c.shape->C,
           c.shape->H, c.shape->V, c.shape->O);
  int whose = shown_rows != NO_ROWS && say_whose(&c, ok);
  if (!ok && !brief && !whose && shown_rows != NO_ROWS) diagnose(&c, size);
  return error;
}

// A row of another kind: what was measured, and whether it is as it must be.
__attribute__((format(printf, 3, 4)))
static int expect(int ok, const char *what, const char *format, ...) {
  va_list args;
  va_start(args, format);
  printf("%-46s ", what);
  vprintf(format, args);
  printf("  %s\n", ok ? "ok" : "FAIL");
  va_end(args);
  return count_verdict(ok, what, "");
}

// A program that ends in the middle, by die(), exit() or a crash, still says where: in which layer.
static const char *checking;
#ifndef EMULATED
static const char *running_kernel(void) { return NULL; }   // the emulator's: "thread N of kernel K"
#endif

static void report_end(void) {
  if (!checking) return;
  const char *kernel = running_kernel();
  if (kernel) printf("in %s\n", kernel);
  printf("%s: the program ended here\n", checking);
  printf("the first failure: %s\n", *first_failure ? first_failure : checking);
  printf("%d passed, %d failed\n", passed, failed + 1);
  fflush(stdout);
  checking = NULL;
}

static void report_crash(int number) {
  printf("signal %d: %s\n", number, strsignal(number));
  report_end();
  _exit(1);
}

static void report_crashes(void) {
  const int crash[] = {SIGSEGV, SIGBUS, SIGFPE, SIGABRT, SIGILL};
  static char memory[1 << 16];
  struct sigaction action;
  stack_t stack;                         // of the handler, since another may be damaged
  memset(&stack, 0, sizeof stack);
  memset(&action, 0, sizeof action);
  stack.ss_sp = memory; stack.ss_size = sizeof memory;
  action.sa_handler = report_crash; action.sa_flags = SA_ONSTACK | SA_RESETHAND;
  sigaltstack(&stack, NULL);
  setvbuf(stdout, NULL, _IOLBF, 1 << 16);   // so that no row is lost, nor half of one
  atexit(report_end);
  for (int i = 0; i < 5; i++) sigaction(crash[i], &action, NULL);
}

// ---- 2. Layers --------------------------------------------------------------------------------
// LAYER(name, stress, (arguments), tensors) registers a layer: the arguments that name_forward and
// name_backward take, and its tensors, t[0] the output first, each with what happens to it. It
// needs a plain forward pass, name_plain, which gets the tensors' data as x[0], x[1], ... in
// double; it may compute SAVED tensors, too. `stress` makes some rows of the first input extreme:
// large means, saturated functions, scores of attention far above and below zero. See make_data().

enum Kind {
  OUTPUT,     // forward sets it; its gradient is given to backward
  SAVED,      // forward sets it for backward; it has no gradient
  SETS,       // from here on inputs: backward sets its gradient (=), which is NaN before, and must
              //   not be read
  ADDS        // an input whose gradient backward adds to (+=); it is random before
};
#ifdef WATCH
enum { MAX_TENSORS = 8, GUARD = 0 };       // every access is watched
#else
enum { MAX_TENSORS = 8, GUARD = 16 };
#endif

// rows and cols are letters of Shape, 'N' for B*T, 'P' for B*H, 'Q' for 3*C; or a small number.
typedef struct { const char *name; int rows, cols; enum Kind kind; } TensorSpec;
typedef struct {
  const char *name;
  void (*forward)(void *), (*backward)(void *);      // the argument is a Case
  void (*plain)(Shape s, double **x, const int *ids);
  double stress;
  TensorSpec spec[MAX_TENSORS];
  double worst;                                      // relative error found; -1: not checked
} Layer;

typedef struct {                                     // a layer on tensors of one shape
  const Layer *layer;
  Shape s;
  int n_tensors;
  TensorSpec spec[MAX_TENSORS];                      // the layer's, with numbers for letters
  Tensor t[MAX_TENSORS];                             // on the device, each with GUARD numbers more
  double *data[MAX_TENSORS], *grad[MAX_TENSORS];     // what was put there
  int *host_ids, *ids;                               // B*T integers in 0..V-1
} Case;

static Layer *layers[32];
static int n_layers;

static WeightBias weight_bias(Tensor w, Tensor b) { WeightBias p = {w, b}; return p; }

#define CASE_NAMES                                                                                 \
  const Case *case_ = (const Case *)argument;                                                      \
  const Shape *s_ = &case_->s;                                                                     \
  __attribute__((unused)) const Tensor *t = case_->t;                                              \
  __attribute__((unused)) const int *ids = case_->ids;                                             \
  __attribute__((unused)) int B = s_->B, T = s_->T, C = s_->C, H = s_->H, V = s_->V, O = s_->O,    \
                              N = B*T;
#define LAYER(name, stress, arguments, ...)                                                        \
  static void name##_forward_case(void *argument) { CASE_NAMES name##_forward arguments; }         \
  static void name##_backward_case(void *argument) { CASE_NAMES name##_backward arguments; }       \
  static Layer name##_layer = {#name, name##_forward_case, name##_backward_case, name##_plain,     \
                               stress, {__VA_ARGS__}, -1};                                         \
  __attribute__((constructor)) static void name##_register(void) {                                 \
    layers[n_layers++] = &name##_layer;                                                            \
  }

// fill: y[n,c] = C / 4. A layer without an input.
static void fill_forward(Tensor y, int N, int C) { fill(y.data, (long)N*C, C / (real)4); }
static void fill_backward(Tensor y, int N, int C) {}
static void fill_plain(Shape s, double **x, const int *ids) {
  for (int i = 0; i < s.B * s.T * s.C; i++) x[0][i] = s.C / 4.0;
}
LAYER(fill, 0, (t[0], N, C), {"y", 'N', 'C', OUTPUT})

static void residual_plain(Shape s, double **x, const int *ids) {
  for (int i = 0; i < s.B * s.T * s.C; i++) x[0][i] = x[1][i] + x[2][i];
}
LAYER(residual, 0, (t[0], t[1], t[2], N, C),
      {"out", 'N', 'C', OUTPUT}, {"x", 'N', 'C', SETS}, {"f", 'N', 'C', SETS})

static void gelu_plain(Shape s, double **x, const int *ids) {
  for (int i = 0; i < s.B * s.T * s.C; i++)
    x[0][i] = x[1][i] * 0.5 * (1 + tanh(sqrt(2 / acos(-1)) * (x[1][i] + 0.044715*pow(x[1][i], 3))));
}
LAYER(gelu, 8, (t[0], t[1], N, C), {"y", 'N', 'C', OUTPUT}, {"x", 'N', 'C', SETS})

static void embedding_plain(Shape s, double **x, const int *ids) {
  for (int n = 0; n < s.B * s.T; n++)
    for (int c = 0; c < s.C; c++)
      x[0][n*s.C + c] = x[1][ids[n]*s.C + c] + x[2][n%s.T*s.C + c];
}
LAYER(embedding, 0, (t[0], ids, t[1], t[2], B, T, C),
      {"out", 'N', 'C', OUTPUT}, {"wte", 'V', 'C', ADDS}, {"wpe", 'T', 'C', ADDS})

static void linear_plain(Shape s, double **x, const int *ids) {
  for (int n = 0; n < s.B * s.T; n++)
    for (int o = 0; o < s.O; o++) {
      x[0][n*s.O + o] = x[3][o];
      for (int c = 0; c < s.C; c++) x[0][n*s.O + o] += x[1][n*s.C + c] * x[2][c*s.O + o];
    }
}
LAYER(linear, 0, (t[0], t[1], weight_bias(t[2], t[3]), N, C, O),
      {"y", 'N', 'O', OUTPUT}, {"x", 'N', 'C', SETS}, {"weight", 'C', 'O', ADDS},
      {"bias", 'O', 1, ADDS})

static void lm_head_plain(Shape s, double **x, const int *ids) {
  for (int n = 0; n < s.B * s.T; n++)
    for (int v = 0; v < s.V; v++) {
      x[0][n*s.V + v] = 0;
      for (int c = 0; c < s.C; c++) x[0][n*s.V + v] += x[1][n*s.C + c] * x[2][v*s.C + c];
    }
}
LAYER(lm_head, 0, (t[0], t[1], t[2], N, C, V),
      {"logits", 'N', 'V', OUTPUT}, {"x", 'N', 'C', SETS}, {"wte", 'V', 'C', ADDS})

static void layernorm_plain(Shape s, double **x, const int *ids) {
  for (int n = 0; n < s.B * s.T; n++) {
    long double mean = 0, variance = 0;
    for (int c = 0; c < s.C; c++) mean += x[2][n*s.C + c] / s.C;
    for (int c = 0; c < s.C; c++) variance += powl(x[2][n*s.C + c] - mean, 2) / s.C;
    for (int c = 0; c < s.C; c++)
      x[0][n*s.C + c] = (double)((x[2][n*s.C + c] - mean) / sqrtl(variance + 1e-5L)) * x[3][c]
                      + x[4][c];
  }
}
LAYER(layernorm, 100, (t[0], t[1], t[2], weight_bias(t[3], t[4]), N, C),
      {"out", 'N', 'C', OUTPUT}, {"mean_rstd", 'N', 2, SAVED}, {"x", 'N', 'C', ADDS},
      {"weight", 'C', 1, ADDS}, {"bias", 'C', 1, ADDS})

static void crossentropy_plain(Shape s, double **x, const int *ids) {
  for (int n = 0; n < s.B * s.T; n++) {
    const double *logits = x[3] + n*s.V;
    long double sum = 0;
    double max = -INFINITY;
    for (int v = 0; v < s.V; v++) max = MAX(max, logits[v]);
    for (int v = 0; v < s.V; v++) sum += expl((long double)logits[v] - max);
    x[0][n] = (double)(max - logits[ids[n]] + logl(sum));
    int first = 0;
    while (logits[first] < max) first++;
    x[1][n] = first == ids[n];
    x[2][n] = (double)(max + logl(sum));
  }
}
LAYER(crossentropy, IS_DOUBLE ? 1000 : 200, (t[0], t[1], t[2], t[3], ids, N, V),
      {"loss", 'N', 1, OUTPUT}, {"correct", 'N', 1, SAVED}, {"row_lse", 'N', 1, SAVED},
      {"logits", 'N', 'V', SETS})

static void attention_plain(Shape s, double **x, const int *ids) {
  int D = s.C / s.H;
  double *att = new_doubles(s.T);
  for (int b = 0; b < s.B; b++)
    for (int h = 0; h < s.H; h++)
      for (int t = 0; t < s.T; t++) {
        const double *q = x[2] + (b*s.T + t)*3*s.C + h*D, *k = x[2] + b*s.T*3*s.C + h*D + s.C;
        double sum = 0, max = -INFINITY, *out = x[0] + (b*s.T + t)*s.C + h*D;
        for (int i = 0; i <= t; i++) {
          att[i] = 0;
          for (int d = 0; d < D; d++) att[i] += q[d] * k[i*3*s.C + d] / sqrt(D);
          max = MAX(max, att[i]);
        }
        for (int i = 0; i <= t; i++) sum += att[i] = exp(att[i] - max);
        for (int d = 0; d < D; d++) out[d] = 0;
        for (int i = 0; i <= t; i++)
          for (int d = 0; d < D; d++) out[d] += att[i] / sum * k[i*3*s.C + s.C + d];
        x[1][(b*s.H + h)*s.T + t] = max + log(sum);
      }
}
LAYER(attention, 10, (t[0], t[1], t[2], B, T, C, H),
      {"out", 'N', 'C', OUTPUT}, {"lse", 'P', 'T', SAVED}, {"qkv", 'N', 'Q', SETS})

// ---- Checking a layer

static int extent(Shape s, int letter) {
  const char *letters = "BTCHVONQP", *at = strchr(letters, letter);
  const int size[] = {s.B, s.T, s.C, s.H, s.V, s.O, s.B * s.T, 3 * s.C, s.B * s.H};
  return at ? size[at - letters] : letter;
}

// Behind each tensor there are GUARD numbers more, where no layer may write.
static double *new_guarded(long n) {
  double *x = new_doubles(n + GUARD);
  for (int i = 0; i < GUARD; i++) x[n + i] = 12345;
  return x;
}

static double *random_numbers(long n, int seed) {
  double *x = new_guarded(n);
  for (long i = 0; i < n; i++) x[i] = (float)random_normal(seed, i);
  return x;
}

static double stress_at(long row, long col, long cols) {   // -1, 0 or 1
  switch (row % 20) {
  case 0: return col < cols / 3 ? 1 : -1;          // q large, k small: scores below zero
  case 1: return 1;
  case 2: return col % 2 ? 1 : -1;
  case 3: return -1;                               // all logits negative
  default: return 0;
  }
}

// Every fourth target gets the largest logit of its row, every fourth shares it with another one.
static void make_correct(double *logits, const int *ids, int N, int V) {
  for (int n = 0; n < N; n += 2, logits += 2*V) {
    double max = -INFINITY;
    for (int v = 0; v < V; v++) if (v != ids[n]) max = MAX(max, logits[v]);
    logits[ids[n]] = (real)(max + (n % 4 == 0));
  }
}

static long count_in(const Case *c, int i) { return (long)c->spec[i].rows * c->spec[i].cols; }

static void make_data(Case *c, int i, double stress) {
  enum Kind kind = c->spec[i].kind;
  long n = count_in(c, i), cols = c->spec[i].cols;
  c->data[i] = new_guarded(n);
  c->grad[i] = new_guarded(n);
  for (long j = 0; j < n; j++) {
    double x = random_normal(100 + i, j) + stress * stress_at(j / cols, j % cols, cols);
    c->data[i][j] = kind == OUTPUT || kind == SAVED ? NAN : (real)x;
    c->grad[i][j] = kind == SETS ? NAN : (real)random_normal(200 + i, j);
  }
  if (c->layer->spec[i].cols == 'V' && kind == SETS)
    make_correct(c->data[i], c->host_ids, c->spec[i].rows, (int)cols);
  c->t[i].data = on_device(c->data[i], n + GUARD);
  c->t[i].grad = kind == SAVED ? NULL : on_device(c->grad[i], n + GUARD);
}

static Case *make_case(const Layer *layer, Shape s) {
  Case *c = (Case *)host_alloc(NULL, sizeof(Case));
  int N = s.B * s.T;
  double stress = layer->stress;
  c->layer = layer;
  c->s = s;
  c->host_ids = (int *)host_alloc(NULL, N * sizeof(int));
  c->ids = (int *)device_alloc(N * sizeof(int));
  for (int n = 0; n < N; n++) c->host_ids[n] = (int)(random_bits(300, n) % s.V);
  c->host_ids[N > 1] = c->host_ids[0];   // a token twice, side by side
  c->host_ids[MIN(4, N - 1)] = s.V - 1;
  copy_in(c->ids, c->host_ids, N * sizeof(int));
  for (int i = 0; i < MAX_TENSORS && layer->spec[i].name; i++, c->n_tensors++) {
    TensorSpec *spec = &c->spec[i];
    *spec = layer->spec[i];
    spec->rows = extent(s, spec->rows);
    spec->cols = extent(s, spec->cols);
    make_data(c, i, spec->kind >= SETS ? stress : 0);
    if (spec->kind >= SETS) stress = 0;              // for the first input only
  }
  return c;
}

static double *fetch(const real *device, long n) {
  double *x = new_doubles(n);
  get(x, device, n);
  return x;
}

// Is what may not be written as it was put there: a tensor, or only what is behind it?
static int untouched(const real *device, const double *before, long n, int may_be_written) {
  long from = may_be_written ? n : 0;
  return !device || !memcmp(fetch(device, n + GUARD) + from, before + from,
                            (n + GUARD - from) * sizeof(double));
}

// Neither pass may write to what it only reads, or beyond the end of a tensor.
static void check_untouched(const Case *c) {
  for (int i = 0; i < c->n_tensors; i++) {
    enum Kind kind = c->spec[i].kind;
    long n = count_in(c, i);
    if (!untouched(c->t[i].data, c->data[i], n, kind == OUTPUT || kind == SAVED)
        || !untouched(c->t[i].grad, c->grad[i], n, kind == SETS || kind == ADDS))
      expect(0, c->layer->name, "writes to %s, or behind it, where it must not", c->spec[i].name);
  }
}

static Comparison row_of(const Case *c, int i, const char *tensor, const double *got,
                         const double *want) {
  Comparison row = {c->layer->name, tensor, c->spec[i].rows, c->spec[i].cols, got, want, NULL,
                    &c->s, BAR, NULL, NULL};
  return row;
}

// The output, and what is saved for backward, beside those of the plain forward pass.
static void check_forward(Case *c) {
  launch(c->layer->forward, c);
  c->layer->plain(c->s, c->data, c->host_ids);
  for (int i = 0; i < c->n_tensors; i++) {
    enum Kind kind = c->spec[i].kind;
    if (kind != OUTPUT && (kind != SAVED || isnan(c->data[i][0]))) continue;
    double *got = fetch(c->t[i].data, count_in(c, i));
    Comparison row = row_of(c, i, c->spec[i].name, got, c->data[i]);
    if (IS_DOUBLE) row.bar /= 1000;                  // no finite difference blurs it
    compare(row);
  }
}

static void evaluate_plain(void *argument, double *out) {
  Case *c = (Case *)argument;
  c->layer->plain(c->s, c->data, c->host_ids);
  memcpy(out, c->data[0], count_in(c, 0) * sizeof(double));
}

static Function function_of(Case *c) {
  Function f = {evaluate_plain, c, c->grad[0], count_in(c, 0)};
  return f;
}

static double check_elements(Case *c, int i, const char *tensor, const double *got) {
  long n = count_in(c, i);
  double *want = new_doubles(n);
  for (long j = 0; j < n; j++) want[j] = slope(function_of(c), c->data[i] + j, 1, NULL);
  Comparison row = row_of(c, i, tensor, got, want);
  if (c->spec[i].kind == ADDS) row.before = c->grad[i];
  row.x = c->data[i];
  if (row.rows == c->spec[0].rows && row.cols == c->spec[0].cols) row.dout = c->grad[0];
  return compare(row);
}

// By how much the slope that the gradient promises, along `direction` and for the numbers
// begin..end-1, exceeds the one that is measured.
static double excess(Case *c, int i, const double *got, const double *direction, long begin,
                     long end) {
  return (double)dot(got + begin, direction + begin, end - begin)
       - slope(function_of(c), c->data[i] + begin, end - begin, direction + begin);
}

// The first wrong number, or the last, by halving: the half at that end is kept if it is wrong,
// else the other.
static long outermost(Case *c, int i, const double *got, const double *direction, double limit,
                      int last) {
  long begin = 0, end = count_in(c, i);
  while (end - begin > 1) {
    long middle = (begin + end) / 2, from = last ? middle : begin, to = last ? end : middle;
    int wrong = !(fabs(excess(c, i, got, direction, from, to)) <= limit);
    if (wrong == last) begin = middle;
    else end = middle;
  }
  return begin;
}

// When a tensor is too large to move each number separately, all are moved at once, along a random
// direction. If the slope is not the one that the gradient promises, a part of them is moved: so
// the first and the last wrong one are found in few steps.
static double check_direction(Case *c, int i, const char *tensor, const double *got) {
  long n = count_in(c, i), cols = c->spec[i].cols, T = c->s.T;
  double *direction = random_numbers(n, 400 + i), promised = (double)dot(got, direction, n);
  double missed = excess(c, i, got, direction, 0, n), found = promised - missed;
  double size = MAX(norm_of(got, n), fabs(found)), error = fabs(missed) / size;
  int ok = count_verdict(error <= BAR, c->layer->name, tensor);
  printf("%-22s %-11s %7ld  %-10.1e %-9s %14.6e %14.6e  %s\n", c->layer->name, tensor, n, error,
         "a slope", promised, found, ok ? "ok" : "FAIL");
  for (int last = 0; last < 2 && !ok; last++) {
    long at = outermost(c, i, got, direction, BAR * size, last), t = at / cols % T;
    double want = got[at] - excess(c, i, got, direction, at, at + 1) / direction[at];
    printf("    the %s wrong one is [%ld,%ld] of [%ld,%ld]: %.6g, not %.6g%s\n",
           last ? "last" : "first", at / cols, at % cols, n / cols, cols, got[at], want,
           !last && c->spec[i].rows == c->s.B * T && t > 0 && t % 32 == 0
           ? "; a tile begins there" : "");
  }
  return error;
}

static void check_layer(Layer *layer, Shape s, int every_element) {
  Case *c = make_case(layer, s);
  int failed_before = failed;
  check_forward(c);
  if (failed > failed_before) return;    // what is read by backward may be wrong
  launch(layer->backward, c);
  check_untouched(c);
  for (int i = 0; i < c->n_tensors; i++) {
    enum Kind kind = c->spec[i].kind;
    if (kind != SETS && kind != ADDS) continue;
    char name[40];
    snprintf(name, sizeof name, "d %s", c->spec[i].name);
    double *got = fetch(c->t[i].grad, count_in(c, i));
    for (long j = 0; kind == ADDS && j < count_in(c, i); j++) got[j] -= c->grad[i][j];
    double error = (every_element ? check_elements : check_direction)(c, i, name, got);
    layer->worst = MAX(layer->worst, error);
  }
}

// The shapes, in the order in which they are tried.
static const struct {
  Shape s;
  int every_element;
  const char *only;                      // the layers that are tried; NULL: all
} tries[] = {
  {{3, 7, 24, 3, 29, 10}, 1, NULL},      // sizes that no tile, vector or CUDA block divides
  {{2, 135, 150, 3, 301, 77}, 0, NULL},  // several tiles, vectors, CUDA blocks each way
  {{2, 3, 21, 7, 7, 9}, 1, NULL},        // remainders 1, 2 and 3 of 4, and 7 of 16; one
  {{1, 5, 23, 1, 10, 3}, 1, NULL},       //   token, one sequence, one head, one channel a head
  {{5, 1, 13, 13, 33, 17}, 1, NULL},
  {{1, 513, 14, 2, 29, 10}, 0, "attention embedding"},   // one key, or row, in the last block
  {{1, 5, 205, 1, 29, 10}, 0, "fill residual gelu"},     // 1025 numbers: one in the last of 8 warps
  {{2, 3, 390, 3, 29, 530}, 0, "linear"},                // more than DEPTH x BLOCK_COLUMNS of w
  {{3, 7, 525, 3, 29, 10}, 0, "linear lm_head"},    // few results, each a sum of over 512 terms,
  {{5, 121, 24, 3, 29, 10}, 0, "linear lm_head"}};  //   which a GPU cuts into slices

static const char *names[32];            // what is asked for
static int n_names;                      // 0: everything

static int wanted(const char *name) {
  for (int k = 0; k < n_names; k++)
    if (!strcmp(names[k], name)) return 1;
  return !n_names;
}

static void check_layers(void) {
  printf("Layers. Every number of every input is moved (B 3, T 7, C 24, H 3, V 29, O 10); beyond\n"
         "a tile (B 2, T 135, C 150, H 3, V 301, O 77) all at once, in a random direction. At 3\n"
         "more small shapes every number again; of these rows only failures are shown.\n");
  heading("backward", "finite diff.");
  for (int i = 0; i < n_layers; i++) {
    int failed_before = failed;
    if (!wanted(layers[i]->name)) continue;
    checking = layers[i]->name;
    for (size_t k = 0; k < sizeof tries / sizeof *tries && failed == failed_before; k++) {
      if (tries[k].only && !strstr(tries[k].only, layers[i]->name)) continue;
      shown_rows = k > 0 && tries[k].every_element ? FAILURES : ALL_ROWS;
      check_layer(layers[i], tries[k].s, tries[k].every_element);
    }
    shown_rows = ALL_ROWS;
    if (failed > failed_before)
      printf("    (what depends on it, and other shapes, are left out)\n");
  }
}

// ---- Sums over everything

// Losses, correct predictions, squared norm: longer than a CUDA block or a chunk. Sums that add
// start from other numbers than 0.
typedef struct { Tensor loss, correct; LossSums *sums; double *partial; int n; } SumsCase;

static void sum_twice(void *argument) {
  SumsCase *s = (SumsCase *)argument;
  add_loss(s->sums, s->loss, s->correct, s->n);
  add_loss(s->sums, s->loss, s->correct, s->n);
  squared_norm(&s->sums->grad_norm2, s->partial, s->loss.data, s->n);
}

static void check_sums(void) {
  const int n = 259*CHUNK + 77;          // more chunks than a CUDA block has threads
  double *loss = random_numbers(n + GUARD, 700), *correct = new_doubles(n), sums[3] = {3, 5, 0};
  double apart = 0, *fresh = new_doubles(chunks(n));
  LossSums before = {3, 5, 7}, after;
  for (int i = 0; i < n; i++) {
    correct[i] = random_bits(701, i) % 3 == 0;
    sums[0] += 2*loss[i]; sums[1] += 2*correct[i]; sums[2] += loss[i] * loss[i];
  }
  SumsCase s = {{on_device(loss, n + GUARD), NULL}, {on_device(correct, n), NULL},
                (LossSums *)device_alloc(sizeof(LossSums)),
                (double *)device_alloc(chunks(n) * sizeof(double)), n};
  copy_out(fresh, s.partial, chunks(n) * sizeof(double));
  expect(norm_of(fresh, chunks(n)) == 0, "device_alloc", "new memory is 0");
  copy_in(s.sums, &before, sizeof before);
  launch(sum_twice, &s);
  copy_out(&after, s.sums, sizeof after);
  double got[] = {after.loss, after.correct, after.grad_norm2};
  for (int i = 0; i < 3; i++) apart = larger(apart, fabs(got[i] / sums[i] - 1));
  expect(apart < 1e-11, "add_loss, squared_norm", "%.1e from plain sums", apart);
}

// ---- exp and tanh in float, against libm in double

#ifndef GPU
static void check_functions(void) {
  const real clamped[][2] = {{-1000, -87}, {-INFINITY, -87}, {1000, 88}, {INFINITY, 88}};
  double worst_exp = 0, worst_tanh = 0;
  int ok = 1;
  for (int i = -88000; i <= 88000; i++) {
    real x = (real)(i * 1e-3 * (1 + 1e-5 * random_uniform(600, i))), u = x / 8;
    double want = exp((double)MIN(MAX(x, -87), 88)), ulp = ldexp(1, ilogb(want) - 23);
    worst_exp = larger(worst_exp, fabs(exp_(x) - want) / ulp);
    worst_tanh = larger(worst_tanh, fabs(tanh_(u) - tanh((double)u)) / 0x1p-24);
  }
  for (int i = 0; i < 4; i++) ok &= exp_(clamped[i][0]) == exp_(clamped[i][1]);
  ok &= tanh_(INFINITY) == 1 && tanh_(-INFINITY) == -1 && isnan(exp_(NAN)) && isnan(exp_(-NAN));
  expect(worst_exp < 1.1, "exp_", "%.2f units in the last place at worst", worst_exp);
  expect(worst_tanh < 4, "tanh_", "%.2f * 2^-24 at worst", worst_tanh);
  expect(ok, "exp_ and tanh_ of huge numbers, infinities, NaN", "as they are documented");
}
#endif

// ---- 3. The whole model -----------------------------------------------------------------------
// A GPT of 6120 parameters on a text of 29 letters, with weights so large that each layer matters.

static const char POEM[] =   // Longfellow 1838
  "tell me not, in mournful numbers, life is but an empty dream. for the soul is dead that "
  "slumbers, and things are not what they seem. life is real, life is earnest, and the grave "
  "is not its goal. dust thou art, to dust returnest, was not spoken of the soul. ";
enum { LETTERS = 29, POEM_SIZE = sizeof POEM - 1 };
static const Config TINY = {3, 3, 12, 8, LETTERS};   // L 3, H 3, C 12, T up to 8, V 29

// The poem twice, as numbers 0..28.
static const unsigned char *poem(void) {
  static unsigned char letter[2 * POEM_SIZE];
  const char *order = "abcdefghijklmnopqrstuvwxyz ,.";
  for (int i = 0; i < 2*POEM_SIZE; i++)
    letter[i] = (unsigned char)(strchr(order, POEM[i % POEM_SIZE]) - order);
  return letter;
}

typedef struct { int B, T, at; } Piece;   // a micro-batch: B sequences of T letters, from `at` on
static const Piece PIECE = {3, 7, 5};
enum { MAX_TOKENS = 100 };

// The n_weights numbers of m->weights.data or .grad: those of an entry begin at data_at, and what
// pads it is 0. The name of the first parameter, in backward order, in which two of them differ.
static const char *first_difference(const Model *m, const double *x, const double *y) {
  const char *name = NULL;                         // in the end: the last of the list
  for (Entry *e = m->parameter; e < m->parameter + m->n_parameter_tensors; e++)
    if (memcmp(x + e->data_at, y + e->data_at, entry_count(e) * sizeof(double))) name = e->name;
  return name;
}

static double *random_weights(const Model *m) {
  double *w = new_doubles(m->n_weights);
  for (int i = 0; i < m->n_parameter_tensors; i++) {
    const Entry *e = &m->parameter[i];
    double std = i < 2 ? 1 : 0.3;                  // wte and wpe; the others
    for (long j = 0; j < entry_count(e); j++)
      w[e->data_at + j] = e->mean + std * random_normal(500 + i, j);
  }
  return w;
}

static void poison(void *model) {                  // what is read before it is written is NaN
  Model *m = (Model *)model;
  fill(m->memory, m->n_memory, (real)NAN);
}

static Trainer *new_trainer(Config config, int unshared) {
  Trainer *t = (Trainer *)host_alloc(NULL, sizeof(Trainer));
  Model *m = &t->model;
  model_layout(m, config, MAX_TOKENS, 1, unshared);
  model_allocate(m);
  launch(poison, m);
  t->moment_m = (real *)device_alloc(m->n_weights * sizeof(real));
  t->moment_v = (real *)device_alloc(m->n_weights * sizeof(real));
  return t;
}

static void reset(Trainer *t) {                    // to random weights and no state
  Model *m = &t->model;
  double *w = random_weights(m), *zeros = new_doubles(m->n_weights);
  put(m->weights.data, w, m->n_weights);
  put(t->moment_m, zeros, m->n_weights);
  put(t->moment_v, zeros, m->n_weights);
  t->updates = t->tokens = 0;
}

static void run_piece(Model *m, Piece p, double dloss) {   // dloss 0: forward only
  MicroBatch batch = {m, p.B, p.T, dloss};
  long start[MAX_TOKENS];
  assert(p.B * p.T <= MAX_TOKENS && p.at + p.B * p.T < 2*POEM_SIZE);
  for (int b = 0; b < p.B; b++) start[b] = p.at + b * p.T;
  load_windows(m, poem(), start, p.B, p.T);
  launch(run_micro_batch, &batch);
}

// The layers between a parameter's gradient and the next one in backward order.
static const char *suspects(const char *name) {
  const char *table[][2] = {
    {"ln_f", "crossentropy_backward, dx of lm_head_backward, or layernorm_backward"},
    {"mlp.c_proj", "dx of layernorm_backward above, residual_backward, or dw of linear_backward"},
    {"mlp.c_fc", "dx of linear_backward above, gelu_backward, or dw of linear_backward"},
    {"ln_2", "dx of linear_backward above, or dw of layernorm_backward"},
    {"attn.c_proj", "dx of layernorm_backward above, residual_backward, or dw of linear_backward"},
    {"attn.c_attn", "dx of linear_backward above, attention_backward, or dw of linear_backward"},
    {"ln_1", "dx of linear_backward above, or dw of layernorm_backward"},
    {"wpe", "dx of layernorm_backward above, residual_backward, or embedding_backward"},
    {"wte", "embedding_backward, or dwte of lm_head_backward: both add to it, since it is tied"}};
  for (int i = 0; i < 9; i++) if (strstr(name, table[i][0])) return table[i][1];
  return "";
}

// Says where to look: `wrong` is the first wrong tensor, `right` the one before it, or "".
static void localise(const char *right, const char *wrong, const char *where) {
  printf("The first, in the order in which they are computed, is %s;\n%s%s", wrong,
         *right ? right : "nothing before it was compared",
         *right ? ", before it, is right: look at what lies between them" : "");
  printf(*where ? ": %s\n" : "\n", where);
}

typedef struct { Model *m; Entry *e; double *data; } Moved;   // a parameter, and moved numbers

static void evaluate_model(void *argument, double *out) {
  Moved *a = (Moved *)argument;
  put(a->e->tensor->data, a->data, entry_count(a->e));
  run_piece(a->m, PIECE, 0);
  get(out, a->m->loss.data, PIECE.B * PIECE.T);
}

// The gradient of the mean loss for a parameter, by finite differences.
static double *model_slopes(Model *m, Entry *e) {
  int N = PIECE.B * PIECE.T;
  double upstream[MAX_TOKENS], *want = new_doubles(entry_count(e));
  Moved a = {m, e, fetch(e->tensor->data, entry_count(e))};
  Function f = {evaluate_model, &a, upstream, N};
  for (int n = 0; n < N; n++) upstream[n] = 1.0 / N;
  for (long j = 0; j < entry_count(e); j++) want[j] = slope(f, a.data + j, 1, NULL);
  put(e->tensor->data, a.data, entry_count(e));
  return want;
}

static void check_model(void) {
  char layer[sizeof first_failure];
  memcpy(layer, first_failure, sizeof layer);
  Trainer *t = new_trainer(TINY, 1);
  Model *m = &t->model;
  const char *right = "", *wrong = NULL;
  Shape shape = {PIECE.B, PIECE.T, TINY.n_embd, TINY.n_head, LETTERS, 0};
  reset(t);
  run_piece(m, PIECE, 1.0 / (PIECE.B * PIECE.T));
  double *grad = fetch(m->weights.grad, m->n_weights);
  printf("\nThe whole model, in backward order: L %d, H %d, C %d, T %d, V %d, B %d\n",
         TINY.n_layer, TINY.n_head, TINY.n_embd, PIECE.T, LETTERS, PIECE.B);
  heading("backward", "finite diff.");
  worst_absolute = 0;
  brief = *layer != 0;   // the layer alone has been diagnosed; here its error spreads
  for (int i = m->n_parameter_tensors - 1; i >= 0; i--) {   // the list has the order of forward
    Entry *e = &m->parameter[i];
    Comparison row = {e->name, "", e->rows, MAX(1, e->cols), grad + e->data_at,
                      model_slopes(m, e), NULL, &shape, BAR, NULL, NULL};
    if (!(compare(row) <= BAR) && !wrong) wrong = e->name;
    if (!wrong) right = e->name;
    else brief = 1;                      // what follows from the first needs no diagnosis
  }
  printf("An absolute tolerance of 2e-2 %s here: the worst is %.1e\n",
         worst_absolute <= 0.02 ? "passes" : "fails", worst_absolute);
  if (wrong) {
    localise(right, wrong, suspects(wrong));
    if (*layer) printf("Alone, %s failed first.\n", layer);
    else printf("Each layer is right alone: look at how forward() and backward() call them.\n");
  }
  brief = 0;
}

static void expect_same(const Model *m, const double *x, const double *y, const char *what,
                        const char *where) {
  const char *differs = first_difference(m, x, y);
  expect(!differs, what, differs ? "%s differs%s" : "the same bits", differs, where);
}

// The model's tensors share memory, see Place. With memory of their own the gradients must have the
// same bits. And the operations that --profile counts must be those of model_flop(), and those that
// the backward pass of attention computes again: the scores (a GPU: twice, and datt). On a GPU the
// numbers that kernels must move are counted, too.
static void check_shared_memory(void) {
  double *grad[2], N = PIECE.B * PIECE.T, flop = 0;
  double again = N * PIECE.T * TINY.n_embd * TINY.n_layer;
  Model *m = NULL;
#ifdef GPU
  again *= 3;
#endif
  for (int unshared = 0; unshared < 2; unshared++) {
    Trainer *t = new_trainer(TINY, unshared);
    m = &t->model;
    reset(t);
    memset(profile, 0, sizeof profile);
    opt.profile = 1;
    run_piece(m, PIECE, 1 / N);
    opt.profile = 0;
    grad[unshared] = fetch(m->weights.grad, m->n_weights);
  }
  expect_same(m, grad[0], grad[1], "with memory shared between activations", ": look at the table "
              "of Place");
  for (struct Profile *p = profile; *p->name; p++) {
    flop += p->flop;
    int products = strstr(p->name, "backward_kv") ? 4 : strstr(p->name, "backward_q") ? 3 : 0;
    if (products)
      expect(p->flop == products * again / 3, "--profile", "%.0f operations of %s", p->flop,
             p->name);
  }
  expect(flop == model_flop(m, N, PIECE.T) + again, "--profile", "%.0f operations, expected %.0f",
         flop, model_flop(m, N, PIECE.T) + again);
#ifdef GPU
  double moved = 0;
  for (struct Profile *p = profile; *p->name; p++)
    if (!strstr(p->name, "add_slices")) moved += p->bytes / sizeof(real);   // those depend on WARPS
  expect(moved == 46872, "--profile", "%.0f numbers moved, expected 46872", moved);
#endif
}

// ---- Every optimizer against its formula

// The same formulas as papers have them, for one weight; decay is 0 if it is of a vector.
typedef struct { double w, m, v, decay; } Plain;
static void plain_step(int optimizer, Plain *p, double g, double rate, int step) {
  const double b1 = opt.beta1, b2 = opt.beta2;
  double move = 0;
  if (optimizer == adamw) p->w -= rate * p->decay * p->w;   // decoupled
  else g += p->decay * p->w;
  switch (optimizer) {
  case sgd: move = g; break;
  case momentum: move = p->m = b1 * p->m + g; break;
  case adagrad:
    p->v += g*g;
    move = g / (sqrt(p->v) + 1e-8);
    break;
  case rmsprop:
    p->v = b2 * p->v + (1 - b2) * g*g;
    move = g / (sqrt(p->v) + 1e-8);
    break;
  case adadelta:
    p->v = b2 * p->v + (1 - b2) * g*g;
    move = sqrt(p->m + 1e-6) / sqrt(p->v + 1e-6) * g;
    p->m = b2 * p->m + (1 - b2) * move*move;
    break;
  case adam: case adamw:
    p->m = b1 * p->m + (1 - b1) * g;
    p->v = b2 * p->v + (1 - b2) * g*g;
    move = p->m / (1 - pow(b1, step)) / (sqrt(p->v / (1 - pow(b2, step))) + 1e-8);
    break;
  default: die("plain_step() lacks a case for --optimizer %s", optimizers[optimizer].name);
  }
  p->w -= rate * move;
}

// The options of update(), for windows of T letters of the poem.
static void set_options(int T, double weight_decay, double grad_clip) {
  text.byte = (unsigned char *)poem();
  text.size = text.train_size = POEM_SIZE;
  opt.config.block_size = T;
  opt.seed = 1; opt.warmup = 0; opt.max_steps = 1000;
  opt.beta1 = 0.9; opt.beta2 = 0.99; opt.weight_decay = weight_decay; opt.grad_clip = grad_clip;
  n_trainers = 1;
}

// The optimizer's part of an update, with the gradients that are in m->weights.grad.
static void apply(Trainer *t, int optimizer, double rate) {
  opt.optimizer = optimizers[optimizer].name;
  t->optimizer = optimizer_config(t);
  t->optimizer.learning_rate = (real)rate;
  launch(apply_gradients, t);
}

// Updates from random gradients, clipped; only matrices decay.
static void check_optimizer(Trainer *t, int optimizer) {
  const double decay = 0.1, clip = 2, rate = 3 * optimizers[optimizer].learning_rate;
  Model *m = &t->model;
  double *first = random_weights(m), *g = new_doubles(m->n_weights), change = 0, off[2] = {0, 0};
  Plain *plain = (Plain *)host_alloc(NULL, m->n_weights * sizeof(Plain));
  reset(t);
  set_options(1, decay, clip);
  for (Entry *e = m->parameter; e < m->parameter + m->n_parameter_tensors; e++)
    for (long i = e->data_at; i < e->data_at + entry_count(e); i++) {
      Plain p = {(real)first[i], 0, 0, e->cols ? decay : 0};
      plain[i] = p;
    }
  for (int step = 1; step <= 4; step++, t->updates++) {
    for (long i = 0; i < m->n_weights; i++)        // no gradient for the padding
      g[i] = first[i] == 0 ? 0 : (real)random_normal(800 + step, i);
    put(m->weights.grad, g, m->n_weights);
    apply(t, optimizer, rate);
    double factor = clip / norm_of(g, m->n_weights);
    for (long i = 0; i < m->n_weights; i++)
      plain_step(optimizer, &plain[i], g[i] * factor, rate, step);
  }
  double *got = fetch(m->weights.data, m->n_weights);
  for (long i = 0; i < m->n_weights; i++) {
    int vector = plain[i].decay == 0;
    change = MAX(change, fabs(plain[i].w - first[i]));
    off[vector] = larger(off[vector], fabs(got[i] - plain[i].w));
  }
  int ok = larger(off[0], off[1]) / change < (IS_DOUBLE ? 1e-11 : 1e-4);
  expect(ok, optimizers[optimizer].name, ok ? "%.1e, %.1e" : "%.1e, %.1e: look at its row of "
         "OPTIMIZERS, apply_gradients(), optimizer_step(), clip_factor()", off[0] / change,
         off[1] / change);
}

static void check_optimizers(void) {
  const Config config = {1, 1, 20, 8, LETTERS};      // more weights than a chunk has
  Trainer *t = new_trainer(config, 0);
  printf("\nEvery optimizer, 4 updates with clipping, and decay of matrices, against its formula:\n"
         "the worst weight of a matrix, and of a vector, relative to the largest change\n");
  for (int i = 0; i < N_OPTIMIZERS; i++) check_optimizer(t, i);
}

#ifdef GPU
// ---- Each rung of matmul's ladder: all transpositions, edges, slices, = and += and bias. The
// numbers are floats; for bf16 they are rounded here, too, so that its products are exact.

// Every seventh number is a bf16 or halfway between two: does rounding go to the even one?
static double *random_matrix(int n, int seed) {
  double *x = random_numbers(n, seed);
  for (int i = 0; i < n; i += 7) x[i] = 1 + (i % 4 - 2) * 0x1p-8;
  return x;
}

static void round_to_bf16(double *x, long n) {   // to 8 bits; of two that are as near, the even one
  for (long i = 0; i < n; i++) {
    int exponent;
    double fraction = frexp(x[i], &exponent);
    x[i] = ldexp(rint(ldexp(fraction, 8)), exponent - 8);
  }
}

// The largest error of an element, relative to the sum of the sizes of its terms.
static double matmul_error(int M, int N, int K, int a_along, int b_along, int mode, int bf16) {
  int shift = mode == ADD;               // then A is not aligned
  double *a = random_matrix(M*K + shift, 800) + shift, *b = random_matrix(K*N, 801);
  double *c = random_matrix(M*N, 802), *bias = random_matrix(N, 803), worst = 0;
  int a_down = a_along ? K : 1, a_right = a_along ? 1 : M;
  int b_down = b_along ? 1 : N, b_right = b_along ? K : 1;
  Matrix device_a = {on_device(a - shift, M*K + shift) + shift, a_down, a_right};
  Matrix device_b = {on_device(b, K*N), b_down, b_right};
  Matrix device_c = rows_of(on_device(c, M*N + GUARD), N);
  if (rounded) CHECK(cudaFree(rounded));   // so that the emulator sees what is read beyond it
  device_bytes -= rounded_bytes;
  rounded = NULL; rounded_bytes = 0;
  matmul(device_c, device_a, device_b, M, N, K, mode, mode == ADD ? NULL : on_device(bias, N));
  double *got = fetch(device_c.at, M*N + GUARD);
  if (bf16) round_to_bf16(a, M*K);
  if (bf16) round_to_bf16(b, K*N);
  for (int i = 0; i < M; i++)
    for (int j = 0; j < N; j++) {
      double sum = mode == ADD ? c[i*N + j] : bias[j], size = fabs(sum);
      for (int k = 0; k < K; k++) {
        double term = a[i*a_down + k*a_right] * b[k*b_down + j*b_right];
        sum += term;
        size += fabs(term);
      }
      worst = larger(worst, fabs(got[i*N + j] - sum) / size);
    }
  if (memcmp(got + M*N, c + M*N, GUARD * sizeof(double))) worst = INFINITY;
  return worst;
}

static void check_rung(const char *name, int number, const char *precision) {
  static const int size[][3] = {{1, 1, 1}, {128, 128, 64}, {131, 70, 37}, {66, 129, 16},
                                {131, 68, 545}, {96, 128, 64}, {128, 64, 516}};
  enum { SIZES = sizeof size / sizeof *size };
  int bf16 = !strcmp(precision, "bf16"), before = rung, n = 0;
  double bar = IS_DOUBLE && !bf16 ? 1e-14 : 1e-5, worst = 0;
  device_start(1, precision);
  fill(scratch, MIN(n_scratch, 1L << 16), (real)NAN);   // what an earlier product left there
  rung = number;
  for (int few = 0; few < 2; few++) {    // which kernel is used depends on the multiprocessors
    multiprocessors = few ? 2 : 132;
    for (int i = 0; i < SIZES; i++)
      for (int way = 0; way < 4; way++, n++)
        worst = larger(worst, matmul_error(size[i][0], size[i][1], size[i][2], way & 1, way / 2,
                                           (n + few) % 3 ? SET : ADD, bf16));
  }
  rung = before;
  device_start(1, "fp32");
  expect(worst < bar, name, "%.1e, the worst element of %d products", worst, n);
}

// Attention on tensor cores against attention in fp32, which the layers above have checked. q, k, v
// and dout are bf16, so their products are the same; att and dz are rounded to 8 bits in one only.
static void check_attention_bf16(void) {
  static const Shape shape[] = {{1, 1, 8, 1, 5, 5}, {2, 135, 150, 3, 5, 5}, {1, 130, 128, 2, 5, 5},
                                {1, 70, 268, 2, 5, 5}};   // heads of 8, 50, 64 and 134 channels
  double worst[5] = {0};                 // out, lse, dq, dk, dv
  for (int i = 0; i < 4; i++) {
    Case *c = make_case(&attention_layer, shape[i]);
    Tensor *t = c->t;
    const real *result[] = {t[0].data, t[1].data, t[2].grad};
    long n = count_in(c, 0), count[] = {n, count_in(c, 1), 3*n};
    round_to_bf16(c->grad[0], n);
    round_to_bf16(c->data[2], 3*n);
    put(t[0].grad, c->grad[0], n);
    put(t[2].data, c->data[2], 3*n);
    double *want[3], *got[3];
    for (int bf16 = 0; bf16 < 2; bf16++) {   // backward gets the same out in both
      device_start(1, bf16 ? "bf16" : "fp32");
      if (!bf16) launch(c->layer->forward, c);
      put(t[2].grad, c->grad[2], 3*n);       // NaN: all must be written
      launch(c->layer->backward, c);
      for (int k = 0; k < 2 && bf16; k++) put(t[k].data, c->data[k], count[k]);
      if (bf16) launch(c->layer->forward, c);
      check_untouched(c);
      for (int k = 0; k < 3; k++)
        (bf16 ? got : want)[k] = fetch(result[k], count[k]);
    }
    for (int k = 0; k < 3; k++) {
      double size = norm_of(want[k], count[k]) / sqrt((double)count[k]);
      for (long j = 0; j < count[k]; j++) {
        double *w = &worst[k < 2 ? k : 2 + j / shape[i].C % 3];
        *w = larger(*w, fabs(got[k][j] - want[k][j]) / size);
      }
    }
  }
  device_start(1, "fp32");
  int ok = worst[0] > 0 && worst[0] < 5e-3 && worst[1] < 1e-5;
  for (int i = 2; i < 5; i++) ok &= worst[i] > 0 && worst[i] < 0.05;   // 0: computed in fp32, too
  expect(ok, "attention on tensor cores", "out %.1e, lse %.1e, dq %.1e, dk %.1e, dv %.1e from fp32",
         worst[0], worst[1], worst[2], worst[3], worst[4]);
}

static void check_matmul_rungs(void) {
  printf("\nMatmul: all transpositions, whole tiles and edges; rungs of its ladder\n");
  if (!SEARCH_FOR_RACES) check_rung("1 plain", 1, "fp32");
  check_rung("2 shared memory", 2, "fp32");
  check_rung("3 registers", 3, "fp32");
  if (compute_capability < 80) printf("This GPU has no tensor cores for bf16: not checked\n");
  else {
    check_rung("4 tensor cores, bf16", 3, "bf16");
    check_attention_bf16();
  }
#ifdef EMULATED
  emulated_ptx = 75;                     // code for Turing, compiled anew by the driver
  device_start(1, "fp32");
  expect(compute_capability == 75, "bf16", "is not there in code for an older GPU");
  emulated_ptx = 80;
  device_start(1, "fp32");
#endif
}

// --profile charges each kernel its own time, however many are launched before the CPU waits. In
// the emulator each takes a millisecond.
static void check_profile(void) {
  real *x = (real *)device_alloc(16*512 * sizeof *x), y;
  Matrix m = rows_of(x, 512);
  profiled = profile;
  memset(profile, 0, sizeof profile);
  opt.profile = 1;
  for (int i = 0; i < 2500; i++) fill(x, 1, 0);
  matmul(m, m, transpose(m), 16, 4, 512, SET, NULL);   // in two slices; of interest is its time
  copy_out(&y, x, sizeof y);
  opt.profile = 0;
  double ms = profile->seconds * 1e3 / 2500;
#ifdef EMULATED
  int ok = fabs(ms - 1) < 1e-9;
#else
  int ok = ms > 0 && ms < 1;
#endif
  expect(ok && !strcmp(profile->name, "fill_kernel") && profile->calls == 2500, "--profile",
         "%ld launches of %s of %.3f ms", profile->calls, profile->name, ms);
#ifdef EMULATED
  char share[64];
  snprintf(share, sizeof share, "%s", profile_share(profile));
  expect(!strcmp(share, IS_DOUBLE ? "  50.0 % of the bandwidth" : "  25.0 % of the bandwidth"),
         "--profile", "of fill:%s", share);
  struct Profile bf16 = {"matmul_big_bf16", 1, 1e-3, 1e3, 0};
  expect(!strcmp(profile_share(&bf16), "  24.4 % of the peak"), "--profile", "of bf16:%s",
         profile_share(&bf16));
  expect(!strcmp(profile_share(profile + 1), " 25600.0 % of the peak"), "--profile", "of matmul:%s",
         profile_share(profile + 1));
#endif
}

// launch_recorded() must do what launch() does. Tried: more arguments than it can keep, each
// launched, recorded and replayed; --profile; and a change of `filling`, which is not in the
// argument, after device_alloc().
static real filling;
static void fill_one(void *x) { fill(*(real **)x, 1, filling); }

static real written(real *at) {          // by a recorded launch
  real y = 0;
  copy_in(at, &y, sizeof y);
  launch_recorded(fill_one, &at, sizeof at);
  copy_out(&y, at, sizeof y);
  return y;
}

static void fill_two(void *x) { fill(*(real **)x, 1, 2); }

static void check_recordings(void) {
  enum { N = 20 };
  real *x = (real *)device_alloc(N * sizeof *x), *at = x, two;
  struct { real *at; char more[ARGUMENT_BYTES]; } large = {x, {0}};   // more than can be kept
  int wrong = 0;
  filling = 1;
  for (int i = 0; i < 3*N; i++) wrong += written(x + i % N) != 1;
  expect(!wrong, "recorded launches", "%d of %d did nothing", wrong, 3*N);
#ifdef EMULATED
  expect(graphs.size() == RECORDINGS, "recorded launches", "%zu graphs", graphs.size());
#endif
  device_alloc(1);
#ifdef EMULATED
  expect(graphs.empty(), "recorded launches", "%zu graphs when all are forgotten", graphs.size());
#endif
  launch_recorded(fill_one, &large, sizeof large);
  expect(recordings == 0, "recorded launches", "a large argument is not kept");
  for (int i = 0; i < 3; i++) written(x);
  launch_recorded(fill_two, &at, sizeof at);
  copy_out(&two, x, sizeof two);
  expect(two == 2, "recorded launches", "two functions with the same argument");
  device_alloc(1);
  filling = 3;
  expect(written(x) == 3, "recorded launches", "are forgotten when memory is allocated");
  memset(profile, 0, sizeof profile);
  opt.profile = 1;
  for (int i = 0; i < 3; i++) written(x);
  opt.profile = 0;
  expect(profile->calls == 3, "recorded launches", "under --profile: %ld of 3 are counted",
         profile->calls);
}

#ifdef EMULATED
// Does a call, in a process of its own, end the program with an error message that has these words?
static void check_refusal(const char *what, void (*call)(void), const char *words) {
  char message[1000] = "";
  int ends[2], status = 0;
  fflush(stdout);
  if (pipe(ends)) die("no pipe: %s", strerror(errno));
  pid_t child = fork();
  if (child == 0) {
    dup2(ends[1], 2);
    checking = NULL;
    call();
    _exit(0);
  }
  close(ends[1]);
  for (long n = 0, part; (part = read(ends[0], message + n, sizeof message - 1 - n)) > 0;)
    n += part;
  close(ends[0]);
  waitpid(child, &status, 0);
  expect(WIFEXITED(status) && WEXITSTATUS(status) == 1 && strstr(message, words), what,
         "must be refused: ... %s ...", words);
}

static void check_refusals(void) {
  check_refusal("--precision fp16", [] { device_start(1, "fp16"); }, "expected fp32 or bf16");
  check_refusal("bf16 on an older GPU", [] { emulated_ptx = 75; device_start(1, "bf16"); },
                "needs compute capability 8.0");
  check_refusal("RUNG=4", [] { setenv("RUNG", "4", 1); device_start(1, "fp32"); },
                "expected 1, 2 or 3");
  check_refusal("RUNG=0", [] { setenv("RUNG", "0", 1); device_start(1, "fp32"); },
                "expected 1, 2 or 3");
  check_refusal("no GPU", [] { emulated_devices = 0; device_start(1, "fp32"); }, "no CUDA device");
  check_refusal("65536 blocks in y", [] {
    RUN(LAUNCH(fill_kernel, dim3(1, 1 << 16), THREADS, 0, stream)(scratch, 1, 0));
  }, "fill_kernel did not start");
  check_refusal("a sum of 2^21 terms in bf16", [] {
    round_to(NULL, rows_of(NULL, 1), 1, 32, 1 << 21, 1 << 21);
  }, "lower --batch_size");
  check_refusal("rounded operands of 2^41 bytes", [] {
    device_start(1, "bf16");
    Matrix m = rows_of(NULL, 1);
    matmul(m, m, m, 1 << 20, 1, 1 << 20, SET, NULL);
  }, "no GPU memory for 2199");
  check_refusal("RUNG=2 in bf16", [] { setenv("RUNG", "2", 1); device_start(1, "bf16"); },
                "expected 1, 2 or 3");
  check_refusal("an array of 4e18 bytes", [] { device_alloc((size_t)1 << 62); }, "no GPU memory");
  check_refusal("a copy to memory of the CPU", [] { char x = 0; copy_in(&x, "1", 1); },
                "cudaMemcpyAsync");
  check_refusal("a matrix of 2^30 rows", [] {
    Matrix m = rows_of(NULL, 1);
    matmul(m, m, m, 1 << 30, 1, 1, SET, NULL);
  }, "lower --batch_size");
  check_refusal("attention of 2^30 rows", [] {
    Tensor none = {NULL, NULL};
    attention_backward(none, none, none, 1 << 10, 1 << 20, 1, 1);
  }, "lower --batch_size");
}
#endif
#endif

// ---- 4. Single-step and multi-step ------------------------------------------------------------
// K micro-batches forward and backward, then one update; or an update after each. What is
// arithmetic is checked; what is a matter of experience is shown.

enum { PIECES = 4, PIECE_B = 2, PIECE_T = 7, UPDATES = 3 };

// The change of the weights since reset(). Softmax does not change when all scores of a query
// change alike, so the gradient of the bias of the keys is zero. Rounding leaves noise there, and
// optimizers that divide by the size of the gradient make steps of the noise: these are left out.
static double *change_of(const Model *m) {
  double *change = fetch(m->weights.data, m->n_weights), *first = random_weights(m);
  for (long i = 0; i < m->n_weights; i++) change[i] -= first[i];
  for (Entry *e = m->parameter; e < m->parameter + m->n_parameter_tensors; e++)
    for (int c = e->rows / 3; strstr(e->name, "c_attn.bias") && c < e->rows / 3 * 2; c++)
      change[e->data_at + c] = 0;
  return change;
}

// n updates by update() of train.c, each from K micro-batches of B sequences. Window number i
// depends on the seed and i alone: so K micro-batches of B, one of K*B, and one of B in each of K
// updates read the same tokens. Fills a row for each update; returns the change of the weights.
typedef struct { double loss, norm, change; } UpdateRow;
static double *run_updates(Trainer *t, int optimizer, double rate, int n, int K, int B,
                           UpdateRow *row) {
  Model *m = &t->model;
  double *before = random_weights(m);
  reset(t);
  opt.optimizer = optimizers[optimizer].name;
  opt.learning_rate = opt.min_lr = rate;
  opt.batch_size = B;
  t->accumulate = K;
  for (int u = 0; u < n; u++) {
    update(t);
    double *now = fetch(m->weights.data, m->n_weights);
    row[u].loss = t->loss;
    row[u].norm = t->grad_norm;
    row[u].change = distance(now, before, m->n_weights) * norm_of(before, m->n_weights);
    before = now;
  }
  return change_of(m);
}

// After an update its gradient is still there. It must be that of the same micro-batches, alone, at
// the weights before the update: nothing left from earlier updates, no micro-batch twice. The same
// holds of loss, accuracy and norm.
static void check_next_gradient(Trainer *t) {
  Model *m = &t->model;
  MicroBatch batch = {m, opt.batch_size, opt.config.block_size, 0};
  double tokens = t->accumulate * batch.B * batch.T;
  LossSums sums = {0, 0, 0};
  batch.dloss = 1 / tokens;
  copy_in(m->sums, &sums, sizeof sums);
  launch(zero_gradients, m);
  for (int k = 0; k < t->accumulate; k++) {
    load_micro_batch(m, t->updates * t->accumulate + k);
    launch(run_micro_batch, &batch);
    fetch(m->loss.data, 1);              // waits for the device: update() must not need that
  }
  copy_out(&sums, m->sums, sizeof sums);
  double *want = fetch(m->weights.grad, m->n_weights);
  update(t);
  double *got = fetch(m->weights.grad, m->n_weights);
  double error[] = {distance(got, want, m->n_weights), t->loss * tokens / sums.loss - 1,
                    t->accuracy * tokens / sums.correct - 1,
                    t->grad_norm / norm_of(want, m->n_weights) - 1}, apart = 0;
  for (int i = 0; i < 4; i++) apart = larger(apart, fabs(error[i]));
  expect(apart < (IS_DOUBLE ? 1e-14 : 1e-6), "the next update",
         "gradient, loss, accuracy, norm: %.1e from those of its micro-batches alone", apart);
}

static void check_accumulation(Trainer *t) {
  printf("\nSingle-step and multi-step. a: %d micro-batches of %d x %d tokens, or one of %d x %d.\n"
         "How far apart are the changes of the weights, and loss and norm, after %d updates?\n",
         PIECES, PIECE_B, PIECE_T, PIECES * PIECE_B, PIECE_T, UPDATES);
  set_options(PIECE_T, 0.1, 1);
  for (int i = 0; i < N_OPTIMIZERS; i++) {
    const long tokens = UPDATES * PIECES * PIECE_B * PIECE_T, n = t->model.n_weights;
    double rate = optimizers[i].learning_rate, bar = IS_DOUBLE ? 1e-12 : 4e-6;
    UpdateRow a[UPDATES], b[UPDATES], *x = &a[UPDATES - 1], *y = &b[UPDATES - 1];
    double *pieces = run_updates(t, i, rate, UPDATES, PIECES, PIECE_B, a);
    int counted = t->tokens == tokens && t->updates == UPDATES;
    double *batch = run_updates(t, i, rate, UPDATES, 1, PIECES * PIECE_B, b);
    counted &= t->tokens == tokens && t->updates == UPDATES;
    double apart = distance(pieces, batch, n);
    double sums = larger(fabs(x->loss / y->loss - 1), fabs(x->norm / y->norm - 1));
    if (!expect(apart < bar && sums < bar && counted, opt.optimizer, "%.1e, %.1e", apart, sums))
      printf("    look at update() and dloss in it. Is loss or norm off by the number of\n"
             "    micro-batches, or its square? Then it is not divided by the update's tokens\n");
  }
  opt.batch_size = PIECE_B;
  t->accumulate = 12;                    // more copies to a GPU than can be on their way at once
  check_next_gradient(t);
}

// ---- What stands around an update: initial weights, data, evaluation, learning rate

static void check_initial_weights(void) {
  static const struct { const char *name; double mean, std; } table[] = {   // GPT-2, 2 layers
    {".bias", 0, 0}, {"ln_", 1, 0}, {"c_proj.weight", 0, 0.01}, {".weight", 0, 0.02}};
  const Config config = {2, 2, 64, 32, 100};
  Trainer *t = new_trainer(config, 0);
  Model *m = &t->model;
  const char *wrong = NULL;
  model_init(m, 1337);
  for (Entry *e = m->parameter; e < m->parameter + m->n_parameter_tensors; e++) {
    long n = entry_count(e);
    double *w = fetch(e->tensor->data, n), mean = 0, variance = 0, neighbours = 0;
    int k = 0;
    while (!strstr(e->name, table[k].name)) k++;
    for (long i = 0; i < n; i++) mean += w[i] / n;
    for (long i = 0; i < n; i++) variance += (w[i] - mean) * (w[i] - mean) / n;
    // the mean of x y^2 is 0 if the neighbours x and y are independent; not if one is made of the
    // other's random bits
    for (long i = 1; i < n; i++) neighbours += (w[i - 1] - mean) * pow(w[i] - mean, 2) / n;
    double std = table[k].std, slack = 5 / sqrt((double)n);   // 5 standard errors
    if (!(fabs(mean - table[k].mean) <= slack * std + 1e-7
          && fabs(sqrt(variance) - std) <= slack * std
          && fabs(neighbours) <= slack * sqrt(3.0) * pow(std, 3) + 1e-20)) wrong = e->name;
  }
  double wte = *fetch(m->wte.data, 1), wpe = *fetch(m->wpe.data, 1);
  double flop = 6 * 10 * (100*64 + 2*12*64*64 + 7*64*2);   // for 10 tokens, T 7
  model_init(m, 1338);
  double next = *fetch(m->wte.data, 1);
  expect(next != wte && next != wpe, "initial weights", "of the next seed are others");
  expect(model_flop(m, 10, 7) == flop, "floating-point operations", "%.0f", model_flop(m, 10, 7));
  expect(!wrong, "initial weights", wrong ? "%s: wrong mean, standard deviation or independence"
         : "mean and standard deviation as in GPT-2%s", wrong ? wrong : "");
}

// Windows of a text in which byte i is i: so a token says where it stands.
static void check_micro_batches(Trainer *t) {
  enum { SIZE = 200, TRAIN = 100, BATCHES = 300, B = 4, T = PIECE_T };
  static unsigned char count[SIZE];
  int first = SIZE, last = 0, changed = 0, token[B*T], target[B*T], ok = 1;
  for (int i = 0; i < SIZE; i++) count[i] = (unsigned char)i;
  text.byte = count; text.size = SIZE; text.train_size = TRAIN;
  opt.batch_size = B;
  for (int k = 0, before = 0; k < BATCHES; k++) {
    load_micro_batch(&t->model, k);
    copy_out(token, t->model.token, sizeof token);
    copy_out(target, t->model.target, sizeof target);
    for (int n = 0; n < B*T; n++)
      ok &= token[n] == token[n / T * T] + n % T && target[n] == token[n] + 1;
    for (int n = 0; n < B*T; n += T) first = MIN(first, token[n]), last = MAX(last, token[n]);
    changed += token[0] != before;
    before = token[0];
  }
  opt.seed++;
  load_micro_batch(&t->model, BATCHES - 1);
  copy_out(target, t->model.token, sizeof target);
  opt.seed--;
  expect(memcmp(token, target, sizeof token), "windows of the text", "of the next seed are others");
  expect(ok, "a micro-batch", "consecutive tokens, each with the next as its target");
  expect(first == 0 && last == TRAIN - T - 1 && changed > BATCHES / 2, "windows of the text",
         "begin at %d to %d of %d", first, last, TRAIN);
}

// evaluate() beside the losses of its windows, one by one; it needs two micro-batches for them.
static void check_evaluate(Trainer *t) {
  enum { BEGIN = 3, WINDOWS = 16, T = PIECE_T };
  Model *m = &t->model;
  LossSums sums = {0, 0, 0};
  reset(t);
  text.byte = (unsigned char *)poem();
  copy_in(m->sums, &sums, sizeof sums);
  for (int w = 0; w < WINDOWS; w++) {
    Piece window = {1, T, BEGIN + w*T};
    run_piece(m, window, 0);
  }
  copy_out(&sums, m->sums, sizeof sums);
  long end = BEGIN + WINDOWS*T + 1;      // the last target is byte end - 1
  double worst = 0, correct = sums.correct / (WINDOWS*T), loss = sums.loss / (WINDOWS*T);
  for (int more = 0; more < T; more += T - 1) {
    Evaluation e = evaluate(m, BEGIN, end + more);
    worst = larger(worst, larger(fabs(e.loss / loss - 1), fabs(e.accuracy - correct)));
  }
  expect(worst < (IS_DOUBLE ? 1e-14 : 1e-6), "evaluate", "%.1e from its windows one by one", worst);
  Evaluation fewer = evaluate(m, BEGIN, end - 1);
  expect(fabs(fewer.loss / loss - 1) > 1e-6, "evaluate", "leaves out a window that is not full");
}

static void check_learning_rate(Trainer *t) {
  static const struct { int trainers, accumulate, updates; double rate; } table[] = {
    {1, 1, 0, 0.2}, {1, 1, 3, 0.8}, {1, 1, 4, 1}, {1, 1, 8, 0.55}, {1, 1, 12, 0.1}, {1, 1, 99, 0.1},
    {1, 4, 1, 0.4}, {1, 4, 12, 0.1},                    // --accumulate counts updates,
    {2, 4, 0, 0.2}, {2, 4, 1, 1}, {2, 4, 2, 0.55}, {2, 4, 3, 0.1}};   // --compare micro-batches
  int before = n_trainers;
  double worst = 0;
  opt.learning_rate = 1; opt.min_lr = 0.1; opt.warmup = 4; opt.max_steps = 12;
  for (size_t i = 0; i < sizeof table / sizeof *table; i++) {
    n_trainers = table[i].trainers;
    t->accumulate = table[i].accumulate;
    t->updates = table[i].updates;
    worst = larger(worst, fabs(learning_rate(t) - table[i].rate));
  }
  n_trainers = before;
  t->updates = 8;
  opt.learning_rate = 0.05;              // below min_lr: constant
  worst = larger(worst, fabs(learning_rate(t) - 0.05));
  expect(worst < 1e-12, "learning rate", "warmup, cosine, end: %.1e from a table", worst);
  t->updates = 2; t->first_update = 1;   // as after --resume
  opt.beta1 = 0.5; opt.beta2 = 0.9999;
  OptimizerConfig o = optimizer_config(t);
  expect(fabs(o.m_correction * 7/8 - 1) < 1e-6 && fabs(o.v_correction * 2.9997000100e-4 - 1) < 1e-6,
         "bias correction of the third update", "1 / (1 - beta^3), beta 0.5 and 0.9999");
  expect(fabs(o.learning_rate - 0.03) < 1e-6, "its learning rate", "%.4f", o.learning_rate);
  expect(clip_factor(4, 1) == (real)0.5 && clip_factor(4, 3) == 1 && clip_factor(4, 0) == 1,
         "clip_factor", "reduces the norm 2 to 1; to 3 or 0, does nothing");
}

static void check_decode(void) {
  static const struct { const char *dtype; uint16_t bits; double x; } table[] = {
    {"F16", 0x0001, 0x1p-24}, {"F16", 0x83ff, -1023 * 0x1p-24}, {"F16", 0x0400, 0x1p-14},
    {"F16", 0x3555, 0x1.554p-2}, {"F16", 0xfbff, -65504}, {"F16", 0x7c00, INFINITY},
    {"BF16", 0x0001, 0x1p-133}, {"BF16", 0xc049, -3.140625}};
  int ok = 1;
  for (int i = 0; i < 8; i++)
    ok &= decode(table[i].dtype, (const char *)&table[i].bits) == table[i].x;
  expect(ok, "numbers in F16 and BF16", "tiny, usual, huge");
}

// ---- b. Wrong recipes

enum Recipe {   // how micro-batches become an update; but for the first two, mistakes people made
  SUM_OF_TOKENS, ONE_BY_ONE, MEAN_OF_MEANS, NOT_DIVIDED, NOT_ZEROED, CLIP_EACH, COUNT_EACH,
  N_RECIPES
};

// Adds the gradients of the four micro-batches of update u.
static void accumulate(Model *m, const Piece *piece, enum Recipe recipe, int u) {
  double tokens = 0, dloss[4];
  for (int k = 0; k < 4; k++) tokens += piece[k].B * piece[k].T;
  for (int k = 0; k < 4; k++) {
    double own = piece[k].B * piece[k].T;
    dloss[k] = recipe == MEAN_OF_MEANS ? 1 / (own * 4) : recipe == NOT_DIVIDED ? 1 / own
                                                                               : 1 / tokens;
    if (recipe != CLIP_EACH) continue;
    launch(zero_gradients, m);
    run_piece(m, piece[k], dloss[k]);
    double norm = norm_of(fetch(m->weights.grad, m->n_weights), m->n_weights);
    dloss[k] *= MIN(1, opt.grad_clip / 4 / norm);
  }
  if (recipe != NOT_ZEROED || u == 0) launch(zero_gradients, m);
  for (int k = 0; k < 4; k++) {
    Piece p = piece[k];
    if (recipe == ONE_BY_ONE) p.B = 1;
    for (int b = 0; b < piece[k].B; b += p.B, p.at += p.B * p.T) run_piece(m, p, dloss[k]);
  }
}

// The change of the weights over 2 updates from 4 unequal pieces each.
static double *unequal_pieces(Trainer *t, enum Recipe recipe, int optimizer) {
  static const Piece pieces[2][4] = {{{5, 7, 0}, {1, 7, 35}, {2, 3, 42}, {1, 2, 48}},
                                     {{3, 7, 50}, {1, 2, 71}, {1, 7, 73}, {4, 3, 80}}};
  reset(t);
  for (int u = 0; u < 2; u++) {
    accumulate(&t->model, pieces[u], recipe, u);
    t->updates = recipe == COUNT_EACH ? (u + 1)*4 - 1 : u;   // optimizer_config() adds 1
    apply(t, optimizer, optimizers[optimizer].learning_rate);
  }
  return change_of(&t->model);
}

static void check_recipes(Trainer *t) {
  static const char *const what[N_RECIPES] = {
    "", "right: all 18 sequences one by one", "mean of the micro-batches' means",
    "means added, not divided by their number", "gradients not zeroed after the first update",
    "each micro-batch clipped, not the sum", "Adam's update counted per micro-batch"};
  printf("\nb: wrong recipes. 2 updates, each of 4 unequal micro-batches (5x7, 1x7, 2x3, ...):\n"
         "how far is the change of the weights from the right one, and at what angle?\n"
         "%-46s %-8s %-10s %-8s %s\n", "", "SGD", "angle", "AdamW", "angle");
  for (int recipe = ONE_BY_ONE; recipe < N_RECIPES; recipe++) {
    double off[2], turned[2];
    set_options(PIECE_T, 0, recipe == CLIP_EACH ? 0.5 : 0);
    for (int i = 0; i < 2; i++) {
      double *x = unequal_pieces(t, (enum Recipe)recipe, i ? adamw : sgd);
      double *y = unequal_pieces(t, SUM_OF_TOKENS, i ? adamw : sgd);
      off[i] = distance(x, y, t->model.n_weights);
      turned[i] = angle(x, y, t->model.n_weights);
    }
    double worst = larger(off[0], off[1]);
    int right = recipe == ONE_BY_ONE, ok = right ? worst < 1e-12 : worst > 0.01;
    printf("%-46s %-8.1e %5.1f deg  %-8.1e %5.1f deg  %s\n", what[recipe], off[0], turned[0],
           off[1], turned[1], ok ? right ? "ok" : "wrong, as it should be" : "FAIL");
    count_verdict(ok, "recipe", what[recipe]);
  }
}

// ---- c. Step by step, and d. the ladder

// PIECES single steps, and one accumulated step with PIECES times the rate.
typedef struct {
  UpdateRow single[PIECES], multi;
  double single_change, multi_change, difference, angle;   // in total
} SideBySide;

static SideBySide side_by_side(Trainer *t, int optimizer, double rate) {
  SideBySide s;
  long n = t->model.n_weights;
  double *x = run_updates(t, optimizer, rate, PIECES, 1, PIECE_B, s.single);
  double *y = run_updates(t, optimizer, rate * PIECES, 1, PIECES, PIECE_B, &s.multi);
  s.single_change = norm_of(x, n);
  s.multi_change = norm_of(y, n);
  s.difference = distance(x, y, n) * s.multi_change;
  s.angle = angle(x, y, n);
  return s;
}

static void show_steps(Trainer *t, int optimizer) {
  double rate = optimizers[optimizer].learning_rate;
  UpdateRow start[PIECES];
  SideBySide s = side_by_side(t, optimizer, rate);
  run_updates(t, optimizer, 0, PIECES, 1, PIECE_B, start);   // each at the weights of the start
  printf("%s: learning rate %-8g          | learning rate %g x %d\n", optimizers[optimizer].name,
         rate, rate, PIECES);
  printf("  micro-batch   loss  |gradient|  |change|  |   loss  |gradient|  |change|\n");
  for (int k = 0; k < PIECES; k++)
    printf("  %-11d %6.3f  %10.4f  %8.4f  | %6.3f  %10.4f\n", k + 1, s.single[k].loss,
           s.single[k].norm, s.single[k].change, start[k].loss, start[k].norm);
  printf("  in total                        %8.4f  |         %10.4f  %8.4f, %.1f degrees apart\n",
         s.single_change, s.multi.norm, s.multi_change, s.angle);
}

static void show_all_steps(Trainer *t) {
  printf("\nc: step by step. Left: %d updates, one after each micro-batch; right: their gradients\n"
         "at the weights of the start, and one update from the mean, with %d times the rate.\n",
         PIECES, PIECES);
  set_options(PIECE_T, 0, 0);
  show_steps(t, sgd);
  show_steps(t, adamw);
  printf("every optimizer: |change| of %d steps, of one, and the angle between them\n", PIECES);
  for (int i = 0; i < N_OPTIMIZERS; i++) {
    SideBySide s = side_by_side(t, i, optimizers[i].learning_rate);
    printf("  %-10s rate %-5g %9.4f %9.4f %6.1f degrees\n", optimizers[i].name,
           optimizers[i].learning_rate, s.single_change, s.multi_change, s.angle);
  }
}

// K steps of SGD move by rate (g_1 + ... + g_K), each g at another place; one step by the same sum
// with each g at the start. From step to step a g changes by rate times something: so the moves
// differ by rate^2 times something, and agree in the limit.
static void check_ladder(Trainer *t) {
  printf("\nd: the ladder. %d steps of SGD against one of %d times the rate: when the rate falls\n"
         "by 10, so does the change, and the difference falls by 100\n"
         "  rate     |change|    |difference|  order\n", PIECES, PIECES);
  double last = NAN, order = NAN, rate = 0.1;
  for (int i = 0; i < 5; i++, rate /= 10) {
    SideBySide s = side_by_side(t, sgd, rate);
    order = log10(last / s.difference);
    printf("  %-8.0e %.3e   %.3e     ", rate, s.multi_change, s.difference);
    printf(i ? "%.3f\n" : "\n", order);
    last = s.difference;
  }
  expect(fabs(order - 2) < 0.01, "order of convergence", "%.4f, expected 2", order);
}

// ---- Threads
// A sum in another order is rounded differently, and a number that two threads write has either
// value: so both show as different bits on another number of threads (the second not every time).

// More than a tile of attention; and a number of channels that no number of threads divides.
static const Config TWO_TILES = {1, 7, 77, 72, LETTERS};

static void long_updates(Trainer *t) {
  UpdateRow row[2];
  set_options(70, 0.1, 1);
  run_updates(t, adamw, 0.01, 2, 2, 1, row);
}

static void check_threads(void) {   // the last check, since threads can only be added
  Trainer *t = new_trainer(TWO_TILES, 0);
  Model *m = &t->model;
  double *w[2], *g[2];                   // on one thread, and on more
  printf("\nThreads: weights and gradients after 2 updates, bit for bit those of one thread?\n");
  for (int i = 0; i < 5; i++) {
    static const int threads[] = {1, 2, 3, 4, 7};   // 4: 2 x 2 parts of a matmul
    char name[32];
    snprintf(name, sizeof name, "on %d threads", threads[i]);
    device_start(threads[i], "fp32");
    long_updates(t);
    w[i > 0] = fetch(m->weights.data, m->n_weights);
    g[i > 0] = fetch(m->weights.grad, m->n_weights);
    if (i == 0) continue;
    const char *gradient = first_difference(m, g[0], g[1]);
    const char *weight = first_difference(m, w[0], w[1]);
    expect(!gradient && !weight, name, gradient ? "the gradient of %s differs" : weight
           ? "%s differs, but no gradient" : "yes%s", gradient ? gradient : weight ? weight : "");
  }
}

// ---- 5. A model small enough to solve by hand -------------------------------------------------
// price = weight area + bias, with mean squared error. The loss is quadratic: its gradient is
// linear in the parameters, its matrix H of second derivatives is constant, and one Newton step,
//   (weight, bias) -= H^-1 gradient,
// goes from anywhere to the minimum. H is measured with gradients: moving a parameter by 1 changes
// the gradient by a column of H, exactly.

enum { HOUSES = 8 };
// In 100 m^2, and in 100 000 of some currency
static const double AREA[HOUSES] = {0.5, 1.4, 0.8, 1.9, 1.6, 0.7, 1.1, 1.0};
static const double PRICE[HOUSES] = {1.32, 3.29, 2.05, 4.41, 3.88, 1.71, 2.76, 2.38};

// The sum of (p[0] AREA + p[1] - PRICE)^2 / total over n houses; adds its gradient, if grad is not
// NULL.
static double houses(const double *p, int first, int n, double total, double *grad) {
  double loss = 0;
  for (int i = first; i < first + n; i++) {
    double error = p[0] * AREA[i] + p[1] - PRICE[i];
    loss += error * error / total;
    if (grad) grad[0] += 2 * error * AREA[i] / total;
    if (grad) grad[1] += 2 * error / total;
  }
  return loss;
}

typedef struct { double p[2], loss; long updates; } Solution;

// Updates after each `per_update` houses, until the loss is within 1e-6 of the least.
static Solution descend(int per_update, double rate, double least) {
  Solution s = {{0, 0}, 1e9, 0};
  while (s.updates < 20000 && s.loss >= least + 1e-6) {   // false for NaN
    for (int first = 0; first < HOUSES; first += per_update, s.updates++) {
      double grad[2] = {0, 0};
      houses(s.p, first, per_update, per_update, grad);
      s.p[0] -= rate * grad[0]; s.p[1] -= rate * grad[1];
    }
    s.loss = houses(s.p, 0, HOUSES, HOUSES, NULL);
  }
  return s;
}

static Solution newton_step(void) {
  Solution s = {{0, 0}, 0, 1};
  double g[2] = {0, 0}, x[2] = {0, 0}, y[2] = {0, 0}, move_x[2] = {1, 0}, move_y[2] = {0, 1};
  houses(s.p, 0, HOUSES, HOUSES, g);
  houses(move_x, 0, HOUSES, HOUSES, x);
  houses(move_y, 0, HOUSES, HOUSES, y);
  for (int j = 0; j < 2; j++) x[j] -= g[j], y[j] -= g[j];   // the columns of H
  double det = x[0] * y[1] - x[1] * y[0];
  s.p[0] -= (y[1] * g[0] - y[0] * g[1]) / det;
  s.p[1] -= (x[0] * g[1] - x[1] * g[0]) / det;
  s.loss = houses(s.p, 0, HOUSES, HOUSES, NULL);
  return s;
}

// For the Transformer: how much more its gradient changes when its weights move twice as far along
// a line. In a quadratic that is 2, at any distance.
static double twice_as_far(Trainer *t, double distance_moved) {
  Model *m = &t->model;
  double *g[3], *w = random_weights(m);
  for (int k = 0; k < 3; k++) {
    for (long i = 0; k && i < m->n_weights; i++)
      w[i] -= distance_moved * g[0][i] / norm_of(g[0], m->n_weights);
    put(m->weights.data, w, m->n_weights);
    launch(zero_gradients, m);
    run_piece(m, PIECE, 1.0 / (PIECE.B * PIECE.T));
    g[k] = fetch(m->weights.grad, m->n_weights);
  }
  return distance(g[2], g[0], m->n_weights) / distance(g[1], g[0], m->n_weights);
}

static void check_regression(Trainer *t) {
  double sx = 0, sy = 0, sxx = 0, sxy = 0, n = HOUSES;
  for (int i = 0; i < HOUSES; i++)
    sx += AREA[i], sy += PRICE[i], sxx += AREA[i] * AREA[i], sxy += AREA[i] * PRICE[i];
  double weight = (n * sxy - sx * sy) / (n * sxx - sx * sx);   // the normal equations
  double book[2] = {weight, (sy - weight * sx) / n}, least = houses(book, 0, HOUSES, HOUSES, NULL);
  printf("\nA model small enough to solve by hand: price = weight area + bias, %d houses, until\n"
         "the loss is within 1e-6 of the least\n  %-44s %8s %8s  %-10s %8s %7s\n", HOUSES, "",
         "weight", "bias", "loss", "updates", "passes");
  const struct { const char *name; double passes_per_update; Solution s; } all[] = {
    {"an update per house, rate 0.008", 1.0 / HOUSES, descend(1, 0.008, least)},
    {"4 houses accumulated, one update, rate 0.01", 4.0 / HOUSES, descend(4, 0.01, least)},
    {"full batch, rate 0.3", 1, descend(HOUSES, 0.3, least)},
    {"one-shot: a Newton step", 3, newton_step()},
    {"the normal equations", 1, {{book[0], book[1]}, least, 1}}};
  double worst = 0;
  for (int i = 0; i < 5; i++) {
    Solution s = all[i].s;
    printf("  %-44s %8.4f %8.4f  %.8f %8ld %7g\n", all[i].name, s.p[0], s.p[1], s.loss, s.updates,
           s.updates * all[i].passes_per_update);
    worst = larger(worst, s.loss - least);
  }
  expect(worst < 1e-6, "all four meet", "loss within %.1e of the least", worst);
  double off = hypot(all[3].s.p[0] - book[0], all[3].s.p[1] - book[1]);
  expect(off < 1e-12, "one Newton step is the answer", "%.1e from the normal equations", off);
  double near = twice_as_far(t, 1e-4), far = twice_as_far(t, 1);
  printf("No such step exists for the Transformer: with softmax, GELU and products of weights its\n"
         "loss is not quadratic, and what Newton's step relies on holds only nearby. When the\n"
         "weights of a quadratic move twice as far, its gradient changes by twice as much, at any\n"
         "distance; the Transformer's, for 1e-4 and 2e-4, by %.4f times; for 1 and 2 by %.4f.\n",
         near, far);
  expect(fabs(near - 2) < 0.01 && fabs(far - 2) > 0.05, "the Transformer's loss is not quadratic",
         "%.4f is not 2", far);
}

// ---- 6. Somebody else's numbers ---------------------------------------------------------------
// --save writes one training step of the tiny model: tokens and targets (B,T) as numbers; every
// parameter under its name in Hugging Face's GPT-2; every activation (N,..) under the name that
// layout() gives it, `loss` being that of each token, and lse in the order (B,H,T); grad.NAME of
// the mean loss for all of them; and updated.NAME, each parameter after SGD with rate 0.1. Any
// program can start from the same tokens and parameters and write what it found under these names,
// as safetensors; --against compares what is there, in the order in which it is computed.

static struct { const char *save, *against, *shape; int partial, sign; } asked;
static Config saved_config = {2, 3, 12, 8, LETTERS};
static Piece saved_piece = {3, 7, 5};
static NamedTensor *saved;
static int n_saved;

static void read_shape(void) {   // --shape L,H,C,T,V,B
  static const int least[6] = {1, 1, 1, 1, LETTERS, 1};
  static const int most[6] = {48, 4096, 4096, MAX_TOKENS, 256, MAX_TOKENS};
  int x[6], n = 0;
  if (!asked.shape) return;
  int ok = sscanf(asked.shape, "%d,%d,%d,%d,%d,%d%n", &x[0], &x[1], &x[2], &x[3], &x[4], &x[5],
                  &n) == 6 && !asked.shape[n];
  for (int i = 0; i < 6 && ok; i++) ok = x[i] >= least[i] && x[i] <= most[i];
  if (!ok || x[3] * x[5] > MAX_TOKENS || x[2] % x[1])
    die("--shape %s: expected L,H,C,T,V,B, like 2,3,12,7,29,3, with H dividing C, V from %d to 256 "
        "and T*B up to %d", asked.shape, LETTERS, MAX_TOKENS);
  Config config = {x[0], x[1], x[2], x[3], x[4]};
  Piece piece = {x[5], x[3], 0};
  saved_config = config;
  saved_piece = piece;
}

static void add_saved(const char *prefix, const char *name, int rows, int cols, const real *data) {
  NamedTensor x = {prefix, name, rows, cols, data};
  if (!data) return;
  saved = (NamedTensor *)host_alloc(saved, (n_saved + 1) * sizeof x);
  saved[n_saved++] = x;
}

static void add_tokens(const char *name, const int *device) {
  int token[MAX_TOKENS], N = saved_piece.B * saved_piece.T;
  double numbers[MAX_TOKENS];
  copy_out(token, device, N * sizeof(int));
  for (int n = 0; n < N; n++) numbers[n] = token[n];
  add_saved("", name, saved_piece.B, saved_piece.T, on_device(numbers, N));
}

static void add_activations(const Model *m, int grad) {
  int n = m->n_activation_tensors, N = saved_piece.B * saved_piece.T;
  for (int i = 0; i < n; i++) {
    Entry *e = &m->activation[grad ? n - 1 - i : i];
    add_saved(grad ? "grad." : "", e->name, N, e->cols, grad ? e->tensor->grad : e->tensor->data);
  }
}

// All tensors, in the order in which they are computed. Returns the model of the step.
static Model *make_saved(void) {
  Trainer *t = new_trainer(saved_config, 1);
  Model *m = &t->model;
  reset(t);
  run_piece(m, saved_piece, 1.0 / (saved_piece.B * saved_piece.T));
  add_tokens("tokens", m->token);
  add_tokens("targets", m->target);
  for (Entry *e = m->parameter; e < m->parameter + m->n_parameter_tensors; e++)
    add_saved("", e->name, e->rows, e->cols, e->tensor->data);
  add_activations(m, 0);
  add_activations(m, 1);
  for (Entry *e = m->parameter + m->n_parameter_tensors - 1; e >= m->parameter; e--)
    add_saved("grad.", e->name, e->rows, e->cols, e->tensor->grad);
  for (Entry *e = m->parameter; e < m->parameter + m->n_parameter_tensors; e++) {
    long n = entry_count(e);
    double *w = fetch(e->tensor->data, n), *grad = fetch(e->tensor->grad, n);
    for (long i = 0; i < n; i++) w[i] -= 0.1 * grad[i];
    add_saved("updated.", e->name, e->rows, e->cols, on_device(w, n));
  }
  return m;
}

// ---- Reading theirs

static int known_name(const char *name) {
  for (const NamedTensor *x = saved; x < saved + n_saved; x++) {
    size_t n = strlen(x->prefix);
    if (!strncmp(name, x->prefix, n) && !strcmp(name + n, x->name)) return 1;
  }
  return 0;
}

// Names in the header of their file that are none of ours. Returns how many; shows the first five.
static int unknown_names(const char *s) {
  int unknown = 0;
  char name[256];
  while ((s = strchr(s, '"'))) {
    size_t n = strcspn(++s, "\"");
    snprintf(name, sizeof name, "%.*s", (int)MIN(255, n), s);
    s += n + (s[n] != 0);                // behind the quote that closes it
    const char *value = s + strspn(s, JSON_SPACE);
    if (*value == ':') value += 1 + strspn(value + 1, JSON_SPACE);
    if (*value != '{' || !strcmp(name, "__metadata__") || known_name(name)) continue;
    for (char *c = name; *c; c++)
      if ((unsigned char)*c < 32 || *c == 127) *c = '?';
    if (unknown++ < 5) printf("%s is none of the names that --save writes\n", name);
  }
  return unknown;
}

static double bar_for(const char *dtype) {   // what rounding to this precision excuses
  if (!IS_DOUBLE || !strcmp(dtype, "F32")) return 1e-4;
  if (!strcmp(dtype, "F16")) return 0.02;
  if (!strcmp(dtype, "BF16")) return 0.1;
  return !strcmp(dtype, "F64") ? BAR : 1e-4;
}

// wte is used twice: is one of the two contributions to its gradient missing?
static void say_tied(const Model *m, const double *got, const double *want, double bar) {
  int token[MAX_TOKENS], C = m->config.n_embd, N = saved_piece.B * saved_piece.T;
  long n = entry_count(&m->parameter[0]);
  double *head = new_doubles(n), *embedding = new_doubles(n), *dx = fetch(m->embedding.grad, N*C);
  copy_out(token, m->token, N * sizeof(int));
  for (int i = 0; i < N*C; i++) embedding[token[i / C]*C + i % C] += dx[i];
  for (long i = 0; i < n; i++) head[i] = want[i] - embedding[i];
  for (int i = 0; i < 2; i++)
    if (distance(got, i ? embedding : head, n) < bar)
      printf("    it is the %s's contribution alone: the %s's is missing; wte is tied\n",
             i ? "embedding" : "head", i ? "head" : "embedding");
}

// Compares a tensor of ours with theirs; returns 0 if they have none of this name.
static int check_stored(Model *m, const Safetensors *st, const NamedTensor *x, const char *name) {
  Shape shape = {saved_piece.B, saved_piece.T, saved_config.n_embd, saved_config.n_head,
                 saved_config.vocab_size, 0};
  StoredTensor stored;
  long n = (long)x->rows * MAX(1, x->cols), their_n = 1;
  if (!find_tensor(st, x->prefix, x->name, &stored)) return 0;
  for (int d = 0; d < stored.dims; d++) their_n *= stored.shape[d];   // cannot overflow: the bytes
  if (their_n != n) {                                                 // have been counted
    expect(0, name, "has %ld numbers, expected %ld", their_n, n);
  } else if (*stored.dtype != 'F' && *stored.dtype != 'B') {
    expect(0, name, "is %s: save it as float64", stored.dtype);
  } else {
    double *got = new_doubles(n), *want = fetch(x->data, n);
    real *numbers = (real *)host_alloc(NULL, n * sizeof(real));
    read_numbers(&stored, numbers, n);
    for (long i = 0; i < n; i++) got[i] = numbers[i];
    Comparison row = {name, stored.dtype, x->rows, MAX(1, x->cols), got, want, NULL, &shape,
                      bar_for(stored.dtype), NULL, NULL};
    if (!(compare(row) <= row.bar) && failed == 1 && !strcmp(name, "grad.wte.weight"))
      say_tied(m, got, want, row.bar);
  }
  return 1;
}

static void check_against(const char *path) {
  Safetensors *st = safetensors_open(NULL, path, NULL);
  int known = 0;
  char right[80] = "", wrong[80] = "", name[80];
  Model *m = make_saved();
  heading("theirs", "here");
  for (NamedTensor *x = saved; x < saved + n_saved; x++) {
    snprintf(name, sizeof name, "%s%s", x->prefix, x->name);
    if (!check_stored(m, st, x, name)) continue;
    known++;
    if (!failed) strcpy(right, name);
    if (!failed || *wrong) continue;
    strcpy(wrong, name);
    shown_rows = NO_ROWS;                // what follows from the first is only counted
  }
  int unknown = unknown_names(st->header);
  printf("%d of the %d tensors that --save writes were compared; %d of theirs match none\n", known,
         n_saved, unknown);
  if (*wrong) {
    printf("%d wrong. ", failed);
    localise(right, wrong, strncmp(wrong, "grad.", 5) ? "" : suspects(wrong));
  }
  if (unknown && !asked.partial)
    expect(0, path, "has tensors that were not compared (%d): rename them, or give --partial",
           unknown);
  if (!known) expect(0, path, "has no tensor under a name that --save uses");
}

// ---- 7. Main ----------------------------------------------------------------------------------

static Option test_options[] = {
  WORD(asked, save, NULL, 0, "write a training step of a tiny model as safetensors"),
  WORD(asked, against, NULL, 0, "compare that step with somebody else's file"),
  WORD(asked, shape, NULL, 0, "L,H,C,T,V,B of that model and its micro-batch: 2,3,12,7,29,3"),
  FLAG(asked, partial, "let --against ignore tensors that have none of our names"),
  FLAG(asked, sign, "at the end, read a word and print it: the judge of exercises sends one"),
  END_OF_OPTIONS};

static void check_names(void) {
  for (int i = 0; i < n_names; i++) {
    int k = 0;
    while (k < n_layers && strcmp(names[i], layers[k]->name)) k++;
    if (k == n_layers && strcmp(names[i], "sums") && strcmp(names[i], "optimizers"))
      die("%s is not a layer; --help lists them", names[i]);
  }
}

#ifdef GPU
// Two updates; once more, which must give the same bits; and in bf16. Then, is memory counted?
static void check_repeated(void) {
  double *w[3], loss[3] = {0, 0, 0};
  Trainer *t = NULL;
  int runs = compute_capability < 80 ? 2 : 3;
  for (int i = 0; i < runs; i++) {
    device_start(1, i < 2 ? "fp32" : "bf16");
    t = new_trainer(TWO_TILES, 0);       // another one: else a recording in fp32 would be replayed
    long_updates(t);
    w[i] = fetch(t->model.weights.data, t->model.n_weights);
    loss[i] = t->loss;
  }
  device_start(1, "fp32");
  expect_same(&t->model, w[0], w[1], "two updates, repeated", "");
  double apart = fabs(loss[2] / loss[0] - 1);
  if (runs == 3)
    expect(apart > 0 && apart < 0.02, "two updates in bf16", "the loss is %.1e from fp32", apart);
#ifdef EMULATED
  double all = 0;
  for (auto &m : device_memory_map) all += m.second;
  expect(fabs(all - device_bytes) < 1000, "device memory", "%.0f bytes, counted as %.0f", all,
         device_bytes);
#endif
}
#endif

static void check_all(void) {
  check_layers();
  checking = "sums";
  if (wanted("sums")) check_sums();
  checking = "optimizers";
  if (wanted("optimizers")) check_optimizers();
  if (n_names) return;
#ifdef GPU
  checking = "the rungs of the matmul";
  check_matmul_rungs();
#endif
  if (SEARCH_FOR_RACES) {          // each kernel has run; now some updates
    checking = "updates";
    long_updates(new_trainer(TWO_TILES, 0));
    return;
  }
#ifdef GPU
  checking = "--profile";
  check_profile();
  checking = "recorded launches";
  check_recordings();
#ifdef EMULATED
  checking = "what is refused";
  check_refusals();
#endif
  checking = "updates";
  check_repeated();
#else
  checking = "the model";
  if (IS_DOUBLE) check_model();
#endif
  checking = "shared memory";
  check_shared_memory();
  if (failed) {
    printf("\nWhat follows is left out: it stands on what is checked above.\n");
    return;
  }
  checking = "updates, and what stands around them";
  Trainer *t = new_trainer(TINY, 0);
  check_accumulation(t);
  printf("\nAround an update\n");
  check_initial_weights();
  check_micro_batches(t);
  check_evaluate(t);
  check_learning_rate(t);
  check_decode();
#ifndef GPU
  if (IS_DOUBLE) {
    check_recipes(t);
    show_all_steps(t);
    check_ladder(t);
    check_regression(t);
  } else check_functions();
  checking = "threads";
  check_threads();
#endif
}

int main(int argc, char **argv) {
  char usage[1000] = "usage: test_gradients [LAYER...] [options]\n\n"
                     "Checks every gradient, or those of these layers:\n ";
  double started = seconds();
  for (int i = 0; i < n_layers; i++) strcat(strcat(usage, " "), layers[i]->name);
  strcat(usage, "\n  sums optimizers\n");
  n_names = parse_options(test_options, argc, argv, usage, names, 32);
  check_names();
  read_shape();
  report_crashes();
  checking = "the device";
  device_start(1, "fp32");
  if (asked.save) {
    checking = NULL;
    make_saved();
    write_safetensors(NULL, asked.save, saved, n_saved, NULL);
    printf("%s: %d tensors of a step of L %d, H %d, C %d, V %d, on %d sequences of %d tokens\n",
           asked.save, n_saved, saved_config.n_layer, saved_config.n_head, saved_config.n_embd,
           saved_config.vocab_size, saved_piece.B, saved_piece.T);
    return 0;
  }
  if (asked.against) {
    checking = "--against";
    check_against(asked.against);
  } else {
    check_all();
    printf("\nworst relative errors:\n");
    for (int i = 0; i < n_layers; i++)
      if (layers[i]->worst >= 0) printf("  %-16s %.1e\n", layers[i]->name, layers[i]->worst);
    printf("%.1f s\n", seconds() - started);
  }
  checking = NULL;
  if (failed) printf("the first failure: %s\n", first_failure);
  printf("%d passed, %d failed\n", passed, failed);
  char word[64];
  if (asked.sign && scanf("%63s", word) == 1) printf("signed %s\n", word);
  return failed > 0;
}

#else   // EMULATED, and this file includes itself for what follows
// ---- 8. CUDA without a GPU --------------------------------------------------------------------
// What a GPU does, in 700 lines, so that any machine can check and debug kernels. A launch names a
// grid of blocks and the threads of a block; all run the same function and differ in threadIdx and
// blockIdx only. Blocks know nothing of each other. The threads of a block share what is declared
// __shared__, and wait for each other at __syncthreads(). 32 consecutive threads are a warp: they
// can exchange numbers (shuffle, ballot).
//
// Here a thread is a fiber: a stack, and a place where it continues. One CPU thread runs them all,
// one after the other, and switches where a fiber waits. What goes wrong on a GPU once in a while
// is made to go wrong here every time:
//   - blocks, and between barriers the threads of a block, run in a random order if GPU_SEED=n;
//   - device memory is NaN until something is written there, and so is shared memory of the first
//     and the last block of a launch;
//   - the work of a stream is done only when the host waits for it;
//   - a barrier or an exchange that a thread does not reach, a host pointer as an argument, a write
//     next to an array, an access that is not aligned, a grid or shared memory beyond the limits,
//     or what may not be done while a graph is recorded, ends the program;
//   - -fsanitize=address sees an index beyond an array, and the host touching device memory;
//   - -fsanitize=thread (`make race`) sees two threads at one address without a barrier between.
#pragma GCC diagnostic ignored "-Wunused-function"
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <functional>
#include <map>
#include <set>
#include <vector>

#ifndef __has_feature
#define __has_feature(x) 0
#endif
#if (defined __SANITIZE_THREAD__ || __has_feature(thread_sanitizer)) && !defined WATCH
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
// Functions of the emulator itself, which the sanitizers should not take for the kernels
#ifdef __clang__
#define UNSEEN __attribute__((noinline, unused, disable_sanitizer_instrumentation)) static
#else
#define UNSEEN \
  __attribute__((noinline, unused, no_sanitize("address", "thread", "undefined"))) static
#endif

// ---- The language
#define __global__
#define __device__
#define __host__
#ifdef WATCH                             // so that its lines are reported as the caller's, too
#define __forceinline__ __attribute__((always_inline)) inline
#else
#define __forceinline__ inline
#endif
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
struct uint3 { unsigned x, y, z; };
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
static uint3 threadIdx, blockIdx;        // of the fiber that runs now
static dim3 blockDim, gridDim;

// One block runs at a time, so a shared array can be static. They are stored together, to be filled
// with NaN before each launch; but not for the address sanitizer, which guards each array alone.
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

// ---- Fibers. To switch from one to another: push the registers that a function must preserve (the
// ABI says which), save the stack pointer, load the other one, pop, return there.
extern "C" void change_fiber(void **save, void *to) __asm("gpu_change_fiber");
#ifdef __x86_64__
enum { FRAME = 8, RETURN_TO = 6 };       // words of a new fiber's stack; the return address
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
#error "The CUDA emulator supports x86-64 and arm64: add change_fiber() for this machine"
#endif

// ---- A block of threads
enum { MAX_THREADS = 1024, STACK = (128 << 10) + 832 };   // 832: not all in the same cache sets
struct Barrier { int arrived, phase; char order[2]; };
struct Thread {
  uint3 index;
  int id, phase, line, syncs;            // syncs: __syncwarp() passed
  int turn;                              // which copy of `shown` is next: another lane may still
                                         //   read the last one
  const char *at;                        // what it waits for, or waited for last
  Barrier *barrier;
  bool returned;
  void *stack, *from;                    // from: of the last access, if it is watched
  int group, copies;                     // of asynchronous copies: the open one; how many wait
};
static Thread thread[MAX_THREADS], *self;
static Barrier block_barrier, warp_barrier[MAX_THREADS / 32];
typedef uint32_t __attribute__((may_alias)) Word;
static Word shown[MAX_THREADS / 32][2][32][6];   // what the lanes of a warp exchange: up to 6 words
static struct {
  const char *kernel;
  const std::function<void()> *body;
  int threads, set, fresh;               // set: which of two sets of stacks; fresh: shared memory
  void *scheduler;
  char *stacks, begin, end;              // begin, end: addresses that serve TSAN as clocks
  unsigned launches;
  uint64_t random;
} gpu;
TSAN(static void *host_fiber, *fiber[2][MAX_THREADS];)

UNSEEN void gpu_die(const char *what, const Thread *a, const Thread *b) {
  fprintf(stderr, "kernel %s, block (%u,%u,%u): %s\n", gpu.kernel, blockIdx.x, blockIdx.y,
          blockIdx.z, what);
  for (const Thread *t = a; t; t = t == a ? b : NULL)
    if (!t->line)
      fprintf(stderr, "  thread %d has %s\n", t->id,
              t->returned ? "returned, and was at no barrier" : "not waited yet");
    else
      fprintf(stderr, "  thread %d %s %s, line %d\n", t->id,
              t->returned ? "has returned; it was last at" : "is at", t->at, t->line);
  self = NULL;                           // all has been said
  exit(1);
}

#ifdef WATCH
static void print_place(void *from);     // prints the line of the last access
#endif
UNSEEN const char *running_kernel(void) {
  static char text[200];
  if (!self) return NULL;
#ifdef WATCH
  print_place(self->from);
#endif
  snprintf(text, sizeof text, "thread %d of kernel %s", self->id, gpu.kernel);
  return text;
}

// Where a fiber begins
UNSEEN void thread_main(void) {
  TSAN(__tsan_acquire(&gpu.begin);)
  (*gpu.body)();
  TSAN(__tsan_release(&gpu.end);)
  self->returned = true;
  change_fiber(&self->stack, gpu.scheduler);
}

// Waits until n threads are here. If the barrier orders memory, what threads wrote before it is
// visible to all after it: the thread sanitizer is told so, by two clocks in turn, since a thread
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
        gpu_die("threads wait for each other at different lines", &thread[i], t);
    b->arrived = 0;
    b->phase++;
  } else change_fiber(&t->stack, gpu.scheduler);
  t->barrier = NULL;
  TSAN(if (memory) __tsan_acquire(order);)
}

UNSEEN void shuffle(int *order, int n) {   // Fisher and Yates; in order without a seed
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
  void **top = (void **)(gpu.stacks + (size_t)(gpu.set * MAX_THREADS + i + 1) * STACK);
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

// Runs a block, in rounds: in each, every thread that does not wait runs until it does.
UNSEEN void run_block(void) {
  static int order[MAX_THREADS];
  TSAN(__tsan_java_alloc((uintptr_t)shared_begin, shared_end - shared_begin);   // forget what the
       __tsan_java_free((uintptr_t)shared_begin, shared_end - shared_begin);)   // last block did
  if (gpu.fresh) memset(shared_begin, 0xff, shared_end - shared_begin);
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
    gpu_die("a thread waits for one that never arrives", waits, other);
  }
  self = NULL;
  gpu.set ^= 1;   // the next block has other fibers, so nothing orders the two for the sanitizer
}

// ---- Device memory
enum cudaError_t {
  cudaSuccess, cudaErrorInvalidValue, cudaErrorMemoryAllocation, cudaErrorStreamCaptureUnsupported,
  cudaErrorInvalidResourceHandle, cudaErrorNotReady, cudaErrorInvalidConfiguration
};
enum cudaMemcpyKind {
  cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice
};
static const char *cudaGetErrorString(cudaError_t e) {
  static const char *const text[] = {"no error", "invalid argument", "out of memory",
                                     "not allowed while a graph is recorded", "never recorded",
                                     "not done yet",
                                     "an empty grid or block, or one that exceeds a limit"};
  return text[e];
}
static std::map<uintptr_t, size_t> device_memory_map;   // address and size of each allocation
static void show_memory(bool show);

// ---- Streams, events, graphs. A stream does nothing before the host waits for it, or for an event
// in it: so what the host has not waited for is seen not to be there. There is one stream, and it
// must have been created: stream 0 would wait for others on a GPU.
typedef std::vector<std::function<void()>> Work;
typedef Work *cudaGraph_t, *cudaGraphExec_t;
struct Stream { Work queue; size_t done; };
struct Event { size_t after; bool recorded; };   // how much of the queue comes before it
typedef Stream *cudaStream_t;
typedef Event *cudaEvent_t;
static Stream the_stream;
static cudaGraph_t recorded;             // while a graph is recorded
static std::set<cudaGraph_t> graphs;     // that have not been destroyed
static cudaError_t enqueue(cudaStream_t stream, const std::function<void()> &work) {
  if (stream != &the_stream) return cudaErrorInvalidResourceHandle;
  (recorded ? *recorded : stream->queue).push_back(work);
  return cudaSuccess;
}
static cudaError_t run_until(size_t end) {
  if (recorded) return cudaErrorStreamCaptureUnsupported;
  show_memory(true);
  while (the_stream.done < end) {
    std::function<void()> work;
    std::swap(work, the_stream.queue[the_stream.done++]);
    work();
  }
  show_memory(false);
  return cudaSuccess;
}

static bool is_device_memory(const void *p, size_t n) {
  auto after = device_memory_map.upper_bound((uintptr_t)p);
  if (after == device_memory_map.begin()) return false;
  --after;
  return (uintptr_t)p + n <= after->first + after->second;
}
static void show_memory(bool show) {     // the host may use it only through the calls below
  (void)show;
  ASAN(for (auto &m : device_memory_map)
    if (show) __asan_unpoison_memory_region((void *)m.first, m.second);
    else __asan_poison_memory_region((void *)m.first, m.second);)
}
// Each array stands between two margins, which are NaN like the array. The address sanitizer has
// its own.
#if ASAN(1) + 0
enum { MARGIN = 0 };
#elif defined WATCH                      // which sees what is accessed in the margins
enum { MARGIN = 1 << 16 };
#else
enum { MARGIN = 64 };
#endif
template <class T> static cudaError_t cudaMalloc(T **p, size_t n) {
  char *all = n >> 40 ? NULL : (char *)malloc(n + 2*MARGIN);
  if (recorded) return cudaErrorStreamCaptureUnsupported;
  if (!all) return cudaErrorMemoryAllocation;
  memset(all, 0xff, n + 2*MARGIN);
  *p = (T *)(all + MARGIN);
  device_memory_map[(uintptr_t)*p] = n;
  show_memory(false);
  return cudaSuccess;
}
static cudaError_t cudaFree(void *p) {   // waits, as CUDA does
  cudaError_t error = run_until(the_stream.queue.size());
  if (error) return error;
  if (!device_memory_map.count((uintptr_t)p)) return cudaErrorInvalidValue;
  show_memory(true);
  device_memory_map.erase((uintptr_t)p);
  free((char *)p - MARGIN);
  show_memory(false);
  return cudaSuccess;
}
UNSEEN void check_margins(void) {
  for (auto &m : device_memory_map)
    for (int i = 0; i < MARGIN && i < 64; i++)
      if (~((signed char *)m.first)[-1 - i] || ~((signed char *)m.first)[m.second + i]) {
        fprintf(stderr, "kernel %s: writes before or behind an array of %zu bytes\n", gpu.kernel,
                m.second);
        exit(1);
      }
}
static cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t n, cudaMemcpyKind kind,
                                   cudaStream_t stream) {
  if (is_device_memory(to, n) != (kind & 1) || is_device_memory(from, n) != kind >> 1)
    return cudaErrorInvalidValue;
  return enqueue(stream, [=] { memcpy(to, from, n); });
}
static cudaError_t cudaMemsetAsync(void *p, int value, size_t n, cudaStream_t stream) {
  if (!is_device_memory(p, n)) return cudaErrorInvalidValue;
  return enqueue(stream, [=] { memset(p, value, n); });
}

// How much shared memory has the kernel written? A block has 48 KB, for arrays of a fixed size.
UNSEEN void check_shared(void) {
  long written = 0;
  for (const char *p = shared_begin; p < shared_end; p += 4) written += *(const Word *)p != ~0u;
  if (4 * written <= 48 << 10) return;
  fprintf(stderr, "kernel %s: uses %ld bytes of shared memory, over 48 KB\n", gpu.kernel,
          4 * written);
  exit(1);
}

// ---- Launches: a sed in the Makefile turns kernel<<<grid, block, 0, stream>>>(x) into
// LAUNCH(kernel, grid, block, 0, stream)(x)
UNSEEN void run_grid(const char *kernel, dim3 grid, dim3 block, const std::function<void()> *body) {
  uint64_t n = (uint64_t)grid.x * grid.y * grid.z;
  gpu.launches++;
  gpu.kernel = kernel; gpu.body = body; gpu.threads = block.x * block.y * block.z;
  gridDim.x = grid.x; gridDim.y = grid.y; gridDim.z = grid.z;
  blockDim.x = block.x; blockDim.y = block.y; blockDim.z = block.z;
  if (gpu.threads % 32) gpu_die("a block has whole warps of threads", 0, 0);
  if (!gpu.stacks) {
    const char *seed = getenv("GPU_SEED");
    gpu.random = seed ? strtoull(seed, NULL, 10) : 0;
    gpu.stacks = (char *)mmap(NULL, 2L * MAX_THREADS * STACK, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANON | MAP_NORESERVE, -1, 0);
    TSAN(__tsan_java_init((uintptr_t)shared_begin, shared_end - shared_begin);)
  }
  TSAN(host_fiber = __tsan_get_current_fiber();)
  int *order = (int *)malloc(n * sizeof *order);
  shuffle(order, n);
  for (uint64_t i = 0; i < n; i++) {
    gpu.fresh = i == 0 || i == n - 1;    // it takes time, and these two show what is not written
    if (i > 0 && gpu.fresh) check_shared();   // what the blocks before have written
    blockIdx.x = order[i] % grid.x;
    blockIdx.y = order[i] / grid.x % grid.y;
    blockIdx.z = order[i] / grid.x / grid.y;
    run_block();
  }
  free(order);
  TSAN(__tsan_acquire(&gpu.end);)
  check_margins();
  check_shared();
}

static cudaError_t launch_error;         // of a launch, until cudaGetLastError()
template <class T> static void check_pointer(const char *kernel, T *p) {
  if (!p || is_device_memory(p, 0)) return;
  fprintf(stderr, "kernel %s: an argument points to host memory\n", kernel);
  exit(1);
}
template <class T> static void check_pointer(const char *, const T &) {}
// The pointers among a kernel's arguments: .ci/watch.h says which of them an address belongs to.
static std::vector<uintptr_t> arguments;
template <class T> static uintptr_t first_word(const T &x) {   // a pointer, or a struct's first
  uintptr_t word = 0;
  memcpy(&word, &x, sizeof x < sizeof word ? sizeof x : sizeof word);
  return word;
}
template <class... P>
static auto launch_of(const char *name, void (*kernel)(P...), dim3 grid, dim3 block, int,
                      cudaStream_t stream) {
  return [=](P... p) {
    (check_pointer(name, p), ...);
    std::function<void()> body = [=] { kernel(p...); };
    auto work = [=] { arguments = {first_word(p)...}; run_grid(name, grid, block, &body); };
    uint64_t blocks = (uint64_t)grid.x * grid.y * grid.z;
    uint64_t threads = (uint64_t)block.x * block.y * block.z;
    if (blocks < 1 || grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535 || threads < 1 ||
        threads > MAX_THREADS)
      launch_error = cudaErrorInvalidConfiguration;
    else if (enqueue(stream, work)) {
      fprintf(stderr, "kernel %s: is launched in a stream that was not created\n", name);
      exit(1);
    }
  };
}
#define LAUNCH(kernel, ...) launch_of(#kernel, kernel, __VA_ARGS__)

// ---- In kernels. LINE is where the call stands.
#define LINE int line = __builtin_LINE()
static inline void __syncthreads(LINE) {
  wait_at(&block_barrier, gpu.threads, true, "__syncthreads()", line);
}
UNSEEN int __syncthreads_or(int vote, LINE) {
  static int votes[MAX_THREADS];
  int any = 0;
  votes[self->id] = vote;
  wait_at(&block_barrier, gpu.threads, true, "__syncthreads_or()", line);
  for (int i = 0; i < gpu.threads; i++) any |= votes[i];
  wait_at(&block_barrier, gpu.threads, true, "__syncthreads_or()", line);
  return any != 0;
}
// Every lane shows n words, and sees those of its warp. This orders no memory.
UNSEEN Word (*show_warp(const void *words, int n, const char *what, int line))[6] {
  Word (*lanes)[6] = shown[self->id / 32][self->turn ^= 1];
  for (int i = 0; i < n; i++) lanes[self->id % 32][i] = ((const Word *)words)[i];
  wait_at(&warp_barrier[self->id / 32], 32, false, what, line);
  return lanes;
}
UNSEEN void check_mask(unsigned lanes) {
  if (lanes != ~0u)
    gpu_die("an exchange between some lanes of a warp is not emulated: pass ALL_LANES", self, 0);
}
// Every lane gets the x of another one; its own, if that one does not exist.
template <class T> UNSEEN T shuffled(unsigned mask, T x, int from, const char *what, int line) {
  check_mask(mask);
  Word (*lanes)[6] = show_warp(&x, sizeof x / 4, what, line);
  if (from >= 0 && from < 32)
    for (unsigned i = 0; i < sizeof x / 4; i++) ((Word *)&x)[i] = lanes[from][i];
  return x;
}
#define SHUFFLE(name, from)                                                            \
  template <class T> UNSEEN T name(unsigned mask, T x, int i, int width = 32, LINE) {  \
    int lane = self->id % 32;                                                          \
    return shuffled(width == 32 ? mask : 0, x, from, #name "()", line);                \
  }
SHUFFLE(__shfl_xor_sync, lane ^ i)
SHUFFLE(__shfl_down_sync, lane + i)
SHUFFLE(__shfl_up_sync, lane - i)
SHUFFLE(__shfl_sync, 0 * lane + i % 32)   // 0 * lane: so that it is used
// Orders memory among the lanes of a warp.
UNSEEN void __syncwarp(unsigned mask = ~0u, LINE) {
  check_mask(mask);
  wait_at(&warp_barrier[self->id / 32], 32, true, "__syncwarp()", line);
  self->syncs++;
}
UNSEEN unsigned __ballot_sync(unsigned mask, int vote, LINE) {
  check_mask(mask);
  Word (*lanes)[6] = show_warp(&vote, 1, "__ballot_sync()", line);
  unsigned votes = 0;
  for (int i = 0; i < 32; i++) votes |= (unsigned)(lanes[i][0] != 0) << i;
  return votes;
}
static inline int __popc(unsigned x) { return __builtin_popcount(x); }

// PTX(s, x, y, text : operands) is an instruction. The compiler for GPUs gets the text; the
// emulator reads it, too. s, x and y are the arrays of the operands: floats (or pointers p), and
// words. %k in the text is the k-th of the operands behind the colons, like "r"(x[2]).
#define PTX(s, x, y, ...) emulate(#__VA_ARGS__, s, x, y)
struct Operands {
  int n;                                 // how often the text names one
  char array[16];                        // of the i-th: 's', 'p', 'x' or 'y'
  int at[16];                            // which number of the array
};
UNSEEN Operands operands_of(const char *text) {
  Operands o = {0, {0}, {0}};
  for (const char *p = text; *p && *p != ':' && o.n < 16; p++) {
    if (*p != '%') continue;
    const char *q = strchr(text, ':');
    for (int k = p[1] - '0'; q && k >= 0; k--) q = strchr(q + 1, '(');   // of operand k
    if (!q || !q[1] || !strchr("spxy", q[1]) || q[2] != '[')
      gpu_die("operands that the emulator cannot read", self, 0);
    o.array[o.n] = q[1];
    o.at[o.n++] = q[3] - '0';
  }
  return o;
}

static inline size_t __cvta_generic_to_shared(const void *p) {
  return (const char *)p - shared_begin;
}
static inline float __uint_as_float(unsigned u) { float x; memcpy(&x, &u, 4); return x; }
UNSEEN float bf16_at_half(Word two, int half) { return __uint_as_float(two >> 16*half << 16); }
UNSEEN unsigned bf16_of(float x) {       // to nearest; both as near: to the one that ends in 0
  unsigned bits;
  memcpy(&bits, &x, 4);
  return x != x ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
// The sanitizers should see this one: what a kernel reads from shared memory
__attribute__((noinline)) static void read_row(Word *to, const Word *from) {
  for (int i = 0; i < 4; i++) to[i] = from[i];
}

UNSEEN void emulate_mma(Operands o, float *s, const unsigned *x, const unsigned *y, int line) {
  Word mine[6];
  int lane = self->id % 32;
  float d[4];
  for (int i = 0; i < 6; i++) mine[i] = (o.array[4 + i] == 'x' ? x : y)[o.at[4 + i]];
  Word (*lanes)[6] = show_warp(mine, 6, "mma", line);
  for (int i = 0; i < 4; i++) {
    int row = lane/4 + i/2*8, column = lane%4*2 + i%2;
    d[i] = s[o.at[10 + i]];
    for (int k = 0; k < 16; k++)
      d[i] += bf16_at_half(lanes[row%8*4 + k%8/2][row/8 + k/8*2], k % 2)
            * bf16_at_half(lanes[column*4 + k%8/2][4 + k/8], k % 2);
  }
  for (int i = 0; i < 4; i++) s[o.at[i]] = d[i];
}

UNSEEN void emulate_ldmatrix(Operands o, unsigned *x, const unsigned *y, bool transposed,
                             int line) {
  Word mine[4];
  int lane = self->id % 32, e = lane / 4, t = lane % 4;
  const char *row = shared_begin + (int)y[o.at[4]];
  if ((uintptr_t)row % 16) gpu_die("the address of a row is not a multiple of 16", self, 0);
  read_row(mine, (const Word *)row);
  Word (*lanes)[6] = show_warp(mine, 4, "ldmatrix", line);
  for (int i = 0; i < 4; i++) {
    unsigned first = lanes[8*i + 2*t][e/2] >> e%2*16, next = lanes[8*i + 2*t + 1][e/2] >> e%2*16;
    x[o.at[i]] = transposed ? (first & 0xffff) | next << 16 : lanes[8*i + e][t];
  }
}

// An asynchronous copy arrives when it is waited for, and not before: until then there is NaN. Both
// times the thread writes, so that the thread sanitizer sees who reads meanwhile.
static struct Copy { Word *to; const Word *from; int group; } copy[MAX_THREADS][64];
__attribute__((noinline)) static void arrive(Word *to, const Word *from) {
  for (int i = 0; i < 4; i++) to[i] = from ? from[i] : ~0u;
}

UNSEEN void start_copy(char *to, const char *from) {
  if ((uintptr_t)to % 16 || (uintptr_t)from % 16)
    gpu_die("an address of cp.async is not a multiple of 16", self, 0);
  if (!is_device_memory(from, 16)) gpu_die("cp.async reads beyond an array", self, 0);
  if (self->copies == 64) gpu_die("too many copies at once: not emulated", self, 0);
  copy[self->id][self->copies++] = Copy{(Word *)to, (const Word *)from, self->group};
  arrive((Word *)to, NULL);
}

UNSEEN void close_copies(void) { self->group++; }

UNSEEN void wait_for_copies(int groups) {   // all but the last so many groups
  Copy *c = copy[self->id];
  int left = 0;
  for (int i = 0; i < self->copies; i++)
    if (c[i].group < self->group - groups) arrive(c[i].to, c[i].from);
    else c[left++] = c[i];
  self->copies = left;
}

static void emulate(const char *text, void *array, const unsigned *read, const unsigned *y, LINE) {
  Operands o = operands_of(text);
  float *s = (float *)array;
  unsigned *x = (unsigned *)read;        // the other instructions write to it
  const char *name = text + 1;           // behind a quotation mark
#define IS(what) (!strncmp(name, what, sizeof what - 1))
  if (IS("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 ") && o.n == 14)
    emulate_mma(o, s, x, y, line);
  else if (IS("ldmatrix.sync.aligned.m8n8.x4.shared.b16 ") && o.n == 5)
    emulate_ldmatrix(o, x, y, false, line);
  else if (IS("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 ") && o.n == 5)
    emulate_ldmatrix(o, x, y, true, line);
  else if (IS("cp.async.cg.shared.global [%0], [%1], 16;") && o.n == 2 && o.array[1] == 'p')
    start_copy(shared_begin + (int)y[o.at[0]], ((const char **)array)[o.at[1]]);
  else if (IS("cp.async.commit_group;")) close_copies();
  else if (IS("cp.async.wait_group ")) wait_for_copies(name[sizeof "cp.async.wait_group"] - '0');
  else if (IS("cvt.rn.bf16x2.f32 ") && o.n == 3)
    x[o.at[0]] = bf16_of(s[o.at[1]]) << 16 | bf16_of(s[o.at[2]]);
  else gpu_die("an instruction that the emulator does not know", self, 0);
}

// ---- The rest of the CUDA runtime that train_gpu.cu calls
enum { cudaStreamNonBlocking, cudaEventDisableTiming, cudaStreamCaptureModeThreadLocal };
struct cudaDeviceProp {
  char name[256];
  int multiProcessorCount, major, minor;
  size_t totalGlobalMem;
};
struct cudaFuncAttributes { int ptxVersion; };
static int emulated_ptx = 80;
#define CALL static inline cudaError_t
static int emulated_devices = 1;
CALL cudaGetLastError(void) { cudaError_t e = launch_error; launch_error = cudaSuccess; return e; }
CALL cudaGetDeviceCount(int *n) { *n = emulated_devices; return cudaSuccess; }
CALL cudaSetDevice(int) { return cudaSuccess; }
CALL cudaGetDeviceProperties(cudaDeviceProp *p, int) {
  *p = {"an emulated GPU", 2, 8, 0, 8 << 20};   // so small that small matrices occupy it
  return cudaSuccess;
}
// A kilohertz, and memory of 8 bits and 8 kilohertz: shares that check_profile() knows.
enum cudaDeviceAttr {
  cudaDevAttrClockRate, cudaDevAttrMemoryClockRate, cudaDevAttrGlobalMemoryBusWidth
};
CALL cudaDeviceGetAttribute(int *value, cudaDeviceAttr a, int) {
  *value = a == cudaDevAttrClockRate ? 1 : 8;
  return cudaSuccess;
}
CALL cudaFuncGetAttributes(cudaFuncAttributes *a, const void *) {
  a->ptxVersion = emulated_ptx;
  return cudaSuccess;
}
CALL cudaMemGetInfo(size_t *left, size_t *all) {
  *left = *all = (size_t)1 << 34;
  return cudaSuccess;
}
CALL cudaMallocHost(void **p, size_t n) { *p = malloc(n); return cudaSuccess; }
CALL cudaStreamCreateWithFlags(cudaStream_t *s, int) {
  *s = &the_stream;
  return cudaSuccess;
}
CALL cudaStreamSynchronize(cudaStream_t s) { return run_until(s->queue.size()); }
CALL cudaEventCreate(cudaEvent_t *e) { *e = new Event(); return cudaSuccess; }
CALL cudaEventCreateWithFlags(cudaEvent_t *e, int) { return cudaEventCreate(e); }
CALL cudaEventRecord(cudaEvent_t e, cudaStream_t s) {
  if (s != &the_stream) return cudaErrorInvalidResourceHandle;
  *e = {s->queue.size(), true};
  return recorded ? cudaErrorStreamCaptureUnsupported : cudaSuccess;
}
CALL cudaEventSynchronize(cudaEvent_t e) { return run_until(e->after); }
CALL cudaEventElapsedTime(float *ms, cudaEvent_t a, cudaEvent_t b) {
  *ms = (float)b->after - (float)a->after;   // each launch or copy takes a millisecond
  if (!a->recorded || !b->recorded) return cudaErrorInvalidResourceHandle;
  return b->after <= the_stream.done ? cudaSuccess : cudaErrorNotReady;
}
CALL cudaStreamBeginCapture(cudaStream_t, int) {
  recorded = new Work;
  return cudaSuccess;
}
CALL cudaStreamEndCapture(cudaStream_t, cudaGraph_t *g) {
  *g = recorded;
  recorded = NULL;
  graphs.insert(*g);
  return cudaSuccess;
}
CALL cudaGraphInstantiateWithFlags(cudaGraphExec_t *x, cudaGraph_t g, int) {
  if (!graphs.count(g)) return cudaErrorInvalidValue;
  graphs.insert(*x = new Work(*g));
  return cudaSuccess;
}
CALL cudaGraphDestroy(cudaGraph_t g) {
  if (!graphs.erase(g)) return cudaErrorInvalidValue;
  delete g;
  return cudaSuccess;
}
CALL cudaGraphExecDestroy(cudaGraphExec_t x) { return cudaGraphDestroy(x); }
CALL cudaGraphLaunch(cudaGraphExec_t x, cudaStream_t s) {
  if (!graphs.count(x)) return cudaErrorInvalidValue;
  for (auto &work : *x)
    if (enqueue(s, work)) return cudaErrorInvalidResourceHandle;
  return cudaSuccess;
}
#ifdef WATCH
#include WATCH                           // .ci/watch.h: exercises are judged with it
#endif
#define EMULATOR_IS_HERE
#endif
