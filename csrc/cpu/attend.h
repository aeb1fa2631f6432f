// The attention: what its operator, and the unit for a few images at a time, compute it with.
#pragma once

#include "common.h"
#include "operators.h"

namespace sk {

// Of B images the descriptors (B, C), these reduced (B, D), normalized and activated (B, D), and the attention (B, M, C).
template <class A> struct Attended {
  int64_t B;
  A *s, *reduced, *h, *a;
};

// The parameters as they are computed with, contiguous and of one dtype: (D, C), (M * C, D), (D,), (D,).
struct Attention {
  at::ScalarType dtype;
  int64_t C, D, M;
  Tensor fc_reduce, fc_select, weight, bias;

  Attention(at::ScalarType dtype, int64_t C, const Tensor& fc_reduce, const std::optional<Tensor>& weight,
            const std::optional<Tensor>& bias, const Tensor& fc_select);
  // t in that dtype, checked.
  Tensor vector(const Tensor& t, const char* name, int64_t length) const;
  // From `parts` of the sums of an image, (C,) each and `step` apart. mean and var (D,) are written if they are those of the batch.
  template <class A>
  void attend(const Attended<A>& of, const A* pooled, int64_t parts, int64_t step, int64_t pixels, bool of_batch, A* mean, A* var,
              double eps, double slope, const A* select_bias) const;
};

}  // namespace sk
