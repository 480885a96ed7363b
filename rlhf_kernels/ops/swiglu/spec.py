"""What the engine and the tests need to know of swiglu."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

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
from rlhf_kernels.ops.swiglu import kernel_torch, reference, swiglu

ALL_DTYPES = (*FLOAT_DTYPES, torch.float64)

CASES = (
    Case("small_64x512", {"N": 64, "F": 512}, tier="smoke"),
    Case("palm_4096x2048", {"N": 4096, "F": 2048}),
    Case("wide_512x8192", {"N": 512, "F": 8192}),
    Case("llama_two_tensors_2048x5504", {"N": 2048, "F": 5504}, {"packed": False}, tier="large"),
    Case("large_16384x8192", {"N": 16384, "F": 8192}, tier="large", dtypes=(torch.bfloat16,)),
    Case("gate_first_1024x1024", {"N": 1024, "F": 1024}, {"gate_first": True}, tier="smoke"),
    Case("one_element", {"N": 1, "F": 1}, tier="awkward", dtypes=ALL_DTYPES),
    Case("ragged_3x1031", {"N": 3, "F": 1031}, tier="awkward", dtypes=ALL_DTYPES),
    Case("ragged_two_tensors_5x77", {"N": 5, "F": 77}, {"packed": False}, "awkward", ALL_DTYPES),
    Case("strided_7x130", {"N": 7, "F": 130}, {"strided": True}, tier="awkward", dtypes=ALL_DTYPES),
    Case("empty_rows", {"N": 0, "F": 8}, tier="awkward"),
    Case("empty_columns", {"N": 4, "F": 0}, tier="awkward"),
    Case("extreme_4x64", {"N": 4, "F": 64}, {"scale": 60.0}, tier="awkward"),
)


def make(case: Case, dtype: torch.dtype, generator: torch.Generator, device: torch.device) -> Inputs:
    """Normal inputs; `strided` takes rows out of a wider tensor, `scale` reaches the ends of exp."""
    n, f = case.sizes["N"], case.sizes["F"]
    options = case.options
    width = f if options.get("packed") is False else 2 * f
    scale = options.get("scale", 1.0)

    def operand() -> torch.Tensor:
        wide = randn((n, width + (3 if options.get("strided") else 0)), dtype, generator, device)
        return wide[:, -width:] * scale if not options.get("strided") else wide[:, 3:]

    args = {"x": operand(), "gate_first": options.get("gate_first", False)}
    if options.get("packed") is False:
        args["gate"] = operand()
    return Inputs(args, wrt=tuple(name for name in ("x", "gate") if name in args))


def cost(case: Case, dtype: torch.dtype, direction: Direction) -> Cost:
    """Forward reads two operands and writes one; backward reads three and writes two."""
    n = case.sizes["N"] * case.sizes["F"]
    flops, moved = (5, 3) if direction == "forward" else (10, 5)
    return Cost(flops=n * flops, bytes=n * itemsize(dtype) * moved)


def kernels() -> Iterator[KernelBuild]:
    """Both kernels in every dtype for every target."""
    from rlhf_kernels.ops.swiglu import kernel_triton as k

    for target in TARGETS:
        for dtype in ("fp32", "bf16", "fp16"):
            for kernel, name, pointers, strides in (
                (k.swiglu_forward_kernel, "forward", "x gate out", "x gate"),
                (k.swiglu_backward_kernel, "backward", "grad x gate grad_x grad_gate", "grad x gate out"),
            ):
                signature = {f"{pointer}_ptr": f"*{dtype}" for pointer in pointers.split()}
                signature |= {f"{stride}_stride": "i32" for stride in strides.split()} | {"n_cols": "i32"}
                yield KernelBuild(
                    f"{name}/{dtype}", kernel, signature, {"BLOCK": k.BLOCK}, target,
                    num_warps=k.NUM_WARPS, aligned=tuple(signature),
                )  # fmt: skip


def _host_swiglu(host: Any, backward: bool) -> Callable[[], Any]:
    import numpy

    x = numpy.linspace(-8, 8, 16384, dtype=numpy.float32)
    return (lambda: host.swiglu_backward(x, x, x)) if backward else (lambda: host.swiglu(x, x))


SPECS = (
    OpSpec(
        name="swiglu",
        family="swiglu",
        summary="silu(gate) * x, packed or two tensors",
        function=swiglu,
        reference=reference.swiglu,
        torch_form=kernel_torch.swiglu,
        make=make,
        cost=cost,
        cases=CASES,
        floor=2.0,
        kernels=kernels,
        host_kernels=(
            HostKernel("swiglu", lambda host: _host_swiglu(host, False)),
            HostKernel("swiglu_backward", lambda host: _host_swiglu(host, True)),
        ),
        knobs=(Knob("grain", "native", (32768, 4096, 16384, 131072)),),
    ),
)
