"""linear_logprob on a GPU: products by PyTorch, the Triton kernels of logprob on each block of logits."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor

from rlhf_kernels.ops.loss_head import kernel_triton, linear_blocks


def _differentiate(logits: Tensor, ids: Tensor, by_row: Sequence[Tensor], temperature: float) -> None:
    kernel_triton.differentiate(logits, ids, tuple(by_row), temperature, logits)


forward = partial(linear_blocks.forward, kernel_triton.forward)
backward = partial(linear_blocks.backward, _differentiate)
