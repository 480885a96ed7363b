"""Sequences one after the other, without the padding that a rectangle of them needs."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from palm_rlhf.models.protocol import CausalModel

# Padding of a row times the square of the width, from which packing is faster on a CPU: 4 tokens at 256.
_PAYS = 2**18


class Packing(NamedTuple):
    """Where the N real tokens of [B, T] are.

    Attributes:
        index: [N] int64, their places in the flattened [B * T], rows in order.
        cu_seqlens: [B + 1] int64: row i has the packed tokens cu_seqlens[i] to cu_seqlens[i + 1].
        positions: [N] int64, from each row's first token, which has 0.
        longest: above every position.
    """

    index: Tensor
    cu_seqlens: Tensor
    positions: Tensor
    longest: int


@runtime_checkable
class PackedModel(Protocol):
    """What a `CausalModel` may do besides: read packed sequences."""

    @property
    def packs(self) -> bool:
        """Whether it can as it is now."""
        ...

    def packed_hidden_states(self, tokens: Tensor, packing: Packing, *, scope: str | None = None) -> Tensor:
        """[N, E] of tokens [N], as `hidden_states` has them at these places: no row sees another."""
        ...


def packing(mask: Tensor) -> Packing:
    """Of a mask [B, T], True where a token is real."""
    index = mask.flatten().nonzero().squeeze(1)
    # Counted in columns, as the padded form does: a hole in a row keeps its place.
    first = mask.to(torch.uint8).argmax(1)
    row, column = index.div(mask.shape[1], rounding_mode="floor"), index % mask.shape[1]
    return Packing(index, F.pad(mask.sum(1).cumsum(0), (1, 0)), column - first[row], mask.shape[1])


def pays(mask: Tensor, model: CausalModel) -> bool:
    """Whether to pack these rows: the model can, and the padding costs more than packing does.

    On a CPU attention is then a call for each sequence; elsewhere it is one for all.
    """
    if not (isinstance(model, PackedModel) and model.packs):
        return False
    padding = mask.numel() - int(mask.sum())
    return padding > 0 and (mask.device.type != "cpu" or padding * model.dim**2 >= _PAYS * len(mask))


def hidden_rows(
    model: CausalModel,
    tokens: Tensor,
    mask: Tensor,
    wanted: Tensor,
    *,
    scope: str | None = None,
    packed: bool | None = None,
) -> Tensor:
    """[n, E]: the hidden states of the n tokens that are wanted, rows in order.

    Args:
        tokens: [B, T]. mask: [B, T] boolean, True where a token is real.
        wanted: [B, T] boolean.
        packed: compute the real tokens alone, for which the model must be a `PackedModel`; None: where it
            `pays`.

    Raises:
        ValueError: packed, and a token is wanted that is not real.
    """
    pack = pays(mask, model) if packed is None else packed
    if pack and bool((wanted & ~mask).any()):
        if packed:
            raise ValueError(
                "packed: a token is scored that follows a hole in its row. Set packed=None for such rows."
            )
        pack = False
    if pack:
        places = packing(mask)
        hidden = model.packed_hidden_states(tokens.flatten()[places.index], places, scope=scope)
        wanted = wanted.flatten()[places.index]
    else:
        hidden = model.hidden_states(tokens, mask=None if bool(mask.all()) else mask, scope=scope)
        hidden, wanted = hidden.flatten(0, 1), wanted.flatten()
    return hidden if bool(wanted.all()) else hidden.index_select(0, wanted.nonzero().squeeze(1))


def placed(rows: Tensor, where: Tensor) -> Tensor:
    """[B, T, ...] of [n, ...]: at the n places of `where` [B, T], in order; 0 elsewhere."""
    shape = (*where.shape, *rows.shape[1:])
    if len(rows) == where.numel():
        return rows.view(shape)
    index = where.flatten().nonzero().squeeze(1)
    return rows.new_zeros(where.numel(), *rows.shape[1:]).index_copy(0, index, rows).view(shape)


def set_packed(packed: bool | None, *parts: Any) -> None:
    """Whether policies and value models pack: always, never, or (None) where it pays.

    Raises:
        ValueError: always, and a model cannot.
    """
    for part in parts:
        if packed and not isinstance(part.model, PackedModel):
            raise ValueError(
                f"packed=True, but {type(part.model).__name__} cannot read packed sequences: it has no "
                "packed_hidden_states(). Leave packed at None."
            )
        part.packed = packed
