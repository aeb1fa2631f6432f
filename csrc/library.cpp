// The native operators: the one list of what is native. Shapes: ys are M branches (B, C, H, W); mean, scale, bias, p, q
// are (M, C), a and what squeeze returns are (B, M, C), s and t are (B, C). sk_fused/functional.py says what each is for.
#include <torch/extension.h>
#include <torch/library.h>

#include "cpu/operators.h"

// The compiler keeps the strides that an operator is called with: they are asserted.
static const std::vector<at::Tag> kTags = {at::Tag::pt2_compliant_tag, at::Tag::needs_exact_strides};

TORCH_LIBRARY(sk_fused, m) {
  m.def(
      "fold(Tensor?[] weights, Tensor?[] biases, Tensor[] means, Tensor[] variances, float eps, ScalarType dtype)"
      " -> (Tensor mean, Tensor r, Tensor scale, Tensor bias)",
      kTags);
  m.def("branch_statistics(Tensor[] ys) -> (Tensor mean, Tensor var)", kTags);
  m.def("branch(Tensor x, Tensor[] weights, int stride, int[] dilations, int groups) -> (Tensor[] ys, Tensor mean, Tensor var)", kTags);
  m.def(
      "branch_backward(Tensor g, Tensor x, Tensor[] weights, int stride, int[] dilations, int groups, Tensor[] ys, Tensor mean, Tensor scale,"
      " Tensor bias, Tensor a, Tensor t, Tensor p, Tensor q, str activation, float negative_slope) -> (Tensor dx, Tensor[] dweights)",
      kTags);
  m.def(
      "unit(Tensor x, Tensor[] weights, int stride, int[] dilations, int groups, Tensor mean, Tensor scale, Tensor bias, Tensor fc_reduce,"
      " Tensor attn_weight, Tensor attn_bias, Tensor attn_mean, Tensor attn_var, float attn_eps, Tensor fc_select, str activation,"
      " float negative_slope) -> Tensor",
      kTags);
  m.def(
      "squeeze(Tensor[] ys, Tensor mean, Tensor scale, Tensor bias, str activation, float negative_slope, int sums, Tensor? g=None) -> Tensor[]",
      kTags);
  m.def(
      "attend(Tensor s, Tensor fc_reduce, Tensor? weight, Tensor? bias, Tensor? mean, Tensor? var, float eps, Tensor fc_select)"
      " -> (Tensor a, Tensor reduced, Tensor mean, Tensor var)",
      kTags);
  m.def(
      "attend_backward(Tensor da, Tensor a, Tensor s, Tensor reduced, Tensor fc_reduce, Tensor? weight, Tensor? bias, Tensor mean,"
      " Tensor var, float eps, bool training, Tensor fc_select) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
      kTags);
  m.def("select(Tensor[] ys, Tensor mean, Tensor scale, Tensor bias, Tensor a, str activation, float negative_slope) -> Tensor", kTags);
  m.def(
      "select_backward(Tensor g, Tensor[] ys, Tensor mean, Tensor scale, Tensor bias, Tensor a, Tensor t, Tensor p, Tensor q,"
      " str activation, float negative_slope) -> Tensor[]",
      kTags);
}

TORCH_LIBRARY_IMPL(sk_fused, CPU, m) {
  m.impl("fold", sk::fold_cpu);
  m.impl("branch_statistics", sk::branch_statistics_cpu);
  m.impl("branch", sk::branch_cpu);
  m.impl("branch_backward", sk::branch_backward_cpu);
  m.impl("unit", sk::unit_cpu);
  m.impl("squeeze", sk::squeeze_cpu);
  m.impl("attend", sk::attend_cpu);
  m.impl("attend_backward", sk::attend_backward_cpu);
  m.impl("select", sk::select_cpu);
  m.impl("select_backward", sk::select_backward_cpu);
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) { m.def("instruction_set", sk::instruction_set_name); }
