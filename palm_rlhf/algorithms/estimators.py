"""From scores to what each token is worth: KL estimates and advantages."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from palm_rlhf.algorithms.objectives import MAX_LOG_RATIO, cleared
from palm_rlhf.rollout import Rollout
from rlhf_kernels import token_advantages

KLKind = Literal["k1", "k2", "k3"]


def kl_estimate(logprob: Tensor, reference: Tensor, kind: KLKind = "k1") -> Tensor:
    """KL(policy || reference) at each token, from the log-probabilities of the token drawn from the policy.

    Schulman, 2020, "Approximating KL divergence", with d = logprob - reference: k1 = d, unbiased;
    k2 = d^2 / 2; k3 = exp(-d) - 1 + d, unbiased and never negative. k1 belongs into rewards: as a
    loss, k3 has a biased gradient.
    """
    d = logprob - reference
    if kind == "k1":
        return d
    if kind == "k2":
        return d.square() / 2
    if kind == "k3":
        # Clamped as the ratio of the loss is: of a token that the policy never says the exponential is inf.
        return torch.expm1((-d).clamp(max=MAX_LOG_RATIO)) + d
    raise ValueError(f"the KL estimate must be k1, k2 or k3, got {kind!r}")


def adapted_kl_coef(
    coef: float, kl: float, *, target: float, responses: int, horizon: float = 10_000.0
) -> float:
    """The next weight of the KL term: coef (1 + clip(kl / target - 1, +-0.2) min(responses / horizon, 1)).

    Ziegler et al., 2019, arXiv:1909.08593, section 2.2; `kl` and `target` are nats of a whole response there.
    Where the horizon is shorter than a rollout it is the rollout: the weight must not fall below 0.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return coef * (1 + error * min(responses / horizon, 1.0))


def response_kl(rollout: Rollout, kind: KLKind = "k1") -> Tensor:
    """[B]: the estimate of KL(policy || reference), summed over the tokens of each response."""
    if rollout.reference_logprob is None:
        return torch.zeros_like(rollout.logprob[:, 0])
    return cleared(kl_estimate(rollout.logprob, rollout.reference_logprob, kind), rollout.mask).sum(1)


def gae_with_kl(
    rollout: Rollout,
    *,
    kl_coef: float,
    kl: KLKind = "k1",
    gamma: float = 1.0,
    lam: float = 0.95,
    whiten: bool = True,
) -> tuple[Tensor, Tensor]:
    """Advantages and returns [B, R] in float32: reward_t = -kl_coef KL_t, and the score at the last token.

    Ziegler et al., 2019, arXiv:1909.08593; Schulman et al., 2016, arXiv:1506.02438. Advantages are whitened
    over the whole batch, returns are those before whitening.
    """
    old = rollout.logprob
    penalty = (
        torch.zeros_like(old)
        if rollout.reference_logprob is None
        else kl_estimate(old, rollout.reference_logprob, kl)
    )
    return token_advantages(
        rollout.score.to(penalty.dtype), penalty, rollout.values.to(penalty.dtype), rollout.mask,
        kl_coef=kl_coef, gamma=gamma, lam=lam, normalize=whiten,
    )  # fmt: skip


def returns_with_kl(
    rollout: Rollout, *, kl_coef: float, kl: KLKind = "k1", gamma: float = 1.0, whiten: bool = True
) -> tuple[Tensor, Tensor]:
    """Discounted sums of what follows each token, KL terms and score, as advantages; and those sums.

    Hu, 2025, arXiv:2501.03262: REINFORCE++. It is GAE with lambda 1 where every value is 0.
    """
    without = replace(rollout, values=torch.zeros_like(rollout.logprob))
    return gae_with_kl(without, kl_coef=kl_coef, kl=kl, gamma=gamma, lam=1.0, whiten=whiten)
