// attend: a = softmax_m(fc_select . act(BN(fc_reduce . s)) + select_bias) on (B, C)-sized data, and its backward. One cooperative launch
// each: whatever a step needs of other images, the grid waits for. Beside the parameters, read about B / kRows times out of the L2
// cache, there is next to nothing to move.

#include "attention.cuh"

namespace sk::cuda {

// As many images share what is read of a matrix, of which a block has so many columns; or so many of D.
constexpr int kRows = 4, kColumns = 64, kDepth = 8;

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

// Blocks of a multiprocessor, as far as registers go.
template <class A> constexpr int kResident = sizeof(A) == sizeof(double) ? 1 : 2;

__device__ __forceinline__ int64_t thread_of_grid() { return int64_t{blockIdx.x} * kThreads + threadIdx.x; }
__device__ __forceinline__ int64_t threads_of_grid() { return int64_t{gridDim.x} * kThreads; }

template <class A> __global__ __launch_bounds__(kThreads, kResident<A>) void _attend_kernel(const __grid_constant__ Attend f) {
  const A* const pooled = static_cast<const A*>(f.pooled);
  A *const s = static_cast<A*>(f.s), *const reduced = static_cast<A*>(f.reduced), *const hidden = static_cast<A*>(f.hidden);
  A* const a = static_cast<A*>(f.a);
  const int lane = threadIdx.x % kWarp;
  const int64_t warp = thread_of_grid() / kWarp, warps = threads_of_grid() / kWarp, groups = (f.B + kRows - 1) / kRows;

  for (int64_t i = thread_of_grid(); i < f.B * f.C; i += threads_of_grid()) {
    const A* const part = pooled + i / f.C * f.P * f.C + i % f.C;
    A total = 0;
    for (int64_t j = 0; j < f.P; ++j) total += part[j * f.C];
    s[i] = total / static_cast<A>(f.pixels);
  }
  wait_for_grid();

  for (int64_t item = warp; item < groups * f.D; item += warps) {
    const int64_t d = item % f.D, b = item / f.D * kRows;
    A total[kRows] = {};
    sum_in_blocks(lane, f.C, kWarp, total, [&](int64_t c, A(&part)[kRows]) {
      const A w = at<A>(f.fc_reduce, d * f.C + c);
#pragma unroll
      for (int r = 0; r < kRows; ++r)
        if (b + r < f.B) part[r] += w * s[(b + r) * f.C + c];
    });
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      total[r] = sum_of_lanes(total[r], kWarp);
      if (lane == 0 && b + r < f.B) reduced[(b + r) * f.D + d] = total[r];
    }
  }
  wait_for_grid();

  // A block has a column of `reduced`.
  for (int64_t d = blockIdx.x; d < f.D; d += gridDim.x) {
    A mean, var;
    if (f.given_mean.data == nullptr) {
      double total[1] = {}, squares[1] = {};
      for (int64_t b = threadIdx.x; b < f.B; b += kThreads) total[0] += reduced[b * f.D + d];
      sum_of_block(total, shared_memory<double>());
      const double average = total[0] / static_cast<double>(f.B);
      for (int64_t b = threadIdx.x; b < f.B; b += kThreads)
        squares[0] += (reduced[b * f.D + d] - average) * (reduced[b * f.D + d] - average);
      sum_of_block(squares, shared_memory<double>());
      mean = static_cast<A>(average);
      var = static_cast<A>(squares[0] / static_cast<double>(f.B));
    } else {
      mean = at<A>(f.given_mean, d);
      var = at<A>(f.given_var, d);
    }
    const Column<A> column(f, d, mean, var);
    for (int64_t b = threadIdx.x; b < f.B; b += kThreads) hidden[b * f.D + d] = column.act(reduced[b * f.D + d]);
    if (threadIdx.x == 0) {
      static_cast<A*>(f.mean)[d] = mean;
      static_cast<A*>(f.var)[d] = var;
    }
  }
  wait_for_grid();

  // Of as many images: a block has the logits of some channels of all branches, a thread the softmax of one channel of an image.
  const int C = static_cast<int>(f.C), tiles = (C + kColumns - 1) / kColumns;
  const int64_t wide = f.M * f.C;
  for (int64_t item = blockIdx.x; item < groups * tiles; item += gridDim.x) {
    const int first = static_cast<int>(item % tiles) * kColumns;
    const int64_t b = item / tiles * kRows, images = f.B - b < kRows ? f.B - b : kRows;
    // Columns beyond the last one are as that, and left out.
    const auto column = [&](int i) { return first + i % kColumns; };
    const auto row_of = [&](int i) { return i / kColumns * C + (column(i) < C ? column(i) : C - 1); };
    multiply_rows<8, kRows>(f.fc_select, static_cast<int>(f.M) * kColumns, static_cast<int>(f.D), hidden + b * f.D,
                            static_cast<int>(images), row_of, [&](int image, int i, A logit) {
                              if (column(i) >= C) return;
                              a[(b + image) * wide + row_of(i)] =
                                  logit + (f.select_bias.data == nullptr ? A(0) : at<A>(f.select_bias, row_of(i)));
                            });
    __syncthreads();
    for (int64_t i = threadIdx.x; i < images * kColumns; i += kThreads)
      if (first + i % kColumns < C) softmax(a + (b + i / kColumns) * wide + first + i % kColumns, f.M, f.C);
  }
}

// Of a product: a block has so many rows, its columns side by side, and so many slices of what is summed over.
constexpr int kProductRows = 6, kSlices = kThreads / kColumns;

// out[row * row_step + column * column_step] = sum_k left[row * left_row + k * left_k] right[k * columns + column], of kProductRows rows
// from `row` on and of kColumns columns; with `sums`, those of the columns of `right` as well.
template <class A>
__device__ void product(int64_t row, int64_t rows, int64_t tile, int64_t columns, int64_t length, const A* left, int64_t left_row,
                        int64_t left_k, const Array& right, A* out, int64_t row_step, int64_t column_step, A* sums) {
  const int slice = threadIdx.x / kColumns;
  const int64_t column = tile * kColumns + threadIdx.x % kColumns;
  A total[kProductRows + 1] = {};
  if (column < columns)
    sum_in_blocks(slice, length, kSlices, total, [&](int64_t k, A(&part)[kProductRows + 1]) {
      const A x = at<A>(right, k * columns + column);
#pragma unroll
      for (int r = 0; r < kProductRows; ++r)
        if (row + r < rows) part[r] += left[(row + r) * left_row + k * left_k] * x;
      part[kProductRows] += x;
    });
  A* const shared = shared_memory<A>();
  __syncthreads();
#pragma unroll
  for (int r = 0; r <= kProductRows; ++r) shared[r * kThreads + threadIdx.x] = total[r];
  __syncthreads();
  if (slice != 0 || column >= columns) return;
#pragma unroll
  for (int r = 0; r <= kProductRows; ++r) {
    for (int other = 1; other < kSlices; ++other) total[r] += shared[r * kThreads + other * kColumns + threadIdx.x];
    if (r < kProductRows && row + r < rows) out[(row + r) * row_step + column * column_step] = total[r];
  }
  if (sums != nullptr) sums[column] = total[kProductRows];
}

template <class A>
__global__ __launch_bounds__(kThreads, kResident<A>) void _attend_backward_kernel(const __grid_constant__ AttendBackward f) {
  const A *const da = static_cast<const A*>(f.da), *const a = static_cast<const A*>(f.a), *const s = static_cast<const A*>(f.s);
  const A *const reduced = static_cast<const A*>(f.reduced), *const mean = static_cast<const A*>(f.mean);
  const A* const var = static_cast<const A*>(f.var);
  A *const dlogits = static_cast<A*>(f.dlogits), *const dreduced = static_cast<A*>(f.dreduced), *const hidden = static_cast<A*>(f.hidden);
  A* const shared = shared_memory<A>();
  const int64_t images = (f.B + kRows - 1) / kRows, wide = f.M * f.C;

  for (int64_t i = thread_of_grid(); i < f.B * f.C; i += threads_of_grid()) {
    const int64_t at = i / f.C * wide + i % f.C;
    A total = 0;
    for (int64_t m = 0; m < f.M; ++m) total += a[at + m * f.C] * da[at + m * f.C];
    for (int64_t m = 0; m < f.M; ++m) dlogits[at + m * f.C] = a[at + m * f.C] * (da[at + m * f.C] - total);
  }
  wait_for_grid();

  // The gradient before the hidden activation, in `dreduced`: of a few d for each block, slices of the sum.
  constexpr int kSlice = kThreads / kDepth;
  const int64_t tiles = (f.D + kDepth - 1) / kDepth;
  const int slice = threadIdx.x / kDepth;
  for (int64_t item = blockIdx.x; item < images * tiles; item += gridDim.x) {
    const int64_t d = item % tiles * kDepth + threadIdx.x % kDepth, b = item / tiles * kRows;
    A total[kRows] = {};
    if (d < f.D)
      sum_in_blocks(slice, wide, kSlice, total, [&](int64_t i, A(&part)[kRows]) {
        const A w = at<A>(f.fc_select, i * f.D + d);
#pragma unroll
        for (int r = 0; r < kRows; ++r)
          if (b + r < f.B) part[r] += w * dlogits[(b + r) * wide + i];
      });
    __syncthreads();
#pragma unroll
    for (int r = 0; r < kRows; ++r) shared[r * kThreads + threadIdx.x] = total[r];
    __syncthreads();
    // A slice for each row.
    if (slice < kRows && b + slice < f.B && d < f.D) {
      A sum = 0;
      for (int other = 0; other < kSlice; ++other) sum += shared[slice * kThreads + other * kDepth + threadIdx.x % kDepth];
      const int64_t i = (b + slice) * f.D + d;
      dreduced[i] = Column<A>(f, d, mean[d], var[d]).gate(reduced[i], sum);
    }
  }
  wait_for_grid();

  // A block has a column of it.
  for (int64_t d = blockIdx.x; d < f.D; d += gridDim.x) {
    const Column<A> column(f, d, mean[d], var[d]);
    // Σ dreduced and Σ dreduced · normalized.
    double sums[2] = {};
    for (int64_t b = threadIdx.x; b < f.B; b += kThreads) {
      const A g = dreduced[b * f.D + d];
      sums[0] += g;
      sums[1] += static_cast<double>(g) * column.normalized(reduced[b * f.D + d]);
    }
    sum_of_block(sums, reinterpret_cast<double*>(shared));
    if (threadIdx.x == 0) {
      static_cast<A*>(f.dbias)[d] = static_cast<A>(sums[0]);
      static_cast<A*>(f.dweight)[d] = static_cast<A>(sums[1]);
    }
    const double count = static_cast<double>(f.B);
    const A average = f.training ? static_cast<A>(sums[0] / count) : A(0), slope = f.training ? static_cast<A>(sums[1] / count) : A(0);
    for (int64_t b = threadIdx.x; b < f.B; b += kThreads) {
      const int64_t i = b * f.D + d;
      dreduced[i] = column.weight * column.r * (dreduced[i] - average - column.normalized(reduced[i]) * slope);
      hidden[i] = column.act(reduced[i]);
    }
  }
  wait_for_grid();

  // ds (B, C) = dreduced . fc_reduce; dfc_reduce (D, C) = dreducedᵀ . s; dfc_select (M * C, D) = dlogitsᵀ . hidden, transposed.
  const Type type = sizeof(A) == sizeof(double) ? Type::float64 : Type::float32;
  const int64_t narrow_tiles = (f.C + kColumns - 1) / kColumns, wide_tiles = (wide + kColumns - 1) / kColumns;
  const int64_t image_rows = (f.B + kProductRows - 1) / kProductRows, hidden_rows = (f.D + kProductRows - 1) / kProductRows;
  const int64_t first = image_rows * narrow_tiles, second = first + hidden_rows * narrow_tiles, all = second + hidden_rows * wide_tiles;
  for (int64_t item = blockIdx.x; item < all; item += gridDim.x) {
    if (item < first) {
      product<A>(item / narrow_tiles * kProductRows, f.B, item % narrow_tiles, f.C, f.D, dreduced, f.D, 1, f.fc_reduce,
                 static_cast<A*>(f.ds), f.C, 1, nullptr);
    } else if (item < second) {
      const int64_t i = item - first;
      product<A>(i / narrow_tiles * kProductRows, f.D, i % narrow_tiles, f.C, f.B, dreduced, 1, f.D, Array{s, type},
                 static_cast<A*>(f.dfc_reduce), f.C, 1, nullptr);
    } else {
      const int64_t i = item - second, row = i / wide_tiles * kProductRows;
      product<A>(row, f.D, i % wide_tiles, wide, f.B, hidden, 1, f.D, Array{dlogits, type}, static_cast<A*>(f.dfc_select), 1, f.D,
                 row == 0 ? static_cast<A*>(f.dselect_bias) : nullptr);
    }
  }
}

// Of the attention or its backward.
template <class F> static std::string shape_of(const F& f) {
  return "B = " + std::to_string(f.B) + ", M = " + std::to_string(f.M) + ", C = " + std::to_string(f.C) + ", D = " + std::to_string(f.D);
}

void attend(const Attend& f, Queue queue) {
  const int64_t groups = quotient(f.B, kRows);
  const int64_t blocks = std::max({quotient(f.B * f.C, kThreads), quotient(groups * f.D, kWarps), groups * quotient(f.C, kColumns), f.D});
  dispatch_accumulate(
      f.type, [&]<class A>() { launch<_attend_kernel<A>>("attend", f, blocks, Blocks::together, kWarps * sizeof(double), queue, f); });
}

void attend_backward(const AttendBackward& f, Queue queue) {
  const int64_t hidden = quotient(f.D, kProductRows);
  const int64_t products = (quotient(f.B, kProductRows) + hidden) * quotient(f.C, kColumns) + hidden * quotient(f.M * f.C, kColumns);
  const int64_t blocks = std::max({quotient(f.B * f.C, kThreads), quotient(f.B, kRows) * quotient(f.D, kDepth), products, f.D});
  dispatch_accumulate(f.type, [&]<class A>() {
    launch<_attend_backward_kernel<A>>("attend_backward", f, blocks, Blocks::together, (kProductRows + 1) * kThreads * sizeof(A), queue, f);
  });
}

}  // namespace sk::cuda
