// What the row kernels of one decoding step take. Torch-free.
#pragma once

#include <cstdint>

#include "common/isa.h"

#if defined(__linux__)
  #include <sys/syscall.h>
  #include <unistd.h>
#endif

// Assemblers that know tiles come with GCC 11.
#if RK_MULTI_ISA && __GNUC__ >= 11 && defined(__linux__)
  #define RK_TILES 1
#else
  #define RK_TILES 0
#endif

namespace rk {

// How bfloat16 is multiplied: as floats; in pairs (AVX512_BF16); by tiles of 16 rows of pairs (AMX). Neither
// of the last two is part of x86-64-v4.
enum class Products { kFloats, kPairs, kTiles };

#if RK_MULTI_ISA
// Linux hands tiles out on request, to the whole process.
inline bool has_tiles() {
  #if RK_TILES
  constexpr int64_t request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return __builtin_cpu_supports("amx-bf16") && syscall(SYS_arch_prctl, request, tile_data) == 0;
  #else
  return false;
  #endif
}

inline Products detect_products() {
  // Whoever names a level in RLHF_KERNELS_ISA gets that level and no more.
  const char* asked = std::getenv("RLHF_KERNELS_ISA");
  const bool pairs = asked && std::strcmp(asked, "v4+bf16") == 0;
  if (isa() != Isa::kV4 || (asked && !pairs) || !__builtin_cpu_supports("avx512bf16"))
    return Products::kFloats;
  if (pairs) return Products::kPairs;
  // Intel multiplies pairs at a quarter of the rate of floats.
  return has_tiles() ? Products::kTiles : __builtin_cpu_is("intel") ? Products::kFloats : Products::kPairs;
}
#endif

inline Products products() {
#if RK_MULTI_ISA
  static const Products found = detect_products();
  return found;
#else
  return Products::kFloats;
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
