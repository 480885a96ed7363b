"""linear_recurrence: the scan that the advantage family rests on, by itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf_kernels.runtime.checks import floating, matrix, on, same, shaped
from rlhf_kernels.runtime.dispatch import Op
from rlhf_kernels.runtime.library import Operator

_OP = Op(
    "linear_recurrence",
    "rlhf_kernels.ops.advantage",
    {"cpu": ("native", "torch"), "cuda": ("triton", "torch")},
    modules={
        "reference": "recurrence_reference",
        "torch": "recurrence_kernel_torch",
        "native": "recurrence_kernel_native",
        "triton": "recurrence_kernel_triton",
    },
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    a, _, initial, ctx.reverse = inputs
    ctx.save_for_backward(a, initial, output)


def _gradients(ctx: Any, run: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The same recurrence the other way: y_t is reached by its own gradient, and by what reaches the step
    made of it, times that step's factor. In float32 at least: a 16-bit gradient would be rounded twice."""
    a, initial, y = ctx.saved_tensors
    dtype = torch.promote_types(y.dtype, torch.float32)
    wide, grad = a.to(dtype), grad.to(dtype)
    steps = y.shape[1]
    edge = y.new_zeros(y.shape[0]) if initial is None else initial
    if steps == 0:
        return grad, grad, None if initial is None else torch.zeros_like(initial), None
    if ctx.reverse:
        rest = run(wide[:, :-1], grad[:, 1:], grad[:, 0], False)
        reaching = torch.cat((grad[:, :1], rest), 1)
        fed = torch.cat((y[:, 1:], edge[:, None]), 1)
        last = -1
    else:
        rest = run(wide[:, 1:], grad[:, :-1], grad[:, -1], True)
        reaching = torch.cat((rest, grad[:, -1:]), 1)
        fed = torch.cat((edge[:, None], y[:, :-1]), 1)
        last = 0
    to_initial = None if initial is None else (wide[:, last] * reaching[:, last]).to(initial.dtype)
    return (reaching * fed.to(dtype)).to(a.dtype), reaching.to(y.dtype), to_initial, None


_linear_recurrence = Operator(
    _OP,
    "(Tensor a, Tensor b, Tensor? initial, bool reverse) -> Tensor",
    lambda a, b, initial, reverse: b.new_empty(b.shape),
    setup_context=_setup,
    gradients=_gradients,
    native="linear_recurrence",
).call


def linear_recurrence(a: Tensor, b: Tensor, *, reverse: bool = True, initial: Tensor | None = None) -> Tensor:
    """y_t = a_t * y_(t+1) + b_t along each row, from the last step to the first; differentiable to any order.

    Args:
        a: [B, T], floating-point.
        b: [B, T], dtype of a.
        reverse: False goes from the first step to the last: y_t = a_t * y_(t-1) + b_t.
        initial: [B], what stands beyond the first step taken: y_T, or y_(-1). None: 0.

    Returns:
        y [B, T] in the dtype of b; arithmetic is in float32 (float64 for float64).

    Raises:
        TypeError: a or b is not floating-point, or a dtype differs.
        ValueError: a shape or device does not fit.
    """
    op = "linear_recurrence"
    matrix(op, "b", b)
    same(op, "b", b, "a", a)
    if initial is not None:
        per_row(op, "b", b, "initial", initial)
    return _linear_recurrence(a, b, initial, bool(reverse))


def per_row(op: str, name: str, x: Tensor, other_name: str, other: Any) -> None:
    """TypeError or ValueError unless `other` is a number for each row of x, of its dtype and device."""
    floating(op, other_name, other)
    if other.dtype != x.dtype:
        raise TypeError(
            f"{op}(): {other_name} must have the dtype of {name}, {x.dtype}, got {other.dtype}. "
            f"Cast with {other_name}.to({name}.dtype)."
        )
    shaped(op, other_name, other, x.shape[:1], "one number for each row")
    on(op, name, x, other_name, other)
