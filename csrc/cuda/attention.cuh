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
