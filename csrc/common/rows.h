// The arithmetic of math.h by itself, on rows. Included by foreach_isa.h.

inline void exp_row(const float* x, float* out, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = exp_fast(x[i]);
}

template <class T>
void load_row(const T* x, float* out, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = load(x[i]);
}

template <class T>
void store_row(const float* x, T* out, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = store<T>(x[i]);
}
