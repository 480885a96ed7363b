// Rotates the pairs (a, b) of `rows` rows by their angles: (a cos - b sin, b cos + a sin). With sign -1 they
// turn back, which is the gradient. Included by foreach_isa.h.
//
// Tables and output are contiguous, rows of x are x_stride apart. Halves: a row is all a, then all b.
#include "common/lanes.h"

#include "common/halves.h"

template <class T>
RK_INLINE void turn_halves(const T* x, const float* cos, const float* sin, T* out, int64_t half, float sign) {
  using A = acc_t<T>;
#pragma omp simd
  for (int64_t i = 0; i < half; ++i) {
    const A c = cos[i], s = sign * sin[i];
    const A a = load(x[i]), b = load(x[half + i]);
    out[i] = store<T>(a * c - b * s);
    out[half + i] = store<T>(b * c + a * s);
  }
}

// Interleaved: a and b are neighbours.
template <class T>
RK_INLINE void turn_neighbours(const T* x, const float* cos, const float* sin, T* out, int64_t half,
                               float sign) {
  using A = acc_t<T>;
#pragma omp simd
  for (int64_t i = 0; i < half; ++i) {
    const A c = cos[i], s = sign * sin[i];
    const A a = load(x[2 * i]), b = load(x[2 * i + 1]);
    out[2 * i] = store<T>(a * c - b * s);
    out[2 * i + 1] = store<T>(b * c + a * s);
  }
}

template <bool interleaved, class T>
RK_INLINE void turn(const T* x, const float* cos, const float* sin, T* out, int64_t half, float sign) {
  if constexpr (kAsFloats<T>) {
    if (2 * half <= kFloats) {
      Floats<> row(x, 2 * half);
      turn<interleaved>(row.values, cos, sin, row.values, half, sign);
      return narrow(row.values, 2 * half, out);
    }
  }
  interleaved ? turn_neighbours(x, cos, sin, out, half, sign) : turn_halves(x, cos, sin, out, half, sign);
}

template <class T, bool interleaved>
void rotate_rows(const T* x, int64_t x_stride, const float* cos, const float* sin, T* out, int64_t rows,
                 int64_t half, float sign) {
  for (int64_t r = 0; r < rows; ++r) {
    turn<interleaved>(x, cos, sin, out, half, sign);
    x += x_stride;
    out += 2 * half;
    cos += half;
    sin += half;
  }
}
