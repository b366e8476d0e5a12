// train_gpu.cu is train.c for NVIDIA GPUs: its rooms 2, 3 and 6 as CUDA kernels, with no library
// but the CUDA runtime. The rest, from the model to main(), is train.c itself, included below.
//
// Read it beside train.c: a function here has the name, the arguments, the equations and the place
// it has there, and its kernels stand directly above it. What a loop is there, is a launch here:
//
//   parallel_for (n, N) { ... }           kernel<<<N / rows of a block, threads, 0, stream>>>(...)
//   the barrier at its end                the next launch: a stream runs its kernels in turn
//   for (c = 0; c < C; c++) in it         for (c = lane; c < C; c += 32): a warp shares the row
//   sum += ...                            each lane's own sum, then warp_sum()
//
// A GPU runs thousands of threads; 32 of them, a warp, step together. Three rules follow:
//   - Consecutive lanes take consecutive addresses ("coalesced"). Memory moves 32 bytes at a time
//     and a warp's load takes as many moves as it touches; so the fastest index is the lane.
//   - What many threads of a block need, one of them fetches into shared memory, as near as
//     a cache. __syncthreads() makes all wait for all: between writing there and another's reading,
//     and between reading and writing the next thing. Each one here says which it is.
//   - No atomics on floats: blocks finish in any order, and a sum in any order has any rounding. A
//     sum is cut into fixed parts, added in a fixed order: a run repeats bit for bit.
//
// No GPU? `make test` runs these kernels on the CPU, thread by thread: see test_gradients.c.
//
//   make train_gpu && ./train_gpu         the options, files and output of ./train

#ifndef GPU
#define GPU
#endif
#define PROGRAM "train_gpu"
#define DEVICE __host__ __device__
#define STEPS_AHEAD 16                   // updates between two looks at the loss, see train_arm()
#ifdef __CUDACC__
#pragma nv_diag_suppress 177             // what a program leaves unused of train.c
#define UNROLL _Pragma("unroll")         // keeps arrays in registers: they cannot be indexed
#define UNROLL_4 _Pragma("unroll 4")
#else
#define UNROLL
#define UNROLL_4
#endif
#include "train.c"

// ---- 2. Device memory and launches ------------------------------------------------------------

#ifndef WARPS
#define WARPS 8                          // of a block. The search for races takes 2, see Makefile
#endif
enum { THREADS = 32*WARPS };
#define ALL_LANES 0xffffffffu

static cudaStream_t stream;              // all work, in the order in which it was asked for
static int multiprocessors, compute_capability;
static int use_tf32;                     // see room 3, matmul
static real *scratch;                    // partial sums on their way, never kept between launches
static long n_scratch;                   // numbers in it

#define CHECK(call) check(call, #call, __FILE__, __LINE__)
static void check(cudaError_t error, const char *call, const char *file, int line) {
  if (error != cudaSuccess) die("%s:%d: %s: %s", file, line, call, cudaGetErrorString(error));
}

// What copy_in() is given may change as soon as it returns, but the copy waits in the stream for
// its turn. So small ones, the tokens of a step, are first put aside, in memory that the GPU reads
// by itself ("pinned"), and the CPU runs ahead of the GPU by up to SLOTS copies.
enum { SLOTS = 16, SLOT_BYTES = 256 << 10 };
static struct { void *memory; cudaEvent_t sent; } slot[SLOTS];

static __global__ void fill_kernel(real *x, long n, real value);

static const char *device_start(int threads) {
  static char words[320];
  int devices = 0;
  (void)threads;                         // the CPU's; a GPU has its own
  cudaError_t error = cudaGetDeviceCount(&devices);
  if (error != cudaSuccess || devices == 0)
    die("no CUDA device (the driver says: %s): ./train does the same on the CPU",
        error != cudaSuccess ? cudaGetErrorString(error) : "none is visible");
  CHECK(cudaSetDevice(0));               // the fastest, if CUDA_VISIBLE_DEVICES says no other
  cudaDeviceProp gpu;
  CHECK(cudaGetDeviceProperties(&gpu, 0));
  cudaFuncAttributes attributes;         // of any kernel: is there code in here for this GPU?
  error = cudaFuncGetAttributes(&attributes, (const void *)fill_kernel);
  if (error != cudaSuccess)
    die("no code for %s (%s): make -B train_gpu ARCH=sm_%d%d", gpu.name,
        cudaGetErrorString(error), gpu.major, gpu.minor);
  multiprocessors = gpu.multiProcessorCount;
  compute_capability = 10*gpu.major + gpu.minor;
  if (stream) return words;              // was started before
  CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  for (int i = 0; i < SLOTS; i++) {
    CHECK(cudaMallocHost(&slot[i].memory, SLOT_BYTES));
    CHECK(cudaEventCreateWithFlags(&slot[i].sent, cudaEventDisableTiming));
  }
  size_t bytes = MIN((size_t)64 << 20, gpu.totalGlobalMem / 64);
  scratch = (real *)device_alloc(bytes);
  n_scratch = bytes / sizeof(real);
  snprintf(words, sizeof words, "%s, %d multiprocessors, %.0f GB", gpu.name, multiprocessors,
           gpu.totalGlobalMem / 1e9);
  return words;
}

// fp32 is what it says. tf32: matmuls on tensor cores, which see 10 of a float's 23 bits.
static void device_precision(const char *name) {
  use_tf32 = strcmp(name, "tf32") == 0;
  if (!use_tf32 && strcmp(name, "fp32") != 0) die("--precision is %s: fp32 or tf32", name);
  if (use_tf32 && compute_capability < 80)
    die("--precision tf32 needs compute capability 8.0, this GPU has %d.%d: use fp32",
        compute_capability / 10, compute_capability % 10);
}

// A training step of a small model is a hundred kernels of a few microseconds, and asking for a
// kernel costs the CPU as much. So what is always the same is asked for once: the second time that
// launch_again() gets the same work, its kernels are recorded as a graph, and from then on a step
// is one request. (The first time runs as it is: only then does the driver load the kernels.)
enum { RECORDINGS = 8 };
static struct Recording {
  void (*work)(void *);
  void *argument;
  int calls;
  cudaGraphExec_t graph;
} recording[RECORDINGS];

static void forget_recordings(void) {    // they hold addresses
  for (int i = 0; i < RECORDINGS; i++) {
    if (recording[i].graph) CHECK(cudaGraphExecDestroy(recording[i].graph));
    memset(&recording[i], 0, sizeof recording[i]);
  }
}

static void launch(void (*work)(void *), void *argument) { work(argument); }

static void launch_again(void (*work)(void *), void *argument) {
  int i = 0;
  while (i < RECORDINGS && recording[i].work
         && (recording[i].work != work || recording[i].argument != argument)) i++;
  if (i == RECORDINGS || profiling) {    // a replay has no laps
    launch(work, argument);
    return;
  }
  struct Recording *r = &recording[i];
  r->work = work; r->argument = argument;
  if (r->calls++ == 0) {
    launch(work, argument);
    return;
  }
  if (!r->graph) {
    cudaGraph_t graph;
    CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    work(argument);
    CHECK(cudaStreamEndCapture(stream, &graph));
    CHECK(cudaGraphInstantiateWithFlags(&r->graph, graph, 0));
    CHECK(cudaGraphDestroy(graph));
  }
  CHECK(cudaGraphLaunch(r->graph, stream));
}

static double device_memory(void) {
  size_t left = 0, total = 0;
  CHECK(cudaMemGetInfo(&left, &total));
  return (double)left;
}

static void *device_alloc(size_t bytes) {
  void *p;
  forget_recordings();
  cudaError_t error = cudaMalloc(&p, MAX(bytes, 1));
  if (error == cudaErrorMemoryAllocation) {
    size_t left = 0, total = 0;
    CHECK(cudaMemGetInfo(&left, &total));
    die("no GPU memory for %.1f MB: %.1f of %.1f MB are free; lower --batch_size, --block_size, "
        "--n_embd or --n_layer", bytes / 1e6, left / 1e6, total / 1e6);
  }
  CHECK(error);
  CHECK(cudaMemsetAsync(p, 0, MAX(bytes, 1), stream));
  return p;
}

static void device_free(void *p) {
  forget_recordings();
  CHECK(cudaStreamSynchronize(stream));
  CHECK(cudaFree(p));
}

static void copy_in(void *device, const void *host, size_t bytes) {
  static int next;
  if (bytes > SLOT_BYTES) {
    CHECK(cudaMemcpyAsync(device, host, bytes, cudaMemcpyHostToDevice, stream));
    CHECK(cudaStreamSynchronize(stream));
    return;
  }
  int i = next++ % SLOTS;
  CHECK(cudaEventSynchronize(slot[i].sent));   // what lay here SLOTS copies ago
  memcpy(slot[i].memory, host, bytes);
  CHECK(cudaMemcpyAsync(device, slot[i].memory, bytes, cudaMemcpyHostToDevice, stream));
  CHECK(cudaEventRecord(slot[i].sent, stream));
}

// The only place where the CPU waits for the GPU, if there is no --profile.
static void copy_out(void *host, const void *device, size_t bytes) {
  CHECK(cudaMemcpyAsync(host, device, bytes, cudaMemcpyDeviceToHost, stream));
  CHECK(cudaStreamSynchronize(stream));
}

// Every function of rooms 3 and 6 ends here, so here its launches are checked. For --profile an
// event marks the stream where the function's kernels end; its time is that since the last event.
static void lap(const char *name, double flop, double bytes) {
  static cudaEvent_t mark[2];
  static int now;
  cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess)
    die("%s: its kernel did not start: %s", name, cudaGetErrorString(error));
  if (!profiling) return;
  for (int i = 0; i < 2; i++)
    if (!mark[i]) CHECK(cudaEventCreate(&mark[i]));
  float milliseconds;
  CHECK(cudaEventRecord(mark[now], stream));
  CHECK(cudaEventSynchronize(mark[now]));
  if (name) {
    CHECK(cudaEventElapsedTime(&milliseconds, mark[!now], mark[now]));
    profile_add(name, 1e-3 * milliseconds, flop, bytes);
  }
  now = !now;
}

static int blocks(long n, long each) { return (int)((n + each - 1) / each); }

// ---- 3. Layers as kernels ---------------------------------------------------------------------

// Four neighbours in memory: the 16 bytes that one instruction moves at most.
typedef struct __align__(16) { real at[4]; } Four;

static __device__ __forceinline__ int whole(const real *x, long n) {   // is it a Four?
  return n >= 4 && (uintptr_t)x % 16 == 0;
}

// x[0..3], of which n are there, the others 0. Rows of an odd length are not aligned: one by one.
static __device__ __forceinline__ Four load_four(const real *x, long n) {
  Four v;
  if (whole(x, n)) return *(const Four *)x;
  UNROLL for (int j = 0; j < 4; j++) v.at[j] = j < n ? x[j] : 0;
  return v;
}

static __device__ __forceinline__ void store_four(real *x, long n, Four v) {
  if (whole(x, n)) *(Four *)x = v;
  else
    UNROLL for (int j = 0; j < 4; j++)
      if (j < n) x[j] = v.at[j];
}

// The sum of a warp's 32 numbers, for every lane: five exchanges between lanes, with no memory.
// Lane i adds what lane i^16 has, then i^8, ..., so all have added the same pairs: the same bits.
static __device__ __forceinline__ real warp_sum(real x) {
  for (int i = 16; i > 0; i /= 2) x += __shfl_xor_sync(ALL_LANES, x, i);
  return x;
}

// The sum over a block, for every thread, in double: a row of V, or a tensor, is long. A kernel may
// call it once: nothing keeps a second call from writing `part` while the first is still read.
static __device__ double block_sum(double x) {
  __shared__ double part[WARPS];
  for (int i = 16; i > 0; i /= 2) x += __shfl_xor_sync(ALL_LANES, x, i);
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = x;
  __syncthreads();                       // the parts are written
  double sum = 0;
  for (unsigned i = 0; i < blockDim.x / 32; i++) sum += part[i];
  return sum;
}

static __device__ real block_max(real x) {
  __shared__ real part[WARPS];
  for (int i = 16; i > 0; i /= 2) {
    real other = __shfl_xor_sync(ALL_LANES, x, i);
    x = MAX(x, other);
  }
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = x;
  __syncthreads();                       // the parts are written
  for (unsigned i = 0; i < blockDim.x / 32; i++) x = MAX(x, part[i]);
  return x;
}

// The matmul. C = A B, (M,N) = (M,K) (K,N). The ladder, in the GPU's words:
//   1. One thread per element loads two numbers for each multiply-add, and waits for memory.
//   2. A block owns a tile of C, 128 x 128. It walks along K in steps of a few k: all its threads
//      bring that much of A's rows and B's columns into shared memory, once, for all of them. So a
//      number from device memory serves 128 multiply-adds.
//   3. A warp owns 32 x 64 of the tile and a thread 8 x 8, in registers: of shared memory it loads
//      8 + 8 numbers, in four 16-byte loads, for 64 multiply-adds. Lanes are 4 x 8, so a load's
//      addresses are few (64 or 128 bytes in a row) and lie in different banks.
//   4. While it multiplies one step the next is already on its way from memory to registers, then
//      goes to a second pair of buffers: so one barrier a step is enough.
//   5. A small C has too few tiles to occupy the GPU. Then tiles are 64 x 64, or K is cut into
//      slices, whose sums go to scratch and are added in order.
// On tensor cores (tf32) step 3 differs: a warp multiplies 16 x 8 x 8 in one instruction.
enum {
  BIG = WARPS == 8 ? 16 : 8,             // a tile is 8*side square, its block side*side threads
  DEPTH = 8,                             // of a step; more for tensor cores, done sooner
  DEEP = sizeof(real) == sizeof(float) ? BIG : 8,
  MOST_FOURS = 2,                            // Fours that a thread brings of each operand, at most
  PAD = 4                                // a row in shared memory has 4 numbers more than the tile:
};                                       // then a column, or a transposed store, is in many banks

// A matrix as it lies in memory: element (i,j) is at[i*row + j*column]. The transpose is the same
// memory with the strides exchanged. One of the strides is 1.
typedef struct { const real *at; long row, column; } Matrix;
static Matrix rows_of(const real *at, long width) { Matrix m = {at, width, 1}; return m; }
static DEVICE Matrix transpose(Matrix m) { Matrix t = {m.at, m.column, m.row}; return t; }

typedef struct {                         // C = A B + bias, or C += A B
  real *c;
  long c_row, c_slice;                   // distances of C's rows, and of slices, in scratch
  Matrix a, b;
  int M, N, K, slice, add;               // of K a slice takes so many
  const real *bias;
} Product;

// Tensor cores see a float as tf32: 8 bits of exponent, 10 of mantissa. Rounded to nearest, or the
// hardware would cut the rest off, always towards zero.
static __device__ __forceinline__ real round_tf32(real x) {
#if defined __CUDA_ARCH__ && __CUDA_ARCH__ >= 800
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"((float)x));
  return __uint_as_float(bits);
#else
  float y = (float)x;
  uint32_t bits;
  memcpy(&bits, &y, 4);
  bits = (bits + 0x1000) & ~0x1fffu;
  memcpy(&y, &bits, 4);
  return x != x ? x : y;
#endif
}

// C += A B by a whole warp, C (16,8), A (16,8), B (8,8). With g = lane / 4 and t = lane % 4 a lane
// has a = A[g][t], A[g+8][t], A[g][t+4], A[g+8][t+4]; b = B[t][g], B[t+4][g]; and of C
// c = C[g][2t], C[g][2t+1], C[g+8][2t], C[g+8][2t+1].
static __device__ __forceinline__ void mma_tf32(real *c, const real *a, const real *b) {
#if defined EMULATED
  emulate_mma(c, a, b);
#elif defined __CUDA_ARCH__ && __CUDA_ARCH__ >= 800
  float s[4] = {(float)c[0], (float)c[1], (float)c[2], (float)c[3]};
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
               "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(s[0]), "+f"(s[1]), "+f"(s[2]), "+f"(s[3])
               : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])),
                 "r"(__float_as_uint(a[2])), "r"(__float_as_uint(a[3])),
                 "r"(__float_as_uint(b[0])), "r"(__float_as_uint(b[1])));
  for (int i = 0; i < 4; i++) c[i] = s[i];
#else
  (void)c; (void)a; (void)b;             // device_precision() does not let it come to this
#endif
}

// Where in a step's tile this thread's piece number l begins: line (a row of A, a column of B) and
// k. Consecutive threads go along the operand's own direction in memory.
static __device__ __forceinline__ void place_of_piece(int l, int side, int depth, long column,
                                                      int *line, int *k) {
  int piece = threadIdx.x + l*side*side;
  if (column == 1) {                     // k is consecutive: `depth` of it, then the next line
    *line = piece / (depth / 4);
    *k = piece % (depth / 4) * 4;
  } else {                               // lines are
    *line = piece % (2*side) * 4;
    *k = piece / (2*side);
  }
}

// Device memory to registers: this thread's pieces of the operand m (lines, K), from (line, k) on.
static __device__ __forceinline__ void fetch(Four *piece, int side, int depth, Matrix m, int lines,
                                             int K, int line0, int k0) {
  UNROLL for (int l = 0; l < MOST_FOURS; l++) {
    int line, k;
    if (l*side == 2*depth) break;
    place_of_piece(l, side, depth, m.column, &line, &k);
    line += line0; k += k0;
    const real *x = m.at + line*m.row + k*m.column;
    if (m.column == 1) piece[l] = load_four(x, line < lines ? K - k : 0);
    else piece[l] = load_four(x, k < K ? lines - line : 0);
  }
}

// Registers to shared memory, as tile[k][line] whatever the operand's strides are: a transposition
// costs nothing more. In tf32 numbers are rounded here, once, for all who read them.
static __device__ __forceinline__ void put(real *tile, const Four *piece, int side, int depth,
                                           long column, int tf32) {
  int row = 8*side + PAD;
  UNROLL for (int l = 0; l < MOST_FOURS; l++) {
    int line, k;
    if (l*side == 2*depth) break;
    place_of_piece(l, side, depth, column, &line, &k);
    Four v = piece[l];
    UNROLL for (int j = 0; j < 4; j++) v.at[j] = tf32 ? round_tf32(v.at[j]) : v.at[j];
    if (column == 1)
      UNROLL for (int j = 0; j < 4; j++) tile[(k + j)*row + line] = v.at[j];
    else *(Four *)(tile + k*row + line) = v;
  }
}

// A step's products, for this thread's 8 x 8 of C: rows lane/8*4 + 0..3 and the same + 16 of the
// warp's 32, columns lane%8*4 + 0..3 and the same + 32 of its 64.
static __device__ __forceinline__ void multiply(real (*sum)[8], const real *a, const real *b,
                                                int row, int depth) {
  a += threadIdx.x % 32 / 8 * 4;
  b += threadIdx.x % 8 * 4;
  UNROLL for (int k = 0; k < depth; k++) {
    Four x[2] = {*(const Four *)(a + k*row), *(const Four *)(a + k*row + 16)};
    Four y[2] = {*(const Four *)(b + k*row), *(const Four *)(b + k*row + 32)};
    UNROLL for (int i = 0; i < 8; i++)
      UNROLL for (int j = 0; j < 8; j++) sum[i][j] += x[i / 4].at[i % 4] * y[j / 4].at[j % 4];
  }
}

// The same on tensor cores: the warp's 32 x 64 as 2 x 8 tiles (16,8), of which this lane has 4
// each. A sum does not mind in which order k comes: lane t takes k = 2t and 2t + 1 for t and t + 4,
// since then the warp's 32 numbers of a load lie in 32 banks.
static __device__ __forceinline__ void multiply_tf32(real (*sum)[8], const real *a, const real *b,
                                                     int row, int depth) {
  int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  UNROLL for (int k = 0; k < depth; k += 8) {
    const real *a0 = a + (k + 2*t)*row + g, *a1 = a0 + row;
    const real *b0 = b + (k + 2*t)*row + g, *b1 = b0 + row;
    real x[2][4] = {{a0[0], a0[8], a1[0], a1[8]}, {a0[16], a0[24], a1[16], a1[24]}};
    UNROLL for (int j = 0; j < 8; j++) {
      real y[2] = {b0[8*j], b1[8*j]};
      mma_tf32(sum[j], x[0], y);
      mma_tf32(sum[j] + 4, x[1], y);
    }
  }
}

// c[i, j..j+n-1] = sum + bias, or += sum; n is 2 or 4, and what lies outside of C is left out.
static __device__ __forceinline__ void finish(const Product *p, int i, int j, const real *sum,
                                              int n) {
  real *c = p->c + blockIdx.z*p->c_slice + i*p->c_row + j;
  if (i >= p->M) return;
  if (n == 4 && whole(c, p->N - j)) {
    Four v = p->add ? *(Four *)c : p->bias ? load_four(p->bias + j, 4) : Four{{0, 0, 0, 0}};
    UNROLL for (int e = 0; e < 4; e++) v.at[e] += sum[e];
    *(Four *)c = v;
  } else
    UNROLL for (int e = 0; e < 4; e++)
      if (e < n && j + e < p->N) c[e] = sum[e] + (p->add ? c[e] : p->bias ? p->bias[j + e] : 0);
}

// A block's tile of C, 8*side square, by side*side threads. side, depth and tf32 are constants, so
// that each kernel below is this function with loops unrolled and one of the two ways to multiply.
static __device__ __forceinline__ void matmul_tile(const int side, const int depth, const int tf32,
                                                   const Product *p, real *shared) {
  const int tile = 8*side, row = tile + PAD;
  real *a = shared, *b = shared + 2*depth*row, sum[8][8] = {{0}};
  Four a_next[MOST_FOURS], b_next[MOST_FOURS];
  int i = blockIdx.y * tile, j = blockIdx.x * tile, warp = threadIdx.x / 32;
  int warp_i = warp / (side / 8) * 32, warp_j = warp % (side / 8) * 64;
  int begin = blockIdx.z * p->slice, end = MIN(p->K, begin + p->slice), now = 0;
  Matrix b_lines = transpose(p->b);      // its lines are C's columns, as those of A are C's rows
  fetch(a_next, side, depth, p->a, p->M, end, i, begin);
  fetch(b_next, side, depth, b_lines, p->N, end, j, begin);
  for (int k = begin; k < end; k += depth, now = !now) {
    real *a_now = a + now*depth*row, *b_now = b + now*depth*row;
    put(a_now, a_next, side, depth, p->a.column, tf32);   // read two steps ago, before the
    put(b_now, b_next, side, depth, b_lines.column, tf32);   // barrier of the last one
    __syncthreads();                     // the step's numbers are there
    if (k + depth < end) {
      fetch(a_next, side, depth, p->a, p->M, end, i, k + depth);
      fetch(b_next, side, depth, b_lines, p->N, end, j, k + depth);
    }
    if (tf32) multiply_tf32(sum, a_now + warp_i, b_now + warp_j, row, depth);
    else multiply(sum, a_now + warp_i, b_now + warp_j, row, depth);
  }
  int lane = threadIdx.x % 32;
  i += warp_i; j += warp_j;
  UNROLL for (int e = 0; e < 8; e++)
    if (tf32) {                          // e: which of the 8 tiles side by side
      UNROLL for (int r = 0; r < 4; r++)
        finish(p, i + 8*r + lane / 4, j + 8*e + lane % 4 * 2, &sum[e][2*r], 2);
    } else {                             // e: which of the 8 rows
      finish(p, i + lane / 8 * 4 + e / 4 * 16 + e % 4, j + lane % 8 * 4, sum[e], 4);
      finish(p, i + lane / 8 * 4 + e / 4 * 16 + e % 4, j + lane % 8 * 4 + 32, sum[e] + 4, 4);
    }
}

// The second number of a launch bound: so many blocks on a multiprocessor at once, hence so many of
// its 65536 registers for each thread: while one block waits at its barrier, another works.
#define MATMUL_KERNEL(name, side, depth, tf32)                                              \
  static __global__ void __launch_bounds__((side)*(side), (side) == 16 ? 2 : 6)             \
  name(Product p) {                                                                         \
    __shared__ __align__(16) real shared[4*(depth)*(8*(side) + PAD)];                       \
    matmul_tile(side, depth, tf32, &p, shared);                                             \
  }
MATMUL_KERNEL(matmul_big, BIG, DEPTH, 0)
MATMUL_KERNEL(matmul_small, 8, DEPTH, 0)
MATMUL_KERNEL(matmul_big_tf32, BIG, DEEP, 1)
MATMUL_KERNEL(matmul_small_tf32, 8, DEPTH, 1)

// c[i,j] = (add ? c[i,j] : bias[j]) + the sum over slices of part[slice][i][j]: a thread an element
static __global__ void add_slices(real *c, long c_row, const real *part, int M, int N, int slices,
                                  int add, const real *bias) {
  long e = (long)blockIdx.x * THREADS + threadIdx.x;   // consecutive in part, and along a row of c
  if (e >= (long)M*N) return;
  real *y = c + e / N * c_row + e % N, sum = add ? *y : bias ? bias[e % N] : 0;
  for (int s = 0; s < slices; s++) sum += part[s*(long)M*N + e];
  *y = sum;
}

static void matmul(real *c, long c_row, Matrix a, Matrix b, int M, int N, int K, int add,
                   const real *bias) {
  Product p = {c, c_row, 0, a, b, M, N, K, K, add, bias};
  long big = (long)blocks(M, 8*BIG) * blocks(N, 8*BIG);
  long room = n_scratch / MAX((long)M*N, 1);
  // Slices of at least 256: with a few times as many blocks as the GPU runs at once, all of it
  // works
  int slices = (int)MIN(room, MIN(K / 256, (2*multiprocessors + big - 1) / big));
  int large = big * MAX(slices, 1) >= multiprocessors;
  if (!large) slices = (int)MIN(room, MIN(K / 256, 4*multiprocessors / ((BIG/8)*(BIG/8)*big)));
  if (slices > 1) {
    p.c = scratch; p.c_row = N; p.c_slice = (long)M*N; p.add = 0; p.bias = NULL;
    p.slice = blocks(blocks(K, slices), DEEP) * DEEP;   // whole steps
    slices = blocks(K, p.slice);
  } else slices = 1;
  int side = large ? BIG : 8;
  dim3 grid(blocks(N, 8*side), blocks(M, 8*side), slices);
  if (large && use_tf32) matmul_big_tf32<<<grid, side*side, 0, stream>>>(p);
  else if (large) matmul_big<<<grid, side*side, 0, stream>>>(p);
  else if (use_tf32) matmul_small_tf32<<<grid, side*side, 0, stream>>>(p);
  else matmul_small<<<grid, side*side, 0, stream>>>(p);
  if (slices > 1)
    add_slices<<<blocks((long)M*N, THREADS), THREADS, 0, stream>>>(
        c, c_row, scratch, M, N, slices, add, bias);
}

// The device's own exponential: exact to 2 units in the last place, and infinity when it should be.
static __device__ __forceinline__ real exp_(real x) {
  return sizeof(real) == sizeof(float) ? (real)expf((float)x) : (real)exp((double)x);
}
static __device__ __forceinline__ real log_(real x) {
  return sizeof(real) == sizeof(float) ? (real)logf((float)x) : (real)log((double)x);
}

// Kernels over single numbers give each thread four neighbours; i is the first. What they read is
// read before anything is written, so output and input may be the same memory.
#define FIRST_OF_FOUR (((long)blockIdx.x * THREADS + threadIdx.x) * 4)
static int blocks_of_fours(long n) { return blocks(n, 4*THREADS); }

// Kernels over rows give each row to a warp: a row's sums then need no barrier.
#define ROW_OF_WARP ((long)blockIdx.x * WARPS + threadIdx.x / 32)

// x[i] = value. Gradients of parameters are zeroed once per update, since backward adds to them.
static __global__ void fill_kernel(real *x, long n, real value) {
  long i = FIRST_OF_FOUR;
  store_four(x + i, n - i, Four{{value, value, value, value}});
}

static void fill(real *x, long n, real value) {
  fill_kernel<<<blocks_of_fours(n), THREADS, 0, stream>>>(x, n, value);
  lap("fill", 0, n * sizeof(real));
}
static void zero(real *x, long n) { fill(x, n, 0); }

// embedding: out[n,c] = wte[token[n],c] + wpe[t,c], with n = b T + t
static __global__ void embedding_forward_kernel(real *out, const int *token, const real *wte,
                                                const real *wpe, int N, int T, int C) {
  long n = ROW_OF_WARP;
  if (n >= N) return;
  const real *word = wte + (long)token[n]*C, *position = wpe + n%T*C;
  for (int c = threadIdx.x % 32; c < C; c += 32) out[n*C + c] = word[c] + position[c];
}

static void embedding_forward(Tensor out, const int *token, Tensor wte, Tensor wpe,
                              int B, int T, int C) {
  embedding_forward_kernel<<<blocks(B*T, WARPS), THREADS, 0, stream>>>(
      out.data, token, wte.data, wpe.data, B*T, T, C);
  lap("embedding_forward", 0, 3.0*B*T*C * sizeof(real));
}

// dwte[v,c] += sum over the n that hold token v of dout[n,c]. Two rows may hold the same token, so
// rows cannot all add at once: the first row that holds a token adds for all that hold it, in
// order. A block is a row n, and each thread owns a channel c (consecutive, and so are the loads of
// a row).
static __global__ void embedding_backward_word(real *dwte, const int *token, const real *dout,
                                               int N, int C) {
  __shared__ int list[THREADS];
  __shared__ unsigned votes[WARPS];
  int n = blockIdx.x, word = token[n], lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int c = blockIdx.y * THREADS + threadIdx.x;
  real sum = 0;
  for (int m0 = 0; m0 < N; m0 += THREADS) {   // who holds it? A thread looks at each row,
    int m = m0 + threadIdx.x, at = 0, count = 0;
    int same = m < N && token[m] == word;
    unsigned vote = __ballot_sync(ALL_LANES, same);   // and the answers of a warp are 32 bits
    if (lane == 0) votes[warp] = vote;
    __syncthreads();                     // the votes are there; and the last list has been read
    for (int i = 0; i < WARPS; i++) {
      if (i < warp) at += __popc(votes[i]);
      count += __popc(votes[i]);
    }
    at += __popc(vote & ((1u << lane) - 1));   // so many rows before this thread's do
    if (same) list[at] = m;
    __syncthreads();                     // the list is there; and the votes have been read
    if (count > 0 && list[0] < n) return;   // not the first: all threads of the block leave
    if (c < C)
      UNROLL for (int i = 0; i < count; i++) sum += dout[(long)list[i]*C + c];
  }
  if (c < C) dwte[(long)word*C + c] += sum;
}

// dwpe[t,c] += sum_b dout[b T + t,c]
static __global__ void embedding_backward_position(real *dwpe, const real *dout, int B, int T,
                                                   int C) {
  long i = (long)blockIdx.x * THREADS + threadIdx.x, TC = (long)T*C;   // i = t C + c
  if (i >= TC) return;
  real sum = 0;
  for (int b = 0; b < B; b++) sum += dout[b*TC + i];
  dwpe[i] += sum;
}

static void embedding_backward(Tensor out, const int *token, Tensor wte, Tensor wpe,
                               int B, int T, int C) {
  dim3 grid(B*T, blocks(C, THREADS));
  embedding_backward_word<<<grid, THREADS, 0, stream>>>(wte.grad, token, out.grad, B*T, C);
  embedding_backward_position<<<blocks((long)T*C, THREADS), THREADS, 0, stream>>>(
      wpe.grad, out.grad, B, T, C);
  lap("embedding_backward", 0, 5.0*B*T*C * sizeof(real));
}

// layernorm: out = xhat w + b, xhat[n,c] = (x[n,c] - mean[n]) rstd[n]; mean and variance over c,
// rstd = 1 / sqrt(variance + 1e-5). stats[n] keeps mean and rstd for backward.
static __global__ void layernorm_forward_kernel(real *out, real *stats, const real *x,
                                                const real *w, const real *b, int N, int C) {
  long n = ROW_OF_WARP;
  int lane = threadIdx.x % 32;
  if (n >= N) return;
  real sum = 0, squares = 0;
  for (int c = lane; c < C; c += 32) sum += x[n*C + c];
  real mean = warp_sum(sum) / C;
  for (int c = lane; c < C; c += 32) squares += (x[n*C + c] - mean) * (x[n*C + c] - mean);
  real rstd = 1 / sqrt_(warp_sum(squares) / C + (real)1e-5);
  for (int c = lane; c < C; c += 32) out[n*C + c] = (x[n*C + c] - mean) * rstd * w[c] + b[c];
  if (lane == 0) stats[2*n] = mean;
  if (lane == 0) stats[2*n + 1] = rstd;
}

static void layernorm_forward(Tensor out, Tensor stats, Tensor x, Affine p, int N, int C) {
  layernorm_forward_kernel<<<blocks(N, WARPS), THREADS, 0, stream>>>(
      out.data, stats.data, x.data, p.weight.data, p.bias.data, N, C);
  lap("layernorm_forward", 0, 2.0*N*C * sizeof(real));
}

// g = dout w; dx[n,c] += rstd (g - avg_c(g) - xhat avg_c(g xhat)): what moves all of a row, or
// stretches it, is taken out again by the normalisation
static __global__ void layernorm_backward_x(real *dx, const real *dout, const real *stats,
                                            const real *x, const real *w, int N, int C) {
  long n = ROW_OF_WARP;
  int lane = threadIdx.x % 32;
  if (n >= N) return;
  real mean = stats[2*n], rstd = stats[2*n + 1], g = 0, g_xhat = 0;
  for (int c = lane; c < C; c += 32) {
    g += dout[n*C + c] * w[c];
    g_xhat += dout[n*C + c] * w[c] * ((x[n*C + c] - mean) * rstd);
  }
  real avg_g = warp_sum(g) / C, avg_g_xhat = warp_sum(g_xhat) / C;
  for (int c = lane; c < C; c += 32)
    dx[n*C + c] += rstd * (dout[n*C + c] * w[c] - avg_g - (x[n*C + c] - mean) * rstd * avg_g_xhat);
}

// Sums of columns, for the gradients of biases and of layernorm's weights. A block takes 32
// columns, a lane each, so that a warp reads 32 neighbours; its warps, and the blocks that share
// the columns, take turns with the rows: row n belongs to number n % (WARPS * blocks). The sums of
// a block's warps meet in shared memory, those of the blocks in scratch, where add_slices() adds
// them.
enum { COLUMN_SLICES = 32 };
static int slices_of(int N) { return MIN(COLUMN_SLICES, blocks(N, 4*WARPS)); }

#define ROW_OF_WARP_IN_SLICE ((long)blockIdx.y * WARPS + threadIdx.x / 32)

static __device__ void store_column(real *part, int c, int C, real sum) {
  __shared__ real sums[WARPS][32];
  __syncthreads();                       // the sums of another call have been read
  sums[threadIdx.x / 32][threadIdx.x % 32] = sum;
  __syncthreads();                       // the sums are there
  if (threadIdx.x >= 32 || c >= C) return;
  sum = 0;
  for (int i = 0; i < WARPS; i++) sum += sums[i][threadIdx.x];
  part[(long)blockIdx.y*C + c] = sum;
}

// dw[c] += sum_n dout[n,c] xhat[n,c]; db[c] += sum_n dout[n,c]
static __global__ void layernorm_backward_wb(real *dw_part, real *db_part, const real *dout,
                                             const real *stats, const real *x, int N, int C) {
  int c = blockIdx.x * 32 + threadIdx.x % 32;
  real dw = 0, db = 0;
  for (long n = ROW_OF_WARP_IN_SLICE; n < N && c < C; n += gridDim.y * WARPS) {
    dw += dout[n*C + c] * ((x[n*C + c] - stats[2*n]) * stats[2*n + 1]);
    db += dout[n*C + c];
  }
  store_column(dw_part, c, C, dw);
  store_column(db_part, c, C, db);
}

static void layernorm_backward(Tensor out, Tensor stats, Tensor x, Affine p, int N, int C) {
  int slices = slices_of(N);
  real *dw = scratch, *db = scratch + (long)slices*C;
  dim3 grid(blocks(C, 32), slices);
  layernorm_backward_x<<<blocks(N, WARPS), THREADS, 0, stream>>>(
      x.grad, out.grad, stats.data, x.data, p.weight.data, N, C);
  layernorm_backward_wb<<<grid, THREADS, 0, stream>>>(dw, db, out.grad, stats.data, x.data, N, C);
  add_slices<<<blocks(C, THREADS), THREADS, 0, stream>>>(
      p.weight.grad, C, dw, 1, C, slices, 1, NULL);
  add_slices<<<blocks(C, THREADS), THREADS, 0, stream>>>(p.bias.grad, C, db, 1, C, slices, 1, NULL);
  lap("layernorm_backward", 0, 6.0*N*C * sizeof(real));
}

// linear: y[n,o] = sum_c x[n,c] w[c,o] + b[o]
static void linear_forward(Tensor y, Tensor x, Affine p, int N, int C, int O) {
  matmul(y.data, O, rows_of(x.data, C), rows_of(p.weight.data, O), N, O, C, 0, p.bias.data);
  lap("linear_forward", 2.0*N*C*O, 0);
}

// db[o] += sum_n dy[n,o]
static __global__ void linear_backward_b(real *db_part, const real *dy, int N, int O) {
  int o = blockIdx.x * 32 + threadIdx.x % 32;
  real db = 0;
  for (long n = ROW_OF_WARP_IN_SLICE; n < N && o < O; n += gridDim.y * WARPS) db += dy[n*O + o];
  store_column(db_part, o, O, db);
}

static void linear_backward(Tensor y, Tensor x, Affine p, int N, int C, int O) {
  // dx[n,c] = sum_o dy[n,o] w[c,o]
  matmul(x.grad, C, rows_of(y.grad, O), transpose(rows_of(p.weight.data, O)), N, C, O, 0, NULL);
  // dw[c,o] += sum_n x[n,c] dy[n,o]
  matmul(p.weight.grad, O, transpose(rows_of(x.data, C)), rows_of(y.grad, O), C, O, N, 1, NULL);
  // db[o] += sum_n dy[n,o]
  int slices = slices_of(N);
  dim3 grid(blocks(O, 32), slices);
  linear_backward_b<<<grid, THREADS, 0, stream>>>(scratch, y.grad, N, O);
  add_slices<<<blocks(O, THREADS), THREADS, 0, stream>>>(
      p.bias.grad, O, scratch, 1, O, slices, 1, NULL);
  lap("linear_backward", 4.0*N*C*O, 0);
}

// attention, for each sequence and head, with q, k, v (T,D) the head's columns of qkv:
//   z[t,s] = q[t].k[s] / sqrt(D); att[t,s] = softmax over s <= t of z; out[t] = sum_s att[t,s] v[s]
// att is never whole in memory. Keys come in tiles of SIDE, and each tile's part of the softmax is
// taken with the maximum so far; when a later tile has a larger one, what was summed is rescaled
// (Milakov and Gimelshein 2018; Dao et al. 2022). lse[b,h,t] = log sum_s exp(z[t,s]) stays for
// backward, which has att again from it: att[t,s] = exp(z[t,s] - lse[t]).
//
// A block takes SIDE queries of one head (or SIDE keys) and up to SIDE of its channels: one block
// has all of a head of 64; heads that are wider have several, each of which makes att anew. All is
// done with one operation, the product of two tiles in shared memory, x[k][row] and y[k][column]. A
// thread has 8 x 4 of the result: rows ty*4 + 0..3 and the same + SIDE/2, columns tx*4 + 0..3. The
// SIDE/4 lanes that share a row are neighbours in a warp, so a row's sum or maximum is a shuffle.
enum {
  SIDE = sizeof(real) == sizeof(float) && WARPS == 8 ? 64 : 32,   // 64 doubles would be too many
  ROW = SIDE + PAD,                      // distance of a tile's rows in shared memory
  SIDE_LANES = SIDE / 4,
  SIDE_THREADS = SIDE/8 * SIDE/4
};
#define TX ((int)threadIdx.x % SIDE_LANES)
#define TY ((int)threadIdx.x / SIDE_LANES)
#define ROW_OF(i) (TY*4 + (i)%4 + (i)/4*(SIDE/2))
#define COLUMN_OF(j) (TX*4 + (j))

// tile[r][c] = x[r*row + c]: neighbours in memory to neighbours in shared memory
static __device__ __forceinline__ void load_tile(real *tile, const real *x, long row, int rows,
                                                 int columns) {
  for (int i = threadIdx.x; i < SIDE*SIDE/4; i += SIDE_THREADS) {
    int r = i / (SIDE/4), c = i % (SIDE/4) * 4;
    *(Four *)(tile + r*ROW + c) = load_four(x + r*row + c, r < rows ? columns - c : 0);
  }
}

// tile[c][r] = x[r*row + c]. A warp takes 8 rows x 4 Fours: the loads are of 64 consecutive bytes,
// and only two lanes at a time store to the same bank.
static __device__ __forceinline__ void load_transposed(real *tile, const real *x, long row,
                                                       int rows, int columns) {
  for (int i = threadIdx.x; i < SIDE*SIDE/4; i += SIDE_THREADS) {
    int r = i % 8 + i / (2*SIDE) * 8, c = i / 8 % (SIDE/4) * 4;
    Four v = load_four(x + r*row + c, r < rows ? columns - c : 0);
    UNROLL for (int j = 0; j < 4; j++) tile[(c + j)*ROW + r] = v.at[j];
  }
}

// tile[column][row] = this thread's part of a result, to be the x of the next product
static __device__ __forceinline__ void store_tile(real *tile, real (*part)[4]) {
  UNROLL for (int j = 0; j < 4; j++)
    UNROLL for (int i = 0; i < 8; i += 4)
      *(Four *)(tile + COLUMN_OF(j)*ROW + ROW_OF(i)) =
          Four{{part[i][j], part[i + 1][j], part[i + 2][j], part[i + 3][j]}};
}

// sum[row][column] += sum over k < depth of x[k][row] y[k][column]
static __device__ __forceinline__ void multiply_tiles(real (*sum)[4], const real *x, const real *y,
                                                      int depth) {
  UNROLL_4 for (int k = 0; k < depth; k++) {
    Four x0 = *(const Four *)(x + k*ROW + ROW_OF(0)), x1 = *(const Four *)(x + k*ROW + ROW_OF(4));
    Four y0 = *(const Four *)(y + k*ROW + COLUMN_OF(0));
    UNROLL for (int i = 0; i < 4; i++)
      UNROLL for (int j = 0; j < 4; j++) {
        sum[i][j] += x0.at[i] * y0.at[j];
        sum[i + 4][j] += x1.at[i] * y0.at[j];
      }
  }
}

// sum[i][j] = x[i].y[j]: rows of x and y, `row` numbers apart, of which x_rows and y_rows are there
static __device__ __forceinline__ void dot_rows(real (*sum)[4], real *x_tile, real *y_tile,
                                                const real *x, int x_rows, const real *y,
                                                int y_rows, long x_row, long y_row, int D) {
  UNROLL for (int i = 0; i < 8; i++)
    UNROLL for (int j = 0; j < 4; j++) sum[i][j] = 0;
  for (int d = 0; d < D; d += SIDE) {
    __syncthreads();                     // the last product has read the tiles
    load_transposed(x_tile, x + d, x_row, x_rows, D - d);
    load_transposed(y_tile, y + d, y_row, y_rows, D - d);
    __syncthreads();                     // the tiles are there
    multiply_tiles(sum, x_tile, y_tile, MIN(SIDE, D - d));
  }
}

// sum += part^T' y: part is a result, made a tile; y are rows of numbers as they lie
static __device__ __forceinline__ void add_product(real (*sum)[4], real *x_tile, real *y_tile,
                                                   real (*part)[4], const real *y, long y_row,
                                                   int y_rows, int columns) {
  __syncthreads();                       // the last product has read the tiles
  store_tile(x_tile, part);
  load_tile(y_tile, y, y_row, y_rows, columns);
  __syncthreads();                       // the tiles are there
  multiply_tiles(sum, x_tile, y_tile, MIN(SIDE, y_rows));
}

// x[i] = this thread's part of a result, for rows that are there
static __device__ __forceinline__ void store_rows(real *x, long row, int rows, int columns,
                                                  real (*part)[4]) {
  UNROLL for (int i = 0; i < 8; i++)
    if (ROW_OF(i) < rows)
      store_four(x + ROW_OF(i)*row + COLUMN_OF(0), columns - COLUMN_OF(0),
                 Four{{part[i][0], part[i][1], part[i][2], part[i][3]}});
}

static __global__ void __launch_bounds__(SIDE_THREADS)
attention_forward_kernel(real *out, real *lse, const real *qkv, int T, int C, int H) {
  __shared__ __align__(16) real x_tile[SIDE*ROW], y_tile[SIDE*ROW];
  int D = C / H, bh = blockIdx.x, d0 = blockIdx.z * SIDE;
  int i = (gridDim.y - 1 - blockIdx.y) * SIDE;   // the last queries have most keys: they go first
  long row = 3l*C;
  const real *q = qkv + bh/H*T*row + bh%H*D, *k = q + C, *v = k + C;
  real scale = 1 / sqrt_(D), z[8][4], o[8][4] = {{0}}, max[8], sum[8];
  UNROLL for (int r = 0; r < 8; r++) max[r] = -INFINITY, sum[r] = 0;
  for (int j = 0; j <= i; j += SIDE) {
    dot_rows(z, x_tile, y_tile, q + i*row, T - i, k + j*row, T - j, row, row, D);
    UNROLL for (int r = 0; r < 8; r++) {
      int seen = i + ROW_OF(r) - j + 1;  // s <= t; of each row at least one key, in any tile
      real tile_max = max[r];
      UNROLL for (int c = 0; c < 4; c++)
        if (COLUMN_OF(c) < seen) tile_max = MAX(tile_max, z[r][c]);
      for (int lanes = SIDE_LANES / 2; lanes > 0; lanes /= 2) {
        real other = __shfl_xor_sync(ALL_LANES, tile_max, lanes);
        tile_max = MAX(tile_max, other);
      }
      real rescale = exp_((max[r] - tile_max) * scale);   // of what was summed; 0 the first time
      max[r] = tile_max;
      sum[r] *= rescale;
      UNROLL for (int c = 0; c < 4; c++) {
        o[r][c] *= rescale;
        z[r][c] = COLUMN_OF(c) < seen ? exp_((z[r][c] - tile_max) * scale) : 0;
        sum[r] += z[r][c];               // this thread's columns; the lanes' sums meet at the end
      }
    }
    add_product(o, x_tile, y_tile, z, v + j*row + d0, row, T - j, D - d0);
  }
  UNROLL for (int r = 0; r < 8; r++) {
    for (int lanes = SIDE_LANES / 2; lanes > 0; lanes /= 2)
      sum[r] += __shfl_xor_sync(ALL_LANES, sum[r], lanes);
    UNROLL for (int c = 0; c < 4; c++) o[r][c] /= sum[r];
    if (TX == 0 && d0 == 0 && i + ROW_OF(r) < T)
      lse[(long)bh*T + i + ROW_OF(r)] = max[r] * scale + log_(sum[r]);
  }
  store_rows(out + ((long)bh/H*T + i)*C + bh%H*D + d0, C, T - i, D - d0, o);
}

static void attention_forward(Tensor out, Tensor lse, Tensor qkv, int B, int T, int C, int H) {
  dim3 grid(B*H, blocks(T, SIDE), blocks(C/H, SIDE));
  attention_forward_kernel<<<grid, SIDE_THREADS, 0, stream>>>(
      out.data, lse.data, qkv.data, T, C, H);
  lap("attention_forward", 2.0*B*T*T*C, 0);
}

// datt[t,s] = dout[t].v[s]; dz[t,s] = att[t,s] (datt[t,s] - expected[t]), expected[t] =
// dout[t].out[t]
static __global__ void attention_backward_expected(real *expected, const real *out,
                                                   const real *dout, int B, int T, int C, int H) {
  long i = ROW_OF_WARP;                  // (b H + h) T + t
  if (i >= (long)B*H*T) return;
  long at = (i/T/H*T + i%T)*C + i/T%H*(C/H);
  real sum = 0;
  for (int d = threadIdx.x % 32; d < C/H; d += 32) sum += dout[at + d] * out[at + d];
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) expected[i] = sum;
}

// dq[t] = sum_s dz[t,s] k[s] / sqrt(D): a block owns SIDE queries and walks over their keys
static __global__ void __launch_bounds__(SIDE_THREADS, 2)
attention_backward_q(real *dqkv, const real *qkv, const real *dout, const real *lse,
                     const real *expected, int T, int C, int H) {
  __shared__ __align__(16) real x_tile[SIDE*ROW], y_tile[SIDE*ROW];
  int D = C / H, bh = blockIdx.x, d0 = blockIdx.z * SIDE, i = (gridDim.y - 1 - blockIdx.y) * SIDE;
  long row = 3l*C, head = bh/H*T*row + bh%H*D;
  const real *q = qkv + head, *k = q + C, *v = k + C;
  const real *dout_i = dout + ((long)bh/H*T + i)*C + bh%H*D;
  real scale = 1 / sqrt_(D), z[8][4], g[8][4], dq[8][4] = {{0}}, lse_t[8], expected_t[8];
  UNROLL for (int r = 0; r < 8; r++) {
    int t = i + ROW_OF(r);
    lse_t[r] = t < T ? lse[(long)bh*T + t] : 0;
    expected_t[r] = t < T ? expected[(long)bh*T + t] : 0;
  }
  for (int j = 0; j <= i; j += SIDE) {
    dot_rows(z, x_tile, y_tile, q + i*row, T - i, k + j*row, T - j, row, row, D);
    dot_rows(g, x_tile, y_tile, dout_i, T - i, v + j*row, T - j, C, row, D);   // datt
    UNROLL for (int r = 0; r < 8; r++)
      UNROLL for (int c = 0; c < 4; c++) {
        int t = i + ROW_OF(r), s = j + COLUMN_OF(c);
        real att = s <= t && t < T ? exp_(z[r][c] * scale - lse_t[r]) : 0;
        g[r][c] = att * (g[r][c] - expected_t[r]) * scale;
      }
    add_product(dq, x_tile, y_tile, g, k + j*row + d0, row, T - j, D - d0);
  }
  store_rows(dqkv + head + i*row + d0, row, T - i, D - d0, dq);
}

// dv[s] = sum_t att[t,s] dout[t]; dk[s] = sum_t dz[t,s] q[t] / sqrt(D): a block owns SIDE keys and
// walks over the queries that see them. Here rows are keys s and columns are queries t.
static __global__ void __launch_bounds__(SIDE_THREADS, 2)
attention_backward_kv(real *dqkv, const real *qkv, const real *dout, const real *lse,
                      const real *expected, int T, int C, int H) {
  __shared__ __align__(16) real x_tile[SIDE*ROW], y_tile[SIDE*ROW];
  int D = C / H, bh = blockIdx.x, d0 = blockIdx.z * SIDE, j = blockIdx.y * SIDE;
  long row = 3l*C, head = bh/H*T*row + bh%H*D;
  const real *q = qkv + head, *k = q + C, *v = k + C;
  real scale = 1 / sqrt_(D), z[8][4], g[8][4], dk[8][4] = {{0}}, dv[8][4] = {{0}};
  for (int i = j; i < T; i += SIDE) {
    const real *dout_i = dout + ((long)bh/H*T + i)*C + bh%H*D;
    dot_rows(z, x_tile, y_tile, k + j*row, T - j, q + i*row, T - i, row, row, D);
    dot_rows(g, x_tile, y_tile, v + j*row, T - j, dout_i, T - i, row, C, D);   // datt
    UNROLL for (int c = 0; c < 4; c++) {
      int t = i + COLUMN_OF(c);
      real lse_t = t < T ? lse[(long)bh*T + t] : 0;
      real expected_t = t < T ? expected[(long)bh*T + t] : 0;
      UNROLL for (int r = 0; r < 8; r++) {
        z[r][c] = j + ROW_OF(r) <= t && t < T ? exp_(z[r][c] * scale - lse_t) : 0;   // att
        g[r][c] = z[r][c] * (g[r][c] - expected_t) * scale;
      }
    }
    add_product(dv, x_tile, y_tile, z, dout_i + d0, C, T - i, D - d0);
    add_product(dk, x_tile, y_tile, g, q + i*row + d0, row, T - i, D - d0);
  }
  store_rows(dqkv + head + C + j*row + d0, row, T - j, D - d0, dk);
  store_rows(dqkv + head + 2*C + j*row + d0, row, T - j, D - d0, dv);
}

static void attention_backward(Tensor out, Tensor lse, Tensor qkv, int B, int T, int C, int H) {
  dim3 grid(B*H, blocks(T, SIDE), blocks(C/H, SIDE));
  if ((long)B*H*T > n_scratch)
    die("attention of %d x %d x %d rows needs more scratch: lower --batch_size", B, H, T);
  real *expected = scratch;
  attention_backward_expected<<<blocks((long)B*H*T, WARPS), THREADS, 0, stream>>>(
      expected, out.data, out.grad, B, T, C, H);
  attention_backward_q<<<grid, SIDE_THREADS, 0, stream>>>(
      qkv.grad, qkv.data, out.grad, lse.data, expected, T, C, H);
  attention_backward_kv<<<grid, SIDE_THREADS, 0, stream>>>(
      qkv.grad, qkv.data, out.grad, lse.data, expected, T, C, H);
  lap("attention_backward", 5.0*B*T*T*C, 0);
}

// gelu: y = x (1 + h) / 2, h = tanh(u), u = sqrt(2/pi) (x + 0.044715 x^3) (Hendrycks, Gimpel 2016).
// tanh(u) = 1 - 2 / (e^2u + 1), safe for any u.
static __device__ __forceinline__ real tanh_(real u) { return 1 - 2 / (exp_(2*u) + 1); }
#define GELU_A (real)0.7978845608028654   // sqrt(2/pi)
#define GELU_B (real)0.044715

static __global__ void gelu_forward_kernel(real *y, const real *x, long n) {
  long i = FIRST_OF_FOUR;
  Four v = load_four(x + i, n - i);
  UNROLL for (int j = 0; j < 4; j++) {
    real a = v.at[j], h = tanh_(GELU_A * (a + GELU_B * a * a * a));
    v.at[j] = a * (1 + h) / 2;
  }
  store_four(y + i, n - i, v);
}

static void gelu_forward(Tensor y, Tensor x, int N, int C) {
  long n = (long)N*C;
  gelu_forward_kernel<<<blocks_of_fours(n), THREADS, 0, stream>>>(y.data, x.data, n);
  lap("gelu_forward", 0, 2.0*N*C * sizeof(real));
}

// dx = dy ((1 + h)/2 + x (1 - h^2)/2 du/dx), du/dx = sqrt(2/pi) (1 + 3*0.044715 x^2)
static __global__ void gelu_backward_kernel(real *dx, const real *dy, const real *x, long n) {
  long i = FIRST_OF_FOUR;
  Four v = load_four(x + i, n - i), g = load_four(dy + i, n - i);
  UNROLL for (int j = 0; j < 4; j++) {
    real a = v.at[j], h = tanh_(GELU_A * (a + GELU_B * a * a * a));
    real du = GELU_A * (1 + 3 * GELU_B * a * a);
    g.at[j] *= (1 + h) / 2 + a * (1 - h*h) / 2 * du;
  }
  store_four(dx + i, n - i, g);
}

static void gelu_backward(Tensor y, Tensor x, int N, int C) {
  long n = (long)N*C;
  gelu_backward_kernel<<<blocks_of_fours(n), THREADS, 0, stream>>>(x.grad, y.grad, x.data, n);
  lap("gelu_backward", 0, 3.0*N*C * sizeof(real));
}

// residual: out = x + f
static __global__ void residual_forward_kernel(real *out, const real *x, const real *f, long n) {
  long i = FIRST_OF_FOUR;
  Four v = load_four(x + i, n - i), g = load_four(f + i, n - i);
  UNROLL for (int j = 0; j < 4; j++) v.at[j] += g.at[j];
  store_four(out + i, n - i, v);
}

static void residual_forward(Tensor out, Tensor x, Tensor f, int N, int C) {
  long n = (long)N*C;
  residual_forward_kernel<<<blocks_of_fours(n), THREADS, 0, stream>>>(out.data, x.data, f.data, n);
  lap("residual_forward", 0, 3.0*N*C * sizeof(real));
}

static void residual_backward(Tensor out, Tensor x, Tensor f, int N, int C) {
  // dx = dout; df = dout. In the model the three share one buffer, and there is nothing to move.
  size_t bytes = (size_t)N*C * sizeof(real);
  if (x.grad != out.grad)
    CHECK(cudaMemcpyAsync(x.grad, out.grad, bytes, cudaMemcpyDeviceToDevice, stream));
  if (f.grad != out.grad)
    CHECK(cudaMemcpyAsync(f.grad, out.grad, bytes, cudaMemcpyDeviceToDevice, stream));
  lap("residual_backward", 0, 0);
}

// head: logits[n,v] = sum_c x[n,c] wte[v,c]: how much a row looks like each word's embedding
static void head_forward(Tensor logits, Tensor x, Tensor wte, int N, int C, int V) {
  matmul(logits.data, V, rows_of(x.data, C), transpose(rows_of(wte.data, C)), N, V, C, 0, NULL);
  lap("head_forward", 2.0*N*C*V, 0);
}

static void head_backward(Tensor logits, Tensor x, Tensor wte, int N, int C, int V) {
  // dx[n,c] = sum_v dlogits[n,v] wte[v,c]
  matmul(x.grad, C, rows_of(logits.grad, V), rows_of(wte.data, C), N, C, V, 0, NULL);
  // dwte[v,c] += sum_n dlogits[n,v] x[n,c]
  matmul(wte.grad, C, transpose(rows_of(logits.grad, V)), rows_of(x.data, C), V, C, N, 1, NULL);
  lap("head_backward", 4.0*N*C*V, 0);
}

// softmax cross-entropy: loss[n] = -log p[n,target[n]], p[n,v] = exp(logits[n,v] - row_lse[n]),
// row_lse[n] = log sum_v exp(logits[n,v]). hit[n] = 1 if the target has the largest logit, else 0.
// A row has V numbers, tens of thousands in some vocabularies: a block takes it, not a warp.
static int threads_for(int n) { return MIN(THREADS, blocks(n, 32) * 32); }

static __global__ void crossentropy_forward_kernel(real *loss, real *hit, real *row_lse,
                                                   const real *logits, const int *target, int V) {
  int n = blockIdx.x;
  const real *logits_n = logits + (long)n*V;
  real max = logits_n[0], sum = 0;
  for (int v = threadIdx.x; v < V; v += blockDim.x) max = MAX(max, logits_n[v]);
  max = block_max(max);                  // minus max: no overflow
  for (int v = threadIdx.x; v < V; v += blockDim.x) sum += exp_(logits_n[v] - max);
  sum = (real)block_sum(sum);
  if (threadIdx.x > 0) return;
  row_lse[n] = max + log_(sum);
  loss[n] = row_lse[n] - logits_n[target[n]];
  hit[n] = logits_n[target[n]] == max;
}

static void crossentropy_forward(Tensor loss, Tensor hit, Tensor row_lse, Tensor logits,
                                 const int *target, int N, int V) {
  crossentropy_forward_kernel<<<N, threads_for(V), 0, stream>>>(
      loss.data, hit.data, row_lse.data, logits.data, target, V);
  lap("crossentropy_forward", 0, 2.0*N*V * sizeof(real));
}

// dlogits[n,v] = dloss[n] (p[n,v] - [v == target[n]])
static __global__ void crossentropy_backward_kernel(real *dlogits, const real *logits,
                                                    const real *row_lse, const real *dloss,
                                                    const int *target, int V) {
  int n = blockIdx.x;
  for (int v = threadIdx.x; v < V; v += blockDim.x) {   // dlogits may be logits itself
    real p = exp_(logits[(long)n*V + v] - row_lse[n]);
    dlogits[(long)n*V + v] = dloss[n] * (p - (v == target[n]));
  }
}

static void crossentropy_backward(Tensor loss, Tensor hit, Tensor row_lse, Tensor logits,
                                  const int *target, int N, int V) {
  (void)hit;   // counted, not learned from
  crossentropy_backward_kernel<<<N, threads_for(V), 0, stream>>>(
      logits.grad, logits.data, row_lse.data, loss.grad, target, V);
  lap("crossentropy_backward", 0, 2.0*N*V * sizeof(real));
}

// mean squared error: loss[n] = avg_o (y[n,o] - target[n,o])^2
static __global__ void squared_error_forward_kernel(real *loss, const real *y, const real *target,
                                                    int N, int O) {
  long n = ROW_OF_WARP;
  if (n >= N) return;
  real sum = 0;
  for (int o = threadIdx.x % 32; o < O; o += 32) {
    real error = y[n*O + o] - target[n*O + o];
    sum += error * error;
  }
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) loss[n] = sum / O;
}

static void squared_error_forward(Tensor loss, Tensor y, const real *target, int N, int O) {
  squared_error_forward_kernel<<<blocks(N, WARPS), THREADS, 0, stream>>>(
      loss.data, y.data, target, N, O);
  lap("squared_error_forward", 0, 2.0*N*O * sizeof(real));
}

// dy[n,o] = dloss[n] 2 (y[n,o] - target[n,o]) / O
static __global__ void squared_error_backward_kernel(real *dy, const real *y, const real *target,
                                                     const real *dloss, int N, int O) {
  long n = ROW_OF_WARP;
  for (int o = threadIdx.x % 32; n < N && o < O; o += 32)
    dy[n*O + o] = dloss[n] * 2 * (y[n*O + o] - target[n*O + o]) / O;
}

static void squared_error_backward(Tensor loss, Tensor y, const real *target, int N, int O) {
  squared_error_backward_kernel<<<blocks(N, WARPS), THREADS, 0, stream>>>(
      y.grad, y.data, target, loss.grad, N, O);
  lap("squared_error_backward", 0, 3.0*N*O * sizeof(real));
}

// ---- 6. Optimizers as kernels -----------------------------------------------------------------

// stats += the sums of N losses and hits, in double: a block sums each
static __global__ void add_loss_kernel(Stats *stats, const real *loss, const real *hit, int N) {
  const real *x = blockIdx.x ? hit : loss;
  double sum = 0;
  for (int n = threadIdx.x; n < N; n += THREADS) sum += x[n];
  sum = block_sum(sum);
  if (threadIdx.x == 0) *(blockIdx.x ? &stats->hits : &stats->loss) += sum;
}

static void add_loss(Stats *stats, Tensor loss, Tensor hit, int N) {
  add_loss_kernel<<<2, THREADS, 0, stream>>>(stats, loss.data, hit.data, N);
  lap("add_loss", 0, 2.0*N * sizeof(real));
}

// A step's sums are kept for the log, and start again
static void keep_stats(Stats *kept, Stats *current) {
  CHECK(cudaMemcpyAsync(kept, current, sizeof *kept, cudaMemcpyDeviceToDevice, stream));
  CHECK(cudaMemsetAsync(current, 0, sizeof *current, stream));
}

// stats->norm2 = sum_i grad[i]^2: a block sums each chunk, one more the chunks' sums
static __global__ void gradient_norm_chunks(double *partial, const real *grad, long n) {
  double sum = 0;
  for (int i = threadIdx.x; i < CHUNK; i += THREADS) {
    long at = (long)blockIdx.x * CHUNK + i;
    double g = at < n ? grad[at] : 0;
    sum += g*g;
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

static __global__ void gradient_norm_total(Stats *stats, const double *partial, long n) {
  double sum = 0;
  for (long i = threadIdx.x; i < n; i += THREADS) sum += partial[i];
  sum = block_sum(sum);
  if (threadIdx.x == 0) stats->norm2 = sum;
}

static void gradient_norm(Stats *stats, double *partial, const real *grad, long n) {
  gradient_norm_chunks<<<chunks(n), THREADS, 0, stream>>>(partial, grad, n);
  gradient_norm_total<<<1, THREADS, 0, stream>>>(stats, partial, chunks(n));
  lap("gradient_norm", 0, 1.0*n * sizeof(real));
}

// w, m and v after one update with the clipped gradient
static __global__ void optimizer_update_kernel(real *w, const real *grad, real *m, real *v, long n,
                                               Update u, const Stats *stats) {
  __shared__ real clip;
  if (threadIdx.x == 0) clip = clip_factor(stats, u.grad_clip);
  __syncthreads();                       // a square root in double is slow: one thread took it
  long i = FIRST_OF_FOUR;
  Four w4 = load_four(w + i, n - i), g4 = load_four(grad + i, n - i);
  Four m4 = {{0}}, v4 = {{0}};
  if (u.optimizer != SGD) {              // which remembers nothing
    m4 = load_four(m + i, n - i);
    v4 = load_four(v + i, n - i);
  }
  UNROLL for (int j = 0; j < 4; j++)
    update_weight(u.optimizer, &w4.at[j], clip * g4.at[j], &m4.at[j], &v4.at[j], u);
  store_four(w + i, n - i, w4);
  if (u.optimizer == SGD) return;
  store_four(m + i, n - i, m4);
  store_four(v + i, n - i, v4);
}

static void optimizer_update(Tensor w, real *m, real *v, long n, Update u, const Stats *stats) {
  optimizer_update_kernel<<<blocks_of_fours(n), THREADS, 0, stream>>>(
      w.data, w.grad, m, v, n, u, stats);
  lap("optimizer_update", 0, 7.0*n * sizeof(real));
}
