// Weights and values of two keys at a time, whose bfloat16 share a word (AVX512_BF16). Included by values.h.
//
// The keys of a vector of scores, 16 / heads of them, go with those of the next vector.

// The lower half of one's words and the upper half of the other's.
RK_INLINE Words32 halves_of(const Words32& lower, const Words32& upper) {
  const Bits uppers = Bits{} + int32_t(0xffff0000);
  constexpr int select = 0xca;
  return (Words32)__builtin_ia32_pternlogd512_mask(uppers, (Bits)upper, (Bits)lower, select, -1);
}

// weights_of() to 18 bits, enough for what is rounded to eight.
RK_INLINE Floats rough_weights_of(const Floats& octaves) {
  constexpr int to_floor = 9, as_set = 4;
  const Floats f = __builtin_ia32_reduceps512_mask_round(octaves, to_floor, Floats{}, -1, as_set);
  // minimax for 0 <= f < 1, to 2.9e-6, exact at 0
  Floats p = f * 1.34266847e-2f + 5.22424728e-2f;
  p = p * f + 2.41280198e-1f;
  p = p * f + 6.93044841e-1f;
  p = p * f + 1.0f;
  return __builtin_ia32_scalefps512_mask(p, octaves, Floats{}, -1, as_set);
}

// As weights_as_floats() does, the weights rounded to nearest, in half as many vectors of words.
RK_INLINE Floats weights_as_pairs(float* scores, int vectors, const Floats& highest, float octaves) {
  Floats sum = {};
  const auto rounded = [&](int i) __attribute__((always_inline)) {
    const Floats weight = rough_weights_of((load_lanes(scores + i * kLanes) - highest) * octaves);
    sum += weight;
    return __builtin_bit_cast(Words32, weight) + 0x8000u;
  };
  for (int i = 0; i < vectors; i += 2) {
    const Words32 lower = rounded(i) >> 16;
    const Words32 words = halves_of(lower, rounded(i + 1));
    __builtin_memcpy(scores + i / 2 * kLanes, &words, sizeof(words));
  }
  return sum;
}

// Words of two keys' values: those at even places, those at odd ones.
RK_INLINE void beside(const bf16* one, const bf16* other, Words32& evens, Words32& odds) {
  Words32 lower, upper;
  __builtin_memcpy(&lower, one, sizeof(lower));
  __builtin_memcpy(&upper, other, sizeof(upper));
  asm("" : "+v"(lower), "+v"(upper));  // else GCC reads each three times
  evens = halves_of(lower, upper << 16);
  odds = halves_of(lower >> 16, upper);
}

// The values of n keys, zeros for what is missing.
template <int n>
RK_OUTLINE void pad_values(const bf16* v, int64_t stride, int keys, int64_t cols, bf16 (&padded)[n][kChunk]) {
  __builtin_memset(padded, 0, sizeof(padded));
  for (int i = 0; i < n && i < keys; ++i) __builtin_memcpy(padded[i], v + i * stride, cols * sizeof(bf16));
}

// acc = shrink * acc + weights * values, as weigh() does.
template <int heads>
RK_INLINE void weigh_pairs(const bf16* v, int64_t stride, int count, int64_t cols, const float* weights,
                           const float* shrink, float* acc, int64_t width) {
  Floats sum[heads][2];
  load_sums<heads>(sum, acc, width, shrink);
  constexpr int unit = kLanes / heads;
  bf16 padded[2 * unit][kChunk];
  for (int s = 0; s < count; s += 2 * unit, v += 2 * unit * stride) {
    const bf16* from = v;
    int64_t step = stride;
    if (count - s < 2 * unit || cols < kChunk) {
      pad_values(v, stride, count - s, cols, padded);
      from = padded[0];
      step = kChunk;
    }
#pragma GCC unroll 4
    for (int i = 0; i < unit; ++i, from += step, weights += heads) {
      __builtin_prefetch(v + (16 + i) * stride);
      __builtin_prefetch(v + (16 + unit + i) * stride);
      Words32 evens, odds;
      beside(from, from + unit * step, evens, odds);
#pragma GCC unroll 8
      for (int h = 0; h < heads; ++h) {
        const Floats weight = repeated<1>(weights + h);
        multiply_pairs(sum[h][0], __builtin_bit_cast(Floats, evens), weight);
        multiply_pairs(sum[h][1], __builtin_bit_cast(Floats, odds), weight);
      }
    }
  }
  store_sums<heads>(sum, acc, width);
}
