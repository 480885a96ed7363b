"""What the engine and the tests need to know of linear_recurrence and of what rests on it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

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
from rlhf_kernels.ops.advantage import recurrence_kernel_torch, recurrence_reference
from rlhf_kernels.ops.advantage.recurrence import linear_recurrence

ALL_DTYPES = (*FLOAT_DTYPES, torch.float64)


def _case(
    name: str, b: int, t: int, tier: str = "awkward", dtypes: tuple = FLOAT_DTYPES, **options: object
) -> Case:
    return Case(f"{name}_{b}x{t}", {"B": b, "T": t}, options, tier, dtypes)


# `initial`: given; `memory`: the layout; `reverse` is the argument.
CASES = (
    _case("smoke", 8, 200, "smoke", initial=True),
    _case("ppo", 64, 1024, "typical", (torch.float32,)),
    _case("forwards", 512, 1024, "large", reverse=False),
    _case("no_row", 0, 5, initial=True),
    _case("no_step", 3, 0, dtypes=ALL_DTYPES, initial=True),
    _case("one_step", 5, 1, dtypes=ALL_DTYPES, initial=True),
    _case("one_step_forwards", 5, 1, initial=True, reverse=False),
    _case("ragged", 19, 131, dtypes=ALL_DTYPES, initial=True),
    _case("ragged_forwards", 19, 131, dtypes=ALL_DTYPES, initial=True, reverse=False),
    _case("second_block", 2, 1041, dtypes=(torch.float32,), initial=True, reverse=False),
    _case("third_block", 2, 2050, dtypes=(torch.float32,)),
    _case("strided", 7, 45, memory="strided"),
)


def make(case: Case, dtype: torch.dtype, generator: torch.Generator, device: torch.device) -> Inputs:
    """Factors around 0.9, of either sign now and then; normal terms."""
    b, t = case.sizes["B"], case.sizes["T"]
    memory = case.options.get("memory")

    def matrix() -> torch.Tensor:
        wide = randn((b, t + 3 * (memory == "strided")), dtype, generator, device)
        return wide[:, wide.shape[1] - t :]

    args = {"a": matrix().mul_(0.1).add_(0.9), "b": matrix(), "reverse": case.options.get("reverse", True)}
    args["a"][:, ::7] *= -1
    if case.options.get("initial"):
        args["initial"] = randn((b,), dtype, generator, device)
    return Inputs(args, wrt=tuple(name for name in ("a", "b", "initial") if name in args))


def cost(case: Case, dtype: torch.dtype, direction: Direction) -> Cost:
    """Forward reads two tensors and writes one, backward reads three and writes two."""
    n = case.sizes["B"] * case.sizes["T"]
    flops, moved = (2, 3) if direction == "forward" else (3, 5)
    return Cost(flops=n * flops, bytes=n * itemsize(dtype) * moved)


def kernels() -> Iterator[KernelBuild]:
    """Both ways in one tile, for every target in two dtypes."""
    from rlhf_kernels.ops.advantage import recurrence_kernel_triton as k
    from rlhf_kernels.ops.advantage.kernel_triton import NUM_WARPS, tile

    rows, block = tile(2048)
    integers = dict.fromkeys(("a_stride", "b_stride", "initial_stride", "n_rows", "n_steps"), "i32")
    for dtype, reverse, target in product(("fp32", "bf16"), (True, False), TARGETS):
        pointers = {f"{name}_ptr": f"*{dtype}" for name in ("a", "b", "initial", "y")}
        yield KernelBuild(
            f"{'reverse' if reverse else 'forwards'}/{dtype}",
            k.recurrence_kernel,
            pointers | integers,
            {"REVERSE": reverse, "ROWS": rows, "BLOCK": block},
            target,
            num_warps=NUM_WARPS,
            aligned=(*pointers, *integers),
        )


def _host(host, reverse: bool):  # noqa: ANN001
    import numpy

    x = numpy.linspace(-1, 1, 32 * 512, dtype=numpy.float32).reshape(32, 512)
    return lambda: host.linear_recurrence(x, x, None, reverse)


SPECS = (
    OpSpec(
        name="linear_recurrence",
        family="advantage",
        summary="y_t = a_t y_(t+1) + b_t along rows, either way",
        function=linear_recurrence,
        reference=recurrence_reference.linear_recurrence,
        torch_form=recurrence_kernel_torch.linear_recurrence,
        make=make,
        cost=cost,
        cases=CASES,
        # One chain of T roundings, where the yardstick's scan has log2(T) of them.
        floor=8.0,
        kernels=kernels,
        host_kernels=(
            HostKernel("linear_recurrence", lambda host: _host(host, True)),
            HostKernel("linear_recurrence_forwards", lambda host: _host(host, False)),
        ),
        knobs=(Knob("grain", "native", (32768, 8192, 131072), ("forward",)),),
    ),
)
