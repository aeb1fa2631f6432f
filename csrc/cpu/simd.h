// Vectors of one register, built on the compilers' vector extension. No include guard and no includes: foreach_isa.h
// includes this file once per instruction set, inside a namespace, and every function here is inlined into its kernel.

#define SK_INLINE inline __attribute__((always_inline))

template <class A> struct Simd;
template <> struct Simd<float> {
  typedef float type __attribute__((vector_size(SK_VECTOR_BYTES)));
  typedef int32_t integer __attribute__((vector_size(SK_VECTOR_BYTES)));
};
template <> struct Simd<double> {
  typedef double type __attribute__((vector_size(SK_VECTOR_BYTES)));
  typedef int64_t integer __attribute__((vector_size(SK_VECTOR_BYTES)));
};

template <class A> using Vec = typename Simd<A>::type;
template <class A> constexpr int kLanes = SK_VECTOR_BYTES / sizeof(A);
inline int64_t lanes() { return kLanes<float>; }

template <class A> SK_INLINE Vec<A> splat(A value) { return value - Vec<A>{}; }

// kLanes elements of storage type T, widened to the type that they are computed in.
template <class T> SK_INLINE Vec<T> load(const T* p) {
  Vec<T> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

typedef uint16_t Bits16 __attribute__((vector_size(SK_VECTOR_BYTES / 2)));
typedef uint32_t Bits32 __attribute__((vector_size(SK_VECTOR_BYTES)));

SK_INLINE Vec<float> load(const c10::BFloat16* p) {
  Bits16 bits;
  std::memcpy(&bits, p, sizeof bits);
  return (Vec<float>)(__builtin_convertvector(bits, Bits32) << 16);
}

SK_INLINE Vec<float> load(const c10::Half* p) {
#if SK_VECTOR_BYTES == 64
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif SK_VECTOR_BYTES == 32
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  Vec<float> v;
  for (int i = 0; i < kLanes<float>; ++i) v[i] = static_cast<float>(p[i]);
  return v;
#endif
}

template <class T> SK_INLINE void store(T* p, Vec<T> v) { std::memcpy(p, &v, sizeof v); }

SK_INLINE void store(c10::BFloat16* p, Vec<float> v) {
  const Bits32 bits = (Bits32)v;
  // Round to nearest even; a NaN could round to infinity, so it is set apart.
  const Bits32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Bits32 nan = 0x7fc0u - Bits32{};
  const Bits16 out = __builtin_convertvector(v == v ? rounded : nan, Bits16);
  std::memcpy(p, &out, sizeof out);
}

SK_INLINE void store(c10::Half* p, Vec<float> v) {
#if SK_VECTOR_BYTES == 64
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#elif SK_VECTOR_BYTES == 32
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes<float>; ++i) p[i] = c10::Half(v[i]);
#endif
}

// Whether registers that are written to p, and to every `step` elements from there on, are whole lines of the caches.
template <class T> SK_INLINE bool are_lines(const T* p, int64_t step) {
  return sizeof(Vec<Accumulate<T>>) == 64 && sizeof(T) == sizeof(Accumulate<T>) &&
         (reinterpret_cast<uintptr_t>(p) | step * sizeof(T)) % 64 == 0;
}

// A line to memory, past the caches. Others may read it after a `fence_streams`.
template <class T> SK_INLINE void stream(T* p, Vec<Accumulate<T>> v) {
#if SK_VECTOR_BYTES == 64
  if constexpr (std::is_same_v<T, float>) return _mm512_stream_ps(p, v);
  if constexpr (std::is_same_v<T, double>) return _mm512_stream_pd(p, v);
#endif
  store(p, v);
}

// Registers, `step` elements apart; if they are `lines` that nobody reads soon, past the caches.
template <class T, int kN> SK_INLINE void store_all(bool lines, T* p, int64_t step, const Vec<Accumulate<T>> (&v)[kN]) {
  if (lines)
    for (int j = 0; j < kN; ++j) stream(p + j * step, v[j]);
  else
    for (int j = 0; j < kN; ++j) store(p + j * step, v[j]);
}

// The first n < kLanes elements only; the lanes beyond them are 0.
#if SK_VECTOR_BYTES == 64
SK_INLINE Vec<float> load(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p); }
SK_INLINE void store(float* p, Vec<float> v, int64_t n) { _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), v); }
#endif

template <class T> SK_INLINE Vec<Accumulate<T>> load(const T* p, int64_t n) {
  T part[kLanes<Accumulate<T>>] = {};
  std::memcpy(part, p, n * sizeof(T));
  return load(part);
}

template <class T> SK_INLINE void store(T* p, Vec<Accumulate<T>> v, int64_t n) {
  T part[kLanes<Accumulate<T>>];
  store(part, v);
  std::memcpy(p, part, n * sizeof(T));
}

// A whole register, or its first n lanes, whichever it is.
template <class T> SK_INLINE Vec<Accumulate<T>> load_some(const T* p, int64_t n) {
  return n < kLanes<Accumulate<T>> ? load(p, n) : load(p);
}

template <class T> SK_INLINE void store_some(T* p, Vec<Accumulate<T>> v, int64_t n) {
  if (n < kLanes<Accumulate<T>>) store(p, v, n);
  else store(p, v);
}

// The same, where it is known when it is compiled.
template <bool kPartial, class T> SK_INLINE Vec<Accumulate<T>> load_lanes(const T* p, int64_t n) {
  if constexpr (kPartial) return load(p, n);
  else return load(p);
}

template <bool kPartial, class T> SK_INLINE void store_lanes(T* p, Vec<Accumulate<T>> v, int64_t n) {
  if constexpr (kPartial) store(p, v, n);
  else store(p, v);
}

// 1 in the first n lanes, 0 beyond.
template <class A> SK_INLINE Vec<A> mask(int64_t n) {
  Vec<A> v = {};
  for (int i = 0; i < kLanes<A>; ++i) v[i] = i < n ? A(1) : A(0);
  return v;
}

#if SK_VECTOR_BYTES == 64
template <class A> SK_INLINE A sum(Vec<A> v) {
  if constexpr (sizeof(A) == 4) return _mm512_reduce_add_ps(v);
  else return _mm512_reduce_add_pd(v);
}
#else
template <class A> SK_INLINE A sum(Vec<A> v) {
  A part[kLanes<A>];
  std::memcpy(part, &v, sizeof v);
  for (int width = kLanes<A> / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) part[i] += part[i + width];
  return part[0];
}
#endif

// 1 / k!, k < kN.
template <class A, int kN> constexpr std::array<A, kN> inverse_factorials() {
  std::array<A, kN> all{};
  double factorial = 1;
  for (int k = 0; k < kN; ++k, factorial *= k) all[k] = static_cast<A>(1 / factorial);
  return all;
}

// exp by x = n ln 2 + r, |r| <= ln 2 / 2, and the Taylor polynomial of exp(r); about 1 ulp. Saturates instead of
// overflowing, keeps NaN.
template <class A> SK_INLINE Vec<A> exp(Vec<A> x) {
  constexpr bool kFloat = sizeof(A) == 4;
  constexpr A kLimit = kFloat ? A(87) : A(708);
  // ln 2 in two parts, so that n * kHigh is exact.
  constexpr A kHigh = kFloat ? A(0.693359375) : A(6.93145751953125e-1);
  constexpr A kLow = kFloat ? A(-2.12194440e-4) : A(1.42860682030941723212e-6);
  // Adding this makes the unit the last mantissa bit, and so rounds.
  constexpr A kRound = kFloat ? A(12582912) : A(6755399441055744);
  constexpr int kTerms = kFloat ? 7 : 13;
  static constexpr auto kFactor = inverse_factorials<A, kTerms + 1>();
  constexpr int kMantissa = kFloat ? 23 : 52, kBias = kFloat ? 127 : 1023;
  x = x > kLimit ? splat<A>(kLimit) : x;
  x = x < -kLimit ? splat<A>(-kLimit) : x;
  const Vec<A> n = (x * A(1.4426950408889634) + kRound) - kRound;
  const Vec<A> r = (x - n * kHigh) - n * kLow;
  Vec<A> p = splat(kFactor[kTerms]);
#pragma GCC unroll 16
  for (int k = kTerms - 1; k >= 0; --k) p = p * r + kFactor[k];
  using Integer = typename Simd<A>::integer;
  return p * (Vec<A>)((__builtin_convertvector(n, Integer) + kBias) << kMantissa);
}

// act(z) is the activation, gate(z, v) is act'(z) * v. A comparison that a NaN fails lets the NaN pass, and ReLU selects
// instead of multiplying by 0, so that an infinity below zero becomes 0 and not NaN: PyTorch's own semantics.
template <class A, Activation kAct> struct Act {
  A slope;
  SK_INLINE Vec<A> operator()(Vec<A> z) const {
    if constexpr (kAct == Activation::silu) return z * sigmoid(z);
#if SK_VECTOR_BYTES == 64
    // The larger of 0 and a NaN is the second operand.
    else if constexpr (kAct == Activation::relu && sizeof(A) == 4) return _mm512_max_ps(Vec<A>{}, z);
#endif
    else return gate(z, z);
  }
  SK_INLINE Vec<A> gate(Vec<A> z, Vec<A> v) const {
    if constexpr (kAct == Activation::relu) return z <= 0 ? Vec<A>{} : v;
    if constexpr (kAct == Activation::leaky_relu) return z <= 0 ? slope * v : v;
    if constexpr (kAct == Activation::identity) return v;
    if constexpr (kAct == Activation::silu) {
      const Vec<A> s = sigmoid(z);
      return v * (s * (A(1) + z * (A(1) - s)));
    }
  }
  SK_INLINE static Vec<A> sigmoid(Vec<A> z) { return A(1) / (A(1) + exp<A>(-z)); }
};

// A constant of channel c, from an array over channels: one per lane where lanes are channels, the same in all lanes
// where they are pixels.
template <bool kChannelsLast, bool kPartial, class A> SK_INLINE Vec<A> constant(const A* p, int64_t n) {
  if constexpr (kChannelsLast) return load_lanes<kPartial>(p, n);
  else return splat<A>(*p);
}

// What comes a KiB after p, into the second level of cache. In order, the hardware runs ahead by itself, but stops at every page, and
// where a row of one branch gives way to one of the next. Into the first level, a prefetch would hold one of the few places in which
// loads wait for memory.
template <class T> SK_INLINE void prefetch_ahead(const T* p) { __builtin_prefetch(reinterpret_cast<const char*>(p) + 1024, 0, 2); }

// Lanes are channels: sums.add<kN, kStrands, kPartial>(c, offset, pixels, step, n) for all C channels of `pixels` consecutive pixels and
// of as many in each of kStrands strands, `step` apart, from `offset` on; kN vectors at a time from channel c on, the last of n lanes.
template <class A, int kStrands, class Sums>
SK_INLINE void each_channel(const Sums& sums, int64_t C, int64_t offset, int64_t pixels, int64_t step) {
  constexpr int64_t L = kLanes<A>;
  int64_t c = 0;
  if constexpr (kStrands == 1) {
    for (; c + 8 * L <= C; c += 8 * L) sums.template add<8, 1, false>(c, offset, pixels, step, 0);
    for (; c + 4 * L <= C; c += 4 * L) sums.template add<4, 1, false>(c, offset, pixels, step, 0);
  }
  for (; c + L <= C; c += L) sums.template add<1, kStrands, false>(c, offset, pixels, step, 0);
  if (c < C) sums.template add<1, kStrands, true>(c, offset, pixels, step, C - c);
}

// The same for all pixels of a segment, in an order that the hardware foresees. The sums of few channels stay in registers for 32
// pixels, which are read as they lie in memory; those of more are added to at every pixel, so four strands share that, each read
// as it lies in memory.
template <class A, class Sums> SK_INLINE void each_pixel(const Sums& sums, int64_t C, int64_t pixels) {
  int64_t pixel = 0;
  if (C <= 8 * kLanes<A>) {
    for (; pixel < pixels; pixel += 32) each_channel<A, 1>(sums, C, pixel * C, pixels - pixel < 32 ? pixels - pixel : 32, 0);
    return;
  }
  const int64_t strand = pixels / 4;
  for (; pixel < strand; ++pixel) each_channel<A, 4>(sums, C, pixel * C, 1, strand * C);
  for (pixel = 4 * strand; pixel < pixels; ++pixel) each_channel<A, 1>(sums, C, pixel * C, 1, 0);
}

// Element i is the index(i)-th of a, or of b, which is counted on.
template <class Index, int... i> SK_INLINE Vec<float> shuffle(Vec<float> a, Vec<float> b, Index, std::integer_sequence<int, i...>) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, Index{}(i)...);
#else
  return __builtin_shuffle(a, b, typename Simd<float>::integer{Index{}(i)...});
#endif
}
template <class Index> SK_INLINE Vec<float> shuffle(Vec<float> a, Vec<float> b, Index index) {
  return shuffle(a, b, index, std::make_integer_sequence<int, kLanes<float>>());
}

// Rows become columns: first four rows in every four lanes, by shuffles that stay in these, which are the cheap ones; then fours.
SK_INLINE void transpose(Vec<float> (&v)[kLanes<float>]) {
  constexpr int L = kLanes<float>;
  // Of every four lanes the first two, or the last, of a and b in turn; and the first pair of both, or the last.
  const auto first = [](int i) { return i / 4 * 4 + i % 4 / 2 + i % 2 * L; };
  const auto last = [](int i) { return i / 4 * 4 + 2 + i % 4 / 2 + i % 2 * L; };
  const auto first_pair = [](int i) { return i / 4 * 4 + i % 2 + i % 4 / 2 * L; };
  const auto last_pair = [](int i) { return i / 4 * 4 + 2 + i % 2 + i % 4 / 2 * L; };
  for (int i = 0; i < L; i += 4) {
    const Vec<float> a = shuffle(v[i], v[i + 1], first), b = shuffle(v[i], v[i + 1], last), c = shuffle(v[i + 2], v[i + 3], first),
                     d = shuffle(v[i + 2], v[i + 3], last);
    v[i] = shuffle(a, c, first_pair);
    v[i + 1] = shuffle(a, c, last_pair);
    v[i + 2] = shuffle(b, d, first_pair);
    v[i + 3] = shuffle(b, d, last_pair);
  }
  const auto even_fours = [](int i) { return i / 4 * 8 + i % 4; };
  const auto odd_fours = [](int i) { return i / 4 * 8 + 4 + i % 4; };
  for (int rows = 4; rows < L; rows *= 2) {
    Vec<float> w[L];
    for (int i = 0; i < L / 2; ++i) {
      const Vec<float> a = v[i / 4 * 8 + i % 4], b = v[i / 4 * 8 + 4 + i % 4];
      w[i] = shuffle(a, b, even_fours);
      w[L / 2 + i] = shuffle(a, b, odd_fours);
    }
    for (int i = 0; i < L; ++i) v[i] = w[i];
  }
}

// In every lane channel i of the lane's group of kGroup channels; p holds one pixel. Where the loop over i is unrolled, a shuffle
// of four lanes has it in its instruction; one that reads it from a register makes the convolution half as long again.
template <int kGroup> SK_INLINE Vec<float> broadcast_in_group(const float* p, int i) {
  if constexpr (kGroup >= kLanes<float>) return splat(p[i]);
#if SK_VECTOR_BYTES == 64
#define SK_SHUFFLE _mm512_permute_ps
#elif SK_VECTOR_BYTES == 32
#define SK_SHUFFLE _mm256_permute_ps
#endif
#ifdef SK_SHUFFLE
  else if constexpr (kGroup == 4) {
    const Vec<float> v = load(p);
    return i == 0 ? SK_SHUFFLE(v, 0x00) : i == 1 ? SK_SHUFFLE(v, 0x55) : i == 2 ? SK_SHUFFLE(v, 0xaa) : SK_SHUFFLE(v, 0xff);
  }
#undef SK_SHUFFLE
#endif
#if SK_VECTOR_BYTES == 64
  else {
    const __m512i first = _mm512_set_epi32(8, 8, 8, 8, 8, 8, 8, 8, 0, 0, 0, 0, 0, 0, 0, 0);
    return _mm512_permutexvar_ps(_mm512_add_epi32(first, _mm512_set1_epi32(i)), load(p));
  }
#endif
}
