"""Compiler flags of the native build: setup.py runs this file by path, the guards compile with the same."""

import re
from pathlib import Path

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

_V4 = {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}  # x86-64-v4


def level_flags(here: bool) -> list[str]:
    """Leaves AVX-512 out, a third of the time to compile, for what runs `here` alone and here is none."""
    try:
        known = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        known = None
    return ["-DRK_WITHOUT_V4"] if here and known and _V4 - set(known[1].split()) else []


NVCC_FLAGS = ["-O3", "--expt-relaxed-constexpr", "-lineinfo", STABLE_ABI, "-DUSE_CUDA"]
CUDA_STANDARD = "-std=c++20"  # torch 2.13's headers need it; torch's own build helper adds it too
CUDA_TARGETS = ("sm_80", "sm_90a", "sm_100")
