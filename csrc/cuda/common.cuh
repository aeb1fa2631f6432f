// What the steps share: 16 bytes at a time, the activations, how a grid goes over the branches, and the launch.
#pragma once

// tests/cuda_on_host has what compiles the same text for the host.
#ifdef __CUDACC__
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#else
#include "cuda_on_host.h"
#endif

#include <algorithm>
#include <atomic>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "launchers.h"

namespace sk::cuda {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;
constexpr unsigned kAllLanes = 0xffffffff;

#ifdef __CUDACC__
// The shared memory that the launch gave the block.
template <class A> __device__ __forceinline__ A* shared_memory() {
  extern __shared__ __align__(16) unsigned char memory[];
  return reinterpret_cast<A*>(memory);
}

// 16 bytes of device memory in one store: of an assignment the compiler makes four where its registers are not neighbours.
__device__ __forceinline__ void store_vector(void* p, const uint4& x) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w) : "memory");
}

__device__ __forceinline__ unsigned shared_address(const void* p) { return static_cast<unsigned>(__cvta_generic_to_shared(p)); }

// 8 or 16 bytes into shared memory, `to` bytes from `base` on, or zeros if they are not there. Copies belong to the group that is closed
// next.
template <int kBytes> __device__ __forceinline__ void copy_async(unsigned char* base, int to, const void* from, bool there) {
  const unsigned address = shared_address(base) + to;
  if constexpr (kBytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(there ? 16 : 0) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(address), "l"(from), "n"(kBytes), "r"(there ? kBytes : 0)
                 : "memory");
}
__device__ __forceinline__ void close_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until no more than kLeft groups are under way.
template <int kLeft> __device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory"); }

// Of a cooperative launch.
__device__ __forceinline__ void wait_for_grid() { cooperative_groups::this_grid().sync(); }
#endif

template <class T> struct AccumulateOf {
  using type = float;
};
template <> struct AccumulateOf<double> {
  using type = double;
};
template <class T> using Accumulate = typename AccumulateOf<T>::type;

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

__device__ __forceinline__ void narrow(float x, float& to) { to = x; }
__device__ __forceinline__ void narrow(double x, double& to) { to = x; }
__device__ __forceinline__ void narrow(float x, __half& to) { to = __float2half_rn(x); }
__device__ __forceinline__ void narrow(float x, __nv_bfloat16& to) { to = __float2bfloat16_rn(x); }

// Two at once, into 32 bits.
template <class T> __device__ __forceinline__ void narrow_pair(float first, float second, T* to) {
#ifdef __CUDACC__
  uint32_t bits;
  if constexpr (std::is_same_v<T, __half>) asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(second), "f"(first));
  else asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(second), "f"(first));
  memcpy(to, &bits, sizeof(bits));
#else
  narrow(first, to[0]);
  narrow(second, to[1]);
#endif
}

// The values in 16 bytes.
template <class T> constexpr int kVector = 16 / sizeof(T);

// V values as they lie in memory: half the registers of what half precision is computed in.
template <int V, class T> struct Packed {
  T values[V];

  __device__ __forceinline__ void load(const T* p) {
    if constexpr (V == 1) {
      values[0] = *p;
    } else {
      uint4 bytes[sizeof(values) / 16];
      static_assert(sizeof(values) == sizeof(bytes));
#pragma unroll
      for (size_t i = 0; i < sizeof(values) / 16; ++i) bytes[i] = reinterpret_cast<const uint4*>(p)[i];
      memcpy(values, bytes, sizeof(bytes));
    }
  }
  __device__ __forceinline__ void store(T* p) const {
    if constexpr (V == 1) {
      *p = values[0];
    } else {
      uint4 bytes;
      static_assert(sizeof(values) == sizeof(bytes));
      memcpy(&bytes, values, sizeof(bytes));
      store_vector(p, bytes);
    }
  }
  __device__ __forceinline__ Accumulate<T> operator[](int i) const {
    // The upper or the lower half of 32 bits, without a register for each.
    if constexpr (std::is_same_v<T, __nv_bfloat16> && V > 1) {
      uint32_t bits;
      memcpy(&bits, values + i / 2 * 2, sizeof(bits));
      bits = i % 2 == 0 ? bits << 16 : bits & 0xffff0000u;
      float value;
      memcpy(&value, &bits, sizeof(value));
      return value;
    } else {
      return widen(values[i]);
    }
  }
  // Values i to i + kCount - 1, i and kCount even if they are of half precision and V is not 1.
  template <int kCount> __device__ __forceinline__ void set(int i, const Accumulate<T> (&x)[kCount]) {
#pragma unroll
    for (int e = 0; e < kCount; e += 2)
      if constexpr (sizeof(T) == 2 && V > 1) narrow_pair(x[e], x[e + 1], values + i + e);
      else {
        narrow(x[e], values[i + e]);
        if constexpr (kCount > 1) narrow(x[e + 1], values[i + e + 1]);
      }
  }
};

template <int V, class T> __device__ __forceinline__ void load(const T* p, Accumulate<T> (&x)[V]) {
  Packed<V, T> packed;
  packed.load(p);
#pragma unroll
  for (int i = 0; i < V; ++i) x[i] = packed[i];
}

template <int V, class T> __device__ __forceinline__ void store(T* p, const Accumulate<T> (&x)[V]) {
  Packed<V, T> packed;
  packed.set(0, x);
  packed.store(p);
}

// V values side by side, at a multiple of 16 bytes if they are several.
template <int V, class A> __device__ __forceinline__ void store_sums(A* p, const A (&x)[V]) {
  if constexpr (V == 1) {
    *p = x[0];
  } else {
    uint4 bytes[sizeof(x) / 16];
    memcpy(bytes, x, sizeof(bytes));
#pragma unroll
    for (size_t i = 0; i < sizeof(x) / 16; ++i) reinterpret_cast<uint4*>(p)[i] = bytes[i];
  }
}

// from(the array, as a pointer to its type).
template <class F> __device__ __forceinline__ void with_pointer(const Array& array, const F& from) {
  switch (array.type) {
    case Type::float32: return from(static_cast<const float*>(array.data));
    case Type::float64: return from(static_cast<const double*>(array.data));
    case Type::float16: return from(static_cast<const __half*>(array.data));
    default: return from(static_cast<const __nv_bfloat16*>(array.data));
  }
}

// V elements of an operand of any type, from i on.
template <int V, class A> __device__ __forceinline__ void read(const Array& array, int64_t i, A (&x)[V]) {
  with_pointer(array, [&](const auto* p) {
#pragma unroll
    for (int e = 0; e < V; ++e) x[e] = static_cast<A>(widen(p[i + e]));
  });
}
template <class A> __device__ __forceinline__ A at(const Array& array, int64_t i) {
  A x[1];
  read(array, i, x);
  return x[0];
}

// The same constants of a channel for all elements (kWidth 1), or those of as many channels.
template <class A, int kWidth> struct Constant {
  A x[kWidth];
  __device__ __forceinline__ Constant(const A* p) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) x[i] = p[i];
  }
  // p is a multiple of 16 bytes, if there are several.
  static __device__ __forceinline__ Constant in_memory(const A* p) {
    A x[kWidth];
    load(p, x);
    return x;
  }
  __device__ __forceinline__ A operator[](int i) const { return x[kWidth == 1 ? 0 : i]; }
};

// A batch-norm with given statistics, of channel c of branch m: (y - mean) * scale + bias.
template <class A> struct Folded {
  A mean, r, scale, bias;
  __device__ __forceinline__ Folded(const Norms& norms, int m, int64_t c)
      : mean(at<A>(norms.mean[m], c)),
        r(A(1) / sqrt(at<A>(norms.var[m], c) + static_cast<A>(norms.eps))),
        scale(norms.weight[m].data == nullptr ? r : r * at<A>(norms.weight[m], c)),
        bias(norms.bias[m].data == nullptr ? A(0) : at<A>(norms.bias[m], c)) {}
};

__device__ __forceinline__ float sigmoid(float z) { return __fdividef(1.0f, 1.0f + expf(-z)); }
__device__ __forceinline__ double sigmoid(double z) { return 1.0 / (1.0 + exp(-z)); }

// u becomes act(z), k becomes act'(z) k.
template <Activation kKind, class A> __device__ __forceinline__ void activate(A slope, A z, A& u, A& k) {
  if constexpr (kKind == Activation::relu) {
    u = z <= 0 ? A(0) : z;
    k = z <= 0 ? A(0) : k;
  } else if constexpr (kKind == Activation::leaky_relu) {
    u = z <= 0 ? slope * z : z;
    k = z <= 0 ? slope * k : k;
  } else if constexpr (kKind == Activation::silu) {
    const A s = sigmoid(z);
    u = z * s;
    k = s * (A(1) + z * (A(1) - s)) * k;
  } else {
    u = z;
  }
}

// The branches are the same for all threads of a launch.
template <class A, int V> __device__ __forceinline__ void activate(Activation kind, A slope, const A (&z)[V], A (&u)[V], A (&k)[V]) {
  const auto all = [&]<Activation kKind>() {
#pragma unroll
    for (int i = 0; i < V; ++i) activate<kKind>(slope, z[i], u[i], k[i]);
  };
  if (kind == Activation::relu) all.template operator()<Activation::relu>();
  else if (kind == Activation::leaky_relu) all.template operator()<Activation::leaky_relu>();
  else if (kind == Activation::silu) all.template operator()<Activation::silu>();
  else all.template operator()<Activation::identity>();
}

// Who takes an item together: a block, of all branches, or a warp, which waits for no other, of one branch. Of channels_last there are to
// be about `items`, a few for every block or one for every warp that a large device holds. For them an image is cut along its channels
// first, while `narrowest` vectors stay side by side and less than `enough` are left to a thread of every part of the pixels; then along
// its pixels, of which a thread has `least` to `most`: parts of the pixels are added up in the end, and long sums lose digits.
struct Team {
  int threads, items, narrowest, enough, least, most;
};
constexpr Team kBlock{kThreads, 1024, kWarp, 1, 2, 1 << 20}, kLoneWarp{kWarp, 2048, 8, 128, 8, 512};

// How a grid goes over the branches: item by item, an item being some images, channels and a segment of pixels, read by the
// threads of a team. `lanes`, `rows` and `side` are powers of two whose product is `threads`.
//   contiguous     `lanes` share the pixels of a channel, there are `rows` channels, and `images` one after the other
//   channels_last  `lanes` are along the channels, a vector each, `rows` pixels are read at a time, of `side` = `images` images
struct Geometry {
  int threads, lanes, rows, side, images;
  int64_t segment, segments, channel_tiles, image_tiles;
  __host__ __device__ int64_t items() const { return segments * channel_tiles * image_tiles; }
};

inline int power_of_two(int64_t n, int most) {
  int p = 1;
  while (p < n && p < most) p *= 2;
  return p;
}

inline int64_t quotient(int64_t n, int64_t d) { return (n + d - 1) / d; }

// V: channels in a vector of channels_last. The segments do not depend on it. A contiguous segment starts at a multiple of 16
// bytes if its row does.
inline Geometry geometry(const Branches& ys, int V, Team team) {
  Geometry s;
  s.threads = team.threads;
  s.side = 1;
  const int values = ys.type == Type::float64 ? 2 : ys.type == Type::float32 ? 4 : 8;
  if (ys.channels_last) {
    int lanes = power_of_two(quotient(ys.C, values), kWarp);
    const auto rows = [&] { return power_of_two(ys.HW, team.threads / lanes); };
    const auto whole = [&] { return ys.B * (team.threads == kWarp ? ys.M : 1) * quotient(ys.C, lanes * values); };
    const auto parts = [&](int pixels) { return std::max<int64_t>(1, ys.HW / (rows() * pixels)); };
    while (lanes > team.narrowest && whole() * parts(team.enough) < team.items) lanes /= 2;
    const int64_t segments = std::clamp(std::max(quotient(team.items, whole()), parts(team.most)), int64_t{1}, parts(team.least));
    s.segment = quotient(quotient(ys.HW, segments), rows()) * rows();
    s.lanes = V == 1 ? power_of_two(ys.C, kWarp) : lanes;
    s.rows = power_of_two(ys.HW, team.threads / s.lanes);
    s.side = s.images = team.threads / (s.lanes * s.rows);
    s.channel_tiles = quotient(ys.C, s.lanes * V);
  } else {
    s.segment = 4096;
    s.lanes = power_of_two(quotient(ys.HW, values), kWarp);
    s.rows = team.threads / s.lanes;
    s.images = static_cast<int>(std::clamp<int64_t>(2048 / ys.HW, 1, 16));
    s.channel_tiles = quotient(ys.C, s.rows);
  }
  s.segments = quotient(ys.HW, s.segment);
  s.image_tiles = quotient(ys.B, s.images);
  return s;
}

// A thread's own vectors on their way from memory to shared memory, at most so many. They cost it no registers, and it waits for nobody
// else. All kernels that read branches in channels_last do it so.
constexpr int kUnderWay = 12;
template <bool kChannelsLast, int V> constexpr size_t streamed = kChannelsLast && V > 1 ? size_t{kUnderWay} * kThreads * 16 : 0;

// Calls tile.begin(first) when the first copies are under way, then tile.use(t, vectors, offset, step, count) for every kTogether of the
// tensors t < tile.tensors() of every batch: `count` of Tile::kBatch vectors, which are `step` values apart, of the first tensor, then of
// the next. All batches of a tensor are `steps` vectors from `first` on.
template <int V, class T, class Tile> __device__ __forceinline__ void stream(Tile& tile, int64_t first, int step, int steps) {
  constexpr int kBatch = Tile::kBatch, kTogether = Tile::kTogether, kStages = kUnderWay / (kBatch * kTogether), kSlot = kThreads * 16;
  constexpr int kStage = kBatch * kTogether * kSlot;
  struct Cursor {
    int64_t offset;
    int tensor = 0, vector = 0, stage = 0;
    __device__ __forceinline__ void advance(int tensors, int step) {
      stage = stage + kStage == kStages * kStage ? 0 : stage + kStage;
      if ((tensor += kTogether) == tensors) tensor = 0, vector += kBatch, offset += int64_t{kBatch} * step;
    }
  } ahead{first}, now{first};
  unsigned char* const slots = shared_memory<unsigned char>() + threadIdx.x * 16;
  const int tensors = tile.tensors();
  const auto fetch = [&] {
    if (ahead.vector < steps) {
#pragma unroll
      for (int t = 0; t < kTogether; ++t) {
        const T* const from = tile.tensor(ahead.tensor + t) + ahead.offset;
#pragma unroll
        for (int j = 0; j < kBatch; ++j)
          copy_async<16>(slots, ahead.stage + (t * kBatch + j) * kSlot, from + int64_t{j} * step, ahead.vector + j < steps);
      }
      ahead.advance(tensors, step);
    }
    close_copies();
  };
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) fetch();
  if (steps > 0) tile.begin(first);
#pragma unroll 1
  while (now.vector < steps) {
    // Into the stage that was used last.
    fetch();
    wait_for_copies<kStages - 1>();
    Packed<V, T> vectors[kTogether * kBatch];
#pragma unroll
    for (int j = 0; j < kTogether * kBatch; ++j) vectors[j].load(reinterpret_cast<const T*>(slots + now.stage + j * kSlot));
    const int left = steps - now.vector;
    tile.use(now.tensor, vectors, now.offset, step, left < kBatch ? left : kBatch);
    now.advance(tensors, step);
  }
}

// The place of this thread in an item: its first channel, its first image, and its pixels [start, end), of which it reads those
// from `lane` on that are `rows` apart, or `lanes` vectors if they are contiguous. Threads of a warp have the same channel and image if
// they are a power of two apart that is `apart` or more, and less than `span`.
template <bool kChannelsLast, int V> struct Place {
  int64_t image_tile, segment, c, b, images, start, end;
  int lane, apart, span;
  bool inside;

  // There is no memory for as many branches as would have more than 2^32 items, and long divisions take long.
  __device__ __forceinline__ Place(const Geometry& s, const Branches& ys, uint32_t item) {
    const int thread = threadIdx.x & (s.threads - 1);
    const uint32_t segments = static_cast<uint32_t>(s.segments), channel_tiles = static_cast<uint32_t>(s.channel_tiles);
    uint32_t channel_tile;
    // Blocks that run at the same time are to read what lies side by side.
    if constexpr (kChannelsLast) {
      channel_tile = item % channel_tiles;
      segment = item / channel_tiles % segments;
      image_tile = item / channel_tiles / segments;
      c = (int64_t{channel_tile} * s.lanes + thread % s.lanes) * V;
      b = image_tile * s.images + thread / (s.lanes * s.rows);
      images = b < ys.B ? 1 : 0;
      lane = thread / s.lanes % s.rows;
      apart = s.lanes;
      span = s.lanes * s.rows;
    } else {
      segment = item % segments;
      channel_tile = item / segments % channel_tiles;
      image_tile = item / segments / channel_tiles;
      c = int64_t{channel_tile} * s.rows + thread / s.lanes;
      b = image_tile * s.images;
      images = ys.B - b < s.images ? ys.B - b : s.images;
      lane = thread % s.lanes;
      apart = 1;
      span = s.lanes;
    }
    start = segment * s.segment;
    end = start + s.segment < ys.HW ? start + s.segment : ys.HW;
    inside = c < ys.C && images > 0;
  }

  // tile.begin(offset) of one of the values, then tile.use(t, vectors, offset, step, count), as `stream` does it, for all of this thread's
  // values in image `image`: `count` vectors, `step` apart. Vectors of a contiguous row begin at its first multiple of 16 bytes, as an
  // address of `like` tells; null: there are none.
  template <class T, class Tile>
  __device__ __forceinline__ void walk(const Geometry& s, const Branches& ys, int64_t image, const T* like, Tile& tile) const {
    constexpr int kBatch = Tile::kBatch;
    if constexpr (kChannelsLast) {
      const int64_t first = (image * ys.HW + start + lane) * ys.C + c;
      const int step = s.rows * static_cast<int>(ys.C);
      const int steps = (static_cast<int>(end - start) - lane + s.rows - 1) / s.rows;
      if constexpr (V > 1) {
        stream<V, T>(tile, first, step, steps);
      } else {
        int i = 0;
        if (steps > 0) tile.begin(first);
        for (; i + kBatch <= steps; i += kBatch) take<T, 1, kBatch>(tile, first + int64_t{i} * step, step);
        for (; i < steps; ++i) take<T, 1, 1>(tile, first + int64_t{i} * step, step);
      }
    } else {
      const int64_t first = (image * ys.C + c) * ys.HW + start, pixels = end - start;
      int64_t head = pixels;
      if (like != nullptr) head = (16 - reinterpret_cast<uintptr_t>(like + first) % 16) % 16 / sizeof(T);
      if (head > pixels) head = pixels;
      const int64_t vectors = (pixels - head) / V;
      const int step = s.lanes * V;
      int64_t i = lane;
      tile.begin(first + (lane < pixels ? lane : 0));
      for (; i + (kBatch - 1) * s.lanes < vectors; i += kBatch * s.lanes) take<T, V, kBatch>(tile, first + head + i * V, step);
      for (; i < vectors; i += s.lanes) take<T, V, 1>(tile, first + head + i * V, 0);
      // What lies before the vectors and after them.
      for (i = lane; i < pixels - vectors * V; i += s.lanes) take<T, 1, 1>(tile, first + (i < head ? i : i + vectors * V), 0);
    }
  }

 private:
  template <class T, int kWidth, int kCount, class Tile> static __device__ __forceinline__ void take(Tile& tile, int64_t offset, int step) {
#pragma unroll 1
    for (int t = 0; t < tile.tensors(); t += Tile::kTogether) {
      Packed<kWidth, T> vectors[Tile::kTogether * kCount];
#pragma unroll
      for (int j = 0; j < Tile::kTogether * kCount; ++j) vectors[j].load(tile.tensor(t + j / kCount) + offset + int64_t{j % kCount} * step);
      tile.use(t, vectors, offset, step, kCount);
    }
  }
};

// The sum over groups of `lanes` neighbouring lanes, in each of them. All lanes of the warp take part.
template <class A> __device__ __forceinline__ A sum_of_lanes(A x, int lanes) {
  for (int o = lanes / 2; o > 0; o /= 2) x += __shfl_xor_sync(kAllLanes, x, o);
  return x;
}

inline std::string shape_of(const Branches& ys) {
  return "M = " + std::to_string(ys.M) + ", B = " + std::to_string(ys.B) + ", C = " + std::to_string(ys.C) +
         ", H * W = " + std::to_string(ys.HW) + (ys.channels_last ? ", channels_last" : ", contiguous");
}

// Throws what CUDA says of `kernel`, and what `where()` does; a call without an error makes no words.
template <class Where> void check(cudaError_t error, const char* kernel, const Where& where) {
  if (error == cudaSuccess) return;
  // The error is reported here, and not to the next one who asks.
  cudaGetLastError();
  throw std::runtime_error(std::string(kernel) + ": " + cudaGetErrorString(error) + ", " + where());
}

inline void take_device(const char* kernel, int device) {
  check(cudaSetDevice(device), kernel, [&] { return "taking device " + std::to_string(device); });
}

// What a block may have of shared memory without asking for more.
constexpr size_t kSharedByDefault = 48 * 1024;

inline int attribute_of_device(cudaDeviceAttr which, const char* kernel, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), kernel,
        [&] { return "asking for attribute " + std::to_string(which) + " of the device"; });
  return value;
}

// Lets blocks of this kernel have as much shared memory as the device allows: once, and never less, since a launch of another size may be
// under way in another thread, or in a graph.
template <auto kernel> void allow_shared(const char* name, size_t shared, int device) {
  static std::atomic<bool> allowed[64];
  if (shared <= kSharedByDefault || (device < 64 && allowed[device].load(std::memory_order_relaxed))) return;
  const int most = attribute_of_device(cudaDevAttrMaxSharedMemoryPerBlockOptin, name, device);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most), name,
        [&] { return "asking for " + std::to_string(most) + " bytes of shared memory"; });
  if (device < 64) allowed[device].store(true, std::memory_order_relaxed);
}

// How many blocks of this kernel the current device, which is this one, holds at a time.
template <auto kernel> int resident_blocks(const char* name, size_t shared, int device, int threads = kThreads) {
  // For each device, of the latest launch.
  static std::atomic<uint64_t> known[64];
  const uint64_t latest = device < 64 ? known[device].load(std::memory_order_relaxed) : 0;
  if (latest >> 32 == shared && latest != 0) return static_cast<int>(latest & 0xffffffff);
  allow_shared<kernel>(name, shared, device);
  int per_processor = 0;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_processor, kernel, threads, shared), name,
        [] { return "counting resident blocks"; });
  const int blocks = attribute_of_device(cudaDevAttrMultiProcessorCount, name, device) * per_processor;
  if (device < 64) known[device].store(uint64_t{shared} << 32 | static_cast<uint64_t>(blocks), std::memory_order_relaxed);
  return blocks;
}

// Whether the blocks of a launch wait for each other.
enum class Blocks { alone, together };

// Blocks for `items`, which a kernel takes in turns of gridDim.x; if all wait for each other, no more than the device holds.
// shape_of(shaped) says what failed.
template <auto kernel, class Shaped, class Parameters>
void launch(const char* name, const Shaped& shaped, int64_t items, Blocks blocks, size_t shared, Queue queue,
            const Parameters& parameters, int threads = kThreads) {
  take_device(name, queue.device);
  const int resident = resident_blocks<kernel>(name, shared, queue.device, threads);
  const int64_t most = blocks == Blocks::together ? resident : int64_t{resident} * 64;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(std::max<int64_t>(1, std::min(items, most))));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared;
  config.stream = queue.stream;
  config.attrs = &attribute;
  config.numAttrs = blocks == Blocks::together ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, parameters), name,
        [&] { return "grid " + std::to_string(config.gridDim.x) + ", block " + std::to_string(threads) + ", " + shape_of(shaped); });
}

inline bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

template <class... P> bool all_aligned(const P*... pointers) { return (aligned(pointers) && ...); }

// Whether all of them are as far from a multiple of 16 bytes.
inline bool alike(const void* like, const void* const* pointers, int count) {
  for (int i = 0; i < count; ++i)
    if ((reinterpret_cast<uintptr_t>(pointers[i]) - reinterpret_cast<uintptr_t>(like)) % 16 != 0) return false;
  return true;
}

// f.operator()<T>() for the type of the branches, f.operator()<A>() for what they are summed in.
template <class F> void dispatch(Type type, const F& f) {
  switch (type) {
    case Type::float32: return f.template operator()<float>();
    case Type::float64: return f.template operator()<double>();
    case Type::float16: return f.template operator()<__half>();
    default: return f.template operator()<__nv_bfloat16>();
  }
}
template <class F> void dispatch_accumulate(Type type, const F& f) {
  if (type == Type::float64) f.template operator()<double>();
  else f.template operator()<float>();
}

// f.operator()<T, channels_last, V>(): a thread's vectors in channels_last are of V channels, one channel alone if `whole_vectors`
// does not hold of the addresses or if they do not divide C.
template <class F> void dispatch(const Branches& ys, bool whole_vectors, const F& f) {
  dispatch(ys.type, [&]<class T>() {
    constexpr int V = kVector<T>;
    if (!ys.channels_last) f.template operator()<T, false, V>();
    else if (whole_vectors && ys.C % V == 0) f.template operator()<T, true, V>();
    else f.template operator()<T, true, 1>();
  });
}

}  // namespace sk::cuda
