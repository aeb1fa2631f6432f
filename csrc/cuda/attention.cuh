// What the attention is made of, in attend.cu and in unit.cu.
#pragma once

#include "common.cuh"

namespace sk::cuda {

// The batch-norm and the hidden activation of column d.
template <class A> struct Column {
  A mean, r, weight, bias, slope;

  template <class Parameters>
  __device__ __forceinline__ Column(const Parameters& f, int64_t d, A mean, A var)
      : mean(mean),
        r(A(1) / sqrt(var + static_cast<A>(f.eps))),
        weight(f.weight.data == nullptr ? A(1) : at<A>(f.weight, d)),
        bias(f.bias.data == nullptr ? A(0) : at<A>(f.bias, d)),
        slope(static_cast<A>(f.slope)) {}

  __device__ __forceinline__ A normalized(A x) const { return (x - mean) * r; }
  __device__ __forceinline__ A act(A x) const { return gate(x, normalized(x) * weight + bias); }
  __device__ __forceinline__ A gate(A x, A g) const { return normalized(x) * weight + bias <= 0 ? (slope == 0 ? A(0) : slope * g) : g; }
};

// term(k, part) for k from `first` on, every `step`; 16 terms at a time are summed before they join the total, as a long chain of
// additions loses more.
template <class A, int N, class F>
__device__ __forceinline__ void sum_in_blocks(int first, int end, int step, A (&total)[N], const F& term) {
  for (int k = first; k < end;) {
    A part[N] = {};
#pragma unroll 4
    for (const int stop = k + 16 * step < end ? k + 16 * step : end; k < stop; k += step) term(k, part);
#pragma unroll
    for (int i = 0; i < N; ++i) total[i] += part[i];
  }
}

// term(get) with get(i) = element i.
template <class A, class F> __device__ __forceinline__ void with_elements(const Array& array, const F& term) {
  if (array.type == Type::float32) {
    const float* const values = static_cast<const float*>(array.data);
    term([values](int64_t i) { return static_cast<A>(values[i]); });
  } else {
    term([&array](int64_t i) { return at<A>(array, i); });
  }
}

// result(image, i, sum over k of matrix[row_of(i), k] x[image, k]) for i < rows and up to kImages images: by a block, of which kLanes lanes
// read a few rows at a time side by side.
template <int kLanes, int kImages, class A, class RowOf, class F>
__device__ __forceinline__ void multiply_rows(const Array& matrix, int rows, int length, const A* x, int images, const RowOf& row_of,
                                              const F& result) {
  // As many as there are registers for.
  constexpr int kRows = sizeof(A) == sizeof(double) ? 2 : 4, kApart = kThreads / kLanes;
  const int lane = threadIdx.x % kLanes;
  with_elements<A>(matrix, [&](const auto& element) {
#pragma unroll 1
    for (int first = 0; first < rows; first += kRows * kApart) {
      const int own = first + static_cast<int>(threadIdx.x) / kLanes;
      A total[kRows * kImages] = {};
      sum_in_blocks(lane, length, kLanes, total, [&](int k, A(&part)[kRows * kImages]) {
#pragma unroll
        for (int j = 0; j < kRows; ++j) {
          const int i = own + j * kApart;
          const A w = element(int64_t{row_of(i < rows ? i : rows - 1)} * length + k);
#pragma unroll
          for (int image = 0; image < kImages; ++image)
            if (image < images) part[j * kImages + image] += w * x[image * length + k];
        }
      });
#pragma unroll
      for (int image = 0; image < kImages; ++image) {
        if (image >= images) break;
#pragma unroll
        for (int j = 0; j < kRows; ++j) {
          const A sum = sum_of_lanes(total[j * kImages + image], kLanes);
          if (lane == 0 && own + j * kApart < rows) result(image, own + j * kApart, sum);
        }
      }
    }
  });
}

// The logits of M branches, `step` apart, become their softmax.
template <class A> __device__ __forceinline__ void softmax(A* logits, int64_t M, int64_t step) {
  A largest = logits[0], total = 0;
#pragma unroll 1
  for (int64_t m = 1; m < M; ++m) largest = logits[m * step] > largest ? logits[m * step] : largest;
#pragma unroll 1
  for (int64_t m = 0; m < M; ++m) total += logits[m * step] = exp(logits[m * step] - largest);
#pragma unroll 1
  for (int64_t m = 0; m < M; ++m) logits[m * step] /= total;
}

}  // namespace sk::cuda
