"""V-trace: targets and advantages of steps that another policy took."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rlhf_kernels.ops.advantage.recurrence import per_row
from rlhf_kernels.runtime.checks import boolean, matrix, number, positive, same
from rlhf_kernels.runtime.dispatch import Op
from rlhf_kernels.runtime.library import Operator

_OP = Op(
    "vtrace",
    "rlhf_kernels.ops.advantage",
    {"cpu": ("native", "torch"), "cuda": ("triton", "torch")},
    modules={
        "reference": "vtrace_reference",
        "torch": "vtrace_kernel_torch",
        "native": "vtrace_kernel_native",
        "triton": "vtrace_kernel_triton",
    },
)
_INPUTS = (
    "Tensor log_ratio, Tensor rewards, Tensor values, Tensor? mask, Tensor? done, Tensor? next_value, "
    "float gamma, float lam, float rho_clip, float c_clip"
)


def _fake(log_ratio: Tensor, rewards: Tensor, values: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return values.new_empty(values.shape), values.new_empty(values.shape)


def _backward_fake(
    grad_targets: Tensor,
    grad_advantages: Tensor,
    log_ratio: Tensor,
    rewards: Tensor,
    values: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:
    last = values.new_empty(0 if rest[2] is None else rest[2].shape)
    return *(x.new_empty(x.shape) for x in (log_ratio, rewards, values)), last


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.gamma, ctx.lam, ctx.rho_clip, ctx.c_clip = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, run: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    found = run(*grads, *tensors, ctx.gamma, ctx.lam, ctx.rho_clip, ctx.c_clip)
    last = None if tensors[5] is None else found[3]
    return *found[:3], None, None, last, None, None, None, None


_vtrace = Operator(
    _OP,
    f"({_INPUTS}) -> (Tensor, Tensor)",
    _fake,
    backward_schema=f"(Tensor grad_targets, Tensor grad_advantages, {_INPUTS})"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    backward_fake=_backward_fake,
    setup_context=_setup,
    gradients=_gradients,
    replay=lambda *args: (args[2:], args[:2]),
    wrt=(0, 1, 2, 5),
    native="vtrace",
    native_backward=False,
).call


def vtrace(
    log_ratio: Tensor,
    rewards: Tensor,
    values: Tensor,
    *,
    mask: Tensor | None = None,
    done: Tensor | None = None,
    next_value: Tensor | None = None,
    gamma: float = 1.0,
    lam: float = 1.0,
    rho_clip: float = 1.0,
    c_clip: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """V-trace (Espeholt et al., 2018, arXiv:1802.01561, equation 1 and section 4.2), last step first:

        rho_t = min(rho_clip, ratio_t),  c_t = lam * min(c_clip, ratio_t)
        v_t = V_t + rho_t * (r_t + gamma * V_(t+1) - V_t) + gamma * c_t * (v_(t+1) - V_(t+1))
        A_t = rho_t * (r_t + gamma * v_(t+1) - V_t)

    Gradients reach all three inputs; IMPALA takes both results without.

    Args:
        log_ratio: [B, T], log of the learner's over the sampler's probability of each action.
        rewards, values: [B, T], of one dtype with it.
        mask: [B, T] boolean, True where a step is real; state passes over the others.
        done: [B, T] boolean: the episode ends with this step, nothing follows it.
        next_value: [B], the value after the last step; None: 0.
        gamma: discount.
        lam: decay of the trace (1 in the paper; remark 2 allows less).
        rho_clip, c_clip: at most these; rho_clip at least c_clip, as the paper assumes.

    Returns:
        targets v and advantages A, [B, T] in the dtype of values, 0 at masked steps.

    Raises:
        TypeError: an input is not floating-point, dtypes differ, a mask is not boolean, a number is none.
        ValueError: a shape or device does not fit, a clip is not positive, or rho_clip is below c_clip.
    """
    op = "vtrace"
    matrix(op, "values", values)
    same(op, "values", values, "log_ratio", log_ratio)
    same(op, "values", values, "rewards", rewards)
    for name, flag in (("mask", mask), ("done", done)):
        if flag is not None:
            boolean(op, name, flag, values.shape, values, "the shape of values")
    if next_value is not None:
        per_row(op, "values", values, "next_value", next_value)
    number(op, "gamma", gamma)
    number(op, "lam", lam)
    positive(op, "rho_clip", rho_clip)
    positive(op, "c_clip", c_clip)
    if rho_clip < c_clip:
        raise ValueError(f"{op}(): rho_clip must be at least c_clip, got {rho_clip!r} and {c_clip!r}")
    return _vtrace(log_ratio, rewards, values, mask, done, next_value, gamma, lam, rho_clip, c_clip)
