// exp of the logits of a row, and their largest; included by row kernels. Include-free, as everything that
// foreach_isa.h compiles inside a namespace.

// The exponents of a row are t = (logit - start) * factor. In float they count octaves, so that one factor
// stands for 1 / (temperature ln2); in double they are natural.
template <class A>
struct Exponents;
template <>
struct Exponents<float> {
  static constexpr double per_nat = 1.4426950408889634;
  static constexpr float lowest = -127;
  static float exp(float t) { return exp2_within(t); }
};
template <>
struct Exponents<double> {
  static constexpr double per_nat = 1;
  static constexpr double lowest = -800;
  static double exp(double t) { return std::exp(t); }
};

// Where exp is 0, and t exp(t) is too, which -inf * 0 would not be. From memory: a constant GCC would carry
// through all that follows, and select twice.
template <class A, class Of = Exponents<A>>
RK_INLINE A lowest_exponent() {
  A lowest = Of::lowest;
  asm("" : "+m"(lowest));
  return lowest;
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
