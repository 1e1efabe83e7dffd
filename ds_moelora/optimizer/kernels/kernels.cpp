// Row kernels of optimizer/kernels/cpp.py, which describes their arguments. GCC's vector extensions: any CPU, any vector length.
//
// A vector of W = 16 floats holds 16 / R rows of a factor (E, n, R) as they lie. With rot_k the rotation by k within every
// group of R lanes and lane i of a group standing for column i:
//
//     Gram matrix    G[i, (i + k) % R]  = sum over vectors and groups of  x[i] * rot_k(x)[i]
//     row times M    out[i]             = sum over k of  rot_k(x)[i] * M[(i + k) % R, i]
//
// Rank first (PEFT's A, (R, n)) a vector holds 16 elements of one column. Every expert is done by one thread in one
// order: results do not depend on the number of threads.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <omp.h>

namespace {

constexpr int W = 16;
constexpr int STREAMS = 4;  // parts of an expert walked through side by side: one alone is bound by latency
typedef float V __attribute__((vector_size(4 * W)));
typedef float Unaligned __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef int32_t Lanes __attribute__((vector_size(4 * W)));

inline V load(const float* p, int64_t count = W) {
  if (count >= W) return *(const Unaligned*)p;
  V v = {};
  memcpy(&v, p, 4 * count);
  return v;
}

inline void store(float* p, V v, int64_t count = W) {
  if (count >= W) *(Unaligned*)p = v;
  else memcpy(p, &v, 4 * count);
}

inline V root(V v) {
  alignas(4 * W) float x[W];
  *(V*)x = v;
  for (int l = 0; l < W; l++) x[l] = std::sqrt(x[l]);
  return *(V*)x;
}

template <int R> struct Rotations {
  Lanes by[R];
  Rotations() {
    for (int k = 0; k < R; k++)
      for (int l = 0; l < W; l++) by[k][l] = l / R * R + (l % R + k) % R;
  }
  V operator()(V v, int k) const { return __builtin_shuffle(v, by[k]); }
};

// Calls f(i, stream, count) for every vector of n elements: whole ones first, STREAMS at a time.
template <class F> inline void for_vectors(int64_t n, F f) {
  const int64_t part = n / (STREAMS * W) * W;
  int64_t i = 0;
  for (; i < part; i += W)
    for (int s = 0; s < STREAMS; s++) f(i + s * part, s, (int64_t)W);
  for (i = STREAMS * part; i + W <= n; i += W) f(i, 0, (int64_t)W);
  if (i < n) f(i, 0, n - i);
}

template <int R> void add_gram(const float* x, int64_t rows, float* G) {
  const Rotations<R> rot;
  constexpr int K = R / 2 + 1;  // G is symmetric
  V sums[STREAMS][K] = {};
  for_vectors(rows * R, [&](int64_t i, int s, int64_t count) {
    const V v = load(x + i, count);
    for (int k = 0; k < K; k++) sums[s][k] += v * rot(v, k);
  });
  for (int k = 0; k < K; k++) {
    const V total = (sums[0][k] + sums[1][k]) + (sums[2][k] + sums[3][k]);
    for (int a = 0; a < R; a++) {
      if (2 * k == R && a >= k) break;  // (a, b) and (b, a) are both in this rotation
      float sum = 0;
      for (int l = a; l < W; l += R) sum += total[l];
      const int b = (a + k) % R;
      G[a * R + b] += sum;
      if (a != b) G[b * R + a] += sum;
    }
  }
}

template <int R> void add_gram_rank_first(const float* x, int64_t n, float* G) {
  for (int a = 0; a < R; a++)
    for (int b = 0; b <= a; b++) {
      V sums[STREAMS] = {};
      for_vectors(n, [&](int64_t i, int s, int64_t count) { sums[s] += load(x + a * n + i, count) * load(x + b * n + i, count); });
      const V total = (sums[0] + sums[1]) + (sums[2] + sums[3]);
      float sum = 0;
      for (int l = 0; l < W; l++) sum += total[l];
      G[a * R + b] += sum;
      if (a != b) G[b * R + a] += sum;
    }
}

// Calls use(i, products, count) with vectors of the product of all rows with M. What lies at i may then be overwritten.
template <int R, class Use> void multiply(const float* x, int64_t rows, const float* M, Use use) {
  const Rotations<R> rot;
  V m[R];
  for (int k = 0; k < R; k++)
    for (int l = 0; l < W; l++) m[k][l] = M[(l % R + k) % R * R + l % R];
  for_vectors(rows * R, [&](int64_t i, int, int64_t count) {
    const V v = load(x + i, count);
    V out = v * m[0];
    for (int k = 1; k < R; k++) out += rot(v, k) * m[k];
    use(i, out, count);
  });
}

template <int R, class Use> void multiply_rank_first(const float* x, int64_t n, const float* M, Use use) {
  for (int64_t i = 0; i < n; i += W) {
    const int64_t count = n - i < W ? n - i : W;
    V v[R];
    for (int j = 0; j < R; j++) v[j] = load(x + j * n + i, count);
    for (int c = 0; c < R; c++) {
      V out = v[0] * M[c];
      for (int j = 1; j < R; j++) out += v[j] * M[j * R + c];
      use(c * n + i, out, count);
    }
  }
}

// One step of AdamW, as torch's fused kernel does it.
struct AdamW {
  float *weight, *average, *square;
  float decay, beta1, beta2, rate, correction, eps;

  // settings: lr, beta1, beta2, eps, weight_decay
  AdamW(const int64_t* at, int64_t offset, const double* settings) {
    weight = (float*)at[0] + offset, average = (float*)at[1] + offset, square = (float*)at[2] + offset;
    const double lr = settings[0], step = *(const float*)at[3] + 1.0;
    decay = 1 - lr * settings[4], beta1 = settings[1], beta2 = settings[2], eps = settings[3];
    rate = lr / (1 - std::pow(settings[1], step));
    correction = 1 / std::sqrt(1 - std::pow(settings[2], step));
  }

  void operator()(int64_t i, V gradient, int64_t count) const {
    V m = load(average + i, count), v = load(square + i, count), w = load(weight + i, count);
    m += (gradient - m) * (1 - beta1);
    v = v * beta2 + gradient * gradient * (1 - beta2);
    w = w * decay - rate * m / (root(v) * correction + eps);
    store(average + i, m, count), store(square + i, v, count), store(weight + i, w, count);
  }
};

// 16 matrices side by side, one per lane.
template <int R> struct Batch {
  V at[R][R];
  V trace() const {
    V sum = at[0][0];
    for (int i = 1; i < R; i++) sum += at[i][i];
    return sum;
  }
};

// X = (A + d I)^-1 by Cholesky; returns which lanes are usable: see _attempt in optimizer/preconditioner.py.
template <int R> Lanes attempt(const Batch<R>& A, V d, Batch<R>& X) {
  V L[R][R], inverse[R][R];
  const V one = V{} + 1;
  Lanes usable = d == d;
  for (int j = 0; j < R; j++) {
    V pivot = A.at[j][j] + d;
    for (int k = 0; k < j; k++) pivot -= L[j][k] * L[j][k];
    const Lanes sound = pivot >= 0.5f * d;
    usable &= sound;
    inverse[j][j] = 1 / root(sound ? pivot : one);
    for (int i = j + 1; i < R; i++) {
      V sum = A.at[i][j];
      for (int k = 0; k < j; k++) sum -= L[i][k] * L[j][k];
      L[i][j] = sum * inverse[j][j];
    }
  }
  for (int j = 0; j < R; j++)
    for (int i = j + 1; i < R; i++) {
      V sum = {};
      for (int k = j; k < i; k++) sum += L[i][k] * inverse[k][j];
      inverse[i][j] = -sum * inverse[i][i];
    }
  V norm = {};
  for (int i = 0; i < R; i++)
    for (int j = 0; j <= i; j++) {
      V sum = {};
      for (int k = i; k < R; k++) sum += inverse[k][i] * inverse[k][j];
      X.at[i][j] = X.at[j][i] = sum;
      norm += (sum * d) * (sum * d) * (i == j ? 1.f : 2.f);
    }
  return usable & (norm <= 4.f * R);
}

template <int R> void damped_inverse(const float* G, int64_t count, const float* damping, int64_t stride, float* out) {
  constexpr float EPS = std::numeric_limits<float>::epsilon(), TINY = std::numeric_limits<float>::min();
  Batch<R> A = {}, X, second;
  V d = {}, poison = {};
  for (int64_t l = 0; l < count; l++) d[l] = damping[l * stride];
  for (int i = 0; i < R; i++)
    for (int j = 0; j < R; j++) {
      for (int64_t l = 0; l < count; l++) A.at[i][j][l] = G[(l * R + i) * R + j];
      poison += A.at[i][j] * 0;
    }
  const V trace = A.trace(), floor = EPS * trace;
  d = d > floor ? d : floor;
  d = d > TINY ? d : V{} + TINY;
  const Lanes first = attempt<R>(A, d, X);
  bool all = true;
  for (int64_t l = 0; l < count; l++) all &= first[l] != 0;
  if (!all) {
    const V raised = 64 * EPS * trace;
    const Lanes usable = attempt<R>(A, d > raised ? d : raised, second);
    const V bound = 1 / (trace + d), zero = {};
    for (int i = 0; i < R; i++)
      for (int j = 0; j < R; j++) X.at[i][j] = first ? X.at[i][j] : usable ? second.at[i][j] : i == j ? bound : zero;
  }
  for (int i = 0; i < R; i++)
    for (int j = 0; j < R; j++)
      for (int64_t l = 0; l < count; l++) out[(l * R + i) * R + j] = poison[l] == 0 ? X.at[i][j][l] : poison[l];
}

// A block of rows: see RowLayout.table in optimizer/kernels/rows.py.
struct Block {
  int64_t unit, offset, experts, rows, stride, first;
};

// Calls f(block, offset in its unit, matrix) for every expert of every block whose unit is there.
template <class F> void for_experts(int64_t count, const int64_t* units, const Block* blocks, const int64_t* matrix, int r, int threads, F f) {
#pragma omp parallel num_threads(threads)
  for (int64_t b = 0; b < count; b++) {
    const Block& block = blocks[b];
    if (units[block.unit])
      for (int64_t e = 0; e < block.experts; e++)
        if ((block.first + e) % omp_get_num_threads() == omp_get_thread_num())
          f(block, block.offset + e * block.rows * r, matrix[block.first + e]);
  }
}

template <int R> struct Kernels {
  static void add_grams(int64_t count, const int64_t* units, const Block* blocks, const int64_t* matrix, float* grams, int threads) {
    for_experts(count, units, blocks, matrix, R, threads, [=](const Block& block, int64_t offset, int64_t which) {
      const float* x = (const float*)units[block.unit] + offset;
      (block.stride > 1 ? add_gram_rank_first<R> : add_gram<R>)(x, block.rows, grams + which * R * R);
    });
  }

  template <class Use> static void multiply_one(const float* x, const Block& block, const float* M, Use use) {
    if (block.stride > 1) multiply_rank_first<R>(x, block.rows, M, use);
    else multiply<R>(x, block.rows, M, use);
  }

  static void precondition(int64_t count, const int64_t* units, const Block* blocks, const int64_t* matrix, const float* inverses,
                           const int64_t* state, const double* settings, int threads) {
    for_experts(count, units, blocks, matrix, R, threads, [=](const Block& block, int64_t offset, int64_t which) {
      float* x = (float*)units[block.unit] + offset;
      const float* M = inverses + which * R * R;
      const int64_t* kept = state ? state + 4 * block.unit : nullptr;
      if (kept && kept[0]) multiply_one(x, block, M, AdamW(kept, offset, settings + 5 * block.unit));
      else multiply_one(x, block, M, [=](int64_t i, V out, int64_t n) { store(x + i, out, n); });
    });
  }

  static void invert(int64_t matrices, const float* grams, const float* damping, int64_t stride, float* out, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < matrices; i += W) {
      const int64_t count = matrices - i < W ? matrices - i : W;
      damped_inverse<R>(grams + i * R * R, count, damping + i * stride, stride, out + i * R * R);
    }
  }
};

}  // namespace

#define FOR_RANK(CALL)                            \
  switch (rank) {                                 \
    case 1: return Kernels<1>::CALL;              \
    case 2: return Kernels<2>::CALL;              \
    case 4: return Kernels<4>::CALL;              \
    case 8: return Kernels<8>::CALL;              \
    case 16: return Kernels<16>::CALL;            \
  }

extern "C" {

void add_grams(int64_t rank, int64_t threads, int64_t count, const int64_t* units, const Block* blocks, const int64_t* matrix, float* grams) {
  FOR_RANK(add_grams(count, units, blocks, matrix, grams, threads))
}

void precondition(int64_t rank, int64_t threads, int64_t count, const int64_t* units, const Block* blocks, const int64_t* matrix,
                  const float* inverses, const int64_t* state, const double* settings) {
  FOR_RANK(precondition(count, units, blocks, matrix, inverses, state, settings, threads))
}

void invert(int64_t rank, int64_t threads, int64_t matrices, const float* grams, const float* damping, int64_t stride, float* out) {
  FOR_RANK(invert(matrices, grams, damping, stride, out, threads))
}
}
