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

// The same in groups, as logits[:, :-1] has them: `group` rows, and the next ones `apart` elements after
// their first. One group where `group` is 0.
template <class T>
struct Groups {
  T* data = nullptr;
  int64_t stride = 0;
  int64_t group = 0, apart = 0;

  T* row(int64_t r) const { return data + (group ? r / group * apart + r % group * stride : r * stride); }
  explicit operator bool() const { return data != nullptr; }
};

}  // namespace rk
