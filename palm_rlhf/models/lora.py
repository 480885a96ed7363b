"""Low-rank adapters (Hu et al., 2021, arXiv:2106.09685) on PaLM's projections."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

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
        """What is added to the projection of x [..., dim]: [..., dim_out], in the adapter's dtype."""
        return (_like(x, self.A) @ self.A) @ (self.B * self.scale)


# The projections of a block: queries, keys, values, output; of the feed-forward two halves and the way back.
PROJECTIONS = {
    "q": "attention", "k": "attention", "v": "attention", "o": "attention",
    "up": "mlp", "gate": "mlp", "down": "mlp",
}  # fmt: skip


class BlockLoRA(nn.Module):
    """The adapters of one block, in the order of `PROJECTIONS`: 0 to 3 are palm-rlhf-pytorch's.

    `lora[i]` is one of them, or None; they are numbered in checkpoints too. Iterating gives those there are.
    """

    def __init__(self, sizes: Mapping[str, tuple[int, int]], r: int, alpha: float | None = None) -> None:
        """`sizes` are the input and output widths of the projections that get an adapter; may be empty."""
        super().__init__()
        for number, name in enumerate(PROJECTIONS):
            if name in sizes:
                self.add_module(str(number), LoRA(*sizes[name], r, alpha))

    def __getitem__(self, number: int) -> LoRA | None:
        return self._modules.get(str(number))

    def __iter__(self) -> Iterator[LoRA]:
        return iter(self._modules.values())

    @property
    def targets(self) -> list[str]:
        """The projections with an adapter."""
        return [name for number, name in enumerate(PROJECTIONS) if self[number] is not None]

    def added(self, first: int, widths: Sequence[int]) -> Tensor | None:
        """[sum of widths, dim] for the rows of a fused projection, whose parts begin with number `first`.

        None where no part has an adapter.
        """
        parts = [self[first + i] for i in range(len(widths))]
        there = next((lora for lora in parts if lora is not None), None)
        if there is None:
            return None
        rows = [
            there.A.new_zeros(width, len(there.A)) if lora is None else lora.weight.t()
            for lora, width in zip(parts, widths)
        ]
        return torch.cat(rows)

    def plus(self, first: int, x: Tensor, outputs: Sequence[Tensor]) -> list[Tensor]:
        """Outputs of the projections from number `first` on, all of x, with what their adapters add."""
        loras = [self[first + i] for i in range(len(outputs))]
        there = [lora for lora in loras if lora is not None]
        if not there:
            return list(outputs)
        # One product for all that read the same.
        low = _like(x, there[0].A) @ torch.cat([lora.A for lora in there], dim=1)
        parts = iter(low.split([lora.A.shape[1] for lora in there], dim=-1))
        return [
            out if lora is None else (out + next(parts) @ (lora.B * lora.scale)).to(out.dtype)
            for lora, out in zip(loras, outputs)
        ]


def _like(x: Tensor, weight: Tensor) -> Tensor:
    """x in the adapter's dtype, which may be wider than the model's; autocast chooses one for both."""
    return x if torch.is_autocast_enabled(x.device.type) else x.to(weight.dtype)
