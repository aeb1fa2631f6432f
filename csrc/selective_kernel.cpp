// The whole unit as one differentiable function: the same as functional._SelectiveKernel, of which this follows every line, but
// with no interpreter between the steps, which for small maps is most of the time. For eager mode, and for the statistics of
// one process.
#include "selective_kernel.h"

#include <torch/csrc/PyInterpreter.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/utils.h>

#include "cpu/operators.h"

namespace sk {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// An operator on any device: what the CPU implements has the types of its schema.
template <class F> c10::TypedOperatorHandle<F> find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<F>();
}

struct Operators {
#define SK_OPERATOR(name) c10::TypedOperatorHandle<decltype(name##_cpu)> name = find<decltype(name##_cpu)>("sk_fused::" #name)
  SK_OPERATOR(branch_statistics);
  SK_OPERATOR(branch);
  SK_OPERATOR(unit);
  SK_OPERATOR(squeeze);
  SK_OPERATOR(attend);
  SK_OPERATOR(select);
  SK_OPERATOR(select_backward_sums);
  SK_OPERATOR(attend_backward);
  SK_OPERATOR(fold_backward);
  SK_OPERATOR(select_backward);
  SK_OPERATOR(branch_backward);
#undef SK_OPERATOR
};

const Operators& operators() {
  static const Operators all;
  return all;
}

struct Activation {
  std::string name;
  double negative_slope;
};

struct BatchNorm {
  bool training;
  double eps;
};

// What the backward is told beside tensors.
struct Call : torch::CustomClassHolder {
  std::optional<Convolution> convolution;
  Activation act, attn_act;
  BatchNorm norms, attn_norm;
  size_t M;
  // functional._differentiable, of this call.
  c10::SafePyObject differentiable;

  Call(std::optional<Convolution> convolution, Activation act, Activation attn_act, BatchNorm norms, BatchNorm attn_norm, size_t M,
       py::object differentiable)
      : convolution(std::move(convolution)),
        act(std::move(act)),
        attn_act(std::move(attn_act)),
        norms(norms),
        attn_norm(attn_norm),
        M(M),
        differentiable(differentiable.release().ptr(), getPyInterpreter()) {}
};

// Running statistics, of the branches and of the attention.
struct Statistics {
  std::vector<Tensor> means, variances;
  std::optional<Tensor> attn_mean, attn_var;
};

// The leaves: those of the attention, the weights and the biases of the branches' batch-norms, and the branches, or what makes them.
struct Leaves {
  TensorList attn, weights, biases, tensors;
  Leaves(TensorList all, size_t M)
      : attn(all.slice(0, 5)), weights(all.slice(5, M)), biases(all.slice(5 + M, M)), tensors(all.slice(5 + 2 * M)) {}
};

std::optional<Tensor> if_given(const Tensor& tensor) { return tensor.defined() ? std::optional(tensor) : std::nullopt; }

OptionalTensors if_given(TensorList tensors) {
  OptionalTensors list;
  for (const Tensor& tensor : tensors) list.push_back(if_given(tensor));
  return list;
}

at::MemoryFormat layout_of(const Tensor& t) {
  return !t.is_contiguous() && t.is_contiguous(at::MemoryFormat::ChannelsLast) ? at::MemoryFormat::ChannelsLast
                                                                               : at::MemoryFormat::Contiguous;
}

// In that of the first.
std::vector<Tensor> in_one_layout(TensorList tensors) {
  std::vector<Tensor> all;
  for (const Tensor& tensor : tensors) all.push_back(tensor.contiguous(layout_of(tensors[0])));
  return all;
}

// What the forward makes: v; mean and unbiased variance of the batch, each where it is used; and what is kept for the backward.
struct Made {
  Tensor v;
  std::vector<Tensor> moments;
  std::vector<Tensor> kept, ys;
};

Tensor unbiased(const Tensor& var, int64_t count) { return var * (static_cast<double>(count) / static_cast<double>(count - 1)); }

// Here and in the backward the operators are called below autograd, whose answer would be that they have no derivative.
Made forward(const Call& call, const Statistics& running, TensorList all, bool needs_grad) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const Leaves leaves(all, call.M);
  const auto& op = operators();
  const auto& [act, slope] = call.act;
  Made made;
  Tensor batch_mean, batch_var;
  if (call.convolution) {
    const auto& [stride, dilations, groups] = *call.convolution;
    const Tensor x = leaves.tensors[0].contiguous(layout_of(leaves.tensors[0]));
    const std::vector<Tensor> kernels = in_one_layout(leaves.tensors.slice(1));
    if (!needs_grad && !call.norms.training && !call.attn_norm.training) {
      made.v = op.unit.call(x, kernels, stride, dilations, groups, if_given(leaves.weights), if_given(leaves.biases), running.means,
                            running.variances, call.norms.eps, leaves.attn[0], if_given(leaves.attn[1]), if_given(leaves.attn[2]),
                            *running.attn_mean, *running.attn_var, call.attn_norm.eps, leaves.attn[3], act, slope);
      return made;
    }
    std::tie(made.ys, batch_mean, batch_var) = op.branch.call(x, kernels, stride, dilations, groups, call.norms.training);
  } else {
    made.ys = in_one_layout(leaves.tensors);
    if (call.norms.training) std::tie(batch_mean, batch_var) = op.branch_statistics.call(made.ys);
  }
  const int64_t B = made.ys[0].size(0), pixels = made.ys[0].size(2) * made.ys[0].size(3);
  if (call.norms.training) made.moments = {batch_mean, unbiased(batch_var, B * pixels)};
  // The second and third sum serve the backward.
  const auto [mean, r, scale, bias, pooled, K] =
      op.squeeze.call(made.ys, if_given(leaves.weights), if_given(leaves.biases), call.norms.training ? batch_mean.unbind() : running.means,
                      call.norms.training ? batch_var.unbind() : running.variances, call.norms.eps, act, slope, needs_grad ? 3 : 1);
  const auto [a, s, reduced, attn_mean, attn_var] = op.attend.call(
      pooled, pixels, leaves.attn[0], if_given(leaves.attn[1]), if_given(leaves.attn[2]), running.attn_mean, running.attn_var,
      call.attn_norm.eps, call.attn_act.name, call.attn_act.negative_slope, leaves.attn[3], if_given(leaves.attn[4]));
  made.v = op.select.call(made.ys, mean, scale, bias, a, act, slope);
  if (call.attn_norm.training) {
    made.moments.push_back(attn_mean);
    made.moments.push_back(unbiased(attn_var, B));
  }
  if (needs_grad) made.kept = {mean, r, scale, bias, K[0], K[1], s, a, reduced, attn_mean, attn_var};
  return made;
}

variable_list backward(const Call& call, Tensor g, TensorList kept, TensorList all, std::vector<Tensor> ys,
                       const std::vector<bool>& needs) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const Leaves leaves(all, call.M);
  const auto& op = operators();
  const auto& [act, slope] = call.act;
  const Tensor &mean = kept[0], &r = kept[1], &scale = kept[2], &bias = kept[3], &K1 = kept[4], &K2 = kept[5], &s = kept[6], &a = kept[7],
               &reduced = kept[8], &attn_mean = kept[9], &attn_var = kept[10];
  if (!call.convolution) ys = in_one_layout(leaves.tensors);
  g = g.contiguous(layout_of(ys[0]));
  const int64_t pixels = g.size(2) * g.size(3), count = g.size(0) * pixels;

  // The reducing pass: the sum of g u is the gradient of a.
  const auto [da, R1, R2] = op.select_backward_sums.call(g, ys, mean, scale, bias, act, slope);
  const auto [ds, dreduce, dattn_weight, dattn_bias, dselect, dselect_bias] = op.attend_backward.call(
      da, a, s, reduced, leaves.attn[0], if_given(leaves.attn[1]), if_given(leaves.attn[2]), attn_mean, attn_var, call.attn_norm.eps,
      call.attn_norm.training, call.attn_act.name, call.attn_act.negative_slope, leaves.attn[3]);
  const auto [t, dweight, dbias, p, q] = op.fold_backward.call(a, ds, pixels, R1, R2, K1, K2, r, scale, call.norms.training ? count : 0);

  // The writing pass.
  std::vector<Tensor> dtensors(leaves.tensors.size());
  const auto first = needs.end() - dtensors.size();
  if (std::find(first, needs.end(), true) != needs.end()) {
    if (!call.convolution) {
      dtensors = op.select_backward.call(g, ys, mean, scale, bias, a, t, p, q, act, slope);
    } else {
      const auto& [stride, dilations, groups] = *call.convolution;
      const Tensor x = leaves.tensors[0].contiguous(layout_of(leaves.tensors[0]));
      const bool needs_kernels = std::find(first + 1, needs.end(), true) != needs.end();
      auto [dx, dkernels] = op.branch_backward.call(g, x, in_one_layout(leaves.tensors.slice(1)), stride, dilations, groups, ys, mean,
                                                    scale, bias, a, t, p, q, act, slope, {*first, needs_kernels});
      dtensors[0] = dx;
      std::move(dkernels.begin(), dkernels.end(), dtensors.begin() + 1);
    }
  }
  variable_list gradients = {dreduce, dattn_weight, dattn_bias, dselect, dselect_bias};
  for (const Tensor& rows : {dweight, dbias})
    for (const Tensor& row : rows.unbind()) gradients.push_back(row);
  gradients.insert(gradients.end(), dtensors.begin(), dtensors.end());
  for (size_t i = 0; i < gradients.size(); ++i)
    if (!needs[i]) gradients[i].reset();
  return gradients;
}

// Gradients of gradients are those that autograd makes of the reference, in Python.
variable_list differentiable(const Call& call, const Tensor& g, TensorList leaves, const std::vector<bool>& needs) {
  const py::gil_scoped_acquire gil;
  const auto function = py::reinterpret_borrow<py::object>(call.differentiable.ptr(getPyInterpreter()));
  py::list given;
  for (const Tensor& leaf : leaves) given.append(leaf.defined() ? py::cast(leaf) : py::none());
  variable_list gradients;
  for (const auto& gradient : function(g, given, needs)) gradients.push_back(gradient.is_none() ? Tensor() : gradient.cast<Tensor>());
  return gradients;
}

// PyTorch sees the leaves that are given, in `edges`.
struct SelectiveKernel : torch::autograd::Function<SelectiveKernel> {
  static variable_list forward(AutogradContext* ctx, const c10::intrusive_ptr<Call>& call, const Statistics& running,
                               std::vector<Tensor>* moments, const variable_list& leaves, TensorList edges) {
    Made made = sk::forward(*call, running, leaves, true);
    *moments = std::move(made.moments);
    variable_list& saved = made.kept;
    ctx->saved_data["call"] = c10::IValue::make_capsule(call);
    ctx->saved_data["kept"] = static_cast<int64_t>(saved.size());
    saved.insert(saved.end(), leaves.begin(), leaves.end());
    if (call->convolution) saved.insert(saved.end(), made.ys.begin(), made.ys.end());
    ctx->save_for_backward(std::move(saved));
    return {made.v};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto call = c10::static_intrusive_pointer_cast<Call>(ctx->saved_data["call"].toCapsule());
    const variable_list saved = ctx->get_saved_variables();
    const size_t kept = ctx->saved_data["kept"].toInt();
    const TensorList all(saved), leaves = all.slice(kept, saved.size() - kept - (call->convolution ? call->M : 0));
    std::vector<bool> needs;
    size_t edges = 0;
    for (const Tensor& leaf : leaves) needs.push_back(leaf.defined() && ctx->needs_input_grad(edges++));
    const bool differentiates = at::GradMode::is_enabled();
    TORCH_CHECK_NOT_IMPLEMENTED(differentiates || !torch::autograd::isFwGradDefined(grads[0]),
                                "selective_kernel: its backward has no forward-mode derivative");
    const variable_list of_leaves =
        differentiates ? differentiable(*call, grads[0], leaves, needs)
                       : sk::backward(*call, grads[0], all.slice(0, kept), leaves, all.slice(kept + leaves.size()).vec(), needs);
    // Of the call, the running statistics, the moments and the leaves as such there are none.
    variable_list gradients(4);
    for (size_t i = 0; i < leaves.size(); ++i)
      if (leaves[i].defined()) gradients.push_back(of_leaves[i]);
    return gradients;
  }
};

BatchNorm of(const py::handle& norm) { return {norm.attr("training").cast<bool>(), norm.attr("eps").cast<double>()}; }

std::optional<Tensor> vector_of(const py::handle& norm, const char* name) { return norm.attr(name).cast<std::optional<Tensor>>(); }

}  // namespace

std::vector<Tensor> selective_kernel(py::object differentiable, std::optional<Convolution> convolution, std::pair<std::string, double> act,
                                     std::pair<std::string, double> attn_act, const py::tuple& norms, const py::object& attn_norm,
                                     const py::args& given) {
  const auto call =
      c10::make_intrusive<Call>(std::move(convolution), Activation{act.first, act.second}, Activation{attn_act.first, attn_act.second},
                                of(norms[0]), of(attn_norm), norms.size(), std::move(differentiable));
  Statistics running;
  if (!call->norms.training)
    for (const auto& norm : norms) {
      running.means.push_back(*vector_of(norm, "running_mean"));
      running.variances.push_back(*vector_of(norm, "running_var"));
    }
  if (!call->attn_norm.training) {
    running.attn_mean = vector_of(attn_norm, "running_mean");
    running.attn_var = vector_of(attn_norm, "running_var");
  }
  variable_list leaves;
  for (const auto& leaf : given) leaves.push_back(leaf.is_none() ? Tensor() : leaf.cast<Tensor>());

  const py::gil_scoped_release no_gil;
  if (at::GradMode::is_enabled() && torch::autograd::any_variable_requires_grad(leaves)) {
    std::vector<Tensor> moments;
    variable_list edges;
    std::copy_if(leaves.begin(), leaves.end(), std::back_inserter(edges), [](const Tensor& leaf) { return leaf.defined(); });
    std::vector<Tensor> outputs = SelectiveKernel::apply(call, running, &moments, leaves, TensorList(edges));
    outputs.insert(outputs.end(), moments.begin(), moments.end());
    return outputs;
  }
  Made made = forward(*call, running, leaves, false);
  made.moments.insert(made.moments.begin(), made.v);
  return made.moments;
}

}  // namespace sk
