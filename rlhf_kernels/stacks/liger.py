"""Liger-Kernel: Triton kernels for norms, SwiGLU and rotary embeddings, and a loss head with entropy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf_kernels.stacks.peer import Peer, Unavailable


def _layer_norm() -> Callable[..., Tensor]:
    from liger_kernel.transformers.functional import liger_layer_norm

    def layer_norm(x: Tensor, weight: Tensor, *, eps: float, **_: Any) -> Tensor:
        return liger_layer_norm(x, weight, torch.zeros_like(weight), eps)  # it has no form without a bias

    return layer_norm


def _rms_norm() -> Callable[..., Tensor]:
    from liger_kernel.transformers.functional import liger_rms_norm

    def rms_norm(x: Tensor, weight: Tensor, *, eps: float, weight_offset: float = 0.0, **_: Any) -> Tensor:
        return liger_rms_norm(x, weight, eps, offset=weight_offset, in_place=False)

    return rms_norm


def _swiglu() -> Callable[..., Tensor]:
    from liger_kernel.transformers.functional import liger_swiglu

    def swiglu(x: Tensor, gate: Tensor | None = None, *, gate_first: bool = False, **_: Any) -> Tensor:
        if gate is None:
            first, second = x.chunk(2, dim=-1)
            x, gate = (second, first) if gate_first else (first, second)
        return liger_swiglu(gate, x)

    return swiglu


def full_width(table: Tensor, width: int) -> Tensor:
    """A table of cosines or sines repeated for both halves of a head, as these stacks want it."""
    return table if table.shape[-1] == width else torch.cat([table, table], dim=-1)


def _rotary() -> Callable[..., Tensor]:
    from liger_kernel.transformers.functional import liger_rope

    def rotary(x: Tensor, tables: Sequence[Tensor], **_: Any) -> Tensor:
        if x.dim() != 4:
            raise Unavailable("Liger's rotary takes [B, H, T, D] only")
        if x.transpose(1, 2).is_contiguous():
            x = x.clone()  # it writes over its input in this layout
        cos, sin = (full_width(table, x.shape[-1]) for table in tables)
        spare = x.new_empty(x.shape[0], 1, *x.shape[2:])  # it always rotates a key as well
        return liger_rope(x, spare, cos, sin)[0]

    return rotary


def _linear_logprob() -> Callable[..., tuple[Tensor, Tensor]]:
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

    def linear_logprob(
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        *,
        temperature: float = 1.0,
        ignore_index: int = -100,
        **_: Any,
    ) -> tuple[Tensor, Tensor]:
        settings = (temperature, ignore_index, 1, True)
        loss, entropy = LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, target, *settings)
        return -loss, entropy

    return linear_logprob


PEERS = [
    Peer(
        stack="liger",
        op="layer_norm",
        label="Liger",
        package="liger-kernel",
        origin="liger_kernel.transformers.functional.liger_layer_norm",
        adapter=_layer_norm,
        options=frozenset({"eps"}),
        devices=("cuda",),
    ),
    Peer(
        stack="liger",
        op="rms_norm",
        label="Liger",
        package="liger-kernel",
        origin="liger_kernel.transformers.functional.liger_rms_norm",
        adapter=_rms_norm,
        options=frozenset({"eps", "weight_offset"}),
        devices=("cuda",),
        note="rounds to the input's type before the weight is applied, as Llama does",
    ),
    Peer(
        stack="liger",
        op="swiglu",
        label="Liger",
        package="liger-kernel",
        origin="liger_kernel.transformers.functional.liger_swiglu",
        adapter=_swiglu,
        options=frozenset({"gate", "gate_first"}),
        devices=("cuda",),
    ),
    Peer(
        stack="liger",
        op="rotary",
        label="Liger",
        package="liger-kernel",
        origin="liger_kernel.transformers.functional.liger_rope",
        adapter=_rotary,
        semantics={"interleaved": False},
        devices=("cuda",),
        note="always rotates queries and keys together; one spare key head is part of the time",
    ),
    Peer(
        stack="liger",
        op="linear_logprob",
        label="Liger",
        package="liger-kernel",
        origin="liger_kernel.ops.fused_linear_scaled_cross_entropy.LigerFusedLinearScaledCrossEntropyFunction",
        adapter=_linear_logprob,
        options=frozenset({"temperature", "ignore_index"}),
        note="a CuTe kernel on Hopper, chunked PyTorch elsewhere",
    ),
]
