// Watches each access to memory that kernels make in the emulator of test_gradients.c, which
// includes this. The compiler's -fsanitize=thread puts a call in front of every read and write; the
// functions called are these, in place of the sanitizer's. They know what a GPU is, so they can say
// more: which thread of which block, which element, which two lines meet.
#include <ctype.h>
#include <dlfcn.h>

#ifdef __clang__
#define HOOK extern "C" __attribute__((noinline, disable_sanitizer_instrumentation)) void
#else
#define HOOK extern "C" __attribute__((noinline, no_sanitize("thread"))) void
#endif

#ifndef __clang__
#pragma GCC push_options
#pragma GCC optimize ("O2")               // called for each access
#endif
struct Access { unsigned launch, block, phase; int thread, syncs; void *from; };
struct Cell { Access write, read, other; };   // of 4 bytes; other: a read by another thread
struct Area { uintptr_t begin; size_t bytes; Cell *cells; };
static std::map<uintptr_t, Area> areas;
static Area shared_area, *area_of_code[4096]; // the area that a piece of code has accessed last
static bool in_hook, counts_traffic = getenv("TRAFFIC") != NULL;
static FILE *report;                      // NULL: stderr

// The line of the source whose code has called a hook; addr2line, or atos on a Mac, finds it in the
// program. A function that was inlined has a chain of spots.
UNSEEN void print_place(void *from) {
  if (!from) return;
  Dl_info program;
  char command[1000], line[500];
  if (!dladdr((void *)print_place, &program)) return;
  long offset = (char *)from - 1 - (char *)program.dli_fbase;
  snprintf(command, sizeof command, "(addr2line -i -e '%s' 0x%lx || atos -o '%s' -offset 0x%lx | "
           "sed 's/.*(\\(.*\\))/\\1/') 2>/dev/null", program.dli_fname, offset, program.dli_fname,
           offset);
  FILE *spots = popen(command, "r");
  for (int i = 0; spots && fgets(line, sizeof line, spots); i++) {
    char *colon = strrchr(line, ':'), text[500] = "", *start = text;
    if (strstr(line, "test_gradients.c:")) break;
    if (!colon) continue;
    *colon = 0;
    FILE *f = fopen(line, "r");
    for (int k = 0; f && k < atoi(colon + 1); k++) if (!fgets(text, sizeof text, f)) *text = 0;
    if (f) fclose(f);
    while (*start == ' ') start++;
    start[strcspn(start, "\n")] = 0;
    if (strncmp(start, "ATTENTION_KERNEL(", 17))   // this only names the kernel once more
      fprintf(report ? report : stderr, "    %sline %d: %s\n", i ? "called from " : "",
              atoi(colon + 1), start);
  }
  if (spots) pclose(spots);
}

// The name of the kernel's parameter number k, from its source
UNSEEN void print_parameter(size_t k) {
  static char text[1 << 20];
  FILE *f = fopen(KERNELS, "r");
  size_t length = f ? fread(text, 1, sizeof text - 1, f) : 0;
  if (f) fclose(f);
  text[length] = 0;
  char *p = text;
  while ((p = strstr(p, gpu.kernel)) && p[strlen(gpu.kernel)] != '(') p++;
  for (; p && k > 0 && (p = strchr(p, ',')); k--) p++;
  if (!p || !(p = strpbrk(p, ",)"))) { fprintf(stderr, "an array"); return; }
  char *end = p;
  while (isalnum((unsigned char)p[-1]) || p[-1] == '_') p--;
  fprintf(stderr, "%.*s", (int)(end - p), p);
}

UNSEEN void print_what(const Area *area, uintptr_t at, unsigned size) {
  size_t k = 0;
  while (k < arguments.size() && arguments[k] != area->begin) k++;
  long each = size > 8 ? 8 : size, i = (long)(at - area->begin);
  i = (i < 0 ? i - each + 1 : i) / each;
  if (area == &shared_area) { fprintf(stderr, "shared memory"); return; }
  if (k == arguments.size()) fprintf(stderr, "an array");
  else print_parameter(k);
  long n = (long)(area->bytes / each);
  fprintf(stderr, "[%ld]", i);
  if (i < 0 || i >= n) fprintf(stderr, ", but it has %ld numbers, 0 to %ld", n, n - 1);
}

UNSEEN void end_watch(void) { fflush(stderr); self = NULL; exit(1); }

UNSEEN void print_block(unsigned block) {
  fprintf(stderr, "block (%u,%u,%u)", block % gridDim.x, block / gridDim.x % gridDim.y,
          block / gridDim.x / gridDim.y);
}

UNSEEN void report_race(const Area *area, uintptr_t at, unsigned size, Access a, bool a_writes,
                        Access b, bool b_writes) {
  fprintf(stderr, "kernel %s: a race for ", gpu.kernel);
  print_what(area, at, size);
  fprintf(stderr, "\n");
  for (int i = 0; i < 2; i++) {
    Access x = i ? b : a;
    fprintf(stderr, "  thread %d of ", x.thread);
    print_block(x.block);
    fprintf(stderr, " %s it, at\n", (i ? b_writes : a_writes) ? "writes" : "reads");
    print_place(x.from);
  }
  fprintf(stderr, a.block == b.block
          ? "  and between the two no __syncthreads() is passed: either can be first.\n"
          : "  and nothing orders the blocks of a launch: either can be first.\n");
  end_watch();
}

UNSEEN bool together(const Area *area, const Access &a, const Access &b) {
  if (a.launch != b.launch) return false;
  if (a.block != b.block) return area != &shared_area;
  if (a.thread / 32 == b.thread / 32 && a.syncs != b.syncs) return false;
  return a.phase == b.phase && a.thread != b.thread;
}

UNSEEN Area *find_area(uintptr_t at) {   // also if `at` is in its margin; or NULL
  if (at >= (uintptr_t)shared_begin && at < (uintptr_t)shared_end) {
    if (!shared_area.cells) {
      size_t bytes = shared_end - shared_begin;
      shared_area = {(uintptr_t)shared_begin, bytes, (Cell *)calloc(bytes / 4 + 1, sizeof(Cell))};
    }
    return &shared_area;
  }
  if (areas.size() != device_memory_map.size()) for (auto &m : device_memory_map)
    if (!areas.count(m.first))
      areas[m.first] = {m.first, m.second, (Cell *)calloc(m.second / 4 + 4, sizeof(Cell))};
  auto after = areas.upper_bound(at);
  Area *next = after == areas.end() ? NULL : &after->second;
  if (next && at + MARGIN >= next->begin) return next;
  if (after == areas.begin()) return NULL;
  Area *before = &(--after)->second;
  return at < before->begin + before->bytes + MARGIN ? before : NULL;
}


// ---- Traffic, if TRAFFIC names a file, of the kernels in KERNELS_COUNTED: how long the accesses of
// a warp take. Of device memory that is the number of 32-byte sectors that they touch. Shared
// memory has 32 banks, and number i of it is in bank i % 32 (a double counts as one number, as a
// float would): an access takes as many passes as there are different numbers in one bank. The
// lanes of a warp run one after the other here; what a GPU would execute together is the same place
// in the code for the same time: so each thread counts how often it was there.
struct Spot { void *from; const char *kernel; bool shared; unsigned long accesses, cost, least; };
struct Count { void *from; int thread; unsigned block, times; };
struct Group {
  void *from;
  int warp;
  unsigned block, time, lanes, n, passes;
  uintptr_t unit[128];                   // the sectors, or numbers of shared memory, seen so far
  unsigned char in_bank[32];
};
enum { SPOTS = 1 << 12, COUNTS = 1 << 16, GROUPS = 1 << 17 };
static Spot *spots;
static Count *counts;
static Group *groups;

UNSEEN unsigned scramble(void *from, unsigned a, unsigned b) {
  uintptr_t mixed = (uintptr_t)from * 0x9e3779b97f4a7c15u ^ a * 0x85ebca6bu ^ b * 0xc2b2ae35u;
  return (unsigned)(mixed >> 7);
}

UNSEEN Spot *spot_of(void *from, bool shared) {
  unsigned i = scramble(from, 0, 0) % SPOTS;
  while (spots[i].from && spots[i].from != from) i = (i + 1) % SPOTS;
  if (!spots[i].from) spots[i] = {from, gpu.kernel, shared, 0, 0, 0};
  return &spots[i];
}

UNSEEN void print_traffic(void) {
  report = fopen(getenv("TRAFFIC"), "w");
  for (int i = 0; report && i < SPOTS; i++) {
    Spot *p = &spots[i];
    if (!p->from) continue;
    fprintf(report, "%s %lu %lu %lu %s\n", p->kernel, p->cost, p->least, p->accesses,
            p->shared ? "shared" : "device");
    print_place(p->from);
  }
  if (report) fclose(report);
}

UNSEEN void start_traffic(void) {
  spots = (Spot *)calloc(SPOTS, sizeof *spots);
  counts = (Count *)calloc(COUNTS, sizeof *counts);
  groups = (Group *)calloc(GROUPS, sizeof *groups);
  atexit(print_traffic);
}

UNSEEN void count_traffic(uintptr_t at, unsigned size, void *from, bool shared) {
  static unsigned blocks_seen, last_block, last_launch;
  static bool counted;
  if (!spots) start_traffic();
  if (gpu.launches != last_launch) counted = strstr(getenv("KERNELS_COUNTED"), gpu.kernel);
  unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  if (block != last_block || gpu.launches != last_launch) blocks_seen++;   // those before are over
  last_block = block; last_launch = gpu.launches;
  if (!counted) return;
  unsigned i = scramble(from, self->id, 0) % COUNTS;
  unsigned tries = 0;
  while (counts[i].block == blocks_seen && (counts[i].from != from || counts[i].thread != self->id))
    if (++tries > 99) return;            // too many to be counted
    else i = (i + 1) % COUNTS;
  if (counts[i].block != blocks_seen) counts[i] = {from, self->id, blocks_seen, 0};
  unsigned time = counts[i].times++;
  int warp = self->id / 32;
  i = scramble(from, warp + 1, time) % GROUPS;
  while (groups[i].block == blocks_seen
         && (groups[i].from != from || groups[i].warp != warp || groups[i].time != time))
    if (++tries > 199) return;
    else i = (i + 1) % GROUPS;
  Group *g = &groups[i];
  Spot *p = spot_of(from, shared);
  if (g->block != blocks_seen) {
    *g = {from, warp, blocks_seen, time, 0, 0, 0, {}, {}};
    p->accesses++;
  }
  if (!shared) p->least += (g->lanes * size) % 32 == 0 ? (size > 32 ? size / 32 : 1) : 0;
  g->lanes++;
  unsigned each = !shared ? 32 : size < 8 ? 4 : 8;
  for (uintptr_t u = at / each; u <= (at + size - 1) / each; u++) {
    unsigned k = 0;
    while (k < g->n && g->unit[k] != u) k++;
    if (k < g->n || k == 128) continue;
    g->unit[g->n++] = u;
    if (!shared) p->cost++;
    else {
      p->least += g->n % 32 == 1;
      if (++g->in_bank[u % 32] > g->passes) g->passes++, p->cost++;
    }
  }
}

UNSEEN void watch(const void *p, unsigned size, bool writes, unsigned alignment, void *from) {
  uintptr_t at = (uintptr_t)p;
  if (!self || in_hook || at - (uintptr_t)gpu.stacks < 2UL * MAX_THREADS * STACK) return;
  in_hook = true;
  self->from = from;
  Area **known = &area_of_code[(uintptr_t)from / 4 % 4096], *area = *known;
  if (!area || at < area->begin || at + size > area->begin + area->bytes)
    *known = area = find_area(at);
  if (area) {
    Access now = {gpu.launches, blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z),
                  (unsigned)block_barrier.phase, self->id, self->syncs, from};
    bool outside = at < area->begin || at + size > area->begin + area->bytes;
    if (outside || at % alignment) {
      fprintf(stderr, "kernel %s, block (%u,%u,%u), thread %d %s ", gpu.kernel, blockIdx.x,
              blockIdx.y, blockIdx.z, self->id, writes ? "writes" : "reads");
      if (!outside) fprintf(stderr, "%u bytes at an address that is not a multiple of %u: ", size,
                            alignment);
      print_what(area, at, size);
      fprintf(stderr, ", at\n");
      print_place(from);
      end_watch();
    }
    if (counts_traffic) count_traffic(at, size, from, area == &shared_area);
    for (uintptr_t a = at; a < at + size; a += size < 8 ? 4 : 8) {
      Cell *cell = &area->cells[(a - area->begin) / 4];
      if (together(area, cell->write, now))
        report_race(area, a, size, cell->write, true, now, writes);
      if (writes) {
        if (together(area, cell->read, now))
          report_race(area, a, size, cell->read, false, now, true);
        if (together(area, cell->other, now))
          report_race(area, a, size, cell->other, false, now, true);
        cell->write = now;
      } else {
        if (cell->read.launch != now.launch) cell->other = now;
        else if (cell->read.block != now.block || (cell->read.thread != now.thread
                 && cell->other.block == now.block)) cell->other = cell->read;
        cell->read = now;
      }
    }
  }
  in_hook = false;
}

#define FROM __builtin_return_address(0)
#define HOOKS(n) \
  HOOK __tsan_read##n(void *p) { watch(p, n, false, n, FROM); }             \
  HOOK __tsan_write##n(void *p) { watch(p, n, true, n, FROM); }             \
  HOOK __tsan_unaligned_read##n(void *p) { watch(p, n, false, 1, FROM); }  \
  HOOK __tsan_unaligned_write##n(void *p) { watch(p, n, true, 1, FROM); }
HOOKS(1) HOOKS(2) HOOKS(4) HOOKS(8) HOOKS(16)
HOOK __tsan_read_range(void *p, long n) { watch(p, (unsigned)n, false, n % 16 ? 1 : 16, FROM); }
HOOK __tsan_write_range(void *p, long n) { watch(p, (unsigned)n, true, n % 16 ? 1 : 16, FROM); }
#ifdef __clang__                         // which copies a struct by a call of memcpy
#define COPY(name)                                                                          \
  extern "C" __attribute__((noinline, disable_sanitizer_instrumentation))                   \
  void *name(void *to, const void *from, size_t n) {                                        \
    watch(from, (unsigned)n, false, n % 16 ? 1 : 16, FROM);                                 \
    watch(to, (unsigned)n, true, n % 16 ? 1 : 16, FROM);                                    \
    for (size_t i = 0; i < n; i++) ((volatile char *)to)[i] = ((volatile const char *)from)[i]; \
    return to;                                                                              \
  }
COPY(memcpy) COPY(__tsan_memcpy)
#endif
HOOK __tsan_init(void) {}
HOOK __tsan_func_entry(void *) {}
HOOK __tsan_func_exit(void) {}
HOOK __tsan_vptr_update(void **, void *) {}
HOOK __tsan_vptr_read(void **) {}
#ifndef __clang__
#pragma GCC pop_options
#endif
