"""Attention of transformers' models, through its registries: `AttentionInterface`, `AttentionMaskInterface`.

The mask function gives [B, S] where causality is all there is besides, so that padding on the left needs no
[B, 1, T, S]; the attention function takes both kinds.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from rlhf_kernels.stacks import rebind
from rlhf_kernels.stacks.rebind import Call, Rebinding

# What transformers passes on to attention that ours does not know; None or False means that it is not used.
_FOREIGN = (
    "softcap",
    "sliding_window",
    "s_aux",
    "cache",
    "output_attentions",
    "cu_seq_lens_q",
)


def our_attention(original: Any) -> Any:
    """An attention function for AttentionInterface; what ours does not know goes to the original."""
    from rlhf_kernels import attention

    def rlhf_kernels_attention(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        position_bias: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        whole = query.shape[2] == key.shape[2] or not causal or query.shape[2] == 1
        key_mask = attention_mask if attention_mask is not None and attention_mask.dim() == 2 else None
        plain = (
            dropout == 0.0
            and position_bias is None
            and all(kwargs.get(name) is None or kwargs[name] is False for name in _FOREIGN)
            and (key_mask is not None or (attention_mask is None and whole))
            and query.shape[-1] == value.shape[-1]
        )
        if plain:
            out = attention(query, key, value, causal=bool(causal), key_mask=key_mask, scale=scaling)
            return out.transpose(1, 2).contiguous(), None
        if key_mask is not None:
            attention_mask = _four_dimensions(key_mask, query.shape[2], bool(causal))
        rest = (attention_mask, dropout, scaling, is_causal, position_bias)
        return original(module, query, key, value, *rest, **kwargs)

    return rlhf_kernels_attention


def our_attention_until_5_23(original: Any) -> Any:
    """The same for versions whose function names the cache of paged attention among its parameters."""
    attend = our_attention(original)

    def rlhf_kernels_attention(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        position_bias: Tensor | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        rest = (attention_mask, dropout, scaling, is_causal, position_bias)
        return attend(module, query, key, value, *rest, cache=cache, **kwargs)

    return rlhf_kernels_attention


def _four_dimensions(key_mask: Tensor, queries: int, causal: bool) -> Tensor:
    """[B, S] as [B, 1, T, S], causal to the bottom right, for the original."""
    keys = key_mask.shape[1]
    seen = torch.ones(queries, keys, dtype=torch.bool, device=key_mask.device)
    seen = seen.tril(keys - queries) if causal else seen
    return key_mask[:, None, None, :] & seen


def our_mask(original: Any) -> Any:
    """A mask function for AttentionMaskInterface: [B, S] for ours where causality is all there is besides."""
    from transformers.masking_utils import causal_mask_function

    def rlhf_kernels_mask(
        batch_size: int,
        q_length: int,
        kv_length: int,
        q_offset: Any = 0,
        kv_offset: Any = 0,
        mask_function: Any = causal_mask_function,
        attention_mask: Tensor | None = None,
        local_size: int | None = None,
        allow_is_causal_skip: bool = True,
        allow_is_bidirectional_skip: bool = False,
        use_vmap: bool = False,
        device: Any = "cpu",
        **kwargs: Any,
    ) -> Tensor | None:
        simple = (
            isinstance(attention_mask, Tensor)
            and attention_mask.shape == (batch_size, kv_length)
            and mask_function is causal_mask_function
            and local_size is None
            and not use_vmap
            and kv_offset == 0
            and isinstance(q_offset, int)
            and q_offset + q_length == kv_length
        )
        if simple:
            return attention_mask.bool()
        return original(
            batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, local_size,
            allow_is_causal_skip, allow_is_bidirectional_skip, use_vmap, device, **kwargs,
        )  # fmt: skip

    return rlhf_kernels_mask


def _attention_call(large: bool) -> Call:
    batch, heads, time, size = (2, 8, 256, 64) if large else (2, 4, 11, 8)
    draw = torch.Generator().manual_seed(0)
    q = torch.randn(batch, heads, time, size, generator=draw).requires_grad_()
    k, v = (torch.randn(batch, heads // 2, time, size, generator=draw).requires_grad_() for _ in range(2))
    module = SimpleNamespace(is_causal=True, num_key_value_groups=2)
    return Call((module, q, k, v, None), {"scaling": 0.2})


def _mask_call(large: bool) -> Call:
    time = 512 if large else 11
    mask = torch.ones(3, time, dtype=torch.bool)
    mask[1, :4] = False

    def invoke(function: Any, mask: Tensor) -> Tensor:
        found = function(len(mask), time, time, attention_mask=mask)
        found = _four_dimensions(found, time, True) if found.dim() == 2 else found
        return found.float()[mask[:, None, :]] if found.shape[1] != 1 else found[:, 0].float()[mask]

    return Call((mask,), {}, invoke)


def _own_attention(device: str) -> str | None:
    return "on a CPU transformers' attention is PyTorch's own, as ours is" if device == "cpu" else None


def _attention(make: Any, version: str) -> Rebinding:
    return Rebinding(
        name="attention",
        op="attention",
        place="transformers.modeling_utils:AttentionInterface._global_mapping.sdpa",
        make=make,
        call=_attention_call,
        versions=(version,),
        backends=rebind.FAST | {"torch"},
        leave=_own_attention,
        note="dropout, windows and other masks than padding go to the original",
    )


ATTENTION = (
    _attention(our_attention_until_5_23, "5.23.0"),
    _attention(our_attention, "5.24.0"),
    Rebinding(
        name="attention_mask",
        op="attention",
        place="transformers.masking_utils:AttentionMaskInterface._global_mapping.sdpa",
        make=our_mask,
        call=_mask_call,
        backends=rebind.FAST | {"torch"},
        leave=_own_attention,
        needs="attention",
        note="goes with `attention`: without it masks have four dimensions, which go to the original",
    ),
)
