// What keys give: the scores of a tile, and how their elements are loaded. Included by rows.h.
//
// The lanes of a vector are the heads, or the heads times a few elements of a key that are summed at the end:
// a key is repeated for the heads as it is loaded, and nothing is transposed.
#include "common/lanes.h"

constexpr int kChunk = 2 * kLanes;  // elements of a head that are taken at a time

using Floats = vec_t<float>;
using Bits = mask_t<float>;

RK_INLINE Floats as_floats(const Bits& x) {
  return __builtin_bit_cast(Floats, x);
}
RK_INLINE Bits as_bits(const Floats& x) {
  return __builtin_bit_cast(Bits, x);
}

template <int... lane>
RK_INLINE Bits lane_numbers(std::integer_sequence<int, lane...>) {
  return Bits{lane...};
}
RK_INLINE Bits lane_numbers() {
  return lane_numbers(std::make_integer_sequence<int, kLanes>());
}

// 2n elements as two vectors. bfloat16 comes as pairs in 32-bit lanes: evens first, then odds.
template <class T>
RK_INLINE void load_chunk(const T* from, Floats& first, Floats& second) {
  if constexpr (std::is_same_v<T, bf16>) {
    Bits pairs;
    __builtin_memcpy(&pairs, from, sizeof(pairs));
    first = as_floats(pairs << 16);
    second = as_floats(pairs & int32_t(0xffff0000));
  } else {
    first = load_lanes(from);
    second = load_lanes(from + kLanes);
  }
}

// Where element d lies once chunks are loaded so.
template <class T>
constexpr int64_t place(int64_t d) {
  const int64_t within = d % kChunk;
  return std::is_same_v<T, bf16> ? d - within + within / 2 + within % 2 * kLanes : d;
}

// How keys meet queries: 32-bit words of a key, each a float, or a pair of bfloat16, which the processor
// multiplies, or which is taken apart once it is repeated for a vector of heads.
template <class T, int heads, Products products>
struct Words {
  static constexpr bool pairs = products != Products::kFloats;
  static constexpr bool halves = !pairs && std::is_same_v<T, bf16> && heads == kLanes;
  static constexpr bool direct = pairs || halves || std::is_same_v<T, float>;  // words as they lie in memory
  static constexpr int elements = pairs || halves ? 2 : 1;                     // of a word
  using Word = std::conditional_t<pairs, uint32_t, float>;                     // of a query
  // Where element d of a query goes.
  static constexpr int64_t place_of(int64_t d) { return halves ? d : place<T>(d); }
};

#if RK_LANES == 16 && RK_MULTI_ISA
RK_INLINE void multiply_pairs(Floats& acc, const Floats& x, const Floats& y) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(x), "v"(y));
}
#endif

// Adds what `unit` words of a key, repeated to fill a vector, give with a query's.
template <class Words>
RK_INLINE void multiply(Floats& acc, const Floats& x, const Floats* query) {
  if constexpr (Words::halves) {
    acc += as_floats(as_bits(x) << 16) * query[0];
    acc += as_floats(as_bits(x) & int32_t(0xffff0000)) * query[1];
#if RK_LANES == 16 && RK_MULTI_ISA
  } else if constexpr (Words::pairs) {
    multiply_pairs(acc, x, query[0]);
#endif
  } else {
    acc += x * query[0];
  }
}

// `unit` words, repeated to fill a vector.
template <int unit, int... lane>
RK_INLINE Floats repeated(const void* from, std::integer_sequence<int, lane...>) {
  if constexpr (unit == kLanes) {
    Floats x;
    __builtin_memcpy(&x, from, sizeof(x));
    return x;
  } else if constexpr (unit == 1) {
    float x;
    __builtin_memcpy(&x, from, sizeof(x));
    return Floats{(lane < 0 ? 0.0f : x)...};
  } else if constexpr (unit == 2) {
    typedef int64_t Wide __attribute__((vector_size(kLanes * 4)));
    int64_t x;
    __builtin_memcpy(&x, from, sizeof(x));
    return __builtin_bit_cast(Floats, Wide{} + x);
  } else {
    struct Few {
      float words[unit];
    };
    const Few& few = *static_cast<const Few*>(from);
    Floats x;
#if RK_LANES == 16 && RK_MULTI_ISA
    if constexpr (unit == 4)  // GCC 12 would build it word by word
      asm("vbroadcastf32x4 %1, %0" : "=v"(x) : "m"(few));
    else
      asm("vbroadcastf32x8 %1, %0" : "=v"(x) : "m"(few));
#else
    for (int i = 0; i < kLanes; i += unit)
      __builtin_memcpy(reinterpret_cast<float*>(&x) + i, &few, sizeof(few));
#endif
    return x;
  }
}
template <int unit>
RK_INLINE Floats repeated(const void* from) {
  return repeated<unit>(from, std::make_integer_sequence<int, kLanes>());
}

// Neighbouring lanes are summed until each key has one sum a head: v[0] is then [unit keys][heads].
template <int unit>
RK_INLINE void sum_neighbours(Floats* v) {
  if constexpr (unit > 1) {
#pragma GCC unroll 8
    for (int i = 0; i < unit / 2; ++i)
      v[i] = permuted<float, Alternate<float, 1, 0>>(v[2 * i], v[2 * i + 1]) +
             permuted<float, Alternate<float, 1, 1>>(v[2 * i], v[2 * i + 1]);
    sum_neighbours<unit / 2>(v);
  }
}

// A block of n keys as words, zeros for what is missing.
template <class T, class Words, int n>
RK_OUTLINE void fetch(const T* k, int64_t stride, int rows, int64_t size, int64_t words, float* block) {
  if (rows < n || size % kChunk) __builtin_memset(block, 0, n * words * sizeof(float));
  for (int i = 0; i < rows; ++i) {
    const T* from = k + i * stride;
    float* to = block + i * words;
    if constexpr (Words::direct) {
      __builtin_memcpy(to, from, size * sizeof(T));
    } else {
      Floats first, second;
      int64_t d = 0;
      for (; d + kChunk <= size; d += kChunk) {
        load_chunk(from + d, first, second);
        store_lanes<float>(to + d, first);
        store_lanes<float>(to + d + kLanes, second);
      }
      for (; d < size; ++d) to[place<T>(d)] = load(from[d]);
    }
  }
}

// Asks for rows that are wanted soon, into the second-level cache.
template <class T>
RK_INLINE void ask_for(const T* rows, int64_t stride, int count, int64_t size) {
  constexpr int64_t line = 64 / sizeof(T);
  for (int i = 0; i < count; ++i, rows += stride)
    for (int64_t d = 0; d < size; d += line) __builtin_prefetch(rows + d, 0, 2);
}

// scores[s][heads] of a tile, not scaled, in blocks of n keys; keys that the last block lacks get -inf. With
// AVX2 the values of these keys are asked for on the way.
template <class T, int heads, Products products>
RK_INLINE void score(const T* k, int64_t stride, int count, int64_t size, const float* q, int64_t words,
                     float* block, float* scores, const T* v, int64_t v_stride) {
  using Key = Words<T, heads, products>;
  constexpr int unit = kLanes / heads, kUnits = Key::halves ? 2 : heads < 4 ? heads : 4;
  constexpr int vectors = Key::halves ? 2 : 1;  // of a query, for one of a key
  for (int first = 0; first < count; first += kLanes) {
    const int rows = count - first < kLanes ? count - first : kLanes;
    const char* base = reinterpret_cast<const char*>(k + first * stride);
    int64_t step = stride * sizeof(T);
    if (!Key::direct || rows < kLanes || size % kChunk) {
      fetch<T, Key, kLanes>(k + first * stride, stride, rows, size, words, block);
      base = reinterpret_cast<const char*>(block);
      step = words * sizeof(float);
    }
    const int64_t ahead = 4 * kLanes * stride * int64_t(sizeof(T));
    if constexpr (kLanes == 8) ask_for(v + first * v_stride, v_stride, rows, size);
    Floats acc[kLanes] = {};
    for (int64_t w = 0; w < words; w += kUnits * unit) {
      Floats query[kUnits * vectors];
#pragma GCC unroll 4
      for (int j = 0; j < kUnits * vectors; ++j) query[j] = load_lanes(q + (w * vectors + j * unit) * heads);
      const char* row = base + w * sizeof(float);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
#pragma GCC unroll 4
        for (int j = 0; j < kUnits; ++j)
          multiply<Key>(acc[i], repeated<unit>(row + j * unit * sizeof(float)), query + j * vectors);
        if constexpr (Key::direct) __builtin_prefetch(row + ahead);
        row += step;
        asm("" : "+r"(row));  // else GCC keeps a pointer for every row, in vector registers
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < heads; ++i) {
      sum_neighbours<unit>(acc + i * unit);
      const Bits key = lane_numbers() / heads + i * unit;
      const Floats none = Floats{} - std::numeric_limits<float>::infinity();
      store_lanes<float>(scores + first * heads + i * kLanes, key < rows ? acc[i * unit] : none);
    }
  }
}
