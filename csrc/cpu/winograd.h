// The transforms of Winograd's F(2 x 2, 3 x 3) (Lavin, Gray 2015, section 4.1) that two files need. Included as simd.h is: once for
// each instruction set.

// v[position][tile][channels] of one tile, B^T x B; `pixel` is its first. A column of x B at a time: these fit into registers.
SK_INLINE void transform_inputs(const float* pixel, int64_t row_step, int64_t column_step, int64_t channels, float* v,
                                int64_t position_step) {
  const float *const second = pixel + column_step, *const third = second + column_step, *const fourth = third + column_step;
  for (int64_t k = 0; k < channels; k += kLanes<float>) {
    const auto column = [&](const float* a, const float* b, float sign, int64_t j) {
      Vec<float> x[4];
      for (int i = 0; i < 4; ++i) {
        const Vec<float> from = load(b + i * row_step + k);
        x[i] = load(a + i * row_step + k) + (sign < 0 ? -from : from);
      }
      float* const to = v + j * position_step + k;
      store(to, x[0] - x[2]);
      store(to + 4 * position_step, x[1] + x[2]);
      store(to + 8 * position_step, x[2] - x[1]);
      store(to + 12 * position_step, x[1] - x[3]);
    };
    column(pixel, third, -1, 0);
    column(second, third, 1, 1);
    column(third, second, -1, 2);
    column(second, fourth, -1, 3);
  }
}

// G g G^T for L output channels, side by side and multiplied by `scale`, to u[position][inputs][step].
SK_INLINE void transform_weights(const float* weights, Vec<float> scale, int64_t inputs, int64_t channel_step, int64_t tap_step, float* u,
                                 int64_t step, int64_t position_step) {
  constexpr int64_t L = kLanes<float>;
  for (int64_t i = 0; i < inputs; ++i) {
    Vec<float> g[4][3];
    for (int kx = 0; kx < 3; ++kx) {
      const float* const w = weights + (i * channel_step + kx * tap_step) * L;
      const Vec<float> g0 = scale * load(w), g1 = scale * load(w + 3 * tap_step * L), g2 = scale * load(w + 6 * tap_step * L);
      g[0][kx] = g0;
      g[1][kx] = 0.5f * (g0 + g1 + g2);
      g[2][kx] = 0.5f * (g0 - g1 + g2);
      g[3][kx] = g2;
    }
    for (int r = 0; r < 4; ++r) {
      float* const to = u + 4 * r * position_step + i * step;
      store(to, g[r][0]);
      store(to + position_step, 0.5f * (g[r][0] + g[r][1] + g[r][2]));
      store(to + 2 * position_step, 0.5f * (g[r][0] - g[r][1] + g[r][2]));
      store(to + 3 * position_step, g[r][2]);
    }
  }
}
