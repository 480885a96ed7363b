"""Attention in Triton: FlashAttention-2 with grouped heads, any key mask and a deterministic backward."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_kernels.ops.attention.layout import new_like
from rlhf_kernels.ops.attention.triton_backward import key_gradient_kernel, query_gradient_kernel
from rlhf_kernels.ops.attention.triton_config import HEAD_SIZES, Tile, chosen, target_of
from rlhf_kernels.ops.attention.triton_forward import forward_kernel
from rlhf_kernels.ops.attention.triton_tiles import key_span_kernel
from rlhf_kernels.runtime.launch import INTERPRETED, cdiv, launch

LOG2E = 1.4426950408889634
SPAN_BLOCK = 1024
# What heads that run at one time read should stay in the L2 cache.
L2_BYTES = 16 << 20


def unsupported(device: str, dtype: torch.dtype, head_size: int | None) -> str | None:
    """Why these kernels cannot serve, or None."""
    if head_size not in (None, *HEAD_SIZES):
        return f"head size {head_size} is none of {', '.join(map(str, HEAD_SIZES))}"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"there is no kernel for {str(dtype).removeprefix('torch.')}"
    return None


def forward(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, key_mask: Tensor | None, scale: float, return_lse: bool
) -> tuple[Tensor, Tensor]:
    """The output, and the log-sum-exp, which the backward needs in any case."""
    q, k, v = _rows(q), _rows(k), _rows(v)
    (batch, heads, queries, size), (groups, keys) = q.shape, k.shape[1:3]
    out = new_like(q)
    lse = q.new_empty(batch, heads, queries, dtype=torch.float32)
    key_mask, span = _key_mask(key_mask)
    tile = _tile("forward", q)
    launch(
        forward_kernel, (cdiv(queries, tile.block_m) * batch * heads,), q,
        q, k, v, key_mask, span, out, lse, scale * LOG2E,
        *_strides(q), *_strides(k), *_strides(v), _row_stride(key_mask), *_strides(out),
        batch * heads, heads, heads // groups, queries, keys,
        _heads_per_wave(batch * heads, k, heads // groups),
        D=size, CAUSAL=causal, HAS_MASK=key_mask is not None, **_meta(tile, q),
    )  # fmt: skip
    return out, lse


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    key_mask: Tensor | None,
    scale: float,
    return_lse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    q, k, v, out, grad_out = _rows(q), _rows(k), _rows(v), _rows(out), _rows(grad_out)
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    (batch, heads, queries, size), (groups, keys) = q.shape, k.shape[1:3]
    group_size = heads // groups
    dq, dk, dv = new_like(q), new_like(k), new_like(v)
    key_mask, span = _key_mask(key_mask)
    flags = {"D": size, "CAUSAL": causal, "HAS_MASK": key_mask is not None}

    tile = _tile("query_gradient", q)
    # Rows padded to whole tiles: the second kernel reads shift and delta without a mask, in wide words.
    pitch = cdiv(queries, tile.block_m) * tile.block_m
    shift, delta = q.new_empty(2, batch, heads, pitch, dtype=torch.float32)
    launch(
        query_gradient_kernel, (cdiv(queries, tile.block_m) * batch * heads,), q,
        q, k, v, key_mask, span, out, lse, grad_out, grad_lse, dq, shift, delta, scale, scale * LOG2E,
        *_strides(q), *_strides(k), *_strides(v), _row_stride(key_mask), *_strides(out), *_strides(grad_out),
        *_strides(dq), pitch, batch * heads, heads, group_size, queries, keys,
        _heads_per_wave(batch * heads, k, group_size),
        HAS_GRAD_LSE=grad_lse is not None, **flags, **_meta(tile, q),
    )  # fmt: skip
    tile = _tile("key_gradient", q)
    launch(
        key_gradient_kernel, (cdiv(keys, tile.block_n) * batch * groups,), q,
        q, k, v, key_mask, grad_out, shift, delta, dk, dv, scale, scale * LOG2E,
        *_strides(q), *_strides(k), *_strides(v), _row_stride(key_mask), *_strides(grad_out), *_strides(dk),
        *_strides(dv), pitch, batch * groups, groups, group_size, queries, keys,
        _heads_per_wave(batch * groups, q, 1 / group_size), **flags, **_meta(tile, q),
    )  # fmt: skip
    return dq, dk, dv


def _rows(x: Tensor) -> Tensor:
    """With a contiguous last dimension; copies where it is not."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _strides(x: Tensor) -> tuple[int, ...]:
    return x.stride()[:3]


def _row_stride(key_mask: Tensor | None) -> int:
    return 0 if key_mask is None else key_mask.stride(0)


def _key_mask(key_mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The mask as bytes, and the span of allowed keys of each row."""
    if key_mask is None:
        return None, None
    key_mask = _rows(key_mask).view(torch.uint8)
    batch, keys = key_mask.shape
    span = key_mask.new_empty(batch, 3, dtype=torch.int32)
    launch(key_span_kernel, (batch,), key_mask, key_mask, span, key_mask.stride(0), keys, BLOCK=SPAN_BLOCK)
    return key_mask, span


def _tile(kernel: str, q: Tensor) -> Tile:
    return chosen(kernel, target_of(q.device), q.dtype, q.shape[-1])


def _meta(tile: Tile, q: Tensor) -> dict[str, int | bool]:
    return {
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "UPCAST": INTERPRETED and q.dtype == torch.bfloat16,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


def _heads_per_wave(heads: int, x: Tensor, sharing: float) -> int:
    """How many heads run side by side; each reads two heads of x's size, which `sharing` of them read too."""
    bytes_per_head = 2 * x.shape[2] * x.shape[3] * x.element_size() / sharing
    return max(1, min(heads, int(L2_BYTES / max(1.0, bytes_per_head))))
