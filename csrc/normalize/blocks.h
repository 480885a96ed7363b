// A tensor as rows of blocks, and what is computed over them: moments, gradient sums, the normalised rows.
// Included after foreach_isa.h has compiled normalize/rows.h.
#pragma once

#include <algorithm>
#include <cstring>

#include "common/tensor.h"
#include "normalize/moments.h"

namespace rk {

// From this length on a row is shared between threads, block by block.
constexpr int64_t kShared = 64 * kBlock;

// A tensor as one sequence of elements in logical order, read a block at a time.
template <class T>
class Source {
 public:
  explicit Source(const Rows& rows)
      : data_(rows.data<T>()), cols_(rows.cols), stride_(rows.stride), flat_(rows.stride == rows.cols) {}

  Source(const T* data, int64_t cols, int64_t stride)
      : data_(data), cols_(cols), stride_(stride), flat_(stride == cols) {}

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

  // Sums over the outputs that depend on a row's moments; `dy` lies as x does.
  template <class G>
  GradientSums gradient_sums(int64_t row, const Source<G>& dy, const Moments& moments) const {
    const auto kernel = RK_PICK(normalize_gradient_sums<G, T>);
    const Center<acc_t<T>> about(moments.mean);
    return reduce<GradientSums>(row, [&](int64_t begin, int64_t n) {
      T values[kBlock];
      G grads[kBlock];
      uint8_t bytes[kBlock];
      return kernel(dy.read(begin, n, grads), x.read(begin, n, values), read_mask(begin, n, bytes), n,
                    !options.zero_masked, about);
    });
  }
};

// Every row through the map that its moments give, into `to`, which may be x itself.
template <class T, class X>
void normalize_all(const Problem<X>& problem, T* to) {
  const auto kernel = RK_PICK(normalize_block<T, X>);
  problem.each_row([&](int64_t row) {
    const ForwardMap<acc_t<T>> map(problem.moments(row), problem.options);
    problem.each_block(row, [&](int64_t begin, int64_t n) {
      X values[kBlock];
      uint8_t bytes[kBlock];
      const uint8_t* hidden = problem.options.zero_masked ? problem.read_mask(begin, n, bytes) : nullptr;
      kernel(problem.x.read(begin, n, values), hidden, to + begin, n, map);
    });
  });
}

}  // namespace rk
