"""logprob and linear_logprob over a process group, each process with a slice of the vocabulary.

The kernels give the statistics of a slice, one gather brings them together, and every process merges them by
the same arithmetic in float64. With w the share of a slice in the sum of exponents of the whole,

    log p(target) = (log p in its slice) + log w        entropy = sum of w (entropy of the slice - log w)

A gradient needs the statistics of the whole alone, and the target's own term where the target is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from rlhf_kernels.ops.loss_head import kernel_torch, linear_kernel_torch
from rlhf_kernels.runtime.checks import positive, tokens
from rlhf_kernels.runtime.dispatch import OPS
from rlhf_kernels.runtime.groups import gathered, process_group

_ELSEWHERE, _IGNORED = -1, -2


class _Share(NamedTuple):
    """What a process knows of the targets.

    ids: [...], within its slice, or _ELSEWHERE or _IGNORED.
    known: [...], whether the whole vocabulary has the target.
    sizes: [processes], the slices' numbers of tokens.
    """

    ids: Tensor
    known: Tensor
    sizes: Tensor


class _Whole(NamedTuple):
    """Of the whole vocabulary, float64: logprob, entropy, largest z, log sum exp(z - largest), and the log of
    each slice's share in it."""

    logprob: Tensor
    entropy: Tensor
    peak: Tensor
    log_total: Tensor
    log_share: Tensor


def _share(
    op: str,
    target: Any,
    shape: tuple[int, ...],
    like: Tensor,
    size: int,
    group: Any,
    ignored: int | None = None,
) -> _Share:
    sizes = gathered(torch.tensor([size], device=like.device), process_group(op, group))[:, 0]
    # On a GPU, where the range is not looked at, nothing may wait for the device.
    tokens(op, "target", target, shape, like, int(sizes.sum()) if like.is_cpu else 0, ignored)
    local = target - sizes[: group.rank()].sum()
    ids = torch.where((local >= 0) & (local < size), local, _ELSEWHERE)
    if ignored is not None:
        ids = ids.masked_fill(target == ignored, _IGNORED)
    return _Share(ids, (target >= 0) & (target < sizes.sum()), sizes)


def _merge(
    found: Sequence[Tensor],
    first: Tensor,
    share: _Share,
    group: dist.ProcessGroup,
    more: Sequence[Tensor] = (),
) -> tuple[_Whole, Tensor]:
    """The whole from a slice's logprob, entropy, peak and log total, and its first logit; what every process
    gives in `more`, [len(more), processes, ...], comes along."""
    logprob, entropy, peak, log_total = (t.double() for t in found)
    # Of a slice of -inf alone, whose share is 0, no other result is a number; a slice of NaN is none such.
    masked = (peak == -torch.inf) & ~first.isnan()
    owns = share.ids >= 0
    stats = torch.stack((logprob.where(owns, 0), entropy, log_total, peak, owns, *more))
    stats[:3].masked_fill_(masked, 0)
    logprobs, entropies, log_totals, peaks, owner, *more = gathered(stats, group).unbind(1)
    peak = peaks.amax(0)
    log_sums = peaks - peak + log_totals
    log_total = log_sums.logsumexp(0)
    log_share = log_sums - log_total
    parts = log_share.exp() * (entropies - log_share)
    entropy = parts.masked_fill(log_share == -torch.inf, 0).sum(0).clamp(min=0)
    logprob = torch.where(owner > 0, logprobs + log_share, 0).sum(0).clamp(max=0)
    # A target outside of the vocabulary, which only the CPU checks, gives NaN.
    whole = _Whole(logprob.where(share.known, torch.nan), entropy, peak, log_total, log_share)
    return whole, torch.stack(more) if more else logprob.new_empty(0)


class _Logprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, share: _Share, temperature: float, group: dist.ProcessGroup
    ) -> tuple[Tensor, ...]:
        ctx.kernel, ids = _kernel("logprob", logits), share.ids.clamp(min=0)
        found = ctx.kernel.forward(logits, ids, temperature)
        whole, _ = _merge(found, logits[..., 0], share, group)
        results = tuple(t.to(found[0].dtype) for t in whole[:4])
        ctx.temperature = temperature
        ctx.save_for_backward(logits, share.ids, *results[1:])
        return results[:2]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        logits, ids, *by_row = ctx.saved_tensors
        grad = ctx.kernel.backward(*grads, logits, ids.clamp(min=0), *by_row, ctx.temperature)
        columns = [t.reshape(-1) for t in (*by_row, *grads)]
        rows = grad.view(-1, grad.shape[-1])
        first = logits[..., 0].reshape(-1)
        kernel_torch.without_target(rows, first, ids.reshape(-1), columns, ctx.temperature)
        return grad, None, None, None


def _kernel(op: str, like: Tensor) -> Any:
    """The chosen backend; plain PyTorch where that is the definition, which has no backward of its own."""
    kernel = OPS[op].choose(like)
    plain = kernel_torch if op == "logprob" else linear_kernel_torch
    return kernel if hasattr(kernel, "backward") else plain


def logprob(
    logits: Tensor, target: Tensor, temperature: float, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """`logprob` of logits whose other columns the other processes hold."""
    share = _share("logprob", target, logits.shape[:-1], logits, logits.shape[-1], group)
    positive("logprob", "temperature", temperature)
    return _Logprob.apply(logits, share, temperature, group)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, share: _Share,
        temperature: float, softcap: float | None, more: int, group: dist.ProcessGroup,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        ctx.kernel, ctx.group = _kernel("linear_logprob", hidden), group
        ctx.options = (temperature, softcap, _IGNORED)
        ids = share.ids.masked_fill(share.ids == _ELSEWHERE, 0)
        operands = (hidden, weight, bias, ids, *ctx.options, more)
        *found, mean, is_top, log_squares, top = ctx.kernel.forward(*operands, parted=True)
        ignored = share.ids == _IGNORED
        first = F.linear(hidden, weight[:1], None if bias is None else bias[:1])[:, 0].masked_fill(ignored, 0)
        owns_top = is_top & (share.ids >= 0) if more & 2 else ignored
        logged = [t if len(t) else torch.zeros_like(top) for t in (mean, log_squares)]
        whole, others = _merge(found, first, share, group, (*logged, owns_top, top))
        logged = _logged(whole, share, *others)
        results = (*whole[:4], *(t if more >> i & 1 else t[:0] for i, t in enumerate(logged)))
        results = [t if t.dtype == torch.bool else t.to(top.dtype) for t in results]
        for i in (0, 1, 4, 5, 6):
            if len(results[i]):
                results[i] = results[i].masked_fill(ignored, 0)
        ctx.mark_non_differentiable(*results[2:])
        ctx.save_for_backward(hidden, weight, bias, share.ids, *results[1:4])
        return tuple(results)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        wanted = list(ctx.needs_input_grad[:3])
        found = list(ctx.kernel.backward(*grads[:2], *ctx.saved_tensors, *ctx.options, wanted, parted=True))
        if wanted[0]:
            total = found[0].to(torch.promote_types(found[0].dtype, torch.float32))
            dist.all_reduce(total, group=ctx.group)
            found[0] = total.to(found[0].dtype)
        return *(grad if w else None for grad, w in zip(found, wanted)), *(None,) * 5


def _logged(
    whole: _Whole, share: _Share, means: Tensor, log_squares: Tensor, owns_top: Tensor, tops: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean z, whether the target is the first of the largest, and log sum p^2, of the whole vocabulary."""
    parts = share.sizes.double() / share.sizes.sum()
    mean = (means * parts.view(-1, 1)).sum(0)
    first = tops.argmax(0, keepdim=True)  # of equals the first, as in a slice
    squares = 2 * whole.log_share + log_squares
    squares = squares.masked_fill(whole.log_share == -torch.inf, -torch.inf)
    return mean, owns_top.gather(0, first)[0] > 0, squares.logsumexp(0)


def linear_logprob(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, temperature: float,
    softcap: float | None, ignore_index: int, more: int, group: dist.ProcessGroup,
) -> tuple[Tensor, ...]:  # fmt: skip
    """`linear_logprob` with a slice of the weight; outputs as those of the operator."""
    share = _share("linear_logprob", target, hidden.shape[:1], hidden, weight.shape[0], group, ignore_index)
    positive("linear_logprob", "temperature", temperature)
    return _Linear.apply(hidden, weight, bias, share, temperature, softcap, more, group)
