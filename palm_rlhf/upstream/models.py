"""palm-rlhf-pytorch's models: PaLM, reward models, actor and critic."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from palm_rlhf.algorithms.preferences import implicit_rewards, outcome_loss
from palm_rlhf.generation import Generation, generate
from palm_rlhf.models import palm as palm_module
from palm_rlhf.models.checkpoint import load_palm
from palm_rlhf.models.value import Policy, ValueModel, frozen
from palm_rlhf.rewards import RewardModel as _RewardModel
from palm_rlhf.rewards import load_reward_model
from rlhf_kernels import logprob


def top_k(thres: float, vocabulary: int) -> dict[str, Any]:
    """Sample from the most probable 1 - thres of the vocabulary, as `filter_logits_fn` does there."""
    return {"top_k": max(1, math.ceil((1 - thres) * vocabulary))}


def top_p(thres: float, vocabulary: int) -> dict[str, Any]:
    """Sample from the smallest set with probability thres: theirs keeps 1 - thres."""
    return {"top_p": thres}


def _load(module: nn.Module, path: str | Path, read: Callable[..., nn.Module]) -> None:
    """A state dict of this very module, or what `read` makes of another file."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception:  # no pickle of tensors: `read` knows other kinds, and says what is wrong
        state = {}
    if not isinstance(state, dict) or state.keys() != module.state_dict().keys():
        state = read(path).state_dict()
    module.load_state_dict(state)


class PaLM(palm_module.PaLM):
    """`palm_rlhf.PaLM` with the methods that write and load."""

    @torch.no_grad()
    def generate(
        self,
        seq_len: int,
        prompt: Tensor | None = None,
        temperature: float = 1.0,
        filter_logits_fn: Callable[[float, int], dict[str, Any]] | None = top_k,
        filter_thres: float = 0.9,
        pad_value: float = 0.0,
        eos_token: int | None = None,
        return_seq_without_prompt: bool = True,
        use_tqdm: bool = False,
        finetune_scope: str | None = None,
    ) -> Tensor:
        """Tokens up to `seq_len` in all [B, T], or [T] for a prompt [T], by PyTorch's global generator.

        Args:
            seq_len: length of prompt and response.
            prompt: [T] or [B, T]; None: a random token, which is kept.
            temperature: 0 is greedy.
            filter_logits_fn: `top_k` or `top_p` of this module, or None: all tokens.
            pad_value: what follows `eos_token`. return_seq_without_prompt: the response alone.
            use_tqdm: accepted, and does nothing. finetune_scope: adapters.
        """
        if prompt is None:
            prompt, return_seq_without_prompt = torch.randint(0, self.num_tokens, (1, 1)), False
        rows = prompt if prompt.dim() == 2 else prompt[None]
        kept = {} if filter_logits_fn is None else filter_logits_fn(filter_thres, self.num_tokens)
        drawn = generate(
            self, rows, max_new_tokens=max(1, seq_len - rows.shape[1]), temperature=temperature,
            stop=eos_token, pad=int(pad_value), scope=finetune_scope, **kept,
        )  # fmt: skip
        found = drawn.responses if return_seq_without_prompt else drawn.tokens
        return found if prompt.dim() == 2 else found[0]

    def load(self, path: str | Path) -> None:
        """Weights from a state dict of this library or of palm-rlhf-pytorch, or a safetensors file."""
        _load(self, path, load_palm)


class RewardModel(_RewardModel):
    """`palm_rlhf.RewardModel` with `load`."""

    def load(self, path: str | Path) -> None:
        """Weights from a state dict of this library or of palm-rlhf-pytorch, or a safetensors file."""
        _load(self, path, load_reward_model)


class ImplicitPRM(nn.Module):
    """A process reward model from outcomes alone: rewards beta log(pi / pi_ref) per token.

    Yuan et al., 2024, arXiv:2412.01981. The loss is the cross-entropy of the sum of a response's rewards.
    That of palm-rlhf-pytorch is per token, and has the other sign: it learns the opposite.
    """

    def __init__(self, model: nn.Module, ref_model: nn.Module | None = None, beta: float = 0.1) -> None:
        """`model` maps tokens [B, T] to logits, negative ones are padding; `ref_model`: a copy by default."""
        super().__init__()
        self.model, self.beta = model, beta
        self.ref_model = frozen(copy.deepcopy(model) if ref_model is None else ref_model)

    def parameters(self, recurse: bool = True) -> Any:
        """Those that learn: not the reference's."""
        return self.model.parameters(recurse)

    def forward(self, seq: Tensor, labels: Tensor | None = None) -> Tensor:
        """Rewards [B, T - 1] of seq [B, T], 0 where ids are negative; with labels [B] the mean loss."""
        target = seq[:, 1:]
        real = target >= 0
        found = []
        for model in (self.model, self.ref_model):
            with torch.set_grad_enabled(torch.is_grad_enabled() and model is self.model):
                found.append(logprob(model(seq[:, :-1]), target.clamp(min=0))[0])
        rewards = implicit_rewards(*found, self.beta).masked_fill(~real, 0.0)
        return rewards if labels is None else outcome_loss(rewards, labels).mean()


class ActorCritic(nn.Module):
    """A policy and, for PPO, the values of the text before each of its tokens."""

    def __init__(
        self,
        palm: PaLM,
        critic: PaLM | None = None,
        pooled_values: bool = False,
        actor_lora: bool = True,
        critic_lora: bool = True,
        actor_lora_r: int = 8,
        critic_lora_r: int = 8,
        actor_lora_scope: str = "actor",
        critic_lora_scope: str = "critic",
        actor_dropout: float = 0.0,
        critic_dropout: float = 0.0,
        critic_dim_out: int = 6,
        critic_range: tuple[float, float] = (-0.5, 5.5),
    ) -> None:
        """
        Args:
            palm: the policy. critic: another model for the values; by default the same, under adapters of its
                own, or a copy where it has none.
            pooled_values: accepted, and does nothing: values that have read the answer are no baseline.
            actor_lora, critic_lora: learn adapters of these ranks and names, not all weights.
            actor_dropout, critic_dropout: must be 0: two masks give a ratio that means nothing.
            critic_dim_out: bins of `critic_range`.

        Raises:
            TypeError: the critic is no PaLM. ValueError: dropout is not 0.
        """
        super().__init__()
        if actor_dropout or critic_dropout:
            raise ValueError(
                f"dropout must be 0 in policy and critic, got {actor_dropout} and {critic_dropout}: the "
                "ratio of two probabilities must not see two masks"
            )
        if critic is not None and not isinstance(critic, palm_module.PaLM):
            raise TypeError(
                f"the critic must be a PaLM, got {type(critic).__name__}. Use an ImplicitPRM as the reward."
            )
        if critic is None:
            # Adapters can share a backbone only while it stays as it is.
            critic = palm if critic_lora and actor_lora else copy.deepcopy(palm)
        if actor_lora:
            palm.add_finetune_params(actor_lora_scope, actor_lora_r)
        if critic_lora:
            critic.add_finetune_params(critic_lora_scope, critic_lora_r)
        low, high = critic_range
        self.actor = Policy(palm, actor_lora_scope if actor_lora else None)
        scope = critic_lora_scope if critic_lora else None
        self.critic = ValueModel(critic, scope, bins=critic_dim_out, low=low, high=high)

    def actor_parameters(self) -> list[nn.Parameter]:
        """What learns of the policy."""
        return list(self.actor.trained())

    def critic_parameters(self) -> list[nn.Parameter]:
        """What learns of the critic."""
        return list(self.critic.trained())

    def generate(
        self, state: Tensor, max_seq_len: int, eos_token: int | None = None, **options: Any
    ) -> Generation:
        """Responses to prompts [B, T], with the log-probabilities of what was drawn."""
        return generate(
            self.actor.model, state, max_new_tokens=max(1, max_seq_len - state.shape[1]), stop=eos_token,
            scope=self.actor.scope, **options,
        )  # fmt: skip

    def forward(
        self, x: Tensor, mask: Tensor | None = None, return_values: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """Logits [B, T, V] and values [B, T] of tokens x [B, T]; values None where they are not wanted."""
        logits = self.actor.model(x, finetune_scope=self.actor.scope, mask=mask)
        return logits, self.critic(x, mask) if return_values else None
