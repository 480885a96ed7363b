"""Low-rank adapters (Hu et al., 2021, arXiv:2106.09685) on PaLM's attention projections."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class LoRA(nn.Module):
    """`x @ A @ B * alpha / r`: an update of rank r that starts at 0.

    A starts as a linear layer's weight would, not at variance 1 as palm-rlhf-pytorch's does, and the product
    `A @ B` is never formed in training: that library's is as large as the weight it adapts.

    Attributes:
        A: [dim, r].
        B: [r, dim_out], zeros at first.
    """

    def __init__(self, dim: int, dim_out: int, r: int = 8, alpha: float | None = None) -> None:
        """`alpha` is r by default, which makes the factor 1; ValueError for a rank below 1."""
        super().__init__()
        if r < 1:
            raise ValueError(f"LoRA: the rank r must be at least 1, got {r}")
        self.scale = (r if alpha is None else alpha) / r
        self.A = nn.Parameter(torch.empty(dim, r).uniform_(-1, 1).mul_(1 / math.sqrt(dim)))
        self.B = nn.Parameter(torch.zeros(r, dim_out))

    @property
    def weight(self) -> Tensor:
        """The update itself, [dim, dim_out]."""
        return (self.A @ self.B) * self.scale

    def forward(self, x: Tensor) -> Tensor:
        """What is added to the projection of x [..., dim]: [..., dim_out]."""
        return (x @ self.A) @ (self.B * self.scale)


class BlockLoRA(nn.ModuleList):
    """The adapters of one block in palm-rlhf-pytorch's order: queries, keys, values, output."""

    def __init__(self, dim: int, inner: int, dim_head: int, r: int) -> None:
        """`inner` is heads * dim_head."""
        super().__init__(
            (LoRA(dim, inner, r), LoRA(dim, dim_head, r), LoRA(dim, dim_head, r), LoRA(inner, dim, r))
        )

    @property
    def inputs(self) -> list[LoRA]:
        """Those of queries, keys and values."""
        return list(self)[:3]

    def added_to_qkv(self) -> Tensor:
        """[inner + 2 * dim_head, dim], to be added to the rows of the fused projection for q, k and v."""
        return torch.cat([lora.weight for lora in self.inputs], dim=1).t()

    def added_to_output(self) -> Tensor:
        """[dim, inner], to be added to the output projection."""
        return self[3].weight.t()

    def qkv(self, x: Tensor) -> Tensor:
        """What is added to q, k and v side by side, [..., inner + 2 * dim_head]."""
        low = x @ torch.cat([lora.A for lora in self.inputs], dim=1)
        parts = low.split([lora.A.shape[1] for lora in self.inputs], dim=-1)
        return torch.cat([part @ (lora.B * lora.scale) for part, lora in zip(parts, self.inputs)], dim=-1)
