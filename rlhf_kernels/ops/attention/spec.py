"""What the engine and the tests need to know of attention."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from rlhf_kernels.engine.spec import (
    FLOAT_DTYPES,
    TARGETS,
    Case,
    Cost,
    Direction,
    Inputs,
    KernelBuild,
    Knob,
    OpSpec,
    itemsize,
    randn,
)
from rlhf_kernels.ops.attention import (
    attention,
    decode_spec,
    kernel_torch,
    prefix_spec,
    reference,
    varlen_spec,
)
from rlhf_kernels.ops.attention.builds import build, gluon_build
from rlhf_kernels.ops.rotary import RotaryTables, rotary_tables

HALF = (torch.bfloat16, torch.float16)
TYPICAL = (torch.float32, torch.bfloat16)  # float16 is slow on CPUs
ALL_DTYPES = (*FLOAT_DTYPES, torch.float64)


def _case(name: str, sizes: str, tier: str = "typical", **options: Any) -> Case:
    """`sizes` is B x H/G x T x S x D; `checked` and `dtypes` are not options."""
    batch, heads, *rest = sizes.split("x")
    letters = dict(zip("BHGTSD", map(int, (batch, *heads.split("/"), *rest))))
    dtypes = options.pop("dtypes", FLOAT_DTYPES)
    return Case(name, letters, options, tier, dtypes, options.pop("checked", None))


CASES = (
    _case("small", "2x4/1x64x64x32", "smoke", causal=True, mask="tail", dtypes=ALL_DTYPES),
    _case("palm_512", "2x8/1x512x512x64", causal=True, mask="tail", dtypes=TYPICAL),
    _case("palm_1024", "1x8/1x1024x1024x64", causal=True, mask="head", dtypes=TYPICAL),
    _case("palm_xpos_512", "1x8/1x512x512x64", causal=True, mask="tail", rotary="xpos", dtypes=TYPICAL),
    _case("mistral_512", "1x8/2x512x512x128", causal=True, window=128, dtypes=TYPICAL,
          checked={"groups": (1,)}),
    _case("gpt2_512", "1x12/12x512x512x64", causal=True, dtypes=TYPICAL),
    _case("llama8b_512", "1x32/8x512x512x128", causal=True, dtypes=TYPICAL, checked={"groups": (0, 7)}),
    _case("encoder_512", "1x16/16x512x512x64", mask="tail", dtypes=TYPICAL, checked={"groups": (0, 15)}),
    _case("palm_2048", "16x8/1x2048x2048x64", "large", causal=True, mask="tail", checked={"batch": (0, 15)}),
    _case("palm_2048_hole", "16x8/1x2048x2048x64", "large", causal=True, mask="middle",
          checked={"batch": (5,)}),
    _case("palm_xpos_2048", "16x8/1x2048x2048x64", "large", causal=True, mask="tail", rotary="xpos",
          dtypes=HALF, checked={"batch": (0, 15)}),
    _case("palm_8192", "8x8/1x8192x8192x64", "large", causal=True, dtypes=HALF, checked={"batch": (7,)}),
    _case("gpt2_1024", "32x12/12x1024x1024x64", "large", causal=True, checked={"batch": (31,)}),
    _case("llama8b_4096", "4x32/8x4096x4096x128", "large", causal=True, dtypes=HALF,
          checked={"batch": (3,), "groups": (0, 7)}),
    _case("llama8b_8192", "2x32/8x8192x8192x128", "large", causal=True, dtypes=HALF,
          checked={"batch": (1,), "groups": (0, 7)}),
    _case("full_16384", "1x16/16x16384x16384x128", "large", dtypes=HALF, checked={"groups": (0, 15)}),
    _case("ragged_64", "4x8/2x1000x1300x64", "large", causal=True, mask="random", return_lse=True,
          dtypes=HALF, checked={"batch": (3,)}),
    _case("ragged_128", "2x8/8x777x1111x128", "large", dtypes=HALF, checked={"groups": (0, 7)}),
    _case("more_keys", "1x4/2x45x75x32", "awkward", causal=True, dtypes=ALL_DTYPES),
    _case("more_queries", "1x2/1x75x45x32", "awkward", causal=True, dtypes=ALL_DTYPES),
    _case("full_ragged", "1x2/2x37x70x32", "awkward", return_lse=True),
    _case("lse_causal", "2x2/1x50x50x32", "awkward", causal=True, mask="row", return_lse=True),
    _case("head_128", "1x2/1x40x40x128", "awkward", causal=True, mask="head"),
    _case("head_64_whole_tiles", "1x2/1x64x64x64", "awkward", causal=True),
    _case("mask_middle", "2x2/1x70x70x32", "awkward", mask="middle"),
    _case("mask_random", "2x2/2x33x65x32", "awkward", causal=True, mask="random", dtypes=ALL_DTYPES),
    _case("mask_whole_row", "2x2/1x35x35x32", "awkward", mask="row"),
    _case("strided", "2x2/1x40x40x32", "awkward", causal=True, mask="tail", strided=True),
    _case("scaled", "1x2/1x33x40x32", "awkward", causal=True, scale=0.5),
    _case("rotary", "1x2/2x50x50x32", "awkward", causal=True, rotary="plain", dtypes=ALL_DTYPES),
    _case("palm_ragged", "2x2/1x40x50x64", "awkward", causal=True, mask="head", rotary="xpos_rows"),
    _case("palm_96", "1x2/1x40x40x96", "awkward", causal=True, mask="tail", rotary="xpos", dtypes=TYPICAL),
    _case("turned_before", "1x2/1x20x20x256", "awkward", causal=True, rotary="plain_rows", dtypes=TYPICAL),
    _case("window_causal", "2x1/1x90x90x32", "awkward", causal=True, window=20, dtypes=ALL_DTYPES),
    _case("window_both", "1x2/2x70x90x32", "awkward", mask="random", window=17, dtypes=TYPICAL),
    _case("window_more_queries", "1x2/1x90x33x32", "awkward", window=5, return_lse=True, dtypes=TYPICAL),
    _case("softcap", "2x2/1x40x40x32", "awkward", causal=True, mask="tail", softcap=2.0, dtypes=TYPICAL),
    _case("gemma", "1x2/1x70x70x32", "awkward", causal=True, window=40, softcap=5.0, rotary="plain",
          return_lse=True, dtypes=TYPICAL),
    _case("head_96", "1x2/1x40x40x96", "awkward", causal=True, mask="middle", dtypes=TYPICAL),
    _case("head_256", "1x2/2x35x40x256", "awkward", causal=True),
    _case("one_query", "2x4/1x1x40x32", "awkward", causal=True, mask="head"),
    _case("two_keys", "1x2/1x33x2x32", "awkward", causal=True),
    _case("no_queries", "2x2/1x0x5x32", "awkward"),
    _case("no_keys", "2x2/1x5x0x32", "awkward", causal=True),
    _case("no_batch", "0x2/1x5x5x32", "awkward"),
)  # fmt: skip


def key_mask(pattern: str, batch: int, keys: int) -> Tensor:
    """Which keys may be seen; the same for every dtype and device, and other in every row of the batch."""
    s = torch.arange(keys)
    hidden = keys // 4 * (1 + torch.arange(batch)[:, None] % 3)  # a quarter to three quarters
    if pattern == "tail":
        return s < keys - hidden
    if pattern == "head":
        return s >= hidden
    if pattern == "middle":
        return (s < keys // 8) | (s >= keys // 8 + hidden)
    if pattern == "row":
        return (s >= 3) & (torch.arange(batch)[:, None] % 2 == 1)
    return torch.rand(batch, keys, generator=torch.Generator().manual_seed(keys)) > 0.5


def make(case: Case, dtype: torch.dtype, generator: torch.Generator, device: torch.device) -> Inputs:
    """Normal inputs, NaN and infinity in masked slots; `strided` slices a fused projection into heads."""
    B, H, G, T, S, D = (case.sizes[letter] for letter in "BHGTSD")
    options = dict(case.options)
    pattern = options.pop("mask", None)
    if options.pop("strided", False):
        fused = randn((B, T, H + 2 * G, D), dtype, generator, device).transpose(1, 2)
        q, k, v = fused.split((H, G, G), dim=1)
    else:
        q, k, v = (randn((B, *rest, D), dtype, generator, device) for rest in ((H, T), (G, S), (G, S)))
    args = {"q": q, "k": k, "v": v}
    if pattern:
        mask = key_mask(pattern, B, S).to(device)
        k.masked_fill_(~mask[:, None, :, None], float("nan"))
        v.masked_fill_(~mask[:, None, :, None], float("inf"))
        args["key_mask"] = mask
    if tables := options.pop("rotary", None):
        args["rotary"] = _tables(tables, B, T, S, D, device)
    return Inputs(args | options, wrt=("q", "k", "v"))


def _tables(kind: str, B: int, T: int, S: int, D: int, device: torch.device) -> RotaryTables:
    """Tables of the keys' positions and of the last T of them, `rows`: other positions in every row."""
    positions = torch.arange(S, device=device)
    if kind.endswith("rows"):
        positions = (positions + torch.arange(B, device=device)[:, None] * 11 - 9).clamp(min=0)
    base = 64 if kind.startswith("xpos") else None
    keys = rotary_tables(positions, D, xpos_scale_base=base, xpos_center=S // 2).key
    queries = rotary_tables(positions[..., S - T :], D, xpos_scale_base=base, xpos_center=S // 2).query
    return RotaryTables(queries, keys)


def cost(case: Case, dtype: torch.dtype, direction: Direction) -> Cost:
    """Two products forward and five backward over the pairs that may meet, 2 D operations each."""
    B, H, G, T, S, D = (case.sizes[letter] for letter in "BHGTSD")
    options = case.options
    ahead = torch.arange(S) - (S - T)
    window = options.get("window", 2**40)
    # Key s is seen by the queries [first, last).
    first = (ahead if options.get("causal") else ahead - window + 1).clamp(0, T)
    queries = ((ahead + window).clamp(0, T) - first).clamp(min=0)
    pattern = options.get("mask")
    seen = key_mask(pattern, B, S) if pattern else torch.ones(B, S, dtype=torch.bool)
    pairs = H * int((seen * queries).sum())
    rows, keys = B * H * T * D * itemsize(dtype), B * G * S * D * itemsize(dtype)
    tables = 4 * (T + S) * D * (B if "rows" in options.get("rotary", "") else 1) if "rotary" in options else 0
    if direction == "forward":
        return Cost(4 * D * pairs, 2 * rows + 2 * keys + 4 * B * H * T + tables)
    return Cost(10 * D * pairs, 4 * rows + 4 * keys + 4 * B * H * T + tables)


def narrow(
    inputs: Inputs, checked: Mapping[str, tuple[int, ...]]
) -> tuple[Inputs, Callable[[Tensor], Tensor]]:
    """Some rows of the batch and some groups with all their query heads: what a gradient of k needs whole."""
    q, k = inputs.args["q"], inputs.args["k"]
    batch = list(checked.get("batch", range(q.shape[0])))
    groups = list(checked.get("groups", range(k.shape[1])))
    each = q.shape[1] // k.shape[1]
    heads = [g * each + i for g in groups for i in range(each)]

    def rows(x: Tensor) -> Tensor:
        return x[batch][:, heads]

    args = inputs.args | {"q": rows(q)} | {name: inputs.args[name][batch][:, groups] for name in ("k", "v")}
    if "key_mask" in args:
        args["key_mask"] = args["key_mask"][batch]
    if "rotary" in args:
        part = Inputs({"rotary": args["rotary"]}).map(lambda t: t[batch] if t.dim() == 3 else t)
        args |= part.args
    return Inputs(args, inputs.wrt), rows


def kernels() -> Iterator[KernelBuild]:
    """Every tile that may be chosen, with the flags of training, and the mask of keys alone."""
    from rlhf_kernels.ops.attention import triton_config as config
    from rlhf_kernels.ops.attention.kernel_triton import SPAN_BLOCK, key_span_kernel

    span = {"key_mask": "*u8", "span": "*i32", "stride_mb": "i32", "S": "i32"}
    for target in TARGETS:
        aligned = ("key_mask", "span")
        yield KernelBuild("key_span", key_span_kernel, span, {"BLOCK": SPAN_BLOCK}, target, aligned=aligned)
        for kernel in config.KERNELS:
            for size in config.HEAD_SIZES:
                for dtype, flags in _flags(target, size):
                    yield build(kernel, target, size, dtype, dict.fromkeys(flags, True))
    yield from _gluon_kernels()


def _gluon_kernels() -> Iterator[KernelBuild]:
    """The usual flags with every value of the knobs, and fewer flags with the defaults."""
    training = {"CAUSAL": True, "HAS_MASK": True}
    palm = training | {"ROTARY": True}
    for size in (64, 128):
        for kernel in ("forward", "query_gradient", "key_gradient"):
            gemma = {"CAUSAL": True, "HAS_WINDOW": True, "HAS_CAP": True, "ROTARY": True}
            gemma["ROTARY"] = kernel != "key_gradient" or size == 64  # else turned back after it
            for flags in (training, {"CAUSAL": True}, {"HAS_MASK": True}, {}, palm, gemma):
                yield gluon_build(kernel, size, "bf16", flags)
            yield gluon_build(kernel, size, "fp16", training)
        for block_n, pinned in itertools.product(*(knob.candidates for knob in KNOBS)):
            if (block_n, pinned) != (128, 1):
                yield gluon_build("forward", size, "bf16", training, block_n, pinned)


KNOBS = (
    Knob("block_n", "gluon", (128, 64), ("forward",)),
    Knob("pinned", "gluon", (1, 0), ("forward",)),
)


def _flags(target: str, size: int) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Each takes a second or two to compile, and code without a flag is part of the code with it: single
    flags for the usual heads, and small heads but for the usual flags, on sm_90 alone. Heads of 96 are tiles
    of 128 with a mask of columns."""
    from rlhf_kernels.ops.attention import triton_config as config

    training = ("CAUSAL", "HAS_MASK")
    if target != "sm_90" and size == 96:
        return
    yield "bf16", training
    if target != "sm_90" and size == 32:
        return
    if config.serves(torch.float32, size):
        yield "fp32", training
    if config.turns(target, torch.bfloat16, size):
        yield "bf16", (*training, "ROTARY")
    if target == "sm_90" and size in (64, 128):
        yield "bf16", ("CAUSAL",)
    if target == "sm_90" and size == 64:
        yield "fp16", training
        yield "bf16", ("HAS_MASK",)
        yield "bf16", ("CAUSAL", "HAS_WINDOW", "HAS_CAP")


SPECS = (
    OpSpec(
        name="attention",
        family="attention",
        summary="exact attention: grouped heads, rotary, causal, window, any key mask",
        function=attention,
        reference=reference.attention,
        torch_form=kernel_torch.attention,
        make=make,
        cost=cost,
        cases=CASES,
        floor=4.0,  # the weights are recomputed from a log-sum-exp in float32: its last bits are theirs
        narrow=narrow,
        kernels=kernels,
        knobs=KNOBS,
    ),
    varlen_spec.SPEC,
    prefix_spec.SPEC,
    decode_spec.SPEC,
)
