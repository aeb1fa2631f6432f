// attend: a = softmax_m(fc_select . act(BN(fc_reduce . s)) + select_bias) on (B, C)-sized data, and its backward. The forward's
// matrix products are ours: the library's would be sums in an order that depends on the number of threads, and for a few images
// take up to twice as long. The backward's are the library's.

#ifdef SK_ISA

// out (B, N) = x (B, K) . w (N, K)^T + bias. Tasks are L of its columns; lanes are parts of their sums.
template <class A>
void product_tasks(const A* x, const A* w, const A* bias, int64_t B, int64_t N, int64_t K, A* out, int64_t first, int64_t last) {
  constexpr int64_t L = kLanes<A>;
  for (int64_t n = first * L; n < last * L; n += L) {
    const int64_t columns = N - n < L ? N - n : L, whole = K / L * L;
    const A* rows[L];
    for (int64_t l = 0; l < L; ++l) rows[l] = w + (l < columns ? n + l : n) * K;
    for (int64_t b = 0; b < B; ++b) {
      Vec<A> sums[L] = {};
      for (int64_t k = 0; k < whole; k += L) {
        const Vec<A> v = load(x + b * K + k);
#pragma GCC unroll 16
        for (int64_t l = 0; l < L; ++l) sums[l] += v * load(rows[l] + k);
      }
      if (whole < K) {
        const Vec<A> v = load(x + b * K + whole, K - whole);
#pragma GCC unroll 16
        for (int64_t l = 0; l < L; ++l) sums[l] += v * load(rows[l] + whole, K - whole);
      }
      Vec<A> total = {};
      if constexpr (sizeof(A) == 4) {
        transpose(sums);
        for (int64_t step = L / 2; step > 0; step /= 2)
          for (int64_t l = 0; l < step; ++l) sums[l] += sums[l + step];
        total = sums[0];
      } else {
        for (int64_t l = 0; l < L; ++l) total[l] = sum<A>(sums[l]);
      }
      if (bias) total += load_some(bias + n, columns);
      store_some(out + b * N + n, total, columns);
    }
  }
}

// Softmax over m of logits (M, C), in place: lanes are channels.
template <class A, bool kPartial> SK_INLINE void softmax_lanes(A* logits, int64_t M, int64_t C, int64_t n) {
  Vec<A> largest = load_lanes<kPartial>(logits, n);
  for (int64_t m = 1; m < M; ++m) {
    const Vec<A> x = load_lanes<kPartial>(logits + m * C, n);
    largest = x > largest ? x : largest;
  }
  Vec<A> total = {};
  for (int64_t m = 0; m < M; ++m) {
    const Vec<A> e = exp<A>(load_lanes<kPartial>(logits + m * C, n) - largest);
    store_lanes<kPartial>(logits + m * C, e, n);
    total += e;
  }
  for (int64_t m = 0; m < M; ++m) store_lanes<kPartial>(logits + m * C, load_lanes<kPartial>(logits + m * C, n) / total, n);
}

template <class A> void softmax(A* logits, int64_t M, int64_t C, int64_t first, int64_t last) {
  for (int64_t b = first; b < last; ++b) {
    A* const row = logits + b * M * C;
    int64_t c = 0;
    for (; c + kLanes<A> <= C; c += kLanes<A>) softmax_lanes<A, false>(row + c, M, C, 0);
    if (c < C) softmax_lanes<A, true>(row + c, M, C, C - c);
  }
}

// dlogits = a (da - sum_m a da).
template <class A, bool kPartial>
SK_INLINE void softmax_backward_lanes(const A* da, const A* a, A* dlogits, int64_t M, int64_t C, int64_t n) {
  Vec<A> total = {};
  for (int64_t m = 0; m < M; ++m) total += load_lanes<kPartial>(a + m * C, n) * load_lanes<kPartial>(da + m * C, n);
  for (int64_t m = 0; m < M; ++m)
    store_lanes<kPartial>(dlogits + m * C, load_lanes<kPartial>(a + m * C, n) * (load_lanes<kPartial>(da + m * C, n) - total), n);
}

template <class A> void softmax_backward(const A* da, const A* a, A* dlogits, int64_t B, int64_t M, int64_t C) {
  for (int64_t b = 0; b < B; ++b) {
    const int64_t at = b * M * C;
    int64_t c = 0;
    for (; c + kLanes<A> <= C; c += kLanes<A>) softmax_backward_lanes<A, false>(da + at + c, a + at + c, dlogits + at + c, M, C, 0);
    if (c < C) softmax_backward_lanes<A, true>(da + at + c, a + at + c, dlogits + at + c, M, C, C - c);
  }
}

#else

#include "attend.h"

#include <cmath>

#include <ATen/CPUFunctions.h>

#define SK_KERNELS "attend.cpp"
#include "foreach_isa.h"

namespace sk {

static Tensor matrix(const Tensor& fc, const char* name, at::ScalarType dtype) {
  TORCH_CHECK_VALUE(fc.dim() == 2 || (fc.dim() == 4 && fc.size(2) == 1 && fc.size(3) == 1), name,
                    ": expected a matrix or the weight of a 1 x 1 convolution, got shape ", fc.sizes());
  return array_of(fc.flatten(1), dtype);
}

Attention::Attention(at::ScalarType dtype, int64_t C, const Tensor& fc_reduce_, const std::optional<Tensor>& weight_,
                     const std::optional<Tensor>& bias_, const Tensor& fc_select_)
    : dtype(dtype), C(C), fc_reduce(matrix(fc_reduce_, "fc_reduce", dtype)), fc_select(matrix(fc_select_, "fc_select", dtype)) {
  D = fc_reduce.size(0);
  TORCH_CHECK_VALUE(C > 0 && fc_select.size(0) > 0 && fc_select.size(0) % C == 0, "fc_select: expected a multiple of C = ", C,
                    " rows, got ", fc_select.size(0));
  M = fc_select.size(0) / C;
  check_array(fc_reduce, "fc_reduce", dtype, {D, C});
  check_array(fc_select, "fc_select", dtype, {M * C, D});
  weight = weight_ ? vector(*weight_, "weight", D) : at::ones({D}, fc_reduce.options());
  bias = bias_ ? vector(*bias_, "bias", D) : at::zeros({D}, fc_reduce.options());
}

Tensor Attention::vector(const Tensor& t, const char* name, int64_t length) const {
  const Tensor converted = array_of(t, dtype);
  check_array(converted, name, dtype, {length});
  return converted;
}

// The batch-norm and activation of column d.
template <class A> struct Column {
  A mean, r, weight, bias, slope;
  A normalized(A x) const { return (x - mean) * r; }
  A act(A x) const {
    const A n = normalized(x) * weight + bias;
    return gate(x, n);
  }
  A gate(A x, A g) const { return normalized(x) * weight + bias <= 0 ? (slope == 0 ? A(0) : slope * g) : g; }
};

// out (B, N) = x (B, K) . w (N, K)^T + bias (N,).
template <class A> static void product(const A* x, const Tensor& w, const A* bias, int64_t B, A* out) {
  const int64_t N = w.size(0), K = w.size(1), L = SK_PICK(lanes)() * sizeof(float) / sizeof(A);
  const A* const rows = w.const_data_ptr<A>();
  const auto kernel = SK_PICK(product_tasks<A>);
  at::parallel_for(0, (N + L - 1) / L, grain(B * K * L / 8),
                   [&](int64_t first, int64_t last) { kernel(x, rows, bias, B, N, K, out, first, last); });
}

template <class A>
void Attention::attend(const Attended<A>& of, const A* pooled, int64_t parts, int64_t step, int64_t pixels, bool of_batch, A* mean, A* var,
                       double eps, double slope, const A* select_bias) const {
  const int64_t B = of.B;
  std::fill_n(of.s, B * C, A(0));
  for (int64_t b = 0; b < B; ++b) {
    A* const s = of.s + b * C;
    for (int64_t i = 0; i < parts; ++i, pooled += step)
      for (int64_t c = 0; c < C; ++c) s[c] += pooled[c];
    for (int64_t c = 0; c < C; ++c) s[c] /= static_cast<A>(pixels);
  }
  product<A>(of.s, fc_reduce, nullptr, B, of.reduced);
  const A *const x = of.reduced, *const weights = weight.const_data_ptr<A>(), *const biases = bias.const_data_ptr<A>();
  for (int64_t d = 0; d < D; ++d) {
    if (of_batch) {
      double total = 0, squares = 0;
      for (int64_t b = 0; b < B; ++b) total += x[b * D + d];
      const double average = total / B;
      for (int64_t b = 0; b < B; ++b) squares += (x[b * D + d] - average) * (x[b * D + d] - average);
      mean[d] = static_cast<A>(average);
      var[d] = static_cast<A>(squares / B);
    }
    const Column<A> column{mean[d], A(1) / std::sqrt(var[d] + static_cast<A>(eps)), weights[d], biases[d], static_cast<A>(slope)};
    for (int64_t b = 0; b < B; ++b) of.h[b * D + d] = column.act(x[b * D + d]);
  }
  product<A>(of.h, fc_select, select_bias, B, of.a);
  const auto kernel = SK_PICK(softmax<A>);
  at::parallel_for(0, B, grain(8 * M * C), [&](int64_t first, int64_t last) { kernel(of.a, M, C, first, last); });
}

template void Attention::attend<float>(const Attended<float>&, const float*, int64_t, int64_t, int64_t, bool, float*, float*, double,
                                       double, const float*) const;

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attend_cpu(const Tensor& pooled, int64_t pixels, const Tensor& fc_reduce,
                                                              const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                                                              const std::optional<Tensor>& mean, const std::optional<Tensor>& var,
                                                              double eps, c10::string_view activation, double negative_slope,
                                                              const Tensor& fc_select, const std::optional<Tensor>& select_bias) {
  check_pooled(pooled, pixels);
  const int64_t B = pooled.size(0), P = pooled.size(1), C = pooled.size(2);
  check_array(pooled, "pooled", pooled.scalar_type(), {B, P, C});
  const double slope = hidden_slope(activation, negative_slope);
  const Attention attention(pooled.scalar_type(), C, fc_reduce, weight, bias, fc_select);
  const int64_t D = attention.D, M = attention.M;
  TORCH_CHECK_VALUE(mean.has_value() == var.has_value(), "mean, var: expected both or neither, got only one");
  const auto statistic = [&](const std::optional<Tensor>& given, const char* name) {
    return given ? attention.vector(*given, name, D).clone() : at::empty({D}, pooled.options());
  };
  const Tensor mean_out = statistic(mean, "mean"), var_out = statistic(var, "var");
  const Tensor added = select_bias ? attention.vector(*select_bias, "select_bias", M * C) : Tensor();
  const auto array = [&](at::IntArrayRef shape) { return at::empty(shape, pooled.options()); };
  const Tensor a = array({B, M, C}), s = array({B, C}), reduced = array({B, D}), h = array({B, D});
  dispatch_accumulate(attention.dtype, [&]<class A>() {
    const Attended<A> of{B, s.data_ptr<A>(), reduced.data_ptr<A>(), h.data_ptr<A>(), a.data_ptr<A>()};
    attention.attend(of, pooled.const_data_ptr<A>(), P, C, pixels, !mean, mean_out.data_ptr<A>(), var_out.data_ptr<A>(), eps, slope,
                     select_bias ? added.const_data_ptr<A>() : nullptr);
  });
  return {a, s, reduced, mean_out, var_out};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> attend_backward_cpu(
    const Tensor& da, const Tensor& a, const Tensor& s, const Tensor& reduced, const Tensor& fc_reduce, const std::optional<Tensor>& weight,
    const std::optional<Tensor>& bias, const Tensor& mean, const Tensor& var, double eps, bool training, c10::string_view activation,
    double negative_slope, const Tensor& fc_select) {
  const double negative = hidden_slope(activation, negative_slope);
  TORCH_CHECK_TYPE(s.scalar_type() == at::kFloat || s.scalar_type() == at::kDouble, "s: expected float32 or float64, got ",
                   s.scalar_type());
  TORCH_CHECK_VALUE(s.dim() == 2, "s: expected shape (B, C), got ", s.sizes());
  check_array(s, "s", s.scalar_type(), s.sizes());
  const int64_t B = s.size(0), C = s.size(1);
  const Attention parameters(s.scalar_type(), C, fc_reduce, weight, bias, fc_select);
  const int64_t D = parameters.D, M = parameters.M;
  check_array(da, "da", s.scalar_type(), {B, M, C});
  check_array(a, "a", s.scalar_type(), {B, M, C});
  check_array(reduced, "reduced", s.scalar_type(), {B, D});
  check_array(mean, "mean", s.scalar_type(), {D});
  check_array(var, "var", s.scalar_type(), {D});
  const Tensor dlogits = at::empty({B, M * C}, s.options()), h = at::empty({B, D}, s.options());
  const Tensor dweight = at::empty({D}, s.options()), dbias = at::empty({D}, s.options());
  dispatch_accumulate(s.scalar_type(), [&]<class A>() {
    SK_PICK(softmax_backward<A>)(da.const_data_ptr<A>(), a.const_data_ptr<A>(), dlogits.data_ptr<A>(), B, M, C);
  });
  // The gradient of h, then, in place, of the reduced descriptor.
  const Tensor dreduced = at::cpu::mm(dlogits, parameters.fc_select);
  dispatch_accumulate(s.scalar_type(), [&]<class A>() {
    const A* const x = reduced.const_data_ptr<A>();
    A *const out = h.data_ptr<A>(), *const g = dreduced.data_ptr<A>();
    for (int64_t d = 0; d < D; ++d) {
      const Column<A> column{mean.const_data_ptr<A>()[d], A(1) / std::sqrt(var.const_data_ptr<A>()[d] + static_cast<A>(eps)),
                             parameters.weight.const_data_ptr<A>()[d], parameters.bias.const_data_ptr<A>()[d], static_cast<A>(negative)};
      double total = 0, product = 0;
      for (int64_t b = 0; b < B; ++b) {
        const int64_t i = b * D + d;
        out[i] = column.act(x[i]);
        g[i] = column.gate(x[i], g[i]);
        total += g[i];
        product += static_cast<double>(g[i]) * column.normalized(x[i]);
      }
      dbias.data_ptr<A>()[d] = static_cast<A>(total);
      dweight.data_ptr<A>()[d] = static_cast<A>(product);
      const A mean_of_g = training ? static_cast<A>(total / B) : A(0), slope = training ? static_cast<A>(product / B) : A(0);
      for (int64_t b = 0; b < B; ++b) {
        const int64_t i = b * D + d;
        g[i] = column.weight * column.r * (g[i] - mean_of_g - column.normalized(x[i]) * slope);
      }
    }
  });
  return {at::cpu::mm(dreduced, parameters.fc_reduce),
          at::cpu::mm(dreduced.t(), s).view(fc_reduce.sizes()),
          dweight,
          dbias,
          at::cpu::mm(dlogits.t(), h).view(fc_select.sizes()),
          at::sum(dlogits, 0)};
}

}  // namespace sk

#endif
