"""Random numbers that belong to one response, whatever is sampled beside it."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral

import torch
from torch import Tensor

# SplitMix64 in signed integers: Steele, Lea, Flood (2014), Fast Splittable Pseudorandom Number Generators.
_STEP = 0x9E3779B97F4A7C15 - 2**64
_FACTORS = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)
_END = 2**63


def uniforms(seeds: Tensor, step: int) -> Tensor:
    """[B] float64 in [0, 1): number `step`, from 0, of the sequences that the seeds [B] int64 stand for.

    Not a torch.Generator for each: those take 32 bits of a seed, and a call for each row and step.
    """
    # Mixed before the steps are added: else a seed could begin in the middle of another's sequence.
    state = _mixed(seeds + _STEP) + torch.tensor(step, device=seeds.device) * _STEP
    return _shifted(_mixed(state), 11).double() * 2.0**-53


def seeds_of(seeds: Sequence[int] | Tensor, count: int) -> Tensor:
    """Seeds as [count] int64.

    Raises:
        TypeError: one is no integer.
        ValueError: there is another number of them, or one is not from 0 to 2^63 - 1.
    """
    given = seeds.flatten().tolist() if isinstance(seeds, Tensor) else list(seeds)
    if len(given) != count:
        raise ValueError(
            f"generate(): there must be a seed for each of the {count} responses (prompts times samples), "
            f"got {len(given)}"
        )
    for seed in given:
        if not isinstance(seed, Integral):
            raise TypeError(f"generate(): seeds must be integers, got {seed!r}")
        if not 0 <= seed < _END:
            raise ValueError(f"generate(): a seed must be from 0 to {_END - 1}, got {seed}")
    return torch.tensor([int(seed) for seed in given], dtype=torch.int64)


def drawn_seeds(count: int, generator: torch.Generator) -> Tensor:
    """[count] int64, of the generator."""
    return torch.randint(_END - 1, (count,), generator=generator, device=generator.device)


def _mixed(x: Tensor) -> Tensor:
    x = (x ^ _shifted(x, 30)) * _FACTORS[0]
    x = (x ^ _shifted(x, 27)) * _FACTORS[1]
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """To the right as an unsigned number."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
