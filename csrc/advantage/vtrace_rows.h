// V-trace over rows [begin, end), each lane a row, from the last step to the first. Included by
// foreach_isa.h.
//
// What is kept of the steps behind is their value V and x = v - V: state passes over masked steps, and
// nothing follows a step that ends an episode.
#include "common/lanes.h"
#include "common/walk.h"

template <class T>
void vtrace_rows(const VTrace<T>& g, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  using Vec = vec_t<A>;
  using Mask = mask_t<A>;
  constexpr int n = Lanes<A>::n;
  const Vec zero = {}, gamma = zero + A(g.gamma), decay = zero + A(g.gamma * g.lam);
  const Vec most_rho = zero + A(g.rho_clip), most_c = zero + A(g.c_clip);
  Vec follows = zero, x = zero, log_ratio[n], reward[n], value[n];
  Cursor<const T, A> log_ratios{g.log_ratio}, rewards{g.rewards}, values{g.values};
  Cursor<const uint8_t, A> mask{g.mask}, ends{g.done};
  Cursor<T, A> targets{g.targets}, advantages{g.advantages};
  Walk<A, Order::kFromEnd> walk(begin, end, g.steps, g.values.stride * sizeof(T));
  Mask real = ~Mask{}, done = {};
  while (walk.next()) {
    if (walk.turned) {
      const Mask began = walk.began();
      x = began ? zero : x;
      follows = began ? zero : follows;
      if (g.next_value) load_starts<T, A>(&follows, g.next_value, walk);
    }
    load_steps<T>(log_ratio, log_ratios, walk);
    load_steps<T>(reward, rewards, walk);
    load_steps<T>(value, values, walk);
    if (g.mask) real = load_bits<A>(mask, walk);
    if (g.done) done = load_bits<A>(ends, walk);
#pragma GCC unroll 16
    for (int k = n - 1; k >= 0; --k) {
      const Mask live = bit<A>(real, k), cut = bit<A>(done, k);
      const Vec r = live ? reward[k] : zero, v = live ? value[k] : zero;
      const Vec ratio = each_lane<A>(live ? log_ratio[k] : zero, [](A x) { return exp_fast(x); });
      const Vec rho = ratio > most_rho ? most_rho : ratio, c = ratio > most_c ? most_c : ratio;
      const Vec error = multiply_add<A>(gamma, cut ? zero : follows, r) - v;
      const Vec x_next = cut ? zero : x;
      const Vec correction = multiply_add<A>(decay * c, x_next, rho * error);
      log_ratio[k] = live ? rho * multiply_add<A>(gamma, x_next, error) : zero;
      reward[k] = live ? v + correction : zero;
      x = live ? correction : x;
      follows = live ? v : follows;
    }
    store_steps<T>(reward, targets, walk);
    store_steps<T>(log_ratio, advantages, walk);
  }
}
