// fold: the batch-norms of the M branches as one multiplication and one addition.

#include "common.h"
#include "operators.h"

#include <cmath>

namespace sk {

std::tuple<Tensor, Tensor, Tensor, Tensor> fold_cpu(const c10::List<std::optional<Tensor>>& weights,
                                                    const c10::List<std::optional<Tensor>>& biases, TensorList means, TensorList variances,
                                                    double eps, at::ScalarType dtype) {
  TORCH_CHECK_VALUE(!means.empty() && means[0].dim() == 1, "means: expected vectors (C,) of at least one branch");
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kDouble, "dtype: expected float32 or float64, got ", dtype);
  const int64_t M = means.size(), C = means[0].size(0);
  const auto check_count = [&](size_t count, const char* name) {
    TORCH_CHECK_VALUE(count == means.size(), name, ": expected ", M, " vectors, got ", count);
  };
  check_count(variances.size(), "variances");
  check_count(weights.size(), "weights");
  check_count(biases.size(), "biases");
  const auto vector = [&](const Tensor& t, const char* name) {
    const Tensor converted = t.to(dtype).contiguous();
    check_array(converted, name, dtype, {C});
    return converted;
  };
  const auto options = means[0].options().dtype(dtype);
  const Tensor mean = at::empty({M, C}, options), r = at::empty({M, C}, options), scale = at::empty({M, C}, options),
               bias = at::empty({M, C}, options);
  const auto fold = [&]<class A>() {
    for (int64_t m = 0, i = 0; m < M; ++m) {
      const Tensor branch_mean = vector(means[m], "means"), var = vector(variances[m], "variances");
      const std::optional<Tensor> weight = weights.get(m), shift = biases.get(m);
      const Tensor gain = weight ? vector(*weight, "weights") : at::ones({C}, options);
      const Tensor offset = shift ? vector(*shift, "biases") : at::zeros({C}, options);
      for (int64_t c = 0; c < C; ++c, ++i) {
        mean.mutable_data_ptr<A>()[i] = branch_mean.const_data_ptr<A>()[c];
        r.mutable_data_ptr<A>()[i] = A(1) / std::sqrt(var.const_data_ptr<A>()[c] + static_cast<A>(eps));
        scale.mutable_data_ptr<A>()[i] = gain.const_data_ptr<A>()[c] * r.const_data_ptr<A>()[i];
        bias.mutable_data_ptr<A>()[i] = offset.const_data_ptr<A>()[c];
      }
    }
  };
  dtype == at::kFloat ? fold.template operator()<float>() : fold.template operator()<double>();
  return {mean, r, scale, bias};
}

}  // namespace sk
