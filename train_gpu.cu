// train_gpu.cu is train.c for NVIDIA GPUs: the functions of its layer interface as CUDA kernels.
// The only library is the CUDA runtime. The rest, from the model to main(), is train.c itself,
// which is included below.
//
// Read it beside train.c. The sections have the same numbers, and a function has the same name,
// arguments and equations; its kernels stand directly above it. (Of attention, only train.c has the
// plain form, in section 5; the fast form ends section 6 of both.) A loop there is a launch here:
//
//   parallel_for (n, N) { ... }           kernel<<<N / rows of a CUDA block, threads>>>(...)
//   the barrier at its end                the next launch: a stream runs its kernels one by one
//   for (c = 0; c < C; c++) inside        for (c = lane; c < C; c += 32): a warp shares the row
//   sum += ...                            a sum in each lane, then warp_sum()
//
// A GPU runs thousands of threads, in CUDA blocks of a few hundred. 32 consecutive threads, the
// lanes of a warp, execute one instruction together. Three rules follow:
//   - Consecutive lanes access consecutive addresses ("coalesced"). Device memory moves in sectors
//     of 32 bytes, and the time of a warp's load grows with the number of sectors that it touches.
//     So the index that is consecutive in memory is the lane.
//   - What many threads of a CUDA block need, one of them copies to shared memory, which is as fast
//     as a cache. __syncthreads() waits for all threads of the block. It is needed after a write
//     before another thread reads, and after a read before the next write; a comment at each one
//     here says which.
//   - No atomic additions of floats: CUDA blocks finish in any order, and a sum in another order is
//     rounded differently. A sum is cut into fixed parts, which are added in a fixed order, so that
//     a run can be repeated bit for bit.
//
// Without a GPU, `make test` runs these kernels on the CPU, thread by thread; see test_gradients.c.
//
//   make train_gpu && ./train_gpu         the options, files and output of ./train

#ifndef GPU
#define GPU
#endif
#ifndef PROGRAM
#define PROGRAM "train_gpu"
#endif
#define DEVICE __host__ __device__
#ifdef __CUDACC__
#pragma nv_diag_suppress 177             // functions of train.c that this program does not call
#define UNROLL _Pragma("unroll")   // an array stays in registers only if its indices are constants
// PTX() is an instruction that C++ has no name for; see rung 4. s, x and y are for the emulator,
// which cannot run a text without its operands.
#if defined __CUDA_ARCH__ && __CUDA_ARCH__ >= 800
#define PTX(s, x, y, ...) asm volatile(__VA_ARGS__)
#else
#define PTX(s, x, y, ...) __trap()   // never reached: device_start() refuses bf16
#endif
#else
#define UNROLL
#endif
#include "train.c"

// ---- What the kernels are written with --------------------------------------------------------

#ifndef WARPS
#define WARPS 8                          // of a CUDA block; some checkers take fewer
#endif
enum { THREADS = 32*WARPS };
#define ALL_LANES 0xffffffffu

static cudaStream_t stream;              // all work, in the order in which it was launched
static int multiprocessors, compute_capability;
static int use_bf16;                     // --precision bf16, see section 6
static real *scratch;                    // partial sums, never kept from one function to the next
static long n_scratch;                   // numbers in it

#define CHECK(call) check(call, #call, __FILE__, __LINE__)
static void check(cudaError_t error, const char *call, const char *file, int line) {
  if (error != cudaSuccess) die("%s:%d: %s: %s", file, line, call, cudaGetErrorString(error));
}

// RUN(kernel<<<...>>>(...)) launches a kernel, checks that it has started, and measures it for
// --profile; see section 7.
#define RUN(...) do { launching(); __VA_ARGS__; launched(#__VA_ARGS__); } while (0)
static void launching(void), launched(const char *call);
static void profile_moves(double numbers);   // how many the last kernel must read and write

static int blocks(long n, long each) { return (int)((n + each - 1) / each); }
static int round_up(long n, int to) { return blocks(n, to) * to; }

// Four consecutive numbers: in float 16 bytes, the most that one instruction moves. They must be
// aligned to that; if they are not, as in rows of an odd length, one number is moved at a time.
typedef struct __align__(16) { real at[4]; } Real4;

static __device__ __forceinline__ int is_real4(const real *x, long n) {
  return n >= 4 && (uintptr_t)x % 16 == 0;
}

static __device__ __forceinline__ Real4 load4(const real *x, long n) {   // x[0..3]; 0 from x[n] on
  Real4 v;
  if (is_real4(x, n)) return *(const Real4 *)x;
  UNROLL for (int j = 0; j < 4; j++) v.at[j] = j < n ? x[j] : 0;
  return v;
}

static __device__ __forceinline__ void store4(real *x, long n, Real4 v) {   // not from x[n] on
  if (is_real4(x, n)) *(Real4 *)x = v;
  else
    UNROLL for (int j = 0; j < 4; j++)
      if (j < n) x[j] = v.at[j];
}

// Kernels over single numbers give each thread four; i is the first. They read all four before they
// write, so that the output may be the input.
#define FIRST_OF_FOUR (((long)blockIdx.x * THREADS + threadIdx.x) * 4)
static int blocks_of_fours(long n) { return blocks(n, 4*THREADS); }

// Kernels over rows give each row to a warp: then the sums of a row need no barrier.
#define ROW_OF_WARP ((long)blockIdx.x * WARPS + threadIdx.x / 32)

// The sum over the 32 lanes of a warp, for every lane. __shfl_xor_sync gives a lane the x of lane
// (its own number ^ i): after i = 16, 8, 4, 2, 1 every lane has added all, in the same pairs.
static __device__ __forceinline__ real warp_sum(real x) {
  for (int i = 16; i > 0; i /= 2) x += __shfl_xor_sync(ALL_LANES, x, i);
  return x;
}

// The sum over the threads of a CUDA block, for every thread; in double, since it is used for long
// sums. A kernel may call it once: a second call could write `part` while a slow thread still reads
// the first one's, since no barrier is between.
static __device__ double block_sum(double x) {
  __shared__ double part[WARPS];
  for (int i = 16; i > 0; i /= 2) x += __shfl_xor_sync(ALL_LANES, x, i);
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = x;
  __syncthreads();                       // part[] has been written
  double sum = 0;
  for (unsigned i = 0; i < blockDim.x / 32; i++) sum += part[i];
  return sum;
}

static __device__ real block_max(real x) {   // once in a kernel, like block_sum
  __shared__ real part[WARPS];
  for (int i = 16; i > 0; i /= 2) {
    real other = __shfl_xor_sync(ALL_LANES, x, i);
    x = MAX(x, other);
  }
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = x;
  __syncthreads();                       // part[] has been written
  for (unsigned i = 0; i < blockDim.x / 32; i++) x = MAX(x, part[i]);
  return x;
}

// expf is accurate to within 2 units in the last place.
static __device__ __forceinline__ real exp_(real x) {
  return sizeof(real) == sizeof(float) ? (real)expf((float)x) : (real)exp((double)x);
}
static __device__ __forceinline__ real tanh_(real u) { return 1 - 2 / (exp_(2*u) + 1); }

// ---- 4. The optimizer -------------------------------------------------------------------------

static __global__ void optimizer_step_kernel(Tensor w, real *m, real *v, long begin, long end,
                                             OptimizerConfig o, const LossSums *sums) {
  __shared__ real clip;
  if (threadIdx.x == 0)                  // one thread: a square root in double is slow
    clip = clip_factor(sums->grad_norm2, o.grad_clip);
  __syncthreads();                       // clip has been written
  long i = begin + FIRST_OF_FOUR, n = end - i;
  Real4 w4 = load4(w.data + i, n), g4 = load4(w.grad + i, n);
  Real4 m4 = load4(m + i, n), v4 = load4(v + i, n);
  UNROLL for (int j = 0; j < 4; j++)
    update_weight(o.kind, &w4.at[j], clip * g4.at[j], &m4.at[j], &v4.at[j], o);
  store4(w.data + i, n, w4);
  store4(m + i, n, m4);
  store4(v + i, n, v4);
}

static void optimizer_step(Tensor w, real *m, real *v, long begin, long end, OptimizerConfig o,
                           const LossSums *sums) {
  RUN(optimizer_step_kernel<<<blocks_of_fours(end - begin), THREADS, 0, stream>>>(
      w, m, v, begin, end, o, sums));
  profile_moves(7.0 * (end - begin));    // w, m and v twice, the gradient
}

// ---- 5. Layers, from simple to hard -----------------------------------------------------------

// residual: out = x + f
static __global__ void residual_forward_kernel(real *out, const real *x, const real *f, long n) {
  long i = FIRST_OF_FOUR;
  Real4 x4 = load4(x + i, n - i), f4 = load4(f + i, n - i);
  UNROLL for (int j = 0; j < 4; j++) x4.at[j] += f4.at[j];
  store4(out + i, n - i, x4);
}

static void residual_forward(Tensor out, Tensor x, Tensor f, int N, int C) {
  long n = (long)N*C;
  RUN(residual_forward_kernel<<<blocks_of_fours(n), THREADS, 0, stream>>>(
      out.data, x.data, f.data, n));
  profile_moves(3.0 * n);
}

static void residual_backward(Tensor out, Tensor x, Tensor f, int N, int C) {
  // dx = dout, df = dout. In the model the three gradients share memory, and nothing is left to do.
  size_t bytes = (size_t)N*C * sizeof(real);
  if (x.grad != out.grad)
    CHECK(cudaMemcpyAsync(x.grad, out.grad, bytes, cudaMemcpyDeviceToDevice, stream));
  if (f.grad != out.grad)
    CHECK(cudaMemcpyAsync(f.grad, out.grad, bytes, cudaMemcpyDeviceToDevice, stream));
}

// gelu: y = x (1 + h) / 2, h = tanh(u), u = a (x + b x^3), a = sqrt(2/pi), b = 0.044715
static __global__ void gelu_forward_kernel(real *y, const real *x, long n) {
  long i = FIRST_OF_FOUR;
  Real4 v = load4(x + i, n - i);
  UNROLL for (int j = 0; j < 4; j++) {
    real x_i = v.at[j], h = tanh_(GELU_A * (x_i + GELU_B * x_i * x_i * x_i));
    v.at[j] = x_i * (1 + h) / 2;
  }
  store4(y + i, n - i, v);
}

static void gelu_forward(Tensor y, Tensor x, int N, int C) {
  long n = (long)N*C;
  RUN(gelu_forward_kernel<<<blocks_of_fours(n), THREADS, 0, stream>>>(y.data, x.data, n));
  profile_moves(2.0 * n);
}

// dx = dy ((1 + h)/2 + x (1 - h^2)/2 du/dx), du/dx = a (1 + 3 b x^2)
static __global__ void gelu_backward_kernel(real *dx, const real *dy, const real *x, long n) {
  long i = FIRST_OF_FOUR;
  Real4 v = load4(x + i, n - i), g = load4(dy + i, n - i);
  UNROLL for (int j = 0; j < 4; j++) {
    real x_i = v.at[j], h = tanh_(GELU_A * (x_i + GELU_B * x_i * x_i * x_i));
    real du_dx = GELU_A * (1 + 3 * GELU_B * x_i * x_i);
    g.at[j] *= (1 + h) / 2 + x_i * (1 - h*h) / 2 * du_dx;
  }
  store4(dx + i, n - i, g);
}

static void gelu_backward(Tensor y, Tensor x, int N, int C) {
  long n = (long)N*C;
  RUN(gelu_backward_kernel<<<blocks_of_fours(n), THREADS, 0, stream>>>(
      x.grad, y.grad, x.data, n));
  profile_moves(3.0 * n);
}

// embedding: out[n,c] = wte[token[n],c] + wpe[t,c], where n = b*T + t
static __global__ void embedding_forward_kernel(real *out, const int *token, const real *wte,
                                                const real *wpe, int N, int T, int C) {
  long n = ROW_OF_WARP;
  if (n >= N) return;
  const real *token_row = wte + (long)token[n]*C, *position_row = wpe + (n % T)*C;
  for (int c = threadIdx.x % 32; c < C; c += 32) out[n*C + c] = token_row[c] + position_row[c];
}

static void embedding_forward(Tensor out, const int *token, Tensor wte, Tensor wpe,
                              int B, int T, int C) {
  RUN(embedding_forward_kernel<<<blocks(B*T, WARPS), THREADS, 0, stream>>>(
      out.data, token, wte.data, wpe.data, B*T, T, C));
  profile_moves(2.0 * B*T * C);          // wpe stays in a cache
}

// dwte[v,c] += the sum of dout[n,c] over all n with token[n] == v. Two rows may have the same
// token, so they cannot all add at once. There is a CUDA block for each row n, but only the first
// row with a token adds, for all rows with this token and in their order; the other blocks return.
// For the tokens 7 3 7 7 (blocks of 4 threads in place of 256):
//
//   block 0 looks for 7:  same = 1 0 1 1  list = 0 2 3  list[0] is 0: adds rows 0, 2, 3 to wte[7]
//   block 1 looks for 3:  same = 0 1 0 0  list = 1      list[0] is 1: adds row 1 to wte[3]
//   block 2 looks for 7:  same = 1 0 1 1  list = 0 2 3  list[0] is 0, not 2: block 0 does it
//
// Each thread compares one row. __ballot_sync packs the answers of a warp into 32 bits, and __popc
// counts bits: those before a thread's own are its place in the list.
static __global__ void embedding_backward_token(real *dwte, const int *token, const real *dout,
                                                int N, int C) {
  __shared__ int list[THREADS];
  __shared__ unsigned votes[WARPS];
  int n = blockIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int c = blockIdx.y * THREADS + threadIdx.x;   // this thread adds column c
  real sum = 0;
  for (int m0 = 0; m0 < N; m0 += THREADS) {
    int m = m0 + threadIdx.x, place = 0, count = 0;
    int same = m < N && token[m] == token[n];
    unsigned vote = __ballot_sync(ALL_LANES, same);
    if (lane == 0) votes[warp] = vote;
    __syncthreads();                     // votes[] has been written; the last list has been read
    for (int i = 0; i < WARPS; i++) {
      if (i < warp) place += __popc(votes[i]);
      count += __popc(votes[i]);
    }
    place += __popc(vote & ((1u << lane) - 1));
    if (same) list[place] = m;
    __syncthreads();                     // the list has been written; votes[] has been read
    if (count > 0 && list[0] < n) return;   // an earlier row has the token: all threads return
    if (c < C)
      UNROLL for (int i = 0; i < count; i++)   // several loads are on their way at once
        sum += dout[(long)list[i]*C + c];
  }
  if (c < C) dwte[(long)token[n]*C + c] += sum;
}

// dwpe[t,c] += sum_b dout[b*T + t,c]
static __global__ void embedding_backward_position(real *dwpe, const real *dout, int B, int T,
                                                   int C) {
  long i = (long)blockIdx.x * THREADS + threadIdx.x, TC = (long)T*C;   // i = t*C + c
  if (i >= TC) return;
  real sum = 0;
  for (int b = 0; b < B; b++) sum += dout[b*TC + i];
  dwpe[i] += sum;
}

static void embedding_backward(Tensor out, const int *token, Tensor wte, Tensor wpe,
                               int B, int T, int C) {
  dim3 grid(B*T, blocks(C, THREADS));
  RUN(embedding_backward_token<<<grid, THREADS, 0, stream>>>(wte.grad, token, out.grad, B*T, C));
  RUN(embedding_backward_position<<<blocks((long)T*C, THREADS), THREADS, 0, stream>>>(
      wpe.grad, out.grad, B, T, C));
  profile_moves((B + 2.0) * T * C);
}

// linear and lm_head only call matmul(), so those of train.c serve here, too.

// layernorm: out[n,c] = xhat[n,c] w[c] + b[c], xhat[n,c] = (x[n,c] - mean[n]) rstd[n], with the
// mean and the variance of row n and rstd = 1 / sqrt(variance + 1e-5). backward reads mean and
// rstd.
static __global__ void layernorm_forward_kernel(real *out, real *mean_rstd, const real *x,
                                                const real *w, const real *b, int N, int C) {
  long n = ROW_OF_WARP;
  int lane = threadIdx.x % 32;
  if (n >= N) return;
  real sum = 0, sum_squares = 0;
  for (int c = lane; c < C; c += 32) sum += x[n*C + c];
  real mean = warp_sum(sum) / C;
  for (int c = lane; c < C; c += 32) sum_squares += (x[n*C + c] - mean) * (x[n*C + c] - mean);
  real rstd = 1 / sqrt(warp_sum(sum_squares) / C + (real)1e-5);
  for (int c = lane; c < C; c += 32) out[n*C + c] = (x[n*C + c] - mean) * rstd * w[c] + b[c];
  if (lane == 0) mean_rstd[2*n] = mean;
  if (lane == 0) mean_rstd[2*n + 1] = rstd;
}

static void layernorm_forward(Tensor out, Tensor mean_rstd, Tensor x, WeightBias p, int N, int C) {
  RUN(layernorm_forward_kernel<<<blocks(N, WARPS), THREADS, 0, stream>>>(
      out.data, mean_rstd.data, x.data, p.weight.data, p.bias.data, N, C));
  profile_moves(2.0 * N * C);
}

// g[n,c] = dout[n,c] w[c]; dx[n,c] += rstd (g - avg_c(g) - xhat avg_c(g xhat)), where avg_c is the
// mean over c
static __global__ void layernorm_backward_x(real *dx, const real *dout, const real *mean_rstd,
                                            const real *x, const real *w, int N, int C) {
  long n = ROW_OF_WARP;
  int lane = threadIdx.x % 32;
  if (n >= N) return;
  real mean = mean_rstd[2*n], rstd = mean_rstd[2*n + 1], sum_g = 0, sum_g_xhat = 0;
  for (int c = lane; c < C; c += 32) {
    sum_g += dout[n*C + c] * w[c];
    sum_g_xhat += dout[n*C + c] * w[c] * ((x[n*C + c] - mean) * rstd);
  }
  real avg_g = warp_sum(sum_g) / C, avg_g_xhat = warp_sum(sum_g_xhat) / C;
  for (int c = lane; c < C; c += 32)
    dx[n*C + c] += rstd * (dout[n*C + c] * w[c] - avg_g - (x[n*C + c] - mean) * rstd * avg_g_xhat);
}

// Sums over the rows of a matrix, for each column. A CUDA block takes 32 columns, one for each
// lane, so that a warp reads 32 consecutive numbers. The rows are dealt out in turn: to the warps
// of a block, and to the `slices` blocks that share the columns. store_column() adds the sums of a
// block's warps; the sums of the slices go to scratch, and add_slices() adds them.
enum { COLUMN_SLICES = 32 };
static int slices_of(int N) { return MIN(COLUMN_SLICES, blocks(N, 4*WARPS)); }   // 4 rows a warp

#define ROW_OF_WARP_IN_SLICE ((long)blockIdx.y * WARPS + threadIdx.x / 32)

static __device__ void store_column(real *part, int c, int C, real sum) {
  __shared__ real sums[WARPS][32];
  sums[threadIdx.x / 32][threadIdx.x % 32] = sum;
  __syncthreads();                       // sums[] has been written
  if (threadIdx.x >= 32 || c >= C) return;
  sum = 0;
  for (int i = 0; i < WARPS; i++) sum += sums[i][threadIdx.x];
  part[(long)blockIdx.y*C + c] = sum;
}

// c[i,j] = sum over slices of part[slice][i][j] + (c[i,j] if mode is ADD, else bias[j] or 0): a
// thread for each element
static __global__ void add_slices_kernel(Matrix c, const real *part, int M, int N, int slices,
                                         int mode, const real *bias) {
  long e = (long)blockIdx.x * THREADS + threadIdx.x;   // consecutive in part, and in a row of c
  if (e >= (long)M*N) return;
  real *y = c.at + e / N * c.down + e % N, sum = mode == ADD ? *y : bias ? bias[e % N] : 0;
  for (int s = 0; s < slices; s++) sum += part[s*(long)M*N + e];
  *y = sum;
}

static void add_slices(Matrix c, const real *part, int M, int N, int slices, int mode,
                       const real *bias) {
  RUN(add_slices_kernel<<<blocks((long)M*N, THREADS), THREADS, 0, stream>>>(
      c, part, M, N, slices, mode, bias));
  profile_moves((slices + 1.0 + (mode == ADD)) * M * N);
}

// dw[c] += sum_n dout[n,c] xhat[n,c]
static __global__ void layernorm_backward_w(real *dw_part, const real *dout, const real *mean_rstd,
                                            const real *x, int N, int C) {
  int c = blockIdx.x * 32 + threadIdx.x % 32;
  real dw = 0;
  for (long n = ROW_OF_WARP_IN_SLICE; n < N && c < C; n += gridDim.y * WARPS)
    dw += dout[n*C + c] * ((x[n*C + c] - mean_rstd[2*n]) * mean_rstd[2*n + 1]);
  store_column(dw_part, c, C, dw);
}

static void layernorm_backward(Tensor out, Tensor mean_rstd, Tensor x, WeightBias p, int N, int C) {
  int slices = slices_of(N);
  dim3 grid(blocks(C, 32), slices);
  RUN(layernorm_backward_x<<<blocks(N, WARPS), THREADS, 0, stream>>>(
      x.grad, out.grad, mean_rstd.data, x.data, p.weight.data, N, C));
  profile_moves(4.0 * N * C);
  RUN(layernorm_backward_w<<<grid, THREADS, 0, stream>>>(
      scratch, out.grad, mean_rstd.data, x.data, N, C));
  profile_moves(2.0 * N * C);
  add_slices(rows_of(p.weight.grad, C), scratch, 1, C, slices, ADD, NULL);
  // db[c] += sum_n dout[n,c]
  add_columns(p.bias.grad, out.grad, N, C);
}

// softmax cross-entropy: loss[n] = -log p[n,target[n]], p[n,v] = exp(logits[n,v] - row_lse[n]),
// row_lse[n] = log sum_v exp(logits[n,v]). correct[n] is 1 if the target has the largest logit; of
// several that are equal, the first counts. A row of V logits can have tens of thousands of
// numbers: a CUDA block takes it, not a warp.
static int threads_for(int n) { return MIN(THREADS, round_up(n, 32)); }

static __global__ void crossentropy_forward_kernel(real *loss, real *correct, real *row_lse,
                                                   const real *logits, const int *target, int V) {
  int n = blockIdx.x;
  const real *logits_n = logits + (long)n*V;
  real max = logits_n[0], sum = 0;
  for (int v = threadIdx.x; v < V; v += blockDim.x) max = MAX(max, logits_n[v]);
  max = block_max(max);                  // subtracted, so that exp cannot overflow
  int earlier = 0;                       // has an entry before the target the largest logit, too?
  for (int v = threadIdx.x; v < V; v += blockDim.x) {
    sum += exp_(logits_n[v] - max);
    earlier |= logits_n[v] == max && v < target[n];
  }
  sum = (real)block_sum(sum);
  earlier = __syncthreads_or(earlier);   // of any thread
  if (threadIdx.x > 0) return;
  row_lse[n] = max + log(sum);
  loss[n] = row_lse[n] - logits_n[target[n]];
  correct[n] = logits_n[target[n]] == max && !earlier;
}

static void crossentropy_forward(Tensor loss, Tensor correct, Tensor row_lse, Tensor logits,
                                 const int *target, int N, int V) {
  RUN(crossentropy_forward_kernel<<<N, threads_for(V), 0, stream>>>(
      loss.data, correct.data, row_lse.data, logits.data, target, V));
  profile_moves((double)N * V);
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

static void crossentropy_backward(Tensor loss, Tensor correct, Tensor row_lse, Tensor logits,
                                  const int *target, int N, int V) {
  (void)correct;   // a count, for the log: no gradient goes through it
  RUN(crossentropy_backward_kernel<<<N, threads_for(V), 0, stream>>>(
      logits.grad, logits.data, row_lse.data, loss.grad, target, V));
  profile_moves(2.0 * N * V);
}

// ---- 6. Matmul, sums and the fast attention ---------------------------------------------------

typedef struct {                         // C = A B + bias, or C += A B
  Matrix c, a, b;
  long c_slice;                          // from one slice of C to the next, see add_slices()
  int M, N, K, slice, mode;              // a slice takes `slice` numbers of K
  const real *bias;
  const char *rounded_a, *rounded_b;     // bf16: lines of K numbers; see round_operands()
} Product;

// c[i, j..j+n-1] = sum + bias, or += sum. n is 1, 2 or 4; what is outside of C is left out.
static __device__ __forceinline__ void store_c(const Product *p, int i, int j, const real *sum,
                                               int n) {
  real *c = p->c.at + blockIdx.z*p->c_slice + i*p->c.down + j;
  Real4 v = {{0, 0, 0, 0}};
  n = i < p->M ? MIN(n, p->N - j) : 0;
  if (p->mode == ADD) v = load4(c, n);
  else if (p->bias) v = load4(p->bias + j, n);
  UNROLL for (int e = 0; e < 4; e++) if (e < n) v.at[e] += sum[e];
  store4(c, n, v);
}

// A ladder of four kernels: each adds an idea to the one before. Training uses rung 3, or rung 4
// with --precision bf16. To compare, run `RUNG=1 ./train_gpu --profile`, then with RUNG=2 and 3.
static int rung = PLAIN ? 1 : 3;

// Rung 1: a thread computes one element of C. The lanes of a warp have neighbouring columns, so
// their loads of B are coalesced where a row of B is consecutive, and A's number is the same for
// all. But each multiply-add waits for two loads from device memory or its caches.
static __global__ void matmul_plain(Product p) {
  int i = blockIdx.x, j = blockIdx.y * THREADS + threadIdx.x;
  real sum = 0;
  for (long k = 0; k < p.K && j < p.N; k++)
    sum += p.a.at[i*p.a.down + k*p.a.right] * p.b.at[k*p.b.down + j*p.b.right];
  store_c(&p, i, j, &sum, 1);
}

// Rung 2, shared memory: a CUDA block computes 16 x 16 of C, a thread one element. It goes along K
// in steps: its threads copy 16 x 16 of A and of B to shared memory, where 16 threads use each
// number. Now shared memory is the limit: each multiply-add needs two loads from it, and in the
// time of these a multiprocessor could do eight. (Four on a T4.)
enum { BIG = WARPS == 8 ? 16 : 8 };      // a CUDA block of rung 2 has BIG*BIG threads

static __global__ void matmul_shared(Product p) {
  __shared__ real a[BIG][BIG], b[BIG][BIG];
  int x = threadIdx.x % BIG, y = threadIdx.x / BIG;
  int i = blockIdx.y * BIG + y, j = blockIdx.x * BIG + x;
  real sum = 0;
  for (long k = 0; k < p.K; k += BIG) {
    a[y][x] = i < p.M && k + x < p.K ? p.a.at[i*p.a.down + (k + x)*p.a.right] : 0;
    b[y][x] = j < p.N && k + y < p.K ? p.b.at[(k + y)*p.b.down + j*p.b.right] : 0;
    __syncthreads();                     // the squares have been written
    for (int l = 0; l < BIG; l++) sum += a[y][l] * b[l][x];
    __syncthreads();                     // the squares have been read
  }
  store_c(&p, i, j, &sum, 1);
}

// Rung 3, registers: a thread computes 8 x 8 elements, in registers. For each k it loads 8 + 8
// numbers from shared memory, in four loads of 16 bytes, for 64 multiply-adds; these are now 512 of
// the 580 instructions of a step, and are the limit. A CUDA block of 256 threads computes 128 x 128
// of C, and a warp 32 x 64 of that. More ideas are in it:
//   - Double buffering: while a step is multiplied, the numbers of the next are on their way from
//     device memory to registers. They then go to a second pair of buffers, so that one barrier a
//     step is enough.
//   - Split-K: a small C has too few tiles for all multiprocessors. Then tiles are 64 x 64, or K is
//     cut into slices, whose sums go to scratch and are added in order.
//   - A load of 16 bytes a lane is served 8 lanes at a time, or 16 where lanes that are neighbours,
//     or two apart, have the same address. So these are the lanes in a warp's 32 x 64, which load 4
//     different Real4 of A and 8 of B:
//
//   columns        0..3   4..7   8..11  ...  28..31   32..35  ...  60..63
//   rows  0..3     0      2      4           14       0            14
//   rows  4..7     1      3      5           15       1            15
//   rows  8..11    16     18     20          30       16           30
//   rows 12..15    17     19     21          31       17           31
//   rows 16..31    the same once more
enum {
  DEPTH = 8,                             // numbers of k in a step
  PAD = 4                                // numbers between two rows of a tile, see put()
};

// From here on `side` is 16 or 8: a CUDA block has side*side threads with 8 x 8 elements each, so
// its tile of C is 8*side x 8*side, 128 or 64.
//
// How a thread reads its part of an operand. A line is a row of A or a column of B. A tile has
// 8*side lines, and side*side threads read it, 16/side Real4 each in a step. `along`: are the
// numbers of a line consecutive in memory? Then consecutive threads read along k, then the next
// line; else they read along the lines, then the next k.
typedef struct {
  const real *x;                         // this thread's first number of the step
  long next, apart;                      // from step to step; from Real4 to Real4 in a step
  int line, k;                           // where x is in the tile
  int lines;                             // of the operand, from the tile's first on
  int whole;                             // are there enough for the tile, and each Real4 aligned?
} Reader;

static __device__ __forceinline__ Reader reader_of(Matrix m, int line0, int lines, int k0,
                                                   int side, int along) {
  Reader r;
  int t = threadIdx.x;
  r.line = along ? t / 2 : t % (2*side) * 4;
  r.k = along ? t % 2 * 4 : t / (2*side);
  r.x = m.at + (line0 + r.line)*m.down + (k0 + r.k)*m.right;
  r.next = DEPTH*m.right;
  r.apart = along ? side*side/2 * m.down : side/2 * m.right;
  r.lines = lines - line0;
  r.whole = r.lines >= 8*side && (uintptr_t)m.at % 16 == 0
         && (along ? m.down : m.right) % 4 == 0;
  return r;
}

// From device memory to registers; `left` numbers of k are left. The else is for the edges of a
// matrix, and for rows that are no multiple of 16 bytes, like logits of 50257 tokens. (Padded to
// 50304 they would be faster, but in train.c, too, a row of logits has V numbers.)
static __device__ __forceinline__ void fetch(Real4 *four, Reader *r, int left, int side,
                                             int along) {
  if (r->whole && left >= DEPTH) {
    UNROLL for (int l = 0; l < 16/side; l++) four[l] = *(const Real4 *)(r->x + l*r->apart);
  } else {
    UNROLL for (int l = 0; l < 16/side; l++)
      UNROLL for (int j = 0; j < 4; j++) {
        int line = r->line + (along ? l*(side*side/2) : j), k = r->k + (along ? j : l*(side/2));
        four[l].at[j] = line < r->lines && k < left ? r->x[l*r->apart + j] : 0;
      }
  }
  r->x += r->next;
}

// From registers to shared memory. If `along`, a warp stores at once the numbers of 16 lines in two
// rows, k and k + 4. These are 4 * (128 + PAD) numbers apart, which is 16 banks from a multiple of
// 32: so the 32 numbers are in different banks.
static __device__ __forceinline__ void put(real *tile, const Real4 *four, const Reader *r, int side,
                                           int along) {
  const int row = 8*side + PAD;
  UNROLL for (int l = 0; l < 16/side; l++) {
    int line = r->line + (along ? l*(side*side/2) : 0), k = r->k + (along ? 0 : l*(side/2));
    if (along)
      UNROLL for (int j = 0; j < 4; j++) tile[(k + j)*row + line] = four[l].at[j];
    else *(Real4 *)(tile + k*row + line) = four[l];
  }
}

// The products of some k, for this thread's 8 x 8 of C. A tile is [k][line] whatever the strides of
// the operand are, so transposing costs nothing more.
static __device__ __forceinline__ void multiply_fp32(real (*sum)[8], const real *a, const real *b,
                                                     int k0, int k1, int side) {
  const int lane = threadIdx.x % 32, row = 8*side + PAD;
  a += (lane/16*2 + lane%2) * 4;
  b += lane%16/2 * 4;
  UNROLL for (int k = k0; k < k1; k++) {
    Real4 x[2] = {*(const Real4 *)(a + k*row), *(const Real4 *)(a + k*row + 16)};
    Real4 y[2] = {*(const Real4 *)(b + k*row), *(const Real4 *)(b + k*row + 32)};
    UNROLL for (int i = 0; i < 8; i++)
      UNROLL for (int j = 0; j < 8; j++) sum[i][j] += x[i / 4].at[i % 4] * y[j / 4].at[j % 4];
  }
}

// A CUDA block's tile of C. The first three arguments are constants, so each call below is a copy
// of this function with its loops unrolled and its branches decided; a kernel has four copies, one
// for each pair of layouts. One operand of the next step is fetched in each half of a step, since
// the numbers of both need too many registers.
static __device__ __forceinline__ void matmul_tile(const int side, const int a_along,
                                                   const int b_along, const Product *p,
                                                   real *shared) {
  const int tile_size = DEPTH*(8*side + PAD), warps_in_row = side / 8;
  const int along[2] = {a_along, b_along};
  int i = blockIdx.y * 8*side, j = blockIdx.x * 8*side, warp = threadIdx.x / 32;
  int warp_i = warp / warps_in_row * 32, warp_j = warp % warps_in_row * 64;
  int begin = blockIdx.z * p->slice, left = MIN(p->K - begin, p->slice);
  Reader reader[2] = {reader_of(p->a, i, p->M, begin, side, a_along),
                      reader_of(transpose(p->b), j, p->N, begin, side, b_along)};
  Real4 next[2];
  real sum[8][8] = {{0}};
  UNROLL for (int h = 0; h < 2; h++) {   // A, then B
    fetch(next, &reader[h], left, side, along[h]);
    put(shared + h*tile_size, next, &reader[h], side, along[h]);
  }
  for (int now = 0; left > 0; left -= DEPTH, now = !now) {
    real *a = shared + 2*now*tile_size, *b = a + tile_size, *other = shared + 2*!now*tile_size;
    __syncthreads();                     // a, b have been written, the other buffers read
    UNROLL for (int h = 0; h < 2; h++) {
      int k = h*DEPTH/2;
      if (left > DEPTH) fetch(next, &reader[h], left - DEPTH, side, along[h]);
      multiply_fp32(sum, a + warp_i, b + warp_j, k, k + DEPTH/2, side);
      if (left > DEPTH) put(other + h*tile_size, next, &reader[h], side, along[h]);
    }
  }
  int lane = threadIdx.x % 32;
  i += warp_i + (lane/16*2 + lane%2)*4; j += warp_j + lane%16/2*4;
  UNROLL for (int e = 0; e < 8; e++) {
    store_c(p, i + e/4*16 + e%4, j, sum[e], 4);
    store_c(p, i + e/4*16 + e%4, j + 32, sum[e] + 4, 4);
  }
}

// Rung 4, tensor cores: one instruction of a warp multiplies 16 x 16 by 16 x 8 numbers. They are
// bf16, the upper half of a float: 8 bits of exponent, 7 of fraction. The sums are floats, and so
// are weights, activations and gradients in memory: round_kernel() rounds both operands before each
// product. That costs time, but then the product reads half as many bytes through the L2 cache,
// which limits it besides the tensor cores. round_kernel() also transposes where necessary and
// fills the last tiles with 0, so that the loop has one form and no edges; and cp.async can copy
// tiles to shared memory without registers, two steps ahead. Not used: TMA, by which, since Hopper,
// one thread fetches a tile, and Hopper's wgmma, by which four warps multiply straight from shared
// memory. Without them mma.sync reaches two thirds of that GPU's peak at most.
enum { STAGES = 3, DEPTH_BF16 = 32 };    // 3 steps of 32 k are 48 KB of tiles
static_assert(STAGES - 2 == 1, "wait_copies() has this number in its text");

// Where a number of a tile of bf16 is. 8 numbers, 16 bytes, are a chunk, and 8 chunks fill the
// banks once. load_bf16() reads chunks from 8 rows, one below the other. So they are swizzled:
// chunk c of row r is in place c ^ r % 8, or c ^ r/2 % 4 where two rows of 4 chunks fill the banks.
static __device__ __forceinline__ int swizzled_bf16(int row, int column, int columns) {
  const int chunks = columns / 8;        // of a row: 4 or 8
  return (row*chunks + (column/8 ^ row*chunks/8 % chunks)) * 8 + column % 8;
}

// Instructions in PTX, the assembly language of NVIDIA GPUs. The arrays s (floats), x and y (words)
// or p (pointers) hold the operands, under these names: the emulator looks for them in the text.

// Two bf16 in a word, rounded to nearest, and to even if both are as near
static __device__ __forceinline__ unsigned bf16_pair(real low, real high) {
  float s[2] = {(float)low, (float)high};
  unsigned x[1] = {0};
  PTX(s, x, NULL, "cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(x[0]) : "f"(s[1]), "f"(s[0]));
  return x[0];
}

// copy_async() begins to copy 16 bytes from device to shared memory. close_group() makes a group of
// the copies that this thread has begun since the last one. wait_copies() returns when all of its
// groups but the newest STAGES - 2 have arrived.
static __device__ __forceinline__ void copy_async(unsigned to, const char *from) {
  const char *p[1] = {from};
  unsigned y[1] = {to};
  PTX(p, NULL, y, "cp.async.cg.shared.global [%0], [%1], 16;" : : "r"(y[0]), "l"(p[0]) : "memory");
}
static __device__ __forceinline__ void close_group(void) {
  PTX(NULL, NULL, NULL, "cp.async.commit_group;" : : : "memory");
}
static __device__ __forceinline__ void wait_copies(void) {
  PTX(NULL, NULL, NULL, "cp.async.wait_group 1;" : : : "memory");
}

// 16 lines x 16 k of a tile, as an A of mma_bf16(), or as two B, for which the second and the third
// square change places. The rows of the tile, of `columns` numbers, are lines if `along`, else k. A
// square is 8 x 8. Lane l gives the address of row l%8 of square l/8, and gets two numbers of each
// square i in x[i]: of row l/4, columns l%4*2 and the next; or, if transposed, of column l/4, rows
// l%4*2 and the next.
static __device__ __forceinline__ unsigned bf16_address(const char *tile, int columns, int line,
                                                        int k, int is_a, int along) {
  int lane = threadIdx.x % 32;
  line += 8 * (is_a ? lane/8%2 : lane/16);
  k += 8 * (is_a ? lane/16 : lane/8%2);
  int at = along ? swizzled_bf16(line + lane%8, k, columns)
                 : swizzled_bf16(k + lane%8, line, columns);
  return (unsigned)__cvta_generic_to_shared(tile + 2*at);
}

static __device__ __forceinline__ void load_bf16(unsigned *x, unsigned address, int along) {
  unsigned y[1] = {address};
  if (along)
    PTX(NULL, x, y, "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
        : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(y[0]) : "memory");
  else
    PTX(NULL, x, y, "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
        : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(y[0]) : "memory");
}

// C += A B by a whole warp, C (16,8), A (16,16), B (16,8). With g = lane / 4 and t = lane % 4, a
// lane holds A[g][2t] and A[g][2t+1] in x[0], the same of row g + 8 in x[1], and both of 8 more k
// in x[2] and x[3]; B[2t][g] and B[2t+1][g] in y[0], of 8 more k in y[1]; C[g][2t] and C[g][2t+1]
// in c, and those of row g + 8 in c8.
static __device__ __forceinline__ void mma_bf16(real *c, real *c8, const unsigned *x,
                                                const unsigned *y) {
  float s[4] = {(float)c[0], (float)c[1], (float)c8[0], (float)c8[1]};
  PTX(s, x, y, "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(s[0]), "+f"(s[1]), "+f"(s[2]), "+f"(s[3])
      : "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]), "r"(y[0]), "r"(y[1]));
  UNROLL for (int i = 0; i < 2; i++) c[i] = s[i], c8[i] = s[2 + i];
}

// to[line][k] = x[line][k], rounded, in rows of `row` numbers; 0 beyond `lines` and K. A CUDA block
// takes 32 x 32 numbers, and a warp reads consecutive ones, whichever way they lie.
static __global__ void round_kernel(unsigned *to, Matrix x, int lines, int K, int row) {
  __shared__ real tile[32][32 + 1];      // a column, too, is in 32 different banks
  int line0 = blockIdx.x * 32, k0 = blockIdx.y * 32, lane = threadIdx.x % 32;
  for (int i = threadIdx.x / 32; i < 32; i += WARPS) {
    int line = x.right == 1 ? i : lane, k = x.right == 1 ? lane : i;
    tile[line][k] = line0 + line < lines && k0 + k < K
                  ? x.at[(line0 + line)*x.down + (k0 + k)*x.right] : 0;
  }
  __syncthreads();                       // the tile has been written
  for (int i = threadIdx.x; i < 32*16; i += THREADS) {
    int line = i / 16, k = i % 16 * 2;
    to[((long)(line0 + line)*row + k0 + k) / 2] = bf16_pair(tile[line][k], tile[line][k + 1]);
  }
}

// Begins the copies of one step. `to` and from[] are this thread's first 16 bytes, a quarter of a
// line, of A's and of B's tile; its next ones in the tile are `apart` bytes further on.
static __device__ __forceinline__ void copy_tiles(unsigned to, const char **from, long apart,
                                                  int side) {
  UNROLL for (int h = 0; h < 2; h++) {
    UNROLL for (int l = 0; l < 32/side; l++)
      copy_async(to + (h*8*side + l*side*side/4) * 2*DEPTH_BF16, from[h] + l*apart);
    from[h] += 2*DEPTH_BF16;
  }
}

// The products of a step, for the warp's 32 x 64 of C: 2 x 8 results of mma_bf16(). a and b are the
// addresses of this lane's first rows. Those of 16 lines more are 1 KB further on, and those of 16
// k more two chunks, which in a swizzled line is an exclusive or.
static __device__ __forceinline__ void multiply_bf16(real (*sum)[8], unsigned a, unsigned b) {
  UNROLL for (int k = 0; k < DEPTH_BF16; k += 16) {
    unsigned x[2][4], y[4];
    UNROLL for (int r = 0; r < 2; r++) load_bf16(x[r], (a ^ 2*k) + r*32*DEPTH_BF16, 1);
    UNROLL for (int e = 0; e < 8; e += 2) {
      load_bf16(y, (b ^ 2*k) + e*16*DEPTH_BF16, 1);
      UNROLL for (int r = 0; r < 2; r++) {
        mma_bf16(sum[e] + 4*r, sum[e] + 4*r + 2, x[r], y);
        mma_bf16(sum[e + 1] + 4*r, sum[e + 1] + 4*r + 2, x[r], y + 2);
      }
    }
  }
}

// A CUDA block's tile of C
static __device__ __forceinline__ void matmul_tile_bf16(const int side, const Product *p,
                                                        char *shared) {
  const int bytes = 8*side*DEPTH_BF16*2, warps_in_row = side / 8, last = (STAGES - 1) * 2*bytes;
  int i = blockIdx.y * 8*side, j = blockIdx.x * 8*side, warp = threadIdx.x / 32;
  int warp_i = warp / warps_in_row * 32, warp_j = warp % warps_in_row * 64;
  int begin = blockIdx.z * p->slice, steps = MIN(p->K - begin, p->slice) / DEPTH_BF16;
  int line = threadIdx.x / 4, k = threadIdx.x % 4 * 8;
  const char *from[2] = {p->rounded_a + 2*((long)(i + line)*p->K + begin + k),
                         p->rounded_b + 2*((long)(j + line)*p->K + begin + k)};
  long apart = side*side/4 * 2L*p->K;
  unsigned to = (unsigned)__cvta_generic_to_shared(shared + 2*swizzled_bf16(line, k, DEPTH_BF16));
  unsigned a = bf16_address(shared, DEPTH_BF16, warp_i, 0, 1, 1);
  unsigned b = bf16_address(shared + bytes, DEPTH_BF16, warp_j, 0, 0, 1);
  real sum[8][8] = {{0}};
  for (int step = 0; step < STAGES - 1; step++) {
    if (step < steps) copy_tiles(to + step*2*bytes, from, apart, side);
    close_group();
  }
  for (int now = 0, next = last; steps > 0; steps--) {
    wait_copies();                       // this thread's copies of this step
    __syncthreads();                     // now has been written, next has been read
    if (steps > STAGES - 1) copy_tiles(to + next, from, apart, side);
    close_group();
    multiply_bf16(sum, a + now, b + now);
    next = now;
    now = now == last ? 0 : now + 2*bytes;
  }
  int lane = threadIdx.x % 32;
  i += warp_i + lane/4; j += warp_j + lane%4*2;
  UNROLL for (int e = 0; e < 8; e++)
    UNROLL for (int r = 0; r < 4; r++) store_c(p, i + 8*r, j + 8*e, &sum[e][2*r], 2);
}

// CUDA blocks that should fit on a multiprocessor. 65536 / 2 blocks / 256 threads leave 128
// registers a thread, 65536 / 6 / 64 leave 168. (Six small ones in bf16 also need 6 x 25 KB of
// shared memory; a GPU with 100 KB runs four.)
enum { BIG_AT_ONCE = 2, SMALL_AT_ONCE = 6 };
#define MATMUL_KERNEL(name, side, at_once)                                                    \
  static __global__ void __launch_bounds__((side)*(side), at_once) name(Product p) {          \
    __shared__ __align__(16) real shared[4*DEPTH*(8*(side) + PAD)];                           \
    int a_along = p.a.right == 1, b_along = p.b.down == 1;                                    \
    if (a_along && b_along) matmul_tile(side, 1, 1, &p, shared);                              \
    else if (a_along) matmul_tile(side, 1, 0, &p, shared);                                    \
    else if (b_along) matmul_tile(side, 0, 1, &p, shared);                                    \
    else matmul_tile(side, 0, 0, &p, shared);                                                 \
  }
#define MATMUL_KERNEL_BF16(name, side, at_once)                                               \
  static __global__ void __launch_bounds__((side)*(side), at_once) name(Product p) {          \
    __shared__ __align__(64) char shared[STAGES*2*8*(side)*DEPTH_BF16*2];                     \
    matmul_tile_bf16(side, &p, shared);                                                       \
  }
MATMUL_KERNEL(matmul_big, BIG, BIG_AT_ONCE)
MATMUL_KERNEL(matmul_small, 8, SMALL_AT_ONCE)
MATMUL_KERNEL_BF16(matmul_big_bf16, BIG, BIG_AT_ONCE)
MATMUL_KERNEL_BF16(matmul_small_bf16, 8, SMALL_AT_ONCE)

// Waves: if `at_once` CUDA blocks fit on the GPU, a grid runs in waves of that many, and the last
// wave takes as long as a full one. This is the number of slices, up to 16 and to `most`, that
// leaves the least of the waves empty; more slices must gain 5 %, since their sums are written and
// read again.
static int slices_for(long tiles, long at_once, long most) {
  int best = 1;
  double fullest = 0;
  for (int s = 1; s <= MAX(1, MIN(most, 16)); s++) {
    double waves = (double)tiles * s / at_once, full = waves / ceil(waves);
    if (full > 1.05 * fullest) fullest = full, best = s;
  }
  return best;
}

// Memory for rounded operands: it grows to what the largest product needs.
static char *rounded;
static size_t rounded_bytes;

static void round_to(char *to, Matrix x, int lines, int all_lines, int K, int row) {
  dim3 grid(all_lines / 32, row / 32);
  if (grid.y > 65535) die("a sum of %d terms is too long for a GPU's grid: lower --batch_size", K);
  RUN(round_kernel<<<grid, THREADS, 0, stream>>>((unsigned *)to, x, lines, K, row));
  profile_moves(1.5 * lines * K);
}

// Lines and K of the rounded operands are filled up with 0, to whole tiles and whole steps.
static void round_operands(Product *p) {
  int K = p->K, row = round_up(K, DEPTH_BF16);
  int a_lines = round_up(p->M, 8*BIG), b_lines = round_up(p->N, 8*BIG);
  size_t bytes = 2L*row * (a_lines + b_lines);
  if (bytes > rounded_bytes) {
    if (rounded) CHECK(cudaFree(rounded));
    rounded = (char *)device_alloc(bytes);
    device_bytes -= rounded_bytes;
    rounded_bytes = bytes;
  }
  p->K = p->slice = row;
  p->rounded_a = rounded;
  p->rounded_b = rounded + 2L*row*a_lines;
  round_to(rounded, p->a, p->M, a_lines, K, row);
  round_to(rounded + 2L*row*a_lines, transpose(p->b), p->N, b_lines, K, row);
}

// A slice should be at least 256 long. Big tiles are used if they and their slices give each
// multiprocessor at least one.
static void matmul(Matrix c, Matrix a, Matrix b, int M, int N, int K, int mode, const real *bias) {
  Product p = {c, a, b, 0, M, N, K, K, mode, bias, NULL, NULL};
  long big = (long)blocks(M, 8*BIG) * blocks(N, 8*BIG), small = (long)blocks(M, 64) * blocks(N, 64);
  long most = MIN(K / 256, n_scratch / MAX((long)M*N, 1));
  int slices = slices_for(big, BIG_AT_ONCE*multiprocessors, most);
  int is_big = big * slices >= multiprocessors, side = is_big ? BIG : 8;
  if (!is_big) slices = slices_for(small, SMALL_AT_ONCE*multiprocessors, most);
  if (rung < 3) slices = 1;
  if (use_bf16) round_operands(&p);
  if (slices > 1) {
    p.c = rows_of(scratch, N); p.c_slice = (long)M*N; p.mode = SET; p.bias = NULL;
    p.slice = round_up(blocks(K, slices), DEPTH_BF16);   // whole steps
    slices = blocks(K, p.slice);
  }
  dim3 grid(blocks(N, 8*side), blocks(M, 8*side), slices);
  if (rung == 1) grid = dim3(M, blocks(N, THREADS));
  if (rung == 2) grid = dim3(blocks(N, BIG), blocks(M, BIG));
  if (grid.y > 65535)
    die("a matrix of %d rows is too large for a GPU's grid: lower --batch_size", M);
  if (rung == 1) RUN(matmul_plain<<<grid, THREADS, 0, stream>>>(p));
  else if (rung == 2) RUN(matmul_shared<<<grid, BIG*BIG, 0, stream>>>(p));
  else if (is_big && use_bf16) RUN(matmul_big_bf16<<<grid, side*side, 0, stream>>>(p));
  else if (is_big) RUN(matmul_big<<<grid, side*side, 0, stream>>>(p));
  else if (use_bf16) RUN(matmul_small_bf16<<<grid, side*side, 0, stream>>>(p));
  else RUN(matmul_small<<<grid, side*side, 0, stream>>>(p));
  profile_flop(2.0 * M * N * K);
  if (slices > 1) add_slices(c, scratch, M, N, slices, mode, bias);
}

// sum[o] += sum_n x[n,o]
static __global__ void add_columns_kernel(real *part, const real *x, int N, int O) {
  int o = blockIdx.x * 32 + threadIdx.x % 32;
  real sum = 0;
  for (long n = ROW_OF_WARP_IN_SLICE; n < N && o < O; n += gridDim.y * WARPS) sum += x[n*O + o];
  store_column(part, o, O, sum);
}

static void add_columns(real *sum, const real *x, int N, int O) {
  int slices = slices_of(N);
  dim3 grid(blocks(O, 32), slices);
  RUN(add_columns_kernel<<<grid, THREADS, 0, stream>>>(scratch, x, N, O));
  profile_moves((double)N * O);
  add_slices(rows_of(sum, O), scratch, 1, O, slices, ADD, NULL);
}

static __global__ void fill_kernel(real *x, long n, real value) {
  long i = FIRST_OF_FOUR;
  store4(x + i, n - i, Real4{{value, value, value, value}});
}

static void fill(real *x, long n, real value) {
  RUN(fill_kernel<<<blocks_of_fours(n), THREADS, 0, stream>>>(x, n, value));
  profile_moves(n);
}

// sums->loss += sum_n loss[n], and likewise correct: a CUDA block for each
static __global__ void add_loss_kernel(LossSums *sums, const real *loss, const real *correct,
                                       int N) {
  const real *x = blockIdx.x ? correct : loss;
  double sum = 0;
  for (int n = threadIdx.x; n < N; n += THREADS) sum += x[n];
  sum = block_sum(sum);
  if (threadIdx.x == 0) *(blockIdx.x ? &sums->correct : &sums->loss) += sum;
}

static void add_loss(LossSums *sums, Tensor loss, Tensor correct, int N) {
  RUN(add_loss_kernel<<<2, THREADS, 0, stream>>>(sums, loss.data, correct.data, N));
}

// *result = sum_i x[i]^2: a CUDA block for each chunk, then one that adds the sums of the chunks
static __global__ void squared_norm_chunk(double *partial, const real *x, long n) {
  double sum = 0;
  for (int i = threadIdx.x; i < CHUNK; i += THREADS) {
    long at = (long)blockIdx.x * CHUNK + i;
    double y = at < n ? x[at] : 0;
    sum += y*y;
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

static __global__ void squared_norm_total(double *result, const double *partial, long n) {
  double sum = 0;
  for (long i = threadIdx.x; i < n; i += THREADS) sum += partial[i];
  sum = block_sum(sum);
  if (threadIdx.x == 0) *result = sum;
}

static void squared_norm(double *result, double *partial, const real *x, long n) {
  RUN(squared_norm_chunk<<<chunks(n), THREADS, 0, stream>>>(partial, x, n));
  profile_moves(n);
  RUN(squared_norm_total<<<1, THREADS, 0, stream>>>(result, partial, chunks(n)));
}

// ---- The fast attention: SIDE queries with SIDE keys at a time

// attention, in each sequence b and head h:
//   z[t,s] = q[t].k[s] / sqrt(D);  att[t,s] = softmax of z[t,:] over s <= t;
//   out[t] = sum_s att[t,s] v[s];  lse[t] = log sum_s exp(z[t,s]); att[t,s] = exp(z[t,s] - lse[t])
// backward:
//   datt[t,s] = dout[t].v[s];      dz[t,s] = att[t,s] (datt[t,s] - dout[t].out[t])
//   dv[s] = sum_t att[t,s] dout[t];  dq[t] = sum_s dz[t,s] k[s] / sqrt(D);
//   dk[s] = sum_t dz[t,s] q[t] / sqrt(D)                     each sum over the pairs with s <= t
//
// The fast forward of train.c takes a few queries with all the keys that they see. Here a CUDA
// block takes SIDE queries with SIDE keys at a time, a tile:
//
//   keys       0..63   64..127  128..191
//   queries  +-------+--------+---------+
//   0..63    | \     |        |         |    On the diagonal a query sees the keys up to its own,
//   64..127  |  all  | \      |         |    below it all of them. Tiles above are skipped.
//   128..191 |  all  |  all   | \       |
//            +-------+--------+---------+
//
// So the softmax of a row goes over several tiles, without having seen the later ones: "online".
// Keep the row's maximum and its sum of exp(z - maximum) so far; if a later tile has a larger
// maximum, multiply what was summed by exp(old - new maximum); after the last tile divide by the
// sum (Milakov and Gimelshein 2018; Dao et al. 2022).
//
// A CUDA block computes SIDE channels of one head's result: all of them if D <= 64. A wider head
// takes several blocks (blockIdx.z), each of which computes att again. Everything is built from one
// operation, the product of two tiles in shared memory: sum[row][column] += x[k][row] y[k][column].
// Each thread has 8 x 4 numbers of the result in registers:
//
//   columns  0..3  4..7  ...  60..63       Thread 17 (TX = 1, TY = 1) has rows 4..7 and 36..39 of
//   rows                                   columns 4..7. The SIDE/4 threads of a row are neighbours
//   0..3     t 0   t 1   ...  t 15         in a warp, so that shuffles add up a row. Its two groups
//   4..7     t 16  t 17  ...  t 31         of rows are 32 apart: so the two TY of a warp read
//   ...                                   neighbouring numbers of x, from different banks; see
//   32..35   t 0   t 1   ...  t 15         swizzled() below.
//   36..39   t 16  t 17  ...  t 31
//
// The forward pass is two such products for each tile of keys. Both operands are read along k, so q
// and k are transposed on the way into shared memory, and so is the result of the first product:
//
//   x[d][t] = q[t][d]  y[d][s] = k[s][d]  ->  z[t][s], in registers: maximum, exp, sum of a row
//   x[s][t] = exp(z[t][s] - maximum)  y[s][d] = v[s][d]  ->  out[t][d] += , in registers until the
//                                                             last tile
//
// With --precision bf16 the products are those of tensor cores (rung 4 above), and a warp has 16
// whole rows of the result. A lane then has SIDE/4 numbers of each of 2 rows: just those that it
// needs as the left operand of the second product, so they never leave its registers. Tiles of bf16
// are small and need not be transposed, so those of a block's own rows are kept over the whole
// loop, and one that several products read is loaded once. In fp32 q would need a third tile of 16
// KB, and only one block would fit on a multiprocessor of a T4 (64 KB); loading it again is one
// instruction for each 50 multiply-adds.
enum {
  SIDE = sizeof(real) == sizeof(float) && WARPS == 8 ? 64 : 32,   // two tiles of 64 x 64 doubles
                                         //   exceed 48 KB of shared memory; small CUDA blocks, of
                                         //   some checkers, get 32, too
  SIDE_LANES = SIDE / 4,
  PART = 32,                             // numbers of a result that a thread has, at most
  FP32_THREADS = SIDE/8 * SIDE/4,
  BF16_THREADS = SIDE/16 * 32,
  FP32_TILE = SIDE*SIDE*(int)sizeof(real), BF16_TILE = SIDE*SIDE*2   // bytes
};
#define TX ((int)threadIdx.x % SIDE_LANES)
#define TY ((int)threadIdx.x / SIDE_LANES)

// A thread's part of a result: part[i*PART_COLUMNS + j], i < PART_ROWS and j < PART_COLUMNS, is in
// row ROW_OF(i) and column COLUMN_OF(j). The macros read `bf16`, a constant argument, 0 or 1, of
// the function that uses them.
#define ROW_LANES (bf16 ? 4 : SIDE_LANES)   // that have numbers of one row: neighbours
#define PART_ROWS (bf16 ? 2 : 8)
#define PART_COLUMNS (bf16 ? SIDE/4 : 4)
#define ROW_OF(i) (bf16 ? (int)threadIdx.x/32*16 + (i)*8 + (int)threadIdx.x%32/4 \
                        : TY*4 + (i)%4 + (i)/4*(SIDE/2))
#define COLUMN_OF(j) (bf16 ? (j)/2*8 + (int)threadIdx.x%4*2 + (j)%2 : TX*4 + (j))

// Where tile[r][c] is. Shared memory has 32 banks; number i of an array is in bank i % 32. A bank
// serves one number at a time, so lanes that want different numbers of one bank wait for each
// other. If each row simply followed the one before, a column would be in one bank. So rows are
// swizzled: the four groups of eight columns change places, in another way for each four rows:
//
//   banks         0..7  8..15  16..23  24..31
//   rows 0..3     0     1      2       3         A warp of load_transposed() stores in rows 0, 4, 8
//   rows 4..7     1     0      3       2         and 12 at once, 8 numbers in each, for example
//   rows 8..11    2     3      0       1         group 0: in 32 different banks. A group of
//   rows 12..15   3     2      1       0         four numbers still is 16 aligned bytes.
static __device__ __forceinline__ int swizzled(int r, int c) {
  return r*SIDE + (c ^ r/4 % 4 * 8);
}

// A tile's rows of q, k, v or dout of one head: number d of row r is x[r*row + d], d < D
typedef struct {
  const real *x;
  long row;                              // from one row to the next
  int left;                              // rows to the end of the sequence; the tile's others are 0
  char *tile;                            // bf16: its place in shared memory,
  int loaded;                            //   and the d whose columns are there; -1: none yet
} Rows;

static __device__ __forceinline__ Rows rows_from(const real *x, long row, int first, int T,
                                                 char *tile) {
  return Rows{x + first*row, row, T - first, tile, -1};
}

typedef struct __align__(8) { unsigned at[2]; } FourBf16;

// tile[r][c] = x[r][d + c]; 0 beyond the rows and beyond D. Four loads are on their way at once.
static __device__ __forceinline__ void load_tile(const int bf16, char *tile, const Rows *x, int d,
                                                 int D) {
  const int apart = (bf16 ? BF16_THREADS : FP32_THREADS) / SIDE_LANES;
  int c = TX*4;
  UNROLL for (int r = TY; r < SIDE; r += 4*apart) {
    Real4 v[4];
    UNROLL for (int l = 0; l < 4; l++)
      v[l] = load4(x->x + (r + l*apart)*x->row + d + c, r + l*apart < x->left ? D - d - c : 0);
    UNROLL for (int l = 0; l < 4; l++)
      if (bf16)
        *(FourBf16 *)(tile + 2*swizzled_bf16(r + l*apart, c, SIDE)) =
            FourBf16{{bf16_pair(v[l].at[0], v[l].at[1]), bf16_pair(v[l].at[2], v[l].at[3])}};
      else *(Real4 *)((real *)tile + swizzled(r + l*apart, c)) = v[l];
  }
}

// tile[c][r] = x[r][d + c]. A warp takes 8 rows x 4 Real4: it loads 64 consecutive bytes of each
// row, and no two lanes store to the same bank.
static __device__ __forceinline__ void load_transposed(real *tile, const Rows *x, int d, int D) {
  for (int c = threadIdx.x / 8 * 4; c < SIDE; c += FP32_THREADS/2)
    for (int r = threadIdx.x % 8; r < SIDE; r += 32) {
      Real4 v[4];
      UNROLL for (int l = 0; l < 4; l++)
        v[l] = load4(x->x + (r + 8*l)*x->row + d + c, r + 8*l < x->left ? D - d - c : 0);
      UNROLL for (int l = 0; l < 4; l++)
        UNROLL for (int j = 0; j < 4; j++) tile[swizzled(c + j, r + 8*l)] = v[l].at[j];
    }
}

// bf16: load_tile(), unless these columns are in the tile already
static __device__ __forceinline__ void load_once(Rows *x, int d, int D) {
  if (x->loaded != d) load_tile(1, x->tile, x, d, D);
  x->loaded = d;
}

// tile[column][row] = this thread's part of a result, which becomes the x of the next product
static __device__ __forceinline__ void store_part(real *tile, const real *part) {
  UNROLL for (int j = 0; j < 4; j++)
    UNROLL for (int i = 0; i < 2; i++) {
      const real *p = part + 16*i + j;   // rows 4*i .. 4*i + 3 of column j
      *(Real4 *)(tile + swizzled(TX*4 + j, TY*4 + i*(SIDE/2))) = Real4{{p[0], p[4], p[8], p[12]}};
    }
}

// sum[row][column] += sum over k < depth of x[k][row] y[k][column], four k at a time: y is 0 from
// depth on, so x may be any finite number there
static __device__ __forceinline__ void multiply_tiles(real *sum, const real *x, const real *y,
                                                      int depth) {
  for (int k = 0; k < depth; k += 4) {
    const real *x0 = x + swizzled(k, TY*4), *x4 = x + swizzled(k, TY*4 + SIDE/2);
    const real *y0 = y + swizzled(k, TX*4);
    UNROLL for (int l = 0; l < 4; l++) {
      Real4 a[2] = {*(const Real4 *)(x0 + l*SIDE), *(const Real4 *)(x4 + l*SIDE)};
      Real4 b = *(const Real4 *)(y0 + l*SIDE);
      UNROLL for (int i = 0; i < 8; i++)
        UNROLL for (int j = 0; j < 4; j++) sum[i*4 + j] += a[i / 4].at[i % 4] * b.at[j];
    }
  }
}

// The same on tensor cores, for the warp's 16 rows and 16 numbers of k. x is the A of mma_bf16().
static __device__ __forceinline__ void multiply_strip(real *sum, const unsigned *x,
                                                      const char *y_tile, int k, int along) {
  UNROLL for (int e = 0; e < SIDE/4; e += 4) {   // 16 columns, of which a lane has 4
    unsigned y[4];
    load_bf16(y, bf16_address(y_tile, SIDE, 4*e, k, 0, along), along);
    mma_bf16(sum + e, sum + SIDE/4 + e, x, y);
    mma_bf16(sum + e + 2, sum + SIDE/4 + e + 2, x, y + 2);
  }
}

// sum[i][j] = x[i].y[j]
static __device__ __forceinline__ void dot_rows(const int bf16, real *sum, real *shared, Rows *x,
                                                Rows *y, int D) {
  UNROLL for (int n = 0; n < PART; n++) sum[n] = 0;
  for (int d = 0; d < D; d += SIDE) {
    __syncthreads();                     // the last product has read the tiles
    if (bf16) {
      load_once(x, d, D);
      load_once(y, d, D);
    } else {
      load_transposed(shared, x, d, D);
      load_transposed(shared + SIDE*SIDE, y, d, D);
    }
    __syncthreads();                     // the tiles have been written
    if (!bf16) multiply_tiles(sum, shared, shared + SIDE*SIDE, MIN(SIDE, D - d));
    else
      UNROLL for (int k = 0; k < SIDE; k += 16) {
        unsigned a[4];
        load_bf16(a, bf16_address(x->tile, SIDE, threadIdx.x/32*16, k, 1, 1), 1);
        multiply_strip(sum, a, y->tile, k, 1);
      }
  }
}

// sum[i] += sum_k part[i][k] y[k], for a result `part`, and of each y[k] the columns from d on
static __device__ __forceinline__ void add_product(const int bf16, real *sum, real *shared,
                                                   const real *part, Rows *y, int d, int D) {
  __syncthreads();                       // the last product has read the tiles
  if (bf16) load_once(y, d, D);
  else {
    store_part(shared, part);
    load_tile(0, (char *)(shared + SIDE*SIDE), y, d, D);
  }
  __syncthreads();                       // the tiles have been written
  if (!bf16) multiply_tiles(sum, shared, shared + SIDE*SIDE, MIN(SIDE, y->left));
  else
    UNROLL for (int k = 0; k < SIDE; k += 16) {
      unsigned a[4];
      UNROLL for (int i = 0; i < 4; i++) {
        const real *pair = part + i%2*PART_COLUMNS + k/4 + i/2*2;
        a[i] = bf16_pair(pair[0], pair[1]);
      }
      multiply_strip(sum, a, y->tile, k, 0);
    }
}

// x[i] = this thread's part of a result, for the rows and columns that exist
static __device__ __forceinline__ void store_rows(const int bf16, real *x, long row, int rows,
                                                  int columns, const real *part) {
  const int n = bf16 ? 2 : 4;            // consecutive numbers; of 2, store4() takes p[0] and p[1]
  UNROLL for (int i = 0; i < PART_ROWS; i++)
    UNROLL for (int j = 0; j < PART_COLUMNS; j += n) {
      const real *p = part + i*PART_COLUMNS + j;
      if (ROW_OF(i) < rows)
        store4(x + ROW_OF(i)*row + COLUMN_OF(j), MIN(n, columns - COLUMN_OF(j)),
               Real4{{p[0], p[1], p[n - 2], p[n - 1]}});
    }
}

typedef struct {                         // what the kernels read and write
  real *out, *lse, *dqkv, *dout_dot_out;
  const real *qkv, *dout;
  int T, C, H;
} Attention;

static __device__ __forceinline__ void attention_forward_tile(const int bf16, Attention p,
                                                              char *shared) {
  int T = p.T, D = p.C / p.H, b = blockIdx.x / p.H, h = blockIdx.x % p.H, d0 = blockIdx.z * SIDE;
  int i = (gridDim.y - 1 - blockIdx.y) * SIDE;   // the last have the most work: they start first
  long row = 3L*p.C;
  const real *q = p.qkv + b*T*row + h*D, *k = q + p.C, *v = k + p.C;
  Rows q_i = rows_from(q, row, i, T, shared);
  real scale = 1 / sqrt((real)D), z[PART], o[PART] = {0}, max[8], sum[8];
  UNROLL for (int r = 0; r < PART_ROWS; r++) max[r] = -INFINITY, sum[r] = 0;
  for (int j = 0; j <= i; j += SIDE) {
    Rows k_j = rows_from(k, row, j, T, shared + BF16_TILE);
    Rows v_j = rows_from(v, row, j, T, shared + 2*BF16_TILE);
    dot_rows(bf16, z, (real *)shared, &q_i, &k_j, D);
    UNROLL for (int r = 0; r < PART_ROWS; r++) {
      int seen = i + ROW_OF(r) - j + 1;  // keys s <= t; at least one in each tile
      real new_max = max[r], *z_r = z + r*PART_COLUMNS, *o_r = o + r*PART_COLUMNS;
      UNROLL for (int c = 0; c < PART_COLUMNS; c++) {
        z_r[c] *= scale;
        if (COLUMN_OF(c) < seen) new_max = MAX(new_max, z_r[c]);
      }
      for (int lanes = ROW_LANES / 2; lanes > 0; lanes /= 2) {
        real other = __shfl_xor_sync(ALL_LANES, new_max, lanes);
        new_max = MAX(new_max, other);
      }
      real rescale = exp_(max[r] - new_max);   // of what was summed; 0 the first time
      max[r] = new_max;
      sum[r] *= rescale;
      UNROLL for (int c = 0; c < PART_COLUMNS; c++) {
        o_r[c] *= rescale;
        z_r[c] = COLUMN_OF(c) < seen ? exp_(z_r[c] - new_max) : 0;
        sum[r] += z_r[c];                // of this thread's columns; see below
      }
    }
    add_product(bf16, o, (real *)shared, z, &v_j, d0, D);
  }
  UNROLL for (int r = 0; r < PART_ROWS; r++) {
    for (int lanes = ROW_LANES / 2; lanes > 0; lanes /= 2)   // of all columns
      sum[r] += __shfl_xor_sync(ALL_LANES, sum[r], lanes);
    UNROLL for (int c = 0; c < PART_COLUMNS; c++) o[r*PART_COLUMNS + c] /= sum[r];
    if (COLUMN_OF(0) == 0 && d0 == 0 && i + ROW_OF(r) < T)
      p.lse[(long)blockIdx.x*T + i + ROW_OF(r)] = max[r] + log(sum[r]);
  }
  store_rows(bf16, p.out + ((long)b*T + i)*p.C + h*D + d0, p.C, T - i, D - d0, o);
}

// dout_dot_out[b,h,t] = dout[t].out[t]
static __global__ void attention_backward_dot(real *dout_dot_out, const real *out,
                                              const real *dout, int B, int T, int C, int H) {
  long i = ROW_OF_WARP;                  // (b*H + h)*T + t
  if (i >= (long)B*H*T) return;
  long at = (i/T/H*T + i%T)*C + i/T%H*(C/H);
  real sum = 0;
  for (int d = threadIdx.x % 32; d < C/H; d += 32) sum += dout[at + d] * out[at + d];
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) dout_dot_out[i] = sum;
}

// dq: a CUDA block owns SIDE queries and goes through the keys that they see. In C one thread owns
// the whole head, and can add dq, dk and dv together; here dk and dv have a kernel of their own, in
// which a block owns keys.
static __device__ __forceinline__ void attention_backward_q_tile(const int bf16, Attention p,
                                                                 char *shared) {
  int T = p.T, D = p.C / p.H, b = blockIdx.x / p.H, h = blockIdx.x % p.H, d0 = blockIdx.z * SIDE;
  int i = (gridDim.y - 1 - blockIdx.y) * SIDE;
  long row = 3L*p.C, head = b*T*row + h*D, first = (long)blockIdx.x * T;   // of lse, dout_dot_out
  const real *q = p.qkv + head, *k = q + p.C, *v = k + p.C;
  Rows q_i = rows_from(q, row, i, T, shared);
  Rows dout_i = rows_from(p.dout + (long)b*T*p.C + h*D, p.C, i, T, shared + BF16_TILE);
  real scale = 1 / sqrt((real)D), z[PART], dz[PART], dq[PART] = {0}, lse[8], dot[8];
  UNROLL for (int r = 0; r < PART_ROWS; r++) {
    int t = i + ROW_OF(r);
    lse[r] = t < T ? p.lse[first + t] : 0;
    dot[r] = t < T ? p.dout_dot_out[first + t] : 0;
  }
  for (int j = 0; j <= i; j += SIDE) {
    Rows k_j = rows_from(k, row, j, T, shared + 2*BF16_TILE);
    Rows v_j = rows_from(v, row, j, T, shared + 3*BF16_TILE);
    dot_rows(bf16, z, (real *)shared, &q_i, &k_j, D);
    dot_rows(bf16, dz, (real *)shared, &dout_i, &v_j, D);   // datt, for now
    UNROLL for (int r = 0; r < PART_ROWS; r++)
      UNROLL for (int c = 0; c < PART_COLUMNS; c++) {
        int t = i + ROW_OF(r), s = j + COLUMN_OF(c), n = r*PART_COLUMNS + c;
        real att = s <= t && t < T ? exp_(z[n] * scale - lse[r]) : 0;
        dz[n] = att * (dz[n] - dot[r]) * scale;   // dz of above / sqrt(D)
      }
    add_product(bf16, dq, (real *)shared, dz, &k_j, d0, D);
  }
  store_rows(bf16, p.dqkv + head + i*row + d0, row, T - i, D - d0, dq);
}

// dk and dv: a CUDA block owns SIDE keys and goes through the queries that see them. So here the
// rows of a tile are keys s, and the columns are queries t.
static __device__ __forceinline__ void attention_backward_kv_tile(const int bf16, Attention p,
                                                                  char *shared) {
  int T = p.T, D = p.C / p.H, b = blockIdx.x / p.H, h = blockIdx.x % p.H, d0 = blockIdx.z * SIDE;
  int j = blockIdx.y * SIDE;
  long row = 3L*p.C, head = b*T*row + h*D, first = (long)blockIdx.x * T;
  const real *q = p.qkv + head, *dout = p.dout + (long)b*T*p.C + h*D;
  Rows k_j = rows_from(q + p.C, row, j, T, shared);
  Rows v_j = rows_from(q + 2*p.C, row, j, T, shared + BF16_TILE);
  real scale = 1 / sqrt((real)D), z[PART], dz[PART], dk[PART] = {0}, dv[PART] = {0};
  for (int i = j; i < T; i += SIDE) {
    Rows q_i = rows_from(q, row, i, T, shared + 2*BF16_TILE);
    Rows dout_i = rows_from(dout, p.C, i, T, shared + 3*BF16_TILE);
    dot_rows(bf16, z, (real *)shared, &k_j, &q_i, D);
    dot_rows(bf16, dz, (real *)shared, &v_j, &dout_i, D);   // datt, for now
    UNROLL for (int c = 0; c < PART_COLUMNS; c++) {
      int t = i + COLUMN_OF(c);
      real lse = t < T ? p.lse[first + t] : 0, dot = t < T ? p.dout_dot_out[first + t] : 0;
      UNROLL for (int r = 0; r < PART_ROWS; r++) {
        int n = r*PART_COLUMNS + c;
        z[n] = j + ROW_OF(r) <= t && t < T ? exp_(z[n] * scale - lse) : 0;   // att
        dz[n] = z[n] * (dz[n] - dot) * scale;   // dz of above / sqrt(D)
      }
    }
    add_product(bf16, dv, (real *)shared, z, &dout_i, d0, D);
    add_product(bf16, dk, (real *)shared, dz, &q_i, d0, D);
  }
  store_rows(bf16, p.dqkv + head + p.C + j*row + d0, row, T - j, D - d0, dk);
  store_rows(bf16, p.dqkv + head + 2*p.C + j*row + d0, row, T - j, D - d0, dv);
}

// The kernels are these functions with `bf16` decided.
//
// Occupancy: while a warp waits for memory or at a barrier, its multiprocessor runs another one.
// How many CUDA blocks fit on it at once depends on their shared memory, threads and registers, of
// which it has 65536. The second launch bound asks the compiler for so few registers that this
// many fit.
#define ATTENTION_KERNEL(name, tile, bf16, bytes, at_once)                                    \
  static __global__ void __launch_bounds__((bf16) ? BF16_THREADS : FP32_THREADS, at_once)     \
  name(Attention p) {                                                                         \
    __shared__ __align__(16) char shared[bytes];                                              \
    tile(bf16, p, shared);                                                                    \
  }
ATTENTION_KERNEL(attention_forward_fp32, attention_forward_tile, 0, 2*FP32_TILE, 3)
ATTENTION_KERNEL(attention_forward_bf16, attention_forward_tile, 1, 3*BF16_TILE, 4)
ATTENTION_KERNEL(attention_backward_q_fp32, attention_backward_q_tile, 0, 2*FP32_TILE, 2)
ATTENTION_KERNEL(attention_backward_q_bf16, attention_backward_q_tile, 1, 4*BF16_TILE, 3)
ATTENTION_KERNEL(attention_backward_kv_fp32, attention_backward_kv_tile, 0, 2*FP32_TILE, 2)
ATTENTION_KERNEL(attention_backward_kv_bf16, attention_backward_kv_tile, 1, 4*BF16_TILE, 2)

static void attention_forward(Tensor out, Tensor lse, Tensor qkv, int B, int T, int C, int H) {
  Attention p = {out.data, lse.data, NULL, NULL, qkv.data, NULL, T, C, H};
  dim3 grid(B*H, blocks(T, SIDE), blocks(C/H, SIDE));
  if (use_bf16) RUN(attention_forward_bf16<<<grid, BF16_THREADS, 0, stream>>>(p));
  else RUN(attention_forward_fp32<<<grid, FP32_THREADS, 0, stream>>>(p));
  profile_flop(2.0*B*T*T*C);
}

static void attention_backward(Tensor out, Tensor lse, Tensor qkv, int B, int T, int C, int H) {
  Attention p = {out.data, lse.data, qkv.grad, scratch, qkv.data, out.grad, T, C, H};
  dim3 grid(B*H, blocks(T, SIDE), blocks(C/H, SIDE));
  if ((long)B*H*T > n_scratch)
    die("attention of %d x %d x %d rows needs more scratch memory: lower --batch_size", B, H, T);
  RUN(attention_backward_dot<<<blocks((long)B*H*T, WARPS), THREADS, 0, stream>>>(
      scratch, out.data, out.grad, B, T, C, H));
  profile_moves(2.0 * B*T * C);
  if (use_bf16) RUN(attention_backward_q_bf16<<<grid, BF16_THREADS, 0, stream>>>(p));
  else RUN(attention_backward_q_fp32<<<grid, FP32_THREADS, 0, stream>>>(p));
  profile_flop(3.0*B*T*T*C);
  if (use_bf16) RUN(attention_backward_kv_bf16<<<grid, BF16_THREADS, 0, stream>>>(p));
  else RUN(attention_backward_kv_fp32<<<grid, FP32_THREADS, 0, stream>>>(p));
  profile_flop(4.0*B*T*T*C);             // z and datt are computed again
}

// ---- 7. Device memory and launches ------------------------------------------------------------

// After copy_in() the caller may change its memory. So a copy, like the tokens of a micro-batch,
// first goes to a slot of "pinned" memory, which the GPU can read by itself, and copy_in() returns
// at once: the CPU can be ahead of the GPU by up to SLOTS copies.
enum { SLOTS = 16, SLOT_BYTES = 256 << 10 };
static struct { void *memory; cudaEvent_t sent; } slot[SLOTS];

// Multiply-adds that a multiprocessor does in a cycle, from this compute capability on. bf16 of
// 8.6, 8.9 and 12.0 is that of GeForce; cards for workstations and data centers do 512 there.
static const struct { int since, fp32, bf16; } PEAK[] = {
  {0, 192, 0}, {50, 128, 0}, {60, 64, 0}, {61, 128, 0}, {70, 64, 0}, {80, 64, 1024}, {86, 128, 256},
  {90, 128, 2048}, {100, 128, 4096}, {120, 128, 256}};
static double peak_fp32, peak_bf16, bandwidth;   // operations and bytes in a second

static void find_peaks(int capability) {
  int kilohertz, memory_kilohertz, bits;
  CHECK(cudaDeviceGetAttribute(&kilohertz, cudaDevAttrClockRate, 0));
  CHECK(cudaDeviceGetAttribute(&memory_kilohertz, cudaDevAttrMemoryClockRate, 0));
  CHECK(cudaDeviceGetAttribute(&bits, cudaDevAttrGlobalMemoryBusWidth, 0));
  double cycles = 1e3 * kilohertz * multiprocessors;
  for (size_t i = 0; i < sizeof PEAK / sizeof *PEAK; i++)
    if (PEAK[i].since <= capability)
      peak_fp32 = 2 * PEAK[i].fp32 * cycles, peak_bf16 = 2 * PEAK[i].bf16 * cycles;
  bandwidth = 2 * 1e3 * memory_kilohertz * bits / 8;   // 2: data moves twice in a cycle
}

static const char *device_start(int threads, const char *precision) {
  static char name[320];
  int devices = 0;
  (void)threads;                         // of the CPU
  cudaError_t error = cudaGetDeviceCount(&devices);
  if (error != cudaSuccess || devices == 0)
    die("no CUDA device (the driver says: %s): ./train does the same on the CPU",
        error != cudaSuccess ? cudaGetErrorString(error) : "none is visible");
  CHECK(cudaSetDevice(0));               // the fastest, unless CUDA_VISIBLE_DEVICES says otherwise
  cudaDeviceProp gpu;
  CHECK(cudaGetDeviceProperties(&gpu, 0));
  cudaFuncAttributes attributes;         // of any kernel: is there code for this GPU?
  error = cudaFuncGetAttributes(&attributes, (const void *)fill_kernel);
  if (error != cudaSuccess)
    die("this program has no code for %s (%s): make -B train_gpu ARCH=sm_%d%d", gpu.name,
        cudaGetErrorString(error), gpu.major, gpu.minor);
  multiprocessors = gpu.multiProcessorCount;
  find_peaks(10*gpu.major + gpu.minor);
  // The code counts, not only the GPU: compiled for an older one, it has no bf16.
  compute_capability = MIN(10*gpu.major + gpu.minor, attributes.ptxVersion);
  use_bf16 = strcmp(precision, "bf16") == 0;
  if (!use_bf16 && strcmp(precision, "fp32"))
    die("--precision %s: expected fp32 or bf16", precision);
  if (use_bf16 && compute_capability < 80)
    die("--precision bf16 needs compute capability 8.0; this GPU has %d.%d, and this program was "
        "compiled for %d.%d: use fp32, or make -B train_gpu", gpu.major, gpu.minor,
        attributes.ptxVersion / 10, attributes.ptxVersion % 10);
  if (getenv("RUNG")) rung = atoi(getenv("RUNG"));
  if (rung < 1 || rung > 3 || (rung < 3 && use_bf16))
    die("RUNG=%d: expected 1, 2 or 3; the fourth is --precision bf16, without RUNG", rung);
  if (stream) return name;               // a second call
  CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  for (int i = 0; i < SLOTS; i++) {
    CHECK(cudaMallocHost(&slot[i].memory, SLOT_BYTES));
    CHECK(cudaEventCreateWithFlags(&slot[i].sent, cudaEventDisableTiming));
  }
  size_t bytes = MIN((size_t)64 << 20, gpu.totalGlobalMem / 64);
  scratch = (real *)device_alloc(bytes);
  n_scratch = bytes / sizeof(real);
  snprintf(name, sizeof name, "%s, %d multiprocessors, %.0f GB", gpu.name, multiprocessors,
           gpu.totalGlobalMem / 1e9);
  return name;
}

static void launch(void (*work)(void *), void *argument) { work(argument); }

// A training step of a small model is two hundred kernels of a few microseconds, and launching a
// kernel costs the CPU as much. So the second time that the same work comes with the same argument,
// its kernels are recorded as a graph; this graph is launched, in one call, then and each time
// after. (The first time the kernels are launched one by one: the driver loads them only then,
// which cannot be recorded.)
enum { RECORDINGS = 8, ARGUMENT_BYTES = 64 };
static struct Recording {
  void (*work)(void *);
  char argument[ARGUMENT_BYTES];
  size_t bytes;
  cudaGraphExec_t graph;
} recording[RECORDINGS];
static int recordings;

static void launch_recorded(void (*work)(void *), void *argument, size_t bytes) {
  struct Recording *r = recording;
  while (r < recording + recordings && (r->work != work || r->bytes != bytes ||
                                        memcmp(r->argument, argument, bytes))) r++;
  if (opt.profile || bytes > ARGUMENT_BYTES || r == recording + RECORDINGS) {
    work(argument);                      // a replay could not be measured kernel by kernel
    return;
  }
  if (r == recording + recordings) {     // the first time
    recordings++;
    r->work = work; r->bytes = bytes;
    memcpy(r->argument, argument, bytes);
    work(argument);
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

static void forget_recordings(void) {
  for (int i = 0; i < recordings; i++)
    if (recording[i].graph) CHECK(cudaGraphExecDestroy(recording[i].graph));
  memset(recording, 0, sizeof recording);
  recordings = 0;
}

static void *device_alloc(size_t bytes) {
  void *p = NULL;
  forget_recordings();                   // a new Model may have the address of an old one
  cudaError_t error = cudaMalloc(&p, MAX(bytes, 1));
  if (error == cudaErrorMemoryAllocation) {
    size_t left = 0, total = 0;
    CHECK(cudaMemGetInfo(&left, &total));
    die("no GPU memory for %.1f MB: %.1f of %.1f MB are free; lower " LOWER, bytes / 1e6,
        left / 1e6, total / 1e6);
  }
  CHECK(error);
  CHECK(cudaMemsetAsync(p, 0, MAX(bytes, 1), stream));
  device_bytes += bytes;
  return p;
}

static void copy_in(void *device, const void *host, size_t bytes) {
  static int next;
  for (size_t at = 0, part; at < bytes; at += part, next = (next + 1) % SLOTS) {
    void *memory = slot[next].memory;
    part = MIN(bytes - at, (size_t)SLOT_BYTES);
    CHECK(cudaEventSynchronize(slot[next].sent));   // the copy of SLOTS copies ago
    memcpy(memory, (const char *)host + at, part);
    CHECK(cudaMemcpyAsync((char *)device + at, memory, part, cudaMemcpyHostToDevice, stream));
    CHECK(cudaEventRecord(slot[next].sent, stream));
  }
}

// For --profile an event marks the end of each kernel in the stream, and a kernel is charged the
// time since the event before it. The marks are read when the stream's work is done anyway, as in
// copy_out(): if the CPU waited at each mark, the next kernel would be charged its launch, too. (A
// kernel shorter than a launch, a few microseconds, still is: the GPU then waits for the CPU.)
enum { MARKS = 1024 };
static struct { cudaEvent_t end; struct Profile *kernel; } mark[MARKS];
static int marks;

static void set_mark(struct Profile *kernel) {
  if (!mark[marks].end) CHECK(cudaEventCreate(&mark[marks].end));
  CHECK(cudaEventRecord(mark[marks].end, stream));
  mark[marks++].kernel = kernel;
}

static void profile_moves(double numbers) { profiled->bytes += numbers * sizeof(real); }

// How near a kernel comes to its limit, at the GPU's highest clock
static const char *profile_share(const struct Profile *p) {
  static char text[64];
  double peak = strstr(p->name, "bf16") ? peak_bf16 : peak_fp32;
  *text = 0;
  if (p->flop)
    snprintf(text, sizeof text, " %5.1f %% of the peak", 100 * p->flop / p->seconds / peak);
  else if (p->bytes)
    snprintf(text, sizeof text, " %5.1f %% of the bandwidth",
             100 * p->bytes / p->seconds / bandwidth);
  return text;
}

static void read_marks(void) {
  for (int i = 1; i < marks; i++) {
    float milliseconds;
    CHECK(cudaEventElapsedTime(&milliseconds, mark[i - 1].end, mark[i].end));
    mark[i].kernel->seconds += 1e-3 * milliseconds;
  }
  marks = 0;
}

static void copy_out(void *host, const void *device, size_t bytes) {
  CHECK(cudaMemcpyAsync(host, device, bytes, cudaMemcpyDeviceToHost, stream));
  CHECK(cudaStreamSynchronize(stream));  // the CPU waits here until all work is done
  read_marks();
}

static void launching(void) {            // before each launch
  if (marks == MARKS) {
    CHECK(cudaEventSynchronize(mark[MARKS - 1].end));
    read_marks();
  }
  if (opt.profile && marks == 0) set_mark(NULL);   // where the first kernel begins
}

static void launched(const char *call) {   // after each launch
  char kernel[40];
  if (!strncmp(call, "LAUNCH(", 7)) call += 7;   // the emulator's way to write a launch
  snprintf(kernel, sizeof kernel, "%.*s", (int)strcspn(call, "<,("), call);
  cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) die("kernel %s did not start: %s", kernel, cudaGetErrorString(error));
  if (!opt.profile) return;
  profile_add(kernel, 0);                // counts the call; the time follows in read_marks()
  set_mark(profiled);
}
