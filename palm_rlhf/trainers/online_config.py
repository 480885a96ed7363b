"""How rollouts are sampled and updates made, and what of it an algorithm cannot learn with."""

from __future__ import annotations

from dataclasses import dataclass

from palm_rlhf.algorithms.row import Algorithm
from palm_rlhf.checks import check_options
from palm_rlhf.trainers.learner import Precision


@dataclass(frozen=True)
class OnlineConfig:
    """How rollouts are sampled and updates made, whatever the algorithm."""

    prompts: int = 64
    """Prompts in a rollout."""
    samples: int = 1
    """Responses to each prompt."""
    max_new_tokens: int = 64
    """Tokens of a response at most."""
    temperature: float = 1.0
    """Divides the logits, in the sampler and in the learner: a greedy policy has nothing to learn from."""
    top_k: int | None = None
    """Sample from so many of the most probable tokens; None: from all."""
    top_p: float | None = None
    """Sample from the smallest set of tokens with this probability; None: from all."""
    rollout_batch: int | None = None
    """Responses sampled at a time, to save memory; None: the whole rollout."""
    missing_stop_score: float | None = None
    """Score of a response that did not stop by itself; None: its reward."""
    epochs: int = 1
    """Passes over a rollout."""
    minibatch: int = 64
    """Responses in one update."""
    micro_batch: int | None = None
    """Responses in one forward pass, to save memory; None: the minibatch."""
    packed: bool | None = None
    """Compute no padding in updates: always, never, or (None) where the model can and it pays."""
    policy_lr: float = 1e-4
    """Learning rate of the policy."""
    critic_lr: float = 1e-4
    """Learning rate of the critic."""
    warmup: int = 0
    """Rollouts over which the learning rates rise."""
    critic_warmup: int = 0
    """Rollouts on which the critic learns alone, before the policy does as well; where there is a critic."""
    max_grad_norm: float | None = 1.0
    """Clip gradients to this norm, policy and critic apart; None: not."""
    precision: Precision = "float32"
    """Of products; with bf16 weights, log-probabilities and losses stay float32."""
    anneal: bool = True
    """Let the learning rates fall to 0 over the run."""
    steps: int = 100
    """Rollouts in all."""
    seed: int = 0
    """Of prompts, sampling and minibatches."""

    def __post_init__(self) -> None:
        check_options(self)


def check_fits(algorithm: Algorithm, config: OnlineConfig) -> None:
    """ValueError for a configuration that the algorithm cannot learn with."""
    if config.critic_warmup and not algorithm.critic:
        raise ValueError(
            f"critic_warmup={config.critic_warmup} lets a critic learn alone, and {algorithm.name} has none: "
            "nothing would learn. Leave it out."
        )
    if config.samples < algorithm.samples:
        raise ValueError(
            f"{algorithm.name} compares responses to the same prompt and needs at least "
            f"{algorithm.samples} of them, got samples={config.samples}"
        )
    if not algorithm.groups:
        return
    for name, size in (("minibatch", config.minibatch), ("micro_batch", config.micro_batch)):
        if size is not None and size % config.samples:
            raise ValueError(
                f"{algorithm.name} needs all {config.samples} responses to a prompt in one {name}, got "
                f"{name}={size}. Choose a multiple of samples."
            )
