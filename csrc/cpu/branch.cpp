// branch: the operators that convolve, and the batch statistics of every branch's batch-norm.

#ifdef SK_ISA

// The deviations from a centre near the mean, and their squares, give both moments, right also when |mean| >> std. The mean of a few
// values can be the centre, and one look is enough: where it is more than two standard deviations from the mean, so that the sums
// would cancel, a second look has the mean that the first found.
template <class A> SK_INLINE bool cancels(A sum, A squares, int64_t pixels) {
  return !(sum * sum <= A(0.8) * static_cast<A>(pixels) * squares);
}

// Where lanes are channels, and a chain of additions is long, a centre in half precision leaves deviations with so few bits that their
// sum is exact. The last bits of the deviations from any other are all the same, and round the same way.
template <class T> SK_INLINE Accumulate<T> round_centre(Accumulate<T> value) { return static_cast<Accumulate<T>>(static_cast<T>(value)); }

// Lanes are channels: adds the deviations from centre (C) to sum (C), and their squares to squares (C).
template <class T> struct ChannelMoments {
  using A = Accumulate<T>;
  const T* y;
  int64_t C;
  const A* centre;
  A *sum, *squares;

  template <int kN, int kStrands, bool kPartial>
  SK_INLINE void add(int64_t c, int64_t offset, int64_t pixels, int64_t step, int64_t n) const {
    constexpr int64_t L = kLanes<A>;
    Vec<A> total[kN] = {}, total_squares[kN] = {};
    for (int64_t pixel = 0; pixel < pixels; ++pixel)
      for (int j = 0; j < kN; ++j) {
        const Vec<A> origin = load_lanes<kPartial>(centre + c + j * L, n);
        for (int k = 0; k < kStrands; ++k) {
          const T* const from = y + offset + pixel * C + k * step + c + j * L;
          if constexpr (kStrands > 1) prefetch_ahead(from);
          const Vec<A> d = load_lanes<kPartial>(from, n) - origin;
          total[j] += d;
          total_squares[j] += d * d;
        }
      }
    for (int j = 0; j < kN; ++j) {
      A *const to = sum + c + j * L, *const to_squares = squares + c + j * L;
      store_lanes<kPartial>(to, load_lanes<kPartial>(to, n) + total[j], n);
      store_lanes<kPartial>(to_squares, load_lanes<kPartial>(to_squares, n) + total_squares[j], n);
    }
  }
};

template <class T>
SK_INLINE void segment_moments(const T* y, int64_t pixels, int64_t C, Accumulate<T>* centre, Accumulate<T>* squares, Accumulate<T>* sum) {
  using A = Accumulate<T>;
  constexpr int64_t L = kLanes<A>;
  // Values from all over the segment are less alike than neighbours.
  const int64_t few = pixels < 8 ? pixels : 8, step = pixels / few * C;
  for (int64_t c = 0; c < C; ++c) {
    A total = 0;
    for (int64_t i = 0; i < few; ++i) total += static_cast<A>(y[i * step + c]);
    centre[c] = round_centre<T>(total / static_cast<A>(few));
    sum[c] = squares[c] = 0;
  }
  const ChannelMoments<T> moments{y, C, centre, sum, squares};
  each_pixel<A>(moments, C, pixels);
  for (int64_t c = 0; c < C; c += L) {
    const int64_t n = C - c < L ? C - c : L;
    bool again = false;
    for (int64_t i = c; i < c + n; ++i) again |= cancels(sum[i], squares[i], pixels);
    if (!again) continue;
    for (int64_t i = c; i < c + n; ++i) {
      centre[i] = round_centre<T>(centre[i] + sum[i] / static_cast<A>(pixels));
      sum[i] = squares[i] = 0;
    }
    moments.template add<1, 1, true>(c, 0, pixels, 0, n);
  }
}

// Lanes are pixels: the sum of the deviations of a row from centre, and of their squares.
template <class T> SK_INLINE void add_row(const T* y, Accumulate<T> centre, int64_t pixels, Accumulate<T>* total, Accumulate<T>* squares) {
  using A = Accumulate<T>;
  constexpr int64_t L = kLanes<A>;
  Vec<A> sums[4] = {}, sums_squares[4] = {};
  int64_t i = 0;
  for (; i + 4 * L <= pixels; i += 4 * L) {
    for (int j = 0; j < 4; ++j) {
      prefetch_ahead(y + i + j * L);
      const Vec<A> d = load(y + i + j * L) - centre;
      sums[j] += d;
      sums_squares[j] += d * d;
    }
  }
  for (; i < pixels; i += L) {
    const Vec<A> d = i + L <= pixels ? load(y + i) - centre : (load<T>(y + i, pixels - i) - centre) * mask<A>(pixels - i);
    sums[0] += d;
    sums_squares[0] += d * d;
  }
  *total = sum<A>((sums[0] + sums[1]) + (sums[2] + sums[3]));
  *squares = sum<A>((sums_squares[0] + sums_squares[1]) + (sums_squares[2] + sums_squares[3]));
}

template <class T>
SK_INLINE void row_moments(const T* y, int64_t pixels, Accumulate<T>* centre, Accumulate<T>* squares, Accumulate<T>* sum) {
  using A = Accumulate<T>;
  const int64_t few = pixels < 4 * kLanes<A> ? pixels : 4 * kLanes<A>;
  add_row(y, A(0), few, sum, squares);
  *centre = *sum / static_cast<A>(few);
  add_row(y, *centre, pixels, sum, squares);
  if (!cancels(*sum, *squares, pixels)) return;
  *centre += *sum / static_cast<A>(pixels);
  add_row(y, *centre, pixels, sum, squares);
}

// moments: (B, S, 2, M, C), of every segment its centre and the sum of the squares of the deviations from it; missed: (B, S,
// M, C), the sum of these deviations. A task is a segment where lanes are channels, one channel of a segment where they
// are pixels.
template <class T>
void branch_statistics_tasks(const Branches<T>& v, const Segments& segments, Accumulate<T>* moments, Accumulate<T>* missed, int64_t first,
                             int64_t last) {
  using A = Accumulate<T>;
  const int64_t channels = v.channels_last ? 1 : v.C;
  for (int64_t task = first; task < last; ++task) {
    const int64_t segment = task / channels, b = segment / segments.per_image;
    const int64_t start = segment % segments.per_image * segments.pixels;
    const int64_t pixels = v.HW - start < segments.pixels ? v.HW - start : segments.pixels;
    for (int64_t m = 0; m < v.M; ++m) {
      A *const centre = moments + (segment * 2 * v.M + m) * v.C, *const squares = centre + v.M * v.C;
      A* const sum = missed + (segment * v.M + m) * v.C;
      if (v.channels_last) {
        segment_moments(v.y[m] + (b * v.HW + start) * v.C, pixels, v.C, centre, squares, sum);
      } else {
        const int64_t c = task % channels;
        row_moments(v.y[m] + (b * v.C + c) * v.HW + start, pixels, centre + c, squares + c, sum + c);
      }
    }
  }
}

#else

#include "convolutions.h"

#define SK_KERNELS "branch.cpp"
#include "foreach_isa.h"

namespace sk {

template <class A>
void join_moments(const A* moments, const A* missed, const Segments& segments, int64_t B, int64_t HW, int64_t channels, A* mean, A* var) {
  const int64_t parts = B * segments.per_image;
  const double count = static_cast<double>(B) * HW;
  const auto pixels = [&](int64_t part) {
    return static_cast<double>(std::min(segments.pixels, HW - part % segments.per_image * segments.pixels));
  };
  // Of a part of n pixels: the mean, to more than A's precision.
  const auto mean_of = [&](int64_t part, double n, int64_t c) {
    return moments[part * 2 * channels + c] + missed[part * channels + c] / n;
  };
  at::parallel_for(0, channels, grain(4 * parts), [&](int64_t first, int64_t last) {
    std::vector<double> average(last - first), square(last - first);
    for (int64_t part = 0; part < parts; ++part) {
      const double n = pixels(part);
      for (int64_t c = first; c < last; ++c) average[c - first] += n / count * mean_of(part, n, c);
    }
    for (int64_t part = 0; part < parts; ++part) {
      const double n = pixels(part);
      for (int64_t c = first; c < last; ++c) {
        const double d = mean_of(part, n, c) - average[c - first], sum = missed[part * channels + c];
        square[c - first] += moments[(part * 2 + 1) * channels + c] - sum * (sum / n) + n * d * d;
      }
    }
    for (int64_t c = first; c < last; ++c) {
      mean[c] = static_cast<A>(average[c - first]);
      var[c] = static_cast<A>(square[c - first] / count);
    }
  });
}

template void join_moments<float>(const float*, const float*, const Segments&, int64_t, int64_t, int64_t, float*, float*);
template void join_moments<double>(const double*, const double*, const Segments&, int64_t, int64_t, int64_t, double*, double*);

std::tuple<Tensor, Tensor> branch_statistics_cpu(TensorList ys) {
  check_branches(ys);
  TORCH_CHECK_VALUE(ys[0].numel() > 0, "ys: expected at least one value per channel, got shape ", ys[0].sizes());
  const auto options = ys[0].options().dtype(accumulate_type(ys[0].scalar_type()));
  const int64_t M = ys.size(), C = ys[0].size(1);
  Tensor mean = at::empty({M, C}, options), var = at::empty({M, C}, options);
  dispatch(ys[0].scalar_type(), [&]<class T>() {
    using A = Accumulate<T>;
    const Branches<T> v(ys);
    // Only the deviations from a mean have to be precise here.
    const Segments segments(v.C, v.HW, v.channels_last, 512);
    Tensor moments = at::empty({v.B * segments.per_image, 2, M, C}, options), missed = at::empty({v.B * segments.per_image, M, C}, options);
    A *const out = moments.data_ptr<A>(), *const missed_out = missed.data_ptr<A>();
    const auto kernel = SK_PICK(branch_statistics_tasks<T>);
    const int64_t channels = v.channels_last ? 1 : C;
    at::parallel_for(0, v.B * segments.per_image * channels, grain(v.M * std::min(v.HW, segments.pixels) * C / channels),
                     [&](int64_t first, int64_t last) { kernel(v, segments, out, missed_out, first, last); });
    join_moments<A>(out, missed_out, segments, v.B, v.HW, M * C, mean.data_ptr<A>(), var.data_ptr<A>());
  });
  return {mean, var};
}

Convolutions check_convolutions(const Tensor& x, TensorList weights, int64_t stride, at::IntArrayRef dilations, int64_t groups) {
  TORCH_CHECK_VALUE(x.dim() == 4 && x.numel() > 0, "x: expected shape (B, C, H, W) without a 0, got ", x.sizes());
  TORCH_CHECK_VALUE(x.device().is_cpu(), "x: expected a CPU tensor, got one on ", x.device());
  TORCH_CHECK_TYPE(x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16 || x.scalar_type() == at::kHalf,
                   "x: expected float32, bfloat16 or float16, got ", x.scalar_type());
  TORCH_CHECK_VALUE(x.is_contiguous(layout(x)), "x: expected contiguous or channels_last, got strides ", x.strides());
  const int64_t M = weights.size(), C = x.size(1), H = x.size(2), W = x.size(3);
  TORCH_CHECK_VALUE(M >= 1 && M <= kMaxBranches, "weights: expected 1 to ", kMaxBranches, " branches, got ", M);
  TORCH_CHECK_VALUE(static_cast<int64_t>(dilations.size()) == M, "dilations: expected one for each of ", M, " branches, got ",
                    dilations.size());
  TORCH_CHECK_VALUE(stride == 1 || stride == 2, "stride: expected 1 or 2, got ", stride);
  TORCH_CHECK_VALUE(groups >= 1, "groups: expected at least 1, got ", groups);
  for (int64_t m = 0; m < M; ++m) {
    const Tensor& w = weights[m];
    TORCH_CHECK_VALUE(
        w.dim() == 4 && w.numel() > 0 && w.sizes() == weights[0].sizes() && w.size(0) % groups == 0 && w.size(2) == 3 && w.size(3) == 3,
        "weights: expected all of shape (a multiple of groups = ", groups, ", inputs, 3, 3) without a 0, got ", weights[0].sizes(), " and ",
        w.sizes());
    TORCH_CHECK_VALUE(w.device().is_cpu(), "weights: expected CPU tensors, got one on ", w.device());
    TORCH_CHECK_TYPE(w.scalar_type() == x.scalar_type(), "weights: expected ", x.scalar_type(), ", got ", w.scalar_type());
    TORCH_CHECK_VALUE(w.is_contiguous(layout(weights[0])), "weights: expected all in one layout, got strides ", weights[0].strides(),
                      " and ", w.strides());
    TORCH_CHECK_VALUE(dilations[m] >= 1 && dilations[m] <= kMaxDilation, "dilations: expected 1 to ", kMaxDilation, ", got ", dilations[m]);
  }
  const int64_t inputs = weights[0].size(1), outputs = weights[0].size(0) / groups;
  const bool split = C != inputs * groups, channels_last = !x.is_contiguous();
  TORCH_CHECK_VALUE(!split || C == inputs * groups * M, "x: expected ", inputs * groups, " channels, or ", inputs * groups * M,
                    " to be split, got ", C);
  const bool weights_channels_last = layout(weights[0]) == at::MemoryFormat::ChannelsLast;
  Convolutions s{.in = {C, H, W, channels_last},
                 .out = {outputs * groups, (H - 1) / stride + 1, (W - 1) / stride + 1, channels_last},
                 .B = x.size(0),
                 .M = M,
                 .groups = groups,
                 .inputs = inputs,
                 .outputs = outputs,
                 .stride = stride,
                 .halo = *std::max_element(dilations.begin(), dilations.end()),
                 .split = split,
                 .channel_step = weights_channels_last ? 1 : 9,
                 .tap_step = weights_channels_last ? inputs : 1,
                 .dilation = {}};
  std::copy(dilations.begin(), dilations.end(), s.dilation);
  TORCH_CHECK_VALUE(s.direct() || s.winograd(),
                    "weights: expected multiples of 16 channels a group, in and out, and stride 1, or 4, 8, 16 or 32, got ", inputs,
                    " in, ", outputs, " out, stride ", stride);
  return s;
}

std::tuple<std::vector<Tensor>, Tensor, Tensor> branch_cpu(const Tensor& x, TensorList weights, int64_t stride, at::IntArrayRef dilations,
                                                           int64_t groups, bool statistics) {
  const Convolutions s = check_convolutions(x, weights, stride, dilations, groups);
  std::vector<Tensor> ys;
  for (int64_t m = 0; m < s.M; ++m) ys.push_back(output_like(s, x));
  Tensor mean = at::empty({0}, at::kFloat), var = at::empty({0}, at::kFloat);
  if (s.direct()) {
    if (statistics) mean.resize_({s.M, s.out.C}), var.resize_({s.M, s.out.C});
    branch_direct(s, x, weights, ys, mean, var);
  } else {
    branch_winograd(s, x, weights, ys);
    if (statistics) std::tie(mean, var) = branch_statistics_cpu(ys);
  }
  return {ys, mean, var};
}

std::tuple<Tensor, std::vector<Tensor>> branch_backward_cpu(const Tensor& g, const Tensor& x, TensorList weights, int64_t stride,
                                                            at::IntArrayRef dilations, int64_t groups, TensorList ys, const Tensor& mean,
                                                            const Tensor& scale, const Tensor& bias, const Tensor& a, const Tensor& t,
                                                            const Tensor& p, const Tensor& q, c10::string_view activation,
                                                            double negative_slope, std::array<bool, 2> needs) {
  const Convolutions s = check_convolutions(x, weights, stride, dilations, groups);
  check_select_backward(g, ys, mean, scale, bias, a, t, p, q);
  const int64_t shape[] = {s.B, s.out.C, s.out.H, s.out.W};
  TORCH_CHECK_VALUE(ys.size() == weights.size() && ys[0].sizes() == at::IntArrayRef(shape), "ys: expected ", s.M, " branches of shape ",
                    at::IntArrayRef(shape), ", got ", ys.size(), " of ", ys[0].sizes());
  TORCH_CHECK_TYPE(ys[0].scalar_type() == x.scalar_type(), "ys: expected ", x.scalar_type(), ", got ", ys[0].scalar_type());
  TORCH_CHECK_VALUE(ys[0].is_contiguous(layout(x)), "ys: expected the layout of x, got strides ", ys[0].strides());
  Tensor dx = needs[0] ? at::empty_like(x, layout(x)) : at::empty({0}, x.options());
  std::vector<Tensor> dweights;
  if (needs[1])
    for (const auto& w : weights) dweights.push_back(at::empty_like(w, at::MemoryFormat::Contiguous));
  const auto backward = s.winograd() ? branch_winograd_backward : branch_direct_backward;
  backward(s, g, x, weights, ys, mean, scale, bias, a, t, p, q, activation, negative_slope, dx, dweights);
  return {dx, dweights};
}

}  // namespace sk

#endif
