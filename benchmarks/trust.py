"""May one trust `regress`? The same code twice, and slow-downs of known size, beside what else is running.

    python benchmarks/trust.py                      40 times the same code, 20 times each slow-down: hours
    python benchmarks/trust.py --quick              a few minutes, too few for a claim
    python benchmarks/trust.py --summary FILE       what a file says

Each repetition is what `rlhf-kernels regress` does: pairs of processes that take their samples in turn, then
`compare`. `same` measures real ops against themselves: whatever is called faster or slower is a false alarm.
`planted` lets one side make 3, 5, 10 or 20 passes over its data more than a hundred (benchmarks/trust_ops):
no sleep, the same kernel. `as_is` is the machine with whatever else runs on it (`running` says how much);
`busy` adds a process that copies memory without end. A repetition is one JSON line, kept
when the study is interrupted and continued by the next call with the same file.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path

from rlhf_kernels.engine import table
from rlhf_kernels.engine.campaign import Place
from rlhf_kernels.engine.compare import VERDICTS, compare
from rlhf_kernels.engine.fingerprint import fingerprint
from rlhf_kernels.engine.store import Run
from rlhf_kernels.engine.turns import SIDES, Side, Target, Turns, pairs_needed

HERE = Path(__file__).parent
SAME = [
    Target(op, case, "float32", "forward", "native")
    for op, case in (
        ("swiglu", "small_64x512"), ("swiglu", "gate_first_1024x1024"), ("gae", "ppo_64x1024"),
        ("masked_normalize", "ppo_512x1024"), ("layer_norm", "plain_2048x512"),
    )
]  # fmt: skip
PLANTED = [
    Target("trust_passes", case, "float32", "forward", "native")
    for case in ("cached_16x512", "walking_6400x512")
]
LEVELS = (3, 5, 10, 20)
_COPY = "b = bytearray(1 << 24)\nwhile True: bytes(b)"


@contextmanager
def load(kind: str) -> Iterator[None]:
    """A process copies memory where kind is busy."""
    if kind == "as_is":
        yield
        return
    other = subprocess.Popen([sys.executable, "-c", _COPY])
    try:
        yield
    finally:
        other.kill()
        other.wait()


def repetition(level: int, pairs: int, seconds: float, seed: int) -> list[dict]:
    """One comparison: the verdict on each target; level 0 is the same code."""
    targets, package = (PLANTED, "trust_ops.spec") if level else (SAME, "rlhf_kernels.ops")
    paths = (HERE, HERE.parent)
    sides = {
        side: Side(HERE.parent, paths, {"TRUST_EXTRA": str(level) if side == "head" else "0"})
        for side in SIDES
    }
    turns = Turns(sides, Place(package=package), seconds, seed=seed)
    for number in range(pairs or pairs_needed(len(targets))):
        turns.pair(number, targets)
    runs = [Run("", {}, turns.rows(side), session="one", side=side) for side in SIDES]
    kept = ("op", "case", "verdict", "ratio", "ratio_ci", "p", "processes", "base_us", "reason")
    rows = [row.to_json() for row in compare(runs[:1], runs[1:]).rows]
    return [{name: row[name] for name in kept} for row in rows]


def study(args: argparse.Namespace) -> None:
    """All repetitions that the file does not hold yet, kinds and loads by turns."""
    done = Counter((line["level"], line["load"]) for line in _lines(args.out))
    todo = [(0, kind, args.same) for kind in args.load]
    todo += [(level, kind, args.planted) for level in args.levels for kind in args.load]
    for number in range(max(count for *_, count in todo)):
        for level, kind, count in todo:
            if not done[level, kind] <= number < count:
                continue
            start = time.time()
            with load(kind):
                rows = repetition(level, args.pairs, args.seconds, seed=number)
            line = {
                "level": level, "load": kind, "repetition": number, "rows": rows,
                "took": round(time.time() - start, 1), "running": os.getloadavg()[0],
                "started": round(start), "fingerprint": fingerprint(),
            }  # fmt: skip
            with args.out.open("a") as file:
                file.write(json.dumps(line) + "\n")
            said = ", ".join(f"{row['verdict']} {row['ratio'] - 1:+.1%}" for row in rows)
            print(f"{_name(level)} {kind} {number + 1}/{count} ({line['took']} s): {said}", flush=True)


def _lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _name(level: int) -> str:
    return f"planted {level} %" if level else "same"


def summary(path: Path) -> None:
    """Verdicts by kind and load, and the share that is called slower or faster."""
    counts: dict[tuple[int, str, str], Counter] = {}
    for line in _lines(path):
        for row in line["rows"]:
            case = "" if not line["level"] else row["case"]
            counts.setdefault((line["level"], line["load"], case), Counter())[row["verdict"]] += 1
    rows = [
        [_name(level), kind, case, *(str(found[v] or "") for v in VERDICTS[1:]),
         f"{(found['slower'] + found['faster']) / found.total():.1%}"]
        for (level, kind, case), found in sorted(counts.items())
    ]  # fmt: skip
    names = ("what", "machine", "case", *(f">{verdict}" for verdict in VERDICTS[1:]), ">called")
    table.print_table(names, rows)


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="the same code once, 5 and 20 %% once")
    parser.add_argument("--same", type=int, default=40, help="repetitions of the same code, each load")
    parser.add_argument("--planted", type=int, default=20, help="repetitions of each slow-down, each load")
    parser.add_argument("--levels", type=lambda text: [int(x) for x in text.split(",")], default=LEVELS)
    parser.add_argument("--load", type=lambda text: text.split(","), default=["as_is", "busy"])
    parser.add_argument("--pairs", type=int, default=0, help="of processes; as many as regress takes")
    parser.add_argument("--seconds", type=float, default=0.3, help="for a target in one pair")
    parser.add_argument("--out", type=Path, default=HERE / "results" / f"trust-cpu-{date.today()}.jsonl")
    parser.add_argument("--summary", type=Path, metavar="FILE", help="read this and measure nothing")
    args = parser.parse_args()
    if args.summary:
        return summary(args.summary)
    if args.quick:
        args.same = args.planted = 1
        args.levels, args.load = [5, 20], ["as_is"]
    try:
        study(args)
    except KeyboardInterrupt:
        print("interrupted: what is finished is kept", file=sys.stderr)
    return summary(args.out)


if __name__ == "__main__":
    main()
