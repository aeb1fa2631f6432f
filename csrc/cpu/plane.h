// Images, and the planes in cache that convolutions work on: pixel by pixel, with channels as lanes.

#ifndef SK_ISA
#ifndef SK_PLANE_H
#define SK_PLANE_H

#include "common.h"

namespace sk {

template <int64_t kMost> inline int64_t clamp(int64_t n) { return n < 0 ? 0 : n < kMost ? n : kMost; }

// One image of a tensor (B, C, H, W).
struct Picture {
  int64_t C, H, W;
  bool channels_last;
  // Whether it is written past the caches, where that can be done.
  bool streamed = false;
  int64_t pixels() const { return H * W; }
  int64_t channel_step() const { return channels_last ? 1 : pixels(); }
  int64_t offset(int64_t b, int64_t c) const { return b * C * pixels() + c * channel_step(); }
};

// Some channels of an image: pixel (r, c) has them at row(r) + c * spread * channels. What lies between the pixels, and
// beside them, is 0.
struct Plane {
  float* data;
  int64_t columns, left, spread, height, width, channels;
  float* row(int64_t r) const { return data + (r * columns + left) * channels; }
  int64_t size() const { return height * columns * channels; }
};

// The operands of select_backward, whose results are packed at once where convolutions are the package's own.
template <class T> struct Gradient {
  const Branches<T>& branches;
  const T* g;
  const float *a, *t, *p, *q;

  Gradient(const Branches<T>& branches, const at::Tensor& g, const at::Tensor& a, const at::Tensor& t, const at::Tensor& p,
           const at::Tensor& q)
      : branches(branches),
        g(g.const_data_ptr<T>()),
        a(a.const_data_ptr<float>()),
        t(t.const_data_ptr<float>()),
        p(p.const_data_ptr<float>()),
        q(q.const_data_ptr<float>()) {}
};

}  // namespace sk

#endif
#else

// The addresses of a plane's pixels, in the image's order.
struct Walk {
  float* at;
  int64_t column, width, step, skip;
  SK_INLINE Walk(const Plane& p)
      : at(p.row(0)), column(0), width(p.width), step(p.spread * p.channels), skip((p.columns - p.width * p.spread) * p.channels) {}
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

// Adds to a sum, and to `missed` what the addition rounds away (Knuth's two-sum): over a large image that would be more than
// PyTorch's pairwise sum loses.
SK_INLINE void add_precisely(float* sum, float* missed, Vec<float> value) {
  const Vec<float> before = load(sum), after = before + value, added = after - before;
  store(sum, after);
  store(missed, load(missed) + ((before - (after - added)) + (value - added)));
}

// At most L pixels of at most L channels, a vector each: from and to the channels at `image`, pixel p and on. These are short pieces
// of every channel, or pixel, which the hardware does not foresee: those of the next task are prefetched, `ahead` channels later,
// and in channels_last those of later pixels.
template <class T>
SK_INLINE void load_pixels(const T* image, const Picture& s, int64_t p, int64_t pixels, int64_t channels, Vec<float> (&v)[kLanes<float>],
                           int64_t ahead = kLanes<float>) {
  constexpr int L = kLanes<float>;
  const T* const from = image + p * (s.channels_last ? s.C : 1);
  const int64_t step = s.channels_last ? s.C : s.pixels(), rows = s.channels_last ? pixels : channels,
                columns = s.channels_last ? channels : pixels;
  for (int i = 0; i < L; ++i) {
    if (s.channels_last) __builtin_prefetch(from + (2 * L + i) * step);
    __builtin_prefetch(from + i * step + ahead * s.channel_step(), 0, 2);
  }
  if (rows == L && columns == L)
    for (int i = 0; i < L; ++i) v[i] = load(from + i * step);
  else if (columns == L)
    for (int i = 0; i < L; ++i) v[i] = i < rows ? load(from + i * step) : Vec<float>{};
  else
    for (int i = 0; i < L; ++i) v[i] = i < rows ? load(from + i * step, columns) : Vec<float>{};
  if (!s.channels_last) transpose(v);
}

// The other way round. Where later pixels, or channels, will go is prefetched, if it is not streamed.
template <class T>
SK_INLINE void store_pixels(T* image, const Picture& s, int64_t p, int64_t pixels, int64_t channels, Vec<float> (&v)[kLanes<float>]) {
  constexpr int L = kLanes<float>;
  T* const to = image + p * (s.channels_last ? s.C : 1);
  const int64_t step = s.channels_last ? s.C : s.pixels(), rows = s.channels_last ? pixels : channels,
                columns = s.channels_last ? channels : pixels;
  const bool lines = s.streamed && are_lines(to, step);
  if (!s.channels_last) transpose(v);
  for (int i = 0; i < L && !lines; ++i) {
    if (s.channels_last) __builtin_prefetch(to + (2 * L + i) * step, 1);
    else __builtin_prefetch(to + (L + i) * step, 1, 2);
  }
  if (rows == L && columns == L) store_all(lines, to, step, v);
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
    const int64_t pixels = clamp<L>(s.pixels() - p);
    Walk walk = start;
    for (int64_t k = 0; k < to.channels; k += L) {
      Vec<float> v[L];
      load_pixels(image + k * s.channel_step(), s, p, pixels, clamp<L>(channels - k), v, to.channels);
      walk = start;
      for (int i = 0; i < pixels; ++i) store(walk.next() + k, v[i]);
    }
    start = walk;
  }
}

// The gradient of branch m, of the picture `s`, image b: its channels from c on into a plane.
template <class T, Activation kAct>
void pack_gradient(const Gradient<T>& d, int64_t m, const Picture& s, int64_t b, int64_t c, const Plane& to) {
  constexpr int64_t L = kLanes<float>;
  const Branches<T>& v = d.branches;
  const Act<float, kAct> act{v.slope};
  for (int64_t k = 0; k < to.channels; k += L) {
    const int64_t lanes = clamp<L>(s.C - c - k), at = m * s.C + c + k, from = s.offset(b, c + k);
    const Vec<float> mean = load_some(v.mean + at, lanes), scale = load_some(v.scale + at, lanes), bias = load_some(v.bias + at, lanes);
    const Vec<float> p = load_some(d.p + at, lanes), q = load_some(d.q + at, lanes);
    const Vec<float> a = load_some(d.a + b * v.M * s.C + at, lanes), t = load_some(d.t + b * s.C + c + k, lanes);
    Walk walk(to);
    for (int64_t pixel = 0; pixel < s.pixels(); pixel += L) {
      const int64_t pixels = clamp<L>(s.pixels() - pixel);
      Vec<float> y[L], g[L];
      load_pixels(v.y[m] + from, s, pixel, pixels, lanes, y, to.channels);
      load_pixels(d.g + from, s, pixel, pixels, lanes, g, to.channels);
      for (int i = 0; i < pixels; ++i) {
        const Vec<float> centred = y[i] - mean;
        const Vec<float> dz = act.gate(centred * scale + bias, a * g[i] + t);
        store(walk.next() + k, scale * dz - p - centred * q);
      }
    }
  }
}

// A block, a plane without margins, back into `image`.
template <class T> SK_INLINE void unpack(const float* block, int64_t block_channels, T* image, const Picture& s, int64_t channels) {
  constexpr int64_t L = kLanes<float>;
  for (int64_t p = 0; p < s.pixels(); p += L) {
    const int64_t pixels = clamp<L>(s.pixels() - p);
    for (int64_t k = 0; k < channels; k += L) {
      Vec<float> v[L];
      for (int i = 0; i < L; ++i) v[i] = i < pixels ? load(block + (p + i) * block_channels + k) : Vec<float>{};
      store_pixels(image + k * s.channel_step(), s, p, pixels, clamp<L>(channels - k), v);
    }
  }
}

#endif
