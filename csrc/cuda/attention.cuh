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
__device__ __forceinline__ void sum_in_blocks(int64_t first, int64_t end, int64_t step, A (&total)[N], const F& term) {
  for (int64_t k = first; k < end;) {
    A part[N] = {};
#pragma unroll 4
    for (const int64_t stop = k + 16 * step < end ? k + 16 * step : end; k < stop; k += step) term(k, part);
#pragma unroll
    for (int i = 0; i < N; ++i) total[i] += part[i];
  }
}

// total[i] = sum_d fc_select[row, d] hidden[i, d] for the images i < `images`; by a warp, which reads the row side by side, and gets the
// sums in every lane.
template <class A, int kImages>
__device__ __forceinline__ void logits_of(const Array& fc_select, int64_t row, int64_t D, const A* hidden, int64_t images,
                                          A (&total)[kImages]) {
  sum_in_blocks(threadIdx.x % kWarp, D, kWarp, total, [&](int64_t d, A(&part)[kImages]) {
    const A w = at<A>(fc_select, row * D + d);
#pragma unroll
    for (int i = 0; i < kImages; ++i)
      if (i < images) part[i] += w * hidden[i * D + d];
  });
#pragma unroll
  for (int i = 0; i < kImages; ++i) total[i] = sum_of_lanes(total[i], kWarp);
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
