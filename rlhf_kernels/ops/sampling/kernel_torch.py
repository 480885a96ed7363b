"""sample in plain PyTorch: the whole vocabulary is sorted only for top_p without top_k."""

from __future__ import annotations

import torch
from torch import Tensor


def forward(
    logits: Tensor, uniform: Tensor, temperature: float, top_k: int | None, top_p: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Token, its log-probability among all tokens, and log of the mass that truncation kept.

    Mass is added up in float64: float32 does not tell the tokens in the tail of a large vocabulary apart.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    peak = logits.amax(-1, keepdim=True)
    z = (logits.to(dtype) - peak) / temperature
    weight = z.exp()
    mass = weight.cumsum(-1, dtype=torch.float64)
    total = kept = mass[:, -1:]
    drawable = weight > 0
    if top_k is not None or top_p is not None:
        drawable &= _kept(logits, peak, temperature, top_k, top_p)
        mass = weight.masked_fill(~drawable, 0).cumsum(-1, dtype=torch.float64)
        kept = mass[:, -1:]
    # argmax gives the first. `drawable`: a parallel sum may step by its rounding where nothing is added.
    token = (drawable & (mass > uniform.unsqueeze(-1) * kept)).to(torch.uint8).argmax(-1, keepdim=True)
    logprob = z.gather(-1, token) - total.log()
    return token.squeeze(-1), logprob.to(dtype).squeeze(-1), (kept / total).log().to(dtype).squeeze(-1)


def _kept(logits: Tensor, peak: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> Tensor:
    """Which tokens [B, V] truncation keeps: so many of the largest, of equal logits the lower tokens."""
    if top_k is None:
        ordered = logits.sort(dim=-1, descending=True).values
    else:
        ordered = logits.topk(min(top_k, logits.shape[-1])).values
    count = torch.full_like(peak, ordered.shape[-1], dtype=torch.int64)
    if top_p is not None:
        dtype = torch.promote_types(logits.dtype, torch.float32)
        weight = ((ordered.to(dtype) - peak) / temperature).exp().double()
        mass = weight.cumsum(-1)
        count = (mass - weight < top_p * mass[:, -1:]).sum(-1, keepdim=True)
    least = ordered.gather(-1, count.clamp(min=1) - 1)
    above, level = logits > least, logits == least
    return above | (level & (level.cumsum(-1) <= count - above.sum(-1, keepdim=True)))


def sample(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    uniform: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The plain form with the public function's signature, for a temperature above 0 and given numbers."""
    return forward(logits, uniform, temperature, top_k, top_p)
