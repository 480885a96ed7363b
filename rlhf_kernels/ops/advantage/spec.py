"""What the engine and the tests need to know of gae; token_spec.py holds token_advantages."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from itertools import product

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
from rlhf_kernels.ops.advantage import gae, kernel_torch, recurrence_spec, reference, returns_spec, token_spec

ALL_DTYPES = (*FLOAT_DTYPES, torch.float64)


def _awkward(
    name: str, b: int, t: int, dtypes: tuple[torch.dtype, ...] = FLOAT_DTYPES, **options: object
) -> Case:
    return Case(f"{name}_{b}x{t}", {"B": b, "T": t}, options, "awkward", dtypes)


# First, last and between, in vectors and chunks of their own.
SOME_ROWS = {"rows": (*range(33), 1000, 2047, 2048, *range(4063, 4096))}

# `mask` is the pattern of the real steps, `masked` what stands in the others, `memory` the layout of rewards
# and values, `flags` which of done and truncated are given, `next` the dimensions of next_value.
CASES = (
    Case("smoke_8x200", {"B": 8, "T": 200}, {"mask": "tail"}, tier="smoke"),
    Case(
        "smoke_general_8x200", {"B": 8, "T": 200}, {"flags": ("done", "truncated"), "next": 1}, tier="smoke"
    ),
    Case("ppo_64x1024", {"B": 64, "T": 1024}),
    Case("ppo_masked_64x1024", {"B": 64, "T": 1024}, {"mask": "tail"}),
    Case("ppo_512x1024", {"B": 512, "T": 1024}),
    Case("ppo_masked_512x1024", {"B": 512, "T": 1024}, {"mask": "tail"}, dtypes=(torch.float32,)),
    # As the loops of TRL and OpenRLHF treat a mask.
    Case("ppo_zeroed_64x1024", {"B": 64, "T": 1024}, {"mask": "tail", "mode": "zero"}),
    Case(
        "ppo_zeroed_512x1024",
        {"B": 512, "T": 1024},
        {"mask": "tail", "mode": "zero"},
        dtypes=(torch.float32,),
    ),
    Case("control_512x128", {"B": 512, "T": 128}, {"flags": ("done",), "next": 1}),
    Case("large_4096x2048", {"B": 4096, "T": 2048}, tier="large", checked=SOME_ROWS),
    Case("ppo_128x1024", {"B": 128, "T": 1024}, tier="large", dtypes=(torch.float32,)),
    Case(
        "large_8192x2048",
        {"B": 8192, "T": 2048},
        {},
        "large",
        (torch.float32,),
        {"rows": (0, 4095, 4096, 8191)},
    ),
    Case("large_masked_4096x2048", {"B": 4096, "T": 2048}, {"mask": "tail"}, tier="large", checked=SOME_ROWS),
    _awkward("empty", 0, 8, mask="tail"),
    _awkward("no_steps", 3, 0, ALL_DTYPES, mask="tail", next=1),
    _awkward("one_step", 5, 1, ALL_DTYPES, mask="random", next=1),
    _awkward("two_steps", 5, 2, ALL_DTYPES, mask="random"),
    _awkward("three_steps", 5, 3, ALL_DTYPES, flags=("done",), next=2),
    _awkward("ragged", 19, 131, ALL_DTYPES),
    _awkward("masked_head", 4, 77, mask="head", next=1),
    _awkward("masked_tail", 4, 77, mask="tail", next=1),
    _awkward("masked_middle", 4, 77, ALL_DTYPES, mask="middle", next=1),
    _awkward("masked_whole_rows", 4, 77, ALL_DTYPES, mask="rows", next=1),
    _awkward("masked_everywhere", 3, 65, mask="none", next=1),
    _awkward("nan_masked", 17, 300, ALL_DTYPES, mask="random", masked=math.nan, next=2),
    _awkward("inf_masked", 5, 77, mask="tail", masked=-math.inf, next=1),
    _awkward("nan_masked_as_zero", 17, 77, ALL_DTYPES, mask="random", masked=math.nan, mode="zero", next=2),
    _awkward("zero_mode", 5, 77, ALL_DTYPES, mask="middle", mode="zero", flags=("done", "truncated"), next=1),
    _awkward("done", 5, 131, ALL_DTYPES, flags=("done",), next=1),
    _awkward("truncated", 5, 131, ALL_DTYPES, flags=("truncated",), next=2),
    _awkward("everything", 21, 131, ALL_DTYPES, mask="random", flags=("done", "truncated"), next=2),
    _awkward("no_discount", 4, 77, mask="tail", gamma=1.0, lam=1.0),
    _awkward("no_trace", 4, 77, mask="tail", lam=0.0),
    _awkward("strided", 9, 130, ALL_DTYPES, mask="random", memory="strided"),
    _awkward("transposed", 9, 130, mask="random", memory="transposed"),
    _awkward("misaligned", 9, 131, mask="random", memory="misaligned"),
    _awkward("lanes_set_off_apart", 3, 1024, (torch.float32, torch.float64), mask="random"),
)


def make(case: Case, dtype: torch.dtype, generator: torch.Generator, device: torch.device) -> Inputs:
    """Normal rewards and values in the layout, and the flags, that the case asks for."""
    b, t = case.sizes["B"], case.sizes["T"]
    options = case.options

    def matrix() -> Tensor:
        memory = options.get("memory")
        if memory == "transposed":
            return randn((t, b), dtype, generator, device).t()
        if memory == "misaligned":
            return randn((b * t + 1,), dtype, generator, device)[1:].view(b, t)
        return (
            randn((b, t + 3), dtype, generator, device)[:, 3:]
            if memory
            else randn((b, t), dtype, generator, device)
        )

    args = {"rewards": matrix(), "values": matrix()}
    for name in options.get("flags", ()):
        args[name] = (torch.rand(b, t, generator=generator) < 0.05).to(device)
    if dims := options.get("next"):
        args["next_value"] = randn((b, t)[:dims], dtype, generator, device)
    wrt = tuple(name for name in ("rewards", "values", "next_value") if name in args)
    if pattern := options.get("mask"):
        args["mask"] = row_mask(pattern, b, t, generator).to(device)
        for name in wrt if "masked" in options else ():
            if args[name].dim() == 2:
                args[name].masked_fill_(~args["mask"], options["masked"])
    args |= {"gamma": options.get("gamma", 0.99), "lam": options.get("lam", 0.95)}
    if "mode" in options:
        args["mask_mode"] = options["mode"]
    return Inputs(args, wrt)


def narrow(
    inputs: Inputs, checked: Mapping[str, tuple[int, ...]]
) -> tuple[Inputs, Callable[[Tensor], Tensor]]:
    """Some of the rows: they do not depend on one another."""
    rows = list(checked["rows"])
    return inputs.map(lambda x: x[rows]), lambda x: x[rows]


def cost(case: Case, dtype: torch.dtype, direction: Direction) -> Cost:
    """Either way two tensors are read and two written, besides the flags and next_value."""
    n = case.sizes["B"] * case.sizes["T"]
    options = case.options
    flags = len(options.get("flags", ())) + ("mask" in options)
    tensors = 5 if options.get("next") == 2 else 4
    return Cost(flops=n * (6 if direction == "forward" else 5), bytes=n * (itemsize(dtype) * tensors + flags))


FLAGS = ("mask", "done", "truncated")
FORWARD = ("rewards", "values", *FLAGS, "next", "last")
BACKWARD = ("grad", "grad_returns", *FLAGS)
RESULTS = {
    "forward": ("advantages", "returns"),
    "backward": ("grad_rewards", "grad_values", "grad_next", "grad_last"),
}
OPTIONAL = frozenset((*FLAGS, "next", "last", "grad_next", "grad_last"))


def kernels() -> Iterator[KernelBuild]:
    """Both kernels for every target: bare; with a mask, on tiles of several rows; with all there is."""
    from rlhf_kernels.ops.advantage import kernel_triton as k

    uses = {
        "plain": (frozenset(), True, 2048),
        "masked": ({"mask"}, True, 48),
        "general": (OPTIONAL, False, 2048),
    }
    both = (("forward", k.gae_forward_kernel, FORWARD), ("backward", k.gae_backward_kernel, BACKWARD))
    for (direction, kernel, inputs), (use, (given, carry, steps)) in product(both, uses.items()):
        names = (*inputs, *RESULTS[direction])
        absent = {name for name in names if name in OPTIONAL - given}
        integers = dict.fromkeys((*(f"{name}_stride" for name in inputs), "n_rows", "n_steps"), "i32")
        rows, block = k.tile(steps)
        constants = {f"{name}_ptr": None for name in absent} | {"CARRY": carry, "ROWS": rows, "BLOCK": block}
        for dtype, target in product(("fp32", "bf16", "fp16"), TARGETS):
            kinds = {name: "*u8" if name in FLAGS else f"*{dtype}" for name in names if name not in absent}
            pointers = {f"{name}_ptr": kind for name, kind in kinds.items()}
            yield KernelBuild(
                f"{direction}_{use}/{dtype}",
                kernel,
                pointers | integers | {"gamma": "fp32", "decay": "fp32"},
                constants,
                target,
                num_warps=k.NUM_WARPS,
                aligned=(*pointers, *integers),
            )


def _host_gae(host, masked: bool, backward: bool = False):  # noqa: ANN001
    import numpy

    x = numpy.linspace(-1, 1, 32 * 512, dtype=numpy.float32).reshape(32, 512)
    mask = (numpy.arange(x.size) % 3 != 0).reshape(x.shape) if masked else None
    return lambda: (host.gae_backward if backward else host.gae)(x, x, mask)


SPECS = (
    OpSpec(
        name="gae",
        family="advantage",
        summary="generalised advantage estimation: advantages and returns",
        function=gae,
        reference=reference.gae,
        torch_form=kernel_torch.gae,
        make=make,
        cost=cost,
        narrow=narrow,
        cases=CASES,
        outputs=("advantages", "returns"),
        # One chain of T roundings, where the yardstick's scan has log2(T) of them.
        floor=8.0,
        kernels=kernels,
        host_kernels=(
            HostKernel("gae", lambda host: _host_gae(host, False)),
            HostKernel("gae_masked", lambda host: _host_gae(host, True)),
            HostKernel("gae_backward", lambda host: _host_gae(host, False, True)),
            HostKernel("gae_masked_backward", lambda host: _host_gae(host, True, True)),
        ),
        knobs=(Knob("grain", "native", (32768, 8192, 131072)),),
    ),
    token_spec.SPEC,
    *recurrence_spec.SPECS,
    *returns_spec.SPECS,
)
