// unit on compute capability 9.0, stride 1: one launch prepares the weights, one does all the rest.
//
// The images lie below each other, with `reach` rows of zeros after each, and `reach` pixels of zeros after each row: in this row of pixels,
// counted from 0, a tap of a convolution is the same distance away from every pixel, and a tile is so many pixels that follow each other,
// zeros included. Its x is copied into shared memory once, 16 channels at a time, in two planes of 8 channels, 16 bytes a pixel. So the
// left operand of a product with any tap is a part of these planes that begins somewhere else, and the matrix units read it there without
// any address of a thread ("no swizzle" in PTX ISA, "Shared Memory Matrix Layout").
//
// A block has three kinds of warpgroups, which do not wait for each other but at the barriers of the stages:
//
//   the first copies x and the weights of what comes next into stages of shared memory;
//   the next ones multiply, each its own pixels of the tile; in the end they normalize, activate, store u and its sums over pixels;
//   the last computes the attention of the images that are complete, and selects, image row by image row: one warp has what is needed
//   copied, three compute.
//
// The work is two lists, of which a block takes the next item by a counter each: `units` of convolutions, tile by tile; and steps, of which
// step i has the attention of image i, and then the parts of the selection of image i - lag. Here
//
//   a unit of tile t waits for the selection of the images in tile t - slots, whose place in the ring it takes;
//   the attention of an image waits for the units of its tiles;
//   a part of the selection of an image waits for its attention.
//
// The ring has room for lag + 1 images and two tiles, or more. So the last tile of image i + lag comes before tile t if i is in tile
// t - slots. The first unit that is not finished, of tile t, therefore waits for steps that wait for units before it alone, which are
// finished, and for steps before them: such a step waits for nothing that is not. All that is waited for has been taken by a block that
// runs. Hence something always goes on, however many blocks the device holds, be it one, and in whatever order they run.

#include "attention.cuh"
#include "unit.cuh"

namespace sk::cuda {

// Pixels that a matrix instruction multiplies, and threads that issue it.
constexpr int kRowsAtOnce = 64, kGroup = 128;

// A tile: kGroups warpgroups with kBlocks times 64 pixels each, kChannels channels. kTogether: of one chunk of inputs all branches.
template <int kChannels_, int kBlocks_, int kGroups_, bool kTogether_> struct HopperTile : Columns<kChannels_> {
  static constexpr int kChannels = kChannels_, kBlocks = kBlocks_, kGroups = kGroups_;
  static constexpr bool kTogether = kTogether_;
  static constexpr int kGroupRows = kRowsAtOnce * kBlocks, kRows = kGroups * kGroupRows;
  static constexpr int kThreads = (1 + kGroups + 1) * kGroup;
  // Sets of sums: if a unit has one tile of channels, its end is enough of a distance.
  static constexpr int kSets = kTogether ? 2 : 1;
  // What is selected comes in chunks of no more bytes of a branch: the stages need their room.
  static constexpr int kChunkBytes = kChannels > 64 ? 4096 : 8192, kBufferBytes = kChannels > 64 ? 16 * 1024 : 48 * 1024;
  // Of 16 inputs.
  static constexpr int kTapBytes = kChannels * 32, kWeightBytes = kTaps * kTapBytes;
  // Registers of a thread: of all warpgroups what the block is launched with, at a multiple of 8.
  static constexpr int kLaunched = 65536 / kThreads / 8 * 8;
  static constexpr int kCopying = 48, kSelecting = 104, kMultiplying = (kLaunched * (2 + kGroups) - kCopying - kSelecting) / kGroups / 8 * 8;
};

// The parameters as they are read: for a tile of channels, branch and chunk nine taps of (2, kChannels, 8) inputs; of the branches' norms
// scale and shift, (2, M, C); of the attention (D, C), scale and shift of its norm (2, D), and (D, M, C).
struct Prepared {
  uint4* weights;
  float *norms, *reduce, *hidden_norm, *select;
};

// A pixel of the row of all: which one it is of v's, or -1 if it is none, and its image.
struct Row {
  int pixel, image;
};

struct HopperRing {
  Unit unit;
  // Pixels from one row to the next, rows from one image to the next, and pixels.
  Divisor row, rows_of_image, image;
  int reach, pixels, last_of_image;
  // Pixels of x around a tile: before it, and all.
  int around, read;
  // Tiles of pixels and of channels; a unit has `together` of the latter, so a tile of pixels has units_of_tile.
  int tiles, channel_tiles, together, units;
  Divisor units_of_tile;
  // The inputs of a tile are those of block_outputs outputs, block_inputs; chunks of 16. The channels of x that a branch reads.
  Divisor block_outputs;
  int block_inputs, chunks, share;
  // Shared memory, from the beginning: barriers, and then bytes of where things are.
  int norms, sums, images, addresses, memory, stages_at;
  // A stage: two planes of x, and weights.
  int stages, stage, plane;
  // Whether the warpgroups multiply in turns.
  bool in_turns;
  // Tiles that have a place, and their pixels; how many steps later the selection comes; rows of an image in a part of it, and parts of an
  // image; items of a step, and all; threads that share a pixel.
  Divisor slots;
  int slot_rows, lag, part_rows, parts;
  Divisor step_items, lanes;
  int items;
  // Pixels of a chunk that is selected, and chunks of a row; bytes of a branch of it, and buffers for chunks.
  int chunk_pixels, row_chunks, chunk_bytes, buffers, buffers_at;
  Prepared prepared;
  // Vectors of weights, and counts, from next_unit on.
  int weight_vectors, counts;
  // u, T (M, slot_rows, C); sums over pixels of a warpgroup's rows and an image: row (tile * kGroups + group) + image; (B, M, C).
  void* u;
  float *row_sums, *a;
  // The next ones; of every tile its finished units; of every image whether its attention is there, and its finished parts of the selection.
  unsigned *next_unit, *next_item, *convolved, *attended_to, *selected;

  __device__ __forceinline__ int first_row(int i) const { return i * image; }
  __device__ __forceinline__ int last_row(int i) const { return i * image + last_of_image; }
  __device__ __forceinline__ void wait_for_place(int tile, int rows) const {
    const int low = (tile - slots) * rows;
    for (int i = low / image; i < unit.B && first_row(i) < low + rows; ++i) wait_for(selected + i, parts);
  }
  __device__ __forceinline__ Row find(int at) const {
    const int from = at < 0 ? 0 : at, y_of_all = from / row, x = from - y_of_all * row, i = y_of_all / rows_of_image, y = y_of_all - i * rows_of_image;
    const int H = static_cast<int>(unit.H), W = static_cast<int>(unit.W);
    return {at >= 0 && x < W && y < H && i < unit.B ? (i * H + y) * W + x : -1, i};
  }
};

// Where barriers are: of every stage, that it is full, and that it is empty; of two warpgroups, that it is their turn; of every buffer
// for chunks, that it is full, and that it is empty. Then what a stage belongs to, the unit that is next, and what the chunks are.
constexpr int kMostStages = 8, kMostBuffers = 4;
constexpr int kFull = 0, kEmpty = 64, kTurn = 128, kChunkFull = 144, kChunkEmpty = 176, kUnitOf = 208, kNextUnit = 240, kChunks = 256, kFirst = 384;

template <class T, class Tile> __device__ __forceinline__ void copy_units(const HopperRing& f, unsigned char* shared) {
  const int thread = static_cast<int>(threadIdx.x) % kGroup, half = thread % 2;
  int* const addresses = reinterpret_cast<int*>(shared + f.addresses);
  volatile int* const unit_of = reinterpret_cast<volatile int*>(shared + kUnitOf);
  volatile int* const told = reinterpret_cast<volatile int*>(shared + kNextUnit);
  const int together = Tile::kTogether ? f.unit.M : 1, passes = Tile::kTogether ? 1 : f.unit.M, bytes = Tile::kWeightBytes * together;
  int stage = 0, phase = 0;
  unsigned next = thread == 0 ? take_number(f.next_unit) : 0;
  const auto advance = [&] {
    if (++stage == f.stages) stage = 0, phase ^= 1;
  };
  for (;;) {
    if (thread == 0) *told = next < static_cast<unsigned>(f.units) ? static_cast<int>(next) : f.units;
    meet_others<kGroup>(2 + Tile::kGroups);
    const int unit = *told;
    // All have read it.
    meet_others<kGroup>(2 + Tile::kGroups);
    if (unit == f.units) break;
    if (thread == 0) next = take_number(f.next_unit);
    const int tile = unit / f.units_of_tile, first = (unit - tile * f.units_of_tile) * f.together;
    // Every thread copies the same pixels of all chunks.
#pragma unroll 2
    for (int r = thread / 2; r < f.read; r += kGroup / 2) addresses[2 * r + half] = f.find(tile * Tile::kRows - f.around + r).pixel;
    bool waits = tile >= f.slots;
    for (int channels = first; channels < first + f.together && channels < f.channel_tiles; ++channels)
      for (int pass = 0; pass < passes; ++pass)
        for (int chunk = 0; chunk < f.chunks; ++chunk) {
          wait_at(shared, kEmpty + 8 * stage, phase ^ 1);
          const int to = f.stages_at + stage * f.stage, input = channels * Tile::kChannels / f.block_outputs * f.block_inputs + chunk * 16;
          const T* const from = static_cast<const T*>(f.unit.x) + (f.unit.split ? pass * f.share : 0) + input + half * 8;
#pragma unroll 4
          for (int r = thread / 2; r < f.read; r += kGroup / 2) {
            const int pixel = addresses[2 * r + half];
            copy_async<16>(shared, to + half * f.plane + r * 16, from + int64_t{pixel < 0 ? 0 : pixel} * f.unit.channels, pixel >= 0);
          }
          arrive_after_copies(shared, kFull + 8 * stage);
          if (thread == 0) {
            unit_of[stage] = unit;
            // Of all of a unit the first stage comes when there is a place in the ring.
            if (waits) f.wait_for_place(tile, Tile::kRows);
            waits = false;
            const int64_t block = (int64_t{channels} * f.unit.M + pass) * f.chunks + chunk;
            arrive_expecting(shared, kFull + 8 * stage, bytes);
            copy_bulk(shared, to + 2 * f.plane, f.prepared.weights + block * (Tile::kWeightBytes / 16), bytes, kFull + 8 * stage);
          }
          advance();
        }
  }
  // There is nothing more to do.
  wait_at(shared, kEmpty + 8 * stage, phase ^ 1);
  if (thread == 0) unit_of[stage] = f.units;
  arrive_at(shared, kFull + 8 * stage);
  if (thread == 0) arrive_at(shared, kFull + 8 * stage);
}

// What a warpgroup multiplies: rows [first_row, first_row + kGroupRows) of a tile.
template <class T, class Tile> struct Multiplier {
  static constexpr int kBlocks = Tile::kBlocks, kAlong = Tile::kAlong, kJoined = Tile::kJoined, kOwn = Tile::kOwn, kChannels = Tile::kChannels;
  using Products = float[kBlocks][kAlong][4];

  const HopperRing& f;
  unsigned char* const shared;
  const int group, warp, lane;
  int stage = 0, phase = 0;
  // The images of a unit; of each of this lane's rows a byte, as registers are few: which one it is of, or kNone.
  static constexpr unsigned kNone = 255;
  unsigned images[(2 * kBlocks + 3) / 4];
  int first_image, last_image;

  __device__ __forceinline__ Multiplier(const HopperRing& f, unsigned char* shared, int group)
      : f(f),
        shared(shared),
        group(group),
        warp(same_in_warp(static_cast<int>(threadIdx.x) % kGroup / kWarp)),
        lane(static_cast<int>(threadIdx.x) % kWarp) {}

  __device__ __forceinline__ unsigned image_of(int block, int half) const {
    return images[(2 * block + half) / 4] >> (2 * block + half) % 4 * 8 & 255;
  }
  __device__ __forceinline__ int row_of(int block, int half) const { return block * kRowsAtOnce + warp * 16 + lane / 4 + 8 * half; }
  __device__ __forceinline__ void advance() {
    if (++stage == f.stages) stage = 0, phase ^= 1;
  }
  __device__ __forceinline__ void wait_for_stage() const {
    wait_at(shared, kFull + 8 * stage, phase);
    copies_before_products();
  }
  // This warp does not read the stage any more, or the one before it.
  __device__ __forceinline__ void leave(int left) const {
    if (lane == 0) arrive_at(shared, kEmpty + 8 * left);
  }
  __device__ __forceinline__ int last_stage() const { return stage == 0 ? f.stages - 1 : stage - 1; }

  // c (+)= the products of a stage's 16 inputs with all taps of branch m, whose weights are the `of_stage`-th there.
  __device__ __forceinline__ void multiply(Products& c, int m, int of_stage, bool adds) const {
    const int x = f.stages_at + stage * f.stage, dilation = f.unit.dilations[m], down = f.row * dilation;
    const SharedMatrix left(shared, x, f.plane), right(shared, x + 2 * f.plane + of_stage * Tile::kWeightBytes, kChannels * 16);
    const int first = group * Tile::kGroupRows + f.around - down - dilation;
    before_products();
#pragma unroll
    for (int tap = 0; tap < kTaps; ++tap) {
      const int at = first + tap / 3 * down + tap % 3 * dilation;
#pragma unroll
      for (int block = 0; block < kBlocks; ++block)
        multiply_add_shared(T{}, c[block], left.from(at + block * kRowsAtOnce), right.from(tap * kChannels * 2), tap > 0 || adds);
    }
    close_products();
  }

  // u of branch m from its products, and its sums over the pixels of every image, into sums (images, 4 warps, kChannels) or, if it is not
  // the first branch, added to them.
  __device__ __forceinline__ void finish(Products& c, int m, int tile, int channels, float* sums) const {
    const int own = lane % 4 * kOwn;
    const float* const scale = reinterpret_cast<const float*>(shared + f.norms) + m * f.unit.C + channels * kChannels + own;
    const float* const shift = scale + f.unit.M * f.unit.C;
    const int64_t first_row = int64_t{m} * f.slot_rows + tile % f.slots * Tile::kRows + group * Tile::kGroupRows;
    T* const u = static_cast<T*>(f.u) + first_row * f.unit.C + channels * kChannels + own;
#pragma unroll
    for (int q = 0; q < kAlong / kJoined; ++q) {
      float factors[kOwn], terms[kOwn];
#pragma unroll
      for (int k = 0; k < kOwn; k += 4) {
        memcpy(factors + k, __builtin_assume_aligned(scale + q * 8 * kJoined + k, 16), 16);
        memcpy(terms + k, __builtin_assume_aligned(shift + q * 8 * kJoined + k, 16), 16);
      }
#pragma unroll
      for (int block = 0; block < kBlocks; ++block)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float z[kOwn], value[kOwn], none[kOwn] = {};
#pragma unroll
          for (int k = 0; k < kOwn; ++k) z[k] = c[block][q * kJoined + k / 2][2 * half + k % 2] * factors[k] + terms[k];
          activate(f.unit.act.kind, static_cast<float>(f.unit.act.negative_slope), z, value, none);
          T narrowed[kOwn];
#pragma unroll
          for (int k = 0; k < kOwn; ++k) c[block][q * kJoined + k / 2][2 * half + k % 2] = value[k];
#pragma unroll
          for (int k = 0; k < kOwn; k += 2) narrow_pair(value[k], value[k + 1], narrowed + k);
          if (image_of(block, half) != kNone) store_own(u + row_of(block, half) * f.unit.C + q * 8 * kJoined, narrowed);
        }
    }
#pragma unroll 1
    for (int image = first_image; image <= last_image; ++image)
#pragma unroll
      for (int q = 0; q < kAlong / kJoined; ++q) {
        float total[kOwn] = {};
#pragma unroll
        for (int block = 0; block < kBlocks; ++block)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const bool of_it = static_cast<int>(image_of(block, half)) == image - first_image;
#pragma unroll
            for (int k = 0; k < kOwn; ++k) total[k] += of_it ? c[block][q * kJoined + k / 2][2 * half + k % 2] : 0;
          }
        const float sum = scatter_sums(lane, total);
        float& all = sums[((image - first_image) * 4 + warp) * kChannels + q * 8 * kJoined + own + lane / (32 / kOwn)];
        if (lane / 4 % (8 / kOwn) == 0) all = m == 0 ? sum : all + sum;
      }
  }

  static __device__ __forceinline__ void store_own(T* to, const T (&values)[8]) {
    uint4 bytes;
    memcpy(&bytes, values, sizeof(bytes));
    store_vector(to, bytes);
  }
  static __device__ __forceinline__ void store_own(T* to, const T (&values)[4]) {
    uint2 bytes;
    memcpy(&bytes, values, sizeof(bytes));
    *reinterpret_cast<uint2*>(to) = bytes;
  }

  __device__ __forceinline__ void run() {
    const int M = f.unit.M, thread = static_cast<int>(threadIdx.x) % kGroup;
    // Of two tiles' sums one set is read while the other is written.
    float* const sets = reinterpret_cast<float*>(shared + f.sums) + group * Tile::kSets * f.images * 4 * kChannels;
    int set = 0, turns = 0;
    for (;;) {
      wait_at(shared, kFull + 8 * stage, phase);
      const int unit = same_in_warp(reinterpret_cast<const volatile int*>(shared + kUnitOf)[stage]);
      if (unit == f.units) return;
      const int tile = unit / f.units_of_tile, first = (unit - tile * f.units_of_tile) * f.together;
      const int first_row = tile * Tile::kRows + group * Tile::kGroupRows;
      const int end = (first_row + Tile::kGroupRows - 1) / f.image, all = static_cast<int>(f.unit.B);
      first_image = first_row / f.image;
      last_image = end < all ? end : all - 1;
#pragma unroll
      for (int block = 0; block < kBlocks; ++block)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const Row row = f.find(first_row + row_of(block, half));
          unsigned& four = images[(2 * block + half) / 4];
          if ((2 * block + half) % 4 == 0) four = 0;
          four |= (row.pixel < 0 ? kNone : row.image - first_image) << (2 * block + half) % 4 * 8;
        }

      for (int channels = first; channels < first + f.together && channels < f.channel_tiles; ++channels) {
        float* const sums = sets + set * f.images * 4 * kChannels;
        set = Tile::kSets - 1 - set;
        if constexpr (Tile::kTogether) {
          // The next branch is multiplied while this one is finished.
          Products c[2];
          wait_for_stage();
          for (int m = 0; m < M; m += 2) {
            const int next = m + 1 < M ? m + 1 : m;
            multiply(c[0], m, m, false);
            multiply(c[1], next, next, false);
            wait_for_products<1>();
            finish(c[0], m, tile, channels, sums);
            wait_for_products<0>();
            if (m + 2 >= M) leave(stage);
            if (m + 1 < M) finish(c[1], m + 1, tile, channels, sums);
          }
          advance();
        } else {
          Products c;
          for (int m = 0; m < M; ++m) {
            if (f.in_turns) wait_at(shared, kTurn + 8 * group, (turns++ & 1) ^ (group == 0));
            for (int chunk = 0; chunk < f.chunks; ++chunk) {
              wait_for_stage();
              multiply(c, m, 0, chunk > 0);
              if (chunk > 0) {
                wait_for_products<1>();
                leave(last_stage());
              }
              advance();
            }
            if (f.in_turns && lane == 0) arrive_at(shared, kTurn + 8 * (1 - group));
            wait_for_products<0>();
            leave(last_stage());
            finish(c, m, tile, channels, sums);
          }
        }
        meet_others<kGroup>(1 + group);
#pragma unroll 1
        for (int i = thread; i < (last_image - first_image + 1) * kChannels; i += kGroup) {
          const int image = first_image + i / kChannels, n = i % kChannels;
          const float* const of = sums + i / kChannels * 4 * kChannels + n;
          f.row_sums[(int64_t{tile} * Tile::kGroups + group + image) * f.unit.C + channels * kChannels + n] =
              of[0] + of[kChannels] + of[2 * kChannels] + of[3 * kChannels];
        }
      }
      meet_others<kGroup>(1 + group);
      if (thread == 0) add_to_count(f.convolved + tile);
    }
  }
};

// The attention and the selection. What is selected comes in chunks: pixels of a row of an image, of all branches. The attention counts as a
// chunk, too.
template <class T, class Tile> struct Selector {
  static constexpr int V = 8, kWarpsThatCompute = kGroup / kWarp - 1, kCount = kWarpsThatCompute * kWarp;
  // The last chunk of a part; another one; the attention of an image; the end.
  enum Kind : int { kLast, kSelect, kAttend, kEnd };
  struct Chunk {
    int kind, image, pixel, pixels;
  };

  const HopperRing& f;
  unsigned char* const shared;
  int buffer = 0, phase = 0;

  static __device__ __forceinline__ void meet() { meet_others<kCount>(1 + Tile::kGroups); }
  __device__ __forceinline__ void advance() {
    if (++buffer == f.buffers) buffer = 0, phase ^= 1;
  }
  __device__ __forceinline__ Chunk* chunk() const { return reinterpret_cast<Chunk*>(shared + kChunks) + buffer; }
  __device__ __forceinline__ int full() const { return kChunkFull + 8 * buffer; }
  __device__ __forceinline__ int empty() const { return kChunkEmpty + 8 * buffer; }
  __device__ __forceinline__ int branch_at(int m) const { return f.buffers_at + (buffer * f.unit.M + m) * f.chunk_bytes; }

  // By one thread: takes items and has their chunks copied.
  __device__ __forceinline__ void copy() {
    for (;;) {
      const unsigned item = take_number(f.next_item);
      const bool ends = item >= static_cast<unsigned>(f.items);
      const int step = static_cast<int>(item) / f.step_items, part = static_cast<int>(item) - step * f.step_items - 1;
      const int image = part < 0 ? step : step - f.lag;
      if (ends || part < 0) {
        if (!ends && image >= f.unit.B) continue;
        wait_at(shared, empty(), phase ^ 1);
        *chunk() = {ends ? kEnd : kAttend, image, 0, 0};
        arrive_at(shared, full());
        advance();
        if (ends) return;
        continue;
      }
      if (image < 0 || image >= f.unit.B) continue;
      wait_for(f.attended_to + image, 1);
      copies_after_stores();
      const int C = f.unit.C, H = static_cast<int>(f.unit.H), W = static_cast<int>(f.unit.W);
      const int behind = (part + 1) * f.part_rows < H ? (part + 1) * f.part_rows : H;
#pragma unroll 1
      for (int y = part * f.part_rows; y < behind; ++y)
#pragma unroll 1
        for (int x = 0; x < W; x += f.chunk_pixels) {
          const int pixels = W - x < f.chunk_pixels ? W - x : f.chunk_pixels;
          wait_at(shared, empty(), phase ^ 1);
          *chunk() = {y + 1 == behind && x + pixels == W ? kLast : kSelect, image, (image * H + y) * W + x, pixels};
          arrive_expecting(shared, full(), f.unit.M * pixels * C * 2);
          // In the ring it may go round the end.
          const int row = f.first_row(image) + y * f.row + x, at = row - row / f.slot_rows * f.slot_rows;
          const int before = f.slot_rows - at < pixels ? f.slot_rows - at : pixels;
#pragma unroll 1
          for (int m = 0; m < f.unit.M; ++m) {
            const T* const u = static_cast<const T*>(f.u) + int64_t{m} * f.slot_rows * C;
            copy_bulk(shared, branch_at(m), u + int64_t{at} * C, before * C * 2, full());
            if (before < pixels) copy_bulk(shared, branch_at(m) + before * C * 2, u, (pixels - before) * C * 2, full());
          }
          advance();
        }
    }
  }

  // By the other warps, of which this is thread `thread`.
  __device__ __forceinline__ void run(int thread) {
    const int C = f.unit.C, M = f.unit.M, rows = kCount / f.lanes, own = thread / f.lanes;
    // Those of the first branches are kept as long as chunks are of this image, and the thread has the same channels.
    constexpr int kKept = 2, kAtOnce = 2;
    float weights[kKept][V];
    int weights_of = -1;
    for (;; advance()) {
      wait_at(shared, full(), phase);
      const Chunk now = *chunk();
      if (now.kind == kEnd) return;
      // What was copied is here: its place in the ring may be taken.
      if (now.kind == kLast && thread == 0) take_number(f.selected + now.image);
      if (now.kind == kAttend) {
        attend(now.image, thread);
        meet();
        if (thread == 0) add_to_count(f.attended_to + now.image);
      } else if (own < rows) {
#pragma unroll 1
        for (int c = (thread - own * f.lanes) * V; c < C; c += f.lanes * V) {
          const auto load_weights = [&](int m, float(&to)[V]) {
            const float4* const from = reinterpret_cast<const float4*>(f.a + (int64_t{now.image} * M + m) * C + c);
            const float4 halves[2] = {load_fresh(from), load_fresh(from + 1)};
            memcpy(to, halves, sizeof(to));
          };
          if (now.image != weights_of || f.lanes * V < C) {
#pragma unroll
            for (int m = 0; m < kKept; ++m) load_weights(m < M ? m : 0, weights[m]);
          }
          T* const v = static_cast<T*>(f.unit.v) + int64_t{now.pixel} * C + c;
          const T* const u = reinterpret_cast<const T*>(shared + branch_at(0)) + c;
          const int branch = f.chunk_bytes / static_cast<int>(sizeof(T));
#pragma unroll 1
          for (int p = own; p < now.pixels; p += kAtOnce * rows) {
            // The second may be the first again.
            const int at[kAtOnce] = {p * C, (p + rows < now.pixels ? p + rows : p) * C};
            Packed<V, T> values[kAtOnce][kKept];
#pragma unroll
            for (int j = 0; j < kAtOnce; ++j)
#pragma unroll
              for (int m = 0; m < kKept; ++m) values[j][m].load(u + (m < M ? m : 0) * branch + at[j]);
#pragma unroll
            for (int j = 0; j < kAtOnce; ++j) {
              float total[V];
#pragma unroll
              for (int i = 0; i < V; ++i) total[i] = weights[0][i] * values[j][0][i];
              if (M > 1) {
#pragma unroll
                for (int i = 0; i < V; ++i) total[i] += weights[1][i] * values[j][1][i];
              }
#pragma unroll 1
              for (int m = kKept; m < M; ++m) {
                float more[V];
                load_weights(m, more);
                values[j][0].load(u + m * branch + at[j]);
#pragma unroll
                for (int i = 0; i < V; ++i) total[i] += more[i] * values[j][0][i];
              }
              store(v + at[j], total);
            }
          }
        }
        weights_of = now.image;
      }
      __syncwarp();
      if (thread % kWarp == 0) arrive_at(shared, empty());
    }
  }

  __device__ __forceinline__ void attend(int image, int thread) const {
    const int C = f.unit.C, rows = f.unit.M * C, D = static_cast<int>(f.unit.attention.D);
    float *const s = reinterpret_cast<float*>(shared + f.memory), *const hidden = s + C, *const logits = hidden + D;
    for (int t = f.first_row(image) / Tile::kRows + thread; t <= f.last_row(image) / Tile::kRows; t += kCount)
      wait_for(f.convolved + t, f.units_of_tile * Tile::kGroups);
    meet();
    const int first = f.first_row(image) / Tile::kGroupRows + image, count = f.last_row(image) / Tile::kGroupRows + image + 1 - first;
    for (int c = thread; c < C; c += kCount) {
      const float* const from = f.row_sums + int64_t{first} * C + c;
      float total = 0;
#pragma unroll 8
      for (int row = 0; row < count; ++row) total += load_fresh(from + row * C);
      s[c] = total / static_cast<float>(f.pixels);
    }
    meet();
#pragma unroll 1
    for (int d = thread / kWarp; d < D; d += kWarpsThatCompute) {
      float total[1] = {};
      sum_in_blocks(thread % kWarp, C, kWarp, total,
                    [&](int c, float(&part)[1]) { part[0] += f.prepared.reduce[d * C + c] * s[c]; });
      const float z = sum_of_lanes(total[0], kWarp) * f.prepared.hidden_norm[d] + f.prepared.hidden_norm[D + d];
      if (thread % kWarp == 0) hidden[d] = z <= 0 ? static_cast<float>(f.unit.attention.slope) * z : z;
    }
    meet();
#pragma unroll 1
    for (int row = thread; row < rows; row += kCount) {
      float total[1] = {};
      sum_in_blocks(0, D, 1, total,
                    [&](int d, float(&part)[1]) { part[0] += f.prepared.select[d * rows + row] * hidden[d]; });
      logits[row] = total[0];
    }
    meet();
    for (int c = thread; c < C; c += kCount) {
      softmax(logits + c, f.unit.M, C);
      for (int m = 0; m < f.unit.M; ++m) f.a[int64_t{image} * rows + m * C + c] = logits[m * C + c];
    }
  }
};

template <class T, class Tile> __global__ __launch_bounds__(Tile::kThreads, 1) void _unit_hopper_kernel(const __grid_constant__ HopperRing f) {
  if constexpr (kHopper) {
    unsigned char* const shared = shared_matrices();
    const int group = same_in_warp(static_cast<int>(threadIdx.x) / kGroup);
    if (threadIdx.x == 0) {
      for (int stage = 0; stage < f.stages; ++stage) {
        open_barrier(shared, kFull + 8 * stage, kGroup + 1);
        open_barrier(shared, kEmpty + 8 * stage, Tile::kGroups * 4);
      }
      for (int turn : {0, 1}) open_barrier(shared, kTurn + 8 * turn, 4);
      for (int buffer = 0; buffer < f.buffers; ++buffer) {
        open_barrier(shared, kChunkFull + 8 * buffer, 1);
        open_barrier(shared, kChunkEmpty + 8 * buffer, Selector<T, Tile>::kWarpsThatCompute);
      }
      barriers_are_open();
    }
    float* const norms = reinterpret_cast<float*>(shared + f.norms);
    for (int i = static_cast<int>(threadIdx.x); i < 2 * f.unit.M * f.unit.C; i += Tile::kThreads) norms[i] = f.prepared.norms[i];
    __syncthreads();
    if (group == 0) {
      take_registers<Tile::kLaunched, Tile::kCopying>();
      copy_units<T, Tile>(f, shared);
    } else if (group <= Tile::kGroups) {
      take_registers<Tile::kLaunched, Tile::kMultiplying>();
      Multiplier<T, Tile>(f, shared, group - 1).run();
    } else {
      take_registers<Tile::kLaunched, Tile::kSelecting>();
      const int thread = static_cast<int>(threadIdx.x) % kGroup;
      Selector<T, Tile> selector{f, shared};
      if (thread >= kWarp) selector.run(thread - kWarp);
      else if (thread == 0) selector.copy();
    }
  }
}

// What it reads, from the unit's parameters; and zeros to count from.
template <class Tile> __global__ __launch_bounds__(kThreads) void _unit_prepare_kernel(const __grid_constant__ HopperRing f) {
  const Unit& unit = f.unit;
  const Attend& attention = unit.attention;
  const int threads = static_cast<int>(gridDim.x) * kThreads, thread = static_cast<int>(blockIdx.x * kThreads + threadIdx.x);
  const int outputs = unit.C / unit.groups, D = static_cast<int>(attention.D);
  for (int i = thread; i < f.weight_vectors; i += threads) {
    int rest = i;
    const auto next = [&](int count) {
      const int index = rest % count;
      rest /= count;
      return index;
    };
    const int n = next(Tile::kChannels), half = next(2), tap = next(kTaps), chunk = next(f.chunks), m = next(unit.M);
    const int first = rest * Tile::kChannels, channel = first + Tile::channel_of(n);
    // Its first input, among those of the channel's own group.
    const int input = first / f.block_outputs * f.block_inputs + chunk * 16 + half * 8 - channel / outputs * unit.inputs;
    // Of either type two bytes.
    const uint16_t* const from = static_cast<const uint16_t*>(unit.weights[m]) + (int64_t{channel} * kTaps + tap) * unit.inputs;
    uint4 bytes{};
    if (unit.inputs % 8 == 0) {
      if (input >= 0 && input < unit.inputs) bytes = *reinterpret_cast<const uint4*>(from + input);
    } else {
      uint16_t values[8] = {};
#pragma unroll
      for (int k = 0; k < 8; ++k)
        if (input + k >= 0 && input + k < unit.inputs) values[k] = from[input + k];
      memcpy(&bytes, values, sizeof(bytes));
    }
    f.prepared.weights[i] = bytes;
  }
  for (int i = thread; i < unit.M * unit.C; i += threads) {
    const Folded<float> norm(unit.norms, i / unit.C, i % unit.C);
    f.prepared.norms[i] = norm.scale;
    f.prepared.norms[unit.M * unit.C + i] = norm.bias - norm.mean * norm.scale;
  }
  for (int i = thread; i < D * unit.C; i += threads) f.prepared.reduce[i] = at<float>(attention.fc_reduce, i);
  for (int d = thread; d < D; d += threads) {
    const Column<float> column(attention, d, at<float>(attention.given_mean, d), at<float>(attention.given_var, d));
    f.prepared.hidden_norm[d] = column.r * column.weight;
    f.prepared.hidden_norm[D + d] = column.bias - column.mean * column.r * column.weight;
  }
  for (int i = thread; i < D * unit.M * unit.C; i += threads)
    f.prepared.select[i] = at<float>(attention.fc_select, int64_t{i % (unit.M * unit.C)} * D + i / (unit.M * unit.C));
  for (int i = thread; i < f.counts; i += threads) f.next_unit[i] = 0;
}

// f.operator()<Tile>() for the tile of this unit; false if there is none.
template <class F> static bool with_hopper_tile(const Unit& f, const F& use) {
  const int outputs = f.C / f.groups;
  if (f.inputs == outputs && f.inputs <= 16) {
    if (f.split || f.C % 16 != 0) return false;
    use.template operator()<HopperTile<16, 2, 4, true>>();
  } else if (f.inputs % 16 != 0) {
    return false;
  } else if (outputs % 128 == 0) {
    use.template operator()<HopperTile<128, 2, 2, false>>();
  } else if (outputs % 64 == 0) {
    use.template operator()<HopperTile<64, 4, 2, false>>();
  } else if (outputs == 32 && f.inputs == 32) {
    use.template operator()<HopperTile<32, 4, 2, false>>();
  } else {
    return false;
  }
  return true;
}

// The geometry, and shared memory, of which the bytes are returned; more than there are if it does not fit.
template <class Tile> static int64_t plan_of(const Unit& f, int64_t most, HopperRing& ring) {
  const int outputs = f.C / f.groups;
  ring.unit = f;
  ring.reach = *std::max_element(f.dilations, f.dilations + f.M);
  ring.row = Divisor(f.W + ring.reach);
  ring.rows_of_image = Divisor(f.H + ring.reach);
  ring.image = Divisor(int64_t{ring.row} * ring.rows_of_image);
  ring.pixels = static_cast<int>(f.H * f.W);
  ring.last_of_image = static_cast<int>((f.H - 1) * ring.row + f.W - 1);
  ring.around = ring.reach * (ring.row + 1);
  ring.read = Tile::kRows + 2 * ring.around;
  ring.tiles = static_cast<int>(quotient(f.B * ring.image, Tile::kRows));
  ring.channel_tiles = f.C / Tile::kChannels;
  ring.together = Tile::kTogether ? std::min(4, ring.channel_tiles) : 1;
  ring.units_of_tile = Divisor(quotient(ring.channel_tiles, ring.together));
  ring.units = ring.tiles * ring.units_of_tile;
  ring.block_outputs = Divisor(std::max(outputs, Tile::kChannels));
  ring.block_inputs = f.groups == 1 ? f.inputs : std::max(f.inputs, Tile::kTogether ? Tile::kChannels : f.inputs);
  ring.chunks = ring.block_inputs / 16;
  ring.share = f.split ? f.channels / f.M : f.channels;

  int64_t bytes = kFirst;
  const auto take = [&](int64_t more) { return static_cast<int>(std::exchange(bytes, quotient(bytes + more, 128) * 128)); };
  ring.images = (Tile::kGroupRows - 2) / ring.image + 2;
  ring.lanes = Divisor(std::min(f.C / 8, kGroup - kWarp));
  ring.row_chunks = static_cast<int>(quotient(f.W, std::max(1, Tile::kChunkBytes / (f.C * 2))));
  ring.chunk_pixels = static_cast<int>(quotient(f.W, ring.row_chunks));
  ring.chunk_bytes = ring.chunk_pixels * f.C * 2;
  ring.buffers = std::clamp(Tile::kBufferBytes / (f.M * ring.chunk_bytes), 2, kMostBuffers);
  ring.norms = take(int64_t{2} * f.M * f.C * sizeof(float));
  ring.sums = take(int64_t{Tile::kGroups} * Tile::kSets * ring.images * 4 * Tile::kChannels * sizeof(float));
  ring.addresses = take(int64_t{ring.read} * 2 * sizeof(int));
  ring.memory = take(((f.M + 1) * f.C + f.attention.D) * sizeof(float));
  ring.buffers_at = take(int64_t{ring.buffers} * f.M * ring.chunk_bytes);
  ring.stages_at = static_cast<int>(bytes);
  ring.plane = static_cast<int>(quotient(int64_t{ring.read} * 16, 128) * 128);
  ring.stage = 2 * ring.plane + Tile::kWeightBytes * (Tile::kTogether ? f.M : 1);
  ring.stages = static_cast<int>(std::min<int64_t>(kMostStages, (most - bytes) / ring.stage));
  // The one whose turn it is has its stages, and the other one as many.
  ring.in_turns = !Tile::kTogether && Tile::kGroups == 2 && ring.chunks + 3 <= ring.stages;
  return ring.stages < 3 ? most + 1 : bytes + int64_t{ring.stages} * ring.stage;
}

bool unit_on_hopper(const Unit& f, const std::function<void*(int64_t)>& allocate, Queue queue) {
  const auto attribute = [&](cudaDeviceAttr which) { return attribute_of_device(which, "unit", queue.device); };
  // Its rows and pixels are counted in 32 bits.
  const int64_t rows = (f.B + 1) * (f.H + 3) * (f.W + 3);
  if (f.stride != 1 || rows >= int64_t{1} << 30 || f.C > 1024 || attribute(cudaDevAttrComputeCapabilityMajor) != 9) return false;
  take_device("unit", queue.device);
  bool taken = false;
  const bool has_tile = with_hopper_tile(f, [&]<class Tile>() {
    with_type(f.type, [&]<class T>() {
      HopperRing ring{};
      const int64_t most = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin), shared = plan_of<Tile>(f, most, ring);
      if (shared > most) return;
      constexpr auto kernel = _unit_hopper_kernel<T, Tile>;
      constexpr auto prepare = _unit_prepare_kernel<Tile>;
      const int blocks = resident_blocks<kernel>("unit", shared, queue.device, Tile::kThreads);
      // The ring: most of the L2 cache, through which x and v go as well, if an image has room in it. The selection comes as much later than
      // the attention as there is room for beside the tiles that are convolved at a time: what it waits for is then there.
      const int64_t tile_bytes = int64_t{f.M} * Tile::kRows * f.C * 2, room = attribute(cudaDevAttrL2CacheSize) * int64_t{3} / 4 / tile_bytes;
      const int64_t fewest = quotient(ring.image, Tile::kRows) + 2;
      ring.slots = Divisor(std::clamp<int64_t>(room, fewest, std::max<int64_t>(ring.tiles, fewest)));
      ring.slot_rows = ring.slots * Tile::kRows;
      const int64_t free_rows = int64_t{ring.slots - 2 - static_cast<int>(quotient(blocks, ring.units_of_tile))} * Tile::kRows;
      ring.lag = static_cast<int>(std::max<int64_t>(free_rows / ring.image - 1 - blocks * kPartValues / (int64_t{ring.pixels} * f.C), 0));
      ring.part_rows = static_cast<int>(std::clamp<int64_t>(kPartValues / (f.W * f.C), 1, f.H));
      ring.parts = static_cast<int>(quotient(f.H, ring.part_rows));
      ring.step_items = Divisor(1 + ring.parts);
      const int64_t items = (f.B + ring.lag) * ring.step_items;
      if (items >= int64_t{1} << 30) return;
      ring.items = static_cast<int>(items);

      Parts parts;
      const int64_t floats = sizeof(float), D = f.attention.D;
      ring.counts = 2 + ring.tiles + 2 * static_cast<int>(f.B);
      ring.weight_vectors = static_cast<int>(int64_t{ring.channel_tiles} * f.M * ring.chunks * Tile::kWeightBytes / 16);
      const int64_t counts = parts.take(ring.counts * int64_t{sizeof(unsigned)}), weights = parts.take(int64_t{ring.weight_vectors} * 16);
      const int64_t norms = parts.take(2 * f.M * f.C * floats), reduce = parts.take(D * f.C * floats), hidden = parts.take(2 * D * floats);
      const int64_t select = parts.take(D * f.M * f.C * floats), a = parts.take(f.B * f.M * f.C * floats);
      const int64_t sums = parts.take((int64_t{ring.tiles} * Tile::kGroups + f.B) * f.C * floats), u = parts.take(ring.slots * tile_bytes);
      auto* const bytes = static_cast<unsigned char*>(allocate(parts.bytes));
      const auto at = [&](int64_t part) { return reinterpret_cast<float*>(bytes + part); };
      ring.prepared = {reinterpret_cast<uint4*>(bytes + weights), at(norms), at(reduce), at(hidden), at(select)};
      ring.row_sums = at(sums);
      ring.a = at(a);
      ring.u = bytes + u;
      ring.next_unit = reinterpret_cast<unsigned*>(bytes + counts);
      ring.next_item = ring.next_unit + 1;
      ring.convolved = ring.next_unit + 2;
      ring.attended_to = ring.convolved + ring.tiles;
      ring.selected = ring.attended_to + f.B;
      const int64_t most_prepared = std::max({int64_t{ring.weight_vectors}, int64_t{ring.counts}, D * f.M * f.C});
      launch<prepare>("unit", f, quotient(most_prepared, kThreads), Blocks::alone, 0, queue, ring);
      launch<kernel>("unit", f, std::min(ring.units, blocks), Blocks::alone, shared, queue, ring, Tile::kThreads);
      taken = true;
    });
  });
  return has_tile && taken;
}

}  // namespace sk::cuda
