// sample on the CPU: schema, memory-safety checks, rows in parallel.
#include <memory>

#include "common/tensor.h"
#include "sampling/args.h"
#define RK_ROWS "sampling/rows.h"
#include "common/foreach_isa.h"

namespace rk {
namespace {

std::tuple<Tensor, Tensor, Tensor> sample(const Tensor& logits, const Tensor& uniform, double temperature,
                                          std::optional<int64_t> top_k, std::optional<double> top_p,
                                          int64_t grain) {
  const Rows rows = as_rows(logits);
  STD_TORCH_CHECK(
      uniform.scalar_type() == ScalarType::Double && uniform.numel() == rows.rows && rows.cols > 0,
      "sample: one float64 number is expected for each row of the logits");
  const Tensor numbers = uniform.is_contiguous() ? uniform : torch::stable::contiguous(uniform);
  const ScalarType dtype =
      logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  const auto result = [&](ScalarType type) { return empty_as(logits, &rows.rows, 1, type); };
  Tensor token = result(ScalarType::Long), logprob = result(dtype), log_mass = result(dtype);
  dispatch_float(logits.scalar_type(), "sample", [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    const Sample<T> g{{rows.data<T>(), rows.stride},
                      static_cast<const double*>(numbers.data_ptr()),
                      static_cast<int64_t*>(token.data_ptr()),
                      static_cast<A*>(logprob.data_ptr()),
                      static_cast<A*>(log_mass.data_ptr()),
                      rows.rows,
                      rows.cols,
                      temperature,
                      top_k && *top_k < rows.cols ? *top_k : 0,
                      top_p ? *top_p : 1.0};
    const auto kernel = RK_PICK(sample_rows<T>);
    parallel_rows(g.rows, g.vocabulary, grain, [&](int64_t begin, int64_t end) {
      const std::unique_ptr<A[]> scratch(new A[sample_scratch(g)]);
      const std::unique_ptr<double[]> sums(new double[sample_blocks(g)]);
      kernel(g, begin, end, scratch.get(), sums.get());
    });
  });
  return {token, logprob, log_mass};
}

}  // namespace
}  // namespace rk

STABLE_TORCH_LIBRARY_FRAGMENT(rlhf_kernels_native, m) {
  m.def(
      "sample(Tensor logits, Tensor uniform, float temperature, int? top_k, float? top_p, int grain=32768)"
      " -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(rlhf_kernels_native, CPU, m) {
  m.impl("sample", TORCH_BOX(&rk::sample));
}
