// The optimizer: AdamW over flat buffers, one pass.
//
// A master weight is an f32 in two halves: the bf16 weight that the model computes with (the f32 rounded half up) and the 16 bits
// that the rounding took away, as a signed number; together they are the f32 exactly. Moments are f32, or 8 bits each in blocks of 256
// with one scale (Dettmers et al., 2022): a 4-bit exponent with 3 bits of mantissa and a sign for the first moment, with 4 bits of
// mantissa for the square root of the second. Rounding is stochastic, by a hash of element and step: an average over many steps would
// otherwise stop moving once a step's change is less than half a unit. Scales have 12 significant bits, so that decoded values are exact
// products and decoding and encoding again gives the same bits.

#define MOMENT_BLOCK 256

static __device__ __forceinline__ float join(bf16 weight, u16 rest) {
  return __int_as_float((int)((u32)weight << 16) + (int)(short)rest);
}
static __device__ __forceinline__ void split(float x, bf16& weight, u16& rest) {
  u32 bits = __float_as_uint(x);
  weight = (bf16)((bits + 0x8000u) >> 16);
  rest = (u16)(bits & 0xffffu);
}

static __device__ __forceinline__ u32 hash(u32 x) {
  x ^= x >> 16; x *= 0x7feb352du;
  x ^= x >> 15; x *= 0x846ca68bu;
  return x ^ (x >> 16);
}

// A code with `m` bits of mantissa means an integer: below 2^m the code itself, above (2^m + mantissa) * 2^(exponent - 1). Shifted to the
// top of a float it is that integer times 2^(-126 - m), small ones as denormal numbers, so that neither way needs a case or a conversion.
template <int m> static __device__ __forceinline__ float code_value(u32 code, float scale) {
  return __uint_as_float(code << (23 - m)) * 0x1p100f * (scale * (float)(1 << (26 + m)));
}
// The code of x >= 0 in units of the scale, rounded up with probability (distance to the code below); `random` has 16 bits, half its range
// is rounding to nearest. `top` is the last code.
template <int m> static __device__ __forceinline__ u32 code_of(float x, u32 random, u32 top) {
  u32 bits = __float_as_uint(x * (0x1p-126f / (float)(1 << m)));
  return min((bits + (random << (23 - m - 16))) >> (23 - m), top);
}
#define FIRST_TOP 127u
#define FIRST_UNIT 245760.f   // value of code 127 with 3 bits of mantissa
#define SECOND_TOP 255u
#define SECOND_UNIT 507904.f  // value of code 255 with 4 bits of mantissa
#define SCALE_MIN 2.168404344971009e-19f  // 2^-62: squares of what it scales stay normal numbers

// The largest value of a block as a scale with 12 significant bits, rounded up.
static __device__ __forceinline__ float scale_for(float largest, float unit) {
  u32 bits = (__float_as_uint(largest / unit) + 0xfffu) & ~0xfffu;
  float scale = __uint_as_float(bits);
  return scale < SCALE_MIN ? 0.f : scale;
}

struct Moments {
  float first[8], second[8];
};

// Approximate, and denormal numbers count as zero: a second moment below 2^-126 moves nothing.
static __device__ __forceinline__ float fast_root(float x) {
  float r;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}
static __device__ __forceinline__ float fast_inverse(float x) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}

static __device__ __forceinline__ void decode(uint2 first, uint2 second, float first_scale, float second_scale, Moments& m) {
#pragma unroll
  for (int i = 0; i < 8; i++) {
    u32 c = (i < 4 ? first.x : first.y) >> (8 * (i & 3)) & 255, d = (i < 4 ? second.x : second.y) >> (8 * (i & 3)) & 255;
    float value = code_value<3>(c & 127, first_scale), root = code_value<4>(d, second_scale);
    m.first[i] = __uint_as_float(__float_as_uint(value) | (c & 128) << 24);
    m.second[i] = root * root;
  }
}

// Encodes the moments of a warp's 256 elements; `root` holds the square roots of the second ones. Without `step` rounding is to nearest.
static __device__ __forceinline__ void encode(u8* first, u8* second, float* first_scale, float* second_scale, i64 at, const Moments& m,
                                              const float* root, u32 step, int lane) {
  float largest = 0.f, highest = 0.f;
#pragma unroll
  for (int i = 0; i < 8; i++) {
    largest = fmaxf(largest, fabsf(m.first[i]));
    highest = fmaxf(highest, root[i]);
  }
  largest = warp_max(largest);
  highest = warp_max(highest);
  float s = scale_for(largest, FIRST_UNIT), t = scale_for(highest, SECOND_UNIT);
  float s_inverse = s > 0.f ? fast_inverse(s) : 0.f, t_inverse = t > 0.f ? fast_inverse(t) : 0.f;
  // Nothing of a block without a scale is kept.
  if (s == 0.f) largest = INFINITY;
  if (t == 0.f) highest = INFINITY;
  u32 least = t > 0.f ? 1u : 0u;
  u32 seed = hash((u32)(at >> 3) ^ step * 0x9e3779b9u), a[2] = {0, 0}, b[2] = {0, 0};
#pragma unroll
  for (int i = 0; i < 8; i++) {
    u32 h = 0x80008000u;
    if (step) {
      h = (seed + i * 0x9e3779b9u) * 0x846ca68bu;
      h ^= h >> 15;
    }
    float x = fabsf(m.first[i]), y = root[i];
    u32 c = code_of<3>(x * s_inverse, h & 0xffff, FIRST_TOP), d = code_of<4>(y * t_inverse, h >> 16, SECOND_TOP);
    // A second moment that vanished would make the step huge.
    d = max(d, y > 0.f ? least : 0u);
    c = x == largest ? FIRST_TOP : c;
    d = y == highest ? SECOND_TOP : d;
    // No negative zero: it would not come back. Codes above zero are large enough to borrow from.
    c |= (c + 127u) & (__float_as_uint(m.first[i]) >> 24) & 128u;
    a[i >> 2] |= c << (8 * (i & 3));
    b[i >> 2] |= d << (8 * (i & 3));
  }
  *reinterpret_cast<uint2*>(first + at) = make_uint2(a[0], a[1]);
  *reinterpret_cast<uint2*>(second + at) = make_uint2(b[0], b[1]);
  if (lane == 0) {
    first_scale[at / MOMENT_BLOCK] = s;
    second_scale[at / MOMENT_BLOCK] = t;
  }
}

struct Settings {
  float keep;             // 1 - lr * weight decay
  float beta1, beta2;
  float step_size;        // lr / (1 - beta1^t)
  float root_factor;  // 1 / sqrt(1 - beta2^t)
  float eps;
  u32 step;
};

static __device__ __forceinline__ void load_floats(const float* p, float* x) {
  float4 a = *reinterpret_cast<const float4*>(p), b = *reinterpret_cast<const float4*>(p + 4);
  x[0] = a.x; x[1] = a.y; x[2] = a.z; x[3] = a.w; x[4] = b.x; x[5] = b.y; x[6] = b.z; x[7] = b.w;
}
static __device__ __forceinline__ void store_floats(float* p, const float* x) {
  *reinterpret_cast<float4*>(p) = make_float4(x[0], x[1], x[2], x[3]);
  *reinterpret_cast<float4*>(p + 4) = make_float4(x[4], x[5], x[6], x[7]);
}

// What has one gradient: where it begins in the buffers (a multiple of 256), its elements, and the gradient, bf16 or (`is_wide`) f32. Spans
// lie one after the other without a gap of 256 elements, and cover everything that is trained.
struct Span {
  i64 start, elements;
  const void* gradient;
  i64 is_wide;
};

// Eight gradients from `at` on; zeros behind the end. Tensors begin at multiples of 16 bytes and their memory ends at one, so that whole
// vectors can be read.
static __device__ __forceinline__ void load_gradient(const void* gradient, int is_wide, i64 at, i64 elements, float* g) {
  if (is_wide) {
#pragma unroll
    for (int i = 0; i < 8; i++) g[i] = at + i < elements ? reinterpret_cast<const float*>(gradient)[at + i] : 0.f;
  } else {
    Eight v = {{0, 0, 0, 0}};
    if (at < elements) v = load8(reinterpret_cast<const bf16*>(gradient) + at);
    unpack8(v, g);
#pragma unroll
    for (int i = 0; i < 8; i++) g[i] = at + i < elements ? g[i] : 0.f;
  }
}

#define NORM_LOADS 4  // vectors that a thread has under way

// Each block's part of the sum of squares of a gradient, in f64, to partial [gridDim.y spans, gridDim.x].
extern "C" __global__ void square_sums(const Span* spans, double* partial) {
  __shared__ double parts[8];
  Span span = spans[blockIdx.y];
  const void* gradient = span.gradient;
  int is_wide = (int)span.is_wide;
  i64 elements = span.elements;
  double sum = 0.0;
  i64 step = (i64)gridDim.x * blockDim.x * 8;
  for (i64 at = ((i64)blockIdx.x * blockDim.x + threadIdx.x) * 8; at < elements; at += step * NORM_LOADS) {
    float v[NORM_LOADS][8];
#pragma unroll
    for (int n = 0; n < NORM_LOADS; n++) load_gradient(gradient, is_wide, at + n * step, elements, v[n]);
#pragma unroll
    for (int n = 0; n < NORM_LOADS; n++) {
      float s = 0.f;
#pragma unroll
      for (int i = 0; i < 8; i++) s += v[n][i] * v[n][i];
      sum += (double)s;
    }
  }
#pragma unroll
  for (int d = 16; d; d >>= 1) sum += __shfl_xor_sync(~0u, sum, d);
  if ((threadIdx.x & 31) == 0) parts[threadIdx.x >> 5] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    double total = 0.0;
    for (int i = 0; i < 8; i++) total += parts[i];
    partial[(i64)blockIdx.y * gridDim.x + blockIdx.x] = total;
  }
}

// verdict = {loss, gradient norm, scale of the gradient, 1 if the step is to be taken}. One block of 256 threads.
extern "C" __global__ void judge(const double* partial, int parts, const float* losses, int rows, double loss_scale, double clip_norm,
                                 double* verdict) {
  __shared__ double sums[2][256];
  double squares = 0.0, loss = 0.0;
  for (int i = threadIdx.x; i < parts; i += 256) squares += partial[i];
  for (int i = threadIdx.x; i < rows; i += 256) loss += (double)losses[i];
  sums[0][threadIdx.x] = squares;
  sums[1][threadIdx.x] = loss;
  __syncthreads();
  for (int d = 128; d; d >>= 1) {
    if (threadIdx.x < d) {
      sums[0][threadIdx.x] += sums[0][threadIdx.x + d];
      sums[1][threadIdx.x] += sums[1][threadIdx.x + d];
    }
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    double norm = sqrt(sums[0][0]);
    loss = sums[1][0] * loss_scale;
    verdict[0] = loss;
    verdict[1] = norm;
    verdict[2] = norm > clip_norm ? clip_norm / norm : 1.0;
    verdict[3] = isfinite(norm) && isfinite(loss) ? 1.0 : 0.0;
  }
}

// One step of eight elements; `root` takes the square roots of the second moments.
static __device__ __forceinline__ void advance(float* w, Moments& m, float* root, const float* g, const Settings& s, float scale) {
#pragma unroll
  for (int i = 0; i < 8; i++) {
    float gradient = g[i] * scale;
    m.first[i] += (gradient - m.first[i]) * (1.f - s.beta1);
    m.second[i] = m.second[i] * s.beta2 + gradient * gradient * (1.f - s.beta2);
    root[i] = fast_root(m.second[i]);
    w[i] = w[i] * s.keep - s.step_size * m.first[i] * fast_inverse(root[i] * s.root_factor + s.eps);
  }
}

// All that is trained; buffers have room up to a multiple of 256. A warp takes 256 elements, which one span has. BYTES: 8-bit moments,
// first and second are codes and the scales are used; otherwise f32. Everything that is read is asked for before the first use.
template <bool BYTES> static __device__ __forceinline__ void update(bf16* weights, u16* rests, void* first, void* second, float* first_scale,
                                                                    float* second_scale, const Span* span, i64 blocks, float scale,
                                                                    Settings settings) {
  int lane = threadIdx.x & 31;
  float keep = settings.keep;
  i64 warps = (i64)gridDim.x * (blockDim.x >> 5);
  for (i64 block = (i64)blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5); block < blocks; block += warps) {
    i64 at = block * MOMENT_BLOCK + lane * 8;
    float g[8], w[8], root[8];
    Moments m;
    Eight hi = load8(weights + at), lo = load8(rests + at);
    uint2 a, b;
    float s, t;
    if (BYTES) {
      a = *reinterpret_cast<const uint2*>((const u8*)first + at);
      b = *reinterpret_cast<const uint2*>((const u8*)second + at);
      s = first_scale[block];
      t = second_scale[block];
    } else {
      load_floats((const float*)first + at, m.first);
      load_floats((const float*)second + at, m.second);
    }
    while (block * MOMENT_BLOCK >= span->start + span->elements) span++;
    bool is_wide = span->is_wide;
    load_gradient(span->gradient, is_wide, at - span->start, span->elements, g);
    // Vectors do not decay.
    settings.keep = is_wide ? 1.f : keep;
    if (BYTES) decode(a, b, s, t, m);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      w[2 * i] = join((bf16)hi.w[i], (u16)lo.w[i]);
      w[2 * i + 1] = join((bf16)(hi.w[i] >> 16), (u16)(lo.w[i] >> 16));
    }
    advance(w, m, root, g, settings, scale);
    if (BYTES) {
      encode((u8*)first, (u8*)second, first_scale, second_scale, at, m, root, settings.step, lane);
    } else {
      store_floats((float*)first + at, m.first);
      store_floats((float*)second + at, m.second);
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
      bf16 a, b;
      u16 c, d;
      split(w[2 * i], a, c);
      split(w[2 * i + 1], b, d);
      hi.w[i] = a | (u32)b << 16;
      lo.w[i] = c | (u32)d << 16;
    }
    store8(weights + at, hi);
    store8(rests + at, lo);
  }
}
extern "C" __global__ void adamw(bf16* weights, u16* rests, void* first, void* second, float* first_scale, float* second_scale,
                                 const Span* spans, i64 blocks, const double* verdict, Settings settings) {
  if (verdict[3] == 0.0) return;
  float scale = (float)verdict[2];
  if (first_scale) update<true>(weights, rests, first, second, first_scale, second_scale, spans, blocks, scale, settings);
  else update<false>(weights, rests, first, second, 0, 0, spans, blocks, scale, settings);
}

// f32 values [elements] into weights and rests, and back; values may lie in the host's memory. Blocks of 256 threads take 1,024 elements
// at a time, all loads of a thread under way at once.
#define COPIED 4
// With `exported`, the weights as they were once, what they changed since then is added.
extern "C" __global__ void split_values(const float* values, const float* exported, bf16* weights, u16* rests, i64 elements) {
  for (i64 at = (i64)blockIdx.x * COPIED * 256 + threadIdx.x; at < elements; at += (i64)gridDim.x * COPIED * 256) {
    float x[COPIED], was[COPIED];
#pragma unroll
    for (int i = 0; i < COPIED; i++) {
      bool is_there = at + i * 256 < elements;
      x[i] = is_there ? values[at + i * 256] : 0.f;
      was[i] = is_there && exported ? exported[at + i * 256] : 0.f;
    }
#pragma unroll
    for (int i = 0; i < COPIED; i++) {
      i64 to = at + i * 256;
      if (to >= elements) continue;
      if (exported) x[i] += join(weights[to], rests[to]) - was[i];
      split(x[i], weights[to], rests[to]);
    }
  }
}
extern "C" __global__ void join_values(const bf16* weights, const u16* rests, float* values, i64 elements) {
  for (i64 at = (i64)blockIdx.x * COPIED * 256 + threadIdx.x; at < elements; at += (i64)gridDim.x * COPIED * 256) {
    float x[COPIED];
#pragma unroll
    for (int i = 0; i < COPIED; i++) x[i] = at + i * 256 < elements ? join(weights[at + i * 256], rests[at + i * 256]) : 0.f;
#pragma unroll
    for (int i = 0; i < COPIED; i++)
      if (at + i * 256 < elements) values[at + i * 256] = x[i];
  }
}

// f32 values between the GPU's and the host's memory, in whichever direction.
extern "C" __global__ void copy_values(const float* from, float* to, i64 elements) {
  i64 at = (i64)blockIdx.x * blockDim.x + threadIdx.x;
  if (at < elements) to[at] = from[at];
}

// Bytes between the GPU's memory and the host's, by eights where they lie so.
extern "C" __global__ void copy_bytes(const u8* from, u8* to, i64 bytes) {
  i64 first = (i64)blockIdx.x * blockDim.x + threadIdx.x, stride = (i64)gridDim.x * blockDim.x, words = 0;
  if (((i64)from | (i64)to) % 8 == 0) {
    words = bytes / 8;
    for (i64 at = first; at < words; at += stride) reinterpret_cast<uint2*>(to)[at] = reinterpret_cast<const uint2*>(from)[at];
  }
  for (i64 at = 8 * words + first; at < bytes; at += stride) to[at] = from[at];
}

// 8-bit moments to f32 [elements] and back, whole blocks of 256; a warp a block.
extern "C" __global__ void moments_out(const u8* first, const u8* second, const float* first_scale, const float* second_scale,
                                       float* first_values, float* second_values, i64 blocks) {
  i64 block = ((i64)blockIdx.x * blockDim.x + threadIdx.x) >> 5;
  if (block >= blocks) return;
  i64 at = block * MOMENT_BLOCK + (threadIdx.x & 31) * 8;
  Moments m;
  decode(*reinterpret_cast<const uint2*>(first + at), *reinterpret_cast<const uint2*>(second + at), first_scale[block],
         second_scale[block], m);
#pragma unroll
  for (int i = 0; i < 8; i++) {
    first_values[at + i] = m.first[i];
    second_values[at + i] = m.second[i];
  }
}
extern "C" __global__ void moments_in(u8* first, u8* second, float* first_scale, float* second_scale, const float* first_values,
                                      const float* second_values, i64 blocks) {
  i64 block = ((i64)blockIdx.x * blockDim.x + threadIdx.x) >> 5;
  if (block >= blocks) return;
  int lane = threadIdx.x & 31;
  i64 at = block * MOMENT_BLOCK + lane * 8;
  Moments m;
  float root[8];
#pragma unroll
  for (int i = 0; i < 8; i++) {
    m.first[i] = first_values[at + i];
    m.second[i] = second_values[at + i];
    root[i] = sqrtf(m.second[i]);
  }
  encode(first, second, first_scale, second_scale, at, m, root, 0, lane);
}
