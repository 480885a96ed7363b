"""`palm-rlhf rollouts`: what a run sampled, as `palm-rlhf train ... --keep-rollouts` keeps it."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from palm_rlhf.commands.common import WEIGHTS, Loaded, load_model
from palm_rlhf.rollout import Rollout
from palm_rlhf.rollout.store import FILE, RolloutStore

FOLDER = "rollouts"


@dataclass
class Rollouts:
    """List the rollouts of a run, or show responses of one.

    palm-rlhf rollouts --run runs/ppo
    palm-rlhf rollouts --run runs/ppo --step -1 --show 5
    """

    run: Path
    """Folder of a run with --keep-rollouts, or of a store."""
    step: int | None = None
    """Show responses of this rollout, counted from 0; -1 is the last."""
    show: int = 10
    """So many of them: the best, by reward."""
    worst: bool = False
    """The worst instead."""
    model: Path | None = None
    """Run whose tokenizer decodes; default: this run's, or that of the model that it began with."""
    json: bool = False
    """One JSON object a line, with log-probability and seed."""


FORM = Rollouts


def run(args: Rollouts, line: str) -> int:
    """Prints a line for each rollout, or for each response."""
    folder = args.run / FOLDER if (args.run / FOLDER).is_dir() else args.run
    if not (folder / FILE).is_file():
        raise ValueError(f"{args.run} has no rollouts. Train with --keep-rollouts to keep them.")
    if args.show < 1:
        raise ValueError(f"--show must be at least 1, got {args.show}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        store = RolloutStore(folder)
    if args.step is not None:
        return _responses(args, store)
    for about, rollout in zip(store.rollouts, store):
        entry = _summary(about, rollout)
        print(json.dumps(entry) if args.json else _line(entry))
    if not args.json:
        print(f"{len(store)} responses in {len(store.rollouts)} rollouts, {store.bytes / 1e6:.2f} MB")
        if store.dropped:
            print(store.dropped)
    return 0


def _summary(about: dict[str, Any], rollout: Rollout) -> dict[str, Any]:
    score = rollout.score.double()
    return {
        "step": about["step"], "responses": about["rows"], "reward": float(score.mean()),
        "deviation": float(score.std(correction=0)), "tokens": int(rollout.mask.sum()),
        "stopped": float(rollout.generation.stopped.double().mean()), "bytes": about["bytes"],
    }  # fmt: skip


def _line(entry: dict[str, Any]) -> str:
    length = entry["tokens"] / entry["responses"]
    return (
        f"step {entry['step']:5}  {entry['responses']:5} responses of {length:6.1f} tokens  "
        f"reward {entry['reward']:8.3f} +- {entry['deviation']:.3f}  stopped {entry['stopped']:4.0%}  "
        f"{entry['bytes'] / 1e3:8.1f} kB"
    )


def _responses(args: Rollouts, store: RolloutStore) -> int:
    steps = [about["step"] for about in store.rollouts]
    try:
        place = args.step if args.step < 0 else steps.index(args.step)
        rollout = store.rollout(place)
    except (ValueError, IndexError):
        there = f"{steps[0]} to {steps[-1]}" if steps else "none"
        raise ValueError(f"there is no rollout of step {args.step}; there are: {there}") from None
    order = rollout.score.argsort(descending=not args.worst, stable=True)[: args.show]
    loaded = _loaded(args)
    for row in order.tolist():
        entry = _entry(rollout, row, loaded)
        print(
            json.dumps(entry)
            if args.json
            else f"[{entry['reward']:.3f}] {entry['prompt']}{entry['response']}"
        )
    return 0


def _entry(rollout: Rollout, row: int, loaded: Loaded) -> dict[str, Any]:
    g = rollout.generation
    ended = (loaded.stop,) if bool(g.stopped[row]) else ()
    prompt, response = (loaded.tokenizer.decode(x) for x in (g.prompt(row), g.response(row, without=ended)))
    found = {
        "prompt": prompt, "response": response, "reward": float(rollout.score[row]),
        "tokens": int(rollout.mask[row].sum()), "logprob": float(g.logprob[row].sum()),
        "stopped": bool(g.stopped[row]), "seed": None if g.seeds is None else int(g.seeds[row]),
    }  # fmt: skip
    if rollout.reference_logprob is not None:
        drift = torch.where(rollout.mask[row], g.logprob[row] - rollout.reference_logprob[row], 0.0)
        found["kl"] = float(drift.sum())
    return found


def _loaded(args: Rollouts) -> Loaded:
    """The model whose tokenizer decodes: the run's, or while it is not finished what it began with."""
    if args.model is not None:
        return load_model(args.model, tokenizer=None, on="cpu")
    if (args.run / WEIGHTS).is_file():
        return load_model(args.run, tokenizer=None, on="cpu")
    try:
        config = json.loads((args.run / "config.json").read_bytes())
        began, tokenizer = Path(config["model"]), config.get("tokenizer")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{args.run} does not say what its tokens are. Give --model RUN.") from error
    return load_model(began, tokenizer=tokenizer, on="cpu")
