"""palm-rlhf-pytorch's `RLHFTrainer.train`, whose rollouts need fewer forward passes.

The stack samples a response and then passes it through the actor once more for the logits, which sampling has
computed. And it keeps what a gradient of the reward would need, although it detaches the reward.
"""

from __future__ import annotations

import contextlib
import io
from typing import Any

import torch
from torch import Tensor

from rlhf_kernels.stacks.palm_generation import cached_generate
from rlhf_kernels.stacks.palm_training import Over, small_trainer
from rlhf_kernels.stacks.rebind import FAST, Call, Rebinding


class _Sampling:
    """Stands for the actor's model during one `ActorCritic.generate`: samples, and knows the logits then."""

    def __init__(self, model: Any, generate: Any) -> None:
        self.model, self.own = model, generate
        self.scope: str | None = None
        self.tokens = self.logits = None

    def generate(self, *args: Any, finetune_scope: str | None = None, **kwargs: Any) -> Tensor:
        """`PaLM.generate` of the model."""
        self.scope = finetune_scope
        sample = cached_generate(self.own, self._keep)
        return sample(self.model, *args, finetune_scope=finetune_scope, **kwargs)

    def _keep(self, tokens: Tensor, logits: Tensor) -> None:
        self.tokens, self.logits = tokens, logits

    def __call__(self, x: Tensor, finetune_scope: str | None = None) -> Tensor:
        """The model's logits. Behind an `eos_token` the sequence was padded: then it is read again."""
        same = self.tokens is not None and finetune_scope == self.scope and torch.equal(x, self.tokens)
        return self.logits if same else self.model(x, finetune_scope=finetune_scope)


def lean_rollouts(original: Any) -> Any:
    """`RLHFTrainer.train`: the logits of a rollout are those of its sampling, its reward keeps no graph."""
    from palm_rlhf_pytorch import palm, ppo

    own, generate_own = palm.PaLM.generate, ppo.ActorCritic.generate

    def plain(actor: Any) -> bool:
        """Whether this is the stack's actor around the stack's model, as they come: see `generate` below."""
        model = getattr(actor, "actor_palm", None)
        return (
            type(actor) is ppo.ActorCritic
            and type(model) is palm.PaLM
            and "forward" not in vars(actor)  # accelerate puts autocast there
            and not {"generate", "forward"} & vars(model).keys()
            and palm.PaLM.generate is own
        )

    def train(
        self: Any,
        num_episodes: int = 50000,
        max_timesteps: int = 500,
        update_timesteps: int = 5000,
        max_batch_size: int = 16,
        max_seq_len: int = 2048,
        eos_token: int | None = None,
        temperature: float = 1.0,
    ) -> None:
        bound, reward = self.actor_critic_generate, self.reward_model

        def generate(*args: Any, **kwargs: Any) -> Any:
            actor = getattr(bound, "__self__", None)
            if getattr(bound, "__func__", None) is not generate_own or not plain(actor):
                return bound(*args, **kwargs)
            sampling = Over(actor, actor_palm=_Sampling(actor.actor_palm, own))
            sampling = Over(sampling, forward=lambda *a, **k: ppo.ActorCritic.forward(sampling, *a, **k))
            return generate_own(sampling, *args, **kwargs)

        def score(*args: Any, **kwargs: Any) -> Any:
            with torch.no_grad():
                return reward(*args, **kwargs)

        trainer = Over(self, actor_critic_generate=generate, reward_model=score)
        return original(
            trainer, num_episodes, max_timesteps, update_timesteps, max_batch_size, max_seq_len, eos_token,
            temperature,
        )  # fmt: skip

    return train


def _train_call(large: bool) -> Call:
    """Rollouts, also with an `eos_token` that is drawn, and with one of the prompt, behind which all is
    padding; gives all that the memories hold."""
    trainer = small_trainer(large)
    length = 128 if large else 24

    def invoke(function: Any, trainer: Any) -> list[Tensor]:
        found: list[Tensor] = []

        def learn(memories: Any) -> None:
            found.extend(part.float() for memory in memories for part in memory)

        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            for end in ("none", "drawn", "in the prompt"):
                prompt = trainer.prompt_token_ids[0]
                eos = int(prompt[1]) if end == "in the prompt" else None
                if end == "drawn":  # the first rollout is found[0] to found[6]
                    eos = next(int(token) for token in found[0] if token not in prompt)
                torch.manual_seed(0)
                function(Over(trainer, learn=learn), 1, 2, 2, max_seq_len=length, eos_token=eos)
        return found

    return Call((trainer,), {}, invoke)


ROLLOUT = Rebinding(
    name="train",
    op="decode_attention",
    place="palm_rlhf_pytorch.ppo:RLHFTrainer.train",
    make=lean_rollouts,
    call=_train_call,
    backends=FAST | {"torch"},
    note="a rollout's logits are those of its sampling; its reward keeps no graph",
)
