"""PyTorch's other attentions: FlexAttention, and the kernels behind `F.scaled_dot_product_attention` by name.

The one that PyTorch picks by itself is the backend `torch`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_kernels.stacks.peer import Peer, Unavailable

Tables = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]


def _turned(q: Tensor, k: Tensor, rotary: Tables | None) -> tuple[Tensor, Tensor]:
    from rlhf_kernels.ops.rotary.kernel_torch import rotary as plain

    return (q, k) if rotary is None else (plain(q, rotary[0]), plain(k, rotary[1]))


def _flex() -> Callable[..., Tensor]:
    """FlexAttention as one would write it: compiled with the rotary embedding, its mask made once."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def run(
        q: Tensor, k: Tensor, v: Tensor, rotary: Tables | None, mask: Any, scale: float | None, cap: Any
    ) -> Tensor:
        q, k = _turned(q, k, rotary)
        return flex_attention(
            q, k, v, score_mod=cap, block_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )

    compiled = torch.compile(run, dynamic=False, fullgraph=True)  # never eager in silence
    made: dict[tuple[Any, ...], tuple[Any, Any, Any]] = {}  # masks and caps; what they hold stays alive

    def attention(
        q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, key_mask: Tensor | None = None,
        scale: float | None = None, window: int | None = None, softcap: float | None = None,
        rotary: Tables | None = None, **_: Any,
    ) -> Tensor:  # fmt: skip
        if key_mask is not None:  # what lies there may be NaN
            k, v = (x.masked_fill(~key_mask[:, None, :, None], 0) for x in (k, v))
        queries, keys = q.shape[2], k.shape[2]
        which = (id(key_mask), causal, window, softcap, queries, keys, q.device)
        if which not in made:
            sees = _sees(queries, keys, causal, window, key_mask)
            batch = None if key_mask is None else q.shape[0]
            mask = sees and create_block_mask(sees, batch, None, queries, keys, device=q.device)
            made[which] = (mask, softcap and _capped(softcap), key_mask)
        mask, cap, _ = made[which]
        return compiled(q, k, v, rotary, mask, scale, cap)

    return attention


def _sees(
    queries: int, keys: int, causal: bool, window: int | None, key_mask: Tensor | None
) -> Callable[..., Tensor] | None:
    """Which query sees which key, as FlexAttention asks; None for all."""
    offset = keys - queries
    if not causal and window is None and key_mask is None:
        return None

    def sees(b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        see = s <= t + offset if causal else s >= 0
        if window is not None:
            see = see & ((s - t - offset).abs() < window)
        return see if key_mask is None else see & key_mask[b, s]

    return sees


def _capped(softcap: float) -> Callable[..., Tensor]:
    def capped(score: Tensor, *_: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return capped


def _kernel(name: str) -> Callable[[], Callable[..., Tensor]]:
    """`F.scaled_dot_product_attention` held to one kernel."""

    def load() -> Callable[..., Tensor]:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        kernel = getattr(SDPBackend, name)

        def attention(
            q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, scale: float | None = None,
            rotary: Tables | None = None, **_: Any,
        ) -> Tensor:  # fmt: skip
            if causal and q.shape[2] != k.shape[2]:
                raise Unavailable("its causal mask begins at the first key, not at the last")
            q, k = _turned(q, k, rotary)
            try:
                with sdpa_kernel(kernel):
                    return F.scaled_dot_product_attention(
                        q, k, v, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
                    )
            except RuntimeError as error:
                if "No available kernel" not in str(error):
                    raise
                raise Unavailable(f"PyTorch's {name} does not take this call") from None

        return attention

    return load


_TORCH = {"stack": "pytorch", "op": "attention", "package": "torch"}

PEERS = [
    Peer(
        **_TORCH,
        label="FlexAttention",
        origin="torch.nn.attention.flex_attention.flex_attention",
        adapter=_flex,
        options=frozenset({"causal", "key_mask", "scale", "window", "softcap", "rotary"}),
        devices=("cuda",),
        note="compiled with the rotary embedding; its block mask is made once and not timed",
    ),
    *(
        Peer(
            **_TORCH,
            label=label,
            origin=f"F.scaled_dot_product_attention, {name}",
            adapter=_kernel(name),
            options=frozenset({"causal", "scale", "rotary"}),
            devices=("cuda",),
        )
        for label, name in (("SDPA flash", "FLASH_ATTENTION"), ("SDPA cuDNN", "CUDNN_ATTENTION"))
    ),
]
