#pragma once

#include <torch/extension.h>

namespace sk {

// Of the branches' convolutions: stride, dilations, groups.
using Convolution = std::tuple<int64_t, std::vector<int64_t>, int64_t>;

// functional._SelectiveKernel.apply, of leaves of which some may be None. `differentiable` gives differentiable gradients:
// (g, leaves, which of these need one) to one for each.
std::vector<at::Tensor> selective_kernel(py::object differentiable, std::optional<Convolution> convolution,
                                         std::pair<std::string, double> act, std::pair<std::string, double> attn_act,
                                         const py::tuple& norms, const py::object& attn_norm, const py::args& leaves);

}  // namespace sk
