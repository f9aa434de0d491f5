// What all kernels share: element types, vector access, reductions. The source of every kernel file begins with this one.
// Sizes of the model come as macros (HIDDEN, HEADS, ...), so that loops unroll. Nothing here adds floats atomically: the same
// input gives the same bits.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;
typedef unsigned long long u64;

#define INFINITY __int_as_float(0x7f800000)

// bf16 as its bits.
typedef u16 bf16;

static __device__ __forceinline__ float wide(bf16 x) { return __uint_as_float((u32)x << 16); }
static __device__ __forceinline__ float low(u32 pair) { return __uint_as_float(pair << 16); }
static __device__ __forceinline__ float high(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }

// Two floats, rounded to nearest even, the first in the low half.
static __device__ __forceinline__ u32 pack(float a, float b) {
  u32 r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(b), "f"(a));
  return r;
}
static __device__ __forceinline__ bf16 narrow(float x) { return (bf16)(pack(x, 0.f) & 0xffffu); }
static __device__ __forceinline__ float rounded(float x) { return low(pack(x, 0.f)); }

// Eight bf16 values, 16 bytes.
struct __align__(16) Eight {
  u32 w[4];
};
static __device__ __forceinline__ Eight load8(const bf16* p) { return *reinterpret_cast<const Eight*>(p); }
static __device__ __forceinline__ void store8(bf16* p, const Eight& v) { *reinterpret_cast<Eight*>(p) = v; }
static __device__ __forceinline__ void unpack8(const Eight& v, float* x) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    x[2 * i] = low(v.w[i]);
    x[2 * i + 1] = high(v.w[i]);
  }
}
static __device__ __forceinline__ Eight pack8(const float* x) {
  Eight v;
#pragma unroll
  for (int i = 0; i < 4; i++) v.w[i] = pack(x[2 * i], x[2 * i + 1]);
  return v;
}

// Four bf16 values, 8 bytes.
struct __align__(8) Four {
  u32 w[2];
};
static __device__ __forceinline__ void load4(const bf16* p, float* x) {
  Four v = *reinterpret_cast<const Four*>(p);
  x[0] = low(v.w[0]); x[1] = high(v.w[0]); x[2] = low(v.w[1]); x[3] = high(v.w[1]);
}
static __device__ __forceinline__ void store4(bf16* p, const float* x) {
  Four v;
  v.w[0] = pack(x[0], x[1]);
  v.w[1] = pack(x[2], x[3]);
  *reinterpret_cast<Four*>(p) = v;
}

static __device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int d = 16; d; d >>= 1) x += __shfl_xor_sync(~0u, x, d);
  return x;
}
// 1 / rms of the 128 channels of a head, four a lane.
static __device__ __forceinline__ float head_scale(const float* x, float eps) {
  return rsqrtf(warp_sum(x[0] * x[0] + x[1] * x[1] + x[2] * x[2] + x[3] * x[3]) / 128.f + eps);
}
static __device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int d = 16; d; d >>= 1) x = fmaxf(x, __shfl_xor_sync(~0u, x, d));
  return x;
}

// Sum over the block, known to every thread; `scratch` has 33 floats. Blocks of whole warps.
static __device__ __forceinline__ float block_sum(float x, float* scratch) {
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
  x = warp_sum(x);
  __syncthreads();
  if (lane == 0) scratch[warp] = x;
  __syncthreads();
  if (warp == 0) {
    float y = warp_sum(lane < warps ? scratch[lane] : 0.f);
    if (lane == 0) scratch[32] = y;
  }
  __syncthreads();
  return scratch[32];
}

static __device__ __forceinline__ float sigmoid(float x) { return 1.f / (1.f + __expf(-x)); }
static __device__ __forceinline__ float silu(float x) { return x * sigmoid(x); }
// d silu / dx
static __device__ __forceinline__ float silu_slope(float x) {
  float s = sigmoid(x);
  return s * (1.f + x * (1.f - s));
}
static __device__ __forceinline__ float softplus(float x) { return x > 20.f ? x : log1pf(expf(x)); }
