"""palm-rlhf-pytorch's PPO update: gradients of what is trained alone, and adapters as two thin products."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlhf_kernels.stacks.rebind import Call, Rebinding


def thin_adapter(original: Any) -> Any:
    """`LoRA.forward` as (x A) B in place of x (A B), where that is less work."""

    def forward(self: Any, x: Tensor) -> Tensor:
        (size, rank), size_out = self.A.shape, self.B.shape[1]
        if rank * (size + size_out) >= size * size_out:
            return original(self, x)
        return (x @ self.A) @ (self.B * self.scale)

    return forward


class Over:
    """Another object with some attributes of its own; what is set goes through to the object."""

    def __init__(self, under: Any, **attributes: Any) -> None:
        vars(self).update(attributes, _under=under)

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["_under"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(vars(self)["_under"], name, value)


def trained_alone(original: Any) -> Any:
    """`RLHFTrainer.learn` of PPO, its `backward` for the parameters that its two optimizers hold.

    The stack computes the gradients of the frozen weights too, and adds them up in `.grad`, where nothing
    reads them. With several processes, where reducing may wait for all of them, the original runs.
    """

    def learn(self: Any, memories: Any) -> None:
        accelerate = self.accelerate
        if accelerate.num_processes > 1:
            return original(self, memories)
        inputs = trained(self)

        def backward(loss: Tensor, **kwargs: Any) -> None:
            accelerate.backward(loss, **{"inputs": inputs, **kwargs})

        return original(Over(self, accelerate=Over(accelerate, backward=backward)), memories)

    return learn


def _adapter_call(large: bool) -> Call:
    from palm_rlhf_pytorch.lora import LoRA

    rows, size = (1024, 512) if large else (7, 24)
    torch.manual_seed(0)
    module = LoRA(size, size, r=8 if large else 3)
    torch.nn.init.normal_(module.B)
    return Call((module, torch.randn(rows, size).requires_grad_()))


def small_trainer(large: bool) -> Any:
    """A trainer of the stack's whose adapters all do something."""
    from palm_rlhf_pytorch import ppo

    torch.manual_seed(0)
    size = {"dim": 256, "depth": 2} if large else {"dim": 16, "depth": 2, "dim_head": 8, "heads": 2}
    model = ppo.PaLM(num_tokens=64, **size)
    trainer = ppo.RLHFTrainer(
        palm=model,
        reward_model=ppo.RewardModel(model, num_binned_output=5),
        prompt_token_ids=torch.randint(1, 64, (1, 4)),
    )
    with torch.no_grad():
        for parameter in trained(trainer):
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return trainer


def trained(trainer: Any) -> list[Any]:
    """The parameters that a trainer's two optimizers hold."""
    groups = [*trainer.actor_optim.param_groups, *trainer.critic_optim.param_groups]
    return [p for group in groups for p in group["params"] if p.requires_grad]


def _learn_call(large: bool) -> Call:
    """An update on rollouts; gives the gradients that both optimizers get."""
    from palm_rlhf_pytorch import ppo

    trainer = small_trainer(large)
    time, count = (128, 4) if large else (9, 3)
    sequences = torch.randint(1, 64, (count, time))
    prompt_mask = torch.arange(time) < 4
    optims = (trainer.actor_optim, trainer.critic_optim)
    start = [p.detach().clone() for p in trained(trainer)]
    with torch.no_grad():
        logits, values = trainer.actor_critic(sequences, mask=~prompt_mask.expand(count, -1))
        probs = ppo.shift(logits, shift=1, dim=-2).softmax(dim=-1)
        logs = ppo.log_prob(probs, sequences)[:, 4:]
    mask = torch.ones(time, dtype=torch.bool)
    memories = [
        ppo.Memory(sequences[i], prompt_mask, mask, probs[i], logs[i], torch.tensor(float(i)), values[i])
        for i in range(count)
    ]

    def invoke(function: Any, trainer: Any, memories: Any) -> list[Tensor]:
        gradients: list[Tensor] = []
        with torch.no_grad():
            for parameter, value in zip(trained(trainer), start):
                parameter.copy_(value)
        hooks = [optim.optimizer.register_step_pre_hook(_keep(gradients)) for optim in optims]
        with contextlib.redirect_stdout(io.StringIO()):
            function(trainer, memories)
        for hook in hooks:
            hook.remove()
        return gradients

    return Call((trainer, memories), {}, invoke)


def _keep(gradients: list[Tensor]) -> Callable[..., None]:
    def keep(optim: Any, *rest: Any) -> None:
        gradients.extend(p.grad.clone() for group in optim.param_groups for p in group["params"])

    return keep


TRAINING = (
    Rebinding(
        name="learn",
        op="",
        place="palm_rlhf_pytorch.ppo:RLHFTrainer.learn",
        make=trained_alone,
        call=_learn_call,
        note="what is not trained gets no gradient; with several processes the stack's own",
    ),
    Rebinding(
        name="adapter",
        op="",
        place="palm_rlhf_pytorch.lora:LoRA.forward",
        make=thin_adapter,
        call=_adapter_call,
        note="(x A) B in place of x (A B), where the rank is small",
    ),
)
