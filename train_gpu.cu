// train_gpu.cu is train.c for NVIDIA GPUs: its rooms 2, 3 and 6 as CUDA kernels, with no library but
// the CUDA runtime. The rest, from the model to main(), is train.c itself, included below.
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
//   - What many threads of a block need, one of them fetches into shared memory, which is as near as
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
#define DEVICE __host__ __device__
#ifdef __CUDACC__
#pragma nv_diag_suppress 177             // what a program leaves unused of train.c
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
  program = "train_gpu";
  cudaError_t error = cudaGetDeviceCount(&devices);
  if (error != cudaSuccess || devices == 0)
    die("no CUDA device (the driver says: %s): ./train does the same on the CPU",
        error != cudaSuccess ? cudaGetErrorString(error) : "none is visible");
  CHECK(cudaSetDevice(0));               // CUDA's first is the fastest; CUDA_VISIBLE_DEVICES chooses
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
    die("--precision tf32 needs tensor cores of compute capability 8.0, this GPU has %d.%d: use fp32",
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

static __device__ __forceinline__ int whole(const real *x, long n) {   // is there all of a Four at x?
  return n >= 4 && (uintptr_t)x % 16 == 0;
}

// x[0..3], of which n are there, the others 0. Rows of an odd length are not aligned: one by one.
static __device__ __forceinline__ Four load_four(const real *x, long n) {
  Four v;
  if (whole(x, n)) return *(const Four *)x;
#pragma unroll
  for (int j = 0; j < 4; j++) v.at[j] = j < n ? x[j] : 0;
  return v;
}

static __device__ __forceinline__ void store_four(real *x, long n, Four v) {
  if (whole(x, n)) *(Four *)x = v;
  else
#pragma unroll
    for (int j = 0; j < 4; j++)
      if (j < n) x[j] = v.at[j];
}

// The sum of a warp's 32 numbers, for every lane: five exchanges between lanes, with no memory.
// Lane i adds what lane i^16 has, then i^8, ..., so all have added the same pairs: the same bits.
static __device__ __forceinline__ real warp_sum(real x) {
  for (int i = 16; i > 0; i /= 2) x += __shfl_xor_sync(ALL_LANES, x, i);
  return x;
}

// The sum over a block, for every thread, in double: a row of V, or a tensor, is long.
static __device__ double block_sum(double x) {
  __shared__ double part[WARPS];
  for (int i = 16; i > 0; i /= 2) x += __shfl_xor_sync(ALL_LANES, x, i);
  __syncthreads();                       // the last sum's parts have been read
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = x;
  __syncthreads();                       // the parts are written
  double sum = 0;
  for (int i = 0; i < WARPS; i++) sum += part[i];
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
  for (int i = 0; i < WARPS; i++) x = MAX(x, part[i]);
  return x;
}

// The matmul. C = A B, (M,N) = (M,K) (K,N). The ladder, in the GPU's words:
//   1. One thread per element loads two numbers for each multiply-add, and waits for memory.
//   2. A block owns a tile of C, 128 x 128. It walks along K in steps of DEPTH: all its threads
//      bring that much of A's rows and B's columns into shared memory, once, for all of them. So a
//      number from device memory serves 128 multiply-adds.
//   3. A warp owns 32 x 64 of the tile and a thread 8 x 8, in registers: of shared memory it loads 8
//      + 8 numbers, in four 16-byte loads, for 64 multiply-adds. Lanes are 4 x 8, so that a load's
//      addresses are few (64 or 128 bytes in a row) and lie in different banks.
//   4. While it multiplies one step the next is already on its way from memory to registers, then
//      goes to a second pair of buffers: so one barrier a step is enough.
//   5. A small C has too few tiles to occupy the GPU. Then tiles are 64 x 64, or K is cut into
//      slices, whose sums go to scratch and are added in order.
// On tensor cores (tf32) step 3 differs: a warp multiplies 16 x 8 x 8 in one instruction.
enum {
  DEPTH = 64 / sizeof(real),             // 16 floats, or 8 doubles: in both 64 bytes of a row
  PIECES = DEPTH / 4,                    // Fours that a thread brings of each operand, at most
  PAD = 4,                               // shared rows of tile + 4 numbers: a column of them, and
  BIG = WARPS == 8 ? 16 : 8              // a transposed store, spread over the banks
};

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

// Where in a step's tile this thread's piece number l begins: line (a row of A, a column of B) and
// k. Consecutive threads go along the operand's own direction in memory.
static __device__ __forceinline__ void place_of_piece(int l, int side, long column, int *line,
                                                      int *k) {
  int piece = threadIdx.x + l*side*side;
  if (column == 1) {                     // k is consecutive: DEPTH of it, then the next line
    *line = piece / (DEPTH / 4);
    *k = piece % (DEPTH / 4) * 4;
  } else {                               // lines are
    *line = piece % (2*side) * 4;
    *k = piece / (2*side);
  }
}

// Device memory to registers: this thread's pieces of the operand m (lines, K), from (line, k) on.
static __device__ __forceinline__ void fetch(Four *piece, int side, Matrix m, int lines, int K,
                                             int line0, int k0) {
#pragma unroll
  for (int l = 0; l < PIECES; l++) {
    int line, k;
    if (l*side*8 >= 2*side*DEPTH) break;
    place_of_piece(l, side, m.column, &line, &k);
    line += line0; k += k0;
    const real *x = m.at + line*m.row + k*m.column;
    if (m.column == 1) piece[l] = load_four(x, line < lines ? K - k : 0);
    else piece[l] = load_four(x, k < K ? lines - line : 0);
  }
}

// Registers to shared memory, as tile[k][line] whatever the operand's strides are: a transposition
// costs nothing more. In tf32 numbers are rounded here, once, for all who read them.
static __device__ __forceinline__ void put(real *tile, const Four *piece, int side, long column,
                                           int tf32) {
  int row = 8*side + PAD;
#pragma unroll
  for (int l = 0; l < PIECES; l++) {
    int line, k;
    if (l*side*8 >= 2*side*DEPTH) break;
    place_of_piece(l, side, column, &line, &k);
    Four v = piece[l];
#pragma unroll
    for (int j = 0; j < 4; j++) v.at[j] = tf32 ? round_tf32(v.at[j]) : v.at[j];
    if (column == 1)
#pragma unroll
      for (int j = 0; j < 4; j++) tile[(k + j)*row + line] = v.at[j];
    else *(Four *)(tile + k*row + line) = v;
  }
}
