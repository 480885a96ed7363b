"""Compiler flags of the native build: setup.py runs this file by path, the guards compile with the same."""

STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # torch 2.11

# Without errno and trapping arithmetic GCC vectorises the row loops. Never -ffast-math: at link time it
# would switch the whole process to flush-to-zero.
CXX_FLAGS = [
    "-O3",
    "-g0",
    "-Wall",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fopenmp-simd",
    "-fvisibility=hidden",
    # A distribution's Python hands its own hardening flags on: counts of instructions would depend on them.
    "-fno-stack-protector",
]

NVCC_FLAGS = ["-O3", "--expt-relaxed-constexpr", "-lineinfo", STABLE_ABI, "-DUSE_CUDA"]
CUDA_STANDARD = "-std=c++20"  # torch 2.13's headers need it; torch's own build helper adds it too
CUDA_TARGETS = ("sm_80", "sm_90a", "sm_100")
