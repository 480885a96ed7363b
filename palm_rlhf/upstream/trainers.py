"""palm-rlhf-pytorch's trainers with their arguments: PPO, GRPO and its kin, FlowRL, TPO."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from palm_rlhf.generation import Generation
from palm_rlhf.models.palm import PaLM
from palm_rlhf.models.value import Policy, ValueModel
from palm_rlhf.rewards import RewardModel
from palm_rlhf.upstream.common import Trainer, adam, chosen, critic_bins, reference_of, sizes
from palm_rlhf.upstream.models import ActorCritic


class RLHFTrainer(Trainer):
    """PPO with a critic of bins, palm-rlhf-pytorch's `RLHFTrainer`."""

    def __init__(
        self,
        *,
        prompts: Sequence[str] | None = None,
        prompts_path: str | Path | None = None,
        prompt_token_ids: Tensor | None = None,
        tokenizer: Callable[[Sequence[str]], Any] | None = None,
        palm: PaLM,
        reward_model: RewardModel | Callable[[Generation], Tensor],
        critic: PaLM | None = None,
        actor_critic: ActorCritic | None = None,
        actor_lr: float = 1e-4,
        critic_lr: float = 1e-4,
        actor_wd: float = 0.0,
        critic_wd: float = 0.0,
        actor_lora: bool = True,
        critic_lora: bool = True,
        actor_lora_r: int = 8,
        critic_lora_r: int = 8,
        critic_pooled_values: bool = True,
        actor_dropout: float = 0.0,
        critic_dropout: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        max_norm: float | None = None,
        eps_clip: float = 0.2,
        value_clip: float = 0.4,
        beta_s: float = 0.01,
        pad_value: float = 0.0,
        minibatch_size: int = 16,
        epochs: int = 1,
        kl_div_loss_weight: float = 0.1,
        critic_num_pred_bins: int = 6,
        hl_gauss_loss_kwargs: Mapping[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        """Arguments as there, but for `accelerate_kwargs`; `seed` is of prompts, samples and minibatches.

        `value_clip` is accepted, and does nothing: it bounds a value, and the critic's loss is of bins.
        """
        critic_options = critic_bins(critic_num_pred_bins, hl_gauss_loss_kwargs or {})
        support = (critic_options["critic_low"], critic_options["critic_high"])
        if actor_critic is None:
            actor_critic = ActorCritic(
                palm, critic, critic_pooled_values, actor_lora, critic_lora, actor_lora_r, critic_lora_r,
                actor_dropout=actor_dropout, critic_dropout=critic_dropout,
                critic_dim_out=critic_num_pred_bins, critic_range=support,
            )  # fmt: skip
        self.actor_critic = actor_critic
        actor = actor_critic.actor
        reference = reference_of(actor.model, actor.scope is not None)
        super().__init__(
            palm=palm, reward_model=reward_model, prompts=prompts, prompts_path=prompts_path,
            prompt_token_ids=prompt_token_ids, tokenizer=tokenizer, pad_value=pad_value, seed=seed,
            parts={"policy": actor_critic.actor, "critic": actor_critic.critic, "reference": reference},
            options=chosen(
                "ppo", clip=eps_clip, value_clip=value_clip, entropy_coef=beta_s,
                kl_coef=kl_div_loss_weight, value_coef=1.0, **critic_options,
            ),
            config=sizes(actor_lr, max_norm, minibatch_size, epochs) | {"critic_lr": critic_lr},
            optimizer={"policy": adam(betas, actor_wd), "critic": adam(betas, critic_wd)},
        )  # fmt: skip


def _policy(palm: PaLM, lora: bool, lora_r: int, dropout: float) -> dict[str, Policy]:
    """Policy and reference."""
    if dropout:
        raise ValueError(f"actor_dropout must be 0, got {dropout}: a ratio must not see two masks")
    reference = reference_of(palm, lora)
    if lora:
        palm.add_finetune_params("actor", lora_r)
    return {"policy": Policy(palm, "actor" if lora else None), "reference": reference}


class GRPOTrainer(Trainer):
    """`palm_rlhf_pytorch.grpo.RLHFTrainer`: GRPO and what its flags make of it."""

    def __init__(
        self,
        *,
        prompts: Sequence[str] | None = None,
        prompts_path: str | Path | None = None,
        prompt_token_ids: Tensor | None = None,
        tokenizer: Callable[[Sequence[str]], Any] | None = None,
        palm: PaLM,
        reward_model: RewardModel | Callable[[Generation], Tensor],
        grpo_num_times_sample_rewards: int = 10,
        actor_lr: float = 1e-4,
        actor_wd: float = 0.0,
        actor_lora: bool = True,
        actor_lora_r: int = 8,
        actor_dropout: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        max_norm: float | None = None,
        eps_clip: float = 0.2,
        beta_s: float = 0.01,
        pad_value: float = 0.0,
        minibatch_size: int = 16,
        epochs: int = 1,
        kl_div_loss_weight: float = 0.1,
        use_simple_policy_optimization: bool = False,
        use_dr_grpo: bool = False,
        dr_grpo_constant: float | None = None,
        use_max_rl: bool = False,
        use_score_centering: bool = False,
        score_centering_topk: int | None = None,
        score_centering_truncation: float | None = None,
        add_entropy_to_advantage: bool = False,
        entropy_to_advantage_kappa: float = 2.0,
        entropy_to_advantage_scale: float = 0.4,
        seed: int = 0,
    ) -> None:
        """Arguments as there, but for `score_centering_truncation`: a bound on the ratio, no function of it.

        A group has one response more than `grpo_num_times_sample_rewards`, as there. Dr. GRPO's constant, by
        default that number, divides the rewards.
        """
        dr_grpo = use_dr_grpo or dr_grpo_constant is not None
        rows = {
            "dr-grpo": dr_grpo, "maxrl": use_max_rl, "score-centering": use_score_centering,
            "spo": use_simple_policy_optimization,
        }  # fmt: skip
        # Simple Policy Optimization is a loss: it goes with any advantages, but not with score centering.
        wanted = [name for name, asked in rows.items() if asked and name != "spo"]
        if len(wanted) > 1 or (use_score_centering and use_simple_policy_optimization):
            asked = [name for name, on in rows.items() if on]
            raise ValueError(f"{' and '.join(asked)} exclude each other")
        self.algorithm = wanted[0] if wanted else "grpo"
        samples = grpo_num_times_sample_rewards + 1
        super().__init__(
            palm=palm, reward_model=reward_model, prompts=prompts, prompts_path=prompts_path,
            prompt_token_ids=prompt_token_ids, tokenizer=tokenizer, pad_value=pad_value, seed=seed,
            parts=_policy(palm, actor_lora, actor_lora_r, actor_dropout),
            options=chosen(
                self.algorithm, clip=eps_clip, entropy_coef=beta_s, kl_coef=kl_div_loss_weight, kl="k2",
                kl_in="loss", loss="spo" if use_simple_policy_optimization else "clip",
                head=palm.num_tokens if score_centering_topk is None else score_centering_topk,
                truncation=score_centering_truncation,
                entropy_advantage=entropy_to_advantage_scale if add_entropy_to_advantage else 0.0,
                entropy_kappa=entropy_to_advantage_kappa,
            ),
            config=sizes(actor_lr, max_norm, minibatch_size, epochs) | {"samples": samples},
            optimizer={"policy": adam(betas, actor_wd)},
            scale=(samples if dr_grpo_constant is None else dr_grpo_constant) if dr_grpo else 1.0,
        )  # fmt: skip


class FlowRLTrainer(Trainer):
    """`palm_rlhf_pytorch.flowrl.FlowRLTrainer`, with log-probabilities where that takes probabilities."""

    algorithm = "flowrl"

    def __init__(
        self,
        *,
        prompts: Sequence[str] | None = None,
        prompts_path: str | Path | None = None,
        prompt_token_ids: Tensor | None = None,
        tokenizer: Callable[[Sequence[str]], Any] | None = None,
        palm: PaLM,
        reward_model: RewardModel | Callable[[Generation], Tensor],
        flowrl_num_times_sample: int = 8,
        beta: float = 15.0,
        actor_lr: float = 1e-4,
        actor_wd: float = 0.0,
        actor_lora: bool = True,
        actor_lora_r: int = 8,
        actor_dropout: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        max_norm: float | None = None,
        eps_clip: float = 0.2,
        beta_s: float = 0.01,
        pad_value: float = 0.0,
        minibatch_size: int = 16,
        epochs: int = 1,
        kl_div_loss_weight: float = 0.1,
        partition_function_hidden_dim: int | None = None,
        partition_function_lr: float = 1e-4,
        seed: int = 0,
    ) -> None:
        """Arguments as there; the width of the partition function is the model's, whatever is given.

        It is adapters on the policy's model, and without `actor_lora` on a copy of it.

        `beta_s` and `kl_div_loss_weight` are used: there they are not.
        """
        parts: dict[str, Any] = _policy(palm, actor_lora, actor_lora_r, actor_dropout)
        # Adapters can share a backbone only while it stays as it is.
        partition = palm if actor_lora else copy.deepcopy(palm)
        partition.add_finetune_params("partition", actor_lora_r)
        super().__init__(
            palm=palm, reward_model=reward_model, prompts=prompts, prompts_path=prompts_path,
            prompt_token_ids=prompt_token_ids, tokenizer=tokenizer, pad_value=pad_value, seed=seed,
            parts=parts | {"critic": ValueModel(partition, "partition")},
            options=chosen(
                "flowrl", beta=beta, clip=eps_clip, entropy_coef=beta_s, kl_coef=kl_div_loss_weight, kl="k2",
                kl_in="loss",
            ),
            config=sizes(actor_lr, max_norm, minibatch_size, epochs)
            | {"samples": flowrl_num_times_sample + 1, "critic_lr": partition_function_lr},
            optimizer={"policy": adam(betas, actor_wd), "critic": adam(betas, 0.0)},
        )  # fmt: skip


class TPOTrainer(Trainer):
    """`palm_rlhf_pytorch.tpo.RLHFTrainer`: target policy optimization."""

    algorithm = "tpo"

    def __init__(
        self,
        *,
        prompts: Sequence[str] | None = None,
        prompts_path: str | Path | None = None,
        prompt_token_ids: Tensor | None = None,
        tokenizer: Callable[[Sequence[str]], Any] | None = None,
        palm: PaLM,
        reward_model: RewardModel | Callable[[Generation], Tensor],
        num_times_sample_rewards: int = 10,
        actor_lr: float = 1e-4,
        actor_wd: float = 0.0,
        actor_lora: bool = True,
        actor_lora_r: int = 8,
        actor_dropout: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        max_norm: float | None = None,
        beta_s: float = 0.01,
        pad_value: float = 0.0,
        minibatch_size: int = 16,
        epochs: int = 1,
        tpo_eta: float = 1.0,
        seed: int = 0,
    ) -> None:
        """Arguments as there; a minibatch is so many groups, and a group one response more than samples."""
        samples = num_times_sample_rewards + 1
        super().__init__(
            palm=palm, reward_model=reward_model, prompts=prompts, prompts_path=prompts_path,
            prompt_token_ids=prompt_token_ids, tokenizer=tokenizer, pad_value=pad_value, seed=seed,
            parts=_policy(palm, actor_lora, actor_lora_r, actor_dropout),
            options=chosen("tpo", eta=tpo_eta, entropy_coef=beta_s),
            config=sizes(actor_lr, max_norm, minibatch_size * samples, epochs) | {"samples": samples},
            optimizer={"policy": adam(betas, actor_wd)},
        )  # fmt: skip
