// fuzz PROGRAM DIR TEXT COUNT: damages copies of a run's files in COUNT ways, and has PROGRAM open
// each by --eval, --init or --resume. It must open it (exit code 0), or refuse it with one line and
// exit code 1, within 20 s. A failure names its number: fuzz PROGRAM DIR TEXT 1 NUMBER repeats it.

#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

static uint64_t state;
static long random_below(long n) {
  state = state * 6364136223846793005u + 1442695040888963407u;
  return (long)((state >> 33) % (uint64_t)n);
}

enum { MOST = 1 << 20 };
static char data[2 * MOST];

static long load(const char *folder, const char *name) {
  char path[4096];
  snprintf(path, sizeof path, "%s/%s", folder, name);
  FILE *file = fopen(path, "rb");
  if (!file) perror(path), exit(1);
  long n = (long)fread(data, 1, MOST, file);
  fclose(file);
  return n;
}

static void store(const char *name, long n) {
  char path[4096];
  snprintf(path, sizeof path, "fuzzed/%s", name);
  FILE *file = fopen(path, "wb");
  if (!file || (long)fwrite(data, 1, n, file) != n) perror(path), exit(1);
  fclose(file);
}

// One of the ways in which files go bad; `text` is how much of it is the header. Returns its size.
static long damage(long n, long text) {
  static const char *const words[] = {"\"", "{", "}", "[", "]", ",", ":", "-1", "0", "\\", "\\u",
    "99999999999", "18446744073709551615", "\"shape\"", "\"F64\"", "\"F16\"", "null", "", "1e9",
    "\"__metadata__\":{}", "4294967296", "[8,8]", "\xff", "nan"};
  const char *word = words[random_below(sizeof words / sizeof *words)];
  long at = random_below(text), length = (long)strlen(word), cut = random_below(20);
  switch (random_below(7)) {
  case 0: data[random_below(n)] ^= (char)(1 << random_below(8)); return n;
  case 1: data[at] = (char)random_below(256); return n;
  case 2: return random_below(n);                                     // cut short
  case 3:                                                             // a word put in
    memmove(data + at + length, data + at, n - at);
    memcpy(data + at, word, length);
    return n + length;
  case 4:                                                             // a word written over
    if (at + length < n) memcpy(data + at, word, length);
    return n;
  case 5:                                                             // some bytes taken out
    if (at + cut > n) return n;
    memmove(data + at, data + at + cut, n - at - cut);
    return n - cut;
  default:                                                            // a digit is another one
    for (long i = at; i < text; i++)
      if (data[i] >= '0' && data[i] <= '9') { data[i] = (char)('0' + random_below(10)); break; }
    return n;
  }
}

// The length of the header that the file has now, in its first 8 bytes: so damage gets further in
static void mend_length(long before, long n, long header) {
  uint64_t size = (uint64_t)(header + n - before);
  for (int i = 0; i < 8 && n > 8; i++) data[i] = (char)(size >> 8*i);
}

static int run(const char *program, const char *text, int way) {
  pid_t pid = fork();
  if (pid == 0) {
    int out = open("fuzzed/out.txt", O_WRONLY | O_CREAT | O_TRUNC, 0666);
    int err = open("fuzzed/err.txt", O_WRONLY | O_CREAT | O_TRUNC, 0666);
    dup2(out, 1); dup2(err, 2);
    alarm(20);
    if (way == 0) execl(program, program, text, "--eval", "--out", "fuzzed", "--threads", "1",
                        NULL);
    if (way == 1) execl(program, program, text, "--init", "fuzzed", "--out", "fuzzed/out",
                        "--max_steps", "1", "--batch_size", "1", "--threads", "1", NULL);
    execl(program, program, text, "--resume", "--out", "fuzzed", "--max_steps", "61",
          "--batch_size", "1", "--accumulate", "1", "--threads", "1", NULL);
    _exit(99);
  }
  int status = 0;
  waitpid(pid, &status, 0);
  return status;
}

int main(int argc, char **argv) {
  if (argc < 5) return fprintf(stderr, "fuzz PROGRAM DIR TEXT COUNT [FIRST]\n"), 2;
  static const char *const names[] = {"model.safetensors", "state.safetensors", "config.json"};
  long failed = 0, opened = 0, refused = 0, first = argc > 5 ? atol(argv[5]) : 0;
  mkdir("fuzzed", 0777);
  for (long number = first; number < first + atol(argv[4]); number++) {
    state = (uint64_t)number * 0x9e3779b97f4a7c15u + 1;
    for (int i = 0; i < 5; i++) random_below(2);
    int way = (int)random_below(3), bad = way == 2 ? 1 : (int)random_below(4) == 0 ? 2 : 0;
    for (int i = 0; i < 3; i++) {
      long n = load(argv[2], names[i]), text = n, header = 0;
      if (bad < 2) {
        for (int k = 0; k < 4; k++) header |= (long)(unsigned char)data[k] << 8*k;
        text = 8 + header;
      }
      if (i == bad)
        for (long k = 1 + random_below(3), mend = random_below(2); k > 0; k--) {
          long before = n;
          n = damage(n, text < n ? text : n);
          if (n < 16) break;
          if (bad < 2 && mend) mend_length(before, n, header), header += n - before;
        }
      store(names[i], n);
    }
    int status = run(argv[1], argv[3], way);
    long size = load("fuzzed", "err.txt"), lines = 0;
    for (long i = 0; i < size; i++) lines += data[i] == '\n';
    int good = WIFEXITED(status) && WEXITSTATUS(status) == 0 && size == 0;
    int no = WIFEXITED(status) && WEXITSTATUS(status) == 1 && lines == 1 && size < 1000;
    opened += good;
    refused += no;
    if (good || no) continue;
    printf("number %ld (way %d, %s): status %d, %ld lines\n%.*s\n", number, way, names[bad], status,
           lines, (int)(size < 3000 ? size : 3000), data);
    failed++;
  }
  printf("%ld opened, %ld refused, %ld failed\n", opened, refused, failed);
  return failed > 0;
}
