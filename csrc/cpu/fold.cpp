// fold: the batch-norms of the M branches as one multiplication and one addition; and their gradients.

#include "common.h"
#include "operators.h"

#include <cmath>

namespace sk {

Folded fold(const OptionalTensors& weights, const OptionalTensors& biases, TensorList means, TensorList variances, double eps,
            at::ScalarType dtype) {
  TORCH_CHECK_VALUE(!means.empty() && means[0].dim() == 1, "means: expected vectors (C,) of at least one branch");
  const int64_t M = means.size(), C = means[0].size(0);
  const auto check_count = [&](size_t count, const char* name) {
    TORCH_CHECK_VALUE(count == means.size(), name, ": expected ", M, " vectors, got ", count);
  };
  check_count(variances.size(), "variances");
  check_count(weights.size(), "norm_weights");
  check_count(biases.size(), "norm_biases");
  const auto vector = [&](const Tensor& t, const char* name) {
    const Tensor converted = array_of(t, dtype);
    check_array(converted, name, dtype, {C});
    return converted;
  };
  const auto options = means[0].options().dtype(dtype);
  const Folded folded{at::empty({M, C}, options), at::empty({M, C}, options), at::empty({M, C}, options), at::empty({M, C}, options)};
  dispatch_accumulate(dtype, [&]<class A>() {
    A *const mean_out = folded.mean.mutable_data_ptr<A>(), *const r_out = folded.r.mutable_data_ptr<A>(),
             *const scale_out = folded.scale.mutable_data_ptr<A>(), *const bias_out = folded.bias.mutable_data_ptr<A>();
    for (int64_t m = 0; m < M; ++m) {
      const Tensor mean = vector(means[m], "means"), var = vector(variances[m], "variances");
      const std::optional<Tensor> weight = weights.get(m), bias = biases.get(m);
      const Tensor gain = weight ? vector(*weight, "norm_weights") : Tensor(), shift = bias ? vector(*bias, "norm_biases") : Tensor();
      const A *const means_in = mean.const_data_ptr<A>(), *const vars_in = var.const_data_ptr<A>(),
                     *const gains = weight ? gain.const_data_ptr<A>() : nullptr, *const shifts = bias ? shift.const_data_ptr<A>() : nullptr;
      for (int64_t c = 0, i = m * C; c < C; ++c, ++i) {
        r_out[i] = A(1) / std::sqrt(vars_in[c] + static_cast<A>(eps));
        mean_out[i] = means_in[c];
        scale_out[i] = gains ? gains[c] * r_out[i] : r_out[i];
        bias_out[i] = shifts ? shifts[c] : A(0);
      }
    }
  });
  return folded;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> fold_backward_cpu(const Tensor& a, const Tensor& ds, int64_t pixels, const Tensor& R1,
                                                                     const Tensor& R2, const Tensor& K1, const Tensor& K2, const Tensor& r,
                                                                     const Tensor& scale, int64_t count) {
  const auto sizes = check_fold_backward(a, ds, pixels, R1, R2, K1, K2, r, scale, count);
  const int64_t B = sizes[0], M = sizes[1], C = sizes[2];
  const auto dtype = a.scalar_type();
  const Tensor t = at::empty_like(ds), dweight = at::empty_like(r), dbias = at::empty_like(r), p = at::empty_like(r), q = at::empty_like(r);
  dispatch_accumulate(dtype, [&]<class A>() {
    // A pointer is taken once: each time costs more than the arithmetic of an element.
    const A *const weights = a.const_data_ptr<A>(), *const total = ds.const_data_ptr<A>(), *const g1 = R1.const_data_ptr<A>(),
                   *const g2 = R2.const_data_ptr<A>(), *const k1 = K1.const_data_ptr<A>(), *const k2 = K2.const_data_ptr<A>(),
                   *const inverse_std = r.const_data_ptr<A>(), *const gains = scale.const_data_ptr<A>();
    A *const share = t.mutable_data_ptr<A>(), *const dgains = dweight.mutable_data_ptr<A>(), *const dshifts = dbias.mutable_data_ptr<A>(),
             *const constant_part = p.mutable_data_ptr<A>(), *const linear_part = q.mutable_data_ptr<A>();
    for (int64_t i = 0; i < B * C; ++i) share[i] = total[i] / static_cast<A>(pixels);
    std::vector<double> first(M * C), second(M * C);
    for (int64_t b = 0; b < B; ++b)
      for (int64_t m = 0; m < M; ++m)
        for (int64_t c = 0; c < C; ++c) {
          const int64_t i = (b * M + m) * C + c;
          first[m * C + c] += weights[i] * g1[i] + share[b * C + c] * k1[i];
          second[m * C + c] += weights[i] * g2[i] + share[b * C + c] * k2[i];
        }
    for (int64_t i = 0; i < M * C; ++i) {
      const A mean_share = count == 0 ? A(0) : gains[i] / static_cast<A>(count);
      dshifts[i] = static_cast<A>(first[i]);
      dgains[i] = inverse_std[i] * static_cast<A>(second[i]);
      constant_part[i] = mean_share * dshifts[i];
      linear_part[i] = mean_share * inverse_std[i] * dgains[i];
    }
  });
  return {t, dweight, dbias, p, q};
}

}  // namespace sk
