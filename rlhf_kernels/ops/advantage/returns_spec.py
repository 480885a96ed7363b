"""What the engine and the tests need to know of discounted_return, lambda_return and vtrace."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch

from rlhf_kernels.engine.spec import (
    Case,
    Cost,
    Direction,
    Inputs,
    OpSpec,
    itemsize,
    randn,
    row_mask,
)
from rlhf_kernels.ops.advantage import kernel_torch, recurrence_kernel_torch, returns, returns_reference

# float16 goes the same way as bfloat16.
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
    _case("everything", 3, 77, mask="middle", done=True, next=True),
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
    name: str, operator: str, summary: str, inputs: tuple[str, ...], torch_form: Callable, **more: object
) -> OpSpec:
    return OpSpec(
        name=name,
        family="advantage",
        summary=summary,
        function=getattr(returns, name),
        reference=getattr(returns_reference, name),
        torch_form=torch_form,
        make=partial(_make, inputs),
        cost=partial(_cost, len(inputs), len(more.get("outputs", (name,)))),
        cases=CASES,
        floor=8.0,
        operator=operator,
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


def _vtrace(
    log_ratio: torch.Tensor,
    rewards: torch.Tensor,
    values: torch.Tensor,
    *,
    gamma: float,
    rho_clip: float,
    **given: object,
) -> tuple[torch.Tensor, torch.Tensor]:
    flags = (given.get(name) for name in ("mask", "done", "next_value"))
    numbers = (gamma, given.get("lam", 1.0), rho_clip, given.get("c_clip", 1.0))
    return returns.corrected(
        recurrence_kernel_torch.linear_recurrence, log_ratio, rewards, values, *flags, *numbers
    )


SPECS = (
    _spec("discounted_return", "gae", "the sum of discounted rewards that follow", ("rewards",), _discounted),
    _spec(
        "lambda_return",
        "gae",
        "returns that mix rewards and values by lambda",
        ("rewards", "values"),
        _of_lambda,
    ),
    _spec(
        "vtrace",
        "linear_recurrence",
        "targets and advantages of another policy's steps, ratios clipped",
        ("log_ratio", "rewards", "values"),
        _vtrace,
        outputs=("targets", "advantages"),
    ),
)
