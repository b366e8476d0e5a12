// generate.c writes text with a GPT that train.c has trained: one step at a time, or several.
//
// The model gives a probability for each byte that may come next. What to do with them is a choice:
//
//   single-step   greedy: the likeliest byte. Or a random one, after temperature, top-k and top-p.
//   multi-step    beam search: of all texts of n bytes it looks for the likeliest, by keeping the W
//                 best beginnings. The likeliest text need not begin with the likeliest byte.
//
// Both are compared by the model's own loss of the result, the sum of -log p over its bytes.
//
// A step reads every weight once. It need not compute the older tokens again, since they matter
// only through their keys and values, and those are kept: the KV cache. Texts that are written at
// the same time, the rows, share the reading. Letters as in train.c: a step has B rows of one token
// each; T is the context.
//
// Sections: 1 a step, 2 the choice, 3 writing, 4 greedy against beam search, 5 looking inside,
// 6 speed, 7 options and main, 8 tests.
//
//   ./generate --prompt "Once"     a text from the model in run/
//   ./generate --compare           greedy against beam search; --help lists the rest

#define NO_MAIN   // train.c's
#define PROGRAM "generate"
#define LOWER "--samples, --beam or --tokens, or take a smaller model"
#pragma GCC diagnostic ignored "-Wunused-function"   // of train.c: this program does not train
#include "train.c"

// ---- 1. A step --------------------------------------------------------------------------------
// The window slides: when a text has filled the T positions of the model, the window moves on by
// half. Its newer half is computed again once, since each token now has another position. This
// rule, window_of(), holds for prompts, for writing and for the loss of a text alike, so the loss
// is that of the very probabilities with which the text was written.

typedef struct {
  Model model;
  int max_rows, rows;      // rows there is memory for; rows that are being written
  long capacity, n;        // bytes there is memory for in a row; bytes in each row now
  long start;              // of the window: the byte that is at position 0
  unsigned char *text;     // [max_rows][capacity]
  real *cache;             // [L][max_rows][H][2][T][D]: keys and values of the window
  int *cache_row;          // [max_rows][T]: the row of the cache that has position t of this row
  unsigned char *old_text; // reorder() copies from these
  int *old_cache_row;
} Writer;

static Writer *stepping;   // whose step is computed: attention_cached() has no argument for it

// The start of the window of byte i. For T 8: bytes 0-7 have the one from 0, bytes 8-11 that from
// 4, bytes 12-15 that from 8.
static long window_of(long i, int T) {
  long half = T - T/2;                   // rounded up
  return i < T ? 0 : ((i - T) / half + 1) * half;
}

static unsigned char *text_of(Writer *w, int row) { return w->text + row * w->capacity; }
static int *cache_rows_of(Writer *w, int row) {
  return w->cache_row + row * w->model.config.block_size;
}
static real *logits_of(Writer *w, int row) {   // of the byte after the last one
  return w->model.logits.data + (long)row * w->model.config.vocab_size;
}
enum { KEY, VALUE };
static real *cache_at(Writer *w, int layer, int row, int head, int which, int t) {
  Config c = w->model.config;
  long before = (((long)layer * w->max_rows + row) * c.n_head + head) * 2 + which;
  return w->cache + (before * c.block_size + t) * (c.n_embd / c.n_head);
}

// Describes a writer of up to max_rows texts of up to n bytes; its model takes no memory yet.
static void writer_layout(Writer *w, Config config, int max_rows, long n) {
  memset(w, 0, sizeof *w);
  w->max_rows = max_rows;
  w->capacity = n + 1;     // the windows of train.c look one byte further, for a target
  model_layout(&w->model, config, MAX(max_rows, config.block_size), 0, 0);
}

static void writer_allocate(Writer *w) {
  Config c = w->model.config;
  size_t tokens = (size_t)w->max_rows * c.block_size;
  w->cache = (real *)device_alloc(tokens * c.n_layer * 2 * c.n_embd * sizeof(real));
  w->text = (unsigned char *)device_alloc(w->max_rows * w->capacity);
  w->old_text = (unsigned char *)device_alloc(w->max_rows * w->capacity);
  w->cache_row = (int *)device_alloc(tokens * sizeof(int));
  w->old_cache_row = (int *)device_alloc(tokens * sizeof(int));
}

// att[s] = exp(att[s]) / the sum of these, of n scores
static void softmax(real *att, int n) {
  real max = max_of(att, n);                     // subtracted, so that exp cannot overflow
  real sum = SUM(real, s, n, att[s] = exp_(att[s] - max));
  for (int s = 0; s < n; s++) att[s] /= sum;
}

// Takes the place of attention_forward() in a step: B rows of one token each, at position t. The
// keys and values of older tokens come from the cache; those of the new ones are put there.
static void attention_cached(Tensor out, Tensor lse, Tensor qkv, int B, int T, int C, int H) {
  Writer *w = stepping;
  int D = C / H, layer = 0, t = (int)(w->n - 1 - w->start);
  (void)lse; (void)T;                            // T is 1; lse is for the backward pass
  while (w->model.act[layer].qkv.data != qkv.data) layer++;   // which layer is this?
  parallel_for (bh, B*H) {
    int row = bh / H, h = bh % H, *cache_row = cache_rows_of(w, row);
    const real *q = qkv.data + (long)row*3*C + h*D;
    real *out_row = out.data + (long)row*C + h*D, *att = scratch(t + 1);
    memcpy(cache_at(w, layer, cache_row[t], h, KEY, t), q + C, D * sizeof(real));
    memcpy(cache_at(w, layer, cache_row[t], h, VALUE, t), q + 2*C, D * sizeof(real));
    for (int s = 0; s <= t; s++) att[s] = z_of(q, cache_at(w, layer, cache_row[s], h, KEY, s), D);
    softmax(att, t + 1);
    for (int d = 0; d < D; d++) out_row[d] = 0;
    for (int s = 0; s <= t; s++) {
      const real *v = cache_at(w, layer, cache_row[s], h, VALUE, s);
      for (int d = 0; d < D; d++) out_row[d] += att[s] * v[d];
    }
  }
}

// The logits after one more token in each row, by forward() of train.c: B rows of one token each,
// with wpe[t] as the only position and attention to the cache.
static void step(Writer *w) {
  Model m = w->model;                            // a copy, whose wpe begins at position t
  m.wpe.data += (w->n - 1 - w->start) * m.config.n_embd;
  m.attention = attention_cached;
  MicroBatch batch = {&m, w->rows, 1, 0};
  stepping = w;
  launch(run_micro_batch, &batch);
}

// Logits and losses of n bytes from `start` on, computed anew.
static void whole_window(Model *m, const unsigned char *bytes, long start, int n) {
  MicroBatch batch = {m, 1, n, 0};
  load_windows(m, bytes, &start, 1, n);
  launch(run_micro_batch, &batch);
}

// Packs each weight matrix into panels, once. (In training, where weights change, every matmul does
// it.) A step then reads memory from front to back, which is what it does fastest.
static void pack_weights(Model *m) {
  int n = n_packed + m->n_parameter_tensors;
  packed = (struct Packed *)host_alloc(packed, n * sizeof *packed);
  for (Entry *e = m->parameter; e < m->parameter + m->n_parameter_tensors; e++) {
    if (!e->cols || e->tensor == &m->wpe) continue;   // these are added, not multiplied
    Matrix w = rows_of(e->tensor->data, e->cols);
    int C = e->rows, O = e->cols;
    if (e->tensor == &m->wte) w = transpose(w), C = e->cols, O = e->rows;   // as lm_head reads it
    real *panels = (real *)device_alloc((size_t)C * (O + COLUMNS) * sizeof(real));
    pack_columns(panels, w, C, O);
    struct Packed p = {w, panels};
    packed[n_packed++] = p;
  }
}

// Fills the cache of a row with the keys and values of its window.
static void fill_cache(Writer *w, int row) {
  int C = w->model.config.n_embd, H = w->model.config.n_head, D = C / H;
  int n = (int)(w->n - w->start);
  if (n == 0) return;                             // a context of one token has nothing to keep
  whole_window(&w->model, text_of(w, row), w->start, n);
  for (int t = 0; t < n; t++) {
    cache_rows_of(w, row)[t] = row;
    for (int l = 0; l < w->model.config.n_layer; l++)
      for (int h = 0; h < H; h++)
        for (int which = KEY; which <= VALUE; which++)
          memcpy(cache_at(w, l, row, h, which, t),     // a row of qkv: query, key, value
                 w->model.act[l].qkv.data + (3L*t + 1 + which)*C + h*D, D * sizeof(real));
  }
}

// Starts `rows` texts with a prompt of one byte or more. It is computed once: all rows find it in
// the cache of the first.
static void start_writing(Writer *w, const unsigned char *prompt, long n, int rows) {
  int T = w->model.config.block_size, V = w->model.config.vocab_size;
  w->n = n;
  w->start = window_of(n - 1, T);
  w->rows = rows;
  memcpy(text_of(w, 0), prompt, n);
  fill_cache(w, 0);
  memmove(logits_of(w, 0), w->model.logits.data + (n - 1 - w->start)*V, V * sizeof(real));
  for (int row = 1; row < rows; row++) {
    memcpy(text_of(w, row), prompt, n);
    memcpy(cache_rows_of(w, row), cache_rows_of(w, 0), T * sizeof(int));
    memcpy(logits_of(w, row), logits_of(w, 0), V * sizeof(real));
  }
}

// Row i continues what was row parent[i]. Nothing is computed again, and no key or value is copied:
// it stays in the cache row where it was computed, and only the table `cache_row`, which records
// where, is copied.
static void reorder(Writer *w, const int *parent, int rows) {
  Writer old = *w;
  w->rows = rows;
  w->text = old.old_text; w->old_text = old.text;
  w->cache_row = old.old_cache_row; w->old_cache_row = old.cache_row;
  for (int i = 0; i < rows; i++) {
    memcpy(text_of(w, i), text_of(&old, parent[i]), w->n);
    memcpy(cache_rows_of(w, i), cache_rows_of(&old, parent[i]),
           w->model.config.block_size * sizeof(int));
  }
}

// Appends a byte to each row; then logits_of() are those of the byte after it.
static void advance(Writer *w, const unsigned char *byte) {
  int T = w->model.config.block_size;
  if (w->n - w->start == T) {                     // the window is full: it slides
    w->start = window_of(w->n, T);
    for (int row = 0; row < w->rows; row++) fill_cache(w, row);
  }
  for (int row = 0; row < w->rows; row++) {
    text_of(w, row)[w->n] = byte[row];
    cache_rows_of(w, row)[w->n - w->start] = row;
    w->model.token[row] = byte[row];
  }
  w->n++;
  step(w);
}

// ---- 2. The choice ----------------------------------------------------------------------------
// Only bytes are chosen: entries of the vocabulary from 256 on are left out.
static int choices(int V) { return MIN(V, 256); }

typedef struct { int byte; double p; } Choice;

static int by_probability(const void *a, const void *b) {   // if equal: the smaller byte first
  const Choice *x = (const Choice *)a, *y = (const Choice *)b;
  return x->p != y->p ? (x->p < y->p ? 1 : -1) : x->byte - y->byte;
}

static void check_finite(double x) {
  if (isfinite(x)) return;
  printf("\n");                                   // ends what was written so far
  die("the model computes inf or nan: are its weights damaged?");
}

// p[v] = softmax(logits / temperature)[v] over all bytes v; returns how many there are.
static int probabilities(Choice *choice, const real *logits, int V, double temperature) {
  int n = choices(V);
  double max = max_of(logits, n), sum = 0;
  for (int v = 0; v < n; v++) {
    choice[v].byte = v;
    choice[v].p = exp((logits[v] - max) / temperature);
    sum += choice[v].p;
  }
  check_finite(sum);
  for (int v = 0; v < n; v++) choice[v].p /= sum;
  return n;
}

// Keeps the top_k likeliest (0: all), then of those the fewest whose sum is at least top_p times
// the sum of all of those; scales what remains to a sum of 1. Returns how many remain. Fan et al.
// 2018; Holtzman et al. 2020.
static int truncate_choices(Choice *choice, int n, int top_k, double top_p) {
  if ((!top_k || top_k >= n) && top_p >= 1) return n;
  qsort(choice, n, sizeof *choice, by_probability);
  if (top_k && top_k < n) n = top_k;
  double all = 0, kept = 0;
  int k = 0;
  for (int i = 0; i < n; i++) all += choice[i].p;
  while (k < n && (k == 0 || kept < top_p * all)) kept += choice[k++].p;
  for (int i = 0; i < k; i++) choice[i].p /= kept;
  return k;
}

typedef struct { double temperature, top_p; int top_k, seed; } Sampler;   // temperature 0: greedy

// Byte i of text number `sample`. Each text has random numbers of its own, so it does not depend on
// how many are written at the same time.
static int choose(const Sampler *s, const real *logits, int V, int sample, long i) {
  Choice choice[256];                            // greedy does not need it, but its check of logits
  int n = probabilities(choice, logits, V, s->temperature > 0 ? s->temperature : 1), k = 0;
  if (s->temperature == 0) {
    for (int v = 1; v < n; v++) if (logits[v] > logits[k]) k = v;
    return k;
  }
  n = truncate_choices(choice, n, s->top_k, s->top_p);
  // Each byte has a share of [0,1), as large as its p: find the share that u falls into.
  double u = random_uniform(random_bits(s->seed, sample), i);
  for (; k < n - 1 && u >= choice[k].p; k++) u -= choice[k].p;
  return choice[k].byte;
}

static void sample_step(Writer *w, const Sampler *s, long i) {
  unsigned char byte[256];
  for (int row = 0; row < w->rows; row++)
    byte[row] = (unsigned char)choose(s, logits_of(w, row), w->model.config.vocab_size, row, i);
  advance(w, byte);
}

// Beam search. score[i] is log p of what row i has written so far. Each row could continue with any
// byte; of all these candidates the W with the largest score become the rows. No byte ends a text,
// so all are of equal length, and no score needs to be corrected for it.
typedef struct { double score; int row, byte; } Candidate;

// Writes the best max_rows candidates to `best`, the largest score first (insertion sort); of equal
// ones the earlier row, then the smaller byte. Returns how many there are.
static int best_candidates(Candidate *best, Writer *w, const double *score) {
  int kept = 0, V = w->model.config.vocab_size;
  for (int row = 0; row < w->rows; row++) {
    const real *logits = logits_of(w, row);
    double max = max_of(logits, V), sum = 0;
    for (int v = 0; v < V; v++) sum += exp(logits[v] - max);
    check_finite(sum);
    double lse = max + log(sum);
    for (int v = 0; v < choices(V); v++) {
      Candidate c = {score[row] + logits[v] - lse, row, v};
      if (kept == w->max_rows && c.score <= best[kept - 1].score) continue;
      int i = kept < w->max_rows ? kept++ : kept - 1;
      for (; i > 0 && c.score > best[i - 1].score; i--) best[i] = best[i - 1];
      best[i] = c;
    }
  }
  return kept;
}

// One step of a search with max_rows hypotheses. It begins with one row: equal rows would stay
// equal.
static void beam_step(Writer *w, double *score) {
  Candidate best[256];
  int parent[256];
  unsigned char byte[256];
  int rows = best_candidates(best, w, score);
  for (int i = 0; i < rows; i++) {
    parent[i] = best[i].row;
    byte[i] = (unsigned char)best[i].byte;
    score[i] = best[i].score;
  }
  reorder(w, parent, rows);
  advance(w, byte);
}

// ---- 3. Writing -------------------------------------------------------------------------------

static struct {
  const char *folder, *prompt, *score, *attention;
  int tokens, top_k, greedy, beam, seed, threads, compare, samples, explain, bench;
  double temperature, top_p;
} gen;   // each option of section 7 has the name of its field

// Without --prompt it is a line break, which is hidden: not printed.
static struct { const unsigned char *byte; long n, hidden; } prompt;

// The length in bytes, 1 to 4, of the UTF-8 character at p, of which n bytes are there; 0 if they
// are only its beginning, -1 if they are not UTF-8.
static int utf8_length(const unsigned char *p, long n) {
  int length = p[0] < 0x80 ? 1 : p[0] < 0xc2 ? -1 : p[0] < 0xe0 ? 2 : p[0] < 0xf0 ? 3
             : p[0] < 0xf5 ? 4 : -1;
  for (int i = 1; i < MIN(length, n); i++) {
    // no overlong form (e0, f0), no control character of two bytes (c2), no surrogate (ed)
    int low = i > 1 ? 0x80 : p[0] == 0xe0 || p[0] == 0xc2 ? 0xa0 : p[0] == 0xf0 ? 0x90 : 0x80;
    int high = i > 1 ? 0xbf : p[0] == 0xed ? 0x9f : p[0] == 0xf4 ? 0x8f : 0xbf;
    if (p[i] < low || p[i] > high) return -1;
  }
  return length > n ? 0 : length;
}

// Prints bytes as UTF-8: U+FFFD in place of what is not, and of control characters, which could do
// anything to a terminal. Returns how many bytes were printed: the beginning of a character at the
// end is left for the next call, unless this is the last one.
static long print_text(const unsigned char *p, long n, int last) {
  long i = 0;
  while (i < n) {
    int length = utf8_length(p + i, n - i);
    if (length == 0 && !last) break;
    int control = length == 1 && (p[i] < 32 || p[i] == 127) && p[i] != '\n' && p[i] != '\t';
    if (length < 1 || control) fputs("\xef\xbf\xbd", stdout), i++;
    else fwrite(p + i, 1, length, stdout), i += length;
  }
  fflush(stdout);
  return i;
}

// A byte as something that can be read; out has 8 bytes.
static const char *readable(char *out, int byte) {
  if (byte == '\n') strcpy(out, "'\\n'");
  else if (byte == '\t') strcpy(out, "'\\t'");
  else snprintf(out, 8, byte < 32 || byte > 126 ? "\\x%02x" : "'%c'", byte);
  return out;
}

// --explain: a byte that was written, and the five that the model found likeliest (at temperature
// 1, before top-k and top-p).
static void explain(const real *logits, int V, int byte) {
  Choice choice[256];
  char name[8];
  int n = probabilities(choice, logits, V, 1);
  printf("%-5s %6.2f%%  |", readable(name, byte), 100 * choice[byte].p);
  qsort(choice, n, sizeof *choice, by_probability);
  for (int i = 0; i < MIN(5, n); i++) {
    printf(" %5s %5.1f%%", readable(name, choice[i].byte), 100 * choice[i].p);
    putchar(choice[i].byte == byte ? '<' : ' ');
  }
  printf("\n");
}

// The sum of -log p of bytes first..n-1 of a text, each given those before it in its window. With
// `explained`, a line for each.
static double text_loss(Writer *w, const unsigned char *bytes, long first, long n, int explained) {
  Model *m = &w->model;
  int T = m->config.block_size, V = m->config.vocab_size;
  double sum = 0;
  for (long i = first - 1; i < n - 1; ) {         // byte i predicts byte i + 1
    long start = window_of(i, T), end = MIN(start + T, n - 1);
    whole_window(m, bytes, start, (int)(end - start));
    for (; i < end; i++) {
      sum += m->loss.data[i - start];
      if (explained) explain(m->logits.data + (i - start)*V, V, bytes[i + 1]);
    }
  }
  return sum;
}

// How many bytes are certain, and can be printed: those in which all hypotheses of a beam search
// agree; without a search all. The first n are.
static long agreed_until(Writer *w, long n, int beam) {
  for (; n < w->n; n++)
    for (int row = 1; beam && row < w->rows; row++)
      if (text_of(w, row)[n] != text_of(w, 0)[n]) return n;
  return n;
}

typedef struct { double score, seconds; } Result;   // log p of the best hypothesis

// Continues the prompt by gen.tokens bytes: `rows` samples, or the best of a beam search. Row 0 is
// printed while it is written.
static Result write_text(Writer *w, const Sampler *s, int rows, int beam) {
  double score[256] = {0}, started = seconds();
  long agreed = prompt.n, printed = prompt.hidden;
  start_writing(w, prompt.byte, prompt.n, beam ? 1 : rows);
  for (int i = 0; ; i++) {
    printed += print_text(text_of(w, 0) + printed, agreed - printed, 0);
    if (i == gen.tokens) break;
    if (beam) beam_step(w, score);
    else sample_step(w, s, i);
    agreed = agreed_until(w, agreed, beam);
  }
  check_finite(logits_of(w, 0)[0]);               // of the last step: nothing is chosen from them
  print_text(text_of(w, 0) + printed, w->n - printed, 1), printf("\n");
  Result result = {score[0], seconds() - started};
  return result;
}

static void write_samples(Writer *w) {
  Sampler s = {gen.greedy ? 0 : gen.temperature, gen.top_p, gen.top_k, gen.seed};
  if (gen.samples > 1) printf("--- 1 of %d ---\n", gen.samples);
  Result result = write_text(w, &s, gen.samples, gen.beam);
  for (int row = 1; row < gen.samples; row++) {
    printf("--- %d of %d ---\n", row + 1, gen.samples);
    print_text(text_of(w, row) + prompt.hidden, w->n - prompt.hidden, 1);
    printf("\n");
  }
  if (gen.explain) {
    printf("\nbyte       p   | the five likeliest, and what was chosen <\n");
    text_loss(w, text_of(w, 0), prompt.n, prompt.n + gen.tokens, 1);
  }
  fflush(stdout);                                 // the text before what is said of it
  if (gen.beam) fprintf(stderr, "beam %d: log p %.3f\n", gen.beam, result.score);
  double bytes = (double)gen.samples * gen.tokens;
  if (bytes)
    fprintf(stderr, "%.0f bytes, %.0f tokens/s, threads %d\n", bytes, bytes / result.seconds,
            n_threads);
}

// --score: the loss of a text.
static void score_text(Writer *w, const unsigned char *bytes, long n) {
  double loss = text_loss(w, bytes, 1, n, gen.explain) / (n - 1);
  check_finite(loss);
  printf("bytes %ld\nperplexity %.4f\nbits per byte %.6f\nloss %.6f\n", n, exp(loss),
         loss / log(2), loss);
}

// ---- 4. Greedy against beam search: --compare -------------------------------------------------

static void print_first_difference(Writer *w, const unsigned char *a, const unsigned char *b) {
  long i = prompt.n, end = prompt.n + gen.tokens;
  char x[8], y[8];
  while (i < end && a[i] == b[i]) i++;
  if (i == end) { printf("They wrote the same text.\n"); return; }
  double p = exp(-text_loss(w, a, i, i + 1, 0)), q = exp(-text_loss(w, b, i, i + 1, 0));
  printf("They differ after %ld byte%s: greedy took %s (%.1f %%), beam search %s (%.1f %%).\n",
         i - prompt.n, i - prompt.n == 1 ? "" : "s", readable(x, a[i]), 100 * p,
         readable(y, b[i]), 100 * q);
}

static void compare(Writer *w) {
  Sampler greedy = {0, 1, 0, 0};
  long n = prompt.n + gen.tokens;
  unsigned char *written[2];
  double loss[2], rate[2];
  for (int i = 0; i < 2; i++) {
    printf("--- %s ---\n", i ? "beam search" : "greedy");
    Result result = write_text(w, &greedy, 1, i ? gen.beam : 0);
    written[i] = (unsigned char *)memcpy(host_alloc(NULL, n), text_of(w, 0), n);
    rate[i] = gen.tokens / result.seconds;
    loss[i] = text_loss(w, written[i], prompt.n, n, 0);
  }
  printf("\n%-12s %10s %10s %10s\n", "", "loss", "per byte", "tokens/s");
  for (int i = 0; i < 2; i++)
    printf("%-12s %10.3f %10.4f %10.0f\n", i ? "beam search" : "greedy", loss[i],
           loss[i] / gen.tokens, rate[i]);
  print_first_difference(w, written[0], written[1]);
  double nats = fabs(loss[0] - loss[1]), tens = nats / log(10);
  if (nats == 0) printf("To the model both texts are equally likely.\n");
  else printf("To the model, the text of %s is %s%.*f times as likely.\n",
              loss[1] < loss[0] ? "beam search" : "greedy", tens < 6 ? "" : "10^", tens < 2,
              tens < 6 ? exp(nats) : tens);
}

// ---- 5. Looking inside: --attention -----------------------------------------------------------
// A picture for each layer (down) and head (across): a triangle in which row t shows how much byte
// t of the prompt attends to each byte up to itself. Only the last MAX_SHOWN bytes, or as many as
// the context has, are drawn, and computed as if nothing stood before them.
enum { MAX_SHOWN = 64, MAP = 240, GAP = 34, MARGIN = 60, CAPTION = 96 };   // bytes; pixels

// att[t,s] of one head, from the queries and keys that forward() left: (n,n), 0 for s > t.
static void head_attention(const Model *m, int layer, int head, int n, real *att) {
  int C = m->config.n_embd, H = m->config.n_head, D = C / H;
  const real *q = m->act[layer].qkv.data + head*D, *k = q + C;
  for (int t = 0; t < n; t++) {
    for (int s = 0; s < n; s++) att[t*n + s] = s <= t ? z_of(q + 3L*t*C, k + 3L*s*C, D) : 0;
    softmax(att + t*n, t + 1);
  }
}

static double mean_distance(const real *att, int n) {   // how many bytes back a head attends
  double sum = 0;
  for (int t = 0; t < n; t++)
    for (int s = 0; s < t; s++) sum += att[t*n + s] * (t - s);
  return sum / n;
}

// The character that begins at byte i, fit for XML; a dot for the rest of one, or what is none.
static const char *label(const unsigned char *bytes, int n, int i) {
  static char character[8];
  int length = utf8_length(bytes + i, n - i);
  if (length == 3 && memcmp(bytes + i, "\xef\xbf\xbe", 3) >= 0) length = -1;   // U+FFFE, U+FFFF
  if (bytes[i] == ' ') return "\xe2\x90\xa3";
  if (bytes[i] == '\n') return "\xe2\x86\xb5";
  if (bytes[i] == '<') return "&lt;";
  if (bytes[i] == '&') return "&amp;";
  if (length < 1 || bytes[i] < 32 || bytes[i] == 127) return "\xc2\xb7";
  snprintf(character, length + 1, "%s", bytes + i);
  return character;
}

static void svg_head(FILE *f, const real *att, const unsigned char *bytes, int n, double x,
                     double y) {
  double side = (double)MAP / n, size = MIN(11, side);
  char style[80];
  fprintf(f, "<path d=\"M%.1f %.1fL%.1f %.1fH%.1fz\" fill=\"#f1f4f9\"/>\n", x, y, x + MAP, y + MAP,
          x);
  for (int t = 0; t < n; t++)
    for (int s = 0; s <= t; s++) {
      double a = sqrt(att[t*n + s]);              // the root makes small weights visible
      if (a < 0.05) continue;
      fprintf(f, "<rect x=\"%.2f\" y=\"%.2f\" width=\"%.2f\" height=\"%.2f\" "
              "fill=\"rgb(%.0f,%.0f,%.0f)\"/>\n", x + s*side, y + t*side, side, side,
              241 - 233*a, 244 - 196*a, 249 - 142*a);
    }
  snprintf(style, sizeof style, "font-size=\"%.1f\" text-anchor=\"middle\" fill=\"#666\"", size);
  for (int t = 0; t < n; t++) {
    svg_text(f, x - size*0.7, y + (t + 0.5)*side + size*0.35, style, "%s", label(bytes, n, t));
    svg_text(f, x + (t + 0.5)*side, y + MAP + size*1.1, style, "%s", label(bytes, n, t));
  }
}

static void write_attention(Writer *w, const unsigned char *bytes, long n_bytes) {
  Model *m = &w->model;
  int L = m->config.n_layer, H = m->config.n_head;
  int n = (int)MIN(n_bytes, MIN(MAX_SHOWN, m->config.block_size));
  real *att = (real *)host_alloc(NULL, n*n * sizeof(real));
  whole_window(m, bytes, n_bytes - n, n);
  for (int v = 0; v < m->config.vocab_size; v++)   // of the last row, which attends to all others
    check_finite(m->logits.data[(long)(n - 1) * m->config.vocab_size + v]);
  bytes += n_bytes - n;
  FILE *f = output_open(NULL, gen.attention);
  svg_begin(f, 2*MARGIN + H*MAP + (H - 1)*GAP, CAPTION + L*(MAP + 2*GAP) + GAP);
  svg_text(f, MARGIN, 30, "font-size=\"18\"", "What each byte attends to");
  svg_text(f, MARGIN, 52, "fill=\"#666\"", "A row is a byte, its columns the bytes up to it; "
           "darker is more attention. Spread evenly, it would go %.1f bytes back.", (n - 1) / 4.0);
  for (int l = 0; l < L; l++)
    for (int h = 0; h < H; h++) {
      double x = MARGIN + h*(MAP + GAP), y = CAPTION + l*(MAP + 2*GAP);
      head_attention(m, l, h, n, att);
      svg_text(f, x, y - 10, "", "layer %d, head %d: %.1f bytes back", l + 1, h + 1,
               mean_distance(att, n));
      svg_head(f, att, bytes, n, x, y);
    }
  fprintf(f, "</svg>\n");
  output_close();
  fprintf(stderr, "%s: the attention of %d heads over %d bytes\n", gen.attention, L*H, n);
  free(att);
}

// ---- 6. Speed ---------------------------------------------------------------------------------

// Reads all weights and computes next to nothing: the fastest that a step could be.
static void read_weights(void *model) {
  Model *m = (Model *)model;
  parallel_for (chunk, chunks(m->n_weights)) {
    const real *x = m->weights.data + chunk*CHUNK;
    long n = MIN((long)CHUNK, m->n_weights - chunk*CHUNK) / (4*VECTOR) * (4*VECTOR);
    vec sum[4] = {{0}};
    for (long i = 0; i < n; i += 4*VECTOR)
      for (int j = 0; j < 4; j++) sum[j] += *(const vec *)(x + i + j*VECTOR);
    vec all = sum[0] + sum[1] + sum[2] + sum[3];
    m->partial[chunk] = all[0];                   // without a use, the sum would not be computed
  }
}

// Tokens a second, and how near that is to reading the weights: TURN times the one, then TURN times
// the other, and so on. The first WARM_UP of a turn find the caches as the other left them, and are
// not counted. Medians.
enum { BENCH_ROWS = 16, TURN = 20, WARM_UP = 5 };
static void bench(Writer *w) {
  Model *m = &w->model;
  int T = MIN(m->config.block_size, 128);
  double bytes = (double)m->n_weights * sizeof(real), took[2][100*TURN];
  unsigned char byte[BENCH_ROWS] = {0};
  printf("%.2f M parameters, %.1f MB of weights, threads %d\n", m->n_parameters / 1e6, bytes / 1e6,
         n_threads);
  for (int rows = 1; rows <= w->max_rows; rows *= 2) {
    int n = 0;
    start_writing(w, byte, 1, rows);
    for (double until = seconds() + 3; n < 100*TURN && seconds() < until; n += TURN)
      for (int writing = 0; writing < 2; writing++)
        for (int i = -WARM_UP; i < TURN; i++) {
          if (w->n >= MAX(T, 2)) start_writing(w, byte, 1, rows);
          double started = seconds();
          if (writing) advance(w, byte);
          else launch(read_weights, m);
          if (i >= 0) took[writing][n + i] = seconds() - started;
        }
    double read = median(took[0], n), step = median(took[1], n);
    printf("rows %-3d %9.0f tokens/s | weights read at %6.1f GB/s, %3.0f %% of the %.1f GB/s of "
           "reading alone\n", rows, rows / step, bytes / step * 1e-9, 100 * read / step,
           bytes / read * 1e-9);
    fflush(stdout);
  }
}

// ---- 7. Options and main ----------------------------------------------------------------------

#ifndef TESTS
static Option generate_options[] = {
  WORD(gen, prompt, NULL, 0, "the beginning of the text; default: a line break, not printed"),
  INT(gen, tokens, "256", 0, 1e7, 0, "bytes to write"),
  NUM(gen, temperature, "0.8", 0, 100, 0, "below 1: likely bytes become likelier; 0: greedy"),
  INT(gen, top_k, "0", 0, 256, 0, "choose among the k likeliest; 0: all"),
  NUM(gen, top_p, "1", 0, 1, 0, "choose among the fewest that add up to this probability"),
  FLAG(gen, greedy, "always take the likeliest byte"),
  INT(gen, beam, NULL, 1, 256, 0, "beam search with this many hypotheses"),
  INT(gen, samples, "1", 1, 256, 0, "texts to write at the same time"),
  INT(gen, seed, "1337", 0, 2147483647, 0, "of the random choices"),
  FLAG(gen, compare, "greedy against beam search (of 4, or --beam)"),
  WORD(gen, score, NULL, 0, "print the loss of this text, and end"),
  FLAG(gen, explain, "show what else each byte might have been"),
  WORD(gen, attention, NULL, 0,
       "draw what each head attends to in the prompt's end, up to 64 bytes: an .svg file"),
  FLAG(gen, bench, "time steps of the model in DIR; without DIR, of one with 10.8 M parameters"),
  INT(gen, threads, NULL, 1, 1024, 0, "default: as many as help"),
  END_OF_OPTIONS};

static const char GENERATE_USAGE[] =
  "usage: generate [DIR] [options]\n\n"
  "Writes text with the GPT in DIR (default: run), which can be any GPT-2 whose tokens are bytes.\n"
  "Write an option as --name value or --name=value. Here each stands with its default.\n";

static void check_choices(void) {
  if (gen.greedy && gen.beam) die("--greedy and --beam are alternatives: give only one");
  if (gen.samples > 1 && (gen.greedy || gen.temperature == 0 || gen.beam || gen.compare))
    die("--samples %d with --greedy, --temperature 0, --beam or --compare: always the same text",
        gen.samples);
  if (gen.compare && gen.greedy) die("--compare is greedy and beam search: leave out --greedy");
  if (gen.compare && !gen.tokens) die("--compare with --tokens 0 has nothing to compare");
  if (gen.score && (!*gen.score || !gen.score[1]))
    die("--score needs a text of two bytes or more: the first is only the context of the second");
  if (gen.score && (gen.prompt || gen.beam || gen.compare || gen.bench))
    die("--score takes the whole text itself: leave out --prompt, --beam, --compare and --bench");
  if (gen.compare && gen.explain) die("--explain is for one text: leave out --compare");
  if (gen.compare && !gen.beam) gen.beam = 4;
}

// The beginning of the text; for --score all of it.
static void take_prompt(Config c) {
  if (gen.prompt && !*gen.prompt) gen.prompt = NULL;
  const char *bytes = gen.score ? gen.score : gen.prompt ? gen.prompt : "\n";
  prompt.byte = (const unsigned char *)bytes;
  prompt.n = (long)strlen(bytes);
  prompt.hidden = !gen.prompt;
  for (long i = 0; i < prompt.n && !gen.bench; i++)
    if (prompt.byte[i] >= c.vocab_size)
      die("byte %ld of %s is %d, but the vocabulary of the model has %d entries", i, gen.score
          ? "--score" : gen.prompt ? "--prompt" : "the default prompt", prompt.byte[i],
          c.vocab_size);
  if (prompt.n > c.block_size && !gen.score)
    fprintf(stderr, "generate: the prompt has %ld bytes, the context of the model is %d: its last "
            "%ld are used\n", prompt.n, c.block_size,
            prompt.n - window_of(prompt.n - 1, c.block_size));
}

int main(int argc, char **argv) {
  static Writer w;
  Config config = {6, 6, 384, 256, 256};          // --bench without a folder: 10.8 M parameters
  parse_options(generate_options, argc, argv, GENERATE_USAGE, &gen.folder, 1);
  check_choices();
  int random = gen.bench && !gen.folder;
  if (!gen.folder) gen.folder = "run";
  if (!random) {
    if (access(gen.folder, F_OK))
      die("%s: %s: train a model first (make run), or name its folder", gen.folder,
          strerror(errno));
    read_config(gen.folder);
    config = opt.config;
  }
  if (config.vocab_size > 256 && gen.score)
    die("%s has %d vocabulary entries, but here a token is a byte: a loss would mean nothing",
        gen.folder, config.vocab_size);
  if (config.vocab_size > 256)
    fprintf(stderr, "generate: of %d vocabulary entries only the first 256 are written, as bytes: "
            "a model whose tokens are not bytes will write nonsense\n", config.vocab_size);
  take_prompt(config);
  int rows = gen.bench ? BENCH_ROWS : MAX(gen.beam, gen.samples);
  int cores = (int)MAX(1, MIN(1024, sysconf(_SC_NPROCESSORS_ONLN)));
  int few = 700000;   // parameters: below this, one thread ends before others could help
  writer_layout(&w, config, rows, gen.bench ? 1024 : prompt.n + gen.tokens);
  device_start(gen.threads ? gen.threads : w.model.n_parameters < few ? 1 : cores, "fp32");
  if (random) model_allocate(&w.model), model_init(&w.model, 1);
  else model_load(&w.model, gen.folder);
  pack_weights(&w.model);
  writer_allocate(&w);
  if (gen.attention) write_attention(&w, prompt.byte, prompt.n);
  if (gen.bench) bench(&w);
  else if (gen.score) score_text(&w, prompt.byte, prompt.n);
  else if (gen.compare) compare(&w);
  else write_samples(&w);
  return finish(0);
}
#endif   // TESTS

// ---- 8. Tests ---------------------------------------------------------------------------------
// With -DTESTS this is a program that checks the sections above on models with random weights.

#ifdef TESTS
static int passed, failed;
__attribute__((format(printf, 2, 3)))
static void check(int ok, const char *format, ...) {
  va_list args;
  va_start(args, format);
  printf(ok ? "ok    " : "FAIL  ");
  vprintf(format, args);
  printf("\n");
  va_end(args);
  if (ok) passed++; else failed++;
}

// A small model whose weights are larger than initial ones, so that its probabilities differ.
static void test_model(Writer *w, int V, int T, int C, int max_rows, long n) {
  Config config = {2, 2, C, T, V};
  writer_layout(w, config, max_rows, n);
  model_allocate(&w->model);
  writer_allocate(w);
  model_init(&w->model, 5);
  for (long i = 0; i < w->model.n_weights; i++)
    if (i < w->model.n_in_matrices) w->model.weights.data[i] *= 12;
    else w->model.weights.data[i] += (real)(0.2 * random_normal(7, i));
  pack_weights(&w->model);
}

static void random_text(unsigned char *bytes, long n, int V) {
  for (long i = 0; i < n; i++) bytes[i] = (unsigned char)(random_bits(3, i) % V);
}

// Writes a given text in several rows; each step's logits must be those of forward().
static void test_cache(int T, int C, int rows, long prompt_size) {
  Writer w, whole;
  enum { BYTES = 60, V = 37 };
  unsigned char text[BYTES + 1] = {0}, byte[32];
  double worst = 0;
  test_model(&w, V, T, C, rows, BYTES);
  test_model(&whole, V, T, C, 1, BYTES);
  random_text(text, BYTES, V);
  start_writing(&w, text + 7, 3, rows);           // of which nothing may be left
  random_text(byte, rows, V);
  advance(&w, byte);
  start_writing(&w, text, prompt_size, rows);
  for (;;) {
    for (int row = 0; row < rows; row++) {
      unsigned char *own = text_of(&w, row);
      long start = window_of(w.n - 1, T);
      whole_window(&whole.model, own, start, (int)(w.n - start));
      const real *expected = whole.model.logits.data + (w.n - 1 - start)*V;
      for (int v = 0; v < V; v++)
        worst = MAX(worst, fabs(logits_of(&w, row)[v] - expected[v]) / MAX(1, fabs(expected[v])));
    }
    if (w.n == BYTES) break;
    for (int row = 0; row < rows; row++) byte[row] = (unsigned char)((text[w.n] + row) % V);
    advance(&w, byte);
  }
  check(worst < 1e-5, "cache: logits of %ld steps x %d rows, context %d, %d channels, differ from "
        "forward() by %.1e", BYTES - prompt_size, rows, T, C, worst);
}

static void test_window(void) {   // every byte has a place, and at least half a window before it
  int ok = 1;
  for (int T = 1; T < 12; T++)
    for (long i = 0; i < 100; i++) {
      long start = window_of(i, T);
      ok &= start <= i && i - start < T && (start == 0 || i - start >= T/2);
      ok &= i == 0 || start == window_of(i - 1, T) || i - 1 - window_of(i - 1, T) == T - 1;
    }
  check(ok, "window: holds every byte, moves only when full, keeps half");
}

// Draws many times; chi-square against the distribution that the definitions give.
static void test_sampler(const char *name, Sampler s) {
  enum { V = 24, DRAWS = 200000 };
  real logits[V];
  double p[V], before[V] = {0}, all = 0, kept = 0, chi2 = 0;
  int likelier[V] = {0}, count[V] = {0}, k = s.top_k ? s.top_k : V, degrees = -1, stray = 0;
  for (int v = 0; v < V; v++) logits[v] = (real)(2 * random_normal(9, v));
  for (int v = 0; v < V; v++) p[v] = exp(logits[v] / s.temperature);
  for (int v = 0; v < V; v++)
    for (int u = 0; u < V; u++)
      if (p[u] > p[v]) likelier[v]++, before[v] += p[u];
  for (int v = 0; v < V; v++) if (likelier[v] < k) all += p[v];
  for (int v = 0; v < V; v++)                             // the one that crosses top_p stays
    if (likelier[v] >= k || before[v] >= s.top_p * all) p[v] = 0;
    else kept += p[v];
  for (long i = 0; i < DRAWS; i++) count[choose(&s, logits, V, 0, i)]++;
  for (int v = 0; v < V; v++) {
    double expected = DRAWS * p[v] / kept;
    if (expected > 0) chi2 += (count[v] - expected) * (count[v] - expected) / expected, degrees++;
    else stray += count[v];
  }
  double limit = degrees + 4 * sqrt(2.0 * degrees) + 8;   // passed by chance once in 10^4
  check(chi2 < limit && !stray, "sampler: %s: %d bytes possible, chi-square %.1f, limit %.1f", name,
        degrees + 1, chi2, limit);
}

static void test_ties(void) {
  real logits[4] = {1, 3, 3, 0}, equal[4] = {2, 2, 2, 2};
  Sampler greedy = {0, 1, 0, 0};
  Choice c[4];
  check(choose(&greedy, logits, 4, 0, 0) == 1, "greedy: of equal bytes the smaller");
  probabilities(c, equal, 4, 1);
  int n = truncate_choices(c, 4, 3, 1);
  check(n == 3 && c[0].byte == 0 && c[2].byte == 2 && fabs(c[0].p - 1/3.0) < 1e-12,
        "top-k: of equal bytes the smaller, renormalised");
  probabilities(c, equal, 4, 1);
  n = truncate_choices(c, 4, 0, 0.5);
  check(n == 2 && c[1].byte == 1, "top-p 0.5 of four equal bytes: two");
  probabilities(c, logits, 4, 1);
  check(truncate_choices(c, 4, 0, 0) == 1 && c[0].byte == 1, "top-p 0 is greedy");
  Sampler narrow = {1e-3, 1, 0, 0};
  check(choose(&narrow, logits, 1, 0, 0) == 0, "a vocabulary of one word");
  Sampler plain = {1, 1, 0, 7};
  int same = 0;
  for (long i = 0; i < 1000; i++)
    same += choose(&plain, equal, 4, 0, i) == choose(&plain, equal, 4, 1, i);
  check(same > 190 && same < 310, "two samples draw alike by chance alone: %d of 1000, one in four "
        "expected", same);
}

// With as many hypotheses as words, two steps of beam search see all pairs.
static void test_exhaustive(void) {
  enum { V = 16 };
  Writer w;
  double log_p[V*V], score[V] = {0}, worst = 0;
  unsigned char text[8] = {3, 1, 4, 1, 5};
  test_model(&w, V, 8, 16, V, 8);
  for (int pair = 0; pair < V*V; pair++) {
    text[5] = (unsigned char)(pair / V);
    text[6] = (unsigned char)(pair % V);
    log_p[pair] = -text_loss(&w, text, 5, 7, 0);
  }
  start_writing(&w, text, 5, 1);
  beam_step(&w, score);
  beam_step(&w, score);
  int same = w.rows == V;
  for (int i = 0; i < w.rows; i++) {              // row i is the pair that i others are better than
    const unsigned char *byte = text_of(&w, i) + 5;
    int own = byte[0] * V + byte[1], better = 0;
    for (int pair = 0; pair < V*V; pair++) better += log_p[pair] > log_p[own];
    same &= better == i;
    worst = MAX(worst, fabs(score[i] - log_p[own]));
  }
  check(same && worst < 1e-4, "beam: with %d hypotheses, two steps are the %d best of all %d pairs "
        "(log p to %.0e)", V, V, V*V, worst);
}

// A long search, beyond the window: the scores it adds up are the losses of its texts, which a
// wrong note of where a key lies would change.
static void test_beam(void) {
  enum { V = 20, BYTES = 50 };
  Writer w;
  unsigned char text[BYTES] = {1, 2, 3};
  double score[6] = {0}, worst = 0;
  test_model(&w, V, 16, 24, 6, BYTES);
  start_writing(&w, text, 3, 1);
  while (w.n < BYTES) beam_step(&w, score);
  for (int row = 0; row < w.rows; row++) {
    memcpy(text, text_of(&w, row), BYTES);
    worst = MAX(worst, fabs(score[row] + text_loss(&w, text, 3, BYTES, 0)));
  }
  check(worst < 1e-3, "beam: after %d steps and slides, log p of each row is minus its loss (to "
        "%.0e)", BYTES - 3, worst);
}

// A row is bit for bit the same, written alone or as the last of many.
static void test_rows(int rows) {
  enum { V = 33, BYTES = 40 };
  Writer many, one;
  unsigned char byte[64], text[BYTES];
  int same = 1, last = rows - 1;
  test_model(&many, V, 16, 24, rows, BYTES);
  test_model(&one, V, 16, 24, 1, BYTES);
  random_text(text, BYTES, V);
  start_writing(&many, text, 2, rows);
  start_writing(&one, text, 2, 1);
  while (one.n < BYTES) {
    for (int row = 0; row < rows; row++) byte[row] = (unsigned char)((text[one.n] + row) % V);
    advance(&many, byte);
    advance(&one, byte + last);
    same &= !memcmp(logits_of(&many, last), logits_of(&one, 0), V * sizeof(real));
  }
  check(same, "rows: the last of %d is bit for bit the one written alone", rows);
}

static void test_attention(void) {   // the weights that the picture shows give forward()'s output
  Writer w;
  enum { V = 20, N = 13, C = 24, D = C / 2 };
  unsigned char text[N + 1] = {0};
  real att[N*N];
  double worst = 0;
  test_model(&w, V, 16, C, 1, N);
  random_text(text, N, V);
  whole_window(&w.model, text, 0, N);
  Activations *a = &w.model.act[1];
  for (int head = 0; head < 2; head++) {
    head_attention(&w.model, 1, head, N, att);
    for (int t = 0; t < N; t++)
      for (int d = 0; d < D; d++) {
        double out = 0;
        for (int s = 0; s < N; s++) out += att[t*N + s] * a->qkv.data[s*3*C + 2*C + head*D + d];
        worst = MAX(worst, fabs(out - a->attn.data[t*C + head*D + d]));
      }
  }
  check(worst < 1e-5, "attention: what is drawn gives what forward() made of it, to %.0e", worst);
}

int main(void) {
  device_start(2, "fp32");
  test_window();
  test_cache(64, 32, 1, 1);
  test_cache(16, 32, 3, 1);
  test_cache(16, 48, 18, 5);     // more rows than a tile has
  test_cache(16, 10, 1, 43);     // the prompt is longer than the context; odd channels
  test_cache(7, 6, 2, 7);
  test_cache(1, 8, 1, 1);
  Sampler plain = {1, 1, 0, 1}, warm = {2.5, 1, 0, 2}, cold = {0.4, 1, 0, 3}, k = {0.8, 1, 5, 4},
          p = {1, 0.9, 0, 5}, both = {1.5, 0.7, 12, 6};
  test_sampler("temperature 1", plain);
  test_sampler("temperature 2.5", warm);
  test_sampler("temperature 0.4", cold);
  test_sampler("top-k 5", k);
  test_sampler("top-p 0.9", p);
  test_sampler("top-k 12, then top-p 0.7", both);
  test_ties();
  test_exhaustive();
  test_beam();
  test_rows(3);
  test_rows(2*ROWS);
  test_attention();
  printf("%d passed, %d failed\n", passed, failed);
  return failed > 0;
}
#endif   // TESTS
