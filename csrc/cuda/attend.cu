// attend: a = softmax_m(fc_select . act(BN(fc_reduce . s)) + select_bias) on (B, C)-sized data, and its backward. One cooperative launch
// each: whatever a step needs of other images, the grid waits for. There is little to move and to compute. Loads take long to come, so
// all of a tile are under way at a time, and long sums are cut into parts for as many blocks as a device holds.

#include "attention.cuh"

namespace sk::cuda {

// Of a product a block has kTile rows and as many columns, a thread kOwn by kOwn of them for one of kSlices slices of what is summed over.
// Of that, kDepth is in shared memory at a time, and the slices take kChain by turns: a long chain of additions loses more.
constexpr int kTile = kWarp, kOwn = 4, kDepth = 64, kChain = 16;
constexpr int kAcross = kTile / kOwn, kSlices = kThreads / (kAcross * kAcross);
// A tile comes as vectors of kOwn values, kAcross threads side by side. Those of a thread are kTile apart.
constexpr int kVectors = kDepth / kTile;
static_assert(kAcross * kTile == kThreads && kSlices * kChain == kDepth && kDepth % kTile == 0);
// Rows of a tile of sums are not to begin in the same bank.
constexpr int kStride = kTile + kOwn;
// A tile of sums for each slice, where the two tiles of the operands were before; beside them there is one more, and a value a column.
template <class A> constexpr size_t kShared = ((kSlices + 1) * kStride + 1) * kTile * sizeof(A);
static_assert(2 * kDepth <= kSlices * kStride);

__host__ __device__ constexpr int tiles_of(int64_t n) { return static_cast<int>((n + kTile - 1) / kTile); }

// Where the vectors of this thread begin in a tile: along what is contiguous, and across.
__device__ __forceinline__ int along() { return static_cast<int>(threadIdx.x) % kAcross * kOwn; }
__device__ __forceinline__ int across() { return static_cast<int>(threadIdx.x) / kAcross; }

// V values side by side, or zeros if they are not there.
template <int V, class T, class A> __device__ __forceinline__ void load_if(bool there, const T* p, A* x) {
  struct alignas(V * sizeof(T) < 16 ? V * sizeof(T) : 16) Vector {
    T values[V];
  } vector{};
  if (there) vector = *reinterpret_cast<const Vector*>(p);
#pragma unroll
  for (int e = 0; e < V; ++e) x[e] = static_cast<A>(widen(vector.values[e]));
}

// As many of the values as are left.
template <class A> __device__ __forceinline__ void store_some(A* p, int64_t left, const A (&x)[kOwn]) {
  if (left >= kOwn && reinterpret_cast<uintptr_t>(p) % 16 == 0) return store_sums(p, x);
#pragma unroll
  for (int e = 0; e < kOwn; ++e)
    if (e < left) p[e] = x[e];
}

// Whether rows that are `step` apart from p on are of whole vectors.
template <class T> __device__ __forceinline__ bool whole(const T* p, int64_t step) {
  constexpr size_t kAligned = sizeof(T) < 4 ? kOwn * sizeof(T) : 16;
  return step % kOwn == 0 && reinterpret_cast<uintptr_t>(p) % kAligned == 0;
}

// visit<V>(j, v) for values v to v + V - 1 of the vectors j of this thread: all of a vector together, or one by one.
template <class Visit> __device__ __forceinline__ void every_vector(bool together, const Visit& visit) {
  const auto all = [&]<int V>() {
#pragma unroll
    for (int j = 0; j < kVectors; ++j)
#pragma unroll
      for (int v = 0; v < kOwn; v += V) visit.template operator()<V>(j, v);
  };
  if (together) all.template operator()<kOwn>();
  else all.template operator()<1>();
}

// What is of a type that is known, beside an Array.
template <class T, class F> __device__ __forceinline__ void with_pointer(const T* p, const F& from) { from(p); }

// An operand of a product has fetch(k, end, x), the vectors of this thread of a tile from k on with zeros beyond `end`, and kAlongK,
// whether the vectors are along k or along the rows.

// Row by row, or k by k, which are `step` apart. A thread has the row `first` + across(), or, if the vectors are along them, rows from
// `first` + along() on, as far as they are less than `rows`.
template <bool kAlong, class Data> struct Matrix {
  Data data;
  int first, rows, step;
  static constexpr bool kAlongK = kAlong;

  template <class A> __device__ __forceinline__ void fetch(int k, int end, A (&x)[kVectors][kOwn]) const {
    const int row = first + (kAlongK ? across() : along()), own = k + (kAlongK ? along() : across());
    with_pointer(data, [&](const auto* p) {
      const auto* const from = p + (kAlongK ? int64_t{row} * step + own : int64_t{own} * step + row);
      every_vector(whole(p, step), [&]<int V>(int j, int v) {
        const bool there = row + (kAlongK ? 0 : v) < rows && own + j * kTile + (kAlongK ? v : 0) < end;
        load_if<V>(there, from + j * kTile * int64_t{kAlongK ? 1 : step} + v, x[j] + v);
      });
    });
  }
};

// s, the mean of what is pooled.
template <class A> struct Pooled {
  const Attend& f;
  int64_t image;
  bool writes;
  static constexpr bool kAlongK = true;

  __device__ __forceinline__ void fetch(int k, int end, A (&x)[kVectors][kOwn]) const {
    const A* const pooled = static_cast<const A*>(f.pooled);
    const int first = k + along();
    const auto there = [&](int c) { return image < f.B && c < end; };
#pragma unroll
    for (auto& vector : x)
#pragma unroll
      for (A& total : vector) total = 0;
#pragma unroll 2
    for (int64_t part = 0; part < f.P; ++part)
      every_vector(whole(pooled, f.C), [&]<int V>(int j, int v) {
        const int c = first + j * kTile + v;
        A y[V];
        load_if<V>(there(c), pooled + (image * f.P + part) * f.C + c, y);
#pragma unroll
        for (int e = 0; e < V; ++e) x[j][v + e] += y[e];
      });
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      const int c = first + j * kTile;
#pragma unroll
      for (A& total : x[j]) total /= static_cast<A>(f.pixels);
      if (writes && there(c)) store_some(static_cast<A*>(f.s) + image * f.C + c, end - c, x[j]);
    }
  }
};

// The gradient of the logits: a_m (da_m - sum_m a_m da_m), of all M * C.
template <class A> struct Logits {
  const AttendBackward& f;
  int64_t image;
  bool writes;
  static constexpr bool kAlongK = true;

  __device__ __forceinline__ void fetch(int k, int end, A (&x)[kVectors][kOwn]) const {
    const int C = static_cast<int>(f.C), M = static_cast<int>(f.M), first = k + along();
    const A *const a = static_cast<const A*>(f.a) + image * M * C, *const da = static_cast<const A*>(f.da) + image * M * C;
    A* const dlogits = static_cast<A*>(f.dlogits) + image * M * C;
    const auto there = [&](int i) { return image < f.B && i < end; };
    every_vector(whole(static_cast<const A*>(f.a), C) && whole(static_cast<const A*>(f.da), C), [&]<int V>(int j, int v) {
      const int i = first + j * kTile + v;
      A weight[V], gradient[V], total[V] = {};
#pragma unroll 2
      for (int m = 0; m < M; ++m) {
        const int at = m * C + i % C;
        load_if<V>(there(i), a + at, weight);
        load_if<V>(there(i), da + at, gradient);
#pragma unroll
        for (int e = 0; e < V; ++e) total[e] += weight[e] * gradient[e];
      }
      load_if<V>(there(i), a + i, weight);
      load_if<V>(there(i), da + i, gradient);
#pragma unroll
      for (int e = 0; e < V; ++e) x[j][v + e] = weight[e] * (gradient[e] - total[e]);
    });
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      const int i = first + j * kTile;
      if (writes && there(i)) store_some(dlogits + i, end - i, x[j]);
    }
  }
};

// Tiles are k by k, kTile rows side by side, but groups of kOwn rows change places, so that a warp that brings vectors along k does not
// write to the same banks.
__device__ __forceinline__ int turned(int row, int k) { return row ^ (k & (kTile - kOwn)); }

// result(row, column, x) for kOwn neighbouring columns of a row: x = sum of left[row, k] right[column, k], k from `start` to `end` - 1.
template <class A, class Left, class Right, class Result>
__device__ __forceinline__ void product(const Left& left, const Right& right, int start, int end, const Result& result) {
  A *const shared = shared_memory<A>(), *const lefts = shared, *const rights = shared + kDepth * kTile;
  const int slice = across() / kAcross, row = across() % kAcross * kOwn, column = along();
  A x[kVectors][kOwn], y[kVectors][kOwn], total[kOwn][kOwn] = {};
  const auto put = [&]<bool kAlongK>(A* tile, const A(&vectors)[kVectors][kOwn]) {
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      const int k = j * kTile + (kAlongK ? along() : across());
      if constexpr (kAlongK) {
#pragma unroll
        for (int e = 0; e < kOwn; ++e) tile[(k + e) * kTile + turned(across(), k)] = vectors[j][e];
      } else {
        store_sums(tile + k * kTile + turned(along(), k), vectors[j]);
      }
    }
  };
  // While a tile is multiplied, the next is on its way.
#pragma unroll 1
  for (int k = start, depth = 0;; k += kDepth) {
    if (k < end) {
      // First what is computed of what it loads.
      right.fetch(k, end, y);
      left.fetch(k, end, x);
    }
    if (slice * kChain < depth) {
      A part[kOwn][kOwn] = {};
      // No more at a time than there are registers for.
#pragma unroll 1
      for (int own = slice * kChain; own < (slice + 1) * kChain; own += kOwn) {
        const A *const l = lefts + own * kTile + turned(row, own), *const r = rights + own * kTile + turned(column, own);
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
          A of_rows[kOwn], of_columns[kOwn];
          load(l + i * kTile, of_rows);
          load(r + i * kTile, of_columns);
#pragma unroll
          for (int p = 0; p < kOwn; ++p)
#pragma unroll
            for (int q = 0; q < kOwn; ++q) part[p][q] += of_rows[p] * of_columns[q];
        }
      }
#pragma unroll
      for (int p = 0; p < kOwn; ++p)
#pragma unroll
        for (int q = 0; q < kOwn; ++q) total[p][q] += part[p][q];
    }
    __syncthreads();
    if (k >= end) break;
    depth = end - k;
    put.template operator()<Left::kAlongK>(lefts, x);
    put.template operator()<Right::kAlongK>(rights, y);
    __syncthreads();
  }
#pragma unroll
  for (int p = 0; p < kOwn; ++p) store_sums(shared + (slice * kTile + row + p) * kStride + column, total[p]);
  __syncthreads();
  A sums[kOwn] = {};
#pragma unroll
  for (int other = 0; other < kSlices; ++other) {
    A part[kOwn];
    load(shared + (other * kTile + across()) * kStride + along(), part);
#pragma unroll
    for (int e = 0; e < kOwn; ++e) sums[e] += part[e];
  }
  result(across(), along(), sums);
}

// Where what is summed over is cut: into `count` parts of `length` terms, of which the last may have less.
template <class F> struct InParts {
  F f;
  int length, count;
};

// The sum of the first `count` values that are `step` apart, or of kTogether if there are more: all of them are under way at a time.
constexpr int kTogether = 16;
template <class A> __device__ __forceinline__ A sum_together(const A* p, int count, int64_t step) {
  A values[kTogether], total = 0;
#pragma unroll
  for (int i = 0; i < kTogether; ++i) values[i] = i < count ? p[i * step] : A(0);
#pragma unroll
  for (int i = 0; i < kTogether; ++i) total += values[i];
  return total;
}

// The sums over the block, in each of its threads.
template <int N> __device__ __forceinline__ void sum_of_block(double (&total)[N], double* shared) {
#pragma unroll
  for (int i = 0; i < N; ++i) total[i] = sum_of_lanes(total[i], kWarp);
  __syncthreads();
#pragma unroll
  for (int i = 0; i < N; ++i)
    if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp * N + i] = total[i];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < N; ++i) {
    total[i] = 0;
    for (int warp = 0; warp < kWarps; ++warp) total[i] += shared[warp * N + i];
  }
}

template <class A> constexpr Type kTypeOf = sizeof(A) == sizeof(double) ? Type::float64 : Type::float32;

// Blocks of a multiprocessor, as far as registers go.
template <class A> constexpr int kResident = sizeof(A) == sizeof(double) ? 1 : 2;

template <class A>
__global__ __launch_bounds__(kThreads, kResident<A>) void _attend_kernel(const __grid_constant__ InParts<Attend> in_parts) {
  const Attend& f = in_parts.f;
  A *const reduced = static_cast<A*>(f.reduced), *const hidden = static_cast<A*>(f.hidden), *const a = static_cast<A*>(f.a);
  const int B = static_cast<int>(f.B), C = static_cast<int>(f.C), D = static_cast<int>(f.D), M = static_cast<int>(f.M);
  const int image_tiles = tiles_of(B), hidden_tiles = tiles_of(D);

  // The parts of `reduced`, (count, D, B), where there is room for them as yet.
  A* const parts = in_parts.count == 1 ? hidden : a;
  for (int item = blockIdx.x; item < image_tiles * hidden_tiles * in_parts.count; item += gridDim.x) {
    const int d = item % hidden_tiles * kTile, b = item / hidden_tiles % image_tiles * kTile, part = item / hidden_tiles / image_tiles;
    const int start = part * in_parts.length, end = C - start < in_parts.length ? C : start + in_parts.length;
    product<A>(Matrix<true, Array>{f.fc_reduce, d, D, C}, Pooled<A>{f, b + across(), d == 0}, start, end,
               [&](int row, int column, const A(&x)[kOwn]) {
                 if (d + row < D) store_some(parts + (int64_t{part} * D + d + row) * B + b + column, B - b - column, x);
               });
  }
  wait_for_grid();

  // A block has a column of `reduced`. `hidden` is (D, B).
  for (int d = blockIdx.x; d < D; d += gridDim.x) {
    A* const own = hidden + int64_t{d} * B;
    double total[1] = {}, squares[1] = {};
    for (int b = threadIdx.x; b < B; b += kThreads) {
      own[b] = reduced[int64_t{b} * D + d] = sum_together(parts + int64_t{d} * B + b, in_parts.count, int64_t{D} * B);
      total[0] += own[b];
    }
    A mean, var;
    if (f.given_mean.data == nullptr) {
      sum_of_block(total, shared_memory<double>());
      const double average = total[0] / B;
      for (int b = threadIdx.x; b < B; b += kThreads) squares[0] += (own[b] - average) * (own[b] - average);
      sum_of_block(squares, shared_memory<double>());
      mean = static_cast<A>(average);
      var = static_cast<A>(squares[0] / B);
    } else {
      mean = at<A>(f.given_mean, d);
      var = at<A>(f.given_var, d);
    }
    const Column<A> column(f, d, mean, var);
    for (int b = threadIdx.x; b < B; b += kThreads) own[b] = column.act(own[b]);
    if (threadIdx.x == 0) {
      static_cast<A*>(f.mean)[d] = mean;
      static_cast<A*>(f.var)[d] = var;
    }
  }
  wait_for_grid();

  // A tile is of some images and, for all branches, of some channels.
  const int channels = kTile / M, channel_tiles = (C + channels - 1) / channels;
  // Not where the product puts its tiles, or where it sums them up.
  A *const logits = shared_memory<A>() + kSlices * kTile * kStride, *const bias = logits + kTile * kStride;
  for (int item = blockIdx.x; item < image_tiles * channel_tiles; item += gridDim.x) {
    const int c = item % channel_tiles * channels, b = item / channel_tiles * kTile;
    const auto row_of = [&](int i) { return i / channels * C + c + i % channels; };
    const auto there = [&](int i) { return i / channels < M && c + i % channels < C; };
    if (threadIdx.x < kTile)
      bias[threadIdx.x] = f.select_bias.data == nullptr || !there(threadIdx.x) ? A(0) : at<A>(f.select_bias, row_of(threadIdx.x));
    // The rows of fc_select are not side by side: each thread is told its own.
    product<A>(Matrix<false, const A*>{hidden, b, B, B},
               Matrix<true, Array>{f.fc_select, row_of(across()) - across(), there(across()) ? M * C : 0, D}, 0, D,
               [&](int row, int column, A(&x)[kOwn]) {
#pragma unroll
                 for (int e = 0; e < kOwn; ++e) x[e] += bias[column + e];
                 store_sums(logits + row * kStride + column, x);
               });
    __syncthreads();
    for (int i = threadIdx.x; i < kTile * channels; i += kThreads) {
      const int image = b + i / channels, channel = c + i % channels;
      if (image >= B || channel >= C) continue;
      A* const own = logits + i / channels * kStride + i % channels;
      softmax(own, M, channels);
      for (int m = 0; m < M; ++m) a[(int64_t{image} * M + m) * C + channel] = own[m * channels];
    }
  }
}

template <class A>
__global__ __launch_bounds__(kThreads,
                             kResident<A>) void _attend_backward_kernel(const __grid_constant__ InParts<AttendBackward> in_parts) {
  const AttendBackward& f = in_parts.f;
  const A *const reduced = static_cast<const A*>(f.reduced), *const mean = static_cast<const A*>(f.mean);
  const A *const var = static_cast<const A*>(f.var), *const dlogits = static_cast<const A*>(f.dlogits);
  A *const dreduced = static_cast<A*>(f.dreduced), *const hidden = static_cast<A*>(f.hidden), *const ds = static_cast<A*>(f.ds);
  const int B = static_cast<int>(f.B), C = static_cast<int>(f.C), D = static_cast<int>(f.D), wide = static_cast<int>(f.M) * C;
  const int image_tiles = tiles_of(B), hidden_tiles = tiles_of(D), narrow_tiles = tiles_of(C), wide_tiles = tiles_of(wide);

  // The parts of the gradient after the hidden activation, (count, D, B), where there is room for them as yet.
  A* const parts = in_parts.count == 1 ? dreduced : ds;
  for (int item = blockIdx.x; item < image_tiles * hidden_tiles * in_parts.count; item += gridDim.x) {
    const int d = item % hidden_tiles * kTile, b = item / hidden_tiles % image_tiles * kTile, part = item / hidden_tiles / image_tiles;
    const int start = part * in_parts.length, end = wide - start < in_parts.length ? wide : start + in_parts.length;
    product<A>(Matrix<false, Array>{f.fc_select, d, D, D}, Logits<A>{f, b + across(), d == 0}, start, end,
               [&](int row, int column, const A(&x)[kOwn]) {
                 if (d + row < D) store_some(parts + (int64_t{part} * D + d + row) * B + b + column, B - b - column, x);
               });
  }
  wait_for_grid();

  // A block has a column of it, or sums some columns of `dlogits`. `dreduced` is (D, B), and (B, D) as well.
  A* const by_image = dreduced + int64_t{D} * B;
  for (int item = blockIdx.x; item < D + wide_tiles; item += gridDim.x) {
    if (item >= D) {
      const int i = (item - D) * kWarp + threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
      A total = 0;
      for (int b = warp; i < wide && b < B; b += kTogether * kWarps)
        total += sum_together(dlogits + int64_t{b} * wide + i, (B - b + kWarps - 1) / kWarps, int64_t{kWarps} * wide);
      A* const shared = shared_memory<A>();
      __syncthreads();
      shared[threadIdx.x] = total;
      __syncthreads();
      if (warp > 0 || i >= wide) continue;
      for (int other = 1; other < kWarps; ++other) total += shared[other * kWarp + threadIdx.x];
      static_cast<A*>(f.dselect_bias)[i] = total;
      continue;
    }
    const int d = item;
    const Column<A> column(f, d, mean[d], var[d]);
    A* const own = dreduced + int64_t{d} * B;
    // Σ dreduced and Σ dreduced · normalized.
    double sums[2] = {};
    for (int b = threadIdx.x; b < B; b += kThreads) {
      const A x = reduced[int64_t{b} * D + d], g = column.gate(x, sum_together(parts + int64_t{d} * B + b, in_parts.count, int64_t{D} * B));
      own[b] = g;
      sums[0] += g;
      sums[1] += static_cast<double>(g) * column.normalized(x);
    }
    sum_of_block(sums, shared_memory<double>());
    if (threadIdx.x == 0) {
      static_cast<A*>(f.dbias)[d] = static_cast<A>(sums[0]);
      static_cast<A*>(f.dweight)[d] = static_cast<A>(sums[1]);
    }
    const A average = f.training ? static_cast<A>(sums[0] / B) : A(0), slope = f.training ? static_cast<A>(sums[1] / B) : A(0);
    for (int b = threadIdx.x; b < B; b += kThreads) {
      const int64_t i = int64_t{b} * D + d;
      own[b] = by_image[i] = column.weight * column.r * (own[b] - average - column.normalized(reduced[i]) * slope);
      hidden[i] = column.act(reduced[i]);
    }
  }
  wait_for_grid();

  // dfc_select (M * C, D) = dlogitsᵀ . hidden; dfc_reduce (D, C) = dreducedᵀ . s; ds (B, C) = dreduced . fc_reduce: the longest first.
  const auto array = [](const void* data) { return Array{data, kTypeOf<A>}; };
  const int first = wide_tiles * hidden_tiles, second = first + hidden_tiles * narrow_tiles, all = second + image_tiles * narrow_tiles;
  for (int item = blockIdx.x; item < all; item += gridDim.x) {
    const int i = item < first ? item : item < second ? item - first : item - second, tiles = item < first ? hidden_tiles : narrow_tiles;
    const int row = i / tiles * kTile, column = i % tiles * kTile;
    using Left = Matrix<false, const A*>;
    using Right = Matrix<false, Array>;
    const Left left = item < first ? Left{dlogits, row, wide, wide} : item < second ? Left{by_image, row, D, D} : Left{dreduced, row, B, B};
    const Right right = item < first    ? Right{array(hidden), column, D, D}
                        : item < second ? Right{array(f.s), column, C, C}
                                        : Right{f.fc_reduce, column, C, C};
    product<A>(left, right, 0, item < second ? B : D, [&](int own_row, int own_column, const A(&x)[kOwn]) {
      const int r = row + own_row, c = column + own_column;
      const int rows = item < first ? wide : item < second ? D : B, columns = item < first ? D : C;
      A* const out = static_cast<A*>(item < first ? f.dfc_select : item < second ? f.dfc_reduce : f.ds);
      if (r < rows) store_some(out + int64_t{r} * columns + c, columns - c, x);
    });
  }
}

// Of the attention or its backward.
template <class F> static std::string shape_of(const InParts<F>& in_parts) {
  const F& f = in_parts.f;
  return "B = " + std::to_string(f.B) + ", M = " + std::to_string(f.M) + ", C = " + std::to_string(f.C) + ", D = " + std::to_string(f.D);
}

// Products of `length` terms for each image and each of D, in so many parts that a large device has something to do, as far as there is
// `room` for so many values.
template <class F> static InParts<F> in_parts(const F& f, int64_t length, int64_t room) {
  constexpr int64_t kItems = 256, kLeast = kChain * kSlices;
  const int64_t tiles = int64_t{tiles_of(f.B)} * tiles_of(f.D);
  const int64_t most = std::max<int64_t>(1, std::min({int64_t{kTogether}, room / (f.B * f.D), length / kLeast}));
  const int64_t each = int64_t{kTile} * tiles_of(quotient(length, std::clamp<int64_t>(kItems / tiles, 1, most)));
  return {f, static_cast<int>(each), static_cast<int>(quotient(length, each))};
}

void attend(const Attend& f, Queue queue) {
  if (f.M > kTile) throw std::runtime_error("attend: at most " + std::to_string(kTile) + " branches, got " + std::to_string(f.M));
  const InParts<Attend> parameters = in_parts(f, f.C, f.B * f.M * f.C);
  const int64_t images = tiles_of(f.B);
  const int64_t blocks = std::max({images * tiles_of(f.D) * parameters.count, f.D, images * quotient(f.C, kTile / f.M)});
  dispatch_accumulate(
      f.type, [&]<class A>() { launch<_attend_kernel<A>>("attend", parameters, blocks, Blocks::together, kShared<A>, queue, parameters); });
}

void attend_backward(const AttendBackward& f, Queue queue) {
  const InParts<AttendBackward> parameters = in_parts(f, f.M * f.C, f.B * f.C);
  const int64_t images = tiles_of(f.B), hidden = tiles_of(f.D), narrow = tiles_of(f.C), wide = tiles_of(f.M * f.C);
  const int64_t blocks = std::max({images * hidden * parameters.count, f.D + wide, hidden * wide + (hidden + images) * narrow});
  dispatch_accumulate(f.type, [&]<class A>() {
    launch<_attend_backward_kernel<A>>("attend_backward", parameters, blocks, Blocks::together, kShared<A>, queue, parameters);
  });
}

}  // namespace sk::cuda
