"""Attention in Triton: FlashAttention-2 with grouped heads, rotary embeddings, any mask; no atomics."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from rlhf_kernels.ops.attention.arguments import ShapeClass, head_size
from rlhf_kernels.ops.attention.layout import heads_inside, new_like, rows_whole
from rlhf_kernels.ops.attention.triton_backward import key_gradient_kernel, query_gradient_kernel
from rlhf_kernels.ops.attention.triton_config import HEAD_SIZES, Tile, chosen, serves, target_of, turns
from rlhf_kernels.ops.attention.triton_forward import forward_kernel
from rlhf_kernels.ops.attention.triton_packed import plan_kernel
from rlhf_kernels.ops.attention.triton_tiles import key_span_kernel
from rlhf_kernels.ops.rotary.kernel_triton import forward as rotary_forward
from rlhf_kernels.runtime.launch import INTERPRETED, cdiv, launch

LOG2E = 1.4426950408889634
SPAN_BLOCK = 1024
PLAN_BLOCK = 256
# What heads that run at one time read should stay in the L2 cache.
L2_BYTES = 16 << 20


class Options(NamedTuple):
    """The arguments of the op after q, k and v, with the sequences of packed rows.

    The last three fields are those of `attention_varlen` alone.
    """

    causal: bool
    key_mask: Tensor | None
    scale: float
    return_lse: bool
    window: int | None = None
    softcap: float | None = None
    q_cos: Tensor | None = None
    q_sin: Tensor | None = None
    k_cos: Tensor | None = None
    k_sin: Tensor | None = None
    cu_seqlens: Tensor | None = None
    cu_seqlens_k: Tensor | None = None


def unsupported(device: str, dtype: torch.dtype, shape_class: ShapeClass) -> str | None:
    """Why these kernels cannot serve, or None."""
    size = head_size(shape_class)
    if device == "cuda" and size in HEAD_SIZES and not serves(dtype, size):
        return f"heads of {size} in float32 are beyond the registers"
    return refusal(dtype, size, HEAD_SIZES)


def refusal(dtype: torch.dtype, size: int | None, sizes: tuple[int, ...]) -> str | None:
    """Why kernels for heads of these sizes cannot serve, or None."""
    if size not in (None, *sizes):
        return f"head size {size} is none of {', '.join(map(str, sizes))}"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"there is no kernel for {str(dtype).removeprefix('torch.')}"
    return None


def forward(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    """The output, and the log-sum-exp, which the backward needs in any case."""
    return run_forward(q, k, v, Options(*options))


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
    return run_backward(grad_out, grad_lse, q, k, v, out, lse, Options(*options))


def run_forward(q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp; packed rows come as a batch of one."""
    if _turned_before(q, options):
        q, k = _turn(q, k, options, False)
        options = options._replace(q_cos=None, q_sin=None, k_cos=None, k_sin=None)
    q, k, v = map(rows_whole, (q, k, v))
    (batch, heads, queries, _), (groups, keys) = q.shape, k.shape[1:3]
    out = new_like(q)
    lse = q.new_empty(batch, heads, queries, dtype=torch.float32)
    tile = _tile("forward", q, options)
    shared = Shared(q, k, options, _always_masked(options))
    tiles = shared.tiles(queries, tile.block_m)
    q_plan = _plan(options.cu_seqlens, queries, tile.block_m)
    k_plan = q_plan if options.cu_seqlens_k is None else _plan(options.cu_seqlens_k, keys, tile.block_m)
    launch(
        forward_kernel, (tiles * batch * heads,), q,
        q, k, v, shared.key_mask, shared.span, *shared.tables, q_plan, k_plan, out, lse, *shared.factors,
        *_strides(q), *_strides(k), *_strides(v), *shared.strides, *_strides(out),
        batch * heads, heads, heads // groups, queries, keys, shared.window,
        heads_per_wave(batch * heads, k, heads // groups), queries, shared.n, tiles,
        **shared.flags, **_meta(tile, q),
    )  # fmt: skip
    return out, lse


def run_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; packed rows come as a batch of one."""
    if _turned_before(q, options):
        q, k = _turn(q, k, options, False)
        bare = options._replace(q_cos=None, q_sin=None, k_cos=None, k_sin=None)
        dq, dk, dv = run_backward(grad_out, grad_lse, q, k, v, out, lse, bare)
        return *map(heads_inside, _turn(dq, dk, options, True)), dv
    q, k, v, out, grad_out = map(rows_whole, (q, k, v, out, grad_out))
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    (batch, heads, queries, _), (groups, keys) = q.shape, k.shape[1:3]
    group_size = heads // groups
    dq, dk, dv = new_like(q), new_like(k), new_like(v)
    shared = Shared(q, k, options, _always_masked(options))

    tile, key_tile = (_tile(kernel, q, options) for kernel in ("query_gradient", "key_gradient"))
    pad, tiles = tile.block_m, shared.tiles(queries, tile.block_m)
    q_plan = _plan(options.cu_seqlens, queries, pad)
    cu_seqlens_k = options.cu_seqlens if options.cu_seqlens_k is None else options.cu_seqlens_k
    k_plan = _plan(cu_seqlens_k, keys, key_tile.block_n)
    # Rows padded to whole tiles: the second kernel reads shift and delta without a mask, in wide words.
    pitch = tiles * pad
    shift, delta = q.new_empty(2, batch, heads, pitch, dtype=torch.float32)
    launch(
        query_gradient_kernel, (tiles * batch * heads,), q,
        q, k, v, shared.key_mask, shared.span, *shared.tables, q_plan, k_plan, out, lse, grad_out, grad_lse,
        dq, shift, delta, options.scale, *shared.factors,
        *_strides(q), *_strides(k), *_strides(v), *shared.strides, *_strides(out), *_strides(grad_out),
        *_strides(dq), pitch, batch * heads, heads, group_size, queries, keys, shared.window,
        heads_per_wave(batch * heads, k, group_size), queries, shared.n, tiles,
        HAS_GRAD_LSE=grad_lse is not None, **shared.flags, **_meta(tile, q),
    )  # fmt: skip
    tiles = shared.tiles(keys, key_tile.block_n)
    launch(
        key_gradient_kernel, (tiles * batch * groups,), q,
        q, k, v, shared.key_mask, *shared.tables, q_plan, k_plan, grad_out, shift, delta, dk, dv,
        options.scale, *shared.factors,
        *_strides(q), *_strides(k), *_strides(v), *shared.strides, *_strides(grad_out), *_strides(dk),
        *_strides(dv), pitch, batch * groups, groups, group_size, queries, keys, shared.window,
        heads_per_wave(batch * groups, q, 1 / group_size), shared.n, tiles, pad,
        **shared.flags, **_meta(key_tile, q),
    )  # fmt: skip
    return dq, dk, dv


class Shared:
    """What the kernels of one call take alike.

    Attributes:
        key_mask, span: the mask as bytes, and the span of allowed keys of each row.
        tables: cos and sin for queries and for keys.
        factors: scale_log2 and cap.
        strides: from row to row of the batch, of the mask and of the tables.
        window: 0 where there is none.
        n: packed sequences, 0 where rows are not packed.
        flags: the kernels' constants.
    """

    def __init__(self, q: Tensor, k: Tensor, options: Options, always_masked: bool = False) -> None:
        """`always_masked` makes up a mask that allows all where there is none."""
        key_mask = options.key_mask
        if key_mask is None and always_masked:
            key_mask = q.new_ones(k.shape[0], k.shape[2], dtype=torch.bool)
        self.key_mask, self.span = _key_mask(key_mask)
        tables = options[options._fields.index("q_cos") : options._fields.index("k_sin") + 1]
        self.tables = tuple(None if table is None else table.contiguous() for table in tables)
        steps = (0 if table is None or table.dim() == 2 else table.stride(0) for table in self.tables[::2])
        self.strides = (0 if self.key_mask is None else self.key_mask.stride(0), *steps)
        scale, cap = options.scale, options.softcap
        self.factors = (scale * LOG2E, 0.0) if cap is None else (scale / cap, cap * LOG2E)
        self.window = 0 if options.window is None else options.window
        self.n = 0 if options.cu_seqlens is None else options.cu_seqlens.numel() - 1
        size = q.shape[-1]
        self.flags = {
            "D": size,
            "WIDTH": triton.next_power_of_2(size),
            "CAUSAL": options.causal,
            "HAS_MASK": self.key_mask is not None,
            "HAS_WINDOW": options.window is not None,
            "HAS_CAP": cap is not None,
            "ROTARY": self.tables[0] is not None,
            "PACKED": options.cu_seqlens is not None,
        }

    def tiles(self, rows: int, block: int) -> int:
        """Most tiles that a head's rows make; every packed sequence, and what is behind, may end in one."""
        return rows // block + self.n + 1 if self.flags["PACKED"] else cdiv(rows, block)


def _plan(cu_seqlens: Tensor | None, rows: int, block: int) -> Tensor | None:
    """Where sequences and their tiles begin (triton_packed.py)."""
    if cu_seqlens is None:
        return None
    n = cu_seqlens.numel() - 1
    plan = cu_seqlens.new_empty(2, n + 2, dtype=torch.int32)
    launch(plan_kernel, (1,), cu_seqlens, cu_seqlens.contiguous(), plan, n, rows, block, BLOCK=PLAN_BLOCK)
    return plan


def _turned_before(q: Tensor, options: Options) -> bool:
    packed = options.cu_seqlens is not None
    return options.q_cos is not None and not turns(target_of(q.device), q.dtype, q.shape[-1], packed)


def _always_masked(options: Options) -> bool:
    """Whether to make a mask: tiles that turn keep their registers with one, and would spill without."""
    return options.q_cos is not None and options.cu_seqlens is None


def _turn(q: Tensor, k: Tensor, options: Options, back: bool) -> tuple[Tensor, Tensor]:
    """q and k, or the gradients of turned ones, through the rotary kernel."""
    q = rotary_forward(q, options.q_cos, options.q_sin, False, back)
    return q, rotary_forward(k, options.k_cos, options.k_sin, False, back)


def _strides(x: Tensor) -> tuple[int, ...]:
    return x.stride()[:3]


def _key_mask(key_mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The mask as bytes, and the span of allowed keys of each row."""
    if key_mask is None:
        return None, None
    key_mask = rows_whole(key_mask).view(torch.uint8)
    batch, keys = key_mask.shape
    span = key_mask.new_empty(batch, 3, dtype=torch.int32)
    launch(key_span_kernel, (batch,), key_mask, key_mask, span, key_mask.stride(0), keys, BLOCK=SPAN_BLOCK)
    return key_mask, span


def _tile(kernel: str, q: Tensor, options: Options) -> Tile:
    return chosen(kernel, target_of(q.device), q.dtype, q.shape[-1], options.q_cos is not None)


def _meta(tile: Tile, q: Tensor) -> dict[str, int | bool]:
    return {
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "UPCAST": INTERPRETED and q.dtype == torch.bfloat16,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


def heads_per_wave(heads: int, x: Tensor, sharing: float) -> int:
    """How many heads run side by side; each reads two heads of x's size, which `sharing` of them read too."""
    bytes_per_head = 2 * x.shape[2] * x.shape[3] * x.element_size() / sharing
    return max(1, min(heads, int(L2_BYTES / max(1.0, bytes_per_head))))
