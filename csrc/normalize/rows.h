// Masked moments of a block, the affine maps of forward and backward. Included by foreach_isa.h.
// Masks are bytes, 0 where masked; nullptr where every element is real.

// Partial sums kept side by side: four vector registers hide the latency of the adder.
constexpr int kSums = 4 * kLanes;

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
    const A d = !kMasked || mask[i] ? load(x[i]) - mean : A(0);
    sums[i - whole] += d;
    squares[i - whole] += d * d;
  }
  const double rest = total(sums) / double(count);
  return {count, double(mean) + rest, total(squares) - rest * rest * double(count)};
}

template <class T>
Moments normalize_moments(const T* x, const uint8_t* mask, int64_t n) {
  const int64_t count = mask ? count_real(mask, n) : n;
  if (count == 0) return {};
  return count == n ? block_moments<T, false>(x, mask, n, count) : block_moments<T, true>(x, mask, n, count);
}

// `mask` is nullptr unless masked slots become 0.
template <class T>
void normalize_block(const T* x, const uint8_t* mask, T* out, int64_t n, const ForwardMap<acc_t<T>>& given) {
  const ForwardMap<acc_t<T>> map = given;
  if (mask) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const acc_t<T> value = map(load(x[i]));
      out[i] = store<T>(mask[i] ? value : acc_t<T>(0));
    }
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i] = store<T>(map(load(x[i])));
  }
}

// Sums over the slots whose outputs depend on the moments: the real ones and, where `all_finite`, masked ones
// that hold a finite value.
template <class T>
GradientSums normalize_gradient_sums(const T* grad, const T* x, const uint8_t* mask, int64_t n,
                                     bool all_finite, const Center<acc_t<T>>& given) {
  using A = acc_t<T>;
  const Center<A> center = given;
  A sums[kSums] = {}, along[kSums] = {};
  const auto add = [&](int64_t i, int l) {
    const A value = load(x[i]), g = load(grad[i]);
    const bool finite = value - value == A(0);
    const bool counts = !mask || mask[i] || (all_finite && finite);
    sums[l] += counts ? g : A(0);
    along[l] += counts ? g * center(value) : A(0);
  };
  const int64_t whole = n - n % kSums;
  for (int64_t i = 0; i < whole; i += kSums)
#pragma omp simd
    for (int l = 0; l < kSums; ++l) add(i + l, l);
  for (int64_t i = whole; i < n; ++i) add(i, int(i - whole));
  return {total(sums), total(along)};
}

// Masked slots get their own gradient alone, or 0 where `zero_masked`.
template <class T>
void normalize_gradient_block(const T* grad, const T* x, const uint8_t* mask, T* out, int64_t n,
                              bool zero_masked, const BackwardMap<acc_t<T>>& given) {
  using A = acc_t<T>;
  const BackwardMap<A> map = given;
  const auto each = [&](int64_t i, bool real) {
    const A g = load(grad[i]);
    const A value = map.real(g, load(x[i]));
    out[i] = store<T>(real ? value : zero_masked ? A(0) : map.masked(g));
  };
  if (mask) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) each(i, mask[i] != 0);
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) each(i, true);
  }
}
