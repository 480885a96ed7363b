// What the row kernels of one decoding step take. Torch-free.
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace rk {

// Whether to multiply pairs of bfloat16 (AVX512_BF16, which is not part of x86-64-v4). Whoever names a level
// in RLHF_KERNELS_ISA gets that level and no more.
inline bool multiplies_pairs() {
#if RK_MULTI_ISA
  static const bool found =
      isa() == Isa::kV4 && __builtin_cpu_supports("avx512bf16") && std::getenv("RLHF_KERNELS_ISA") == nullptr;
  return found;
#else
  return false;
#endif
}

// Keys that one task reads. A row is cut by the number of its keys alone, so that its bits depend on neither
// the batch around it nor the threads.
constexpr int64_t kDecodeSplit = 512;

// The query heads of one key head, and a run of the keys and values that they read; strides in elements.
template <class T>
struct DecodeSplit {
  const T *q, *k, *v;
  int64_t q_stride, k_stride, v_stride;  // between heads; between slots
  int64_t heads, keys, size;
  float scale;
};

}  // namespace rk
