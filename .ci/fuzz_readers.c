// For libFuzzer: feeds the readers of train.c whatever bytes it invents. The first byte says which
// file of a run they are; the reader may refuse them by die(), which comes back here.
#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
static jmp_buf back;
static FILE *opened;
#define exit(code) longjmp(back, 1)
#define fopen(path, mode) (opened = fopen(path, mode))
#define fclose(file) (opened = NULL, fclose(file))
// What a reader has allocated, since one that ends by die() frees nothing
static void *kept[1000];
static int n_kept;
static void *keep(void *old, void *p) {
  for (int i = 0; i < n_kept; i++)
    if (old && kept[i] == old) {
      kept[i] = p ? p : kept[--n_kept];
      return p;
    }
  if (p && n_kept < 1000) kept[n_kept++] = p;
  return p;
}
#define calloc(n, size) keep(NULL, calloc(n, size))
#define realloc(p, size) keep(p, realloc(p, size))
#define free(p) (keep(p, NULL), free(p))
#define NO_MAIN
#pragma GCC diagnostic ignored "-Wunused-function"
#include "../train.c"

static Model m;

static void read_state(const char *folder) {
  char value[4096];
  Safetensors *st = safetensors_open(folder, "file", NULL);
  for (Option *o = train_options; o->name; o++)
    if (metadata(st, o->name, value) && o->kind != TEXT) set_option(o, value);
  read_parameters(&m, st, "transformer.", NULL);
  read_parameters(&m, st, "transformer.", m.weights.data);
  safetensors_close(st);
}

static void read_any_log(void) {
  trainer[0].name = "train";
  trainer[0].updates = 1000000;
  text.floor = NAN;
  log_row = (LogRow *)host_alloc(NULL, 1);
  log_rows = 0;
  read_log(&trainer[0]);
  opt.optimizer = "adamw";
  n_trainers = 1;
  write_plot();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  static char folder[] = "fuzz.XXXXXX", path[64];
  static const char *const name[] = {"file", "config.json", "log.csv", "text.floor",
                                     "model.safetensors.index.json"};
  if (size < 1) return 0;
  if (!*path) {                          // the first time
    const Config c = {1, 2, 8, 8, 256};
    if (!mkdtemp(folder)) abort();
    model_layout(&m, c, 16, 1, 0);
    m.weights.data = (real *)device_alloc(m.n_weights * sizeof(real));
    n_kept = 0;
  }
  snprintf(path, sizeof path, "%s/%s", folder, name[data[0] % 5]);
  FILE *f = fopen(path, "wb");
  if (!f || fwrite(data + 1, 1, size - 1, f) != size - 1 || fclose(f)) abort();
  opt.out = folder;
  text.path = "text";
  if (!setjmp(back)) {
    if (data[0] % 5 == 0) read_state(folder);
    if (data[0] % 5 == 4) open_weights(folder);
    if (data[0] % 5 == 1) read_config(folder);
    if (data[0] % 5 == 2) read_any_log();
    if (data[0] % 5 == 3) {
      snprintf(path, sizeof path, "%s/text", folder);
      text.path = path;
      read_floor();
    }
  }
  while (n_kept > 0) (free)(kept[--n_kept]);
  if (opened) (fclose)(opened);
  opened = NULL;
  if (output.file) unlink(output.temporary);
  return 0;
}
