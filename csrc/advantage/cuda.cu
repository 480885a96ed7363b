// gae and its gradients on the GPU: a block takes a row, a parallel scan of affine maps along T, tile after
// tile. A thread has one vector of neighbouring steps, aligned or not, so that what is combined in which
// order depends on T alone.
#include "advantage/planes.h"
#include "common/scan.cuh"
#include "common/vectors.cuh"

namespace rk {
namespace cuda {
namespace {

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

// The flags of one thread's vector of steps, a bit for each; none is set beyond the row.
struct Marks {
  unsigned real, live, done, cut;
};

template <class T>
__device__ inline T* at(const Plane<T>& plane, int64_t row, int64_t t) {
  return plane.data ? plane.data + row * plane.stride + t : nullptr;
}

template <class T, bool kAligned>
__device__ inline Marks read_marks(const GaeFlags& flags, int64_t row, int64_t t, int64_t n) {
  const auto bits = [&](const Plane<const uint8_t>& plane) {
    return read_bits<T, kAligned>(at(plane, row, t), n);
  };
  Marks is;
  is.real = bits(flags.mask);
  is.live = flags.carry ? is.real : bits({});
  is.done = flags.done.data ? bits(flags.done) : 0;
  is.cut = is.done | (flags.truncated.data ? bits(flags.truncated) : 0);
  return is;
}

__device__ inline bool bit(unsigned bits, int i) {
  return bits >> i & 1;
}

// A thread's vector, with 0 where it is not real.
template <class T, bool kAligned>
__device__ inline void read_real(const Plane<const T>& plane, int64_t row, int64_t t, int64_t n,
                                 unsigned real, acc_t<T>* to) {
  read_vector<T, kAligned>(at(plane, row, t), n, to);
#pragma unroll
  for (int i = 0; i < kVector<T>; ++i) to[i] = bit(real, i) ? to[i] : acc_t<T>(0);
}

// How many of `most` steps from t on the row has.
__device__ inline int64_t extent(int64_t t, int64_t steps, int64_t most) {
  return t < 0 || t >= steps ? 0 : steps - t < most ? steps - t : most;
}

template <class T, bool kAligned>
__global__ void __launch_bounds__(kMaxThreads) gae_kernel(GaeForward<T> g) {
  using A = acc_t<T>;
  constexpr int k = kVector<T>;
  const int64_t row = blockIdx.x, vectors = ceil_div(g.steps, k);
  const A gamma = A(g.gamma), decay = A(g.gamma * g.lam);
  State<A> state;
  if (g.last.data) state.p = load(*at(g.last, row, 0));
  for (int64_t base = 0; base < vectors; base += blockDim.x) {
    const int64_t t = (vectors - 1 - base - threadIdx.x) * k, n = extent(t, g.steps, k);
    const Marks is = read_marks<T, kAligned>(g.flags, row, t, n);
    A delta[k], value[k], follows[k];  // delta without what the value that follows adds
    read_real<T, kAligned>(g.rewards, row, t, n, is.real, delta);
    read_real<T, kAligned>(g.values, row, t, n, is.real, value);
    if (g.next.data) read_real<T, kAligned>(g.next, row, t, n, is.real & ~is.done, follows);
    Step<A> mine, total;
#pragma unroll
    for (int i = k - 1; i >= 0; --i) {
      delta[i] = g.next.data ? delta[i] + gamma * follows[i] - value[i] : delta[i] - value[i];
      const A next = g.next.data || bit(is.done, i) ? A(0) : gamma;
      if (bit(is.live, i)) mine = then(mine, {A(0), value[i], next, bit(is.cut, i) ? A(0) : decay, delta[i]});
    }
    State<A> s = after(exclusive_scan(mine, total), state);
#pragma unroll
    for (int i = k - 1; i >= 0; --i) {
      const A next = g.next.data || bit(is.done, i) ? A(0) : gamma * s.p;
      if (bit(is.live, i)) s = {value[i], delta[i] + next + (bit(is.cut, i) ? A(0) : decay * s.q)};
      delta[i] = s.q;
      value[i] += s.q;
    }
    write_vector<T, kAligned>(delta, n, at(g.advantages, row, t));
    write_vector<T, kAligned>(value, n, at(g.returns, row, t));
    state = after(total, state);
  }
}

template <class T, bool kAligned>
__global__ void __launch_bounds__(kMaxThreads) gae_backward_kernel(GaeBackward<T> g) {
  using A = acc_t<T>;
  constexpr int k = kVector<T>;
  const int64_t row = blockIdx.x, vectors = ceil_div(g.steps, k);
  const A gamma = A(g.gamma), decay = A(g.gamma * g.lam);
  State<A> state;
  for (int64_t base = 0; base < vectors; base += blockDim.x) {
    const int64_t t = (base + threadIdx.x) * k, n = extent(t, g.steps, k);
    const Marks is = read_marks<T, kAligned>(g.flags, row, t, n);
    A advantage[k], returned[k], follows[k];
    read_vector<T, kAligned>(at(g.grad_advantages, row, t), n, advantage);
    read_vector<T, kAligned>(at(g.grad_returns, row, t), n, returned);
    Step<A> mine, total;
#pragma unroll
    for (int i = 0; i < k; ++i) {
      const A trace = bit(is.cut, i) ? A(0) : decay,
              next = g.grad_next.data || bit(is.done, i) ? A(0) : gamma;
      const A x = advantage[i] + returned[i];
      mine = then(mine, bit(is.live, i) ? Step<A>{trace, trace * x, next, A(0), next * x}
                                        : Step<A>{A(1), x, A(0), A(1), A(0)});
    }
    State<A> s = after(exclusive_scan(mine, total), state);
#pragma unroll
    for (int i = 0; i < k; ++i) {
      const A a = advantage[i] + returned[i] + s.p, to_value = returned[i] - a + s.q;
      const A to_next = bit(is.done, i) ? A(0) : gamma * a;
      advantage[i] = bit(is.real, i) ? a : A(0);
      returned[i] = bit(is.real, i) ? to_value : A(0);
      follows[i] = bit(is.real, i) ? to_next : A(0);
      const A sent = g.grad_next.data ? A(0) : to_next;
      s = bit(is.live, i) ? State<A>{bit(is.cut, i) ? A(0) : decay * a, sent} : State<A>{a, s.q};
    }
    write_vector<T, kAligned>(advantage, n, at(g.grad_rewards, row, t));
    write_vector<T, kAligned>(returned, n, at(g.grad_values, row, t));
    if (g.grad_next.data) write_vector<T, kAligned>(follows, n, at(g.grad_next, row, t));
    state = after(total, state);
  }
  if (g.grad_last.data && threadIdx.x == 0) *at(g.grad_last, row, 0) = store<T>(state.q);
}

// Whether vectors of this many bytes can be read from every row.
template <class T>
bool aligned(const Plane<T>& plane, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(plane.data) % bytes == 0 && plane.stride * sizeof(T) % bytes == 0;
}

template <class T>
bool aligned(const GaeFlags& flags) {
  return aligned(flags.mask, kVector<T>) && aligned(flags.done, kVector<T>) &&
         aligned(flags.truncated, kVector<T>);
}

// A block for each row, of as many threads as it has vectors if that suffices.
template <class T, class Problem>
void launch_rows(const OnDevice& on, const Problem& g, bool is_aligned, void (*vectors)(Problem),
                 void (*elements)(Problem)) {
  const int64_t wanted = ceil_div(g.steps, kVector<T> * kWarp) * kWarp;
  const int threads = int(wanted < kWarp ? kWarp : wanted < kMaxThreads ? wanted : kMaxThreads);
  launch(on, is_aligned ? vectors : elements, g.rows, threads, 0, g);
}

std::tuple<Tensor, Tensor> gae(const Tensor& rewards, const Tensor& values, const std::optional<Tensor>& mask,
                               const std::optional<Tensor>& done, const std::optional<Tensor>& truncated,
                               const std::optional<Tensor>& next_value, double gamma, double lam, bool carry,
                               int64_t) {
  const OnDevice on(rewards);
  return gae_results(rewards, values, mask, done, truncated, next_value, gamma, lam, carry,
                     [&]<class T>(const GaeForward<T>& g) {
                       const bool all = aligned(g.rewards, 16) && aligned(g.values, 16) &&
                                        aligned(g.next, 16) && aligned(g.advantages, 16) &&
                                        aligned<T>(g.flags);
                       launch_rows<T>(on, g, all, gae_kernel<T, true>, gae_kernel<T, false>);
                     });
}

std::tuple<Tensor, Tensor> gae_common(const Tensor& rewards, const Tensor& values, double gamma, double lam,
                                      const std::optional<Tensor>& mask, int64_t grain) {
  return gae(rewards, values, mask, {}, {}, {}, gamma, lam, true, grain);
}

std::tuple<Tensor, Tensor, Tensor> gae_backward(const Tensor& grad, const Tensor& grad_returns,
                                                const std::optional<Tensor>& mask,
                                                const std::optional<Tensor>& done,
                                                const std::optional<Tensor>& truncated, int64_t next_dims,
                                                double gamma, double lam, bool carry, int64_t) {
  const OnDevice on(grad);
  return gae_gradients(grad, grad_returns, mask, done, truncated, next_dims, gamma, lam, carry,
                       [&]<class T>(const GaeBackward<T>& g) {
                         const bool all = aligned(g.grad_advantages, 16) && aligned(g.grad_returns, 16) &&
                                          aligned(g.grad_rewards, 16) && aligned<T>(g.flags);
                         launch_rows<T>(on, g, all, gae_backward_kernel<T, true>,
                                        gae_backward_kernel<T, false>);
                       });
}

}  // namespace
}  // namespace cuda
}  // namespace rk

STABLE_TORCH_LIBRARY_IMPL(rlhf_kernels_native, CUDA, m) {
  m.impl("gae_common", TORCH_BOX(&rk::cuda::gae_common));
  m.impl("gae", TORCH_BOX(&rk::cuda::gae));
  m.impl("gae_backward", TORCH_BOX(&rk::cuda::gae_backward));
}
