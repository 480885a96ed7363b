"""Critics that classify: values as distributions over bins, each formula written once."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# Standard deviation of a target over the width of a bin.
SIGMA_TO_BIN = 0.75


def bin_centres(low: float, high: float, bins: int) -> Tensor:
    """[bins]: the middles of as many equal parts of [low, high]."""
    edges = torch.linspace(low, high, bins + 1, dtype=torch.float64)
    return ((edges[1:] + edges[:-1]) / 2).float()


def hl_gauss_target(
    values: Tensor, low: float, high: float, bins: int, *, sigma_to_bin: float = SIGMA_TO_BIN
) -> Tensor:
    """[..., bins]: the share of a normal distribution about each value that falls in each bin of [low, high].

    Imani and White, 2018, arXiv:1806.04613; as a critic Farebrother et al., 2024, arXiv:2403.03950,
    appendix A, where the standard deviation is 0.75 of a bin. Values outside are taken to be at the edge.
    """
    edges = torch.linspace(low, high, bins + 1, dtype=torch.float64, device=values.device)
    sigma = sigma_to_bin * (high - low) / bins
    x = values.double().clamp(low, high)[..., None]
    below = torch.special.erf((edges - x) / (sigma * math.sqrt(2.0)))
    return ((below[..., 1:] - below[..., :-1]) / (below[..., -1:] - below[..., :1])).to(values.dtype)


def hl_gauss_loss(logits: Tensor, target: Tensor) -> Tensor:
    """[...]: cross-entropy of logits [..., bins] with such a target [..., bins]."""
    return -(target * F.log_softmax(logits, -1)).sum(-1)
