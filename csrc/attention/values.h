// What values give: scores become weights, and these a sum of the values, whose elements are the lanes.
// Included by rows.h after keys.h.

RK_INLINE Floats exp_lanes(const Floats& x) {
  alignas(sizeof(x)) float lanes[kLanes];
  __builtin_memcpy(lanes, &x, sizeof(x));
#pragma omp simd
  for (int i = 0; i < kLanes; ++i) lanes[i] = exp_fast(lanes[i]);
  return load_lanes(lanes);
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

// acc = shrink * acc + weights * values, for 2n elements of the heads.
template <class T, int heads>
RK_INLINE void weigh(const T* v, int64_t stride, int count, int64_t cols, const float* weights,
                     const float* shrink, float* acc, int64_t width) {
  Floats sum[heads][2];
  load_sums<heads>(sum, acc, width, shrink);
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
  store_sums<heads>(sum, acc, width);
}

// The same for two keys at a time, whose weights are a pair of bfloat16 in one word.
template <int heads>
RK_INLINE void weigh_pairs(const bf16* v, int64_t stride, int count, int64_t cols, const float* weights,
                           const float* shrink, float* acc, int64_t width) {
  Floats sum[heads][2];
  load_sums<heads>(sum, acc, width, shrink);
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
  store_sums<heads>(sum, acc, width);
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
