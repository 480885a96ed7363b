"""Generalised advantage estimation, and the whole way from scores and KL to whitened advantages."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from rlhf_kernels.ops.advantage.off_policy import vtrace
from rlhf_kernels.ops.advantage.recurrence import linear_recurrence
from rlhf_kernels.ops.advantage.returns import discounted_return, lambda_return
from rlhf_kernels.ops.advantage.token import token_advantages
from rlhf_kernels.runtime.checks import boolean, floating, matrix, number, on, same
from rlhf_kernels.runtime.dispatch import Op
from rlhf_kernels.runtime.library import Operator

__all__ = [
    "discounted_return",
    "gae",
    "lambda_return",
    "linear_recurrence",
    "token_advantages",
    "vtrace",
]

_OP = Op("gae", __name__, {"cpu": ("native", "torch"), "cuda": ("native", "triton", "torch")})
_FLAGS = "Tensor? mask, Tensor? done, Tensor? truncated"
_OPTIONS = "float gamma, float lam, bool carry"


def _fake(rewards: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return rewards.new_empty(rewards.shape), rewards.new_empty(rewards.shape)


def _backward_fake(
    grad: Tensor, grad_returns: Tensor, mask: Any, done: Any, truncated: Any, next_dims: int, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    shape = (grad.new_empty(0).shape, grad.shape[:1], grad.shape)[next_dims]
    return grad.new_empty(grad.shape), grad.new_empty(grad.shape), grad.new_empty(shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, mask, done, truncated, next_value, *ctx.options = inputs
    ctx.next_dims = 0 if next_value is None else next_value.dim()
    ctx.save_for_backward(mask, done, truncated)


def _gradients(ctx: Any, backward: Any, grad: Tensor, grad_returns: Tensor) -> tuple[Tensor | None, ...]:
    found = backward(grad, grad_returns, *ctx.saved_tensors, ctx.next_dims, *ctx.options)
    grad_next = found[2] if ctx.next_dims else None
    return found[0], found[1], None, None, None, grad_next, None, None, None


def _replay(
    grad: Tensor, grad_returns: Tensor, mask: Any, done: Any, truncated: Any, next_dims: int, *options: Any
) -> tuple[tuple[Any, ...], tuple[Tensor, Tensor]]:
    # Linear in rewards and values: the gradients are the same wherever they are taken.
    zeros = torch.zeros_like(grad)
    next_value = (None, zeros.new_zeros(zeros.shape[:1]), zeros)[next_dims]
    return (zeros, zeros, mask, done, truncated, next_value, *options), (grad, grad_returns)


_gae = Operator(
    _OP,
    f"(Tensor rewards, Tensor values, {_FLAGS}, Tensor? next_value, {_OPTIONS}) -> (Tensor, Tensor)",
    _fake,
    backward_schema=f"(Tensor grad, Tensor grad_returns, {_FLAGS}, int next_dims, {_OPTIONS})"
    " -> (Tensor, Tensor, Tensor)",
    backward_fake=_backward_fake,
    setup_context=_setup,
    gradients=_gradients,
    replay=_replay,
    wrt=(0, 1, 5),
    native="gae",
).call


def gae(
    rewards: Tensor,
    values: Tensor,
    *,
    mask: Tensor | None = None,
    done: Tensor | None = None,
    truncated: Tensor | None = None,
    next_value: Tensor | None = None,
    gamma: float = 1.0,
    lam: float = 0.95,
    mask_mode: Literal["carry", "zero"] = "carry",
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al., 2016, arXiv:1506.02438), last step first:

        delta_t = r_t + gamma * (0 if done_t else V_next_t) - V_t
        A_t = delta_t + gamma * lam * (0 if done_t or truncated_t else A_(t+1))

    What stands in masked slots of rewards, values and a [B, T] next_value, NaN and inf included, reaches no
    output and no gradient.

    Args:
        rewards: [B, T], floating-point.
        values: [B, T], dtype of rewards.
        mask: [B, T] boolean, True where a step is real; None where all are.
        done: [B, T] boolean: the episode ends with this step, nothing follows it.
        truncated: [B, T] boolean: the episode is cut off after this step; its bootstrap value stays.
        next_value: V_next. [B]: after the last step, elsewhere it is V_(t+1); [B, T]: after each step;
            None: 0 after the last step.
        gamma: discount.
        lam: decay of the trace.
        mask_mode: "carry" (verl) skips masked steps: advantage and next value pass over them to the real step
            before, their flags are ignored, and a masked slot of the advantages holds what passes. "zero"
            (OpenRLHF) lets them be steps of reward and value 0.

    Returns:
        advantages [B, T] and returns [B, T], in the dtype of rewards; arithmetic is in float32 (float64 for
        float64). Returns are advantages + values, with 0 for the value of a masked step.

    Raises:
        TypeError: rewards or values are not floating-point, a dtype differs, a mask or flag is not boolean,
            gamma or lam is no Python number.
        ValueError: a shape or device does not fit, or mask_mode is unknown.
    """
    matrix("gae", "rewards", rewards)
    same("gae", "rewards", rewards, "values", values)
    if mask is not None:
        boolean("gae", "mask", mask, rewards.shape, rewards, "the shape of rewards")
    if done is not None:
        boolean("gae", "done", done, rewards.shape, rewards, "the shape of rewards")
    if truncated is not None:
        boolean("gae", "truncated", truncated, rewards.shape, rewards, "the shape of rewards")
    if next_value is not None:
        _check_next_value(rewards, next_value)
    number("gae", "gamma", gamma)
    number("gae", "lam", lam)
    if mask_mode not in ("carry", "zero"):
        raise ValueError(f"gae(): mask_mode must be 'carry' or 'zero', got {mask_mode!r}")
    return _gae(rewards, values, mask, done, truncated, next_value, gamma, lam, mask_mode == "carry")


def _check_next_value(rewards: Tensor, next_value: Any) -> None:
    floating("gae", "next_value", next_value)
    if next_value.dtype != rewards.dtype:
        raise TypeError(
            f"gae(): next_value must have the dtype of rewards, {rewards.dtype}, got {next_value.dtype}. "
            "Cast with next_value.to(rewards.dtype)."
        )
    if next_value.shape != (rewards.shape if next_value.dim() == 2 else rewards.shape[:1]):
        raise ValueError(
            f"gae(): next_value must be {tuple(rewards.shape[:1])}, a value after each row, or "
            f"{tuple(rewards.shape)}, one after each step, got {tuple(next_value.shape)}"
        )
    on("gae", "rewards", rewards, "next_value", next_value)
