// Rows in groups, as the row kernels of the CPU take them. Torch-free.
#pragma once

#include <cstdint>

namespace rk {

// Rows of contiguous elements in groups, as logits[:, :-1] has them: `stride` elements apart within a group
// of `group` rows, and groups `apart` elements apart. One group where `group` is 0.
template <class T>
struct Groups {
  T* data = nullptr;
  int64_t stride = 0;
  int64_t group = 0, apart = 0;

  T* row(int64_t r) const { return data + (group ? r / group * apart + r % group * stride : r * stride); }
  explicit operator bool() const { return data != nullptr; }
};

}  // namespace rk
