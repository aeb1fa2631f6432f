// The branches' convolutions, 3 x 3 in channels_last, as products on the matrix units out of shared memory, tile by tile: with the
// batch-norm and the activation in the epilogue, and the sums over the tile's here.
#pragma once

#include "unit.cuh"

namespace sk::cuda {

// A tile has pixels of no more images.
constexpr int kMostImages = 8;

// A convolution tile: kPixels by kChannels, by as many warps as there are, each with a part of both. Its channels are those of one block,
// whose inputs are taken 32 at a time, or of several blocks that have kBlock inputs and outputs each.
template <int kPixels_, int kChannels_, int kBlock_> struct Tile : Columns<kBlock_ < 32 ? kBlock_ : 32> {
  static constexpr int kPixels = kPixels_, kChannels = kChannels_, kBlock = kBlock_;
  static constexpr bool kSeveral = kBlock < kChannels;
  static constexpr int kInputs = kBlock < 32 ? kBlock : 32;
  // In shared memory, bytes of a pixel of x, and of the weights of one tap and output.
  static constexpr int kPixelBytes = (kSeveral ? kChannels : kInputs) * 2, kWeightBytes = kInputs * 2;
  static constexpr int kColumns = kBlock < 32 ? kBlock : 32;
  static constexpr int kWarpColumns = kChannels / kColumns, kWarpRows = kWarps / kWarpColumns, kRows = kPixels / kWarpRows;
  // Matrix instructions along the pixels, in a warp.
  static constexpr int kDown = kRows / 16;
  static_assert(kRows % 16 == 0 && kPixels <= kThreads);
};

// How the output is cut into tiles.
struct Cut {
  // An image's size. A tile is `run` pixels, row by row, of one of `strips` strips of columns, whose widths differ by one at most: of
  // either, the width and the pixels of an image. If there is but one strip, all images are one below the other in it, and a tile may be of
  // several.
  Divisor height, columns, area, run, strips, strip_tiles, width[2], image_pixels[2];
  int strip_rows, tiles;
  // A group of the convolution, or a few small ones together, or all of it: `blocks` of `inputs` and `outputs` channels, each of
  // `block_tiles` tiles.
  int channels, blocks, inputs, outputs;
  // The channels of x that a branch reads.
  int share;
  Divisor block_tiles;
  // Chunks of a block's inputs, and how many of them a tile goes through: where all branches share one, it is there since the first.
  Divisor chunks;
  int parts;
  // Pixels of x that a tile reads, at most; the reach of the longest dilation.
  int read, reach;

  __host__ __device__ int channel_tiles() const { return blocks * block_tiles; }
  __host__ __device__ int strip_start(int strip) const { return strip * columns / strips; }
  // The tiles with pixels of an image, and the first image whose last pixels are in a tile, or in one behind it.
  __host__ __device__ int first_tile(int image) const { return strips == 1 ? image * area / run : image * strips * strip_tiles; }
  __host__ __device__ int last_tile(int image) const { return strips == 1 ? ((image + 1) * area - 1) / run : first_tile(image + 1) - 1; }
  __host__ __device__ int first_ending(int tile) const { return strips == 1 ? tile * run / area : tile / strip_tiles / strips; }
  // Of a tile of kChannels channels.
  __host__ __device__ int first_channel(int tile, int kChannels) const {
    return tile / block_tiles * outputs + tile % block_tiles * kChannels;
  }
  __host__ __device__ int end_channel(int tile, int kChannels) const {
    const int tile_end = first_channel(tile, kChannels) + kChannels, block_end = (tile / block_tiles + 1) * outputs;
    const int end = tile_end < block_end ? tile_end : block_end;
    return end < channels ? end : channels;
  }
};

// The shared memory of a tile, offsets in bytes: which one it is, zeros, and what is known of its pixels; scale and shift of its channels
// in every branch; sums of its channels; the stages of x, of which there is one more if `x_stage` is not 0, and two of three taps' weights.
struct Layout {
  int sums, x, x_stage, weights, all;
  static constexpr int kWhere = 64, kZeros = 128, kPixels = 256, kNorms = kPixels + 256 * 4;

  Layout() = default;
  template <class Tile> static Layout of(const Tile&, int M, const Cut& cut) {
    const auto whole = [](int bytes) { return (bytes + 1023) / 1024 * 1024; };
    const int stage = whole(cut.read * Tile::kPixelBytes);
    Layout layout;
    layout.sums = kNorms + M * Tile::kChannels * 8;
    layout.x = whole(layout.sums + (Tile::kWarpRows + kMostImages) * Tile::kChannels * 4);
    layout.x_stage = cut.parts > 1 ? stage : 0;
    layout.weights = layout.x + stage + layout.x_stage;
    layout.all = layout.weights + 2 * 3 * Tile::kChannels * Tile::kWeightBytes;
    return layout;
  }
};

// The pixels of a tile: `count` of them, from the start-th of a strip on, whose first row is that of `image`.
struct Pixels {
  int image, first_column, width, kind, start, count;

  __device__ __forceinline__ Pixels(const Cut& cut, int tile)
      : image(0), first_column(0), width(cut.columns), kind(0), start(tile * cut.run) {
    if (cut.strips > 1) {
      const int strip = tile / cut.strip_tiles, of_image = strip % cut.strips;
      image = strip / cut.strips;
      first_column = cut.strip_start(of_image);
      width = cut.strip_start(of_image + 1) - first_column;
      kind = width - cut.width[0];
      start = tile % cut.strip_tiles * cut.run;
    }
    const int left = cut.strip_rows * width - start;
    count = left < 0 ? 0 : left < cut.run ? left : cut.run;
  }
  // In the output, of all images.
  __device__ __forceinline__ int output(const Cut& cut, int p) const {
    const int in_strip = start + p, row = in_strip / cut.width[kind];
    return cut.strips == 1 ? in_strip : (image * cut.height + row) * cut.columns + first_column + in_strip - row * width;
  }
  __device__ __forceinline__ int image_of(const Cut& cut, int p) const { return image + (start + p) / cut.image_pixels[kind]; }
  // A narrow strip may have fewer tiles than a wide one; the others have no pixels, and count as the image's all the same.
  __device__ __forceinline__ int first_image(const Cut& cut) const { return count > 0 ? image_of(cut, 0) : image; }
  __device__ __forceinline__ int last_image(const Cut& cut) const { return count > 0 ? image_of(cut, count - 1) : image; }
  // Those of an image are [first_of, end_of).
  __device__ __forceinline__ int first_of(const Cut& cut, int i) const {
    const int first = (i - image) * cut.image_pixels[kind] - start;
    return first > 0 ? first : 0;
  }
  __device__ __forceinline__ int end_of(const Cut& cut, int i) const {
    const int end = (i + 1 - image) * cut.image_pixels[kind] - start;
    return end < count ? end : count;
  }
};

// Where a tile is, in the output and in x. One thread finds it out; the others have it out of shared memory, as registers are few.
struct Where : Pixels {
  int block, first_channel, end_channel;
  // Of x, in rows of `wide` pixels, the first at column `left`, all images one below the other: the tile reads `read` from `first` on.
  int left, wide, first, read;

  __device__ __forceinline__ Where(const Unit& f, const Cut& cut, int tile, int channel_tile, int kChannels) : Pixels(cut, tile) {
    block = channel_tile / cut.block_tiles;
    first_channel = cut.first_channel(channel_tile, kChannels);
    end_channel = cut.end_channel(channel_tile, kChannels);
    const int H = static_cast<int>(f.H), W = static_cast<int>(f.W);
    left = first_column * f.stride - cut.reach;
    if (left < 0) left = 0;
    const int right = (first_column + width - 1) * f.stride + 1 + cut.reach;
    wide = (right < W ? right : W) - left;
    const int around = cut.reach * (wide + 1), top = image * H * wide, bottom = top + cut.strip_rows / cut.height * H * wide;
    first = 0;
    const int begin = input(f, cut, 0) - around, end = input(f, cut, count - 1) + around + 1;
    first = begin > top ? begin : top;
    read = (end < bottom ? end : bottom) - first;
  }

  // The pixel of x in the middle of the p-th, of those that are read.
  __device__ __forceinline__ int input(const Unit& f, const Cut& cut, int p) const {
    const int row = (start + p) / cut.width[kind], column = start + p - row * width;
    return ((image + row / cut.height) * static_cast<int>(f.H) + row % cut.height * f.stride) * wide + (first_column + column) * f.stride -
           left - first;
  }
  // How far that is from the image's borders: above, below, left, right, 2 bits each, as dilations are 3 at most.
  __device__ __forceinline__ int margins(const Unit& f, const Cut& cut, int p) const {
    const auto least = [](int x) { return x < 3 ? x : 3; };
    const int row = (start + p) / cut.width[kind], y = row % cut.height * f.stride, x = (first_column + start + p - row * width) * f.stride;
    return least(y) | least(static_cast<int>(f.H) - 1 - y) << 2 | least(x) << 4 | least(static_cast<int>(f.W) - 1 - x) << 6;
  }
};
static_assert(Layout::kWhere + sizeof(Where) <= Layout::kZeros);

// Of the nine taps those that are inside of the image.
__device__ __forceinline__ int taps_inside(int margins, int dilation) {
  const int rows = 0070 | ((margins & 3) >= dilation ? 0007 : 0) | ((margins >> 2 & 3) >= dilation ? 0700 : 0);
  const int columns = 0222 | ((margins >> 4 & 3) >= dilation ? 0111 : 0) | ((margins >> 6 & 3) >= dilation ? 0444 : 0);
  return rows & columns;
}

// Where the 16 bytes lie: of rows of kBytes, side by side, they change places such that those of eight neighbouring rows lie in all banks.
template <int kBytes> __device__ __forceinline__ int place(unsigned row, unsigned sixteen) {
  return static_cast<int>(row * kBytes + ((sixteen ^ (row / (128 / kBytes) % (kBytes / 16))) * 16));
}

// A tile goes in steps, three taps of a chunk of inputs of a branch each: the next step's weights are copied while one is multiplied, and
// so is the next chunk of x, of which nothing is copied twice: a tap's pixels are those of another row of the same matrix, or zeros.
template <class T, class Tile> struct Convolution {
  const Unit& f;
  const Cut& cut;
  const Layout& layout;
  unsigned char* const shared;
  const Where& here;

  __device__ __forceinline__ Convolution(const Unit& f, const Cut& cut, const Layout& layout, unsigned char* shared)
      : f(f), cut(cut), layout(layout), shared(shared), here(*reinterpret_cast<const Where*>(shared + Layout::kWhere)) {}

  __device__ __forceinline__ int x_part(int step) const { return cut.parts == 1 ? 0 : step / 3; }
  __device__ __forceinline__ int x_stage(int step) const { return layout.x + x_part(step) % 2 * layout.x_stage; }
  __device__ __forceinline__ int weight_stage(int step) const {
    return layout.weights + step % 2 * (3 * Tile::kChannels * Tile::kWeightBytes);
  }

  __device__ __forceinline__ void fill(int step) const {
    const int m = step / 3 / cut.chunks, chunk = step / 3 % cut.chunks;
    if (x_part(step) * 3 == step) fill_x(x_stage(step), m, chunk);
    fill_weights(weight_stage(step), m, chunk, step % 3);
  }

  __device__ __forceinline__ void fill_x(int stage, int m, int chunk) const {
    constexpr int kSixteens = Tile::kPixelBytes / 16, kStep = kThreads / kSixteens;
    const int sixteen = threadIdx.x % kSixteens, W = static_cast<int>(f.W), read = here.read, first = here.first, wide = here.wide;
    const int in_block = chunk * Tile::kInputs + sixteen * 8;
    const int channel = Tile::kSeveral ? here.first_channel + sixteen * 8 : here.block * cut.inputs + in_block;
    const bool there = Tile::kSeveral ? channel < cut.share : in_block < cut.inputs;
    int p = threadIdx.x / kSixteens, to = stage + place<Tile::kPixelBytes>(p, sixteen);
    const T* const image = static_cast<const T*>(f.x) + (f.split ? m * cut.share : 0) + channel;
    if (wide == W) {
      const T* from = image + int64_t{first + p} * f.channels;
      const int64_t step = int64_t{kStep} * f.channels;
#pragma unroll 1
      for (; p < read; p += kStep, to += kStep * Tile::kPixelBytes, from += step) copy_async<16>(shared, to, from, there);
    } else {
      const int left = here.left;
#pragma unroll 1
      for (; p < read; p += kStep, to += kStep * Tile::kPixelBytes) {
        const int row = (first + p) / wide, column = (first + p) % wide;
        copy_async<16>(shared, to, image + (int64_t{row} * W + left + column) * f.channels, there);
      }
    }
  }

  // Of taps 3 row ... 3 row + 2, those of all channels one after the other.
  __device__ __forceinline__ void fill_weights(int stage, int m, int chunk, int row) const {
    constexpr int kSixteens = Tile::kWeightBytes / 16, kAtOnce = kThreads / kSixteens, kAll = 3 * Tile::kChannels;
    // All that a thread copies is as far from its first as its place is from the place of that.
    static_assert(kAtOnce % Tile::kChannels == 0 || (Tile::kChannels % kAtOnce == 0 && kAtOnce % (8 * Tile::kJoined) == 0));
    const int sixteen = threadIdx.x % kSixteens, in_block = chunk * Tile::kInputs + sixteen * 8, first = threadIdx.x / kSixteens;
    const int channel = here.first_channel + Tile::channel_of(first % Tile::kChannels), end = here.end_channel;
    const int to = stage + place<Tile::kWeightBytes>(first, sixteen);
    const T* const weights = static_cast<const T*>(f.weights[m]);
    const int from = (channel * kTaps + row * 3 + first / Tile::kChannels) * f.inputs;
    // There are fewest registers to spare where there are several blocks.
#pragma unroll(Tile::kSeveral ? 1 : 9)
    for (int i = 0; i < (kAll + kAtOnce - 1) / kAtOnce; ++i) {
      const int k = i * kAtOnce, later = k % Tile::kChannels;
      if (kAll % kAtOnce != 0 && k + first >= kAll) break;
      const bool inside = channel + later < end;
      const T* const here_from = weights + (from + (later * kTaps + k / Tile::kChannels) * f.inputs);
      if (Tile::kBlock > 16 || f.inputs >= 16) {
        copy_async<16>(shared, to + k * Tile::kWeightBytes, here_from + in_block, inside && in_block < cut.inputs);
        continue;
      }
      // Small groups, several in 16 channels: a block-diagonal matrix. These 8 inputs are those of a group of 8 or of two of 4.
      const bool there = inside && (channel + later) / 8 % 2 == sixteen;
      if (f.inputs == 8) {
        copy_async<16>(shared, to + k * Tile::kWeightBytes, here_from, there);
      } else {
        copy_async<8>(shared, to + k * Tile::kWeightBytes, here_from, there && (channel + later) % 8 < 4);
        copy_async<8>(shared, to + k * Tile::kWeightBytes + 8, here_from, there && (channel + later) % 8 >= 4);
      }
    }
  }

  // Scale and shift of the channels, branch by branch: z = y * scale + shift.
  __device__ __forceinline__ void fold_norms() const {
    float* const folded = reinterpret_cast<float*>(shared + Layout::kNorms);
#pragma unroll 1
    for (int i = threadIdx.x; i < f.M * Tile::kChannels; i += kThreads) {
      const int m = i / Tile::kChannels, n = i % Tile::kChannels, channel = here.first_channel + n;
      const Folded<float> norm(f.norms, m, channel < here.end_channel ? channel : here.first_channel);
      folded[2 * m * Tile::kChannels + n] = norm.scale;
      folded[(2 * m + 1) * Tile::kChannels + n] = norm.bias - norm.mean * norm.scale;
    }
  }

  // c += the three taps' products of a step.
  template <class RowOfTap>
  __device__ __forceinline__ void multiply(float (&c)[Tile::kDown][Tile::kAlong][4], int weights, int warp_column,
                                           const RowOfTap& row_of_tap) const {
    constexpr int kAlong = Tile::kAlong, kTimes = Tile::kInputs / 16;
    const int lane = threadIdx.x % kWarp, b_row = warp_column * Tile::kColumns + lane / 16 * 8 + lane % 8, b_half = lane / 8 % 2;
#pragma unroll
    for (int tap = 0; tap < 3; ++tap) {
      int row[Tile::kDown];
#pragma unroll
      for (int k = 0; k < kTimes; ++k) {
        uint32_t right[kAlong / 2][4];
#pragma unroll
        for (int j = 0; j < kAlong / 2; ++j)
          load_matrices(right[j], shared, weights + place<Tile::kWeightBytes>(tap * Tile::kChannels + b_row + j * 16, k * 2 + b_half));
#pragma unroll
        for (int i = 0; i < Tile::kDown; ++i) {
          if (k == 0) row[i] = row_of_tap(i, tap);
          uint32_t left[4];
          load_matrices(left, shared, row[i] ^ k * 32);
#pragma unroll
          for (int j = 0; j < kAlong; ++j) multiply_add(T{}, c[i][j], left, right[j / 2][j % 2 * 2], right[j / 2][j % 2 * 2 + 1]);
        }
      }
    }
  }
  // The batch-norm and the activation of kOwn channels of this lane's pixels, which stay in c and go to u.
  __device__ __forceinline__ void finish_channels(float (&c)[Tile::kDown][Tile::kAlong][4], int q, int m, int own_channel, int first_row,
                                                  T* u) const {
    constexpr int kOwn = Tile::kOwn;
    float scale[kOwn], shift[kOwn];
    const float* const folded = reinterpret_cast<const float*>(shared + Layout::kNorms) + 2 * m * Tile::kChannels + own_channel;
#pragma unroll
    for (int k = 0; k < kOwn; k += 4) {
      memcpy(scale + k, __builtin_assume_aligned(folded + k, 16), 16);
      memcpy(shift + k, __builtin_assume_aligned(folded + Tile::kChannels + k, 16), 16);
    }
    const bool has_channels = here.first_channel + own_channel < here.end_channel;
    const int count = here.count;
    T* const to = u + here.first_channel + own_channel;
#pragma unroll
    for (int i = 0; i < Tile::kDown; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int p = first_row + i * 16 + threadIdx.x % kWarp / 4 + 8 * h;
        float z[kOwn], value[kOwn], none[kOwn] = {};
#pragma unroll
        for (int k = 0; k < kOwn; ++k) z[k] = c[i][q * Tile::kJoined + k / 2][2 * h + k % 2] * scale[k] + shift[k];
        activate(f.act.kind, static_cast<float>(f.act.negative_slope), z, value, none);
        T narrowed[kOwn];
#pragma unroll
        for (int k = 0; k < kOwn; ++k) {
          c[i][q * Tile::kJoined + k / 2][2 * h + k % 2] = value[k];
          narrow(value[k], narrowed[k]);
        }
        if (has_channels && p < count) store_values(to + int64_t{p} * f.C, narrowed);
      }
  }

  // u of the item's branches: of branch m, the tile's first pixel and its channel 0 are at u_of(m); and of every image of the tile the sums
  // over branches and pixels, at sums() + image * C. Both are asked when they are needed, as registers are few. The block's threads
  // are to meet before what comes next uses the shared memory. before_last() is called once, before the last of the products.
  template <class UOf, class Sums, class F>
  __device__ __forceinline__ void run(const UOf& u_of, const Sums& sums_at, const F& before_last) const {
    constexpr int kDown = Tile::kDown, kAlong = Tile::kAlong, kJoined = Tile::kJoined, kOwn = Tile::kOwn;
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const int warp_row = warp / Tile::kWarpColumns, warp_column = warp % Tile::kWarpColumns, first_row = warp_row * Tile::kRows;

    int step = 0;
    const int steps = f.M * cut.chunks * 3;
    if (here.count > 0) fill(step);
    else before_last();
    close_copies();
    fold_norms();
    int* const centers = reinterpret_cast<int*>(shared + Layout::kPixels);
    if (threadIdx.x < Tile::kPixels) {
      const int p = threadIdx.x;
      centers[p] = p < here.count ? here.input(f, cut, p) << 8 | here.margins(f, cut, p) : -1;
    }
    if (threadIdx.x < 32) reinterpret_cast<float*>(shared + Layout::kZeros)[threadIdx.x] = 0;
    __syncthreads();
    const int a_half = (Tile::kSeveral ? warp_column * Tile::kColumns / 8 : 0) + lane / 16;

#pragma unroll 1
    for (int m = 0; m < f.M && here.count > 0; ++m) {
      float c[kDown][kAlong][4] = {};
      const int dilation = f.dilations[m];
      // Of the pixels whose rows of A this lane gives the addresses of: where they are in x, and the taps that are.
      int center[kDown];
#pragma unroll
      for (int i = 0; i < kDown; ++i) {
        const int known = centers[first_row + i * 16 + lane % 16];
        center[i] = known < 0 ? 0 : known >> 8 << 9 | taps_inside(known & 255, dilation);
      }
#pragma unroll 1
      for (const int end = step + cut.chunks * 3; step < end; ++step) {
        wait_for_copies<0>();
        __syncthreads();
        // What is filled now was used in the last step.
        if (step + 1 < steps) fill(step + 1);
        else before_last();
        close_copies();
        const int tap_row = step % 3, wide = here.wide, x = x_stage(step), weights = weight_stage(step);
        const auto row_of_tap = [&](int i, int tap) {
          const int offset = ((tap_row - 1) * wide + tap - 1) * dilation;
          const bool there = center[i] >> (tap_row * 3 + tap) & 1;
          return there ? x + place<Tile::kPixelBytes>((center[i] >> 9) + offset, a_half) : Layout::kZeros;
        };
        multiply(c, weights, warp_column, row_of_tap);
      }

#pragma unroll
      for (int q = 0; q < kAlong / kJoined; ++q) {
        const int own_channel = warp_column * Tile::kColumns + q * 4 * kOwn + lane % 4 * kOwn;
        finish_channels(c, q, m, own_channel, first_row, u_of(m));
      }
      // What a lane has of an image's pixels, and then its warp.
      const int end_row = first_row + Tile::kRows < here.count ? first_row + Tile::kRows : here.count;
      if (first_row >= end_row) continue;
#pragma unroll 1
      for (int image = here.image_of(cut, first_row); here.first_of(cut, image) < end_row; ++image) {
        const int low = here.first_of(cut, image), high = here.end_of(cut, image);
        float* const by_row = reinterpret_cast<float*>(shared + layout.sums);
        float* const to = by_row + (warp_row + image - here.first_image(cut)) * Tile::kChannels + warp_column * Tile::kColumns;
        const auto sum_up = [&]<bool kWhole>() {
#pragma unroll
          for (int q = 0; q < kAlong / kJoined; ++q) {
            float total[kOwn] = {};
#pragma unroll
            for (int i = 0; i < kDown; ++i)
#pragma unroll
              for (int h = 0; h < 2; ++h) {
                const int p = first_row + i * 16 + lane / 4 + 8 * h;
                const bool of_it = kWhole || (p >= low && p < high);
#pragma unroll
                for (int k = 0; k < kOwn; ++k) total[k] += of_it ? c[i][q * kJoined + k / 2][2 * h + k % 2] : 0;
              }
            const float sum = scatter_sums(lane, total);
            float& all = to[q * 4 * kOwn + lane % 4 * kOwn + lane / (32 / kOwn)];
            if (lane / 4 % (8 / kOwn) == 0) all = m == 0 ? sum : all + sum;
          }
        };
        if (low <= first_row && high >= first_row + Tile::kRows) sum_up.template operator()<true>();
        else sum_up.template operator()<false>();
      }
    }

    // Rows of warps, one after the other, of which an image has neighbouring ones.
    __syncthreads();
    const float* const by_row = reinterpret_cast<const float*>(shared + layout.sums);
    float* const sums = sums_at();
    const int first_image = here.first_image(cut), images = here.last_image(cut) - first_image + 1;
#pragma unroll 1
    for (int i = threadIdx.x; i < images * Tile::kChannels; i += kThreads) {
      const int of = i / Tile::kChannels, image = first_image + of, n = i % Tile::kChannels, channel = here.first_channel + n;
      const int low = here.first_of(cut, image), high = here.end_of(cut, image);
      if (channel >= here.end_channel) continue;
      float total = 0;
      for (int row = low / Tile::kRows; row * Tile::kRows < high; ++row) total += by_row[(row + of) * Tile::kChannels + n];
      sums[int64_t{image} * f.C + channel] = total;
    }
  }

  static __device__ __forceinline__ void store_values(T* to, const T (&values)[8]) {
    uint4 bytes;
    memcpy(&bytes, values, sizeof(bytes));
    store_vector(to, bytes);
  }
  static __device__ __forceinline__ void store_values(T* to, const T (&values)[4]) {
    uint2 bytes;
    memcpy(&bytes, values, sizeof(bytes));
    *reinterpret_cast<uint2*>(to) = bytes;
  }
};

}  // namespace sk::cuda
