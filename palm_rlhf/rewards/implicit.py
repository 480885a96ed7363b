"""What a trained policy implies that each token is worth: beta (log pi - log pi_ref)."""

from __future__ import annotations

import torch
from torch import Tensor

from palm_rlhf.algorithms.preferences import implicit_rewards
from palm_rlhf.generation import Generation
from palm_rlhf.models.value import Policy


class ImplicitReward:
    """A policy that learned preferences, and its reference, as a reward; of each token, or of responses.

    Yuan et al., 2024, arXiv:2412.01981, proposition 3.1: whatever was trained on outcomes by a sigmoid of
    this sum (DPO, KTO, `outcome_loss`) is a model of the process as well. A token that the policy made more
    probable has a positive reward: palm-rlhf-pytorch's ImplicitPRM learns the opposite.
    """

    def __init__(
        self,
        policy: Policy,
        reference: Policy,
        *,
        beta: float = 0.1,
        temperature: float = 1.0,
        micro_batch: int = 32,
    ) -> None:
        """
        Args:
            policy, reference: what learned, and what it began as.
            beta, temperature: those of the training; logits are divided by the latter.
            micro_batch: texts in one forward pass.

        Raises:
            ValueError: `micro_batch` is below 1, or `temperature` not above 0.
        """
        if micro_batch < 1:
            raise ValueError(f"ImplicitReward: micro_batch must be at least 1, got {micro_batch}")
        if not temperature > 0:
            raise ValueError(f"ImplicitReward: temperature must be above 0, got {temperature}")
        self.policy, self.reference, self.micro_batch = policy, reference, micro_batch
        self.beta, self.temperature = beta, temperature

    @torch.no_grad()
    def tokens(self, generation: Generation) -> Tensor:
        """[B, R], of each token of the responses; 0 where masked."""
        found = []
        device = self.policy.model.device
        for start in range(0, len(generation.tokens), self.micro_batch):
            part = generation.rows(slice(start, start + self.micro_batch))
            tokens, mask = part.tokens.to(device), part.mask.to(device)
            both = (
                model(tokens, mask, part.prompt_width, self.temperature)[0]
                for model in (self.policy, self.reference)
            )
            found.append(implicit_rewards(*both, self.beta))
        return torch.cat(found).to(generation.tokens.device)

    def __call__(self, generation: Generation) -> Tensor:
        """[B] in float32: the sum over a response's tokens."""
        return self.tokens(generation).sum(1).float()
