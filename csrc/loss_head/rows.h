// Log-probability of a token and entropy of a row of logits, and the gradient of both. Included by
// foreach_isa.h.

#include "common/exponents.h"
#include "common/lanes.h"

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

template <class A>
RK_INLINE vec_t<A> exp_of(const vec_t<A>& t) {
  return each_lane<A>(t, [](A x) { return Exponents<A>::exp(x); });
}

template <class T, class A = acc_t<T>>
RK_INLINE SoftmaxSums sums_of(const T* x, int64_t n, A start, A factor) {
  constexpr int lanes = Lanes<A>::n;
  using Vec = vec_t<A>;
  const Vec lowest = Vec{} + lowest_exponent<A>();
  Vec total = {}, moment = {}, largest = Vec{} - std::numeric_limits<A>::infinity();
  const auto add = [&](const Vec& logits) __attribute__((always_inline)) {
    Vec t = (logits - start) * factor;
    largest = largest < t ? t : largest;
    t = t < lowest ? lowest : t;
    const Vec p = exp_of<A>(t);
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

  RowSums(const T* x, int64_t n, double temperature) : factor(A(Exponents<A>::per_nat / temperature)) {
    constexpr int64_t block = 128 * kLanes;  // so many additions in float
    for (int64_t i = 0; i < n; i += block) add(x + i, n - i < block ? n - i : block);
  }

 private:
  void add(const T* x, int64_t n) {
    constexpr double far = 2;  // further, the entropy would be a small difference
    if (!begun) restart(largest_of(x, n));
    SoftmaxSums more = sums_of(x, n, start, factor);
    if (begun && more.largest > far) {
      restart(largest_of(x, n));
      more = sums_of(x, n, start, factor);
    }
    total += more.total;
    moment += more.moment;
    largest = largest < more.largest ? more.largest : largest;
  }

  void restart(A at) {
    if (at == -std::numeric_limits<A>::infinity()) return;
    const double rise = (double(at) - double(start)) * double(factor);
    if (total > 0) {
      const double shrink = std::exp(-rise / Exponents<A>::per_nat);
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
  constexpr double nat = 1 / Exponents<A>::per_nat;
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
    return exp_of<A>(t) * (constant + slope * t);
  }
};

template <class T>
void logprob_backward_rows(const LogprobBackward<T>& g, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  constexpr double per_nat = Exponents<A>::per_nat;
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
                              lowest_exponent<A>()};
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
