"""The definition of sample."""

from __future__ import annotations

import torch
from torch import Tensor


def weights(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None
) -> tuple[Tensor, Tensor]:
    """Probabilities [B, V] up to a factor for each row: of all tokens, and 0 where truncation cut them."""
    z = logits.double()
    weight = ((z - z.amax(-1, keepdim=True)) / temperature).exp()
    order = z.argsort(dim=-1, descending=True, stable=True)  # equal logits: the lower token first
    ordered = weight.gather(-1, order)
    if top_k is not None:
        ordered[:, top_k:] = 0
    if top_p is not None:
        before = ordered.cumsum(-1) - ordered
        ordered = ordered.masked_fill(before >= top_p * ordered.sum(-1, keepdim=True), 0)
    return weight, torch.zeros_like(weight).scatter(-1, order, ordered)


def forward(
    logits: Tensor, uniform: Tensor, temperature: float, top_k: int | None, top_p: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The first token at which the kept mass, added up in the order of the vocabulary, exceeds its share."""
    weight, kept = weights(logits, temperature, top_k, top_p)
    reached = kept.cumsum(-1)
    token = (reached > uniform.unsqueeze(-1) * reached[:, -1:]).int().argmax(-1)
    chosen = weight.gather(-1, token.unsqueeze(-1)).squeeze(-1)
    mass = weight.sum(-1)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return token, (chosen / mass).log().to(dtype), (kept.sum(-1) / mass).log().to(dtype)


def sample(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    uniform: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition with the public function's signature."""
    if temperature == 0:
        temperature, top_k = 1.0, 1
    if uniform is None:
        uniform = torch.rand(len(logits), dtype=torch.float64, generator=generator)
    return forward(logits, uniform, temperature, top_k, top_p)
