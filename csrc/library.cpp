// The native operators: the one list of what is native. Shapes: ys are M branches (B, C, H, W); mean, scale, bias, p, q
// are (M, C), a is (B, M, C), s and t are (B, C), what squeeze
// returns (sums, B, M, C). sk_fused/functional.py says what each is for.
#include <torch/extension.h>
#include <torch/library.h>

#include "cpu/operators.h"

TORCH_LIBRARY(sk_fused, m) {
  m.def("branch_statistics(Tensor[] ys) -> (Tensor mean, Tensor var)");
  m.def("branch(Tensor x, Tensor[] weights, int stride, int[] dilations, int groups) -> (Tensor[] ys, Tensor mean, Tensor var)");
  m.def(
      "branch_backward(Tensor g, Tensor x, Tensor[] weights, int stride, int[] dilations, int groups, Tensor[] ys, Tensor mean, Tensor scale,"
      " Tensor bias, Tensor a, Tensor t, Tensor p, Tensor q, str activation, float negative_slope) -> (Tensor dx, Tensor[] dweights)");
  m.def(
      "unit(Tensor x, Tensor[] weights, int stride, int[] dilations, int groups, Tensor mean, Tensor scale, Tensor bias, Tensor fc_reduce,"
      " Tensor attn_weight, Tensor attn_bias, Tensor attn_mean, Tensor attn_var, float attn_eps, Tensor fc_select, str activation,"
      " float negative_slope) -> Tensor");
  m.def("squeeze(Tensor[] ys, Tensor mean, Tensor scale, Tensor bias, str activation, float negative_slope, int sums, Tensor? g=None) -> Tensor");
  m.def(
      "attend(Tensor s, Tensor fc_reduce, Tensor weight, Tensor bias, Tensor? mean, Tensor? var, float eps, Tensor fc_select)"
      " -> (Tensor a, Tensor reduced, Tensor mean, Tensor var)");
  m.def(
      "attend_backward(Tensor da, Tensor a, Tensor s, Tensor reduced, Tensor fc_reduce, Tensor weight, Tensor bias, Tensor mean,"
      " Tensor var, float eps, bool training, Tensor fc_select) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("select(Tensor[] ys, Tensor mean, Tensor scale, Tensor bias, Tensor a, str activation, float negative_slope) -> Tensor");
  m.def(
      "select_backward(Tensor g, Tensor[] ys, Tensor mean, Tensor scale, Tensor bias, Tensor a, Tensor t, Tensor p, Tensor q,"
      " str activation, float negative_slope) -> Tensor[]");
}

TORCH_LIBRARY_IMPL(sk_fused, CPU, m) {
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
