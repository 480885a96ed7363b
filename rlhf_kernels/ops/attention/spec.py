"""What the engine and the tests need to know of attention."""

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
    Inputs,
    KernelBuild,
    OpSpec,
    itemsize,
    randn,
)
from rlhf_kernels.ops.attention import attention, decode_spec, kernel_torch, reference

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
    _case("gpt2_512", "1x12/12x512x512x64", causal=True, dtypes=TYPICAL),
    _case("llama8b_512", "1x32/8x512x512x128", causal=True, dtypes=TYPICAL, checked={"groups": (0, 7)}),
    _case("encoder_512", "1x16/16x512x512x64", mask="tail", dtypes=TYPICAL, checked={"groups": (0, 15)}),
    _case("palm_2048", "16x8/1x2048x2048x64", "large", causal=True, mask="tail", checked={"batch": (0, 15)}),
    _case("palm_2048_hole", "16x8/1x2048x2048x64", "large", causal=True, mask="middle",
          checked={"batch": (5,)}),
    _case("palm_8192", "8x8/1x8192x8192x64", "large", causal=True, dtypes=HALF, checked={"batch": (7,)}),
    _case("gpt2_1024", "32x12/12x1024x1024x64", "large", causal=True, checked={"batch": (31,)}),
    _case("llama8b_4096", "4x32/8x4096x4096x128", "large", causal=True, dtypes=HALF,
          checked={"batch": (3,), "groups": (0, 7)}),
    _case("full_16384", "1x16/16x16384x16384x128", "large", dtypes=HALF, checked={"groups": (0, 15)}),
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
    args = {"q": q, "k": k, "v": v, **options}
    if pattern:
        mask = key_mask(pattern, B, S).to(device)
        k.masked_fill_(~mask[:, None, :, None], float("nan"))
        v.masked_fill_(~mask[:, None, :, None], float("inf"))
        args["key_mask"] = mask
    return Inputs(args, wrt=("q", "k", "v"))


def cost(case: Case, dtype: torch.dtype, direction: Direction) -> Cost:
    """Two products forward and five backward over the pairs that may meet, 2 D operations each."""
    B, H, G, T, S, D = (case.sizes[letter] for letter in "BHGTSD")
    queries = (S - torch.arange(S)).clamp(max=T) if case.options.get("causal") else torch.full((S,), T)
    pattern = case.options.get("mask")
    seen = key_mask(pattern, B, S) if pattern else torch.ones(B, S, dtype=torch.bool)
    pairs = H * int((seen * queries).sum())
    rows, keys = B * H * T * D * itemsize(dtype), B * G * S * D * itemsize(dtype)
    if direction == "forward":
        return Cost(4 * D * pairs, 2 * rows + 2 * keys + 4 * B * H * T)
    return Cost(10 * D * pairs, 4 * rows + 4 * keys + 4 * B * H * T)


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
    return Inputs(args, inputs.wrt), rows


def kernels() -> Iterator[KernelBuild]:
    """Every tile that may be chosen, (causal, masked): all flags on sm_90, elsewhere those of training.

    Each takes the better part of a second to compile, and code without a flag is part of the code with it.
    """
    from rlhf_kernels.ops.attention import triton_config as config
    from rlhf_kernels.ops.attention.kernel_triton import SPAN_BLOCK, key_span_kernel

    span = {"key_mask": "*u8", "span": "*i32", "stride_mb": "i32", "S": "i32"}
    for target in TARGETS:
        flags = {"bf16": ((1, 1), (1, 0)), "fp32": ((1, 1),)}
        if target == "sm_90":
            flags |= {"bf16": ((1, 1), (1, 0), (0, 1), (0, 0)), "fp16": ((1, 1),)}
        aligned = ("key_mask", "span")
        yield KernelBuild("key_span", key_span_kernel, span, {"BLOCK": SPAN_BLOCK}, target, aligned=aligned)
        for kernel in config.KERNELS:
            for size in config.HEAD_SIZES:
                for dtype, choices in flags.items():
                    for causal, masked in choices:
                        yield _build(kernel, target, size, dtype, bool(causal), bool(masked))


def _build(kernel: str, target: str, size: int, dtype: str, causal: bool, masked: bool) -> KernelBuild:
    from rlhf_kernels.ops.attention import kernel_triton as k
    from rlhf_kernels.ops.attention.triton_config import chosen

    function = {"forward": k.forward_kernel, "query_gradient": k.query_gradient_kernel,
                "key_gradient": k.key_gradient_kernel}[kernel]  # fmt: skip
    tile = chosen(kernel, target, torch.float32 if dtype == "fp32" else torch.bfloat16, size)
    constants = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "D": size, "CAUSAL": causal,
                 "HAS_MASK": masked, "HAS_GRAD_LSE": causal and masked, "UPCAST": False}  # fmt: skip
    constants |= {} if masked else {"key_mask": None, "span": None}
    constants |= {} if causal and masked else {"grad_lse": None}
    types = dict.fromkeys(("q", "k", "v", "out", "grad_out", "dq", "dk", "dv"), f"*{dtype}")
    types |= dict.fromkeys(("lse", "grad_lse", "shift", "delta"), "*fp32")
    types |= {"key_mask": "*u8", "span": "*i32", "scale": "fp32", "scale_log2": "fp32"}
    signature = {name: types.get(name, "i32") for name in function.arg_names if name not in constants}
    strides = [name for name in signature if name.startswith("stride") or name == "row_pitch"]
    return KernelBuild(
        f"{kernel}/{dtype}/{size}{'/causal' * causal}{'/mask' * masked}",
        function,
        signature,
        {name: value for name, value in constants.items() if name in function.arg_names},
        target,
        tile.num_warps,
        tile.num_stages,
        tensor_core=dtype != "fp32",
        aligned=(*(name for name, kind in signature.items() if kind.startswith("*")), *strides),
    )


SPECS = (
    OpSpec(
        name="attention",
        family="attention",
        summary="exact attention: grouped heads, causal, any key mask",
        function=attention,
        reference=reference.attention,
        torch_form=kernel_torch.attention,
        make=make,
        cost=cost,
        cases=CASES,
        floor=4.0,  # the weights are recomputed from a log-sum-exp in float32: its last bits are theirs
        narrow=narrow,
        kernels=kernels,
    ),
    decode_spec.SPEC,
)
