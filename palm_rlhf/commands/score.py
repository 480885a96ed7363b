"""`palm-rlhf score`: a number for each response of a file of samples."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from palm_rlhf.commands.stages import Scores, concluded
from palm_rlhf.pipeline.files import StageFile, digest, read_stage
from palm_rlhf.pipeline.scoring import scored


@dataclass
class Score:
    """Score sampled responses: the second stage. Stopped or killed, the same command goes on where it was.

    $ palm-rlhf score --samples runs/samples.jsonl --reward-model runs/reward --out runs/scored.jsonl
    $ palm-rlhf score --samples runs/samples.jsonl --reward score.py:polite --out runs/scored.jsonl
    """

    samples: Path
    """File of palm-rlhf sample."""
    out: Path
    """File of JSON lines, or .parquet, to write: the same with scores."""
    scores: Annotated[Scores, tyro.conf.arg(name="")] = field(default_factory=Scores)
    batch: int = 16
    """Prompts at a time."""
    device: str | None = None
    """cpu or cuda; default: the GPU if there is one."""
    quiet: bool = False
    """No progress bar."""
    json: bool = False
    """The summary as one JSON object."""


FORM = Score


def run(args: Score, line: str) -> int:
    """Scores what is not there yet."""
    if args.batch < 1:
        raise ValueError(f"--batch must be at least 1, got {args.batch}")
    if args.out.resolve() == args.samples.resolve():
        raise ValueError(f"--out {args.out} is the file of samples itself. Choose another file.")
    rows, made = read_stage(args.samples, "sample")
    made.pop("summary", None)
    scorer = args.scores.scorer(made["tokenizer"], args.device)
    config = {
        "stage": "score",
        "samples": str(args.samples),
        "samples_version": digest(args.samples),
        **args.scores.identity(),
        "batch": args.batch,
        **{name: made[name] for name in ("tokenizer", "sampling", "template")},
    }
    file, began = StageFile(args.out, config), time.perf_counter()
    batches = [rows[i : i + args.batch] for i in range(0, len(rows), args.batch)]
    done = file.write(batches, lambda part: scored(part, scorer), name="score", show=not args.quiet)
    summary = _summary(done) | {"out": str(args.out)}
    if cut := getattr(scorer, "cut", 0):
        summary["cut"] = cut
    if not file.complete:
        file.finish(summary)
    summary["seconds"] = time.perf_counter() - began
    return concluded(
        summary,
        args.json,
        [
            f"{summary['responses']} responses: mean score {summary['mean']:.4f}, mean of the best "
            f"{summary['best']:.4f}, of the worst {summary['worst']:.4f}",
            *([f"{cut} texts lost their beginning, to fit the reward model"] if cut else []),
            f"file   {args.out}",
            f"next   palm-rlhf pairs --scored {args.out} --out {args.out.with_name('pairs.jsonl')}",
        ],
    )


def _summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    scores = [score for row in rows for score in row["scores"]]
    return {
        "stage": "score",
        "prompts": len(rows),
        "responses": len(scores),
        "mean": statistics.fmean(scores),
        "deviation": statistics.pstdev(scores),
        "best": statistics.fmean(max(row["scores"]) for row in rows),
        "worst": statistics.fmean(min(row["scores"]) for row in rows),
    }
