// What the row kernels of the advantage room take, for CPU and CUDA. Torch-free.
#pragma once

#include "common/isa.h"
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

// y = a * (y of the step after, or before) + b; `initial` stands beyond the first step taken, and may be
// null.
template <class T>
struct Recurrence {
  Plane<const T> a, b, initial;
  Plane<T> y;
  int64_t rows, steps;
};

// V-trace; mask, done and next_value ([B]) may be null.
template <class T>
struct VTrace {
  Plane<const T> log_ratio, rewards, values, next_value;
  Plane<const uint8_t> mask, done;
  Plane<T> targets, advantages;
  int64_t rows, steps;
  double gamma, lam, rho_clip, c_clip;
};

// Scores and KL terms in the place of rewards; a mask is always there. `advantages` may be kept in more
// digits than the inputs; `returns` may be null.
template <class T, class Out = T>
struct TokenForward {
  Plane<const T> score, kl, values;
  Plane<const uint8_t> mask;
  Plane<Out> advantages;
  Plane<T> returns;
  int64_t rows, steps;
  double kl_coef, gamma, lam;
};

// `advantages` are those before whitening; null where they were not whitened.
template <class T>
struct TokenBackward {
  Plane<const T> grad_advantages, grad_returns;
  Plane<const acc_t<T>> advantages;
  Plane<const uint8_t> mask;
  Plane<T> grad_score, grad_kl, grad_values;
  int64_t rows, steps;
  double kl_coef, gamma, lam;
};

}  // namespace rk
