// unit: the whole eval unit in one launch. x is read once and v written once; the activated branches u never reach device memory.
//
// The output is cut into tiles of pixels, of one image or of a few small ones. u lives in a ring of tiles that stays in the L2 cache. The
// work is a list of items in a fixed order: step i of it has the convolutions of pixel tile i, one or a few of each channel tile, and then the parts
// of the selection of pixel tile i - lag. Blocks take the items one after the other by a counter. Whoever finishes the last convolution of
// an image computes its attention. So
//
//   a part of the selection of tile t waits for the convolutions of all images in t, of which one computes an image's attention;
//   a convolution of tile t waits for the parts of the selection of tile t - slots, whose place in the ring it takes.
//
// No image in tile t has pixels beyond tile t + lag, and lag < slots, so both wait for items that come before them in the list alone, and
// those have been taken, by blocks that run. Of all items that are not finished the first therefore waits for nobody: it ends, and so does
// every one after it, however many blocks the device holds at a time, be it one, and in whatever order they run. Beyond that, lag and slots
// are only there to make waits short: when an item is taken, what it waits for was taken at least as many items ago as there are blocks, if
// the cache has room for as many tiles.

#include "attention.cuh"
#include "convolution.cuh"

namespace sk::cuda {

// Vectors of 8 channels that a thread selects at a time, and about how many values a part of the selection has.
constexpr int kSelected = 4, kPartValues = 16384;

struct Ring {
  Unit unit;
  Cut cut;
  Layout layout;
  // Tiles that have a place; how many tiles later the selection comes; pixels of a part of it, and how many parts of a tile there are; all
  // items.
  int slots, lag, part_pixels, parts;
  unsigned items;
  // Of every slot: u, T (M, run, C). Of every image in a tile: sums over its pixels there, row (tile + image) * pieces + piece. Of every image: the
  // attention (M, C).
  void* u;
  float *sums, *a;
  // The next item; of every image its finished convolutions, and whether its attention is there; of every tile its finished parts of the
  // selection.
  unsigned *next, *convolved, *attended, *selected;
};

// What comes first in the shared memory: an item; 2: there are no more; and then whether an image of its tile is complete.
struct Taken {
  int convolves, tile, index;
  bool complete[kMostImages];
};
static_assert(sizeof(Taken) <= Layout::kWhere);

// term(get) with get(i) = element i.
template <class F> __device__ __forceinline__ void with_elements(const Array& array, const F& term) {
  if (array.type == Type::float32) {
    const float* const values = static_cast<const float*>(array.data);
    term([values](int64_t i) { return values[i]; });
  } else {
    term([&array](int64_t i) { return at<float>(array, i); });
  }
}

// The attention of one image, by one block, four rows of a matrix at a time.
__device__ __forceinline__ void attend_to(const Ring& f, int image, float* s) {
  constexpr int kTogether = 4;
  const Attend& attention = f.unit.attention;
  const int C = f.unit.C, D = static_cast<int>(attention.D), lane = threadIdx.x % kWarp, rows = f.unit.M * C;
  float* const hidden = s + C;
  const int first = (f.cut.first_tile(image) + image) * f.cut.pieces, end = (f.cut.last_tile(image) + image + 1) * f.cut.pieces;
  for (int c = threadIdx.x; c < C; c += kThreads) {
    float total = 0;
#pragma unroll 8
    for (int row = first; row < end; ++row) total += load_fresh(f.sums + int64_t{row} * C + c);
    s[c] = total / static_cast<float>(f.cut.area());
  }
  __syncthreads();
  with_elements(attention.fc_reduce, [&](const auto& weight) {
    for (int d = threadIdx.x / kWarp * kTogether; d < D; d += kWarps * kTogether) {
      float total[kTogether] = {};
      sum_in_blocks(lane, C, kWarp, total, [&](int64_t c, float(&part)[kTogether]) {
#pragma unroll
        for (int k = 0; k < kTogether; ++k) part[k] += weight(int64_t{d + k < D ? d + k : d} * C + c) * s[c];
      });
#pragma unroll
      for (int k = 0; k < kTogether; ++k) total[k] = sum_of_lanes(total[k], kWarp);
      if (lane < kTogether && d + lane < D) {
        const float reduced = lane == 0 ? total[0] : lane == 1 ? total[1] : lane == 2 ? total[2] : total[3];
        hidden[d + lane] = Column<float>(attention, d + lane, at<float>(attention.given_mean, d + lane),
                                         at<float>(attention.given_var, d + lane)).act(reduced);
      }
    }
  });
  __syncthreads();
  float* const a = f.a + int64_t{image} * rows;
  with_elements(attention.fc_select, [&](const auto& weight) {
    for (int row = threadIdx.x; row < rows; row += kThreads * kTogether) {
      float total[kTogether] = {};
      sum_in_blocks(0, D, 1, total, [&](int64_t d, float(&part)[kTogether]) {
#pragma unroll
        for (int k = 0; k < kTogether; ++k)
          part[k] += weight(int64_t{row + k * kThreads < rows ? row + k * kThreads : row} * D + d) * hidden[d];
      });
#pragma unroll
      for (int k = 0; k < kTogether; ++k)
        if (row + k * kThreads < rows) a[row + k * kThreads] = total[k];
    }
  });
  __syncthreads();
  for (int c = threadIdx.x; c < C; c += kThreads) softmax(a + c, f.unit.M, C);
}

// v = sum_m a_m u_m for some pixels of a tile.
template <class T> __device__ __forceinline__ void select_part(const Ring& f, int tile, int part) {
  constexpr int V = 8;
  const Pixels pixels(f.cut, tile);
  const int C = f.unit.C, vectors = C / V, lanes = vectors < kThreads ? vectors : kThreads, rows = kThreads / lanes;
  const int first = part * f.part_pixels, behind = first + f.part_pixels, end = behind < pixels.count ? behind : pixels.count;
  const int64_t branch = int64_t{f.cut.run} * C;
  const T* const u = static_cast<const T*>(f.u) + tile % f.slots * f.unit.M * branch;
  const int first_image = pixels.first_image();
  const bool one_image = first_image == pixels.last_image();
  if (threadIdx.x >= static_cast<unsigned>(lanes * rows)) return;
  for (int c = threadIdx.x % lanes * V; c < C; c += lanes * V)
    for (int p = first + threadIdx.x / lanes; p < end; p += rows * kSelected) {
      float total[kSelected][V] = {};
      int image[kSelected];
#pragma unroll
      for (int j = 0; j < kSelected; ++j) image[j] = one_image ? first_image : pixels.image_of(p + j * rows < end ? p + j * rows : p);
#pragma unroll 1
      for (int m = 0; m < f.unit.M; ++m) {
        uint4 packed[kSelected] = {};
#pragma unroll
        for (int j = 0; j < kSelected; ++j)
          if (p + j * rows < end) packed[j] = load_fresh(reinterpret_cast<const uint4*>(u + m * branch + int64_t{p + j * rows} * C + c));
        float weights[V];
#pragma unroll
        for (int j = 0; j < kSelected; ++j) {
          if (j == 0 || image[j] != image[j - 1]) {
            const float4* const from = reinterpret_cast<const float4*>(f.a + (int64_t{image[j]} * f.unit.M + m) * C + c);
            const float4 halves[2] = {load_fresh(from), load_fresh(from + 1)};
            memcpy(weights, halves, sizeof(weights));
          }
          T values[V];
          memcpy(values, &packed[j], sizeof(values));
#pragma unroll
          for (int i = 0; i < V; ++i) total[j][i] += weights[i] * widen(values[i]);
        }
      }
#pragma unroll
      for (int j = 0; j < kSelected; ++j)
        if (p + j * rows < end) store(static_cast<T*>(f.unit.v) + int64_t{pixels.output(f.cut, p + j * rows)} * C + c, total[j]);
    }
}

// An item of the list.
struct Item {
  bool convolves;
  int tile, index;

  // Steps 0 ... lag - 1 convolve, the next ones do both, the last `lag` select.
  __device__ __forceinline__ Item(const Ring& f, unsigned i) {
    const unsigned convolutions = f.cut.convolutions(), parts = f.parts, lag = f.lag, tiles = f.cut.tiles;
    unsigned step = i / convolutions, rest = i % convolutions;
    if (step >= lag) {
      i -= lag * convolutions;
      step = lag + i / (convolutions + parts);
      rest = i % (convolutions + parts);
      if (step >= tiles) {
        i -= (tiles - lag) * (convolutions + parts);
        step = tiles + i / parts;
        rest = convolutions + i % parts;
      }
    }
    convolves = rest < convolutions;
    tile = static_cast<int>(convolves ? step : step - lag);
    index = static_cast<int>(convolves ? rest : rest - convolutions);
  }

  __device__ __forceinline__ void wait(const Ring& f) const {
    if (convolves) {
      if (tile >= f.slots)
        while (read_count(f.selected + tile - f.slots) < static_cast<unsigned>(f.parts)) wait_a_little();
    } else {
      const Pixels pixels(f.cut, tile);
      for (int image = pixels.first_image(), last = pixels.last_image(); image <= last; ++image)
        while (read_count(f.attended + image) == 0) wait_a_little();
    }
  }
};

template <class T, class Tile> __global__ __launch_bounds__(kThreads, 2) void _unit_kernel(const __grid_constant__ Ring f) {
  // Where four warps cannot multiply together, nobody asks for it.
  if constexpr (Tile::kWide && !kFourWarpsTogether) return;
  unsigned char* const shared = shared_matrices();
  Taken* const taken = reinterpret_cast<Taken*>(shared);
  Where* const where = reinterpret_cast<Where*>(shared + Layout::kWhere);
  for (;;) {
    if (threadIdx.x == 0) {
      const unsigned next = take_number(f.next);
      taken->convolves = 2;
      if (next < f.items) {
        const Item item(f, next);
        item.wait(f);
        taken->convolves = item.convolves;
        taken->tile = item.tile;
        taken->index = item.index;
        if (item.convolves) *where = Where(f.unit, f.cut, item.tile, item.index, Tile::kChannels);
      }
    }
    __syncthreads();
    if (taken->convolves == 2) return;
    // After all of the block have done their part, one thread counts it: its fence speaks for all, as they met before.
    if (taken->convolves == 0) {
      select_part<T>(f, taken->tile, taken->index);
      __syncthreads();
      if (threadIdx.x == 0) add_to_count(f.selected + taken->tile);
      continue;
    }
    Convolution<T, Tile>(f.unit, f.cut, f.layout, shared)
        .run(
            [&](int m) { return static_cast<T*>(f.u) + (int64_t{taken->tile % f.slots} * f.unit.M + m) * f.cut.run * f.unit.C; },
            [&] { return f.sums + (int64_t{taken->tile} * f.cut.pieces + where->first_branch % f.cut.pieces) * f.unit.C; });
    __syncthreads();
    const int first = where->first_image(), images = where->last_image() - first + 1;
    if (static_cast<int>(threadIdx.x) < images) {
      const int image = first + static_cast<int>(threadIdx.x);
      const unsigned all = (f.cut.last_tile(image) - f.cut.first_tile(image) + 1) * f.cut.convolutions();
      taken->complete[threadIdx.x] = add_to_count(f.convolved + image) + 1 == all;
    }
    __syncthreads();
#pragma unroll 1
    for (int i = 0; i < images; ++i) {
      if (!taken->complete[i]) continue;
      attend_to(f, first + i, reinterpret_cast<float*>(shared + Layout::kNorms));
      __syncthreads();
      if (threadIdx.x == 0) add_to_count(f.attended + first + i);
    }
  }
}

// The tiles that there are: of several small blocks, and of one.
template <class F> static void with_tile(int channels, int block, bool wide, const F& f) {
  if (block == 16) f.template operator()<Tile<256, 64, 16, false>>();
  else if (block == 32) f.template operator()<Tile<256, 64, 32, false>>();
  else if (channels == 128 && wide) f.template operator()<Tile<128, 128, 128, true>>();
  else if (channels == 128) f.template operator()<Tile<128, 128, 128, false>>();
  else if (wide) f.template operator()<Tile<256, 64, 64, true>>();
  else f.template operator()<Tile<256, 64, 64, false>>();
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

// A tile, its shared memory, the blocks that the device holds, and the ring.
struct Plan {
  int channels, block;
  bool wide;
  int64_t shared;
  Cut cut;
  Layout layout;
  int blocks, slots, lag, part_pixels, parts;
};

static Cut cut_of(const Unit& f) {
  if (f.B * f.H * f.W >= int64_t{1} << 31 || f.channels >= 1 << 20 || f.C >= 1 << 20) refuse(f, "too many pixels or channels");
  Cut cut{};
  cut.height = static_cast<int>((f.H - 1) / f.stride + 1);
  cut.columns = static_cast<int>((f.W - 1) / f.stride + 1);
  cut.reach = *std::max_element(f.dilations, f.dilations + f.M);
  cut.channels = f.C;
  return cut;
}

// Tiles of `run` pixels of `strips` strips.
static void cut_into(const Unit& f, Cut& cut, int run, int strips) {
  const int wide = static_cast<int>(quotient(cut.columns, strips)), narrow = cut.columns / strips;
  const int64_t read_width = std::min<int64_t>(f.W, (wide - 1) * f.stride + 1 + 2 * cut.reach);
  const int64_t all_rows = (strips == 1 ? f.B : 1) * f.H, rows = quotient(run - 1, narrow);
  cut.run = run;
  cut.strips = strips;
  cut.strip_rows = static_cast<int>(strips == 1 ? f.B * cut.height : cut.height);
  cut.strip_tiles = static_cast<int>(quotient(int64_t{cut.strip_rows} * wide, run));
  cut.tiles = static_cast<int>(strips == 1 ? cut.strip_tiles : f.B * strips * cut.strip_tiles);
  cut.read = static_cast<int>(
      std::min(all_rows * read_width, f.stride * (run - 1 + rows * (read_width - narrow)) + 1 + 2 * cut.reach * (read_width + 1)));
}

template <class Tile> static void plan_tile(const Unit& f, int device, Plan& plan) {
  Cut& cut = plan.cut;
  cut.blocks = Tile::kSeveral ? 1 : f.groups;
  cut.inputs = Tile::kSeveral ? Tile::kBlock : f.inputs;
  cut.outputs = f.C / cut.blocks;
  cut.block_tiles = static_cast<int>(quotient(cut.outputs, Tile::kChannels));
  cut.chunks = static_cast<int>(quotient(cut.inputs, Tile::kInputs));
  // One branch alone is work enough where it has many inputs, and smaller items leave fewer blocks idle at the end. It does not depend on the
  // device, as the order of the sums does on it.
  cut.pieces = cut.chunks >= 4 ? f.M : 1;
  cut.parts = !f.split && cut.chunks == 1 ? 1 : f.M * cut.chunks;
  const int fewest = static_cast<int>(quotient(cut.columns, 256)), most = std::max(fewest, cut.columns / 16);
  plan.shared = kMostShared + 1;
  // No more images than a tile may have.
  const int64_t longest = int64_t{cut.area()} * (kMostImages - 1) + 1;
  for (int run = static_cast<int>(std::min<int64_t>(Tile::kPixels, longest)); plan.shared > kMostShared && run > 0; run /= 2)
    for (int strips = fewest; strips <= most && plan.shared > kMostShared; ++strips) {
      cut_into(f, cut, run, strips);
      plan.layout = Layout::of(Tile{}, f.M, cut);
      plan.shared = plan.layout.all;
    }
  plan.shared = std::max<int64_t>(plan.shared, Layout::kNorms + (f.C + f.attention.D) * static_cast<int64_t>(sizeof(float)));
  if (plan.shared > kMostShared)
    refuse(f, "an attention with D = " + std::to_string(f.attention.D) + " that does not fit into shared memory");
  with_type(f.type, [&]<class T>() { plan.blocks = resident_blocks<_unit_kernel<T, Tile>>("unit", plan.shared, device); });

  // How many tiles the last one of an image may lie behind one that it is in.
  const int64_t behind = cut.strips == 1 ? quotient(cut.area() + cut.run - 2, cut.run) : int64_t{cut.strips} * cut.strip_tiles - 1;
  const int64_t wanted = quotient(plan.blocks, cut.convolutions()) + 1, tile = int64_t{f.M} * cut.run * f.C * 2;
  // Half of the L2 cache: x, v and the weights go through it as well.
  const int64_t room = attribute_of_device(cudaDevAttrL2CacheSize, "unit", device) / 2 / tile;
  const int64_t slots = std::max(behind + 1, std::min(2 * wanted + behind, room));
  plan.slots = static_cast<int>(std::min<int64_t>(slots, cut.tiles + behind));
  plan.lag = static_cast<int>(std::min<int64_t>(cut.tiles, behind + (plan.slots - behind) / 2));
  plan.part_pixels = static_cast<int>(std::clamp<int64_t>(kPartValues / f.C, 1, cut.run));
  plan.parts = static_cast<int>(quotient(cut.run, plan.part_pixels));
}

static Plan plan_of(const Unit& f, int device) {
  // What is asked of a kernel is asked of the current device.
  take_device("unit", device);
  Plan plan{};
  plan.cut = cut_of(f);
  const int outputs = f.C / f.groups;
  plan.block = f.inputs <= 16 && f.inputs == outputs ? 16 : f.inputs == 32 && outputs == 32 && f.groups > 1 ? 32 : 0;
  plan.channels = plan.block == 0 && outputs > 64 ? 128 : 64;
  plan.wide = attribute_of_device(cudaDevAttrComputeCapabilityMajor, "unit", device) == 9;
  with_tile(plan.channels, plan.block, plan.wide, [&]<class Tile>() { plan_tile<Tile>(f, device, plan); });
  return plan;
}

// Bytes of the parts of the scratch memory, in their order, each a multiple of 16.
struct Scratch {
  int64_t counts, sums, a, u;
  Scratch(const Unit& f, const Plan& plan)
      : counts(whole((1 + 2 * f.B + plan.cut.tiles) * sizeof(unsigned))),
        sums(whole((plan.cut.tiles + f.B) * plan.cut.pieces * f.C * sizeof(float))),
        a(whole(f.B * f.M * f.C * sizeof(float))),
        u(whole(int64_t{plan.slots} * f.M * plan.cut.run * f.C * 2)) {}
  static int64_t whole(int64_t bytes) { return quotient(bytes, 16) * 16; }
};

void unit(const Unit& f, const std::function<void*(int64_t)>& allocate, Queue queue) {
  const Plan plan = plan_of(f, queue.device);
  const Scratch sizes(f, plan);
  const int64_t items = int64_t{plan.cut.tiles} * (plan.cut.convolutions() + plan.parts);
  if (items >= int64_t{1} << 31) refuse(f, "too much for one launch");
  auto* const bytes = static_cast<unsigned char*>(allocate(sizes.counts + sizes.sums + sizes.a + sizes.u));
  auto* const counts = reinterpret_cast<unsigned*>(bytes);
  Ring ring{};
  ring.unit = f;
  ring.cut = plan.cut;
  ring.layout = plan.layout;
  ring.slots = plan.slots;
  ring.lag = plan.lag;
  ring.part_pixels = plan.part_pixels;
  ring.parts = plan.parts;
  ring.items = static_cast<unsigned>(items);
  ring.next = counts;
  ring.convolved = counts + 1;
  ring.attended = ring.convolved + f.B;
  ring.selected = ring.attended + f.B;
  ring.sums = reinterpret_cast<float*>(bytes + sizes.counts);
  ring.a = reinterpret_cast<float*>(bytes + sizes.counts + sizes.sums);
  ring.u = bytes + sizes.counts + sizes.sums + sizes.a;
  check(cudaMemsetAsync(counts, 0, sizes.counts, queue.stream), "unit", [&] { return "setting its counters to 0, " + shape_of(f); });
  with_type(f.type, [&]<class T>() {
    with_tile(plan.channels, plan.block, plan.wide, [&]<class Tile>() {
      launch<_unit_kernel<T, Tile>>("unit", f, std::min<int64_t>(items, plan.blocks), {}, plan.shared, queue, ring);
    });
  });
}

}  // namespace sk::cuda
