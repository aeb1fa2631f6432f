// The convolutions that make the branches: what they are, and what the two ways of computing them share.
#pragma once

#include <atomic>

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
  // strides, are convolved directly: of 4 and 8 channels, with a tile's products in registers, it took 0.9 of that time on an
  // idle core, up to 1.8 times as long where another thread had half of the core, and had three times the error.
  bool winograd() const { return stride == 1 && inputs % 16 == 0 && outputs % 16 == 0; }
  bool direct() const { return !winograd() && !split && inputs == outputs && (inputs == 4 || inputs == 8 || inputs == 16 || inputs == 32); }
};

// `x` and `weights`, checked. One layout for all weights.
Convolutions check_convolutions(const Tensor& x, TensorList weights, int64_t stride, at::IntArrayRef dilations, int64_t groups);

// An output of all branches, in the layout of x.
inline Tensor output_like(const Convolutions& s, const Tensor& x) {
  return at::empty({s.B, s.out.C, s.out.H, s.out.W}, x.options().memory_format(layout(x)));
}

// dispatch, but for float64, which check_convolutions refuses.
template <class F> void dispatch_convolution(at::ScalarType dtype, const F& f) {
  dispatch(dtype, [&]<class T>() {
    if constexpr (!std::is_same_v<T, double>) f.template operator()<T>();
  });
}
template <class F> void dispatch_convolution(at::ScalarType dtype, c10::string_view activation, const F& f) {
  dispatch(dtype, activation, [&]<class T, Activation kAct>() {
    if constexpr (!std::is_same_v<T, double>) f.template operator()<T, kAct>();
  });
}

// A thread's share of the tasks: it takes them from the front, and whoever has finished his own takes them from the back.
struct alignas(64) Share {
  std::atomic<uint64_t> bounds;
  void set(int64_t first, int64_t last) { bounds = static_cast<uint64_t>(first) << 32 | static_cast<uint64_t>(last); }
  // A task, or -1.
  int64_t take(bool front) {
    for (uint64_t now = bounds;;) {
      const uint64_t first = now >> 32, last = now & 0xffffffff;
      if (first == last) return -1;
      if (bounds.compare_exchange_weak(now, front ? (first + 1) << 32 | last : first << 32 | (last - 1))) return front ? first : last - 1;
    }
  }
};

// Memory of the calling thread, uninitialised, its own until it asks for the same `kept` again. It is kept from call to call if it has
// `most` bytes at most: memory that is allocated anew is often faulted in anew, page by page, for longer than it takes to fill it.
// Deterministic algorithms have what is uninitialised filled, so they get new memory.
inline Tensor scratch_of(Tensor& kept, int64_t size, int64_t most) {
  if (size * 4 > most || at::globalContext().deterministicAlgorithms()) return at::empty({size}, at::kFloat);
  if (!kept.defined() || kept.numel() < size) kept = at::empty({size}, at::kFloat);
  return kept;
}

// Tasks are cut for less, but for pictures of many channels.
constexpr int64_t kTaskBytes = 8 << 20;
inline thread_local Tensor kept_for_tasks;

// f(scratch, first, last) on every task, one after the other. Each thread has scratch of its own, whose first `margins` values are 0 at
// first.
template <class F> void parallel_tasks(int64_t tasks, int64_t margins, int64_t scratch_size, const F& f) {
  const int64_t threads = std::min<int64_t>(tasks, at::get_num_threads());
  std::vector<Share> shares(threads);
  for (int64_t i = 0; i < threads; ++i) shares[i].set(i * tasks / threads, (i + 1) * tasks / threads);
  at::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
    const Tensor scratch = scratch_of(kept_for_tasks, scratch_size, kTaskBytes);
    float* const data = scratch.data_ptr<float>();
    std::fill_n(data, margins, 0.0f);
    for (int64_t i = first; i < last; ++i)
      for (int64_t task; (task = shares[i].take(true)) >= 0;) f(data, task, task + 1);
    for (auto& share : shares)
      for (int64_t task; (task = share.take(false)) >= 0;) f(data, task, task + 1);
    fence_streams();
  });
}

// Weights as the kernels read them, (M, channels * row): each output channel's times its scale (M, C), if one is given, and L
// of them side by side: out[m][output channel / L][element of the row][L]; 0 for channels beyond C.
Tensor pack_weights(const Convolutions& s, TensorList weights, int64_t channels, const float* scale);

// Weights of a branch the other way round, for the gradient of its input: out[input channel / L][(o * 9 + k) * L], taps
// turned by half a turn.
template <class T> void turn_weights(const Convolutions& s, const T* weights, float* out);

// The sum of the parts of a weight's gradient, (groups * outputs / L, inputs * 9, L) each and `part_step` apart.
void sum_weight_gradients(const Convolutions& s, const float* partial, int64_t part_step, int64_t parts, const Tensor& dweight);

// The branches of some images in eval, in cache, as clusters of channels: z (images, clusters, M, pixels, cluster), with the
// batch-norm applied, of which the weights have the scale, `bias` (M, clusters * cluster) the rest; and `pooled` (images,
// 2, clusters * cluster), the sums of their activations, and what these have missed by rounding.
struct Blocks {
  int64_t clusters, cluster;
  const float* bias;
  float *z, *pooled;
  int64_t channels() const { return clusters * cluster; }
};

// Where Convolutions::direct(). The statistics of the rows are not joined if mean is empty; the gradient of x is not computed if dx is
// empty, those of the weights if dweights is.
void branch_direct(const Convolutions& s, const Tensor& x, TensorList weights, TensorList ys, const Tensor& mean, const Tensor& var);
void branch_direct_backward(const Convolutions& s, const Tensor& g, const Tensor& x, TensorList weights, TensorList ys, const Tensor& mean,
                            const Tensor& scale, const Tensor& bias, const Tensor& a, const Tensor& t, const Tensor& p, const Tensor& q,
                            c10::string_view activation, double negative_slope, const Tensor& dx, TensorList dweights);
int64_t cluster_of_direct(const Convolutions& s);
void unit_branches_direct(const Convolutions& s, const Tensor& x, const Tensor& packed, const Blocks& blocks, c10::string_view activation,
                          double negative_slope);

// Where Convolutions::winograd(); dx and dweights likewise.
void branch_winograd(const Convolutions& s, const Tensor& x, TensorList weights, TensorList ys);
void branch_winograd_backward(const Convolutions& s, const Tensor& g, const Tensor& x, TensorList weights, TensorList ys,
                              const Tensor& mean, const Tensor& scale, const Tensor& bias, const Tensor& a, const Tensor& t,
                              const Tensor& p, const Tensor& q, c10::string_view activation, double negative_slope, const Tensor& dx,
                              TensorList dweights);
int64_t cluster_of_winograd(const Convolutions& s);
void unit_branches_winograd(const Convolutions& s, const Tensor& x, TensorList weights, const float* scale, const Blocks& blocks,
                            c10::string_view activation, double negative_slope);

}  // namespace sk
