// swiglu on the CPU: schema, memory-safety checks, rows in parallel.
#include <algorithm>

#include "common/tensor.h"
#define RK_ROWS "swiglu/rows.h"
#include "common/foreach_isa.h"

namespace rk {
namespace {

// x and gate as rows of F: the two halves of one tensor, or two tensors.
struct Pair {
  Rows x, gate;
};

Pair split(const Tensor& x, const std::optional<Tensor>& gate, bool gate_first) {
  Rows first = as_groups(x);
  if (gate) {
    const Rows second = as_groups(*gate);
    STD_TORCH_CHECK(
        second.rows == first.rows && second.cols == first.cols && gate->scalar_type() == x.scalar_type(),
        "swiglu: x and gate must have one shape and dtype");
    return {first, second};
  }
  STD_TORCH_CHECK(first.cols % 2 == 0, "swiglu: the packed dimension must be even, got ", first.cols);
  first.cols /= 2;
  return {first, first};
}

template <class T>
struct Operands {
  Groups<const T> x, gate;
};

// Half a row apart when packed.
template <class T>
Operands<T> operands(const Pair& pair, bool packed, bool gate_first) {
  const int64_t half = packed ? pair.x.cols : 0;
  return {pair.x.groups<T>(gate_first ? half : 0), pair.gate.groups<T>(gate_first ? 0 : half)};
}

Tensor swiglu(const Tensor& x, const std::optional<Tensor>& gate, bool gate_first, int64_t grain) {
  const bool packed = !gate.has_value();
  const Pair pair = split(x, gate, gate_first);
  const Shape shape(x);
  STD_TORCH_CHECK(shape.dim >= 1, "swiglu: expected at least one dimension");
  int64_t sizes[Shape::kMostDims];
  std::copy_n(shape.sizes, shape.dim - 1, sizes);
  sizes[shape.dim - 1] = pair.x.cols;
  Tensor out = new_like(x, sizes, shape.dim);
  dispatch_float(x.scalar_type(), "swiglu", [&](auto zero) {
    using T = decltype(zero);
    const auto row = RK_PICK(swiglu_row<T>);
    const auto from = operands<T>(pair, packed, gate_first && packed);
    T* to = static_cast<T*>(out.data_ptr());
    const int64_t cols = pair.x.cols;
    parallel_rows(pair.x.rows, cols, grain, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) row(from.x.row(r), from.gate.row(r), to + r * cols, cols);
    });
  });
  return out;
}

// The second result is empty when x is packed: its gradient holds both halves.
std::tuple<Tensor, Tensor> swiglu_backward(const Tensor& grad, const Tensor& x,
                                           const std::optional<Tensor>& gate, bool gate_first,
                                           int64_t grain) {
  const bool packed = !gate.has_value();
  const Pair pair = split(x, gate, gate_first);
  const Rows dy = as_groups(grad);
  const int64_t cols = pair.x.cols;
  STD_TORCH_CHECK(dy.cols == cols && dy.rows == pair.x.rows && grad.scalar_type() == x.scalar_type(),
                  "swiglu_backward: the gradient does not fit x");
  Tensor grad_x = new_like(x);
  const int64_t none = 0;
  Tensor grad_gate = packed ? new_like(x, &none, 1) : new_like(*gate);
  dispatch_float(x.scalar_type(), "swiglu_backward", [&](auto zero) {
    using T = decltype(zero);
    const auto row = RK_PICK(swiglu_backward_row<T>);
    const auto from = operands<T>(pair, packed, gate_first && packed);
    const auto upstream = dy.groups<T>();
    const int64_t to_stride = packed ? 2 * cols : cols;
    T* base = static_cast<T*>(grad_x.data_ptr());
    T* to_x = base + (packed && gate_first ? cols : 0);
    T* to_gate = packed ? base + (gate_first ? 0 : cols) : static_cast<T*>(grad_gate.data_ptr());
    parallel_rows(pair.x.rows, cols, grain, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r)
        row(upstream.row(r), from.x.row(r), from.gate.row(r), to_x + r * to_stride, to_gate + r * to_stride,
            cols);
    });
  });
  return {grad_x, grad_gate};
}

}  // namespace
}  // namespace rk

STABLE_TORCH_LIBRARY_FRAGMENT(rlhf_kernels_native, m) {
  m.def("swiglu(Tensor x, Tensor? gate=None, bool gate_first=False, int grain=32768) -> Tensor");
  m.def(
      "swiglu_backward(Tensor grad, Tensor x, Tensor? gate, bool gate_first, int grain=32768)"
      " -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(rlhf_kernels_native, CPU, m) {
  m.impl("swiglu", TORCH_BOX(&rk::swiglu));
  m.impl("swiglu_backward", TORCH_BOX(&rk::swiglu_backward));
}
