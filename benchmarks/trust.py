"""May one trust `regress`? The same code twice, and slow-downs of known size, beside what else is running.

    python benchmarks/trust.py                      40 times the same code, 20 times the slow-downs: hours
    python benchmarks/trust.py --quick              a few minutes, too few for a claim
    python benchmarks/trust.py --summary FILE       what a file says

Each repetition is what `rlhf-kernels regress` does with what it has built. `same` measures real ops against
themselves: whatever is called faster or slower is a false alarm. `planted` lets one side make 3, 5, 10 or 20
passes over its data more than a hundred (benchmarks/trust_ops): no sleep, the same kernel. `as_is` is the
machine with whatever else runs on it (`running` says how much); `busy` adds a process that copies memory
without end; any other name is a note on the machine as it is. A repetition is one JSON line, kept when the
study is interrupted and continued by the next call with the same file.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path

from rlhf_kernels.engine import table
from rlhf_kernels.engine.campaign import Place
from rlhf_kernels.engine.compare import VERDICTS
from rlhf_kernels.engine.fingerprint import fingerprint
from rlhf_kernels.engine.regress import Regression
from rlhf_kernels.engine.spec import load_specs
from rlhf_kernels.engine.turns import SIDES, Side, Target

HERE = Path(__file__).parent
ROOT = HERE.parent
SAME = [
    Target(op, case, "float32", "forward", "native")
    for op, case in (
        ("swiglu", "small_64x512"), ("swiglu", "gate_first_1024x1024"), ("gae", "ppo_64x1024"),
        ("masked_normalize", "ppo_512x1024"), ("layer_norm", "plain_2048x512"),
    )
]  # fmt: skip
SPECS = load_specs("trust_ops.spec")["trust_passes"]
PLANTED = [Target("trust_passes", case.name, "float32", "forward", "native") for case in SPECS.cases]
_NAMES = {"": "the same code"} | {
    case.name: f"{case.options['extra']} % planted, {place}"
    for walk, place in ((False, "in the cache"), (True, "walking through memory"))
    for case in SPECS.cases
    if case.options["walk"] == walk
}
_COPY = "b = bytearray(1 << 24)\nwhile True: bytes(b)"


@contextmanager
def load(kind: str) -> Iterator[None]:
    """A process copies memory where kind is busy."""
    if kind != "busy":
        yield
        return
    other = subprocess.Popen([sys.executable, "-c", _COPY])
    try:
        yield
    finally:
        other.kill()
        other.wait()


def repetition(planted: bool, pairs: int | None, seconds: float, seed: int) -> list[dict]:
    """One comparison: the verdict on each target."""
    targets, package = (PLANTED, "trust_ops.spec") if planted else (SAME, "rlhf_kernels.ops")
    sides = {
        side: Side(ROOT, (HERE, ROOT), {"TRUST_PLANTED": str(int(planted and side == "head"))})
        for side in SIDES
    }
    found = Regression(ROOT, SIDES, Place(package=package), targets, pairs, seconds, seed=seed)
    found.by_turns(sides, lambda *_: None, lambda: None)
    kept = ("op", "case", "verdict", "ratio", "ratio_ci", "p", "processes", "base_us", "reason")
    rows = [row.to_json() for row in found.report().rows]
    return [{name: row[name] for name in kept} for row in rows]


def study(args: argparse.Namespace) -> None:
    """All repetitions that the file does not hold yet, kinds and loads by turns."""
    done = Counter((line["what"], line["load"]) for line in _lines(args.out))
    todo = [("same", kind, args.same) for kind in args.load]
    todo += [("planted", kind, args.planted) for kind in args.load]
    for number in range(max(count for *_, count in todo)):
        for what, kind, count in todo:
            if not done[what, kind] <= number < count:
                continue
            start = time.time()
            with load(kind):
                rows = repetition(what == "planted", args.pairs, args.seconds, seed=number)
            line = {
                "what": what, "load": kind, "repetition": number, "rows": rows,
                "took": round(time.time() - start, 1), "running": os.getloadavg()[0],
                "started": round(start), "fingerprint": fingerprint(),
            }  # fmt: skip
            with args.out.open("a") as file:
                file.write(json.dumps(line) + "\n")
            said = ", ".join(f"{row['verdict']} {row['ratio'] - 1:+.1%}" for row in rows)
            print(f"{what} {kind} {number + 1}/{count} ({line['took']} s): {said}", flush=True)


def _lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def summary(path: Path) -> None:
    """Verdicts by kind and load, and the share that is called, with its interval."""
    counts: dict[tuple[str, str], Counter] = {}
    lines = _lines(path)
    for line in lines:
        for row in line["rows"]:
            name = _NAMES[row["case"]] if line["what"] == "planted" else "the same code"
            counts.setdefault((name, line["load"]), Counter())[row["verdict"]] += 1
    order = list(_NAMES.values())
    rows = []
    for name, kind in sorted(counts, key=lambda key: (key[1], order.index(key[0]))):
        found = counts[name, kind]
        called, total = found["slower"] + found["faster"], found.total()
        low, high = shares(called, total)
        rows.append(
            [name, kind, str(total), *(str(found[verdict]) for verdict in VERDICTS),
             f"{called / total:.1%}", f"{low:.1%} to {high:.1%}"]
        )  # fmt: skip
    table.print_table(("what", "machine", ">rows", *(f">{v}" for v in VERDICTS), ">called", ">95 %"), rows)
    for kind in sorted({line["load"] for line in lines}):
        some = [line for line in lines if line["load"] == kind]
        running, commits = (
            [line["running"] for line in some],
            {line["fingerprint"]["commit"] for line in some},
        )
        print(
            f"{kind}: {len(some)} repetitions, {sum(line['took'] for line in some) / 60:.0f} minutes, load "
            f"average {min(running):.1f} to {max(running):.1f}, commit {', '.join(sorted(commits))}"
        )


def shares(found: int, of: int, level: float = 0.95) -> tuple[float, float]:
    """The exact interval of a share (Clopper and Pearson 1934), by bisection."""

    def at_most(count: int, share: float) -> float:
        return sum(math.comb(of, i) * share**i * (1 - share) ** (of - i) for i in range(count + 1))

    def solve(above: Callable[[float], bool]) -> float:
        low, high = 0.0, 1.0
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (low, middle) if above(middle) else (middle, high)
        return high

    tail = (1 - level) / 2
    low = solve(lambda share: 1 - at_most(found - 1, share) > tail) if found else 0.0
    return low, solve(lambda share: at_most(found, share) < tail) if found < of else 1.0


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="each once")
    parser.add_argument("--same", type=int, default=40, help="repetitions of the same code, each load")
    parser.add_argument("--planted", type=int, default=20, help="repetitions of all slow-downs, each load")
    parser.add_argument("--load", type=lambda text: text.split(","), default=["as_is", "busy"])
    parser.add_argument("--pairs", type=int, help="of processes; as many as regress takes")
    parser.add_argument("--seconds", type=float, default=0.3, help="for a target in one pair")
    parser.add_argument("--out", type=Path, default=HERE / "results" / f"trust-cpu-{date.today()}.jsonl")
    parser.add_argument("--summary", type=Path, metavar="FILE", help="read this and measure nothing")
    args = parser.parse_args()
    if args.summary:
        return summary(args.summary)
    if args.quick:
        args.same = args.planted = 1
        args.load = ["as_is"]
    try:
        study(args)
    except KeyboardInterrupt:
        print("interrupted: what is finished is kept", file=sys.stderr)
    return summary(args.out)


if __name__ == "__main__":
    main()
