"""What the engine and the tests need to know of attention_varlen."""

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
from rlhf_kernels.ops.attention import attention_varlen, varlen_kernel_torch, varlen_reference
from rlhf_kernels.ops.attention.builds import build
from rlhf_kernels.ops.rotary import RotaryTables, rotary_tables

TYPICAL = (torch.float32, torch.bfloat16)  # float16 is slow on CPUs


def _case(name: str, sizes: str, tier: str, lengths: tuple[int, ...], **options: Any) -> Case:
    """`sizes` is H/GxD; `behind` rows follow the last sequence; `dtypes` is no option."""
    heads, size = sizes.split("x")
    letters = dict(zip("HGD", map(int, (*heads.split("/"), size)))) | {"N": sum(lengths)}
    dtypes = options.pop("dtypes", FLOAT_DTYPES)
    return Case(name, letters, {"lengths": lengths} | options, tier, dtypes)


CASES = (
    _case("small", "4/1x32", "smoke", (17, 30, 5), causal=True, dtypes=(*FLOAT_DTYPES, torch.float64)),
    _case("palm_1024", "8/1x64", "typical", (512, 84, 300, 128), causal=True, rotary="xpos", dtypes=TYPICAL),
    _case("llama8b_1024", "8/2x128", "typical", (700, 324), causal=True, dtypes=TYPICAL),
    _case("palm_16k", "8/1x64", "large", (2048, 512) * 6 + (1024,), causal=True, rotary="xpos"),
    _case("ragged", "2/1x32", "awkward", (33, 0, 1, 20), causal=True, behind=20, rotary="plain",
          dtypes=(torch.bfloat16, torch.float16)),
    _case("cross", "2/2x32", "awkward", (5, 37, 0, 9), lengths_k=(20, 33, 6, 0), return_lse=True,
          dtypes=TYPICAL),
    _case("window", "2/1x32", "awkward", (50, 3), causal=True, window=20, softcap=3.0, dtypes=TYPICAL),
    _case("no_sequence", "2/1x32", "awkward", (), causal=True, behind=3),
    _case("no_rows", "2/1x32", "awkward", (0, 0)),
)  # fmt: skip


def _bounds(lengths: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor((0, *lengths), device=device).cumsum(0).to(torch.int32)


def _positions(lengths: tuple[int, ...], rows: int) -> torch.Tensor:
    """Of every row in its sequence, and 0 behind the last."""
    counted = torch.cat([torch.arange(n) for n in lengths] or [torch.arange(0)])
    return torch.cat((counted, counted.new_zeros(rows - counted.numel())))


def make(case: Case, dtype: torch.dtype, generator: torch.Generator, device: torch.device) -> Inputs:
    """Normal inputs, also in the rows behind the last sequence."""
    H, G, D = (case.sizes[letter] for letter in "HGD")
    options = dict(case.options)
    lengths, behind = options.pop("lengths"), options.pop("behind", 0)
    lengths_k = options.pop("lengths_k", None)
    rows, keys = (sum(each) + behind for each in (lengths, lengths_k or lengths))
    q, k, v = (randn(shape, dtype, generator, device) for shape in ((rows, H, D), (keys, G, D), (keys, G, D)))
    args = {"q": q, "k": k, "v": v, "cu_seqlens": _bounds(lengths, device)}
    if lengths_k:
        args["cu_seqlens_k"] = _bounds(lengths_k, device)
    if kind := options.pop("rotary", None):
        base = 64 if kind == "xpos" else None
        args["rotary"] = RotaryTables(*(
            rotary_tables(_positions(each, n).to(device), D, xpos_scale_base=base)[which]
            for which, (each, n) in enumerate(((lengths, rows), (lengths_k or lengths, keys)))
        ))  # fmt: skip
    return Inputs(args | options, wrt=("q", "k", "v"))


def cost(case: Case, dtype: torch.dtype, direction: Direction) -> Cost:
    """Two products forward and five backward over the pairs that meet, 2 D operations each."""
    H, G, D = (case.sizes[letter] for letter in "HGD")
    options = case.options
    lengths, behind = options["lengths"], options.get("behind", 0)
    lengths_k = options.get("lengths_k") or lengths
    pairs = 0
    for t, s in zip(lengths, lengths_k):
        ahead = torch.arange(s) - torch.arange(t)[:, None] - (s - t)
        see = ahead <= 0 if options.get("causal") else torch.ones_like(ahead, dtype=torch.bool)
        pairs += H * int((see & (ahead.abs() < options.get("window", 2**40))).sum())
    rows, keys = ((sum(each) + behind) * D * itemsize(dtype) for each in (lengths, lengths_k))
    tables = 4 * D * (sum(lengths) + sum(lengths_k)) if "rotary" in options else 0
    statistics = 4 * H * (sum(lengths) + behind) + tables
    if direction == "forward":
        return Cost(4 * D * pairs, 2 * H * rows + 2 * G * keys + statistics)
    return Cost(10 * D * pairs, 4 * H * rows + 4 * G * keys + statistics)


def kernels() -> Iterator[KernelBuild]:
    """The plan, and packed rows where they turn too: attention's kernels, so that few sizes will do."""
    from rlhf_kernels.ops.attention import triton_config as config
    from rlhf_kernels.ops.attention.kernel_triton import PLAN_BLOCK, plan_kernel

    plan = {"cu_seqlens": "*i32", "plan": "*i32"} | dict.fromkeys(("n", "rows", "tile"), "i32")
    for target in TARGETS:
        yield KernelBuild("plan", plan_kernel, plan, {"BLOCK": PLAN_BLOCK}, target, aligned=("cu_seqlens",))
        for kernel in config.KERNELS:
            turned = config.turns(target, torch.bfloat16, 64, packed=True)
            yield build(kernel, target, 64, "bf16", {"CAUSAL": True, "ROTARY": turned, "PACKED": True})
            if target == "sm_90":
                yield build(kernel, target, 128, "bf16", {"CAUSAL": True, "PACKED": True})


SPEC = OpSpec(
    name="attention_varlen",
    family="attention",
    summary="attention of packed sequences, without padding",
    function=attention_varlen,
    reference=varlen_reference.attention_varlen,
    torch_form=varlen_kernel_torch.attention_varlen,
    make=make,
    cost=cost,
    cases=CASES,
    floor=4.0,
    kernels=kernels,
)
