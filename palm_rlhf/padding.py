"""Prompts and responses of any lengths as rows of equal length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def left_padded(
    prompts: Sequence[Sequence[int] | Tensor], pad: int = 0, device: Any = None
) -> tuple[Tensor, Tensor]:
    """Tokens and mask [B, P] of prompts that end together; ValueError or TypeError for what is none."""
    rows = [_ids(which, prompt) for which, prompt in enumerate(prompts)]
    if not rows or not all(len(row) for row in rows):
        which = next((i for i, row in enumerate(rows) if not len(row)), None)
        raise ValueError(
            "generate(): there are no prompts" if which is None else f"generate(): prompt {which} is empty"
        )
    width = max(map(len, rows))
    tokens = torch.stack([F.pad(row, (width - len(row), 0), value=pad) for row in rows])
    mask = torch.stack([torch.arange(width) >= width - len(row) for row in rows])
    return tokens.to(device), mask.to(device)


def _ids(which: int, prompt: Any) -> Tensor:
    """A prompt's tokens [P]."""
    try:
        ids = torch.as_tensor(prompt, dtype=torch.int64)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(
            f"generate(): prompt {which} must be token ids, got {prompt!r:.40}. Encode a text with the "
            "model's tokenizer."
        ) from None
    if ids.dim() != 1:
        raise ValueError(
            f"generate(): prompt {which} must be a list of token ids, got {tuple(ids.shape) or prompt}. One "
            "prompt alone is [prompt]."
        )
    return ids


def side_by_side(
    prompts: Sequence[Sequence[int] | Tensor], responses: Sequence[Sequence[int]], pad: int = 0
) -> tuple[Tensor, Tensor, int]:
    """Tokens and mask [B, P + R], and P: prompts padded on the left, responses on the right: they meet.

    A response may be empty; ValueError for an empty prompt.
    """
    left, mask = left_padded(prompts, pad)
    lengths = torch.tensor([len(response) for response in responses])
    real = torch.arange(int(lengths.max())) < lengths[:, None]
    right = torch.full(real.shape, pad)
    right[real] = torch.tensor([token for response in responses for token in response], dtype=torch.int64)
    return torch.cat([left, right], 1), torch.cat([mask, real], 1), left.shape[1]
