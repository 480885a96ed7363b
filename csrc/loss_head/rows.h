// Log-probability of a token and entropy of a row of logits, and the gradient of both. Included by
// foreach_isa.h.

// The largest of so many logits is looked for before their exponentials are summed; for the second reading
// they are still in the first-level cache, so that memory sees one pass.
constexpr int64_t kLogitBlock = 1024;

// exp is 0 here, and x exp(x) is 0 too, which -inf * 0 would not be. NaN stays NaN.
template <class A>
inline A log_probability(A x) {
  constexpr A vanished = sizeof(A) == sizeof(float) ? A(-87) : A(-800);
  return x < vanished ? vanished : x;
}

// -inf where nothing is larger: also for NaN, which the sums will show.
template <class T>
RK_INLINE acc_t<T> largest_of(const T* x, int64_t n) {
  using A = acc_t<T>;
  A largest = -std::numeric_limits<A>::infinity();
#pragma omp simd reduction(max : largest)
  for (int64_t i = 0; i < n; ++i) {
    const A value = load(x[i]);
    largest = largest < value ? value : largest;
  }
  return largest;
}

// sum exp(z - peak) and sum (z - peak) exp(z - peak), in double over the blocks of a row.
struct SoftmaxSums {
  double total = 0, moment = 0;

  // The same sums for a peak that lies `rise` higher.
  void raise(double rise) {
    if (!(total > 0)) return;
    const double factor = std::exp(-rise);
    moment = factor > 0 ? factor * (moment - rise * total) : 0;
    total *= factor;
  }
};

template <class T>
RK_INLINE void add_block(const T* x, int64_t n, acc_t<T> scale, acc_t<T> peak, SoftmaxSums& sums) {
  using A = acc_t<T>;
  A total = 0, moment = 0;
#pragma omp simd reduction(+ : total, moment)
  for (int64_t i = 0; i < n; ++i) {
    const A z = log_probability(load(x[i]) * scale - peak);
    const A p = exp_within(z);
    total += p;
    moment += z * p;
  }
  sums.total += double(total);
  sums.moment += double(moment);
}

template <class T>
void logprob_rows(const LogprobForward<T>& g, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  constexpr A none = -std::numeric_limits<A>::infinity();
  const A scale = A(1 / g.temperature);
  for (int64_t r = begin; r < end; ++r) {
    const T* x = g.logits.row(r);
    A largest = none, peak = 0;
    SoftmaxSums sums;
    for (int64_t i = 0; i < g.vocabulary; i += kLogitBlock) {
      const int64_t n = g.vocabulary - i < kLogitBlock ? g.vocabulary - i : kLogitBlock;
      const A here = largest_of(x + i, n);
      if (here > largest) {
        const A raised = here * scale;
        sums.raise(double(raised) - double(peak));
        largest = here;
        peak = raised;
      }
      add_block(x + i, n, scale, peak, sums);
    }
    // Where all logits are -inf nothing is defined.
    const double log_total = largest > none ? std::log(sums.total) : std::numeric_limits<double>::quiet_NaN();
    const double logprob = double(load(x[g.target[r]]) * scale - peak) - log_total;
    const double entropy = log_total - sums.moment / sums.total;
    // The peak is rounded, so that certainty may come out beyond 0.
    g.logprob[r] = A(logprob > 0 ? 0.0 : logprob);
    g.entropy[r] = A(entropy < 0 ? 0.0 : entropy);
    g.peak[r] = peak;
    g.log_total[r] = A(log_total);
  }
}

// d logprob / dz = onehot(target) - p and d entropy / dz = -p (log p + entropy): p times a line in log p.
template <class A>
struct LogitGradient {
  A scale, peak, log_total, constant, slope;

  RK_INLINE A operator()(A x) const {
    const A log_p = log_probability((x * scale - peak) - log_total);
    return exp_within(log_p) * (constant + slope * log_p);
  }
};

template <class T>
void logprob_backward_rows(const LogprobBackward<T>& g, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const A scale = A(1 / g.temperature);
  for (int64_t r = begin; r < end; ++r) {
    const T* x = g.logits.row(r);
    T* out = g.grad.row(r);
    const A constant = -(g.grad_logprob[r] + g.grad_entropy[r] * g.entropy[r]) * scale;
    const LogitGradient<A> of{scale, g.peak[r], g.log_total[r], constant, -g.grad_entropy[r] * scale};
    const int64_t target = g.target[r];
    // Before the row is written: `out` may be `x`, and 16-bit sums would round twice.
    const A chosen = of(load(x[target])) + g.grad_logprob[r] * scale;
#pragma omp simd
    for (int64_t i = 0; i < g.vocabulary; ++i) out[i] = store<T>(of(load(x[i])));
    out[target] = store<T>(chosen);
  }
}
