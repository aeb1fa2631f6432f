// branch: the weights of convolutions as the kernels read them, and their gradients as PyTorch reads those.

#ifdef SK_ISA

#include "plane.h"

template <class T> void pack_rows(const T* rows, const float* scale, int64_t channels, int64_t row, float* out) {
  constexpr int64_t L = kLanes<float>;
  pack(rows, Picture{channels, 1, row, false}, channels, Plane{out, row, 0, 1, 1, row, L});
  if (!scale) return;
  const Vec<float> factor = load_some(scale, channels);
  for (int64_t i = 0; i < row; ++i) store(out + i * L, load(out + i * L) * factor);
}

// Of `channels` input channels, at most L, the weights for every output channel, a row apart: out[(o * 9 + 8 - k) * L].
template <class T> void turn_rows(const T* weights, const Picture& kernel, int64_t outputs, int64_t row, int64_t channels, float* out) {
  constexpr int64_t L = kLanes<float>;
  for (int64_t o = 0; o < outputs; ++o)
    for (int64_t k = 0; k < 9; k += L) {
      Vec<float> v[L];
      load_pixels(weights + o * row, kernel, k, clamp<L>(9 - k), channels, v);
      for (int64_t i = 0; i < clamp<L>(9 - k); ++i) store_some(out + (o * 9 + 8 - k - i) * L, v[i], channels);
    }
}

// Sums the parts of L channels' gradients (parts, row, L), and brings them back into rows.
template <class T>
void sum_rows(const float* partial, int64_t part_step, int64_t parts, int64_t channels, int64_t row, float* scratch, T* rows) {
  constexpr int64_t L = kLanes<float>;
  for (int64_t i = 0; i < row; ++i) {
    Vec<float> total = load(partial + i * L);
    for (int64_t part = 1; part < parts; ++part) total += load(partial + part * part_step + i * L);
    store(scratch + i * L, total);
  }
  unpack(scratch, L, rows, Picture{channels, 1, row, false}, channels);
}

#else

#include "convolutions.h"

#define SK_KERNELS "branch_weights.cpp"
#include "foreach_isa.h"

namespace sk {

Tensor pack_weights(const Convolutions& s, TensorList weights, int64_t channels, const float* scale) {
  const int64_t L = SK_PICK(lanes)(), M = weights.size(), C = s.groups * s.outputs;
  const Tensor packed = at::empty({M, channels * s.row()}, at::kFloat);
  float* const out = packed.data_ptr<float>();
  dispatch_convolution(weights[0].scalar_type(), [&]<class T>() {
    c10::SmallVector<const T*, 4> in;
    for (const auto& w : weights) in.push_back(w.const_data_ptr<T>());
    const auto kernel = SK_PICK(pack_rows<T>);
    at::parallel_for(0, M * channels / L, grain(s.row() * L), [&](int64_t first, int64_t last) {
      for (int64_t i = first * L; i < last * L; i += L) {
        const int64_t m = i / channels, c = i % channels;
        if (c < C) kernel(in[m] + c * s.row(), scale ? scale + m * C + c : nullptr, std::min(L, C - c), s.row(), out + i * s.row());
        else std::fill_n(out + i * s.row(), L * s.row(), 0.0f);
      }
    });
  });
  return packed;
}

template <class T> void turn_weights(const Convolutions& s, const T* weights, float* out) {
  const int64_t L = SK_PICK(lanes)();
  const auto kernel = SK_PICK(turn_rows<T>);
  const int64_t vectors = (s.inputs + L - 1) / L;
  at::parallel_for(0, s.groups * vectors, grain(s.outputs * 9 * L), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t group = i / vectors, c = i % vectors * L, channel = group * s.inputs + c;
      const Picture kernel_of_input{s.inputs, 1, 9, s.channel_step == 1};
      kernel(weights + group * s.outputs * s.row() + c * s.channel_step, kernel_of_input, s.outputs, s.row(), std::min(L, s.inputs - c),
             out + channel / L * L * s.outputs * 9 + channel % L);
    }
  });
}

void sum_weight_gradients(const Convolutions& s, const float* partial, int64_t part_step, int64_t parts, const Tensor& dweight) {
  const int64_t L = SK_PICK(lanes)(), channels = s.groups * s.outputs;
  dispatch_convolution(dweight.scalar_type(), [&]<class T>() {
    T* const out = dweight.data_ptr<T>();
    const auto kernel = SK_PICK(sum_rows<T>);
    parallel_tasks((channels + L - 1) / L, 0, s.row() * L, [&](float* scratch, int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i)
        kernel(partial + i * L * s.row(), part_step, parts, std::min(L, channels - i * L), s.row(), scratch, out + i * L * s.row());
    });
  });
}

#define SK_INSTANTIATE(T) template void turn_weights<T>(const Convolutions&, const T*, float*);
SK_INSTANTIATE(float)
SK_INSTANTIATE(c10::BFloat16)
SK_INSTANTIATE(c10::Half)

}  // namespace sk

#endif
