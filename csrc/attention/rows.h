// One decoding step: few queries against many keys, softmax(scale q k^T) v. Included by foreach_isa.h.
//
// The query heads that share a key head are taken together, kTile keys at a time, so that keys and values
// come from memory once. For scores the lanes of a vector are the heads, or the heads times a few elements
// of a key that are summed at the end: a key is repeated for the heads as it is loaded, and nothing is
// transposed. For values the lanes are the elements of a head. The softmax is kept as a running maximum, the
// sum of the weights and the weighted values.
#include "common/lanes.h"

constexpr int kTile = 128;
constexpr int kMostKeys = kTile + kTile / 2;                   // the last tile takes a rest with it
constexpr int kMostHeads = kLanes == 16 ? 8 : 4;               // whose values fit the registers
constexpr int kChunk = 2 * kLanes;                             // elements of a head that are taken at a time
constexpr float kLowest = -std::numeric_limits<float>::max();  // finite: a score of -inf can be compared

using Floats = vec_t<float>;
using Bits = mask_t<float>;
typedef uint32_t Words32 __attribute__((vector_size(kLanes * 4)));

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

RK_INLINE Floats exp_lanes(const Floats& x) {
  alignas(sizeof(x)) float lanes[kLanes];
  __builtin_memcpy(lanes, &x, sizeof(x));
#pragma omp simd
  for (int i = 0; i < kLanes; ++i) lanes[i] = exp_fast(lanes[i]);
  return load_lanes(lanes);
}

// 2n elements as two vectors. bfloat16 comes as pairs in 32-bit lanes: evens first, then odds.
template <class T>
RK_INLINE void load_chunk(const T* from, Floats& first, Floats& second) {
  if constexpr (std::is_same_v<T, bf16>) {
    Bits pairs;
    __builtin_memcpy(&pairs, from, sizeof(pairs));
    first = as_floats(pairs << 16);
    second = as_floats(pairs & int32_t(0xffff0000));
#if RK_LANES >= 8 && RK_MULTI_ISA
  } else if constexpr (std::is_same_v<T, fp16>) {  // an instruction that GCC has no vector conversion for
    struct Half {
      fp16 lanes[kLanes];
    };
    const Half* half = reinterpret_cast<const Half*>(from);
    asm("vcvtph2ps %1, %0" : "=v"(first) : "m"(half[0]));
    asm("vcvtph2ps %1, %0" : "=v"(second) : "m"(half[1]));
#endif
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

// How keys meet queries: 32-bit words of a key, each a float, or a pair of bfloat16 where the processor
// multiplies them (`paired`).
template <class T, bool paired>
struct Words {
  static constexpr bool direct = paired || std::is_same_v<T, float>;  // words as they lie in memory
  using Word = std::conditional_t<paired, uint32_t, float>;
};

RK_INLINE void multiply(Floats& acc, const Floats& x, const Floats& y, std::false_type) {
  acc += x * y;
}
#if RK_LANES == 16 && RK_MULTI_ISA
RK_INLINE void multiply(Floats& acc, const Floats& x, const Floats& y, std::true_type) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(x), "v"(y));
}
#else  // never chosen: see multiplies_pairs()
RK_INLINE void multiply(Floats&, const Floats&, const Floats&, std::true_type) {}
#endif

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
template <class T, bool paired>
RK_OUTLINE void fetch(const T* k, int64_t stride, int rows, int64_t size, int64_t words, float* block) {
  if (rows < kLanes || size % kChunk) __builtin_memset(block, 0, kLanes * words * sizeof(float));
  for (int i = 0; i < rows; ++i) {
    const T* from = k + i * stride;
    float* to = block + i * words;
    if constexpr (Words<T, paired>::direct) {
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

// scores[s][heads] of a tile, in blocks of n keys; keys that the last block lacks get -inf.
template <class T, int heads, bool paired>
RK_INLINE void score(const T* k, int64_t stride, int count, int64_t size, const float* q, int64_t words,
                     float scale, float* block, float* scores) {
  constexpr int unit = kLanes / heads, kUnits = heads < 4 ? heads : 4;
  for (int first = 0; first < count; first += kLanes) {
    const int rows = count - first < kLanes ? count - first : kLanes;
    const char* base = reinterpret_cast<const char*>(k + first * stride);
    int64_t step = stride * sizeof(T);
    if (!Words<T, paired>::direct || rows < kLanes || size % kChunk) {
      fetch<T, paired>(k + first * stride, stride, rows, size, words, block);
      base = reinterpret_cast<const char*>(block);
      step = words * sizeof(float);
    }
    const int64_t ahead = 4 * kLanes * stride * int64_t(sizeof(T));
    Floats acc[kLanes] = {};
    for (int64_t w = 0; w < words; w += kUnits * unit) {
      Floats query[kUnits];
#pragma GCC unroll 4
      for (int j = 0; j < kUnits; ++j) query[j] = load_lanes(q + (w + j * unit) * heads);
      const char* row = base + w * sizeof(float);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
#pragma GCC unroll 4
        for (int j = 0; j < kUnits; ++j)
          multiply(acc[i], repeated<unit>(row + j * unit * sizeof(float)), query[j],
                   std::bool_constant<paired>());
        __builtin_prefetch(row + ahead);
        row += step;
        asm("" : "+r"(row));  // else GCC keeps a pointer for every row, in vector registers
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < heads; ++i) {
      sum_neighbours<unit>(acc + i * unit);
      const Bits key = lane_numbers() / heads + i * unit;
      const Floats none = Floats{} - std::numeric_limits<float>::infinity();
      store_lanes<float>(scores + first * heads + i * kLanes, key < rows ? acc[i * unit] * scale : none);
    }
  }
}

// Scores become weights; `shrink` is what everything before has to be multiplied by.
template <int heads>
RK_INLINE void soften(float* scores, int vectors, float* top, float* total, float* shrink) {
  constexpr int unit = kLanes / heads;
  alignas(64) float lanes[kLanes];
  Floats highest = load_lanes(scores);
  for (int i = 1; i < vectors; ++i) {
    const Floats x = load_lanes(scores + i * kLanes);
    highest = highest > x ? highest : x;
  }
  store_lanes<float>(lanes, highest);
  float higher[heads];
  for (int h = 0; h < heads; ++h) {
    higher[h] = top[h];
    for (int i = 0; i < unit; ++i)
      higher[h] = higher[h] > lanes[i * heads + h] ? higher[h] : lanes[i * heads + h];
  }
  for (int i = 0; i < kLanes; ++i) lanes[i] = higher[i % heads];
  highest = load_lanes(lanes);
  Floats sum = {};
  for (int i = 0; i < vectors; ++i) {
    const Floats weight = exp_lanes(load_lanes(scores + i * kLanes) - highest);
    store_lanes<float>(scores + i * kLanes, weight);
    sum += weight;
  }
  store_lanes<float>(lanes, sum);
#pragma omp simd
  for (int h = 0; h < heads; ++h) {
    shrink[h] = exp_fast(top[h] - higher[h]);
    top[h] = higher[h];
    total[h] *= shrink[h];
  }
  for (int i = 0; i < unit; ++i)
    for (int h = 0; h < heads; ++h) total[h] += lanes[i * heads + h];
}

// acc = shrink * acc + weights * values, for 2n elements of the heads.
template <class T, int heads>
RK_INLINE void weigh(const T* v, int64_t stride, int count, int64_t cols, const float* weights,
                     const float* shrink, float* acc, int64_t width) {
  Floats sum[heads][2];
#pragma GCC unroll 8
  for (int h = 0; h < heads; ++h) {
    sum[h][0] = load_lanes(acc + h * width) * shrink[h];
    sum[h][1] = load_lanes(acc + h * width + kLanes) * shrink[h];
  }
  T padded[kChunk] = {};
  for (int s = 0; s < count; ++s) {
    const T* from = v + s * stride;
    if (cols < kChunk) {
      __builtin_memcpy(padded, from, cols * sizeof(T));
      from = padded;
    }
    __builtin_prefetch(v + (s + 16) * stride);
    Floats first, second;
    load_chunk(from, first, second);
#pragma GCC unroll 8
    for (int h = 0; h < heads; ++h) {
      sum[h][0] += first * weights[s * heads + h];
      sum[h][1] += second * weights[s * heads + h];
    }
  }
#pragma GCC unroll 8
  for (int h = 0; h < heads; ++h) {
    store_lanes<float>(acc + h * width, sum[h][0]);
    store_lanes<float>(acc + h * width + kLanes, sum[h][1]);
  }
}

// The same for two keys at a time, whose weights are a pair of bfloat16 in one word.
template <int heads>
RK_INLINE void weigh_pairs(const bf16* v, int64_t stride, int count, int64_t cols, const float* weights,
                           const float* shrink, float* acc, int64_t width) {
  Floats sum[heads][2];
#pragma GCC unroll 8
  for (int h = 0; h < heads; ++h) {
    sum[h][0] = load_lanes(acc + h * width) * shrink[h];
    sum[h][1] = load_lanes(acc + h * width + kLanes) * shrink[h];
  }
  const bool whole = cols == kChunk;
  bf16 padded[2][kChunk];
  for (int s = 0; s < count; s += 2) {
    const bf16 *from = v + s * stride, *next = from + stride;
    if (!whole || s + 1 == count) {
      __builtin_memset(padded, 0, sizeof(padded));
      __builtin_memcpy(padded[0], from, cols * sizeof(bf16));
      if (s + 1 < count) __builtin_memcpy(padded[1], next, cols * sizeof(bf16));
      from = padded[0];
      next = padded[1];
    }
    __builtin_prefetch(v + (s + 16) * stride);
    __builtin_prefetch(v + (s + 17) * stride);
    Words32 first, second;
    __builtin_memcpy(&first, from, sizeof(first));
    __builtin_memcpy(&second, next, sizeof(second));
    const Floats evens = __builtin_bit_cast(Floats, (first & 0xffffu) | (second << 16));
    const Floats odds = __builtin_bit_cast(Floats, (first >> 16) | (second & 0xffff0000u));
#pragma GCC unroll 8
    for (int h = 0; h < heads; ++h) {
      const Floats weight = repeated<1>(weights + s / 2 * heads + h);
      multiply(sum[h][0], evens, weight, std::true_type());
      multiply(sum[h][1], odds, weight, std::true_type());
    }
  }
#pragma GCC unroll 8
  for (int h = 0; h < heads; ++h) {
    store_lanes<float>(acc + h * width, sum[h][0]);
    store_lanes<float>(acc + h * width + kLanes, sum[h][1]);
  }
}

// weights[s][heads] rounded, and those of two keys in one word.
template <int heads>
RK_INLINE void pair_weights(float* weights, int count) {
  uint32_t pair[heads];
  for (int s = 0; s < count; s += 2) {
#pragma omp simd
    for (int h = 0; h < heads; ++h) {  // as store<bf16> rounds, but in 32 bits
      const uint32_t low = float_to_bits(weights[s * heads + h]);
      const uint32_t high = float_to_bits(weights[(s + 1) * heads + h]);
      pair[h] = ((low + 0x7fffu + ((low >> 16) & 1u)) >> 16) |
                ((high + 0x7fffu + ((high >> 16) & 1u)) & 0xffff0000u);
    }
    __builtin_memcpy(weights + s / 2 * heads, pair, sizeof(pair));
  }
}

// What a task works in, taken from one piece of memory.
struct Scratch {
  int64_t heads, size, width = (size + kChunk - 1) / kChunk * kChunk;
  float *q, *acc = q + heads * width, *block = acc + heads * width, *top = block + kLanes * width,
            *total = top + heads;

  static int64_t floats(int64_t heads, int64_t size) {
    return (2 * heads + kLanes) * (size + kChunk) + 2 * heads;
  }
};
inline int64_t decode_scratch(int64_t heads, int64_t size) {
  return Scratch::floats(heads, size);
}
inline int64_t decode_state(int64_t size) {
  return Scratch{.heads = 0, .size = size, .q = nullptr}.width + 2;
}

// Heads from h on, in the order in which score() reads them: [words / unit][heads][unit].
template <class T, int heads, bool paired>
RK_OUTLINE void spread_queries(const DecodeSplit<T>& in, const Scratch& own, int64_t h) {
  using Word = typename Words<T, paired>::Word;
  constexpr int unit = kLanes / heads;
  Word* to = reinterpret_cast<Word*>(own.q + h * own.width);
  for (int i = 0; i < heads; ++i) {
    const T* from = in.q + (h + i) * in.q_stride;
    const auto put = [&](int64_t w, Word word) { to[w / unit * kLanes + i * unit + w % unit] = word; };
    if constexpr (paired) {
      for (int64_t w = 0; w < own.width / 2; ++w) {
        const uint32_t low = 2 * w < in.size ? from[2 * w].bits : 0;
        const uint32_t high = 2 * w + 1 < in.size ? from[2 * w + 1].bits : 0;
        put(w, low | high << 16);
      }
    } else {
      for (int64_t d = 0; d < own.width; ++d) put(place<T>(d), d < in.size ? load(from[d]) : 0.0f);
    }
  }
}

// What was gathered for a head, divided by its total, in order.
template <class T>
RK_INLINE void finish(const float* acc, float total, int64_t size, T* out) {
  const float least = total == 0 ? 1.0f : total;  // a row that sees nothing gives 0
  constexpr bool pairs = std::is_same_v<T, bf16>;
  int64_t c = 0;
  for (; c + kChunk <= size; c += kChunk) {
#pragma omp simd
    for (int i = 0; i < kLanes; ++i) {
      out[c + (pairs ? 2 * i : i)] = store<T>(acc[c + i] / least);
      out[c + (pairs ? 2 * i + 1 : kLanes + i)] = store<T>(acc[c + kLanes + i] / least);
    }
  }
  for (; c < size; ++c) out[c] = store<T>(acc[place<T>(c)] / least);
}

// Some heads take up one tile of keys.
template <class T, int heads, bool paired>
RK_OUTLINE void attend(const DecodeSplit<T>& in, const Scratch& own, int64_t h, int64_t first, int count) {
  alignas(64) float weights[kMostKeys * heads];
  alignas(64) float shrink[heads];
  const int64_t words = paired ? own.width / 2 : own.width;
  score<T, heads, paired>(in.k + first * in.k_stride, in.k_stride, count, in.size, own.q + h * own.width,
                          words, in.scale, own.block, weights);
  const int blocks = (count + kLanes - 1) / kLanes;
  soften<heads>(weights, blocks * heads, own.top + h, own.total + h, shrink);
  constexpr bool pairs = paired && heads >= 4;  // below, rounding the weights costs what it saves
  if constexpr (pairs) pair_weights<heads>(weights, count);
  for (int64_t c = 0; c < in.size; c += kChunk) {
    const T* v = in.v + first * in.v_stride + c;
    const int64_t cols = in.size - c < kChunk ? in.size - c : kChunk;
    float* acc = own.acc + h * own.width + c;
    if constexpr (pairs)
      weigh_pairs<heads>(v, in.v_stride, count, cols, weights, shrink, acc, own.width);
    else
      weigh<T, heads>(v, in.v_stride, count, cols, weights, shrink, acc, own.width);
  }
}

// f(heads, h) for blocks of heads that a kernel is compiled for.
template <class F>
RK_INLINE void blocks_of_heads(int64_t heads, const F& f) {
  for (int64_t h = 0; h < heads;) {
    const int64_t left = heads - h;
    const auto take = [&](auto some) __attribute__((always_inline)) {
      f(some, h);
      h += some;
    };
    if (left >= kMostHeads)
      take(std::integral_constant<int, kMostHeads>());
    else if (left >= 4)
      take(std::integral_constant<int, 4>());
    else if (left >= 2)
      take(std::integral_constant<int, 2>());
    else
      take(std::integral_constant<int, 1>());
  }
}

// The heads' part over one split. `out`, [heads, size], takes the result where this is the whole row; where
// it is null, `states` takes maximum, sum and values of each head, decode_state(size) floats.
template <class T, bool paired>
void decode_split(const DecodeSplit<T>& in, float* scratch, float* states, T* out) {
  const int64_t size = in.size;
  const Scratch own{.heads = in.heads, .size = size, .q = scratch};
  blocks_of_heads(in.heads, [&](auto some, int64_t h) { spread_queries<T, some, paired>(in, own, h); });
  for (int64_t i = 0; i < in.heads * own.width; ++i) own.acc[i] = 0;
  for (int64_t h = 0; h < in.heads; ++h) {
    own.top[h] = kLowest;
    own.total[h] = 0;
  }
  for (int64_t first = 0, count; first < in.keys; first += count) {
    count = in.keys - first <= kMostKeys ? in.keys - first : kTile;
    blocks_of_heads(in.heads,
                    [&](auto some, int64_t h) { attend<T, some, paired>(in, own, h, first, int(count)); });
  }
  for (int64_t h = 0; h < in.heads; ++h) {
    const float* acc = own.acc + h * own.width;
    if (out) {
      finish(acc, own.total[h], size, out + h * size);
    } else {
      float* state = states + h * (own.width + 2);
      state[0] = own.top[h];
      state[1] = own.total[h];
      __builtin_memcpy(state + 2, acc, own.width * sizeof(float));
    }
  }
}

// One head's splits, `step` floats apart, become its output; always from the first to the last.
template <class T>
void decode_combine(float* states, int64_t splits, int64_t step, int64_t size, T* out) {
  float top = kLowest;
  for (int64_t i = 0; i < splits; ++i) top = top > states[i * step] ? top : states[i * step];
  float total = 0;
  float* acc = states + 2;
  const int64_t width = decode_state(size) - 2;
  for (int64_t i = 0; i < splits; ++i) {
    const float* state = states + i * step;
    const float weight = exp_fast(state[0] - top);
    total += weight * state[1];
    const float keep = i ? 1.0f : 0.0f;
#pragma omp simd
    for (int64_t d = 0; d < width; ++d) acc[d] = keep * acc[d] + weight * state[2 + d];
  }
  finish(acc, total, size, out);
}
