// masked_normalize on the GPU: moments by chunks into a workspace, merged by every block in one order, then
// the affine map. A row of at most kLong elements is one block's, without a workspace. No atomics, nothing
// waits for the host. A row's arithmetic depends on its length alone: unaligned rows take the same elements
// to the same threads.
#include "common/cuda.cuh"
#include "common/scan.cuh"
#include "common/vectors.cuh"
#include "normalize/moments.h"

namespace rk {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kLong = 16384;
constexpr int64_t kChunks = 1024;

// A thread holds this many vectors in registers at a time.
template <class T>
constexpr int kGroup = sizeof(T) == 2 ? 2 : 4;
template <class T>
constexpr int kHeld = kVector<T> * kGroup<T>;
template <class T>
constexpr int64_t kTile = int64_t(kThreads) * kHeld<T>;

// Rows of the inputs, of which a block takes one chunk.
struct Layout {
  int64_t x_stride, mask_stride, grad_stride, length, chunk, chunks;
};

struct Share {
  int64_t row, begin, size;

  __device__ explicit Share(const Layout& at) {
    row = int64_t(blockIdx.x) / at.chunks;
    begin = (int64_t(blockIdx.x) % at.chunks) * at.chunk;
    size = at.length - begin < at.chunk ? at.length - begin : at.chunk;
  }
};

__device__ inline const uint8_t* shifted(const uint8_t* mask, int64_t by) {
  return mask ? mask + by : nullptr;
}

// The sum over the block; adding commutes, so that every thread gets the same bits.
template <class V>
__device__ V block_sum(V mine) {
  __shared__ double scratch[kWarp * sizeof(V) / sizeof(double)];  // shared memory runs no constructors
  return block_reduce(mine, V(), reinterpret_cast<V*>(scratch), [](V a, const V& b) {
    a.merge(b);
    return a;
  });
}

struct Weighted {
  double count = 0, sum = 0;
  __device__ void merge(const Weighted& other) {
    count += other.count;
    sum += other.sum;
  }
};

struct Squares {
  double sum = 0;
  __device__ void merge(const Squares& other) { sum += other.sum; }
};

// Moments over the block: first the mean of the means, then the squares about it. `each(f)` gives f the
// moments that this thread brings.
template <class Each>
__device__ Moments pooled(const Each& each) {
  Weighted weighted;
  each([&](const Moments& m) { weighted.merge({double(m.count), double(m.count) * m.mean}); });
  weighted = block_sum(weighted);
  const double mean = weighted.sum / (weighted.count > 0 ? weighted.count : 1.0);
  Squares squares;
  each([&](const Moments& m) {
    squares.sum += m.squares + double(m.count) * (m.mean - mean) * (m.mean - mean);
  });
  return {int64_t(weighted.count), mean, block_sum(squares).sum};
}

template <class T, bool kAligned>
__device__ Moments moments_of(const T* x, const uint8_t* mask, int64_t size) {
  using A = acc_t<T>;
  Moments mine;
  for (int64_t tile = int64_t(threadIdx.x) * kVector<T>; tile < size; tile += kTile<T>) {
    A values[kHeld<T>];
    unsigned real[kGroup<T>];
    int count = 0;
    A sum = 0;
#pragma unroll
    for (int g = 0; g < kGroup<T>; ++g) {
      const int64_t i = tile + int64_t(g) * kThreads * kVector<T>;
      read_vector<T, kAligned>(x + i, size - i, values + g * kVector<T>);
      real[g] = read_bits<T, kAligned>(shifted(mask, i), size - i);
    }
#pragma unroll
    for (int e = 0; e < kHeld<T>; ++e) {
      const bool is_real = real[e / kVector<T>] >> (e % kVector<T>)&1u;
      count += is_real;
      sum += is_real ? values[e] : A(0);
    }
    const A many = A(count > 0 ? count : 1);
    const A mean = sum / many;
    A rest = 0, squares = 0;
#pragma unroll
    for (int e = 0; e < kHeld<T>; ++e) {
      const bool is_real = real[e / kVector<T>] >> (e % kVector<T>)&1u;
      const A d = is_real ? values[e] - mean : A(0);
      rest += d;
      squares += d * d;
    }
    // What the rounded mean left over is taken back out.
    mine.merge({count, double(mean) + double(rest / many), double(squares) - double(rest * rest / many)});
  }
  return pooled([&](const auto& f) { f(mine); });
}

// A row's moments and gradient sums from those of its chunks.
__device__ Moments merged(const Moments* parts, const Layout& at, int64_t row) {
  return pooled([&](const auto& f) {
    for (int64_t c = threadIdx.x; c < at.chunks; c += kThreads) f(parts[row * at.chunks + c]);
  });
}

__device__ GradientSums merged(const GradientSums* parts, const Layout& at, int64_t row) {
  GradientSums mine;
  for (int64_t c = threadIdx.x; c < at.chunks; c += kThreads) mine.merge(parts[row * at.chunks + c]);
  return block_sum(mine);
}

template <class T, bool kAligned>
__device__ GradientSums sums_of(const T* grad, const T* x, const uint8_t* mask, int64_t size, double mean,
                                bool all_finite) {
  using A = acc_t<T>;
  const Center<A> center(mean);
  A total = 0, along = 0;
  for (int64_t i = int64_t(threadIdx.x) * kVector<T>; i < size; i += int64_t(kThreads) * kVector<T>) {
    A values[kVector<T>], grads[kVector<T>];
    read_vector<T, kAligned>(x + i, size - i, values);
    read_vector<T, kAligned>(grad + i, size - i, grads);
    const unsigned real = read_bits<T, kAligned>(shifted(mask, i), size - i);
#pragma unroll
    for (int v = 0; v < kVector<T>; ++v) {
      // Beyond the end the gradient is 0.
      const bool counts = (real >> v & 1u) || (all_finite && values[v] - values[v] == A(0));
      total += counts ? grads[v] : A(0);
      along += counts ? grads[v] * center(values[v]) : A(0);
    }
  }
  return block_sum(GradientSums{double(total), double(along)});
}

template <class T, bool kAligned>
__global__ void __launch_bounds__(kThreads)
    moments_kernel(const T* x, const uint8_t* mask, Moments* parts, Layout at) {
  const Share share(at);
  const Moments all =
      moments_of<T, kAligned>(x + share.row * at.x_stride + share.begin,
                              shifted(mask, share.row * at.mask_stride + share.begin), share.size);
  if (threadIdx.x == 0) parts[blockIdx.x] = all;
}

template <class T, bool kAligned>
__global__ void __launch_bounds__(kThreads)
    forward_kernel(const T* x, const uint8_t* mask, const Moments* parts, T* out, Layout at,
                   NormalizeOptions options) {
  using A = acc_t<T>;
  const Share share(at);
  x += share.row * at.x_stride + share.begin;
  mask = shifted(mask, share.row * at.mask_stride + share.begin);
  out += share.row * at.length + share.begin;
  const ForwardMap<A> map(parts ? merged(parts, at, share.row) : moments_of<T, kAligned>(x, mask, share.size),
                          options);
  for (int64_t i = int64_t(threadIdx.x) * kVector<T>; i < share.size; i += int64_t(kThreads) * kVector<T>) {
    A values[kVector<T>];
    read_vector<T, kAligned>(x + i, share.size - i, values);
    const unsigned kept =
        options.zero_masked ? read_bits<T, kAligned>(shifted(mask, i), share.size - i) : ~0u;
#pragma unroll
    for (int v = 0; v < kVector<T>; ++v) values[v] = kept >> v & 1u ? map(values[v]) : A(0);
    write_vector<T, kAligned>(values, share.size - i, out + i);
  }
}

template <class T, bool kAligned>
__global__ void __launch_bounds__(kThreads)
    sums_kernel(const T* grad, const T* x, const uint8_t* mask, const Moments* parts, GradientSums* sums,
                Layout at, bool all_finite) {
  const Share share(at);
  const double mean = merged(parts, at, share.row).mean;
  const GradientSums all = sums_of<T, kAligned>(
      grad + share.row * at.grad_stride + share.begin, x + share.row * at.x_stride + share.begin,
      shifted(mask, share.row * at.mask_stride + share.begin), share.size, mean, all_finite);
  if (threadIdx.x == 0) sums[blockIdx.x] = all;
}

template <class T, bool kAligned>
__global__ void __launch_bounds__(kThreads)
    backward_kernel(const T* grad, const T* x, const uint8_t* mask, const Moments* parts,
                    const GradientSums* sums, T* out, Layout at, NormalizeOptions options) {
  using A = acc_t<T>;
  const Share share(at);
  grad += share.row * at.grad_stride + share.begin;
  x += share.row * at.x_stride + share.begin;
  mask = shifted(mask, share.row * at.mask_stride + share.begin);
  out += share.row * at.length + share.begin;
  const Moments moments = parts ? merged(parts, at, share.row) : moments_of<T, kAligned>(x, mask, share.size);
  const GradientSums all =
      sums ? merged(sums, at, share.row)
           : sums_of<T, kAligned>(grad, x, mask, share.size, moments.mean, !options.zero_masked);
  const BackwardMap<A> map(moments, all, options);
  for (int64_t i = int64_t(threadIdx.x) * kVector<T>; i < share.size; i += int64_t(kThreads) * kVector<T>) {
    A values[kVector<T>], grads[kVector<T>];
    read_vector<T, kAligned>(x + i, share.size - i, values);
    read_vector<T, kAligned>(grad + i, share.size - i, grads);
    const unsigned real = read_bits<T, kAligned>(shifted(mask, i), share.size - i);
#pragma unroll
    for (int v = 0; v < kVector<T>; ++v) {
      values[v] = real >> v & 1u        ? map.real(grads[v], values[v])
                  : options.zero_masked ? A(0)
                                        : map.masked(grads[v]);
    }
    write_vector<T, kAligned>(values, share.size - i, out + i);
  }
}

// Rows of `length` contiguous elements; a copy where the trailing dimensions are strided.
Rows long_rows(const Tensor& t, int64_t length) {
  const Rows rows = as_rows(t);
  if (rows.cols == length) return rows;
  const int64_t count = t.numel() / length;
  if (rows.stride == rows.cols) return {rows.tensor, count, length, length};
  return {torch::stable::contiguous(t), count, length, length};
}

bool aligned(const Rows& rows, int64_t itemsize, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(rows.tensor.data_ptr()) % bytes == 0 &&
         (rows.rows == 1 || rows.stride * itemsize % bytes == 0);
}

// Inputs as rows, and how blocks share them.
struct Problem {
  Rows x;
  std::optional<Rows> mask, grad;
  Layout at;

  Problem(const Tensor& x_, const std::optional<Tensor>& mask_, const Tensor* grad_, int64_t trailing,
          int64_t tile) {
    int64_t length = 1;
    for (int64_t d = x_.dim() - trailing; d < x_.dim(); ++d) length *= x_.size(d);
    x = long_rows(x_, length);
    if (mask_) mask = long_rows(*mask_, length);
    if (grad_) grad = long_rows(*grad_, length);
    const int64_t chunk = length <= kLong ? length : tile * ceil_div(length, tile * kChunks);
    at = {x.stride, mask ? mask->stride : 0, grad ? grad->stride : 0, length, chunk, ceil_div(length, chunk)};
  }

  int64_t blocks() const { return x.rows * at.chunks; }
  const uint8_t* real() const { return mask ? mask->data<uint8_t>() : nullptr; }

  template <class T>
  bool vectors() const {
    constexpr int64_t kSize = sizeof(T);
    return aligned(x, kSize, 16) && (!mask || aligned(*mask, 1, kVector<T>)) &&
           (!grad || aligned(*grad, kSize, 16)) && (x.rows == 1 || at.length * kSize % 16 == 0);
  }

  // Memory for one value per chunk; nothing where a block holds a whole row.
  template <class V>
  std::optional<Tensor> workspace() const {
    if (at.chunks == 1) return std::nullopt;
    const int64_t size = blocks() * int64_t(sizeof(V) / sizeof(double));
    return empty_as(x.tensor, &size, 1, ScalarType::Double);
  }
};

template <class V>
V* values(const std::optional<Tensor>& workspace) {
  return workspace ? static_cast<V*>(workspace->data_ptr()) : nullptr;
}

void check(const Tensor& x, const std::optional<Tensor>& mask, int64_t trailing) {
  STD_TORCH_CHECK(trailing >= 0 && trailing <= x.dim(), "masked_normalize: ", trailing,
                  " trailing dimensions of ", x.dim());
  STD_TORCH_CHECK(!mask || (mask->scalar_type() == ScalarType::Bool && mask->numel() == x.numel() &&
                            mask->get_device_index() == x.get_device_index()),
                  "masked_normalize: the mask must be boolean, of x's shape and on x's device");
}

template <class F>
void with_alignment(bool vectors, const F& f) {
  vectors ? f(std::true_type()) : f(std::false_type());
}

Tensor masked_normalize(const Tensor& x, const std::optional<Tensor>& mask, int64_t trailing, double eps,
                        int64_t flags, int64_t) {
  check(x, mask, trailing);
  const OnDevice on(x);
  Tensor out = new_like(x);
  if (x.numel() == 0) return out;
  dispatch_float(x.scalar_type(), "masked_normalize", [&](auto zero) {
    using T = decltype(zero);
    const Problem problem(x, mask, nullptr, trailing, kTile<T>);
    const auto parts = problem.workspace<Moments>();
    with_alignment(problem.vectors<T>(), [&](auto vectors) {
      constexpr bool kAligned = decltype(vectors)::value;
      const T* from = problem.x.data<T>();
      if (parts)
        launch(on, moments_kernel<T, kAligned>, problem.blocks(), kThreads, 0, from, problem.real(),
               values<Moments>(parts), problem.at);
      launch(on, forward_kernel<T, kAligned>, problem.blocks(), kThreads, 0, from, problem.real(),
             values<Moments>(parts), static_cast<T*>(out.data_ptr()), problem.at,
             NormalizeOptions::of(eps, flags));
    });
  });
  return out;
}

Tensor masked_normalize_backward(const Tensor& grad, const Tensor& x, const std::optional<Tensor>& mask,
                                 int64_t trailing, double eps, int64_t flags, int64_t) {
  check(x, mask, trailing);
  STD_TORCH_CHECK(grad.numel() == x.numel() && grad.scalar_type() == x.scalar_type() &&
                      grad.get_device_index() == x.get_device_index(),
                  "masked_normalize_backward: the gradient does not fit x");
  const OnDevice on(x);
  Tensor out = new_like(x);
  if (x.numel() == 0) return out;
  dispatch_float(x.scalar_type(), "masked_normalize_backward", [&](auto zero) {
    using T = decltype(zero);
    const auto options = NormalizeOptions::of(eps, flags);
    const Problem problem(x, mask, &grad, trailing, kTile<T>);
    const auto parts = problem.workspace<Moments>();
    const auto sums = problem.workspace<GradientSums>();
    with_alignment(problem.vectors<T>(), [&](auto vectors) {
      constexpr bool kAligned = decltype(vectors)::value;
      const T *from = problem.x.data<T>(), *dy = problem.grad->data<T>();
      if (parts) {
        launch(on, moments_kernel<T, kAligned>, problem.blocks(), kThreads, 0, from, problem.real(),
               values<Moments>(parts), problem.at);
        launch(on, sums_kernel<T, kAligned>, problem.blocks(), kThreads, 0, dy, from, problem.real(),
               values<Moments>(parts), values<GradientSums>(sums), problem.at, !options.zero_masked);
      }
      launch(on, backward_kernel<T, kAligned>, problem.blocks(), kThreads, 0, dy, from, problem.real(),
             values<Moments>(parts), values<GradientSums>(sums), static_cast<T*>(out.data_ptr()), problem.at,
             options);
    });
  });
  return out;
}

}  // namespace
}  // namespace cuda
}  // namespace rk

STABLE_TORCH_LIBRARY_IMPL(rlhf_kernels_native, CUDA, m) {
  m.impl("masked_normalize", TORCH_BOX(&rk::cuda::masked_normalize));
  m.impl("masked_normalize_backward", TORCH_BOX(&rk::cuda::masked_normalize_backward));
}
