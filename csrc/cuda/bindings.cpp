// The operators for CUDA tensors: their checks and their memory. The only file here that sees PyTorch, and nothing of PyTorch's that
// needs CUDA's headers.
#include <array>

#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/library.h>

#include "../checks.h"
#include "launchers.h"

namespace sk::cuda {
namespace {

using at::Tensor;
using at::TensorList;

// tests/cuda_on_host runs the kernels on the host.
#ifdef SK_CUDA_ON_HOST
constexpr auto kDevice = at::kCPU;
#define SK_DISPATCH_KEY CPU
#else
constexpr auto kDevice = at::kCUDA;
#define SK_DISPATCH_KEY CUDA
#endif

// Makes the device of a tensor the current one, with its current stream.
struct Guard {
  explicit Guard(const Tensor& t) : guard(t.device()) {
#ifndef SK_CUDA_ON_HOST
    queue.device = t.device().index();
    const c10::impl::VirtualGuardImpl implementation(kDevice);
    queue.stream = static_cast<CUstream_st*>(implementation.getStream(t.device()).native_handle());
#endif
  }
  c10::DeviceGuard guard;
  Queue queue{0, nullptr};
};

Type type_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case at::kFloat: return Type::float32;
    case at::kDouble: return Type::float64;
    case at::kHalf: return Type::float16;
    case at::kBFloat16: return Type::bfloat16;
    default: TORCH_CHECK_TYPE(false, name, ": expected float32, float64, bfloat16 or float16, got ", t.scalar_type());
  }
}

Branches branches_of(TensorList ys) {
  check_branches(ys, kDevice);
  TORCH_CHECK_VALUE(ys.size() <= kMostBranches, "ys: expected at most ", kMostBranches, " branches, got ", ys.size());
  TORCH_CHECK_VALUE(ys[0].numel() > 0, "ys: expected at least one value, got shape ", ys[0].sizes());
  Branches branches{};
  branches.type = type_of(ys[0], "ys");
  branches.M = static_cast<int>(ys.size());
  branches.B = ys[0].size(0);
  branches.C = ys[0].size(1);
  branches.HW = ys[0].size(2) * ys[0].size(3);
  branches.channels_last = !ys[0].is_contiguous();
  for (size_t m = 0; m < ys.size(); ++m) branches.y[m] = ys[m].const_data_ptr();
  return branches;
}

Act act_of(c10::string_view activation, double negative_slope) {
  if (activation == "relu") return {Activation::relu, negative_slope};
  if (activation == "leaky_relu") return {Activation::leaky_relu, negative_slope};
  if (activation == "silu") return {Activation::silu, negative_slope};
  TORCH_CHECK_VALUE(activation == "identity", "activation: expected relu, leaky_relu, identity or silu, got ", activation);
  return {Activation::identity, negative_slope};
}

// Parameters of any type, as the kernels read them, on `device`. What had to be made contiguous lives as long as this.
class Parameters {
 public:
  explicit Parameters(at::Device device) : device(device) {}
  Array vector(const std::optional<Tensor>& t, const char* name, int64_t length) {
    if (!t) return {nullptr, Type::float32};
    return array(t->contiguous(), name, {length});
  }
  Array matrix(const Tensor& t, const char* name, int64_t rows, int64_t columns) {
    TORCH_CHECK_VALUE(t.dim() == 2 || (t.dim() == 4 && t.size(2) == 1 && t.size(3) == 1), name,
                      ": expected a matrix or the weight of a 1 x 1 convolution, got shape ", t.sizes());
    return array(t.flatten(1).contiguous(), name, {rows, columns});
  }

 private:
  Array array(const Tensor& t, const char* name, at::IntArrayRef shape) {
    const Type type = type_of(t, name);
    check_array(t, name, t.scalar_type(), shape, device);
    kept.push_back(t);
    return {t.const_data_ptr(), type};
  }
  at::Device device;
  std::vector<Tensor> kept;
};

std::tuple<Tensor, Tensor> branch_statistics_cuda(TensorList ys) {
  const Branches branches = branches_of(ys);
  const Guard guard(ys[0]);
  const auto options = ys[0].options().dtype(accumulate_type(ys[0].scalar_type())).memory_format(at::MemoryFormat::Contiguous);
  const int64_t parts = statistics_parts(branches);
  const Tensor scratch = at::empty({3, parts, branches.M, branches.C}, options);
  const Tensor mean = at::empty({branches.M, branches.C}, options), var = at::empty({branches.M, branches.C}, options);
  branch_statistics(branches, scratch[0].mutable_data_ptr(), scratch[1].mutable_data_ptr(), scratch[2].mutable_data_ptr(),
                    mean.mutable_data_ptr(), var.mutable_data_ptr(), guard.queue);
  return {mean, var};
}

// `count` sums, (B, M, C), with their parts.
struct Summed {
  std::vector<Tensor> sums, parts;
  Sums out{};
  Summed(int64_t count, const Branches& ys, const at::TensorOptions& options) {
    const int64_t segments = squeeze_parts(ys);
    for (int64_t i = 0; i < count; ++i) {
      sums.push_back(at::empty({ys.B, ys.M, ys.C}, options));
      parts.push_back(segments == 1 ? sums.back() : at::empty({ys.B, ys.M, segments, ys.C}, options));
      out.sums[i] = sums.back().mutable_data_ptr();
      out.parts[i] = parts.back().mutable_data_ptr();
    }
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, std::vector<Tensor>> squeeze_cuda(
    TensorList ys, const OptionalTensors& norm_weights, const OptionalTensors& norm_biases, TensorList means, TensorList variances, double eps,
    c10::string_view activation, double negative_slope, int64_t sums) {
  const Branches branches = branches_of(ys);
  TORCH_CHECK_VALUE(sums == 1 || sums == 3, "sums: expected 1 or 3, got ", sums);
  const auto check_count = [&](size_t count, size_t expected, const char* name) {
    TORCH_CHECK_VALUE(count == expected, name, ": expected ", expected, " vectors, got ", count);
  };
  check_count(variances.size(), means.size(), "variances");
  check_count(means.size(), ys.size(), "means");
  check_count(norm_weights.size(), ys.size(), "norm_weights");
  check_count(norm_biases.size(), ys.size(), "norm_biases");
  Parameters parameters(ys[0].device());
  Norms norms{};
  norms.eps = eps;
  for (size_t m = 0; m < ys.size(); ++m) {
    norms.weight[m] = parameters.vector(norm_weights.get(m), "norm_weights", branches.C);
    norms.bias[m] = parameters.vector(norm_biases.get(m), "norm_biases", branches.C);
    norms.mean[m] = parameters.vector(means[m], "means", branches.C);
    norms.var[m] = parameters.vector(variances[m], "variances", branches.C);
  }
  const Act act = act_of(activation, negative_slope);
  const Guard guard(ys[0]);
  const auto options = means[0].options().dtype(accumulate_type(ys[0].scalar_type()));
  std::array<Tensor, 4> folded;
  for (auto& array : folded) array = at::empty({branches.M, branches.C}, options);
  Summed summed(sums, branches, options);
  squeeze(branches, norms, act, folded[0].mutable_data_ptr(), folded[1].mutable_data_ptr(), folded[2].mutable_data_ptr(),
          folded[3].mutable_data_ptr(), summed.out, sums, guard.queue);
  const Tensor pooled = summed.sums[0];
  summed.sums.erase(summed.sums.begin());
  return {folded[0], folded[1], folded[2], folded[3], pooled, summed.sums};
}

std::tuple<Tensor, Tensor, Tensor> select_backward_sums_cuda(const Tensor& g, TensorList ys, const Tensor& mean, const Tensor& scale,
                                                             const Tensor& bias, c10::string_view activation, double negative_slope) {
  check_normalized(ys, mean, scale, bias, kDevice);
  check_like(g, "g", ys[0]);
  const Branches branches = branches_of(ys);
  const Act act = act_of(activation, negative_slope);
  const Guard guard(ys[0]);
  const Summed summed(3, branches, mean.options());
  select_backward_sums(g.const_data_ptr(), branches, mean.const_data_ptr(), scale.const_data_ptr(), bias.const_data_ptr(), act, summed.out,
                       guard.queue);
  return {summed.sums[0], summed.sums[1], summed.sums[2]};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> fold_backward_cuda(const Tensor& a, const Tensor& ds, int64_t pixels, const Tensor& R1,
                                                                      const Tensor& R2, const Tensor& K1, const Tensor& K2, const Tensor& r,
                                                                      const Tensor& scale, int64_t count) {
  const auto [B, M, C] = check_fold_backward(a, ds, pixels, R1, R2, K1, K2, r, scale, count, kDevice);
  const Guard guard(a);
  const Tensor t = at::empty_like(ds), dweight = at::empty_like(r), dbias = at::empty_like(r), p = at::empty_like(r), q = at::empty_like(r);
  const FoldBackward f{type_of(a, "a"),
                       B,
                       M,
                       C,
                       pixels,
                       count,
                       a.const_data_ptr(),
                       ds.const_data_ptr(),
                       R1.const_data_ptr(),
                       R2.const_data_ptr(),
                       K1.const_data_ptr(),
                       K2.const_data_ptr(),
                       r.const_data_ptr(),
                       scale.const_data_ptr(),
                       t.mutable_data_ptr(),
                       dweight.mutable_data_ptr(),
                       dbias.mutable_data_ptr(),
                       p.mutable_data_ptr(),
                       q.mutable_data_ptr()};
  fold_backward(f, guard.queue);
  return {t, dweight, dbias, p, q};
}

Tensor select_cuda(TensorList ys, const Tensor& mean, const Tensor& scale, const Tensor& bias, const Tensor& a, c10::string_view activation,
                   double negative_slope) {
  check_normalized(ys, mean, scale, bias, kDevice);
  const Branches branches = branches_of(ys);
  check_array(a, "a", mean.scalar_type(), {branches.B, branches.M, branches.C}, ys[0].device());
  const Act act = act_of(activation, negative_slope);
  const Guard guard(ys[0]);
  const Tensor v = at::empty_like(ys[0], layout(ys[0]));
  select(branches, mean.const_data_ptr(), scale.const_data_ptr(), bias.const_data_ptr(), a.const_data_ptr(), act, v.mutable_data_ptr(),
         guard.queue);
  return v;
}

std::vector<Tensor> select_backward_cuda(const Tensor& g, TensorList ys, const Tensor& mean, const Tensor& scale, const Tensor& bias,
                                         const Tensor& a, const Tensor& t, const Tensor& p, const Tensor& q, c10::string_view activation,
                                         double negative_slope) {
  check_select_backward(g, ys, mean, scale, bias, a, t, p, q, kDevice);
  const Branches branches = branches_of(ys);
  const Act act = act_of(activation, negative_slope);
  const Guard guard(ys[0]);
  std::vector<Tensor> dys;
  void* pointers[kMostBranches];
  for (const auto& y : ys) {
    dys.push_back(at::empty_like(y, layout(y)));
    pointers[dys.size() - 1] = dys.back().mutable_data_ptr();
  }
  select_backward(g.const_data_ptr(), branches, mean.const_data_ptr(), scale.const_data_ptr(), bias.const_data_ptr(), a.const_data_ptr(),
                  t.const_data_ptr(), p.const_data_ptr(), q.const_data_ptr(), act, pointers, guard.queue);
  return dys;
}

int64_t branches_in(const Tensor& fc_select, int64_t C) {
  TORCH_CHECK_VALUE(C > 0 && fc_select.size(0) > 0 && fc_select.size(0) % C == 0, "fc_select: expected a multiple of C = ", C, " rows, got ",
                    fc_select.size(0));
  return fc_select.size(0) / C;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attend_cuda(const Tensor& pooled, int64_t pixels, const Tensor& fc_reduce,
                                                               const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                                                               const std::optional<Tensor>& mean, const std::optional<Tensor>& var,
                                                               double eps, c10::string_view activation, double negative_slope,
                                                               const Tensor& fc_select, const std::optional<Tensor>& select_bias) {
  check_pooled(pooled, pixels);
  Attend f{};
  f.type = type_of(pooled, "pooled");
  f.B = pooled.size(0);
  f.P = pooled.size(1);
  f.C = pooled.size(2);
  f.D = fc_reduce.size(0);
  f.M = branches_in(fc_select, f.C);
  f.pixels = pixels;
  f.eps = eps;
  f.slope = hidden_slope(activation, negative_slope);
  check_array(pooled, "pooled", pooled.scalar_type(), {f.B, f.P, f.C}, kDevice);
  TORCH_CHECK_VALUE(f.B > 0 && f.D > 0, "pooled, fc_reduce: expected at least one image and one row, got ", f.B, " and ", f.D);
  TORCH_CHECK_VALUE(mean.has_value() == var.has_value(), "mean, var: expected both or neither, got only one");
  Parameters parameters(pooled.device());
  f.fc_reduce = parameters.matrix(fc_reduce, "fc_reduce", f.D, f.C);
  f.weight = parameters.vector(weight, "weight", f.D);
  f.bias = parameters.vector(bias, "bias", f.D);
  f.given_mean = parameters.vector(mean, "mean", f.D);
  f.given_var = parameters.vector(var, "var", f.D);
  f.fc_select = parameters.matrix(fc_select, "fc_select", f.M * f.C, f.D);
  f.select_bias = parameters.vector(select_bias, "select_bias", f.M * f.C);
  const Guard guard(pooled);
  const auto empty = [&](at::IntArrayRef shape) { return at::empty(shape, pooled.options()); };
  const Tensor a = empty({f.B, f.M, f.C}), s = empty({f.B, f.C}), reduced = empty({f.B, f.D}), hidden = empty({f.B, f.D});
  const Tensor mean_used = empty({f.D}), var_used = empty({f.D});
  f.pooled = pooled.const_data_ptr();
  f.s = s.mutable_data_ptr();
  f.reduced = reduced.mutable_data_ptr();
  f.hidden = hidden.mutable_data_ptr();
  f.mean = mean_used.mutable_data_ptr();
  f.var = var_used.mutable_data_ptr();
  f.a = a.mutable_data_ptr();
  attend(f, guard.queue);
  return {a, s, reduced, mean_used, var_used};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> attend_backward_cuda(
    const Tensor& da, const Tensor& a, const Tensor& s, const Tensor& reduced, const Tensor& fc_reduce, const std::optional<Tensor>& weight,
    const std::optional<Tensor>& bias, const Tensor& mean, const Tensor& var, double eps, bool training, c10::string_view activation,
    double negative_slope, const Tensor& fc_select) {
  const auto dtype = s.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kDouble, "s: expected float32 or float64, got ", dtype);
  TORCH_CHECK_VALUE(s.dim() == 2, "s: expected shape (B, C), got ", s.sizes());
  AttendBackward f{};
  f.type = type_of(s, "s");
  f.B = s.size(0);
  f.C = s.size(1);
  f.D = fc_reduce.size(0);
  f.M = branches_in(fc_select, f.C);
  f.eps = eps;
  f.slope = hidden_slope(activation, negative_slope);
  f.training = training;
  TORCH_CHECK_VALUE(f.B > 0 && f.D > 0, "s, fc_reduce: expected at least one image and one row, got ", f.B, " and ", f.D);
  check_array(s, "s", dtype, {f.B, f.C}, kDevice);
  check_array(da, "da", dtype, {f.B, f.M, f.C}, s.device());
  check_array(a, "a", dtype, {f.B, f.M, f.C}, s.device());
  check_array(reduced, "reduced", dtype, {f.B, f.D}, s.device());
  check_array(mean, "mean", dtype, {f.D}, s.device());
  check_array(var, "var", dtype, {f.D}, s.device());
  Parameters parameters(s.device());
  f.fc_reduce = parameters.matrix(fc_reduce, "fc_reduce", f.D, f.C);
  f.weight = parameters.vector(weight, "weight", f.D);
  f.bias = parameters.vector(bias, "bias", f.D);
  f.fc_select = parameters.matrix(fc_select, "fc_select", f.M * f.C, f.D);
  const Guard guard(s);
  const auto empty = [&](at::IntArrayRef shape) { return at::empty(shape, s.options()); };
  const Tensor dlogits = empty({f.B, f.M, f.C}), dreduced = empty({f.B, f.D}), hidden = empty({f.B, f.D}), ds = empty({f.B, f.C});
  const Tensor dfc_reduce = empty(fc_reduce.sizes()), dweight = empty({f.D}), dbias = empty({f.D});
  const Tensor dfc_select = empty(fc_select.sizes()), dselect_bias = empty({f.M * f.C});
  f.da = da.const_data_ptr();
  f.a = a.const_data_ptr();
  f.s = s.const_data_ptr();
  f.reduced = reduced.const_data_ptr();
  f.mean = mean.const_data_ptr();
  f.var = var.const_data_ptr();
  f.dlogits = dlogits.mutable_data_ptr();
  f.dreduced = dreduced.mutable_data_ptr();
  f.hidden = hidden.mutable_data_ptr();
  f.ds = ds.mutable_data_ptr();
  f.dfc_reduce = dfc_reduce.mutable_data_ptr();
  f.dweight = dweight.mutable_data_ptr();
  f.dbias = dbias.mutable_data_ptr();
  f.dfc_select = dfc_select.mutable_data_ptr();
  f.dselect_bias = dselect_bias.mutable_data_ptr();
  attend_backward(f, guard.queue);
  return {ds, dfc_reduce, dweight, dbias, dfc_select, dselect_bias};
}

}  // namespace

TORCH_LIBRARY_IMPL(sk_fused, SK_DISPATCH_KEY, m) {
  m.impl("branch_statistics", branch_statistics_cuda);
  m.impl("squeeze", squeeze_cuda);
  m.impl("attend", attend_cuda);
  m.impl("select", select_cuda);
  m.impl("select_backward_sums", select_backward_sums_cuda);
  m.impl("attend_backward", attend_backward_cuda);
  m.impl("fold_backward", fold_backward_cuda);
  m.impl("select_backward", select_backward_cuda);
}

}  // namespace sk::cuda
