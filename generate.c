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
// A step costs reading every weight once, because a token sees older tokens only through their
// keys and values, and those are kept: the KV cache. Rows, texts that are written at the same time,
// share that read. Letters as in train.c; N rows, and T the context.
//
// Read in this order: step() and advance() in room 1, then room 2, a page each for drawing and for
// searching, then write_text() in room 4. Rooms: 1 a step, 2 the choice, 3 looking inside,
// 4 writing, 5 speed, 6 options and main; then tests.
//
//   ./generate --prompt "Once"     a text, from the model in run/
//   ./generate --compare           greedy and beam search side by side; --help lists the rest

#define NO_MAIN   // train.c's
#pragma GCC diagnostic ignored "-Wunused-function"   // this program does not train
#include "train.c"

// ---- 1. A step --------------------------------------------------------------------------------
// The context slides: when a text outgrows the window of T tokens, the window moves on by half. Its
// newest half is computed again, once, since each token now has another position, and all goes on.
// This one rule, window_of(), holds for prompts, for writing and for the loss of a text, so that
// the loss is that of the very probabilities the text was written with.

// A matrix w (C,O) and its bias, for linear_step(): panels of COLUMNS columns, each C x COLUMNS
// numbers in a row. So a step reads memory from front to back, which is what it does fastest, and
// each thread reads panels of its own.
typedef struct { const real *panel, *bias; int C, O; } Panels;
typedef struct { Panels c_attn, attn_proj, c_fc, mlp_proj; } BlockPanels;

typedef struct {
  Model model;
  BlockPanels *block;      // the matrices of the L blocks, once more
  Panels head;             // wte, transposed: logits = x wte^T
  real *packed;            // the memory of all panels
  int most, rows;          // rows there is memory for; rows being written
  long room, n;            // bytes there is memory for in each; each is so long, prompt included
  long start;              // the byte at position 0 of the window
  unsigned char *text;     // [most][room]
  real *cache;             // [L][most][H][2][T][D]: keys and values of the tokens of the window
  int *cell;               // [most][T]: in which row of the cache a text's token t is
  real *att;               // [most][H][T], scratch of attention_step()
  unsigned char *old_text; // reorder() copies from these when rows change places
  int *old_cell;
} Writer;

// The start of the window in which byte i has its place.
static long window_of(long i, int T) {
  long half = T - T/2;                            // rounded up
  return i < T ? 0 : ((i - T) / half + 1) * half;
}

static unsigned char *text_of(Writer *w, int row) { return w->text + row * w->room; }
static int *cell_of(Writer *w, int row) {
  return w->cell + (long)row * w->model.config.block_size;
}
static real *logits_of(Writer *w, int row) {      // of what comes after the newest byte
  return w->model.logits.data + (long)row * w->model.config.vocab_size;
}
enum { KEY, VALUE };
static real *cache_at(Writer *w, int layer, int row, int head, int which, int t) {
  Config c = w->model.config;
  long before = (((long)layer * w->most + row) * c.n_head + head) * 2 + which;
  return w->cache + (before * c.block_size + t) * (c.n_embd / c.n_head);
}

// Describes a writer of at most `most` texts of `room` bytes; as in model_plan(), the large pieces
// of memory are not taken yet.
static void writer_plan(Writer *w, Config config, int most, long room) {
  memset(w, 0, sizeof *w);
  w->most = most;
  w->room = room + 1;      // train.c's windows look one byte further, for a target
  model_plan(&w->model, config, MAX(most, config.block_size), 0, 0);
}

static void writer_allocate(Writer *w) {
  Config c = w->model.config;
  size_t tokens = (size_t)w->most * c.block_size, texts = w->most * w->room;
  size_t cells = tokens * sizeof(int), att = tokens * c.n_head * sizeof(real);
  size_t cache = tokens * c.n_layer * 2 * c.n_embd * sizeof(real);
  size_t padding = (7L*c.n_layer + 1) * c.n_embd * COLUMNS;   // a last panel may be part empty
  size_t packed = (w->model.count + padding) * sizeof(real);
  double needed = model_bytes(&w->model) + packed + cache + att + 2.0 * (texts + cells);
  if (needed > device_memory())
    die("%d texts at once need %.1f GB, the machine has %.1f GB: lower --beam, --samples or "
        "--tokens", w->most, needed / 1e9, device_memory() / 1e9);
  model_allocate(&w->model);
  w->block = (BlockPanels *)device_alloc(c.n_layer * sizeof(BlockPanels));
  w->packed = (real *)device_alloc(packed);
  w->cache = (real *)device_alloc(cache);
  w->att = (real *)device_alloc(att);
  w->text = (unsigned char *)device_alloc(texts);
  w->old_text = (unsigned char *)device_alloc(texts);
  w->cell = (int *)device_alloc(cells);
  w->old_cell = (int *)device_alloc(cells);
}

static void writer_free(Writer *w) {
  model_free(&w->model);
  device_free(w->block); device_free(w->packed); device_free(w->cache); device_free(w->att);
  device_free(w->text); device_free(w->old_text); device_free(w->cell); device_free(w->old_cell);
}

// Copies w (C,O) into panels, from *room on, and moves *room behind them.
static Panels pack_matrix(real **room, Matrix w, const real *bias, int C, int O) {
  Panels p = {*room, bias, C, O};
  for (int o = 0; o < O; o += COLUMNS, *room += (long)C*COLUMNS)
    pack(*room, COLUMNS, part_of(w, 0, o), C, MIN(COLUMNS, O - o));
  return p;
}
static Panels pack_affine(real **room, Affine p, int C, int O) {
  return pack_matrix(room, rows_of(p.weight.data, O), p.bias.data, C, O);
}

// To be called when the weights are there. They stay as they are, too: whole windows go through
// forward().
static void pack_weights(Writer *w) {
  Model *m = &w->model;
  int C = m->config.n_embd;
  real *room = w->packed;
  for (int l = 0; l < m->config.n_layer; l++) {
    const Block *p = &m->block[l];
    BlockPanels *panels = &w->block[l];
    panels->c_attn = pack_affine(&room, p->c_attn, C, 3*C);
    panels->attn_proj = pack_affine(&room, p->attn_proj, C, C);
    panels->c_fc = pack_affine(&room, p->c_fc, C, 4*C);
    panels->mlp_proj = pack_affine(&room, p->mlp_proj, 4*C, C);
  }
  w->head = pack_matrix(&room, transpose(rows_of(m->wte.data, C)), NULL, C, m->config.vocab_size);
}

// tile() of train.c for FEW rows or less: its arithmetic would cost more than the reading.
enum { FEW = 4 };
__attribute__((noinline))
static void few_tile(real *c, long c_row, Matrix a, const real *panel, int rows, int columns,
                     int depth, int add, const real *bias) {
  tile_of(FEW, c, c_row, a, panel, rows, columns, depth, add, bias);
}

// y[n,o] = sum_c x[n,c] w[c,o] + b[o], for the N rows of a step. Reading w is all the cost as long
// as N is small, and it comes from memory once for all rows: each panel from front to back, while
// its sums stay in registers. y[n,o] is the same sum in the same order, however many rows and
// threads there are.
static void linear_step(Tensor y, Tensor x, Panels p, int N) {
  parallel_for (panel, (p.O + COLUMNS - 1) / COLUMNS) {
    int o = panel * COLUMNS, columns = MIN(COLUMNS, p.O - o);
    const real *w = p.panel + (long)o*p.C, *bias = p.bias ? p.bias + o : NULL;
    for (int n = 0; n < N; n += ROWS) {
      int rows = MIN(ROWS, N - n);
      real *y_n = y.data + (long)n*p.O + o;
      Matrix x_n = rows_of(x.data + (long)n*p.C, p.C);
      if (rows > FEW) tile(y_n, p.O, x_n, w, rows, columns, p.C, 0, bias);
      else few_tile(y_n, p.O, x_n, w, rows, columns, p.C, 0, bias);
    }
  }
}

// Attention of one token a row, at position t, to those at positions 0..t: the keys and values of
// the old ones come from the cache, those of the new one are put there.
static void attention_step(Writer *w, Tensor out, Tensor qkv, int layer, int t) {
  int C = w->model.config.n_embd, H = w->model.config.n_head, D = C / H;
  int T = w->model.config.block_size;
  real scale = 1 / sqrt_(D);
  parallel_for (nh, w->rows * H) {
    int n = nh / H, h = nh % H, *cell = cell_of(w, n);
    const real *q = qkv.data + (long)n*3*C + h*D;
    real *o = out.data + (long)n*C + h*D, *att = w->att + nh*T;
    memcpy(cache_at(w, layer, cell[t], h, KEY, t), q + C, D * sizeof(real));
    memcpy(cache_at(w, layer, cell[t], h, VALUE, t), q + 2*C, D * sizeof(real));
    for (int s = 0; s <= t; s++) att[s] = dot(q, cache_at(w, layer, cell[s], h, KEY, s), D);
    real sum = softmax_weights(att, t + 1, t + 1, max_of(att, t + 1), scale);
    for (int d = 0; d < D; d++) o[d] = 0;
    for (int s = 0; s <= t; s++) {
      const real *v = cache_at(w, layer, cell[s], h, VALUE, s), p = att[s] / sum;
      for (int d = 0; d < D; d++) o[d] += p * v[d];
    }
  }
}

// The logits after one more token in each row: forward() with T = 1, and attention to the cache.
static void step(void *argument) {
  Writer *w = (Writer *)argument;
  Model *m = &w->model;
  int N = w->rows, C = m->config.n_embd;
  int t = (int)(w->n - 1 - w->start);
  Tensor position = {m->wpe.data + (long)t*C, NULL}, x = m->embedding;   // wpe[t], for all rows
  embedding_forward(x, m->token, m->wte, position, N, 1, C);
  for (int l = 0; l < m->config.n_layer; l++) {
    Block *p = &m->block[l];
    BlockPanels *panels = &w->block[l];
    Acts *a = &m->act[l];
    layernorm_forward(a->ln_1, a->ln_1_stats, x, p->ln_1, N, C);
    linear_step(a->qkv, a->ln_1, panels->c_attn, N);
    attention_step(w, a->attn, a->qkv, l, t);
    linear_step(a->attn_proj, a->attn, panels->attn_proj, N);
    residual_forward(a->x_mid, x, a->attn_proj, N, C);
    layernorm_forward(a->ln_2, a->ln_2_stats, a->x_mid, p->ln_2, N, C);
    linear_step(a->fc, a->ln_2, panels->c_fc, N);
    gelu_forward(a->gelu, a->fc, N, 4*C);
    linear_step(a->mlp_proj, a->gelu, panels->mlp_proj, N);
    residual_forward(a->x, a->x_mid, a->mlp_proj, N, C);
    x = a->x;
  }
  layernorm_forward(m->x_f, m->x_f_stats, x, m->ln_f, N, C);
  linear_step(m->logits, m->x_f, w->head, N);
}

// forward() of n bytes from `start` on: logits and losses of all of them.
static void whole_window(Model *m, const unsigned char *text, long start, int n) {
  MicroBatch f = {m, 1, n, 0};
  load_windows(m, text, &start, 1, n);
  launch(forward_only, &f);
}

// Fills the cache of a row with its window up to the newest byte; forward() has made all of it.
static void fill_cache(Writer *w, int row) {
  int C = w->model.config.n_embd, H = w->model.config.n_head, D = C / H;
  int n = (int)(w->n - w->start);
  if (!n) return;                                 // a context of one token keeps none
  whole_window(&w->model, text_of(w, row), w->start, n);
  for (int t = 0; t < n; t++) {
    cell_of(w, row)[t] = row;
    for (int l = 0; l < w->model.config.n_layer; l++)
      for (int h = 0; h < H; h++)
        for (int which = KEY; which <= VALUE; which++)
          memcpy(cache_at(w, l, row, h, which, t),     // from row t of qkv: q, key, value
                 w->model.act[l].qkv.data + (3L*t + 1 + which)*C + h*D, D * sizeof(real));
  }
}

// Starts with `rows` copies of a prompt of one byte or more. It is computed once: all rows look at
// the first one's part of the cache.
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
    memcpy(cell_of(w, row), cell_of(w, 0), T * sizeof(int));
    memcpy(logits_of(w, row), logits_of(w, 0), V * sizeof(real));
  }
}

// Row i goes on from what was row parent[i]. Nothing is computed again, and no key or value moves:
// a token's stay in the cache row of whoever wrote it, and what is copied is the note of where.
static void reorder(Writer *w, const int *parent, int rows) {
  Writer old = *w;
  int moved = 0;
  for (int i = 0; i < rows; i++) moved |= parent[i] != i;
  w->rows = rows;
  if (!moved) return;
  w->text = old.old_text; w->old_text = old.text;
  w->cell = old.old_cell; w->old_cell = old.cell;
  for (int i = 0; i < rows; i++) {
    memcpy(text_of(w, i), text_of(&old, parent[i]), w->n);
    memcpy(cell_of(w, i), cell_of(&old, parent[i]), w->model.config.block_size * sizeof(int));
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
    cell_of(w, row)[w->n - w->start] = row;
    w->model.token[row] = byte[row];
  }
  w->n++;
  launch(step, w);
}

// ---- 2. The choice ----------------------------------------------------------------------------
// Only bytes are chosen: of a larger vocabulary, the words from 256 on are left out.
static int choices(int V) { return MIN(V, 256); }

typedef struct { int byte; double p; } Choice;

static int by_probability(const void *a, const void *b) {   // equal ones: the smaller byte first
  const Choice *x = (const Choice *)a, *y = (const Choice *)b;
  return x->p != y->p ? (x->p < y->p ? 1 : -1) : x->byte - y->byte;
}

static void check_finite(double x) {
  if (isfinite(x)) return;
  printf("\n");                                   // ends what was written so far
  die("the model's numbers are not finite: are its weights damaged?");
}

// p[v] = softmax(logits / temperature)[v], over all bytes v; returns how many those are.
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
  int n = probabilities(choice, logits, V, s->temperature > 0 ? s->temperature : 1), best = 0;
  if (s->temperature == 0) {
    for (int v = 1; v < n; v++) if (logits[v] > logits[best]) best = v;
    return best;
  }
  n = truncate_choices(choice, n, s->top_k, s->top_p);
  return draw(choice, n, random_uniform(random_bits(s->seed, sample), i));
}

// In each row, byte i after the prompt.
static void draw_step(Writer *w, const Sampler *s, long i) {
  unsigned char byte[256];
  for (int row = 0; row < w->rows; row++)
    byte[row] = (unsigned char)choose(s, logits_of(w, row), w->model.config.vocab_size, row, i);
  advance(w, byte);
}

// Beam search. score[i] is log p of what row i has written so far; each row could go on with any
// byte, and of all these ways the W with the largest score become the rows. No byte ends a text, so
// all are equally long, and no row has to be forgiven its length here.
typedef struct { double score; int row, byte; } Way;

static int best_ways(Way *best, int most, Writer *w, const double *score) {
  int kept = 0, V = w->model.config.vocab_size;
  for (int row = 0; row < w->rows; row++) {
    const real *logits = logits_of(w, row);
    double max = max_of(logits, V), sum = 0;
    for (int v = 0; v < V; v++) sum += exp(logits[v] - max);
    check_finite(sum);
    double lse = max + log(sum);
    for (int v = 0; v < choices(V); v++) {
      Way way = {score[row] + logits[v] - lse, row, v};
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
  Way best[256];
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

// The picture of --attention: for each layer (down) and head (across) a triangle, in which row t
// shows what byte t of the prompt looks at.
enum { MOST_SEEN = 64, MAP = 240, GAP = 34, MARGIN = 60, HEAD_ROOM = 96 };   // bytes; pixels

// att[t,s] of one head, from the queries and keys that forward() left: (n,n), zero for s > t.
static void head_attention(const Model *m, int layer, int head, int n, real *att) {
  int C = m->config.n_embd, D = C / m->config.n_head;
  for (int t = 0; t < n; t++) {
    const real *q = m->act[layer].qkv.data + (long)t*3*C + head*D, *k = q + C - (long)t*3*C;
    for (int s = 0; s <= t; s++) att[t*n + s] = dot(q, k + (long)s*3*C, D);
    real sum = softmax_weights(att + t*n, t + 1, n, max_of(att + t*n, t + 1), 1 / sqrt_(D));
    for (int s = 0; s <= t; s++) att[t*n + s] /= sum;
  }
}

// How many bytes back a head looks, on average.
static double mean_distance(const real *att, int n) {
  double sum = 0;
  for (int t = 0; t < n; t++)
    for (int s = 0; s < t; s++) sum += att[t*n + s] * (t - s);
  return sum / n;
}

// The character that starts at byte i, fit for XML; a dot for the rest of one, or what is none.
static void svg_label(String *s, const unsigned char *text, int n, int i, double x, double y,
                      const char *style) {
  char label[16] = "\xc2\xb7";
  int length = utf8_length(text + i, n - i);
  if (text[i] == ' ') strcpy(label, "\xe2\x90\xa3");
  else if (text[i] == '\n') strcpy(label, "\xe2\x86\xb5");
  else if (text[i] == '<') strcpy(label, "&lt;");
  else if (text[i] == '&') strcpy(label, "&amp;");
  else if (length > 0 && text[i] > 32 && text[i] != 127)
    snprintf(label, length + 1, "%s", text + i);
  svg_text(s, x, y, style, label);
}

static void svg_head(String *s, const real *att, const unsigned char *text, int n, double x,
                     double y) {
  double side = (double)MAP / n, size = MIN(11, side);
  char style[80];
  append(s, "<path d=\"M%.1f %.1fL%.1f %.1fH%.1fz\" fill=\"#f1f4f9\"/>\n", x, y, x + MAP, y + MAP,
         x);
  for (int t = 0; t < n; t++)
    for (int u = 0; u <= t; u++) {
      double a = sqrt(att[t*n + u]);              // the root shows small weights, too
      if (a < 0.05) continue;
      append(s, "<rect x=\"%.2f\" y=\"%.2f\" width=\"%.2f\" height=\"%.2f\" "
             "fill=\"rgb(%.0f,%.0f,%.0f)\"/>\n", x + u*side, y + t*side, side, side,
             241 - 233*a, 244 - 196*a, 249 - 142*a);
    }
  snprintf(style, sizeof style, "font-size=\"%.1f\" text-anchor=\"middle\" fill=\"#666\"", size);
  for (int t = 0; t < n; t++) {
    svg_label(s, text, n, t, x - size*0.7, y + (t + 0.5)*side + size*0.35, style);
    svg_label(s, text, n, t, x + (t + 0.5)*side, y + MAP + size*1.1, style);
  }
}

static void write_attention(Writer *w, const unsigned char *text, long bytes, const char *path) {
  Model *m = &w->model;
  int L = m->config.n_layer, H = m->config.n_head;
  int n = (int)MIN(bytes, MIN(MOST_SEEN, m->config.block_size));
  int width = 2*MARGIN + H*MAP + (H - 1)*GAP, height = HEAD_ROOM + L*(MAP + 2*GAP) + GAP;
  real *att = (real *)host_alloc(NULL, n*n * sizeof(real));
  whole_window(m, text, bytes - n, n);
  text += bytes - n;
  String s = {NULL, 0, 0};
  append(&s, "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 %d %d\" "
         "font-family=\"Helvetica, Arial, sans-serif\" font-size=\"13\" fill=\"#333\">\n"
         "<rect width=\"%d\" height=\"%d\" fill=\"white\"/>\n", width, height, width, height);
  svg_text(&s, MARGIN, 30, "font-size=\"18\"", "What each byte looks at");
  char key[200];
  snprintf(key, sizeof key, "A row is a byte, its columns the bytes up to it: the darker, the more "
           "attention. Spread evenly, it would go %.1f bytes back.", (n - 1) / 4.0);
  svg_text(&s, MARGIN, 52, "fill=\"#666\"", key);
  for (int l = 0; l < L; l++)
    for (int h = 0; h < H; h++) {
      char caption[128];
      double x = MARGIN + h*(MAP + GAP), y = HEAD_ROOM + l*(MAP + 2*GAP);
      head_attention(m, l, h, n, att);
      snprintf(caption, sizeof caption, "layer %d, head %d: %.1f bytes back", l + 1, h + 1,
               mean_distance(att, n));
      svg_text(&s, x, y - 10, "", caption);
      svg_head(&s, att, text, n, x, y);
    }
  append(&s, "</svg>\n");
  Output out = output_open(path);
  output_write(&out, s.at, s.size);
  output_close(&out);
  fprintf(stderr, "%s: the attention of %d heads over %d bytes\n", path, L*H, n);
  free(s.at);
  free(att);
}

// ---- 4. Writing -------------------------------------------------------------------------------

static struct {
  const char *folder, *prompt, *score, *attention;
  int tokens, top_k, greedy, beam, seed, threads, compare, samples, explain, bench;
  double temperature, top_p, length_penalty;
} gen;   // each has the name of its option: room 6

// n bytes. Without --prompt the only one is a line break, which is hidden: not printed.
static struct { const unsigned char *byte; long n, hidden; } prompt;

// How many bytes of row 0 are settled, n at least: those that all hypotheses of a search share.
static long settled(Writer *w, long n, int beam) {
  if (!beam) return w->n;
  for (; n < w->n; n++)
    for (int row = 1; row < w->rows; row++)
      if (text_of(w, row)[n] != text_of(w, 0)[n]) return n;
  return n;
}

typedef struct { double score, seconds; } Written;   // log p of a beam's best; with the prompt's

// Goes on from the prompt by gen.tokens bytes: rows drawn with s, or one searched for with a beam.
// With `stream`, row 0 is printed as it is made.
static Written write_text(Writer *w, const Sampler *s, int rows, int beam, int stream) {
  double score[256] = {0}, started = seconds();
  long agreed = prompt.n, printed = prompt.hidden;
  start_writing(w, prompt.byte, prompt.n, beam ? 1 : rows);
  for (int i = 0; ; i++) {
    if (stream) printed += print_text(text_of(w, 0) + printed, agreed - printed, 0);
    if (i == gen.tokens) break;
    if (beam) beam_step(w, score);
    else draw_step(w, s, i);
    agreed = settled(w, agreed, beam);
  }
  if (stream) print_text(text_of(w, 0) + printed, w->n - printed, 1), printf("\n");
  Written written = {score[0], seconds() - started};
  return written;
}

static void write_samples(Writer *w) {
  Sampler s = {gen.greedy ? 0 : gen.temperature, gen.top_p, gen.top_k, gen.seed};
  int most = gen.samples;
  if (most > 1) printf("--- 1 of %d ---\n", most);
  Written written = write_text(w, &s, most, gen.beam, 1);
  for (int row = 1; row < most; row++) {
    printf("--- %d of %d ---\n", row + 1, most);
    print_text(text_of(w, row) + prompt.hidden, w->n - prompt.hidden, 1);
    printf("\n");
  }
  if (gen.explain) {
    printf("\nbyte       p   | the five likeliest, and what was chosen <\n");
    text_loss(w, text_of(w, 0), prompt.n, prompt.n + gen.tokens, 1);
  }
  fflush(stdout);                      // the text before what is said of it
  if (gen.beam)
    fprintf(stderr, "beam %d: log p %.3f, score %.4f\n", gen.beam, written.score,
            written.score / pow(MAX(1, gen.tokens), gen.length_penalty));
  double bytes = (double)most * gen.tokens;
  if (bytes)
    fprintf(stderr, "%.0f bytes, %.0f tokens/s, threads %d\n", bytes, bytes / written.seconds,
            n_threads);
}

// ---- Greedy against beam search: --compare

// Prints the next line of a text in a column of this width, broken between words where it can be;
// returns where the line after it begins.
static const unsigned char *print_cell(const unsigned char *p, const unsigned char *end,
                                       int width) {
  const unsigned char *stop = p, *space = NULL;
  int columns = 0, at_space = 0;
  while (stop < end && *stop != '\n') {
    int length = utf8_length(stop, end - stop), wide = length >= 3 ? 2 : 1;   // as Chinese is
    if (columns + wide > width) {
      if (space) stop = space, columns = at_space;
      break;
    }
    columns += wide;
    stop += MAX(1, length);
    if (stop[-1] == ' ') space = stop, at_space = columns;
  }
  while (p < stop)
    if (*p == '\t') putchar(' '), p++;            // a tab would be as wide as it likes
    else p += print_text(p, MAX(1, utf8_length(p, stop - p)), 1);
  printf("%*s", width - columns, "");
  return p < end && *p == '\n' ? p + 1 : p;
}

static void print_side_by_side(const unsigned char *a, const unsigned char *b, long n) {
  const unsigned char *end_a = a + n, *end_b = b + n;
  while (a < end_a || b < end_b) {
    a = print_cell(a, end_a, 46);
    printf(" | ");
    b = print_cell(b, end_b, 46);
    printf("\n");
  }
}

static void print_parting(Writer *w, const unsigned char *a, const unsigned char *b) {
  long i = prompt.n, end = prompt.n + gen.tokens;
  char x[8], y[8];
  while (i < end && a[i] == b[i]) i++;
  if (i == end) { printf("They wrote the same text.\n"); return; }
  double p = exp(-text_loss(w, a, i, i + 1, 0)), q = exp(-text_loss(w, b, i, i + 1, 0));
  printf("They part after %ld byte%s: greedy took %s (%.1f %%), beam search %s (%.1f %%).\n",
         i - prompt.n, i - prompt.n == 1 ? "" : "s", readable(x, a[i]), 100 * p,
         readable(y, b[i]), 100 * q);
}

static void compare(Writer *w) {
  Sampler greedy = {0, 1, 0, 0};
  long n = prompt.n + gen.tokens;
  unsigned char *text[2];
  double loss[2], rate[2];
  for (int i = 0; i < 2; i++) {
    Written written = write_text(w, &greedy, 1, i ? gen.beam : 0, 0);
    text[i] = (unsigned char *)memcpy(host_alloc(NULL, n), text_of(w, 0), n);
    rate[i] = gen.tokens / written.seconds;
    loss[i] = text_loss(w, text[i], prompt.n, n, 0);
  }
  const char *rule = "-----------------------------------------------";
  printf("%-46s | beam search, %d hypotheses\n%s+%s\n", "greedy", gen.beam, rule, rule);
  print_side_by_side(text[0] + prompt.hidden, text[1] + prompt.hidden, n - prompt.hidden);
  printf("\n%-12s %10s %10s %12s %10s\n", "", "loss", "a byte", "score", "tokens/s");
  for (int i = 0; i < 2; i++)
    printf("%-12s %10.3f %10.4f %12.4f %10.0f\n", i ? "beam search" : "greedy", loss[i],
           loss[i] / gen.tokens, -loss[i] / pow(gen.tokens, gen.length_penalty), rate[i]);
  print_parting(w, text[0], text[1]);
  double times = exp(fabs(loss[0] - loss[1]));
  if (loss[0] == loss[1]) printf("To the model both are as likely.\n");
  else printf("To the model, what %s wrote is %.*f times as likely.\n",
              loss[1] < loss[0] ? "beam search" : "greedy", times < 100 ? 1 : 0, times);
  free(text[0]);
  free(text[1]);
}

static void score(Writer *w, const unsigned char *text, long n) {
  double loss = text_loss(w, text, 1, n, gen.explain) / (n - 1);
  check_finite(loss);
  printf("bytes %ld\nperplexity %.4f\nbits per byte %.6f\nloss %.6f\n", n, exp(loss),
         loss / log(2), loss);
}

// ---- 5. Speed ---------------------------------------------------------------------------------

// How many threads a step is worth. It has ten barriers a layer, of some 0.5 us each if there is
// anybody to wait for (more on a busy machine); alone it reads weights at some 25 GB/s, and a row
// more costs a sixteenth of that in arithmetic. So a model of a MB is best read by one thread. More
// must pay well, as each barrier waits for whichever core is busy with something else: all cores
// are taken if that saves 3 parts in 10.
static int worthwhile_threads(const Model *m, int rows, int cores) {
  double barriers = 10.0 * m->config.n_layer + 3;
  double alone = m->count * sizeof(real) * (1 + rows / 16.0) / 25e9;
  return alone / cores + barriers * 5e-7 < 0.7 * alone ? cores : 1;
}

// Reads all weights and does next to nothing with them: the most that a step could do.
static void read_all(void *argument) {
  Model *m = (Model *)argument;
  parallel_for (chunk, chunks(m->n_weights)) {
    const real *x = m->weights.data + chunk*CHUNK;
    long n = MIN((long)CHUNK, m->n_weights - chunk*CHUNK) / (4*VECTOR) * (4*VECTOR);
    vec sum[4] = {{0}};
    for (long i = 0; i < n; i += 4*VECTOR)
      for (int j = 0; j < 4; j++) sum[j] += *(const vec *)(x + i + j*VECTOR);
    vec all = sum[0] + sum[1] + sum[2] + sum[3];
    m->partial[chunk] = all[0];                   // a sum that nobody wanted would not be computed
  }
}

// Tokens a second, beside what reading the weights alone takes: TURN times the one, TURN times the
// other, and so on; the first of a turn, which find memory as the other left it, are not counted.
// Medians.
enum { BENCH_ROWS = 16, TURN = 20, WARM_UP = 5 };
static void bench(Writer *w) {
  Model *m = &w->model;
  int T = MIN(m->config.block_size, 128);
  double bytes = (double)(m->count - entry_count(&m->parameter[1])) * sizeof(real);   // not wpe
  double all = (double)m->n_weights * sizeof(real), took[2][100*TURN];
  unsigned char byte[BENCH_ROWS] = "\n";
  printf("%.2f M parameters, %.1f MB of weights, threads %d\n", m->count / 1e6, all / 1e6,
         n_threads);
  for (int rows = 1; rows <= w->most; rows *= 2) {
    int n = 0;
    start_writing(w, byte, 1, rows);
    for (double until = seconds() + 3; n < 100*TURN && seconds() < until; n += TURN)
      for (int writing = 0; writing < 2; writing++)
        for (int i = -WARM_UP; i < TURN; i++) {
          if (w->n >= MAX(T, 2)) start_writing(w, byte, 1, rows);
          double started = seconds();
          if (writing) advance(w, byte);
          else launch(read_all, m);
          if (i >= 0) took[writing][n + i] = seconds() - started;
        }
    double read = median(took[0], n), step = median(took[1], n);
    printf("rows %-3d %9.0f tokens/s | weights read at %6.1f GB/s, %3.0f %% of the %.1f GB/s that "
           "reading alone reaches\n", rows, rows / step, bytes / step * 1e-9,
           100 * bytes / step / (all / read), all / read * 1e-9);
    fflush(stdout);
  }
}

// ---- 6. Options and main ----------------------------------------------------------------------

#ifndef TESTS
static Option generate_options[] = {
  {"prompt", TEXT, &gen.prompt, NULL, 0, 0, 0,
   "what the text begins with; a line break, not printed, if not given", 0},
  {"tokens", INTEGER, &gen.tokens, "256", 0, 1e7, 0, "bytes to write", 0},
  {"temperature", NUMBER, &gen.temperature, "0.8", 0, 100, 0,
   "below 1: likely bytes become likelier; 0: greedy", 0},
  {"top_k", INTEGER, &gen.top_k, "0", 0, 256, 0, "draw among the k likeliest; 0: all", 0},
  {"top_p", NUMBER, &gen.top_p, "1", 0, 1, 0,
   "draw among the fewest that add up to this probability", 0},
  {"greedy", FLAG, &gen.greedy, NULL, 0, 0, 0, "always take the likeliest byte", 0},
  {"beam", INTEGER, &gen.beam, NULL, 1, 256, 0, "search with this many hypotheses", 0},
  {"length_penalty", NUMBER, &gen.length_penalty, "0", 0, 10, 0,
   "a text's score is log p / length^this; all being equally long, it chooses nothing", 0},
  {"samples", INTEGER, &gen.samples, "1", 1, 256, 0, "texts to write at once", 0},
  {"seed", INTEGER, &gen.seed, "1337", 0, 2147483647, 0, "of what is drawn", 0},
  {"compare", FLAG, &gen.compare, NULL, 0, 0, 0, "greedy and beam search (of 4) side by side", 0},
  {"score", TEXT, &gen.score, NULL, 0, 0, 0, "print the loss of this text, and end", 0},
  {"explain", FLAG, &gen.explain, NULL, 0, 0, 0, "show what else each byte might have been", 0},
  {"attention", TEXT, &gen.attention, NULL, 0, 0, 0,
   "draw what each head looks at, in the prompt, to this .svg file", 0},
  {"bench", FLAG, &gen.bench, NULL, 0, 0, 0,
   "time steps of the model in DIR; with no DIR, of one with 10.8 M parameters", 0},
  {"threads", INTEGER, &gen.threads, NULL, 1, 1024, 0, "threads (as many as help if not given)", 0},
  {NULL, FLAG, NULL, NULL, 0, 0, 0, NULL, 0}};

static const char GENERATE_USAGE[] =
  "usage: generate [DIR] [options]\n\n"
  "Writes text with the GPT in DIR, which is run if not given: any GPT-2 folder whose tokens are\n"
  "bytes. An option is written --name value or --name=value; shown with the value it has if not\n"
  "given.\n";

static void check_choices(void) {
  if (gen.greedy && gen.beam) die("--greedy is --beam 1: leave one out");
  if (gen.samples > 1 && (gen.greedy || gen.beam || gen.compare))
    die("--samples %d with --greedy, --beam or --compare: they write one text, always the same",
        gen.samples);
  if (gen.compare && gen.greedy) die("--compare is greedy and beam search: leave out --greedy");
  if (gen.compare && !gen.tokens) die("--compare with --tokens 0 compares nothing");
  if (gen.score && (!*gen.score || !gen.score[1]))
    die("--score takes a text of two bytes or more: the first is only what the second follows");
  if (gen.compare && !gen.beam) gen.beam = 4;
}

// A config.json is believed if it speaks of no more numbers than the file of weights could have.
static void check_size(Config c, const char *folder) {
  char path[4096];
  struct stat info;
  join(path, folder, "model.safetensors");
  if (stat(path, &info)) die("%s: %s: is %s what --out of ./train names?", path, strerror(errno),
                             folder);
  double C = c.n_embd, numbers = c.n_layer * 12.0*C*C + ((double)c.vocab_size + c.block_size) * C;
  if (2 * numbers > (double)info.st_size)
    die("%s has %ld bytes, but %s/config.json speaks of %.0f numbers: damaged, or of two models?",
        path, (long)info.st_size, folder, numbers);
}

// What the text begins with; or all of it, for --score.
static void take_prompt(Config c) {
  if (gen.prompt && !*gen.prompt) gen.prompt = NULL;
  const char *text = gen.score ? gen.score : gen.prompt ? gen.prompt : "\n";
  prompt.byte = (const unsigned char *)text;
  prompt.n = (long)strlen(text);
  prompt.hidden = !gen.prompt;
  for (long i = 0; i < prompt.n; i++)
    if (prompt.byte[i] >= c.vocab_size)
      die("byte %ld of %s is %d, but the model's vocabulary has %d words", i,
          gen.score ? "--score" : "the prompt", prompt.byte[i], c.vocab_size);
  if (prompt.n > c.block_size && !gen.score)
    fprintf(stderr, "generate: the prompt has %ld bytes, the model's context %d: its newest %ld "
            "are used\n", prompt.n, c.block_size,
            prompt.n - window_of(prompt.n - 1, c.block_size));
}

int main(int argc, char **argv) {
  program = "generate";
  parse_options(generate_options, argc, argv, GENERATE_USAGE, &gen.folder, 1);
  check_choices();
  int random = gen.bench && !gen.folder;          // no model is read: weights are random
  Config config = {6, 6, 384, 256, 256};          // 10.8 M parameters
  if (!gen.folder) gen.folder = "run";
  if (!random) {
    if (access(gen.folder, F_OK))
      die("%s: %s: train a model first (make run), or name its folder", gen.folder,
          strerror(errno));
    config = read_config(gen.folder);
    check_size(config, gen.folder);
  }
  if (config.vocab_size > 256)
    fprintf(stderr, "generate: of %d words, only the first 256 are written, as bytes: a model "
            "whose tokens are something else will write nonsense\n", config.vocab_size);
  take_prompt(config);
  int rows = gen.bench ? BENCH_ROWS : MAX(gen.beam, gen.samples);
  int cores = (int)MAX(1, MIN(1024, sysconf(_SC_NPROCESSORS_ONLN)));
  Writer w;
  writer_plan(&w, config, rows, gen.bench ? 1024 : prompt.n + gen.tokens);
  device_start(gen.threads ? gen.threads : worthwhile_threads(&w.model, rows, cores));
  writer_allocate(&w);
  if (random) model_init(&w.model, 1);
  else read_weights(&w.model, gen.folder);
  pack_weights(&w);
  if (gen.attention) write_attention(&w, prompt.byte, prompt.n, gen.attention);
  if (gen.bench) bench(&w);
  else if (gen.score) score(&w, prompt.byte, prompt.n);
  else if (gen.compare) compare(&w);
  else write_samples(&w);
  writer_free(&w);
  return finish(0);
}
#endif   // TESTS

// ---- Tests ------------------------------------------------------------------------------------
// Compiled with -DTESTS, this is a program that checks the rooms above on models of random weights.

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

// A small model with strong opinions: its weights are larger than those training starts from.
static void test_model(Writer *w, int V, int T, int C, int most, long room) {
  Config config = {2, 2, C, T, V};
  writer_plan(w, config, most, room);
  writer_allocate(w);
  model_init(&w->model, 5);
  for (long i = 0; i < w->model.n_weights; i++)
    if (i < w->model.n_matrices) w->model.weights.data[i] *= 12;
    else w->model.weights.data[i] += (real)(0.2 * random_normal(7, i));
  pack_weights(w);
}

static void random_text(unsigned char *text, long n, int V) {
  for (long i = 0; i < n; i++) text[i] = (unsigned char)(random_bits(3, i) % V);
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
  writer_free(&w);
  writer_free(&whole);
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
  writer_free(&w);
}

// A long search, beyond the window: the scores it adds up are the losses of its texts, which a
// wrong note of where a key lies would change; and one hypothesis is greedy.
static void test_beam(void) {
  enum { V = 20, BYTES = 50 };
  Writer w;
  unsigned char text[BYTES] = {1, 2, 3};
  double score[6] = {0}, one[1] = {0}, worst = 0;
  test_model(&w, V, 16, 24, 6, BYTES);
  start_writing(&w, text, 3, 1);
  while (w.n < BYTES) beam_step(&w, score);
  for (int row = 0; row < w.rows; row++) {
    memcpy(text, text_of(&w, row), BYTES);
    worst = MAX(worst, fabs(score[row] + text_loss(&w, text, 3, BYTES, 0)));
  }
  check(worst < 1e-3, "beam: after %d steps and slides, log p of each row is minus its loss (to "
        "%.0e)", BYTES - 3, worst);
  writer_free(&w);
  Sampler greedy = {0, 1, 0, 0};
  int same = 1;
  test_model(&w, V, 16, 24, 1, BYTES);
  start_writing(&w, text, 3, 1);
  while (w.n < BYTES) beam_step(&w, one);
  memcpy(text, text_of(&w, 0), BYTES);
  start_writing(&w, text, 3, 1);
  while (w.n < BYTES) {
    draw_step(&w, &greedy, 0);
    same &= text_of(&w, 0)[w.n - 1] == text[w.n - 1];
  }
  check(same, "beam: one hypothesis is greedy");
  writer_free(&w);
}

// The last of a tile's rows, or of a few, is to the bit the row that is written alone.
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
  writer_free(&many);
  writer_free(&one);
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
  Acts *a = &w.model.act[1];
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
  writer_free(&w);
}

int main(void) {
  program = "test_generate";
  device_start(2);
  test_window();
  test_cache(64, 32, 1, 1);
  test_cache(16, 32, 3, 1);
  test_cache(16, 48, 18, 5);     // more rows than linear_step() takes at once
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
