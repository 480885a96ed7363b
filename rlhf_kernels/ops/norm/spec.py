"""What the engine and the tests need to know of layer_norm and rms_norm."""

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
from rlhf_kernels.ops.norm import kernel_torch, layer_norm, reference, rms_norm

ALL_DTYPES = (*FLOAT_DTYPES, torch.float64)


def _awkward(
    name: str, n: int, e: int, dtypes: tuple[torch.dtype, ...] = FLOAT_DTYPES, **options: object
) -> Case:
    return Case(f"{name}_{n}x{e}", {"N": n, "E": e}, options, "awkward", dtypes)


# `bias`, `residual`: whether there is one; `memory`: the layout of x; `weight`: float32 whatever x is;
# `shift`, `scale`: of the values. `weight_offset` and `eps` are arguments of the function.
COMMON = (
    Case("small_64x512", {"N": 64, "E": 512}, tier="smoke"),
    Case("palm_2048x512", {"N": 2048, "E": 512}, {"weight_offset": 1.0}),
    Case("plain_2048x512", {"N": 2048, "E": 512}),
    Case("residual_2048x512", {"N": 2048, "E": 512}, {"residual": True}),
    Case("wide_512x4096", {"N": 512, "E": 4096}),
    Case("residual_512x4096", {"N": 512, "E": 4096}, {"residual": True}),
    Case("wide_2048x4096", {"N": 2048, "E": 4096}, tier="large"),
    Case("residual_2048x4096", {"N": 2048, "E": 4096}, {"residual": True}, tier="large"),
    Case("large_8192x8192", {"N": 8192, "E": 8192}, {"residual": True}, tier="large"),
    # In float64 the definition, too, loses the digits of rms_norm's gradient, a small rest at a small eps.
    _awkward("one_element", 1, 1),
    _awkward("one_element_eps", 1, 1, (torch.float64,), eps=0.5),
    _awkward("ragged", 3, 1031, ALL_DTYPES),
    _awkward("offset", 5, 77, ALL_DTYPES, weight_offset=1.0),
    _awkward("residual", 5, 77, ALL_DTYPES, residual=True),
    _awkward("float32_weight", 7, 96, weight="float32"),
    _awkward("strided_residual", 7, 130, ALL_DTYPES, memory="strided", residual=True),
    _awkward("transposed", 7, 130, memory="transposed"),
    _awkward("misaligned", 5, 131, ALL_DTYPES, memory="misaligned", residual=True),
    _awkward("groups_of_rows", 193, 40, ALL_DTYPES, residual=True),
    _awkward("blocks", 2, 9001),
    _awkward("three_dimensions", 6, 64, memory="cube"),
    _awkward("large_mean", 4, 513, (torch.float32, torch.float64), shift=1e3),
    _awkward("small", 3, 64, scale=1e-4, eps=1e-6),
    _awkward("empty_rows", 0, 8, residual=True),
    _awkward("empty_columns", 4, 0),
)
BIASED = (
    Case("bias_1024x2048", {"N": 1024, "E": 2048}, {"bias": True}),
    _awkward("bias", 5, 77, ALL_DTYPES, bias=True),
    _awkward("bias_residual_offset", 4, 130, bias=True, residual=True, weight_offset=1.0, weight="float32"),
)


def make(case: Case, dtype: torch.dtype, generator: torch.Generator, device: torch.device) -> Inputs:
    """Normal inputs in the layout that the case asks for; weights about 1 - weight_offset."""
    n, e = case.sizes["N"], case.sizes["E"]
    options = case.options
    memory = options.get("memory")

    def rows() -> torch.Tensor:
        wide = randn((n, e + 3 * (memory == "strided")), torch.float32, generator, torch.device("cpu"))
        wide = (wide * options.get("scale", 1.0) + options.get("shift", 0.0)).to(device, dtype)
        if memory == "misaligned":
            return torch.cat([wide.new_zeros(1), wide.flatten()])[1:].view(n, e)
        if memory == "transposed":
            return wide.t().contiguous().t()
        return wide.view(2, n // 2, e).transpose(0, 1) if memory == "cube" else wide[:, wide.shape[1] - e :]

    offset = options.get("weight_offset", 0.0)
    parameter = torch.float32 if options.get("weight") == "float32" else dtype
    args = {"x": rows(), "weight": randn((e,), parameter, generator, device) * 0.2 + (1.0 - offset)}
    if options.get("bias"):
        args["bias"] = randn((e,), parameter, generator, device)
    if options.get("residual"):
        args["residual"] = rows()
    wrt = tuple(args)
    return Inputs(args | {name: options[name] for name in ("weight_offset", "eps") if name in options}, wrt)


def cost(case: Case, dtype: torch.dtype, direction: Direction) -> Cost:
    """Forward reads the rows and writes the result; backward reads both and writes one more."""
    n = case.sizes["N"] * case.sizes["E"]
    residual = bool(case.options.get("residual"))
    tensors = 2 + 2 * residual if direction == "forward" else 3 + residual
    return Cost(flops=n * (8 if direction == "forward" else 14), bytes=n * itemsize(dtype) * tensors)


def _host_norm(host: Any, center: bool, backward: bool) -> Callable[[], Any]:
    import numpy

    x = (numpy.arange(16 * 1027, dtype=numpy.float32) * 0.37 % 11).reshape(16, 1027)
    weight, none = x[0], x[:0]
    if backward:
        mean = x.mean(-1) * center
        scale = 1 / numpy.sqrt((numpy.square(x).mean(-1) - mean**2) + 1e-5)
        statistics = numpy.stack((mean, scale, 0 * mean), -1)
        return lambda: host.norm_backward(x, none, x, weight, statistics, center=center)
    return lambda: host.norm(x, weight, none, x, center=center)


def _host_kernels(name: str, center: bool) -> tuple[HostKernel, ...]:
    return (
        HostKernel(name, lambda host: _host_norm(host, center, False)),
        HostKernel(f"{name}_backward", lambda host: _host_norm(host, center, True)),
    )


def _kernels(center: bool) -> Iterator[KernelBuild]:
    """Both directions with all that can be added, for every target: rows in registers and in blocks."""
    from rlhf_kernels.ops.norm import kernel_triton as k

    strides = dict.fromkeys(("x_stride", "residual_stride"), "i32")
    options = {"size": "i32", "eps": "fp32", "weight_offset": "fp32"}
    for name, size, dtype in (("4096", 4096, "bf16"), ("4096", 4096, "fp32"), ("long", 3 * k.LONG, "bf16")):
        forward = {
            f"{name}_ptr": f"*{dtype}" for name in ("x", "residual", "weight", "bias", "out", "summed")
        }
        forward |= {"statistics_ptr": "*fp32", **strides, **options}
        backward = {f"{name}_ptr": f"*{dtype}" for name in ("grad", "also", "x", "weight")}
        backward |= {f"{name}_ptr": "*fp32" for name in ("statistics",)} | {"grad_x_ptr": f"*{dtype}"}
        backward |= {"by_weight_ptr": "*fp32", "by_bias_ptr": "*fp32"}
        backward |= (
            dict.fromkeys(("grad_stride", "also_stride", "x_stride", "rows", "share"), "i32") | options
        )
        block = k.block_of(size)
        shape = {"CENTER": center, "BIAS": center, "WHOLE": size <= block, "BLOCK": block}
        builds = (
            ("forward", k.forward_kernel, forward, {"ADDS": True}),
            ("backward", k.backward_kernel, backward, {"ALSO": True}),
        )
        for direction, kernel, signature, constants in builds:
            aligned = tuple(a for a in signature if a.endswith(("_ptr", "_stride")) or a == "size")
            for target in TARGETS:
                yield KernelBuild(
                    f"{direction}_{name}/{dtype}", kernel, signature, shape | constants, target,
                    num_warps=k.warps_of(block), aligned=aligned,
                )  # fmt: skip


KNOBS = (Knob("grain", "native", (32768, 8192, 131072)),)

SPECS = (
    OpSpec(
        name="layer_norm",
        family="norm",
        summary="mean 0, variance 1, weight; after adding a residual",
        function=layer_norm,
        reference=reference.layer_norm,
        torch_form=kernel_torch.layer_norm,
        make=make,
        cost=cost,
        cases=(*COMMON, *BIASED),
        floor=2.0,
        kernels=lambda: _kernels(True),
        host_kernels=_host_kernels("layer_norm", True),
        knobs=KNOBS,
    ),
    OpSpec(
        name="rms_norm",
        family="norm",
        summary="mean square 1, weight; after adding a residual",
        function=rms_norm,
        reference=reference.rms_norm,
        torch_form=kernel_torch.rms_norm,
        make=make,
        cost=cost,
        cases=COMMON,
        floor=2.0,
        kernels=lambda: _kernels(False),
        host_kernels=_host_kernels("rms_norm", False),
        knobs=KNOBS,
    ),
)
