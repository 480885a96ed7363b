// What the row kernels of the advantage room take, for CPU and CUDA. Torch-free.
#pragma once

#include "common/plane.h"

namespace rk {

// A mask, and which steps end an episode. `carry`: state passes over masked steps; else they count as 0.
struct GaeFlags {
  Plane<const uint8_t> mask, done, truncated;
  bool carry;
};

// What a kernel is compiled for: no mask and no flags; a mask that state passes over; a mask whose steps
// count as 0; anything.
enum class GaeKind { kPlain, kMasked, kZeroed, kGeneral };

// next: what follows each step ([B, T]); last: what follows the last one ([B], stride apart). Both may be
// null.
template <class T>
struct GaeForward {
  Plane<const T> rewards, values, next, last;
  GaeFlags flags;
  Plane<T> advantages, returns;
  int64_t rows, steps;
  double gamma, lam;
};

template <class T>
struct GaeBackward {
  Plane<const T> grad_advantages, grad_returns;
  GaeFlags flags;
  Plane<T> grad_rewards, grad_values, grad_next, grad_last;
  int64_t rows, steps;
  double gamma, lam;
};

}  // namespace rk
