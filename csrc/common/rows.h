// The arithmetic that row kernels share by itself, on rows. Included by foreach_isa.h.
#include "common/lanes.h"
#include "common/exp2.h"

inline void exp_row(const float* x, float* out, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = exp_fast(x[i]);
}

inline void exp2_row(const float* x, float* out, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) {
    float lanes[kLanes] = {};
    const int64_t left = n - i < kLanes ? n - i : kLanes;
    __builtin_memcpy(lanes, x + i, left * sizeof(float));
    const vec_t<float> powers = exp2_lanes(load_lanes(lanes));
    __builtin_memcpy(out + i, &powers, left * sizeof(float));
  }
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
