// train_gpu.cu is train.c for NVIDIA GPUs: the functions of its layer interface as CUDA kernels.
// The only library is the CUDA runtime. The rest, from the model to main(), is train.c itself,
// which is included below.
//
// Read it beside train.c. The sections have the same numbers, and a function has the same name,
// arguments and equations; its kernels stand directly above it. A loop there is a launch here:
//
//   parallel_for (n, N) { ... }           kernel<<<N / rows of a CUDA block, threads>>>(...)
//   the barrier at its end                the next launch: a stream runs its kernels one by one
//   for (c = 0; c < C; c++) inside        for (c = lane; c < C; c += 32): a warp shares the row
//   sum += ...                            a sum in each lane, then warp_sum()
//
// A GPU runs thousands of threads, in CUDA blocks of a few hundred. 32 consecutive threads, the
// lanes of a warp, execute one instruction together. Three rules follow:
//   - Consecutive lanes access consecutive addresses ("coalesced"). Device memory moves in sectors
//     of 32 bytes, and a load of a warp takes as long as the number of sectors that it touches. So
//     the index that is consecutive in memory is the lane.
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
#define UNROLL _Pragma("unroll")         // for arrays in registers, which cannot be indexed
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
#define WARPS 8                          // of a CUDA block; the search for races takes 2
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

static int blocks(long n, long each) { return (int)((n + each - 1) / each); }

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
}

// dx = dy ((1 + h)/2 + x (1 - h^2)/2 du/dx), du/dx = a (1 + 3 b x^2)
static __global__ void gelu_backward_kernel(real *dx, const real *dy, const real *x, long n) {
  long i = FIRST_OF_FOUR;
  Real4 v = load4(x + i, n - i), g = load4(dy + i, n - i);
  UNROLL for (int j = 0; j < 4; j++) {
    real x_i = v.at[j], h = tanh_(GELU_A * (x_i + GELU_B * x_i * x_i * x_i));
    real du = GELU_A * (1 + 3 * GELU_B * x_i * x_i);
    g.at[j] *= (1 + h) / 2 + x_i * (1 - h*h) / 2 * du;
  }
  store4(dx + i, n - i, g);
}

static void gelu_backward(Tensor y, Tensor x, int N, int C) {
  long n = (long)N*C;
  RUN(gelu_backward_kernel<<<blocks_of_fours(n), THREADS, 0, stream>>>(
      x.grad, y.grad, x.data, n));
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
      UNROLL for (int i = 0; i < count; i++) sum += dout[(long)list[i]*C + c];
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
  real sum = 0, squares = 0;
  for (int c = lane; c < C; c += 32) sum += x[n*C + c];
  real mean = warp_sum(sum) / C;
  for (int c = lane; c < C; c += 32) squares += (x[n*C + c] - mean) * (x[n*C + c] - mean);
  real rstd = 1 / sqrt(warp_sum(squares) / C + (real)1e-5);
  for (int c = lane; c < C; c += 32) out[n*C + c] = (x[n*C + c] - mean) * rstd * w[c] + b[c];
  if (lane == 0) mean_rstd[2*n] = mean;
  if (lane == 0) mean_rstd[2*n + 1] = rstd;
}

static void layernorm_forward(Tensor out, Tensor mean_rstd, Tensor x, WeightBias p, int N, int C) {
  RUN(layernorm_forward_kernel<<<blocks(N, WARPS), THREADS, 0, stream>>>(
      out.data, mean_rstd.data, x.data, p.weight.data, p.bias.data, N, C));
}

// g[n,c] = dout[n,c] w[c]; dx[n,c] += rstd (g - avg_c(g) - xhat avg_c(g xhat)). Shifting or scaling
// a row of x does not change out, so dx has no component in these two directions.
static __global__ void layernorm_backward_x(real *dx, const real *dout, const real *mean_rstd,
                                            const real *x, const real *w, int N, int C) {
  long n = ROW_OF_WARP;
  int lane = threadIdx.x % 32;
  if (n >= N) return;
  real mean = mean_rstd[2*n], rstd = mean_rstd[2*n + 1], g = 0, g_xhat = 0;
  for (int c = lane; c < C; c += 32) {
    g += dout[n*C + c] * w[c];
    g_xhat += dout[n*C + c] * w[c] * ((x[n*C + c] - mean) * rstd);
  }
  real avg_g = warp_sum(g) / C, avg_g_xhat = warp_sum(g_xhat) / C;
  for (int c = lane; c < C; c += 32)
    dx[n*C + c] += rstd * (dout[n*C + c] * w[c] - avg_g - (x[n*C + c] - mean) * rstd * avg_g_xhat);
}

// Sums over the rows of a matrix, for each column. A CUDA block takes 32 columns, one for each
// lane, so that a warp reads 32 consecutive numbers. The rows are dealt out in turn: to the warps
// of a block, and to the `slices` blocks that share the columns. store_column() adds the sums of a
// block's warps; the sums of the slices go to scratch, and add_slices() adds them.
enum { COLUMN_SLICES = 32 };
static int slices_of(int N) { return MIN(COLUMN_SLICES, blocks(N, 4*WARPS)); }

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

static void add_slices(Matrix c, const real *part, int M, int N, int slices, int mode,
                       const real *bias);   // see section 6

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
  RUN(layernorm_backward_w<<<grid, THREADS, 0, stream>>>(
      scratch, out.grad, mean_rstd.data, x.data, N, C));
  add_slices(rows_of(p.weight.grad, C), scratch, 1, C, slices, ADD, NULL);
  // db[c] += sum_n dout[n,c]
  add_columns(p.bias.grad, out.grad, N, C);
}

// softmax cross-entropy: loss[n] = -log p[n,target[n]], p[n,v] = exp(logits[n,v] - row_lse[n]),
// row_lse[n] = log sum_v exp(logits[n,v]). correct[n] is 1 if the target has the largest logit; of
// several that are equal, the first counts. A row of V logits can have tens of thousands of
// numbers: a CUDA block takes it, not a warp.
static int threads_for(int n) { return MIN(THREADS, blocks(n, 32) * 32); }

static __global__ void crossentropy_forward_kernel(real *loss, real *correct, real *row_lse,
                                                   const real *logits, const int *target, int V) {
  int n = blockIdx.x;
  const real *logits_n = logits + (long)n*V;
  real max = logits_n[0], sum = 0;
  for (int v = threadIdx.x; v < V; v += blockDim.x) max = MAX(max, logits_n[v]);
  max = block_max(max);                  // subtracted, so that exp cannot overflow
  int earlier = 0;                       // is there an equal logit before the target's?
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
}

// attention, in each sequence b and head h:
//   z[t,s] = q[t].k[s] / sqrt(D);  att[t,s] = softmax of z[t,:] over s <= t;
//   out[t] = sum_s att[t,s] v[s];  lse[t] = log sum_s exp(z[t,s]); att[t,s] = exp(z[t,s] - lse[t])
// backward:
//   datt[t,s] = dout[t].v[s];      dz[t,s] = att[t,s] (datt[t,s] - dout[t].out[t])
//   dv[s] = sum_t att[t,s] dout[t];  dq[t] = sum_s dz[t,s] k[s] / sqrt(D);
//   dk[s] = sum_t dz[t,s] q[t] / sqrt(D)                     each sum over the pairs with s <= t
//
// train.c takes a few queries with all the keys that they see. Here a CUDA block takes SIDE queries
// with SIDE keys at a time, a tile:
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
// A CUDA block has one head, and SIDE of its channels: all of a head of 64. A wider head has
// several blocks, each of which computes att again. Everything is built from one operation, the
// product of two tiles in shared memory, x[k][row] and y[k][column]. Each thread has 8 x 4 numbers
// of the result in registers:
//
//   columns  0..3  4..7  ...  60..63       Thread 17 (TX = 1, TY = 1) has rows 4..7 and 36..39 of
//   rows                                   columns 4..7. The SIDE/4 threads of a row are neighbours
//   0..3     t 0   t 1   ...  t 15         in a warp, so that shuffles add up a row. Its two groups
//   4..7     t 16  t 17  ...  t 31         of rows are 32 apart: so the two TY of a warp read
//   ...                                   neighbouring numbers of x, from different banks; see
//   32..35   t 0   t 1   ...  t 15         at() below.
//   36..39   t 16  t 17  ...  t 31
//
// The forward pass is two such products for each tile of keys. Both operands are read along k, so q
// and k are transposed on the way into shared memory, and so is the result of the first product:
//
//   x[d][t] = q[t][d]  y[d][s] = k[s][d]  ->  z[t][s], in registers: maximum, exp, sum of a row
//   x[s][t] = z[t][s]  y[s][d] = v[s][d]  ->  out[t][d] += , in registers until the last tile
enum {
  SIDE = sizeof(real) == sizeof(float) && WARPS == 8 ? 64 : 32,   // two tiles of 64 x 64 doubles
                                         //   exceed 48 KB of shared memory; small CUDA blocks (the
                                         //   checker's) get 32, too
  SIDE_LANES = SIDE / 4,
  SIDE_THREADS = SIDE/8 * SIDE/4
};
#define TX ((int)threadIdx.x % SIDE_LANES)
#define TY ((int)threadIdx.x / SIDE_LANES)
#define ROW_OF(i) (TY*4 + (i)%4 + (i)/4*(SIDE/2))   // of this thread's number [i][j]
#define COLUMN_OF(j) (TX*4 + (j))

// Where tile[r][c] is. Shared memory has 32 banks; number i of an array is in bank i % 32. A bank
// serves one number at a time, so lanes that want different numbers of one bank wait for each
// other. If each row simply followed the one before, a column would be in one bank. So the groups
// of eight of a row are exchanged, in another way in each four rows ("swizzled"):
//
//   banks         0..7  8..15  16..23  24..31
//   rows 0..3     0     1      2       3         A warp of load_transposed() stores in rows 0, 4, 8
//   rows 4..7     1     0      3       2         and 12 at once, 8 numbers in each, for example
//   rows 8..11    2     3      0       1         group 0: in 32 different banks. A group of
//   rows 12..15   3     2      1       0         four numbers still is 16 aligned bytes.
static __device__ __forceinline__ int at(int r, int c) {
  return r*SIDE + (c ^ r/4 % 4 * 8);
}

// tile[r][c] = x[r*row + c]; 0 beyond `rows` and `columns`. Four loads are on their way at once.
static __device__ __forceinline__ void load_tile(real *tile, const real *x, long row, int rows,
                                                 int columns) {
  for (int r = TY, c = TX*4; r < SIDE; r += SIDE/2) {
    Real4 v[4];
    UNROLL for (int l = 0; l < 4; l++)
      v[l] = load4(x + (r + l*SIDE/8)*row + c, r + l*SIDE/8 < rows ? columns - c : 0);
    UNROLL for (int l = 0; l < 4; l++) *(Real4 *)(tile + at(r + l*SIDE/8, c)) = v[l];
  }
}

// tile[c][r] = x[r*row + c]. A warp takes 8 rows x 4 Real4: it loads 64 consecutive bytes of each
// row, and no two lanes store to the same bank.
static __device__ __forceinline__ void load_transposed(real *tile, const real *x, long row,
                                                       int rows, int columns) {
  for (int c = threadIdx.x / 8 * 4; c < SIDE; c += SIDE_THREADS/2)
    for (int r = threadIdx.x % 8; r < SIDE; r += 32) {
      Real4 v[4];
      UNROLL for (int l = 0; l < 4; l++)
        v[l] = load4(x + (r + 8*l)*row + c, r + 8*l < rows ? columns - c : 0);
      UNROLL for (int l = 0; l < 4; l++)
        UNROLL for (int j = 0; j < 4; j++) tile[at(c + j, r + 8*l)] = v[l].at[j];
    }
}

// tile[column][row] = this thread's part of a result, which becomes the x of the next product
static __device__ __forceinline__ void store_tile(real *tile, real (*part)[4]) {
  UNROLL for (int j = 0; j < 4; j++)
    UNROLL for (int i = 0; i < 8; i += 4)
      *(Real4 *)(tile + at(COLUMN_OF(j), ROW_OF(i))) =
          Real4{{part[i][j], part[i + 1][j], part[i + 2][j], part[i + 3][j]}};
}

// sum[row][column] += sum over k < depth of x[k][row] y[k][column], four k at a time: the tiles are
// 0 from depth on
static __device__ __forceinline__ void multiply_tiles(real (*sum)[4], const real *x, const real *y,
                                                      int depth) {
  for (int k = 0; k < depth; k += 4) {
    const real *x0 = x + at(k, ROW_OF(0)), *x4 = x + at(k, ROW_OF(4));
    const real *y0 = y + at(k, COLUMN_OF(0));
    UNROLL for (int l = 0; l < 4; l++) {
      Real4 a[2] = {*(const Real4 *)(x0 + l*SIDE), *(const Real4 *)(x4 + l*SIDE)};
      Real4 b = *(const Real4 *)(y0 + l*SIDE);
      UNROLL for (int i = 0; i < 8; i++)
        UNROLL for (int j = 0; j < 4; j++) sum[i][j] += a[i / 4].at[i % 4] * b.at[j];
    }
  }
}

// sum[i][j] = x[i].y[j], for rows of D numbers that are x_row and y_row apart; x_rows and y_rows of
// them exist.
static __device__ __forceinline__ void dot_rows(real (*sum)[4], real *x_tile, real *y_tile,
                                                const real *x, int x_rows, const real *y,
                                                int y_rows, long x_row, long y_row, int D) {
  UNROLL for (int i = 0; i < 8; i++)
    UNROLL for (int j = 0; j < 4; j++) sum[i][j] = 0;
  for (int d = 0; d < D; d += SIDE) {
    __syncthreads();                     // the last product has read the tiles
    load_transposed(x_tile, x + d, x_row, x_rows, D - d);
    load_transposed(y_tile, y + d, y_row, y_rows, D - d);
    __syncthreads();                     // the tiles have been written
    multiply_tiles(sum, x_tile, y_tile, MIN(SIDE, D - d));
  }
}

// sum[i] += sum_k part[i][k] y[k], for a result `part` and rows y[k] of `columns` numbers
static __device__ __forceinline__ void add_product(real (*sum)[4], real *x_tile, real *y_tile,
                                                   real (*part)[4], const real *y, long y_row,
                                                   int y_rows, int columns) {
  __syncthreads();                       // the last product has read the tiles
  store_tile(x_tile, part);
  load_tile(y_tile, y, y_row, y_rows, columns);
  __syncthreads();                       // the tiles have been written
  multiply_tiles(sum, x_tile, y_tile, MIN(SIDE, y_rows));
}

// x[i] = this thread's part of a result, for the rows and columns that exist
static __device__ __forceinline__ void store_rows(real *x, long row, int rows, int columns,
                                                  real (*part)[4]) {
  UNROLL for (int i = 0; i < 8; i++)
    if (ROW_OF(i) < rows)
      store4(x + ROW_OF(i)*row + COLUMN_OF(0), columns - COLUMN_OF(0),
             Real4{{part[i][0], part[i][1], part[i][2], part[i][3]}});
}

static __global__ void __launch_bounds__(SIDE_THREADS, 3)
attention_forward_kernel(real *out, real *lse, const real *qkv, int T, int C, int H) {
  __shared__ __align__(16) real x_tile[SIDE*SIDE], y_tile[SIDE*SIDE];
  int D = C / H, b = blockIdx.x / H, h = blockIdx.x % H, d0 = blockIdx.z * SIDE;
  int i = (gridDim.y - 1 - blockIdx.y) * SIDE;   // the last have the most work: they start first
  long row = 3L*C;
  const real *q = qkv + b*T*row + h*D, *k = q + C, *v = k + C;
  real scale = 1 / sqrt((real)D), z[8][4], o[8][4] = {{0}}, max[8], sum[8];
  UNROLL for (int r = 0; r < 8; r++) max[r] = -INFINITY, sum[r] = 0;
  for (int j = 0; j <= i; j += SIDE) {
    dot_rows(z, x_tile, y_tile, q + i*row, T - i, k + j*row, T - j, row, row, D);
    UNROLL for (int r = 0; r < 8; r++) {
      int seen = i + ROW_OF(r) - j + 1;  // keys s <= t; at least one in each tile
      real tile_max = max[r];
      UNROLL for (int c = 0; c < 4; c++) {
        z[r][c] *= scale;
        if (COLUMN_OF(c) < seen) tile_max = MAX(tile_max, z[r][c]);
      }
      for (int lanes = SIDE_LANES / 2; lanes > 0; lanes /= 2) {
        real other = __shfl_xor_sync(ALL_LANES, tile_max, lanes);
        tile_max = MAX(tile_max, other);
      }
      real rescale = exp_(max[r] - tile_max);   // 0 the first time
      max[r] = tile_max;
      sum[r] *= rescale;
      UNROLL for (int c = 0; c < 4; c++) {
        o[r][c] *= rescale;
        z[r][c] = COLUMN_OF(c) < seen ? exp_(z[r][c] - tile_max) : 0;
        sum[r] += z[r][c];               // of this thread's columns; see below
      }
    }
    add_product(o, x_tile, y_tile, z, v + j*row + d0, row, T - j, D - d0);
  }
  UNROLL for (int r = 0; r < 8; r++) {
    for (int lanes = SIDE_LANES / 2; lanes > 0; lanes /= 2)   // of all columns
      sum[r] += __shfl_xor_sync(ALL_LANES, sum[r], lanes);
    UNROLL for (int c = 0; c < 4; c++) o[r][c] /= sum[r];
    if (TX == 0 && d0 == 0 && i + ROW_OF(r) < T)
      lse[(long)blockIdx.x*T + i + ROW_OF(r)] = max[r] + log(sum[r]);
  }
  store_rows(out + ((long)b*T + i)*C + h*D + d0, C, T - i, D - d0, o);
}

static void attention_forward(Tensor out, Tensor lse, Tensor qkv, int B, int T, int C, int H) {
  dim3 grid(B*H, blocks(T, SIDE), blocks(C/H, SIDE));
  RUN(attention_forward_kernel<<<grid, SIDE_THREADS, 0, stream>>>(
      out.data, lse.data, qkv.data, T, C, H));
  profile_flop(2.0*B*T*T*C);
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

// dq: a CUDA block owns SIDE queries and goes through the keys that they see. In C one loop adds
// dq, dk and dv, since one thread owns the whole head; here dk and dv have a kernel of their own,
// in which a block owns keys.
//
// Occupancy: while a warp waits for memory or at a barrier, its multiprocessor runs another one.
// How many CUDA blocks fit on it at once depends on their shared memory, threads and registers, of
// which it has 65536. The second launch bound asks the compiler for so few registers that this
// many fit.
static __global__ void __launch_bounds__(SIDE_THREADS, 2)
attention_backward_q(real *dqkv, const real *qkv, const real *dout, const real *lse,
                     const real *dout_dot_out, int T, int C, int H) {
  __shared__ __align__(16) real x_tile[SIDE*SIDE], y_tile[SIDE*SIDE];
  int D = C / H, b = blockIdx.x / H, h = blockIdx.x % H, d0 = blockIdx.z * SIDE;
  int i = (gridDim.y - 1 - blockIdx.y) * SIDE;
  long row = 3L*C, head = b*T*row + h*D, first = (long)blockIdx.x * T;   // of lse, dout_dot_out
  const real *q = qkv + head, *k = q + C, *v = k + C;
  const real *dout_i = dout + ((long)b*T + i)*C + h*D;
  real scale = 1 / sqrt((real)D), z[8][4], dz[8][4], dq[8][4] = {{0}}, lse_t[8], dot_t[8];
  UNROLL for (int r = 0; r < 8; r++) {
    int t = i + ROW_OF(r);
    lse_t[r] = t < T ? lse[first + t] : 0;
    dot_t[r] = t < T ? dout_dot_out[first + t] : 0;
  }
  for (int j = 0; j <= i; j += SIDE) {
    dot_rows(z, x_tile, y_tile, q + i*row, T - i, k + j*row, T - j, row, row, D);
    dot_rows(dz, x_tile, y_tile, dout_i, T - i, v + j*row, T - j, C, row, D);   // datt
    UNROLL for (int r = 0; r < 8; r++)
      UNROLL for (int c = 0; c < 4; c++) {
        int t = i + ROW_OF(r), s = j + COLUMN_OF(c);
        real att = s <= t && t < T ? exp_(z[r][c] * scale - lse_t[r]) : 0;
        dz[r][c] = att * (dz[r][c] - dot_t[r]) * scale;
      }
    add_product(dq, x_tile, y_tile, dz, k + j*row + d0, row, T - j, D - d0);
  }
  store_rows(dqkv + head + i*row + d0, row, T - i, D - d0, dq);
}

// dk and dv: a CUDA block owns SIDE keys and goes through the queries that see them. So here the
// rows of a tile are keys s, and the columns are queries t.
static __global__ void __launch_bounds__(SIDE_THREADS, 2)
attention_backward_kv(real *dqkv, const real *qkv, const real *dout, const real *lse,
                      const real *dout_dot_out, int T, int C, int H) {
  __shared__ __align__(16) real x_tile[SIDE*SIDE], y_tile[SIDE*SIDE];
  int D = C / H, b = blockIdx.x / H, h = blockIdx.x % H, d0 = blockIdx.z * SIDE;
  int j = blockIdx.y * SIDE;
  long row = 3L*C, head = b*T*row + h*D, first = (long)blockIdx.x * T;
  const real *q = qkv + head, *k = q + C, *v = k + C;
  real scale = 1 / sqrt((real)D), z[8][4], dz[8][4], dk[8][4] = {{0}}, dv[8][4] = {{0}};
  for (int i = j; i < T; i += SIDE) {
    const real *dout_i = dout + ((long)b*T + i)*C + h*D;
    dot_rows(z, x_tile, y_tile, k + j*row, T - j, q + i*row, T - i, row, row, D);
    dot_rows(dz, x_tile, y_tile, v + j*row, T - j, dout_i, T - i, row, C, D);   // datt
    UNROLL for (int c = 0; c < 4; c++) {
      int t = i + COLUMN_OF(c);
      real lse_t = t < T ? lse[first + t] : 0, dot_t = t < T ? dout_dot_out[first + t] : 0;
      UNROLL for (int r = 0; r < 8; r++) {
        z[r][c] = j + ROW_OF(r) <= t && t < T ? exp_(z[r][c] * scale - lse_t) : 0;   // att
        dz[r][c] = z[r][c] * (dz[r][c] - dot_t) * scale;
      }
    }
    add_product(dv, x_tile, y_tile, z, dout_i + d0, C, T - i, D - d0);
    add_product(dk, x_tile, y_tile, dz, q + i*row + d0, row, T - i, D - d0);
  }
  store_rows(dqkv + head + C + j*row + d0, row, T - j, D - d0, dk);
  store_rows(dqkv + head + 2*C + j*row + d0, row, T - j, D - d0, dv);
}

static void attention_backward(Tensor out, Tensor lse, Tensor qkv, int B, int T, int C, int H) {
  dim3 grid(B*H, blocks(T, SIDE), blocks(C/H, SIDE));
  if ((long)B*H*T > n_scratch)
    die("attention of %d x %d x %d rows needs more scratch memory: lower --batch_size", B, H, T);
  real *dout_dot_out = scratch;
  RUN(attention_backward_dot<<<blocks((long)B*H*T, WARPS), THREADS, 0, stream>>>(
      dout_dot_out, out.data, out.grad, B, T, C, H));
  RUN(attention_backward_q<<<grid, SIDE_THREADS, 0, stream>>>(
      qkv.grad, qkv.data, out.grad, lse.data, dout_dot_out, T, C, H));
  RUN(attention_backward_kv<<<grid, SIDE_THREADS, 0, stream>>>(
      qkv.grad, qkv.data, out.grad, lse.data, dout_dot_out, T, C, H));
  profile_flop(5.0*B*T*T*C);
}

// ---- 6. Matmul and sums -----------------------------------------------------------------------

typedef struct {                         // C = A B + bias, or C += A B
  Matrix c, a, b;
  long c_slice;                          // from one slice of C to the next, see add_slices()
  int M, N, K, slice, mode;              // a slice takes `slice` numbers of K
  const real *bias;
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

// A ladder of four kernels, each the one before and an idea. The third trains, or the fourth with
// --precision bf16. RUNG=1 in the environment selects the first: compare the rows of matmul in
// `RUNG=1 ./train_gpu --profile` with those of RUNG=2 and 3.
//
// Rung 1: a thread computes one element of C. The lanes of a warp have neighbouring columns, so
// their loads of B are coalesced where a row of B is consecutive, and A's number is the same for
// all. But each multiply-add waits for two loads from device memory or its caches.
static int rung = PLAIN ? 1 : 3;

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
enum { BIG = WARPS == 8 ? 16 : 8 };      // BIG*BIG == THREADS

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
//   - Lanes with the same address are served at once if they are neighbours, or two apart. So these
//     are the lanes in a warp's 32 x 64, which load 4 different Real4 of A and 8 of B:
//
//   columns        0..3   4..7   8..11  ...  28..31   32..35  ...  60..63
//   rows  0..3     0      2      4           14       0            14
//   rows  4..7     1      3      5           15       1            15
//   rows  8..11    16     18     20          30       16           30
//   rows 12..15    17     19     21          31       17           31
//   rows 16..31    the same once more
//
// Rung 4, tensor cores: a warp multiplies 16 x 16 by 16 x 8 numbers in one instruction. They are
// bf16, the upper half of a float: 8 bits of exponent, 7 of fraction. Their sums are floats.
// Weights, activations and gradients stay floats in memory, and are rounded on the way to shared
// memory. So they go through registers as on rung 3; cp.async, which copies to shared memory
// without these, cannot round. The limit is the L2 cache: a tile of 128 x 128 does 32
// floating-point operations for each byte that it reads, so 5 TB/s, about what an A100's gives,
// feed 160 of its 312 TFLOP/s. The way on is operands in bf16 in memory; and, on Hopper alone,
// TMA, by which one thread fetches a tile, and wgmma, by which four warps multiply straight from
// shared memory: mma.sync reaches two thirds of that GPU's peak at most.
enum {
  LONGEST = 32,                          // numbers of k in a step of tensor cores; in fp32 8
  PAD = 4,                               // numbers between two rows of a tile, see put()
  MAX_FOURS = 8                          // Real4 that a thread copies of an operand in a step
};

// How a thread reads its part of an operand. A line is a row of A or a column of B. A tile has
// 8*side lines, and side*side threads read it, 2*depth/side Real4 each in a step. `along`: are the
// numbers of a line consecutive in memory? Then consecutive threads read along k, then the next
// line; else they read along the lines, then the next k.
typedef struct {
  const real *x;                         // this thread's first number of the step
  long next, apart;                      // from step to step; from Real4 to Real4 in a step
  int line, k;                           // where x is in the tile
  int lines, whole;                      // how many exist from the tile's first on; do they fill
} Reader;                                //   the tile, and are their Real4 aligned?

static __device__ __forceinline__ Reader reader_of(Matrix m, int line0, int lines, int k0,
                                                   int side, int depth, int along) {
  Reader r;
  int t = threadIdx.x;
  r.line = along ? t / (depth/4) : t % (2*side) * 4;
  r.k = along ? t % (depth/4) * 4 : t / (2*side);
  r.x = m.at + (line0 + r.line)*m.down + (k0 + r.k)*m.right;
  r.next = depth*m.right;
  r.apart = along ? 4*side*side/depth * m.down : side/2 * m.right;
  r.lines = lines - line0;
  r.whole = r.lines >= 8*side && (uintptr_t)m.at % 16 == 0
         && (along ? m.down : m.right) % 4 == 0;
  return r;
}

// From device memory to registers; `left` numbers of k are left. The second way is for the edges.
static __device__ __forceinline__ void fetch(Real4 *four, Reader *r, int left, int side, int depth,
                                             int along) {
  if (r->whole && left >= depth) {
    UNROLL for (int l = 0; l < 2*depth/side; l++) four[l] = *(const Real4 *)(r->x + l*r->apart);
  } else {
    UNROLL for (int l = 0; l < 2*depth/side; l++)
      UNROLL for (int j = 0; j < 4; j++) {
        int line = r->line + (along ? l*(4*side*side/depth) : j);
        int k = r->k + (along ? j : l*(side/2));
        four[l].at[j] = line < r->lines && k < left ? r->x[l*r->apart + j] : 0;
      }
  }
  r->x += r->next;
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

// Where a number of a tile of bf16 is. The tile keeps the order of memory: its rows are lines if
// `along`, else k. 8 numbers, 16 bytes, are a chunk, and 8 chunks fill the banks once. load_bf16()
// reads chunks from 8 rows, one below the other. So they are swizzled: chunk c of row r is in place
// c ^ r % 8, or c ^ r/2 % 4 where two rows of 4 chunks fill the banks.
static __device__ __forceinline__ int bf16_at(int row, int column, int columns) {
  const int chunks = columns / 8, most = MIN(chunks, 8);
  return (row*chunks + (column/8 ^ row*most/8 % most)) * 8 + column % 8;
}

// Three instructions that C++ has no name for, in PTX, the assembly language of NVIDIA GPUs. s, x
// and y are the arrays of the operands; the emulator gets them, and reads the text, too.

// Two bf16 in a word, rounded to nearest, and to even if both are as near
static __device__ __forceinline__ unsigned bf16_pair(real low, real high) {
  float s[2] = {(float)low, (float)high};
  unsigned x[1] = {0};
  PTX(s, x, NULL, "cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(x[0]) : "f"(s[1]), "f"(s[0]));
  return x[0];
}

// 16 lines x 16 k of a tile, as an A of mma_bf16(), or as two B, for which the second and the
// third square change places. A square is 8 x 8. Lane l gives the address of row l%8 of square l/8,
// and gets two numbers of each square i in x[i]: of row l/4, columns l%4*2 and the next; or, if
// transposed, of column l/4, rows l%4*2 and the next.
static __device__ __forceinline__ void load_bf16(unsigned *x, const char *tile, int line, int k,
                                                 int is_a, int side, int depth, int along) {
  int lane = threadIdx.x % 32;
  line += 8 * (is_a ? lane/8%2 : lane/16);
  k += 8 * (is_a ? lane/16 : lane/8%2);
  int at = along ? bf16_at(line + lane%8, k, depth) : bf16_at(k + lane%8, line, 8*side);
  unsigned y[1] = {(unsigned)__cvta_generic_to_shared(tile + 2*at)};
  if (along)
    PTX(NULL, x, y, "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
        : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(y[0]));
  else
    PTX(NULL, x, y, "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
        : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(y[0]));
}

// C += A B by a whole warp, C (16,8), A (16,16), B (16,8). With g = lane / 4 and t = lane % 4, a
// lane holds A[g][2t] and A[g][2t+1] in x[0], the same of row g + 8 in x[1], and both of 8 more k
// in x[2] and x[3]; B[2t][g] and B[2t+1][g] in y[0], of 8 more k in y[1]; and of C
// c = C[g][2t], C[g][2t+1], C[g+8][2t], C[g+8][2t+1].
static __device__ __forceinline__ void mma_bf16(real *c, const unsigned *x, const unsigned *y) {
  float s[4] = {(float)c[0], (float)c[1], (float)c[2], (float)c[3]};
  PTX(s, x, y, "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(s[0]), "+f"(s[1]), "+f"(s[2]), "+f"(s[3])
      : "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]), "r"(y[0]), "r"(y[1]));
  UNROLL for (int i = 0; i < 4; i++) c[i] = s[i];
}

// The products of some k, for the warp's 32 x 64 of C: 2 x 8 results of mma_bf16()
static __device__ __forceinline__ void multiply_bf16(real (*sum)[8], const char *a, const char *b,
                                                     int i, int j, int k0, int k1, int side,
                                                     int depth, int a_along, int b_along) {
  UNROLL for (int k = k0; k < k1; k += 16) {
    unsigned x[2][4], y[4];
    UNROLL for (int r = 0; r < 2; r++) load_bf16(x[r], a, i + 16*r, k, 1, side, depth, a_along);
    UNROLL for (int e = 0; e < 8; e += 2) {
      load_bf16(y, b, j + 8*e, k, 0, side, depth, b_along);
      UNROLL for (int r = 0; r < 2; r++) {
        mma_bf16(sum[e] + 4*r, x[r], y);
        mma_bf16(sum[e + 1] + 4*r, x[r], y + 2);
      }
    }
  }
}

typedef struct __align__(8) { unsigned at[2]; } FourBf16;

// From registers to shared memory. In fp32, if `along`, a warp stores at once the numbers of 16
// lines in two rows, k and k + 4. These are 4 * (128 + PAD) numbers apart, which is 16 banks from
// a multiple of 32: so the 32 numbers are in different banks.
static __device__ __forceinline__ void put(char *tile, const Real4 *four, const Reader *r, int side,
                                           int depth, int bf16, int along) {
  const int row = 8*side + PAD;
  real *t = (real *)tile;
  UNROLL for (int l = 0; l < 2*depth/side; l++) {
    int line = r->line + along * l * (4*side*side/depth), k = r->k + !along * l * (side/2);
    const real *x = four[l].at;
    if (bf16) {
      int at = along ? bf16_at(line, k, depth) : bf16_at(k, line, 8*side);
      *(FourBf16 *)(tile + 2*at) = FourBf16{{bf16_pair(x[0], x[1]), bf16_pair(x[2], x[3])}};
    } else if (along) {
      UNROLL for (int j = 0; j < 4; j++) t[(k + j)*row + line] = x[j];
    } else *(Real4 *)(t + k*row + line) = four[l];
  }
}

#define TILE_BYTES(side, depth, bf16) \
  ((bf16) ? (depth)*8*(side)*2 : (depth)*(8*(side) + PAD)*(int)sizeof(real))

// A CUDA block's tile of C. All arguments but the last two are constants, so each kernel below is
// this function with its loops unrolled and its branches decided. One operand of the next step is
// fetched in each half of a step, since the numbers of both need too many registers.
static __device__ __forceinline__ void matmul_tile(const int side, const int depth, const int bf16,
                                                   const int a_along, const int b_along,
                                                   const Product *p, char *shared) {
  const int bytes = TILE_BYTES(side, depth, bf16), row_of_warps = side / 8;
  const int along[2] = {a_along, b_along};
  int i = blockIdx.y * 8*side, j = blockIdx.x * 8*side, warp = threadIdx.x / 32;
  int warp_i = warp / row_of_warps * 32, warp_j = warp % row_of_warps * 64;
  int begin = blockIdx.z * p->slice, left = MIN(p->K - begin, p->slice);
  Reader reader[2] = {reader_of(p->a, i, p->M, begin, side, depth, a_along),
                      reader_of(transpose(p->b), j, p->N, begin, side, depth, b_along)};
  Real4 next[MAX_FOURS];
  real sum[8][8] = {{0}};
  UNROLL for (int h = 0; h < 2; h++) {   // A, then B
    fetch(next, &reader[h], left, side, depth, along[h]);
    put(shared + h*bytes, next, &reader[h], side, depth, bf16, along[h]);
  }
  for (int now = 0; left > 0; left -= depth, now = !now) {
    char *a = shared + 2*now*bytes, *b = a + bytes, *other = shared + 2*!now*bytes;
    __syncthreads();                     // a, b have been written, the other buffers read
    UNROLL for (int h = 0; h < 2; h++) {
      int k = h*depth/2;
      if (left > depth) fetch(next, &reader[h], left - depth, side, depth, along[h]);
      if (bf16)
        multiply_bf16(sum, a, b, warp_i, warp_j, k, k + depth/2, side, depth, a_along, b_along);
      else
        multiply_fp32(sum, (real *)a + warp_i, (real *)b + warp_j, k, k + depth/2, side);
      if (left > depth) put(other + h*bytes, next, &reader[h], side, depth, bf16, along[h]);
    }
  }
  int lane = threadIdx.x % 32;
  i += warp_i; j += warp_j;
  UNROLL for (int e = 0; e < 8; e++)
    if (bf16) {                          // e: which of the 8 tiles side by side
      UNROLL for (int r = 0; r < 4; r++)
        store_c(p, i + 8*r + lane/4, j + 8*e + lane%4*2, &sum[e][2*r], 2);
    } else {                             // e: which of the 8 rows
      int row = i + (lane/16*2 + lane%2)*4 + e/4*16 + e%4, column = j + lane%16/2*4;
      store_c(p, row, column, sum[e], 4);
      store_c(p, row, column + 32, sum[e] + 4, 4);
    }
}

// CUDA blocks that should fit on a multiprocessor. 65536 / 2 blocks / 256 threads leave 128
// registers a thread, 65536 / 6 / 64 leave 168.
enum { BIG_AT_ONCE = 2, SMALL_AT_ONCE = 6, SMALL_BF16_AT_ONCE = 4 };
#define MATMUL_KERNEL(name, side, depth, bf16, at_once)                                       \
  static __global__ void __launch_bounds__((side)*(side), at_once) name(Product p) {          \
    __shared__ __align__(16) char shared[4*TILE_BYTES(side, depth, bf16)];                    \
    int a_along = p.a.right == 1, b_along = p.b.down == 1;                                    \
    if (a_along && b_along) matmul_tile(side, depth, bf16, 1, 1, &p, shared);                 \
    else if (a_along) matmul_tile(side, depth, bf16, 1, 0, &p, shared);                       \
    else if (b_along) matmul_tile(side, depth, bf16, 0, 1, &p, shared);                       \
    else matmul_tile(side, depth, bf16, 0, 0, &p, shared);                                    \
  }
MATMUL_KERNEL(matmul_big, BIG, 8, 0, BIG_AT_ONCE)
MATMUL_KERNEL(matmul_small, 8, 8, 0, SMALL_AT_ONCE)
MATMUL_KERNEL(matmul_big_bf16, BIG, LONGEST, 1, BIG_AT_ONCE)
MATMUL_KERNEL(matmul_small_bf16, 8, LONGEST, 1, SMALL_BF16_AT_ONCE)

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
}

// Waves: if `at_once` CUDA blocks fit on the GPU, a grid runs in waves of that many, and the last
// wave takes as long as a full one. This is the number of slices, up to `most`, that leaves the
// least of the waves empty; more slices must gain 5 %, since their sums are written and read again.
static int slices_for(long tiles, long at_once, long most) {
  int best = 1;
  double fullest = 0;
  for (int s = 1; s <= MAX(1, MIN(most, 16)); s++) {
    double waves = (double)tiles * s / at_once, full = waves / ceil(waves);
    if (full > 1.05 * fullest) fullest = full, best = s;
  }
  return best;
}

// A slice should be at least 256 long. Big tiles are used if they and their slices give each
// multiprocessor at least one.
static void matmul(Matrix c, Matrix a, Matrix b, int M, int N, int K, int mode, const real *bias) {
  Product p = {c, a, b, 0, M, N, K, K, mode, bias};
  long big = (long)blocks(M, 8*BIG) * blocks(N, 8*BIG), small = (long)blocks(M, 64) * blocks(N, 64);
  long most = MIN(K / 256, n_scratch / MAX((long)M*N, 1));
  int slices = slices_for(big, BIG_AT_ONCE*multiprocessors, most);
  int is_big = big * slices >= multiprocessors, side = is_big ? BIG : 8;
  int small_at_once = use_bf16 ? SMALL_BF16_AT_ONCE : SMALL_AT_ONCE;
  if (!is_big) slices = slices_for(small, small_at_once*multiprocessors, most);
  if (rung < 3) slices = 1;
  if (slices > 1) {
    p.c = rows_of(scratch, N); p.c_slice = (long)M*N; p.mode = SET; p.bias = NULL;
    p.slice = blocks(blocks(K, slices), LONGEST) * LONGEST;   // whole steps
    slices = blocks(K, p.slice);
  }
  dim3 grid(blocks(N, 8*side), blocks(M, 8*side), slices);
  if (rung == 1) grid = dim3(M, blocks(N, THREADS));
  if (rung == 2) grid = dim3(blocks(N, BIG), blocks(M, BIG));
  if (grid.y > 65535)
    die("a matrix of %d rows is too large for a GPU's grid: lower --batch_size", M);
  if (rung == 1) RUN(matmul_plain<<<grid, THREADS, 0, stream>>>(p));
  else if (rung == 2) RUN(matmul_shared<<<grid, THREADS, 0, stream>>>(p));
  else if (is_big && use_bf16) RUN(matmul_big_bf16<<<grid, side*side, 0, stream>>>(p));
  else if (is_big) RUN(matmul_big<<<grid, side*side, 0, stream>>>(p));
  else if (use_bf16) RUN(matmul_small_bf16<<<grid, side*side, 0, stream>>>(p));
  else RUN(matmul_small<<<grid, side*side, 0, stream>>>(p));
  if (slices > 1) add_slices(c, scratch, M, N, slices, mode, bias);
  profile_flop(2.0 * M * N * K);
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
  add_slices(rows_of(sum, O), scratch, 1, O, slices, ADD, NULL);
}

static __global__ void fill_kernel(real *x, long n, real value) {
  long i = FIRST_OF_FOUR;
  store4(x + i, n - i, Real4{{value, value, value, value}});
}

static void fill(real *x, long n, real value) {
  RUN(fill_kernel<<<blocks_of_fours(n), THREADS, 0, stream>>>(x, n, value));
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
  RUN(squared_norm_total<<<1, THREADS, 0, stream>>>(result, partial, chunks(n)));
}

// ---- 7. Device memory and launches ------------------------------------------------------------

// After copy_in() the caller may change its memory. So a copy, like the tokens of a micro-batch,
// first goes to a slot of "pinned" memory, which the GPU can read by itself, and copy_in() returns
// at once: the CPU can be ahead of the GPU by up to SLOTS copies.
enum { SLOTS = 16, SLOT_BYTES = 256 << 10 };
static struct { void *memory; cudaEvent_t sent; } slot[SLOTS];

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

// A training step of a small model is a hundred kernels of a few microseconds each, and launching a
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
  void *p;
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
