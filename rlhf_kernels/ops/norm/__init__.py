"""Layer and root-mean-square normalisation, with the residual sum before it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlhf_kernels.runtime.checks import floating, number, on, positive, same, shaped
from rlhf_kernels.runtime.dispatch import Op
from rlhf_kernels.runtime.library import Operator

_PARAMETERS = "Tensor weight, Tensor? bias"
_OPTIONS = "float eps, float weight_offset, bool center"


def _fake(x: Tensor, weight: Tensor, bias: Any, residual: Tensor | None, *options: Any) -> tuple[Tensor, ...]:
    statistics = x.new_empty((*x.shape[:-1], 3), dtype=torch.promote_types(x.dtype, torch.float32))
    return x.new_empty(x.shape), x.new_empty(0 if residual is None else x.shape), statistics


def _backward_fake(
    grad: Tensor,
    grad_summed: Tensor | None,
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    statistics: Tensor,
    *options: Any,
) -> tuple[Tensor, ...]:
    return (
        rows.new_empty(rows.shape),
        weight.new_empty(weight.shape),
        weight.new_empty(0 if bias is None else bias.shape),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, residual, *ctx.options = inputs
    ctx.adds = residual is not None
    ctx.save_for_backward(output[1] if ctx.adds else x, weight, bias, output[2])
    ctx.mark_non_differentiable(output[2])


def _gradients(
    ctx: Any, backward: Any, grad: Tensor, grad_summed: Tensor, _: Any
) -> tuple[Tensor | None, ...]:
    rows, weight, bias, statistics = ctx.saved_tensors
    found = backward(grad, grad_summed if ctx.adds else None, rows, weight, bias, statistics, *ctx.options)
    grad_x, grad_weight, grad_bias = found
    grad_residual = grad_x if ctx.adds else None
    return grad_x, grad_weight, None if bias is None else grad_bias, grad_residual, None, None, None


def _replay(
    grad: Tensor,
    grad_summed: Tensor | None,
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    statistics: Tensor,
    *options: Any,
) -> tuple[tuple[Any, ...], tuple[Tensor | None, ...]]:
    # The sum is what was kept: it plus nothing is itself, and takes the gradient of the second output.
    nothing = None if grad_summed is None else rows.new_zeros(()).expand_as(rows)
    return (rows, weight, bias, nothing, *options), (grad, grad_summed, None)


def _operator(name: str) -> Callable[..., Any]:
    """Both functions are one kernel; `center` tells them apart."""
    return Operator(
        Op(name, __name__, {"cpu": ("native", "torch"), "cuda": ("triton", "torch")}),
        f"(Tensor x, {_PARAMETERS}, Tensor? residual, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
        _fake,
        backward_schema=f"(Tensor grad, Tensor? grad_summed, Tensor rows, {_PARAMETERS}, Tensor statistics,"
        f" {_OPTIONS})"
        " -> (Tensor, Tensor, Tensor)",
        backward_fake=_backward_fake,
        setup_context=_setup,
        gradients=_gradients,
        replay=_replay,
        wrt=(0, 1, 2),
        native="norm",
    ).call


_layer_norm = _operator("layer_norm")
_rms_norm = _operator("rms_norm")


def layer_norm(
    x: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    weight_offset: float = 0.0,
    residual: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`(x - mean) / sqrt(var + eps) * (weight + weight_offset) + bias` over the last dimension.

    Ba, Kiros and Hinton, 2016, arXiv:1607.06450.

    Args:
        x: [..., E], floating-point.
        weight: [E], in x's dtype or float32.
        bias: [E], in weight's dtype; PaLM has none, GPT-NeoX and Phi do.
        eps: positive; added to the (biased) variance.
        weight_offset: added to the weight in float32; 1 where a model stores gamma - 1, as PaLM's does.
        residual: as x; added to x first, as blocks that normalise their input do. The sum is rounded to x's
            dtype and normalised as rounded, so that nothing changes against an addition before the call.

    Returns:
        [..., E] in x's dtype. Arithmetic is in float32 (float64 for float64) and rounded once, at the end.
        With `residual`, that and the sum.

    Raises:
        TypeError: an operand is no floating-point tensor or has the wrong dtype, an option is no number.
        ValueError: shapes or devices do not fit, eps is not positive.
    """
    _check("layer_norm", x, weight, bias, residual, eps, weight_offset)
    if x.dtype is torch.float64:
        weight, bias = weight.double(), None if bias is None else bias.double()
    out, summed, _ = _layer_norm(x, weight, bias, residual, eps, weight_offset, True)
    return out if residual is None else (out, summed)


def rms_norm(
    x: Tensor,
    weight: Tensor,
    *,
    eps: float = 1e-5,
    weight_offset: float = 0.0,
    residual: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`x / sqrt(mean(x^2) + eps) * (weight + weight_offset)` over the last dimension.

    Zhang and Sennrich, 2019, arXiv:1910.07467. The order of rounding is Gemma's: the weight multiplies in
    float32 and the product is rounded. Llama's modules round `x / rms` first and again after the weight: in
    16 bits theirs may differ in the last place.

    Args:
        x: [..., E], floating-point.
        weight: [E], in x's dtype or float32.
        eps: positive; added to the mean square.
        weight_offset: added to the weight in float32; 1 for Gemma, which stores gamma - 1.
        residual: as x; added to x first and rounded to x's dtype, as in layer_norm.

    Returns:
        [..., E] in x's dtype. With `residual`, that and the sum.

    Raises:
        TypeError: an operand is no floating-point tensor or has the wrong dtype, an option is no number.
        ValueError: shapes or devices do not fit, eps is not positive.
    """
    _check("rms_norm", x, weight, None, residual, eps, weight_offset)
    if x.dtype is torch.float64:
        weight = weight.double()
    out, summed, _ = _rms_norm(x, weight, None, residual, eps, weight_offset, False)
    return out if residual is None else (out, summed)


def _check(
    op: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    weight_offset: float,
) -> None:
    floating(op, "x", x)
    floating(op, "weight", weight)
    if x.dim() == 0:
        raise ValueError(f"{op}(): x must have a last dimension to normalise along, got a scalar")
    if weight.dtype != x.dtype and weight.dtype != torch.float32:
        raise TypeError(f"{op}(): weight must be {x.dtype} as x is, or float32, got {weight.dtype}")
    shaped(op, "weight", weight, x.shape[-1:], "one element for each of x's last dimension")
    on(op, "x", x, "weight", weight)
    if bias is not None:
        same(op, "weight", weight, "bias", bias)
    if residual is not None:
        same(op, "x", x, "residual", residual)
    positive(op, "eps", eps)
    number(op, "weight_offset", weight_offset)
