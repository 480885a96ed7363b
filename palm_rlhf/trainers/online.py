"""Training on what the policy itself samples. Which algorithm it is stands in the table, not here."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from palm_rlhf.algorithms.policy import adapted
from palm_rlhf.algorithms.row import Algorithm, Loss, Outputs, Whole
from palm_rlhf.generation import Generation, checked_finite, generate, joined, scored
from palm_rlhf.models.packing import set_packed
from palm_rlhf.models.value import Policy, ValueModel, set_dropout
from palm_rlhf.rollout import Rollout
from palm_rlhf.seeds import drawn_seeds
from palm_rlhf.trainers.figures import described
from palm_rlhf.trainers.learner import Order, Trainer, forward_pass, linear_share, train_only
from palm_rlhf.trainers.online_config import OnlineConfig, check_fits
from palm_rlhf.trainers.ranks import ranks

if TYPE_CHECKING:
    from palm_rlhf.rollout.store import RolloutStore


class OnlineTrainer(Trainer):
    """A `Learner`: rollout, reward, advantages, updates."""

    def __init__(
        self,
        algorithm: Algorithm,
        policy: Policy,
        reward: Callable[[Generation], Tensor],
        prompts: Sequence[Sequence[int]],
        *,
        config: OnlineConfig,
        options: Any = None,
        reference: Policy | None = None,
        critic: ValueModel | None = None,
        stop: int | None = None,
        pad: int = 0,
        evaluate: Callable[[Policy, torch.Generator], Mapping[str, float]] | None = None,
        eval_every: int = 0,
        store: RolloutStore | None = None,
    ) -> None:
        """
        Args:
            algorithm: a row of `algorithms.table.ALGORITHMS`.
            policy: what learns. Dropout is turned off in it, and in reference and critic.
            reward: maps a Generation to [B]; a reward model or a ProgrammaticReward.
            prompts: token ids.
            config: sizes and rates. options: the algorithm's, its defaults if None.
            reference: what the KL divergence is to; may share the policy's weights where that has adapters.
            critic: where the algorithm needs one.
            stop, pad: tokens.
            evaluate: called before the first step and every `eval_every` steps; what it returns is logged.
            store: keeps every rollout, with its advantages; those of steps that are done again are replaced.

        Raises:
            ValueError: there are no prompts, or what the algorithm needs is missing.
        """
        if not prompts:
            raise ValueError("there are no prompts to learn from")
        for needed, given in (("critic", critic), ("reference", reference)):
            if getattr(algorithm, needed) and given is None:
                raise ValueError(f"{algorithm.name} needs a {needed}, got none")
        check_fits(algorithm, config)
        self.algorithm, self.config = algorithm, config
        self.options = algorithm.options() if options is None else options
        self.policy, self.reference, self.critic = policy, reference, critic
        self.reward, self.prompts, self.stop, self.pad = reward, [list(p) for p in prompts], stop, pad
        self.evaluate, self.eval_every, self.store = evaluate, eval_every, store
        # A ratio of probabilities must not see two masks.
        models = [model for model in (policy, reference, critic) if model is not None]
        set_dropout(0.0, *models)
        seeds = torch.Generator().manual_seed(config.seed)
        generators = {
            name: torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=seeds)))
            for name in ("prompts", "sampling", "minibatches", "evaluation")
        }
        # Rollouts that an auxiliary phase will see again, and the values of the policy's own that it learns.
        self._kept: list[Rollout] = []
        self._auxiliary = ValueModel(policy.model, policy.scope) if algorithm.auxiliary else None
        set_packed(config.packed, *models, *([self._auxiliary] if self._auxiliary else []))
        parts = [part for part in (policy, critic) if part is not None]
        train_only((p for part in parts for p in part.trained()), *parts, *([reference] if reference else ()))
        ranks().cut(*(part.model for part in models))
        learned = {"policy": policy.trained()}
        if critic is not None:
            learned["critic"] = critic.trained()
        if self._auxiliary is not None:
            learned["auxiliary"] = self._auxiliary.value_head.parameters()
        super().__init__(
            algorithm.name,
            Order(len(prompts), generators["prompts"], across=True),
            # eps as in TensorFlow's Adam, with which PPO was tuned: it divides by more than PyTorch's.
            {name: torch.optim.Adam(list(found), eps=1e-5) for name, found in learned.items()},
            generators,
            batch=config.prompts,
            max_grad_norm=config.max_grad_norm,
            precision=config.precision,
        )
        self._set_rates(0)

    def rates(self, index: int) -> dict[str, float]:
        """A warm-up, then a line to 0."""
        c = self.config
        share = linear_share(index, c.steps, warmup=c.warmup, anneal=c.anneal)
        rates = {"policy": c.policy_lr, "critic": c.critic_lr, "auxiliary": c.policy_lr}
        return {name: rate * share for name, rate in rates.items()}

    def step(self, index: int) -> dict[str, float]:
        """One rollout and the updates on it."""
        metrics: dict[str, float] = {}
        if self.evaluate is not None and index == 0:
            metrics |= {f"{name}_before": value for name, value in self._evaluated().items()}
        began = time.perf_counter()
        rollout = self.rollout()
        sampled = time.perf_counter()
        rollout = self.estimated(rollout)
        if self.store is not None and self.ranks.main:
            self.store.append(rollout, step=index)
        estimated = time.perf_counter()
        metrics |= self.update(rollout, index)
        metrics |= described(rollout, self.options)
        self.options = adapted(self.options, rollout)
        metrics |= {
            "rollout_seconds": sampled - began,
            "scoring_seconds": estimated - sampled,
            "update_seconds": time.perf_counter() - estimated,
        }
        if self.evaluate is not None and self.eval_every and (index + 1) % self.eval_every == 0:
            metrics |= self._evaluated()
        return metrics

    def _evaluated(self) -> dict[str, float]:
        return dict(self.evaluate(self.whole_policy(), self._generators["evaluation"]))

    def whole_policy(self) -> Policy:
        """The policy to sample from or to save; of a model in shards a copy, for which all must ask."""
        return self.policy.of(self.ranks.whole(self.policy.model))

    def next_prompts(self) -> list[list[int]]:
        """Every prompt once before any comes again, in a fresh order each time."""
        return [self.prompts[i] for i in self._next_indices()]

    def rollout(self) -> Rollout:
        """Responses to the next prompts, with their scores."""
        c, whole = self.config, self.next_prompts()
        # One for each response, so that the responses do not depend on which process samples them.
        seeds = drawn_seeds(len(whole) * c.samples, self._generators["sampling"]).view(len(whole), -1)
        mine = self.ranks.share(len(whole))
        prompts, seeds = whole[mine], seeds[mine]
        size = max(1, (c.rollout_batch or len(whole) * c.samples) // c.samples)
        model = self.whole_policy().model
        with self.ranks.together():
            with self.autocast():
                parts = [
                    generate(
                        model, prompts[start : start + size], max_new_tokens=c.max_new_tokens,
                        samples=c.samples, temperature=c.temperature, top_k=c.top_k, top_p=c.top_p,
                        stop=self.stop, pad=self.pad, seeds=seeds[start : start + size],
                        scope=self.policy.scope,
                    )
                    for start in range(0, len(prompts), size)
                ]  # fmt: skip
            del model
            scores = [scored(self.reward, part).float() for part in parts]
        device = self.policy.model.device
        found = self.ranks.everyones(list(zip(parts, scores)))
        parts, scores = zip(*(pair for pairs in found for pair in pairs))
        generation = joined([part.to(device) for part in parts], self.pad)
        score = checked_finite(torch.cat([score.to(device) for score in scores]))
        if c.missing_stop_score is not None:
            score = torch.where(generation.stopped, score, c.missing_stop_score)
        group = torch.arange(c.prompts, device=score.device).repeat_interleave(c.samples)
        return Rollout(generation, c.temperature, score, group=group)

    @torch.no_grad()
    def estimated(self, rollout: Rollout) -> Rollout:
        """The rollout with reference log-probabilities, values, advantages and returns."""
        scored: dict[str, Callable[[Rollout], Tensor]] = {}
        if self.algorithm.reference:
            scored["reference_logprob"] = lambda part: self._scored(self.reference, part)[0]
        if self.algorithm.critic:
            scored["values"] = lambda part: self._values(part, self.critic)[0]
        found = self._by_all(rollout, lambda part: [score(part) for score in scored.values()])
        rollout = replace(rollout, **dict(zip(scored, found)))
        advantages, returns = self.algorithm.estimator(rollout, self.options)
        rollout = replace(rollout, advantages=advantages, returns=returns)
        return self.with_head(rollout) if self.algorithm.head else rollout

    @torch.no_grad()
    def with_head(self, rollout: Rollout) -> Rollout:
        """The rollout with the tokens that the policy finds most probable now at every place."""

        ids, logprob = self._by_all(rollout, self._most_probable)
        return replace(rollout, head_ids=ids, head_logprob=logprob)

    @forward_pass
    def _most_probable(self, rollout: Rollout) -> tuple[Tensor, Tensor]:
        g = rollout.generation
        return self.policy.most_probable(
            g.tokens, g.mask, g.prompt_width, rollout.temperature, self.options.head
        )

    def _by_all(self, rollout: Rollout, score: Callable[[Rollout], Sequence[Tensor]]) -> list[Tensor]:
        """What `score` finds for parts of a rollout, [B, R, ...] each: every process scores its share."""
        found = []
        for part, counts in self._share(rollout, self.config.micro_batch or self.config.minibatch):
            short, scored = rollout.mask.shape[1] - part.mask.shape[1], score(part)
            if counts:
                found.append([F.pad(x, (0, 0) * (x.dim() - 2) + (0, short)) for x in scored])
        return self.ranks.joined([torch.cat(parts) for parts in zip(*found)], rollout.score.device)

    def _share(self, rollout: Rollout, size: int | None) -> Iterator[tuple[Rollout, bool]]:
        """The part of a rollout that this process computes, at most `size` responses at a time.

        With each whether it counts; see `Ranks.in_step`.
        """
        unit = self.config.samples if self.algorithm.groups else 1
        share = self.ranks.share(len(rollout), unit)
        parts = rollout.rows(share).micro_batches(size) if share.start < share.stop else ()
        return self.ranks.in_step(parts, lambda: rollout.rows(slice(unit)).trimmed())

    @forward_pass
    def _scored(self, policy: Policy, rollout: Rollout) -> tuple[Tensor, Tensor]:
        g = rollout.generation
        return policy(g.tokens, g.mask, g.prompt_width, rollout.temperature)

    @forward_pass
    def _values(self, rollout: Rollout, critic: ValueModel) -> tuple[Tensor, Tensor | None]:
        """[B, R]: the value of the state before each token of the response; logits of a critic with bins."""
        g = rollout.generation
        values, logits = critic.scored(g.tokens[:, :-1], g.mask[:, :-1])
        first = g.prompt_width - 1
        return values[:, first:], None if logits is None else logits[:, first:]

    @forward_pass
    def outputs(self, rollout: Rollout) -> Outputs:
        """What the learner finds for these responses now."""
        head = None
        if rollout.head_ids is None:
            logprob, entropy = self._scored(self.policy, rollout)
        else:
            g = rollout.generation
            logprob, entropy, head = self.policy.with_head(
                g.tokens, g.mask, g.prompt_width, rollout.temperature, rollout.head_ids
            )
        values = self._values(rollout, self.critic) if self.algorithm.critic else (None, None)
        return Outputs(logprob, entropy, *values, head)

    def update(self, rollout: Rollout, index: int) -> dict[str, float]:
        """All epochs over a rollout; the means of what the updates found."""
        self._set_rates(index)
        found = self._learned(
            self._minibatches(rollout, self.config.epochs), self.algorithm.objective, self.outputs, index
        )
        return found | self._auxiliary_phase(rollout, index)

    def _auxiliary_phase(self, rollout: Rollout, index: int) -> dict[str, float]:
        """Where the algorithm has one: keeps the rollout; once there are enough it learns from them."""
        if self.algorithm.auxiliary is None:
            return {}
        self._kept.append(rollout)
        if len(self._kept) < self.options.auxiliary_every:
            return {}
        # Of the policy as it is now: that is where it is to stay.
        kept, self._kept = [self.with_head(rollout) for rollout in self._kept], []

        def outputs(part: Rollout) -> Outputs:
            return self.outputs(part)._replace(auxiliary=self._values(part, self._auxiliary)[0])

        passes = kept * self.options.auxiliary_epochs
        minibatches = (part for rollout in passes for part in self._minibatches(rollout, 1))
        return self._learned(minibatches, self.algorithm.auxiliary, outputs, index)

    def _learned(
        self,
        minibatches: Iterable[Rollout],
        objective: Callable[[Rollout, Outputs, Any, Whole], Loss],
        outputs: Callable[[Rollout], Outputs],
        index: int,
    ) -> dict[str, float]:
        """An update for every minibatch; the means of what they found."""
        sums: dict[str, Tensor] = {}
        updates = 0
        for minibatch in minibatches:
            whole = Whole(minibatch.mask.sum(), len(minibatch), self.config.max_new_tokens)
            for part, counts in self._share(minibatch, self.config.micro_batch):
                loss = objective(part, outputs(part), self.options, whole)
                (loss.total * counts).backward()
                for name, value in loss.metrics.items() if counts else ():
                    sums[name] = sums.get(name, 0.0) + value
            self._apply(index, without=("policy",) if index < self.config.critic_warmup else ())
            updates += 1
        return self.ranks.summed({name: float(value) / updates for name, value in sums.items()})

    def _minibatches(self, rollout: Rollout, epochs: int) -> Iterator[Rollout]:
        for _ in range(epochs):
            yield from rollout.minibatches(
                self.config.minibatch, self._generators["minibatches"], groups=self.algorithm.groups
            )

    def modules(self) -> dict[str, nn.Module]:
        """The policy's model, with all its adapters; the critic's too where it is another, and its head."""
        found = {"policy": self.policy.model}
        if self.critic is not None:
            shared = self.critic.model is self.policy.model
            found["critic"] = self.critic.value_head if shared else self.critic
        if self._auxiliary is not None:
            found["auxiliary"] = self._auxiliary.value_head
        if self.reference is not None and self.reference.model is not self.policy.model:
            found["reference"] = self.reference.model
        return found

    def extra_state(self) -> dict[str, Any]:
        """The prompts that this round still has to come to, the weight of the KL term, rollouts kept."""
        kept = [rollout.state() for rollout in self._kept]
        return super().extra_state() | {"kl_coef": self.options.kl_coef, "kept": kept}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Takes that back."""
        super().load_extra_state(state)
        # A checkpoint is read to the CPU.
        device = self.policy.model.device
        self._kept = [Rollout.from_state(rollout).to(device) for rollout in state["kept"]]
        if self.options.kl_target is not None:
            self.options = replace(self.options, kl_coef=state["kl_coef"])
