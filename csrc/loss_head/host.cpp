// logprob on NumPy arrays.
#include "common/host.h"
#include "loss_head/args.h"
#define RK_ROWS "loss_head/rows.h"
#include "common/foreach_isa.h"

namespace rk {
namespace {

using IdArray = py::array_t<int64_t, py::array::c_style | py::array::forcecast>;

void check(const FloatArray& logits, const IdArray& target) {
  require(logits.ndim() == 2 && logits.shape(1) > 0, "logprob: logits must be [rows, vocabulary]");
  require(target.ndim() == 1 && target.shape(0) == logits.shape(0), "logprob: one target a row is expected");
  for (py::ssize_t r = 0; r < target.shape(0); ++r)
    require(target.at(r) >= 0 && target.at(r) < logits.shape(1),
            "logprob: targets must be at least 0 and below the vocabulary");
}

py::tuple logprob(const FloatArray& logits, const IdArray& target, double temperature) {
  check(logits, target);
  FloatArray logprob(shape(target)), entropy(shape(target)), peak(shape(target)), log_total(shape(target));
  LogprobForward<float> g{};
  g.logits = {logits.data(), logits.shape(1)};
  g.target = target.data();
  g.logprob = logprob.mutable_data();
  g.entropy = entropy.mutable_data();
  g.peak = peak.mutable_data();
  g.log_total = log_total.mutable_data();
  g.vocabulary = logits.shape(1);
  g.temperature = temperature;
  RK_PICK(logprob_rows<float>)(g, 0, logits.shape(0));
  return py::make_tuple(logprob, entropy, peak, log_total);
}

FloatArray logprob_backward(const FloatArray& grad_logprob, const FloatArray& grad_entropy,
                            const FloatArray& logits, const IdArray& target, const FloatArray& entropy,
                            const FloatArray& peak, const FloatArray& log_total, double temperature) {
  check(logits, target);
  for (const FloatArray* by_row : {&grad_logprob, &grad_entropy, &entropy, &peak, &log_total})
    require(by_row->size() == logits.shape(0), "logprob_backward: one element a row is expected");
  FloatArray grad(shape(logits));
  LogprobBackward<float> g{};
  g.logits = {logits.data(), logits.shape(1)};
  g.target = target.data();
  g.grad_logprob = grad_logprob.data();
  g.grad_entropy = grad_entropy.data();
  g.entropy = entropy.data();
  g.peak = peak.data();
  g.log_total = log_total.data();
  g.grad = {grad.mutable_data(), logits.shape(1)};
  g.vocabulary = logits.shape(1);
  g.temperature = temperature;
  RK_PICK(logprob_backward_rows<float>)(g, 0, logits.shape(0));
  return grad;
}

const Binding binding([](py::module_& m) {
  m.def("logprob", &logprob, py::arg("logits"), py::arg("target"), py::arg("temperature") = 1.0,
        "Log-probability of the target, entropy, largest z = logits / temperature, and log sum exp(z - that),"
        " for each row of [rows, vocabulary], float32.");
  m.def("logprob_backward", &logprob_backward, py::arg("grad_logprob"), py::arg("grad_entropy"),
        py::arg("logits"), py::arg("target"), py::arg("entropy"), py::arg("peak"), py::arg("log_total"),
        py::arg("temperature") = 1.0, "The gradient of the logits [rows, vocabulary], float32.");
});

}  // namespace
}  // namespace rk
