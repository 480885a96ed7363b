"""The cosines and sines that `rotary` turns by, in float32, whatever the model's dtype."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_kernels.runtime.checks import positive

_POSITION_DTYPES = frozenset(
    (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.float32, torch.float64)
)


class RotaryTable(NamedTuple):
    """cos and sin of every position's angles, each float32 [T, D/2] or [B, T, D/2]."""

    cos: Tensor
    sin: Tensor


class RotaryTables(NamedTuple):
    """The table for queries and the one for keys; the same object where xPos scales neither."""

    query: RotaryTable
    key: RotaryTable


def rotary_tables(
    positions: Tensor,
    D: int,
    base: float = 10000,
    xpos_scale_base: float | None = None,
    xpos_center: float = 0,
) -> RotaryTables:
    """Tables of rotary position embeddings (Su et al., 2021, arXiv:2104.09864), optionally with xPos's decay.

    Pair i of D/2 turns by position * base**(-2i/D). With xPos (Sun et al., 2022, arXiv:2212.10554) queries
    are scaled by s_i**p and keys by s_i**-p, where s_i is (2i + 0.4 D) / 1.4 D and p is (position -
    xpos_center) / xpos_scale_base. Their products decay with the distance alone: the centre cancels, and
    keeps the factors in range, which float32 holds for |p| < 70.

    Args:
        positions: [T], or [B, T] for positions of each row's own (left-padded prompts); integers, float32 or
            float64. A cached step passes the positions of its new tokens.
        D: size of a head, even.
        base: wave length of the slowest pair, over 2 pi.
        xpos_scale_base: distance in tokens over which xPos scales by s_i, 512 in PaLM-rlhf-pytorch; None: no
            xPos.
        xpos_center: position at which xPos scales by 1, T // 2 in PaLM-rlhf-pytorch.

    Returns:
        RotaryTables of float32 [T, D/2] or [B, T, D/2] on the device of the positions.

    Raises:
        TypeError: positions are no tensor, or of a dtype that cannot hold them.
        ValueError: positions' shape, D, base or xpos_scale_base is out of range.
    """
    _check(positions, D, base, xpos_scale_base)
    positions = positions.to(torch.float64)[..., None]
    even = torch.arange(0, D, 2, dtype=torch.float64, device=positions.device)
    angles = positions * base ** (-even / D)
    cos, sin = angles.cos(), angles.sin()
    if xpos_scale_base is None:
        table = RotaryTable(cos.float(), sin.float())
        return RotaryTables(table, table)
    scale = ((even + 0.4 * D) / (1.4 * D)) ** ((positions - xpos_center) / xpos_scale_base)
    return RotaryTables(
        RotaryTable((cos * scale).float(), (sin * scale).float()),
        RotaryTable((cos / scale).float(), (sin / scale).float()),
    )


def _check(positions: Any, D: Any, base: Any, xpos_scale_base: Any) -> None:
    if not isinstance(positions, Tensor):
        raise TypeError(
            f"rotary_tables(): positions must be a tensor, got {type(positions).__name__}. "
            "Make them with torch.arange(T, device=...)."
        )
    if positions.dtype not in _POSITION_DTYPES:
        raise TypeError(
            f"rotary_tables(): positions must be integers, float32 or float64, got {positions.dtype}: "
            "neighbours above 256 are one number in bfloat16. Make them with torch.arange(T, device=...)."
        )
    if positions.dim() not in (1, 2):
        raise ValueError(f"rotary_tables(): positions must be [T] or [B, T], got {tuple(positions.shape)}")
    if not isinstance(D, int) or D < 2 or D % 2:
        raise ValueError(f"rotary_tables(): D, the size of a head, must be an even number above 0, got {D!r}")
    positive("rotary_tables", "base", base)
    if xpos_scale_base is not None:
        positive("rotary_tables", "xpos_scale_base", xpos_scale_base)
