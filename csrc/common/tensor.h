// What every ops.cpp needs of torch's stable ABI: tensors as rows, dtype dispatch, allocation.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <vector>

#include "common/groups.h"
#include "common/isa.h"

namespace rk {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A tensor as rows of `cols` contiguous elements, `stride` elements apart, or in groups (see groups.h).
// `tensor` keeps a copy alive.
struct Rows {
  Tensor tensor;
  int64_t rows;
  int64_t cols;
  int64_t stride;
  int64_t group = 0, apart = 0;

  template <class T>
  const T* data() const {
    return static_cast<const T*>(tensor.data_ptr());
  }
  template <class T>
  T* mutable_data() const {
    return static_cast<T*>(tensor.data_ptr());
  }
  template <class T>
  Groups<const T> groups(int64_t first = 0) const {
    return {data<T>() + first, stride, group, apart};
  }
};

// Sizes and strides by three calls across the ABI instead of one for every number.
struct Shape {
  explicit Shape(const Tensor& t) : sizes(t.sizes().data()), strides(t.strides().data()), dim(t.dim()) {
    STD_TORCH_CHECK(dim <= kMostDims, "at most 16 dimensions are supported, got ", dim);
  }

  static constexpr int64_t kMostDims = 16;
  const int64_t *sizes, *strides;
  int64_t dim;

  // How the dimensions before the last are walked.
  struct Walk {
    int64_t stride, group = 0, apart = 0;
    bool walks = true;
  };

  // As rows, or groups of rows; it does not walk where neither will do.
  Walk walk() const {
    if (dim == 0) return {1};
    Walk found{sizes[dim - 1]};
    if (found.stride > 1 && strides[dim - 1] != 1) return {0, 0, 0, false};
    int64_t span = 1;  // rows, and then groups, seen so far, from the innermost leading dimension outwards
    for (int64_t d = dim - 2; d >= 0; --d) {
      if (sizes[d] == 1) continue;
      int64_t& step = found.group ? found.apart : found.stride;
      if (span == 1) {
        step = strides[d];
      } else if (strides[d] != step * span) {
        if (found.group) return {0, 0, 0, false};
        found.group = span;
        found.apart = strides[d];
        span = 1;
      }
      span *= sizes[d];
    }
    return found;
  }
};

// In groups where one stride does not walk them; copied where groups do not either.
inline Rows as_groups(const Tensor& t) {
  const Shape shape(t);
  const int64_t cols = shape.dim == 0 ? 1 : shape.sizes[shape.dim - 1];
  const int64_t rows = cols == 0 ? 0 : t.numel() / cols;
  const Shape::Walk walk = shape.walk();
  if (walk.walks) return {t, rows, cols, walk.stride, walk.group, walk.apart};
  return {torch::stable::contiguous(t), rows, cols, cols};
}

// Copied where one stride does not walk them.
inline Rows as_rows(const Tensor& t) {
  Rows rows = as_groups(t);
  if (rows.group == 0) return rows;
  return {torch::stable::contiguous(t), rows.rows, rows.cols, rows.cols};
}

inline int32_t dtype_code(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return aoti_torch_dtype_float32();
    case ScalarType::Double:
      return aoti_torch_dtype_float64();
    case ScalarType::BFloat16:
      return aoti_torch_dtype_bfloat16();
    case ScalarType::Half:
      return aoti_torch_dtype_float16();
    case ScalarType::Bool:
      return aoti_torch_dtype_bool();
    default:
      return aoti_torch_dtype_int64();
  }
}

// Uninitialised and contiguous. Straight to the allocator: a dispatcher look-up by name costs 0.4 us.
inline Tensor empty_as(const Tensor& like, const int64_t* sizes, int64_t dim, int32_t dtype) {
  int64_t strides[Shape::kMostDims];
  STD_TORCH_CHECK(dim <= Shape::kMostDims, "at most 16 dimensions are supported, got ", dim);
  int64_t span = 1;
  for (int64_t d = dim - 1; d >= 0; --d) {
    strides[d] = span;
    span *= sizes[d] > 0 ? sizes[d] : 1;
  }
  int32_t device_type, device_index;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dim, sizes, strides, dtype, device_type, device_index, &handle));
  return Tensor(handle);
}
inline Tensor empty_as(const Tensor& like, const int64_t* sizes, int64_t dim, ScalarType dtype) {
  return empty_as(like, sizes, dim, dtype_code(dtype));
}

// Of t's dtype, and of its own shape or another.
inline Tensor new_like(const Tensor& t, const int64_t* sizes, int64_t dim) {
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &dtype));
  return empty_as(t, sizes, dim, dtype);
}
inline Tensor new_like(const Tensor& t) {
  const Shape shape(t);
  return new_like(t, shape.sizes, shape.dim);
}

// Calls f with a value of the C++ type that stores this dtype.
template <class F>
auto dispatch_float(ScalarType dtype, const char* op, F&& f) {
  switch (dtype) {
    case ScalarType::Float:
      return f(float());
    case ScalarType::Double:
      return f(double());
    case ScalarType::BFloat16:
      return f(bf16());
    case ScalarType::Half:
      return f(fp16());
    default:
      STD_TORCH_CHECK(false, op, ": expected a floating-point tensor");
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
