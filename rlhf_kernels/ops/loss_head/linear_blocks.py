"""linear_logprob by blocks of rows, for any backend of logprob: products by PyTorch, the rest by the backend.

The logits of some rows exist at a time and are computed again for the gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from rlhf_kernels.ops.loss_head.kernel_torch import log_sum_squares, spans, without_target
from rlhf_kernels.runtime import onednn

# Rows in work at a time: fewer read the weight too often, more only take memory.
ROWS = 512
# oneDNN reads the weight fast enough for fewer rows, whose logits (24 MB) may then stay in the cache.
_CACHED, _FEWEST = 6 << 20, 64

# (logits, target, temperature) -> logprob, entropy, peak, log total
Reduce = Callable[[Tensor, Tensor, float], Sequence[Tensor]]
# (logits, target, by row, temperature): overwrites the logits with their gradient. By row are entropy, peak,
# log total, gradient of logprob, gradient of entropy.
Differentiate = Callable[[Tensor, Tensor, Sequence[Tensor], float], None]


def _blocks(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ignored: Tensor, softcap: float | None
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Slices of the rows, their hidden states, and their logits, which the next step overwrites.

    16-bit logits are rounded to 16 bits, as a model's own are. Ignored rows enter as zeros, so that what
    stands there, NaN included, stays there.
    """
    by_onednn = onednn.suits(hidden, weight)
    most = max(_FEWEST, min(ROWS, _CACHED // len(weight) // 32 * 32)) if by_onednn else ROWS
    memory = None if by_onednn else hidden.new_empty((min(len(hidden), most), len(weight)))
    for part in spans(len(hidden), most):
        rows = hidden[part].masked_fill(ignored[part, None], 0)
        if by_onednn:
            logits = onednn.product(rows, weight, bias)
        elif bias is None:
            logits = torch.mm(rows, weight.t(), out=memory[: len(rows)])
        else:
            logits = torch.addmm(bias, rows, weight.t(), out=memory[: len(rows)])
        if softcap is not None:
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            logits.div_(softcap).tanh_().mul_(softcap)
        yield part, rows, logits
        # Whoever takes a block drops it as well, so that there is never a second one.
        del logits


def forward(
    reduce: Reduce,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    temperature: float,
    softcap: float | None,
    ignore_index: int,
    more: int = 0,
    parted: bool = False,
) -> tuple[Tensor, ...]:
    """logprob, entropy, largest z and log sum exp(z - largest); then, empty unless the bits of `more` ask for
    them, mean z (1), whether the target is the first of the largest (2), log sum p^2 (4).

    `parted`: the vocabulary is a process's share, and its largest (capped) logit is one result more."""
    ignored = target == ignore_index
    ids = target.masked_fill(ignored, 0)
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    results = tuple(hidden.new_empty(target.shape, dtype=dtype) for _ in range(4))
    mean, is_top, log_squares = (
        hidden.new_empty(target.shape if more & bit else 0, dtype=t)
        for bit, t in ((1, dtype), (2, torch.bool), (4, dtype))
    )
    tops = [hidden.new_empty(target.shape, dtype=dtype)] if parted else []
    for part, _, logits in _blocks(hidden, weight, bias, ignored, softcap):
        if more & 1:
            mean[part] = logits.mean(-1, dtype=dtype) / temperature
        if more & 2:
            is_top[part] = logits.argmax(-1) == ids[part]
        for top in tops:
            top[part] = logits.amax(-1)
        for result, found in zip(results, reduce(logits, ids[part], temperature)):
            result[part] = found
        if more & 4:
            log_squares[part] = log_sum_squares(logits, results[2][part], results[3][part], temperature)
        del logits
    for result in (*results[:2], mean, is_top, log_squares):
        if len(result):
            result.masked_fill_(ignored, 0)
    return *results, mean, is_top, log_squares, *tops


def backward(
    differentiate: Differentiate,
    grad_logprob: Tensor,
    grad_entropy: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    entropy: Tensor,
    peak: Tensor,
    log_total: Tensor,
    temperature: float,
    softcap: float | None,
    ignore_index: int,
    wanted: Sequence[bool],
    parted: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias; empty where not wanted. Sums over rows are kept in float32.

    `parted`: the vocabulary is a process's share, and -1 a target in another's."""
    ignored = target == ignore_index
    ids = target.masked_fill(ignored, 0)
    by_row = (entropy, peak, log_total, *(g.masked_fill(ignored, 0) for g in (grad_logprob, grad_entropy)))
    to_hidden, to_weight, to_bias = wanted
    grad_hidden = torch.empty(hidden.shape if to_hidden else 0, dtype=hidden.dtype, device=hidden.device)
    grad_weight = torch.zeros(weight.shape if to_weight else 0, dtype=peak.dtype, device=weight.device)
    grad_bias = torch.zeros(len(weight) if to_bias else 0, dtype=peak.dtype, device=weight.device)
    for part, rows, grad in _blocks(hidden, weight, bias, ignored, softcap):
        # The slope of softcap * tanh(x / softcap), from its value.
        slope = None if softcap is None else 1 - (grad / softcap).square_()
        columns = [t[part] for t in by_row]
        if parted:
            first = grad[:, 0].clone()
            differentiate(grad, ids[part].clamp(min=0), columns, temperature)
            without_target(grad, first, ids[part], columns, temperature)
        else:
            differentiate(grad, ids[part], columns, temperature)
        if slope is not None:
            grad = grad.mul_(slope).to(hidden.dtype)
        if to_hidden:
            torch.mm(grad, weight, out=grad_hidden[part])
        if to_weight:
            _add_product(grad_weight, grad.t(), rows)
        if to_bias:
            grad_bias.add_(grad.sum(0, dtype=peak.dtype))
        del grad
    return grad_hidden, grad_weight.to(weight.dtype), grad_bias.to(weight.dtype)


def _add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a @ b, without an intermediate where the dtypes allow it."""
    if a.dtype == out.dtype:
        out.addmm_(a, b)
    else:
        out.add_(a @ b)
