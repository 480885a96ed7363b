"""`palm-rlhf rollouts`: what a run sampled, as `palm-rlhf train ... --keep-rollouts` keeps it."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from palm_rlhf.commands.common import WEIGHTS, Loaded, hf_name, load_model
from palm_rlhf.commands.terminal import visible
from palm_rlhf.pipeline.files import config_path
from palm_rlhf.rollout import Rollout
from palm_rlhf.rollout.store import FILE, RolloutStore
from palm_rlhf.tasks.rows import encoded
from palm_rlhf.tokens import identity, prompt_text
from rlhf_kernels.runtime.files import write_aside

FOLDER = "rollouts"
# Of a pair, as palm_rlhf.tasks.pairs reads it.
_SIDES = ("prompt", "chosen", "rejected")


@dataclass
class Rollouts:
    """List the rollouts of a run, show responses of one, or make pairs of all to train on.

    $ palm-rlhf rollouts --run runs/grpo
    $ palm-rlhf rollouts --run runs/grpo --step -1 --show 5
    $ palm-rlhf rollouts --run runs/grpo --pairs pairs.jsonl
    """

    run: Path
    """Folder of a run with --keep-rollouts, or of a store."""
    step: int | None = None
    """Show responses of this rollout, counted from 0; -1 is the last."""
    show: int = 10
    """So many of them: the best, by reward."""
    worst: bool = False
    """The worst instead."""
    pairs: Path | None = None
    """Write the best and the worst response to each prompt here, for palm-rlhf train dpo --pairs FILE."""
    model: Path | None = None
    """Run whose tokenizer decodes; default: this run's, or that of the model that it began with."""
    json: bool = False
    """One JSON object a line, with log-probability and seed."""


FORM = Rollouts


def run(args: Rollouts, line: str) -> int:
    """Prints a line for each rollout, or for each response; or writes pairs."""
    folder = args.run / FOLDER if (args.run / FOLDER).is_dir() else args.run
    if not args.run.exists():
        raise ValueError(f"--run {args.run}: there is no such folder")
    if not (folder / FILE).is_file():
        raise ValueError(f"{args.run} has no rollouts. Train with --keep-rollouts to keep them.")
    if args.show < 1:
        raise ValueError(f"--show must be at least 1, got {args.show}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        store = RolloutStore(folder)
    if args.pairs is not None:
        return _pairs(args, store)
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


def _place(step: int, store: RolloutStore) -> int:
    """Which rollout is that of a step."""
    steps = [about["step"] for about in store.rollouts]
    if step < 0 and -step <= len(steps):
        return len(steps) + step
    if step not in steps:
        there = f"{steps[0]} to {steps[-1]}" if steps else "none"
        raise ValueError(f"there is no rollout of step {step}; there are: {there}")
    return steps.index(step)


def _pairs(args: Rollouts, store: RolloutStore) -> int:
    """Writes a pair for each prompt whose responses differ in reward; equal pairs once."""
    chosen = range(len(store.rollouts)) if args.step is None else [_place(args.step, store)]
    loaded, found, heats = _loaded(args), {}, set()
    for rollout in map(store.rollout, chosen):
        heats.add(rollout.temperature)
        group = torch.arange(len(rollout)) if rollout.group is None else rollout.group
        for number in group.unique():
            rows = (group == number).nonzero().squeeze(1)
            best, worst = (
                int(rows[place]) for place in (rollout.score[rows].argmax(), rollout.score[rows].argmin())
            )
            pair = _pair(rollout, best, worst, loaded)
            if pair is not None:
                found[tuple(tuple(pair[f"{name}_tokens"]) for name in _SIDES)] = pair
    if not found:
        raise ValueError(
            f"{args.run} has no two responses to one prompt with different rewards. Train with --samples 2 "
            "or more."
        )
    write_aside(args.pairs, encoded(args.pairs, list(found.values())))
    # As palm-rlhf pairs says it: whose tokens they are, and how they were drawn.
    sampling = {"temperature": heats.pop() if len(heats) == 1 else None}
    made = {"stage": "rollouts", "tokenizer": identity(loaded.tokenizer), "sampling": sampling}
    write_aside(config_path(args.pairs), json.dumps(made, indent=1))
    said = {"pairs": len(found), "rollouts": len(chosen), "out": str(args.pairs)}
    print(json.dumps(said) if args.json else f"{len(found)} pairs of {len(chosen)} rollouts  {args.pairs}")
    return 0


def _pair(rollout: Rollout, best: int, worst: int, loaded: Loaded) -> dict[str, Any] | None:
    """Two responses to one prompt, as texts and as sampled tokens; None where none is better."""
    g, margin = rollout.generation, float(rollout.score[best] - rollout.score[worst])
    good, bad = (_entry(rollout, row, loaded) for row in (best, worst))
    chosen, rejected = good["response"], bad["response"]
    if not (margin > 0 and chosen and rejected and chosen != rejected):
        return None
    tokens = (g.prompt(best), g.response(best), g.response(worst))
    texts = dict(zip(_SIDES, (good["prompt"], chosen, rejected)))
    return texts | {"margin": margin} | {f"{name}_tokens": ids for name, ids in zip(_SIDES, tokens)}


def _responses(args: Rollouts, store: RolloutStore) -> int:
    rollout = store.rollout(_place(args.step, store))
    order = rollout.score.argsort(descending=not args.worst, stable=True)[: args.show]
    loaded = _loaded(args)
    for row in order.tolist():
        entry = _entry(rollout, row, loaded)
        print(
            json.dumps(entry)
            if args.json
            else visible(f"[{entry['reward']:.3f}] {entry['prompt']}{entry['response']}")
        )
    return 0


def _entry(rollout: Rollout, row: int, loaded: Loaded) -> dict[str, Any]:
    g = rollout.generation
    ended = (loaded.stop,) if bool(g.stopped[row]) else ()
    prompt = prompt_text(loaded.tokenizer, g.prompt(row))
    response = loaded.tokenizer.decode(g.response(row, without=ended))
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
    if (args.run / WEIGHTS).is_file() or hf_name(args.run) is not None:
        return load_model(args.run, tokenizer=None, on="cpu")
    from palm_rlhf.commands.steps import begun_with

    if not (args.run / "config.json").is_file():
        raise ValueError(f"{args.run} does not say what its tokens are. Give --model RUN.")
    return begun_with(args.run, on="cpu")
