"""token_advantages: from a score and KL terms to whitened advantages, as one op."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from rlhf_kernels.ops.normalize import NORMALIZE_PRESETS
from rlhf_kernels.ops.normalize.arguments import as_flags
from rlhf_kernels.runtime.checks import boolean, floating, number, on, same, shaped
from rlhf_kernels.runtime.dispatch import Op
from rlhf_kernels.runtime.library import Operator

_OP = Op(
    "token_advantages",
    "rlhf_kernels.ops.advantage",
    {"cpu": ("native", "torch"), "cuda": ("triton", "torch")},
    modules={
        "native": "token_kernel_native",
        "torch": "token_kernel_torch",
        "triton": "token_kernel_triton",
        "reference": "token_reference",
    },
    sized_by=2,
)
_INPUTS = (
    "Tensor score, Tensor kl, Tensor values, Tensor mask, "
    "float kl_coef, float gamma, float lam, bool carry, bool normalized, float eps, int flags"
)


def _fake(score: Tensor, kl: Tensor, values: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    return values.new_empty(values.shape), values.new_empty(values.shape)


def _backward_fake(grad: Tensor, grad_returns: Tensor, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    score, kl, values = inputs[:3]
    return score.new_empty(score.shape), kl.new_empty(kl.shape), values.new_empty(values.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.options = inputs[4:]


def _gradients(ctx: Any, backward: Any, grad: Tensor, grad_returns: Tensor) -> tuple[Tensor | None, ...]:
    return *backward(grad, grad_returns, *ctx.saved_tensors, *ctx.options), *(None,) * 8


_token_advantages = Operator(
    _OP,
    f"({_INPUTS}) -> (Tensor, Tensor)",
    _fake,
    backward_schema=f"(Tensor grad, Tensor grad_returns, {_INPUTS}) -> (Tensor, Tensor, Tensor)",
    backward_fake=_backward_fake,
    setup_context=_setup,
    gradients=_gradients,
    replay=lambda grad, grad_returns, *inputs: (inputs, (grad, grad_returns)),
    wrt=(0, 1, 2),
    native="token_advantages",
).call


def _normalization(normalize: bool | str) -> dict[str, Any]:
    """Arguments of masked_normalize; a preset counts for the batch, whatever dimension it names."""
    options = {"eps": 1e-5, "eps_mode": "clamp", "unbiased": False}
    if isinstance(normalize, bool):
        return options
    if normalize not in NORMALIZE_PRESETS:
        raise ValueError(
            f"token_advantages(): normalize must be True, False or one of {', '.join(NORMALIZE_PRESETS)}, "
            f"got {normalize!r}"
        )
    return {name: NORMALIZE_PRESETS[normalize].get(name, default) for name, default in options.items()}


def token_advantages(
    score: Tensor,
    kl: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    kl_coef: float,
    gamma: float = 1.0,
    lam: float = 0.95,
    mask_mode: Literal["carry", "zero"] = "carry",
    normalize: bool | str = True,
) -> tuple[Tensor, Tensor]:
    """Advantages and returns of responses, from their scores (Ziegler et al., 2019, arXiv:1909.08593):

        reward_t = -kl_coef * kl_t, and + score at the last real token; then `gae`; then `masked_normalize`

    A row without a real token gets no score. NaN and inf in masked slots reach no output and no gradient.

    Args:
        score: [B], one for each response, floating-point.
        kl: [B, T], an estimate of the KL divergence from the reference policy at each token.
        values: [B, T].
        mask: [B, T] boolean, True where a token is of the response.
        kl_coef: weight of the KL term.
        gamma, lam, mask_mode: as in `gae`.
        normalize: True gives the advantages of all real tokens of the batch mean 0 and variance 1 with
            masked_normalize's defaults, a name out of NORMALIZE_PRESETS with that stack's variance and eps;
            False leaves them.

    Returns:
        advantages [B, T] and returns [B, T] in the dtype of values, 0 at masked tokens; returns are those of
        `gae`, before normalising.

    Raises:
        TypeError: an input is not floating-point, dtypes differ, mask is not boolean, a number is none.
        ValueError: a shape or device does not fit, mask_mode or normalize is unknown.
    """
    return _token_advantages(*operands(score, kl, values, mask, kl_coef, gamma, lam, mask_mode, normalize))


def operands(
    score: Tensor, kl: Tensor, values: Tensor, mask: Tensor,
    kl_coef: float, gamma: float, lam: float, mask_mode: str, normalize: bool | str,
) -> tuple[Any, ...]:  # fmt: skip
    """What kernels take, of arguments that are checked here."""
    name = "token_advantages"
    floating(name, "values", values)
    if values.dim() != 2:
        raise ValueError(f"{name}(): values must be [batch, time], got {tuple(values.shape)}")
    same(name, "values", values, "kl", kl)
    floating(name, "score", score)
    if score.dtype != values.dtype:
        raise TypeError(f"{name}(): score must have the dtype of values, {values.dtype}, got {score.dtype}")
    shaped(name, "score", score, values.shape[:1], "one score for each row")
    on(name, "values", values, "score", score)
    boolean(name, "mask", mask, values.shape, values, "the shape of values")
    for label, value in (("kl_coef", kl_coef), ("gamma", gamma), ("lam", lam)):
        number(name, label, value)
    if mask_mode not in ("carry", "zero"):
        raise ValueError(f"{name}(): mask_mode must be 'carry' or 'zero', got {mask_mode!r}")
    options = _normalization(normalize)
    flags = as_flags(options["eps_mode"], options["unbiased"], True, True)
    return (
        score, kl, values, mask, kl_coef, gamma, lam, mask_mode == "carry", normalize is not False,
        options["eps"], flags,
    )  # fmt: skip
