"""attention_varlen in Triton: attention's kernels; a program finds the sequence that its tile lies in."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rlhf_kernels.ops.attention.kernel_triton import Options, run_backward, run_forward, unsupported

__all__ = ["backward", "forward", "unsupported"]


def forward(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    """The output [N, H, D], and the log-sum-exp [H, N], which the backward needs in any case."""
    out, lse = run_forward(*map(_as_batch, (q, k, v)), _options(*options))
    return out[0].transpose(0, 1), lse[0]


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *options: Any,
) -> tuple[Tensor, ...]:
    """Gradients of q, k and v."""
    rows = map(_as_batch, (q, k, v, out))
    gradients = run_backward(_as_batch(grad_out), grad_lse, *rows, lse, _options(*options))
    return tuple(grad[0].transpose(0, 1) for grad in gradients)


def _as_batch(x: Tensor) -> Tensor:
    """[N, H, D] as [1, H, N, D]."""
    return x.transpose(0, 1)[None]


def _options(
    cu_seqlens: Tensor,
    cu_seqlens_k: Tensor | None,
    causal: bool,
    scale: float,
    return_lse: bool,
    *rest: Any,
) -> Options:
    options = Options(causal, None, scale, return_lse, *rest)
    return options._replace(cu_seqlens=cu_seqlens, cu_seqlens_k=cu_seqlens_k)
