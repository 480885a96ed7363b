// gae and its gradients on the GPU: a block takes a row, a parallel scan of affine maps along T, tile after
// tile. What is combined in which order depends on T alone.
#include "advantage/planes.h"
#include "common/scan.cuh"

namespace rk {
namespace cuda {
namespace {

constexpr int kSteps = 4;  // steps of one thread in a tile
constexpr int kMaxThreads = 256;

// A step as a map of the state (p, q): p' = f p + h, q' = k p + a q + b. In gae p is the value that follows
// and q the advantage; in the gradients p is what reaches the advantage and q what the steps before send to a
// value.
template <class A>
struct Step {
  A f = 1, h = 0, k = 0, a = 1, b = 0;
};

template <class A>
struct State {
  A p = 0, q = 0;
};

// A factor of 0 forgets even inf and NaN: a step that ends an episode lets nothing through.
template <class A>
__device__ inline A times(A factor, A x) {
  return factor == A(0) ? A(0) : factor * x;
}

template <class A>
__device__ inline Step<A> then(const Step<A>& first, const Step<A>& second) {
  return {second.f * first.f, times(second.f, first.h) + second.h, second.k * first.f + second.a * first.k,
          second.a * first.a, times(second.k, first.h) + times(second.a, first.b) + second.b};
}

template <class A>
__device__ inline State<A> after(const Step<A>& step, const State<A>& s) {
  return {times(step.f, s.p) + step.h, times(step.k, s.p) + times(step.a, s.q) + step.b};
}

// The map of all threads before this one; `total` becomes that of the block.
template <class A>
__device__ Step<A> exclusive_scan(const Step<A>& mine, Step<A>& total) {
  __shared__ A storage[kMaxThreads / kWarp * 5];  // shared memory runs no constructors
  auto* warps = reinterpret_cast<Step<A>*>(storage);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, count = blockDim.x / kWarp;
  const auto combine = [](const Step<A>& first, const Step<A>& second) { return then(first, second); };
  const Step<A> inclusive = warp_scan(mine, combine);
  if (lane == kWarp - 1) warps[warp] = inclusive;
  __syncthreads();
  Step<A> before;
  total = Step<A>();
  for (int w = 0; w < count; ++w) {
    if (w == warp) before = total;
    total = then(total, warps[w]);
  }
  const Step<A> neighbour = shuffle<Shuffle::kUp>(inclusive, 1);
  __syncthreads();  // the next tile writes `warps` again
  return lane == 0 ? before : then(before, neighbour);
}

// What the flags say of one step.
struct Marks {
  bool real, live, done, cut;
};

__device__ inline bool flag(const Plane<const uint8_t>& plane, int64_t row, int64_t t, bool absent) {
  return plane.data ? plane.data[row * plane.stride + t] != 0 : absent;
}

__device__ inline Marks marks(const GaeFlags& flags, int64_t row, int64_t t) {
  const bool real = flag(flags.mask, row, t, true);
  const bool done = flag(flags.done, row, t, false);
  return {real, real || !flags.carry, done, done || flag(flags.truncated, row, t, false)};
}

template <class T>
__device__ inline acc_t<T> element(const Plane<const T>& plane, int64_t row, int64_t t) {
  return load(plane.data[row * plane.stride + t]);
}

// Scans positions 0 .. count - 1: `make` gives the step of a position, `emit` takes the state after it.
template <class A, class Make, class Emit>
__device__ void scan_row(int64_t count, State<A> state, const Make& make, const Emit& emit) {
  const int64_t tile = int64_t(blockDim.x) * kSteps;
  for (int64_t base = 0; base < count; base += tile) {
    const int64_t begin = base + int64_t(threadIdx.x) * kSteps;
    Step<A> steps[kSteps], mine, total;
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      if (begin + i < count) steps[i] = make(begin + i);
      mine = then(mine, steps[i]);
    }
    State<A> s = after(exclusive_scan(mine, total), state);
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      s = after(steps[i], s);
      if (begin + i < count) emit(begin + i, s);
    }
    state = after(total, state);
  }
}

template <class T>
__global__ void __launch_bounds__(kMaxThreads) gae_kernel(GaeForward<T> g) {
  using A = acc_t<T>;
  const int64_t row = blockIdx.x;
  const A gamma = A(g.gamma), decay = A(g.gamma * g.lam);
  State<A> start;
  if (g.last.data) start.p = load(g.last.data[row * g.last.stride]);
  const auto make = [&](int64_t from_end) {
    const int64_t t = g.steps - 1 - from_end;
    const Marks is = marks(g.flags, row, t);
    Step<A> step;
    if (!is.live) return step;
    const A reward = is.real ? element(g.rewards, row, t) : A(0);
    const A value = is.real ? element(g.values, row, t) : A(0);
    step.f = A(0);
    step.h = value;
    step.k = is.done ? A(0) : gamma;
    step.a = is.cut ? A(0) : decay;
    step.b = reward - value;
    if (g.next.data) {
      const A follows = is.real && !is.done ? element(g.next, row, t) : A(0);
      step.k = A(0);
      step.b = reward + gamma * follows - value;
    }
    return step;
  };
  scan_row(g.steps, start, make, [&](int64_t from_end, const State<A>& s) {
    const int64_t t = g.steps - 1 - from_end;
    const A value = flag(g.flags.mask, row, t, true) ? element(g.values, row, t) : A(0);
    g.advantages.data[row * g.advantages.stride + t] = store<T>(s.q);
    g.returns.data[row * g.returns.stride + t] = store<T>(s.q + value);
  });
}

// Position t holds what the step before makes of the state, so that position `steps` is what follows the
// last.
template <class T>
__global__ void __launch_bounds__(kMaxThreads) gae_backward_kernel(GaeBackward<T> g) {
  using A = acc_t<T>;
  const int64_t row = blockIdx.x;
  const A gamma = A(g.gamma), decay = A(g.gamma * g.lam);
  const auto make = [&](int64_t t) {
    Step<A> step;
    if (t > 0) {
      const Marks was = marks(g.flags, row, t - 1);
      if (was.live) {
        step.f = was.cut ? A(0) : decay;
        step.k = was.done || g.grad_next.data ? A(0) : gamma;
        step.a = A(0);
      }
    }
    if (t < g.steps) step.h = element(g.grad_advantages, row, t) + element(g.grad_returns, row, t);
    return step;
  };
  scan_row(g.steps + 1, State<A>(), make, [&](int64_t t, const State<A>& s) {
    if (t == g.steps) {
      if (g.grad_last.data) g.grad_last.data[row * g.grad_last.stride] = store<T>(s.q);
      return;
    }
    const Marks is = marks(g.flags, row, t);
    const A to_value = element(g.grad_returns, row, t) - s.p + s.q;
    g.grad_rewards.data[row * g.grad_rewards.stride + t] = store<T>(is.real ? s.p : A(0));
    g.grad_values.data[row * g.grad_values.stride + t] = store<T>(is.real ? to_value : A(0));
    if (g.grad_next.data) {
      const A to_next = is.real && !is.done ? gamma * s.p : A(0);
      g.grad_next.data[row * g.grad_next.stride + t] = store<T>(to_next);
    }
  });
}

// Threads of a block: one tile where that suffices.
int threads(int64_t positions) {
  const int64_t wanted = ceil_div(ceil_div(positions, kSteps), kWarp) * kWarp;
  return int(wanted < kMaxThreads ? wanted : kMaxThreads);
}

std::tuple<Tensor, Tensor> gae_general(const Tensor& rewards, const Tensor& values,
                                       const std::optional<Tensor>& mask, const std::optional<Tensor>& done,
                                       const std::optional<Tensor>& truncated,
                                       const std::optional<Tensor>& next_value, double gamma, double lam,
                                       bool carry, int64_t) {
  const OnDevice on(rewards);
  Planes planes(rewards);
  Tensor advantages = planes.empty(), returns = planes.empty();
  if (planes.steps() == 0) return {advantages, returns};
  dispatch_float(planes.dtype(), "gae", [&](auto zero) {
    using T = decltype(zero);
    GaeForward<T> g{};
    g.rewards = planes.matrix<T>(rewards);
    g.values = planes.matrix<T>(values);
    if (next_value) {
      if (next_value->dim() == 2)
        g.next = planes.matrix<T>(*next_value);
      else
        g.last = planes.column<T>(*next_value);
    }
    g.flags = planes.flags(mask, done, truncated, carry);
    g.advantages = written<T>(advantages);
    g.returns = written<T>(returns);
    g.rows = planes.rows();
    g.steps = planes.steps();
    g.gamma = gamma;
    g.lam = lam;
    launch(on, gae_kernel<T>, g.rows, threads(g.steps), 0, g);
  });
  return {advantages, returns};
}

std::tuple<Tensor, Tensor> gae(const Tensor& rewards, const Tensor& values, const std::optional<Tensor>& mask,
                               double gamma, double lam, int64_t grain) {
  return gae_general(rewards, values, mask, {}, {}, {}, gamma, lam, true, grain);
}

std::tuple<Tensor, Tensor, Tensor> gae_backward(const Tensor& grad, const Tensor& grad_returns,
                                                const std::optional<Tensor>& mask,
                                                const std::optional<Tensor>& done,
                                                const std::optional<Tensor>& truncated, int64_t next_dims,
                                                double gamma, double lam, bool carry, int64_t) {
  const OnDevice on(grad);
  Planes planes(grad);
  Tensor grad_rewards = planes.empty(), grad_values = planes.empty();
  const int64_t sizes[2] = {next_dims ? planes.rows() : 0, planes.steps()};
  Tensor grad_next = empty_as(grad, sizes, next_dims == 2 ? 2 : 1, planes.dtype());
  dispatch_float(planes.dtype(), "gae_backward", [&](auto zero) {
    using T = decltype(zero);
    GaeBackward<T> g{};
    g.grad_advantages = planes.matrix<T>(grad);
    g.grad_returns = planes.matrix<T>(grad_returns);
    g.flags = planes.flags(mask, done, truncated, carry);
    g.grad_rewards = written<T>(grad_rewards);
    g.grad_values = written<T>(grad_values);
    if (next_dims) (next_dims == 2 ? g.grad_next : g.grad_last) = written<T>(grad_next);
    g.rows = planes.rows();
    g.steps = planes.steps();
    g.gamma = gamma;
    g.lam = lam;
    launch(on, gae_backward_kernel<T>, g.rows, threads(g.steps + 1), 0, g);
  });
  return {grad_rewards, grad_values, grad_next};
}

}  // namespace
}  // namespace cuda
}  // namespace rk

STABLE_TORCH_LIBRARY_IMPL(rlhf_kernels_native, CUDA, m) {
  m.impl("gae", TORCH_BOX(&rk::cuda::gae));
  m.impl("gae_general", TORCH_BOX(&rk::cuda::gae_general));
  m.impl("gae_backward", TORCH_BOX(&rk::cuda::gae_backward));
}
