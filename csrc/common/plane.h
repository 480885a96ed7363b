// A matrix as the row kernels of CPU and GPU take it. Torch-free.
#pragma once

#include <cstdint>

namespace rk {

// Rows of contiguous elements, `stride` elements apart; null where the matrix is absent.
template <class T>
struct Plane {
  T* data = nullptr;
  int64_t stride = 0;

  T* row(int64_t r) const { return data + r * stride; }
  explicit operator bool() const { return data != nullptr; }
};

}  // namespace rk
