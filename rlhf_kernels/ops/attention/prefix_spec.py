"""What the engine and the tests need to know of attention_prefix."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from rlhf_kernels.engine.spec import (
    FLOAT_DTYPES,
    TARGETS,
    Case,
    Cost,
    Direction,
    Inputs,
    KernelBuild,
    OpSpec,
    itemsize,
    randn,
)
from rlhf_kernels.ops.attention import attention_prefix, prefix_kernel_torch, prefix_reference
from rlhf_kernels.ops.rotary import rotary_tables

TYPICAL = (torch.float32, torch.bfloat16)  # float16 is slow on CPUs


def _case(name: str, sizes: str, tier: str, **options: Any) -> Case:
    """`sizes` is P x n x H/G x T x S x U x D; `dtypes` is no option."""
    prefixes, n, heads, *rest = sizes.split("x")
    letters = dict(zip("PNHGTSUD", map(int, (prefixes, n, *heads.split("/"), *rest))))
    dtypes = options.pop("dtypes", FLOAT_DTYPES)
    return Case(name, letters, options, tier, dtypes)


CASES = (
    _case("small", "2x3x4/1x16x16x24x32", "smoke", mask=True, dtypes=(*FLOAT_DTYPES, torch.float64)),
    _case("palm_8_responses", "1x8x8/1x128x128x384x64", "typical", mask=True, dtypes=TYPICAL),
    _case("grpo_16_responses", "4x16x16/2x512x512x1024x128", "large", mask=True, dtypes=TYPICAL),
    _case("ragged", "2x2x2/1x20x24x20x32", "awkward", mask=True, return_lse=True, dtypes=TYPICAL),
    _case("open", "1x2x2/2x18x18x20x32", "awkward", causal=False, dtypes=TYPICAL),
    _case("tiny", "1x2x2/1x3x3x5x32", "awkward", mask=True, dtypes=TYPICAL),
    _case("rotary", "2x2x1/1x6x7x18x32", "awkward", mask=True, rotary="prefixes", dtypes=TYPICAL),
    _case("rotary_shared", "1x2x2/1x5x6x3x32", "awkward", rotary="shared", dtypes=TYPICAL),
    _case("no_prefix", "1x2x2/1x5x5x0x32", "awkward"),
    _case("no_rows", "1x0x2/1x5x5x7x32", "awkward"),
)  # fmt: skip


def make(case: Case, dtype: torch.dtype, generator: torch.Generator, device: torch.device) -> Inputs:
    """Normal inputs; `mask` pads prefixes on the left and rows on the right, with NaN that none may see."""
    P, n, H, G, T, S, U, D = (case.sizes[letter] for letter in "PNHGTSUD")
    shapes = {"q": (n * P, H, T, D), "k": (n * P, G, S, D), "v": (n * P, G, S, D),
              "prefix_k": (P, G, U, D), "prefix_v": (P, G, U, D)}  # fmt: skip
    args: dict[str, Any] = {name: randn(shape, dtype, generator, device) for name, shape in shapes.items()}
    options = dict(case.options)
    if pattern := options.pop("rotary", None):
        positions = torch.arange(U + S, device=device)
        if pattern == "prefixes":  # padded on the left
            positions = positions - torch.arange(P, device=device)[:, None]
        args["rotary"] = rotary_tables(positions, D, xpos_scale_base=512)
    if options.pop("mask", False):
        row, prefix = (torch.arange(rows, device=device)[:, None] for rows in (n * P, P))
        args["key_mask"] = torch.arange(S, device=device) < torch.where(row == 0, 1, S - S // 4 * (row % 3))
        args["prefix_mask"] = torch.arange(U, device=device) >= U // 3 * (1 + prefix % 2)
        for name, mask in (("k", "key_mask"), ("v", "key_mask"), ("prefix_k", "prefix_mask"),
                           ("prefix_v", "prefix_mask")):  # fmt: skip
            args[name].masked_fill_(~args[mask][:, None, :, None], float("nan"))
    return Inputs(args | options, wrt=tuple(shapes))


def cost(case: Case, dtype: torch.dtype, direction: Direction) -> Cost:
    """Two products forward and five backward over the pairs that may meet but for the masks."""
    P, n, H, G, T, S, U, D = (case.sizes[letter] for letter in "PNHGTSUD")
    own = T * S - T * (T - 1) // 2 if case.options.get("causal", True) else T * S
    pairs = n * P * H * (T * U + own)
    rows, keys = n * P * H * T * D * itemsize(dtype), (n * P * S + P * U) * G * D * itemsize(dtype)
    if direction == "forward":
        return Cost(4 * D * pairs, 2 * rows + 2 * keys + 4 * n * P * H * T)
    return Cost(10 * D * pairs, 4 * rows + 4 * keys + 4 * n * P * H * T)


def kernels() -> Iterator[KernelBuild]:
    """What joins the parts; the rest is attention's."""
    from rlhf_kernels.ops.attention import prefix_kernel_triton as k

    for target in TARGETS:
        for dtype, size in (("bf16", 64), ("bf16", 128), ("fp32", 64)):
            types = dict.fromkeys(("prefix_out", "own_out", "out"), f"*{dtype}")
            types |= dict.fromkeys(("prefix_lse", "own_lse", "lse"), "*fp32")
            signature = types | dict.fromkeys(("rows", "H", "T", "n"), "i32")
            constants = {"ROWS": k.JOINED_ROWS, "D": size, "WIDTH": size}
            yield KernelBuild(f"join/{dtype}/{size}", k.join_kernel, signature, constants, target,
                              num_warps=k.JOIN_WARPS, aligned=tuple(types))  # fmt: skip


SPEC = OpSpec(
    name="attention_prefix",
    family="attention",
    summary="attention of n responses to one prompt, whose keys are read once",
    function=attention_prefix,
    reference=prefix_reference.attention_prefix,
    torch_form=prefix_kernel_torch.attention_prefix,
    make=make,
    cost=cost,
    cases=CASES,
    floor=4.0,
    kernels=kernels,
)
