// squeeze: the statistics of the branches, and the sums over the pixels that the pooled descriptor rests on, with the batch-norms
// folded on the way; select_backward_sums, the same sums weighted by a gradient; fold_backward, what the batch-norms get of them.
//
// Bytes moved, at the least: M branches read; with a gradient, it as well. Sums are taken in two stages in an order that depends on
// the shape alone: parts, then, after the whole grid has arrived, the sums of the parts.

#include "common.cuh"

namespace sk::cuda {

// n values of each of some channels: their means, and the sums of the squares of the deviations from them (Chan, Golub, LeVeque 1979).
template <class A, int kWidth> struct Moments {
  A n, mean[kWidth], square[kWidth];

  __device__ __forceinline__ void join_lanes(int span, int apart) {
    for (int o = span / 2; o >= apart; o /= 2) {
      const A other_n = __shfl_xor_sync(kAllLanes, n, o), total = n + other_n, share = total == 0 ? A(0) : other_n / total;
#pragma unroll
      for (int w = 0; w < kWidth; ++w) {
        const A d = __shfl_xor_sync(kAllLanes, mean[w], o) - mean[w];
        mean[w] += d * share;
        square[w] += __shfl_xor_sync(kAllLanes, square[w], o) + d * d * n * share;
      }
      n = total;
    }
  }
};

__device__ __forceinline__ float about_one_over(float x) { return __fdividef(1.0f, x); }
__device__ __forceinline__ double about_one_over(double x) { return 1.0 / x; }

// Sums of deviations from a shift that follows the mean: what is far from 0 beside its spread, or from the first values, would lose its
// last digits.
template <class T, int kWidth> struct ShiftedSums {
  using A = Accumulate<T>;
  const T* y;
  A n = 0, shift[kWidth] = {}, sum[kWidth] = {}, square[kWidth] = {};
  static constexpr int kBatch = 4, kTogether = 1;

  __device__ __forceinline__ int tensors() const { return 1; }
  __device__ __forceinline__ const T* tensor(int) const { return y; }
  __device__ __forceinline__ void begin(int64_t offset) {
    if (n == 0) load(y + offset, shift);
  }

  template <int V, int kCount> __device__ __forceinline__ void use(int, const Packed<V, T> (&x)[kCount], int64_t, int, int count) {
    // Values of a channel in a vector.
    constexpr int kEach = kWidth == 1 ? V : 1;
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      if (j >= count) break;
#pragma unroll
      for (int w = 0; w < kWidth; ++w)
#pragma unroll
        for (int e = 0; e < kEach; ++e) {
          const A d = x[j][w + e] - shift[w];
          sum[w] += d;
          square[w] += d * d;
        }
    }
    n += static_cast<A>(count * kEach);
    const A each = about_one_over(n);
#pragma unroll
    for (int w = 0; w < kWidth; ++w) {
      // What the shift really moves by, however it is rounded.
      const A to = shift[w] + sum[w] * each, moved = to - shift[w], rest = sum[w] - n * moved;
      square[w] -= moved * (sum[w] + rest);
      sum[w] = rest;
      shift[w] = to;
    }
  }

  // As seen from `base`.
  __device__ __forceinline__ Moments<A, kWidth> moments(const A (&base)[kWidth]) const {
    Moments<A, kWidth> out{n, {}, {}};
    const A each = n == 0 ? A(0) : A(1) / n;
#pragma unroll
    for (int w = 0; w < kWidth; ++w) {
      out.mean[w] = n == 0 ? A(0) : shift[w] - base[w] + sum[w] * each;
      out.square[w] = square[w] - sum[w] * sum[w] * each;
    }
    return out;
  }
};

struct Statistics {
  Branches ys;
  Geometry s;
  bool vectors;
  void *counts, *means, *squares, *mean, *var;
};

// A block sums over images or parts for 8 channels, a sector of memory: thread i has channel i % 8, and those of slice i / 8.
constexpr int kSector = 8, kSlices = kThreads / kSector;

// What the slices of a channel sum up to, in slice 0.
template <int N, class A> __device__ __forceinline__ void sum_slices(A (&x)[N]) {
  A* const shared = shared_memory<A>();
  __syncthreads();
#pragma unroll
  for (int i = 0; i < N; ++i) shared[i * kThreads + threadIdx.x] = x[i];
  __syncthreads();
  if (threadIdx.x >= kSector) return;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    A total[4] = {};
#pragma unroll
    for (int slice = 0; slice < kSlices; ++slice) total[slice % 4] += shared[i * kThreads + slice * kSector + threadIdx.x];
    x[i] = (total[0] + total[1]) + (total[2] + total[3]);
  }
}

// Parts (parts, M, C) → mean and variance, in double: as seen from the mean of the first part, of which the others are not far.
template <class T, class A> __device__ void join_parts(const Statistics& f, const A* counts, const A* means, const A* squares) {
  const int64_t channels = f.ys.M * f.ys.C, parts = f.s.image_tiles * f.s.segments;
  for (int64_t tile = blockIdx.x; tile * kSector < channels; tile += gridDim.x) {
    const int64_t i = tile * kSector + threadIdx.x % kSector;
    double base = 0, sums[2] = {};
    if (i < channels) {
      base = means[i];
      // As many loads at a time as there are registers for: they are most of the time.
      constexpr int kLoads = 8;
      for (int64_t part = threadIdx.x / kSector; part < parts; part += kLoads * kSlices) {
        A n[kLoads], mean[kLoads], square[kLoads];
#pragma unroll
        for (int j = 0; j < kLoads; ++j) {
          const int64_t at = (part + j * kSlices) * channels + i;
          const bool there = part + j * kSlices < parts;
          n[j] = there ? counts[at] : A(0);
          mean[j] = there ? means[at] : A(0);
          square[j] = there ? squares[at] : A(0);
        }
#pragma unroll
        for (int j = 0; j < kLoads; ++j) {
          const double d = mean[j] - base;
          sums[0] += n[j] * d;
          sums[1] += square[j] + n[j] * d * d;
        }
      }
    }
    sum_slices(sums);
    if (threadIdx.x >= kSector || i >= channels) continue;
    const double count = static_cast<double>(f.ys.B * f.ys.HW), moved = sums[0] / count, var = sums[1] / count - moved * moved;
    const int64_t c = i % f.ys.C;
    const double shift = widen(static_cast<const T*>(f.ys.y[i / f.ys.C])[f.ys.channels_last ? c : c * f.ys.HW]);
    static_cast<A*>(f.mean)[i] = static_cast<A>(shift + base + moved);
    // Rounding may take it below 0, where all values are the same; NaN stays.
    static_cast<A*>(f.var)[i] = var < 0 ? A(0) : static_cast<A>(var);
  }
}

// The items of the warps of a grid, of one branch each, one by one: work(m, place). Neighbours read the same pixels of the branches, so
// that what is read with every branch comes from memory once.
template <bool kChannelsLast, int V, class Work>
__device__ __forceinline__ void every_item(const Geometry& s, const Branches& ys, const Work& work) {
  const uint32_t M = static_cast<uint32_t>(ys.M), items = static_cast<uint32_t>(s.items()) * M;
  for (uint32_t item = blockIdx.x * kWarps + threadIdx.x / kWarp; item < items; item += gridDim.x * kWarps)
    work(static_cast<int>(item % M), Place<kChannelsLast, V>(s, ys, item / M));
}

// Blocks of warps for the items.
static int64_t blocks_of(const Geometry& s, const Branches& ys) { return quotient(s.items() * ys.M, kWarps); }

template <class T, bool kChannelsLast, int V>
__global__ __launch_bounds__(kThreads, 2) void _branch_statistics_kernel(const __grid_constant__ Statistics f) {
  using A = Accumulate<T>;
  constexpr int kWidth = kChannelsLast ? V : 1;
  const Branches& ys = f.ys;
  A *const counts = static_cast<A*>(f.counts), *const means = static_cast<A*>(f.means), *const squares = static_cast<A*>(f.squares);
  every_item<kChannelsLast, V>(f.s, ys, [&](int m, const Place<kChannelsLast, V>& place) {
    const T* const y = static_cast<const T*>(ys.y[m]);
    ShiftedSums<T, kWidth> sums{y};
    if (place.inside)
      for (int64_t b = place.b; b < place.b + place.images; ++b) place.walk(f.s, ys, b, f.vectors ? y : nullptr, sums);
    A base[kWidth] = {};
    if (place.inside) load(y + (kChannelsLast ? place.c : place.c * ys.HW), base);
    Moments<A, kWidth> moments = sums.moments(base);
    moments.join_lanes(place.span, place.apart);
    if (!place.inside || place.lane > 0) return;
    const int64_t at = ((place.image_tile * f.s.segments + place.segment) * ys.M + m) * ys.C + place.c;
#pragma unroll
    for (int w = 0; w < kWidth; ++w) counts[at + w] = moments.n;
    store_sums(means + at, moments.mean);
    store_sums(squares + at, moments.square);
  });
  wait_for_grid();
  join_parts<T>(f, counts, means, squares);
}

static bool whole_vectors(const Branches& ys) { return aligned(ys.y[0]) && alike(ys.y[0], ys.y, ys.M); }

// In channels_last the images are pixels of one.
static Branches joined(Branches ys) {
  if (ys.channels_last) ys.HW *= ys.B, ys.B = 1;
  return ys;
}

int64_t statistics_parts(const Branches& ys) {
  const Geometry s = geometry(joined(ys), 1, kLoneWarp);
  return s.image_tiles * s.segments;
}

void branch_statistics(const Branches& ys, void* counts, void* means, void* squares, void* mean, void* var, Queue queue) {
  dispatch(ys, whole_vectors(ys), [&]<class T, bool kChannelsLast, int V>() {
    const Statistics f{joined(ys), geometry(joined(ys), V, kLoneWarp), alike(ys.y[0], ys.y, ys.M), counts, means, squares, mean, var};
    const size_t shared = std::max(2 * sizeof(double) * kThreads, streamed<kChannelsLast, V>);
    launch<_branch_statistics_kernel<T, kChannelsLast, V>>("branch_statistics", ys, blocks_of(f.s, f.ys), Blocks::together, shared, queue,
                                                           f);
  });
}

struct Squeeze {
  Branches ys;
  Geometry s;
  bool vectors;
  Act act;
  // Of squeeze; select_backward_sums gets them folded.
  Norms norms;
  void *mean, *r, *scale, *bias;
  const void* g;
  Sums out;
};

// A batch-norm with given statistics, of channels c, c + 1, ... of branch m, as `Folded` has it of one.
template <class A, int kWidth>
__device__ __forceinline__ void fold(const Norms& norms, int m, int64_t c, A (&mean)[kWidth], A (&r)[kWidth], A (&scale)[kWidth],
                                     A (&bias)[kWidth]) {
  read(norms.mean[m], c, mean);
  read(norms.var[m], c, r);
  if (norms.bias[m].data != nullptr) read(norms.bias[m], c, bias);
  if (norms.weight[m].data != nullptr) read(norms.weight[m], c, scale);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    r[i] = A(1) / sqrt(r[i] + static_cast<A>(norms.eps));
    scale[i] = norms.weight[m].data == nullptr ? r[i] : r[i] * scale[i];
  }
}

// sum w u, sum w k and sum w k (y - mean) with u = act(z), k = act'(z), and w = g or 1; the first alone if kSums is 1.
template <class T, int kWidth, int kSums, bool kWeighted> struct PooledSums {
  using A = Accumulate<T>;
  const Squeeze& f;
  const T* y;
  int m;
  // The first channel, and whether its batch-norm is written.
  int64_t c;
  bool writes;
  bool begun = false;
  A mean[kWidth] = {}, scale[kWidth] = {}, bias[kWidth] = {}, sums[kSums][kWidth] = {};

  static constexpr int kBatch = kWeighted ? 2 : 4, kTogether = kWeighted ? 2 : 1;
  // Deviations of half precision from a mean of all digits have the same last ones, and a chain of sums would round them all to the same
  // side; from a mean of few digits they have few.
  static constexpr bool kRounded = sizeof(T) == 2 && kSums == 3 && !kWeighted;
  static __device__ __forceinline__ A rounded(A x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof(bits));
    bits &= 0xffff0000u;
    memcpy(&x, &bits, sizeof(bits));
    return x;
  }

  __device__ __forceinline__ int tensors() const { return kTogether; }
  __device__ __forceinline__ const T* tensor(int t) const { return static_cast<const T*>(t == 0 ? y : f.g); }

  __device__ __forceinline__ void begin(int64_t) {
    if (begun) return;
    begun = true;
    const int64_t i = m * f.ys.C + c;
    A *const means = static_cast<A*>(f.mean) + i, *const scales = static_cast<A*>(f.scale) + i, *const biases = static_cast<A*>(f.bias) + i;
    if constexpr (kWeighted) {
      load(means, mean);
      load(scales, scale);
      load(biases, bias);
    } else {
      A r[kWidth];
      fold(f.norms, m, c, mean, r, scale, bias);
      if (writes) {
        store_sums(means, mean);
        store_sums(static_cast<A*>(f.r) + i, r);
        store_sums(scales, scale);
        store_sums(biases, bias);
      }
      if constexpr (kRounded)
#pragma unroll
        for (int w = 0; w < kWidth; ++w) {
          const A exact = mean[w];
          mean[w] = rounded(exact);
          bias[w] += (mean[w] - exact) * scale[w];
        }
    }
  }

  template <int V, int kSize> __device__ __forceinline__ void use(int, const Packed<V, T> (&x)[kSize], int64_t, int, int count) {
    const A slope = static_cast<A>(f.act.negative_slope);
    if (f.act.kind == Activation::relu) add<Activation::relu>(slope, x, count);
    else if (f.act.kind == Activation::silu) add<Activation::silu>(slope, x, count);
    else add<Activation::leaky_relu>(slope, x, count);
  }

  __device__ __forceinline__ void join_lanes(int span, int apart) {
    for (int o = span / 2; o >= apart; o /= 2)
#pragma unroll
      for (auto& of_channels : sums)
#pragma unroll
        for (A& x : of_channels) x += __shfl_xor_sync(kAllLanes, x, o);
    if constexpr (kRounded) {
      A exact[kWidth] = {};
      if (c < f.ys.C) read(f.norms.mean[m], c, exact);
#pragma unroll
      for (int w = 0; w < kWidth; ++w) sums[2][w] += (rounded(exact[w]) - exact[w]) * sums[1][w];
    }
  }

 private:
  // A batch is summed by itself first: long chains lose digits. Where there are weights, vectors that are not there are zeros, and so are
  // theirs.
  template <Activation kKind, int V, int kSize> __device__ __forceinline__ void add(A slope, const Packed<V, T> (&x)[kSize], int count) {
    constexpr int kCount = kSize / kTogether;
    A staged[kSums][kWidth];
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const int at = kWidth == 1 ? 0 : i;
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        const A d = x[j][i] - mean[at], z = d * scale[at] + bias[at], w = kWeighted ? x[kSize - kCount + j][i] : A(1);
        A u, k = w;
        activate<kKind>(slope, z, u, k);
        const A terms[]{kWeighted ? u * w : u, k, k * d};
        if (kWeighted || j == 0 || j < count)
#pragma unroll
          for (int sum = 0; sum < kSums; ++sum)
            staged[sum][at] = j == 0 && (kWidth > 1 || i == 0) ? terms[sum] : staged[sum][at] + terms[sum];
      }
      if (kWidth > 1 || i == V - 1)
#pragma unroll
        for (int sum = 0; sum < kSums; ++sum) sums[sum][at] += staged[sum][at];
    }
  }
};

template <class T, bool kChannelsLast, int V, int kSums, bool kWeighted>
__global__ __launch_bounds__(kThreads, 2) void _squeeze_kernel(const __grid_constant__ Squeeze f) {
  using A = Accumulate<T>;
  constexpr int kWidth = kChannelsLast ? V : 1;
  const Branches& ys = f.ys;
  every_item<kChannelsLast, V>(f.s, ys, [&](int m, const Place<kChannelsLast, V>& place) {
    const bool writes = place.b == 0 && place.segment == 0 && place.lane == 0;
    PooledSums<T, kWidth, kSums, kWeighted> pooled{f, static_cast<const T*>(ys.y[m]), m, place.c, writes};
    for (int64_t image = 0; image < (kChannelsLast ? 1 : place.images); ++image) {
      if (place.inside) place.walk(f.s, ys, place.b + image, f.vectors ? pooled.y : nullptr, pooled);
      const int64_t at = (((place.b + image) * ys.M + m) * f.s.segments + place.segment) * ys.C + place.c;
      pooled.join_lanes(place.span, place.apart);
#pragma unroll
      for (int sum = 0; sum < kSums; ++sum) {
        if (place.inside && place.lane == 0) store_sums(static_cast<A*>(f.out.parts[sum]) + at, pooled.sums[sum]);
#pragma unroll
        for (A& x : pooled.sums[sum]) x = 0;
      }
    }
  });
  if (f.s.segments == 1) return;
  wait_for_grid();
  const int64_t channels = ys.B * ys.M * ys.C;
#pragma unroll
  for (int sum = 0; sum < kSums; ++sum)
    for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < channels; i += int64_t{gridDim.x} * kThreads) {
      const A* const parts = static_cast<const A*>(f.out.parts[sum]) + i / ys.C * f.s.segments * ys.C + i % ys.C;
      A total = 0;
      for (int64_t segment = 0; segment < f.s.segments; ++segment) total += parts[segment * ys.C];
      static_cast<A*>(f.out.sums[sum])[i] = total;
    }
}

int64_t squeeze_parts(const Branches& ys) { return geometry(ys, 1, kLoneWarp).segments; }

template <int kSums, bool kWeighted> static void launch_squeeze(const char* name, Squeeze f, Queue queue) {
  // Which it is: the kernel has three kinds.
  if (f.act.kind == Activation::identity) f.act = {Activation::leaky_relu, 1};
  f.vectors = alike(f.ys.y[0], f.ys.y, f.ys.M) && (!kWeighted || alike(f.ys.y[0], &f.g, 1));
  dispatch(f.ys, f.vectors && all_aligned(f.ys.y[0], f.mean, f.scale, f.bias), [&]<class T, bool kChannelsLast, int V>() {
    f.s = geometry(f.ys, V, kLoneWarp);
    launch<_squeeze_kernel<T, kChannelsLast, V, kSums, kWeighted>>(
        name, f.ys, blocks_of(f.s, f.ys), f.s.segments > 1 ? Blocks::together : Blocks::alone, streamed<kChannelsLast, V>, queue, f);
  });
}

void squeeze(const Branches& ys, const Norms& norms, Act act, void* mean, void* r, void* scale, void* bias, const Sums& out, int64_t count,
             Queue queue) {
  const Squeeze f{ys, {}, false, act, norms, mean, r, scale, bias, nullptr, out};
  if (count == 1) launch_squeeze<1, false>("squeeze", f, queue);
  else launch_squeeze<3, false>("squeeze", f, queue);
}

void select_backward_sums(const void* g, const Branches& ys, const void* mean, const void* scale, const void* bias, Act act,
                          const Sums& out, Queue queue) {
  const Squeeze f{ys, {}, false, act, {}, const_cast<void*>(mean), nullptr, const_cast<void*>(scale), const_cast<void*>(bias), g, out};
  launch_squeeze<3, true>("select_backward_sums", f, queue);
}

template <class A> __global__ __launch_bounds__(kThreads, 2) void _fold_backward_kernel(const __grid_constant__ FoldBackward f) {
  const int64_t tiles = (f.C + kSector - 1) / kSector;
  const A *const a = static_cast<const A*>(f.a), *const ds = static_cast<const A*>(f.ds);
  const A *const R1 = static_cast<const A*>(f.R1), *const R2 = static_cast<const A*>(f.R2);
  const A *const K1 = static_cast<const A*>(f.K1), *const K2 = static_cast<const A*>(f.K2);
  for (int64_t item = blockIdx.x; item < f.M * tiles; item += gridDim.x) {
    const int64_t m = item / tiles, c = item % tiles * kSector + threadIdx.x % kSector, i = m * f.C + c;
    A sums[2] = {}, r = 0, scale = 0;
    if (c < f.C) {
      r = static_cast<const A*>(f.r)[i];
      scale = static_cast<const A*>(f.scale)[i];
#pragma unroll 4
      for (int64_t b = threadIdx.x / kSector; b < f.B; b += kSlices) {
        const int64_t at = b * f.M * f.C + i;
        const A t = ds[b * f.C + c] / static_cast<A>(f.pixels);
        if (m == 0) static_cast<A*>(f.t)[b * f.C + c] = t;
        sums[0] += a[at] * R1[at] + t * K1[at];
        sums[1] += a[at] * R2[at] + t * K2[at];
      }
    }
    sum_slices(sums);
    if (threadIdx.x >= kSector || c >= f.C) continue;
    const A share = f.count == 0 ? A(0) : scale / static_cast<A>(f.count), gain = sums[1] * r;
    static_cast<A*>(f.dbias)[i] = sums[0];
    static_cast<A*>(f.dweight)[i] = gain;
    static_cast<A*>(f.p)[i] = share * sums[0];
    static_cast<A*>(f.q)[i] = share * r * gain;
  }
}

static std::string shape_of(const FoldBackward& f) {
  return "M = " + std::to_string(f.M) + ", B = " + std::to_string(f.B) + ", C = " + std::to_string(f.C);
}

void fold_backward(const FoldBackward& f, Queue queue) {
  dispatch_accumulate(f.type, [&]<class A>() {
    launch<_fold_backward_kernel<A>>("fold_backward", f, f.M * quotient(f.C, kSector), Blocks::alone, 2 * kThreads * sizeof(A), queue, f);
  });
}

}  // namespace sk::cuda
