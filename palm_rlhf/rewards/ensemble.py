"""Several rewards as one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from palm_rlhf.generation import Generation

Combine = Literal["mean", "min", "lower", "sum"]


class Ensemble:
    """The weighted mean or sum of rewards, their least, or their mean less `k` standard deviations.

    Coste et al., 2023, arXiv:2310.02743: `min` is their worst case; `lower` punishes disagreement, as their
    uncertainty-weighted optimisation does by the variance. What a policy finds that one member overrates, the
    others do not reward. Members should have one scale: see `ModelReward.normalize_on`.
    """

    def __init__(
        self,
        rewards: Sequence[Callable[[Generation], Tensor]],
        combine: Combine = "mean",
        *,
        weights: Sequence[float] | None = None,
        k: float = 1.0,
    ) -> None:
        """
        Args:
            rewards: each maps a Generation to [B].
            combine: how they become one number.
            weights: of `mean` and `sum`, one for each reward; a mean divides by their sum.
            k: of `lower`, in population standard deviations over the members.

        Raises:
            ValueError: there are no rewards, `combine` is none of the four, or weights do not fit.
        """
        if not rewards:
            raise ValueError("Ensemble: there are no rewards")
        if combine not in get_args(Combine):
            raise ValueError(
                f"Ensemble: combine must be one of {', '.join(get_args(Combine))}, got {combine!r}"
            )
        if weights is not None and combine not in ("mean", "sum"):
            raise ValueError(f"Ensemble: weights are of mean and sum, not of {combine}")
        if weights is not None and (len(weights) != len(rewards) or (combine == "mean" and not sum(weights))):
            raise ValueError(
                f"Ensemble: there must be a weight for each of the {len(rewards)} rewards, and their sum "
                f"not 0, got {list(weights)}"
            )
        if k < 0:
            raise ValueError(f"Ensemble: k must be at least 0, got {k}")
        self.rewards, self.combine, self.k = list(rewards), combine, k
        self.weights = [1.0] * len(rewards) if weights is None else [float(weight) for weight in weights]

    def members(self, generation: Generation) -> Tensor:
        """[M, B]: what each of the M rewards says."""
        found = [reward(generation).float() for reward in self.rewards]
        return torch.stack([each.to(found[0].device) for each in found])

    def __call__(self, generation: Generation) -> Tensor:
        """[B] in float32."""
        return self.combined(self.members(generation))

    def combined(self, found: Tensor) -> Tensor:
        """[B] of what each of the M rewards says, [M, B]."""
        if self.combine == "min":
            return found.amin(0)
        if self.combine == "lower":
            return found.mean(0) - self.k * found.std(0, correction=0)
        weights = torch.tensor(self.weights, dtype=found.dtype, device=found.device)
        summed = (weights[:, None] * found).sum(0)
        return summed if self.combine == "sum" else summed / weights.sum()
