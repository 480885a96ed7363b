"""Keys and values of the tokens that a batch has seen, so that each new token costs one step."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_kernels import RotaryTable, RotaryTables


class KVCache:
    """Keys, rotated already, and values of every layer, [B, 1, capacity, D] each.

    All rows hold `length` slots: prompts are padded on the left, and `mask` says which slots are tokens.
    Positions are counted in slots, since rotary embeddings see distances only.
    """

    def __init__(
        self,
        layers: int,
        shape: tuple[int, int, int, int],
        tables: RotaryTables,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Room for `shape` = (B, key heads, capacity, D) in each layer; `tables` are those of all slots."""
        # Zeros, not rubbish: a slot is multiplied by the weight 0 before it is written.
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)]
        self.mask = torch.zeros(shape[0], shape[2], dtype=torch.bool, device=device)
        self.length = 0
        self.padded = False
        # First token of each row, where padding is on the left alone; a row without padding starts at 0.
        self.starts: Tensor | None = None
        self.gapless = True
        self._tables = tables

    @property
    def capacity(self) -> int:
        """Slots in all."""
        return self.mask.shape[1]

    @property
    def key_mask(self) -> Tensor | None:
        """[B, length], or None where every slot holds a token."""
        return self.mask[:, : self.length] if self.padded else None

    def extend(self, steps: int, mask: Tensor | None) -> slice:
        """Claims the next slots, for tokens with this mask [B, steps]; ValueError where they do not fit."""
        end = self.length + steps
        if end > self.capacity:
            raise ValueError(
                f"the cache has {self.capacity} slots, {self.length} of them used; {steps} more do not fit"
            )
        slots = slice(self.length, end)
        if mask is None:
            self.mask[:, slots] = True
        else:
            self.mask[:, slots] = mask
            if not bool(mask.all()):
                self.padded = True
                self.gapless = slots.start == 0 and bool((mask[:, 1:] >= mask[:, :-1]).all())
                self.starts = (~mask).sum(1)
        self.length = end
        return slots

    def tables(self, slots: slice) -> RotaryTables:
        """Rotary tables of these slots."""
        query, key = (RotaryTable(table.cos[slots], table.sin[slots]) for table in self._tables)
        return RotaryTables(query, key)

    def append(self, layer: int, slots: slice, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Writes one layer's new keys and values; returns all so far, [B, 1, length, D]."""
        self.keys[layer][:, :, slots] = key
        self.values[layer][:, :, slots] = value
        return self.keys[layer][:, :, : slots.stop], self.values[layer][:, :, : slots.stop]

    def keep(self, rows: Tensor) -> None:
        """Drops all other rows of the batch; `rows` are indices."""
        self.keys = [key[rows] for key in self.keys]
        self.values = [value[rows] for value in self.values]
        self.mask = self.mask[rows]
        self.starts = None if self.starts is None else self.starts[rows]
