"""What the engine and the tests need to know of discounted_return, lambda_return and vtrace."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from itertools import product
from types import ModuleType

import torch

from rlhf_kernels.engine.spec import (
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
    row_mask,
)
from rlhf_kernels.ops.advantage import (
    kernel_torch,
    off_policy,
    returns,
    returns_reference,
    vtrace_kernel_torch,
    vtrace_reference,
)

# float16 goes the same way as bfloat16: one case has it.
DTYPES = (torch.float32, torch.bfloat16)


def _case(
    name: str, b: int, t: int, tier: str = "awkward", dtypes: tuple = DTYPES, **options: object
) -> Case:
    return Case(f"{name}_{b}x{t}", {"B": b, "T": t}, options, tier, dtypes)


# `mask`: the pattern of the real steps, with NaN in the others; `done`, `next`: given.
CASES = (
    _case("smoke", 8, 200, "smoke", mask="middle", done=True, next=True),
    _case("ppo", 64, 1024, "large"),
    _case("no_step", 3, 0),
    _case("bare", 3, 41),
    _case("everything", 3, 77, dtypes=(*DTYPES, torch.float16), mask="middle", done=True, next=True),
)


def _make(
    names: tuple[str, ...], case: Case, dtype: torch.dtype, generator: torch.Generator, device: torch.device
) -> Inputs:
    b, t = case.sizes["B"], case.sizes["T"]
    args = {name: randn((b, t), dtype, generator, device) for name in names}
    if "log_ratio" in args:
        args["log_ratio"] *= 0.3
    if case.options.get("next"):
        args["next_value"] = randn((b,), dtype, generator, device)
    wrt = tuple(args)
    if pattern := case.options.get("mask"):
        args["mask"] = row_mask(pattern, b, t, generator).to(device)
        for name in names:
            args[name].masked_fill_(~args["mask"], math.nan)
    if case.options.get("done"):
        args["done"] = (torch.rand(b, t, generator=generator) < 0.05).to(device)
    return Inputs(args | {"gamma": 0.99} | ({"rho_clip": 1.2} if "log_ratio" in args else {}), wrt)


def _cost(reads: int, writes: int, case: Case, dtype: torch.dtype, direction: Direction) -> Cost:
    """Each input is read and each output written once, either way."""
    n = case.sizes["B"] * case.sizes["T"]
    flags = ("mask" in case.options) + ("done" in case.options)
    return Cost(flops=n * 4 * reads, bytes=n * (itemsize(dtype) * (reads + writes) + flags))


def _spec(
    name: str, room: ModuleType, reference: ModuleType, summary: str, inputs: tuple[str, ...], **more: object
) -> OpSpec:
    return OpSpec(
        name=name,
        family="advantage",
        summary=summary,
        function=getattr(room, name),
        reference=getattr(reference, name),
        make=partial(_make, inputs),
        cost=partial(_cost, len(inputs), len(more.get("outputs", (name,)))),
        cases=CASES,
        floor=8.0,
        **more,
    )


def _discounted(
    rewards: torch.Tensor, *, mask: torch.Tensor | None = None, **options: object
) -> torch.Tensor:
    return returns.discounted(kernel_torch.gae, rewards, mask, **options)


def _of_lambda(
    rewards: torch.Tensor, values: torch.Tensor, *, mask: torch.Tensor | None = None, **options: object
) -> torch.Tensor:
    return returns.of_lambda(kernel_torch.gae, rewards, values, mask, **options)


def _vtrace_kernels() -> Iterator[KernelBuild]:
    """Everything given, in one tile, for every target in two dtypes."""
    from rlhf_kernels.ops.advantage import vtrace_kernel_triton as k
    from rlhf_kernels.ops.advantage.kernel_triton import NUM_WARPS, tile

    rows, block = tile(2048)
    inputs = ("log_ratio", "rewards", "values", "mask", "done", "last")
    integers = dict.fromkeys((*(f"{name}_stride" for name in inputs), "n_rows", "n_steps"), "i32")
    numbers = dict.fromkeys(("gamma", "decay", "rho_clip", "c_clip"), "fp32")
    for dtype, target in product(("fp32", "bf16"), TARGETS):
        pointers = {f"{name}_ptr": f"*{dtype}" for name in (*inputs, "targets", "advantages")}
        pointers |= {"mask_ptr": "*u8", "done_ptr": "*u8"}
        yield KernelBuild(
            f"everything/{dtype}",
            k.vtrace_kernel,
            pointers | integers | numbers,
            {"ROWS": rows, "BLOCK": block},
            target,
            num_warps=NUM_WARPS,
            aligned=(*pointers, *integers),
        )


def _host_vtrace(host, masked: bool):  # noqa: ANN001
    import numpy

    x = numpy.linspace(-1, 1, 32 * 512, dtype=numpy.float32).reshape(32, 512)
    mask = numpy.arange(512) % 7 > 0 if masked else None
    return lambda: host.vtrace(x, x, x, None if mask is None else numpy.broadcast_to(mask, x.shape))


SPECS = (
    _spec(
        "discounted_return",
        returns,
        returns_reference,
        "the sum of discounted rewards that follow",
        ("rewards",),
        torch_form=_discounted,
        operator="gae",
    ),
    _spec(
        "lambda_return",
        returns,
        returns_reference,
        "returns that mix rewards and values by lambda",
        ("rewards", "values"),
        torch_form=_of_lambda,
        operator="gae",
    ),
    _spec(
        "vtrace",
        off_policy,
        vtrace_reference,
        "targets and advantages of another policy's steps, ratios clipped",
        ("log_ratio", "rewards", "values"),
        torch_form=vtrace_kernel_torch.vtrace,
        outputs=("targets", "advantages"),
        kernels=_vtrace_kernels,
        host_kernels=(
            HostKernel("vtrace", lambda host: _host_vtrace(host, False)),
            HostKernel("vtrace_masked", lambda host: _host_vtrace(host, True)),
        ),
        knobs=(Knob("grain", "native", (32768, 8192, 131072), ("forward",)),),
    ),
)
