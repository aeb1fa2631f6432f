// The attention: what its operator, and the unit for a few images at a time, compute it with.
#pragma once

#include "common.h"
#include "operators.h"

namespace sk {

struct Attended {
  Tensor a, s, reduced;
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
  // Of pooled (B, P, C), contiguous and of that dtype; mean and var (D,) are written if they are those of the batch.
  Attended attend(const Tensor& pooled, int64_t pixels, bool of_batch, const Tensor& mean, const Tensor& var, double eps, double slope,
                  const std::optional<Tensor>& select_bias) const;
};

}  // namespace sk
