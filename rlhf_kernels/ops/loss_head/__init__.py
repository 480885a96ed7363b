"""Log-probability of chosen tokens and entropy, from logits or straight from the last hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlhf_kernels.runtime.checks import floating, on, positive, shaped, tokens
from rlhf_kernels.runtime.dispatch import Op
from rlhf_kernels.runtime.library import Operator

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# What `outputs` of linear_logprob may name; each has a bit of the operator's `more`.
MORE = ("mean_logit", "is_top1", "log_sum_p2")
_BACKENDS = {"cpu": ("native", "torch"), "cuda": ("triton", "torch")}


def _by_row(like: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    dtype = torch.promote_types(like.dtype, torch.float32)
    return tuple(like.new_empty(target.shape, dtype=dtype) for _ in range(4))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, target, ctx.temperature = inputs
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(logits, target, *output[1:])


def _gradients(ctx: Any, backward: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    return backward(*grads[:2], *ctx.saved_tensors, ctx.temperature), None, None


_GRADS = "Tensor grad_logprob, Tensor grad_entropy"
_RESULTS = "Tensor entropy, Tensor peak, Tensor log_total"

_logprob = Operator(
    Op("logprob", __name__, _BACKENDS),
    "(Tensor logits, Tensor target, float temperature) -> (Tensor, Tensor, Tensor, Tensor)",
    lambda logits, target, temperature: _by_row(logits, target),
    backward_schema=f"({_GRADS}, Tensor logits, Tensor target, {_RESULTS}, float temperature) -> Tensor",
    backward_fake=lambda grad_logprob, grad_entropy, logits, *rest: logits.new_empty(logits.shape),
    setup_context=_setup,
    gradients=_gradients,
    replay=lambda grad_logprob, grad_entropy, logits, target, entropy, peak, log_total, temperature: (
        (logits, target, temperature),
        (grad_logprob, grad_entropy),
    ),
    native="logprob",
).call


def _linear_fake(hidden: Tensor, weight: Tensor, bias: Any, target: Tensor, *options: Any) -> tuple[Any, ...]:
    by_row = _by_row(hidden, target)
    kinds = (by_row[0].dtype, torch.bool, by_row[0].dtype)
    shapes = (target.shape if options[-1] & 1 << i else (0,) for i in range(len(MORE)))
    return *by_row, *(target.new_empty(shape, dtype=kind) for shape, kind in zip(shapes, kinds))


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, target, *ctx.options, _ = inputs
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(hidden, weight, bias, target, *output[1:4])


def _linear_gradients(ctx: Any, backward: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    wanted = list(ctx.needs_input_grad[:3])
    found = backward(*grads[:2], *ctx.saved_tensors, *ctx.options, wanted)
    return *(grad if w else None for grad, w in zip(found, wanted)), None, None, None, None, None


def _linear_backward_fake(
    grad_logprob: Tensor, grad_entropy: Tensor, hidden: Tensor, weight: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    return tuple(hidden.new_empty(shape if wanted else 0) for shape, wanted in zip(shapes, rest[-1]))


_OPERANDS = "Tensor hidden, Tensor weight, Tensor? bias, Tensor target"
_OPTIONS = "float temperature, float? softcap, int ignore_index"

_linear_logprob = Operator(
    Op(
        "linear_logprob",
        __name__,
        _BACKENDS,
        modules={
            "reference": "linear_reference",
            "torch": "linear_kernel_torch",
            "native": "linear_kernel_native",
            "triton": "linear_kernel_triton",
        },
    ),
    f"({_OPERANDS}, {_OPTIONS}, int more) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _linear_fake,
    backward_schema=f"({_GRADS}, {_OPERANDS}, {_RESULTS}, {_OPTIONS}, bool[] wanted)"
    " -> (Tensor, Tensor, Tensor)",
    backward_fake=_linear_backward_fake,
    setup_context=_linear_setup,
    gradients=_linear_gradients,
    replay=lambda grad_logprob, grad_entropy, *given: (
        (*given[:4], *given[7:10], 0),
        (grad_logprob, grad_entropy),
    ),
    wrt=(0, 1, 2),
    wanted=lambda *given: given[-1],
).call


def logprob(
    logits: Tensor, target: Tensor, *, temperature: float = 1.0, group: ProcessGroup | None = None
) -> tuple[Tensor, Tensor]:
    """Log-probability of a token under softmax(logits / temperature), and the entropy, both differentiable.

    Logits of -inf (a masked vocabulary) are tokens of probability 0: they add nothing to the entropy, and as
    a target their log-probability is -inf. Where all of a row are -inf, the row's results are NaN.

    Args:
        logits: [..., V], floating-point.
        target: [...], int64, below V. Whether it is, is checked in eager calls on the CPU.
        temperature: divides the logits. Ratios and KL terms want that of the sampling.
        group: a torch.distributed process group whose processes hold consecutive slices of the vocabulary, in
            the order of their ranks and of any sizes: V is this one's, the targets are those of the whole.
            Every process must call, with the same targets, and gets the same results, to the bit; the
            gradients are those of a loss that all compute alike. Runs eagerly.

    Returns:
        log p(target) and -sum p log p, [...]. Arithmetic and results are float32 (float64 for float64): a
        log-probability in 16 bits would put more noise into a ratio than an update puts there.

    Raises:
        TypeError: logits are not floating-point, target not int64, temperature no number.
        ValueError: shapes, devices or a target do not fit, temperature is not positive.
    """
    floating("logprob", "logits", logits)
    _vocabulary("logprob", "logits", logits, logits.shape[-1:])
    if group is not None:
        from rlhf_kernels.ops.loss_head.group import (
            logprob as over_group,
        )  # torch.distributed costs an import

        return over_group(logits, target, temperature, group)
    tokens("logprob", "target", target, logits.shape[:-1], logits, logits.shape[-1])
    positive("logprob", "temperature", temperature)
    return _logprob(logits, target, temperature)[:2]


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    outputs: Sequence[str] = (),
    group: ProcessGroup | None = None,
) -> tuple[Tensor, ...]:
    """`logprob` of `hidden @ weight.T + bias`, without ever holding the logits [N, V].

    Some rows' logits exist at a time; the backward computes them once more. Gradients reach hidden, weight
    and bias through both results; one that is not required is not computed. Autocast is not consulted:
    operands have one dtype, and that is the dtype of the products.

    Args:
        hidden: [N, E], floating-point: the inputs of the output layer.
        weight: [V, E], of hidden's dtype.
        target: [N], int64, below V, or `ignore_index`.
        bias: [V], of hidden's dtype; -inf masks a part of the vocabulary, unless there is a softcap,
            which makes it -softcap.
        temperature: divides the (capped) logits.
        softcap: `softcap * tanh(logits / softcap)` before the temperature, as Gemma 2 has it.
        ignore_index: target of rows that do not count: both results are 0, and the row has no gradient and
            gives none to weight and bias, whatever stands in it.
        outputs: more results, for what a trainer logs, at a pass over the logits each, without gradient:
            "mean_logit", the mean over the vocabulary of the capped and divided logits, "is_top1", whether
            the target is the first of the largest, and "log_sum_p2", the log of the sum of p squared.
        group: as in `logprob`: weight and bias are this process's slice of the vocabulary, hidden and target
            the same on all. The gradient of hidden is the sum over the group.

    Returns:
        log p(target) and the entropy, [N], in float32 (float64 for float64); see `logprob`. Then what
        `outputs` names, in its order: [N], of the same dtype, or bool for "is_top1"; 0 and False where the
        target is ignored.

    Raises:
        TypeError: an operand has the wrong dtype, temperature or softcap is no number.
        ValueError: shapes, devices or a target do not fit, temperature or softcap is not positive, or
            `outputs` names what there is not.
    """
    op = "linear_logprob"
    floating(op, "hidden", hidden)
    floating(op, "weight", weight)
    if hidden.dim() != 2 or weight.dim() != 2:
        raise ValueError(
            f"{op}(): hidden must be [N, E] and weight [V, E], got {tuple(hidden.shape)} and "
            f"{tuple(weight.shape)}. Flatten leading dimensions with hidden.flatten(0, -2)."
        )
    _vocabulary(op, "weight", weight, weight.shape[:1])
    _parameter(
        op,
        "weight",
        weight,
        (weight.shape[0], hidden.shape[1]),
        "a row of hidden's size for each token",
        hidden,
    )
    if bias is not None:
        floating(op, "bias", bias)
        _parameter(op, "bias", bias, weight.shape[:1], "one element for each token", hidden)
    if softcap is not None:
        positive(op, "softcap", softcap)
    if unknown := [name for name in outputs if name not in MORE]:
        if isinstance(outputs, str):
            raise TypeError(f"{op}(): outputs must be a list of names, got {outputs!r}. Pass [{outputs!r}].")
        raise ValueError(f"{op}(): outputs must be among {', '.join(MORE)}, got {unknown[0]!r}")
    options = (temperature, softcap, ignore_index, sum(1 << MORE.index(name) for name in set(outputs)))
    if group is None:
        tokens(op, "target", target, hidden.shape[:1], hidden, weight.shape[0], ignore_index)
        positive(op, "temperature", temperature)
        found = _linear_logprob(hidden, weight, bias, target, *options)
    else:
        from rlhf_kernels.ops.loss_head.group import linear_logprob as over_group

        found = over_group(hidden, weight, bias, target, *options, group)
    return *found[:2], *(found[4 + MORE.index(name)] for name in outputs)


def _vocabulary(op: str, name: str, x: Tensor, size: tuple[int, ...]) -> None:
    if not size or size[0] == 0:
        raise ValueError(f"{op}(): {name} must have a vocabulary of at least one token, got {tuple(x.shape)}")


def _parameter(op: str, name: str, x: Tensor, shape: tuple[int, ...], meaning: str, hidden: Tensor) -> None:
    if x.dtype != hidden.dtype:
        raise TypeError(
            f"{op}(): {name} must have the dtype of hidden, {hidden.dtype}, got {x.dtype}. "
            f"Cast with {name}.to(hidden.dtype)."
        )
    shaped(op, name, x, shape, meaning)
    on(op, "hidden", hidden, name, x)
