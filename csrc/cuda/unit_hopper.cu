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
//   the last computes the attention of the images that are complete, and selects.
//
// The work is two lists, of which a block takes the next item by a counter each: `units` of convolutions, tile by tile; and steps, of which
// step i has the attention of the images whose last pixels are in tile i, and then the parts of the selection of tile i - lag. Here
//
//   a unit of tile t waits for the parts of the selection of tile t - slots, whose place in the ring it takes, and slots > lag;
//   the attention in step i waits for the units of tiles up to i;
//   a part of the selection of tile t waits for the attention of its images, of which none ends behind tile t + lag.
//
// The first unit that is not finished, of tile t, waits for step t - slots + lag < t at most, and what comes before it; the units of all
// these steps are finished, so those steps wait for nothing but steps before them. All that is waited for has been taken by a block that
// runs. Hence something always goes on, however many blocks the device holds, be it one, and in whatever order they run.

#include "attention.cuh"
#include "unit.cuh"

namespace sk::cuda {

// Pixels that a matrix instruction multiplies, and threads that issue it.
constexpr int kRowsAtOnce = 64, kGroup = 128;
// Vectors of 16 bytes in a chunk that is selected, of one branch; bytes of all that are on their way; and of what attention computes with.
constexpr int kChunkVectors = 256, kBufferBytes = 32 * 1024, kAttendedBytes = 12 * 1024;

// A tile: kGroups warpgroups with kBlocks times 64 pixels each, kChannels channels. kTogether: of one chunk of inputs all branches.
template <int kChannels_, int kBlocks_, int kGroups_, bool kTogether_> struct HopperTile : Columns<kChannels_> {
  static constexpr int kChannels = kChannels_, kBlocks = kBlocks_, kGroups = kGroups_;
  static constexpr bool kTogether = kTogether_;
  static constexpr int kGroupRows = kRowsAtOnce * kBlocks, kRows = kGroups * kGroupRows;
  static constexpr int kThreads = (1 + kGroups + 1) * kGroup;
  // Of 16 inputs.
  static constexpr int kTapBytes = kChannels * 32, kWeightBytes = kTaps * kTapBytes;
  // Registers of a thread: of all warpgroups what the block is launched with, at a multiple of 8.
  static constexpr int kLaunched = 65536 / kThreads / 8 * 8;
  static constexpr int kCopying = 48, kSelecting = 96, kMultiplying = (kLaunched * (2 + kGroups) - kCopying - kSelecting) / kGroups / 8 * 8;
};

// The parameters as they are read: for a tile of channels, branch and chunk nine taps of (2, kChannels, 8) inputs; of the branches' norms
// scale and shift, (2, M, C); of the attention (D, C), scale and shift of its norm (2, D), and (D, M, C).
struct Prepared {
  uint4* weights;
  float *norms, *reduce, *hidden_norm, *select;
};

// A row of a tile: its pixel in v, or -1 if there is none, and its image.
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
  // Tiles that have a place; how much later their selection comes; rows of a part of it, and parts of a tile; items of a step, and all.
  Divisor slots, step_items, lanes;
  int lag, part_rows, parts, items;
  // Images that are attended to at a time; rows of a chunk that is selected, bytes of a branch of it, and buffers for them.
  int attended, chunk_rows, chunk_bytes, buffers, buffers_at;
  Prepared prepared;
  // Vectors of weights, and counts, from next_unit on.
  int weight_vectors, counts;
  // Of every slot u, T (M, rows, C); sums over pixels of a warpgroup's rows and an image: row (tile * kGroups + group) + image; (B, M, C).
  void* u;
  float *row_sums, *a;
  unsigned *next_unit, *next_item, *convolved, *attended_to, *selected;

  __device__ __forceinline__ int first_row(int i) const { return i * image; }
  __device__ __forceinline__ int last_row(int i) const { return i * image + last_of_image; }
  // The first image whose last pixel is not before this row.
  __device__ __forceinline__ int first_ending(int at) const {
    const int first = at <= last_of_image ? 0 : (at - last_of_image + image - 1) / image, all = static_cast<int>(unit.B);
    return first < all ? first : all;
  }
  __device__ __forceinline__ Row find(int at) const {
    const int from = at < 0 ? 0 : at, y_of_all = from / row, x = from - y_of_all * row, i = y_of_all / rows_of_image, y = y_of_all - i * rows_of_image;
    const int H = static_cast<int>(unit.H), W = static_cast<int>(unit.W);
    return {at >= 0 && x < W && y < H && i < unit.B ? (i * H + y) * W + x : -1, i};
  }
};

// Where barriers are: of every stage, that it is full, and that it is empty; of two warpgroups, that it is their turn; of every chunk that is
// selected, that it is there. Then what a stage belongs to, the unit that is next, and what the chunks are.
constexpr int kMostStages = 8, kMostBuffers = 4;
constexpr int kFull = 0, kEmpty = 64, kTurn = 128, kChunkFull = 144, kUnitOf = 176, kNextUnit = 208, kChunks = 256, kFirst = 384;

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
            if (waits) wait_for(f.selected + tile - f.slots, f.parts);
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
  // Of this lane's rows of a unit: their images, or -1.
  int image_of[kBlocks][2], first_image, last_image;

  __device__ __forceinline__ Multiplier(const HopperRing& f, unsigned char* shared, int group)
      : f(f),
        shared(shared),
        group(group),
        warp(same_in_warp(static_cast<int>(threadIdx.x) % kGroup / kWarp)),
        lane(static_cast<int>(threadIdx.x) % kWarp) {}

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
    const Matrix left(shared, x, f.plane), right(shared, x + 2 * f.plane + of_stage * Tile::kWeightBytes, kChannels * 16);
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
    const int own = lane % 4 * kOwn, branch = Tile::kRows * f.unit.C;
    const float* const scale = reinterpret_cast<const float*>(shared + f.norms) + m * f.unit.C + channels * kChannels + own;
    const float* const shift = scale + f.unit.M * f.unit.C;
    T* const u = static_cast<T*>(f.u) + (int64_t{tile % f.slots} * f.unit.M + m) * branch + group * Tile::kGroupRows * f.unit.C +
                 channels * kChannels + own;
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
          if (image_of[block][half] >= 0) store_own(u + row_of(block, half) * f.unit.C + q * 8 * kJoined, narrowed);
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
            const bool of_it = image_of[block][half] == image;
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
    // Of two units' sums one set is read while the other is written.
    float* const both = reinterpret_cast<float*>(shared + f.sums) + group * 2 * f.images * 4 * kChannels;
    int parity = 0, turns = 0;
    for (;;) {
      wait_at(shared, kFull + 8 * stage, phase);
      const int unit = same_in_warp(reinterpret_cast<const volatile int*>(shared + kUnitOf)[stage]);
      if (unit == f.units) return;
      const int tile = unit / f.units_of_tile, first = (unit - tile * f.units_of_tile) * f.together;
      const int first_row = tile * Tile::kRows + group * Tile::kGroupRows;
#pragma unroll
      for (int block = 0; block < kBlocks; ++block)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const Row row = f.find(first_row + row_of(block, half));
          image_of[block][half] = row.pixel < 0 ? -1 : row.image;
        }
      const int end = (first_row + Tile::kGroupRows - 1) / f.image, all = static_cast<int>(f.unit.B);
      first_image = first_row / f.image;
      last_image = end < all ? end : all - 1;

      for (int channels = first; channels < first + f.together && channels < f.channel_tiles; ++channels) {
        float* const sums = both + parity * f.images * 4 * kChannels;
        parity ^= 1;
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

// The attention and the selection, by the last warpgroup. What is selected comes in chunks of a few rows of all branches, which the first
// thread has copied into shared memory ahead; the attention counts as a chunk, too.
template <class T, class Tile> struct Selector {
  static constexpr int V = 8;
  // What a chunk is: rows [first, end) of a tile; the attention of the images that end in it; the end.
  enum Kind : int { kSelect, kSelectLast, kAttend, kEnd };
  struct Chunk {
    int kind, tile, first, end;
  };

  const HopperRing& f;
  unsigned char* const shared;
  const int thread;
  // Of the first thread: the next item, where it is in that, and the chunks that it has begun.
  unsigned next = 0;
  bool within = false, ended = false;
  int tile = 0, row = 0, behind = 0, begun = 0;

  __device__ __forceinline__ Selector(const HopperRing& f, unsigned char* shared)
      : f(f), shared(shared), thread(static_cast<int>(threadIdx.x) % kGroup) {}

  static __device__ __forceinline__ void meet() { meet_others<kGroup>(1 + Tile::kGroups); }
  __device__ __forceinline__ Chunk* chunk_of(int number) const { return reinterpret_cast<Chunk*>(shared + kChunks) + number % f.buffers; }
  __device__ __forceinline__ int full(int number) const { return kChunkFull + 8 * (number % f.buffers); }
  __device__ __forceinline__ int buffer(int number) const { return f.buffers_at + number % f.buffers * f.unit.M * f.chunk_bytes; }

  // Whether the attention is there of all images in rows [low, end) of all; or waits for it.
  __device__ __forceinline__ bool is_attended(int low, int end, bool waits) const {
    for (int image = low / f.image; image < f.unit.B && f.first_row(image) < end; ++image) {
      const unsigned* const count = f.attended_to + f.last_row(image) / Tile::kRows;
      if (waits) wait_for(count, 1);
      else if (read_count(count) < 1) return false;
    }
    return true;
  }

  // By the first thread: begins the next chunk; or does not, if that has to wait and may not: as long as a chunk that was begun is not
  // finished, others may wait for this block.
  __device__ __forceinline__ void begin(bool waits) {
    if (ended) return;
    Chunk* const chunk = chunk_of(begun);
    while (!within) {
      if (next >= static_cast<unsigned>(f.items)) {
        ended = true;
        *chunk = {kEnd, 0, 0, 0};
        arrive_at(shared, full(begun++));
        return;
      }
      const int item = static_cast<int>(next), step = item / f.step_items, part = item - step * f.step_items - 1;
      tile = step - (part < 0 ? 0 : f.lag);
      if (part < 0 && tile < f.tiles && f.first_ending(tile * Tile::kRows) < f.first_ending((tile + 1) * Tile::kRows)) {
        next = take_number(f.next_item);
        *chunk = {kAttend, tile, 0, 0};
        arrive_at(shared, full(begun++));
        return;
      }
      if (part >= 0 && tile >= 0 && tile < f.tiles) {
        row = part * f.part_rows;
        behind = row + f.part_rows < Tile::kRows ? row + f.part_rows : Tile::kRows;
        if (!is_attended(tile * Tile::kRows + row, tile * Tile::kRows + behind, waits)) return;
        copies_after_stores();
        within = true;
      }
      next = take_number(f.next_item);
    }
    const int end = row + f.chunk_rows < behind ? row + f.chunk_rows : behind, C = f.unit.C, bytes = (end - row) * C * 2;
    within = end < behind;
    *chunk = {within ? kSelect : kSelectLast, tile, row, end};
    arrive_expecting(shared, full(begun), f.unit.M * bytes);
    const T* const u = static_cast<const T*>(f.u) + (int64_t{tile % f.slots} * f.unit.M * Tile::kRows + row) * C;
    for (int m = 0; m < f.unit.M; ++m) copy_bulk(shared, buffer(begun) + m * f.chunk_bytes, u + m * Tile::kRows * C, bytes, full(begun));
    row = end;
    ++begun;
  }

  // At least the chunk of this number, and others as long as there are buffers.
  __device__ __forceinline__ void begin_ahead(int number) {
    for (int last = -1; begun != last && begun < number + f.buffers;) {
      last = begun;
      begin(begun == number);
    }
  }

  __device__ __forceinline__ void run() {
    const int lanes = f.lanes, rows = kGroup / lanes, own = thread / f.lanes, c = (thread - own * lanes) * V, C = f.unit.C, M = f.unit.M;
    // Those of the first branches are kept as long as rows are of this image.
    constexpr int kKept = 2;
    float weights[kKept][V];
    int image = -1;
    const auto load_weights = [&](int m, float(&to)[V]) {
      const float4* const from = reinterpret_cast<const float4*>(f.a + (int64_t{image} * M + m) * C + c);
      const float4 halves[2] = {load_fresh(from), load_fresh(from + 1)};
      memcpy(to, halves, sizeof(to));
    };
    if (thread == 0) next = take_number(f.next_item);
    int phase = 0;
    for (int number = 0;; ++number) {
      if (thread == 0) begin_ahead(number);
      wait_at(shared, full(number), phase);
      const Chunk chunk = *chunk_of(number);
      if (chunk.kind == kEnd) return;
      if (chunk.kind == kAttend) {
        attend_to_all(chunk.tile);
      } else {
        const unsigned char* const u = shared + buffer(number);
#pragma unroll 2
        for (int p = chunk.first + own; p < chunk.end && own < rows; p += rows) {
          const Row at = f.find(chunk.tile * Tile::kRows + p);
          if (at.pixel < 0) continue;
          const bool other = at.image != image;
          image = at.image;
          float total[V] = {};
          const auto add = [&](int m, const float(&factors)[V]) {
            T values[V];
            memcpy(values, __builtin_assume_aligned(u + m * f.chunk_bytes + ((p - chunk.first) * C + c) * 2, 16), sizeof(values));
#pragma unroll
            for (int i = 0; i < V; ++i) total[i] += factors[i] * widen(values[i]);
          };
#pragma unroll
          for (int m = 0; m < kKept; ++m)
            if (m < M) {
              if (other) load_weights(m, weights[m]);
              add(m, weights[m]);
            }
#pragma unroll 1
          for (int m = kKept; m < M; ++m) {
            float more[V];
            load_weights(m, more);
            add(m, more);
          }
          store(static_cast<T*>(f.unit.v) + int64_t{at.pixel} * C + c, total);
        }
      }
      meet();
      if (thread == 0) {
        if (chunk.kind == kSelectLast) add_to_count(f.selected + chunk.tile);
        if (chunk.kind == kAttend) add_to_count(f.attended_to + chunk.tile);
      }
      if ((number + 1) % f.buffers == 0) phase ^= 1;
    }
  }

  __device__ __forceinline__ void attend_to_all(int tile) const {
    const int first = f.first_ending(tile * Tile::kRows), end = f.first_ending((tile + 1) * Tile::kRows);
    for (int t = f.first_row(first) / Tile::kRows + thread; t <= tile; t += kGroup) wait_for(f.convolved + t, f.units_of_tile * Tile::kGroups);
    meet();
#pragma unroll 1
    for (int image = first; image < end; image += f.attended) {
      attend(image, end - image < f.attended ? end - image : f.attended);
      meet();
    }
  }

  // Of up to kAttended images.
  __device__ __forceinline__ void attend(int first_image, int images) const {
    const int C = f.unit.C, rows = f.unit.M * C, D = static_cast<int>(f.unit.attention.D);
    float *const s = reinterpret_cast<float*>(shared + f.memory), *const hidden = s + f.attended * C, *const logits = hidden + f.attended * D;
    for (int i = thread; i < images * C; i += kGroup) {
      const int image = first_image + i / C, first = f.first_row(image) / Tile::kGroupRows + image;
      const int count = f.last_row(image) / Tile::kGroupRows + image + 1 - first;
      const float* const from = f.row_sums + int64_t{first} * C + i % C;
      float total = 0;
#pragma unroll 8
      for (int row = 0; row < count; ++row) total += load_fresh(from + row * C);
      s[i] = total / static_cast<float>(f.pixels);
    }
    meet();
#pragma unroll 2
    for (int d = thread / kWarp; d < D; d += kGroup / kWarp) {
      float total[kAttended] = {};
      sum_in_blocks(thread % kWarp, C, kWarp, total, [&](int64_t c, float(&part)[kAttended]) {
        const float w = f.prepared.reduce[d * C + static_cast<int>(c)];
#pragma unroll
        for (int i = 0; i < kAttended; ++i)
          if (i < images) part[i] += w * s[i * C + c];
      });
#pragma unroll
      for (int i = 0; i < kAttended; ++i) {
        if (i >= images) break;
        const float z = sum_of_lanes(total[i], kWarp) * f.prepared.hidden_norm[d] + f.prepared.hidden_norm[D + d];
        if (thread % kWarp == 0) hidden[i * D + d] = z <= 0 ? static_cast<float>(f.unit.attention.slope) * z : z;
      }
    }
    meet();
    for (int row = thread; row < rows; row += kGroup) {
      float total[kAttended] = {};
      sum_in_blocks(0, D, 1, total, [&](int64_t d, float(&part)[kAttended]) {
        const float w = f.prepared.select[static_cast<int>(d) * rows + row];
#pragma unroll
        for (int i = 0; i < kAttended; ++i)
          if (i < images) part[i] += w * hidden[i * D + d];
      });
#pragma unroll
      for (int i = 0; i < kAttended; ++i)
        if (i < images) logits[i * rows + row] = total[i];
    }
    meet();
    for (int i = thread; i < images * C; i += kGroup) {
      float* const own = logits + i / C * rows + i % C;
      softmax(own, f.unit.M, C);
      for (int m = 0; m < f.unit.M; ++m) f.a[(int64_t{first_image + i / C} * f.unit.M + m) * C + i % C] = own[m * C];
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
      for (int buffer = 0; buffer < f.buffers; ++buffer) open_barrier(shared, kChunkFull + 8 * buffer, 1);
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
      Selector<T, Tile>(f, shared).run();
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

  const int64_t an_image = ((f.M + 1) * f.C + f.attention.D) * static_cast<int64_t>(sizeof(float));
  int64_t bytes = kFirst;
  const auto take = [&](int64_t more) { return static_cast<int>(std::exchange(bytes, quotient(bytes + more, 128) * 128)); };
  ring.images = (Tile::kGroupRows - 2) / ring.image + 2;
  ring.attended = static_cast<int>(std::clamp<int64_t>(kAttendedBytes / an_image, 1, kAttended));
  ring.lanes = Divisor(std::min(f.C / 8, kGroup));
  ring.chunk_rows = kChunkVectors / kGroup * (kGroup / ring.lanes);
  ring.chunk_bytes = ring.chunk_rows * f.C * 2;
  ring.buffers = std::clamp(kBufferBytes / (f.M * ring.chunk_bytes), 2, kMostBuffers);
  ring.norms = take(int64_t{2} * f.M * f.C * sizeof(float));
  ring.sums = take(int64_t{Tile::kGroups} * 2 * ring.images * 4 * Tile::kChannels * sizeof(float));
  ring.addresses = take(int64_t{ring.read} * 2 * sizeof(int));
  ring.memory = take(ring.attended * an_image);
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
      const int64_t tile_bytes = int64_t{f.M} * Tile::kRows * f.C * 2, room = attribute(cudaDevAttrL2CacheSize) * int64_t{3} / 4 / tile_bytes;
      // How many tiles the last one of an image may lie behind one that it is in.
      ring.lag = static_cast<int>(quotient(int64_t{ring.last_of_image}, Tile::kRows));
      ring.slots = Divisor(std::clamp<int64_t>(room, ring.lag + 1, std::max(ring.tiles, ring.lag + 1)));
      const int64_t wanted = quotient(Tile::kRows, std::max<int64_t>(1, int64_t{Tile::kRows} * f.C / kPartValues));
      ring.part_rows = static_cast<int>(quotient(wanted, ring.chunk_rows) * ring.chunk_rows);
      ring.parts = static_cast<int>(quotient(Tile::kRows, ring.part_rows));
      ring.step_items = Divisor(1 + ring.parts);
      const int64_t items = (int64_t{ring.tiles} + ring.lag) * ring.step_items;
      if (items >= int64_t{1} << 30) return;
      ring.items = static_cast<int>(items);

      Parts parts;
      const int64_t floats = sizeof(float), D = f.attention.D;
      ring.counts = 2 + 3 * ring.tiles;
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
      ring.selected = ring.attended_to + ring.tiles;
      const int64_t most_prepared = std::max({int64_t{ring.weight_vectors}, int64_t{ring.counts}, D * f.M * f.C});
      launch<prepare>("unit", f, quotient(most_prepared, kThreads), Blocks::alone, 0, queue, ring);
      launch<kernel>("unit", f, std::min(ring.units, blocks), Blocks::alone, shared, queue, ring, Tile::kThreads);
      taken = true;
    });
  });
  return has_tile && taken;
}

}  // namespace sk::cuda
