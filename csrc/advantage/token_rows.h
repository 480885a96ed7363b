// token_advantages and its gradients over rows [begin, end), before whitening. Included by foreach_isa.h.
//
// As in gae, each lane of a vector takes a row of its own, and time runs in order. Rewards are formed in
// registers. The score belongs to the last real step, which a walk from the end meets first: it waits in the
// lane until then.
#include "normalize/rows.h"  // with lanes.h

#include "common/walk.h"

template <class T, class Out, bool kCarry>
void token_rows(const TokenForward<T, Out>& g, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  using Vec = vec_t<A>;
  using Mask = mask_t<A>;
  constexpr int n = Lanes<A>::n;
  const A penalty = A(-g.kl_coef), gamma = A(g.gamma), decay = A(g.gamma * g.lam);
  const Vec zero = {}, one = zero + A(1);
  // What follows a step is its discounted next value. State that passes over masked steps may start as the
  // score; else the score is kept apart.
  Vec advantage = zero, follows = zero, score = zero, kl[n], value[n];
  Cursor<const T, A> kls{g.kl}, values{g.values};
  Cursor<const uint8_t, A> mask{g.mask};
  Cursor<Out, A> advantages{g.advantages};
  Cursor<T, A> returns{g.returns};
  Walk<A, Order::kFromEnd> walk(begin, end, g.steps, g.kl.stride * sizeof(T));
  while (walk.next()) {
    if (walk.turned) {
      const Mask began = walk.began();
      advantage = began ? zero : advantage;
      follows = began ? zero : follows;
      load_starts<T, A>(kCarry ? &follows : &score, g.score, walk);
    }
    load_steps<T>(kl, kls, walk);
    load_steps<T>(value, values, walk);
    const Mask bits = load_bits<A>(mask, walk);
#pragma GCC unroll 16
    for (int k = n - 1; k >= 0; --k) {
      const Mask real = bit<A>(bits, k);
      if constexpr (kCarry) {
        const Vec delta = real ? penalty * kl[k] + follows - value[k] : zero;
        advantage = delta + (real ? decay + zero : one) * advantage;
        follows = real ? gamma * value[k] : follows;
      } else {
        const Vec reward = real ? penalty * kl[k] + score : zero;
        const Vec v = real ? value[k] : zero;
        score = real ? zero : score;
        advantage = reward + follows - v + decay * advantage;
        follows = gamma * v;
      }
      kl[k] = real ? advantage : zero;
      value[k] = real ? value[k] + advantage : zero;
    }
    store_steps<Out>(kl, advantages, walk);
    if (g.returns) store_steps<T>(value, returns, walk);
  }
}

// One scan forwards in time, as gae's: `trace` is what the step before sends to a step's advantage, `next`
// what it sends to its value. With kWhitened the gradient goes through `map` on the way in.
template <class T, bool kCarry, bool kWhitened>
void token_backward_rows(const TokenBackward<T>& g, const BackwardMap<acc_t<T>>& map, int64_t begin,
                         int64_t end) {
  using A = acc_t<T>;
  using Vec = vec_t<A>;
  using Mask = mask_t<A>;
  constexpr int n = Lanes<A>::n;
  const A penalty = A(-g.kl_coef), gamma = A(g.gamma), decay = A(g.gamma * g.lam);
  const A high = map.center.high, low = map.center.low;
  const A scale = map.scale, average = map.average, slope = map.slope;
  const Vec zero = {};
  Vec next = zero, trace = zero, latest = zero, grad[n], returned[n], x[n];
  Cursor<const T, A> grad_advantages{g.grad_advantages}, grad_returns{g.grad_returns};
  Cursor<const A, A> advantages{g.advantages};
  Cursor<const uint8_t, A> mask{g.mask};
  Cursor<T, A> grad_kl{g.grad_kl}, grad_values{g.grad_values};
  Walk<A, Order::kFromStart> walk(begin, end, g.steps, g.grad_kl.stride * sizeof(T));
  while (walk.next()) {
    if (walk.turned) {
      const Mask began = walk.began();
      next = began ? zero : next;
      trace = began ? zero : trace;
      latest = began ? zero : latest;
    }
    load_steps<T>(grad, grad_advantages, walk);
    load_steps<T>(returned, grad_returns, walk);
    if constexpr (kWhitened) load_steps<A>(x, advantages, walk);
    const Mask bits = load_bits<A>(mask, walk);
#pragma GCC unroll 16
    for (int k = 0; k < n; ++k) {
      const Mask real = bit<A>(bits, k);
      Vec given = grad[k];
      if constexpr (kWhitened) given = (given - average) * scale + slope * ((x[k] - high) - low);
      const Vec a = (real ? given + returned[k] : zero) + trace;
      const Vec to_value = returned[k] - a + next;
      grad[k] = real ? penalty * a : zero;
      returned[k] = real ? to_value : zero;
      latest = real ? a : latest;
      if constexpr (kCarry) {
        next = real ? gamma * a : next;
        trace = real ? decay * a : a;
      } else {
        next = gamma * a;
        trace = decay * a;
      }
    }
    store_steps<T>(grad, grad_kl, walk);
    store_steps<T>(returned, grad_values, walk);
    if (walk.turns()) store_ends<T, A>(&latest, g.grad_score, walk);
  }
}
