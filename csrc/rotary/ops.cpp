// rotary on the CPU: schema, memory-safety checks, positions in parallel.
#include "common/tensor.h"
#define RK_ROWS "rotary/rows.h"
#include "common/foreach_isa.h"

namespace rk {
namespace {

// The dimensions before the last two, walked as one in any layout.
struct Leading {
  explicit Leading(const Shape& x) : x(x) {
    for (int64_t d = 0; d + 2 < x.dim; ++d) count *= x.sizes[d];
  }

  int64_t offset(int64_t index) const {
    int64_t at = 0;
    for (int64_t d = x.dim - 2; d-- > 0; index /= x.sizes[d]) at += index % x.sizes[d] * x.strides[d];
    return at;
  }

  const Shape& x;
  int64_t count = 1;
};

Tensor packed(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

Tensor rotary(Tensor x, const Tensor& cos_table, const Tensor& sin_table, bool interleaved, bool conjugate,
              int64_t grain) {
  const int64_t dim = x.dim();
  STD_TORCH_CHECK(dim >= 2, "rotary: expected [..., T, D], got ", dim, " dimensions");
  if (x.stride(dim - 1) != 1) x = torch::stable::contiguous(x);
  const Shape shape(x);
  const int64_t steps = shape.sizes[dim - 2], width = shape.sizes[dim - 1], half = width / 2;
  STD_TORCH_CHECK(width % 2 == 0, "rotary: D must be even, got ", width);
  Tensor out = new_like(x, shape.sizes, dim);
  const Leading leading(shape);
  if (leading.count * steps * half == 0) return out;

  const Tensor cos = packed(cos_table), sin = packed(sin_table);
  const int64_t tables = cos.numel() / (steps * half);  // one, or one for each index of the first dimension
  STD_TORCH_CHECK(cos.scalar_type() == ScalarType::Float && sin.scalar_type() == ScalarType::Float &&
                      cos.numel() == tables * steps * half && sin.numel() == cos.numel() &&
                      (tables == 1 || (dim > 2 && tables == shape.sizes[0])),
                  "rotary: the tables do not fit x");
  const int64_t per_table = leading.count / tables;
  const auto* from_cos = static_cast<const float*>(cos.data_ptr());
  const auto* from_sin = static_cast<const float*>(sin.data_ptr());
  dispatch_float(x.scalar_type(), "rotary", [&](auto zero) {
    using T = decltype(zero);
    const auto rotate = interleaved ? RK_PICK(rotate_rows<T, true>) : RK_PICK(rotate_rows<T, false>);
    const T* from = static_cast<const T*>(x.data_ptr());
    T* to = static_cast<T*>(out.data_ptr());
    const int64_t stride = shape.strides[dim - 2];
    parallel_rows(leading.count * steps, width, grain, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end;) {
        const int64_t index = row / steps, t = row % steps;
        const int64_t rows = steps - t < end - row ? steps - t : end - row;
        const int64_t table = (index / per_table * steps + t) * half;
        rotate(from + leading.offset(index) + t * stride, stride, from_cos + table, from_sin + table,
               to + row * width, rows, half, conjugate ? -1.0f : 1.0f);
        row += rows;
      }
    });
  });
  return out;
}

}  // namespace
}  // namespace rk

STABLE_TORCH_LIBRARY_FRAGMENT(rlhf_kernels_native, m) {
  m.def(
      "rotary(Tensor x, Tensor cos, Tensor sin, bool interleaved=False, bool conjugate=False,"
      " int grain=32768) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(rlhf_kernels_native, CPU, m) {
  m.impl("rotary", TORCH_BOX(&rk::rotary));
}
