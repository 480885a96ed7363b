// y_t = a_t y + b_t along rows, y the step after or before, over rows [begin, end). Included by
// foreach_isa.h.
#include "common/lanes.h"
#include "common/walk.h"

template <class T, bool kReverse>
void recurrence_rows(const Recurrence<T>& g, int64_t begin, int64_t end) {
  constexpr Order order = kReverse ? Order::kFromEnd : Order::kFromStart;
  using A = acc_t<T>;
  using Vec = vec_t<A>;
  using Mask = mask_t<A>;
  constexpr int n = Lanes<A>::n;
  const Vec zero = {}, one = zero + A(1);
  Vec state = zero, a[n], b[n];
  Cursor<const T, A> factors{g.a}, terms{g.b};
  Cursor<T, A> out{g.y};
  Walk<A, order> walk(begin, end, g.steps, g.b.stride * sizeof(T));
  // Steps that stick out of a row's beginning are zero; going forwards, they come first and would forget.
  const int outside = !kReverse && g.initial ? int((n - g.steps % n) % n) : 0;
  while (walk.next()) {
    Mask began = {};
    if (walk.turned) {
      began = walk.began();
      state = began ? zero : state;
      if (g.initial) load_starts<T, A>(&state, g.initial, walk);
    }
    load_steps<T>(a, factors, walk);
    load_steps<T>(b, terms, walk);
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) {
      const int k = kReverse ? n - 1 - i : i;
      const Vec factor = !kReverse && i < outside ? (began ? one : a[k]) : a[k];
      state = b[k] + factor * state;
      b[k] = state;
    }
    store_steps<T>(b, out, walk);
  }
}
