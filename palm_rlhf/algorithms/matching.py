"""Losses that compare distributions, of tokens [B, R] or of responses [B], each written once."""

from __future__ import annotations

import torch
from torch import Tensor

# Below it a probability is no number to divide by.
TINY = 1e-6


def score_centred_loss(
    logprob: Tensor,
    old_logprob: Tensor,
    head: Tensor,
    old_head: Tensor,
    advantages: Tensor,
    *,
    truncation: float | None = None,
    tail: bool = True,
) -> Tensor:
    """-A (w log pi(a) - sum_v q_v w_v log pi(v)) per token: a score whose mean under the sampler q is 0.

    Marek and Ryabinin, 2026, arXiv:2609.20807, eq. 8 and 14: what the sampler and the learner differ in does
    not drift into the gradient. Coefficients have no gradient.

    Args:
        logprob, old_logprob: [B, R], of the tokens drawn, under the learner and the sampler.
        head, old_head: [B, R, K], of the tokens over which the mean is taken.
        advantages: A.
        truncation: w is the ratio pi / q up to this bound (truncated importance sampling); None: w is 1.
        tail: whether there are tokens beside the K; they are taken to be as the learner has them, in the
            sampler's mass.
    """
    weight = (lambda ratio: ratio.clamp(max=truncation)) if truncation is not None else torch.ones_like
    with torch.no_grad():
        own = weight((logprob - old_logprob).exp())
        p, q = head.exp(), old_head.exp()
        coefficient = q * weight(p / q.clamp(min=TINY))
        if tail:
            rest = ((1 - x.sum(-1, keepdim=True)).clamp(min=TINY) for x in (p, q))
            ratio = next(rest) / next(rest)
            # The gradients of all log pi, weighted by pi, are 0: those of the tail follow from the head's.
            coefficient = coefficient - weight(ratio) / ratio * p
    return -advantages * (own * logprob - (coefficient * head).sum(-1))


def cloning_divergence(head: Tensor, old_head: Tensor) -> Tensor:
    """KL(old || new) per token over K tokens and the rest as one, [B, R]: a bound from below.

    Cobbe et al., 2020, arXiv:2009.04416: of Phasic Policy Gradient's auxiliary phase, where it is over all
    actions.
    """
    old_rest, rest = ((1 - x.exp().sum(-1)).clamp(min=TINY) for x in (old_head, head))
    return (old_head.exp() * (old_head - head)).sum(-1) + old_rest * (old_rest.log() - rest.log())


def group_log_softmax(scores: Tensor, group: Tensor) -> Tensor:
    """log of softmax over the responses of each group: [B], like `scores` and `group`."""
    ids, place = torch.unique(group, return_inverse=True)
    peak = torch.full((len(ids),), -torch.inf, dtype=scores.dtype, device=scores.device)
    peak = peak.scatter_reduce(0, place, scores.detach(), "amax")
    shifted = scores - peak[place]
    total = torch.zeros_like(peak).index_add(0, place, shifted.exp())
    return shifted - total.log()[place]


def target_policy_loss(
    scores: Tensor, old_scores: Tensor, advantages: Tensor, group: Tensor, *, eta: float = 1.0
) -> Tensor:
    """-q_i log p_i of each response: summed over a group the cross-entropy of its target with the policy.

    p is the softmax of the log-probabilities of whole responses over their group, and the target
    q_i ~ p_old,i exp(z_i / eta): its gradient is p - q, which vanishes where the target is reached.
    arXiv:2604.06159, Target Policy Optimization.

    Args:
        scores: log-probabilities of whole responses. old_scores: of the policy that sampled them.
        advantages: z, standardised within the group.
        group: the same number for responses to one prompt.
        eta: temperature of the target.
    """
    target = group_log_softmax(old_scores.detach() + advantages / eta, group).exp()
    return -target.to(scores.dtype) * group_log_softmax(scores, group)


def trajectory_balance_loss(
    log_z: Tensor, mean_logprob: Tensor, mean_reference: Tensor, advantages: Tensor, *, beta: float = 15.0
) -> Tensor:
    """(log Z(x) + log pi(y) / |y| - beta r - log pi_ref(y) / |y|)^2: pi becomes pi_ref exp(beta r) / Z.

    Zhu et al., 2025, arXiv:2509.15207, eq. 6, without its weight: FlowRL.

    Args:
        log_z: of the prompt, learned. mean_logprob, mean_reference: log-probabilities per token.
        advantages: r, standardised within the group.
    """
    return (log_z + mean_logprob - beta * advantages - mean_reference).square()
