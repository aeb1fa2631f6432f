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

  template <int V, int kCount> __device__ __forceinline__ void run(int64_t offset, int64_t step) {
    A d[kCount][V];
#pragma unroll
    for (int j = 0; j < kCount; ++j) load(y + offset + j * step, d[j]);
#pragma unroll
    for (int j = 0; j < kCount; ++j)
#pragma unroll
      for (int i = 0; i < V; ++i) d[j][i] -= shift[i];
    constexpr int kEach = kWidth == 1 ? kCount * V : kCount;
    A joined = n;
#pragma unroll
    for (int w = 0; w < kWidth; ++w) {
      A total = 0, part = 0;
#pragma unroll
      for (int e = 0; e < kEach; ++e) total += kWidth == 1 ? d[e / V][e % V] : d[e][w];
      const A average = total / A(kEach);
#pragma unroll
      for (int e = 0; e < kEach; ++e) {
        const A r = (kWidth == 1 ? d[e / V][e % V] : d[e][w]) - average;
        part += r * r;
      }
      joined = n;
      join(joined, mean[w], square[w], A(kEach), average, part);
    }
    n = joined;
  }
};

struct Statistics {
  Branches ys;
  Geometry s;
  bool vectors;
  void *counts, *means, *squares, *mean, *var;
};

// Parts (parts, M, C) → mean and variance: 32 channels by 8 threads each.
template <class T, class A> __device__ void join_parts(const Statistics& f, const A* counts, const A* means, const A* squares) {
  const int lane = threadIdx.x % kWarp, slice = threadIdx.x / kWarp, slices = kThreads / kWarp;
  const int64_t channels = f.ys.M * f.ys.C, parts = f.s.image_tiles * f.s.segments;
  double (*const shared)[kWarp] = reinterpret_cast<double (*)[kWarp]>(shared_memory<double>());
  const auto sum = [&](double x) {
    __syncthreads();
    shared[slice][lane] = x;
    __syncthreads();
    double total = 0;
    for (int i = 0; i < slices; ++i) total += shared[i][lane];
    return total;
  };
  for (int64_t tile = blockIdx.x; tile * kWarp < channels; tile += gridDim.x) {
    const int64_t i = tile * kWarp + lane;
    double total = 0, squared = 0;
    if (i < channels)
      for (int64_t part = slice; part < parts; part += slices) {
        const double n = counts[part * channels + i];
        // A part may be empty, and its mean no number.
        if (n > 0) total += n * means[part * channels + i];
      }
    const double count = static_cast<double>(f.ys.B * f.ys.HW), average = sum(total) / count;
    if (i < channels)
      for (int64_t part = slice; part < parts; part += slices) {
        const double n = counts[part * channels + i], d = means[part * channels + i] - average;
        if (n > 0) squared += squares[part * channels + i] + n * d * d;
      }
    const double var = sum(squared) / count;
    if (i < channels && slice == 0) {
      const int64_t c = i % f.ys.C;
      const double shift = widen(static_cast<const T*>(f.ys.y[i / f.ys.C])[f.ys.channels_last ? c : c * f.ys.HW]);
      static_cast<A*>(f.mean)[i] = static_cast<A>(shift + average);
      static_cast<A*>(f.var)[i] = static_cast<A>(var);
    }
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
        for (int i = 0; i < V; ++i) {
          const int column = threadIdx.x % f.s.lanes * V + i;
          shared[row * columns + column] = sums.mean[i];
          shared[kThreads * V + row * columns + column] = sums.square[i];
        }
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

static int channel_vector(const Branches& ys) {
  int width = 1;
  dispatch(ys, whole_vectors(ys), [&]<class T, bool, int V>() { width = V; });
  return width;
}

int64_t statistics_parts(const Branches& ys) {
  const Geometry s = geometry(ys, channel_vector(ys));
  return s.image_tiles * s.segments;
}

void branch_statistics(const Branches& ys, void* counts, void* means, void* squares, void* mean, void* var, Queue queue) {
  dispatch(ys, whole_vectors(ys), [&]<class T, bool kChannelsLast, int V>() {
    const Statistics f{ys, geometry(ys, V), alike(ys.y[0], ys.y, ys.M), counts, means, squares, mean, var};
    const size_t shared = std::max(sizeof(double) * kThreads, sizeof(Accumulate<T>) * (2 * kThreads * V + kThreads) * kChannelsLast);
    launch<_branch_statistics_kernel<T, kChannelsLast, V>>("branch_statistics", ys, f.s.items(), {.cooperative = true}, shared,
                                                           queue, f);
  });
}

// sum w u, sum w k and sum w k (y - mean) with u = act(z), k = act'(z), and w = g or 1; the first alone if kSums is 1.
template <class T, int kWidth, int kSums, bool kWeighted> struct PooledSums {
  using A = Accumulate<T>;
  const T *y, *g;
  Act act;
  Constant<A, kWidth> mean, scale, bias;
  A sums[kSums][kWidth] = {};

  template <int V, int kCount> __device__ __forceinline__ void run(int64_t offset, int64_t step) {
    A value[kCount][V], weight[kCount][V];
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      load(y + offset + j * step, value[j]);
      if constexpr (kWeighted) load(g + offset + j * step, weight[j]);
    }
    // In two stages where a lane sums many values: deviations from one mean have the same last bits, and a long chain would round them
    // all to the same side.
    constexpr bool kStaged = kWidth == 1;
    A staged[kSums][kWidth] = {};
    auto& to = kStaged ? staged : sums;
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      A z[V], u[V], k[V];
#pragma unroll
      for (int i = 0; i < V; ++i) {
        value[j][i] -= mean[i];
        z[i] = value[j][i] * scale[i] + bias[i];
        k[i] = kWeighted ? weight[j][i] : A(1);
      }
      activate(act.kind, static_cast<A>(act.negative_slope), z, u, k);
      if constexpr (kWeighted)
#pragma unroll
        for (int i = 0; i < V; ++i) u[i] *= weight[j][i];
      add(to[0], u);
      if constexpr (kSums == 3) {
        add(to[1], k);
#pragma unroll
        for (int i = 0; i < V; ++i) k[i] *= value[j][i];
        add(to[2], k);
      }
    }
    if constexpr (kStaged)
#pragma unroll
      for (int sum = 0; sum < kSums; ++sum) sums[sum][0] += staged[sum][0];
  }

  // All values of a vector are of one channel, or each is of its own.
  template <int V> static __device__ __forceinline__ void add(A (&sums)[kWidth], const A (&x)[V]) {
    if constexpr (kWidth == V) {
#pragma unroll
      for (int i = 0; i < V; ++i) sums[i] += x[i];
    } else {
      A total = x[0];
#pragma unroll
      for (int i = 1; i < V; ++i) total += x[i];
      sums[0] += total;
    }
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

// mean, scale and bias of kWidth channels from c on; written, too, if `writes`.
template <class A, int kWidth>
__device__ __forceinline__ void fold(const Squeeze& f, int m, int64_t c, bool writes, A (&mean)[kWidth], A (&scale)[kWidth],
                                     A (&bias)[kWidth]) {
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    const int64_t to = m * f.ys.C + c + i;
    const Folded<A> folded(f.norms, m, c + i);
    mean[i] = folded.mean;
    scale[i] = folded.scale;
    bias[i] = folded.bias;
    if (writes) {
      static_cast<A*>(f.mean)[to] = mean[i];
      static_cast<A*>(f.r)[to] = folded.r;
      static_cast<A*>(f.scale)[to] = scale[i];
      static_cast<A*>(f.bias)[to] = bias[i];
    }
  }
}

template <class T, bool kChannelsLast, int V, int kSums, bool kWeighted>
__global__ __launch_bounds__(kThreads, 2) void _squeeze_kernel(const __grid_constant__ Squeeze f) {
  using A = Accumulate<T>;
  constexpr int kWidth = kChannelsLast ? V : 1;
  const Branches& ys = f.ys;
  const T* const g = static_cast<const T*>(f.g);
  for (int64_t item = blockIdx.x; item < f.s.items(); item += gridDim.x) {
    const Place<kChannelsLast, V> place(f.s, ys, item);
    for (int m = 0; m < ys.M; ++m) {
      const T* const y = static_cast<const T*>(ys.y[m]);
      A mean[kWidth] = {}, scale[kWidth] = {}, bias[kWidth] = {};
      if constexpr (kWeighted) {
#pragma unroll
        for (int i = 0; i < kWidth; ++i)
          if (place.inside) {
            mean[i] = static_cast<const A*>(f.mean)[m * ys.C + place.c + i];
            scale[i] = static_cast<const A*>(f.scale)[m * ys.C + place.c + i];
            bias[i] = static_cast<const A*>(f.bias)[m * ys.C + place.c + i];
          }
      } else if (place.inside) {
        fold<A>(f, m, place.c, place.b == 0 && place.segment == 0 && place.lane == 0, mean, scale, bias);
      }
      // The longest tile decides for all threads of a block, as they wait for each other.
      const int64_t images = kChannelsLast ? 1 : place.images;
      for (int64_t image = 0; image < images; ++image) {
        const int64_t b = place.b + image;
        PooledSums<T, kWidth, kSums, kWeighted> pooled{y, g, f.act, mean, scale, bias};
        if (place.inside) place.walk(f.s, ys, b, f.vectors ? y : nullptr, pooled);
        if constexpr (kChannelsLast) {
          const int columns = f.s.lanes * V, row = threadIdx.x / f.s.lanes;
          const int64_t tile = place.c - threadIdx.x % f.s.lanes * V, first = place.image_tile * f.s.images;
          A* const shared = shared_memory<A>();
#pragma unroll
          for (int sum = 0; sum < kSums; ++sum) {
            __syncthreads();
#pragma unroll
            for (int i = 0; i < V; ++i) shared[row * columns + threadIdx.x % f.s.lanes * V + i] = pooled.sums[sum][i];
            __syncthreads();
            for (int i = threadIdx.x; i < columns * f.s.side; i += kThreads) {
              const int side = i / columns, column = i % columns;
              A total = 0;
              for (int r = 0; r < f.s.rows;) {
                A part = 0;
                for (const int stop = r + 8; r < stop && r < f.s.rows; ++r) part += shared[(side * f.s.rows + r) * columns + column];
                total += part;
              }
              if (first + side < ys.B && tile + column < ys.C)
                static_cast<A*>(f.out.parts[sum])[(((first + side) * ys.M + m) * f.s.segments + place.segment) * ys.C + tile + column] =
                    total;
            }
          }
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
  dispatch(f.ys, f.vectors && aligned(f.ys.y[0]), [&]<class T, bool kChannelsLast, int V>() {
    f.s = geometry(f.ys, V);
    const size_t shared = kChannelsLast ? sizeof(Accumulate<T>) * kThreads * V : 0;
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

// 32 channels of a branch by 8 slices of the images.
template <class A> __global__ __launch_bounds__(kThreads, 2) void _fold_backward_kernel(const __grid_constant__ FoldBackward f) {
  const int lane = threadIdx.x % kWarp, slice = threadIdx.x / kWarp, slices = kThreads / kWarp;
  const int64_t tiles = (f.C + kWarp - 1) / kWarp;
  const A *const a = static_cast<const A*>(f.a), *const ds = static_cast<const A*>(f.ds);
  const A *const R1 = static_cast<const A*>(f.R1), *const R2 = static_cast<const A*>(f.R2);
  const A *const K1 = static_cast<const A*>(f.K1), *const K2 = static_cast<const A*>(f.K2);
  A* const shared = shared_memory<A>();
  for (int64_t item = blockIdx.x; item < f.M * tiles; item += gridDim.x) {
    const int64_t m = item / tiles, c = item % tiles * kWarp + lane;
    A shift = 0, gain = 0;
    if (c < f.C)
#pragma unroll 2
      for (int64_t b = slice; b < f.B; b += slices) {
        const int64_t i = (b * f.M + m) * f.C + c;
        const A t = ds[b * f.C + c] / static_cast<A>(f.pixels);
        if (m == 0) static_cast<A*>(f.t)[b * f.C + c] = t;
        shift += a[i] * R1[i] + t * K1[i];
        gain += a[i] * R2[i] + t * K2[i];
      }
    __syncthreads();
    shared[threadIdx.x] = shift;
    shared[kThreads + threadIdx.x] = gain;
    __syncthreads();
    if (slice == 0 && c < f.C) {
      for (int other = 1; other < slices; ++other) {
        shift += shared[other * kWarp + lane];
        gain += shared[kThreads + other * kWarp + lane];
      }
      const int64_t i = m * f.C + c;
      const A r = static_cast<const A*>(f.r)[i];
      const A share = f.count == 0 ? A(0) : static_cast<const A*>(f.scale)[i] / static_cast<A>(f.count);
      gain *= r;
      static_cast<A*>(f.dbias)[i] = shift;
      static_cast<A*>(f.dweight)[i] = gain;
      static_cast<A*>(f.p)[i] = share * shift;
      static_cast<A*>(f.q)[i] = share * r * gain;
    }
  }
}

static std::string shape_of(const FoldBackward& f) {
  return "M = " + std::to_string(f.M) + ", B = " + std::to_string(f.B) + ", C = " + std::to_string(f.C);
}

void fold_backward(const FoldBackward& f, Queue queue) {
  dispatch_accumulate(f.type, [&]<class A>() {
    launch<_fold_backward_kernel<A>>("fold_backward", f, f.M * quotient(f.C, kWarp), {}, 2 * kThreads * sizeof(A), queue, f);
  });
}

}  // namespace sk::cuda
