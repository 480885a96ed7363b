"""What palm-rlhf-pytorch's trainers share here: prompts, a run, best-of-n, a file, options."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from palm_rlhf.algorithms.table import ALGORITHMS
from palm_rlhf.generation import Generation, best_of
from palm_rlhf.models.palm import PaLM
from palm_rlhf.models.value import Policy, frozen
from palm_rlhf.rewards import ModelReward, RewardModel
from palm_rlhf.trainers.online import OnlineConfig, OnlineTrainer
from rlhf_kernels.runtime.files import write_aside


class Trainer:
    """What the trainers share: prompts, an `OnlineTrainer` made at `train`, best-of-n, a file."""

    algorithm = "ppo"

    def __init__(
        self,
        *,
        palm: PaLM,
        reward_model: RewardModel | Callable[[Generation], Tensor],
        prompts: Sequence[str] | None,
        prompts_path: str | Path | None,
        prompt_token_ids: Tensor | None,
        tokenizer: Callable[[Sequence[str]], Any] | None,
        parts: Mapping[str, Any],
        options: Any,
        config: Mapping[str, Any],
        optimizer: Mapping[str, Mapping[str, Any]],
        pad_value: float,
        seed: int,
        scale: float = 1.0,
    ) -> None:
        self.palm, self.parts, self.options, self.optimizer = palm, dict(parts), options, optimizer
        self.config, self.pad, self.seed = dict(config), int(pad_value), seed
        given = {"prompts": prompts, "prompts_path": prompts_path, "prompt_token_ids": prompt_token_ids}
        named = [name for name, value in given.items() if value is not None]
        if len(named) != 1:
            raise ValueError(f"give one of {', '.join(given)}, got {' and '.join(named) or 'none'}")
        if prompts_path is not None:
            prompts = Path(prompts_path).read_text(encoding="utf-8").splitlines()
        if prompts is not None:
            if tokenizer is None:
                raise ValueError("prompts that are texts need a tokenizer: a function of a list of texts")
            prompt_token_ids = tokenizer([prompt for prompt in prompts if prompt])
        self.prompts = [_without_padding(row, self.pad) for row in prompt_token_ids]
        model_reward = isinstance(reward_model, RewardModel)
        self.reward = ModelReward(reward_model.eval()) if model_reward else reward_model
        self.scale = scale
        self.trainer: OnlineTrainer | None = None
        self.metrics: list[dict[str, float]] = []

    def train(
        self,
        num_episodes: int = 50000,
        max_timesteps: int = 500,
        update_timesteps: int = 5000,
        max_batch_size: int = 16,
        max_seq_len: int = 2048,
        eos_token: int | None = None,
        temperature: float = 1.0,
    ) -> list[dict[str, float]]:
        """Samples `num_episodes * max_timesteps` prompts, learns after every `update_timesteps`.

        `max_batch_size` responses are sampled at a time, of as many tokens as the longest prompt leaves of
        `max_seq_len`. A second call goes on with the weights, the prompts that this round still has to come
        to and fresh random numbers, and with fresh optimizers.

        Returns:
            The metrics of every rollout.
        """
        steps = num_episodes * max_timesteps // update_timesteps
        if steps < 1:
            raise ValueError(
                f"{num_episodes} episodes of {max_timesteps} timesteps are less than update_timesteps="
                f"{update_timesteps}: nothing would be learned"
            )
        room = max_seq_len - max(map(len, self.prompts))
        if room < 1:
            raise ValueError(f"max_seq_len={max_seq_len} leaves the longest prompt no room for a response")
        sizes = {"prompts": update_timesteps, "steps": steps, "rollout_batch": max_batch_size}
        config = OnlineConfig(
            max_new_tokens=room, temperature=temperature, anneal=False, seed=self.seed, **self.config, **sizes
        )
        before = self.trainer
        scaled = self.reward if self.scale == 1 else lambda generation: self.reward(generation) / self.scale
        self.trainer = OnlineTrainer(
            ALGORITHMS[self.algorithm], reward=scaled, prompts=self.prompts, config=config,
            options=self.options, stop=eos_token, pad=self.pad, **self.parts,
        )  # fmt: skip
        if before is not None:
            for name, generator in before.generators().items():
                self.trainer.generators()[name].set_state(generator.get_state())
            self.trainer.load_extra_state(before.extra_state())
        for name, settings in self.optimizer.items():
            for group in self.trainer.optimizers()[name].param_groups:
                group.update(settings)
        self.metrics = [self.trainer.step(index) for index in range(steps)]
        return self.metrics

    def generate(
        self,
        max_seq_len: int,
        *,
        prompt: Tensor,
        num_samples: int = 4,
        eos_token: int | None = None,
        **options: Any,
    ) -> Tensor:
        """The best by the reward of so many responses to a prompt [T]: both, without padding."""
        if prompt.dim() != 1:
            raise ValueError(f"generate takes one prompt, [T], got {tuple(prompt.shape)}")
        policy = self.parts["policy"]
        best, _ = best_of(
            policy.model, [prompt.tolist()], self.reward, samples=num_samples, scope=policy.scope,
            max_new_tokens=max(1, max_seq_len - len(prompt)), stop=eos_token, pad=self.pad, **options,
        )  # fmt: skip
        return best.tokens[0][best.mask[0]]

    def _modules(self) -> nn.ModuleDict:
        return nn.ModuleDict({name: part for name, part in self.parts.items() if name != "reference"})

    def save(self, filepath: str | Path = "./checkpoint.pt") -> None:
        """Policy and critic, as a state dict."""
        buffer = io.BytesIO()
        torch.save(self._modules().state_dict(), buffer)
        write_aside(Path(filepath), buffer.getvalue())

    def load(self, filepath: str | Path = "./checkpoint.pt") -> None:
        """Takes them back."""
        self._modules().load_state_dict(torch.load(filepath, weights_only=True))


def _without_padding(row: Any, pad: int) -> list[int]:
    """A prompt without the padding at either end; all of it where it is nothing else."""
    tokens = [int(token) for token in row]
    real = [i for i, token in enumerate(tokens) if token != pad]
    return tokens[real[0] : real[-1] + 1] if real else tokens


def reference_of(palm: PaLM, lora: bool) -> Policy:
    """The model as it is: under adapters the same one, without them a copy."""
    return Policy(palm) if lora else Policy(frozen(copy.deepcopy(palm)))


def chosen(algorithm: str, **options: Any) -> Any:
    """Options of a row, those that it knows."""
    known = {f.name for f in fields(ALGORITHMS[algorithm].options)}
    return ALGORITHMS[algorithm].options(**{name: x for name, x in options.items() if name in known})


def critic_bins(bins: int, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The options of the critic from hl-gauss-pytorch's keywords, of which these are known."""
    usual = {
        "min_value": 0.0, "max_value": 5.0, "min_max_value_on_bin_center": True, "clamp_to_range": True,
        "sigma_to_bin_ratio": 1.0,
    }  # fmt: skip
    if unknown := sorted(settings.keys() - usual.keys()):
        raise ValueError(f"hl_gauss_loss_kwargs has {', '.join(unknown)}; known are {', '.join(usual)}")
    s = usual | dict(settings)
    rim = (s["max_value"] - s["min_value"]) / (2 * (bins - 1)) if s["min_max_value_on_bin_center"] else 0.0
    return {
        "critic_bins": bins, "critic_low": s["min_value"] - rim, "critic_high": s["max_value"] + rim,
        "critic_sigma": s["sigma_to_bin_ratio"],
    }  # fmt: skip


def sizes(lr: float, max_norm: float | None, minibatch: int, epochs: int) -> dict[str, Any]:
    return {"policy_lr": lr, "max_grad_norm": max_norm, "minibatch": minibatch, "epochs": epochs}


def adam(betas: tuple[float, float], weight_decay: float) -> dict[str, Any]:
    return {"betas": betas, "weight_decay": weight_decay, "decoupled_weight_decay": True}
