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

// The batch-norms of M branches of C channels.
Norms norms_of(Parameters& parameters, size_t M, int64_t C, const OptionalTensors& weights, const OptionalTensors& biases, TensorList means,
               TensorList variances, double eps) {
  const auto check_count = [&](size_t count, size_t expected, const char* name) {
    TORCH_CHECK_VALUE(count == expected, name, ": expected ", expected, " vectors, got ", count);
  };
  check_count(variances.size(), means.size(), "variances");
  check_count(means.size(), M, "means");
  check_count(weights.size(), M, "norm_weights");
  check_count(biases.size(), M, "norm_biases");
  Norms norms{};
  norms.eps = eps;
  for (size_t m = 0; m < M; ++m) {
    norms.weight[m] = parameters.vector(weights.get(m), "norm_weights", C);
    norms.bias[m] = parameters.vector(biases.get(m), "norm_biases", C);
    norms.mean[m] = parameters.vector(means[m], "means", C);
    norms.var[m] = parameters.vector(variances[m], "variances", C);
  }
  return norms;
}

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

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, std::vector<Tensor>> squeeze_cuda(TensorList ys, const OptionalTensors& norm_weights,
                                                                                     const OptionalTensors& norm_biases, TensorList means,
                                                                                     TensorList variances, double eps,
                                                                                     c10::string_view activation, double negative_slope,
                                                                                     int64_t sums) {
  const Branches branches = branches_of(ys);
  TORCH_CHECK_VALUE(sums == 1 || sums == 3, "sums: expected 1 or 3, got ", sums);
  Parameters parameters(ys[0].device());
  const Norms norms = norms_of(parameters, ys.size(), branches.C, norm_weights, norm_biases, means, variances, eps);
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
  TORCH_CHECK_VALUE(C > 0 && fc_select.size(0) > 0 && fc_select.size(0) % C == 0, "fc_select: expected a multiple of C = ", C,
                    " rows, got ", fc_select.size(0));
  return fc_select.size(0) / C;
}

// What the attention, its backward and the unit have in common. `prefix`: of the names of its batch-norm's vectors.
template <class F>
void take_attention(F& f, Parameters& parameters, int64_t M, int64_t C, const Tensor& fc_reduce, const std::optional<Tensor>& weight,
                    const std::optional<Tensor>& bias, const Tensor& fc_select, const std::string& prefix = "") {
  f.fc_reduce = parameters.matrix(fc_reduce, "fc_reduce", f.D, C);
  f.weight = parameters.vector(weight, (prefix + "weight").c_str(), f.D);
  f.bias = parameters.vector(bias, (prefix + "bias").c_str(), f.D);
  f.fc_select = parameters.matrix(fc_select, "fc_select", M * C, f.D);
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
  take_attention(f, parameters, f.M, f.C, fc_reduce, weight, bias, fc_select);
  f.given_mean = parameters.vector(mean, "mean", f.D);
  f.given_var = parameters.vector(var, "var", f.D);
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
  take_attention(f, parameters, f.M, f.C, fc_reduce, weight, bias, fc_select);
  const Guard guard(s);
  const auto empty = [&](at::IntArrayRef shape) { return at::empty(shape, s.options()); };
  const Tensor dlogits = empty({f.B, f.M, f.C}), dreduced = empty({2, f.B, f.D}), hidden = empty({f.B, f.D}), ds = empty({f.B, f.C});
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

// The convolutions of `branch` are the library's: w_m * x_m, padded by the dilation, in the layout of x.
struct Convolutions {
  Tensor x;
  int64_t M, stride, groups, share;
  at::IntArrayRef dilations;

  Convolutions(const Tensor& x, TensorList weights, int64_t stride, at::IntArrayRef dilations, int64_t groups)
      : x(x), M(weights.size()), stride(stride), groups(groups), dilations(dilations) {
    check_device(x, "x", kDevice);
    TORCH_CHECK_VALUE(x.dim() == 4 && x.numel() > 0, "x: expected shape (B, C, H, W) without a 0, got ", x.sizes());
    TORCH_CHECK_VALUE(x.is_contiguous(layout(x)), "x: expected contiguous or channels_last, got strides ", x.strides());
    TORCH_CHECK_VALUE(M >= 1 && M <= kMostBranches, "weights: expected 1 to ", kMostBranches, " branches, got ", M);
    TORCH_CHECK_VALUE(static_cast<int64_t>(dilations.size()) == M, "dilations: expected one for each of ", M, " branches, got ",
                      dilations.size());
    TORCH_CHECK_VALUE(stride == 1 || stride == 2, "stride: expected 1 or 2, got ", stride);
    TORCH_CHECK_VALUE(groups >= 1, "groups: expected at least 1, got ", groups);
    for (const auto& w : weights) {
      TORCH_CHECK_VALUE(w.dim() == 4 && w.numel() > 0 && w.sizes() == weights[0].sizes() && w.size(0) % groups == 0 && w.size(2) == 3 &&
                            w.size(3) == 3,
                        "weights: expected all of shape (a multiple of groups = ", groups, ", inputs, 3, 3) without a 0, got ",
                        weights[0].sizes(), " and ", w.sizes());
      check_device(w, "weights", x.device());
      TORCH_CHECK_TYPE(w.scalar_type() == x.scalar_type(), "weights: expected ", x.scalar_type(), ", got ", w.scalar_type());
    }
    for (const int64_t dilation : dilations)
      TORCH_CHECK_VALUE(dilation >= 1 && dilation <= 3, "dilations: expected 1 to 3, got ", dilation);
    share = weights[0].size(1) * groups;
    TORCH_CHECK_VALUE(x.size(1) == share || x.size(1) == share * M, "x: expected ", share, " channels, or ", share * M,
                      " to be split, got ", x.size(1));
  }

  bool split() const { return x.size(1) != share; }
  Tensor part(int64_t m) const { return split() ? x.narrow(1, m * share, share) : x; }
};

std::tuple<std::vector<Tensor>, Tensor, Tensor> branch_cuda(const Tensor& x, TensorList weights, int64_t stride, at::IntArrayRef dilations,
                                                            int64_t groups, bool statistics) {
  const Convolutions s(x, weights, stride, dilations, groups);
  std::vector<Tensor> ys;
  for (int64_t m = 0; m < s.M; ++m)
    ys.push_back(at::conv2d(s.part(m), weights[m], {}, stride, dilations[m], dilations[m], groups).contiguous(layout(x)));
  Tensor mean = at::empty({0}, x.options().dtype(accumulate_type(x.scalar_type()))), var = at::empty_like(mean);
  if (statistics) std::tie(mean, var) = branch_statistics_cuda(ys);
  return {ys, mean, var};
}

std::tuple<Tensor, std::vector<Tensor>> branch_backward_cuda(const Tensor& g, const Tensor& x, TensorList weights, int64_t stride,
                                                             at::IntArrayRef dilations, int64_t groups, TensorList ys, const Tensor& mean,
                                                             const Tensor& scale, const Tensor& bias, const Tensor& a, const Tensor& t,
                                                             const Tensor& p, const Tensor& q, c10::string_view activation,
                                                             double negative_slope, std::array<bool, 2> needs) {
  const Convolutions s(x, weights, stride, dilations, groups);
  const auto dys = select_backward_cuda(g, ys, mean, scale, bias, a, t, p, q, activation, negative_slope);
  std::vector<Tensor> dxs, dweights;
  for (int64_t m = 0; m < s.M; ++m) {
    const int64_t dilation[] = {dilations[m], dilations[m]}, strides[] = {stride, stride};
    auto [dx, dweight, none] = at::convolution_backward(dys[m], s.part(m), weights[m], at::OptionalIntArrayRef{}, strides, dilation,
                                                        dilation, false, {0, 0}, groups, {needs[0], needs[1], false});
    if (needs[0]) dxs.push_back(dx);
    if (needs[1]) dweights.push_back(dweight.contiguous());
  }
  if (!needs[0]) return {at::empty({0}, x.options()), dweights};
  if (s.split()) return {at::cat(dxs, 1).contiguous(layout(x)), dweights};
  Tensor dx = dxs[0];
  for (int64_t m = 1; m < s.M; ++m) dx = dx + dxs[m];
  return {dx.contiguous(layout(x)), dweights};
}

// Where 16 bytes can be read at a time, in channels_last.
Tensor for_matrix_units(const Tensor& t) {
  const Tensor laid_out = t.contiguous(at::MemoryFormat::ChannelsLast);
  return reinterpret_cast<uintptr_t>(laid_out.const_data_ptr()) % 16 == 0 ? laid_out : laid_out.clone();
}

Tensor unit_cuda(const Tensor& x, TensorList weights, int64_t stride, at::IntArrayRef dilations, int64_t groups,
                 const OptionalTensors& norm_weights, const OptionalTensors& norm_biases, TensorList means, TensorList variances,
                 double eps, const Tensor& fc_reduce, const std::optional<Tensor>& attn_weight, const std::optional<Tensor>& attn_bias,
                 const Tensor& attn_mean, const Tensor& attn_var, double attn_eps, const Tensor& fc_select, c10::string_view activation,
                 double negative_slope) {
  const Convolutions s(x, weights, stride, dilations, groups);
  Unit f{};
  f.type = type_of(x, "x");
  TORCH_CHECK_TYPE(f.type == Type::float16 || f.type == Type::bfloat16, "x: expected float16 or bfloat16, got ", x.scalar_type());
  f.act = act_of(activation, negative_slope);
  f.B = x.size(0);
  f.channels = static_cast<int>(x.size(1));
  f.H = x.size(2);
  f.W = x.size(3);
  f.C = static_cast<int>(weights[0].size(0));
  f.inputs = static_cast<int>(weights[0].size(1));
  f.groups = static_cast<int>(groups);
  f.M = static_cast<int>(s.M);
  f.stride = static_cast<int>(stride);
  f.split = s.split();
  const bool small = (f.inputs == 4 || f.inputs == 8) && f.C == f.inputs * groups;
  TORCH_CHECK_VALUE((small || f.inputs % 16 == 0) && f.C / groups % (small ? 4 : 8) == 0 && f.C % 8 == 0,
                    "weights: expected multiples of 16 ",
                    "inputs and of 8 outputs a group, or 4 or 8 of both and a multiple of 8 in all, got ", f.inputs, " inputs, ",
                    f.C / groups, " outputs, ", groups, " groups");
  const Guard guard(x);
  const Tensor laid_out = for_matrix_units(x);
  std::vector<Tensor> matrices;
  for (int64_t m = 0; m < s.M; ++m) {
    f.dilations[m] = static_cast<int>(dilations[m]);
    matrices.push_back(for_matrix_units(weights[m]));
    f.weights[m] = matrices.back().const_data_ptr();
  }
  Parameters parameters(x.device());
  f.norms = norms_of(parameters, s.M, f.C, norm_weights, norm_biases, means, variances, eps);
  Attend& attention = f.attention;
  attention.D = fc_reduce.size(0);
  TORCH_CHECK_VALUE(attention.D > 0, "fc_reduce: expected at least one row, got ", attention.D);
  take_attention(attention, parameters, s.M, f.C, fc_reduce, attn_weight, attn_bias, fc_select, "attn_");
  attention.given_mean = parameters.vector(attn_mean, "attn_mean", attention.D);
  attention.given_var = parameters.vector(attn_var, "attn_var", attention.D);
  attention.eps = attn_eps;
  const int64_t shape[] = {f.B, f.C, (f.H - 1) / stride + 1, (f.W - 1) / stride + 1};
  const Tensor v = at::empty(shape, x.options().memory_format(at::MemoryFormat::ChannelsLast));
  f.x = laid_out.const_data_ptr();
  f.v = v.mutable_data_ptr();
  Tensor scratch;
  const auto allocate = [&](int64_t bytes) {
    scratch = at::empty({bytes}, x.options().dtype(at::kByte).memory_format(at::MemoryFormat::Contiguous));
    return scratch.mutable_data_ptr();
  };
  unit(f, allocate, guard.queue);
  return v.contiguous(layout(x));
}

}  // namespace

TORCH_LIBRARY_IMPL(sk_fused, SK_DISPATCH_KEY, m) {
  m.impl("branch_statistics", branch_statistics_cuda);
  m.impl("branch", branch_cuda);
  m.impl("branch_backward", branch_backward_cuda);
  m.impl("unit", unit_cuda);
  m.impl("squeeze", squeeze_cuda);
  m.impl("attend", attend_cuda);
  m.impl("select", select_cuda);
  m.impl("select_backward_sums", select_backward_sums_cuda);
  m.impl("attend_backward", attend_backward_cuda);
  m.impl("fold_backward", fold_backward_cuda);
  m.impl("select_backward", select_backward_cuda);
}

}  // namespace sk::cuda
