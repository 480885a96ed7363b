// float16 for loops over elements: a block of it as floats, and back, an instruction a vector. Left to itself
// GCC converts it by integer arithmetic there. (bfloat16 gains nothing.) Included after lanes.h.

// Whether rows of T are computed as floats, block by block.
template <class T>
constexpr bool kAsFloats = RK_MULTI_ISA && kLanes >= 8 && std::is_same_v<T, fp16>;

// Elements that are converted at a time: a few such blocks fit the first-level cache.
constexpr int64_t kFloats = 512;

// f(first, count) for the blocks of n elements.
template <class F>
RK_INLINE void each_block_of_floats(int64_t n, const F& f) {
  for (int64_t i = 0; i < n; i += kFloats) f(i, n - i < kFloats ? n - i : kFloats);
}

template <class T>
RK_OUTLINE void widen(const T* from, int64_t n, float* to) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store_lanes<float>(to + i, load_lanes(from + i));
  for (; i < n; ++i) to[i] = load(from[i]);
}

template <class T>
RK_OUTLINE void narrow(const float* from, int64_t n, T* to) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store_lanes<T>(to + i, load_lanes(from + i));
  for (; i < n; ++i) to[i] = store<T>(from[i]);
}

// At most `most` elements as floats; floats are copied.
template <int64_t most = kFloats>
struct Floats {
  template <class T>
  Floats(const T* from, int64_t n) {
    widen(from, n, values);
  }

  alignas(64) float values[most];
};
