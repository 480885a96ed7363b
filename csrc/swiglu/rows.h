// silu(gate) * x over one row, and its gradients. Included by foreach_isa.h.

template <class T>
void swiglu_row(const T* x, const T* gate, T* out, int64_t n) {
  using A = acc_t<T>;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const A g = load(gate[i]);
    out[i] = store<T>(g / (A(1) + exp_fast(-g)) * load(x[i]));
  }
}

template <class T>
void swiglu_backward_row(const T* grad, const T* x, const T* gate, T* grad_x, T* grad_gate, int64_t n) {
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
