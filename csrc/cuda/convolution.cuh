// The branches' convolutions, 3 x 3 in channels_last, as products on the matrix units out of shared memory, tile by tile: with the
// batch-norm and the activation in the epilogue, and the sums over the tile's pixels.
#pragma once

#include "intrinsics.cuh"

namespace sk::cuda {

// Channels that a step of a convolution takes: what one matrix instruction sums over.
constexpr int kInputs = 16;
constexpr int kTaps = 9;

// A convolution tile: kPixels of an image by kChannels, by as many warps as there are, each with 16 or 32 of both.
template <int kPixels_, int kChannels_> struct Tile {
  static constexpr int kPixels = kPixels_, kChannels = kChannels_;
  static constexpr int kWarpColumns = kChannels <= 32 ? 1 : kChannels / 32, kWarpRows = kWarps / kWarpColumns;
  static constexpr int kRows = kPixels / kWarpRows, kColumns = kChannels / kWarpColumns;
  // Matrix instructions along both, in a warp.
  static constexpr int kDown = kRows / 16, kAlong = kColumns / 8;
  static_assert(kRows % 16 == 0 && kColumns % 16 == 0);
};

// How an image is cut into tiles.
struct Cut {
  // The output's size. A tile is `run` pixels, row by row, of one of `strips` strips of columns, whose widths differ by one at most.
  int height, columns, run, strips, strip_tiles;
  // A group of the convolution, or a few small ones together, or all of it: `blocks` of `inputs` and `outputs` channels, each of
  // `block_tiles` tiles.
  int channels, blocks, inputs, outputs, block_tiles;
  // Pixels of x that a tile reads, at most, in rows and columns; the reach of the longest dilation.
  int rows, row_pixels, reach;

  __host__ __device__ int64_t area() const { return int64_t{height} * columns; }
  __host__ __device__ int pixel_tiles() const { return strips * strip_tiles; }
  __host__ __device__ int channel_tiles() const { return blocks * block_tiles; }
  __host__ __device__ int strip_start(int strip) const { return static_cast<int>(int64_t{strip} * columns / strips); }
  // Of a tile of kChannels channels.
  __host__ __device__ int first_channel(int tile, int kChannels) const {
    return tile / block_tiles * outputs + tile % block_tiles * kChannels;
  }
  __host__ __device__ int end_channel(int tile, int kChannels) const {
    const int tile_end = first_channel(tile, kChannels) + kChannels, block_end = (tile / block_tiles + 1) * outputs;
    const int end = tile_end < block_end ? tile_end : block_end;
    return end < channels ? end : channels;
  }

  // Bytes of shared memory for a tile: the sums of every row of warps; two stages, each of x, 32 bytes a pixel, and of the weights,
  // 32 bytes a tap and channel.
  __host__ __device__ int64_t shared(int kChannels) const {
    return kSumBytes + 2 * (int64_t{rows} * row_pixels + kTaps * kChannels) * kInputs * 2;
  }
  static constexpr int kSumBytes = 256 * sizeof(float);
};

// Halves of 32 bytes change places every four rows: eight neighbouring rows of a matrix then lie in all banks.
__device__ __forceinline__ int place(int row, int half) { return row * kInputs + ((half ^ (row >> 2 & 1)) * 8); }

// A tile of image b: `pixels` of them, from pixel `start` of a strip on, by the channels [first_channel, end_channel) of a block. It goes
// in steps, branch * chunks + chunk, through two stages of shared memory, of which one is filled while the other is used.
template <class T, class Tile> struct Convolution {
  const Unit& f;
  const Cut& cut;
  const T* image;
  float* by_row;
  T *x, *weights;
  int first_column, strip_width, start, pixels, block, first_channel, end_channel, chunks;

  // `shared`: cut.shared(kChannels) bytes.
  __device__ __forceinline__ Convolution(const Unit& f, const Cut& cut, int64_t b, int pixel_tile, int channel_tile, unsigned char* shared)
      : f(f), cut(cut), image(static_cast<const T*>(f.x) + b * f.H * f.W * f.channels), chunks(cut.inputs / kInputs) {
    const int strip = pixel_tile / cut.strip_tiles;
    first_column = cut.strip_start(strip);
    strip_width = cut.strip_start(strip + 1) - first_column;
    start = pixel_tile % cut.strip_tiles * cut.run;
    const int left = cut.height * strip_width - start;
    pixels = left < 0 ? 0 : left < cut.run ? left : cut.run;
    block = channel_tile / cut.block_tiles;
    first_channel = cut.first_channel(channel_tile, Tile::kChannels);
    end_channel = cut.end_channel(channel_tile, Tile::kChannels);
    by_row = reinterpret_cast<float*>(shared);
    x = reinterpret_cast<T*>(shared + Cut::kSumBytes);
    weights = x + 2 * cut.rows * cut.row_pixels * kInputs;
  }

  // In the image, the p-th of them.
  __device__ __forceinline__ int pixel(int p) const {
    return (start + p) / strip_width * cut.columns + first_column + (start + p) % strip_width;
  }

  __device__ __forceinline__ T* x_stage(int step) const { return x + step % 2 * (cut.rows * cut.row_pixels * kInputs); }
  __device__ __forceinline__ T* weight_stage(int step) const { return weights + step % 2 * (kTaps * Tile::kChannels * kInputs); }

  // Where all branches share x and it is of one chunk, it is there since the first step.
  __device__ __forceinline__ int x_step(int step) const { return !f.split && chunks == 1 ? 0 : step; }

  __device__ __forceinline__ void fill(int step) const {
    const int m = step / chunks, chunk = step % chunks * kInputs;
    if (x_step(step) == step) {
      const int share = f.split ? f.channels / f.M : f.channels, from = block * cut.inputs + chunk;
      const T* const source = image + (f.split ? m * share : 0) + from;
      const int first_row = start / strip_width, last_row = (start + pixels - 1) / strip_width;
      const int top = first_row * f.stride - cut.reach, left = first_column * f.stride - cut.reach;
      const int rows = (last_row - first_row) * f.stride + 1 + 2 * cut.reach, columns = (strip_width - 1) * f.stride + 1 + 2 * cut.reach;
      T* const to = x_stage(step);
#pragma unroll 1
      for (int i = threadIdx.x; i < rows * columns * 2; i += kThreads) {
        const int half = i % 2, column = i / 2 % columns, row = i / 2 / columns, y = top + row, z = left + column;
        const bool there = y >= 0 && y < f.H && z >= 0 && z < f.W && from + half * 8 < share;
        copy_async(to + place(row * cut.row_pixels + column, half), there ? source + (int64_t{y} * f.W + z) * f.channels + half * 8 : image,
                   there);
      }
    }
    const T* const source = static_cast<const T*>(f.weights[m]);
    T* const to = weight_stage(step);
#pragma unroll 1
    for (int i = threadIdx.x; i < kTaps * Tile::kChannels * 2; i += kThreads) {
      const int half = i % 2, n = i / 2 % Tile::kChannels, tap = i / 2 / Tile::kChannels, channel = first_channel + n;
      const T* const row = source + (int64_t{channel} * kTaps + tap) * f.inputs;
      T* const at = to + place(tap * Tile::kChannels + n, half);
      if (f.inputs >= kInputs) {
        const bool there = channel < end_channel;
        copy_async(at, there ? row + chunk + half * 8 : source, there);
        continue;
      }
      // Small groups, several in 16 channels: a block-diagonal matrix. These 8 inputs are those of a group of 8 or of two of 4.
      const bool there = channel < end_channel && channel / 8 == block * 2 + half;
      if (f.inputs == 8) {
        copy_async(at, there ? row : source, there);
      } else {
        const uint2 four = there ? *reinterpret_cast<const uint2*>(row) : uint2{0, 0}, none{0, 0};
        reinterpret_cast<uint2*>(at)[0] = channel % 8 < 4 ? four : none;
        reinterpret_cast<uint2*>(at)[1] = channel % 8 < 4 ? none : four;
      }
    }
  }

  // The two values of a lane in row h of a fragment.
  static __device__ __forceinline__ uint32_t packed(const float (&c)[4], int h) {
    T pair[2];
    narrow(c[2 * h], pair[0]);
    narrow(c[2 * h + 1], pair[1]);
    uint32_t bits;
    memcpy(&bits, pair, sizeof(bits));
    return bits;
  }

  // u of all branches: its first channel in `u`, branches and pixels so far apart; and its sums over branches and pixels, one a channel.
  // The block's threads are to meet before what comes next uses the shared memory.
  __device__ __forceinline__ void run(T* u, int64_t branch_step, int64_t pixel_step, float* sums) const {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const int warp_row = warp / Tile::kWarpColumns, warp_column = warp % Tile::kWarpColumns;

    // The pixels whose rows of A this lane gives the addresses of, and those whose results it has.
    int corner[Tile::kDown], own[Tile::kDown][2];
#pragma unroll
    for (int i = 0; i < Tile::kDown; ++i) {
      const int row = warp_row * Tile::kRows + i * 16, p = row + lane % 16 < pixels ? row + lane % 16 : 0;
      const int y = (start + p) / strip_width - start / strip_width, x = (start + p) % strip_width;
      corner[i] = (y * cut.row_pixels + x) * f.stride;
#pragma unroll
      for (int h = 0; h < 2; ++h) own[i][h] = row + lane / 4 + 8 * h < pixels ? pixel(row + lane / 4 + 8 * h) : -1;
    }
    const int b_row = warp_column * Tile::kColumns + lane / 16 * 8 + lane % 8, b_half = lane / 8 % 2;

    float pooled[Tile::kAlong][2] = {};
    const int steps = f.M * chunks;
    if (pixels > 0) fill(0);
    close_copies();
    for (int m = 0; m < f.M && pixels > 0; ++m) {
      float c[Tile::kDown][Tile::kAlong][4] = {};
      const int shift = cut.reach - f.dilations[m];
      for (int step = m * chunks; step < (m + 1) * chunks; ++step) {
        if (step + 1 < steps) fill(step + 1);
        close_copies();
        wait_for_copies<1>();
        __syncthreads();
        const T *const x = x_stage(x_step(step)), *const weights = weight_stage(step);
#pragma unroll 1
        for (int tap = 0; tap < kTaps; ++tap) {
          const int offset = (shift + tap / 3 * f.dilations[m]) * cut.row_pixels + shift + tap % 3 * f.dilations[m];
          uint32_t right[Tile::kAlong / 2][4];
#pragma unroll
          for (int j = 0; j < Tile::kAlong / 2; ++j)
            load_matrices(right[j], weights + place(tap * Tile::kChannels + b_row + j * 16, b_half));
#pragma unroll
          for (int i = 0; i < Tile::kDown; ++i) {
            uint32_t left[4];
            load_matrices(left, x + place(corner[i] + offset, lane / 16));
#pragma unroll
            for (int j = 0; j < Tile::kAlong; ++j) multiply_add(T{}, c[i][j], left, right[j / 2][j % 2 * 2], right[j / 2][j % 2 * 2 + 1]);
          }
        }
        __syncthreads();
      }
#pragma unroll
      for (int j = 0; j < Tile::kAlong; ++j) {
        const int column = warp_column * Tile::kColumns + j * 8 + lane % 4 * 2, channel = first_channel + column;
        if (channel >= end_channel) continue;
        const Folded<float> norms[2] = {{f.norms, m, channel}, {f.norms, m, channel + 1}};
#pragma unroll
        for (int i = 0; i < Tile::kDown; ++i)
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            if (own[i][h] < 0) continue;
            float z[2], value[2], k[2] = {};
#pragma unroll
            for (int e = 0; e < 2; ++e) z[e] = (c[i][j][2 * h + e] - norms[e].mean) * norms[e].scale + norms[e].bias;
            activate(f.act.kind, static_cast<float>(f.act.negative_slope), z, value, k);
#pragma unroll
            for (int e = 0; e < 2; ++e) pooled[j][e] += c[i][j][2 * h + e] = value[e];
          }
      }
      // Two neighbouring lanes have four values of a pixel in each of two tiles of 8 columns: each gives the other its half of one, so
      // that a warp stores 32 bytes of every pixel, a whole sector of memory.
      const bool odd = lane % 2 != 0;
#pragma unroll
      for (int j = 0; j < Tile::kAlong; j += 2) {
        const int column = warp_column * Tile::kColumns + (j + odd) * 8 + lane % 4 / 2 * 4;
        const bool there = first_channel + column < end_channel;
#pragma unroll
        for (int i = 0; i < Tile::kDown; ++i)
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const uint32_t first = packed(c[i][j], h), second = packed(c[i][j + 1], h);
            const uint32_t others = __shfl_xor_sync(kAllLanes, odd ? first : second, 1);
            if (there && own[i][h] >= 0)
              *reinterpret_cast<uint2*>(u + m * branch_step + own[i][h] * pixel_step + column) =
                  odd ? uint2{others, second} : uint2{first, others};
          }
      }
    }
    wait_for_copies<0>();

#pragma unroll
    for (int j = 0; j < Tile::kAlong; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float total = pooled[j][e];
#pragma unroll
        for (int o = 4; o < kWarp; o *= 2) total += __shfl_xor_sync(kAllLanes, total, o);
        if (lane < 4) by_row[warp_row * Tile::kChannels + warp_column * Tile::kColumns + j * 8 + lane * 2 + e] = total;
      }
    __syncthreads();
    if (threadIdx.x < Tile::kChannels && first_channel + static_cast<int>(threadIdx.x) < end_channel) {
      float total = 0;
      for (int row = 0; row < Tile::kWarpRows; ++row) total += by_row[row * Tile::kChannels + threadIdx.x];
      sums[threadIdx.x] = total;
    }
  }
};

}  // namespace sk::cuda
