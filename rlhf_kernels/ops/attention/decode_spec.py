"""What the engine and the tests need to know of decode_attention."""

from __future__ import annotations

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
    HostKernel,
    Inputs,
    KernelBuild,
    Knob,
    OpSpec,
    itemsize,
    randn,
)
from rlhf_kernels.ops.attention import decode_attention, decode_kernel_torch, decode_reference

HALF = (torch.bfloat16, torch.float16)
TYPICAL = (torch.float32, torch.bfloat16)  # float16 is slow on CPUs


def _case(name: str, sizes: str, tier: str = "typical", **options: Any) -> Case:
    """`sizes` is B x H/G x C x D; `checked` and `dtypes` are not options."""
    batch, heads, *rest = sizes.split("x")
    letters = dict(zip("BHGCD", map(int, (batch, *heads.split("/"), *rest))))
    dtypes = options.pop("dtypes", FLOAT_DTYPES)
    return Case(name, letters, options, tier, dtypes, options.pop("checked", None))


# `rows` says which slots the rows see, `layout` how the cache lies, `scale` is an argument.
CASES = (
    _case("small", "2x4/1x64x32", "smoke", rows="ragged"),
    _case("palm_1x4096", "1x8/1x4096x64", dtypes=TYPICAL),
    _case("palm_128_1x4096", "1x8/1x4096x128", dtypes=TYPICAL),
    _case("palm_1x32768", "1x8/1x32768x64", "large", dtypes=TYPICAL),
    _case("palm_16x144", "16x8/1x144x64", dtypes=TYPICAL),
    _case("palm_16x256", "16x8/1x256x64", dtypes=TYPICAL),
    _case("palm_left_16x256", "16x8/1x256x64", rows="left", layout="slice", dtypes=TYPICAL),
    _case("llama8b_4x1024", "4x32/8x1024x128", rows="ragged", dtypes=TYPICAL),
    _case("gpt2_8x512", "8x12/12x512x64", rows="ragged", dtypes=TYPICAL),
    _case("palm_64x32768", "64x8/1x32768x64", "large", dtypes=HALF, checked={"batch": (0, 63)}),
    _case("llama8b_16x8192", "16x32/8x8192x128", "large", rows="ragged", dtypes=HALF,
          checked={"batch": (0, 15)}),
    _case("ragged", "3x4/2x75x32", "awkward", rows="ragged"),
    _case("left_padded", "3x4/1x75x64", "awkward", rows="left"),
    _case("nothing_seen", "4x2/1x40x32", "awkward", rows="nothing"),
    _case("int32", "3x2/1x50x32", "awkward", rows="ragged", whole="int32"),
    _case("head_128", "2x8/1x70x128", "awkward", rows="left"),
    _case("heads_alone", "2x3/3x66x32", "awkward", rows="ragged"),
    _case("seven_heads", "1x7/1x130x32", "awkward"),
    _case("many_heads", "1x40/2x33x32", "awkward"),
    _case("several_splits", "2x2/1x1100x32", "awkward", rows="left", dtypes=(torch.float32, torch.bfloat16)),
    _case("sliced", "2x4/2x45x32", "awkward", rows="left", layout="slice"),
    _case("steps_first", "2x4/2x45x32", "awkward", rows="ragged", layout="BCGD"),
    _case("columns_strided", "1x2/1x40x32", "awkward", layout="columns"),
    _case("scaled", "2x2/1x33x32", "awkward", scale=0.5),
    _case("one_slot", "2x2/1x1x32", "awkward"),
    _case("no_slots", "2x2/1x0x32", "awkward"),
    _case("no_batch", "0x2/1x5x32", "awkward", rows="ragged"),
)  # fmt: skip

# How a cache of B, G, C, D lies in memory: made in one shape, seen in another.
LAYOUTS: dict[str, Callable[..., Tensor]] = {
    "BGCD": lambda new, B, G, C, D: new(B, G, C, D),
    "BCGD": lambda new, B, G, C, D: new(B, C, G, D).transpose(1, 2),
    "slice": lambda new, B, G, C, D: new(B, G, C + 9, D)[:, :, :C],
    "columns": lambda new, B, G, C, D: new(B, G, C, 2 * D)[..., ::2],
}


def seen_slots(pattern: str | None, batch: int, slots: int) -> tuple[Tensor | None, Tensor | None]:
    """Starts and lengths of the rows; the same for every dtype and device, and other in every row."""
    row = torch.arange(batch)
    if pattern is None:
        return None, None
    if pattern == "nothing":  # at all, from the end on, beyond it, and a row that sees its last slot alone
        starts = torch.tensor([0, slots, slots - 5, slots - 1])[:batch]
        return starts, torch.tensor([0, slots, 3, slots + 7])[:batch]
    lengths = slots - row * 37 % max(1, slots // 2)
    return (row * 29 % max(1, slots // 3), lengths) if pattern == "left" else (None, lengths)


def make(case: Case, dtype: torch.dtype, generator: torch.Generator, device: torch.device) -> Inputs:
    """Normal inputs; NaN and infinity in the slots that a row does not see."""
    B, H, G, C, D = (case.sizes[letter] for letter in "BHGCD")
    layout = LAYOUTS[case.options.get("layout", "BGCD")]
    q = randn((B, H, 1, D), dtype, generator, device)
    k, v = (layout(lambda *s: randn(s, dtype, generator, device), B, G, C, D) for _ in range(2))
    args: dict[str, Any] = {"q": q, "k_cache": k, "v_cache": v}
    starts, lengths = seen_slots(case.options.get("rows"), B, C)
    see = decode_reference.seen(k.new_empty(B, G, C, 0, device="cpu"), lengths, starts)
    if see is not None:
        k.masked_fill_(~see[:, None, :, None].to(device), float("nan"))
        v.masked_fill_(~see[:, None, :, None].to(device), float("inf"))
    for name, whole in (("lengths", lengths), ("starts", starts)):
        if whole is not None:
            kind = torch.int32 if case.options.get("whole") == "int32" else torch.int64
            args[name] = whole.to(device=device, dtype=kind)
    if "scale" in case.options:
        args["scale"] = case.options["scale"]
    return Inputs(args)


def cost(case: Case, dtype: torch.dtype, direction: Direction) -> Cost:
    """Two products over the slots that are seen, each read once for all heads that share it."""
    B, H, G, C, D = (case.sizes[letter] for letter in "BHGCD")
    starts, lengths = seen_slots(case.options.get("rows"), B, C)
    slots = B * C
    if lengths is not None:
        low = 0 if starts is None else starts
        slots = int((lengths.clamp(max=C) - low).clamp(min=0).sum())
    return Cost(4 * D * H * slots, (2 * D * G * slots + 2 * B * H * D) * itemsize(dtype))


def narrow(
    inputs: Inputs, checked: Mapping[str, tuple[int, ...]]
) -> tuple[Inputs, Callable[[Tensor], Tensor]]:
    """Some rows of the batch."""
    batch = list(checked["batch"])
    rows = {name: x[batch] for name, x in inputs.args.items() if isinstance(x, Tensor)}
    return Inputs(inputs.args | rows), lambda out: out[batch]


def kernels() -> Iterator[KernelBuild]:
    """Every tile of up to 16 heads, with lengths and starts; on sm_90 without them, and 64 heads too."""
    from rlhf_kernels.ops.attention import decode_kernel_triton as k

    for target in TARGETS:
        for size in k.HEAD_SIZES:
            for dtype in ("bf16", "fp16", "fp32"):
                yield _split(k, target, size, dtype, 8, True)
            if target == "sm_90":
                yield _split(k, target, size, "bf16", 8, False)
                yield _split(k, target, size, "bf16", 64, True)
            yield _combine(k, target, size)


def _build(
    name: str, kernel: Any, target: str, types: dict[str, str], constants: dict[str, Any], ragged: bool,
    **launched: Any,
) -> KernelBuild:  # fmt: skip
    constants |= {"HAS_LENGTHS": ragged, "HAS_STARTS": ragged}
    constants |= {} if ragged else {"lengths": None, "starts": None}
    types = {"lengths": "*i64", "starts": "*i64"} | types
    signature = {arg: types.get(arg, "i32") for arg in kernel.arg_names if arg not in constants}
    strides = [arg for arg in signature if arg.startswith("stride")]
    aligned = (*(arg for arg, kind in signature.items() if kind.startswith("*")), *strides)
    return KernelBuild(name, kernel, signature, constants, target, aligned=aligned, **launched)


def _split(k: Any, target: str, size: int, dtype: str, each: int, ragged: bool) -> KernelBuild:
    wide = torch.float32 if dtype == "fp32" else torch.bfloat16
    heads, keys, warps, stages = k.tile(target, wide, size, each)
    types = dict.fromkeys(("q", "k", "v"), f"*{dtype}") | dict.fromkeys(("values", "tops", "totals"), "*fp32")
    constants = {"BLOCK_H": heads, "BLOCK_N": keys, "D": size, "LEAST": k.least_keys(target),
                 "MOST": k.MOST_SPLITS, "UPCAST": False}  # fmt: skip
    name = f"split/{dtype}/{size}/heads{heads}{'/ragged' * ragged}"
    # 16 rows are too few for the large instructions of sm_90 and sm_100: there Triton takes those of sm_80.
    tensor_core = dtype != "fp32" and (heads >= 64 or target in ("sm_80", "gfx942"))
    return _build(
        name, k.split_kernel, target, types | {"scale_log2": "fp32"}, constants, ragged,
        num_warps=warps, num_stages=stages, tensor_core=tensor_core,
    )  # fmt: skip


def _combine(k: Any, target: str, size: int) -> KernelBuild:
    types = dict.fromkeys(("values", "tops", "totals"), "*fp32") | {"out": "*bf16"}
    constants = {"D": size, "LEAST": k.least_keys(target), "MOST": k.MOST_SPLITS}
    return _build(
        f"combine/bf16/{size}/ragged", k.combine_kernel, target, types, constants, True,
        num_warps=k.COMBINE_WARPS,
    )  # fmt: skip


def _host(host: Any, heads: int) -> Callable[[], Any]:
    import numpy

    q = numpy.linspace(-1, 1, heads * 64, dtype=numpy.float32).reshape(heads, 64)
    k = numpy.linspace(-1, 1, 600 * 64, dtype=numpy.float32).reshape(600, 64)
    return lambda: host.decode_attention(q, k, k, 0.125)


SPEC = OpSpec(
    name="decode_attention",
    family="attention",
    summary="one decoding step against a cache, split over the keys",
    function=decode_attention,
    reference=decode_reference.decode_attention,
    torch_form=decode_kernel_torch.decode_attention,
    make=make,
    cost=cost,
    cases=CASES,
    floor=4.0,
    narrow=narrow,
    kernels=kernels,
    host_kernels=(
        HostKernel("decode_heads", lambda host: _host(host, 8)),
        HostKernel("decode_head_alone", lambda host: _host(host, 1)),
    ),
    knobs=(Knob("grain", "native", (1000000, 250000, 4000000), ("forward",)),),
)
