// branch: 3 x 3 convolutions by Winograd's minimal filtering F(2 x 2, 3 x 3) (Lavin, Gray 2015, section 4.1): a tile of 4 x 4
// inputs makes 2 x 2 outputs with 16 products in place of 36, as 16 matrix products over many tiles. Its error is about
// that of the direct sum; the larger tile F(4 x 4, 3 x 3) has ten times that, and is not used.
//
// A dilated convolution is d * d undilated ones on every d-th row and column: a tile's rows are d apart.

#ifdef SK_ISA

#include "plane.h"

// v[position][tile][channels] of one tile, B^T x B; `pixel` is its first. A column of x B at a time: these fit into registers. Of a
// tile with one row of outputs, x has two rows, which are not mixed; likewise with one column.
template <bool kOneRow, bool kOneColumn>
SK_INLINE void transform_inputs(const float* pixel, int64_t row_step, int64_t column_step, int64_t channels, float* v,
                                int64_t position_step) {
  constexpr int kHeight = kOneRow ? 2 : 4;
  const float *const second = pixel + column_step, *const third = second + column_step, *const fourth = third + column_step;
  for (int64_t k = 0; k < channels; k += kLanes<float>) {
    const auto column = [&](const float* a, int sign, const float* b, int j) {
      Vec<float> x[kHeight];
      for (int i = 0; i < kHeight; ++i) {
        x[i] = load(a + i * row_step + k);
        if (sign > 0) x[i] += load(b + i * row_step + k);
        if (sign < 0) x[i] -= load(b + i * row_step + k);
      }
      const auto put = [&](int i, Vec<float> value) { store(v + position(i, j) * position_step + k, value); };
      if constexpr (kOneRow) {
        put(0, x[0]);
        put(4, x[1]);
      } else {
        put(0, x[0] - x[2]);
        put(1, x[1] + x[2]);
        put(2, x[2] - x[1]);
        put(3, x[1] - x[3]);
      }
    };
    if constexpr (kOneColumn) {
      column(pixel, 0, nullptr, 0);
      column(second, 0, nullptr, 4);
    } else {
      column(pixel, -1, third, 0);
      column(second, 1, third, 1);
      column(third, -1, second, 2);
      column(second, -1, fourth, 3);
    }
  }
}

// The same for the gradient of a tile's outputs: A dy A^T.
template <bool kOneRow, bool kOneColumn>
SK_INLINE void transform_gradients(const float* pixel, int64_t row_step, int64_t column_step, int64_t channels, float* v,
                                   int64_t position_step) {
  for (int64_t k = 0; k < channels; k += kLanes<float>) {
    const auto row = [&](int i, const auto& of_column) {
      const auto put = [&](int j, Vec<float> value) { store(v + position(i, j) * position_step + k, value); };
      const Vec<float> y0 = of_column(0);
      put(0, y0);
      if constexpr (kOneColumn) {
        put(4, y0);
      } else {
        const Vec<float> y1 = of_column(1);
        put(1, y0 + y1);
        put(2, y0 - y1);
        put(3, -y1);
      }
    };
    const auto upper = [&](int64_t j) { return load(pixel + j * column_step + k); };
    const auto lower = [&](int64_t j) { return load(pixel + row_step + j * column_step + k); };
    row(0, upper);
    if constexpr (kOneRow) {
      row(4, upper);
    } else {
      row(1, [&](int64_t j) { return upper(j) + lower(j); });
      row(2, [&](int64_t j) { return upper(j) - lower(j); });
      row(3, [&](int64_t j) { return -lower(j); });
    }
  }
}

// The weights of L output channels side by side: out[element of the row][L]. A row has a multiple of L elements.
template <class T> void transpose_rows(const T* rows, int64_t row, float* out) {
  constexpr int64_t L = kLanes<float>;
  for (int64_t k = 0; k < row; k += L) {
    Vec<float> v[L];
    for (int64_t i = 0; i < L; ++i) {
      // More streams than the processor foresees by itself: the next rows that are transposed.
      __builtin_prefetch(rows + (i + L) * row + k, 0, 2);
      v[i] = load(rows + i * row + k);
    }
    transpose(v);
    for (int64_t i = 0; i < L; ++i) store(out + (k + i) * L, v[i]);
  }
}

// G g G^T for L output channels, side by side and multiplied by `scale`, to u[position][inputs][step]; to the fifth row and column
// only if there are `edges`.
void transform_weights(const float* weights, Vec<float> scale, int64_t inputs, int64_t channel_step, int64_t tap_step, bool edges, float* u,
                       int64_t step, int64_t position_step) {
  constexpr int64_t L = kLanes<float>;
  for (int64_t i = 0; i < inputs; ++i) {
    Vec<float> g[5][3];
    for (int kx = 0; kx < 3; ++kx) {
      const float* const w = weights + (i * channel_step + kx * tap_step) * L;
      const Vec<float> g0 = scale * load(w), g1 = scale * load(w + 3 * tap_step * L), g2 = scale * load(w + 6 * tap_step * L);
      g[0][kx] = g0;
      g[1][kx] = 0.5f * (g0 + g1 + g2);
      g[2][kx] = 0.5f * (g0 - g1 + g2);
      g[3][kx] = g2;
      g[4][kx] = g1;
    }
    for (int r = 0; r < 4 + edges; ++r) {
      const auto put = [&](int c, Vec<float> value) { store(u + position(r, c) * position_step + i * step, value); };
      put(0, g[r][0]);
      put(1, 0.5f * (g[r][0] + g[r][1] + g[r][2]));
      put(2, 0.5f * (g[r][0] - g[r][1] + g[r][2]));
      put(3, g[r][2]);
      if (edges) put(4, g[r][1]);
    }
  }
}

// Its transpose, for the gradients of L output channels: G^T du G, to out[(i * 9 + k) * L].
void transform_weight_gradients(const float* du, int64_t inputs, bool edges, int64_t step, int64_t position_step, float* out) {
  constexpr int64_t L = kLanes<float>;
  for (int64_t i = 0; i < inputs; ++i) {
    Vec<float> g[3][5] = {};
    for (int c = 0; c < 4 + edges; ++c) {
      Vec<float> u[5] = {};
      for (int r = 0; r < 4 + edges; ++r) u[r] = load(du + position(r, c) * position_step + i * step);
      g[0][c] = u[0] + 0.5f * (u[1] + u[2]);
      g[1][c] = u[4] + 0.5f * (u[1] - u[2]);
      g[2][c] = u[3] + 0.5f * (u[1] + u[2]);
    }
    for (int ky = 0; ky < 3; ++ky) {
      float* const to = out + (i * 9 + 3 * ky) * L;
      store(to, g[ky][0] + 0.5f * (g[ky][1] + g[ky][2]));
      store(to + L, g[ky][4] + 0.5f * (g[ky][1] - g[ky][2]));
      store(to + 2 * L, g[ky][3] + 0.5f * (g[ky][1] + g[ky][2]));
    }
  }
}

// m (kRows, kVecs * L) = v (kRows, inputs) times u (inputs, kVecs * L).
template <int kRows, int kVecs> SK_INLINE void multiply(const float* v, const float* u, int64_t inputs, float* m) {
  constexpr int64_t L = kLanes<float>;
  Vec<float> sum[kRows][kVecs] = {};
#pragma GCC unroll 4
  for (int64_t i = 0; i < inputs; ++i) {
    Vec<float> w[kVecs];
    for (int j = 0; j < kVecs; ++j) w[j] = load(u + (i * kVecs + j) * L);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r)
      for (int j = 0; j < kVecs; ++j) sum[r][j] += v[r * inputs + i] * w[j];
  }
  for (int r = 0; r < kRows; ++r)
    for (int j = 0; j < kVecs; ++j) store(m + (r * kVecs + j) * L, sum[r][j]);
}

// du (kRows of the inputs, kVecs * L) += the sum over some tiles of v (tiles, inputs) and d (tiles, kVecs * L of outputs), summed
// apart: a chain of additions as long as the batch would round away more.
template <int kRows, int kVecs>
SK_INLINE void multiply_transposed(const float* v, const float* d, const Range* ranges, int64_t count, int64_t inputs, int64_t outputs,
                                   float* du) {
  constexpr int64_t L = kLanes<float>;
  Vec<float> sum[kRows][kVecs] = {};
  for (const Range* range = ranges; range < ranges + count; ++range)
    for (int64_t t = range->begin; t < range->end; ++t) {
      Vec<float> w[kVecs];
      for (int j = 0; j < kVecs; ++j) w[j] = load(d + t * outputs + j * L);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r)
        for (int j = 0; j < kVecs; ++j) sum[r][j] += v[t * inputs + r] * w[j];
    }
  for (int r = 0; r < kRows; ++r)
    for (int j = 0; j < kVecs; ++j) {
      float* const to = du + (r * kVecs + j) * L;
      store(to, load(to) + sum[r][j]);
    }
}

// Rows of a product, and of a transposed one: as many sums as there are registers for, and the latter divide 16 inputs.
constexpr int kRows = SK_VECTOR_BYTES == 64 ? 8 : 6, kTransposedRows = SK_VECTOR_BYTES == 64 ? 8 : 4;
inline int64_t rows_of_product() { return kRows; }

// put(pixel, value) for those of a tile's outputs that are in the picture, L channels of them: A^T m A.
template <bool kOneRow, bool kOneColumn, class F>
SK_INLINE void each_output(const Tile& tile, const float* m, int64_t position_step, const F& put) {
  constexpr int kHeight = kOneRow ? 1 : 2;
  Vec<float> x[kHeight][5];
  for (int c = 0; c < 5; ++c) {
    if (kOneColumn ? c % 4 != 0 : c == 4) continue;
    const auto product = [&](int r) { return load(m + position(r, c) * position_step); };
    if constexpr (kOneRow) {
      x[0][c] = product(0) + product(4);
    } else {
      const Vec<float> m1 = product(1), m2 = product(2);
      x[0][c] = product(0) + m1 + m2;
      x[1][c] = m1 - m2 - product(3);
    }
  }
  // Of tiles that are computed as whole ones, most are.
  const bool all = kOneRow || kOneColumn || tile.pixel[3] >= 0;
  for (int r = 0; r < kHeight; ++r) {
    const int32_t* const pixel = tile.pixel + 2 * r;
    if constexpr (kOneColumn) {
      put(pixel[0], x[r][0] + x[r][4]);
    } else {
      if (all || pixel[0] >= 0) put(pixel[0], x[r][0] + x[r][1] + x[r][2]);
      if (all || pixel[1] >= 0) put(pixel[1], x[r][1] - x[r][2] - x[r][3]);
    }
  }
}

// f.operator()<kOneRow, kOneColumn>() for the tiles of a band.
template <class F> SK_INLINE void for_band(int64_t band, const F& f) {
  switch (band) {
    case 0: return f.template operator()<false, true>();
    case 1: return f.template operator()<false, false>();
    case 2: return f.template operator()<true, false>();
    default: return f.template operator()<true, true>();
  }
}

// f(position, ranges, how many these are), for the positions whose products some of the tiles need: these tiles.
template <class F> SK_INLINE void each_position(const Pieces& pieces, const F& f) {
  for (uint32_t left = pieces.positions; left != 0; left &= left - 1) {
    const int64_t at = __builtin_ctz(left);
    Range ranges[kMostPieces];
    f(at, ranges, pieces.needing(at, ranges));
  }
}

// What becomes of the outputs of some tiles of a band, of image b, kVecs * L channels from channel c on: they go to, or with `add` are
// added to, images whose pixels are `step` apart.
template <class T, int kVecs> struct ToImages {
  T* images;
  int64_t image_step, step;
  bool add, streamed;
  template <bool kOneRow, bool kOneColumn>
  SK_INLINE void put(int64_t b, const Tile* tiles, int64_t count, int64_t c, const float* m, int64_t position_step) const {
    constexpr int64_t L = kLanes<float>;
    for (int64_t t = 0; t < count; ++t)
      for (int j = 0; j < kVecs; ++j)
        each_output<kOneRow, kOneColumn>(tiles[t], m + (t * kVecs + j) * L, position_step, [&](int64_t pixel, Vec<float> value) {
          T* const to = images + b * image_step + pixel * step + c + j * L;
          if (add) value += load(to);
          store_all(streamed && are_lines(to, step), to, step, {value});
        });
  }
};

// Or to the blocks of the unit, and their activations to the pooled sums; one of a task's blocks has all its kVecs * L channels.
template <int kVecs, Activation kAct> struct ToBlocks {
  Act<float, kAct> act;
  const float* bias;
  float *z, *pooled;
  int64_t image_step, block_step, channels;
  template <bool kOneRow, bool kOneColumn>
  SK_INLINE void put(int64_t b, const Tile* tiles, int64_t count, int64_t c, const float* m, int64_t position_step) const {
    constexpr int64_t L = kLanes<float>;
    float* const block = z + b * image_step + c / (kVecs * L) * block_step;
    for (int j = 0; j < kVecs; ++j) {
      const Vec<float> shift = load(bias + c + j * L);
      Vec<float> total = {};
      for (int64_t t = 0; t < count; ++t)
        each_output<kOneRow, kOneColumn>(tiles[t], m + (t * kVecs + j) * L, position_step, [&](int64_t pixel, Vec<float> value) {
          value += shift;
          store(block + (pixel * kVecs + j) * L, value);
          total += act(value);
        });
      float* const sum = pooled + b * 2 * channels + c + j * L;
      add_precisely(sum, sum + channels, total);
    }
  }
};

// What is convolved: the channels of a group, of image b.
template <class T> SK_INLINE void pack_input(const Branch<T>& branch, int64_t b, int64_t group, const Plane& plane) {
  const Winograd& s = branch.convolution;
  if (branch.gradient) branch.pack_gradient(*branch.gradient, branch.m, s.in, b, group * s.inputs, plane);
  else pack(branch.x + s.in.offset(b, s.first_input + group * s.inputs), s.in, s.inputs, plane);
}

// Output channels `begin` to `end` of a group, of some images: the products of an image's tiles go to to.put(image, tiles, ...).
// With `packed` the planes have the images already.
template <int kVecs, class T, class To>
SK_INLINE void convolve(const Branch<T>& branch, bool packed, int64_t image, int64_t images, int64_t group, int64_t begin, int64_t end,
                        float* scratch, const To& to) {
  constexpr int64_t L = kLanes<float>, kChunk = kVecs * L;
  const Winograd& s = branch.convolution;
  const WeightRows<T>& weights = branch.weights;
  const int64_t plane_size = s.plane_size(s.in, s.inputs), v_step = position_step(s.span * s.inputs),
                u_step = position_step(s.inputs * kChunk), m_step = position_step(kTilesOfProduct * kChunk), tiles = images * s.tiles;
  float* const v = scratch + s.planes * plane_size;
  float* const u = v + s.bands.positions() * v_step;
  float* const m = u + s.kept * s.bands.positions() * u_step;
  float* const side_by_side = m + s.bands.positions() * m_step;
  const bool all_kept = s.kept * kChunk >= end - begin, take_turns = !s.has_all_planes(images);
  if (!take_turns && !packed)
    for (int64_t i = 0; i < images; ++i) pack_input(branch, image + i, group, s.plane(scratch + i * plane_size, s.in, s.inputs));
  // The weights of the channels from here on are to be transformed next.
  int64_t next = begin;
  for (TileOf start{s.bands, images, take_turns && tiles > s.span}; start.left() > 0; start += s.span) {
    const int64_t count = start.left() < s.span ? start.left() : s.span;
    TileOf in{s.bands, images, take_turns};
    in += start.in_task;
    for (int64_t t = 0; t < count; ++t, in += 1) {
      if (take_turns && in.tile == 0) pack_input(branch, image + in.image, group, s.plane(scratch, s.in, s.inputs));
      const Plane plane = s.plane(scratch + (take_turns ? 0 : in.image) * plane_size, s.in, s.inputs);
      const Tile& tile = s.tile[in.tile];
      const float* const pixel = plane.row(tile.row - s.dilation) + (tile.column - s.dilation) * s.inputs;
      float* const to_tile = v + (in.by_image && !start.by_image ? in.place_in_bands() : t) * s.inputs;
      for_band(in.band, [&]<bool kOneRow, bool kOneColumn>() {
        transform_inputs<kOneRow, kOneColumn>(pixel, s.dilation * plane.columns * s.inputs, s.dilation * s.inputs, s.inputs, to_tile,
                                              v_step);
      });
    }
    for (int64_t c = begin; c < end; c += kChunk) {
      float* const of_chunk = u + (c - begin) / kChunk % s.kept * s.bands.positions() * u_step;
      if (c == next) {
        for (int64_t j = 0, row = s.inputs * 9; j < kVecs; ++j) {
          const int64_t channel = group * s.outputs + c + j * L;
          if (weights.rows) transpose_rows(weights.rows + channel * row, row, side_by_side);
          transform_weights(weights.rows ? side_by_side : weights.packed + channel * row,
                            weights.scale ? load(weights.scale + channel) : splat(1.0f), s.inputs, s.channel_step, s.tap_step,
                            s.bands.edges(), of_chunk + j * L, kChunk, u_step);
        }
        next = all_kept || c + kChunk < end ? c + kChunk : begin;
      }
      TileOf out = start;
      for (int64_t from = 0; from < count; from += kTilesOfProduct) {
        const int64_t until = from + kTilesOfProduct < count ? from + kTilesOfProduct : count;
        const Pieces pieces(out, until - from);
        each_position(pieces, [&](int64_t at, const Range* ranges, int64_t needing) {
          int64_t t = 0;
          for (const Range* range = ranges; range < ranges + needing; ++range)
            for (t = t > range->begin ? t : range->begin - range->begin % kRows; t < range->end; t += kRows)
              multiply<kRows, kVecs>(v + at * v_step + (from + t) * s.inputs, of_chunk + at * u_step, s.inputs,
                                     m + at * m_step + t * kChunk);
        });
        for (int64_t t = from, now; t < until; t += now, out += now) {
          now = until - t < out.in_band() ? until - t : out.in_band();
          for_band(out.band, [&]<bool kOneRow, bool kOneColumn>() {
            to.template put<kOneRow, kOneColumn>(out.image, s.tile + out.tile, now, c, m + (t - from) * kChunk, m_step);
          });
        }
      }
    }
  }
}

// Tasks are (some images, group, part of its output channels), of all branches. The last of the scratch, `picture`, is for outputs
// that do not go where they belong at once.
template <class T, int kVecs>
void convolve_tasks(const Branch<T>* branches, int64_t M, float* scratch, int64_t picture, int64_t first, int64_t last) {
  constexpr int64_t kChunk = kVecs * kLanes<float>;
  const Winograd& s = branches[0].convolution;
  const int64_t pixels = s.out.pixels();
  for (int64_t task = first; task < last; ++task) {
    const auto [image, images, group, begin, end] = s.task(task, kChunk);
    const int64_t channels = end - begin;
    for (int64_t m = 0; m < M; ++m) {
      const Branch<T>& branch = branches[m];
      const bool packed = m > 0 && branch.reads_as(branches[m - 1]) && s.has_all_planes(images),
                 add = m > 0 && branch.writes_as(branches[m - 1]), last_to_add = m + 1 == M || !branches[m + 1].writes_as(branch);
      T* const to = branch.out + s.out.offset(image, group * s.outputs + branch.convolution.first_output);
      if (in_place<T>(s.out, add || !last_to_add)) {
        convolve<kVecs>(branch, packed, image, images, group, begin, end, scratch,
                        ToImages<T, kVecs>{to, s.out.C * pixels, s.out.C, add, s.out.streamed && last_to_add});
        continue;
      }
      float* const block = scratch + picture;
      convolve<kVecs>(branch, packed, image, images, group, begin, end, scratch,
                      ToImages<float, kVecs>{block - begin, pixels * channels, channels, add, false});
      if (!last_to_add) continue;
      for (int64_t i = 0; i < images; ++i) unpack(block + i * pixels * channels, channels, to + s.out.offset(i, begin), s.out, channels);
    }
  }
}

// The same tasks, into blocks.
template <class T, int kVecs, Activation kAct>
void unit_branches_tasks(const Branch<T>* branches, int64_t M, const Blocks& blocks, float slope, float* scratch, int64_t first,
                         int64_t last) {
  constexpr int64_t kChunk = kVecs * kLanes<float>;
  const Winograd& s = branches[0].convolution;
  const int64_t channels = blocks.channels(), block_size = s.out.pixels() * kChunk;
  for (int64_t task = first; task < last; ++task) {
    const auto [image, images, group, begin, end] = s.task(task, kChunk);
    const int64_t channel = group * s.outputs;
    float* const pooled = blocks.pooled + image * 2 * channels + channel;
    for (int64_t i = 0; i < 2 * images; ++i)
      for (int64_t c = begin; c < end; ++c) pooled[i * channels + c] = 0;
    for (int64_t m = 0; m < M; ++m) {
      const bool packed = m > 0 && branches[m].reads_as(branches[m - 1]) && s.has_all_planes(images);
      float* const z = blocks.z + ((image * blocks.clusters + channel / kChunk) * M + m) * block_size;
      convolve<kVecs>(
          branches[m], packed, image, images, group, begin, end, scratch,
          ToBlocks<kVecs, kAct>{
              {slope}, blocks.bias + m * channels + channel, z, pooled, blocks.clusters * M * block_size, M * block_size, channels});
    }
  }
}

// Tasks are (branch, part of the batch, `width` output channels of a group). If there is one part its sums are the gradient, and go to
// the branch's `out`; else they go to partial (M, parts, groups * outputs / L, inputs * 9, L).
template <class T, int kVecs>
void weight_gradient_tasks(const Branch<T>* branches, int64_t width, float* partial, float* scratch, int64_t first, int64_t last) {
  constexpr int64_t L = kLanes<float>, kChunk = kVecs * L;
  const int64_t tasks = branches[0].convolution.parts * branches[0].convolution.groups * branches[0].convolution.outputs / width;
  for (int64_t task = first; task < last; ++task) {
    const Branch<T>& branch = branches[task / tasks];
    const Winograd& s = branch.convolution;
    const Plane inputs = s.plane(scratch, s.in, s.inputs), gradients = s.plane(scratch + s.plane_size(s.in, s.inputs), s.out, width);
    const int64_t v_step = position_step(s.span * s.inputs), d_step = position_step(s.span * width),
                  du_step = position_step(s.inputs * width), channels = s.groups * s.outputs;
    float* const v = scratch + s.plane_size(s.in, s.inputs) + s.plane_size(s.out, width);
    float* const d = v + s.bands.positions() * v_step;
    float* const du = d + s.bands.positions() * d_step;
    const int64_t part = task % tasks / (channels / width), channel = task % (channels / width) * width, group = channel / s.outputs;
    std::memset(du, 0, s.bands.positions() * du_step * sizeof(float));
    const int64_t begin = part * s.B / s.parts;
    for (TileOf start{s.bands, (part + 1) * s.B / s.parts - begin, true}; start.left() > 0; start += s.span) {
      const int64_t count = start.left() < s.span ? start.left() : s.span;
      TileOf in = start;
      for (int64_t t = 0; t < count; ++t, in += 1) {
        if (in.tile == 0) {
          pack(branch.x + s.in.offset(begin + in.image, s.first_input + group * s.inputs), s.in, s.inputs, inputs);
          branch.pack_gradient(*branch.gradient, branch.m, s.out, begin + in.image, channel, gradients);
        }
        const Tile& tile = s.tile[in.tile];
        const int64_t rows = s.dilation * inputs.columns, columns = s.dilation;
        for_band(in.band, [&]<bool kOneRow, bool kOneColumn>() {
          transform_inputs<kOneRow, kOneColumn>(inputs.row(tile.row - columns) + (tile.column - columns) * s.inputs, rows * s.inputs,
                                                columns * s.inputs, s.inputs, v + t * s.inputs, v_step);
          transform_gradients<kOneRow, kOneColumn>(gradients.row(tile.row) + tile.column * width, rows * width, columns * width, width,
                                                   d + t * width, d_step);
        });
      }
      each_position(Pieces(start, count), [&](int64_t at, const Range* ranges, int64_t needing) {
        for (int64_t c = 0; c < width; c += kChunk)
          for (int64_t i = 0; i < s.inputs; i += kTransposedRows)
            multiply_transposed<kTransposedRows, kVecs>(v + at * v_step + i, d + at * d_step + c, ranges, needing, s.inputs, width,
                                                        du + at * du_step + c * s.inputs + i * kChunk);
      });
    }
    const int64_t row = s.inputs * 9;
    for (int64_t c = 0; c < width; c += L) {
      // The transformed inputs have done their service.
      float* const sums = s.parts == 1 ? v : partial + ((branch.m * s.parts + part) * channels + channel + c) * row;
      transform_weight_gradients(du + c / kChunk * kChunk * s.inputs + c % kChunk, s.inputs, s.bands.edges(), kChunk, du_step, sums);
      if (s.parts == 1) unpack(sums, L, branch.out + (channel + c) * row, Picture{L, 1, row, false}, L);
    }
  }
}

#else

#include "convolutions.h"

#include <numeric>

namespace sk {

// The first pixel of a tile's 2 x 2 outputs; and which of the picture's pixels they are, -1 beyond its edges.
struct Tile {
  int32_t row, column, pixel[4];
};

struct Range {
  int64_t begin, end;
};

// A tile has 4 x 4 positions. Tiles at the bottom of a picture may have no second row of outputs, and so no third row of inputs
// either: their outputs are the upper taps' products, in the first row of the positions, and the middle taps' by themselves, in a
// fifth. Those at the right edge have a fifth column likewise. The fifths come after the others.
constexpr int64_t kPositions = 25;
constexpr int64_t position(int row, int column) { return row == 4 ? 20 + column : column == 4 ? 16 + row : 4 * row + column; }

// A bit for each position that tiles of so many rows and columns of outputs need.
constexpr uint32_t needed(bool one_row, bool one_column) {
  uint32_t bits = 0;
  for (int r = 0; r < 5; ++r)
    for (int c = 0; c < 5; ++c)
      if ((one_row ? r % 4 == 0 : r < 4) && (one_column ? c % 4 == 0 : c < 4)) bits |= 1u << position(r, c);
  return bits;
}

// So an image's tiles are in bands: those with one column, whole ones, those with one row, those with one output.
constexpr uint32_t kNeeded[4] = {needed(false, true), needed(false, false), needed(true, false), needed(true, true)};

struct Bands {
  int64_t ends[4];
  int64_t begin(int64_t band) const { return band == 0 ? 0 : ends[band - 1]; }
  // Whether there are other than whole tiles.
  bool edges() const { return ends[1] - ends[0] < ends[3]; }
  int64_t positions() const { return edges() ? kPositions : 16; }
};

// The tiles of some images: of which image, in which band, and which one of its image this is. In order they come band by band, and
// image by image in these, or else image by image.
struct TileOf {
  const Bands& bands;
  const int64_t images;
  const bool by_image;
  int64_t in_task = 0, image = 0, band = 0, tile = 0;
  TileOf(const Bands& bands, int64_t images, bool by_image) : bands(bands), images(images), by_image(by_image) { *this += 0; }
  // From here on, of all, and of this band of this image.
  int64_t left() const { return images * bands.ends[3] - in_task; }
  int64_t in_band() const { return bands.ends[band] - tile; }
  void operator+=(int64_t n) {
    in_task += n;
    for (tile += n; in_band() <= 0 && left() > 0; tile = bands.begin(band) + n) {
      n = -in_band();
      if (by_image ? ++band == 4 : ++image == images) {
        (by_image ? band : image) = 0;
        ++(by_image ? image : band);
      }
    }
  }
  // Where it comes band by band.
  int64_t place_in_bands() const {
    return images * bands.begin(band) + image * (bands.ends[band] - bands.begin(band)) + tile - bands.begin(band);
  }
};

// At most so many consecutive tiles, in pieces of one band.
constexpr int64_t kMostPieces = 64;
struct Pieces {
  int64_t count = 0, band[kMostPieces], end[kMostPieces];
  uint32_t positions = 0;
  Pieces(TileOf at, int64_t tiles) {
    for (int64_t t = 0, now; t < tiles; t += now, at += now) {
      now = std::min(tiles - t, at.in_band());
      if (count == 0 || band[count - 1] != at.band) band[count++] = at.band;
      end[count - 1] = t + now;
      positions |= kNeeded[at.band];
    }
  }
  // The tiles that need the products of a position. Returns how many ranges these are.
  int64_t needing(int64_t position, Range* ranges) const {
    int64_t found = 0;
    for (int64_t i = 0; i < count; ++i) {
      if (!(kNeeded[band[i]] >> position & 1)) continue;
      const int64_t begin = i == 0 ? 0 : end[i - 1];
      if (found > 0 && ranges[found - 1].end == begin) ranges[found - 1].end = end[i];
      else ranges[found++] = {begin, end[i]};
    }
    return found;
  }
};

// Tiles that are multiplied by some output channels' weights before these outputs are made: a multiple of kRows. Of the last product of
// a range too many rows are computed, and not looked at; nor is what lies where no product was needed.
constexpr int64_t kTilesOfProduct = 48;
static_assert(kTilesOfProduct <= kMostPieces);

// From a position's values to the next one's: a power of two would bring all 16 into the same few lines of a cache.
inline int64_t position_step(int64_t values) { return values + 16; }

// The weights of one convolution, as PyTorch has them, an output channel's `rows` after the other's; or else packed as
// turn_weights does. Each channel's are multiplied by its `scale`, if there is one.
template <class T> struct WeightRows {
  const T* rows;
  const float *packed, *scale;
};

// One convolution of stride 1, and how it is cut into tasks.
struct Winograd {
  Picture in, out;
  int64_t B, groups, inputs, outputs, first_input, first_output, dilation, halo;
  // Tiles of an image.
  const Tile* tile;
  int64_t tiles;
  Bands bands;
  // Tiles that are transformed at a time; chunks of output channels whose transformed weights are kept; images of a task, and how
  // many of them have a plane of their own; parts of the output channels, or of the batch.
  int64_t span, kept, images, planes, parts;
  // What transform_weights reads.
  int64_t channel_step, tap_step;

  // Whether a task of so many images has a plane for each. Else these take turns in one plane, image by image. If their tiles fit
  // into a span they go to where the bands have them.
  bool has_all_planes(int64_t images) const { return planes >= images; }
  // Tiles may begin before the picture by one step and end up to two after it. A step is a dilation, at most the halo.
  int64_t plane_columns(const Picture& p) const { return p.W + 3 * halo; }
  int64_t plane_size(const Picture& p, int64_t channels) const { return (p.H + 3 * halo) * plane_columns(p) * channels; }
  Plane plane(float* data, const Picture& p, int64_t channels) const {
    return {data + halo * plane_columns(p) * channels, plane_columns(p), halo, 1, p.H, p.W, channels};
  }

  // The planes; the transformed inputs, weights and outputs of `chunk` channels; and such weights before.
  int64_t scratch_size(int64_t chunk) const {
    return planes * plane_size(in, inputs) +
           bands.positions() *
               (position_step(span * inputs) + kept * position_step(inputs * chunk) + position_step(kTilesOfProduct * chunk)) +
           inputs * 9 * chunk;
  }

  struct Task {
    int64_t image, images, group, begin, end;
  };
  int64_t tasks() const { return (B + images - 1) / images * groups * parts; }
  Task task(int64_t i, int64_t chunk) const {
    const int64_t part = i % parts, image = i / parts / groups * images;
    return {image, std::min(images, B - image), i / parts % groups, chunk_of(part, chunk), chunk_of(part + 1, chunk)};
  }
  int64_t chunk_of(int64_t part, int64_t chunk) const { return part * (outputs / chunk) / parts * chunk; }
};

// Whether outputs go where they belong at once: in channels_last, if they are not to be added up in half precision.
template <class T> bool in_place(const Picture& out, bool added_up) { return out.channels_last && (!added_up || std::is_same_v<T, float>); }

// What is convolved, and where that goes: x, or the gradient of branch m.
template <class T> struct Branch {
  Winograd convolution;
  const T* x;
  WeightRows<T> weights;
  T* out;
  const Gradient<T>* gradient = nullptr;
  void (*pack_gradient)(const Gradient<T>&, int64_t m, const Picture&, int64_t b, int64_t c, const Plane&) = nullptr;
  int64_t m = 0;
  bool reads_as(const Branch& other) const { return !gradient && x == other.x && convolution.first_input == other.convolution.first_input; }
  bool writes_as(const Branch& other) const { return out == other.out && convolution.first_output == other.convolution.first_output; }
};

}  // namespace sk

#define SK_KERNELS "branch_winograd.cpp"
#include "foreach_isa.h"

namespace sk {

// Of an image.
struct Tiles {
  std::vector<Tile> tiles;
  Bands bands;
};

static Tiles tiles_of(const Picture& p, int64_t dilation) {
  std::vector<Tile> bands[4];
  for (int64_t first_row = 0; first_row < std::min(dilation, p.H); ++first_row)
    for (int64_t first_column = 0; first_column < std::min(dilation, p.W); ++first_column)
      for (int64_t row = first_row; row < p.H; row += 2 * dilation)
        for (int64_t column = first_column; column < p.W; column += 2 * dilation) {
          const bool two_rows = row + dilation < p.H, two_columns = column + dilation < p.W;
          Tile& tile = bands[two_rows ? two_columns : 3 - two_columns].emplace_back(
              Tile{static_cast<int32_t>(row), static_cast<int32_t>(column), {}});
          for (int i = 0; i < 4; ++i) {
            const int64_t y = row + i / 2 * dilation, x = column + i % 2 * dilation;
            tile.pixel[i] = y < p.H && x < p.W ? static_cast<int32_t>(y * p.W + x) : -1;
          }
        }
  Tiles all;
  for (int i = 0; i < 4; ++i) {
    all.tiles.insert(all.tiles.end(), bands[i].begin(), bands[i].end());
    all.bands.ends[i] = all.tiles.size();
  }
  return all;
}

// The transform of weights is worth it for this many tiles: images are taken together until they have them.
constexpr int64_t kTilesOfWeights = 128;

// Channels of outputs that are multiplied at a time: two vectors where they fill them.
static int64_t chunk_of(int64_t outputs) { return outputs % (2 * SK_PICK(lanes)()) == 0 ? 2 * SK_PICK(lanes)() : SK_PICK(lanes)(); }

// Of second-level cache, what the transformed weights of a group may take.
constexpr int64_t kWeightsBytes = 64 << 10;

// Where the transformed weights of a whole group fit they are kept, and serve all tiles, of which those of one product are transformed
// at a time. Else the transformed inputs are kept, half a MiB of them, unless that is too few to transform weights for.
static void choose_what_is_kept(Winograd& w) {
  const int64_t chunks = w.outputs / chunk_of(w.outputs), bytes = 16 * w.inputs * w.outputs * 4;
  w.kept = bytes <= kWeightsBytes ? chunks : 1;
  if (chunks == 1) w.span = SK_PICK(rows_of_product)();
  else if (w.kept == chunks) w.span = kTilesOfProduct;
  else w.span = std::max<int64_t>(kTilesOfWeights, 8192 / w.inputs);
}

static Winograd winograd_of(const Convolutions& s, int64_t m, const Tiles& tiles) {
  Winograd w{.in = s.in,
             .out = s.out,
             .B = s.B,
             .groups = s.groups,
             .inputs = s.inputs,
             .outputs = s.outputs,
             .first_input = s.first_input(m),
             .first_output = 0,
             .dilation = s.dilation[m],
             .halo = s.halo};
  w.tile = tiles.tiles.data();
  w.tiles = tiles.tiles.size();
  w.bands = tiles.bands;
  choose_what_is_kept(w);
  w.channel_step = s.channel_step;
  w.tap_step = s.tap_step;
  return w;
}

// Whether to have bands of their own for tiles at the edges of so many images saves more than the further weights cost, of which each
// takes as long as about three rows of a product; or else these tiles are computed as whole ones.
static bool edges_pay(const Bands& bands, int64_t images) {
  const int64_t rows = SK_PICK(rows_of_product)(), tiles = images * bands.ends[3], whole = 16 * ((tiles + rows - 1) / rows);
  const Pieces pieces({bands, images, false}, tiles);
  int64_t products = 0;
  for (int64_t position = 0; position < kPositions; ++position) {
    Range ranges[kMostPieces];
    const int64_t needing = pieces.needing(position, ranges);
    for (int64_t i = 0; i < needing; ++i) products += (ranges[i].end + rows - 1) / rows - ranges[i].begin / rows;
  }
  return products * rows + 9 * 3 < whole * rows;
}

// Of second-level cache, what the planes of a task may take.
constexpr int64_t kPlanesBytes = 256 << 10;

// Cuts the branches into the same tasks: as many for each thread, if there are several; if there are few, a task has only some of the
// output channels, though each of these parts transforms the inputs anew.
template <class T> static void cut(std::vector<Branch<T>>& branches, int64_t chunk) {
  const Winograd& first = branches[0].convolution;
  const int64_t threads = at::get_num_threads();
  const int64_t together = std::clamp<int64_t>((kTilesOfWeights + first.tiles - 1) / first.tiles, 1, first.B);
  int64_t image_groups = (first.B + together - 1) / together;
  if (image_groups > 1) image_groups = std::min(first.B, (image_groups + threads - 1) / threads * threads);
  const int64_t images = (first.B + image_groups - 1) / image_groups, bytes = images * first.plane_size(first.in, first.inputs) * 4;
  for (auto& branch : branches) {
    Winograd& w = branch.convolution;
    w.images = images;
    w.planes = bytes <= kPlanesBytes ? images : 1;
    w.span = std::min(w.span, images * w.tiles);
    // Whatever the number of threads: it decides how edges are rounded.
    if (!edges_pay(w.bands, together)) w.bands = {0, w.tiles, w.tiles, w.tiles};
    w.parts = 1;
    const int64_t tasks = w.tasks();
    if (tasks < 4 * threads) w.parts = std::min(threads / std::gcd(tasks, threads), w.outputs / chunk);
  }
}

// kernel(scratch, first, last) on the tasks of `branches`, of which each has scratch of this size at most, and `more` behind it.
template <class T, class F> static void on_tasks(const std::vector<Branch<T>>& branches, int64_t chunk, int64_t more, const F& kernel) {
  const Winograd& w = branches[0].convolution;
  int64_t size = 0;
  for (const auto& branch : branches) size = std::max(size, branch.convolution.scratch_size(chunk));
  parallel_tasks(w.tasks(), w.planes * w.plane_size(w.in, w.inputs), size + more,
                 [&](float* scratch, int64_t first, int64_t last) { kernel(scratch, size, first, last); });
}

// To outputs of so many bytes.
template <class T> static void convolve(std::vector<Branch<T>> branches, int64_t bytes) {
  for (auto& branch : branches) branch.convolution.out.streamed = beyond_caches(bytes);
  const int64_t chunk = chunk_of(branches[0].convolution.outputs);
  cut(branches, chunk);
  const Winograd& w = branches[0].convolution;
  const int64_t most_channels = (w.outputs / chunk + w.parts - 1) / w.parts * chunk;
  const bool added_up = branches.size() > 1 && branches[1].writes_as(branches[0]);
  const int64_t picture = in_place<T>(w.out, added_up) ? 0 : w.images * w.out.pixels() * most_channels;
  const auto kernel = chunk == SK_PICK(lanes)() ? SK_PICK(convolve_tasks<T, 1>) : SK_PICK(convolve_tasks<T, 2>);
  on_tasks(branches, chunk, picture, [&](float* scratch, int64_t size, int64_t first, int64_t last) {
    kernel(branches.data(), branches.size(), scratch, size, first, last);
  });
}

static std::vector<Tiles> tiles_of(const Convolutions& s) {
  std::vector<Tiles> tiles;
  for (int64_t m = 0; m < s.M; ++m) tiles.push_back(tiles_of(s.out, s.dilation[m]));
  return tiles;
}

void branch_winograd(const Convolutions& s, const Tensor& x, TensorList weights, TensorList ys) {
  const std::vector<Tiles> tiles = tiles_of(s);
  dispatch_convolution(x.scalar_type(), [&]<class T>() {
    std::vector<Branch<T>> branches;
    for (int64_t m = 0; m < s.M; ++m)
      branches.push_back(
          {winograd_of(s, m, tiles[m]), x.const_data_ptr<T>(), {weights[m].const_data_ptr<T>(), nullptr, nullptr}, ys[m].data_ptr<T>()});
    convolve(std::move(branches), s.M * ys[0].nbytes());
  });
}

int64_t cluster_of_winograd(const Convolutions& s) { return chunk_of(s.outputs); }

void unit_branches_winograd(const Convolutions& s, const Tensor& x, TensorList weights, const float* scale, const Blocks& blocks,
                            c10::string_view activation, double negative_slope) {
  const std::vector<Tiles> tiles = tiles_of(s);
  dispatch_convolution(x.scalar_type(), activation, [&]<class T, Activation kAct>() {
    std::vector<Branch<T>> branches;
    for (int64_t m = 0; m < s.M; ++m)
      branches.push_back(
          {winograd_of(s, m, tiles[m]), x.const_data_ptr<T>(), {weights[m].const_data_ptr<T>(), nullptr, scale + m * s.out.C}, nullptr});
    cut(branches, blocks.cluster);
    const auto kernel =
        blocks.cluster == SK_PICK(lanes)() ? SK_PICK(unit_branches_tasks<T, 1, kAct>) : SK_PICK(unit_branches_tasks<T, 2, kAct>);
    on_tasks(branches, blocks.cluster, 0, [&](float* scratch, int64_t, int64_t first, int64_t last) {
      kernel(branches.data(), s.M, blocks, static_cast<float>(negative_slope), scratch, first, last);
    });
  });
}

// Of branches whose gradients are to be packed.
template <class T>
static void input_gradient(const Convolutions& s, std::vector<Branch<T>> branches, TensorList weights, const Tensor& dx) {
  const Tensor turned = at::empty({s.M, s.branch_inputs() * s.outputs * 9}, at::kFloat);
  for (auto& branch : branches) {
    const int64_t m = branch.m;
    float* const to = turned[m].data_ptr<float>();
    turn_weights(s, weights[m].const_data_ptr<T>(), to);
    Winograd& back = branch.convolution;
    std::swap(back.in, back.out);
    std::swap(back.inputs, back.outputs);
    std::swap(back.first_input, back.first_output);
    choose_what_is_kept(back);
    back.channel_step = 9;
    back.tap_step = 1;
    branch.weights = {nullptr, to, nullptr};
    branch.out = dx.data_ptr<T>();
  }
  convolve(std::move(branches), dx.nbytes());
}

template <class T>
static void weight_gradients(const Convolutions& s, std::vector<Branch<T>> branches, const Tensor& x, TensorList dweights) {
  const int64_t chunk = chunk_of(s.outputs);
  // As many chunks of a group at a time as have sums of 64 KiB at most.
  int64_t width = chunk;
  while (s.outputs % (2 * width) == 0 && 16 * s.inputs * 2 * width <= (64 << 10) / 4) width *= 2;
  const int64_t tasks = s.M * s.groups * s.outputs / width;
  // Parts of the batch are summed apart, where there are too few tasks for many threads, or many images.
  const int64_t parts = std::clamp<int64_t>(std::max((32 + tasks - 1) / tasks, (s.B + 31) / 32), 1, s.B);
  for (auto& branch : branches) {
    // A quarter of a MiB of transformed inputs, since their gradients are to be kept too.
    const int64_t m = branch.m;
    branch.convolution.span = clamp<kMostPieces>(std::max<int64_t>(32, 4096 / s.inputs));
    branch.convolution.parts = parts;
    branch.x = x.const_data_ptr<T>();
    branch.out = dweights[m].data_ptr<T>();
  }
  const Tensor partial = at::empty({s.M, parts == 1 ? 0 : parts, s.groups * s.outputs * s.row()}, at::kFloat);
  const Winograd& w = branches[0].convolution;
  const int64_t margins = w.plane_size(w.in, w.inputs) + w.plane_size(w.out, width);
  const int64_t scratch_size =
      margins + kPositions * (position_step(w.span * w.inputs) + position_step(w.span * width) + position_step(w.inputs * width));
  const auto kernel = chunk == SK_PICK(lanes)() ? SK_PICK(weight_gradient_tasks<T, 1>) : SK_PICK(weight_gradient_tasks<T, 2>);
  parallel_tasks(parts * tasks, margins, scratch_size, [&](float* scratch, int64_t first, int64_t last) {
    kernel(branches.data(), width, partial.data_ptr<float>(), scratch, first, last);
  });
  for (int64_t m = 0; m < s.M && parts > 1; ++m)
    sum_weight_gradients(s, partial[m].const_data_ptr<float>(), partial.stride(1), parts, dweights[m]);
}

void branch_winograd_backward(const Convolutions& s, const Tensor& g, const Tensor& x, TensorList weights, TensorList ys,
                              const Tensor& mean, const Tensor& scale, const Tensor& bias, const Tensor& a, const Tensor& t,
                              const Tensor& p, const Tensor& q, c10::string_view activation, double negative_slope, const Tensor& dx,
                              TensorList dweights) {
  const std::vector<Tiles> tiles = tiles_of(s);
  dispatch_convolution(x.scalar_type(), activation, [&]<class T, Activation kAct>() {
    const Branches<T> operands(ys, mean, scale, bias, negative_slope);
    const Gradient<T> gradient(operands, g, a, t, p, q);
    std::vector<Branch<T>> branches;
    for (int64_t m = 0; m < s.M; ++m)
      branches.push_back({winograd_of(s, m, tiles[m]), nullptr, {}, nullptr, &gradient, SK_PICK(pack_gradient<T, kAct>), m});
    if (dx.numel()) input_gradient(s, branches, weights, dx);
    if (!dweights.empty()) weight_gradients(s, branches, x, dweights);
  });
}

}  // namespace sk

#endif
