// What the steps share: the instruction set in use, the view of the branches that a kernel gets, and the checks.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include "../checks.h"

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

// M branches y_m of shape (B, C, H, W), all dense in one layout, and their folded batch-norm
// z = (y - mean) * scale + bias, arrays of shape (M, C).
template <class T> struct Branches {
  const T* const* y;
  int64_t M, B, C, HW;
  bool channels_last;
  const Accumulate<T>*mean = nullptr, *scale = nullptr, *bias = nullptr;
  Accumulate<T> slope = 0;

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

// The reductions sum a segment of pixels of one image at a time, and then the segments, always in the same order: the result does
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

// For each thread, what its share of the last-level cache holds on today's servers.
constexpr int64_t kCacheBytes = 2 << 20;

// Whether so many bytes of outputs are more than the caches hold. These are written past the caches: whoever reads them next would not
// find them there, and a line that is written into cache is fetched first.
inline bool beyond_caches(int64_t bytes) { return bytes > at::get_num_threads() * kCacheBytes; }

// Lets others see what this thread has written past the caches before all that it writes from here on.
inline void fence_streams() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// t, contiguous and in this dtype. To ask PyTorch for it takes longer than to see that there is nothing to do.
inline at::Tensor array_of(const at::Tensor& t, at::ScalarType dtype) { return (t.scalar_type() == dtype ? t : t.to(dtype)).contiguous(); }

// Rows per task so that a task is worth a thread: about 32 Ki elements.
inline int64_t grain(int64_t elements_per_row) { return std::max<int64_t>(1, 32768 / std::max<int64_t>(1, elements_per_row)); }

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
