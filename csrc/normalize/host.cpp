// masked_normalize on NumPy arrays.
#include <algorithm>

#include "common/host.h"
#include "normalize/moments.h"
#define RK_ROWS "normalize/rows.h"
#include "common/foreach_isa.h"

namespace rk {
namespace {

const uint8_t* bytes(const BoolArray& mask) {
  return reinterpret_cast<const uint8_t*>(mask.data());
}

NormalizeOptions options_of(double eps, bool zero_masked) {
  return {eps, false, false, true, zero_masked};
}

// Merges f(first element, how many) over the blocks of n elements.
template <class Part, class F>
Part reduce(int64_t n, const F& f) {
  Part whole;
  for (int64_t begin = 0; begin < n; begin += kBlock) whole.merge(f(begin, std::min(kBlock, n - begin)));
  return whole;
}

Moments moments_of(const FloatArray& x, const BoolArray& mask) {
  const auto block = RK_PICK(normalize_moments<float>);
  return reduce<Moments>(
      x.size(), [&](int64_t begin, int64_t n) { return block(x.data() + begin, bytes(mask) + begin, n); });
}

FloatArray masked_normalize(const FloatArray& x, const BoolArray& mask, double eps, bool zero_masked) {
  require(x.size() == mask.size(), "masked_normalize: x and mask must have one size");
  FloatArray out(shape(x));
  const ForwardMap<float> map(moments_of(x, mask), options_of(eps, zero_masked));
  RK_PICK(normalize_block<float>)(x.data(), zero_masked ? bytes(mask) : nullptr, out.mutable_data(), x.size(),
                                  map);
  return out;
}

FloatArray masked_normalize_backward(const FloatArray& grad, const FloatArray& x, const BoolArray& mask,
                                     double eps, bool zero_masked) {
  require(x.size() == mask.size() && x.size() == grad.size(),
          "masked_normalize_backward: grad, x and mask must have one size");
  FloatArray out(shape(x));
  const Moments moments = moments_of(x, mask);
  const Center<float> about(moments.mean);
  const auto block = RK_PICK(normalize_gradient_sums<float>);
  const auto sums = reduce<GradientSums>(x.size(), [&](int64_t begin, int64_t n) {
    return block(grad.data() + begin, x.data() + begin, bytes(mask) + begin, n, !zero_masked, about);
  });
  const BackwardMap<float> map(moments, sums, options_of(eps, zero_masked));
  RK_PICK(normalize_gradient_block<float>)(grad.data(), x.data(), bytes(mask), out.mutable_data(), x.size(),
                                           !zero_masked, map);
  return out;
}

const Binding binding([](py::module_& m) {
  m.def("masked_normalize", &masked_normalize, py::arg("x"), py::arg("mask"), py::arg("eps") = 1e-5,
        py::arg("zero_masked") = false,
        "(x - mean) / std with the moments of the real elements (mask True), over the whole array, float32.");
  m.def("masked_normalize_backward", &masked_normalize_backward, py::arg("grad"), py::arg("x"),
        py::arg("mask"), py::arg("eps") = 1e-5, py::arg("zero_masked") = false,
        "The gradient of x, float32.");
});

}  // namespace
}  // namespace rk
