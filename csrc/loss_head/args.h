// What the row kernels of the loss head take. Torch-free.
#pragma once

#include "common/groups.h"
#include "common/isa.h"
#include "common/plane.h"

namespace rk {

// One number a row, of the type that the arithmetic is in. z = logits / temperature; `peak` is the largest z
// and `log_total` log sum exp(z - peak).
template <class T, class A = acc_t<T>>
struct LogprobForward {
  Groups<const T> logits;
  const int64_t* target;
  A *logprob, *entropy, *peak, *log_total;
  int64_t rows, vocabulary;
  double temperature;
};

// `grad` may be the logits themselves.
template <class T, class A = acc_t<T>>
struct LogprobBackward {
  Groups<const T> logits;
  const int64_t* target;
  const A *grad_logprob, *grad_entropy, *entropy, *peak, *log_total;
  Plane<T> grad;
  int64_t rows, vocabulary;
  double temperature;
};

}  // namespace rk
