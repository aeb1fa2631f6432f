// What the steps share: the instruction set in use, the view of the branches that a kernel gets, and the checks.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>
#include <tuple>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

namespace sk {

enum class InstructionSet { base, avx2, avx512 };

// The best that this processor runs, or what the environment variable SK_FUSED_ISA ("base", "avx2", "avx512") lowers it
// to. Read once.
InstructionSet instruction_set();

enum class Activation { relu, leaky_relu, identity, silu };

// Half precision is computed, and every sum taken, in float32; float64 stays float64.
template <class T> struct AccumulateOf {
  using type = float;
};
template <> struct AccumulateOf<double> {
  using type = double;
};
template <class T> using Accumulate = typename AccumulateOf<T>::type;

inline at::ScalarType accumulate_type(at::ScalarType dtype) { return dtype == at::kDouble ? at::kDouble : at::kFloat; }

// M branches y_m of shape (B, C, H, W), all dense in one layout, and their folded batch-norm
// z = (y - mean) * scale + bias, arrays of shape (M, C).
template <class T> struct Branches {
  const T* const* y;
  int64_t M, B, C, HW;
  bool channels_last;
  const Accumulate<T>*mean, *scale, *bias;
  Accumulate<T> slope;

  Branches(at::TensorList ys) : M(ys.size()), B(ys[0].size(0)), C(ys[0].size(1)), HW(ys[0].size(2) * ys[0].size(3)) {
    for (const auto& branch : ys) pointers.push_back(branch.const_data_ptr<T>());
    y = pointers.data();
    channels_last = !ys[0].is_contiguous();
  }

  Branches(at::TensorList ys, const at::Tensor& mean_, const at::Tensor& scale_, const at::Tensor& bias_, double negative_slope)
      : Branches(ys) {
    mean = mean_.const_data_ptr<Accumulate<T>>();
    scale = scale_.const_data_ptr<Accumulate<T>>();
    bias = bias_.const_data_ptr<Accumulate<T>>();
    slope = static_cast<Accumulate<T>>(negative_slope);
  }

  Branches(const Branches&) = delete;

 private:
  c10::SmallVector<const T*, 4> pointers;
};

// In channels_last, how many pixels share one load of the constants.
constexpr int kPixelsAtOnce = 4;

// The reductions sum a segment of pixels of one image at a time, and then the segments in their order: the result does
// not depend on the number of threads. A segment is short enough that a second look at it finds it in cache. In
// channels_last, where one lane adds up all of a channel, it is at most `longest` pixels, for the sake of precision.
struct Segments {
  int64_t pixels, per_image;
  // One for each image.
  explicit Segments(int64_t HW) : pixels(HW), per_image(1) {}
  Segments(int64_t C, int64_t HW, bool channels_last, int64_t longest = 128)
      : pixels(channels_last ? std::clamp<int64_t>(32768 / std::max<int64_t>(1, C), 1, longest) : 4096),
        per_image((HW + pixels - 1) / pixels) {}
};

// Of every segment, moments (B, per_image, 2, channels): a value near its mean, and the sum of the squares of the deviations
// from it; missed (B, per_image, channels): the sum of these deviations. Joined to the mean and the variance of all (Chan,
// Golub, LeVeque 1979, formula 2.1, for many parts at once). In branch.cpp.
template <class A>
void join_moments(const A* moments, const A* missed, const Segments& segments, int64_t B, int64_t HW, int64_t channels, A* mean, A* var);

// Rows per task so that a task is worth a thread: about 32 Ki elements.
inline int64_t grain(int64_t elements_per_row) { return std::max<int64_t>(1, 32768 / std::max<int64_t>(1, elements_per_row)); }

inline at::MemoryFormat layout(const at::Tensor& t) {
  return t.is_contiguous() ? at::MemoryFormat::Contiguous : at::MemoryFormat::ChannelsLast;
}

// A tensor that is read beside the branches: their shape, dtype and layout.
inline void check_like(const at::Tensor& t, const char* name, const at::Tensor& y) {
  TORCH_CHECK_VALUE(t.sizes() == y.sizes(), name, ": expected shape ", y.sizes(), ", got ", t.sizes());
  TORCH_CHECK_VALUE(t.device() == y.device(), name, ": expected a tensor on ", y.device(), ", got one on ", t.device());
  TORCH_CHECK_TYPE(t.scalar_type() == y.scalar_type(), name, ": expected ", y.scalar_type(), ", got ", t.scalar_type());
  TORCH_CHECK_VALUE(t.is_contiguous(layout(y)), name, ": expected the layout of strides ", y.strides(), ", got strides ", t.strides());
}

inline void check_branches(at::TensorList ys) {
  TORCH_CHECK_VALUE(!ys.empty(), "ys: expected at least one branch, got none");
  TORCH_CHECK_VALUE(ys[0].dim() == 4, "ys: expected branches of shape (B, C, H, W), got ", ys[0].sizes());
  TORCH_CHECK_VALUE(ys[0].device().is_cpu(), "ys: expected CPU tensors, got a tensor on ", ys[0].device());
  for (const auto& y : ys) check_like(y, "ys", ys[0]);
}

// A small operand: contiguous, with the dtype and shape given.
inline void check_array(const at::Tensor& t, const char* name, at::ScalarType dtype, at::IntArrayRef shape) {
  TORCH_CHECK_VALUE(t.sizes() == shape && t.is_contiguous(), name, ": expected a contiguous array of shape ", shape, ", got shape ",
                    t.sizes(), " with strides ", t.strides());
  TORCH_CHECK_TYPE(t.scalar_type() == dtype, name, ": expected ", dtype, ", got ", t.scalar_type());
  TORCH_CHECK_VALUE(t.device().is_cpu(), name, ": expected a CPU tensor, got one on ", t.device());
}

inline void check_normalized(at::TensorList ys, const at::Tensor& mean, const at::Tensor& scale, const at::Tensor& bias) {
  check_branches(ys);
  const auto dtype = accumulate_type(ys[0].scalar_type());
  const int64_t shape[] = {static_cast<int64_t>(ys.size()), ys[0].size(1)};
  check_array(mean, "mean", dtype, shape);
  check_array(scale, "scale", dtype, shape);
  check_array(bias, "bias", dtype, shape);
}

inline void check_select_backward(const at::Tensor& g, at::TensorList ys, const at::Tensor& mean, const at::Tensor& scale,
                                  const at::Tensor& bias, const at::Tensor& a, const at::Tensor& t, const at::Tensor& p,
                                  const at::Tensor& q) {
  check_normalized(ys, mean, scale, bias);
  check_like(g, "g", ys[0]);
  const int64_t M = ys.size(), B = ys[0].size(0), C = ys[0].size(1);
  check_array(a, "a", mean.scalar_type(), {B, M, C});
  check_array(t, "t", mean.scalar_type(), {B, C});
  check_array(p, "p", mean.scalar_type(), {M, C});
  check_array(q, "q", mean.scalar_type(), {M, C});
}

// f.operator()<T>() for the storage type T.
template <class F> void dispatch(at::ScalarType dtype, const F& f) {
  switch (dtype) {
    case at::kFloat: return f.template operator()<float>();
    case at::kDouble: return f.template operator()<double>();
    case at::kBFloat16: return f.template operator()<c10::BFloat16>();
    case at::kHalf: return f.template operator()<c10::Half>();
    default: TORCH_CHECK_TYPE(false, "ys: expected float32, float64, bfloat16 or float16, got ", dtype);
  }
}

// f.operator()<A>() for what a small array is computed in.
template <class F> void dispatch_accumulate(at::ScalarType dtype, const F& f) {
  if (dtype == at::kDouble) f.template operator()<double>();
  else f.template operator()<float>();
}

// f.operator()<T, Activation>().
template <class F> void dispatch(at::ScalarType dtype, c10::string_view activation, const F& f) {
  dispatch(dtype, [&]<class T>() {
    if (activation == "relu") f.template operator()<T, Activation::relu>();
    else if (activation == "leaky_relu") f.template operator()<T, Activation::leaky_relu>();
    else if (activation == "identity") f.template operator()<T, Activation::identity>();
    else if (activation == "silu") f.template operator()<T, Activation::silu>();
    else TORCH_CHECK_VALUE(false, "activation: expected relu, leaky_relu, identity or silu, got ", activation);
  });
}

}  // namespace sk
