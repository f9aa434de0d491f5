// Products of small matrices in shared memory on the tensor cores (mma.m16n8k16, bf16 in, f32 sums in registers), for a block of
// 8 warps (4 x 2 of them over a tile of 64 or 128 rows, 2 x 4 over 32 rows).

static __device__ __forceinline__ u32 address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
static __device__ __forceinline__ void ldmatrix(u32* r, const bf16* p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address(p)) : "memory");
}
static __device__ __forceinline__ void ldmatrix_turned(u32* r, const bf16* p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address(p)) : "memory");
}
static __device__ __forceinline__ void mma(float* c, const u32* a, const u32* b) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
static __device__ __forceinline__ void copy_async(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" :: "r"(address(to)), "l"(from) : "memory");
}
static __device__ __forceinline__ void copies_sent() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int left> static __device__ __forceinline__ void copies_wait() { asm volatile("cp.async.wait_group %0;" :: "n"(left) : "memory"); }

// How a matrix lies in shared memory. Rows are padded by 8 elements: ldmatrix then meets every bank once.
enum { AS_IS = 0, TURNED = 1 };
#define PAD 8
#define THREADS 256

// The part of an M x N product that one warp holds: MT x NT at (row0, column0).
template <int M, int N> struct Tile {
  static const int WM = M >= 64 ? 4 : 2, WN = 8 / WM;
  static const int MT = M / WM, NT = N / WN;
  float c[MT / 16][NT / 8][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < MT / 16; i++)
#pragma unroll
      for (int j = 0; j < NT / 8; j++)
#pragma unroll
        for (int k = 0; k < 4; k++) c[i][j][k] = 0.f;
  }

  // += A B. A is M x K: lies as [m][k], or TURNED as [k][m]. B is K x N: lies as [k][n], or TURNED as [n][k].
  template <int K, int a_lies, int b_lies> __device__ __forceinline__ void add(const bf16* a, int lda, const bf16* b, int ldb) {
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, l = lane & 7, i8 = (lane >> 3) & 1, j8 = lane >> 4;
    int m0 = (warp / WN) * MT, n0 = (warp % WN) * NT;
#pragma unroll
    for (int k = 0; k < K; k += 16) {
      u32 fa[MT / 16][4];
#pragma unroll
      for (int i = 0; i < MT / 16; i++) {
        int m = m0 + i * 16;
        if (a_lies == AS_IS) ldmatrix(fa[i], a + (m + i8 * 8 + l) * lda + k + j8 * 8);
        else ldmatrix_turned(fa[i], a + (k + j8 * 8 + l) * lda + m + i8 * 8);
      }
#pragma unroll
      for (int j = 0; j < NT / 16; j++) {
        int n = n0 + j * 16;
        u32 fb[4];
        if (b_lies == TURNED) ldmatrix(fb, b + (n + j8 * 8 + l) * ldb + k + i8 * 8);
        else ldmatrix_turned(fb, b + (k + i8 * 8 + l) * ldb + n + j8 * 8);
#pragma unroll
        for (int i = 0; i < MT / 16; i++) {
          mma(c[i][2 * j], fa[i], fb);
          mma(c[i][2 * j + 1], fa[i], fb + 2);
        }
      }
    }
  }

  // f(row, column, first, second) for each pair of neighbouring columns.
  template <typename F> __device__ __forceinline__ void each(F f) {
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    int m0 = (warp / WN) * MT + (lane >> 2), n0 = (warp % WN) * NT + (lane & 3) * 2;
#pragma unroll
    for (int i = 0; i < MT / 16; i++)
#pragma unroll
      for (int j = 0; j < NT / 8; j++) {
        f(m0 + i * 16, n0 + j * 8, c[i][j][0], c[i][j][1]);
        f(m0 + i * 16 + 8, n0 + j * 8, c[i][j][2], c[i][j][3]);
      }
  }

  // As bf16 to rows of `ld` elements.
  __device__ __forceinline__ void store(bf16* to, i64 ld) {
    each([&](int row, int column, float& x, float& y) { *reinterpret_cast<u32*>(to + row * ld + column) = pack(x, y); });
  }
  // The same, rows from `rows` on left out.
  __device__ __forceinline__ void store_rows(bf16* to, i64 ld, int rows) {
    each([&](int row, int column, float& x, float& y) {
      if (row < rows) *reinterpret_cast<u32*>(to + row * ld + column) = pack(x, y);
    });
  }
};

// ROWS x COLUMNS from rows of `stride` elements into rows of COLUMNS + PAD; zeros from row `rows` on. Does not wait: after copies_sent,
// copies_wait and a barrier it is there.
template <int ROWS, int COLUMNS> static __device__ __forceinline__ void fetch(bf16* to, const bf16* from, i64 stride, int rows) {
#pragma unroll
  for (int n = 0; n < ROWS * COLUMNS / 8 / THREADS; n++) {
    int i = n * THREADS + threadIdx.x, row = i / (COLUMNS / 8), column = i % (COLUMNS / 8) * 8;
    if (row < rows) {
      copy_async(to + row * (COLUMNS + PAD) + column, from + row * stride + column);
    } else {
      Eight zero = {{0, 0, 0, 0}};
      store8(to + row * (COLUMNS + PAD) + column, zero);
    }
  }
}
// Everything that was fetched is there, for all threads.
static __device__ __forceinline__ void arrive() {
  copies_sent();
  copies_wait<0>();
  __syncthreads();
}
// The same from shared memory to rows of `stride` elements.
template <int ROWS, int COLUMNS> static __device__ __forceinline__ void deliver(bf16* to, i64 stride, const bf16* from) {
#pragma unroll
  for (int n = 0; n < ROWS * COLUMNS / 8 / THREADS; n++) {
    int i = n * THREADS + threadIdx.x, row = i / (COLUMNS / 8), column = i % (COLUMNS / 8) * 8;
    store8(to + row * stride + column, load8(from + row * (COLUMNS + PAD) + column));
  }
}

// Elements in a row of a tile of 128, 64 and 32 columns.
#define WIDE (128 + PAD)
#define HALF (64 + PAD)
#define QUARTER (32 + PAD)

// A chunk of CHUNK tokens of one head. A group is one head of one row; `many` tokens of the last chunk are real.
struct Place {
  int chunk, chunks, group, row, head, first, many;
};
template <int CHUNK> static __device__ __forceinline__ Place place_of(int chunk, int chunks, int group, int tokens) {
  Place p;
  p.chunk = chunk; p.chunks = chunks; p.group = group;
  p.row = group / HEADS; p.head = group % HEADS;
  p.first = chunk * CHUNK;
  p.many = min(CHUNK, tokens - p.first);
  return p;
}
// First element of the chunk's first token in a tensor [rows, tokens, heads, width], and of the chunk in an array
// [groups, chunks, rows, width].
static __device__ __forceinline__ i64 at_token(const Place& p, int tokens, int heads, int head, int width) {
  return (((i64)p.row * tokens + p.first) * heads + head) * width;
}
static __device__ __forceinline__ i64 at_chunk(const Place& p, int rows, int width) {
  return ((i64)p.group * p.chunks + p.chunk) * rows * width;
}
static __device__ __forceinline__ int kv_head(int head) { return head / (HEADS / KV_HEADS); }

// Hands out dynamic shared memory.
extern __shared__ __align__(16) unsigned char shared_memory[];
struct Arena {
  unsigned char* next;
  __device__ Arena() : next(shared_memory) {}
  __device__ bf16* half(int elements) { bf16* p = (bf16*)next; next += (elements * 2 + 15) / 16 * 16; return p; }
  __device__ float* single(int elements) { float* p = (float*)next; next += (elements * 4 + 15) / 16 * 16; return p; }
};
