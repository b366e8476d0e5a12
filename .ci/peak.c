// peak THREADS: how many GFLOP/s this machine does with nothing but fused multiply-adds of floats
// in vector registers: the best of 5 times 0.1 s. Nothing that computes can be faster.
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#if defined __AVX512F__
enum { BYTES = 64, SUMS = 24 };
#elif defined __AVX__
enum { BYTES = 32, SUMS = 12 };
#else
enum { BYTES = 16, SUMS = 12 };
#endif
#ifdef __aarch64__
#define IN_REGISTER "+w"
#else
#define IN_REGISTER "+v"
#endif
#ifdef __clang__
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 24")
#endif
typedef float vec __attribute__((vector_size(BYTES)));

static double seconds(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec + 1e-9 * now.tv_nsec;
}

static void *work(void *flop) {
  vec sum[SUMS], x, y;
  double best = 0;
  UNROLL for (int i = 0; i < SUMS; i++) sum[i] = (vec){0};   // or they would not be in registers
  x = (vec){0} + 0.999f; y = (vec){0} + 0.001f;
  for (int run = 0; run < 5; run++) {
    double start = seconds(), took = 0;
    long loops = 0;
    while ((took = seconds() - start) < 0.1)
      for (int k = 0; k < 10000; k++, loops++)
        UNROLL for (int i = 0; i < SUMS; i++) {
          sum[i] = sum[i] * x + y;
          __asm__ volatile("" : IN_REGISTER (sum[i]));       // so that it is computed
        }
    double rate = 2.0 * BYTES / sizeof(float) * SUMS * loops / took;
    if (rate > best) best = rate;
  }
  *(double *)flop = best;
  return NULL;
}

int main(int argc, char **argv) {
  int n = argc > 1 ? atoi(argv[1]) : 1;
  double flop[64], all = 0;
  pthread_t thread[64];
  if (n < 1 || n > 64) return 1;
  for (int i = 0; i < n; i++) pthread_create(&thread[i], NULL, work, &flop[i]);
  for (int i = 0; i < n; i++) { pthread_join(thread[i], NULL); all += flop[i]; }
  printf("%.1f\n", all * 1e-9);
  return 0;
}
