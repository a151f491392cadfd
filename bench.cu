
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline.h>
#include <mma.h>
extern "C" __global__ void add(const float* a, const float* b, float* c, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) c[i] = a[i] + b[i];
}
extern "C" __global__ void block_sum(const double* a, double* out, int n) {
  __shared__ double parts[32];
  double sum = 0;
  for (int i = threadIdx.x; i < n; i += blockDim.x) sum += exp(a[i]) / sqrt(a[i]);
  for (int k = 16; k; k >>= 1) sum += __shfl_xor_sync(~0u, sum, k);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x < 32) {
    sum = threadIdx.x < blockDim.x / 32 ? parts[threadIdx.x] : 0;
    for (int k = 16; k; k >>= 1) sum += __shfl_down_sync(~0u, sum, k);
    if (threadIdx.x == 0) out[blockIdx.x] = sum;
  }
}
extern "C" __global__ void __launch_bounds__(256) matmul(const float* a, const float* b, float* c, int n) {
  __shared__ float x[2][16][64], y[2][16][64];
  float sums[4][4] = {};
  const int tx = threadIdx.x % 16, ty = threadIdx.x / 16, row = blockIdx.y * 64, column = blockIdx.x * 64;
  auto fetch = [&](int k, int stage) {
    for (int i = threadIdx.x; i < 1024; i += 256) x[stage][i % 16][i / 16] = a[(row + i / 16) * n + k + i % 16];
    __pipeline_memcpy_async(&y[stage][threadIdx.x / 16][threadIdx.x % 16 * 4], &b[(k + threadIdx.x / 16) * n + column + threadIdx.x % 16 * 4], 16);
    __pipeline_commit();
  };
  fetch(0, 0);
  for (int k = 0; k < n; k += 16) {
    const int stage = k / 16 % 2;
    __pipeline_wait_prior(0);
    __syncthreads();
    if (k + 16 < n) fetch(k + 16, !stage);
    for (int d = 0; d < 16; ++d)
      for (int i = 0; i < 4; ++i)
        for (int j = 0; j < 4; ++j) sums[i][j] += x[stage][d][ty * 4 + i] * y[stage][d][tx * 4 + j];
  }
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 4; ++j) c[(row + ty * 4 + i) * n + column + tx * 4 + j] = sums[i][j];
}
template <typename T, typename U> __device__ void tile(const T* a, const T* b, U* c) {
  using namespace nvcuda::wmma;
  fragment<matrix_a, 16, 16, 16, T, row_major> x;
  fragment<matrix_b, 16, 16, 16, T, col_major> y;
  fragment<accumulator, 16, 16, 16, U> z;
  fill_fragment(z, U(0));
  load_matrix_sync(x, a, 16), load_matrix_sync(y, b, 16);
  mma_sync(z, x, y, z), mma_sync(z, x, y, z);
  store_matrix_sync(c, z, 16, mem_row_major);
}
extern "C" __global__ void wmma_half(const __half* a, const __half* b, float* c) { tile(a, b, c); }
extern "C" __global__ void wmma_bfloat(const __nv_bfloat16* a, const __nv_bfloat16* b, float* c) { tile(a, b, c); }
extern "C" __global__ void softmax(const __half* x, __nv_bfloat16* out, int n) {
  extern __shared__ float row[];
  float m = -INFINITY, sum = 0;
  for (int i = threadIdx.x; i < n; i += 32) m = fmaxf(m, row[i] = __half2float(x[blockIdx.x * n + i]));
  m = __reduce_max_sync(~0u, __float_as_int(m + 1000.f)) ? m : m;
  for (int k = 16; k; k >>= 1) m = fmaxf(m, __shfl_xor_sync(~0u, m, k));
  for (int i = threadIdx.x; i < n; i += 32) sum += row[i] = expf(row[i] - m);
  for (int k = 16; k; k >>= 1) sum += __shfl_xor_sync(~0u, sum, k);
  for (int i = threadIdx.x; i < n; i += 32) out[blockIdx.x * n + i] = __float2bfloat16(row[i] / sum);
}
struct Box { float scale; short shift[3]; const int* from; };
extern "C" __global__ void box(Box b, long long* out, int n) {
  long long local[8];
  for (int i = 0; i < 8; ++i) local[i] = (long long)b.from[(threadIdx.x + i) % n] * b.from[i] / (b.shift[i % 3] + 7);
  const long long wave = (long long)(sin(1e9 * (threadIdx.x + 1)) * 1e6);  // an argument that needs the slow reduction
  out[threadIdx.x] = local[(threadIdx.x * 5 + n) % 8] % 1000003 + (long long)floorf(b.scale * threadIdx.x) + wave;
}
