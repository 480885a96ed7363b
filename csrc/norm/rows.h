// layer_norm and rms_norm of rows, and their gradients. Included by foreach_isa.h.
#include "common/lanes.h"

// Vectors that are summed side by side, which hides the latency of the adder, and how many such rounds are
// summed before their sum joins the others.
constexpr int kChains = 4;
constexpr int64_t kRounds = 64;

// Instead of a number of elements: a whole vector of them.
struct Whole {};

template <class T>
RK_INLINE vec_t<acc_t<T>> load_part(const T* from, Whole, acc_t<T>) {
  return load_lanes(from);
}
// n elements and `fill` for the rest; and so many written.
template <class T>
RK_INLINE vec_t<acc_t<T>> load_rest(const T* from, int64_t n, acc_t<T> fill) {
  using A = acc_t<T>;
  A wide[Lanes<A>::n];
  for (int i = 0; i < Lanes<A>::n; ++i) wide[i] = i < n ? load(from[i]) : fill;
  return load_lanes(wide);
}
template <class T>
RK_INLINE void store_rest(T* to, const vec_t<acc_t<T>>& from, int64_t n) {
  T narrow[Lanes<acc_t<T>>::n];
  store_lanes<T>(narrow, from);
  for (int64_t i = 0; i < n; ++i) to[i] = narrow[i];
}

// The end of a row is a small part of it, and in every place where it is inlined a second of the compiler's.
template <class T>
RK_OUTLINE vec_t<acc_t<T>> load_rest_apart(const T* from, int64_t n, acc_t<T> fill) {
  return load_rest(from, n, fill);
}
template <class T>
RK_OUTLINE void store_rest_apart(T* to, const vec_t<acc_t<T>>& from, int64_t n) {
  store_rest<T>(to, from, n);
}
template <class T>
constexpr bool kInlined = std::is_same_v<T, float> && !kOutgrown;

template <class T>
RK_INLINE vec_t<acc_t<T>> load_part(const T* from, int64_t n, acc_t<T> fill) {
  if constexpr (kInlined<T>)
    return load_rest(from, n, fill);
  else
    return load_rest_apart(from, n, fill);
}
template <class T>
RK_INLINE void store_part(T* to, const vec_t<acc_t<T>>& from, Whole) {
  store_lanes<T>(to, from);
}
template <class T>
RK_INLINE void store_part(T* to, const vec_t<acc_t<T>>& from, int64_t n) {
  if constexpr (kInlined<T>)
    store_rest<T>(to, from, n);
  else
    store_rest_apart<T>(to, from, n);
}

// f(where, which chain, how many) for each vector of n elements.
template <class A, class F>
RK_INLINE void each_vector(int64_t n, const F& f) {
  constexpr int64_t lanes = Lanes<A>::n;
  int64_t i = 0;
  for (; !kOutgrown && i + kChains * lanes <= n; i += kChains * lanes) {
    f(i, 0, Whole());
    f(i + lanes, 1, Whole());
    f(i + 2 * lanes, 2, Whole());
    f(i + 3 * lanes, 3, Whole());
  }
  for (; i + lanes <= n; i += lanes) f(i, 0, Whole());
  if (i < n) f(i, 1, n - i);
}

// Of the next row, while this one is worked on in the cache: else a pass over it would wait for memory.
template <class T>
RK_INLINE void expect(const T* from) {
  __builtin_prefetch(from, 0, 2);
}

template <class A>
struct Sums {
  vec_t<A> first = {}, second = {};

  RK_INLINE Sums operator+(const Sums& other) const { return {first + other.first, second + other.second}; }
};

// The sum over the lanes, by halves.
template <class A>
RK_INLINE double total(const vec_t<A>& lanes) {
  constexpr int n = Lanes<A>::n;
  A part[n];
  __builtin_memcpy(part, &lanes, sizeof(part));
  for (int half = n / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) part[i] += part[i + half];
  return double(part[0]);
}

// Two sums over a row; term(where, how many, sums) adds a vector's.
template <class A, class F>
RK_INLINE Sums<A> sums_of(int64_t n, const F& term) {
  constexpr int64_t block = kRounds * (kOutgrown ? 1 : kChains) * Lanes<A>::n;
  Sums<A> whole;
  for (int64_t begin = 0; begin < n; begin += block) {
    Sums<A> chain[kChains];
    each_vector<A>(n - begin < block ? n - begin : block,
                   [&](int64_t i, int c, auto part)
                       __attribute__((always_inline)) { term(begin + i, part, chain[c]); });
    whole = whole + ((chain[0] + chain[1]) + (chain[2] + chain[3]));
  }
  return whole;
}

// (x - mean) / std as (x - mean) * scale + shift: `shift` is what the rounded mean left over. About 0, x /
// rms.
template <class A, bool kCenter>
struct Standard {
  A mean = 0, scale, shift = 0;

  RK_INLINE void keep(A* to) const {
    to[0] = mean;
    to[1] = scale;
    to[2] = shift;
  }

  RK_INLINE vec_t<A> operator()(const vec_t<A>& x) const {
    return kCenter ? (x - mean) * scale + shift : x * scale;
  }
};

// What the first pass over a row sums: values about a mean, else squares.
template <bool kCenter, class A>
RK_INLINE void add_value(Sums<A>& sums, const vec_t<A>& value) {
  sums.first += kCenter ? value : value * value;
}

// `sum` is over the row, of what add_value adds. The squares are about the mean, in a second pass.
template <bool kCenter, class T, class A = acc_t<T>>
RK_INLINE Standard<A, kCenter> standard_of(const T* x, int64_t n, double sum, double eps) {
  const double mean = sum / double(n);
  if constexpr (!kCenter) return {0, A(1 / std::sqrt(mean + eps)), 0};
  const A about = A(mean);
  const Sums<A> sums = sums_of<A>(n, [&](int64_t i, auto part, Sums<A>& to) __attribute__((always_inline)) {
    const vec_t<A> away = load_part(x + i, part, about) - about;
    to.first += away;
    to.second += away * away;
  });
  const double rest = total<A>(sums.first) / double(n);
  const double variance = total<A>(sums.second) / double(n) - rest * rest;
  // NaN stays NaN. A single element is its own mean, whatever rounding leaves of the difference.
  const double scale = n == 1 ? 0 : 1 / std::sqrt((variance < 0 ? 0 : variance) + eps);
  return {about, A(scale), A(-rest * scale)};
}

template <bool kCenter, class T, class A = acc_t<T>>
RK_INLINE Standard<A, kCenter> standard_of(const T* x, int64_t n, double eps) {
  const Sums<A> sums = sums_of<A>(n, [&](int64_t i, auto part, Sums<A>& to) __attribute__((always_inline)) {
    add_value<kCenter>(to, load_part(x + i, part, A(0)));
  });
  return standard_of<kCenter>(x, n, total<A>(sums.first), eps);
}

// Of x + residual, which goes to `summed` and counts as rounded there.
template <bool kCenter, class T, class A = acc_t<T>>
RK_INLINE Standard<A, kCenter> standard_of_sum(const T* x, const T* residual, T* summed, int64_t n,
                                               double eps) {
  const Sums<A> sums = sums_of<A>(n, [&](int64_t i, auto part, Sums<A>& to) __attribute__((always_inline)) {
    const vec_t<A> sum = load_part(x + i, part, A(0)) + load_part(residual + i, part, A(0));
    T rounded[Lanes<A>::n];
    store_lanes<T>(rounded, sum);
    store_part<T>(summed + i, sum, part);
    add_value<kCenter>(to, load_lanes(rounded));
  });
  return standard_of<kCenter>(static_cast<const T*>(summed), n, total<A>(sums.first), eps);
}

template <bool kCenter, bool kBias, class T>
RK_OUTLINE void norm_forward(const NormForward<T>& g, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const A *weight = g.weight, *bias = g.bias;
  const int64_t n = g.cols;
  for (int64_t r = begin; r < end; ++r) {
    const T* x = g.residual ? g.summed.row(r) : g.x.row(r);
    const T *next = g.x.row(r + 1 < end ? r + 1 : r),
            *also = g.residual ? g.residual.row(r + 1 < end ? r + 1 : r) : next;
    T* out = g.out.row(r);
    const Standard<A, kCenter> standard =
        g.residual ? standard_of_sum<kCenter>(g.x.row(r), g.residual.row(r), g.summed.row(r), n, g.eps)
                   : standard_of<kCenter>(x, n, g.eps);
    standard.keep(g.statistics + r * kNormStatistics);
    each_vector<A>(n, [&](int64_t i, int, auto part) __attribute__((always_inline)) {
      expect(next + i);
      expect(also + i);
      vec_t<A> y = standard(load_part(x + i, part, A(0))) * load_part(weight + i, part, A(0));
      if constexpr (kBias) y += load_part(bias + i, part, A(0));
      store_part<T>(out + i, y, part);
    });
  }
}

template <class T>
void norm_forward_rows(const NormForward<T>& g, int64_t begin, int64_t end) {
  if (g.center)
    g.bias ? norm_forward<true, true>(g, begin, end) : norm_forward<true, false>(g, begin, end);
  else
    g.bias ? norm_forward<false, true>(g, begin, end) : norm_forward<false, false>(g, begin, end);
}

// With y = (x - mean) / std and s = grad * weight, the gradient of x is (s - mean(s) - y mean(s y)) / std.
// mean(s) belongs to the mean that was subtracted.
template <bool kCenter, bool kBias, class T>
RK_OUTLINE void norm_backward(const NormBackward<T>& g, int64_t group) {
  using A = acc_t<T>;
  const A* weight = g.weight;
  const int64_t n = g.cols, begin = group * kNormGroup;
  const int64_t end = g.rows - begin < kNormGroup ? g.rows : begin + kNormGroup;
  A* by_weight = g.weight_sums + group * n;
  A* by_bias = kBias ? g.bias_sums + group * n : nullptr;
  __builtin_memset(by_weight, 0, n * sizeof(A));
  if (kBias) __builtin_memset(by_bias, 0, n * sizeof(A));
  for (int64_t r = begin; r < end; ++r) {
    const T *x = g.x.row(r), *grad = g.grad.row(r);
    const int64_t after = r + 1 < g.rows ? r + 1 : r;
    const T *next = g.x.row(after), *next_grad = g.grad.row(after);
    const A* kept = g.statistics + r * kNormStatistics;
    const Standard<A, kCenter> standard =
        kept[1] != 0 ? Standard<A, kCenter>{kept[0], kept[1], kept[2]} : standard_of<kCenter>(x, n, g.eps);
    const Sums<A> sums = sums_of<A>(n, [&](int64_t i, auto part, Sums<A>& to) __attribute__((always_inline)) {
      const vec_t<A> y = standard(load_part(x + i, part, standard.mean)),
                     dy = load_part(grad + i, part, A(0));
      expect(next + i);
      const vec_t<A> s = dy * load_part(weight + i, part, A(0)), along = dy * y;
      if constexpr (kCenter) to.first += s;
      to.second += s * y;
      store_part<A>(by_weight + i, load_part(by_weight + i, part, A(0)) + along, part);
      if constexpr (kBias) store_part<A>(by_bias + i, load_part(by_bias + i, part, A(0)) + dy, part);
    });
    const A average = kCenter ? A(total<A>(sums.first) / double(n)) : A(0);
    const A slope = A(total<A>(sums.second) / double(n));
    const T* also = g.grad_summed ? g.grad_summed.row(r) : nullptr;
    T* to = g.grad_x.row(r);
    const auto write = [&](int64_t i, auto part, const vec_t<A>& besides) __attribute__((always_inline)) {
      const vec_t<A> y = standard(load_part(x + i, part, standard.mean));
      expect(next_grad + i);
      vec_t<A> s = load_part(grad + i, part, A(0)) * load_part(weight + i, part, A(0));
      if constexpr (kCenter) s -= average;
      store_part<T>(to + i, (s - y * slope) * standard.scale + besides, part);
    };
    if (also)
      each_vector<A>(n, [&](int64_t i, int, auto part) __attribute__((always_inline)) {
        write(i, part, load_part(also + i, part, A(0)));
      });
    else
      each_vector<A>(
          n, [&](int64_t i, int, auto part) __attribute__((always_inline)) { write(i, part, vec_t<A>{}); });
  }
}

template <class T>
void norm_backward_groups(const NormBackward<T>& g, int64_t begin, int64_t end) {
  for (int64_t group = begin; group < end; ++group) {
    if (g.center)
      g.bias_sums ? norm_backward<true, true>(g, group) : norm_backward<true, false>(g, group);
    else
      g.bias_sums ? norm_backward<false, true>(g, group) : norm_backward<false, false>(g, group);
  }
}

// A parameter in the type of the arithmetic.
template <class W>
void norm_parameter(const W* from, double offset, acc_t<W>* to, int64_t n) {
  const acc_t<W> more = acc_t<W>(offset);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) to[i] = load(from[i]) + more;
}

// Columns begin .. end of the groups' sums [groups, cols], added in the groups' order.
template <class W>
void norm_combine(const acc_t<W>* sums, int64_t groups, int64_t cols, W* to, int64_t begin, int64_t end) {
  constexpr int64_t most = 64;
  for (int64_t at = begin; at < end; at += most) {
    const int64_t n = end - at < most ? end - at : most;
    double whole[most] = {};
    for (int64_t group = 0; group < groups; ++group)
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) whole[i] += double(sums[group * cols + at + i]);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) to[at + i] = store<W>(acc_t<W>(whole[i]));
  }
}
