// What values give: scores become weights, and these a sum of the values, whose elements are the lanes.
// Included by rows.h after keys.h.

// 2^x for what is at most 0: 0 from -126.5 down, NaN stays NaN.
inline float weight_of(float octaves) {
  return exp2_within(octaves < -127.0f ? -127.0f : octaves);
}
RK_INLINE Floats weights_of(const Floats& octaves) {
  return each_lane<float>(octaves, [](float x) { return weight_of(x); });
}

// Scores become weights in place; their sum by lanes. A score's distance from the highest times `octaves` is
// a power of two.
RK_INLINE Floats weights_as_floats(float* scores, int vectors, const Floats& highest, float octaves) {
  Floats sum = {};
  for (int i = 0; i < vectors; ++i) {
    const Floats weight = weights_of((load_lanes(scores + i * kLanes) - highest) * octaves);
    store_lanes<float>(scores + i * kLanes, weight);
    sum += weight;
  }
  return sum;
}

// Scores become weights, as weights_as_floats() makes them; `shrink` is what everything before has to be
// multiplied by.
template <int heads, class Weights>
RK_INLINE void soften(float* scores, int vectors, float octaves, float* top, float* total, float* shrink,
                      const Weights& as_weights) {
  constexpr int unit = kLanes / heads;
  alignas(64) float lanes[kLanes];
  constexpr int kChains = 4;  // as many comparisons wait for one another no longer
  Floats found[kChains];
  for (Floats& highest : found) highest = load_lanes(scores);
  for (int i = 1; i < vectors; i += kChains) {
#pragma GCC unroll 4
    for (int j = 0; j < kChains; ++j) {
      const Floats x = load_lanes(scores + (i + j < vectors ? i + j : 0) * kLanes);
      found[j] = found[j] > x ? found[j] : x;
    }
  }
  for (int j = 1; j < kChains; ++j) found[0] = found[0] > found[j] ? found[0] : found[j];
  store_lanes<float>(lanes, found[0]);
  float higher[heads];
  for (int h = 0; h < heads; ++h) {
    higher[h] = top[h];
    for (int i = 0; i < unit; ++i)
      higher[h] = higher[h] > lanes[i * heads + h] ? higher[h] : lanes[i * heads + h];
  }
  for (int i = 0; i < kLanes; ++i) lanes[i] = higher[i % heads];
  const Floats highest = load_lanes(lanes);
  const Floats sum = as_weights(scores, vectors, highest, octaves);
  store_lanes<float>(lanes, sum);
#pragma omp simd
  for (int h = 0; h < heads; ++h) {
    shrink[h] = weight_of((top[h] - higher[h]) * octaves);
    top[h] = higher[h];
    total[h] *= shrink[h];
  }
  for (int i = 0; i < unit; ++i)
    for (int h = 0; h < heads; ++h) total[h] += lanes[i * heads + h];
}

template <int heads>
RK_INLINE void load_sums(Floats (&sum)[heads][2], const float* acc, int64_t width, const float* shrink) {
#pragma GCC unroll 8
  for (int h = 0; h < heads; ++h) {
    sum[h][0] = load_lanes(acc + h * width) * shrink[h];
    sum[h][1] = load_lanes(acc + h * width + kLanes) * shrink[h];
  }
}
template <int heads>
RK_INLINE void store_sums(const Floats (&sum)[heads][2], float* acc, int64_t width) {
#pragma GCC unroll 8
  for (int h = 0; h < heads; ++h) {
    store_lanes<float>(acc + h * width, sum[h][0]);
    store_lanes<float>(acc + h * width + kLanes, sum[h][1]);
  }
}

// acc = shrink * acc + weights * values, for 2n elements of the heads, whose weights for one key are `pitch`
// from those for the next.
template <class T, int heads>
RK_INLINE void weigh(const T* v, int64_t stride, int count, int64_t cols, const float* weights, int64_t pitch,
                     const float* shrink, float* acc, int64_t width) {
  Floats sum[heads][2];
  load_sums<heads>(sum, acc, width, shrink);
  const auto add = [&](const T* from) __attribute__((always_inline)) {
    Floats first, second;
    load_chunk(from, first, second);
#pragma GCC unroll 8
    for (int h = 0; h < heads; ++h) {
      sum[h][0] += first * weights[h];
      sum[h][1] += second * weights[h];
    }
    weights += pitch;
  };
  if (cols < kChunk) {
    T padded[kChunk] = {};
    for (int s = 0; s < count; ++s, v += stride) {
      __builtin_memcpy(padded, v, cols * sizeof(T));
      add(padded);
    }
  } else {
    const int64_t ahead = 16 * stride;
    for (int s = 0; s < count; ++s, v += stride) {
      __builtin_prefetch(v + ahead);
      add(v);
    }
  }
  store_sums<heads>(sum, acc, width);
}

#if RK_LANES == 16 && RK_MULTI_ISA
  #include "attention/pairs.h"
  #if RK_TILES
    #include "attention/tiles.h"
  #endif
#endif
