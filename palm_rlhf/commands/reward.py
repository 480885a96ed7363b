"""`palm-rlhf reward`: from preferences to a reward model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch
import tyro
from torch import Tensor

from palm_rlhf.commands.common import (
    WEIGHTS,
    HFOptions,
    Loaded,
    Tuning,
    device,
    kept_tokenizer,
    load_model,
    metadata,
    tokenizer_metadata,
    weights_file,
)
from palm_rlhf.commands.runs import Run
from palm_rlhf.commands.stages import check_origin
from palm_rlhf.generation import Generation, generate
from palm_rlhf.rewards import ModelReward, RewardModel, load_reward_model, save_reward_model
from palm_rlhf.tasks.pairs import Labelled, Pair, read_examples, split_examples
from palm_rlhf.tokens import Tokenizer, check_fits, first_ids, prompt_ids, same_tokens
from palm_rlhf.trainers.reward import RewardConfig, RewardTrainer


@dataclass
class Reward:
    """Train a reward model on pairs of responses, or on texts with labels.

    A line of --pairs is {"prompt": ..., "chosen": ..., "rejected": ...}, or with a label
    {"prompt": ..., "text": ..., "label": 1.5}; the prompt may be left out.

    $ palm-rlhf reward --model runs/sft --pairs pairs.jsonl --out runs/reward
    """

    model: Path
    """Run or file to start from, such as that of palm-rlhf sft, or a model of transformers: its folder, or
    hf:NAME with a name on the hub."""
    pairs: Path
    """Examples as JSON lines or Parquet."""
    out: Path
    """Folder of the run. If it is there, the run goes on."""
    bins: int = 0
    """How many there are, for labels that are bins 0, 1, 2, ...; 0 for pairs and for other labels."""
    held_back: float = 0.1
    """Share of the examples that judge."""
    tuning: Annotated[Tuning, tyro.conf.arg(name="")] = field(default_factory=Tuning)
    dropout: float = 0.1
    """Of the model, in training."""
    normalize: int = 0
    """Make rewards of mean 0 and variance 1 on so many responses of --model, before and after; 0: not."""
    normalize_tokens: int = 64
    """Tokens of such a response at most."""
    tokenizer: str | None = None
    """'bytes', a tokenizer.json or hf:NAME, for a --model that does not say what its tokens are."""
    config: Annotated[RewardConfig, tyro.conf.arg(name="")] = field(default_factory=RewardConfig)
    save_every: int = 100
    """Steps between checkpoints."""
    hf: Annotated[HFOptions, tyro.conf.arg(name="")] = field(default_factory=HFOptions)
    device: str | None = None
    """cpu or cuda; default: the GPU if there is one."""
    quiet: bool = False
    """No progress bar."""


FORM = Reward


def run(args: Reward, line: str) -> int:
    """Trains, and writes the reward model."""
    folder = Run("reward", args, line, grows="epochs")
    train, judge = split_examples(read_examples(args.pairs), args.held_back, args.config.seed)
    loaded = load_model(args.model, tokenizer=args.tokenizer, on=args.device, hf=args.hf)
    check_origin(args.pairs, args.model, loaded)
    torch.manual_seed(args.config.seed)
    model = RewardModel(
        loaded.model,
        dropout=args.dropout,
        num_binned_output=args.bins,
        use_lora=args.tuning.lora,
        lora_r=args.tuning.lora_r,
        lora_targets=args.tuning.lora_targets,
        lora_alpha=args.tuning.lora_alpha,
        last_layers=args.tuning.last_layers,
    )
    samples = _samples(args, loaded, train)
    if samples is not None:
        ModelReward(model).normalize_on(samples)
    trainer = RewardTrainer(
        model, train, loaded.tokenizer, config=args.config, held_out=judge, stop=loaded.stop
    )
    rows = folder.train(trainer, ("loss", "accuracy", "held_out_accuracy"), steps=trainer.steps)
    said = None if samples is None else _normalized(model, samples)
    model = trainer.ranks.whole(model)
    if not folder.main:
        return 0
    if said is not None:
        print(said)
    kept = tokenizer_metadata(folder.folder, loaded.tokenizer)
    saved = save_reward_model(folder.folder / WEIGHTS, model, stop=loaded.stop, **kept)
    curve = folder.draw(rows, ("loss", "held_out_loss", "accuracy", "held_out_accuracy"), line)
    judged = next((row for row in reversed(rows) if "held_out_loss" in row), {})
    found = {name: value for name, value in judged.items() if name.startswith("held_out_")}
    print(f"on {len(judge)} held-out examples: " + ", ".join(f"{_said(k)} {v:.4f}" for k, v in found.items()))
    print(f"model  {saved}\n" + (f"curve  {curve}\n" if curve else ""), end="")
    return 0


def _samples(args: Reward, loaded: Loaded, examples: Sequence[Pair | Labelled]) -> Generation | None:
    """What the model that the reward model begins as answers to the prompts; None: not asked for."""
    if not args.normalize:
        return None
    if args.normalize < 2 or args.normalize_tokens < 1:
        raise ValueError(
            f"--normalize needs at least 2 responses of at least 1 token, got {args.normalize} of "
            f"{args.normalize_tokens}"
        )
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(args.config.seed))
    chosen = [examples[order[i % len(order)]] for i in range(args.normalize)]
    # A text without a prompt follows the end of another.
    begin = first_ids(loaded.tokenizer) or [loaded.stop]
    prompts = [_asked(example, loaded.tokenizer)[-args.config.max_tokens :] or begin for example in chosen]
    return generate(
        loaded.model, prompts, max_new_tokens=args.normalize_tokens, stop=loaded.stop,
        pad=loaded.tokenizer.pad, seeds=range(args.config.seed, args.config.seed + len(prompts)),
    )  # fmt: skip


def _normalized(model: RewardModel, samples: Generation) -> str:
    """Normalises what was trained, and says so; where all rewards are equal the model is kept as it is."""
    try:
        mean, deviation = ModelReward(model).normalize_on(samples)
    except ValueError as error:
        return f"rewards after training are not normalised: {error}"
    said = f"mean {mean:.3f} and deviation {deviation:.3f}, now 0 and 1"
    return f"rewards of {len(samples.tokens)} responses after training: {said}"


def _asked(example: Pair | Labelled, tokenizer: Tokenizer) -> list[int]:
    """Ids of an example's prompt: those that were sampled after, where they are known."""
    tokens = getattr(example, "tokens", None)
    return prompt_ids(tokenizer, example.prompt) if tokens is None else list(tokens[0])


def _said(name: str) -> str:
    return name.removeprefix("held_out_").replace("_", " ")


def load_reward(path: Path, tokenizer: Tokenizer, on: str | None) -> Callable[[Generation], Tensor]:
    """The reward model of a run, for texts in these tokens; ValueError where it reads others."""
    file = weights_file(path)
    model = load_reward_model(file, device=device(on))
    check_fits(tokenizer, model.palm)
    kept = metadata(file)
    if "tokenizer" in kept and not same_tokens(kept_tokenizer(kept, file), tokenizer):
        raise ValueError(
            f"the reward model {path} reads other tokens ({kept['tokenizer']}) than the model writes "
            f"({tokenizer.name}). Train it on a model with the same tokenizer."
        )
    return ModelReward(model.requires_grad_(False))
