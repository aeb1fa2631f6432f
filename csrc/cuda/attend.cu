// attend: a = softmax_m(fc_select . act(BN(fc_reduce . s)) + select_bias) on (B, C)-sized data, and its backward. One cooperative launch
// each: whatever a step needs of other images, the grid waits for. Beside the parameters, read about B / kRows times out of the L2
// cache, there is next to nothing to move.

#include "attention.cuh"

namespace sk::cuda {

// As many rows share what is read of a matrix, of which a block has so many columns.
constexpr int kRows = 4, kColumns = 64;

__device__ __forceinline__ int64_t thread_of_grid() { return int64_t{blockIdx.x} * kThreads + threadIdx.x; }
__device__ __forceinline__ int64_t threads_of_grid() { return int64_t{gridDim.x} * kThreads; }

template <class A> __global__ __launch_bounds__(kThreads, 2) void _attend_kernel(const __grid_constant__ Attend f) {
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

  for (int64_t d = warp; d < f.D; d += warps) {
    A mean, var;
    if (f.given_mean.data == nullptr) {
      double total = 0, squares = 0;
      for (int64_t b = lane; b < f.B; b += kWarp) total += reduced[b * f.D + d];
      const double average = sum_of_lanes(total, kWarp) / static_cast<double>(f.B);
      for (int64_t b = lane; b < f.B; b += kWarp) squares += (reduced[b * f.D + d] - average) * (reduced[b * f.D + d] - average);
      mean = static_cast<A>(average);
      var = static_cast<A>(sum_of_lanes(squares, kWarp) / static_cast<double>(f.B));
    } else {
      mean = at<A>(f.given_mean, d);
      var = at<A>(f.given_var, d);
    }
    const Column<A> column(f, d, mean, var);
    for (int64_t b = lane; b < f.B; b += kWarp) hidden[b * f.D + d] = column.act(reduced[b * f.D + d]);
    if (lane == 0) {
      static_cast<A*>(f.mean)[d] = mean;
      static_cast<A*>(f.var)[d] = var;
    }
  }
  wait_for_grid();

  // Of as many images: a warp has the logits of one channel of a branch, a thread the softmax of one channel of an image.
  const int64_t tiles = (f.C + kColumns - 1) / kColumns;
  for (int64_t item = blockIdx.x; item < groups * tiles; item += gridDim.x) {
    const int64_t first = item % tiles * kColumns, b = item / tiles * kRows, images = f.B - b < kRows ? f.B - b : kRows;
    for (int64_t i = threadIdx.x / kWarp; i < f.M * kColumns; i += kWarps) {
      const int64_t m = i / kColumns, c = first + i % kColumns;
      if (c >= f.C) continue;
      A logits[kRows] = {};
      logits_of(f.fc_select, m * f.C + c, f.D, hidden + b * f.D, images, logits);
      const A bias = f.select_bias.data == nullptr ? A(0) : at<A>(f.select_bias, m * f.C + c);
#pragma unroll
      for (int r = 0; r < kRows; ++r)
        if (lane == 0 && r < images) a[((b + r) * f.M + m) * f.C + c] = logits[r] + bias;
    }
    __syncthreads();
    for (int64_t i = threadIdx.x; i < images * kColumns; i += kThreads)
      if (first + i % kColumns < f.C) softmax(a + (b + i / kColumns) * f.M * f.C + first + i % kColumns, f.M, f.C);
  }
}

// Of a product: a block has its columns side by side, and so many slices of what is summed over.
constexpr int kSlices = kThreads / kColumns;

// out[row * row_step + column * column_step] = sum_k left[row * left_row + k * left_k] right[k * columns + column], of kRows rows from
// `row` on and of kColumns columns; with `sums`, those of the columns of `right` as well.
template <class A>
__device__ void product(int64_t row, int64_t rows, int64_t tile, int64_t columns, int64_t length, const A* left, int64_t left_row,
                        int64_t left_k, const Array& right, A* out, int64_t row_step, int64_t column_step, A* sums) {
  const int slice = threadIdx.x / kColumns;
  const int64_t column = tile * kColumns + threadIdx.x % kColumns;
  A total[kRows + 1] = {};
  if (column < columns)
    sum_in_blocks(slice, length, kSlices, total, [&](int64_t k, A(&part)[kRows + 1]) {
      const A x = at<A>(right, k * columns + column);
#pragma unroll
      for (int r = 0; r < kRows; ++r)
        if (row + r < rows) part[r] += left[(row + r) * left_row + k * left_k] * x;
      part[kRows] += x;
    });
  A* const shared = shared_memory<A>();
  __syncthreads();
#pragma unroll
  for (int r = 0; r <= kRows; ++r) shared[r * kThreads + threadIdx.x] = total[r];
  __syncthreads();
  if (slice != 0 || column >= columns) return;
#pragma unroll
  for (int r = 0; r <= kRows; ++r) {
    for (int other = 1; other < kSlices; ++other) total[r] += shared[r * kThreads + other * kColumns + threadIdx.x];
    if (r < kRows && row + r < rows) out[(row + r) * row_step + column * column_step] = total[r];
  }
  if (sums != nullptr) sums[column] = total[kRows];
}

template <class A> __global__ __launch_bounds__(kThreads, 2) void _attend_backward_kernel(const __grid_constant__ AttendBackward f) {
  const A *const da = static_cast<const A*>(f.da), *const a = static_cast<const A*>(f.a), *const s = static_cast<const A*>(f.s);
  const A *const reduced = static_cast<const A*>(f.reduced), *const mean = static_cast<const A*>(f.mean);
  const A* const var = static_cast<const A*>(f.var);
  A *const dlogits = static_cast<A*>(f.dlogits), *const dreduced = static_cast<A*>(f.dreduced), *const hidden = static_cast<A*>(f.hidden);
  A* const shared = shared_memory<A>();
  const int lane = threadIdx.x % kWarp, slice = threadIdx.x / kWarp;
  const int64_t warp = thread_of_grid() / kWarp, warps = threads_of_grid() / kWarp;
  const int64_t images = (f.B + kRows - 1) / kRows, wide = f.M * f.C;

  for (int64_t i = thread_of_grid(); i < f.B * f.C; i += threads_of_grid()) {
    const int64_t at = i / f.C * wide + i % f.C;
    A total = 0;
    for (int64_t m = 0; m < f.M; ++m) total += a[at + m * f.C] * da[at + m * f.C];
    for (int64_t m = 0; m < f.M; ++m) dlogits[at + m * f.C] = a[at + m * f.C] * (da[at + m * f.C] - total);
  }
  wait_for_grid();

  // The gradient before the hidden activation, in `dreduced`: lanes are d, warps slices of the sum.
  const int64_t tiles = (f.D + kWarp - 1) / kWarp;
  for (int64_t item = blockIdx.x; item < images * tiles; item += gridDim.x) {
    const int64_t d = item % tiles * kWarp + lane, b = item / tiles * kRows;
    A total[kRows] = {};
    if (d < f.D)
      sum_in_blocks(slice, wide, kWarps, total, [&](int64_t i, A(&part)[kRows]) {
        const A w = at<A>(f.fc_select, i * f.D + d);
#pragma unroll
        for (int r = 0; r < kRows; ++r)
          if (b + r < f.B) part[r] += w * dlogits[(b + r) * wide + i];
      });
    __syncthreads();
#pragma unroll
    for (int r = 0; r < kRows; ++r) shared[r * kThreads + threadIdx.x] = total[r];
    __syncthreads();
    // A warp for each row.
    if (slice < kRows && b + slice < f.B && d < f.D) {
      A sum = 0;
      for (int other = 0; other < kWarps; ++other) sum += shared[slice * kThreads + other * kWarp + lane];
      const int64_t i = (b + slice) * f.D + d;
      dreduced[i] = Column<A>(f, d, mean[d], var[d]).gate(reduced[i], sum);
    }
  }
  wait_for_grid();

  for (int64_t d = warp; d < f.D; d += warps) {
    const Column<A> column(f, d, mean[d], var[d]);
    double total = 0, product = 0;
    for (int64_t i = lane * f.D + d; i < f.B * f.D; i += kWarp * f.D) {
      total += dreduced[i];
      product += static_cast<double>(dreduced[i]) * column.normalized(reduced[i]);
    }
    total = sum_of_lanes(total, kWarp);
    product = sum_of_lanes(product, kWarp);
    if (lane == 0) {
      static_cast<A*>(f.dbias)[d] = static_cast<A>(total);
      static_cast<A*>(f.dweight)[d] = static_cast<A>(product);
    }
    const double count = static_cast<double>(f.B);
    const A average = f.training ? static_cast<A>(total / count) : A(0), slope = f.training ? static_cast<A>(product / count) : A(0);
    for (int64_t i = lane * f.D + d; i < f.B * f.D; i += kWarp * f.D) {
      dreduced[i] = column.weight * column.r * (dreduced[i] - average - column.normalized(reduced[i]) * slope);
      hidden[i] = column.act(reduced[i]);
    }
  }
  wait_for_grid();

  // ds (B, C) = dreduced . fc_reduce; dfc_reduce (D, C) = dreducedᵀ . s; dfc_select (M * C, D) = dlogitsᵀ . hidden, transposed.
  const Type type = sizeof(A) == sizeof(double) ? Type::float64 : Type::float32;
  const int64_t narrow_tiles = (f.C + kColumns - 1) / kColumns, wide_tiles = (wide + kColumns - 1) / kColumns;
  const int64_t hidden_rows = (f.D + kRows - 1) / kRows;
  const int64_t first = images * narrow_tiles, second = first + hidden_rows * narrow_tiles, all = second + hidden_rows * wide_tiles;
  for (int64_t item = blockIdx.x; item < all; item += gridDim.x) {
    if (item < first) {
      product<A>(item / narrow_tiles * kRows, f.B, item % narrow_tiles, f.C, f.D, dreduced, f.D, 1, f.fc_reduce, static_cast<A*>(f.ds), f.C,
                 1, nullptr);
    } else if (item < second) {
      const int64_t i = item - first;
      product<A>(i / narrow_tiles * kRows, f.D, i % narrow_tiles, f.C, f.B, dreduced, 1, f.D, Array{s, type}, static_cast<A*>(f.dfc_reduce),
                 f.C, 1, nullptr);
    } else {
      const int64_t i = item - second, row = i / wide_tiles * kRows;
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
  const int64_t blocks = std::max({quotient(f.B * f.C, kThreads), quotient(groups * f.D, kWarps), groups * quotient(f.C, kColumns)});
  dispatch_accumulate(f.type, [&]<class A>() {
    launch<_attend_kernel<A>>("attend", f, blocks, {.cooperative = true}, 0, queue, f);
  });
}

void attend_backward(const AttendBackward& f, Queue queue) {
  const int64_t images = quotient(f.B, kRows), hidden = quotient(f.D, kRows);
  const int64_t products = (images + hidden) * quotient(f.C, kColumns) + hidden * quotient(f.M * f.C, kColumns);
  const int64_t blocks = std::max({quotient(f.B * f.C, kThreads), images * quotient(f.D, kWarp), products});
  dispatch_accumulate(f.type, [&]<class A>() {
    launch<_attend_backward_kernel<A>>("attend_backward", f, blocks, {.cooperative = true},
                                       (kRows + 1) * kThreads * sizeof(A), queue, f);
  });
}

}  // namespace sk::cuda
