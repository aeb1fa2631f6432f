// The operators that the CPU implements; library.cpp has their schemas.
#pragma once

#include <ATen/ATen.h>

namespace sk {

using at::Tensor;
using at::TensorList;

std::tuple<Tensor, Tensor, Tensor, Tensor> fold_cpu(const c10::List<std::optional<Tensor>>& weights,
                                                    const c10::List<std::optional<Tensor>>& biases, TensorList means, TensorList variances,
                                                    double eps, at::ScalarType dtype);

std::tuple<Tensor, Tensor> branch_statistics_cpu(TensorList ys);

std::tuple<std::vector<Tensor>, Tensor, Tensor> branch_cpu(const Tensor& x, TensorList weights, int64_t stride, at::IntArrayRef dilations,
                                                           int64_t groups);

std::tuple<Tensor, std::vector<Tensor>> branch_backward_cpu(const Tensor& g, const Tensor& x, TensorList weights, int64_t stride,
                                                            at::IntArrayRef dilations, int64_t groups, TensorList ys, const Tensor& mean,
                                                            const Tensor& scale, const Tensor& bias, const Tensor& a, const Tensor& t,
                                                            const Tensor& p, const Tensor& q, c10::string_view activation,
                                                            double negative_slope);

Tensor unit_cpu(const Tensor& x, TensorList weights, int64_t stride, at::IntArrayRef dilations, int64_t groups, const Tensor& mean,
                const Tensor& scale, const Tensor& bias, const Tensor& fc_reduce, const Tensor& attn_weight, const Tensor& attn_bias,
                const Tensor& attn_mean, const Tensor& attn_var, double attn_eps, const Tensor& fc_select, c10::string_view activation,
                double negative_slope);

std::vector<Tensor> squeeze_cpu(TensorList ys, const Tensor& mean, const Tensor& scale, const Tensor& bias, c10::string_view activation,
                                double negative_slope, int64_t sums, const std::optional<Tensor>& g);

std::tuple<Tensor, Tensor, Tensor, Tensor> attend_cpu(const Tensor& s, const Tensor& fc_reduce, const std::optional<Tensor>& weight,
                                                      const std::optional<Tensor>& bias, const std::optional<Tensor>& mean,
                                                      const std::optional<Tensor>& var, double eps, const Tensor& fc_select);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attend_backward_cpu(
    const Tensor& da, const Tensor& a, const Tensor& s, const Tensor& reduced, const Tensor& fc_reduce, const std::optional<Tensor>& weight,
    const std::optional<Tensor>& bias, const Tensor& mean, const Tensor& var, double eps, bool training, const Tensor& fc_select);

Tensor select_cpu(TensorList ys, const Tensor& mean, const Tensor& scale, const Tensor& bias, const Tensor& a, c10::string_view activation,
                  double negative_slope);

// The same, to where it is wanted.
void select_out(const Tensor& out, TensorList ys, const Tensor& mean, const Tensor& scale, const Tensor& bias, const Tensor& a,
                c10::string_view activation, double negative_slope);

std::vector<Tensor> select_backward_cpu(const Tensor& g, TensorList ys, const Tensor& mean, const Tensor& scale, const Tensor& bias,
                                        const Tensor& a, const Tensor& t, const Tensor& p, const Tensor& q, c10::string_view activation,
                                        double negative_slope);

std::string instruction_set_name();

}  // namespace sk
