"""linear_logprob in plain PyTorch: the logits of some rows at a time, computed again for the gradients."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_kernels.ops.loss_head import kernel_torch, linear_blocks


def _differentiate(logits: Tensor, ids: Tensor, by_row: Sequence[Tensor], temperature: float) -> None:
    kernel_torch.logit_gradient(logits, ids, by_row, temperature, out=logits)


forward = partial(linear_blocks.forward, kernel_torch.forward)
backward = partial(linear_blocks.backward, _differentiate)


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor]:
    """All logits at once and autograd, as one would write it: the public function's signature."""
    ignored = target == ignore_index
    logits = F.linear(hidden.masked_fill(ignored[:, None], 0), weight, bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    found = kernel_torch.logprob(logits, target.masked_fill(ignored, 0), temperature=temperature)
    return found[0].masked_fill(ignored, 0), found[1].masked_fill(ignored, 0)
