"""Supervised fine-tuning, and training from nothing: the next token of given texts."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from palm_rlhf.algorithms.objectives import masked_mean
from palm_rlhf.checks import check_options
from palm_rlhf.models.protocol import CausalModel
from palm_rlhf.models.value import Policy
from palm_rlhf.tasks.text import Samples
from palm_rlhf.trainers.learner import Order, Precision, Trainer, forward_pass, train_only
from palm_rlhf.trainers.ranks import ranks


@dataclass(frozen=True)
class SFTConfig:
    """How texts are learned."""

    steps: int = 500
    """Updates in all."""
    batch: int = 32
    """Samples in one forward pass."""
    accumulate: int = 1
    """Forward passes in one update."""
    lr: float = 1e-3
    """Highest learning rate."""
    warmup: int = 20
    """Updates over which the learning rate rises to it."""
    final_lr: float = 0.1
    """Share of it that is left at the end of a cosine; 1 keeps it constant."""
    weight_decay: float = 0.1
    """AdamW's, of matrices; norms have none."""
    beta2: float = 0.95
    """AdamW's decay of squared gradients; the other is 0.9."""
    max_grad_norm: float | None = 1.0
    """Clip gradients to this norm; None: not."""
    precision: Precision = "float32"
    """Of products; with bf16 weights, log-probabilities and losses stay float32."""
    eval_every: int = 50
    """Updates between two looks at the samples held back; the last update is always followed by one."""
    eval_samples: int = 256
    """Samples held back that are looked at, at most."""
    seed: int = 0
    """Of the order of samples."""

    def __post_init__(self) -> None:
        check_options(self)

    def rate(self, index: int) -> float:
        """The learning rate of the update with this index: linear warm-up, then half a cosine."""
        if index < self.warmup:
            return self.lr * (index + 1) / (self.warmup + 1)
        done = (index - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * (self.final_lr + (1 - self.final_lr) * (1 + math.cos(math.pi * min(done, 1.0))) / 2)


class SFTTrainer(Trainer):
    """A `Learner`: cross entropy of the next token, AdamW, warm-up and cosine."""

    def __init__(
        self,
        model: CausalModel,
        samples: Samples,
        held_back: Samples | None,
        config: SFTConfig,
        scope: str | None = None,
        last_layers: int | None = None,
    ) -> None:
        """
        Args:
            model: learns; with a `scope`, its adapters of that name do; else `last_layers` may say how many.
            samples: what to imitate.
            held_back: what `validation_loss` is of; None or empty: it is not logged.
            config: sizes and rates.

        Raises:
            ValueError: there are no samples, or they are longer than the model allows.
        """
        if not len(samples):
            raise ValueError("there are no samples to learn from")
        longest = int(samples.lengths.max()) - 1
        if model.max_length is not None and longest > model.max_length:
            raise ValueError(
                f"samples of {longest} tokens exceed the model's {model.max_length}. Lower the length."
            )
        self.model, self.policy, self.config = model, Policy(model, scope, last_layers), config
        self.samples, self.held_back = (
            samples,
            held_back if held_back is not None and len(held_back) else None,
        )
        generator = torch.Generator().manual_seed(config.seed)
        train_only(self.policy.trained(), model)
        ranks().cut(model)
        trained = [p for p in model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.dim() > 1], "weight_decay": config.weight_decay},
            {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
        ]
        super().__init__(
            "sft",
            Order(len(samples), generator, across=True),
            {"model": torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, config.beta2))},
            {"order": generator},
            batch=config.batch,
            max_grad_norm=config.max_grad_norm,
            precision=config.precision,
        )

    def rates(self, index: int) -> dict[str, float]:
        """A warm-up, then half a cosine."""
        return {"model": self.config.rate(index)}

    def step(self, index: int) -> dict[str, float]:
        """One update."""
        c = self.config
        began = time.perf_counter()
        self.model.train()
        taken = [torch.tensor(self._next_indices()) for _ in range(c.accumulate)]
        # Of the whole update: with a mean for each part, tokens in short samples would weigh more.
        count = sum(map(self.samples.count_learned, taken))
        self._set_rates(index)
        loss = self.ranks.summed({"loss": sum(self._learn(index, count) for index in taken)})["loss"]
        norm = self._apply(index, loss)["model"]
        found = {"loss": loss, "lr": c.rate(index), "grad_norm": norm}
        found["tokens_per_second"] = count / (time.perf_counter() - began)
        if self.held_back is not None and ((index + 1) % c.eval_every == 0 or index + 1 == c.steps):
            found["validation_loss"] = self.validation_loss()
            found["validation_perplexity"] = math.exp(min(found["validation_loss"], 700.0))
        return found

    def _learn(self, indices: Tensor, count: int) -> float:
        """This process's share of a batch: its loss over the tokens of the update; leaves its gradients."""
        mine, found = indices[self.ranks.share(len(indices))], 0.0
        for part, counts in self.ranks.in_step([mine] if len(mine) else [], lambda: indices[:1]):
            loss = self._loss_sum(*self._batch(self.samples, part)) / count * counts
            loss.backward()
            found += float(loss.detach())
        return found

    def _batch(self, samples: Samples, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, mask, and which tokens are learned: [B, L] each."""
        tokens, mask = samples.batch(index)
        return tuple(x.to(self.model.device) for x in (tokens, mask, samples.learned(index, mask)))

    @forward_pass
    def _loss_sum(self, tokens: Tensor, mask: Tensor, learned: Tensor) -> Tensor:
        return -masked_mean(self.policy(tokens, mask, prompt_width=1)[0], learned[:, 1:], 1.0)

    @torch.no_grad()
    def validation_loss(self) -> float:
        """Mean negative log-probability of the tokens held back, in nats; its exponential is the perplexity.

        Raises:
            ValueError: nothing is held back.
        """
        if self.held_back is None:
            raise ValueError("validation_loss: no samples are held back")
        self.model.eval()
        total, whole = 0.0, torch.arange(min(len(self.held_back), self.config.eval_samples))
        mine = whole[self.ranks.share(len(whole))]
        parts = mine.split(self.config.batch) if len(mine) else ()
        for index, counts in self.ranks.in_step(parts, lambda: whole[:1]):
            total += float(self._loss_sum(*self._batch(self.held_back, index))) * counts
        return self.ranks.summed({"": total})[""] / self.held_back.count_learned(whole)

    def modules(self) -> dict[str, nn.Module]:
        """The model."""
        return {"model": self.model}
