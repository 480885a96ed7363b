// One vector register as lanes, and square blocks of lanes transposed; included by row kernels that put a row
// in each lane. Include-free, as everything that foreach_isa.h compiles inside a namespace.

template <class A>
struct Lanes {
  static constexpr int n = kLanes * int(sizeof(float)) / int(sizeof(A));
  using Bits = std::conditional_t<sizeof(A) == 4, int32_t, int64_t>;
  typedef A Vec __attribute__((vector_size(kLanes * sizeof(float))));
  typedef Bits Mask __attribute__((vector_size(kLanes * sizeof(float))));  // a lane is all ones or zero
};
template <class A>
using vec_t = typename Lanes<A>::Vec;
template <class A>
using mask_t = typename Lanes<A>::Mask;

// As many 16-bit words as a vector has floats.
typedef uint16_t Words16 __attribute__((vector_size(kLanes * 2)));
typedef uint32_t Words32 __attribute__((vector_size(kLanes * 4)));

// n consecutive elements, at any alignment.
template <class T>
RK_INLINE vec_t<acc_t<T>> load_lanes(const T* from) {
  vec_t<acc_t<T>> to;
  if constexpr (std::is_same_v<T, acc_t<T>>) {
    __builtin_memcpy(&to, from, sizeof(to));
  } else if constexpr (std::is_same_v<T, bf16>) {
    Words16 bits;
    __builtin_memcpy(&bits, from, sizeof(bits));
    to = (vec_t<float>)(__builtin_convertvector(bits, Words32) << 16);
#if RK_LANES >= 8 && RK_MULTI_ISA
  } else if constexpr (std::is_same_v<T, fp16>) {  // an instruction that GCC has no vector conversion for
    struct Half {
      fp16 lanes[kLanes];
    };
    asm("vcvtph2ps %1, %0" : "=v"(to) : "m"(*reinterpret_cast<const Half*>(from)));
#endif
  } else {
    alignas(sizeof(to)) acc_t<T> wide[Lanes<acc_t<T>>::n];
#pragma omp simd
    for (int i = 0; i < Lanes<acc_t<T>>::n; ++i) wide[i] = load(from[i]);
    __builtin_memcpy(&to, wide, sizeof(to));
  }
  return to;
}

template <class T>
RK_INLINE void store_lanes(T* to, const vec_t<acc_t<T>>& from) {
  if constexpr (std::is_same_v<T, acc_t<T>>) {
    __builtin_memcpy(to, &from, sizeof(from));
  } else if constexpr (std::is_same_v<T, bf16>) {  // as store<bf16>
    const Words32 bits = (Words32)from;
    const Words32 rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
    const Words32 kept = from != from ? bits | 0x400000u : rounded;
    const Words16 words = __builtin_convertvector(kept >> 16, Words16);
    __builtin_memcpy(to, &words, sizeof(words));
#if RK_LANES >= 8 && RK_MULTI_ISA
  } else if constexpr (std::is_same_v<T, fp16>) {
    struct Half {
      fp16 lanes[kLanes];
    };
    asm("vcvtps2ph $0, %1, %0" : "=m"(*reinterpret_cast<Half*>(to)) : "v"(from));  // to nearest even
#endif
  } else {
    alignas(sizeof(from)) acc_t<T> wide[Lanes<acc_t<T>>::n];
    __builtin_memcpy(wide, &from, sizeof(from));
#pragma omp simd
    for (int i = 0; i < Lanes<acc_t<T>>::n; ++i) to[i] = store<T>(wide[i]);
  }
}

// f of every lane, which GCC vectorises.
template <class A, class F>
RK_INLINE vec_t<A> each_lane(const vec_t<A>& x, const F& f) {
  alignas(sizeof(x)) A lanes[Lanes<A>::n];
  __builtin_memcpy(lanes, &x, sizeof(x));
#pragma omp simd
  for (int i = 0; i < Lanes<A>::n; ++i) lanes[i] = f(lanes[i]);
  return load_lanes(lanes);
}

// a * b + c, rounded once where the instruction set does that. Said outright: left to itself GCC fuses one of
// two copies of a formula and not the other, and a row's bits would depend on which one it takes.
template <class A>
RK_INLINE vec_t<A> multiply_add(const vec_t<A>& a, const vec_t<A>& b, const vec_t<A>& c) {
#if RK_LANES == 16 && RK_MULTI_ISA
  constexpr int as_set = 4;  // the rounding mode in force
  if constexpr (sizeof(A) == 4)
    return __builtin_ia32_vfmaddps512_mask(a, b, c, -1, as_set);
  else
    return __builtin_ia32_vfmaddpd512_mask(a, b, c, -1, as_set);
#elif RK_LANES == 8 && RK_MULTI_ISA
  if constexpr (sizeof(A) == 4)
    return __builtin_ia32_vfmaddps256(a, b, c);
  else
    return __builtin_ia32_vfmaddpd256(a, b, c);
#else
  return a * b + c;
#endif
}

// The same where `where` is set, elsewhere a.
template <class A>
RK_INLINE vec_t<A> multiply_add(const vec_t<A>& a, const vec_t<A>& b, const vec_t<A>& c,
                                const mask_t<A>& where) {
#if RK_LANES == 16 && RK_MULTI_ISA
  constexpr int as_set = 4;
  typedef long long Quads __attribute__((vector_size(64)));
  if constexpr (sizeof(A) == 4)
    return __builtin_ia32_vfmaddps512_mask(a, b, c, __builtin_ia32_cvtd2mask512(where), as_set);
  else
    return __builtin_ia32_vfmaddpd512_mask(a, b, c, __builtin_ia32_cvtq2mask512((Quads)where), as_set);
#else
  return where ? multiply_add<A>(a, b, c) : a;
#endif
}

// A lane permutation of two vectors: `source(i)` is lane i's origin, 0 .. n-1 in a and n .. 2n-1 in b.
template <class A, class Source, int... lane>
RK_INLINE vec_t<A> permuted(const vec_t<A>& a, const vec_t<A>& b, std::integer_sequence<int, lane...>) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, Source::of(lane)...);
#else
  return __builtin_shuffle(a, b, mask_t<A>{Source::of(lane)...});
#endif
}
template <class A, class Source>
RK_INLINE vec_t<A> permuted(const vec_t<A>& a, const vec_t<A>& b) {
  return permuted<A, Source>(a, b, std::make_integer_sequence<int, Lanes<A>::n>());
}

// Runs of `unit` lanes by turns from a and b, out of the lower or upper half of every `group` lanes. With
// groups of 16 bytes this is the processor's unpack instruction.
template <class A, int group, int unit, int half>
struct Interleave {
  static constexpr int of(int lane) {
    const int at = lane % group;
    const int origin = lane - at + half * group / 2 + at / (2 * unit) * unit + at % unit;
    return origin + at / unit % 2 * Lanes<A>::n;
  }
};

// Every second run of `unit` lanes: a's fill the lower half, b's the upper.
template <class A, int unit, int odd>
struct Alternate {
  static constexpr int of(int lane) {
    constexpr int n = Lanes<A>::n;
    const int at = lane % (n / 2);
    return lane / (n / 2) * n + (2 * (at / unit) + odd) * unit + at % unit;
  }
};

template <class A, int group, int unit>
RK_INLINE void interleave(vec_t<A>& a, vec_t<A>& b) {
  const vec_t<A> low = permuted<A, Interleave<A, group, unit, 0>>(a, b);
  b = permuted<A, Interleave<A, group, unit, 1>>(a, b);
  a = low;
}

// v[i] lane j becomes v[j] lane i. First 16-byte blocks within themselves, then the blocks among each other.
template <class A>
RK_INLINE void transpose(vec_t<A> (&v)[Lanes<A>::n]) {
  constexpr int n = Lanes<A>::n;
  constexpr int block = 16 / int(sizeof(A));
#pragma GCC unroll 8
  for (int i = 0; i < n; i += block) {
    if constexpr (block == 2) {
      interleave<A, 2, 1>(v[i], v[i + 1]);
    } else {
      interleave<A, 4, 1>(v[i], v[i + 1]);
      interleave<A, 4, 1>(v[i + 2], v[i + 3]);
      interleave<A, 4, 2>(v[i], v[i + 2]);
      interleave<A, 4, 2>(v[i + 1], v[i + 3]);
      const vec_t<A> third = v[i + 1];
      v[i + 1] = v[i + 2];
      v[i + 2] = third;
    }
  }
  if constexpr (n == 2 * block) {
#pragma GCC unroll 4
    for (int i = 0; i < block; ++i) interleave<A, n, block>(v[i], v[i + block]);
  } else if constexpr (n == 4 * block) {
#pragma GCC unroll 4
    for (int i = 0; i < block; ++i) {
      vec_t<A>&a = v[i], &b = v[i + block], &c = v[i + 2 * block], &d = v[i + 3 * block];
      interleave<A, n, 2 * block>(a, b);
      interleave<A, n, 2 * block>(c, d);
      const vec_t<A> first = permuted<A, Alternate<A, block, 0>>(a, c);
      const vec_t<A> third = permuted<A, Alternate<A, block, 0>>(b, d);
      d = permuted<A, Alternate<A, block, 1>>(b, d);
      b = permuted<A, Alternate<A, block, 1>>(a, c);
      a = first;
      c = third;
    }
  }
}
