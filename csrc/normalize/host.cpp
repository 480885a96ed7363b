// masked_normalize on NumPy arrays.
#include <algorithm>

#include "common/host.h"
#include "normalize/moments.h"
#define RK_ROWS "normalize/rows.h"
#include "common/foreach_isa.h"

namespace rk {
namespace {

FloatArray masked_normalize(const FloatArray& x, const BoolArray& mask, double eps, bool zero_masked) {
  require(x.size() == mask.size(), "masked_normalize: x and mask must have one size");
  FloatArray out(std::vector<py::ssize_t>(x.shape(), x.shape() + x.ndim()));
  const float* from = x.data();
  const uint8_t* real = reinterpret_cast<const uint8_t*>(mask.data());
  float* to = out.mutable_data();
  const NormalizeOptions options{eps, false, false, true, zero_masked};
  Moments moments;
  for (int64_t begin = 0; begin < x.size(); begin += kBlock) {
    const int64_t n = std::min<int64_t>(kBlock, x.size() - begin);
    moments.merge(RK_PICK(normalize_moments<float>)(from + begin, real + begin, n));
  }
  const ForwardMap<float> map(moments, options);
  RK_PICK(normalize_block<float>)(from, zero_masked ? real : nullptr, to, x.size(), map);
  return out;
}

const Binding binding([](py::module_& m) {
  m.def("masked_normalize", &masked_normalize, py::arg("x"), py::arg("mask"), py::arg("eps") = 1e-5,
        py::arg("zero_masked") = false,
        "(x - mean) / std with the moments of the real elements (mask True), over the whole array, float32.");
});

}  // namespace
}  // namespace rk
