// A token of each row of logits: the first at which the cumulative distribution exceeds a random number, in
// the order of the vocabulary, after top-k and top-p. Included by foreach_isa.h.
#include "common/exponents.h"
#include "common/lanes.h"

// Weights exp((logit - peak) / temperature) of n tokens, and their sum.
template <class T, class A = acc_t<T>>
RK_INLINE double weigh(const T* x, int64_t n, A peak, A factor, A* weight) {
  const A lowest = lowest_exponent<A>();
  double total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < n; ++i) {
    A t = (load(x[i]) - peak) * factor;
    t = t < lowest ? lowest : t;
    const A p = Exponents<A>::exp(t);
    weight[i] = p;
    total += double(p);
  }
  return total;
}

template <class A>
RK_INLINE double sum_of(const A* weight, int64_t n) {
  double total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < n; ++i) total += double(weight[i]);
  return total;
}

// The lowest logit that truncation keeps: the measure of larger ones, that of all that equal it, and how
// many these are.
template <class A>
struct Level {
  A value;
  double above, measure;
  int64_t count;
};

template <class A>
RK_INLINE A middle_of(const A* x, int64_t n) {
  constexpr int64_t most = 9;
  A sorted[most] = {};
  const int64_t count = n < most ? n : most;
  for (int64_t i = 0; i < count; ++i) {
    const A value = x[i * (n - 1) / (count > 1 ? count - 1 : 1)];
    int64_t at = i;
    for (; at > 0 && sorted[at - 1] > value; --at) sorted[at] = sorted[at - 1];
    sorted[at] = value;
  }
  return sorted[count / 2];
}

// Of n > 0 candidates, of which the largest are kept while the measure of those before is below `limit`. The
// measure is their weight, or their number. Quickselect: overwrites the candidates.
template <bool kWeighted, class A>
RK_OUTLINE Level<A> lowest_kept(A* x, A* weight, int64_t n, double limit) {
  using Count = typename Lanes<A>::Bits;
  double before = 0;
  for (;;) {
    const A pivot = middle_of(x, n);
    double above = 0, level = 0;
    Count larger = 0, equal = 0;
    if constexpr (kWeighted) {
#pragma omp simd reduction(+ : above, level)
      for (int64_t i = 0; i < n; ++i) {
        above += double(x[i] > pivot ? weight[i] : A(0));
        level += double(x[i] == pivot ? weight[i] : A(0));
      }
    }
#pragma omp simd reduction(+ : larger, equal)
    for (int64_t i = 0; i < n; ++i) {
      larger += x[i] > pivot;
      equal += x[i] == pivot;
    }
    if constexpr (!kWeighted) above = larger, level = equal;
    const bool down = larger == 0 || before + above < limit;
    if (down && (before + above + level >= limit || larger + equal == n))
      return {pivot, before + above, level, equal};
    if (down) before += above + level;
    int64_t left = 0;
    for (int64_t i = 0; i < n; ++i) {
      const A value = x[i];
      x[left] = value;
      if constexpr (kWeighted) weight[left] = weight[i];
      left += down ? value < pivot : value > pivot;
    }
    n = left;
  }
}

// A number that at least `count` of the logits reach: as many of the maxima of strided parts do.
template <class T, class A = acc_t<T>>
RK_OUTLINE A reached_by(const T* x, int64_t n, int64_t count, A* maxima) {
  constexpr int lanes = Lanes<A>::n;
  const int64_t fitting = n / (4 * count), each = fitting < 64 ? fitting : 64;
  int64_t found = 0;
  if (each > 1) {
    for (int64_t i = 0; i + each * lanes <= n; i += each * lanes) {
      vec_t<A> largest = load_lanes(x + i);
      for (int64_t j = 1; j < each; ++j) {
        const vec_t<A> more = load_lanes(x + i + j * lanes);
        largest = largest < more ? more : largest;
      }
      store_lanes<A>(maxima + found, largest);
      found += lanes;
    }
  }
  if (found < count) return -std::numeric_limits<A>::infinity();
  return lowest_kept<false>(maxima, maxima, found, double(count)).value;
}

// Logits and weights that are not below these bounds, side by side; most runs of `group` hold none.
template <class T, class A = acc_t<T>>
RK_OUTLINE int64_t gather(const T* x, const A* weight, int64_t n, A least_logit, A least_weight, A* logits,
                          A* weights) {
  constexpr int64_t group = 2 * kLanes;
  using Count = typename Lanes<A>::Bits;
  int64_t found = 0;
  for (int64_t i = 0; i < n; i += group) {
    const int64_t end = n - i < group ? n : i + group;
    if (end == i + group) {
      Count any = 0;
#pragma omp simd reduction(| : any)
      for (int64_t j = i; j < i + group; ++j)
        any |= (load(x[j]) >= least_logit) & (weight[j] >= least_weight);
      if (!any) continue;
    }
    for (int64_t j = i; j < end; ++j) {
      const A value = load(x[j]);
      logits[found] = value;
      weights[found] = weight[j];
      found += (value >= least_logit) & (weight[j] >= least_weight);
    }
  }
  return found;
}

// What is kept: logits above `least`, and the first `ties` that equal it.
template <class A>
struct Edge {
  A least;
  int64_t ties;
};

template <class T, class A = acc_t<T>>
RK_INLINE Edge<A> edge_of(const T* x, const A* weight, double total, const Sample<T>& g, A* scratch) {
  const int64_t n = g.vocabulary;
  A *logits = scratch, *weights = scratch + n;
  Edge<A> edge{-std::numeric_limits<A>::infinity(), n};
  // Tokens of less weight have, with all that are not larger, less than what top_p cuts.
  double least_weight = 0.5 * (1 - g.top_p) * total / double(n);
  if (g.top_k > 0) {
    const A bound = reached_by(x, n, g.top_k, logits);
    const int64_t count = gather(x, weight, n, bound, A(0), logits, weights);
    const Level<A> level = lowest_kept<false>(logits, weights, count, double(g.top_k));
    edge = {level.value, g.top_k - int64_t(level.above)};
    least_weight = 0;
  }
  if (g.top_p == 1) return edge;
  const A smallest = std::numeric_limits<A>::min();  // what is 0 is not drawn
  const int64_t count =
      gather(x, weight, n, edge.least, least_weight > smallest ? A(least_weight) : smallest, logits, weights);
  double mass = total;
  if (g.top_k > 0) {
    mass = 0;
    int64_t ties = edge.ties;
    for (int64_t i = 0; i < count; ++i) mass += logits[i] > edge.least || ties-- > 0 ? weights[i] : A(0);
  }
  const double limit = g.top_p * mass;
  const Level<A> level = lowest_kept<true>(logits, weights, count, limit);
  const double wanted = std::ceil((limit - level.above) / (level.measure / double(level.count)));
  const int64_t most = level.value == edge.least ? edge.ties : n;
  edge = {level.value, wanted < 1 ? 1 : wanted < double(most) ? int64_t(wanted) : most};
  return edge;
}

// Weights beyond the edge become 0; whether any was more.
template <class T, class A = acc_t<T>>
RK_INLINE bool cut(const T* x, int64_t n, const Edge<A>& edge, A* weight) {
  typename Lanes<A>::Bits removed = 0, level = 0;
#pragma omp simd reduction(+ : removed, level)
  for (int64_t i = 0; i < n; ++i) {
    const A value = load(x[i]);
    removed += (value < edge.least) & (weight[i] > 0);
    level += value == edge.least;
    weight[i] = value < edge.least ? A(0) : weight[i];
  }
  if (level <= edge.ties) return removed > 0;
  int64_t ties = edge.ties;
  for (int64_t i = 0; i < n; ++i)
    if (load(x[i]) == edge.least && ties-- <= 0) {
      removed |= weight[i] > 0;
      weight[i] = 0;
    }
  return removed > 0;
}

// Where the running sum first exceeds `aim`, else the last that weighs anything.
template <class A>
RK_INLINE int64_t reached(const A* weight, int64_t n, double running, double aim) {
  int64_t last = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (!(weight[i] > 0)) continue;
    last = i;
    running += double(weight[i]);
    if (running > aim) break;
  }
  return last;
}

template <class T, class A = acc_t<T>>
RK_INLINE void sample_row(const Sample<T>& g, int64_t r, A* scratch, double* sums) {
  const T* x = g.logits.row(r);
  const int64_t n = g.vocabulary, blocks = sample_blocks(g);
  const double steepest = std::numeric_limits<A>::max(), slope = Exponents<A>::per_nat / g.temperature;
  const A peak = largest_of(x, n), factor = A(slope < steepest ? slope : steepest);
  const auto length = [n](int64_t b) {
    return n - b * kSampleBlock < kSampleBlock ? n - b * kSampleBlock : kSampleBlock;
  };
  const auto at = [&](int64_t b) { return scratch + (g.truncates() ? b * kSampleBlock : 0); };
  double total = 0;
  for (int64_t b = 0; b < blocks; ++b)
    total += sums[b] = weigh(x + b * kSampleBlock, length(b), peak, factor, at(b));
  if (!(total > 0)) {  // no token, or NaN
    g.token[r] = 0;
    g.logprob[r] = g.log_mass[r] = std::numeric_limits<A>::quiet_NaN();
    return;
  }
  double kept = total;
  if (g.truncates() && cut(x, n, edge_of(x, scratch, total, g, scratch + n), scratch)) {
    kept = 0;
    for (int64_t b = 0; b < blocks; ++b) kept += sums[b] = sum_of(at(b), length(b));
  }
  const double aim = g.uniform[r] * kept;
  double before = 0;
  int64_t chosen = 0, last = 0;
  for (; chosen < blocks && !(before + sums[chosen] > aim); ++chosen) {
    if (sums[chosen] > 0) last = chosen;
    before += sums[chosen];
  }
  if (chosen == blocks) chosen = last;
  if (!g.truncates()) weigh(x + chosen * kSampleBlock, length(chosen), peak, factor, scratch);
  const int64_t within = reached(at(chosen), length(chosen), before, aim);
  const int64_t token = chosen * kSampleBlock + within;
  const double logprob = (double(load(x[token])) - double(peak)) / g.temperature - std::log(total);
  g.token[r] = token;
  g.logprob[r] = A(logprob > 0 ? 0.0 : logprob);
  g.log_mass[r] = kept == total                        ? A(0)
                  : double(at(chosen)[within]) == kept ? g.logprob[r]
                                                       : A(std::log(kept / total));
}

template <class T>
void sample_rows(const Sample<T>& g, int64_t begin, int64_t end, acc_t<T>* scratch, double* sums) {
  for (int64_t r = begin; r < end; ++r) sample_row(g, r, scratch, sums);
}
