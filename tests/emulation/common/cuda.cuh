// Stands in for csrc/common/cuda.cuh, so that g++ compiles a cuda.cu as it is and its kernels run on the CPU.
//
// A block's threads are fibers on one stack each, switched at __syncthreads() and at shuffles; blocks run one
// after the other. Arithmetic, indexing, barriers and the order of reductions are those of the GPU; races
// between barriers and the memory model are not.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdio>
#include <memory>
#include <vector>

#include "common/tensor.h"

namespace rk {
namespace emulated {
#define RK_LANES 4
#include "common/math.h"
#undef RK_LANES
}  // namespace emulated
}  // namespace rk

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};

struct EmulatedDim {
  unsigned x = 0;
};
inline EmulatedDim threadIdx, blockIdx, blockDim, gridDim;

namespace rk {
namespace cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

constexpr int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

using emulated::load;
using emulated::store;

// What one barrier knows: who has come, and how often it has opened.
struct Gate {
  unsigned arrived = 0, opened = 0;
};

class Block {
 public:
  explicit Block(int threads) : fibers_(threads), stacks_(new char[size_t(threads) * kStack]) {}

  // Runs `body` as every thread of the block, in turn from barrier to barrier.
  template <class Body>
  void run(const Body& body) {
    running_ = this;
    body_ = [](void* f) { (*static_cast<const Body*>(f))(); };
    argument_ = const_cast<Body*>(&body);
    for (size_t i = 0; i < fibers_.size(); ++i) {
      getcontext(&fibers_[i].context);
      fibers_[i].context.uc_stack.ss_sp = stacks_.get() + i * kStack;
      fibers_[i].context.uc_stack.ss_size = kStack;
      fibers_[i].context.uc_link = &scheduler_;
      fibers_[i].done = false;
      makecontext(&fibers_[i].context, &Block::enter, 0);
    }
    for (bool alive = true; alive;) {
      alive = false;
      progress_ = false;
      for (current_ = 0; current_ < fibers_.size(); ++current_) {
        if (fibers_[current_].done) continue;
        threadIdx.x = unsigned(current_);
        swapcontext(&scheduler_, &fibers_[current_].context);
        alive = alive || !fibers_[current_].done;
      }
      if (alive && !progress_) {
        std::fprintf(stderr, "emulated block: threads wait at different barriers\n");
        std::abort();
      }
    }
  }

  void wait(Gate& gate, unsigned count) {
    const unsigned before = gate.opened;
    if (++gate.arrived == count) {
      gate.arrived = 0;
      ++gate.opened;
      progress_ = true;
    }
    while (gate.opened == before) swapcontext(&fibers_[current_].context, &scheduler_);
  }

  Gate& block_gate() { return block_gate_; }
  Gate& warp_gate() { return warp_gates_[threadIdx.x / kWarp]; }
  void* exchange() { return exchange_[threadIdx.x / kWarp]; }
  static Block& running() { return *running_; }

 private:
  static constexpr size_t kStack = 64 << 10;
  struct Fiber {
    ucontext_t context;
    bool done;
  };

  static void enter() {
    Block& block = *running_;
    block.body_(block.argument_);
    block.fibers_[block.current_].done = true;
    block.progress_ = true;
  }

  static inline Block* running_ = nullptr;
  std::vector<Fiber> fibers_;
  std::unique_ptr<char[]> stacks_;
  ucontext_t scheduler_;
  size_t current_ = 0;
  bool progress_ = false;
  void (*body_)(void*) = nullptr;
  void* argument_ = nullptr;
  Gate block_gate_, warp_gates_[32];
  alignas(16) char exchange_[32][kWarp * 8];
};

inline void sync_block() {
  Block::running().wait(Block::running().block_gate(), blockDim.x);
}

// What lane `from` holds.
template <class V>
V exchanged(V value, int from) {
  Block& block = Block::running();
  V* lanes = static_cast<V*>(block.exchange());
  lanes[threadIdx.x % kWarp] = value;
  block.wait(block.warp_gate(), kWarp);
  const V found = lanes[from];
  block.wait(block.warp_gate(), kWarp);
  return found;
}

class OnDevice {
 public:
  explicit OnDevice(const Tensor&) {}
};

template <class... Parameters, class... Arguments>
void launch(const OnDevice&, void (*kernel)(Parameters...), int64_t blocks, int threads, size_t,
            Arguments... arguments) {
  STD_TORCH_CHECK(threads % kWarp == 0 && threads <= 1024, "a block of ", threads, " threads");
  Block block(threads);
  blockDim.x = unsigned(threads);
  gridDim.x = unsigned(blocks);
  for (int64_t b = 0; b < blocks; ++b) {
    blockIdx.x = unsigned(b);
    block.run([&] { kernel(arguments...); });
  }
}

}  // namespace cuda
}  // namespace rk

#define __syncthreads ::rk::cuda::sync_block

template <class V>
V __shfl_xor_sync(unsigned, V value, int offset) {
  return rk::cuda::exchanged(value, int(threadIdx.x % 32) ^ offset);
}
template <class V>
V __shfl_up_sync(unsigned, V value, int offset) {
  const int lane = int(threadIdx.x % 32);
  return rk::cuda::exchanged(value, lane < offset ? lane : lane - offset);
}
template <class V>
V __shfl_down_sync(unsigned, V value, int offset) {
  const int lane = int(threadIdx.x % 32);
  return rk::cuda::exchanged(value, lane + offset > 31 ? lane : lane + offset);
}

// Cache hints are plain loads and stores here.
template <class V>
void __stwb(V* to, V value) {
  *to = value;
}
template <class V>
V __ldg(const V* from) {
  return *from;
}
