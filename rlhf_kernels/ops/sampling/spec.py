"""What the engine and the tests need to know of sample."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from rlhf_kernels.engine.spec import (
    FLOAT_DTYPES,
    TARGETS,
    Case,
    Cost,
    Direction,
    HostKernel,
    Inputs,
    KernelBuild,
    Knob,
    OpSpec,
    itemsize,
    randn,
)
from rlhf_kernels.ops.sampling import kernel_torch, reference, sample

ALL_DTYPES = (*FLOAT_DTYPES, torch.float64)


def _case(
    tier: str, name: str, b: int, v: int, dtypes: tuple[torch.dtype, ...] = FLOAT_DTYPES, **options: object
) -> Case:
    return Case(f"{name}_{b}x{v}", {"B": b, "V": v}, options, tier, dtypes)


# `scale`: of the logits; `masked`: every third token is masked; `memory`: the layout. The rest are arguments.
CASES = (
    _case("smoke", "small", 8, 2048),
    _case("typical", "gpt2", 16, 50257),
    _case("typical", "gpt2_top_k", 16, 50257, top_k=50, temperature=0.7),
    _case("typical", "gpt2_top_p", 16, 50257, top_p=0.9, scale=3.0),
    _case("typical", "byte_top_p", 64, 512, top_p=0.9, scale=3.0),
    _case("large", "qwen", 512, 151936),
    _case("large", "qwen_top_p", 512, 151936, top_p=0.9, scale=3.0, temperature=0.8),
    _case("awkward", "one_token", 2, 1, ALL_DTYPES, top_k=1, top_p=0.5),
    _case("awkward", "ragged", 2, 1031, ALL_DTYPES, temperature=1.7),
    _case("awkward", "both", 2, 333, ALL_DTYPES, top_k=20, top_p=0.7, temperature=0.9),
    _case("awkward", "top_k_beyond", 2, 20, top_k=50),
    _case("awkward", "equal_logits", 2, 200, ALL_DTYPES, scale=0.0, top_k=7),
    _case("awkward", "masked", 2, 100, ALL_DTYPES, masked=True, top_p=0.8),
    _case("awkward", "sharp", 2, 300, scale=40.0, temperature=0.1),
    _case("awkward", "strided", 2, 130, memory="strided", top_k=9),
    _case("awkward", "transposed", 2, 130, memory="transposed", top_p=0.5),
    _case("awkward", "two_tiles", 1, 4500, top_k=40, top_p=0.8, scale=2.0),
    _case("awkward", "empty", 0, 8),
)
ARGUMENTS = ("temperature", "top_k", "top_p")


def make(case: Case, dtype: torch.dtype, generator: torch.Generator, device: torch.device) -> Inputs:
    """Normal logits; each random number is halfway through some token's share, away from rounding."""
    b, v = case.sizes["B"], case.sizes["V"]
    memory = case.options.get("memory")
    wide = randn((b, v + 3 * (memory == "strided")), dtype, generator, device)
    logits = (wide * case.options.get("scale", 1.0))[:, wide.shape[1] - v :]
    if case.options.get("masked"):
        logits[:, ::3] = -math.inf
    if memory == "transposed":
        logits = logits.t().contiguous().t()
    options = {name: case.options[name] for name in ARGUMENTS if name in case.options}
    uniform = _halfway(logits, torch.rand(b, dtype=torch.float64, generator=generator).to(device), **options)
    return Inputs({"logits": logits, "uniform": uniform} | options)


def _halfway(logits: Tensor, uniform: Tensor, **options: float) -> Tensor:
    settings = [{"temperature": 1.0, "top_k": None, "top_p": None, **options}[name] for name in ARGUMENTS]
    kept = reference.weights(logits, *settings)[1]
    token = reference.forward(logits, uniform, *settings)[0].unsqueeze(-1)
    reached = kept.cumsum(-1)
    return ((reached.gather(-1, token) - kept.gather(-1, token) / 2) / reached[:, -1:]).squeeze(-1)


def cost(case: Case, dtype: torch.dtype, direction: Direction) -> Cost:
    """The logits are read once; finding what to keep is not counted."""
    n = case.sizes["B"] * case.sizes["V"]
    return Cost(flops=4 * n, bytes=n * itemsize(dtype) + case.sizes["B"] * 24)


def kernels() -> Iterator[KernelBuild]:
    """Without truncation and with both kinds, in two dtypes for every target."""
    from rlhf_kernels.ops.sampling import kernel_triton as k

    results = {"token_ptr": "*i64", "logprob_ptr": "*fp32", "log_mass_ptr": "*fp32"}
    integers = dict.fromkeys(("stride", "size", "top_k"), "i32")
    numbers = {"temperature": "fp64", "top_p": "fp64"}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        signature = {"logits_ptr": f"*{name}", "uniform_ptr": "*fp64"} | results | integers | numbers
        bits, shift = k.KEYS[dtype]
        for use in (False, True):
            constants = {
                "TOP_K": use,
                "TOP_P": use,
                "BITS": bits,
                "SHIFT": shift,
                "BLOCK": k.BLOCK,
                "SEARCH": k.SEARCH,
            }
            for target in TARGETS:
                yield KernelBuild(
                    f"{'cut' if use else 'plain'}/{name}", k.sample_kernel, signature, constants, target,
                    num_warps=k.NUM_WARPS, aligned=("logits_ptr", "stride", "size"),
                )  # fmt: skip


def _host_sample(host, **options: float):  # noqa: ANN001
    import numpy

    logits = (numpy.arange(8 * 5001, dtype=numpy.float32) * 0.37 % 11).reshape(8, 5001)
    uniform = numpy.linspace(0.05, 0.95, 8)
    return lambda: host.sample(logits, uniform, **options)


SPECS = (
    OpSpec(
        name="sample",
        family="sampling",
        summary="a token with its log-probability and the mass that truncation kept",
        function=sample,
        reference=reference.sample,
        torch_form=kernel_torch.sample,
        make=make,
        cost=cost,
        cases=CASES,
        outputs=("token", "logprob", "log_mass"),
        floor=4.0,
        kernels=kernels,
        host_kernels=(
            HostKernel("sample", _host_sample),
            HostKernel("sample_top_k", lambda host: _host_sample(host, top_k=50)),
            HostKernel("sample_top_p", lambda host: _host_sample(host, top_p=0.9)),
        ),
        knobs=(Knob("grain", "native", (32768, 8192, 131072), ("forward",)),),
    ),
)
