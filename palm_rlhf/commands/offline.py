"""`palm-rlhf train ALGORITHM --pairs FILE`: preferences with any row of the table of offline algorithms."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch
import tyro

from palm_rlhf.algorithms.offline_table import PAIR_ALGORITHMS, PairAlgorithm
from palm_rlhf.commands.common import HFOptions, Loaded, Tuning, load_model, merged, save_model
from palm_rlhf.commands.runs import Run
from palm_rlhf.commands.stages import check_origin
from palm_rlhf.models.value import Policy
from palm_rlhf.tasks.pairs import Pair, read_pairs, split_examples
from palm_rlhf.trainers.offline import OfflineConfig, OfflineTrainer

__all__ = ["PAIR_ALGORITHMS", "PairAlgorithm", "TrainPairs", "run"]


@dataclass
class TrainPairs:
    """Learn from pairs of responses to make the better one of each more probable.

    A line of --pairs is {"prompt": ..., "chosen": ..., "rejected": ..., "margin": 1.5}. The prompt may be
    left out; the margin, by how much the chosen one is better, as well, where the algorithm needs none.
    """

    model: Path
    """Run or file to start from, such as that of palm-rlhf sft, or a model of transformers: its folder, or
    hf:NAME with a name on the hub. It is the reference as well."""
    pairs: Path
    """Pairs as JSON lines or Parquet."""
    out: Path
    """Folder of the run. If it is there, the run goes on."""
    test_pairs: Path | None = None
    """Pairs that judge, such as those that palm-rlhf pairs split off."""
    held_back: float = 0.1
    """Without --test-pairs: share of the pairs that judge."""
    tokenizer: str | None = None
    """'bytes', a tokenizer.json or hf:NAME, for a --model that does not say what its tokens are."""
    tuning: Annotated[Tuning, tyro.conf.arg(name="")] = field(default_factory=Tuning)
    config: Annotated[OfflineConfig, tyro.conf.arg(name="")] = field(default_factory=OfflineConfig)
    save_every: int = 100
    """Steps between checkpoints."""
    keep: int = 2
    """Checkpoints that stay; palm-rlhf evaluate --run looks at all that are there."""
    hf: Annotated[HFOptions, tyro.conf.arg(name="")] = field(default_factory=HFOptions)
    device: str | None = None
    """cpu or cuda; default: the GPU if there is one."""
    quiet: bool = False
    """No progress bar."""


def run(args: TrainPairs, line: str) -> int:
    """Trains, and writes the model with the adapters merged."""
    folder = Run(f"train {args.algorithm.name}", args, line, grows="epochs")
    loaded = load_model(args.model, tokenizer=args.tokenizer, on=args.device, hf=args.hf)
    train, judge = _divided(args)
    check_origin(args.pairs, args.model, loaded, args.config.temperature)
    if args.test_pairs is not None:
        check_origin(args.test_pairs, args.model, loaded)
    torch.manual_seed(args.config.seed)  # of new adapters
    policy = args.tuning.policy(loaded.model)
    trainer = OfflineTrainer(
        args.algorithm,
        policy,
        train,
        loaded.tokenizer,
        config=args.config,
        options=args.options,
        reference=Policy(loaded.model),
        held_out=judge,
        stop=loaded.stop,
    )
    before = trainer.evaluate()
    rows = folder.train(trainer, ("loss", "accuracy", "held_out_accuracy"), steps=trainer.steps)
    after = trainer.evaluate()
    policy = policy.of(trainer.ranks.whole(policy.model))
    if not folder.main:
        return 0
    saved = save_model(folder.folder, Loaded(merged(policy), loaded.tokenizer, loaded.stop))
    curve = folder.draw(rows, ("loss", "held_out_loss", "accuracy", "held_out_accuracy", "margin"), line)
    said = ", ".join(
        f"{name} {before[name]:.4f} to {after[name]:.4f}" for name in ("loss", "accuracy", "margin")
    )
    print(f"on {len(judge)} held-out pairs: {said}")
    print(f"model  {saved}\n" + (f"curve  {curve}\n" if curve else ""), end="")
    return 0


def _divided(args: TrainPairs) -> tuple[list[Pair], list[Pair]]:
    """Pairs that are learned from and pairs that judge."""
    pairs = read_pairs(args.pairs)
    if args.test_pairs is None:
        return split_examples(pairs, args.held_back, args.config.seed)
    judge = read_pairs(args.test_pairs)
    if not pairs or not judge:
        raise ValueError(f"{args.test_pairs if pairs else args.pairs} has no pairs that differ")
    return pairs, judge
