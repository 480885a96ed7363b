"""What the engine and the tests need to know of masked_normalize."""

from __future__ import annotations

import math
from collections.abc import Iterator

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
    row_mask,
)
from rlhf_kernels.ops.normalize import NORMALIZE_PRESETS, kernel_torch, masked_normalize, reference

ALL_DTYPES = (*FLOAT_DTYPES, torch.float64)


def _awkward(
    name: str, b: int, t: int, dtypes: tuple[torch.dtype, ...] = FLOAT_DTYPES, **options: object
) -> Case:
    return Case(f"{name}_{b}x{t}", {"B": b, "T": t}, options, "awkward", dtypes)


WHITEN = NORMALIZE_PRESETS["trl"]  # and verl's

# `mask` is the pattern of the real slots, `masked` what stands in the others, `memory` the layout of x;
# the other options are arguments of the function.
CASES = (
    Case("smoke_8x300", {"B": 8, "T": 300}, {"mask": "tail"}, tier="smoke"),
    Case("ppo_512x1024", {"B": 512, "T": 1024}, {"mask": "tail"}),
    Case("rows_512x1024", {"B": 512, "T": 1024}, {"mask": "tail", "dim": -1}),
    Case("unmasked_512x1024", {"B": 512, "T": 1024}),
    Case("whiten_512x1024", {"B": 512, "T": 1024}, {"mask": "tail", **WHITEN}),
    Case("large_4096x4096", {"B": 4096, "T": 4096}, {"mask": "tail"}, tier="large"),
    Case("large_whiten_4096x4096", {"B": 4096, "T": 4096}, {"mask": "tail", **WHITEN}, tier="large"),
    _awkward("ragged", 3, 4099, ALL_DTYPES, mask="random"),
    _awkward("ragged_rows", 5, 4099, ALL_DTYPES, mask="random", dim=-1),
    _awkward("first_dimension", 37, 19, ALL_DTYPES, mask="random", dim=0),
    _awkward("masked_head", 4, 1031, mask="head"),
    _awkward("masked_middle_rows", 4, 1031, mask="middle", dim=-1),
    _awkward("none_real", 3, 65, ALL_DTYPES, mask="none"),
    _awkward("one_real_rows", 3, 65, ALL_DTYPES, mask="one", dim=-1, unbiased=True),
    _awkward("two_real_rows", 3, 65, ALL_DTYPES, mask="two", dim=-1, unbiased=True),
    _awkward("nan_masked", 7, 4099, ALL_DTYPES, mask="random", masked=math.nan, zero_masked=True),
    _awkward("nan_masked_rows", 9, 4100, mask="tail", masked=math.nan, dim=-1),
    _awkward("inf_masked", 7, 513, mask="tail", masked=-math.inf),
    _awkward("strided", 9, 130, ALL_DTYPES, mask="random", memory="strided"),
    _awkward("strided_rows", 9, 130, mask="random", memory="strided", dim=-1),
    _awkward("transposed", 9, 130, mask="random", memory="transposed"),
    _awkward("misaligned", 9, 131, mask="random", memory="misaligned"),
    _awkward("large_offset", 6, 3000, (torch.float32,), mask="tail", offset=1e4, scale=1e-2, eps=1e-8),
    _awkward(
        "large_offset_rows", 6, 3000, (torch.float32,), mask="tail", offset=1e4, scale=1e-2, eps=1e-8, dim=-1
    ),
    _awkward("small_variance", 6, 300, mask="tail", scale=1e-4),
    _awkward("keeps_mean", 5, 700, ALL_DTYPES, mask="tail", center=False, offset=3.0),
    _awkward(
        "keeps_mean_zeroed_rows", 5, 700, mask="tail", center=False, zero_masked=True, offset=3.0, dim=-1
    ),
    _awkward("added_eps_unbiased", 5, 700, mask="tail", eps_mode="add", unbiased=True, eps=1e-8),
    _awkward("empty", 0, 8, mask="tail"),
    _awkward("empty_rows", 4, 0, mask="tail", dim=-1),
)
ARGUMENTS = ("dim", "eps", "eps_mode", "unbiased", "center", "zero_masked")


def make(case: Case, dtype: torch.dtype, generator: torch.Generator, device: torch.device) -> Inputs:
    """Normal inputs in the layout and with the mask that the case asks for."""
    b, t = case.sizes["B"], case.sizes["T"]
    options = case.options
    memory = options.get("memory")
    extra = {"strided": 3, "misaligned": 1}.get(memory, 0)
    x = randn(
        (t, b) if memory == "transposed" else (b, t + extra), torch.float32, generator, torch.device("cpu")
    )
    x = (x * options.get("scale", 1.0) + options.get("offset", 0.0)).to(device, dtype)
    if memory == "misaligned":
        x = x.reshape(-1)[1 : 1 + b * t].view(b, t)
    x = x.t() if memory == "transposed" else x[:, -t:] if t else x
    args = {"x": x} | {name: options[name] for name in ARGUMENTS if name in options}
    if pattern := options.get("mask"):
        args["mask"] = row_mask(pattern, b, t, generator).to(device)
        if "masked" in options:
            x.masked_fill_(~args["mask"], options["masked"])
    return Inputs(args, wrt=("x",))


def cost(case: Case, dtype: torch.dtype, direction: Direction) -> Cost:
    """Forward reads x and the mask and writes the result; backward reads the gradient as well."""
    n = case.sizes["B"] * case.sizes["T"]
    tensors = 2 if direction == "forward" else 3
    mask = n if case.options.get("mask") else 0
    return Cost(flops=n * (6 if direction == "forward" else 10), bytes=n * itemsize(dtype) * tensors + mask)


def kernels() -> Iterator[KernelBuild]:
    """Every kernel in every dtype for every target, masked, on rows and on chunks."""
    from rlhf_kernels.ops.normalize import kernel_triton as k

    sizes = {"x_stride": "i32", "mask_stride": "i32", "length": "i32", "chunk": "i32"}
    options = {"eps": "fp32", "flags": "i32"}
    for dtype in ("fp32", "bf16", "fp16"):
        x = {"x_ptr": f"*{dtype}", "mask_ptr": "*u8"}
        grad, out = {"grad_ptr": f"*{dtype}"}, {"out_ptr": f"*{dtype}"}
        parts, sums = {"parts_ptr": "*fp64"}, {"sums_ptr": "*fp64"}
        block = {"MASKED": True, "BLOCK": k.BLOCK}
        whole = {**block, "CHUNKS": k.CHUNKS}
        hide = {**whole, "HIDE": True}
        both = {"rows": {"SPLIT": False}, "chunks": {"SPLIT": True}}
        builds = [
            ("moments", k.moments_kernel, x | parts | sizes, block),
            ("sums", k.sums_kernel, grad | x | parts | sums | sizes | {"flags": "i32"}, whole),
            *(
                (f"forward_{name}", k.forward_kernel, x | parts | out | sizes | options, hide | split)
                for name, split in both.items()
            ),
            *(
                (
                    f"backward_{name}",
                    k.backward_kernel,
                    grad | x | parts | sums | out | sizes | options,
                    whole | split,
                )
                for name, split in both.items()
            ),
        ]
        for name, kernel, signature, constants in builds:
            aligned = tuple(argument for argument in signature if argument not in options)
            for target in TARGETS:
                yield KernelBuild(
                    f"{name}/{dtype}",
                    kernel,
                    signature,
                    constants,
                    target,
                    num_warps=k.NUM_WARPS,
                    aligned=aligned,
                )


def _host_normalize(host, backward: bool):  # noqa: ANN001
    import numpy

    x = numpy.linspace(-8, 8, 16384, dtype=numpy.float32)
    mask = numpy.arange(16384) % 3 != 0
    if backward:
        return lambda: host.masked_normalize_backward(x, x, mask)
    return lambda: host.masked_normalize(x, mask)


SPECS = (
    OpSpec(
        name="masked_normalize",
        family="normalize",
        summary="mean 0 and variance 1 over the real elements",
        function=masked_normalize,
        reference=reference.masked_normalize,
        torch_form=kernel_torch.masked_normalize,
        make=make,
        cost=cost,
        cases=CASES,
        # In float64 plain PyTorch does what the definition does, so that this is all that is granted.
        floor=4.0,
        kernels=kernels,
        host_kernels=(
            HostKernel("masked_normalize", lambda host: _host_normalize(host, False)),
            HostKernel("masked_normalize_backward", lambda host: _host_normalize(host, True)),
        ),
        knobs=(Knob("grain", "native", (32768, 8192, 131072)),),
    ),
)
