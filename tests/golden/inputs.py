"""Seeded inputs for the recorded vectors: small shapes, and every kind of mask that a batch can have."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

SHAPES = ((4, 7), (3, 16), (2, 2), (1, 1))


def generator(*seed: int) -> torch.Generator:
    """A generator whose seed is a function of small numbers."""
    value = 0
    for part in seed:
        value = value * 1009 + part + 1
    return torch.Generator().manual_seed(value)


def masks(rows: int, columns: int) -> Iterator[tuple[str, Tensor]]:
    """Masks [rows, columns] by name; True is real, False is padding."""
    columns_index = torch.arange(columns).expand(rows, columns)
    row = torch.arange(rows) % 4
    lengths = torch.tensor([columns, columns // 2 + 1, max(columns - 2, 1), 1])[row, None]
    few = torch.tensor([0, 1, 2, columns]).clamp(max=columns)[row, None]
    yield "full", torch.ones(rows, columns, dtype=torch.bool)
    yield "tail", columns_index < lengths  # padded on the right
    yield "head", columns_index >= columns - lengths  # padded on the left
    middle = (columns_index % 3 != 1) & (columns_index < columns - 1)
    middle[0, -1] = True
    yield "middle", middle  # holes, as tool output makes them
    yield "few", columns_index < few  # rows with 0, 1, 2 and all tokens
    for total in (0, 1, 2):  # so many real tokens in the whole batch
        count = torch.zeros(rows * columns, dtype=torch.bool)
        count[torch.arange(total) * 3 % max(rows * columns, 1)] = True
        yield f"total_{total}", count.view(rows, columns)


def values(kind: str, shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """Random values, drawn in float64 and rounded: normal, far from zero, or all the same."""
    drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
    if kind == "offset":
        drawn = drawn + 100.0
    if kind == "constant":
        drawn = torch.full_like(drawn, 0.75)
    return drawn.to(dtype)
