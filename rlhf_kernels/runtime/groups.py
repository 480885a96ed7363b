"""Process groups as arguments of ops. Imported where one is given: torch.distributed costs an import."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def process_group(op: str, group: Any) -> dist.ProcessGroup:
    """`group`, or TypeError where it is none."""
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"{op}(): group must be a torch.distributed.ProcessGroup, got {type(group).__name__}")
    return group


def gathered(mine: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Every process's tensor of mine's shape and dtype, [processes, ...], in the order of the ranks."""
    ranks = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(ranks, mine.contiguous(), group=group)
    return torch.stack(ranks)
