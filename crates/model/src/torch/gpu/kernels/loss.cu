// Next-token loss over the vocabulary (macro VOCABULARY, a multiple of 8), in place on a tile of logits.

#define LOSS_THREADS 1024
// Vectors of eight logits that a thread takes, and where it keeps them between the two passes, so that a row is read once: registers
// first, then as much shared memory as the launch gives; what is left of a very large vocabulary is read again.
#define VECTORS ((VOCABULARY / 8 + LOSS_THREADS - 1) / LOSS_THREADS)
#define IN_REGISTERS (VECTORS < 8 ? VECTORS : 8)

// A maximum and the sum of exponentials relative to it.
struct Partition {
  float top, sum;
  __device__ __forceinline__ void take(const Eight& vector) {
    float v[8], m = top;
    unpack8(vector, v);
#pragma unroll
    for (int i = 0; i < 8; i++) m = fmaxf(m, v[i]);
    sum *= __expf(top - m);
    top = m;
#pragma unroll
    for (int i = 0; i < 8; i++) sum += __expf(v[i] - m);
  }
};

// scale * (softmax - one_hot) of eight logits from number `c` on.
static __device__ __forceinline__ Eight slope_of(const Eight& vector, int c, int target, float norm, float scale) {
  float v[8];
  unpack8(vector, v);
#pragma unroll
  for (int i = 0; i < 8; i++) v[i] = scale * (__expf(v[i] - norm) - (c + i == target ? 1.f : 0.f));
  return pack8(v);
}

// logits [rows, VOCABULARY] bf16 become scale * (softmax - one_hot(target)); losses [rows] f32. Rows whose target is negative
// count nothing: loss 0, gradient 0. One block a row.
extern "C" __global__ void __launch_bounds__(LOSS_THREADS) cross_entropy(bf16* logits, const int* targets, float* losses, float scale) {
  extern __shared__ Eight kept[];
  __shared__ float maxima[32], sums[32];
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, shared_bytes;
  asm("mov.u32 %0, %%dynamic_smem_size;" : "=r"(shared_bytes));
  const int held_until = IN_REGISTERS + shared_bytes / (LOSS_THREADS * (int)sizeof(Eight));
  bf16* row = logits + (i64)blockIdx.x * VOCABULARY;
  int target = targets[blockIdx.x];
  if (target < 0) {
    Eight zero = {{0, 0, 0, 0}};
    for (int c = threadIdx.x * 8; c < VOCABULARY; c += LOSS_THREADS * 8) store8(row + c, zero);
    if (threadIdx.x == 0) losses[blockIdx.x] = 0.f;
    return;
  }
  float label = wide(row[target]);
  auto column = [](int n) { return (n * LOSS_THREADS + (int)threadIdx.x) * 8; };
  Partition mine = {-INFINITY, 0.f};
  Eight held[IN_REGISTERS];
#pragma unroll
  for (int n = 0; n < IN_REGISTERS; n++)
    if (column(n) < VOCABULARY) held[n] = load8(row + column(n));
#pragma unroll 4
  for (int n = IN_REGISTERS; n < VECTORS; n++) {
    if (column(n) >= VOCABULARY) break;
    Eight v = load8(row + column(n));
    if (n < held_until) kept[(n - IN_REGISTERS) * LOSS_THREADS + threadIdx.x] = v;
    mine.take(v);
  }
#pragma unroll
  for (int n = 0; n < IN_REGISTERS; n++)
    if (column(n) < VOCABULARY) mine.take(held[n]);
  float m = warp_max(mine.top);
  float sum = warp_sum(mine.top == -INFINITY ? 0.f : mine.sum * __expf(mine.top - m));
  if (lane == 0) { maxima[warp] = m; sums[warp] = sum; }
  __syncthreads();  // all have read their label
  float one = maxima[lane], part = sums[lane];
  m = warp_max(one);
  sum = warp_sum(part * __expf(one - m));
  float norm = m + logf(sum);
  if (threadIdx.x == 0) losses[blockIdx.x] = norm - label;
#pragma unroll
  for (int n = 0; n < IN_REGISTERS; n++)
    if (column(n) < VOCABULARY) store8(row + column(n), slope_of(held[n], column(n), target, norm, scale));
#pragma unroll 4
  for (int n = IN_REGISTERS; n < VECTORS; n++) {
    if (column(n) >= VOCABULARY) break;
    Eight v = n < held_until ? kept[(n - IN_REGISTERS) * LOSS_THREADS + threadIdx.x] : load8(row + column(n));
    store8(row + column(n), slope_of(v, column(n), target, norm, scale));
  }
}
