// The convolutions that make the branches: what they are, and what the two ways of computing them share.
#pragma once

#include "common.h"
#include "operators.h"
#include "plane.h"

namespace sk {

constexpr int64_t kMaxBranches = 8, kMaxDilation = 3;

// M convolutions, 3 x 3, padded by their dilation, of one input, or of its channels' M parts.
struct Convolutions {
  Picture in, out;
  // A group's channels: in, and out.
  int64_t B, M, groups, inputs, outputs, stride, halo;
  bool split;
  // Weight (o, i, k), k the tap, is the (i * channel_step + k * tap_step)-th of its output channel.
  int64_t channel_step, tap_step;
  int64_t dilation[kMaxBranches];

  int64_t row() const { return inputs * 9; }
  // The channels of x that a branch sees.
  int64_t branch_inputs() const { return groups * inputs; }
  int64_t first_input(int64_t m) const { return split ? m * branch_inputs() : 0; }
  // Winograd's algorithm saves more than half of the products, and pays from 16 channels a group on. Smaller groups, and
  // strides, are convolved directly.
  bool winograd() const { return stride == 1 && inputs % 16 == 0 && outputs % 16 == 0; }
  bool direct() const { return !winograd() && !split && inputs == outputs && (inputs == 4 || inputs == 8 || inputs == 16 || inputs == 32); }
};

// `x` and `weights`, checked. One layout for all weights.
Convolutions check_convolutions(const Tensor& x, TensorList weights, int64_t stride, at::IntArrayRef dilations, int64_t groups);

template <class F> void dispatch_convolution(at::ScalarType dtype, const F& f) {
  dispatch(dtype, [&]<class T>() {
    if constexpr (!std::is_same_v<T, double>) f.template operator()<T>();
  });
}

// f(scratch, first, last) on parts of the tasks, each part with zeroed scratch of its own.
template <class F> void parallel_tasks(int64_t tasks, int64_t scratch_size, const F& f) {
  at::parallel_for(0, tasks, 1, [&](int64_t first, int64_t last) {
    const Tensor scratch = at::zeros({scratch_size}, at::kFloat);
    f(scratch.data_ptr<float>(), first, last);
  });
}

// Weights of a branch, each output channel's times its scale, if one is given, and L of them side by side:
// out[output channel / L][element of the row][L].
template <class T> void pack_weights(const Convolutions& s, const T* weights, const float* scale, float* out);

// Weights of a branch the other way round, for the gradient of its input: out[input channel / L][(o * 9 + k) * L], taps
// turned by half a turn.
template <class T> void turn_weights(const Convolutions& s, const T* weights, float* out);

// The sum of the parts of a weight's gradient, (groups * outputs / L, inputs * 9, L) each and `part_step` apart.
void sum_weight_gradients(const Convolutions& s, const float* partial, int64_t part_step, int64_t parts, const Tensor& dweight);

// The attention from the parts of the pooled sums, (B, P, C).
struct Attention {
  const Tensor& fc_reduce;
  const std::optional<Tensor>&weight, &bias;
  const Tensor &mean, &var;
  double eps;
  const Tensor& fc_select;
  Tensor operator()(const Tensor& pooled, int64_t pixels) const {
    return std::get<0>(attend_cpu(pooled, pixels, fc_reduce, weight, bias, mean, var, eps, "relu", 0, fc_select, std::nullopt));
  }
};

// Where Convolutions::direct(). The gradient of x is not computed if dx is empty, those of the weights if dweights is.
void branch_direct(const Convolutions& s, const Tensor& x, TensorList weights, TensorList ys, const Tensor& mean, const Tensor& var);
void branch_direct_backward(const Convolutions& s, const Tensor& g, const Tensor& x, TensorList weights, TensorList ys, const Tensor& mean,
                            const Tensor& scale, const Tensor& bias, const Tensor& a, const Tensor& t, const Tensor& p, const Tensor& q,
                            c10::string_view activation, double negative_slope, const Tensor& dx, TensorList dweights);
Tensor unit_direct(const Convolutions& s, const Tensor& x, TensorList weights, int64_t images, const Tensor& mean, const Tensor& scale,
                   const Tensor& bias, const Attention& attention, c10::string_view activation, double negative_slope);

// Where Convolutions::winograd(), with packed weights; dx and dweights likewise.
void branch_winograd(const Convolutions& s, const Tensor& x, TensorList packed, TensorList ys);
void branch_winograd_backward(const Convolutions& s, const Tensor& x, TensorList weights, TensorList dys, const Tensor& dx,
                              TensorList dweights);

}  // namespace sk
