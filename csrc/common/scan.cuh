// Scans and reductions over a warp and a block, for any associative operator on trivially copyable values.
#pragma once

#include "common/cuda.cuh"

namespace rk {
namespace cuda {

// The value of the lane `offset` above or below, or with lane number ^ offset, word by word for structs.
enum class Shuffle { kDown, kUp, kXor };

template <Shuffle kind, class V>
__device__ inline V shuffle(V value, int offset) {
  static_assert(sizeof(V) % 4 == 0, "shuffled values are made of 32-bit words");
  union Words {
    __device__ Words() {}
    V value;
    unsigned words[sizeof(V) / 4];
  } from, to;
  from.value = value;
#pragma unroll
  for (int i = 0; i < int(sizeof(V) / 4); ++i) {
    if constexpr (kind == Shuffle::kDown)
      to.words[i] = __shfl_down_sync(kAllLanes, from.words[i], offset);
    else if constexpr (kind == Shuffle::kUp)
      to.words[i] = __shfl_up_sync(kAllLanes, from.words[i], offset);
    else
      to.words[i] = __shfl_xor_sync(kAllLanes, from.words[i], offset);
  }
  return to.value;
}

// Every lane gets the combination of all lanes, in one fixed order.
template <class V, class Combine>
__device__ inline V warp_reduce(V value, Combine combine) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2)
    value = combine(value, shuffle<Shuffle::kXor>(value, offset));
  return value;
}

// Every thread gets the combination over the block. `scratch` is shared memory for one value per warp; it may
// be used again after the next __syncthreads().
template <class V, class Combine>
__device__ inline V block_reduce(V value, V identity, V* scratch, Combine combine) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  value = warp_reduce(value, combine);
  if (lane == 0) scratch[warp] = value;
  __syncthreads();
  return warp_reduce(lane < warps ? scratch[lane] : identity, combine);
}

// Lane i gets combine(v_0, ..., v_i): lane 0 comes first.
template <class V, class Combine>
__device__ inline V warp_scan(V value, Combine combine) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const V before = shuffle<Shuffle::kUp>(value, offset);
    if (lane >= offset) value = combine(before, value);
  }
  return value;
}

}  // namespace cuda
}  // namespace rk
