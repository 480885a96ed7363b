"""Writes docs/learning.md from the raw files: python benchmarks/learning/tables.py

`--check` writes nothing and exits with 1 where the page is not what the files say.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rows import RATES, RESULTS, chosen_rate, compared, read

from palm_rlhf.algorithms.offline_table import PAIR_ALGORITHMS
from palm_rlhf.algorithms.table import ALGORITHMS
from palm_rlhf.evaluate import wilson
from rlhf_kernels.runtime.files import write_aside

PAGE = Path(__file__).parents[2] / "docs" / "learning.md"
TEXT = Path(__file__).with_name("learning.md.in")
KINDS = (("online", ALGORITHMS), ("offline", PAIR_ALGORITHMS))
# What says how good a model is.
JUDGED = {"arithmetic": "sampled", "sentiment": "positive"}
Run = dict[str, Any]
HELP = 5  # points


def percent(values: Sequence[float]) -> str:
    """The mean of shares over seeds, and all of them where there are more."""
    one = [f"{100 * value:.1f}" for value in values]
    return one[0] if len(one) == 1 else f"{100 * statistics.mean(values):.1f} ({', '.join(one)})"


def number(values: Sequence[float], digits: int = 2) -> str:
    """The mean over seeds."""
    return f"{statistics.mean(values):.{digits}f}"


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """In Markdown."""
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *lines))


def by_row(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """The runs of each row, in the order of the tables."""
    order = ["sft", "reward", *ALGORITHMS, *PAIR_ALGORITHMS]
    found: dict[str, list[Run]] = {}
    for run in sorted(runs, key=lambda run: (order.index(run["row"]), run["seed"])):
        found.setdefault(run["row"], []).append(run)
    return found


def of(runs: Sequence[Run], *keys: str) -> list[float]:
    """What lies under these keys in every run."""
    found: list[Any] = list(runs)
    for key in keys:
        found = [one[key] for one in found]
    return found


def gain(runs: Sequence[Run], key: str) -> str:
    """Points over the start, the mean over seeds and the least."""
    points = [100 * (run["after"][key] - run["before"][key]) for run in runs]
    mean = f"{statistics.mean(points):+.1f}"
    return mean if len(points) == 1 else f"{mean} (least {min(points):+.1f})"


def rows_of(runs: dict[str, list[Run]], cells: Callable[[list[Run]], list[str]]) -> list[list[str]]:
    """A line for each row of the two tables that was run."""
    return [
        [f"`{name}`", kind, str(len(runs[name])), *cells(runs[name])]
        for kind, names in KINDS
        for name in names
        if name in runs
    ]


def plainly(runs: dict[str, list[Run]], key: str) -> str:
    """Which rows do not help, and which were not run."""
    points = {
        name: 100 * statistics.mean(run["after"][key] - run["before"][key] for run in some)
        for name, some in runs.items()
        if "before" in some[0]
    }
    said = []
    for what, chosen in (
        (f"No help here, within {HELP} points of the start", lambda value: abs(value) < HELP),
        ("Worse than the start", lambda value: value <= -HELP),
    ):
        names = [f"`{name}` ({value:+.1f})" for name, value in points.items() if chosen(value)]
        said.append(f"{what}: {', '.join(names) or 'none'}.")
    return f"{' '.join(said)} {missing(runs)}"


def bar(what: str, wanted: str, found: str, met: bool) -> list[str]:
    """A line of the table of bars."""
    return [what, wanted, found, "met" if met else "missed"]


def seeds(runs: list[Run]) -> str:
    """How many there are."""
    return f"{len(runs)} seed{'s' * (len(runs) > 1)}"


def positive_bar(name: str, runs: list[Run]) -> list[str]:
    """Of sentiment: every seed must be there."""
    share, kl = of(runs, "after", "positive"), of(runs, "after", "kl")
    variety = [run["after"]["distinct_2"] / run["before"]["distinct_2"] for run in runs]
    return bar(
        f"sentiment, `{name}`, {seeds(runs)}",
        "85 % positive by the judge from about 50 %, KL at most 10, distinct-2 at least 70 %",
        f"{percent(of(runs, 'before', 'positive'))} to {percent(share)} %, KL at most {max(kl):.1f}, "
        f"at least {100 * min(variety):.0f} %",
        min(share) >= 0.85 and max(kl) <= 10 and min(variety) >= 0.7,
    )


def bars(runs: dict[str, dict[str, list[Run]]]) -> str:
    """What had to be true, and what is: the least over seeds where more is better."""
    lines, a, b = [], runs["sentiment"], runs["arithmetic"]
    for name in ("ppo", "grpo", "rloo"):
        if name in b:
            least = min(100 * (run["after"]["sampled"] - run["before"]["sampled"]) for run in b[name])
            what = f"arithmetic, `{name}`, {seeds(b[name])}"
            lines.append(bar(what, "+25 points on held-out problems", f"{least:+.1f}", least >= 25))
    for name in ("ppo", "grpo", "rloo"):
        if name in a:
            lines.append(positive_bar(name, a[name]))
    for run in a.get("sft", []):
        found = run["reward_accuracy"]
        what = f"reward model, seed {run['seed']}"
        lines.append(bar(what, "78 % on SST-2's development set", f"{100 * found:.1f} %", found >= 0.78))
    return table(("what", "bar", "figure", ""), lines)


def missing(runs: dict[str, list[Run]]) -> str:
    """What was not run."""
    left = [f"`{name}`" for _, names in KINDS for name in names if name not in runs]
    return f"Not run: {', '.join(left)}." if left else "Every row was run."


def arithmetic(runs: dict[str, list[Run]]) -> str:
    """Exact match on held-out problems."""
    head = ("row", "kind", "seeds", "sampled, %", "points", "greedy, %", "points", "KL, nats")

    def cells(some: list[Run]) -> list[str]:
        kl = [run["curve"][-1].get("kl_response") for run in some]
        return [
            percent(of(some, "after", "sampled")), gain(some, "sampled"),
            percent(of(some, "after", "greedy")), gain(some, "greedy"),
            number(kl) if None not in kl else "-",
        ]  # fmt: skip

    start = runs["sft"]
    lines = [
        ["SFT start", "", str(len(start)), percent(of(start, "after", "sampled")), "",
         percent(of(start, "after", "greedy")), "", "0"],
        ["best of 4 of the start", "", str(len(start)), percent(of(start, "after", "best_of_4")), "", "", "",
         ""],
    ]  # fmt: skip
    return f"{table(head, lines + rows_of(runs, cells))}\n\n{plainly(runs, 'sampled')}"


def sentiment(runs: dict[str, list[Run]]) -> str:
    """Positive continuations by the judge."""
    head = (
        "row", "kind", "seeds", "positive, %", "by VADER, %", "KL, nats", "distinct-2", "of the start's",
        "reward", "tokens",
    )  # fmt: skip

    def measured(some: Sequence[Run], key: str = "after") -> list[str]:
        first = [run.get("before", run["after"])["distinct_2"] for run in some]
        vader = [run[key]["positive_by_vader"] for run in some if "positive_by_vader" in run[key]]
        share = [run[key]["distinct_2"] / one for run, one in zip(some, first)]
        return [
            percent(of(some, key, "positive")), percent(vader) if len(vader) == len(some) else "-",
            number(of(some, key, "kl")),
            number(of(some, key, "distinct_2")), f"{100 * statistics.mean(share):.0f} %",
            number(of(some, key, "reward")), number(of(some, key, "tokens"), 1),
        ]  # fmt: skip

    start = runs["sft"]
    first, best = measured(start), measured(start, "best_of_4")
    first[2] = "0"
    best[2] = "0.64"  # log 4 - 3/4: of a choice, not of the samples' log-probabilities
    lines = [
        ["SFT start", "", str(len(start)), *first],
        ["best of 4 of the start", "", str(len(start)), *best],
    ]
    return f"{table(head, lines + rows_of(runs, measured))}\n\n{plainly(runs, 'positive')}"


def judges(runs: dict[str, list[Run]]) -> str:
    """The reward model and the judge on SST-2's development set."""
    lines, start = [], runs["sft"]
    for what, label in (("reward", "reward"), ("judge", "judge"), ("vader", "VADER")):
        for run in start:
            if f"{what}_accuracy" not in run:
                continue
            share, total = run[f"{what}_accuracy"], run["dev"]
            _, low, high, _ = wilson(share * total, total)
            called = [run.get(f"{what}_on_{kind}") for kind in ("positive", "negative")]
            lines.append(
                [label, str(run["seed"]), str(run.get(f"{what}_examples", 0)), f"{100 * share:.1f}",
                 f"{100 * low:.1f} to {100 * high:.1f}",
                 *("-" if one is None else f"{100 * one:.1f}" for one in called)]
            )  # fmt: skip
            if what != "reward":  # the same in every run
                break
    members = "; ".join(
        f"seed {run['seed']}: {', '.join(f'{100 * one:.1f}' for one in run['members'])}" for run in start
    )
    head = (
        "", "seed", "sentences learned", "dev accuracy, %", "95 %", "of positive ones called positive, %",
        "of negative ones, %",
    )  # fmt: skip
    return f"{table(head, lines)}\n\nThe reward's members alone, networks and naive Bayes, %: {members}."


def tried(task: str, key: str) -> str:
    """Rows that learn from pairs at every rate, judged with --tune; the rate that a row has is bold."""
    found, lines = compared(task, key), []
    for name in PAIR_ALGORITHMS:
        if len(found.get(name, ())) == len(RATES):
            best = chosen_rate(found[name])
            cells = (f"{100 * found[name][rate]:.1f}" for rate in RATES)
            lines.append([f"`{name}`", *(f"**{c}**" if r == best else c for r, c in zip(RATES, cells))])
    return table(("row", *(f"{rate:g}" for rate in RATES)), lines) if lines else "Not all run."


def preferences(runs: dict[str, list[Run]]) -> str:
    """Pairs that were got right."""
    lines = []
    for name, some in runs.items():
        for run in some:
            share, total = run["after"]["accuracy"], run["held_out"]
            _, low, high, _ = wilson(share * total, total)
            label = "reward model" if name == "reward" else f"`{name}`"
            lines.append(
                [label, str(run["seed"]), str(run["pairs"]), str(total), f"{100 * share:.1f}",
                 f"{100 * low:.1f} to {100 * high:.1f}"]
            )  # fmt: skip
    return table(("", "seed", "pairs", "held out", "right, %", "95 %"), lines)


def page() -> str:
    """The text with its tables; a table whose files are not there says so."""
    text = TEXT.read_text(encoding="utf-8")
    folders = {"arithmetic": (arithmetic,), "sentiment": (judges, sentiment), "preferences": (preferences,)}
    runs = {folder: by_row(read(RESULTS / folder)) for folder in folders}
    for folder, makers in folders.items():
        for maker in makers:
            made = maker(runs[folder]) if runs[folder] else "Not run."
            text = text.replace(f"<!-- {maker.__name__} -->", made)
    for task, key in JUDGED.items():
        text = text.replace(f"<!-- {task} rates -->", tried(task, key))
        start = of(by_row(read(RESULTS / f"{task}-tune")).get("sft", []), "after", key)
        text = text.replace(f"<!-- {task} tuning start -->", percent(start) if start else "-")
    return text.replace("<!-- bars -->", bars(runs))


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    if parser.parse_args().check:
        return int(page() != PAGE.read_text(encoding="utf-8"))
    write_aside(PAGE, page())
    print(PAGE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
