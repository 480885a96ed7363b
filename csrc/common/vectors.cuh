// 128-bit loads and stores where memory is aligned, single elements where it is not: a thread gets the same
// elements either way, so that a layout does not change the order of a sum.
#pragma once

#include "common/cuda.cuh"

namespace rk {
namespace cuda {

// Elements of one load.
template <class T>
constexpr int kVector = 16 / int(sizeof(T));

template <class T>
struct alignas(16) Vector {
  T values[kVector<T>];
};

// The vector at `from`, of which `n` elements exist; the rest are 0.
template <class T, bool kAligned>
__device__ inline void read_vector(const T* from, int64_t n, acc_t<T>* to) {
  if (kAligned && n >= kVector<T>) {
    Vector<T> all;
    *reinterpret_cast<uint4*>(&all) = *reinterpret_cast<const uint4*>(from);
#pragma unroll
    for (int v = 0; v < kVector<T>; ++v) to[v] = load(all.values[v]);
  } else {
#pragma unroll
    for (int v = 0; v < kVector<T>; ++v) to[v] = v < n ? load(from[v]) : acc_t<T>(0);
  }
}

template <class T, bool kAligned>
__device__ inline void write_vector(const acc_t<T>* from, int64_t n, T* to) {
  if (kAligned && n >= kVector<T>) {
    Vector<T> all;
#pragma unroll
    for (int v = 0; v < kVector<T>; ++v) all.values[v] = store<T>(from[v]);
    // The intrinsic: the compiler would merge a plain store with the single ones below.
    __stwb(reinterpret_cast<uint4*>(to), *reinterpret_cast<const uint4*>(&all));
  } else {
#pragma unroll
    for (int v = 0; v < kVector<T>; ++v)
      if (v < n) to[v] = store<T>(from[v]);
  }
}

// Bit v tells whether element v exists and is real.
template <class T, bool kAligned>
__device__ inline unsigned read_bits(const uint8_t* from, int64_t n) {
  constexpr int kCount = kVector<T>;
  struct alignas(kCount) Bytes {
    uint8_t values[kCount];
  };
  unsigned bits = 0;
  if (from == nullptr) {
    bits = n >= kCount ? (1u << kCount) - 1 : (1u << (n > 0 ? n : 0)) - 1;
  } else if (kAligned && n >= kCount) {
    const Bytes all = *reinterpret_cast<const Bytes*>(from);
#pragma unroll
    for (int v = 0; v < kCount; ++v) bits |= unsigned(all.values[v] != 0) << v;
  } else {
#pragma unroll
    for (int v = 0; v < kCount; ++v)
      if (v < n) bits |= unsigned(from[v] != 0) << v;
  }
  return bits;
}

}  // namespace cuda
}  // namespace rk
