// silu(gate) * x over one row, and its gradients. Included by foreach_isa.h.
#include "common/lanes.h"

#include "common/halves.h"

// out may be x.
template <class T>
void swiglu_row(const T* x, const T* gate, T* out, int64_t n) {
  if constexpr (kAsFloats<T>) {
    each_block_of_floats(n, [&](int64_t i, int64_t count) {
      const Floats<> gates(gate + i, count);
      Floats<> values(x + i, count);
      swiglu_row(values.values, gates.values, values.values, count);
      narrow(values.values, count, out + i);
    });
    return;
  }
  using A = acc_t<T>;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const A g = load(gate[i]);
    out[i] = store<T>(g / (A(1) + exp_fast(-g)) * load(x[i]));
  }
}

// grad_x may be grad, and grad_gate may be gate.
template <class T>
void swiglu_backward_row(const T* grad, const T* x, const T* gate, T* grad_x, T* grad_gate, int64_t n) {
  if constexpr (kAsFloats<T>) {
    each_block_of_floats(n, [&](int64_t i, int64_t count) {
      const Floats<> values(x + i, count);
      Floats<> grads(grad + i, count), gates(gate + i, count);
      swiglu_backward_row(grads.values, values.values, gates.values, grads.values, gates.values, count);
      narrow(grads.values, count, grad_x + i);
      narrow(gates.values, count, grad_gate + i);
    });
    return;
  }
  using A = acc_t<T>;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const A dy = load(grad[i]);
    const A g = load(gate[i]);
    const A s = sigmoid(g);
    grad_x[i] = store<T>(dy * g * s);
    grad_gate[i] = store<T>(dy * load(x[i]) * s * (A(1) + g * (A(1) - s)));
  }
}
