// generate.c writes text with a GPT that train.c has trained: one step at a time, or several.
//
// A model gives, for each byte that may come next, a probability. What to do with it is a choice:
//
//   single-step    greedy: the likeliest byte. Or a draw, after temperature, top-k and top-p.
//   multi-step     beam search: of all texts of n bytes, look for the likeliest, by keeping the W
//                  best beginnings. The likeliest text need not start with the likeliest byte.
//
// Both are compared by what the model itself says of the result: the loss, -log p, of its bytes.
//
// A step costs reading every weight once, because a token sees older tokens only through their keys
// and values, and those are kept: the KV cache. Rows, texts that are written at the same time, share
// that read. Letters as in train.c; N rows, and T the context.
//
// Read in this order: step() and advance() in room 1, then room 2, a page each for drawing and for
// searching, then write_text() in room 4. Rooms: 1 a step, 2 the choice, 3 looking inside,
// 4 writing, 5 speed, 6 options and main; then tests.
//
//   ./generate --prompt "Once"            a text, from the model in run/
//   ./generate --compare --beam 8         greedy and beam search side by side; --help lists the rest

#define NO_MAIN   // train.c's
#pragma GCC diagnostic ignored "-Wunused-function"   // this program does not train
#include "train.c"

// ---- 1. A step --------------------------------------------------------------------------------
// The context slides: when a text outgrows the window of T tokens, the window moves on by half. Its
// newest half is computed again, once, since each token now has another position, and all goes on.
// This one rule, window_of(), holds for prompts, for writing and for the loss of a text, so that the
// loss is that of the very probabilities the text was written with.

typedef struct {
  Model model;
  int most, rows;          // rows there is memory for; rows being written
  long room, n;            // bytes there is memory for in each; each is so long, prompt included
  long start;              // the byte at position 0 of the window
  unsigned char *text;     // [most][room]
  int *cell;               // [most][T]: the row of the cache that has the token at position t
  real *cache;             // [L][most][T][2C]: key and value of each token of the window
  real *att;               // [most][H][T], scratch of attention_step()
  unsigned char *old_text; // advance() copies from these when rows change places
  int *old_cell;
} Writer;

// Where the window lies in which byte i has its place.
static long window_of(long i, int T) {
  long step = T - T/2;
  return i < T ? 0 : (i - T) / step * step + step;
}

static unsigned char *text_of(Writer *w, int row) { return w->text + row * w->room; }

static real *cache_at(Writer *w, int layer, int row, long t) {
  long T = w->model.config.block_size;
  return w->cache + (((long)layer * w->most + row) * T + t) * 2 * w->model.config.n_embd;
}

static void writer_plan(Writer *w, Config config, int most, long room) {
  memset(w, 0, sizeof *w);
  w->most = most;
  w->room = room + 1;      // train.c's windows look one byte further, for a target
  model_plan(&w->model, config, MAX(most, config.block_size), 0, 0);
}

static void writer_allocate(Writer *w) {
  Config c = w->model.config;
  double rows = w->most, T = c.block_size;
  double cache = rows * T * 2 * c.n_embd * c.n_layer * sizeof(real);
  double needed = model_bytes(&w->model) + cache + rows * c.n_head * T * sizeof(real)
                + 2 * rows * (w->room + T * sizeof(int));
  if (needed > device_memory())
    die("%d texts at once need %.1f GB, the machine has %.1f GB: lower --beam, --samples or "
        "--tokens", w->most, needed / 1e9, device_memory() / 1e9);
  model_allocate(&w->model);
  w->cache = (real *)device_alloc((size_t)cache);
  w->att = (real *)device_alloc(w->most * (size_t)c.n_head * c.block_size * sizeof(real));
  w->text = (unsigned char *)device_alloc(w->most * w->room);
  w->old_text = (unsigned char *)device_alloc(w->most * w->room);
  w->cell = (int *)device_alloc(w->most * (size_t)c.block_size * sizeof(int));
  w->old_cell = (int *)device_alloc(w->most * (size_t)c.block_size * sizeof(int));
}

static void writer_free(Writer *w) {
  model_free(&w->model);
  device_free(w->cache); device_free(w->att); device_free(w->text); device_free(w->old_text);
  device_free(w->cell); device_free(w->old_cell);
}

// y[n,o] = sum_c x[n,c] w[c,o] + b[o] for the few rows of a step. Nothing is used twice but across
// rows, so no tile and no packing: a thread takes a range of columns, and walks down the rows of w
// four at a time, in the order they lie in memory. Each vector that is loaded meets all rows n; the
// sums are in y, in the innermost cache. y[n,o] is always the same sum in the same order, however
// many rows and threads there are.
enum { FEW = 16 };         // rows whose sums stay near; of more, w is read again for the next FEW
static void columns_step(real *y, const real *x, const real *w, const real *bias, int N, int C,
                         int O, int from, int to) {
  for (int n = 0; n < N; n++) memcpy(y + (long)n*O + from, bias + from, (to - from) * sizeof(real));
  for (int c = 0; c < C; c += 4) {
    const real *row[4];
    real x4[FEW][4];
    for (int i = 0; i < 4; i++) row[i] = w + (long)MIN(c + i, C - 1) * O;
    for (int n = 0; n < N; n++)
      for (int i = 0; i < 4; i++) x4[n][i] = c + i < C ? x[(long)n*C + c + i] : 0;
    int o = from;
    for (; o + VECTOR <= to; o += VECTOR) {
      vec w4[4];
      for (int i = 0; i < 4; i++) {
        w4[i] = *(const vec *)(row[i] + o);
        __builtin_prefetch(row[i] + o + 8L*O);
      }
      for (int n = 0; n < N; n++)
        *(vec *)(y + (long)n*O + o) += x4[n][0]*w4[0] + x4[n][1]*w4[1] + x4[n][2]*w4[2] + x4[n][3]*w4[3];
    }
    for (; o < to; o++)
      for (int n = 0; n < N; n++)
        for (int i = 0; i < 4; i++) y[(long)n*O + o] += x4[n][i] * row[i][o];
  }
}

static void linear_step(Tensor y, Tensor x, Affine p, int N, int C, int O) {
  int blocks = (O + VECTOR - 1) / VECTOR;         // no thread's range cuts one
  parallel_for (part, n_threads) {
    int from = (int)(blocks * part / n_threads) * VECTOR;
    int to = MIN(O, (int)(blocks * (part + 1) / n_threads) * VECTOR);
    for (int n = 0; n < N && from < to; n += FEW)
      columns_step(y.data + (long)n*O, x.data + (long)n*C, p.weight.data, p.bias.data,
                   MIN(FEW, N - n), C, O, from, to);
  }
}

// logits[n,v] = sum_c x[n,c] wte[v,c]
static void head_step(Tensor logits, Tensor x, Tensor wte, int N, int C, int V) {
  parallel_for (v, V)
    for (int n = 0; n < N; n++)
      logits.data[(long)n*V + v] = dot(x.data + (long)n*C, wte.data + v*C, C);
}

// Attention of one token a row, at position t, to those at positions 0..t: the keys and values of
// the old ones come from the cache, those of the new one are put there.
static void attention_step(Writer *w, Tensor out, Tensor qkv, int layer, int t) {
  int C = w->model.config.n_embd, H = w->model.config.n_head, D = C / H;
  int T = w->model.config.block_size;
  real scale = 1 / sqrt_(D);
  parallel_for (nh, w->rows * H) {
    int n = nh / H, column = nh % H * D, *cell = w->cell + (long)n*T;
    const real *q = qkv.data + (long)n*3*C + column;
    real *o = out.data + (long)n*C + column, *att = w->att + nh*T;
    real *own = cache_at(w, layer, cell[t], t) + column;
    memcpy(own, q + C, D * sizeof(real));
    memcpy(own + C, q + 2*C, D * sizeof(real));
    for (int s = 0; s <= t; s++) att[s] = dot(q, cache_at(w, layer, cell[s], s) + column, D);
    real sum = softmax_weights(att, t + 1, t + 1, max_of(att, t + 1), scale);
    for (int d = 0; d < D; d++) o[d] = 0;
    for (int s = 0; s <= t; s++) {
      const real *v = cache_at(w, layer, cell[s], s) + C + column;
      for (int d = 0; d < D; d++) o[d] += att[s] / sum * v[d];
    }
  }
}

// The logits after one more token in each row: forward() with T = 1, and attention to the cache.
static void step(void *argument) {
  Writer *w = (Writer *)argument;
  Model *m = &w->model;
  int N = w->rows, C = m->config.n_embd, V = m->config.vocab_size;
  int t = (int)(w->n - 1 - w->start);
  Tensor position = {m->wpe.data + (long)t*C, NULL}, x = m->embedding;
  embedding_forward(x, m->token, m->wte, position, N, 1, C);
  for (int l = 0; l < m->config.n_layer; l++) {
    Block *p = &m->block[l];
    Acts *a = &m->act[l];
    layernorm_forward(a->ln_1, a->ln_1_stats, x, p->ln_1, N, C);
    linear_step(a->qkv, a->ln_1, p->c_attn, N, C, 3*C);
    attention_step(w, a->attn, a->qkv, l, t);
    linear_step(a->attn_proj, a->attn, p->attn_proj, N, C, C);
    residual_forward(a->x_mid, x, a->attn_proj, N, C);
    layernorm_forward(a->ln_2, a->ln_2_stats, a->x_mid, p->ln_2, N, C);
    linear_step(a->fc, a->ln_2, p->c_fc, N, C, 4*C);
    gelu_forward(a->gelu, a->fc, N, 4*C);
    linear_step(a->mlp_proj, a->gelu, p->mlp_proj, N, 4*C, C);
    residual_forward(a->x, a->x_mid, a->mlp_proj, N, C);
    x = a->x;
  }
  layernorm_forward(m->x_f, m->x_f_stats, x, m->ln_f, N, C);
  head_step(m->logits, m->x_f, m->wte, N, C, V);
}

// forward() of n bytes from `start` on: logits and losses of all of them.
static void whole_window(Model *m, const unsigned char *text, long start, int n) {
  ForwardOnly f = {m, 1, n};
  load_windows(m, text, &start, 1, n);
  launch(forward_only, &f);
}

// Fills the cache of a row with its window up to the newest byte; forward() has made all of it.
static void fill_cache(Writer *w, int row) {
  int C = w->model.config.n_embd, n = (int)(w->n - w->start);
  if (!n) return;
  whole_window(&w->model, text_of(w, row), w->start, n);
  for (int t = 0; t < n; t++) {
    w->cell[(long)row * w->model.config.block_size + t] = row;
    for (int l = 0; l < w->model.config.n_layer; l++)
      memcpy(cache_at(w, l, row, t), w->model.act[l].qkv.data + (long)t*3*C + C,
             2*C * sizeof(real));
  }
}

static const real *logits_of(const Writer *w, int row) {
  return w->model.logits.data + (long)row * w->model.config.vocab_size;
}

// Starts with `rows` copies of a prompt of one byte or more. It is computed once: all rows look at
// the first one's part of the cache.
static void start_writing(Writer *w, const unsigned char *prompt, long n, int rows) {
  int T = w->model.config.block_size, V = w->model.config.vocab_size;
  w->n = n;
  w->start = window_of(n - 1, T);
  w->rows = rows;
  for (int row = 0; row < rows; row++) memcpy(text_of(w, row), prompt, n);
  fill_cache(w, 0);
  for (int row = 1; row < rows; row++) memcpy(w->cell + (long)row*T, w->cell, T * sizeof(int));
  real *logits = w->model.logits.data, *last = logits + (n - 1 - w->start)*V;
  memmove(logits, last, V * sizeof(real));
  for (int row = 1; row < rows; row++) memcpy(logits + (long)row*V, logits, V * sizeof(real));
}

// Row i goes on from what was row parent[i]. Nothing is computed again, and no key or value moves:
// a token's stay in the cache row of whoever wrote it, and what is copied is the note of where.
static void reorder(Writer *w, const int *parent, int rows) {
  int T = w->model.config.block_size, moved = rows > w->rows;
  for (int i = 0; i < rows; i++) moved |= parent[i] != i;
  w->rows = rows;
  if (!moved) return;
  unsigned char *text = w->text;
  int *cell = w->cell;
  w->text = w->old_text; w->old_text = text;
  w->cell = w->old_cell; w->old_cell = cell;
  for (int i = 0; i < rows; i++) {
    memcpy(text_of(w, i), text + parent[i] * w->room, w->n);
    memcpy(w->cell + (long)i*T, cell + (long)parent[i]*T, T * sizeof(int));
  }
}

// One more byte for each row; then logits_of() are those after it.
static void advance(Writer *w, const unsigned char *byte) {
  int T = w->model.config.block_size;
  if (w->n - w->start == T) {                     // the window is full: it slides
    w->start = window_of(w->n, T);
    for (int row = 0; row < w->rows; row++) fill_cache(w, row);
  }
  for (int row = 0; row < w->rows; row++) {
    text_of(w, row)[w->n] = byte[row];
    w->cell[(long)row*T + w->n - w->start] = row;
    w->model.token[row] = byte[row];
  }
  w->n++;
  launch(step, w);
}

// ---- 2. The choice ----------------------------------------------------------------------------
// Only bytes are chosen: of a larger vocabulary, the words from 256 on are left out.

typedef struct { int byte; double p; } Choice;

static int by_probability(const void *a, const void *b) {   // equal ones: the smaller byte first
  const Choice *x = (const Choice *)a, *y = (const Choice *)b;
  return x->p != y->p ? (x->p < y->p ? 1 : -1) : x->byte - y->byte;
}

static int choices(int V) { return MIN(V, 256); }

// p[v] = softmax(logits / temperature)[v], over n words.
static void probabilities(Choice *choice, const real *logits, int n, double temperature) {
  double max = max_of(logits, n), sum = 0;
  for (int v = 0; v < n; v++) {
    choice[v].byte = v;
    choice[v].p = exp((logits[v] - max) / temperature);
    sum += choice[v].p;
  }
  if (!isfinite(sum)) die("the model's numbers are not finite: are its weights damaged?");
  for (int v = 0; v < n; v++) choice[v].p /= sum;
}

// Leaves the top_k likeliest (0: all), of those the fewest that add up to top_p of what was left;
// what remains adds up to 1 again. Returns how many remain. Fan et al. 2018; Holtzman et al. 2020.
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

static int draw(const Choice *choice, int n, double u) {   // u uniform in [0,1)
  int i = 0;
  for (; i < n - 1 && u >= choice[i].p; i++) u -= choice[i].p;
  return choice[i].byte;
}

typedef struct { double temperature, top_p; int top_k, seed; } Sampler;   // temperature 0: greedy

// Text number `sample` draws from random numbers of its own, so that it is the same text however
// many are written at once.
static int choose(const Sampler *s, const real *logits, int V, int sample, long i) {
  Choice choice[256];
  int n = choices(V), best = 0;
  probabilities(choice, logits, n, s->temperature > 0 ? s->temperature : 1);
  if (s->temperature == 0) {
    for (int v = 1; v < n; v++) if (logits[v] > logits[best]) best = v;
    return best;
  }
  n = truncate_choices(choice, n, s->top_k, s->top_p);
  return draw(choice, n, random_uniform(random_bits(s->seed, sample), i));
}

// Beam search. score[i] is log p of what row i has written so far; each row could go on with any
// byte, and of all these ways the W with the largest score become the rows. No byte ends a text, so
// all are equally long, and no row has to be forgiven its length here.
typedef struct { double score; int row, byte; } Way;

static int best_ways(Way *best, int most, const Writer *w, const double *score) {
  int kept = 0, V = w->model.config.vocab_size;
  for (int row = 0; row < w->rows; row++) {
    const real *logits = logits_of(w, row);
    double max = max_of(logits, V), sum = 0;
    for (int v = 0; v < V; v++) sum += exp(logits[v] - max);
    if (!isfinite(sum)) die("the model's numbers are not finite: are its weights damaged?");
    for (int v = 0; v < choices(V); v++) {
      Way way = {score[row] + logits[v] - max - log(sum), row, v};
      if (kept == most && way.score <= best[most - 1].score) continue;   // equal ones: the first
      int i = kept < most ? kept++ : most - 1;
      for (; i > 0 && way.score > best[i - 1].score; i--) best[i] = best[i - 1];
      best[i] = way;
    }
  }
  return kept;
}

// One step of a search for W rows; they begin as one row, since W equal ones would stay equal.
static void beam_step(Writer *w, double *score) {
  static Way best[256];
  int parent[256];
  unsigned char byte[256];
  int rows = best_ways(best, w->most, w, score);
  for (int i = 0; i < rows; i++) {
    parent[i] = best[i].row;
    byte[i] = (unsigned char)best[i].byte;
    score[i] = best[i].score;
  }
  reorder(w, parent, rows);
  advance(w, byte);
}

// ---- 3. Looking inside ------------------------------------------------------------------------

// A byte as something that can be read; out has 8 bytes.
static const char *readable(char *out, int byte) {
  if (byte == '\n') strcpy(out, "'\\n'");
  else if (byte == '\t') strcpy(out, "'\\t'");
  else snprintf(out, 8, byte < 32 || byte > 126 ? "\\x%02x" : "'%c'", byte);
  return out;
}

static void explain(const real *logits, int V, int byte) {
  Choice choice[256];
  char name[8];
  int n = choices(V);
  probabilities(choice, logits, n, 1);
  printf("%-5s %6.2f%%  |", readable(name, byte), 100 * choice[byte].p);
  qsort(choice, n, sizeof *choice, by_probability);
  for (int i = 0; i < MIN(5, n); i++) {
    printf(" %5s %5.1f%%", readable(name, choice[i].byte), 100 * choice[i].p);
    putchar(choice[i].byte == byte ? '<' : ' ');
  }
  printf("\n");
}

// The sum of -log p of bytes first..n-1 of a text, each given those before it in its window. With
// `show`, a line for each: what it was, and what else it might have been.
static double text_loss(Writer *w, const unsigned char *text, long first, long n, int show) {
  Model *m = &w->model;
  int T = m->config.block_size, V = m->config.vocab_size;
  double sum = 0;
  for (long i = first - 1; i < n - 1; ) {         // byte i predicts byte i + 1
    long start = window_of(i, T), end = MIN(start + T, n - 1);
    whole_window(m, text, start, (int)(end - start));
    for (; i < end; i++) {
      sum += m->loss.data[i - start];
      if (show) explain(m->logits.data + (i - start)*V, V, text[i + 1]);
    }
  }
  return sum;
}
