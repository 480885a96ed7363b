// Which x86-64 level this processor runs, and the names that the row kernels are compiled under.
//
// A file of row kernels (rows.h) is torch-free and knows no instruction set: foreach_isa.h compiles it once
// per level, in the namespaces rk::base, rk::v3 (AVX2) and rk::v4 (AVX-512), and RK_PICK chooses at run
// time. One binary, every machine; RLHF_KERNELS_ISA=base|v3|v4|v4+bf16 lowers the level, so that each can be
// tested (the last: see attention/decode.h).
// RK_WITHOUT_V4 leaves the last out, for a build that is meant for a processor without it.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <type_traits>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
  #define RK_MULTI_ISA 1
#else
  #define RK_MULTI_ISA 0
#endif

// Inside foreach_isa.h a function that is not inlined loses its registers at every call, and in a file of
// many instantiations GCC stops inlining by itself.
#define RK_INLINE inline __attribute__((always_inline))
#define RK_OUTLINE __attribute__((noinline))

namespace rk {

enum class Isa : int { kBase = 0, kV3 = 1, kV4 = 2 };

inline Isa detect_isa() {
#if RK_MULTI_ISA
  __builtin_cpu_init();
  #ifdef RK_WITHOUT_V4
  const bool v4 = false;
  #else
  const bool v4 = __builtin_cpu_supports("x86-64-v4");
  #endif
  Isa best = v4 ? Isa::kV4 : __builtin_cpu_supports("x86-64-v3") ? Isa::kV3 : Isa::kBase;
  if (const char* asked = std::getenv("RLHF_KERNELS_ISA")) {
    if (std::strcmp(asked, "base") == 0) return Isa::kBase;
    if (std::strcmp(asked, "v3") == 0 && best >= Isa::kV3) return Isa::kV3;
  }
  return best;
#else
  return Isa::kBase;
#endif
}

inline Isa isa() {
  static const Isa level = detect_isa();
  return level;
}

inline const char* isa_name() {
  return isa() == Isa::kV4 ? "v4" : isa() == Isa::kV3 ? "v3" : "base";
}

// 16-bit storage types; arithmetic is in float.
struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

template <class T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};
template <class T>
using acc_t = typename Accumulator<T>::type;

}  // namespace rk

#if RK_MULTI_ISA
  #define RK_PICK(...)                                        \
    (::rk::isa() == ::rk::Isa::kV4   ? &::rk::v4::__VA_ARGS__ \
     : ::rk::isa() == ::rk::Isa::kV3 ? &::rk::v3::__VA_ARGS__ \
                                     : &::rk::base::__VA_ARGS__)
#else
  #define RK_PICK(...) (&::rk::base::__VA_ARGS__)
#endif
