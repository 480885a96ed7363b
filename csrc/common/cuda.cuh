// What every cuda.cu needs: the tensor's device and stream, launches, 16-bit loads and stores.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <torch/csrc/stable/macros.h>

#include "common/tensor.h"

namespace rk {
namespace cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// While it lives, the tensor's device is current; `stream` is the one that torch uses there.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& t) : guard_(t.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  cudaStream_t stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

// kernel<<<blocks, threads, shared>>>(args...) on the tensor's device and stream, checked; empty grids are
// left out. Blocks lie on the x axis, the only one that goes beyond 65535.
template <class... Parameters, class... Arguments>
void launch(const OnDevice& on, void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared,
            Arguments... arguments) {
  if (blocks == 0) return;
  STD_TORCH_CHECK(blocks <= 0x7fffffff, "a grid of ", blocks, " blocks is beyond 2^31 - 1");
  kernel<<<static_cast<unsigned>(blocks), threads, shared, on.stream()>>>(arguments...);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

constexpr int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// Storage to arithmetic and back, rounding to nearest even.
__device__ inline double load(double x) {
  return x;
}
__device__ inline float load(float x) {
  return x;
}
__device__ inline float load(bf16 x) {
  return __uint_as_float(static_cast<uint32_t>(x.bits) << 16);
}
__device__ inline float load(fp16 x) {
  return __half2float(__ushort_as_half(x.bits));
}

template <class T>
__device__ inline T store(acc_t<T> x);
template <>
__device__ inline double store<double>(double x) {
  return x;
}
template <>
__device__ inline float store<float>(float x) {
  return x;
}
template <>
__device__ inline bf16 store<bf16>(float x) {
  return bf16{__bfloat16_as_ushort(__float2bfloat16_rn(x))};
}
template <>
__device__ inline fp16 store<fp16>(float x) {
  return fp16{__half_as_ushort(__float2half_rn(x))};
}

}  // namespace cuda
}  // namespace rk
