// Masked moments of a block, the affine maps of forward and backward. Included by foreach_isa.h.
// Masks are bytes, 0 where masked; nullptr where every element is real.
#include "common/lanes.h"

#include "common/halves.h"

// Partial sums kept side by side: four vector registers hide the latency of the adder.
constexpr int kSums = 4 * kLanes;

// x where true, else 0: also for NaN and inf. Bits instead of a choice, which GCC would turn into a branch
// around the loads.
inline float only(bool condition, float x) {
  return __builtin_bit_cast(float, __builtin_bit_cast(uint32_t, x) & (0u - uint32_t(condition)));
}
inline double only(bool condition, double x) {
  return __builtin_bit_cast(double, __builtin_bit_cast(uint64_t, x) & (uint64_t(0) - uint64_t(condition)));
}

template <class A>
inline double total(const A* sums) {
  double part[8] = {};
  for (int l = 0; l < kSums; l += 8)
#pragma omp simd
    for (int p = 0; p < 8; ++p) part[p] += double(sums[l + p]);
  return ((part[0] + part[1]) + (part[2] + part[3])) + ((part[4] + part[5]) + (part[6] + part[7]));
}

inline int64_t count_real(const uint8_t* mask, int64_t n) {
  int32_t count = 0;
#pragma omp simd reduction(+ : count)
  for (int64_t i = 0; i < n; ++i) count += mask[i] != 0;
  return count;
}

// Two passes over a block that the first brings into the cache: the mean, then the squares about it, with
// what the rounded mean left over taken back out.
template <class T, bool kMasked>
Moments block_moments(const T* x, const uint8_t* mask, int64_t n, int64_t count) {
  using A = acc_t<T>;
  A sums[kSums] = {}, squares[kSums] = {};
  const int64_t whole = n - n % kSums;
  for (int64_t i = 0; i < whole; i += kSums)
#pragma omp simd
    for (int l = 0; l < kSums; ++l) {
      const A value = load(x[i + l]);  // read always: a conditional read would not vectorise
      sums[l] += !kMasked || mask[i + l] ? value : A(0);
    }
  for (int64_t i = whole; i < n; ++i) sums[i - whole] += !kMasked || mask[i] ? load(x[i]) : A(0);

  const A mean = A(total(sums) / double(count));
  for (int l = 0; l < kSums; ++l) sums[l] = A(0);
  for (int64_t i = 0; i < whole; i += kSums)
#pragma omp simd
    for (int l = 0; l < kSums; ++l) {
      const A value = load(x[i + l]) - mean;
      const A d = !kMasked || mask[i + l] ? value : A(0);
      sums[l] += d;
      squares[l] += d * d;
    }
  for (int64_t i = whole; i < n; ++i) {
    const A d = only(!kMasked || mask[i], load(x[i]) - mean);
    sums[i - whole] += d;
    squares[i - whole] += d * d;
  }
  const double rest = total(sums) / double(count);
  return {count, double(mean) + rest, total(squares) - rest * rest * double(count)};
}

template <class T>
Moments normalize_moments(const T* x, const uint8_t* mask, int64_t n) {
  if constexpr (kAsFloats<T>) {
    const Floats<kBlock> values(x, n);
    return normalize_moments(values.values, mask, n);
  }
  const int64_t count = mask ? count_real(mask, n) : n;
  if (count == 0) return {};
  return count == n ? block_moments<T, false>(x, mask, n, count) : block_moments<T, true>(x, mask, n, count);
}

// `mask` is nullptr unless masked slots become 0. x may be kept in more digits than the result, and `out` be
// x.
template <class T, class X = T>
void normalize_block(const X* x, const uint8_t* mask, T* out, int64_t n, const ForwardMap<acc_t<T>>& given) {
  if constexpr (kAsFloats<T>) {
    return each_block_of_floats(n, [&](int64_t i, int64_t count) {
      Floats<> values(x + i, count);
      normalize_block(values.values, mask ? mask + i : nullptr, values.values, count, given);
      narrow(values.values, count, out + i);
    });
  }
  const ForwardMap<acc_t<T>> map = given;
  if (mask) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i] = store<T>(only(mask[i], map(load(x[i]))));
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i] = store<T>(map(load(x[i])));
  }
}

// Whether a slot's output depends on the moments: a real one, or a masked one that is kept and finite.
template <bool kMasked, class A>
inline bool depends(uint8_t real, bool kept, A x) {
  return !kMasked | (real != 0) | (kept & (x - x == A(0)));
}

template <class T, class X, bool kMasked>
GradientSums gradient_sums(const T* grad, const X* x, const uint8_t* mask, int64_t n, bool kept,
                           const Center<acc_t<T>>& given) {
  if constexpr (kAsFloats<T> || kAsFloats<X>) {
    const Floats<kBlock> grads(grad, n), values(x, n);
    return gradient_sums<float, float, kMasked>(grads.values, values.values, mask, n, kept, given);
  }
  using A = acc_t<T>;
  const Center<A> center = given;
  A sums[kSums] = {}, along[kSums] = {};
  const int64_t whole = n - n % kSums;
  for (int64_t i = 0; i < whole; i += kSums)
#pragma omp simd
    for (int l = 0; l < kSums; ++l) {
      const A value = load(x[i + l]), g = load(grad[i + l]);
      const bool counts = depends<kMasked>(kMasked ? mask[i + l] : 1, kept, value);
      sums[l] += only(counts, g);
      along[l] += only(counts, g * center(value));
    }
  for (int64_t i = whole; i < n; ++i) {
    const A value = load(x[i]), g = load(grad[i]);
    const bool counts = depends<kMasked>(kMasked ? mask[i] : 1, kept, value);
    sums[i - whole] += only(counts, g);
    along[i - whole] += only(counts, g * center(value));
  }
  return {total(sums), total(along)};
}

template <class T, class X = T>
GradientSums normalize_gradient_sums(const T* grad, const X* x, const uint8_t* mask, int64_t n, bool kept,
                                     const Center<acc_t<T>>& center) {
  return mask ? gradient_sums<T, X, true>(grad, x, mask, n, kept, center)
              : gradient_sums<T, X, false>(grad, x, mask, n, kept, center);
}

// Masked slots get their own gradient alone, or 0 where they are not kept.
template <class T>
void normalize_gradient_block(const T* grad, const T* x, const uint8_t* mask, T* out, int64_t n, bool kept,
                              const BackwardMap<acc_t<T>>& given) {
  if constexpr (kAsFloats<T>) {
    return each_block_of_floats(n, [&](int64_t i, int64_t count) {
      const Floats<> values(x + i, count);
      Floats<> grads(grad + i, count);
      normalize_gradient_block(grads.values, values.values, mask ? mask + i : nullptr, grads.values, count,
                               kept, given);
      narrow(grads.values, count, out + i);
    });
  }
  using A = acc_t<T>;
  const BackwardMap<A> map = given;
  if (mask) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const A g = load(grad[i]);
      const bool real = mask[i] != 0;
      // One of the two is 0.
      out[i] = store<T>(only(real, map.real(g, load(x[i]))) + only(kept & !real, map.masked(g)));
    }
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i] = store<T>(map.real(load(grad[i]), load(x[i])));
  }
}
