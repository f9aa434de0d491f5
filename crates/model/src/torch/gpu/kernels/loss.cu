// Next-token loss over the vocabulary (macro VOCABULARY, a multiple of 8), in place on a tile of logits.

#define LOSS_THREADS 1024

// logits [rows, VOCABULARY] bf16 become scale * (softmax - one_hot(target)); losses [rows] f32. Rows whose target is negative
// count nothing: loss 0, gradient 0. One block a row: one pass for maximum and sum, one for the gradient (from the L2 cache).
extern "C" __global__ void __launch_bounds__(LOSS_THREADS) cross_entropy(bf16* logits, const int* targets, float* losses, float scale) {
  __shared__ float maxima[32], sums[32];
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  bf16* row = logits + (i64)blockIdx.x * VOCABULARY;
  int target = targets[blockIdx.x];
  if (target < 0) {
    Eight zero = {{0, 0, 0, 0}};
    for (int c = threadIdx.x * 8; c < VOCABULARY; c += LOSS_THREADS * 8) store8(row + c, zero);
    if (threadIdx.x == 0) losses[blockIdx.x] = 0.f;
    return;
  }
  float top = -INFINITY, sum = 0.f;
  for (int c = threadIdx.x * 8; c < VOCABULARY; c += LOSS_THREADS * 8) {
    float v[8];
    unpack8(load8(row + c), v);
    float m = top;
#pragma unroll
    for (int i = 0; i < 8; i++) m = fmaxf(m, v[i]);
    sum *= __expf(top - m);
    top = m;
#pragma unroll
    for (int i = 0; i < 8; i++) sum += __expf(v[i] - m);
  }
  float m = warp_max(top);
  sum = warp_sum(top == -INFINITY ? 0.f : sum * __expf(top - m));
  if (lane == 0) { maxima[warp] = m; sums[warp] = sum; }
  __syncthreads();
  float one = maxima[lane], part = sums[lane];
  m = warp_max(one);
  sum = warp_sum(part * __expf(one - m));
  float norm = m + logf(sum);
  if (threadIdx.x == 0) losses[blockIdx.x] = norm - wide(row[target]);
  __syncthreads();
  for (int c = threadIdx.x * 8; c < VOCABULARY; c += LOSS_THREADS * 8) {
    float v[8];
    unpack8(load8(row + c), v);
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] = scale * (__expf(v[i] - norm) - (c + i == target ? 1.f : 0.f));
    store8(row + c, pack8(v));
  }
}
