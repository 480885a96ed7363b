"""`palm-rlhf pairs`: the best and the worst response to each prompt, in files to train and to judge."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from palm_rlhf.commands.stages import concluded
from palm_rlhf.pipeline.files import check_suffix, config_path, digest, read_stage, stage_config
from palm_rlhf.pipeline.pairs import PairOptions, choose, split
from palm_rlhf.tasks.rows import encoded
from rlhf_kernels.runtime.files import write_aside


@dataclass
class Pairs:
    """Make pairs of scored responses: the third stage, before palm-rlhf train rebel --pairs.

    $ palm-rlhf pairs --scored runs/scored.jsonl --out runs/pairs.jsonl --test 0.1
    """

    out: Path
    """JSON lines or .parquet to write; those that judge go to the same name with .test before its end."""
    scored: tuple[Path, ...] = ()
    """One or more files of palm-rlhf score."""
    choice: Annotated[PairOptions, tyro.conf.arg(name="")] = field(default_factory=PairOptions)
    test: float = 0.1
    """Share of the pairs that judge; from 1 on their number; 0: none. Those of one prompt stay together."""
    seed: int = 0
    """Of which pairs judge."""
    json: bool = False
    """The summary as one JSON object."""


FORM = Pairs


def run(args: Pairs, line: str) -> int:
    """Writes the pairs; there is nothing to resume, and the same command writes the same files."""
    if not args.scored:
        raise ValueError("--scored must be given: one or more files of palm-rlhf score")
    check_suffix(args.out)
    if args.out.exists() and (stage_config(args.out) or {}).get("stage") != "pairs":
        raise ValueError(
            f"--out {args.out} is there, and palm-rlhf pairs did not write it. Choose another file."
        )
    judged = args.out.with_name(f"{args.out.stem}.test{args.out.suffix}")
    rows, made = _read(args)
    chosen, dropped = choose(rows, args.choice)
    if not chosen:
        raise ValueError(f"no pair is left of {len(rows)} prompts: {_said(dropped)}")
    train, test = split(chosen, args.test, args.seed)
    margins = [pair["margin"] for pair in chosen]
    summary = {
        "stage": "pairs", "prompts": len(rows), "responses": sum(len(row["responses"]) for row in rows),
        "dropped": dropped, "pairs": len(train), "test": len(test),
        "margin": {"mean": statistics.fmean(margins), "least": min(margins), "most": max(margins)},
        "out": str(args.out), "test_out": str(judged) if test else None,
    }  # fmt: skip
    config = {
        "stage": "pairs",
        "scored": {str(path): digest(path) for path in args.scored},
        **asdict(args.choice),
        "test": args.test,
        "seed": args.seed,
        **made,
    }
    for path, pairs in ((judged, test), (args.out, train)):
        if pairs or path == args.out:
            write_aside(path, encoded(path, pairs))
            write_aside(config_path(path), json.dumps({**config, "summary": summary}, indent=1))
        else:
            path.unlink(missing_ok=True)  # of an earlier call that split some off
    heat = made["sampling"]["temperature"]
    return concluded(
        summary,
        args.json,
        [
            f"{len(chosen)} pairs of {len(rows)} prompts: {len(train)} to train on, {len(test)} to judge by; "
            f"the best is {summary['margin']['mean']:.4f} better on average",
            f"dropped: {_said(dropped)}",
            f"file   {args.out}" + (f" and {judged}" if test else ""),
            f"next   palm-rlhf train rebel --pairs {args.out} "
            + (f"--test-pairs {judged} " if test else "")
            + (f"--temperature {heat:g} " if heat else "")
            + ("--chat " if made["template"] == "own" else "")
            + "--model RUN --out FOLDER",
        ],
    )


def _read(args: Pairs) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows of all files; ValueError where they were sampled in different ways."""
    rows: list[dict[str, Any]] = []
    made: dict[str, Any] = {}
    seen: dict[str, Path] = {}
    for path in args.scored:
        more, config = read_stage(path, "score")
        if (other := seen.setdefault(digest(path), path)) is not path:
            raise ValueError(f"--scored: {path} holds what {other} holds. Its pairs would count twice.")
        config = {name: config[name] for name in ("tokenizer", "sampling", "template")}
        for name in made:
            if made[name] != config[name]:
                raise ValueError(
                    f"{path} was sampled with {name} {config[name]}, and {args.scored[0]} with {made[name]}. "
                    "Make pairs of them one by one."
                )
        rows, made = rows + more, config
    return rows, made


def _said(dropped: dict[str, dict[str, int]]) -> str:
    parts = [
        f"{count} {what} ({reason})"
        for what, reasons in dropped.items()
        for reason, count in reasons.items()
        if count
    ]
    return ", ".join(parts) or "nothing"
