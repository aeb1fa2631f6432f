// branch: the weights of convolutions as the kernels read them, and their gradients as PyTorch reads those.

#ifdef SK_ISA

#include "plane.h"

template <class T> void pack_rows(const T* rows, int64_t channels, int64_t row, float* out) {
  pack(rows, Picture{channels, 1, row, false}, channels, Plane{out, row, 0, 1, 1, row, kLanes<float>});
}

// Sums the parts of L channels' gradients (parts, row, L), and brings them back into rows.
template <class T> void sum_rows(const float* partial, int64_t part_step, int64_t parts, int64_t channels, int64_t row, float* scratch, T* rows) {
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

template <class T> void pack_weights(const T* rows, int64_t channels, int64_t row, float* out) { SK_PICK(pack_rows<T>)(rows, channels, row, out); }

template <class T> void turn_weights(const Convolutions& s, const T* weights, int64_t lanes, float* out) {
  at::parallel_for(0, s.branch_inputs(), 32, [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c) {
      const int64_t group = c / s.inputs;
      const T* const from = weights + group * s.outputs * s.row() + c % s.inputs * s.channel_step;
      float* const to = out + c / lanes * lanes * s.outputs * 9 + c % lanes;
      for (int64_t o = 0; o < s.outputs; ++o)
        for (int64_t k = 0; k < 9; ++k) to[(o * 9 + 8 - k) * lanes] = static_cast<float>(from[o * s.row() + k * s.tap_step]);
    }
  });
}

void sum_weight_gradients(const Convolutions& s, const float* partial, int64_t part_step, int64_t parts, const Tensor& dweight) {
  const int64_t L = SK_PICK(lanes)(), channels = s.groups * s.outputs;
  dispatch_convolution(dweight.scalar_type(), [&]<class T>() {
    T* const out = dweight.data_ptr<T>();
    const auto kernel = SK_PICK(sum_rows<T>);
    parallel_tasks((channels + L - 1) / L, s.row() * L, [&](float* scratch, int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i)
        kernel(partial + i * L * s.row(), part_step, parts, std::min(L, channels - i * L), s.row(), scratch, out + i * L * s.row());
    });
  });
}

#define SK_INSTANTIATE(T)                                              \
  template void pack_weights<T>(const T*, int64_t, int64_t, float*);   \
  template void turn_weights<T>(const Convolutions&, const T*, int64_t, float*);
SK_INSTANTIATE(float)
SK_INSTANTIATE(c10::BFloat16)
SK_INSTANTIATE(c10::Half)

}  // namespace sk

#endif
