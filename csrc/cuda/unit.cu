// unit: the whole eval unit in one launch. x is read once and v written once; the activated branches u never reach device memory.
//
// Small maps: a cluster of blocks for each image, each block with the branches of its share of the channels in its shared memory. Of the
// attention, the blocks exchange their shares of the reduced descriptor.
//
// Others: u lives in a ring of a few images that stays in the L2 cache. The work is a list of items in a fixed order: step i of it has the
// convolutions of image i, a tile or a few, and then the parts of the selection of image i - lag. Blocks take the items one after the
// other by a counter. Whoever finishes the last convolution of an image computes its attention. So
//
//   a part of the selection of image b waits for the convolutions of b, of which one computes the attention;
//   a convolution of image b waits for the parts of the selection of image b - slots, whose place in the ring it takes.
//
// lag < slots, so both wait for items that come before them in the list alone, and those have been taken, by blocks that run. Of all
// items that are not finished the first therefore waits for nobody: it ends, and so does every one after it, however many blocks the
// device holds at a time, be it one, and in whatever order they run. Beyond that, lag and slots are only there to make waits short: when
// an item is taken, what it waits for was taken at least as many items ago as there are blocks, if the cache has room for as many images.

#include "attention.cuh"
#include "convolution.cuh"

namespace sk::cuda {

// Vectors of 8 channels that a thread selects in one item.
constexpr int kSelected = 4;

struct Ring {
  Unit unit;
  Cut cut;
  // Images that have a place; how many images later the selection comes; channel tiles of one item. Items of one image, convolutions and
  // parts of the selection; all items.
  int slots, lag, share;
  int64_t convolutions, parts, items;
  // Of every slot: u, T (M, H', W', C); sums over the pixels of a tile (pixel tiles, C); the attention (M, C).
  void* u;
  float *sums, *a;
  // The next item; of every image its finished convolutions, whether its attention is there, its finished parts of the selection.
  unsigned *next, *convolved, *attended, *selected;
};

// What comes first in the shared memory: the item, and what a count was.
constexpr int kItemBytes = 16;

// Whether an item may be several tiles of so many channels. One of 64 is work enough, and there are no registers for a loop around it.
__host__ __device__ constexpr bool several(int channels) { return channels < 64; }

template <class T, class Tile> __device__ __forceinline__ void convolve(const Ring& f, int64_t b, int index) {
  const int tiles = f.cut.channel_tiles();
  const int64_t slot = b % f.slots, C = f.unit.C, values = f.cut.area() * C;
  const auto convolve_tile = [&](int pixel_tile, int channel_tile) {
    const Convolution<T, Tile> tile(f.unit, f.cut, b, pixel_tile, channel_tile, shared_memory<unsigned char>() + kItemBytes);
    tile.run(static_cast<T*>(f.u) + slot * f.unit.M * values + tile.first_channel, values, C,
             f.sums + (slot * f.cut.pixel_tiles() + pixel_tile) * C + tile.first_channel);
  };
  if constexpr (several(Tile::kChannels)) {
    const int items = (tiles + f.share - 1) / f.share, first = index % items * f.share;
    for (int i = first; i < first + f.share && i < tiles; ++i) {
      if (i > first) __syncthreads();
      convolve_tile(index / items, i);
    }
  } else {
    convolve_tile(index / tiles, index % tiles);
  }
}

__device__ __forceinline__ float hidden_of(const Attend& f, int64_t d, float reduced) {
  return Column<float>(f, d, at<float>(f.given_mean, d), at<float>(f.given_var, d)).act(reduced);
}

// The attention of one image, by one block.
__device__ __forceinline__ void attend_to(const Ring& f, int64_t b) {
  const Attend& attention = f.unit.attention;
  const int64_t C = f.unit.C, D = attention.D, slot = b % f.slots, tiles = f.cut.pixel_tiles();
  const int lane = threadIdx.x % kWarp;
  float* const s = reinterpret_cast<float*>(shared_memory<unsigned char>() + kItemBytes);
  float* const hidden = s + C;
  for (int64_t c = threadIdx.x; c < C; c += kThreads) {
    float total = 0;
    for (int64_t i = 0; i < tiles; ++i) total += load_fresh(f.sums + (slot * tiles + i) * C + c);
    s[c] = total / static_cast<float>(f.cut.area());
  }
  __syncthreads();
  for (int64_t d = threadIdx.x / kWarp; d < D; d += kWarps) {
    float total[1] = {};
    sum_in_blocks(lane, C, kWarp, total, [&](int64_t c, float (&part)[1]) { part[0] += at<float>(attention.fc_reduce, d * C + c) * s[c]; });
    const float reduced = sum_of_lanes(total[0], kWarp);
    if (lane == 0) hidden[d] = hidden_of(attention, d, reduced);
  }
  __syncthreads();
  float* const a = f.a + slot * f.unit.M * C;
  for (int64_t row = threadIdx.x / kWarp; row < f.unit.M * C; row += kWarps) {
    float total[1] = {};
    logits_of(attention.fc_select, row, D, hidden, 1, total);
    if (lane == 0) a[row] = total[0];
  }
  __syncthreads();
  for (int64_t c = threadIdx.x; c < C; c += kThreads) softmax(a + c, f.unit.M, C);
}

// v = sum_m a_m u_m for kThreads * kSelected vectors of an image.
template <class T> __device__ __forceinline__ void select_part(const Ring& f, int64_t b, int64_t index) {
  constexpr int V = 8;
  const int64_t C = f.unit.C, slot = b % f.slots, values = f.cut.area() * C, first = (index * kThreads * kSelected + threadIdx.x) * V;
  const T* const u = static_cast<const T*>(f.u) + slot * f.unit.M * values;
  const float* const a = f.a + slot * f.unit.M * C;
  // All vectors of a thread may be of the same channels.
  const bool same = kThreads * V % C == 0;
  float total[kSelected][V] = {};
  for (int m = 0; m < f.unit.M; ++m) {
    uint4 packed[kSelected] = {};
#pragma unroll
    for (int j = 0; j < kSelected; ++j)
      if (first + j * kThreads * V < values)
        packed[j] = load_fresh(reinterpret_cast<const uint4*>(u + m * values + first + j * kThreads * V));
    float weights[V];
#pragma unroll
    for (int j = 0; j < kSelected; ++j) {
      if (j == 0 || !same) {
        const float4* const from = reinterpret_cast<const float4*>(a + m * C + (first + j * kThreads * V) % C);
        const float4 halves[2] = {load_fresh(from), load_fresh(from + 1)};
        memcpy(weights, halves, sizeof(weights));
      }
      T branch[V];
      memcpy(branch, &packed[j], sizeof(branch));
#pragma unroll
      for (int i = 0; i < V; ++i) total[j][i] += weights[i] * widen(branch[i]);
    }
  }
#pragma unroll
  for (int j = 0; j < kSelected; ++j)
    if (first + j * kThreads * V < values) store(static_cast<T*>(f.unit.v) + b * values + first + j * kThreads * V, total[j]);
}

// An item of the list.
struct Item {
  bool convolves;
  int64_t image, index;

  // Steps 0 ... lag - 1 convolve, the next ones do both, the last `lag` select.
  __device__ __forceinline__ Item(const Ring& f, int64_t i) {
    const int64_t convolutions = f.convolutions, parts = f.parts, lag = f.lag;
    int64_t step = i / convolutions, rest = i % convolutions;
    if (step >= lag) {
      i -= lag * convolutions;
      step = lag + i / (convolutions + parts);
      rest = i % (convolutions + parts);
      if (step >= f.unit.B) {
        i -= (f.unit.B - lag) * (convolutions + parts);
        step = f.unit.B + i / parts;
        rest = convolutions + i % parts;
      }
    }
    convolves = rest < convolutions;
    image = convolves ? step : step - lag;
    index = convolves ? rest : rest - convolutions;
  }

  __device__ __forceinline__ void wait(const Ring& f) const {
    const int64_t before = image - f.slots;
    if (!convolves)
      while (read_count(f.attended + image) == 0) wait_a_little();
    else if (before >= 0)
      while (read_count(f.selected + before) < f.parts) wait_a_little();
  }
};

// After all of the block have done their part, thread 0 counts it: its fence speaks for all, as they met before. They get what
// `count` was.
__device__ __forceinline__ unsigned finish(unsigned* count) {
  unsigned* const shared = shared_memory<unsigned>();
  __syncthreads();
  if (threadIdx.x == 0) shared[1] = add_to_count(count);
  __syncthreads();
  return shared[1];
}

template <class T, class Tile> __global__ __launch_bounds__(kThreads, 2) void _unit_kernel(const __grid_constant__ Ring f) {
  unsigned* const shared = shared_memory<unsigned>();
  for (;;) {
    if (threadIdx.x == 0) {
      const unsigned next = take_number(f.next);
      if (next < f.items) Item(f, next).wait(f);
      shared[0] = next;
    }
    __syncthreads();
    const unsigned taken = shared[0];
    if (taken >= f.items) return;
    const Item item(f, taken);
    if (item.convolves) {
      convolve<T, Tile>(f, item.image, static_cast<int>(item.index));
      if (finish(f.convolved + item.image) + 1 == f.convolutions) {
        attend_to(f, item.image);
        finish(f.attended + item.image);
      }
    } else {
      select_part<T>(f, item.image, item.index);
      finish(f.selected + item.image);
    }
  }
}

// One image in a cluster: block `rank` has the channel tiles [rank * share, (rank + 1) * share).
struct Clustered {
  Unit unit;
  Cut cut;
  int blocks, share;
};

// Shared memory of a block: beside that of a tile, in float, for each of its columns s and the sums of a tile, the attention (M, columns),
// and two vectors of D; and u, T (M, H', W', columns). A column is a channel, or none, where a tile has fewer.
struct Shares {
  int columns;
  int64_t tile, floats, u;
  __host__ __device__ Shares(const Unit& f, const Cut& cut, int share, int kChannels)
      : columns(share * kChannels),
        tile(cut.shared(kChannels)),
        floats(((2 + f.M) * columns + (2 * f.attention.D + 3) / 4 * 4) * static_cast<int64_t>(sizeof(float))),
        u(f.M * cut.area() * columns * 2) {}
  __host__ __device__ int64_t all() const { return tile + floats + u; }
};

template <class T, class Tile> __global__ __launch_bounds__(kThreads, 2) void _unit_in_cluster_kernel(const __grid_constant__ Clustered f) {
  const Attend& attention = f.unit.attention;
  const Shares shares(f.unit, f.cut, f.share, Tile::kChannels);
  const int M = f.unit.M, columns = shares.columns, rank = block_in_cluster();
  const int64_t C = f.unit.C, D = attention.D, b = blockIdx.x / f.blocks, area = f.cut.area();
  unsigned char* const shared = shared_memory<unsigned char>();
  float *const s = reinterpret_cast<float*>(shared + shares.tile), *const sums = s + columns, *const a = sums + columns;
  float *const reduced = a + M * columns, *const hidden = reduced + D;
  T* const u = reinterpret_cast<T*>(shared + shares.tile + shares.floats);
  const auto channel_of = [&](int column) -> int64_t {
    const int tile = rank * f.share + column / Tile::kChannels;
    if (tile >= f.cut.channel_tiles()) return -1;
    const int channel = f.cut.first_channel(tile, Tile::kChannels) + column % Tile::kChannels;
    return channel < f.cut.end_channel(tile, Tile::kChannels) ? channel : -1;
  };

  for (int column = threadIdx.x; column < columns; column += kThreads) s[column] = 0;
  for (int i = 0; i < f.share && rank * f.share + i < f.cut.channel_tiles(); ++i)
    for (int pixel_tile = 0; pixel_tile < f.cut.pixel_tiles(); ++pixel_tile) {
      const Convolution<T, Tile> tile(f.unit, f.cut, b, pixel_tile, rank * f.share + i, shared);
      tile.run(u + i * Tile::kChannels, area * columns, columns, sums);
      __syncthreads();
      if (threadIdx.x < Tile::kChannels && channel_of(i * Tile::kChannels + threadIdx.x) >= 0)
        s[i * Tile::kChannels + threadIdx.x] += sums[threadIdx.x];
    }
  __syncthreads();

  // This block's share of fc_reduce . s; then all of them together, in their order.
  const int lane = threadIdx.x % kWarp;
  for (int64_t d = threadIdx.x / kWarp; d < D; d += kWarps) {
    float total[1] = {};
    sum_in_blocks(lane, columns, kWarp, total, [&](int64_t column, float (&part)[1]) {
      const int64_t c = channel_of(static_cast<int>(column));
      if (c >= 0) part[0] += at<float>(attention.fc_reduce, d * C + c) * s[column];
    });
    total[0] = sum_of_lanes(total[0], kWarp);
    if (lane == 0) reduced[d] = total[0] / static_cast<float>(area);
  }
  wait_for_cluster();
  for (int64_t d = threadIdx.x; d < D; d += kThreads) {
    float total = 0;
    for (int other = 0; other < f.blocks; ++other) total += load_of_block(reduced + d, other);
    hidden[d] = hidden_of(attention, d, total);
  }
  // Nobody ends as long as another may read what it has.
  wait_for_cluster();

  for (int i = threadIdx.x / kWarp; i < M * columns; i += kWarps) {
    const int64_t c = channel_of(i % columns);
    if (c < 0) continue;
    float total[1] = {};
    logits_of(attention.fc_select, i / columns * C + c, D, hidden, 1, total);
    if (lane == 0) a[i] = total[0];
  }
  __syncthreads();
  for (int column = threadIdx.x; column < columns; column += kThreads)
    if (channel_of(column) >= 0) softmax(a + column, M, columns);
  __syncthreads();

  constexpr int V = 8;
  const int vectors = columns / V;
  for (int64_t i = threadIdx.x; i < area * vectors; i += kThreads) {
    const int column = static_cast<int>(i % vectors) * V;
    const int64_t c = channel_of(column), pixel = i / vectors;
    if (c < 0) continue;
    float total[V] = {};
    for (int m = 0; m < M; ++m) {
      float branch[V];
      load(u + (m * area + pixel) * columns + column, branch);
#pragma unroll
      for (int e = 0; e < V; ++e) total[e] += a[m * columns + column + e] * branch[e];
    }
    store(static_cast<T*>(f.unit.v) + (b * area + pixel) * C + c, total);
  }
}

// The tiles that there are.
template <class F> static void with_tile(int pixels, int channels, const F& f) {
  if (channels == 16) f.template operator()<Tile<128, 16>>();
  else if (channels == 32) f.template operator()<Tile<128, 32>>();
  else if (pixels == 64) f.template operator()<Tile<64, 64>>();
  else f.template operator()<Tile<128, 64>>();
}

template <class F> static void with_type(Type type, const F& f) {
  if (type == Type::float16) f.template operator()<__half>();
  else f.template operator()<__nv_bfloat16>();
}

static std::string shape_of(const Unit& f) {
  return "M = " + std::to_string(f.M) + ", B = " + std::to_string(f.B) + ", x of " + std::to_string(f.channels) + " channels, " +
         std::to_string(f.H) + " x " + std::to_string(f.W) + ", C = " + std::to_string(f.C) + ", groups = " + std::to_string(f.groups) +
         ", stride = " + std::to_string(f.stride);
}

[[noreturn]] static void refuse(const Unit& f, const std::string& what) { throw std::runtime_error("unit: " + what + ", " + shape_of(f)); }

// What every device from sm_80 on lets a block have.
constexpr int64_t kMostShared = 99 * 1024;

// A road, its tile, and its shared memory.
struct Plan {
  bool clustered;
  int pixels, channels;
  int64_t shared;
  Cut cut;
  // Of the cluster: blocks, and channel tiles of each. Of the ring: blocks that the device holds, channel tiles of an item, slots.
  int blocks, share, slots;
  // Items of an image that convolve.
  int64_t convolutions() const { return cut.pixel_tiles() * quotient(cut.channel_tiles(), share); }
};

static Cut cut_of(const Unit& f) {
  if (f.H * f.W >= int64_t{1} << 31 || f.channels >= 1 << 20 || f.C >= 1 << 20) refuse(f, "images of too many pixels or channels");
  Cut cut{};
  cut.height = static_cast<int>((f.H - 1) / f.stride + 1);
  cut.columns = static_cast<int>((f.W - 1) / f.stride + 1);
  cut.reach = *std::max_element(f.dilations, f.dilations + f.M);
  cut.channels = f.C;
  const bool packed = f.inputs < kInputs;
  cut.inputs = packed ? kInputs : f.inputs;
  cut.outputs = packed ? kInputs : f.C / f.groups;
  cut.blocks = packed ? static_cast<int>(quotient(f.C, kInputs)) : f.groups;
  return cut;
}

// Tiles of `run` pixels of `strips` strips by so many channels.
static void cut_into(const Unit& f, Cut& cut, int channels, int run, int strips) {
  const int wide = static_cast<int>(quotient(cut.columns, strips)), narrow = cut.columns / strips;
  cut.block_tiles = static_cast<int>(quotient(cut.outputs, channels));
  cut.run = run;
  cut.strips = strips;
  cut.strip_tiles = static_cast<int>(quotient(int64_t{cut.height} * wide, run));
  const int rows = static_cast<int>(quotient(run - 1, narrow)) + 1;
  cut.rows = (std::min(cut.height, rows) - 1) * f.stride + 1 + 2 * cut.reach;
  cut.row_pixels = (wide - 1) * f.stride + 1 + 2 * cut.reach;
}

// A cluster of at most 8 blocks, as every device with clusters has them, if its shared memory holds an image.
static bool plan_cluster(const Unit& f, int device, Plan& plan) {
  if (attribute_of_device(cudaDevAttrComputeCapabilityMajor, "unit", device) < 9) return false;
  const int64_t most = attribute_of_device(cudaDevAttrMaxSharedMemoryPerBlockOptin, "unit", device);
  if (plan.cut.columns > 64) return false;
  cut_into(f, plan.cut, plan.channels, plan.pixels, 1);
  plan.share = static_cast<int>(quotient(plan.cut.channel_tiles(), 8));
  plan.blocks = static_cast<int>(quotient(plan.cut.channel_tiles(), plan.share));
  plan.shared = Shares(f, plan.cut, plan.share, plan.channels).all();
  if (plan.shared > most || f.B * plan.blocks >= int64_t{1} << 31) return false;
  bool holds = false;
  with_type(f.type, [&]<class T>() {
    with_tile(plan.pixels, plan.channels, [&]<class Tile>() {
      holds = holds_cluster<_unit_in_cluster_kernel<T, Tile>>("unit", plan.blocks, plan.shared, device);
    });
  });
  return holds;
}

static void plan_ring(const Unit& f, int device, Plan& plan) {
  Cut& cut = plan.cut;
  const int fewest = static_cast<int>(quotient(cut.columns, 64)), most = std::max(fewest, cut.columns / 16);
  plan.shared = kMostShared + 1;
  for (int run = plan.pixels; plan.shared > kMostShared; run /= 2)
    for (int strips = fewest; strips <= most && plan.shared > kMostShared; ++strips) {
      cut_into(f, cut, plan.channels, run, strips);
      plan.shared = kItemBytes + cut.shared(plan.channels);
    }
  plan.shared = std::max<int64_t>(plan.shared, kItemBytes + (f.C + f.attention.D) * static_cast<int64_t>(sizeof(float)));
  if (plan.shared > kMostShared)
    refuse(f, "an attention with D = " + std::to_string(f.attention.D) + " that does not fit into shared memory");
  with_type(f.type, [&]<class T>() {
    with_tile(plan.pixels, plan.channels,
              [&]<class Tile>() { plan.blocks = resident_blocks<_unit_kernel<T, Tile>>("unit", plan.shared, device); });
  });
  // To take an item and to say that it is done costs about as much as so many multiplications; no more tiles than leave two items for
  // every block.
  constexpr int64_t kWorthwhile = 5 << 20;
  const int64_t tile = int64_t{plan.pixels} * plan.channels * kTaps * cut.inputs * f.M, tiles = cut.channel_tiles();
  const int64_t most_tiles = several(plan.channels) ? tiles : 1;
  const int64_t share = std::min({most_tiles, kWorthwhile / tile, f.B * cut.pixel_tiles() * tiles / std::max(1, 2 * plan.blocks)});
  plan.share = static_cast<int>(quotient(tiles, quotient(tiles, std::max<int64_t>(1, share))));
  // Half of the L2 cache: x, v and the weights go through it as well.
  const int64_t cache = attribute_of_device(cudaDevAttrL2CacheSize, "unit", device);
  const int64_t room = std::max<int64_t>(2, cache / 2 / (f.M * cut.area() * f.C * 2));
  const int64_t wanted = quotient(plan.blocks, plan.convolutions()) + 1;
  plan.slots = static_cast<int>(std::min({f.B, room, 2 * wanted}));
}

static Plan plan_of(const Unit& f, int device) {
  // What is asked of a kernel is asked of the current device.
  take_device("unit", device);
  Plan plan{};
  plan.cut = cut_of(f);
  plan.channels = plan.cut.outputs <= 16 ? 16 : plan.cut.outputs <= 32 ? 32 : 64;
  // Where more than a quarter of 128 pixels would be empty.
  plan.pixels = plan.channels == 64 && quotient(plan.cut.area(), 128) * 128 * 3 > plan.cut.area() * 4 ? 64 : 128;
  plan.clustered = plan_cluster(f, device, plan);
  if (!plan.clustered) plan_ring(f, device, plan);
  return plan;
}

// Bytes of the parts of the ring's scratch, in their order, each a multiple of 16.
struct Scratch {
  int64_t counts, sums, a, u;
  Scratch(const Unit& f, const Plan& plan)
      : counts(whole((1 + 3 * f.B) * sizeof(unsigned))),
        sums(whole(int64_t{plan.slots} * plan.cut.pixel_tiles() * f.C * sizeof(float))),
        a(whole(int64_t{plan.slots} * f.M * f.C * sizeof(float))),
        u(whole(plan.slots * f.M * plan.cut.area() * f.C * 2)) {}
  static int64_t whole(int64_t bytes) { return quotient(bytes, 16) * 16; }
};

static void launch_ring(const Unit& f, const Plan& plan, const std::function<void*(int64_t)>& allocate, Queue queue) {
  const Scratch sizes(f, plan);
  auto* const bytes = static_cast<unsigned char*>(allocate(sizes.counts + sizes.sums + sizes.a + sizes.u));
  auto* const counts = reinterpret_cast<unsigned*>(bytes);
  Ring ring{};
  ring.unit = f;
  ring.cut = plan.cut;
  ring.slots = plan.slots;
  ring.lag = plan.slots / 2;
  ring.share = plan.share;
  ring.convolutions = plan.convolutions();
  ring.parts = quotient(plan.cut.area() * f.C, 8 * kThreads * kSelected);
  ring.items = f.B * (ring.convolutions + ring.parts);
  ring.next = counts;
  ring.convolved = counts + 1;
  ring.attended = ring.convolved + f.B;
  ring.selected = ring.attended + f.B;
  ring.sums = reinterpret_cast<float*>(bytes + sizes.counts);
  ring.a = reinterpret_cast<float*>(bytes + sizes.counts + sizes.sums);
  ring.u = bytes + sizes.counts + sizes.sums + sizes.a;
  if (ring.items >= int64_t{1} << 31) refuse(f, "too much for one launch");
  check(cudaMemsetAsync(counts, 0, sizes.counts, queue.stream), "unit", [&] { return "setting its counters to 0, " + shape_of(f); });
  with_type(f.type, [&]<class T>() {
    with_tile(plan.pixels, plan.channels, [&]<class Tile>() {
      launch<_unit_kernel<T, Tile>>("unit", f, std::min<int64_t>(ring.items, plan.blocks), {}, plan.shared, queue, ring);
    });
  });
}

void unit(const Unit& f, const std::function<void*(int64_t)>& allocate, Queue queue) {
  const Plan plan = plan_of(f, queue.device);
  if (!plan.clustered) return launch_ring(f, plan, allocate, queue);
  const Clustered clustered{f, plan.cut, plan.blocks, plan.share};
  with_type(f.type, [&]<class T>() {
    with_tile(plan.pixels, plan.channels, [&]<class Tile>() {
      launch<_unit_in_cluster_kernel<T, Tile>>("unit", f, f.B * plan.blocks, {.cluster = plan.blocks}, plan.shared, queue, clustered);
    });
  });
}

}  // namespace sk::cuda
