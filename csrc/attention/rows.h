// One decoding step: few queries against many keys, softmax(scale q k^T) v. Included by foreach_isa.h.
//
// The query heads that share a key head are taken together, kTile keys at a time, so that keys and values
// come from memory once. The softmax is kept as a running maximum, the sum of the weights and the weighted
// values.
#include "attention/keys.h"
#include "attention/values.h"

constexpr int kTile = 128;
constexpr int kMostKeys = kTile + kTile / 2;                   // the last tile takes a rest with it
constexpr float kLowest = -std::numeric_limits<float>::max();  // finite: a score of -inf can be compared

// Heads that are taken together, and those of them whose values fit the registers.
constexpr int most_heads(Products products) {
  return products == Products::kTiles ? 16 : kLanes >= 8 ? 8 : 4;
}
constexpr int kMostValues = kLanes == 16 ? 8 : 4;

// Weights are powers of two: the factor that makes an exponent of a score.
inline float octaves_of(float scale) {
  return float(scale * 1.4426950408889634);
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

// Below four heads a tile does not pay.
constexpr bool in_tiles(Products products, int heads) {
  return RK_TILES && products == Products::kTiles && heads >= 4;
}

// Heads from h on, in the order in which score() reads them: [words / unit][heads][unit].
template <class T, int heads, Products products>
RK_OUTLINE void spread_queries(const DecodeSplit<T>& in, const Scratch& own, int64_t h) {
  using Key = Words<T, heads, products>;
  using Word = typename Key::Word;
  constexpr int unit = in_tiles(products, heads) ? 1 : kLanes / heads;
  Word* to = reinterpret_cast<Word*>(own.q + h * own.width);
  for (int i = 0; i < heads; ++i) {
    const T* from = in.q + (h + i) * in.q_stride;
    const auto put = [&](int64_t w, Word word) { to[w / unit * unit * heads + i * unit + w % unit] = word; };
    if constexpr (Key::pairs) {
      const int64_t whole = in.size / 2;
      for (int64_t w = 0; w < whole; ++w) {
        Word word;
        __builtin_memcpy(&word, from + 2 * w, sizeof(word));
        put(w, word);
      }
      for (int64_t w = whole; w < own.width / 2; ++w) put(w, 2 * w < in.size ? from[2 * w].bits : 0);
    } else {
      for (int64_t d = 0; d < own.width; ++d) put(Key::place_of(d), d < in.size ? load(from[d]) : 0.0f);
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

// Some heads take up one tile of keys. A score times `octaves` is a power of two.
template <class T, int heads, Products products>
RK_OUTLINE void attend(const DecodeSplit<T>& in, const Scratch& own, int64_t h, int64_t first, int count,
                       float octaves, int& shaped) {
  alignas(64) float weights[kMostKeys * heads];
  alignas(64) float shrink[heads];
  using Key = Words<T, heads, products>;
  const int64_t words = own.width / Key::elements;
  const T* k = in.k + first * in.k_stride;
  const float* q = own.q + h * own.width;
  const auto scores_become = [&](int blocks, const auto& as_weights) __attribute__((always_inline)) {
    soften<heads>(weights, blocks * heads, octaves, own.top + h, own.total + h, shrink, as_weights);
  };
  const auto each_chunk = [&](int64_t most, auto weighs) __attribute__((always_inline)) {
    for (int64_t c = 0; c < in.size; c += most)
      weighs(in.v + first * in.v_stride + c, in.size - c < most ? in.size - c : most,
             own.acc + h * own.width + c);
  };
#if RK_LANES == 16 && RK_TILES
  if constexpr (in_tiles(products, heads)) {
    const int steps = (count + kStep - 1) / kStep;
    if (shaped != heads) shape_tiles<heads>();
    shaped = heads;
    score_tiles<heads>(k, in.k_stride, count, in.size, q, words, own.block, weights);
    scores_become(steps * kStep / kLanes, weights_as_pairs);
    turn_weights<heads>(weights, steps);
    return each_chunk(2 * kChunk, [&](const T* v, int64_t cols, float* acc) {
      weigh_tiles<heads>(v, in.v_stride, count, cols, weights, shrink, acc, own.width);
    });
  }
#endif
  score<T, heads, products>(k, in.k_stride, count, in.size, q, words, own.block, weights,
                            in.v + first * in.v_stride, in.v_stride);
  const int blocks = (count + kLanes - 1) / kLanes;
#if RK_LANES == 16 && RK_MULTI_ISA
  // With fewer heads rounding the weights costs what it saves.
  if constexpr (Key::pairs && heads >= 4) {
    scores_become(blocks, weights_as_pairs);
    return each_chunk(kChunk, [&](const T* v, int64_t cols, float* acc) {
      weigh_pairs<heads>(v, in.v_stride, count, cols, weights, shrink, acc, own.width);
    });
  }
#endif
  scores_become(blocks, weights_as_floats);
  constexpr int some = heads < kMostValues ? heads : kMostValues;
  for (int i = 0; i < heads; i += some)
    each_chunk(kChunk, [&](const T* v, int64_t cols, float* acc) {
      weigh<T, some>(v, in.v_stride, count, cols, weights + i, heads, shrink + i, acc + i * own.width,
                     own.width);
    });
}

// f(heads, h) for blocks of heads that a kernel is compiled for.
template <int most, class F>
RK_INLINE void blocks_of_heads(int64_t heads, const F& f) {
  constexpr int eight = most < 8 ? most : 8;
  for (int64_t h = 0; h < heads;) {
    const int64_t left = heads - h;
    const auto take = [&](auto some) __attribute__((always_inline)) {
      f(some, h);
      h += some;
    };
    if (left >= most)
      take(std::integral_constant<int, most>());
    else if (left >= eight)
      take(std::integral_constant<int, eight>());
    else if (left >= 4)
      take(std::integral_constant<int, 4>());
    else if (left >= 2)
      take(std::integral_constant<int, 2>());
    else
      take(std::integral_constant<int, 1>());
  }
}

template <class T, Products products>
RK_INLINE void split_by(const DecodeSplit<T>& in, float* scratch, float* states, T* out) {
  constexpr int most = most_heads(products);
  const int64_t size = in.size;
  const Scratch own{.heads = in.heads, .size = size, .q = scratch};
  blocks_of_heads<most>(in.heads,
                        [&](auto some, int64_t h) { spread_queries<T, some, products>(in, own, h); });
  for (int64_t i = 0; i < in.heads * own.width; ++i) own.acc[i] = 0;
  for (int64_t h = 0; h < in.heads; ++h) {
    own.top[h] = kLowest;
    own.total[h] = 0;
  }
  const float octaves = octaves_of(in.scale);
  int shaped = 0;  // the heads that the tiles have the shapes for
  for (int64_t first = 0, count; first < in.keys; first += count) {
    count = in.keys - first <= kMostKeys ? in.keys - first : kTile;
    blocks_of_heads<most>(in.heads, [&](auto some, int64_t h) {
      attend<T, some, products>(in, own, h, first, int(count), octaves, shaped);
    });
  }
#if RK_LANES == 16 && RK_TILES
  if (products == Products::kTiles) release_tiles();
#endif
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

// The heads' part over one split. `out`, [heads, size], takes the result where this is the whole row; where
// it is null, `states` takes maximum, sum and values of each head, decode_state(size) floats.
template <class T, Products products>
void decode_split(const DecodeSplit<T>& in, float* scratch, float* states, T* out) {
  if constexpr (products != Products::kFloats && !(kLanes == 16 && RK_MULTI_ISA)) {
    return decode_split<T, Products::kFloats>(in, scratch, states, out);  // never asked for here
  } else {
    split_by<T, products>(in, scratch, states, out);
  }
}

// One head's splits, `step` floats apart, become its output; always from the first to the last.
template <class T>
void decode_combine(float* states, int64_t splits, int64_t step, int64_t size, float scale, T* out) {
  float top = kLowest;
  for (int64_t i = 0; i < splits; ++i) top = top > states[i * step] ? top : states[i * step];
  float total = 0;
  float* acc = states + 2;
  const int64_t width = decode_state(size) - 2;
  for (int64_t i = 0; i < splits; ++i) {
    const float* state = states + i * step;
    const float weight = weight_of((state[0] - top) * octaves_of(scale));
    total += weight * state[1];
    const float keep = i ? 1.0f : 0.0f;
#pragma omp simd
    for (int64_t d = 0; d < width; ++d) acc[d] = keep * acc[d] + weight * state[2 + d];
  }
  finish(acc, total, size, out);
}
