"""`palm-rlhf sft`: from text to a model."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from palm_rlhf.commands.common import (
    FACTORS,
    HFOptions,
    Loaded,
    Tuning,
    device,
    load_model,
    make_task,
    merged,
    save_model,
)
from palm_rlhf.commands.runs import Run
from palm_rlhf.models.palm import PaLM
from palm_rlhf.tasks import calculator, text
from palm_rlhf.tokens import Tokenizer, load_tokenizer, stop_token
from palm_rlhf.trainers.sft import SFTConfig, SFTTrainer

# Of a model that is made anew.
_SHAPE = {"dim": 128, "depth": 4, "heads": 4, "dim_head": 32, "ff_mult": 4}


@dataclass
class SFT:
    """Train a model on text: from nothing, or further (--model).

    $ palm-rlhf sft --text book.txt --out runs/book
    $ palm-rlhf sft --task calculator --out runs/sft
    """

    out: Path
    """Folder of the run. If it is there, the run goes on."""
    text: Path | None = None
    """UTF-8 text to imitate, in windows of --length tokens."""
    lines: bool = False
    """Each line of --text is a sample of its own, with a stop token."""
    task: Literal["calculator"] | None = None
    """Imitate the solved problems of this task instead."""
    gsm8k: Path | None = None
    """Instead: the products among the calculator steps in GSM8K's train.jsonl."""
    factors: tuple[int, int] = FACTORS
    """Largest first and second factor in --task calculator."""
    model: Path | None = None
    """Start from this run, file or model of transformers (its folder, or hf:NAME), not from nothing."""
    tokenizer: str | None = None
    """'bytes' (default), a Hugging Face tokenizer.json, or hf:NAME; with --model, the model's own."""
    pad_token: str | None = None
    """Name of the padding token in --tokenizer, if it is unusual."""
    stop_token: str | None = None
    """Name of the token that ends a text in --tokenizer, if it is unusual."""
    dim: int | None = None
    """Width of a new model; default 128."""
    depth: int | None = None
    """Blocks of a new model; default 4."""
    heads: int | None = None
    """Query heads of a new model; default 4."""
    dim_head: int | None = None
    """Size of a head of a new model; default 32."""
    ff_mult: int | None = None
    """Inner width of the feed-forward over --dim of a new model; default 4."""
    length: int = 128
    """Tokens of a window, or of a line at most."""
    held_back: float = 0.05
    """Share of the text that is not trained on, for validation_loss."""
    config: Annotated[SFTConfig, tyro.conf.arg(name="")] = field(default_factory=SFTConfig)
    tuning: Annotated[Tuning, tyro.conf.arg(name="")] = field(default_factory=partial(Tuning, lora=False))
    save_every: int = 100
    """Steps between checkpoints."""
    hf: Annotated[HFOptions, tyro.conf.arg(name="")] = field(default_factory=HFOptions)
    device: str | None = None
    """cpu or cuda; default: the GPU if there is one."""
    quiet: bool = False
    """No progress bar."""


FORM = SFT


def run(args: SFT, line: str) -> int:
    """Trains, and writes the model."""
    folder = Run("sft", args, line)
    if sum(source is not None for source in (args.text, args.task, args.gsm8k)) != 1:
        raise ValueError("give one text to learn from: --text FILE, --task calculator, or --gsm8k FILE")
    if args.lines and args.text is None:
        raise ValueError("--lines belongs to --text: a task is learned problem by problem anyway")
    task = make_task(args.task, args.gsm8k, args.factors)
    loaded = _model(args)
    stop = stop_token(loaded.tokenizer, task.stop) if task else loaded.tokenizer.stop
    samples, held_back = _samples(args, task, loaded.tokenizer, stop)
    if args.tuning.lora:
        torch.manual_seed(args.config.seed)
    policy = args.tuning.policy(loaded.model)
    trainer = SFTTrainer(
        loaded.model, samples, held_back, args.config, policy.scope, last_layers=policy.last_layers
    )
    rows = folder.train(trainer, ("loss", "validation_loss"))
    policy = policy.of(trainer.ranks.whole(policy.model))
    if not folder.main:
        return 0
    saved = save_model(folder.folder, Loaded(merged(policy), loaded.tokenizer, stop))
    curve = folder.draw(rows, ("loss", "validation_loss", "lr"), line)
    last = next((row for row in reversed(rows) if row.get("validation_loss") is not None), None)
    if last is not None:
        print(
            f"validation loss {last['validation_loss']:.4f}, perplexity {last['validation_perplexity']:.3f}"
        )
    print(f"model  {saved}\n" + (f"curve  {curve}\n" if curve else ""), end="")
    prompt = task.held_out[0] if task else "Once"
    print(f'next   palm-rlhf generate --model {args.out} --prompt "{prompt}"')
    return 0


def _model(args: SFT) -> Loaded:
    given = {name: getattr(args, name) for name in _SHAPE if getattr(args, name) is not None}
    if args.model is not None:
        if given:
            name = next(iter(given)).replace("_", "-")
            raise ValueError(
                f"--{name} is of a new model, and --model {args.model} has its own. Leave one of them out."
            )
        return load_model(
            args.model,
            tokenizer=args.tokenizer,
            pad=args.pad_token,
            stop=args.stop_token,
            on=args.device,
            hf=args.hf,
        )
    if args.hf != HFOptions(args.hf.chat, args.hf.system):
        raise ValueError("--dtype, --patch and --checkpoint-layers are for a --model of transformers")
    tokenizer = load_tokenizer(
        args.tokenizer or "bytes",
        pad=args.pad_token,
        stop=args.stop_token,
        chat=args.hf.chat,
        system=args.hf.system,
    )
    where = device(args.device)
    torch.manual_seed(args.config.seed)
    model = PaLM(num_tokens=tokenizer.vocabulary, **{**_SHAPE, **given}).to(where)
    return Loaded(model, tokenizer, tokenizer.stop)


def _samples(
    args: SFT, task: calculator.Calculator | None, tokenizer: Tokenizer, stop: int
) -> tuple[text.Samples, text.Samples]:
    if task is not None:
        judge = [(prompt, calculator.answer(prompt)) for prompt in task.held_out]
        train, judge = (
            text.lines(texts, tokenizer, stop=stop, length=args.length, what=task.name)
            for texts in (task.solved, judge)
        )
        return train, judge
    if args.lines:
        found = text.lines(
            text.read_lines(args.text), tokenizer, stop=stop, length=args.length, what=str(args.text)
        )
        return found.divided(args.held_back, torch.Generator().manual_seed(args.config.seed))
    return text.windows(text.read_text(args.text), tokenizer, args.length, what=str(args.text)).divided(
        args.held_back
    )
