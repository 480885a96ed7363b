"""Tiny models, away from where they start: the B of an adapter is zero there and a gain is one."""

from collections.abc import Callable

import pytest
import torch

from palm_rlhf.models.palm import PaLM

SIZES = {"dim": 32, "num_tokens": 23, "depth": 2, "heads": 2, "dim_head": 16, "ff_mult": 2}


@pytest.fixture
def make_palm() -> Callable[..., PaLM]:
    """make_palm(seed=0, spread=0.15, **arguments): a PaLM with random weights, in evaluation mode."""

    def make(seed: int = 0, spread: float = 0.15, **arguments) -> PaLM:
        generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed)
            model = PaLM(**(SIZES | arguments))
        for parameter in model.parameters():
            parameter.data.add_(spread * torch.randn(parameter.shape, generator=generator))
        return model.eval()

    return make


@pytest.fixture
def palm(make_palm) -> PaLM:
    """One of them, causal and without adapters."""
    return make_palm()


@pytest.fixture
def tokens() -> torch.Tensor:
    """[3, 9] ids of that model."""
    return torch.randint(1, SIZES["num_tokens"], (3, 9), generator=torch.Generator().manual_seed(7))
