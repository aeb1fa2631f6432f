// branch: grouped 3 x 3 convolutions of 4, 8, 16 or 32 channels a group, where the library's are slow: the branches with
// their batch statistics, their backward, and the whole unit in eval.
//
// A task is an image's share of one cluster of channels: whole groups that fill whole vectors. It goes into a plane in L2
// cache, pixel by pixel, with channels as lanes; all branches are convolved from there, and the results go back into the
// layout of the image. So x is read once for all branches, and what comes before or after a convolution finds it in cache.

#ifdef SK_ISA

int64_t lanes() { return kLanes<float>; }

// The addresses of a plane's pixels, in the image's order.
struct Walk {
  float* at;
  int64_t column, width, step, skip;
  SK_INLINE Walk(const Plane& p)
      : at(p.row(0)), column(0), width(p.width), step(p.spread * p.cluster), skip((p.columns - p.width * p.spread) * p.cluster) {}
  SK_INLINE float* next() {
    float* const here = at;
    at += step;
    if (++column == width) {
      column = 0;
      at += skip;
    }
    return here;
  }
};

SK_INLINE Vec<float> load_some(const float* p, int64_t n) { return n < kLanes<float> ? load(p, n) : load(p); }

// At most L pixels of at most L channels, a vector each: from and to the channels at `image`, pixel p and on.
template <class T> SK_INLINE void load_pixels(const T* image, const Picture& s, int64_t p, int64_t pixels, int64_t channels, Vec<float> (&v)[kLanes<float>]) {
  constexpr int L = kLanes<float>;
  const T* const from = image + p * (s.channels_last ? s.C : 1);
  const int64_t step = s.channels_last ? s.C : s.pixels(), rows = s.channels_last ? pixels : channels, columns = s.channels_last ? channels : pixels;
  if (s.channels_last)
    for (int i = 0; i < L; ++i) __builtin_prefetch(from + (2 * L + i) * step);
  if (rows == L && columns == L)
    for (int i = 0; i < L; ++i) v[i] = load(from + i * step);
  else if (columns == L)
    for (int i = 0; i < L; ++i) v[i] = i < rows ? load(from + i * step) : Vec<float>{};
  else
    for (int i = 0; i < L; ++i) v[i] = i < rows ? load(from + i * step, columns) : Vec<float>{};
  if (!s.channels_last) transpose(v);
}

template <class T> SK_INLINE void store_pixels(T* image, const Picture& s, int64_t p, int64_t pixels, int64_t channels, Vec<float> (&v)[kLanes<float>]) {
  constexpr int L = kLanes<float>;
  T* const to = image + p * (s.channels_last ? s.C : 1);
  const int64_t step = s.channels_last ? s.C : s.pixels(), rows = s.channels_last ? pixels : channels, columns = s.channels_last ? channels : pixels;
  if (!s.channels_last) transpose(v);
  if (s.channels_last)
    for (int i = 0; i < L; ++i) __builtin_prefetch(to + (2 * L + i) * step, 1);
  if (rows == L && columns == L)
    for (int i = 0; i < L; ++i) store(to + i * step, v[i]);
  else if (columns == L)
    for (int i = 0; i < rows; ++i) store(to + i * step, v[i]);
  else
    for (int i = 0; i < rows; ++i) store(to + i * step, v[i], columns);
}

// The channels of `image` into a plane; the lanes of channels that it has not are 0.
template <class T> SK_INLINE void pack(const T* image, const Picture& s, int64_t channels, const Plane& to) {
  constexpr int64_t L = kLanes<float>;
  Walk start(to);
  for (int64_t p = 0; p < s.pixels(); p += L) {
    const int64_t pixels = s.pixels() - p < L ? s.pixels() - p : L;
    Walk walk = start;
    for (int64_t k = 0; k < to.cluster; k += L) {
      Vec<float> v[L];
      load_pixels(image + k * s.channel_step(), s, p, pixels, clamp<L>(channels - k), v);
      walk = start;
      for (int i = 0; i < pixels; ++i) store(walk.next() + k, v[i]);
    }
    start = walk;
  }
}

// A block, a plane without margins, back into `image`.
template <class T> SK_INLINE void unpack(const float* block, int64_t cluster, T* image, const Picture& s, int64_t channels) {
  constexpr int64_t L = kLanes<float>;
  for (int64_t p = 0; p < s.pixels(); p += L) {
    const int64_t pixels = s.pixels() - p < L ? s.pixels() - p : L;
    for (int64_t k = 0; k < channels; k += L) {
      Vec<float> v[L];
      for (int i = 0; i < L; ++i) v[i] = i < pixels ? load(block + (p + i) * cluster + k) : Vec<float>{};
      store_pixels(image + k * s.channel_step(), s, p, pixels, clamp<L>(channels - k), v);
    }
  }
}

// One row of a 3 x 3 convolution, for the L output channels whose weights these are. rows[ky] is where the input row of
// tap (ky, 0) of the first output pixel lies, null where it is outside the image. The sum starts from `bias`, or, if that
// is null, from what `out` has. A channel that is brought from memory serves up to three pixels, so kTile of them are
// summed at a time, in registers.
template <int kGroup, int kDilation, int kStride, int kTile>
void convolve_row(const float* const* rows, const Weights& weights, const float* bias, float* out, int64_t cluster, int64_t width) {
  constexpr int64_t L = kLanes<float>;
  constexpr int kInputs = (kTile - 1) * kStride + 2 * kDilation + 1;
  for (int64_t x = 0; x < width; x += kTile, out += kTile * cluster) {
    const int64_t pixels = width - x < kTile ? width - x : kTile;
    Vec<float> sum[kTile];
    for (int t = 0; t < kTile; ++t) sum[t] = bias ? load(bias) : t < pixels ? load(out + t * cluster) : Vec<float>{};
    for (int ky = 0; ky < 3; ++ky) {
      if (!rows[ky]) continue;
      const float* const row = rows[ky] + x * kStride * cluster;
      for (int i = 0; i < kGroup; ++i) {
        const float* const w = weights.data + (i * weights.channel_step + 3 * ky * weights.tap_step) * L;
        const Vec<float> w0 = load(w), w1 = load(w + weights.tap_step * L), w2 = load(w + 2 * weights.tap_step * L);
#pragma GCC unroll 64
        for (int q = 0; q < kInputs; ++q) {
          const int q1 = q - kDilation, q2 = q - 2 * kDilation;
          const bool first = q % kStride == 0 && q / kStride < kTile;
          const bool second = q1 >= 0 && q1 % kStride == 0 && q1 / kStride < kTile;
          const bool third = q2 >= 0 && q2 % kStride == 0 && q2 / kStride < kTile;
          if (!first && !second && !third) continue;
          const Vec<float> value = broadcast_in_group<kGroup>(row + q * cluster, i);
          if (first) sum[q / kStride] += value * w0;
          if (second) sum[q1 / kStride] += value * w1;
          if (third) sum[q2 / kStride] += value * w2;
        }
      }
    }
    for (int t = 0; t < kTile; ++t)
      if (t < pixels) store(out + t * cluster, sum[t]);
  }
}

// Adds to out [kGroup][9][L] what a plane of gradients, and the block that was convolved, give for the weights: the sum
// over the pixels of each product of an input channel and a gradient. The rows are summed in parts of some hundred pixels.
template <int kGroup>
void weight_gradient(const Plane& x, const Plane& dy, int64_t dilation, int64_t stride, float* out) {
  constexpr int64_t L = kLanes<float>;
  constexpr int kChannels = L == 16 && kGroup >= 8 ? 8 : 4;
  const int64_t rows_at_once = 1 + 512 / x.width;
  for (int64_t top = 0; top < dy.height; top += rows_at_once) {
    const int64_t bottom = top + rows_at_once < dy.height ? top + rows_at_once : dy.height;
    for (int ky = 0; ky < 3; ++ky)
      for (int first = 0; first < kGroup; first += kChannels) {
        Vec<float> sum[kChannels][3] = {};
        for (int64_t row = top; row < bottom; ++row) {
          const int64_t source = row * stride + (ky - 1) * dilation;
          if (source < 0 || source >= x.height) continue;
          const float *value = x.row(source), *g = dy.row(row);
          for (int64_t c = 0; c < x.width; ++c, value += x.cluster, g += dy.cluster) {
            const Vec<float> g0 = load(g + dilation * dy.cluster), g1 = load(g), g2 = load(g - dilation * dy.cluster);
#pragma GCC unroll 8
            for (int i = 0; i < kChannels; ++i) {
              const Vec<float> broadcast = broadcast_in_group<kGroup>(value, first + i);
              sum[i][0] += broadcast * g0;
              sum[i][1] += broadcast * g1;
              sum[i][2] += broadcast * g2;
            }
          }
        }
        for (int i = 0; i < kChannels; ++i)
          for (int kx = 0; kx < 3; ++kx) {
            float* const to = out + ((first + i) * 9 + ky * 3 + kx) * L;
            store(to, load(to) + sum[i][kx]);
          }
      }
  }
}

using ConvolveRow = void (*)(const float* const*, const Weights&, const float*, float*, int64_t, int64_t);
using WeightGradient = void (*)(const Plane&, const Plane&, int64_t, int64_t, float*);

template <int kGroup, int kDilation> SK_INLINE ConvolveRow pick_convolve_row(int64_t stride, int64_t tile) {
  if (stride == 1) return tile == 7 ? convolve_row<kGroup, kDilation, 1, 7> : convolve_row<kGroup, kDilation, 1, 8>;
  return tile == 7 ? convolve_row<kGroup, kDilation, 2, 7> : convolve_row<kGroup, kDilation, 2, 8>;
}

template <int kGroup> SK_INLINE ConvolveRow pick_convolve_row(int64_t dilation, int64_t stride, int64_t tile) {
  if (dilation == 1) return pick_convolve_row<kGroup, 1>(stride, tile);
  return dilation == 2 ? pick_convolve_row<kGroup, 2>(stride, tile) : pick_convolve_row<kGroup, 3>(stride, tile);
}

ConvolveRow pick_convolve_row(int64_t group, int64_t dilation, int64_t stride, int64_t tile) {
  switch (group) {
    case 4: return pick_convolve_row<4>(dilation, stride, tile);
    case 8: return pick_convolve_row<8>(dilation, stride, tile);
    case 16: return pick_convolve_row<16>(dilation, stride, tile);
    default: return pick_convolve_row<32>(dilation, stride, tile);
  }
}

WeightGradient pick_weight_gradient(int64_t group) {
  switch (group) {
    case 4: return weight_gradient<4>;
    case 8: return weight_gradient<8>;
    case 16: return weight_gradient<16>;
    default: return weight_gradient<32>;
  }
}

// All channels' weights (C, group * 9), a row a channel, as vectors of L channels, scaled: out [C / L][group * 9][L].
template <class T> void pack_weights(const T* weights, int64_t C, int64_t row, const float* scale, float* out) {
  constexpr int64_t L = kLanes<float>;
  const Picture matrix{C, 1, row, false};
  for (int64_t c = 0; c < C; c += L, out += row * L) {
    const Plane block{out, row, 0, 1, 1, row, L};
    pack(weights + c * row, matrix, clamp<L>(C - c), block);
    if (!scale) continue;
    const Vec<float> factor = load_some(scale + c, clamp<L>(C - c));
    for (int64_t i = 0; i < row; ++i) store(out + i * L, load(out + i * L) * factor);
  }
}

// One branch of a task, row by row, into a block, and what is to happen to each row while it is in L1 cache.
template <class EachRow>
SK_INLINE void convolve(const Grouped& s, int64_t m, const Plane& x, const float* weights, const float* bias, float* block, const EachRow& each_row) {
  constexpr int64_t L = kLanes<float>;
  const int64_t d = s.dilation[m];
  const ConvolveRow row = pick_convolve_row(s.group, d, s.stride, s.tile(s.out.W));
  for (int64_t k = 0; k < x.cluster; k += L) {
    const Weights w{weights + k * s.row(), s.channel_step, s.tap_step};
    for (int64_t r = 0; r < s.out.H; ++r) {
      const float* rows[3];
      for (int ky = 0; ky < 3; ++ky) {
        const int64_t source = r * s.stride + (ky - 1) * d;
        rows[ky] = source < 0 || source >= s.in.H ? nullptr : x.row(source) - d * x.cluster;
      }
      float* const out = block + r * s.out.W * x.cluster + k;
      row(rows, w, bias + k, out, x.cluster, s.out.W);
      each_row.add(out, x.cluster, s.out.W, k, r * s.out.W);
    }
  }
}

// Mean and sum of squared deviations of each channel, joined row by row (Chan, Golub, LeVeque 1979, formula 2.1).
struct RowMoments {
  float *mean, *squares;
  SK_INLINE void add(const float* row, int64_t cluster, int64_t width, int64_t k, int64_t before) const {
    Vec<float> total = {}, deviations = {};
    for (int64_t i = 0; i < width; ++i) total += load(row + i * cluster);
    const Vec<float> average = total / static_cast<float>(width);
    for (int64_t i = 0; i < width; ++i) {
      const Vec<float> d = load(row + i * cluster) - average;
      deviations += d * d;
    }
    if (before == 0) {
      store(mean + k, average);
      store(squares + k, deviations);
      return;
    }
    const float share = static_cast<float>(width) / static_cast<float>(before + width);
    const Vec<float> old = load(mean + k), difference = average - old;
    store(mean + k, old + difference * share);
    store(squares + k, load(squares + k) + deviations + difference * difference * (share * static_cast<float>(before)));
  }
};

// Adds the row's activations to `sum`.
template <Activation kAct> struct RowSum {
  float* sum;
  Act<float, kAct> act;
  SK_INLINE void add(const float* row, int64_t cluster, int64_t width, int64_t k, int64_t) const {
    Vec<float> total = {};
    for (int64_t i = 0; i < width; ++i) total += act(load(row + i * cluster));
    store(sum + k, load(sum + k) + total);
  }
};

// Tasks are (b, cluster). moments is (B, 2, M, clusters * cluster).
template <class T>
void branch_tasks(const Grouped& s, const T* x, const float* weights, T* const* ys, float* scratch, float* moments, int64_t first, int64_t last) {
  const Plane plane = s.input_plane(scratch);
  float* const block = scratch + plane.size();
  const float zero[kMaxCluster] = {};
  for (int64_t task = first; task < last; ++task) {
    const int64_t b = task / s.clusters(), c = task % s.clusters() * s.cluster, channels = s.in.C - c < s.cluster ? s.in.C - c : s.cluster;
    pack(x + s.in.offset(b, c), s.in, channels, plane);
    for (int64_t m = 0; m < s.M; ++m) {
      float* const mean = moments + (b * 2 * s.M + m) * s.channels() + c;
      convolve(s, m, plane, weights + (m * s.channels() + c) * s.row(), zero, block, RowMoments{mean, mean + s.M * s.channels()});
      unpack(block, s.cluster, ys[m] + s.out.offset(b, c), s.out, channels);
    }
  }
}

// Eval: z (B, clusters, M, pixels, cluster) of all branches, and the pooled sums (B, clusters * cluster) of their activations.
template <class T, Activation kAct>
void unit_branch_tasks(const Grouped& s, float slope, const T* x, const float* weights, const float* bias, float* scratch, float* z, float* pooled, int64_t first, int64_t last) {
  const Plane plane = s.input_plane(scratch);
  for (int64_t task = first; task < last; ++task) {
    const int64_t b = task / s.clusters(), c = task % s.clusters() * s.cluster, channels = s.in.C - c < s.cluster ? s.in.C - c : s.cluster;
    pack(x + s.in.offset(b, c), s.in, channels, plane);
    float* const sum = pooled + b * s.channels() + c;
    for (int64_t k = 0; k < s.cluster; ++k) sum[k] = 0;
    for (int64_t m = 0; m < s.M; ++m)
      convolve(s, m, plane, weights + (m * s.channels() + c) * s.row(), bias + m * s.channels() + c,
               z + (task * s.M + m) * s.out.pixels() * s.cluster, RowSum<kAct>{sum, {slope}});
  }
}

template <class T, Activation kAct>
void unit_select_tasks(const Grouped& s, float slope, const float* z, const float* a, T* v, int64_t first, int64_t last) {
  constexpr int64_t L = kLanes<float>;
  const Act<float, kAct> act{slope};
  for (int64_t task = first; task < last; ++task) {
    const int64_t b = task / s.clusters(), c = task % s.clusters() * s.cluster;
    const float* const task_z = z + task * s.M * s.out.pixels() * s.cluster;
    T* const image = v + s.out.offset(b, c);
    for (int64_t k = 0; k < s.cluster && c + k < s.in.C; k += L) {
      const int64_t lanes = clamp<L>(s.in.C - c - k);
      for (int64_t p = 0; p < s.out.pixels(); p += L) {
        const int64_t pixels = clamp<L>(s.out.pixels() - p);
        Vec<float> total[L] = {};
        for (int64_t m = 0; m < s.M; ++m) {
          const Vec<float> weight = load_some(a + (b * s.M + m) * s.in.C + c + k, lanes);
          const float* const from = task_z + (m * s.out.pixels() + p) * s.cluster + k;
          for (int i = 0; i < L; ++i)
            if (i < pixels) total[i] += weight * act(load(from + i * s.cluster));
        }
        store_pixels(image + k * s.out.channel_step(), s.out, p, pixels, lanes, total);
      }
    }
  }
}

// The gradients of all branches' convolutions, into a plane each: what select_backward gives, where it is used at once.
template <class T, Activation kAct>
SK_INLINE void gradient_planes(const Grouped& s, const Gradient<T>& d, int64_t b, int64_t c, const Plane* planes) {
  constexpr int64_t L = kLanes<float>;
  const Branches<T>& v = d.branches;
  const Act<float, kAct> act{v.slope};
  const int64_t offset = s.out.offset(b, c);
  for (int64_t m = 0; m < s.M; ++m)
    for (int64_t k = 0; k < s.cluster; k += L) {
      const int64_t lanes = clamp<L>(s.in.C - c - k);
      const int64_t at = m * s.in.C + c + k;
      const Vec<float> mean = load_some(v.mean + at, lanes), scale = load_some(v.scale + at, lanes), bias = load_some(v.bias + at, lanes);
      const Vec<float> p = load_some(d.p + at, lanes), q = load_some(d.q + at, lanes);
      const Vec<float> a = load_some(d.a + b * s.M * s.in.C + at, lanes), t = load_some(d.t + b * s.in.C + c + k, lanes);
      Walk walk(planes[m]);
      const int64_t from = offset + k * s.out.channel_step();
      for (int64_t pixel = 0; pixel < s.out.pixels(); pixel += L) {
        const int64_t pixels = clamp<L>(s.out.pixels() - pixel);
        Vec<float> y[L], g[L];
        load_pixels(v.y[m] + from, s.out, pixel, pixels, lanes, y);
        load_pixels(d.g + from, s.out, pixel, pixels, lanes, g);
        for (int i = 0; i < pixels; ++i) {
          const Vec<float> centred = y[i] - mean;
          const Vec<float> dz = act.gate(centred * scale + bias, a * g[i] + t);
          store(walk.next() + k, scale * dz - p - centred * q);
        }
      }
    }
}

// dx of a task, from the gradients' planes and the weights turned round: a block.
void input_gradient(const Grouped& s, const Plane* dy, const float* turned, int64_t c, float* block) {
  constexpr int64_t L = kLanes<float>;
  const float zero[kMaxCluster] = {};
  for (int64_t m = 0; m < s.M; ++m) {
    const int64_t d = s.dilation[m];
    const ConvolveRow row = pick_convolve_row(s.group, d, 1, s.tile(s.in.W));
    for (int64_t k = 0; k < s.cluster; k += L) {
      const Weights w{turned + (m * s.channels() + c + k) * s.row(), 9, 1};
      for (int64_t r = 0; r < s.in.H; ++r) {
        const float* rows[3];
        for (int ky = 0; ky < 3; ++ky) {
          const int64_t source = r + (ky - 1) * d;
          const bool inside = source >= 0 && source % s.stride == 0 && source / s.stride < s.out.H;
          rows[ky] = inside ? dy[m].row(source / s.stride) - d * s.cluster : nullptr;
        }
        row(rows, w, m == 0 ? zero : nullptr, block + r * s.in.W * s.cluster + k, s.cluster, s.in.W);
      }
    }
  }
}

// Tasks are (part of the batch, cluster). dweights is (parts, M, clusters * cluster / L, group * 9, L).
template <class T, Activation kAct>
void branch_backward_tasks(const Grouped& s, const Gradient<T>& d, const T* x, const float* turned, int64_t parts, float* scratch, T* dx,
                           float* dweights, int64_t first, int64_t last) {
  constexpr int64_t L = kLanes<float>;
  Plane planes[kMaxBranches];
  for (int64_t m = 0; m < s.M; ++m) planes[m] = s.gradient_plane(scratch + m * s.gradient_plane(nullptr).size());
  float* const block = scratch + s.M * planes[0].size();
  const Plane inputs{block, s.in.W, 0, 1, s.in.H, s.in.W, s.cluster};
  const WeightGradient gradient = pick_weight_gradient(s.group);
  for (int64_t task = first; task < last; ++task) {
    const int64_t part = task / s.clusters(), c = task % s.clusters() * s.cluster, channels = s.in.C - c < s.cluster ? s.in.C - c : s.cluster;
    for (int64_t m = 0; m < s.M; ++m)
      std::memset(dweights + ((part * s.M + m) * s.channels() + c) * s.row(), 0, s.cluster * s.row() * sizeof(float));
    for (int64_t b = part * s.B / parts; b < (part + 1) * s.B / parts; ++b) {
      gradient_planes<T, kAct>(s, d, b, c, planes);
      pack(x + s.in.offset(b, c), s.in, channels, inputs);
      for (int64_t m = 0; m < s.M; ++m)
        for (int64_t k = 0; k < s.cluster; k += L) {
          Plane dy = planes[m];
          dy.data += k;
          gradient(inputs, dy, s.dilation[m], s.stride, dweights + ((part * s.M + m) * s.channels() + c + k) * s.row());
        }
      input_gradient(s, planes, turned, c, block);
      unpack(block, s.cluster, dx + s.in.offset(b, c), s.in, channels);
    }
  }
}

// The dweights (C, group * 9) of branch m, the cluster from channel `start` on: the sum of their parts.
template <class T>
void sum_weight_gradients(const Grouped& s, const float* dweights, int64_t m, int64_t parts, int64_t start, float* scratch, T* out) {
  constexpr int64_t L = kLanes<float>;
  const int64_t row = s.row();
  const Picture matrix{s.in.C, 1, row, false};
  for (int64_t c = start; c < start + s.cluster && c < s.in.C; c += L) {
    for (int64_t i = 0; i < row * L; ++i) {
      float total = 0;
      for (int64_t part = 0; part < parts; ++part) total += dweights[((part * s.M + m) * s.channels() + c) * row + i];
      scratch[i] = total;
    }
    unpack(scratch, L, out + c * row, matrix, clamp<L>(s.in.C - c));
  }
}

#else

#include "common.h"
#include "operators.h"

namespace sk {

constexpr int64_t kMaxCluster = 32, kMaxBranches = 8, kMaxDilation = 3;

template <int64_t kMost> inline int64_t clamp(int64_t n) { return n < 0 ? 0 : n < kMost ? n : kMost; }

// One image of a tensor (B, C, H, W).
struct Picture {
  int64_t C, H, W;
  bool channels_last;
  int64_t pixels() const { return H * W; }
  int64_t channel_step() const { return channels_last ? 1 : pixels(); }
  int64_t offset(int64_t b, int64_t c) const { return b * C * pixels() + c * channel_step(); }
};

// A cluster's share of an image: pixel (r, c) has its channels at row(r) + c * spread * cluster. What lies between the
// pixels, and beside them, is 0.
struct Plane {
  float* data;
  int64_t columns, left, spread, height, width, cluster;
  float* row(int64_t r) const { return data + (r * columns + left) * cluster; }
  int64_t size() const { return height * columns * cluster; }
};

// Input channel i, tap k of L output channels: data[(i * channel_step + k * tap_step) * L].
struct Weights {
  const float* data;
  int64_t channel_step, tap_step;
};

// The operands of select_backward.
template <class T> struct Gradient {
  const Branches<T>& branches;
  const T* g;
  const float *a, *t, *p, *q;
};

// M convolutions of one input, and how they are cut into tasks.
struct Grouped {
  Picture in, out;
  int64_t B, M, group, stride, cluster, halo, channel_step, tap_step;
  int64_t dilation[kMaxBranches];

  int64_t clusters() const { return (in.C + cluster - 1) / cluster; }
  int64_t channels() const { return clusters() * cluster; }
  int64_t row() const { return group * 9; }

  // How many pixels of a row are summed at a time: 7 or 8, whichever wastes less of the row's last tile.
  static int64_t tile(int64_t width) { return whole_tiles(width, 7) < whole_tiles(width, 8) ? 7 : 8; }
  static int64_t whole_tiles(int64_t width, int64_t tile) { return (width + tile - 1) / tile * tile; }

  // What the branches are convolved from, and their gradients: with margins that the taps may reach into, and the last
  // tile too. A gradient's pixels lie where the convolution's stride had put them.
  Plane input_plane(float* data) const {
    const int64_t reach = (whole_tiles(out.W, tile(out.W)) - 1) * stride + 1;
    return {data, 2 * halo + std::max(in.W, reach), halo, 1, in.H, in.W, cluster};
  }
  Plane gradient_plane(float* data) const {
    return {data, 2 * halo + whole_tiles(in.W, tile(in.W)), halo, stride, out.H, out.W, cluster};
  }
};

}  // namespace sk

#define SK_KERNELS "branch_grouped.cpp"
#include "foreach_isa.h"

namespace sk {

static Grouped check_grouped(const Tensor& x, TensorList weights, int64_t stride, at::IntArrayRef dilations) {
  TORCH_CHECK_VALUE(x.dim() == 4 && x.numel() > 0, "x: expected shape (B, C, H, W) without a 0, got ", x.sizes());
  TORCH_CHECK_VALUE(x.device().is_cpu(), "x: expected a CPU tensor, got one on ", x.device());
  TORCH_CHECK_TYPE(x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16 || x.scalar_type() == at::kHalf,
                   "x: expected float32, bfloat16 or float16, got ", x.scalar_type());
  TORCH_CHECK_VALUE(x.is_contiguous(layout(x)), "x: expected contiguous or channels_last, got strides ", x.strides());
  TORCH_CHECK_VALUE(!weights.empty() && weights.size() <= kMaxBranches, "weights: expected 1 to ", kMaxBranches, " branches, got ", weights.size());
  TORCH_CHECK_VALUE(dilations.size() == weights.size(), "dilations: expected one for each of ", weights.size(), " branches, got ", dilations.size());
  TORCH_CHECK_VALUE(stride == 1 || stride == 2, "stride: expected 1 or 2, got ", stride);
  TORCH_CHECK_VALUE(weights[0].dim() == 4, "weights: expected shape (C, group, 3, 3), got ", weights[0].sizes());
  const int64_t C = x.size(1), H = x.size(2), W = x.size(3), group = weights[0].size(1);
  TORCH_CHECK_VALUE(group == 4 || group == 8 || group == 16 || group == 32, "weights: expected 4, 8, 16 or 32 channels a group, got ", group);
  TORCH_CHECK_VALUE(C % group == 0, "x: expected a multiple of ", group, " channels, got ", C);
  const bool channels_last = !x.is_contiguous(), weights_channels_last = layout(weights[0]) == at::MemoryFormat::ChannelsLast;
  Grouped s{.in = {C, H, W, channels_last},
            .out = {C, (H - 1) / stride + 1, (W - 1) / stride + 1, channels_last},
            .B = x.size(0),
            .M = static_cast<int64_t>(weights.size()),
            .group = group,
            .stride = stride,
            .cluster = std::max(group, SK_PICK(lanes)()),
            .halo = *std::max_element(dilations.begin(), dilations.end()),
            .channel_step = weights_channels_last ? 1 : 9,
            .tap_step = weights_channels_last ? group : 1,
            .dilation = {}};
  for (int64_t m = 0; m < s.M; ++m) {
    const Tensor& w = weights[m];
    TORCH_CHECK_VALUE(w.sizes() == at::IntArrayRef({C, group, 3, 3}), "weights: expected shape ", at::IntArrayRef({C, group, 3, 3}), ", got ", w.sizes());
    TORCH_CHECK_VALUE(w.device().is_cpu(), "weights: expected CPU tensors, got one on ", w.device());
    TORCH_CHECK_TYPE(w.scalar_type() == x.scalar_type(), "weights: expected ", x.scalar_type(), ", got ", w.scalar_type());
    TORCH_CHECK_VALUE(w.is_contiguous(layout(weights[0])), "weights: expected all in one layout, got strides ", weights[0].strides(), " and ", w.strides());
    TORCH_CHECK_VALUE(dilations[m] >= 1 && dilations[m] <= kMaxDilation, "dilations: expected 1 to ", kMaxDilation, ", got ", dilations[m]);
    s.dilation[m] = dilations[m];
  }
  return s;
}

template <class F> static void dispatch_grouped(at::ScalarType dtype, const F& f) {
  dispatch(dtype, [&]<class T>() {
    if constexpr (!std::is_same_v<T, double>) f.template operator()<T>();
  });
}

template <class F> static void dispatch_grouped(at::ScalarType dtype, c10::string_view activation, const F& f) {
  dispatch(dtype, activation, [&]<class T, Activation kAct>() {
    if constexpr (!std::is_same_v<T, double>) f.template operator()<T, kAct>();
  });
}

// f(scratch, first, last) on parts of the tasks, each with zeroed scratch of its own.
template <class F> static void parallel_tasks(int64_t tasks, int64_t scratch_size, const F& f) {
  at::parallel_for(0, tasks, 1, [&](int64_t first, int64_t last) {
    const Tensor scratch = at::zeros({scratch_size}, at::kFloat);
    f(scratch.data_ptr<float>(), first, last);
  });
}

// (M, C / L, group * 9, L), each channel times its scale.
template <class T> static Tensor pack_weights(const Grouped& s, TensorList weights, const float* scale) {
  Tensor packed = at::zeros({s.M, s.channels() * s.row()}, at::kFloat);
  float* const out = packed.data_ptr<float>();
  const auto kernel = SK_PICK(pack_weights<T>);
  at::parallel_for(0, s.M * s.clusters(), 4, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t m = i / s.clusters(), c = i % s.clusters() * s.cluster;
      kernel(weights[m].const_data_ptr<T>() + c * s.row(), std::min(s.cluster, s.in.C - c), s.row(), scale ? scale + m * s.in.C + c : nullptr,
             out + (m * s.channels() + c) * s.row());
    }
  });
  return packed;
}

// The same for the way back: input and output channels change places, and the taps are turned round.
template <class T> static Tensor turn_weights(const Grouped& s, TensorList weights, int64_t lanes) {
  Tensor turned = at::zeros({s.M, s.channels() * s.row()}, at::kFloat);
  float* const out = turned.data_ptr<float>();
  at::parallel_for(0, s.M * s.in.C, 32, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t m = i / s.in.C, c = i % s.in.C, in_group = c % s.group;
      const T* const from = weights[m].const_data_ptr<T>() + (c - in_group) * s.row() + in_group * s.channel_step;
      float* const to = out + (m * s.channels() + c / lanes * lanes) * s.row() + c % lanes;
      for (int64_t o = 0; o < s.group; ++o)
        for (int64_t k = 0; k < 9; ++k) to[(o * 9 + 8 - k) * lanes] = static_cast<float>(from[o * s.row() + k * s.tap_step]);
    }
  });
  return turned;
}

std::tuple<std::vector<Tensor>, Tensor, Tensor> branch_cpu(const Tensor& x, TensorList weights, int64_t stride, at::IntArrayRef dilations) {
  const Grouped s = check_grouped(x, weights, stride, dilations);
  std::vector<Tensor> ys;
  for (int64_t m = 0; m < s.M; ++m) ys.push_back(at::empty({s.B, s.in.C, s.out.H, s.out.W}, x.options().memory_format(layout(x))));
  Tensor moments = at::empty({s.B, 2, s.M, s.channels()}, at::kFloat);
  dispatch_grouped(x.scalar_type(), [&]<class T>() {
    const Tensor packed = pack_weights<T>(s, weights, nullptr);
    c10::SmallVector<T*, 4> out;
    for (const auto& y : ys) out.push_back(y.data_ptr<T>());
    const auto kernel = SK_PICK(branch_tasks<T>);
    parallel_tasks(s.B * s.clusters(), s.input_plane(nullptr).size() + s.out.pixels() * s.cluster, [&](float* scratch, int64_t first, int64_t last) {
      kernel(s, x.const_data_ptr<T>(), packed.const_data_ptr<float>(), out.data(), scratch, moments.data_ptr<float>(), first, last);
    });
  });
  Tensor mean = at::empty({s.M, s.channels()}, at::kFloat), var = at::empty({s.M, s.channels()}, at::kFloat);
  join_moments(moments.const_data_ptr<float>(), Segments(s.out.pixels()), s.B, s.out.pixels(), s.M * s.channels(), mean.data_ptr<float>(), var.data_ptr<float>());
  return {ys, mean.narrow(1, 0, s.in.C).contiguous(), var.narrow(1, 0, s.in.C).contiguous()};
}

std::tuple<Tensor, std::vector<Tensor>> branch_backward_cpu(const Tensor& g, const Tensor& x, TensorList weights, int64_t stride,
                                                            at::IntArrayRef dilations, TensorList ys, const Tensor& mean,
                                                            const Tensor& scale, const Tensor& bias, const Tensor& a, const Tensor& t,
                                                            const Tensor& p, const Tensor& q, c10::string_view activation,
                                                            double negative_slope) {
  const Grouped s = check_grouped(x, weights, stride, dilations);
  check_select_backward(g, ys, mean, scale, bias, a, t, p, q);
  const int64_t shape[] = {s.B, s.in.C, s.out.H, s.out.W};
  TORCH_CHECK_VALUE(ys.size() == weights.size() && ys[0].sizes() == at::IntArrayRef(shape), "ys: expected ", s.M, " branches of shape ",
                    at::IntArrayRef(shape), ", got ", ys.size(), " of ", ys[0].sizes());
  TORCH_CHECK_TYPE(ys[0].scalar_type() == x.scalar_type(), "ys: expected ", x.scalar_type(), ", got ", ys[0].scalar_type());
  TORCH_CHECK_VALUE(ys[0].is_contiguous(layout(x)), "ys: expected the layout of x, got strides ", ys[0].strides());
  // Parts of the batch are summed apart, where there are too few clusters for many threads.
  const int64_t parts = std::clamp<int64_t>((64 + s.clusters() - 1) / s.clusters(), 1, s.B);
  Tensor dx = at::empty_like(x, layout(x));
  std::vector<Tensor> dweights;
  for (const auto& w : weights) dweights.push_back(at::empty_like(w, at::MemoryFormat::Contiguous));
  Tensor partial = at::empty({parts, s.M, s.channels() * s.row()}, at::kFloat);
  dispatch_grouped(x.scalar_type(), activation, [&]<class T, Activation kAct>() {
    const Branches<T> branches(ys, mean, scale, bias, negative_slope);
    const Gradient<T> gradient{branches, g.const_data_ptr<T>(), a.const_data_ptr<float>(), t.const_data_ptr<float>(), p.const_data_ptr<float>(), q.const_data_ptr<float>()};
    const Tensor turned = turn_weights<T>(s, weights, SK_PICK(lanes)());
    const auto kernel = SK_PICK(branch_backward_tasks<T, kAct>);
    parallel_tasks(parts * s.clusters(), s.M * s.gradient_plane(nullptr).size() + s.in.pixels() * s.cluster, [&](float* scratch, int64_t first, int64_t last) {
      kernel(s, gradient, x.const_data_ptr<T>(), turned.const_data_ptr<float>(), parts, scratch, dx.data_ptr<T>(), partial.data_ptr<float>(), first, last);
    });
    const auto sum = SK_PICK(sum_weight_gradients<T>);
    parallel_tasks(s.M * s.clusters(), s.cluster * s.row(), [&](float* scratch, int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const int64_t m = i / s.clusters();
        sum(s, partial.const_data_ptr<float>(), m, parts, i % s.clusters() * s.cluster, scratch, dweights[m].data_ptr<T>());
      }
    });
  });
  return {dx, dweights};
}

// Of the images in flight, for each thread: what its share of the last-level cache holds on today's servers.
constexpr int64_t kCacheBytes = 2 << 20;

Tensor unit_cpu(const Tensor& x, TensorList weights, int64_t stride, at::IntArrayRef dilations, const Tensor& mean, const Tensor& scale,
                const Tensor& bias, const Tensor& fc_reduce, const Tensor& attn_weight, const Tensor& attn_bias, const Tensor& attn_mean,
                const Tensor& attn_var, double attn_eps, const Tensor& fc_select, c10::string_view activation, double negative_slope) {
  const Grouped s = check_grouped(x, weights, stride, dilations);
  for (const auto& [name, array] : {std::pair<const char*, const Tensor&>{"mean", mean}, {"scale", scale}, {"bias", bias}})
    check_array(array, name, at::kFloat, {s.M, s.in.C});
  const Tensor shift = at::zeros({s.M, s.channels()}, at::kFloat);
  for (int64_t m = 0; m < s.M; ++m)
    for (int64_t c = 0; c < s.in.C; ++c) {
      const int64_t i = m * s.in.C + c;
      shift.data_ptr<float>()[m * s.channels() + c] = bias.const_data_ptr<float>()[i] - mean.const_data_ptr<float>()[i] * scale.const_data_ptr<float>()[i];
    }
  Tensor v = at::empty({s.B, s.in.C, s.out.H, s.out.W}, x.options().memory_format(layout(x)));
  const int64_t image = s.M * s.channels() * s.out.pixels();
  const int64_t images = std::clamp<int64_t>(at::get_num_threads() * kCacheBytes / (image * 4), 1, s.B);
  const Tensor z = at::empty({images * image}, at::kFloat), pooled = at::empty({images, s.channels()}, at::kFloat);
  dispatch_grouped(x.scalar_type(), activation, [&]<class T, Activation kAct>() {
    const Tensor packed = pack_weights<T>(s, weights, scale.const_data_ptr<float>());
    const float slope = static_cast<float>(negative_slope);
    const auto branch_kernel = SK_PICK(unit_branch_tasks<T, kAct>);
    const auto select_kernel = SK_PICK(unit_select_tasks<T, kAct>);
    for (int64_t first_image = 0; first_image < s.B; first_image += images) {
      const int64_t count = std::min(images, s.B - first_image);
      parallel_tasks(count * s.clusters(), s.input_plane(nullptr).size(), [&](float* scratch, int64_t first, int64_t last) {
        branch_kernel(s, slope, x.const_data_ptr<T>() + s.in.offset(first_image, 0), packed.const_data_ptr<float>(), shift.const_data_ptr<float>(), scratch,
                      z.data_ptr<float>(), pooled.data_ptr<float>(), first, last);
      });
      const Tensor descriptor = pooled.narrow(0, 0, count).narrow(1, 0, s.in.C) / static_cast<double>(s.out.pixels());
      const Tensor a = std::get<0>(attend_cpu(descriptor.contiguous(), fc_reduce, attn_weight, attn_bias, attn_mean, attn_var, attn_eps, fc_select));
      TORCH_CHECK_VALUE(a.size(1) == s.M, "fc_select: expected ", s.M, " * ", s.in.C, " rows, got ", fc_select.size(0));
      at::parallel_for(0, count * s.clusters(), 1, [&](int64_t first, int64_t last) {
        select_kernel(s, slope, z.const_data_ptr<float>(), a.const_data_ptr<float>(), v.data_ptr<T>() + s.out.offset(first_image, 0), first, last);
      });
    }
  });
  return v;
}

}  // namespace sk

#endif
