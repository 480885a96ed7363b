// masked_normalize on the CPU: schema, memory-safety checks, blocks and rows in parallel.
#include <algorithm>
#include <cstring>

#include "common/tensor.h"
#include "normalize/moments.h"
#define RK_ROWS "normalize/rows.h"
#include "common/foreach_isa.h"

namespace rk {
namespace {

// From this length on a row is shared between threads, block by block.
constexpr int64_t kShared = 64 * kBlock;

// A tensor as one sequence of elements in logical order, read a block at a time.
template <class T>
class Source {
 public:
  explicit Source(const Rows& rows)
      : data_(rows.data<T>()), cols_(rows.cols), stride_(rows.stride), flat_(rows.stride == rows.cols) {}

  // n <= kBlock elements from `begin` on; copied into the buffer where they do not lie side by side.
  const T* read(int64_t begin, int64_t n, T* buffer) const {
    if (flat_) return data_ + begin;
    int64_t row = begin / cols_, col = begin % cols_;
    if (col + n <= cols_) return data_ + row * stride_ + col;
    for (int64_t done = 0; done < n; ++row, col = 0) {
      const int64_t run = std::min(cols_ - col, n - done);
      std::memcpy(buffer + done, data_ + row * stride_ + col, run * sizeof(T));
      done += run;
    }
    return buffer;
  }

 private:
  const T* data_;
  int64_t cols_, stride_;
  bool flat_;
};

// The inputs of a call: rows of `length` elements, each a sequence of blocks.
template <class T>
struct Problem {
  Source<T> x;
  std::optional<Source<uint8_t>> mask;
  int64_t rows, length, grain;
  NormalizeOptions options;

  bool shared() const { return length > kBlock && (rows == 1 || length >= kShared); }

  // f(begin, n) for the blocks of a row.
  template <class F>
  void each_block(int64_t row, const F& f) const {
    const int64_t blocks = (length + kBlock - 1) / kBlock;
    const auto run = [&](int64_t first, int64_t last) {
      for (int64_t b = first; b < last; ++b)
        f(row * length + b * kBlock, std::min(kBlock, length - b * kBlock));
    };
    shared() ? parallel_rows(blocks, kBlock, grain, run) : run(0, blocks);
  }

  // The blocks' values f(begin, n), merged in order.
  template <class V, class F>
  V reduce(int64_t row, const F& f) const {
    std::vector<V> parts(shared() ? (length + kBlock - 1) / kBlock : 0);
    V merged;
    each_block(row, [&](int64_t begin, int64_t n) {
      if (parts.empty())
        merged.merge(f(begin, n));
      else
        parts[(begin - row * length) / kBlock] = f(begin, n);
    });
    for (const V& part : parts) merged.merge(part);
    return merged;
  }

  template <class F>
  void each_row(const F& f) const {
    const auto run = [&](int64_t first, int64_t last) {
      for (int64_t r = first; r < last; ++r) f(r);
    };
    shared() ? run(0, rows) : parallel_rows(rows, length, grain, run);
  }

  const uint8_t* read_mask(int64_t begin, int64_t n, uint8_t* buffer) const {
    return mask ? mask->read(begin, n, buffer) : nullptr;
  }

  Moments moments(int64_t row) const {
    const auto kernel = RK_PICK(normalize_moments<T>);
    return reduce<Moments>(row, [&](int64_t begin, int64_t n) {
      T values[kBlock];
      uint8_t bytes[kBlock];
      return kernel(x.read(begin, n, values), read_mask(begin, n, bytes), n);
    });
  }
};

void check(const Tensor& x, const std::optional<Tensor>& mask, int64_t trailing) {
  STD_TORCH_CHECK(trailing >= 0 && trailing <= x.dim(), "masked_normalize: ", trailing,
                  " trailing dimensions of ", x.dim());
  if (!mask) return;
  STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool && mask->dim() == x.dim(),
                  "masked_normalize: the mask must be boolean, with the shape of x");
  for (int64_t d = 0; d < x.dim(); ++d)
    STD_TORCH_CHECK(mask->size(d) == x.size(d), "masked_normalize: the mask must have the shape of x");
}

// Keeps copies of strided tensors alive while f(problem) runs.
template <class T, class F>
void with_problem(const Tensor& x, const std::optional<Tensor>& mask, int64_t trailing, int64_t grain,
                  const NormalizeOptions& options, const F& f) {
  int64_t length = 1;
  for (int64_t d = x.dim() - trailing; d < x.dim(); ++d) length *= x.size(d);
  const Rows values = as_rows(x);
  std::optional<Rows> real;
  if (mask) real = as_rows(*mask);
  Problem<T> problem{Source<T>(values), std::nullopt, x.numel() / length, length, grain, options};
  if (real) problem.mask.emplace(*real);
  f(problem);
}

Tensor masked_normalize(const Tensor& x, const std::optional<Tensor>& mask, int64_t trailing, double eps,
                        int64_t flags, int64_t grain) {
  check(x, mask, trailing);
  Tensor out = new_like(x);
  if (x.numel() == 0) return out;
  dispatch_float(x.scalar_type(), "masked_normalize", [&](auto zero) {
    using T = decltype(zero);
    T* to = static_cast<T*>(out.data_ptr());
    const auto kernel = RK_PICK(normalize_block<T>);
    const auto options = NormalizeOptions::of(eps, flags);
    with_problem<T>(x, mask, trailing, grain, options, [&](const Problem<T>& problem) {
      problem.each_row([&](int64_t row) {
        const ForwardMap<acc_t<T>> map(problem.moments(row), options);
        problem.each_block(row, [&](int64_t begin, int64_t n) {
          T values[kBlock];
          uint8_t bytes[kBlock];
          const uint8_t* hidden = options.zero_masked ? problem.read_mask(begin, n, bytes) : nullptr;
          kernel(problem.x.read(begin, n, values), hidden, to + begin, n, map);
        });
      });
    });
  });
  return out;
}

Tensor masked_normalize_backward(const Tensor& grad, const Tensor& x, const std::optional<Tensor>& mask,
                                 int64_t trailing, double eps, int64_t flags, int64_t grain) {
  check(x, mask, trailing);
  STD_TORCH_CHECK(grad.numel() == x.numel() && grad.scalar_type() == x.scalar_type(),
                  "masked_normalize_backward: the gradient does not fit x");
  Tensor out = new_like(x);
  if (x.numel() == 0) return out;
  dispatch_float(x.scalar_type(), "masked_normalize_backward", [&](auto zero) {
    using T = decltype(zero);
    T* to = static_cast<T*>(out.data_ptr());
    const Rows grad_rows = as_rows(grad);
    const Source<T> dy(grad_rows);
    const auto sums_of = RK_PICK(normalize_gradient_sums<T>);
    const auto kernel = RK_PICK(normalize_gradient_block<T>);
    const auto options = NormalizeOptions::of(eps, flags);
    with_problem<T>(x, mask, trailing, grain, options, [&](const Problem<T>& problem) {
      problem.each_row([&](int64_t row) {
        const Moments moments = problem.moments(row);
        const Center<acc_t<T>> about(moments.mean);
        const auto sums = problem.template reduce<GradientSums>(row, [&](int64_t begin, int64_t n) {
          T values[kBlock], grads[kBlock];
          uint8_t bytes[kBlock];
          return sums_of(dy.read(begin, n, grads), problem.x.read(begin, n, values),
                         problem.read_mask(begin, n, bytes), n, !options.zero_masked, about);
        });
        const BackwardMap<acc_t<T>> map(moments, sums, options);
        problem.each_block(row, [&](int64_t begin, int64_t n) {
          T values[kBlock], grads[kBlock];
          uint8_t bytes[kBlock];
          kernel(dy.read(begin, n, grads), problem.x.read(begin, n, values),
                 problem.read_mask(begin, n, bytes), to + begin, n, !options.zero_masked, map);
        });
      });
    });
  });
  return out;
}

}  // namespace
}  // namespace rk

STABLE_TORCH_LIBRARY_FRAGMENT(rlhf_kernels_native, m) {
  m.def(
      "masked_normalize(Tensor x, Tensor? mask, int trailing, float eps, int flags, int grain=32768) -> "
      "Tensor");
  m.def(
      "masked_normalize_backward(Tensor grad, Tensor x, Tensor? mask, int trailing, float eps, int flags,"
      " int grain=32768) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(rlhf_kernels_native, CPU, m) {
  m.impl("masked_normalize", TORCH_BOX(&rk::masked_normalize));
  m.impl("masked_normalize_backward", TORCH_BOX(&rk::masked_normalize_backward));
}
