"""What of a model learns: adapters on which projections, the last layers, or everything."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

# "attention", "mlp", "all", or names of projections.
Targets = str | Sequence[str]
KINDS = ("attention", "mlp")


def learned_dtype(weight: Tensor) -> torch.dtype:
    """Of what learns beside such weights: float32 or wider: in 16 bits an update of Adam's size is lost."""
    return torch.promote_types(weight.dtype, torch.float32)


def chosen(projections: Mapping[str, str], targets: Targets, what: str = "the model") -> list[str]:
    """Names of the projections that `targets` mean, in their order.

    Args:
        projections: names to kinds, "attention" or "mlp".
        targets: "all", a kind, an end of names at a dot such as "q_proj", or several of these.
        what: the model in errors.

    Raises:
        ValueError: one of the targets means no projection.
    """
    wanted = [targets] if isinstance(targets, str) else list(targets)
    found: set[str] = set()
    for target in wanted:
        matched = {
            name
            for name, kind in projections.items()
            if target in ("all", kind, name) or name.endswith(f".{target}")
        }
        if not matched:
            there = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in projections}))
            raise ValueError(
                f"{what} has no projection {target!r} for adapters. Choose from all, "
                f"{', '.join(KINDS)}, {there}."
            )
        found |= matched
    if not found:
        raise ValueError(f"{what}: adapters need a projection at least, got none")
    return [name for name in projections if name in found]


def last_blocks(model: Any, count: int | None) -> list[nn.Module]:
    """So many of a model's last layers, or all; ValueError where there are not as many."""
    blocks = model.blocks
    if count is None:
        return blocks
    if not 1 <= count <= len(blocks):
        raise ValueError(
            f"the model has {len(blocks)} layers: from 1 to {len(blocks)} of the last ones can learn, "
            f"got {count}"
        )
    return blocks[-count:]


def learned(model: Any, scope: str | None, last_layers: int | None = None) -> Iterator[nn.Parameter]:
    """The parameters that learn: adapters, the last layers (embeddings, last norm and head not), or all."""
    if scope is not None:
        yield from model.finetune_parameters(scope)
    elif last_layers is None:
        yield from model.parameters()
    else:
        for block in last_blocks(model, last_layers):
            yield from block.parameters()


def apart(model: nn.Module, parameters: Iterable[nn.Parameter]) -> nn.Module:
    """A copy of a model with these parameters of its own; it shares the others."""
    own = {id(parameter) for parameter in parameters}
    return copy.deepcopy(model, {id(p): p for p in model.parameters() if id(p) not in own})
