"""How the attention kernels are compiled ahead of time: types and constants for a choice of flags."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from rlhf_kernels.engine.spec import KernelBuild

# Flags of the kernels, and what a name calls them.
FLAGS = {"CAUSAL": "causal", "HAS_MASK": "mask", "HAS_WINDOW": "window", "HAS_CAP": "cap", "ROTARY": "rotary",
         "PACKED": "packed"}  # fmt: skip
NEEDED = {"HAS_MASK": ("key_mask", "span"), "ROTARY": ("q_cos", "q_sin", "k_cos", "k_sin"),
          "PACKED": ("q_plan", "k_plan")}  # fmt: skip


def build(
    kernel: str, target: str, size: int, dtype: str, flags: Mapping[str, bool], tile: Any = None
) -> KernelBuild:
    """One kernel with these flags on, on the tile that is chosen for it unless another is given."""
    from rlhf_kernels.ops.attention import kernel_triton as k
    from rlhf_kernels.ops.attention.triton_config import chosen

    function = {"forward": k.forward_kernel, "query_gradient": k.query_gradient_kernel,
                "key_gradient": k.key_gradient_kernel}[kernel]  # fmt: skip
    wide = torch.float32 if dtype == "fp32" else torch.bfloat16
    flags = {flag: flags.get(flag, False) for flag in FLAGS}
    tile = tile or chosen(kernel, target, wide, size, flags["ROTARY"])
    rows = tile.block_n if kernel == "key_gradient" else tile.block_m  # HGMMA takes 64 or more
    with_lse = flags["CAUSAL"] and flags["HAS_MASK"]
    constants = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "D": size, "UPCAST": False,
                 "WIDTH": 1 << (size - 1).bit_length(), "HAS_GRAD_LSE": with_lse} | flags  # fmt: skip
    constants |= {name: None for flag, names in NEEDED.items() if not flags[flag] for name in names}
    constants |= {} if with_lse else {"grad_lse": None}
    types = dict.fromkeys(("q", "k", "v", "out", "grad_out", "dq", "dk", "dv"), f"*{dtype}")
    types |= dict.fromkeys(("lse", "grad_lse", "shift", "delta", *NEEDED["ROTARY"]), "*fp32")
    types |= dict.fromkeys(("span", *NEEDED["PACKED"]), "*i32") | {"key_mask": "*u8"}
    types |= dict.fromkeys(("scale", "scale_log2", "cap"), "fp32")
    signature = {name: types.get(name, "i32") for name in function.arg_names if name not in constants}
    strides = [name for name in signature if name.startswith("stride") or name == "row_pitch"]
    return KernelBuild(
        "/".join((kernel, dtype, str(size), *(name for flag, name in FLAGS.items() if flags[flag]))),
        function,
        signature,
        {name: value for name, value in constants.items() if name in function.arg_names},
        target,
        tile.num_warps,
        tile.num_stages,
        tensor_core=dtype != "fp32" and (target != "sm_90" or rows >= 64),
        aligned=(*(name for name, kind in signature.items() if kind.startswith("*")), *strides),
    )


def gluon_build(
    kernel: str, size: int, dtype: str, flags: Mapping[str, bool], block_n: int = 128, pinned: int = 1
) -> KernelBuild:
    """One Gluon kernel for sm_90 with these flags on and these values of its knobs."""
    from rlhf_kernels.ops.attention import kernel_gluon as k

    function = {"forward": k.forward_kernel, "query_gradient": k.query_gradient_kernel,
                "key_gradient": k.key_gradient_kernel}[kernel]  # fmt: skip
    keys = {"forward": block_n, "query_gradient": k.QUERY_GRADIENT_KEYS[size], "key_gradient": k.KEYS}[kernel]
    constants = {flag: flags.get(flag, False) for flag in FLAGS}
    constants |= {"PINNED": bool(pinned), "D": size, "BLOCK_N": keys, "STAGES": k.STAGES}
    constants |= {"HAS_GRAD_LSE": constants["CAUSAL"] and constants["HAS_MASK"]}
    for flag, names in NEEDED.items():
        constants |= {} if constants[flag] else dict.fromkeys(names)
    constants |= {} if constants["HAS_GRAD_LSE"] else {"grad_lse": None}
    constants |= {} if constants["ROTARY"] else {"turned_desc": None}
    rows = dict.fromkeys(("q_desc", "turned_desc", "out_desc", "do_desc", "dq_desc"), k.ROWS)
    rows |= dict.fromkeys(("k_desc", "v_desc", "dk_desc", "dv_desc"), keys)
    wide = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    types = {
        name: f"tensordesc<{dtype}[1, 1, {n}, {size}],{k.layout(n, size, wide)!r}>"
        for name, n in rows.items()
    }
    types |= dict.fromkeys(("lse", "grad_lse", "shift", "delta", *NEEDED["ROTARY"]), "*fp32")
    types |= {"key_mask": "*u8", "span": "*i32"} | dict.fromkeys(("scale", "scale_log2", "cap"), "fp32")
    signature = {name: types.get(name, "i32") for name in function.arg_names if name not in constants}
    strides = [name for name in signature if name.startswith("stride") or name == "row_pitch"]
    named = [name for flag, name in FLAGS.items() if flags.get(flag)]
    if kernel == "forward":
        named += [f"n{block_n}"] * (block_n != 128) + ["unpinned"] * (not pinned)
    return KernelBuild(
        "/".join(("gluon", kernel, dtype, str(size), *named)),
        function,
        signature,
        {name: value for name, value in constants.items() if name in function.arg_names},
        "sm_90",
        k.KEY_WARPS if kernel == "key_gradient" else k.WARPS,
        tensor_core=True,
        aligned=(*(name for name, kind in signature.items() if kind.startswith("*")), *strides),
        gluon=True,
    )
