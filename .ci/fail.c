// LD_PRELOAD=fail.so FAIL_CALL=rename FAIL_AT=3 PROGRAM: the third rename() of the program fails.
// FAIL_LOG names a file that is written when it has happened. For Linux.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static int fails(const char *call) {
  static int count;
  const char *name = getenv("FAIL_CALL"), *at = getenv("FAIL_AT"), *log = getenv("FAIL_LOG");
  if (!name || !at || strcmp(name, call)) return 0;
  if (__atomic_add_fetch(&count, 1, __ATOMIC_RELAXED) != atoi(at)) return 0;
  int fd = log ? creat(log, 0666) : -1;
  if (fd >= 0) close(fd);
  errno = strstr(call, "alloc") ? ENOMEM : ENOSPC;
  return 1;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define WRAP(type, name, failed, parameters, arguments)                                            \
  type name parameters { return fails(#name) ? failed : REAL(name) arguments; }

WRAP(FILE *, fopen, NULL, (const char *path, const char *mode), (path, mode))
WRAP(FILE *, fdopen, NULL, (int fd, const char *mode), (fd, mode))
WRAP(size_t, fread, 0, (void *p, size_t size, size_t n, FILE *f), (p, size, n, f))
WRAP(int, fflush, EOF, (FILE *f), (f))
WRAP(int, fclose, EOF, (FILE *f), (f))
WRAP(int, fseek, -1, (FILE *f, long to, int from), (f, to, from))
WRAP(int, fsync, -1, (int fd), (fd))
WRAP(int, rename, -1, (const char *from, const char *to), (from, to))
WRAP(int, unlink, -1, (const char *path), (path))
WRAP(int, mkdir, -1, (const char *path, mode_t mode), (path, mode))
WRAP(int, access, -1, (const char *path, int mode), (path, mode))
WRAP(int, stat, -1, (const char *path, struct stat *s), (path, s))
WRAP(int, lstat, -1, (const char *path, struct stat *s), (path, s))
WRAP(int, posix_memalign, ENOMEM, (void **p, size_t align, size_t n), (p, align, n))

size_t fwrite(const void *p, size_t size, size_t n, FILE *f) {
  if (!fails("fwrite")) return REAL(fwrite)(p, size, n, f);
  f->_flags |= 0x20;   // glibc's _IO_ERR_SEEN: a compiler may call fwrite() for fputs(), whose
  return 0;            // errors are found by ferror()
}

int open(const char *path, int flags, ...) {
  va_list args;
  va_start(args, flags);
  int mode = flags & O_CREAT ? va_arg(args, int) : 0;
  va_end(args);
  return fails("open") ? -1 : REAL(open)(path, flags, mode);
}

// dlsym() allocates, so these two ask glibc's own names
void *__libc_calloc(size_t, size_t), *__libc_realloc(void *, size_t);
void *calloc(size_t n, size_t size) { return fails("calloc") ? NULL : __libc_calloc(n, size); }
void *realloc(void *p, size_t n) { return fails("realloc") ? NULL : __libc_realloc(p, n); }
