"""linear_logprob on the CPU: products by PyTorch, the row kernels of logprob on each block of logits."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor

from rlhf_kernels.ops.loss_head import kernel_native, linear_blocks
from rlhf_kernels.runtime.native import operator

_backward_in_place = operator("logprob_backward_")


def _differentiate(logits: Tensor, ids: Tensor, by_row: Sequence[Tensor], temperature: float) -> None:
    entropy, peak, log_total, grad_logprob, grad_entropy = by_row
    _backward_in_place(grad_logprob, grad_entropy, logits, ids, entropy, peak, log_total, temperature)


forward = partial(linear_blocks.forward, kernel_native.forward)
backward = partial(linear_blocks.backward, _differentiate)
