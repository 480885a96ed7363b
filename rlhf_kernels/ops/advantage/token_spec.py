"""What the engine and the tests need to know of token_advantages."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

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
    row_mask,
)
from rlhf_kernels.ops.advantage import token_kernel_torch, token_reference
from rlhf_kernels.ops.advantage.token import operands, token_advantages

ALL_DTYPES = (*FLOAT_DTYPES, torch.float64)
ARGUMENTS = ("mask_mode", "normalize")


def _case(
    name: str, b: int, t: int, tier: str = "awkward", dtypes: tuple = FLOAT_DTYPES, **options: Any
) -> Case:
    return Case(f"{name}_{b}x{t}", {"B": b, "T": t}, options, tier, dtypes)


# `mask` is the pattern of the real tokens, `masked` what stands in the others, `memory` the layout of the
# three matrices; the rest are arguments. second_block has more elements than moments take at a time, and than
# one Triton program.
CASES = (
    _case("smoke", 16, 128, "smoke", mask="tail"),
    _case("ppo", 512, 1024, "typical", mask="tail"),
    _case("ppo_verl", 256, 1024, "typical", mask="tail", normalize="verl"),
    _case("ppo_openrlhf", 256, 1024, "typical", mask="tail", mask_mode="zero", normalize="openrlhf"),
    _case("no_step", 3, 0, dtypes=ALL_DTYPES, mask="tail"),
    _case("no_row", 0, 5, mask="tail"),
    _case("one_step", 5, 1, dtypes=ALL_DTYPES, mask="random"),
    _case("two_steps", 5, 2, dtypes=ALL_DTYPES, mask="random"),
    _case("three_steps", 5, 3, dtypes=ALL_DTYPES, mask="random", mask_mode="zero"),
    _case("one_real", 3, 300, mask="one", normalize=False),
    _case("second_block", 65, 64, dtypes=ALL_DTYPES, mask="middle"),
    _case("ragged", 7, 41, dtypes=ALL_DTYPES, mask="middle"),
    _case("none_real", 3, 9, mask="none"),
    _case("nan_masked", 7, 41, dtypes=ALL_DTYPES, mask="middle", masked=math.nan),
    _case("zeroed", 7, 41, mask="head", mask_mode="zero", normalize="openrlhf"),
    _case("zeroed_nan_masked", 19, 131, mask="middle", masked=math.nan, mask_mode="zero"),
    _case("unbiased", 7, 41, mask="tail", normalize="verl"),
    _case("not_normalized", 7, 41, dtypes=ALL_DTYPES, mask="middle", normalize=False),
    _case("strided", 9, 130, dtypes=ALL_DTYPES, mask="middle", memory="strided"),
    _case("transposed", 9, 130, mask="middle", memory="transposed"),
    _case("lanes_set_off_apart", 3, 1024, dtypes=(torch.float32, torch.float64), mask="random"),
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
    if memory := case.options.get("memory"):
        args |= {name: _laid_out(args[name], memory) for name in ("kl", "values", "mask")}
    args |= {"kl_coef": 0.1, "gamma": 0.99}
    args |= {name: case.options[name] for name in ARGUMENTS if name in case.options}
    return Inputs(args, wrt=("score", "kl", "values"))


def _laid_out(x: Tensor, memory: str) -> Tensor:
    """The same numbers within wider rows, or column by column."""
    if memory == "transposed":
        return x.t().contiguous().t()
    wide = x.new_zeros(x.shape[0], x.shape[1] + 3)
    wide[:, 3:] = x
    return wide[:, 3:]


def cost(case: Case, dtype: torch.dtype, direction: Direction) -> Cost:
    """KL terms, values and mask are read, advantages and returns written; backward moves as many."""
    n = case.sizes["B"] * case.sizes["T"]
    return Cost(flops=n * 15, bytes=4 * n * itemsize(dtype) + n)


def _by(forward: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """The public function by one module's arithmetic, around the operator: torch.compile sees through it."""

    def function(
        score: Tensor, kl: Tensor, values: Tensor, mask: Tensor, *, kl_coef: float, gamma: float = 1.0,
        lam: float = 0.95, mask_mode: str = "carry", normalize: bool | str = True,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        return forward(*operands(score, kl, values, mask, kl_coef, gamma, lam, mask_mode, normalize))

    return function


def _host(carry: bool, backward: bool) -> Callable[[Any], Callable[[], Any]]:
    def call(host: Any) -> Callable[[], Any]:
        import numpy

        x = numpy.linspace(-1, 1, 32 * 512, dtype=numpy.float32).reshape(32, 512)
        mask = (numpy.arange(x.size) % 3 != 0).reshape(x.shape)
        if backward:
            return lambda: host.token_advantages_backward(x, x, mask, 0.1, 1.0, 0.95, carry)
        return lambda: host.token_advantages(x[:, 0], x, x, mask, 0.1, 1.0, 0.95, carry)

    return call


_GIVEN, _GRADS = ("score", "kl", "values"), ("grad", "grad_returns")
_RESULTS = ("grad_score", "grad_kl", "grad_values")
# kernel: tensors in the op's dtype; tensors in float64; what has row strides.
TRITON = {
    "forward": ((*_GIVEN, "returns"), ("parts",), (*_GIVEN, "mask")),
    "backward": ((*_GRADS, *_RESULTS), ("parts", "sums"), (*_GRADS, "mask")),
}


def kernels() -> Iterator[KernelBuild]:
    """For every target: each kernel, on the tiles with most and with least steps, and without whitening."""
    from rlhf_kernels.ops.advantage import token_kernel_triton as k

    whiten = {"out_ptr": None, "WHITEN": True, "SPAN": k.SPAN}
    whole = {"parts_ptr": None, "WHITEN": True, "SPAN": k.SPAN}
    chunks = {"CHUNKS": k.CHUNKS}
    bare = dict.fromkeys(("raw_ptr", "parts_ptr", "sums_ptr"))
    uses: list[tuple[str, str, int, bool, dict[str, Any]]] = [
        ("forward", "forward", 1024, True, whiten),
        ("forward_zeroed", "forward", 64, False, whiten),
        ("forward_whole", "forward", 1024, True, whole),
        ("forward_whole_zeroed", "forward", 64, False, whole),
        ("forward_plain", "forward", 1024, True, whiten | {"parts_ptr": None, "WHITEN": False}),
        ("backward", "backward", 1024, True, chunks),
        ("backward_zeroed", "backward", 64, False, chunks),
        ("backward_plain", "backward", 1024, True, chunks | bare),
    ]
    for use, dtype in product(uses, ("fp32", "bf16", "fp16")):
        for target in TARGETS:
            yield _build(k, dtype, target, *use)


def _build(
    k: Any, dtype: str, target: str, use: str, name: str, steps: int, carry: bool, fixed: dict[str, Any]
) -> KernelBuild:
    own, double, strided = TRITON[name]
    kinds = dict.fromkeys((*own, "out"), f"*{dtype}") | dict.fromkeys(double, "*fp64")
    kinds |= {"raw": "*fp32", "mask": "*u8"}
    taken = getattr(k, f"token_{name}_kernel").arg_names
    pointers = {f"{x}_ptr": kind for x, kind in kinds.items() if f"{x}_ptr" in taken}
    pointers = {x: kind for x, kind in pointers.items() if x not in fixed}
    integers = (*(f"{x}_stride" for x in strided), "n_rows", "n_steps")
    integers += tuple(x for x in ("per_program", "chunks") if x in taken)
    floats = dict.fromkeys(("kl_coef", "gamma", "decay", "eps"), "fp32")
    rows, block = k.tile(steps)
    return KernelBuild(
        f"{use}/{dtype}",
        getattr(k, f"token_{name}_kernel"),
        pointers | dict.fromkeys(integers, "i32") | floats | {"flags": "i32"},
        fixed | {"CARRY": carry, "ROWS": rows, "BLOCK": block},
        target,
        num_warps=k.NUM_WARPS,
        aligned=(*pointers, *integers),
    )


SPEC = OpSpec(
    name="token_advantages",
    family="advantage",
    summary="scores and KL terms to whitened advantages, as one op",
    function=token_advantages,
    reference=_by(token_reference.forward),
    torch_form=_by(token_kernel_torch.forward),
    make=make,
    cost=cost,
    cases=CASES,
    # In float64 plain PyTorch and the definition differ by the order of the scan alone.
    floor=8.0,
    kernels=kernels,
    host_kernels=(
        HostKernel("token_advantages", _host(True, False)),
        HostKernel("token_advantages_zeroed", _host(False, False)),
        HostKernel("token_advantages_backward", _host(True, True)),
        HostKernel("token_advantages_zeroed_backward", _host(False, True)),
    ),
    knobs=(
        Knob("grain", "native", (32768, 8192, 131072)),
        Knob("one_program", "triton", (4096, 0, 16384, 65536), ("forward",)),
    ),
)
