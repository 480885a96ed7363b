// What every ops.cpp needs of torch's stable ABI: tensors as rows, dtype dispatch, allocation.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <vector>

#include "common/isa.h"

namespace rk {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A tensor as rows of `cols` contiguous elements, `stride` elements apart. `tensor` keeps a copy alive.
struct Rows {
  Tensor tensor;
  int64_t rows;
  int64_t cols;
  int64_t stride;

  template <class T>
  const T* data() const {
    return static_cast<const T*>(tensor.data_ptr());
  }
  template <class T>
  T* mutable_data() const {
    return static_cast<T*>(tensor.data_ptr());
  }
};

// The leading dimensions as one, or -1 where no single stride walks them.
inline int64_t row_stride(const Tensor& t) {
  const int64_t dim = t.dim();
  if (dim == 0) return 1;
  if (t.size(dim - 1) > 1 && t.stride(dim - 1) != 1) return -1;
  int64_t stride = t.size(dim - 1);
  int64_t span = 1;  // rows seen so far, from the innermost leading dimension outwards
  for (int64_t d = dim - 2; d >= 0; --d) {
    if (t.size(d) == 1) continue;
    if (span == 1)
      stride = t.stride(d);
    else if (t.stride(d) != stride * span)
      return -1;
    span *= t.size(d);
  }
  return stride;
}

inline Rows as_rows(const Tensor& t) {
  const int64_t cols = t.dim() == 0 ? 1 : t.size(t.dim() - 1);
  const int64_t rows = cols == 0 ? 0 : t.numel() / cols;
  const int64_t stride = row_stride(t);
  if (stride >= 0) return {t, rows, cols, stride};
  return {torch::stable::contiguous(t), rows, cols, cols};
}

// Uninitialised and contiguous. Straight to the allocator: a dispatcher look-up by name costs 0.4 us.
inline Tensor empty_as(const Tensor& like, const int64_t* sizes, int64_t dim, ScalarType dtype) {
  int64_t strides[16];
  STD_TORCH_CHECK(dim <= 16, "at most 16 dimensions are supported, got ", dim);
  int64_t span = 1;
  for (int64_t d = dim - 1; d >= 0; --d) {
    strides[d] = span;
    span *= sizes[d] > 0 ? sizes[d] : 1;
  }
  int32_t code, device_type, device_index;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  switch (dtype) {
    case ScalarType::Float: code = aoti_torch_dtype_float32(); break;
    case ScalarType::Double: code = aoti_torch_dtype_float64(); break;
    case ScalarType::BFloat16: code = aoti_torch_dtype_bfloat16(); break;
    case ScalarType::Half: code = aoti_torch_dtype_float16(); break;
    case ScalarType::Bool: code = aoti_torch_dtype_bool(); break;
    default: code = aoti_torch_dtype_int64(); break;
  }
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dim, sizes, strides, code, device_type, device_index, &handle));
  return Tensor(handle);
}

inline Tensor new_like(const Tensor& t) {
  int64_t sizes[16];
  const int64_t dim = t.dim();
  STD_TORCH_CHECK(dim <= 16, "at most 16 dimensions are supported, got ", dim);
  for (int64_t d = 0; d < dim; ++d) sizes[d] = t.size(d);
  return empty_as(t, sizes, dim, t.scalar_type());
}

// Calls f with a value of the C++ type that stores this dtype.
template <class F>
auto dispatch_float(ScalarType dtype, const char* op, F&& f) {
  switch (dtype) {
    case ScalarType::Float: return f(float());
    case ScalarType::Double: return f(double());
    case ScalarType::BFloat16: return f(bf16());
    case ScalarType::Half: return f(fp16());
    default: STD_TORCH_CHECK(false, op, ": expected a floating-point tensor");
  }
  return f(float());
}

// Rows in parallel, in torch's own thread pool; `grain` elements are worth a task of their own.
template <class F>
void parallel_rows(int64_t rows, int64_t cols, int64_t grain, const F& f) {
  if (rows == 0) return;
  const int64_t per_task = cols > 0 ? (grain + cols - 1) / cols : rows;
  if (rows <= per_task) return f(int64_t(0), rows);
  torch::stable::parallel_for(0, rows, per_task, [&](int64_t begin, int64_t end) { f(begin, end); });
}

// Elements below which a second thread costs more than it saves.
constexpr int64_t kGrain = 32768;

}  // namespace rk
