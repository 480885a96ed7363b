"""What is logged of a rollout."""

from __future__ import annotations

from palm_rlhf.algorithms.estimators import response_kl
from palm_rlhf.algorithms.objectives import masked_mean
from palm_rlhf.algorithms.policy import Regularised
from palm_rlhf.rollout import Rollout


def described(rollout: Rollout, options: Regularised) -> dict[str, float]:
    """Rewards, lengths and stops; KL divergence (nats) and explained variance where they are known."""
    g, mask = rollout.generation, rollout.mask
    found = {
        "reward": rollout.score.mean(),
        "response_tokens": mask.sum(1).float().mean(),
        "stopped": g.stopped.float().mean(),
        "log_mass": masked_mean(g.log_mass, mask),
        # Of the rectangle that holds prompts and responses.
        "padding": 1 - g.mask.float().mean(),
    }
    if rollout.reference_logprob is not None:
        found["kl"] = masked_mean(rollout.logprob - rollout.reference_logprob, mask)
        found["kl_response"] = response_kl(rollout).mean()
        found["kl_coef"] = options.kl_coef
    if rollout.returns is not None and rollout.values is not None:
        error = masked_mean((rollout.returns - rollout.values).square(), mask)
        spread = masked_mean((rollout.returns - masked_mean(rollout.returns, mask)).square(), mask)
        found["explained_variance"] = 1 - error / spread.clamp(min=1e-8)
    return {name: float(value) for name, value in found.items()}
