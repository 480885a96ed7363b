"""Whole PPO cycles of palm_rlhf, TRL and palm-rlhf-pytorch, one implementation a process: see palm_bars.py.

Sampling, rewards, reference, values, advantages and one epoch in one minibatch, by the trainers themselves.
"""

from __future__ import annotations

import contextlib
import copy
import io
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rlhf_kernels.stacks import peers_root
from rlhf_kernels.stacks.peer import installed_version

OURS = "palm_rlhf"
OURS_LLAMA = "palm_rlhf, that Llama"
UPSTREAM = f"palm-rlhf-pytorch {installed_version('palm-rlhf-pytorch')}"
TRL_FOLDER = peers_root() / "trl-1.12"
TRL = f"TRL {installed_version('trl', TRL_FOLDER)} PPO, Llama"

# Of the cycles with a real vocabulary: GPT-2's.
SIZES = {"dim": 256, "num_tokens": 50257, "depth": 4}
BATCH, PROMPT, NEW = 16, 32, 256


class Cycle(NamedTuple):
    """A cycle, which returns how many tokens it sampled, and the number of parameters that it trains."""

    run: Callable[[], int]
    trained: int


def cycle() -> dict[str, Callable[[], Cycle]]:
    """16 rollouts of 256 tokens from 32-token prompts, one epoch; 512 wide, depth 4, V 256, LoRA rank 8.

    A process each, with its models in its memory; palm-rlhf-pytorch's, which takes minutes, once.
    """
    sizes = {"dim": 512, "num_tokens": 256, "depth": 4}
    return {OURS: lambda: _ours_adapted(sizes, 224), UPSTREAM: lambda: _upstream(sizes, 224)}


def ppo() -> dict[str, Callable[[], Cycle]]:
    """PPO, all parameters of policy and critic: batch 16, 256 new tokens, V 50257, 256 wide, depth 4.

    A process each; the cycle that is timed is its second.
    """
    return {OURS: lambda: _ours(_palm()), OURS_LLAMA: lambda: _ours(_our_llama()), TRL: _trl}


def ppo_lora() -> dict[str, Callable[[], Cycle]]:
    """The same with adapters of rank 8 on the attention of policy and critic, which is all that learns.

    A process each; palm-rlhf-pytorch's, which takes minutes, once.
    """
    return {OURS: lambda: _ours_adapted(SIZES, NEW), UPSTREAM: lambda: _upstream(SIZES, NEW)}


def _of(run: Callable[[], int], *optimizers: torch.optim.Optimizer) -> Cycle:
    groups: Iterable[Mapping[str, Any]] = (group for each in optimizers for group in each.param_groups)
    return Cycle(run, sum(parameter.numel() for group in groups for parameter in group["params"]))


def _prompts(vocabulary: int) -> Tensor:
    # Without 0 and 1, which are padding and the end in the tokenizer that TRL wants to have.
    return torch.randint(2, vocabulary, (BATCH, PROMPT))


def _palm() -> Any:
    from palm_rlhf import PaLM

    return PaLM(**SIZES)


def _llama_config(**more: Any) -> Any:
    """As many parameters as that PaLM, the norms' apart."""
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=SIZES["dim"], intermediate_size=4 * SIZES["dim"], num_hidden_layers=SIZES["depth"],
        num_attention_heads=8, head_dim=64, num_key_value_heads=1, vocab_size=SIZES["num_tokens"],
        tie_word_embeddings=True, max_position_embeddings=512, pad_token_id=0, eos_token_id=None,
        bos_token_id=None, **more,
    )  # fmt: skip


def _our_llama() -> Any:
    from transformers import LlamaForCausalLM

    from palm_rlhf.models.hf import HFModel

    return HFModel(LlamaForCausalLM(_llama_config()))


def _trainer(policy: Any, reference: Any, critic: Any, reward: Any, vocabulary: int, new: int) -> Cycle:
    from palm_rlhf.algorithms.table import ALGORITHMS
    from palm_rlhf.trainers.online import OnlineConfig, OnlineTrainer

    config = OnlineConfig(prompts=BATCH, max_new_tokens=new, minibatch=BATCH, epochs=1, steps=1000)
    trainer = OnlineTrainer(
        ALGORITHMS["ppo"], policy, reward, _prompts(vocabulary).tolist(), config=config,
        reference=reference, critic=critic,
    )  # fmt: skip

    def run() -> int:
        trainer.step(0)
        return BATCH * new

    return _of(run, *trainer.optimizers().values())


def _ours(model: Any) -> Cycle:
    from palm_rlhf.models.value import Policy, ValueModel, frozen

    reference, critic = copy.deepcopy(model), copy.deepcopy(model)

    def reward(generation: Any) -> Tensor:
        return generation.tokens[:, -1] / SIZES["num_tokens"]

    return _trainer(
        Policy(model), Policy(frozen(reference)), ValueModel(critic), reward, SIZES["num_tokens"], NEW
    )


def _ours_adapted(sizes: Mapping[str, int], new: int) -> Cycle:
    from palm_rlhf import PaLM, RewardModel
    from palm_rlhf.models.value import Policy, ValueModel
    from palm_rlhf.rewards import ModelReward

    palm = PaLM(**sizes)
    reward = ModelReward(RewardModel(palm, num_binned_output=5))
    for scope in ("actor", "critic"):
        palm.add_finetune_params(scope)
    return _trainer(
        Policy(palm, "actor"), Policy(palm), ValueModel(palm, "critic"), reward, sizes["num_tokens"], new
    )


def _upstream(sizes: Mapping[str, int], new: int) -> Cycle:
    from palm_rlhf_pytorch import PaLM, RewardModel, RLHFTrainer

    palm = PaLM(**sizes)
    reward = RewardModel(palm, num_binned_output=5)
    trainer = RLHFTrainer(palm=palm, reward_model=reward, prompt_token_ids=_prompts(sizes["num_tokens"]))

    def run() -> int:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            trainer.train(
                num_episodes=1, max_timesteps=BATCH, update_timesteps=BATCH, max_seq_len=PROMPT + new
            )
        return BATCH * new

    return _of(run, trainer.actor_optim, trainer.critic_optim)


class _LastToken(nn.Module):
    """What PPOTrainer takes for a reward model, in constant time: the id of the last token over V."""

    base_model_prefix = "backbone"

    def __init__(self) -> None:
        super().__init__()
        self.backbone = lambda input_ids, **_: SimpleNamespace(hidden_states=[input_ids[..., None].float()])

    def score(self, hidden: Tensor) -> Tensor:
        return hidden / SIZES["num_tokens"]


def _trl() -> Cycle:
    """`PPOTrainer.train()` for one batch."""
    sys.path.insert(0, str(TRL_FOLDER))
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
    config = PPOConfig(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=BATCH, gradient_accumulation_steps=1,
        num_ppo_epochs=1, num_mini_batches=1, total_episodes=BATCH, response_length=NEW, temperature=1.0,
        num_sample_generations=0, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True,
        bf16=False,
    )  # fmt: skip
    trainer = PPOTrainer(
        config, tokenizer, LlamaForCausalLM(_llama_config()), None, _LastToken(),
        Dataset.from_dict({"input_ids": _prompts(SIZES["num_tokens"]).tolist()}),
        LlamaForSequenceClassification(_llama_config(num_labels=1)),
    )  # fmt: skip

    def run() -> int:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            trainer.train()
        return BATCH * NEW

    return _of(run, trainer.optimizer)
