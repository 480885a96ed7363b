"""Tiles of the attention kernels for each target, kernel, kind of dtype and head size.

Chosen by compiling ahead of time: nothing here spills, and what computes in 16 bits uses the target's matrix
instructions. Among those the choice is by occupancy and reuse; it has not been measured yet.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch

HEAD_SIZES = (32, 64, 96, 128, 256)
KERNELS = ("forward", "query_gradient", "key_gradient")


class Tile(NamedTuple):
    """Queries by keys of one step, and how it is launched."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# One column for each head size. block_m of key_gradient divides that of query_gradient, which pads its rows.
# Shared memory on sm_80 is that of the smaller 8.6 and 8.9.
_HALF = {
    "sm_80": {
        "forward": (
            Tile(128, 64, 8, 2), Tile(128, 64, 8, 3), Tile(128, 32, 8, 2), Tile(128, 32, 8, 3),
            Tile(64, 32, 8, 1),
        ),
        "query_gradient": (
            Tile(64, 64, 4, 2), Tile(128, 64, 8, 2), Tile(64, 32, 4, 2), Tile(64, 32, 4, 2),
            Tile(32, 32, 8, 1),
        ),
        "key_gradient": (
            Tile(64, 64, 4, 2), Tile(32, 128, 8, 2), Tile(32, 64, 8, 2), Tile(32, 64, 8, 2),
            Tile(32, 32, 8, 1),
        ),
    },
    "sm_90": {
        "forward": (
            Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(128, 64, 8, 3),
            Tile(128, 32, 8, 2),
        ),
        # At 256 the accumulators of a tile for HGMMA do not fit beside the rest.
        "query_gradient": (
            Tile(64, 64, 4, 3), Tile(64, 64, 4, 2), Tile(128, 64, 8, 2), Tile(128, 64, 8, 2),
            Tile(32, 32, 8, 1),
        ),
        "key_gradient": (
            Tile(64, 128, 8, 3), Tile(64, 128, 8, 3), Tile(32, 128, 8, 2), Tile(32, 128, 8, 3),
            Tile(32, 32, 8, 1),
        ),
    },
    "sm_100": {
        "forward": (
            Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(128, 64, 8, 3),
            Tile(128, 64, 8, 2),
        ),
        "query_gradient": (
            Tile(128, 64, 8, 3), Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(128, 64, 8, 2),
            Tile(128, 32, 8, 1),
        ),
        "key_gradient": (
            Tile(64, 128, 8, 2), Tile(64, 128, 8, 2), Tile(64, 128, 8, 1), Tile(64, 128, 8, 2),
            Tile(64, 64, 8, 1),
        ),
    },
    "gfx942": {
        "forward": (
            Tile(128, 64, 4, 1), Tile(128, 64, 4, 1), Tile(128, 32, 4, 1), Tile(128, 32, 4, 1),
            Tile(64, 32, 8, 1),
        ),
        "query_gradient": (
            Tile(128, 32, 8, 1), Tile(128, 32, 8, 1), Tile(128, 32, 8, 1), Tile(128, 32, 8, 1),
            Tile(32, 32, 4, 1),
        ),
        "key_gradient": (
            Tile(32, 128, 4, 1), Tile(32, 128, 4, 1), Tile(32, 64, 4, 1), Tile(32, 64, 4, 1),
            Tile(16, 32, 4, 1),
        ),
    },
}  # fmt: skip
# With rotary embeddings, up to 128: turning takes registers, most of them where operands are held in such.
_ROTARY = {
    "sm_80": {
        "forward": (Tile(128, 64, 8, 2), Tile(128, 32, 8, 2), Tile(64, 32, 8, 2), Tile(64, 32, 8, 2)),
        "query_gradient": (Tile(64, 32, 4, 2), Tile(32, 32, 4, 2), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
        "key_gradient": (Tile(32, 64, 4, 2), Tile(32, 32, 4, 1), Tile(16, 32, 8, 1), Tile(16, 32, 8, 1)),
    },
    "sm_90": {
        "forward": (Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(128, 64, 8, 3)),
        "query_gradient": (Tile(64, 64, 4, 3), Tile(64, 64, 4, 2), Tile(128, 32, 8, 2), Tile(128, 32, 8, 2)),
        "key_gradient": (Tile(64, 128, 8, 3), Tile(32, 128, 8, 2), Tile(32, 64, 8, 2), Tile(32, 128, 8, 2)),
    },
    "sm_100": {
        "forward": (Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(128, 64, 8, 3)),
        "query_gradient": (
            Tile(128, 64, 8, 3), Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(128, 64, 8, 2),
        ),
        "key_gradient": (Tile(64, 128, 8, 2), Tile(64, 128, 8, 2), Tile(32, 128, 8, 2), Tile(32, 128, 8, 2)),
    },
    "gfx942": {
        "forward": (Tile(128, 64, 4, 1), Tile(128, 64, 4, 1), Tile(128, 32, 4, 1), Tile(128, 32, 4, 1)),
        "query_gradient": (Tile(128, 32, 8, 1), Tile(128, 32, 8, 1), Tile(64, 32, 4, 1), Tile(64, 32, 4, 1)),
        "key_gradient": (Tile(32, 128, 4, 1), Tile(32, 128, 4, 1), Tile(32, 64, 4, 1), Tile(32, 64, 4, 1)),
    },
}  # fmt: skip
# Up to 128. Fewer than 64 rows on NVIDIA: with more, Triton 3.6 rounds some products to TF32 on sm_100.
_FLOAT32 = {
    "sm_80": {
        "forward": (Tile(32, 32, 4, 2), Tile(16, 32, 4, 1), Tile(16, 32, 8, 1), Tile(32, 32, 8, 1)),
        "query_gradient": (Tile(32, 32, 4, 1), Tile(32, 32, 8, 2), Tile(16, 16, 8, 2), Tile(16, 16, 8, 2)),
        "key_gradient": (Tile(32, 32, 8, 2), Tile(16, 32, 8, 2), Tile(16, 32, 8, 1), Tile(16, 32, 8, 1)),
    },
    "sm_90": {
        "forward": (Tile(32, 32, 4, 2), Tile(32, 32, 8, 2), Tile(16, 32, 8, 1), Tile(32, 32, 8, 1)),
        "query_gradient": (Tile(32, 32, 4, 1), Tile(32, 32, 8, 2), Tile(16, 16, 8, 2), Tile(16, 16, 8, 2)),
        "key_gradient": (Tile(32, 32, 8, 1), Tile(16, 32, 4, 2), Tile(16, 32, 8, 1), Tile(16, 32, 8, 1)),
    },
    "sm_100": {
        "forward": (Tile(32, 32, 4, 2), Tile(32, 32, 8, 2), Tile(16, 16, 8, 1), Tile(32, 32, 8, 1)),
        "query_gradient": (Tile(32, 32, 4, 1), Tile(32, 32, 8, 2), Tile(16, 16, 8, 2), Tile(16, 16, 8, 2)),
        "key_gradient": (Tile(16, 32, 4, 1), Tile(16, 32, 4, 2), Tile(16, 32, 8, 1), Tile(16, 32, 8, 1)),
    },
    "gfx942": {
        "forward": (Tile(64, 32, 4, 1), Tile(64, 32, 4, 1), Tile(64, 32, 4, 1), Tile(64, 32, 4, 1)),
        "query_gradient": (Tile(32, 32, 4, 1), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1)),
        "key_gradient": (Tile(32, 32, 4, 1), Tile(32, 32, 4, 1), Tile(16, 32, 4, 1), Tile(16, 32, 4, 1)),
    },
}
# Small, so that small inputs have several tiles in every loop.
_INTERPRETED = {
    "forward": Tile(32, 16, 4, 1),
    "query_gradient": Tile(32, 16, 4, 1),
    "key_gradient": Tile(16, 32, 4, 1),
}


@cache
def target_of(device: torch.device) -> str:
    """The key of a device in the tables; the closest where it is not listed."""
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip:
        return "gfx942"
    # Consumer Blackwell (12.x) has the shared memory and the matrix instructions of the 8.x line.
    return {9: "sm_90", 10: "sm_100"}.get(torch.cuda.get_device_capability(device)[0], "sm_80")


def serves(dtype: torch.dtype, head_size: int) -> bool:
    """Whether there are tiles; float32 with heads of 256 would spill on every one."""
    return head_size in HEAD_SIZES and (dtype != torch.float32 or head_size <= 128)


def turns(target: str, dtype: torch.dtype, head_size: int, packed: bool = False) -> bool:
    """Whether the kernels turn q and k themselves; else that happens before, since tiles would spill."""
    if target == "interpreter":
        return head_size <= 128
    most = 128 if not packed else 0 if target == "sm_100" else 64
    return head_size <= most and dtype != torch.float32


def chosen(kernel: str, target: str, dtype: torch.dtype, head_size: int, rotary: bool = False) -> Tile:
    """The tile that runs."""
    if target == "interpreter":
        return _INTERPRETED[kernel]
    table = _FLOAT32 if dtype == torch.float32 else _ROTARY if rotary else _HALF
    return table[target][kernel][HEAD_SIZES.index(head_size)]
