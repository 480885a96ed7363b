"""Pairs of hh-rlhf (harmless-base): which share of held-out ones a reward model and DPO get right.

    python benchmarks/learning/preferences.py --rows reward dpo --seeds 1

Of the 2,312 pairs in harmless-base-test.jsonl.gz JUDGED are held out. The reward model reads the last LENGTH
tokens of a dialogue, DPO what fits of its last turn and of what came before.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from rows import DATA, RESULTS, Start, learned_tokenizer, offline, write

from palm_rlhf.algorithms.offline_table import PAIR_ALGORITHMS
from palm_rlhf.models.palm import PaLM
from palm_rlhf.rewards import RewardModel
from palm_rlhf.tasks import text
from palm_rlhf.tasks.pairs import Pair, read_pairs, split_examples
from palm_rlhf.trainers.offline import OfflineConfig
from palm_rlhf.trainers.reward import RewardConfig, RewardTrainer
from palm_rlhf.trainers.sft import SFTConfig, SFTTrainer

JUDGED, LENGTH, VOCABULARY = 412, 128, 2000
SHAPE = {"dim": 64, "depth": 2, "heads": 4, "dim_head": 16, "ff_mult": 2}
SFT = SFTConfig(steps=200, batch=16, lr=3e-3, warmup=20, final_lr=0.0)
REWARD = RewardConfig(epochs=2, batch=16, lr=1e-3, weight_decay=0.1, max_tokens=LENGTH, eval_every=1000)
OFFLINE = OfflineConfig(epochs=1, batch=16, lr=3e-4, warmup=10, max_tokens=LENGTH, eval_every=1000)


def start(train: Sequence[Pair], seed: int) -> Start:
    """A language model of the preferred dialogues."""
    tokens = learned_tokenizer([pair.chosen for pair in train], VOCABULARY, apart=True)
    torch.manual_seed(seed)
    model = PaLM(num_tokens=tokens.vocabulary, **SHAPE)
    read = text.windows("\n".join(pair.chosen for pair in train), tokens, LENGTH)
    trainer = SFTTrainer(model, read, None, replace(SFT, seed=seed))
    for i in range(SFT.steps):
        trainer.step(i)
    return Start(model, tokens, tokens.stop)


def reward(begin: Start, train: Sequence[Pair], judge: Sequence[Pair], seed: int):
    """Settings and metrics of the reward model."""
    scorer = RewardModel(copy.deepcopy(begin.model), dropout=0.2, use_lora=False, pooling="mean")
    config = replace(REWARD, seed=seed)
    trainer = RewardTrainer(scorer, train, begin.tokenizer, config=config, held_out=judge)
    return config, [{"step": i + 1, **trainer.step(i)} for i in range(trainer.steps)]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", nargs="+", choices=["reward", *PAIR_ALGORITHMS], default=["reward", "dpo"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--out", type=Path, default=RESULTS / "preferences")
    args = parser.parse_args()
    torch.set_num_threads(1)
    pairs = read_pairs(DATA / "hh-rlhf" / "harmless-base-test.jsonl.gz")
    train, judge = split_examples(pairs, JUDGED / len(pairs), seed=0)
    for seed in args.seeds:
        begin = start(train, seed)
        for name in args.rows:
            path, began = args.out / f"{name}-{seed}.json", time.process_time()
            if path.exists():
                print(f"{path.name}: is there", flush=True)
                continue
            if name == "reward":
                config, metrics = reward(begin, train, judge, seed)
            else:
                config = replace(OFFLINE, seed=seed)
                metrics = offline(name, begin, train, config, {}, judge)[1]
            accuracy = metrics[-1]["held_out_accuracy"]
            write(
                path, metrics, row=name, seed=seed, settings=asdict(config) | SHAPE, pairs=len(train),
                held_out=len(judge), after={"accuracy": accuracy},
                processor_seconds=round(time.process_time() - began, 1),
            )  # fmt: skip
            print(f"{path.name}: {accuracy:.3f} of {len(judge)} held-out pairs", flush=True)


if __name__ == "__main__":
    main()
