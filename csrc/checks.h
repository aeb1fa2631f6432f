// The checks that the operators of all devices begin with.
#pragma once

#include <array>

#include <ATen/ATen.h>

namespace sk {

using OptionalTensors = c10::List<std::optional<at::Tensor>>;

inline at::ScalarType accumulate_type(at::ScalarType dtype) { return dtype == at::kDouble ? at::kDouble : at::kFloat; }

inline at::MemoryFormat layout(const at::Tensor& t) {
  return t.is_contiguous() ? at::MemoryFormat::Contiguous : at::MemoryFormat::ChannelsLast;
}

// A device without an index is any of its type.
inline void check_device(const at::Tensor& t, const char* name, at::Device device) {
  TORCH_CHECK_VALUE(device.has_index() ? t.device() == device : t.device().type() == device.type(), name, ": expected a tensor on ", device,
                    ", got one on ", t.device());
}

// A tensor that is read beside the branches: their shape, dtype and layout.
inline void check_like(const at::Tensor& t, const char* name, const at::Tensor& y) {
  TORCH_CHECK_VALUE(t.sizes() == y.sizes(), name, ": expected shape ", y.sizes(), ", got ", t.sizes());
  TORCH_CHECK_VALUE(t.device() == y.device(), name, ": expected a tensor on ", y.device(), ", got one on ", t.device());
  TORCH_CHECK_TYPE(t.scalar_type() == y.scalar_type(), name, ": expected ", y.scalar_type(), ", got ", t.scalar_type());
  TORCH_CHECK_VALUE(t.is_contiguous(layout(y)), name, ": expected the layout of strides ", y.strides(), ", got strides ", t.strides());
}

inline void check_branches(at::TensorList ys, at::Device device = at::kCPU) {
  TORCH_CHECK_VALUE(!ys.empty(), "ys: expected at least one branch, got none");
  TORCH_CHECK_VALUE(ys[0].dim() == 4 && ys[0].size(1) > 0, "ys: expected branches of shape (B, C, H, W), C at least 1, got ",
                    ys[0].sizes());
  check_device(ys[0], "ys", device);
  for (const auto& y : ys) check_like(y, "ys", ys[0]);
}

// A small operand: contiguous, with the dtype and shape given.
inline void check_array(const at::Tensor& t, const char* name, at::ScalarType dtype, at::IntArrayRef shape, at::Device device = at::kCPU) {
  TORCH_CHECK_VALUE(t.sizes() == shape && t.is_contiguous(), name, ": expected a contiguous array of shape ", shape, ", got shape ",
                    t.sizes(), " with strides ", t.strides());
  TORCH_CHECK_TYPE(t.scalar_type() == dtype, name, ": expected ", dtype, ", got ", t.scalar_type());
  check_device(t, name, device);
}

inline void check_normalized(at::TensorList ys, const at::Tensor& mean, const at::Tensor& scale, const at::Tensor& bias,
                             at::Device device = at::kCPU) {
  check_branches(ys, device);
  const auto dtype = accumulate_type(ys[0].scalar_type());
  const int64_t shape[] = {static_cast<int64_t>(ys.size()), ys[0].size(1)};
  check_array(mean, "mean", dtype, shape, ys[0].device());
  check_array(scale, "scale", dtype, shape, ys[0].device());
  check_array(bias, "bias", dtype, shape, ys[0].device());
}

inline void check_select_backward(const at::Tensor& g, at::TensorList ys, const at::Tensor& mean, const at::Tensor& scale,
                                  const at::Tensor& bias, const at::Tensor& a, const at::Tensor& t, const at::Tensor& p,
                                  const at::Tensor& q, at::Device device = at::kCPU) {
  check_normalized(ys, mean, scale, bias, device);
  check_like(g, "g", ys[0]);
  const int64_t M = ys.size(), B = ys[0].size(0), C = ys[0].size(1);
  check_array(a, "a", mean.scalar_type(), {B, M, C}, ys[0].device());
  check_array(t, "t", mean.scalar_type(), {B, C}, ys[0].device());
  check_array(p, "p", mean.scalar_type(), {M, C}, ys[0].device());
  check_array(q, "q", mean.scalar_type(), {M, C}, ys[0].device());
}

// B, M and C.
inline std::array<int64_t, 3> check_fold_backward(const at::Tensor& a, const at::Tensor& ds, int64_t pixels, const at::Tensor& R1,
                                                  const at::Tensor& R2, const at::Tensor& K1, const at::Tensor& K2, const at::Tensor& r,
                                                  const at::Tensor& scale, int64_t count, at::Device device = at::kCPU) {
  check_device(a, "a", device);
  TORCH_CHECK_VALUE(a.dim() == 3, "a: expected shape (B, M, C), got ", a.sizes());
  const int64_t B = a.size(0), M = a.size(1), C = a.size(2);
  const auto dtype = a.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kDouble, "a: expected float32 or float64, got ", dtype);
  for (const auto& [name, array] : {std::pair<const char*, const at::Tensor&>{"a", a}, {"R1", R1}, {"R2", R2}, {"K1", K1}, {"K2", K2}})
    check_array(array, name, dtype, {B, M, C}, a.device());
  check_array(ds, "ds", dtype, {B, C}, a.device());
  check_array(r, "r", dtype, {M, C}, a.device());
  check_array(scale, "scale", dtype, {M, C}, a.device());
  TORCH_CHECK_VALUE(pixels >= 1 && count >= 0, "pixels, count: expected at least 1 and 0, got ", pixels, " and ", count);
  return {B, M, C};
}

inline void check_pooled(const at::Tensor& pooled, int64_t pixels) {
  const auto dtype = pooled.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kDouble, "pooled: expected float32 or float64, got ", dtype);
  TORCH_CHECK_VALUE(pooled.dim() == 3, "pooled: expected shape (B, P, C), got ", pooled.sizes());
  TORCH_CHECK_VALUE(pixels >= 1, "pixels: expected at least 1, got ", pixels);
}

// The slope of the attention's hidden activation where it is not positive.
inline double hidden_slope(c10::string_view activation, double negative_slope) {
  if (activation == "relu") return 0;
  if (activation == "identity") return 1;
  TORCH_CHECK_VALUE(activation == "leaky_relu", "activation: expected relu, leaky_relu or identity, got ", activation);
  return negative_slope;
}

}  // namespace sk
