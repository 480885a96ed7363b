// Keys and values of bfloat16 by tiles (AMX): registers of 16 rows of 64 bytes, and an instruction that adds
// the products of one's rows of pairs and another's columns of pairs to a third. Included by values.h.
//
// Keys are loaded as they lie, 16 rows of 32 elements, against queries that lie in columns of pairs. Values
// become columns of pairs on their way through a block in the first-level cache; their weights are turned, so
// that a head has a row.

constexpr int kStep = 2 * kLanes;  // keys that one instruction sums over
constexpr int64_t kRow = 64;       // bytes of a row

// Registers 0 and 1: scores, queries; 2: keys or values; 3 to 6 and 7: sums of values, weights. One of each
// is enough, since the processor renames them.
template <int heads>
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {4 * heads, 4 * heads, kRow, kRow, kRow, kRow, kRow, kRow};
  uint8_t rows[16] = {16, 16, 16, heads, heads, heads, heads, heads};
};
template <int heads>
RK_INLINE void shape_tiles() {
  static constexpr TileShapes<heads> shapes;
  asm volatile("ldtilecfg %0" : : "m"(shapes));
}
// What is left in the tiles would be saved at every switch of threads.
inline void release_tiles() {
  asm volatile("tilerelease");
}

template <int tile>
RK_INLINE void zero_tile() {
  asm volatile("tilezero %%tmm%c0" : : "i"(tile));
}
template <int tile>
RK_INLINE void load_tile(const void* from, int64_t stride) {
  asm volatile("tileloadd (%1,%2,1), %%tmm%c0" : : "i"(tile), "r"(from), "r"(stride) : "memory");
}
template <int tile>
RK_INLINE void store_tile(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c0, (%1,%2,1)" : : "i"(tile), "r"(to), "r"(stride) : "memory");
}
template <int sums, int rows, int columns>
RK_INLINE void multiply_tiles() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(sums), "i"(rows), "i"(columns));
}

// scores[s][heads], not scaled, in steps of 32 keys; keys that the last one lacks get -inf.
template <int heads>
RK_INLINE void score_tiles(const bf16* k, int64_t stride, int count, int64_t size, const float* q,
                           int64_t words, float* block, float* scores) {
  constexpr int64_t query = heads * sizeof(float);
  for (int first = 0; first < count; first += kStep) {
    const int rows = count - first < kStep ? count - first : kStep;
    const char* row = reinterpret_cast<const char*>(k + first * stride);
    int64_t step = stride * sizeof(bf16);
    if (rows < kStep || size % kChunk) {
      fetch<bf16, Words<bf16, heads, Products::kTiles>, kStep>(k + first * stride, stride, rows, size, words,
                                                               block);
      row = reinterpret_cast<const char*>(block);
      step = words * sizeof(float);
    }
    float* to = scores + first * heads;
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half, row += 16 * step, to += 16 * heads) {
      zero_tile<0>();
      for (int64_t w = 0; w < words; w += kLanes) {
        load_tile<1>(q + w * heads, query);
        load_tile<2>(row + w * sizeof(float), step);
        multiply_tiles<0, 2, 1>();
      }
      store_tile<0>(to, query);
    }
    for (int i = rows * heads; i < kStep * heads; ++i)
      scores[first * heads + i] = -std::numeric_limits<float>::infinity();
  }
}

// Every second word of two vectors, one after the other.
template <int odd>
struct EverySecond {
  static constexpr int of(int lane) { return 2 * lane + odd; }
};

// v, words of [16 pairs][heads], becomes [heads][16 pairs], the bits of a head's number the other way round.
template <int heads>
RK_INLINE void part(Floats* v) {
  if constexpr (heads > 1) {
    Floats odd[heads / 2];
#pragma GCC unroll 8
    for (int i = 0; i < heads / 2; ++i) {
      odd[i] = permuted<float, EverySecond<1>>(v[2 * i], v[2 * i + 1]);
      v[i] = permuted<float, EverySecond<0>>(v[2 * i], v[2 * i + 1]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < heads / 2; ++i) v[heads / 2 + i] = odd[i];
    part<heads / 2>(v);
    part<heads / 2>(v + heads / 2);
  }
}
constexpr int mirrored(int i, int n) {
  return n == 1 ? 0 : i % 2 * (n / 2) + mirrored(i / 2, n / 2);
}

// Weights of pairs of keys, turned in place: [heads][16 pairs] for every step.
template <int heads>
RK_INLINE void turn_weights(float* weights, int steps) {
  for (int s = 0; s < steps; ++s, weights += kLanes * heads) {
    Floats v[heads];
#pragma GCC unroll 16
    for (int i = 0; i < heads; ++i) v[i] = load_lanes(weights + i * kLanes);
    part<heads>(v);
#pragma GCC unroll 16
    for (int i = 0; i < heads; ++i) store_lanes<float>(weights + mirrored(i, heads) * kLanes, v[i]);
  }
}

// Values of a step become columns of pairs: of elements at even places, then of those at odd ones.
template <int heads>
RK_INLINE void interleave(const bf16* v, int64_t stride, int keys, int64_t cols, Words32* to) {
  constexpr int unit = kLanes / heads;
  bf16 padded[kStep][kChunk];
  if (keys < kStep || cols < kChunk) {
    pad_values(v, stride, keys, cols, padded);
    v = padded[0];
    stride = kChunk;
  }
  for (int p = 0; p < kStep / 2; p += unit, v += 2 * unit * stride, to += unit) {
#pragma GCC unroll 4
    for (int i = 0; i < unit; ++i) beside(v + i * stride, v + (unit + i) * stride, to[i], to[kStep / 2 + i]);
  }
}

// acc = shrink * acc + weights * values, for up to 64 elements of the heads, with weights as turn_weights()
// leaves them.
template <int heads>
RK_INLINE void weigh_tiles(const bf16* v, int64_t stride, int count, int64_t cols, const float* weights,
                           const float* shrink, float* acc, int64_t width) {
  Words32 columns[2][4][kStep / 2];  // of this step and the next
  const int64_t more = cols - kChunk;
  const auto interleave_step = [&](int s) __attribute__((always_inline)) {
    auto& to = columns[s / kStep % 2];
    interleave<heads>(v + s * stride, stride, count - s, more < 0 ? cols : kChunk, to[0]);
    if (more > 0) interleave<heads>(v + s * stride + kChunk, stride, count - s, more, to[2]);
  };
  for (int h = 0; h < heads; ++h)
    for (int i = 0; i < (more > 0 ? 4 : 2) * kLanes; ++i) acc[h * width + i] *= shrink[h];
  interleave_step(0);
  const int64_t row = width * sizeof(float);
  load_tile<3>(acc, row);
  load_tile<4>(acc + kLanes, row);
  if (more > 0) {
    load_tile<5>(acc + 2 * kLanes, row);
    load_tile<6>(acc + 3 * kLanes, row);
  }
  for (int s = 0; s < count; s += kStep, weights += kLanes * heads) {
    if (s + kStep < count) interleave_step(s + kStep);
    const auto& from = columns[s / kStep % 2];
    load_tile<7>(weights, kRow);
    load_tile<2>(from[0], kRow);
    multiply_tiles<3, 7, 2>();
    load_tile<2>(from[1], kRow);
    multiply_tiles<4, 7, 2>();
    if (more > 0) {
      load_tile<2>(from[2], kRow);
      multiply_tiles<5, 7, 2>();
      load_tile<2>(from[3], kRow);
      multiply_tiles<6, 7, 2>();
    }
  }
  store_tile<3>(acc, row);
  store_tile<4>(acc + kLanes, row);
  if (more > 0) {
    store_tile<5>(acc + 2 * kLanes, row);
    store_tile<6>(acc + 3 * kLanes, row);
  }
}
