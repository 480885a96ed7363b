// 2^x of a vector's lanes; included after lanes.h. Include-free, as everything that foreach_isa.h compiles
// inside a namespace.

#if RK_LANES >= 8 && RK_MULTI_ISA
// The bits behind the point of 2^(i/16). As many steps make an octave as there are lanes to look them up in.
constexpr int32_t kRoots[16] = {0,       371395,  759234,  1164243, 1587184, 2028850, 2490071, 2971711,
                                3474675, 3999908, 4548394, 5121164, 5719293, 6343903, 6996167, 7677309};
constexpr int kStepBits = RK_LANES == 16 ? 4 : 3;

// Those bits without the step's own number, which adding the exponent brings along.
template <int... step>
RK_INLINE mask_t<float> roots_without_steps(std::integer_sequence<int, step...>) {
  return mask_t<float>{(kRoots[step * (16 / kLanes)] - step * (1 << (23 - kStepBits)))...};
}
#endif

// For x in [-127, 127]: relative error below 1.7e-7 (exp2_within(): 1e-7), exact for whole numbers, 0 at
// -127, NaN stays NaN. Below -126 the result is one of the smallest numbers, not always the nearest.
//
// x is rounded to a step of the octave, whose power is looked up, so that a short polynomial does for the
// rest: of pipes that multiply a processor has too few.
RK_INLINE vec_t<float> exp2_lanes(const vec_t<float>& x) {
#if RK_LANES >= 8 && RK_MULTI_ISA
  // Adding it rounds to a step; the low bits are then the step, and above it the exponent field.
  constexpr float shift = 12582912.0f / kLanes + 127.0f;
  const vec_t<float> shifted = x + shift;
  const vec_t<float> rest = x - (shifted - shift);
  const mask_t<float> bits = __builtin_bit_cast(mask_t<float>, shifted);
  const mask_t<float> roots = roots_without_steps(std::make_integer_sequence<int, kLanes>());
  const mask_t<float> power = __builtin_shuffle(roots, bits) + (bits << (23 - kStepBits));
  // minimax for |rest| <= 1/16, to 2.5e-8
  vec_t<float> p = rest * 5.54962233e-2f + 2.40257636e-1f;
  p = p * rest + 6.93147242e-1f;
  p = p * rest + 1.0f;
  return p * __builtin_bit_cast(vec_t<float>, power);
#else
  return each_lane<float>(x, [](float lane) { return exp2_within(lane); });
#endif
}
