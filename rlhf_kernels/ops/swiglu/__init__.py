"""SwiGLU: silu(gate) * x, on one packed tensor or two."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rlhf_kernels.runtime.checks import floating, same
from rlhf_kernels.runtime.dispatch import Op
from rlhf_kernels.runtime.library import Operator

_OP = Op("swiglu", __name__, {"cpu": ("native", "torch"), "cuda": ("triton", "torch")})


def _fake(x: Tensor, gate: Tensor | None, gate_first: bool) -> Tensor:
    return x.new_empty(x.shape) if gate is not None else x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


def _backward_fake(grad: Tensor, x: Tensor, gate: Tensor | None, gate_first: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(0 if gate is None else gate.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, gate, ctx.gate_first = inputs
    ctx.save_for_backward(x, gate)


def _gradients(ctx: Any, backward: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, gate = ctx.saved_tensors
    grad_x, grad_gate = backward(grad, x, gate, ctx.gate_first)
    return grad_x, None if gate is None else grad_gate, None


_swiglu = Operator(
    _OP,
    "(Tensor x, Tensor? gate, bool gate_first) -> Tensor",
    _fake,
    backward_schema="(Tensor grad, Tensor x, Tensor? gate, bool gate_first) -> (Tensor, Tensor)",
    backward_fake=_backward_fake,
    setup_context=_setup,
    gradients=_gradients,
    replay=lambda grad, x, gate, gate_first: ((x, gate, gate_first), (grad,)),
    wrt=(0, 1),
    native="swiglu",
).call


def swiglu(x: Tensor, gate: Tensor | None = None, *, gate_first: bool = False) -> Tensor:
    """`silu(gate) * x` (Shazeer, 2020, arXiv:2002.05202, without the projections).

    Args:
        x: [..., 2F] holding both operands side by side, or [..., F] with `gate` apart.
        gate: [..., F], same shape, dtype and device as x; None where x is packed.
        gate_first: whether the gate is the first half of a packed x (Llama's fused projections); in PaLM it
            is the second. Has no effect with two tensors.

    Returns:
        [..., F] in x's dtype; arithmetic is in float32 (float64 for float64).

    Raises:
        TypeError: an operand is no floating-point tensor.
        ValueError: shapes, dtypes or devices do not fit.
    """
    floating("swiglu", "x", x)
    if gate is not None:
        same("swiglu", "x", x, "gate", gate)
    elif x.dim() == 0 or x.shape[-1] % 2:
        raise ValueError(
            "swiglu(): packed x must end in an even dimension (both operands side by side), got "
            f"{tuple(x.shape)}. Pass gate= where the operands are two tensors."
        )
    return _swiglu(x, gate, gate_first)
