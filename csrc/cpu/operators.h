// The operators that the CPU implements; library.cpp has their schemas.
#pragma once

#include "../checks.h"

namespace sk {

using at::Tensor;
using at::TensorList;

// The batch-norms of the branches: r = 1 / sqrt(var + eps), scale = weight * r; (M, C) each, of this dtype.
struct Folded {
  Tensor mean, r, scale, bias;
};
Folded fold(const OptionalTensors& weights, const OptionalTensors& biases, TensorList means, TensorList variances, double eps,
            at::ScalarType dtype);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> fold_backward_cpu(const Tensor& a, const Tensor& ds, int64_t pixels, const Tensor& R1,
                                                                     const Tensor& R2, const Tensor& K1, const Tensor& K2, const Tensor& r,
                                                                     const Tensor& scale, int64_t count);

std::tuple<Tensor, Tensor> branch_statistics_cpu(TensorList ys);

std::tuple<std::vector<Tensor>, Tensor, Tensor> branch_cpu(const Tensor& x, TensorList weights, int64_t stride, at::IntArrayRef dilations,
                                                           int64_t groups, bool statistics);

std::tuple<Tensor, std::vector<Tensor>> branch_backward_cpu(const Tensor& g, const Tensor& x, TensorList weights, int64_t stride,
                                                            at::IntArrayRef dilations, int64_t groups, TensorList ys, const Tensor& mean,
                                                            const Tensor& scale, const Tensor& bias, const Tensor& a, const Tensor& t,
                                                            const Tensor& p, const Tensor& q, c10::string_view activation,
                                                            double negative_slope, std::array<bool, 2> needs);

Tensor unit_cpu(const Tensor& x, TensorList weights, int64_t stride, at::IntArrayRef dilations, int64_t groups,
                const OptionalTensors& norm_weights, const OptionalTensors& norm_biases, TensorList means, TensorList variances, double eps,
                const Tensor& fc_reduce, const std::optional<Tensor>& attn_weight, const std::optional<Tensor>& attn_bias,
                const Tensor& attn_mean, const Tensor& attn_var, double attn_eps, const Tensor& fc_select, c10::string_view activation,
                double negative_slope);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, std::vector<Tensor>> squeeze_cpu(TensorList ys, const OptionalTensors& norm_weights,
                                                                                    const OptionalTensors& norm_biases, TensorList means,
                                                                                    TensorList variances, double eps,
                                                                                    c10::string_view activation, double negative_slope,
                                                                                    int64_t sums);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attend_cpu(const Tensor& pooled, int64_t pixels, const Tensor& fc_reduce,
                                                              const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                                                              const std::optional<Tensor>& mean, const std::optional<Tensor>& var,
                                                              double eps, c10::string_view activation, double negative_slope,
                                                              const Tensor& fc_select, const std::optional<Tensor>& select_bias);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> attend_backward_cpu(
    const Tensor& da, const Tensor& a, const Tensor& s, const Tensor& reduced, const Tensor& fc_reduce, const std::optional<Tensor>& weight,
    const std::optional<Tensor>& bias, const Tensor& mean, const Tensor& var, double eps, bool training, c10::string_view activation,
    double negative_slope, const Tensor& fc_select);

Tensor select_cpu(TensorList ys, const Tensor& mean, const Tensor& scale, const Tensor& bias, const Tensor& a, c10::string_view activation,
                  double negative_slope);

std::tuple<Tensor, Tensor, Tensor> select_backward_sums_cpu(const Tensor& g, TensorList ys, const Tensor& mean, const Tensor& scale,
                                                            const Tensor& bias, c10::string_view activation, double negative_slope);

std::vector<Tensor> select_backward_cpu(const Tensor& g, TensorList ys, const Tensor& mean, const Tensor& scale, const Tensor& bias,
                                        const Tensor& a, const Tensor& t, const Tensor& p, const Tensor& q, c10::string_view activation,
                                        double negative_slope);

std::string instruction_set_name();

}  // namespace sk
