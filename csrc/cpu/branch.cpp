// branch: the batch statistics of every branch's batch-norm.

#ifdef SK_ISA

// The sum over a segment gives its mean, a second look the sum of squared deviations from that mean: right also when
// |mean| >> std. The second look finds the segment in cache.

// Lanes are channels: adds y, or (y - mean)^2, of kN pixels to total (C).
template <class T, bool kSquares, int kN>
SK_INLINE void add_pixels(const T* y, const Accumulate<T>* mean, int64_t C, Accumulate<T>* total) {
  using A = Accumulate<T>;
  int64_t c = 0;
  for (; c + kLanes<A> <= C; c += kLanes<A>) {
    if constexpr (kN > 1 && !kSquares) prefetch_next_pixels<kN>(y + c, C, c);
    Vec<A> x = load(total + c);
    const Vec<A> centre = kSquares ? load(mean + c) : Vec<A>{};
    for (int j = 0; j < kN; ++j) {
      const Vec<A> d = load(y + j * C + c) - centre;
      x += kSquares ? d * d : d;
    }
    store(total + c, x);
  }
  for (; c < C; ++c)
    for (int j = 0; j < kN; ++j) {
      const A d = static_cast<A>(y[j * C + c]) - (kSquares ? mean[c] : A(0));
      total[c] += kSquares ? d * d : d;
    }
}

template <class T, bool kSquares>
SK_INLINE void add_segment(const T* y, const Accumulate<T>* mean, int64_t pixels, int64_t C, Accumulate<T>* total) {
  constexpr int64_t kN = kPixelsAtOnce;
  for (int64_t c = 0; c < C; ++c) total[c] = 0;
  int64_t pixel = 0;
  for (; pixel + kN <= pixels; pixel += kN) add_pixels<T, kSquares, kN>(y + pixel * C, mean, C, total);
  for (; pixel < pixels; ++pixel) add_pixels<T, kSquares, 1>(y + pixel * C, mean, C, total);
}

template <class A, bool kSquares> SK_INLINE void add_one(Vec<A>& total, Vec<A> d) { total += kSquares ? d * d : d; }

// Lanes are pixels: the sum of y, or of (y - mean)^2, over a row.
template <class T, bool kSquares> SK_INLINE Accumulate<T> sum_row(const T* y, Accumulate<T> mean, int64_t pixels) {
  using A = Accumulate<T>;
  constexpr int64_t L = kLanes<A>;
  Vec<A> total[4] = {};
  int64_t i = 0;
  for (; i + 4 * L <= pixels; i += 4 * L)
    for (int j = 0; j < 4; ++j) add_one<A, kSquares>(total[j], load(y + i + j * L) - mean);
  for (; i + L <= pixels; i += L) add_one<A, kSquares>(total[0], load(y + i) - mean);
  if (i < pixels) add_one<A, kSquares>(total[1], (load<T>(y + i, pixels - i) - mean) * mask<A>(pixels - i));
  return sum<A>((total[0] + total[1]) + (total[2] + total[3]));
}

// moments: (B, S, 2, M, C), the mean and the sum of squared deviations of every segment. A task is a segment where lanes
// are channels, one channel of a segment where they are pixels.
template <class T>
void branch_statistics_tasks(const Branches<T>& v, const Segments& segments, Accumulate<T>* moments, int64_t first, int64_t last) {
  using A = Accumulate<T>;
  const int64_t channels = v.channels_last ? 1 : v.C;
  for (int64_t task = first; task < last; ++task) {
    const int64_t segment = task / channels, b = segment / segments.per_image;
    const int64_t start = segment % segments.per_image * segments.pixels;
    const int64_t pixels = v.HW - start < segments.pixels ? v.HW - start : segments.pixels;
    for (int64_t m = 0; m < v.M; ++m) {
      A* const mean = moments + (segment * 2 * v.M + m) * v.C;
      A* const squares = mean + v.M * v.C;
      if (!v.channels_last) {
        const int64_t c = task % channels;
        const T* const row = v.y[m] + (b * v.C + c) * v.HW + start;
        mean[c] = sum_row<T, false>(row, 0, pixels) / static_cast<A>(pixels);
        squares[c] = sum_row<T, true>(row, mean[c], pixels);
        continue;
      }
      const T* const y = v.y[m] + (b * v.HW + start) * v.C;
      add_segment<T, false>(y, nullptr, pixels, v.C, mean);
      for (int64_t c = 0; c < v.C; ++c) mean[c] /= static_cast<A>(pixels);
      add_segment<T, true>(y, mean, pixels, v.C, squares);
    }
  }
}

#else

#include "common.h"
#include "operators.h"

#define SK_KERNELS "branch.cpp"
#include "foreach_isa.h"

namespace sk {

template <class A>
void join_moments(const A* moments, const Segments& segments, int64_t B, int64_t HW, int64_t channels, A* mean, A* var) {
  const int64_t parts = B * segments.per_image;
  const double count = static_cast<double>(B) * HW;
  std::vector<double> average(channels), square(channels);
  const auto pixels = [&](int64_t part) {
    return static_cast<double>(std::min(segments.pixels, HW - part % segments.per_image * segments.pixels));
  };
  for (int64_t part = 0; part < parts; ++part) {
    const A* const part_mean = moments + part * 2 * channels;
    const double share = pixels(part) / count;
    for (int64_t c = 0; c < channels; ++c) average[c] += share * part_mean[c];
  }
  for (int64_t part = 0; part < parts; ++part) {
    const A* const part_mean = moments + part * 2 * channels;
    const double n = pixels(part);
    for (int64_t c = 0; c < channels; ++c) {
      const double d = part_mean[c] - average[c];
      square[c] += part_mean[channels + c] + n * d * d;
    }
  }
  for (int64_t c = 0; c < channels; ++c) {
    mean[c] = static_cast<A>(average[c]);
    var[c] = static_cast<A>(square[c] / count);
  }
}

template void join_moments<float>(const float*, const Segments&, int64_t, int64_t, int64_t, float*, float*);
template void join_moments<double>(const double*, const Segments&, int64_t, int64_t, int64_t, double*, double*);

std::tuple<Tensor, Tensor> branch_statistics_cpu(TensorList ys) {
  check_branches(ys);
  TORCH_CHECK_VALUE(ys[0].numel() > 0, "ys: expected at least one value per channel, got shape ", ys[0].sizes());
  const auto options = ys[0].options().dtype(accumulate_type(ys[0].scalar_type()));
  const int64_t M = ys.size(), C = ys[0].size(1);
  Tensor mean = at::empty({M, C}, options), var = at::empty({M, C}, options);
  dispatch(ys[0].scalar_type(), [&]<class T>() {
    using A = Accumulate<T>;
    const Branches<T> v(ys);
    const Segments segments(v.C, v.HW, v.channels_last);
    Tensor moments = at::empty({v.B * segments.per_image, 2, M, C}, options);
    A* const out = moments.data_ptr<A>();
    const auto kernel = SK_PICK(branch_statistics_tasks<T>);
    const int64_t channels = v.channels_last ? 1 : C;
    at::parallel_for(0, v.B * segments.per_image * channels, grain(v.M * std::min(v.HW, segments.pixels) * C / channels),
                     [&](int64_t first, int64_t last) { kernel(v, segments, out, first, last); });
    join_moments<A>(out, segments, v.B, v.HW, M * C, mean.data_ptr<A>(), var.data_ptr<A>());
  });
  return {mean, var};
}

}  // namespace sk

#endif
