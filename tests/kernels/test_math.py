"""The arithmetic that the C++ row kernels share: exp and the 16-bit conversions, over their whole range."""

import os
import subprocess
import sys

import numpy
import pytest
import torch

from rlhf_kernels.runtime.native import host

EVERY_BIT_PATTERN = numpy.arange(1 << 16, dtype=numpy.uint16)


def test_exp_is_right_to_an_ulp():
    """From where it leaves zero to where it overflows: 7.6e-8 with fused multiply-adds, 9.8e-8 without."""
    x = numpy.unique(numpy.linspace(-86.98, 88.72, 1_000_001).astype(numpy.float32))
    error = numpy.abs(host().exp(x) / numpy.exp(x.astype(numpy.float64)) - 1)
    assert error.max() < 1e-7
    assert error.mean() < 3e-8


def test_exp_at_the_ends():
    x = numpy.array([0.0, -0.0, 88.73, 100, 3e38, numpy.inf, -87, -100, -3e38, -numpy.inf], numpy.float32)
    expected = [1, 1, numpy.inf, numpy.inf, numpy.inf, numpy.inf, 0, 0, 0, 0]
    assert host().exp(x).tolist() == expected


def test_exp_of_any_nan_is_nan():
    bits = numpy.array([0x7FC00000, 0x7F800001, 0x7FFFFFFF, 0xFFC00000, 0xFF800001, 0xFFFFFFFF], numpy.uint32)
    assert numpy.isnan(host().exp(bits.view(numpy.float32))).all()


def test_16_bit_numbers_are_read_exactly():
    bfloat16 = torch.from_numpy(EVERY_BIT_PATTERN.view(numpy.int16)).view(torch.bfloat16).float().numpy()
    float16 = EVERY_BIT_PATTERN.view(numpy.float16).astype(numpy.float32)
    assert numpy.array_equal(host().from_bfloat16(EVERY_BIT_PATTERN), bfloat16, equal_nan=True)
    assert numpy.array_equal(host().from_float16(EVERY_BIT_PATTERN), float16, equal_nan=True)


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_16_bit_numbers_are_rounded_as_torch_does(name):
    """Random bits, and the middles between neighbours with what lies beside them."""
    random = numpy.random.default_rng(0).integers(0, 1 << 32, 1_000_000, dtype=numpy.uint32)
    shift = 16 if name == "bfloat16" else 13
    middles = (numpy.arange(1 << (32 - shift), dtype=numpy.uint32) << shift) + (1 << (shift - 1))
    x = numpy.concatenate([random, middles - 1, middles, middles + 1]).view(numpy.float32)
    expected = torch.from_numpy(x).to(getattr(torch, name)).view(torch.int16).numpy().view(numpy.uint16)
    bits = getattr(host(), f"to_{name}")(x)
    nan = numpy.isnan(x)
    assert numpy.array_equal(bits[~nan], expected[~nan])
    assert numpy.isnan(getattr(host(), f"from_{name}")(bits[nan])).all()


@pytest.mark.parametrize("level", ["base", "v3"])
def test_lower_instruction_sets(level):
    """This file and the NumPy functions once more, as on a machine without AVX-512 or AVX2."""
    if os.environ.get("RLHF_KERNELS_ISA") or host().isa() == "base":
        pytest.skip("runs on a lower level already")
    files = [os.path.join(os.path.dirname(__file__), name) for name in ("test_math.py", "test_rotary.py")]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        *files,
        "-k",
        "16_bit or exp or numpy",
    ]
    environment = os.environ | {"RLHF_KERNELS_ISA": level}
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=os.getcwd())
    assert ran.returncode == 0, ran.stdout[-3000:]
