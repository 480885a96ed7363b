// Elementwise arithmetic that GCC can vectorise; included by foreach_isa.h, once per instruction set.

// float lanes in one vector register of this instruction set
constexpr int kLanes = RK_LANES;
// Whether this level is for processors of before 2013 alone: right, and not worth much of the compiler's
// time.
constexpr bool kOutgrown = RK_MULTI_ISA && kLanes == 4;

inline float bits_to_float(uint32_t bits) {
  return __builtin_bit_cast(float, bits);
}
inline uint32_t float_to_bits(float x) {
  return __builtin_bit_cast(uint32_t, x);
}

inline double load(double x) {
  return x;
}
inline float load(float x) {
  return x;
}
inline float load(bf16 x) {
  return bits_to_float(uint32_t(x.bits) << 16);
}
inline float load(fp16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  // Normal numbers only move their exponent; subnormals are scaled exactly by a multiplication.
  const float normal = bits_to_float((magnitude << 13) + (112u << 23));
  const float subnormal = float(magnitude) * 0x1p-24f;
  const float special = bits_to_float((magnitude << 13) | 0x7f800000u);
  const float value = magnitude < 0x400u ? subnormal : magnitude >= 0x7c00u ? special : normal;
  return bits_to_float(float_to_bits(value) | sign);
}

// Round to nearest even, as PyTorch does.
template <class T>
inline T store(acc_t<T> x);
template <>
inline double store<double>(double x) {
  return x;
}
template <>
inline float store<float>(float x) {
  return x;
}
template <>
inline bf16 store<bf16>(float x) {
  const uint32_t bits = float_to_bits(x);
  const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  return bf16{uint16_t((x != x ? bits | 0x400000u : rounded) >> 16)};
}
template <>
inline fp16 store<fp16>(float x) {
  const uint32_t bits = float_to_bits(x);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  // Adding 2^-1 * 2^(exponent of the last kept bit) rounds subnormals in the float adder itself.
  const uint32_t subnormal = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  const uint32_t overflow = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  return fp16{uint16_t(sign | (magnitude >= 0x477ff000u ? overflow : finite))};
}

// exp for vectorised loops: relative error below 1e-7; 0 below -86.98, inf above 88.73, NaN stays NaN.
// x = k ln2 + r, and the result is 2 exp(r) by a polynomial, times 2^(k-1): at the lower clamp that power's
// exponent field is 0, and at the upper clamp the product overflows, so neither end needs a branch.
inline float exp_fast(float x) {
  // Clamped to [-87, 89] as integers, one instruction each: with floats GCC threads the constants through
  // everything that follows and computes it twice. Seen as unsigned, negative floats are above positive ones.
  constexpr uint32_t low = __builtin_bit_cast(uint32_t, -87.0f);
  constexpr int32_t high = __builtin_bit_cast(int32_t, 89.0f);
  const uint32_t bits = float_to_bits(x);
  const int32_t above = int32_t(bits < low ? bits : low);
  const float clamped = bits_to_float(uint32_t(above < high ? above : high));
  // Adding 1.5 * 2^23 rounds to an integer; with 126 more the low bits are the exponent field of 2^(k-1).
  constexpr float shift = 12582912.0f + 126.0f;
  const float shifted = clamped * 1.44269504f + shift;
  const float k = shifted - shift;
  const float r = (clamped - k * 0.693359375f) + k * 2.12194440e-4f;
  // minimax for |r| <= ln2 / 2, to 3.1e-9, exact at 0
  float p = 2.0f * 1.38145401e-3f;
  p = p * r + 2.0f * 8.36874521e-3f;
  p = p * r + 2.0f * 4.16683908e-2f;
  p = p * r + 2.0f * 1.66665204e-1f;
  p = p * r + 2.0f * 4.99999934e-1f;
  p = p * r + 2.0f;
  p = p * r + 2.0f;
  return x != x ? x : p * bits_to_float(float_to_bits(shifted) << 23);
}
inline double exp_fast(double x) {
  return std::exp(x);
}

// 2^x for x in [-127, 127]: relative error below 1e-7, exact for whole numbers; 0 below -126.5, NaN stays
// NaN. The rounding is that of exp_fast, without its way there from base e.
inline float exp2_within(float x) {
  constexpr float shift = 12582912.0f + 127.0f;
  const float shifted = x + shift;
  const float f = x - (shifted - shift);
  // minimax for |f| <= 1/2, to 2e-9
  float p = 1.53533621e-4f;
  p = p * f + 1.33988746e-3f;
  p = p * f + 9.61843736e-3f;
  p = p * f + 5.55033247e-2f;
  p = p * f + 2.40226479e-1f;
  p = p * f + 6.93147203e-1f;
  p = p * f + 1.0f;
  return p * bits_to_float(float_to_bits(shifted) << 23);
}

template <class A>
inline A sigmoid(A x) {
  return A(1) / (A(1) + exp_fast(-x));
}
