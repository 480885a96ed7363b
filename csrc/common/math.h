// Elementwise arithmetic that GCC can vectorise; included by foreach_isa.h, once per instruction set.

// float lanes in one vector register of this instruction set
constexpr int kLanes = RK_LANES;

inline float bits_to_float(uint32_t bits) { return __builtin_bit_cast(float, bits); }
inline uint32_t float_to_bits(float x) { return __builtin_bit_cast(uint32_t, x); }

inline double load(double x) { return x; }
inline float load(float x) { return x; }
inline float load(bf16 x) { return bits_to_float(uint32_t(x.bits) << 16); }
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
inline double store<double>(double x) { return x; }
template <>
inline float store<float>(float x) { return x; }
template <>
inline bf16 store<bf16>(float x) {
  const uint32_t bits = float_to_bits(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t quiet = (bits >> 16) | 0x40u;
  return bf16{uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded)};
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

// exp for vectorised loops: relative error below 1.2e-7 on [-87, 88]; 0 below and inf above, NaN stays NaN.
inline float exp_fast(float x) {
  const float clamped = x < -87.33654f ? -87.33654f : (x > 88.72283f ? 88.72283f : x);
  const float k = __builtin_rintf(clamped * 1.44269504f);
  const float r = (clamped - k * 0.693359375f) + k * 2.12194440e-4f;
  float p = 1.9875691e-4f;
  p = p * r + 1.3981999e-3f;
  p = p * r + 8.3334519e-3f;
  p = p * r + 4.1665796e-2f;
  p = p * r + 1.6666665e-1f;
  p = p * r + 5.0000001e-1f;
  const float mantissa = p * r * r + r + 1.0f;
  // Two half steps keep 2^k in range at both ends.
  const int32_t half = int32_t(k) / 2;
  const float scaled = mantissa * bits_to_float(uint32_t(half + 127) << 23) *
                       bits_to_float(uint32_t(int32_t(k) - half + 127) << 23);
  const float bounded = x > 88.72283f ? std::numeric_limits<float>::infinity() : scaled;
  const float floored = x < -87.33654f ? 0.0f : bounded;
  return x != x ? x : floored;
}
inline double exp_fast(double x) { return std::exp(x); }

template <class A>
inline A sigmoid(A x) {
  return A(1) / (A(1) + exp_fast(-x));
}
