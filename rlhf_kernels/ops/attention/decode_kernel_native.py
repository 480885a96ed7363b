"""decode_attention by the C++ row kernels: a split of a row's keys, for all heads that read it, at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_kernels.runtime.native import operator

_forward = operator("decode_attention")


def unsupported(device: str, dtype: torch.dtype, shape_class: int | None) -> str | None:
    """Why these kernels cannot serve, or None."""
    return "there is no kernel for float64" if dtype == torch.float64 else None


def forward(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor | None,
    starts: Tensor | None,
    scale: float,
    grain: int | None = None,
) -> Tensor:
    """The output, [B, H, 1, D]."""
    if grain is not None:
        return _forward(q, k_cache, v_cache, lengths, starts, scale, grain)
    return _forward(q, k_cache, v_cache, lengths, starts, scale)
