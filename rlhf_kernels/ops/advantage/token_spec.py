"""What the engine and the tests need to know of token_advantages."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlhf_kernels.engine.spec import (
    FLOAT_DTYPES,
    Case,
    Cost,
    Direction,
    Inputs,
    OpSpec,
    itemsize,
    randn,
    row_mask,
)
from rlhf_kernels.ops.advantage.token import token_advantages
from rlhf_kernels.runtime.dispatch import backend

ALL_DTYPES = (*FLOAT_DTYPES, torch.float64)
ARGUMENTS = ("mask_mode", "normalize")


def _case(
    name: str, b: int, t: int, tier: str = "awkward", dtypes: tuple = FLOAT_DTYPES, **options: Any
) -> Case:
    return Case(f"{name}_{b}x{t}", {"B": b, "T": t}, options, tier, dtypes)


# `mask` is the pattern of the real tokens, `masked` what stands in the others; the rest are arguments.
CASES = (
    _case("smoke", 16, 128, "smoke", mask="tail"),
    _case("ppo", 512, 1024, "typical", mask="tail"),
    _case("no_step", 3, 0, mask="tail"),
    _case("no_row", 0, 5, mask="tail"),
    _case("ragged", 7, 41, dtypes=ALL_DTYPES, mask="middle"),
    _case("none_real", 3, 9, mask="none"),
    _case("nan_masked", 7, 41, dtypes=ALL_DTYPES, mask="middle", masked=math.nan),
    _case("zeroed", 7, 41, mask="head", mask_mode="zero", normalize="openrlhf"),
    _case("unbiased", 7, 41, mask="tail", normalize="verl"),
    _case("not_normalized", 7, 41, mask="middle", normalize=False),
)


def make(case: Case, dtype: torch.dtype, generator: torch.Generator, device: torch.device) -> Inputs:
    """Normal scores, KL terms and values."""
    b, t = case.sizes["B"], case.sizes["T"]
    args: dict[str, Any] = {"score": randn((b,), dtype, generator, device)}
    args |= {name: randn((b, t), dtype, generator, device) for name in ("kl", "values")}
    args["mask"] = row_mask(case.options["mask"], b, t, generator).to(device)
    if "masked" in case.options:
        for name in ("kl", "values"):
            args[name].masked_fill_(~args["mask"], case.options["masked"])
    args |= {"kl_coef": 0.1, "gamma": 0.99}
    args |= {name: case.options[name] for name in ARGUMENTS if name in case.options}
    return Inputs(args, wrt=("score", "kl", "values"))


def cost(case: Case, dtype: torch.dtype, direction: Direction) -> Cost:
    """KL terms, values and mask are read, advantages and returns written; backward moves as many."""
    n = case.sizes["B"] * case.sizes["T"]
    return Cost(flops=n * 15, bytes=4 * n * itemsize(dtype) + n)


def _on(name: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """The public function on one backend: as definition, and as plain form."""

    def function(**arguments: Any) -> tuple[Tensor, Tensor]:
        with backend(f"token_advantages={name}"):
            return token_advantages(**arguments)

    return function


SPEC = OpSpec(
    name="token_advantages",
    family="advantage",
    summary="scores and KL terms to whitened advantages, as one op",
    function=token_advantages,
    reference=_on("reference"),
    torch_form=_on("torch"),
    make=make,
    cost=cost,
    cases=CASES,
    # In float64 plain PyTorch and the definition differ by the order of the scan alone.
    floor=8.0,
)
