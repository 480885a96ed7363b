// sample on NumPy arrays.
#include <memory>

#include "common/host.h"
#include "sampling/args.h"
#define RK_ROWS "sampling/rows.h"
#include "common/foreach_isa.h"

namespace rk {
namespace {

using DoubleArray = py::array_t<double, py::array::c_style | py::array::forcecast>;
using IdArray = py::array_t<int64_t, py::array::c_style | py::array::forcecast>;

py::tuple sample(const FloatArray& logits, const DoubleArray& uniform, double temperature, int64_t top_k,
                 double top_p) {
  require(logits.ndim() == 2 && logits.shape(1) > 0, "sample: logits must be [rows, vocabulary]");
  require(uniform.ndim() == 1 && uniform.shape(0) == logits.shape(0), "sample: one number a row is expected");
  require(temperature > 0 && top_k >= 0 && top_p > 0 && top_p <= 1, "sample: an option is out of its range");
  IdArray token(shape(uniform));
  FloatArray logprob(shape(uniform)), log_mass(shape(uniform));
  const int64_t rows = logits.shape(0), vocabulary = logits.shape(1);
  const Sample<float> g{
      {logits.data(), vocabulary},    uniform.data(), token.mutable_data(), logprob.mutable_data(),
      log_mass.mutable_data(),        rows,           vocabulary,           temperature,
      top_k < vocabulary ? top_k : 0, top_p};
  const std::unique_ptr<float[]> scratch(new float[sample_scratch(g)]);
  const std::unique_ptr<double[]> sums(new double[sample_blocks(g)]);
  RK_PICK(sample_rows<float>)(g, 0, rows, scratch.get(), sums.get());
  return py::make_tuple(token, logprob, log_mass);
}

const Binding binding([](py::module_& m) {
  m.def(
      "sample", &sample, py::arg("logits"), py::arg("uniform"), py::arg("temperature") = 1.0,
      py::arg("top_k") = 0, py::arg("top_p") = 1.0,
      "Token, its log-probability among all, and log of the mass that top_k (0: all) and top_p kept, for each"
      " row of [rows, vocabulary], float32, from its random number in [0, 1).");
});

}  // namespace
}  // namespace rk
