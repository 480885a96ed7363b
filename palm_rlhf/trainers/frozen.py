"""What need not be in a checkpoint: weights that do not learn, of a model that has files of its own."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from palm_rlhf.models.checkpoint import CheckpointError
from palm_rlhf.trainers.ranks import ranks


def frozen_names(tensors: Mapping[str, Tensor]) -> set[str]:
    """The names of the parameters that have no gradient."""
    return {
        name
        for name, tensor in tensors.items()
        if isinstance(tensor, nn.Parameter) and not tensor.requires_grad
    }


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, dtypes, shapes and bits, one tensor after the other. All processes must ask."""
    there, found = ranks(), hashlib.sha256()
    for name in sorted(tensors):
        for tensor in there.gathered({name: tensors[name]}).values():
            found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return there.everyones(found.hexdigest())[0]


def check_frozen(
    own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], metadata: Mapping[str, Any], path: str
) -> None:
    """Whether a file with these tensors and the weights of `own` that it leaves out make a whole.

    All processes must ask.

    Raises:
        CheckpointError: a tensor is on one side only, or what is left out has other bits than it had.
    """
    left, of = own.keys() - tensors.keys(), metadata.get("frozen")
    odd = sorted((tensors.keys() - own.keys()) | (set() if of and len(left) == of["tensors"] else left))
    if odd:
        raise CheckpointError(
            f"{path} does not fit: {', '.join(odd[:3])} {'is' if len(odd) == 1 else 'are'} on one side only"
        )
    if left and (found := digest({name: own[name] for name in left})) != of["sha256"]:
        raise CheckpointError(
            f"{path} goes with the frozen weights of {of['model']} as they were (SHA-256 "
            f"{of['sha256'][:12]}), and now they are others ({found[:12]})"
        )
