// branch: direct grouped 3 x 3 convolutions, 4, 8, 16 or 32 channels a group, of one input: the branches with their batch
// statistics, their backward, and the branches of the unit in eval (unit.cpp).
//
// A task is an image's share of one cluster of channels: whole groups that fill whole vectors. It goes into a plane in L2
// cache, pixel by pixel, with channels as lanes; all branches are convolved from there, and the results go back into the
// layout of the image. So x is read once for all branches, and what comes before or after a convolution finds it in cache.

#ifdef SK_ISA

#include "plane.h"

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
      const float* row = rows[ky] + x * kStride * cluster;
#pragma GCC unroll 4
      for (int i = 0; i < kGroup; ++i) {
        const float* const w = weights.data + (i * weights.channel_step + 3 * ky * weights.tap_step) * L;
        // The same values for every i, or so the compiler would see: it would keep them, and there are not the registers for that.
        asm("" : "+r"(row));
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
template <int kGroup> void weight_gradient(const Plane& x, const Plane& dy, int64_t dilation, int64_t stride, float* out) {
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
          for (int64_t c = 0; c < x.width; ++c, value += x.channels, g += dy.channels) {
            const Vec<float> g0 = load(g + dilation * dy.channels), g1 = load(g), g2 = load(g - dilation * dy.channels);
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

// As many sums as there are registers for, beside three weights and a channel.
constexpr int kLongestTile = SK_VECTOR_BYTES == 64 ? 14 : 10;
inline int64_t longest_tile() { return kLongestTile; }

template <int kGroup, int kDilation> SK_INLINE ConvolveRow pick_convolve_row(int64_t stride, int64_t tile) {
  if constexpr (kLongestTile == 14)
    if (tile == 14) return stride == 1 ? convolve_row<kGroup, kDilation, 1, 14> : convolve_row<kGroup, kDilation, 2, 14>;
  if (tile == 7) return stride == 1 ? convolve_row<kGroup, kDilation, 1, 7> : convolve_row<kGroup, kDilation, 2, 7>;
  if (tile == 8) return stride == 1 ? convolve_row<kGroup, kDilation, 1, 8> : convolve_row<kGroup, kDilation, 2, 8>;
  return stride == 1 ? convolve_row<kGroup, kDilation, 1, 10> : convolve_row<kGroup, kDilation, 2, 10>;
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

// One branch of a task, row by row, into a block, and what is to happen to each row while it is in L1 cache.
template <class EachRow>
SK_INLINE void convolve(const Clustered& s, int64_t m, const Plane& x, const float* weights, const float* bias, float* block,
                        const EachRow& each_row) {
  constexpr int64_t L = kLanes<float>;
  const int64_t d = s.dilation[m];
  const ConvolveRow row = pick_convolve_row(s.inputs, d, s.stride, s.tile(s.out.W));
  for (int64_t k = 0; k < x.channels; k += L) {
    const Weights w{weights + k * s.row(), s.channel_step, s.tap_step};
    for (int64_t r = 0; r < s.out.H; ++r) {
      const float* rows[3];
      for (int ky = 0; ky < 3; ++ky) {
        const int64_t source = r * s.stride + (ky - 1) * d;
        rows[ky] = source < 0 || source >= s.in.H ? nullptr : x.row(source) - d * x.channels;
      }
      float* const out = block + r * s.out.W * x.channels + k;
      row(rows, w, bias + k, out, x.channels, s.out.W);
      each_row.add(out, x.channels, s.out.W, k, r * s.out.W);
    }
  }
}

// f(i, j) for the pixels i of a row, j the sum that is to take it: one alone would wait for every addition.
template <class F> SK_INLINE void in_four(int64_t width, const F& f) {
  int64_t i = 0;
  for (; i + 4 <= width; i += 4)
    for (int j = 0; j < 4; ++j) f(i + j, j);
  for (int j = 0; i + j < width; ++j) f(i + j, j);
}

SK_INLINE Vec<float> sum_of(const Vec<float> (&sums)[4]) { return (sums[0] + sums[1]) + (sums[2] + sums[3]); }

// Of each channel of an image, what join_moments takes; the first row's mean is the value near the mean.
struct RowMoments {
  float *centre, *squares, *missed;
  SK_INLINE void add(const float* row, int64_t cluster, int64_t width, int64_t k, int64_t before) const {
    if (before == 0) {
      Vec<float> total = {};
      for (int64_t i = 0; i < width; ++i) total += load(row + i * cluster);
      store(centre + k, total / static_cast<float>(width));
      store(squares + k, Vec<float>{});
      store(missed + k, Vec<float>{});
    }
    const Vec<float> from = load(centre + k);
    Vec<float> deviations[4] = {}, their_squares[4] = {};
    in_four(width, [&](int64_t i, int j) {
      const Vec<float> d = load(row + i * cluster) - from;
      deviations[j] += d;
      their_squares[j] += d * d;
    });
    store(missed + k, load(missed + k) + sum_of(deviations));
    store(squares + k, load(squares + k) + sum_of(their_squares));
  }
};

// Adds the row's activations to `sum` and `missed`.
template <Activation kAct> struct RowSum {
  float *sum, *missed;
  Act<float, kAct> act;
  SK_INLINE void add(const float* row, int64_t cluster, int64_t width, int64_t k, int64_t) const {
    Vec<float> total[4] = {};
    in_four(width, [&](int64_t i, int j) { total[j] += act(load(row + i * cluster)); });
    add_precisely(sum + k, missed + k, sum_of(total));
  }
};

// Nothing, where the statistics are not wanted.
struct NoMoments {
  SK_INLINE void add(const float*, int64_t, int64_t, int64_t, int64_t) const {}
};

// Tasks are (b, cluster). moments is (B, 2, M, clusters * cluster), missed (B, M, clusters * cluster), or both are null.
template <class T>
void branch_tasks(const Clustered& s, const T* x, const float* weights, T* const* ys, float* scratch, float* moments, float* missed,
                  int64_t first, int64_t last) {
  const Plane plane = s.input_plane(scratch);
  float* const block = scratch + plane.size();
  const float zero[kMaxCluster] = {};
  for (int64_t task = first; task < last; ++task) {
    const auto [b, c, channels] = s.task(task);
    pack(x + s.in.offset(b, c), s.in, channels, plane);
    for (int64_t m = 0; m < s.M; ++m) {
      const float* const weights_of_task = weights + (m * s.channels() + c) * s.row();
      if (moments) {
        float* const centre = moments + (b * 2 * s.M + m) * s.channels() + c;
        const RowMoments row_moments{centre, centre + s.M * s.channels(), missed + (b * s.M + m) * s.channels() + c};
        convolve(s, m, plane, weights_of_task, zero, block, row_moments);
      } else {
        convolve(s, m, plane, weights_of_task, zero, block, NoMoments{});
      }
      unpack(block, s.cluster, ys[m] + s.out.offset(b, c), s.out, channels);
    }
  }
}

// The same tasks for the unit, into blocks.
template <class T, Activation kAct>
void unit_branches_tasks(const Clustered& s, const Blocks& blocks, float slope, const T* x, const float* weights, float* scratch,
                         int64_t first, int64_t last) {
  const Plane plane = s.input_plane(scratch);
  for (int64_t task = first; task < last; ++task) {
    const auto [b, c, channels] = s.task(task);
    pack(x + s.in.offset(b, c), s.in, channels, plane);
    float *const sum = blocks.pooled + b * 2 * s.channels() + c, *const missed = sum + s.channels();
    for (int64_t k = 0; k < s.cluster; ++k) sum[k] = missed[k] = 0;
    for (int64_t m = 0; m < s.M; ++m)
      convolve(s, m, plane, weights + (m * s.channels() + c) * s.row(), blocks.bias + m * s.channels() + c,
               blocks.z + (task * s.M + m) * s.out.pixels() * s.cluster, RowSum<kAct>{sum, missed, {slope}});
  }
}

// dx of a task, from the gradients' planes and the weights turned round: a block.
void input_gradient(const Clustered& s, const Plane* dy, const float* turned, int64_t c, float* block) {
  constexpr int64_t L = kLanes<float>;
  const float zero[kMaxCluster] = {};
  for (int64_t m = 0; m < s.M; ++m) {
    const int64_t d = s.dilation[m];
    const ConvolveRow row = pick_convolve_row(s.inputs, d, 1, s.tile(s.in.W));
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

// Tasks are (part of the batch, cluster). dweights is (parts, M, clusters * cluster / L, group * 9, L); it or dx may be null.
template <class T, Activation kAct>
void branch_backward_tasks(const Clustered& s, const Gradient<T>& d, const T* x, const float* turned, int64_t parts, float* scratch, T* dx,
                           float* dweights, int64_t first, int64_t last) {
  constexpr int64_t L = kLanes<float>;
  Plane planes[kMaxBranches];
  for (int64_t m = 0; m < s.M; ++m) planes[m] = s.gradient_plane(scratch + m * s.gradient_plane(nullptr).size());
  float* const block = scratch + s.M * planes[0].size();
  const Plane inputs{block, s.in.W, 0, 1, s.in.H, s.in.W, s.cluster};
  const WeightGradient gradient = pick_weight_gradient(s.inputs);
  for (int64_t task = first; task < last; ++task) {
    const auto [part, c, channels] = s.task(task);
    for (int64_t m = 0; m < s.M && dweights; ++m)
      std::memset(dweights + ((part * s.M + m) * s.channels() + c) * s.row(), 0, s.cluster * s.row() * sizeof(float));
    for (int64_t b = part * s.B / parts; b < (part + 1) * s.B / parts; ++b) {
      for (int64_t m = 0; m < s.M; ++m) pack_gradient<T, kAct>(d, m, s.out, b, c, planes[m]);
      if (dweights) pack(x + s.in.offset(b, c), s.in, channels, inputs);
      for (int64_t m = 0; m < s.M && dweights; ++m)
        for (int64_t k = 0; k < s.cluster; k += L) {
          Plane dy = planes[m];
          dy.data += k;
          gradient(inputs, dy, s.dilation[m], s.stride, dweights + ((part * s.M + m) * s.channels() + c + k) * s.row());
        }
      if (!dx) continue;
      input_gradient(s, planes, turned, c, block);
      unpack(block, s.cluster, dx + s.in.offset(b, c), s.in, channels);
    }
  }
}

#else

#include "convolutions.h"

namespace sk {

constexpr int64_t kMaxCluster = 32;

// Input channel i, tap k of L output channels: data[(i * channel_step + k * tap_step) * L].
struct Weights {
  const float* data;
  int64_t channel_step, tap_step;
};

// The convolutions, cut into clusters of channels.
struct Clustered : Convolutions {
  int64_t cluster, longest_tile;

  int64_t clusters() const { return (in.C + cluster - 1) / cluster; }
  int64_t channels() const { return clusters() * cluster; }

  // An image, or part of the batch, and a cluster: its first channel, and how many there are.
  struct Task {
    int64_t image, c, channels;
  };
  Task task(int64_t i) const {
    const int64_t c = i % clusters() * cluster;
    return {i / clusters(), c, std::min(cluster, in.C - c)};
  }

  // How many pixels of a row are summed at a time: 7, 8, 10 or 14, whichever takes least, and of equals the most, which share more
  // of the channels. Two additions begin in a cycle and last four, so that fewer than 8 sums take as long as 8.
  int64_t tile(int64_t width) const {
    const auto time = [&](int64_t tile) { return whole_tiles(width, tile) / tile * std::max<int64_t>(tile, 8); };
    int64_t best = 7;
    for (const int64_t tile : {8, 10, 14})
      if (tile <= longest_tile && time(tile) <= time(best)) best = tile;
    return best;
  }
  static int64_t whole_tiles(int64_t width, int64_t tile) { return (width + tile - 1) / tile * tile; }

  // What the branches are convolved from, and their gradients: with margins that the taps may reach into, and the last
  // tile too. A gradient's pixels lie where the convolution's stride had put them.
  Plane input_plane(float* data) const {
    const int64_t reach = (whole_tiles(out.W, tile(out.W)) - 1) * stride + 1;
    return {data, 2 * halo + std::max(in.W, reach), halo, 1, in.H, in.W, cluster};
  }
  Plane gradient_plane(float* data) const { return {data, 2 * halo + whole_tiles(in.W, tile(in.W)), halo, stride, out.H, out.W, cluster}; }
};

}  // namespace sk

#define SK_KERNELS "branch_direct.cpp"
#include "foreach_isa.h"

namespace sk {

int64_t cluster_of_direct(const Convolutions& s) { return std::max(s.inputs, SK_PICK(lanes)()); }

static Clustered clustered(const Convolutions& s) { return {s, cluster_of_direct(s), SK_PICK(longest_tile)()}; }

void branch_direct(const Convolutions& convolutions, const Tensor& x, TensorList weights, TensorList ys, const Tensor& mean,
                   const Tensor& var) {
  Clustered s = clustered(convolutions);
  s.out.streamed = beyond_caches(s.M * ys[0].nbytes());
  const bool statistics = mean.numel() > 0;
  const Tensor moments = at::empty({statistics ? s.B : 0, 2, s.M, s.channels()}, at::kFloat),
               missed = at::empty({statistics ? s.B : 0, s.M, s.channels()}, at::kFloat);
  const Tensor packed = pack_weights(s, weights, s.channels(), nullptr);
  dispatch_convolution(x.scalar_type(), [&]<class T>() {
    c10::SmallVector<T*, 4> out;
    for (const auto& y : ys) out.push_back(y.data_ptr<T>());
    const auto kernel = SK_PICK(branch_tasks<T>);
    parallel_tasks(s.B * s.clusters(), s.input_plane(nullptr).size(), s.input_plane(nullptr).size() + s.out.pixels() * s.cluster,
                   [&](float* scratch, int64_t first, int64_t last) {
                     kernel(s, x.const_data_ptr<T>(), packed.const_data_ptr<float>(), out.data(), scratch,
                            statistics ? moments.data_ptr<float>() : nullptr, missed.data_ptr<float>(), first, last);
                   });
  });
  if (!statistics) return;
  const Tensor padded = at::empty({2, s.M, s.channels()}, at::kFloat);
  float* const joined = padded.data_ptr<float>();
  join_moments(moments.const_data_ptr<float>(), missed.const_data_ptr<float>(), Segments(s.out.pixels()), s.B, s.out.pixels(),
               s.M * s.channels(), joined, joined + s.M * s.channels());
  mean.copy_(padded[0].narrow(1, 0, s.in.C));
  var.copy_(padded[1].narrow(1, 0, s.in.C));
}

void branch_direct_backward(const Convolutions& convolutions, const Tensor& g, const Tensor& x, TensorList weights, TensorList ys,
                            const Tensor& mean, const Tensor& scale, const Tensor& bias, const Tensor& a, const Tensor& t, const Tensor& p,
                            const Tensor& q, c10::string_view activation, double negative_slope, const Tensor& dx, TensorList dweights) {
  Clustered s = clustered(convolutions);
  s.in.streamed = beyond_caches(dx.nbytes());
  // Parts of the batch are summed apart, where there are too few clusters for many threads.
  const int64_t parts = std::clamp<int64_t>((64 + s.clusters() - 1) / s.clusters(), 1, s.B);
  const bool wants_dx = dx.numel() > 0, wants_dweights = !dweights.empty();
  const Tensor partial = at::empty({wants_dweights ? parts : 0, s.M, s.channels() * s.row()}, at::kFloat);
  const Tensor turned = at::zeros({wants_dx ? s.M : 0, s.channels() * s.row()}, at::kFloat);
  dispatch_convolution(x.scalar_type(), activation, [&]<class T, Activation kAct>() {
    const Branches<T> branches(ys, mean, scale, bias, negative_slope);
    const Gradient<T> gradient(branches, g, a, t, p, q);
    for (int64_t m = 0; m < s.M && wants_dx; ++m) turn_weights(s, weights[m].const_data_ptr<T>(), turned[m].data_ptr<float>());
    const auto kernel = SK_PICK(branch_backward_tasks<T, kAct>);
    const int64_t margins = s.M * s.gradient_plane(nullptr).size();
    parallel_tasks(parts * s.clusters(), margins, margins + s.in.pixels() * s.cluster, [&](float* scratch, int64_t first, int64_t last) {
      kernel(s, gradient, x.const_data_ptr<T>(), turned.const_data_ptr<float>(), parts, scratch, wants_dx ? dx.data_ptr<T>() : nullptr,
             wants_dweights ? partial.data_ptr<float>() : nullptr, first, last);
    });
  });
  for (int64_t m = 0; m < s.M && wants_dweights; ++m)
    sum_weight_gradients(s, partial.data_ptr<float>() + m * s.channels() * s.row(), partial.stride(0), parts, dweights[m]);
}

void unit_branches_direct(const Convolutions& convolutions, const Tensor& x, const Tensor& packed, const Blocks& blocks,
                          c10::string_view activation, double negative_slope) {
  const Clustered s = clustered(convolutions);
  const int64_t scratch_size = s.input_plane(nullptr).size();
  dispatch_convolution(x.scalar_type(), activation, [&]<class T, Activation kAct>() {
    const auto kernel = SK_PICK(unit_branches_tasks<T, kAct>);
    parallel_tasks(s.B * s.clusters(), scratch_size, scratch_size, [&](float* scratch, int64_t first, int64_t last) {
      kernel(s, blocks, static_cast<float>(negative_slope), x.const_data_ptr<T>(), packed.const_data_ptr<float>(), scratch, first, last);
    });
  });
}

}  // namespace sk

#endif
