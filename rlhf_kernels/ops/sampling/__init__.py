"""Sampling a token from logits, with the probabilities that a learner needs to weigh it."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_kernels.runtime.checks import floating, on, positive, shaped
from rlhf_kernels.runtime.dispatch import Op
from rlhf_kernels.runtime.library import Operator

# At 1, or rounded to it from more digits, no token would be reached.
_BELOW_1 = 1 - 2.0**-53


def _fake(logits: Tensor, uniform: Tensor, *options: object) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(logits.dtype, torch.float32)
    row = (logits.shape[0],)
    return (
        logits.new_empty(row, dtype=torch.int64),
        logits.new_empty(row, dtype=dtype),
        logits.new_empty(row, dtype=dtype),
    )


_sample = Operator(
    Op("sample", __name__, {"cpu": ("native", "torch"), "cuda": ("triton", "torch")}),
    "(Tensor logits, Tensor uniform, float temperature, int? top_k, float? top_p)"
    " -> (Tensor, Tensor, Tensor)",
    _fake,
    setup_context=lambda ctx, inputs, output: ctx.mark_non_differentiable(*output),
    gradients=lambda ctx, run, *grads: (None,) * 5,
    native="sample",
).call


def sample(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    uniform: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Draws a token for each row by inverting the cumulative distribution, in the order of the vocabulary.

    `logprob - log_mass` is the log-probability with which the token was drawn, `logprob` that which a learner
    finds who knows the temperature but no truncation. A row's results depend on its logits and its random
    number alone.

    Args:
        logits: [B, V], floating-point; -inf masks a token. A row needs one finite logit.
        temperature: divides the logits. 0 takes the largest logit: as top_k=1 at temperature 1, so that
            logprob is that at temperature 1, and log_mass equals it.
        top_k: keep so many tokens of the largest logits; among equal ones the lower tokens. None keeps all.
        top_p: keep the smallest set of the most probable tokens whose share of what top_k kept reaches top_p,
            one token at least. In (0, 1]; None or 1 keeps all.
        generator: of the random numbers; on the CPU it gives the same numbers for logits on a GPU.
        uniform: [B], the random numbers themselves, in [0, 1); then `generator` is not used. For common
            random numbers, and for torch.compile(fullgraph=True), which takes no generator. What lies
            outside counts as the nearest inside: rounded to 16 bits some are 1.

    Returns:
        token [B] int64; logprob [B], under softmax(logits / temperature) without truncation; log_mass [B],
        log of the probability that truncation kept, 0 where it cut nothing. float32 (float64 for float64),
        without gradient. Near a boundary of the distribution rounding decides between two tokens.

    Raises:
        TypeError: logits or uniform are not floating-point, an option is no number.
        ValueError: logits are not [B, V], an option is out of its range.
    """
    floating("sample", "logits", logits)
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(
            f"sample(): logits must be [B, V] with at least one token, got {tuple(logits.shape)}. "
            "Take the last position of [B, T, V] with logits[:, -1]."
        )
    if temperature == 0:
        temperature, top_k = 1.0, 1
    _check_options(temperature, top_k, top_p)
    if uniform is None:
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(
                f"sample(): generator must be a torch.Generator, got {type(generator).__name__}. "
                "A seed makes one: torch.Generator().manual_seed(seed)."
            )
        device = logits.device if generator is None else generator.device
        uniform = torch.rand(logits.shape[0], dtype=torch.float64, device=device, generator=generator)
        uniform = uniform.to(logits.device)
    else:
        floating("sample", "uniform", uniform)
        shaped("sample", "uniform", uniform, logits.shape[:1], "one number for each row")
        on("sample", "logits", logits, "uniform", uniform)
        uniform = uniform.double().clamp(0.0, _BELOW_1)
    return _sample(logits, uniform, temperature, top_k, None if top_p == 1 else top_p)


def _check_options(temperature: float, top_k: int | None, top_p: float | None) -> None:
    positive("sample", "temperature", temperature)
    if top_k is not None and not (isinstance(top_k, int) and top_k >= 1):
        raise ValueError(
            f"sample(): top_k must be an int of at least 1, got {top_k!r}. Pass None to keep all."
        )
    if top_p is not None:
        positive("sample", "top_p", top_p)
        if top_p > 1:
            raise ValueError(f"sample(): top_p must be in (0, 1], got {top_p!r}. Pass None to keep all.")
