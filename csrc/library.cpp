// The native operators: the one list of what is native. Shapes: ys are M branches (B, C, H, W); mean, scale, bias, p, q
// are (M, C); a, K, da, R1 and R2 are (B, M, C); s and t are (B, C). sk_fused/backends/reference.py says what each does.
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/extension.h>
#include <torch/library.h>

#include "cpu/operators.h"
#include "selective_kernel.h"

// The compiler keeps the strides that an operator is called with: they are asserted.
static const std::vector<at::Tag> kTags = {at::Tag::pt2_compliant_tag, at::Tag::needs_exact_strides};

TORCH_LIBRARY(sk_fused, m) {
  m.def("branch_statistics(Tensor[] ys) -> (Tensor mean, Tensor var)", kTags);
  // Without statistics mean and var are empty.
  m.def(
      "branch(Tensor x, Tensor[] weights, int stride, int[] dilations, int groups, bool statistics=True)"
      " -> (Tensor[] ys, Tensor mean, Tensor var)",
      kTags);
  m.def(
      "branch_backward(Tensor g, Tensor x, Tensor[] weights, int stride, int[] dilations, int groups, Tensor[] ys, Tensor mean, Tensor scale,"
      " Tensor bias, Tensor a, Tensor t, Tensor p, Tensor q, str activation, float negative_slope, bool[2] needs)"
      " -> (Tensor dx, Tensor[] dweights)",
      kTags);
  m.def(
      "unit(Tensor x, Tensor[] weights, int stride, int[] dilations, int groups, Tensor?[] norm_weights, Tensor?[] norm_biases, Tensor[] means,"
      " Tensor[] variances, float eps, Tensor fc_reduce, Tensor? attn_weight, Tensor? attn_bias, Tensor attn_mean, Tensor attn_var,"
      " float attn_eps, Tensor fc_select, str activation, float negative_slope) -> Tensor",
      kTags);
  m.def(
      "squeeze(Tensor[] ys, Tensor?[] norm_weights, Tensor?[] norm_biases, Tensor[] means, Tensor[] variances, float eps, str activation,"
      " float negative_slope, int sums) -> (Tensor mean, Tensor r, Tensor scale, Tensor bias, Tensor pooled, Tensor[] K)",
      kTags);
  m.def(
      "attend(Tensor pooled, SymInt pixels, Tensor fc_reduce, Tensor? weight, Tensor? bias, Tensor? mean, Tensor? var, float eps, str activation,"
      " float negative_slope, Tensor fc_select, Tensor? select_bias) -> (Tensor a, Tensor s, Tensor reduced, Tensor mean, Tensor var)",
      kTags);
  m.def("select(Tensor[] ys, Tensor mean, Tensor scale, Tensor bias, Tensor a, str activation, float negative_slope) -> Tensor", kTags);
  m.def(
      "select_backward_sums(Tensor g, Tensor[] ys, Tensor mean, Tensor scale, Tensor bias, str activation, float negative_slope)"
      " -> (Tensor da, Tensor R1, Tensor R2)",
      kTags);
  m.def(
      "attend_backward(Tensor da, Tensor a, Tensor s, Tensor reduced, Tensor fc_reduce, Tensor? weight, Tensor? bias, Tensor mean,"
      " Tensor var, float eps, bool training, str activation, float negative_slope, Tensor fc_select)"
      " -> (Tensor ds, Tensor dfc_reduce, Tensor dweight, Tensor dbias, Tensor dfc_select, Tensor dselect_bias)",
      kTags);
  m.def(
      "fold_backward(Tensor a, Tensor ds, SymInt pixels, Tensor R1, Tensor R2, Tensor K1, Tensor K2, Tensor r, Tensor scale, SymInt count)"
      " -> (Tensor t, Tensor dweight, Tensor dbias, Tensor p, Tensor q)",
      kTags);
  m.def(
      "select_backward(Tensor g, Tensor[] ys, Tensor mean, Tensor scale, Tensor bias, Tensor a, Tensor t, Tensor p, Tensor q,"
      " str activation, float negative_slope) -> Tensor[]",
      kTags);
}

TORCH_LIBRARY_IMPL(sk_fused, CPU, m) {
  m.impl("branch_statistics", sk::branch_statistics_cpu);
  m.impl("branch", sk::branch_cpu);
  m.impl("branch_backward", sk::branch_backward_cpu);
  m.impl("unit", sk::unit_cpu);
  m.impl("squeeze", sk::squeeze_cpu);
  m.impl("attend", sk::attend_cpu);
  m.impl("select", sk::select_cpu);
  m.impl("select_backward_sums", sk::select_backward_sums_cpu);
  m.impl("attend_backward", sk::attend_backward_cpu);
  m.impl("fold_backward", sk::fold_backward_cpu);
  m.impl("select_backward", sk::select_backward_cpu);
}

// functional.py differentiates the unit. Whoever asks the operators themselves, as an exported program does, is told that they
// have no derivative, and does not miss gradients unawares.
TORCH_LIBRARY_IMPL(sk_fused, Autograd, m) {
  for (const char* name : {"branch_statistics", "branch", "squeeze", "attend", "select", "unit", "select_backward_sums", "attend_backward",
                           "fold_backward", "select_backward", "branch_backward"})
    m.impl(name, torch::autograd::autogradNotImplementedFallback());
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("instruction_set", sk::instruction_set_name);
  m.def("selective_kernel", sk::selective_kernel);
  // What the CUDA kernels, cuda/bindings.cpp, are built for: "80 90a …"; without them, nothing.
#ifdef SK_FUSED_CUDA
  m.attr("cuda_architectures") = SK_FUSED_CUDA;
#else
  m.attr("cuda_architectures") = "";
#endif
}
