"""verl: GAE that carries its state over masked tokens, unbiased whitening, log-probabilities."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlhf_kernels.stacks import rebind, slots
from rlhf_kernels.stacks.peer import Peer
from rlhf_kernels.stacks.rebind import Call, Rebinding, Target


def _masked_whiten() -> Callable[..., Tensor]:
    from verl.utils.torch_functional import masked_whiten

    def masked_normalize(x: Tensor, mask: Tensor | None = None, *, center: bool = True, **_: Any) -> Tensor:
        mask = torch.ones_like(x) if mask is None else mask
        return masked_whiten(x, mask, shift_mean=center)

    return masked_normalize


def unwhitened_gae() -> Callable[..., tuple[Tensor, Tensor]]:
    """`compute_gae_advantage_return` as installed, but for the whitening at its end: the same code with
    another object for `verl_F`, because the advantages themselves are what our `gae` returns."""
    from verl.trainer.ppo import core_algos

    plain = types.SimpleNamespace(masked_whiten=lambda advantages, mask: advantages)
    function = core_algos.compute_gae_advantage_return
    return slots.over(function, {"verl_F": plain})


def _gae() -> Callable[..., tuple[Tensor, Tensor]]:
    function = unwhitened_gae()

    def gae(
        rewards: Tensor,
        values: Tensor,
        *,
        mask: Tensor | None = None,
        gamma: float = 1.0,
        lam: float = 0.95,
        **_: Any,
    ) -> tuple[Tensor, Tensor]:
        mask = torch.ones_like(rewards) if mask is None else mask.to(rewards.dtype)
        return function(rewards, values, mask, gamma, lam)

    return gae


def _token_advantages() -> Callable[..., tuple[Tensor, Tensor]]:
    from verl.trainer.ppo.core_algos import compute_gae_advantage_return

    def token_advantages(
        score: Tensor,
        kl: Tensor,
        values: Tensor,
        mask: Tensor,
        *,
        kl_coef: float,
        gamma: float = 1.0,
        lam: float = 0.95,
        **_: Any,
    ) -> tuple[Tensor, Tensor]:
        mask = mask.to(kl.dtype)
        positions = torch.arange(mask.shape[1], device=mask.device)
        last = (mask * positions).argmax(1, keepdim=True)  # where verl's reward managers put the score
        scores = torch.zeros_like(kl).scatter_(1, last, score[:, None])
        return compute_gae_advantage_return(scores - kl_coef * (kl * mask), values, mask, gamma, lam)

    return token_advantages


def _logprob() -> Callable[..., tuple[Tensor, Tensor]]:
    from verl.utils.torch_functional import entropy_from_logits, logprobs_from_logits

    def logprob(
        logits: Tensor, target: Tensor, *, temperature: float = 1.0, **_: Any
    ) -> tuple[Tensor, Tensor]:
        logits = logits if temperature == 1.0 else logits / temperature
        return logprobs_from_logits(logits, target, inplace_backward=False), entropy_from_logits(logits)

    return logprob


def _chunked_linear_logprob() -> Callable[..., tuple[Tensor, Tensor]]:
    from verl.utils.experimental.torch_functional import FusedLinearForPPO

    fused = FusedLinearForPPO()

    def linear_logprob(
        hidden: Tensor, weight: Tensor, target: Tensor, *, temperature: float = 1.0, **_: Any
    ) -> tuple[Tensor, Tensor]:
        return fused(hidden, weight, target, temperature)

    return linear_logprob


def _triton_linear_logprob() -> Callable[..., tuple[Tensor, Tensor]]:
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    def linear_logprob(
        hidden: Tensor, weight: Tensor, target: Tensor, *, temperature: float = 1.0, **_: Any
    ) -> tuple[Tensor, Tensor]:
        return linear_cross_entropy(hidden, weight, target, float(temperature), "none")

    return linear_logprob


WHITEN = {"unbiased": True, "eps": 1e-8, "eps_mode": "add", "zero_masked": False, "dim": None}

PEERS = [
    Peer(
        stack="verl",
        op="masked_normalize",
        label="verl",
        package="verl",
        origin="verl.utils.torch_functional.masked_whiten",
        adapter=_masked_whiten,
        semantics=WHITEN,
        options=frozenset({"mask", "center"}),
        note="raises ValueError where the mask has fewer than two ones, which makes a GPU wait for it",
    ),
    Peer(
        stack="verl",
        op="gae",
        label="verl",
        package="verl",
        origin="verl.trainer.ppo.core_algos.compute_gae_advantage_return",
        adapter=_gae,
        semantics={"mask_mode": "carry"},
        options=frozenset({"mask", "gamma", "lam"}),
        directions=("forward",),
        note="without its final whitening; NaN in a masked slot reaches the real ones",
    ),
    Peer(
        stack="verl",
        op="token_advantages",
        label="verl",
        package="verl",
        origin="verl.trainer.ppo.core_algos.compute_gae_advantage_return",
        adapter=_token_advantages,
        semantics={"mask_mode": "carry", "normalize": "verl"},
        options=frozenset({"mask", "kl_coef", "gamma", "lam"}),
        directions=("forward",),
    ),
    Peer(
        stack="verl",
        op="logprob",
        label="verl",
        package="verl",
        origin="verl.utils.torch_functional.{logprobs_from_logits, entropy_from_logits}",
        adapter=_logprob,
        options=frozenset({"temperature"}),
    ),
    Peer(
        stack="verl",
        op="linear_logprob",
        label="verl chunked",
        package="verl",
        origin="verl.utils.experimental.torch_functional.FusedLinearForPPO",
        adapter=_chunked_linear_logprob,
        options=frozenset({"temperature"}),
        note="an ignored target is not provided for: every target has to be a token",
    ),
    Peer(
        stack="verl",
        op="linear_logprob",
        label="verl Triton",
        package="verl",
        origin="verl.utils.kernel.linear_cross_entropy.linear_cross_entropy",
        adapter=_triton_linear_logprob,
        options=frozenset({"temperature"}),
        devices=("cuda",),
        note="an ignored target is not provided for: every target has to be a token",
    ),
]


def _our_gae(original: Any) -> Any:
    from rlhf_kernels import gae

    def compute_gae_advantage_return(
        token_level_rewards: Tensor, values: Tensor, response_mask: Tensor, gamma: Any, lam: Any
    ) -> tuple[Tensor, Tensor]:
        """verl's: GAE that passes over masked tokens, then whitening; returns of masked ones too."""
        given = (token_level_rewards, values, response_mask, gamma, lam)
        whole = rebind.floats(token_level_rewards, values) and values.dim() == 2
        mask = rebind.as_booleans(response_mask, values.shape) if whole else None
        if mask is None or not rebind.is_number(gamma, lam):
            return original(*given)
        with torch.no_grad():
            advantages, _ = gae(token_level_rewards, values, mask=mask, gamma=float(gamma), lam=float(lam))
            returns = advantages + values
            whiten = original.__globals__["verl_F"].masked_whiten  # ours too, unless it was left
            return whiten(advantages, mask), returns

    return compute_gae_advantage_return


def whitening(original: Any) -> Any:
    """verl's and TRL's masked_whiten by ours; with fewer than two real ones theirs raises or gives NaN."""
    from rlhf_kernels import NORMALIZE_PRESETS, masked_normalize

    def masked_whiten(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
        real = rebind.as_booleans(mask, values.shape) if rebind.floats(values) else None
        if real is None or values.device != real.device or int(real.sum()) < 2:
            return original(values, mask, shift_mean)
        return masked_normalize(values, real, center=bool(shift_mean), **NORMALIZE_PRESETS["verl"])

    return masked_whiten


def _our_logprobs(original: Any) -> Any:
    from rlhf_kernels import logprob

    def logprobs_from_logits(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
        if not rebind.picks_tokens(logits, labels):
            return original(logits, labels, inplace_backward)
        return logprob(logits, labels)[0].to(logits.dtype)

    return logprobs_from_logits


def _our_entropy(original: Any) -> Any:
    from rlhf_kernels import logprob

    def entropy_from_logits(logits: Tensor) -> Tensor:
        if not (rebind.floats(logits) and logits.dim() > 1):
            return original(logits)
        anything = logits.new_zeros(logits.shape[:-1], dtype=torch.int64)
        return logprob(logits, anything)[1].to(logits.dtype)

    return entropy_from_logits


def _gae_call(large: bool) -> Call:
    rewards, values, mask = rebind.left_padded(large)
    return Call((rewards, values, mask.long(), 0.99, 0.95))


def whiten_call(large: bool) -> Call:
    """values that require a gradient, and a mask."""
    values, _, mask = rebind.left_padded(large)
    return Call((values.requires_grad_(), mask.long()))


_F = "verl.utils.torch_functional"

PATCH = Target(
    name="verl",
    package="verl",
    root="verl",
    checked=("0.9.1",),
    rebindings=(
        Rebinding(
            name="compute_gae_advantage_return",
            op="gae",
            place="verl.trainer.ppo.core_algos:compute_gae_advantage_return",
            registries=("verl.trainer.ppo.core_algos:ADV_ESTIMATOR_REGISTRY",),
            make=_our_gae,
            call=_gae_call,
            backends=rebind.FAST | {"torch"},
            note="NaN in a masked slot reaches its own slot only",
        ),
        Rebinding(
            name="masked_whiten",
            op="masked_normalize",
            place=f"{_F}:masked_whiten",
            make=whitening,
            call=whiten_call,
            note="raises as verl does where fewer than two are real",
        ),
        Rebinding(
            name="logprobs_from_logits",
            op="logprob",
            place=f"{_F}:logprobs_from_logits",
            make=_our_logprobs,
            call=lambda large: Call(rebind.logits_and_labels(large)),
        ),
        Rebinding(
            name="entropy_from_logits",
            op="logprob",
            place=f"{_F}:entropy_from_logits",
            make=_our_entropy,
            call=lambda large: Call(rebind.logits_and_labels(large)[:1]),
            note="a logit of -inf adds 0, where verl gives NaN",
        ),
    ),
    untouched={
        "kl_penalty and the losses": "elementwise; a second copy of a loss is where patches go wrong",
        "linear_cross_entropy": "chosen by verl's own configuration (use_fused_kernels)",
    },
)
