// What the row kernels of sampling take. Torch-free.
#pragma once

#include "common/isa.h"
#include "common/plane.h"

namespace rk {

// One number a row. `top_k` is 0 and `top_p` is 1 where nothing is cut.
template <class T, class A = acc_t<T>>
struct Sample {
  Plane<const T> logits;
  const double* uniform;
  int64_t* token;
  A *logprob, *log_mass;
  int64_t rows, vocabulary;
  double temperature;
  int64_t top_k;
  double top_p;

  bool truncates() const { return top_k > 0 || top_p < 1; }
};

// Tokens whose mass is added up to one number: of these blocks the one is found that holds the drawn token.
constexpr int64_t kSampleBlock = 1024;

// Numbers that a task needs to work on: the weights, and for truncation what may be at its edge.
template <class T>
int64_t sample_scratch(const Sample<T>& g) {
  return g.truncates() ? 3 * g.vocabulary : kSampleBlock;
}
template <class T>
int64_t sample_blocks(const Sample<T>& g) {
  return (g.vocabulary + kSampleBlock - 1) / kSampleBlock;
}

}  // namespace rk
