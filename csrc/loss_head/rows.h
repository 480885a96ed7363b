// Log-probability of a token and entropy of a row of logits, and the gradient of both. Included by
// foreach_isa.h.

#include "common/exponents.h"
#include "common/lanes.h"

// Exponents of vectors, all lanes at once.
template <class A>
struct Powers : Exponents<A> {
  static RK_INLINE vec_t<A> of(const vec_t<A>& t) {
    return each_lane<A>(t, [](A x) { return Exponents<A>::exp(x); });
  }
};
#if RK_LANES == 8 && RK_MULTI_ISA
// With AVX2 a vector holds the powers of the eighths of an octave, and a permutation looks them up: of a
// polynomial's six multiplications, which two pipes share with most of the rest, three remain. Natural
// exponents, as a temperature of 1 then costs no multiplication. exp(t) for t in [-88, 88]: relative error
// below 1.2e-7 beside that of t itself, 1 at 0; about 0 below -87.3, NaN stays NaN.
template <>
struct Powers<float> {
  static constexpr double per_nat = 1;
  static constexpr float lowest = -88.03f;  // 127 octaves
  static RK_INLINE vec_t<float> of(const vec_t<float>& t) {
    using Vec = vec_t<float>;
    using Bits = mask_t<float>;
    const Vec shift = Vec{} + 0x1.8p20f;  // beside it a float counts eighths
    const Vec shifted = multiply_add<float>(t, Vec{} + 1.44269504f, shift);
    const Vec f = multiply_add<float>(shifted - shift, Vec{} - 0.69314718f, t);
    // 2^(j / 8) less j << 20, which the eighths will add.
    constexpr Bits eighths = {0x3f800000, 0x3f7b95c2, 0x3f7837f0, 0x3f75fed7,
                              0x3f7504f3, 0x3f75672a, 0x3f7744fd, 0x3f7ac0c7};
    const Bits counted = (Bits)shifted;
    const Vec power = (Vec)(__builtin_shuffle(eighths, counted) + (counted << 20));
    // (exp(f) - 1) / f for |f| <= ln2 / 16, so that f times it is right to 2.5e-8
    const Vec slope = multiply_add<float>(Vec{} + 0.16666859f, f, Vec{} + 0.50006462f);
    const Vec rise = multiply_add<float>(slope, f, Vec{} + 1.0f) * f;
    return multiply_add<float>(power, rise, power);
  }
};
#endif

// sum exp(t), sum t exp(t) and the largest t.
struct SoftmaxSums {
  double total = 0, moment = 0, largest = -std::numeric_limits<double>::infinity();
};

// f(i) for vectors at i, from 0 as long as whole lines of the cache lie within n elements; where these end.
// Lines are fetched ahead, as the processor's own prefetching ends with a page.
template <class T, class F>
RK_INLINE int64_t each_vector(const T* x, int64_t n, const F& f) {
  constexpr int line = 64 / sizeof(T), lanes = Lanes<acc_t<T>>::n;
  constexpr int64_t ahead = 4096;  // bytes
  int64_t i = 0;
  for (; i + line <= n; i += line) {
    __builtin_prefetch(reinterpret_cast<const char*>(x + i) + ahead);
#pragma GCC unroll 8
    for (int j = 0; j < line; j += lanes) f(i + j);
  }
  return i;
}

template <bool kScaled, class T, class A = acc_t<T>>
RK_INLINE SoftmaxSums sums_of(const T* x, int64_t n, A start, A factor) {
  constexpr int lanes = Lanes<A>::n;
  using Vec = vec_t<A>;
  const Vec lowest = Vec{} + lowest_exponent<A, Powers<A>>();
  Vec total = {}, moment = {}, largest = Vec{} - std::numeric_limits<A>::infinity();
  const auto add = [&](const Vec& logits) __attribute__((always_inline)) {
    Vec t = logits - start;
    if constexpr (kScaled) t *= factor;
    largest = largest < t ? t : largest;
    t = t < lowest ? lowest : t;
    const Vec p = Powers<A>::of(t);
    total += p;
    moment += t * p;
  };
  int64_t i = each_vector(x, n, [&](int64_t at) __attribute__((always_inline)) { add(load_lanes(x + at)); });
  for (; i < n; i += lanes) {
    A rest[lanes];
    for (int j = 0; j < lanes; ++j)
      rest[j] = i + j < n ? A(load(x[i + j])) : -std::numeric_limits<A>::infinity();
    add(load_lanes(rest));
  }
  SoftmaxSums sums;
  for (int j = 0; j < lanes; ++j) {
    sums.total += total[j];
    sums.moment += moment[j];
    sums.largest = sums.largest < largest[j] ? largest[j] : sums.largest;
  }
  return sums;
}

// The sums over a row in one pass, in double over its blocks. Exponents start at the largest of the first
// logits; a block that goes far beyond is read again with its own.
template <class T, class A = acc_t<T>>
struct RowSums : SoftmaxSums {
  A start = 0, factor;
  bool begun = false;  // false where all logits are -inf or NaN

  RowSums(const T* x, int64_t n, double temperature) : factor(A(Powers<A>::per_nat / temperature)) {
    constexpr int64_t block = 128 * kLanes;  // so many additions in float
    for (int64_t i = 0; i < n; i += block) add(x + i, n - i < block ? n - i : block);
  }

 private:
  void add(const T* x, int64_t n) {
    constexpr double far = 2;  // further, the entropy would be a small difference
    if (!begun) restart(largest_of(x, n));
    SoftmaxSums more = sums(x, n);
    if (begun && more.largest > far) {
      restart(largest_of(x, n));
      more = sums(x, n);
    }
    total += more.total;
    moment += more.moment;
    largest = largest < more.largest ? more.largest : largest;
  }

  SoftmaxSums sums(const T* x, int64_t n) const {
    if constexpr (Powers<A>::per_nat == 1)
      if (factor == A(1)) return sums_of<false>(x, n, start, factor);
    return sums_of<true>(x, n, start, factor);
  }

  void restart(A at) {
    if (at == -std::numeric_limits<A>::infinity()) return;
    const double rise = (double(at) - double(start)) * double(factor);
    if (total > 0) {
      const double shrink = std::exp(-rise / Powers<A>::per_nat);
      moment = shrink > 0 ? shrink * (moment - rise * total) : 0;
      total *= shrink;
    }
    largest -= rise;
    start = at;
    begun = true;
  }
};

template <class T>
void logprob_rows(const LogprobForward<T>& g, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  constexpr double nat = 1 / Powers<A>::per_nat;
  for (int64_t r = begin; r < end; ++r) {
    const T* x = g.logits.row(r);
    const RowSums<T> sums(x, g.vocabulary, g.temperature);
    const double log_total = sums.begun ? std::log(sums.total) : std::numeric_limits<double>::quiet_NaN();
    const double chosen = (double(load(x[g.target[r]])) - double(sums.start)) * double(sums.factor);
    const double logprob = chosen * nat - log_total;
    const double entropy = log_total - sums.moment / sums.total * nat;
    // Certainty may be rounded to beyond 0.
    g.logprob[r] = A(logprob > 0 ? 0.0 : logprob);
    g.entropy[r] = A(entropy < 0 ? 0.0 : entropy);
    const double started = double(sums.start) / g.temperature;
    g.peak[r] = A(started + sums.largest * nat);
    g.log_total[r] = A(log_total + (started - double(g.peak[r])));
  }
}

// d logprob / dz = onehot(target) - p and d entropy / dz = -p (log p + entropy): p times a line in log p.
template <class A>
struct LogitGradient {
  A start, factor, log_total, constant, slope, lowest;

  RK_INLINE vec_t<A> operator()(const vec_t<A>& x) const {
    const vec_t<A> least = vec_t<A>{} + lowest;
    vec_t<A> t = (x - start) * factor - log_total;
    t = t < least ? least : t;
    return Powers<A>::of(t) * (constant + slope * t);
  }
};

template <class T>
void logprob_backward_rows(const LogprobBackward<T>& g, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  constexpr double per_nat = Powers<A>::per_nat;
  const A factor = A(per_nat / g.temperature);
  const double scale = 1 / g.temperature;
  for (int64_t r = begin; r < end; ++r) {
    const T* x = g.logits.row(r);
    T* out = g.grad.row(r);
    const double by_logprob = g.grad_logprob[r], by_entropy = g.grad_entropy[r];
    const double peak = double(g.peak[r]) * g.temperature;
    const A start = A(peak);
    const double rounded = (peak - double(start)) * double(factor);
    const LogitGradient<A> of{start,
                              factor,
                              A(double(g.log_total[r]) * per_nat + rounded),
                              A(-(by_logprob + by_entropy * double(g.entropy[r])) * scale),
                              A(-by_entropy * scale / per_nat),
                              lowest_exponent<A, Powers<A>>()};
    const int64_t target = g.target[r];
    // Before the row is written: `out` may be `x`, and a 16-bit sum would round twice.
    const A chosen = of(vec_t<A>{} + load(x[target]))[0] + A(by_logprob * scale);
    int64_t i = each_vector(x, g.vocabulary, [&](int64_t at) __attribute__((always_inline)) {
      store_lanes<T>(out + at, of(load_lanes(x + at)));
    });
    for (; i < g.vocabulary; ++i) out[i] = store<T>(of(vec_t<A>{} + load(x[i]))[0]);
    out[target] = store<T>(chosen);
  }
}
