// gae and its gradients over rows [begin, end). Included by foreach_isa.h.
//
// A row is a chain of dependent steps, so each lane of a vector takes a row of its own: exactly the
// sequential arithmetic per row, whatever the batch. Masks and flags are blends, never branches.
#include "common/lanes.h"
#include "common/walk.h"

// What is compiled for a kind: everything for float32, less for what is rarer, whose kernels are then those
// of a more general kind. Each is a second of the compiler's.
template <class T>
constexpr GaeKind compiled(GaeKind kind) {
  if (kOutgrown || sizeof(T) == 8) return GaeKind::kGeneral;
  return sizeof(T) == 2 && kind == GaeKind::kZeroed ? GaeKind::kGeneral : kind;
}

// The flags of one block, a bit for each step; `kind` says which can be other than trivial.
template <class A, GaeKind kind>
struct FlagBits {
  Cursor<const uint8_t, A> mask, ends, cuts;
  mask_t<A> real = ~mask_t<A>{}, done = {}, cut = {};
  // Whether no lane's mask changes within the block. Looked at where steps are selected by mask registers:
  // AVX2 gains nothing by it.
  static constexpr bool kLooks = kind == GaeKind::kMasked && kLanes == 16;
  bool steady = false;

  explicit FlagBits(const GaeFlags& flags) : mask{flags.mask}, ends{flags.done}, cuts{flags.truncated} {}

  template <Order order>
  RK_INLINE void load(const Walk<A, order>& walk) {
    if (kind != GaeKind::kPlain && mask.plane) {
      typename Lanes<A>::Bits mixed = 0;
      real = load_bits<A>(mask, walk, mixed);
      if (kLooks) steady = mixed == 0;
    }
    if (kind != GaeKind::kGeneral) return;
    if (ends.plane) cut = done = load_bits<A>(ends, walk);
    if (cuts.plane) cut = done | load_bits<A>(cuts, walk);
  }
};

template <class T, GaeKind kind>
RK_OUTLINE void gae_steps(const GaeForward<T>& g, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  using Vec = vec_t<A>;
  using Mask = mask_t<A>;
  constexpr int n = Lanes<A>::n;
  const Vec zero = {}, gamma = zero + A(g.gamma), decay = zero + A(g.gamma * g.lam);
  Vec next = zero, advantage = zero, reward[n], value[n], follows[n] = {};
  Cursor<const T, A> rewards{g.rewards}, values{g.values}, nexts{g.next};
  Cursor<T, A> advantages{g.advantages}, returns{g.returns};
  FlagBits<A, kind> flags(g.flags);
  Walk<A, Order::kFromEnd> walk(begin, end, g.steps, g.rewards.stride * sizeof(T));
  while (walk.next()) {
    if (walk.turned) {
      const Mask began = walk.began();
      advantage = began ? zero : advantage;
      next = began ? zero : next;
      if (g.last) load_starts<T, A>(&next, g.last, walk);
    }
    load_steps<T>(reward, rewards, walk);
    load_steps<T>(value, values, walk);
    if (kind == GaeKind::kGeneral && g.next) load_steps<T>(follows, nexts, walk);
    flags.load(walk);
    const auto step = [&](int k, const Mask& real) __attribute__((always_inline)) {
      if constexpr (kind == GaeKind::kPlain || kind == GaeKind::kZeroed) {
        if (kind == GaeKind::kZeroed) {
          reward[k] = real ? reward[k] : zero;
          value[k] = real ? value[k] : zero;
        }
        const Vec delta = multiply_add<A>(gamma, next, reward[k]) - value[k];
        advantage = multiply_add<A>(decay, advantage, delta);
        next = value[k];
        value[k] += advantage;
      } else if constexpr (kind == GaeKind::kMasked) {
        const Vec delta = multiply_add<A>(gamma, next, reward[k]) - value[k];
        advantage = multiply_add<A>(advantage, decay, delta, real);
        next = real ? value[k] : next;
        value[k] = real ? value[k] + advantage : advantage;
      } else {
        const Mask live = g.flags.carry ? real : ~Mask{};
        const Vec r = real ? reward[k] : zero, v = real ? value[k] : zero;
        const Vec after = bit<A>(flags.done, k) ? zero : !g.next ? next : real ? follows[k] : zero;
        const Vec trace = bit<A>(flags.cut, k) ? zero : advantage;
        const Vec delta = multiply_add<A>(gamma, after, r) - v;
        advantage = live ? multiply_add<A>(decay, trace, delta) : advantage;
        next = live ? v : next;
        value[k] = v + advantage;
      }
      reward[k] = advantage;
    };
    // Masks are mostly runs.
    if (flags.kLooks && flags.steady) {
      const Mask real = bit<A>(flags.real, 0);
#pragma GCC unroll 16
      for (int k = n - 1; k >= 0; --k) step(k, real);
    } else {
#pragma GCC unroll 16
      for (int k = n - 1; k >= 0; --k) step(k, bit<A>(flags.real, k));
    }
    store_steps<T>(reward, advantages, walk);
    store_steps<T>(value, returns, walk);
  }
}

// One scan forwards in time: `a` is what reaches a step's advantage from the outputs and from the step before
// (`trace`), `next` what the step before sends to its value.
template <class T, GaeKind kind>
RK_OUTLINE void gae_backward_steps(const GaeBackward<T>& g, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  using Vec = vec_t<A>;
  using Mask = mask_t<A>;
  constexpr int n = Lanes<A>::n;
  const A gamma = A(g.gamma), decay = A(g.gamma * g.lam);
  const Vec zero = {};
  Vec next = zero, trace = zero, advantage[n], returned[n], follows[n];
  Cursor<const T, A> grad_advantages{g.grad_advantages}, grad_returns{g.grad_returns};
  Cursor<T, A> grad_rewards{g.grad_rewards}, grad_values{g.grad_values}, grad_next{g.grad_next};
  FlagBits<A, kind> flags(g.flags);
  Walk<A, Order::kFromStart> walk(begin, end, g.steps, g.grad_rewards.stride * sizeof(T));
  while (walk.next()) {
    if (walk.turned) {
      const Mask began = walk.began();
      next = began ? zero : next;
      trace = began ? zero : trace;
    }
    load_steps<T>(advantage, grad_advantages, walk);
    load_steps<T>(returned, grad_returns, walk);
    flags.load(walk);
#pragma GCC unroll 16
    for (int k = 0; k < n; ++k) {
      const Mask real = bit<A>(flags.real, k);
      const Vec a = advantage[k] + returned[k] + trace;
      const Vec to_value = returned[k] - a + next;
      if constexpr (kind == GaeKind::kPlain || kind == GaeKind::kZeroed) {
        advantage[k] = kind == GaeKind::kPlain || real ? a : zero;
        returned[k] = kind == GaeKind::kPlain || real ? to_value : zero;
        next = gamma * a;
        trace = decay * a;
      } else {
        advantage[k] = real ? a : zero;
        returned[k] = real ? to_value : zero;
        Vec to_next = gamma * a, to_trace = decay * a;
        Mask live = real;
        if constexpr (kind == GaeKind::kGeneral) {
          to_next = bit<A>(flags.done, k) ? zero : to_next;
          to_trace = bit<A>(flags.cut, k) ? zero : to_trace;
          live = g.flags.carry ? real : ~Mask{};
          follows[k] = real ? to_next : zero;
          to_next = g.grad_next ? zero : to_next;
        }
        next = live ? to_next : next;
        trace = live ? to_trace : a;
      }
    }
    store_steps<T>(advantage, grad_rewards, walk);
    store_steps<T>(returned, grad_values, walk);
    if (kind == GaeKind::kGeneral && g.grad_next) store_steps<T>(follows, grad_next, walk);
    if (g.grad_last && walk.turns()) store_ends<T, A>(&next, g.grad_last, walk);
  }
}

template <class T, GaeKind kind>
void gae_rows(const GaeForward<T>& g, int64_t begin, int64_t end) {
  gae_steps<T, compiled<T>(kind)>(g, begin, end);
}
template <class T, GaeKind kind>
void gae_backward_rows(const GaeBackward<T>& g, int64_t begin, int64_t end) {
  gae_backward_steps<T, compiled<T>(kind)>(g, begin, end);
}
