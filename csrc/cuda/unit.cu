// unit: the whole eval unit in one launch. x is read once and v written once; the activated branches u never reach device memory.
//
// The output is cut into tiles of pixels, of one image or of a few small ones. u lives in a ring of tiles that stays in the L2 cache. The
// work is a list of items in a fixed order: step i of it has the convolutions of tile i, one of each channel tile, then the
// attention of the images whose last pixels are in tile i - attend_lag, and then the parts of the selection of tile i - lag. Blocks take
// the items one after the other by a counter, each the next one while it ends the last. So
//
//   a convolution of tile t waits for the parts of the selection of tile t - slots, whose place in the ring it takes;
//   the attention of an image waits for the convolutions of its tiles, the last of which is t;
//   a part of the selection of tile t waits for the attention of its images, of which none ends behind tile t + lag - attend_lag.
//
// There slots > lag, or every tile has a place.
// All wait for items that come before them in the list alone, and those have been taken, by blocks that run, and do what they took in that
// order. Of all items that are not finished the first therefore waits for nobody: it ends, and so does every one after it, however many
// blocks the device holds at a time, be it one, and in whatever order they run. Beyond that, the lags are only there to make waits short:
// what an item waits for was taken at least as many items ago as there are blocks, if the cache has room for as many tiles.

#include "attention.cuh"
#include "convolution.cuh"

namespace sk::cuda {

// Vectors of 8 channels that a thread selects at a time, of so many branches, and about how many values a part of the selection has.
constexpr int kSelected = 3, kSelectedBranches = 2, kPartValues = 16384;
// Images whose attention a block computes at a time, at most; it reads the weights once for them.
constexpr int kAttended = 4;

struct Ring {
  Unit unit;
  Cut cut;
  Layout layout;
  // Tiles that have a place; how many steps later their attention comes, and their selection; pixels of a part of it, and how many parts of
  // a tile there are; the items of a step, and all. Lanes that share a pixel's channels where it is selected. Images that are attended to
  // at a time.
  Divisor slots;
  int attend_lag, lag, part_pixels, parts;
  Divisor step_items, lanes;
  int items, together;
  // Of every slot: u, T (M, run, C). Of every image in a tile: sums over its pixels there, row tile + image. Of every image: the attention
  // (M, C).
  void* u;
  float *sums, *a;
  // The next item; of every tile its finished convolutions, whether the attention of the images that end in it is there, and its finished
  // parts of the selection.
  unsigned *next, *convolved, *attended, *selected;
};

// result(image, row, sum over k of matrix[row, k] x[image, k]) for all rows and up to kAttended images: by a block, of which kLanes lanes
// read a few rows at a time side by side.
template <int kLanes, class F>
__device__ __forceinline__ void multiply_rows(const Array& matrix, int rows, int length, const float* x, int images, const F& result) {
  // As many rows as there are registers for; 16 terms are summed before they join the total, as a long chain of additions loses more.
  constexpr int kRows = 4, kApart = kThreads / kLanes, kChain = 16;
  const int64_t lane = threadIdx.x % kLanes, terms = length;
  const auto multiply = [&](const auto& element) {
#pragma unroll 1
    for (int first = 0; first < rows; first += kRows * kApart) {
      const int own = first + static_cast<int>(threadIdx.x) / kLanes;
      float total[kRows * kAttended] = {};
      for (int64_t k = lane; k < terms;) {
        float part[kRows * kAttended] = {};
#pragma unroll 4
        for (const int64_t stop = k + kChain * kLanes < terms ? k + kChain * kLanes : terms; k < stop; k += kLanes)
#pragma unroll
          for (int j = 0; j < kRows; ++j) {
            const int row = own + j * kApart;
            const float w = element(int64_t{row < rows ? row : rows - 1} * length + k);
#pragma unroll
            for (int image = 0; image < kAttended; ++image)
              if (image < images) part[j * kAttended + image] += w * x[image * length + k];
          }
#pragma unroll
        for (int i = 0; i < kRows * kAttended; ++i) total[i] += part[i];
      }
#pragma unroll
      for (int image = 0; image < kAttended; ++image) {
        if (image >= images) break;
#pragma unroll
        for (int j = 0; j < kRows; ++j) {
          const float sum = sum_of_lanes(total[j * kAttended + image], kLanes);
          if (lane == 0 && own + j * kApart < rows) result(image, own + j * kApart, sum);
        }
      }
    }
  };
  if (matrix.type == Type::float32) {
    const float* const values = static_cast<const float*>(matrix.data);
    multiply([values](int64_t i) { return values[i]; });
  } else {
    multiply([&matrix](int64_t i) { return at<float>(matrix, i); });
  }
}

// The attention of a few images, by one block.
__device__ __forceinline__ void attend_to(const Ring& f, int first_image, int images, float* s) {
  const Attend& attention = f.unit.attention;
  const int C = f.unit.C, D = static_cast<int>(attention.D), rows = f.unit.M * C;
  float* const hidden = s + images * C;
  for (int i = 0; i < images; ++i) {
    const int image = first_image + i;
    const int first = f.cut.first_tile(image) + image, end = f.cut.last_tile(image) + image + 1;
    for (int c = threadIdx.x; c < C; c += kThreads) {
      float total = 0;
#pragma unroll 8
      for (int row = first; row < end; ++row) total += load_fresh(f.sums + int64_t{row} * C + c);
      s[i * C + c] = total / static_cast<float>(f.cut.area);
    }
  }
  __syncthreads();
  multiply_rows<kWarp>(attention.fc_reduce, D, C, s, images, [&](int i, int d, float reduced) {
    hidden[i * D + d] = Column<float>(attention, d, at<float>(attention.given_mean, d), at<float>(attention.given_var, d)).act(reduced);
  });
  __syncthreads();
  float* const a = f.a + int64_t{first_image} * rows;
  multiply_rows<8>(attention.fc_select, rows, D, hidden, images, [&](int i, int row, float logit) { a[int64_t{i} * rows + row] = logit; });
  __syncthreads();
  for (int i = 0; i < images; ++i)
    for (int c = threadIdx.x; c < C; c += kThreads) softmax(a + int64_t{i} * rows + c, f.unit.M, C);
}

// v = sum_m a_m u_m for some pixels of a tile.
template <class T> __device__ __forceinline__ void select_part(const Ring& f, int tile, int part) {
  constexpr int V = 8;
  const Pixels pixels(f.cut, tile);
  const int C = f.unit.C, lanes = f.lanes, rows = kThreads / lanes, row = static_cast<int>(threadIdx.x) / f.lanes;
  const int first = part * f.part_pixels, behind = first + f.part_pixels, end = behind < pixels.count ? behind : pixels.count;
  const int branch = f.cut.run * C;
  const T* const u = static_cast<const T*>(f.u) + int64_t{tile % f.slots} * f.unit.M * branch;
  const int first_image = pixels.first_image(f.cut);
  const bool one_image = first_image == pixels.last_image(f.cut);
  if (row >= rows) return;
  for (int c = (static_cast<int>(threadIdx.x) - row * lanes) * V; c < C; c += lanes * V)
    for (int p = first + row; p < end; p += rows * kSelected) {
      float total[kSelected][V] = {};
      int image[kSelected];
#pragma unroll
      for (int j = 0; j < kSelected; ++j)
        image[j] = one_image ? first_image : pixels.image_of(f.cut, p + j * rows < end ? p + j * rows : p);
#pragma unroll 1
      for (int m = 0; m < f.unit.M; m += kSelectedBranches) {
        uint4 packed[kSelectedBranches][kSelected] = {};
#pragma unroll
        for (int b = 0; b < kSelectedBranches; ++b)
#pragma unroll
          for (int j = 0; j < kSelected; ++j)
            if (m + b < f.unit.M && p + j * rows < end)
              packed[b][j] = load_fresh(reinterpret_cast<const uint4*>(u + ((m + b) * branch + (p + j * rows) * C + c)));
#pragma unroll
        for (int b = 0; b < kSelectedBranches; ++b) {
          if (m + b >= f.unit.M) break;
          float weights[V];
#pragma unroll
          for (int j = 0; j < kSelected; ++j) {
            if (j == 0 || image[j] != image[j - 1]) {
              const float4* const from = reinterpret_cast<const float4*>(f.a + (int64_t{image[j]} * f.unit.M + m + b) * C + c);
              const float4 halves[2] = {load_fresh(from), load_fresh(from + 1)};
              memcpy(weights, halves, sizeof(weights));
            }
            T values[V];
            memcpy(values, &packed[b][j], sizeof(values));
#pragma unroll
            for (int i = 0; i < V; ++i) total[j][i] += weights[i] * widen(values[i]);
          }
        }
      }
#pragma unroll
      for (int j = 0; j < kSelected; ++j)
        if (p + j * rows < end) store(static_cast<T*>(f.unit.v) + int64_t{pixels.output(f.cut, p + j * rows)} * C + c, total[j]);
    }
}

enum class Work { convolve, attend, select };

// An item of the list.
struct Item {
  Work work;
  int tile, index;

  __device__ __forceinline__ Item(const Ring& f, int i) {
    const int step = i / f.step_items, rest = i - step * f.step_items, convolutions = f.cut.channel_tiles();
    work = rest < convolutions ? Work::convolve : rest == convolutions ? Work::attend : Work::select;
    tile = work == Work::convolve ? step : work == Work::attend ? step - f.attend_lag : step - f.lag;
    index = work == Work::select ? rest - convolutions - 1 : rest;
  }
  // Before the first tile and behind the last one there is nothing to do, nor where no image ends.
  __device__ __forceinline__ bool is_empty(const Ring& f) const {
    return tile < 0 || tile >= f.cut.tiles || (work == Work::attend && first_image(f) == end_image(f));
  }
  // The images that are attended to.
  __device__ __forceinline__ int first_image(const Ring& f) const { return f.cut.first_ending(tile); }
  __device__ __forceinline__ int end_image(const Ring& f) const {
    const int end = f.cut.first_ending(tile + 1), all = static_cast<int>(f.unit.B);
    return end < all ? end : all;
  }

  // By a warp, of which every lane waits for one tile.
  __device__ __forceinline__ void wait(const Ring& f, int lane) const {
    if (work == Work::convolve) {
      if (lane == 0 && tile >= f.slots) wait_for(f.selected + tile - f.slots, f.parts);
    } else if (work == Work::attend) {
      for (int t = f.cut.first_tile(first_image(f)) + lane; t <= tile; t += kWarp) wait_for(f.convolved + t, f.cut.channel_tiles());
    } else {
      const Pixels pixels(f.cut, tile);
      const int image = pixels.first_image(f.cut) + lane;
      if (image <= pixels.last_image(f.cut)) wait_for(f.attended + f.cut.last_tile(image), 1);
    }
  }
  static __device__ __forceinline__ void wait_for(const unsigned* count, int all) {
    while (read_count(count) < static_cast<unsigned>(all)) wait_a_little();
  }
  __device__ __forceinline__ unsigned* counted(const Ring& f) const {
    return (work == Work::convolve ? f.convolved : work == Work::attend ? f.attended : f.selected) + tile;
  }
};

// What comes first in the shared memory: the numbers of an item and of the one before it, and its tile. Registers are few.
struct Taken {
  int number, last, tile;
};
static_assert(sizeof(Taken) <= Layout::kWhere);

template <class T, class Tile> __global__ __launch_bounds__(kThreads, 2) void _unit_kernel(const __grid_constant__ Ring f) {
  // Where four warps cannot multiply together, nobody asks for it.
  if constexpr (Tile::kWide && !kFourWarpsTogether) return;
  unsigned char* const shared = shared_matrices();
  Taken* const taken = reinterpret_cast<Taken*>(shared);
  Where* const where = reinterpret_cast<Where*>(shared + Layout::kWhere);
  // Of the first thread: the next item's number.
  unsigned next = 0;
  const auto take = [&] {
    if (threadIdx.x == 0) next = take_number(f.next);
  };
  if (threadIdx.x == 0) taken->number = -1;
  take();
  for (;;) {
    if (threadIdx.x == 0) {
      while (next < static_cast<unsigned>(f.items) && Item(f, static_cast<int>(next)).is_empty(f)) take();
      taken->last = taken->number;
      taken->number = next < static_cast<unsigned>(f.items) ? static_cast<int>(next) : f.items;
    }
    __syncthreads();
    // All of the block have done their part of the last item: the fence of one thread speaks for them.
    if (threadIdx.x == 2 * kWarp && taken->last >= 0) add_to_count(Item(f, taken->last).counted(f));
    if (taken->number == f.items) return;
    const Item item(f, taken->number);
    if (threadIdx.x < kWarp) item.wait(f, threadIdx.x);
    if (threadIdx.x == kWarp) {
      taken->tile = item.tile;
      if (item.work == Work::convolve) *where = Where(f.unit, f.cut, item.tile, item.index, Tile::kChannels);
    }
    __syncthreads();
    if (item.work == Work::convolve) {
      Convolution<T, Tile>(f.unit, f.cut, f.layout, shared)
          .run([&](int m) { return static_cast<T*>(f.u) + (int64_t{taken->tile % f.slots} * f.unit.M + m) * f.cut.run * f.unit.C; },
               [&] { return f.sums + int64_t{taken->tile} * f.unit.C; }, take);
    } else if (item.work == Work::attend) {
      take();
      const int end = item.end_image(f);
#pragma unroll 1
      for (int image = item.first_image(f); image < end; image += f.together) {
        attend_to(f, image, end - image < f.together ? end - image : f.together, reinterpret_cast<float*>(shared + Layout::kNorms));
        __syncthreads();
      }
    } else {
      take();
      select_part<T>(f, item.tile, item.index);
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
  int blocks, slots, attend_lag, lag, part_pixels, parts, together;
};

static Cut cut_of(const Unit& f) {
  if (f.B * f.H * f.W >= int64_t{1} << 31 || f.W >= 1 << 17 || f.channels >= 1 << 20 || f.C >= 1 << 20 ||
      int64_t{f.C} * kTaps * f.inputs >= int64_t{1} << 31)
    refuse(f, "too many pixels, channels or weights");
  Cut cut{};
  cut.height = Divisor((f.H - 1) / f.stride + 1);
  cut.columns = Divisor((f.W - 1) / f.stride + 1);
  cut.area = Divisor(cut.height * cut.columns);
  cut.reach = *std::max_element(f.dilations, f.dilations + f.M);
  cut.channels = f.C;
  cut.share = f.split ? f.channels / f.M : f.channels;
  return cut;
}

// Tiles of `run` pixels of `strips` strips.
static void cut_into(const Unit& f, Cut& cut, int run, int strips) {
  const int narrow = cut.columns / strips, wide = static_cast<int>(quotient(cut.columns, strips));
  const int64_t read_width = std::min<int64_t>(f.W, (wide - 1) * f.stride + 1 + 2 * cut.reach);
  const int64_t all_rows = (strips == 1 ? f.B : 1) * f.H, rows = quotient(run - 1, narrow);
  cut.run = Divisor(run);
  cut.strips = Divisor(strips);
  cut.strip_rows = static_cast<int>(strips == 1 ? f.B * cut.height : cut.height);
  cut.strip_tiles = Divisor(quotient(int64_t{cut.strip_rows} * wide, run));
  cut.tiles = static_cast<int>(strips == 1 ? cut.strip_tiles : f.B * strips * cut.strip_tiles);
  for (int kind : {0, 1}) {
    cut.width[kind] = Divisor(narrow + kind);
    cut.image_pixels[kind] = Divisor(int64_t{cut.height} * (narrow + kind));
  }
  cut.read = static_cast<int>(
      std::min(all_rows * read_width, f.stride * (run - 1 + rows * (read_width - narrow)) + 1 + 2 * cut.reach * (read_width + 1)));
}

template <class Tile> static void plan_tile(const Unit& f, int device, Plan& plan) {
  Cut& cut = plan.cut;
  cut.blocks = Tile::kSeveral ? 1 : f.groups;
  cut.inputs = Tile::kSeveral ? Tile::kBlock : f.inputs;
  cut.outputs = f.C / cut.blocks;
  cut.block_tiles = Divisor(quotient(cut.outputs, Tile::kChannels));
  cut.chunks = Divisor(quotient(cut.inputs, Tile::kInputs));
  cut.parts = !f.split && cut.chunks == 1 ? 1 : f.M * cut.chunks;
  const int fewest = static_cast<int>(quotient(cut.columns, 256)), most = std::max<int>(fewest, cut.columns.value / 16);
  plan.shared = kMostShared + 1;
  // No more images than a tile may have.
  const int64_t longest = int64_t{cut.area} * (kMostImages - 1) + 1;
  for (int run = static_cast<int>(std::min<int64_t>(Tile::kPixels, longest)); plan.shared > kMostShared && run > 0; run /= 2)
    for (int strips = fewest; strips <= most && plan.shared > kMostShared; ++strips) {
      cut_into(f, cut, run, strips);
      plan.layout = Layout::of(Tile{}, f.M, cut);
      plan.shared = plan.layout.all;
    }
  const int64_t an_image = (f.C + f.attention.D) * static_cast<int64_t>(sizeof(float));
  if (Layout::kNorms + an_image > kMostShared)
    refuse(f, "an attention with D = " + std::to_string(f.attention.D) + " that does not fit into shared memory");
  plan.together = static_cast<int>(std::min<int64_t>(kAttended, (kMostShared - Layout::kNorms) / an_image));
  plan.shared = std::max(plan.shared, Layout::kNorms + plan.together * an_image);
  with_type(f.type, [&]<class T>() { plan.blocks = resident_blocks<_unit_kernel<T, Tile>>("unit", plan.shared, device); });
  plan.part_pixels = static_cast<int>(std::clamp<int64_t>(kPartValues / f.C, 1, cut.run));
  plan.parts = static_cast<int>(quotient(cut.run, plan.part_pixels));

  // How many tiles the last one of an image may lie behind one that it is in.
  const int behind =
      static_cast<int>(cut.strips == 1 ? quotient(int64_t{cut.area} + cut.run - 2, cut.run) : int64_t{cut.strips} * cut.strip_tiles - 1);
  const int64_t tile = int64_t{f.M} * cut.run * f.C * 2, taken = quotient(plan.blocks, cut.channel_tiles() + plan.parts) + 1;
  // Most of the L2 cache: x, v and the weights go through it as well. For every wait the steps that are under way at a time, and twice for
  // that of the convolutions, which take longest, if there is room.
  const int64_t room = attribute_of_device(cudaDevAttrL2CacheSize, "unit", device) * int64_t{3} / 4 / tile;
  const int64_t wait = std::clamp<int64_t>((room - behind - 1) / 4, 0, std::min<int64_t>(taken, cut.tiles));
  plan.attend_lag = static_cast<int>(2 * wait);
  plan.lag = static_cast<int>(behind + 3 * wait);
  plan.slots = static_cast<int>(std::min<int64_t>(plan.lag + 1 + wait, cut.tiles));
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
      : counts(whole((1 + 3 * int64_t{plan.cut.tiles}) * sizeof(unsigned))),
        sums(whole((plan.cut.tiles + f.B) * f.C * sizeof(float))),
        a(whole(f.B * f.M * f.C * sizeof(float))),
        u(whole(int64_t{plan.slots} * f.M * plan.cut.run * f.C * 2)) {}
  static int64_t whole(int64_t bytes) { return quotient(bytes, 16) * 16; }
};

void unit(const Unit& f, const std::function<void*(int64_t)>& allocate, Queue queue) {
  const Plan plan = plan_of(f, queue.device);
  const Scratch sizes(f, plan);
  const int64_t step_items = plan.cut.channel_tiles() + 1 + plan.parts, items = (int64_t{plan.cut.tiles} + plan.lag) * step_items;
  if (items >= int64_t{1} << 30) refuse(f, "too much for one launch");
  auto* const bytes = static_cast<unsigned char*>(allocate(sizes.counts + sizes.sums + sizes.a + sizes.u));
  auto* const counts = reinterpret_cast<unsigned*>(bytes);
  Ring ring{};
  ring.unit = f;
  ring.cut = plan.cut;
  ring.layout = plan.layout;
  ring.slots = Divisor(plan.slots);
  ring.attend_lag = plan.attend_lag;
  ring.lag = plan.lag;
  ring.part_pixels = plan.part_pixels;
  ring.parts = plan.parts;
  ring.step_items = Divisor(step_items);
  ring.lanes = Divisor(std::min(f.C / 8, kThreads));
  ring.items = static_cast<int>(items);
  ring.together = plan.together;
  ring.next = counts;
  ring.convolved = counts + 1;
  ring.attended = ring.convolved + plan.cut.tiles;
  ring.selected = ring.attended + plan.cut.tiles;
  ring.sums = reinterpret_cast<float*>(bytes + sizes.counts);
  ring.a = reinterpret_cast<float*>(bytes + sizes.counts + sizes.sums);
  ring.u = bytes + sizes.counts + sizes.sums + sizes.a;
  check(cudaMemsetAsync(counts, 0, sizes.counts, queue.stream), "unit", [&] { return "setting its counters to 0, " + shape_of(f); });
  with_type(f.type, [&]<class T>() {
    with_tile(plan.channels, plan.block, plan.wide, [&]<class Tile>() {
      launch<_unit_kernel<T, Tile>>("unit", f, std::min<int64_t>(items, plan.blocks), Blocks::alone, plan.shared, queue, ring);
    });
  });
}

}  // namespace sk::cuda
