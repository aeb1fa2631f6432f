// squeeze: the statistics of the branches, and the sums over the pixels that the pooled descriptor rests on, with the batch-norms
// folded on the way; select_backward_sums, the same sums weighted by a gradient; fold_backward, what the batch-norms get of them.
//
// Bytes moved, at the least: M branches read; with a gradient, it as well. Sums are taken in two stages in an order that depends on
// the shape alone: parts, then, after the whole grid has arrived, the sums of the parts.

#include "common.cuh"

namespace sk::cuda {

// n values: their mean, and the sum of the squares of the deviations from it (Chan, Golub, LeVeque 1979).
template <class A> __device__ __forceinline__ void join(A& n, A& mean, A& square, A other_n, A other_mean, A other_square) {
  const A total = n + other_n;
  if (total == 0) return;
  const A d = other_mean - mean, share = other_n / total;
  mean += d * share;
  square += other_square + d * d * n * share;
  n = total;
}

// Of deviations from `shift`, a value of the channel: what is far from 0 beside its spread would lose its last digits.
template <class T, int kWidth> struct Moments {
  using A = Accumulate<T>;
  const T* y;
  Constant<A, kWidth> shift;
  A n = 0, mean[kWidth] = {}, square[kWidth] = {};
  static constexpr int kBatch = 4;

  __device__ __forceinline__ int tensors() const { return 1; }
  __device__ __forceinline__ const T* tensor(int) const { return y; }

  template <int V, int kCount> __device__ __forceinline__ void use(int, const Packed<V, T> (&x)[kCount], int64_t, int64_t, int count) {
    // Values of a channel in a vector.
    constexpr int kEach = kWidth == 1 ? V : 1;
    const A more = static_cast<A>(count * kEach), total = n + more, share = more / total, each = A(1) / more;
#pragma unroll
    for (int w = 0; w < kWidth; ++w) {
      A d[kCount][kEach], sum = 0, squares = 0;
#pragma unroll
      for (int j = 0; j < kCount; ++j)
#pragma unroll
        for (int e = 0; e < kEach; ++e) {
          d[j][e] = x[j][w + e] - shift[w];
          if (j < count) sum += d[j][e];
        }
      const A average = sum * each;
#pragma unroll
      for (int j = 0; j < kCount; ++j)
#pragma unroll
        for (int e = 0; e < kEach; ++e)
          if (j < count) squares += (d[j][e] - average) * (d[j][e] - average);
      const A moved = average - mean[w];
      mean[w] += moved * share;
      square[w] += squares + moved * moved * n * share;
    }
    n = total;
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
#pragma unroll 4
      for (int64_t part = threadIdx.x / kSector; part < parts; part += kSlices) {
        const double n = counts[part * channels + i], d = means[part * channels + i] - base;
        sums[0] += n * d;
        sums[1] += squares[part * channels + i] + n * d * d;
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

template <class T, bool kChannelsLast, int V>
__global__ __launch_bounds__(kThreads, 2) void _branch_statistics_kernel(const __grid_constant__ Statistics f) {
  using A = Accumulate<T>;
  constexpr int kWidth = kChannelsLast ? V : 1;
  const Branches& ys = f.ys;
  A *const counts = static_cast<A*>(f.counts), *const means = static_cast<A*>(f.means), *const squares = static_cast<A*>(f.squares);
  for (int64_t item = blockIdx.x; item < f.s.items(); item += gridDim.x) {
    const Place<kChannelsLast, V> place(f.s, ys, item);
    for (int m = 0; m < ys.M; ++m) {
      const T* const y = static_cast<const T*>(ys.y[m]);
      A first[kWidth] = {};
      if (place.c < ys.C) load(y + (kChannelsLast ? place.c : place.c * ys.HW), first);
      Moments<T, kWidth> sums{y, Constant<A, kWidth>(first)};
      if (place.inside)
        for (int64_t b = place.b; b < place.b + place.images; ++b) place.walk(f.s, ys, b, f.vectors ? y : nullptr, sums);
      const int64_t at = ((place.image_tile * f.s.segments + place.segment) * ys.M + m) * ys.C;
      if constexpr (kChannelsLast) {
        // Every row of threads has sums of the same channels.
        const int columns = f.s.lanes * V, rows = kThreads / f.s.lanes, row = threadIdx.x / f.s.lanes;
        A* const shared = shared_memory<A>();
        const int64_t tile = place.c - threadIdx.x % f.s.lanes * V;
        __syncthreads();
        A* const mine = shared + row * columns + threadIdx.x % f.s.lanes * V;
        store_shared(mine, sums.mean);
        store_shared(mine + kThreads * V, sums.square);
        if (threadIdx.x % f.s.lanes == 0) shared[2 * kThreads * V + row] = sums.n;
        __syncthreads();
        for (int column = threadIdx.x; column < columns; column += kThreads) {
          // From the mean of the first row on, the others are not far: joined one by one, each would add its rounding error.
          const A base = shared[column];
          A n = 0, moved = 0, square = 0;
          for (int r = 0; r < rows; ++r) {
            const A count = shared[2 * kThreads * V + r];
            n += count;
            moved += count * (shared[r * columns + column] - base);
          }
          const A mean = base + moved / n;
          for (int r = 0; r < rows; ++r) {
            const A d = shared[r * columns + column] - mean;
            square += shared[kThreads * V + r * columns + column] + shared[2 * kThreads * V + r] * d * d;
          }
          if (tile + column < ys.C) {
            counts[at + tile + column] = n;
            means[at + tile + column] = mean;
            squares[at + tile + column] = square;
          }
        }
        __syncthreads();
      } else {
        for (int o = f.s.lanes / 2; o > 0; o /= 2) {
          const A n = __shfl_down_sync(kAllLanes, sums.n, o, f.s.lanes), mean = __shfl_down_sync(kAllLanes, sums.mean[0], o, f.s.lanes);
          const A square = __shfl_down_sync(kAllLanes, sums.square[0], o, f.s.lanes);
          join(sums.n, sums.mean[0], sums.square[0], n, mean, square);
        }
        if (place.inside && place.lane == 0) {
          counts[at + place.c] = sums.n;
          means[at + place.c] = sums.mean[0];
          squares[at + place.c] = sums.square[0];
        }
      }
    }
  }
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
  const Geometry s = geometry(joined(ys), 1);
  return s.image_tiles * s.segments;
}

void branch_statistics(const Branches& ys, void* counts, void* means, void* squares, void* mean, void* var, Queue queue) {
  dispatch(ys, whole_vectors(ys), [&]<class T, bool kChannelsLast, int V>() {
    const Statistics f{joined(ys), geometry(joined(ys), V), alike(ys.y[0], ys.y, ys.M), counts, means, squares, mean, var};
    const size_t shared = std::max({2 * sizeof(double) * kThreads, sizeof(Accumulate<T>) * (2 * kThreads * V + kThreads) * kChannelsLast,
                                    streamed<kChannelsLast, V>});
    launch<_branch_statistics_kernel<T, kChannelsLast, V>>("branch_statistics", ys, f.s.items(), {.cooperative = true}, shared, queue, f);
  });
}

// sum w u, sum w k and sum w k (y - mean) with u = act(z), k = act'(z), and w = g or 1; the first alone if kSums is 1.
template <class T, int kWidth, int kSums, bool kWeighted> struct PooledSums {
  using A = Accumulate<T>;
  const T *y, *g;
  Act act;
  Constant<A, kWidth> mean, scale, bias;
  A sums[kSums][kWidth] = {};

  // There are no registers for more with their weights, and with constants of every channel.
  static constexpr int kBatch = !kWeighted ? 4 : kWidth == 1 ? 2 : 1;
  // Of a batch, until its branch comes.
  Packed<kVector<T>, T> weights[kBatch];

  __device__ __forceinline__ int tensors() const { return kWeighted ? 2 : 1; }
  __device__ __forceinline__ const T* tensor(int t) const { return kWeighted && t == 0 ? g : y; }

  template <int V, int kCount> __device__ __forceinline__ void use(int t, const Packed<V, T> (&x)[kCount], int64_t, int64_t, int count) {
    if (kWeighted && t == 0) {
#pragma unroll
      for (int j = 0; j < kCount; ++j) memcpy(&weights[j], &x[j], sizeof(x[j]));
      return;
    }
    // In two stages where a lane sums many values: deviations from one mean have the same last bits, and a long chain would round them
    // all to the same side.
    constexpr bool kStaged = kWidth == 1;
    A staged[kSums][kWidth] = {};
    auto& to = kStaged ? staged : sums;
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      if (j >= count) break;
      A d[V], z[V], u[V], k[V];
#pragma unroll
      for (int i = 0; i < V; ++i) {
        d[i] = x[j][i] - mean[i];
        z[i] = d[i] * scale[i] + bias[i];
        k[i] = kWeighted ? weights[j][i] : A(1);
      }
      activate(act.kind, static_cast<A>(act.negative_slope), z, u, k);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const int at = kWidth == 1 ? 0 : i;
        to[0][at] += kWeighted ? u[i] * weights[j][i] : u[i];
        if constexpr (kSums == 3) to[1][at] += k[i], to[2][at] += k[i] * d[i];
      }
    }
    if constexpr (kStaged)
#pragma unroll
      for (int sum = 0; sum < kSums; ++sum) sums[sum][0] += staged[sum][0];
  }
};

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

// mean, scale and bias of channel c of branch m; written, too, if `writes`.
template <class A> __device__ __forceinline__ void fold(const Squeeze& f, int m, int64_t c, bool writes, A& mean, A& scale, A& bias) {
  const Folded<A> folded(f.norms, m, c);
  mean = folded.mean;
  scale = folded.scale;
  bias = folded.bias;
  if (!writes) return;
  const int64_t to = m * f.ys.C + c;
  static_cast<A*>(f.mean)[to] = mean;
  static_cast<A*>(f.r)[to] = folded.r;
  static_cast<A*>(f.scale)[to] = scale;
  static_cast<A*>(f.bias)[to] = bias;
}

template <class T, bool kChannelsLast, int V, int kSums, bool kWeighted>
__global__ __launch_bounds__(kThreads, 2) void _squeeze_kernel(const __grid_constant__ Squeeze f) {
  using A = Accumulate<T>;
  constexpr int kWidth = kChannelsLast ? V : 1;
  const Branches& ys = f.ys;
  const T* const g = static_cast<const T*>(f.g);
  for (int64_t item = blockIdx.x; item < f.s.items(); item += gridDim.x) {
    const Place<kChannelsLast, V> place(f.s, ys, item);
    const int columns = f.s.lanes * V, column = threadIdx.x % f.s.lanes * V, row = threadIdx.x / f.s.lanes;
    const int64_t tile = place.c - column;
    for (int m = 0; m < ys.M; ++m) {
      const T* const y = static_cast<const T*>(ys.y[m]);
      A mean[kWidth] = {}, scale[kWidth] = {}, bias[kWidth] = {};
      if constexpr (kWeighted) {
        const auto read = [&](const void* from, A(&x)[kWidth]) { load(static_cast<const A*>(from) + m * ys.C + place.c, x); };
        if (place.inside) read(f.mean, mean), read(f.scale, scale), read(f.bias, bias);
      } else if constexpr (kChannelsLast) {
        // A thread folds a channel, for all rows.
        A* const shared = shared_memory<A>();
        for (int i = threadIdx.x; i < columns && tile + i < ys.C; i += kThreads)
          fold(f, m, tile + i, item < f.s.channel_tiles, shared[i], shared[columns + i], shared[2 * columns + i]);
        __syncthreads();
        const auto read = [&](const A* from, A(&x)[kWidth]) { load(from + column, x); };
        if (place.inside) read(shared, mean), read(shared + columns, scale), read(shared + 2 * columns, bias);
        __syncthreads();
      } else if (place.inside) {
        fold(f, m, place.c, place.b == 0 && place.segment == 0 && place.lane == 0, mean[0], scale[0], bias[0]);
      }
      for (int64_t image = 0; image < (kChannelsLast ? 1 : place.images); ++image) {
        const int64_t b = place.b + image;
        PooledSums<T, kWidth, kSums, kWeighted> pooled{y, g, f.act, mean, scale, bias};
        if (place.inside) place.walk(f.s, ys, b, f.vectors ? y : nullptr, pooled);
        if constexpr (kChannelsLast) {
          const int64_t first = place.image_tile * f.s.images;
          A* const shared = shared_memory<A>();
          __syncthreads();
#pragma unroll
          for (int sum = 0; sum < kSums; ++sum) store_shared(shared + sum * kThreads * V + row * columns + column, pooled.sums[sum]);
          __syncthreads();
          for (int i = threadIdx.x; i < kSums * f.s.side * columns; i += kThreads) {
            const int sum = i / (f.s.side * columns), side = i / columns % f.s.side, to = i % columns;
            const A* const from = shared + sum * kThreads * V + side * f.s.rows * columns + to;
            A total = 0;
            for (int r = 0; r < f.s.rows;) {
              A part = 0;
              for (const int stop = r + 8; r < stop && r < f.s.rows; ++r) part += from[r * columns];
              total += part;
            }
            if (first + side < ys.B && tile + to < ys.C)
              static_cast<A*>(f.out.parts[sum])[(((first + side) * ys.M + m) * f.s.segments + place.segment) * ys.C + tile + to] = total;
          }
          __syncthreads();
        } else {
#pragma unroll
          for (int sum = 0; sum < kSums; ++sum) {
            const A total = sum_of_lanes(pooled.sums[sum][0], f.s.lanes);
            if (place.inside && place.lane == 0)
              static_cast<A*>(f.out.parts[sum])[((b * ys.M + m) * f.s.segments + place.segment) * ys.C + place.c] = total;
          }
        }
      }
    }
  }
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

int64_t squeeze_parts(const Branches& ys) { return geometry(ys, 1).segments; }

template <int kSums, bool kWeighted> static void launch_squeeze(const char* name, Squeeze f, Queue queue) {
  f.vectors = alike(f.ys.y[0], f.ys.y, f.ys.M) && (!kWeighted || alike(f.ys.y[0], &f.g, 1));
  dispatch(f.ys, f.vectors && all_aligned(f.ys.y[0], f.mean, f.scale, f.bias), [&]<class T, bool kChannelsLast, int V>() {
    f.s = geometry(f.ys, V);
    const size_t shared = std::max(kChannelsLast ? sizeof(Accumulate<T>) * kThreads * std::max(V * kSums, 3) : 0, streamed<kChannelsLast, V>);
    launch<_squeeze_kernel<T, kChannelsLast, V, kSums, kWeighted>>(name, f.ys, f.s.items(), {.cooperative = f.s.segments > 1},
                                                                   shared, queue, f);
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
    launch<_fold_backward_kernel<A>>("fold_backward", f, f.M * quotient(f.C, kSector), {}, 2 * kThreads * sizeof(A), queue, f);
  });
}

}  // namespace sk::cuda
