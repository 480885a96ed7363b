"""What the engine and the tests need to know of rotary."""

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
from rlhf_kernels.ops.rotary import kernel_torch, reference, rotary, rotary_tables

ALL_DTYPES = (*FLOAT_DTYPES, torch.float64)
PER_ROW = {"per_row": True}


def _sizes(B: int, H: int, T: int, D: int) -> dict[str, int]:
    return {"B": B, "H": H, "T": T, "D": D}


CASES = (
    Case("small_2x4x64x32", _sizes(2, 4, 64, 32), tier="smoke"),
    Case("palm_8x8x512x64", _sizes(8, 8, 512, 64)),
    Case("palm_xpos_8x8x512x64", _sizes(8, 8, 512, 64), {"xpos": 512}),
    Case("llama_2x32x1024x128", _sizes(2, 32, 1024, 128)),
    Case("projected_4x16x512x128", _sizes(4, 16, 512, 128), {"layout": "BTHD"}),
    Case("interleaved_4x16x512x64", _sizes(4, 16, 512, 64), {"interleaved": True}),
    Case("left_padded_16x8x256x64", _sizes(16, 8, 256, 64), PER_ROW),
    Case("decode_64x32x1x128", _sizes(64, 32, 1, 128), PER_ROW),
    Case("long_1x32x8192x128", _sizes(1, 32, 8192, 128), tier="large"),
    Case("many_4x32x8192x128", _sizes(4, 32, 8192, 128), tier="large", dtypes=(torch.bfloat16,)),
    Case("one_pair", _sizes(1, 1, 1, 2), tier="awkward", dtypes=ALL_DTYPES),
    Case("ragged_2x3x37x10", _sizes(2, 3, 37, 10), {"xpos": 16}, "awkward", ALL_DTYPES),
    Case("interleaved_3x1x19x6", _sizes(3, 1, 19, 6), PER_ROW | {"interleaved": True}, "awkward", ALL_DTYPES),
    Case("transposed_2x5x33x24", _sizes(2, 5, 33, 24), PER_ROW | {"layout": "BTHD"}, "awkward", ALL_DTYPES),
    Case("tiles_1x2x70x96", _sizes(1, 2, 70, 96), tier="awkward"),
    Case("five_dimensions", _sizes(2, 6, 9, 8), PER_ROW | {"layout": "split"}, "awkward"),
    Case("two_dimensions", _sizes(1, 1, 12, 8), {"layout": "TD"}, "awkward"),
    Case("columns_strided", _sizes(2, 2, 7, 12), {"layout": "columns"}, "awkward"),
    Case("no_rows", _sizes(0, 4, 8, 16), tier="awkward"),
    Case("no_steps", _sizes(2, 4, 0, 16), tier="awkward"),
)  # fmt: skip

# How x of B, H, T, D lies in memory: made in one shape, seen in another.
LAYOUTS: dict[str, Callable[..., torch.Tensor]] = {
    "BHTD": lambda new, B, H, T, D: new(B, H, T, D),
    "BTHD": lambda new, B, H, T, D: new(B, T, H, D).transpose(1, 2),
    "split": lambda new, B, H, T, D: new(B, T, 2, H // 2, D + 2)[..., 2:].permute(0, 3, 2, 1, 4),
    "TD": lambda new, B, H, T, D: new(T, D),
    "columns": lambda new, B, H, T, D: new(B, H, T, 2 * D)[..., ::2],
}


def make(case: Case, dtype: torch.dtype, generator: torch.Generator, device: torch.device) -> Inputs:
    """Queries and their table; `per_row` begins every row elsewhere, some with padding at position 0."""
    sizes, options = case.sizes, case.options
    layout = LAYOUTS[options.get("layout", "BHTD")]
    x = layout(lambda *shape: randn(shape, dtype, generator, device), **sizes)
    positions = torch.arange(sizes["T"], device=device)
    if options.get("per_row"):
        starts = torch.arange(sizes["B"], device=device)[:, None] * 37 % 101 - 20
        positions = (positions + starts).clamp(min=0)
    tables = rotary_tables(
        positions, sizes["D"], xpos_scale_base=options.get("xpos"), xpos_center=sizes["T"] // 2
    )
    args: dict[str, Any] = {"x": x, "tables": tables.query}
    if options.get("interleaved"):
        args["interleaved"] = True
    return Inputs(args, wrt=("x",))


def cost(case: Case, dtype: torch.dtype, direction: Direction) -> Cost:
    """Either direction reads and writes x once and reads the tables once."""
    B, H, T, D = (case.sizes[size] for size in "BHTD")
    tables = (B if case.options.get("per_row") else 1) * T * D * 4
    return Cost(flops=3 * B * H * T * D, bytes=2 * B * H * T * D * itemsize(dtype) + tables)


def kernels() -> Iterator[KernelBuild]:
    """Both pairings in every dtype for every target, and the conjugate once, at heads of 64 and 128."""
    from rlhf_kernels.ops.rotary import kernel_triton as k

    flags = [(False, False), (True, False), (False, True)]
    for target in TARGETS:
        for dtype in ("fp32", "bf16", "fp16"):
            for D, (interleaved, conjugate) in [(64, flag) for flag in flags] + [(128, flags[0])]:
                name = "interleaved" if interleaved else "conjugate" if conjugate else "halves"
                block_t, block = k.blocks(512, D // 2)
                pointers = {
                    "x_ptr": f"*{dtype}",
                    "cos_ptr": "*fp32",
                    "sin_ptr": "*fp32",
                    "out_ptr": f"*{dtype}",
                }
                aligned = (*pointers, "stride0", "stride1", "stride2", "stride_t", "half")
                integers = (*aligned[4:], "size1", "size2", "steps", "heads_per_table")
                yield KernelBuild(
                    f"{name}_d{D}/{dtype}", k.rotary_kernel, pointers | dict.fromkeys(integers, "i32"),
                    {"INTERLEAVED": interleaved, "CONJUGATE": conjugate, "BLOCK_T": block_t, "BLOCK": block},
                    target, num_warps=k.NUM_WARPS, aligned=aligned,
                )  # fmt: skip


def _host_rotary(host: Any, interleaved: bool) -> Callable[[], Any]:
    import numpy

    x = numpy.linspace(-1, 1, 256 * 64, dtype=numpy.float32).reshape(256, 64)
    angles = numpy.linspace(0, 9, 256 * 32, dtype=numpy.float32).reshape(256, 32)
    cos, sin = numpy.cos(angles), numpy.sin(angles)
    return lambda: host.rotary(x, cos, sin, interleaved)


SPECS = (
    OpSpec(
        name="rotary",
        family="rotary",
        summary="rotary position embedding, halves or neighbours, with xPos",
        function=rotary,
        reference=reference.rotary,
        torch_form=kernel_torch.rotary,
        make=make,
        cost=cost,
        cases=CASES,
        kernels=kernels,
        host_kernels=(
            HostKernel("rotary_halves", lambda host: _host_rotary(host, False)),
            HostKernel("rotary_neighbours", lambda host: _host_rotary(host, True)),
        ),
        knobs=(Knob("grain", "native", (32768, 4096, 16384, 131072)),),
    ),
)
