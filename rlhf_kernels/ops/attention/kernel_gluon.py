"""Attention in Gluon for Hopper (sm_90): TMA copies, asynchronous wgmma, warps with roles of their own.

With rotary embeddings the keys are turned once before, since every tile of queries reads them; queries are
turned by the kernels, in shared memory, and the gradients of both are turned back in registers.

None of it has run on a GPU: it is compiled ahead of time under budgets and emulated (tests/emulation/gluon),
and runs where it is asked for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from rlhf_kernels.ops.attention import gluon_key_gradient, gluon_tiles
from rlhf_kernels.ops.attention.arguments import ShapeClass, head_size
from rlhf_kernels.ops.attention.gluon_forward import forward_kernel
from rlhf_kernels.ops.attention.gluon_key_gradient import key_gradient_kernel
from rlhf_kernels.ops.attention.gluon_query_gradient import query_gradient_kernel
from rlhf_kernels.ops.attention.kernel_triton import (
    Options,
    Shared,
    heads_per_wave,
    refusal,
)
from rlhf_kernels.ops.attention.layout import heads_inside, new_like
from rlhf_kernels.ops.rotary.kernel_triton import forward as rotary_forward
from rlhf_kernels.runtime.launch import cdiv, launch

HEAD_SIZES = (64, 128)
STAGES = 2
BLOCK_M, ROWS, WARPS = (c.value for c in (gluon_tiles.BLOCK_M, gluon_tiles.ROWS, gluon_tiles.WARPS))
KEYS, QUERIES, KEY_WARPS = (
    c.value for c in (gluon_key_gradient.KEYS, gluon_key_gradient.QUERIES, gluon_key_gradient.WARPS)
)
# Keys of a step of dQ by head size: with 128 at 128 its tiles fill the shared memory to the last kilobytes.
QUERY_GRADIENT_KEYS = {64: 128, 128: 64}
ELEMENTS = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


def unsupported(device: str, dtype: torch.dtype, shape_class: ShapeClass) -> str | None:
    """Why these kernels cannot serve, or None."""
    if dtype == torch.float32:
        return "wgmma takes no float32"
    if reason := refusal(dtype, head_size(shape_class), HEAD_SIZES):
        return reason
    if device == "cuda":
        if not torch.cuda.is_available() or torch.version.hip:
            return "it is for Hopper (sm_90), and there is no NVIDIA GPU here"
        if torch.cuda.get_device_capability()[0] != 9:
            return f"it is for Hopper (sm_90), and this is {torch.cuda.get_device_name()}"
    return None


def forward(
    q: Tensor, k: Tensor, v: Tensor, *options: Any, block_n: int = 128, pinned: int = 1
) -> tuple[Tensor, Tensor]:
    """The output, and the log-sum-exp, which the backward needs in any case.

    Args:
        q, k, v, options: as the op takes them.
        block_n: keys of a step, 64 or 128.
        pinned: whether the softmax is held beside the product of the step before (gluon_forward.py).
    """
    given = Options(*options)
    (batch, heads, queries, _), (groups, keys) = q.shape, k.shape[1:3]
    out, lse = new_like(q), q.new_empty(batch, heads, queries, dtype=torch.float32)
    if out.numel() == 0 or k.numel() == 0:
        return out.zero_(), lse.fill_(float("-inf"))
    shared, flags, k = _prepared(q, k, given)
    q, k, v = _copyable(q), _copyable(k), _copyable(v)
    launch(
        forward_kernel, (cdiv(queries, BLOCK_M) * batch * heads,), q,
        _described(q, ROWS), _described(k, block_n), _described(v, block_n), _described(out, ROWS),
        shared.key_mask, shared.span, *shared.tables[:2], lse, *shared.factors, *shared.strides[:2],
        batch * heads, heads, heads // groups, queries, keys, shared.window,
        heads_per_wave(batch * heads, k, heads // groups),
        **flags, PINNED=bool(pinned), BLOCK_N=block_n, num_warps=WARPS,
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
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    given = Options(*options)
    if q.numel() == 0 or k.numel() == 0:
        return new_like(q).zero_(), new_like(k).zero_(), new_like(v).zero_()
    dk, dv = new_like(k), new_like(v)
    shared, flags, k = _prepared(q, k, given)
    q, k, v, out, grad_out = (_copyable(x) for x in (q, k, v, out, grad_out))
    dq, q, shift, delta = _query_gradient(grad_out, grad_lse, q, k, v, out, lse, given, shared, flags)
    (batch, heads, queries, size), (groups, keys) = q.shape, k.shape[1:3]
    turn_after = flags["ROTARY"] and flags["HAS_CAP"] and size == 128  # with a cap no registers are left
    flags["ROTARY"] = flags["ROTARY"] and not turn_after
    launch(
        key_gradient_kernel, (cdiv(keys, KEYS) * batch * groups,), q,
        _described(q, QUERIES), _described(k, KEYS), _described(v, KEYS), _described(grad_out, QUERIES),
        _described(dk, KEYS), _described(dv, KEYS), shared.key_mask,
        *(shared.tables[2:] if flags["ROTARY"] else (None, None)), shift, delta, given.scale, *shared.factors,
        *shared.strides[::2], shift.shape[-1], batch * groups, groups, heads // groups,
        queries, keys, shared.window, heads_per_wave(batch * groups, q, groups / heads),
        **flags, num_warps=KEY_WARPS,
    )  # fmt: skip
    if turn_after:
        dk = heads_inside(rotary_forward(dk, *shared.tables[2:], False, True))
    return dq, dk, dv


def _prepared(q: Tensor, k: Tensor, given: Options) -> tuple[Shared, dict[str, bool | int], Tensor]:
    """What the kernels take alike, their constants, and the keys as they read them: turned."""
    shared = Shared(q, k, given)
    names = ("CAUSAL", "HAS_MASK", "HAS_WINDOW", "HAS_CAP", "ROTARY", "D")
    flags = {name: shared.flags[name] for name in names} | {"STAGES": STAGES}
    return shared, flags, rotary_forward(k, *shared.tables[2:], False, False) if flags["ROTARY"] else k


def _query_gradient(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    given: Options, shared: Shared, flags: dict[str, bool | int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradient of q, q turned, and shift and delta as [B, H, rows], padded to whole tiles."""
    (batch, heads, queries, size), (groups, keys) = q.shape, k.shape[1:3]
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    tiles, block_n = cdiv(queries, BLOCK_M), QUERY_GRADIENT_KEYS[size]
    dq = new_like(q)
    turned = new_like(q) if flags["ROTARY"] else None
    shift, delta = q.new_empty(2, batch, heads, tiles * BLOCK_M, dtype=torch.float32)
    launch(
        query_gradient_kernel, (tiles * batch * heads,), q,
        _described(q, ROWS), _described(k, block_n), _described(v, block_n), _described(out, ROWS),
        _described(grad_out, ROWS), _described(dq, ROWS),
        None if turned is None else _described(turned, ROWS), shared.key_mask, shared.span,
        *shared.tables[:2], lse, grad_lse, shift, delta, given.scale, *shared.factors, *shared.strides[:2],
        shift.shape[-1], batch * heads, heads, heads // groups, queries, keys, shared.window,
        heads_per_wave(batch * heads, k, heads // groups),
        **flags, HAS_GRAD_LSE=grad_lse is not None, BLOCK_N=block_n, num_warps=WARPS,
    )  # fmt: skip
    return dq, q if turned is None else turned, shift, delta


def layout(rows: int, size: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    """How a tile of a head lies in shared memory."""
    return gl.NVMMASharedLayout.get_default_for([1, 1, rows, size], ELEMENTS[dtype])


def _described(x: Tensor, rows: int) -> TensorDescriptor:
    """x [B, H, T, D] for copies of `rows` rows of a head."""
    block = [1, 1, rows, x.shape[-1]]
    return TensorDescriptor(x, list(x.shape), _strides(x), block, layout(rows, x.shape[-1], x.dtype))


def _strides(x: Tensor) -> list[int]:
    """Its strides; along a dimension of one element, where any would do, one that TMA takes."""
    return [stride if n > 1 else x.shape[-1] for n, stride in zip(x.shape[:-1], x.stride())] + [1]


def _copyable(x: Tensor) -> Tensor:
    """x where TMA can copy it (16 bytes must divide its address and strides), else a copy of it."""
    unit = 16 // x.element_size()
    fits = x.stride(-1) == 1 and x.data_ptr() % 16 == 0
    fits = fits and all(stride > 0 and stride % unit == 0 for stride in _strides(x)[:-1])
    return x if fits else x.clone(memory_format=torch.contiguous_format)
