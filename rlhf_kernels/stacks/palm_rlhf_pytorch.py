"""palm-rlhf-pytorch: the parts of its PaLM block, and the normalisation and log-probabilities of its PPO."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from rlhf_kernels.stacks.liger import full_width
from rlhf_kernels.stacks.peer import Peer, Unavailable


def _attention() -> Callable[..., Tensor]:
    from palm_rlhf_pytorch.attention import Attention

    modules = {causal: Attention(causal=causal).eval() for causal in (False, True)}

    def attention(
        q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, key_mask: Tensor | None = None, **_: Any
    ) -> Tensor:
        if k.shape[1] != 1:
            raise Unavailable("palm-rlhf-pytorch has multi-query attention only: one key head")
        if causal and q.shape[2] != k.shape[2]:
            raise Unavailable("palm-rlhf-pytorch has causal attention for as many queries as keys only")
        return modules[causal](q, k[:, 0], v[:, 0], mask=key_mask)

    return attention


def _rotary() -> Callable[..., Tensor]:
    from palm_rlhf_pytorch.palm import apply_rotary_pos_emb

    last: list[Any] = [None, None]  # the tables seen last and what they were turned into

    def angles(tables: Sequence[Tensor], width: int) -> tuple[Tensor, Tensor]:
        """The stack wants angles and a scale, and takes the cosine of the angles at every call."""
        cos, sin = (full_width(table, width) for table in tables)
        if cos.dim() == 3:
            cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        return torch.atan2(sin, cos), torch.hypot(sin, cos)

    def rotary(x: Tensor, tables: Sequence[Tensor], **_: Any) -> Tensor:
        if last[0] is not tables:
            last[:] = [tables, angles(tables, x.shape[-1])]
        positions, scale = last[1]
        return apply_rotary_pos_emb(positions, x, scale)

    return rotary


def _swiglu() -> Callable[..., Tensor]:
    from palm_rlhf_pytorch.palm import SwiGLU

    def swiglu(x: Tensor, gate: Tensor | None = None, **_: Any) -> Tensor:
        if gate is not None:
            raise Unavailable("palm-rlhf-pytorch takes values and gate in one tensor only")
        return module(x)

    module = SwiGLU()
    return swiglu


def _layer_norm() -> Callable[..., Tensor]:
    from palm_rlhf_pytorch.palm import LayerNorm

    def layer_norm(x: Tensor, weight: Tensor, **_: Any) -> Tensor:
        return LayerNorm.forward(SimpleNamespace(gamma=weight, beta=torch.zeros_like(weight)), x)

    return layer_norm


def _masked_normalize() -> Callable[..., Tensor]:
    from palm_rlhf_pytorch.ppo import masked_normalize as function

    def masked_normalize(
        x: Tensor, mask: Tensor | None = None, *, dim: int | None = None, eps: float = 1e-5, **_: Any
    ) -> Tensor:
        if mask is None and dim is not None:
            raise Unavailable("palm-rlhf-pytorch drops the reduced dimension where there is no mask")
        return function(x, eps=eps, mask=None if mask is None else mask.bool(), dim=dim)

    return masked_normalize


def _logprob() -> Callable[..., tuple[Tensor, None]]:
    from palm_rlhf_pytorch.ppo import log_prob

    def logprob(logits: Tensor, target: Tensor, *, temperature: float = 1.0, **_: Any) -> tuple[Tensor, None]:
        if logits.dim() != 3:
            raise Unavailable("palm-rlhf-pytorch takes logits [B, T, V] only")
        logits = logits if temperature == 1.0 else logits / temperature
        return log_prob(logits.softmax(dim=-1), target), None

    return logprob


_STACK = {"stack": "palm_rlhf_pytorch", "label": "palm-rlhf-pytorch", "package": "palm-rlhf-pytorch"}

PEERS = [
    Peer(
        **_STACK,
        op="attention",
        origin="palm_rlhf_pytorch.attention.Attention.forward",
        adapter=_attention,
        options=frozenset({"causal", "key_mask"}),
        note="a query with no key allowed gets the mean of all values",
    ),
    Peer(
        **_STACK,
        op="rotary",
        origin="palm_rlhf_pytorch.palm.apply_rotary_pos_emb",
        adapter=_rotary,
        semantics={"interleaved": False},
    ),
    Peer(
        **_STACK,
        op="swiglu",
        origin="palm_rlhf_pytorch.palm.SwiGLU.forward",
        adapter=_swiglu,
        semantics={"gate_first": False},
    ),
    Peer(
        **_STACK,
        op="layer_norm",
        origin="palm_rlhf_pytorch.palm.LayerNorm.forward",
        adapter=_layer_norm,
        semantics={"eps": 1e-5, "weight_offset": 1.0},
    ),
    Peer(
        **_STACK,
        op="masked_normalize",
        origin="palm_rlhf_pytorch.ppo.masked_normalize",
        adapter=_masked_normalize,
        semantics={"unbiased": False, "eps": 1e-5, "eps_mode": "clamp", "center": True, "zero_masked": False},
        options=frozenset({"mask", "dim", "eps"}),
        note="an empty mask gives mean 0 and variance 0, so the values times eps^-1/2",
    ),
    Peer(
        **_STACK,
        op="logprob",
        origin="palm_rlhf_pytorch.ppo.log_prob of a softmax",
        adapter=_logprob,
        options=frozenset({"temperature"}),
        outputs=("logprob",),
        note="goes through probabilities, so it cannot fall below log(1e-20)",
    ),
]
