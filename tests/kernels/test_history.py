"""Steps in stored times: those planted are found, noise and single bad runs are not called steps."""

import dataclasses
import json
import math
import random
from pathlib import Path

import pytest

from rlhf_kernels.engine import history, results, store
from rlhf_kernels.engine.row import Row

RECORDED = Path(__file__).parents[2] / "benchmarks" / "results" / "cpu-2026-11-20.jsonl"


def simulated(draw, runs, kind="normal", step=1.0, at=None, noise=0.02):
    """Logarithms of a level with noise, and a step of its level at one run."""
    found = []
    for i in range(runs):
        if kind == "normal":
            error = draw.gauss(0, noise)
        elif kind == "laplace":
            error = draw.choice((-1, 1)) * draw.expovariate(1) * noise / math.sqrt(2)
        else:  # one run in ten on a machine that did something else
            error = draw.gauss(0, noise) + (abs(draw.gauss(0, 6 * noise)) if draw.random() < 0.1 else 0)
        found.append(error + (math.log(step) if at is not None and i >= at else 0))
    return found


def points(values, fingerprints=None):
    """Points with these values."""
    return [
        history.Point(i + 1, f"2026-01-{i + 1:02}", v, v, v, (fingerprints or [{}] * len(values))[i])
        for i, v in enumerate(values)
    ]


def followed(values, metric="time", fingerprints=None):
    """A fitted series."""
    key = ("op", "case", "float32", "forward", "native", "cpu")
    return history.fitted(history.Series(key, "here", metric, points(values, fingerprints)))


@pytest.mark.parametrize("kind", ["normal", "laplace", "outliers"])
def test_series_without_a_step_have_none(kind):
    draw = random.Random(3)
    alarms = 0
    for number in range(150):
        logs = simulated(draw, (5, 8, 12, 20, 40)[number % 5], kind)
        alarms += bool(followed([math.exp(v) for v in logs]).steps)
    assert alarms <= 5


@pytest.mark.parametrize(
    ("runs", "at", "step", "least"), [(20, 12, 1.2, 78), (20, 12, 1.1, 76), (12, 9, 0.8, 78)]
)
def test_planted_steps_are_found_where_they_are(runs, at, step, least):
    draw = random.Random(4)
    found = 0
    for _ in range(80):
        one = followed([math.exp(v) for v in simulated(draw, runs, "normal", step, at)])
        hits = [s for s in one.steps if abs(s.at - at) <= 1]
        found += bool(hits)
        assert all(s.verdict == ("slower" if step > 1 else "faster") for s in hits)
    assert found >= least


def test_one_bad_run_is_no_step_and_two_are():
    calm = [100.0, 101, 99, 100.5, 99.5, 100, 101, 99]
    assert followed([*calm[:4], 300.0, *calm[4:]]).steps == []
    assert followed([*calm, 300.0]).steps == [], "a single run, the newest as well"
    (step,) = followed([*calm, 300.0, 303.0]).steps
    assert step.at == 8
    assert step.percent == pytest.approx(201.5)


def test_clear_but_small_is_not_called():
    exact = [100.0, 100.01, 99.99, 100.0] * 5
    assert followed([*exact, *(v * 1.015 for v in exact)]).steps == []
    assert len(followed([*exact, *(v * 1.06 for v in exact)]).steps) == 1


def test_uncertain_runs_do_not_step():
    values = [100.0, 100.1, 99.9, 100, 108, 108.1, 107.9, 108]
    assert followed(values).steps
    wide = [dataclasses.replace(p, low=p.value * 0.8, high=p.value * 1.2) for p in points(values)]
    key = ("op", "case", "float32", "forward", "native", "cpu")
    one = history.fitted(history.Series(key, "here", "time", wide))
    assert one.steps == [], "each run knows its median to 20 % only"
    many = [
        dataclasses.replace(p, low=p.value * 0.8, high=p.value * 1.2)
        for p in points(values[:4] * 6 + values[4:] * 6)
    ]
    assert history.fitted(history.Series(key, "here", "time", many)).steps, "forty runs know better"
    assert one.noise == pytest.approx(math.log(1.2 / 0.8) / 2 / 1.96 * math.sqrt(4 / 11), rel=0.01)


def test_too_few_runs_tell_nothing():
    one = followed([100.0, 200.0, 200.0])
    assert one.steps == []
    assert one.told == "3 runs: too few to tell."


def test_more_is_slower_for_times_alone():
    values = [2.0, 2.01, 1.99, 2.0, 1.0, 1.01, 0.99, 1.0]
    assert followed(values).steps[0].verdict == "faster"
    assert followed(values, "speedup").steps[0].verdict == "slower"
    assert followed(values, "roof").steps[0].verdict == "slower"


def test_a_step_says_what_changed():
    old = {"torch": "2.12", "commit": "a" * 40, "dirty": False, "build": {"_C": "1"}, "triton": "3.6"}
    new = old | {"torch": "2.13", "commit": "b" * 40, "dirty": True, "build": {"_C": "2"}}
    values = [100.0, 101, 99, 100, 120, 121, 119, 120]
    one = followed(values, fingerprints=[old] * 4 + [new] * 4)
    (step,) = one.steps
    assert step.changed == ("torch 2.12 to 2.13", "commit aaaaaaa to bbbbbbb", "build")
    assert one.told == "Slower by 20 % from run #5 (torch 2.12 to 2.13, commit aaaaaaa to bbbbbbb, build)."
    assert one.points[4].commit == "bbbbbbb+"
    assert followed(values).told == "Slower by 20 % from run #5 (nothing else changed)."


@dataclasses.dataclass
class Budgeted(Row):
    """A row of `budget --out`."""

    figures: dict = dataclasses.field(default_factory=dict)
    notes: dict = dataclasses.field(default_factory=dict)


def _budgets(*counts):
    """Runs of budget, one a count of instructions."""
    runs = []
    for n, count in enumerate(counts, 1):
        row = Budgeted("gae", "host", "host/gae", "", "", "v3", figures={"instructions": count}, notes={})
        row.notes = {"budget": {"instructions": counts[0]}}
        if count > counts[0]:
            row.status, row.reason = "incorrect", f"instructions {count}, budget {counts[0]}"
        runs.append(store.Run("rlhf-kernels budget", {"processor": "X"}, [row], started=f"2026-01-0{n}"))
    return results.Results([], runs, [])


def test_counted_figures_step_at_every_change():
    (one,) = history.series(_budgets(1000, 1000, 1010).machines(), "instructions")
    (step,) = one.steps
    assert (step.at, step.before, step.after, step.verdict) == (2, 1000, 1010, "slower")
    assert one.title == "gae host/gae v3, host"
    assert (step.shown(), step.shown("+")) == ("1 %", "+1 %")
    assert history.series(_budgets(1000, 1010).machines(), "time") == []
    assert history.series(_budgets(1000, 1000).machines(), "instructions")[0].told == "No step in 2 runs."


def test_stored_budgets_are_in_the_report(parsed):
    pytest.importorskip("matplotlib")
    from rlhf_kernels.engine import report

    cells = parsed(report.build(_budgets(1000, 1010), "rlhf-kernels report")).cells
    assert "1,010 (budget 1,000)" in cells
    assert "incorrect: instructions 1010, budget 1000" in cells
    at = cells.index("Slower by 1 % from run #2 (nothing else changed).")
    assert cells[at - 8 : at - 2] == ["host/gae", "", "v3", "host", "instructions", "2"]


def _scaled(run, number, factor, commit):
    """A recorded run as if taken later, its native kernel slower by a factor."""

    def scaled(row):
        if row.median_us is None:
            return row
        f = factor if row.impl == "native" else 1.0
        return dataclasses.replace(
            row, median_us=row.median_us * f, ci_us=tuple(v * f for v in row.ci_us), samples_us=[],
            speedup=row.speedup and row.speedup / f, speedup_ci=None,
        )  # fmt: skip

    rows = [scaled(row) for row in run.rows if row.case == "palm_4096x2048"]
    fingerprint = run.fingerprint | {"commit": commit * 40}
    return dataclasses.replace(
        run, started=f"2026-12-{number:02}T00:00:00+00:00", rows=rows, fingerprint=fingerprint
    )


@pytest.fixture
def stored(tmp_path):
    """Eight runs made of one that was recorded: from the sixth on native takes 1.3 times as long."""
    recorded = next(run for run in store.read(RECORDED)[0] if " swiglu " in run.command)
    path = tmp_path / "runs" / "year.jsonl"
    for n, f in enumerate((1, 1.01, 0.99, 1, 1.005, 1.3, 1.31, 1.29), 1):
        store.append(path, _scaled(recorded, n, f, "a" if n < 6 else "b"))
    return path


def test_the_command_shows_steps(command, stored, tmp_path):
    code, out, _ = command("history", stored.parent, "--impl", "native")
    assert code == 0
    lines = [line for line in out.splitlines() if line.startswith("| swiglu")]
    assert len(lines) == 2
    assert all("Slower by 30 % from run #6 (commit aaaaaaa to bbbbbbb)." in line for line in lines)
    assert "#6 is 2026-12-06T00:00 rlhf-kernels bench swiglu" in out
    code, out, _ = command("history", stored, "--json", "--metric", "speedup", "--case", "palm_*")
    found = {(one["impl"], one["direction"]): one for one in json.loads(out)}
    (step,) = found["native", "forward"]["steps"]
    assert (step["run"], step["verdict"]) == (6, "slower")
    assert step["percent"] == pytest.approx(100 / 1.3 - 100, abs=0.5)
    assert found["torch.compile", "forward"]["steps"] == []
    assert len(found["native", "forward"]["points"]) == 8


def test_drawings(command, parsed, stored, tmp_path):
    pytest.importorskip("matplotlib")
    assert command("history", stored, "--impl", "native", "--plots", tmp_path / "plots")[0] == 0
    drawings = sorted((tmp_path / "plots").glob("*.svg"))
    assert len(drawings) == 2
    text = drawings[0].read_text()
    assert "var(" not in text
    assert "+30 %" in text
    parsed(text.partition("?>\n")[2])
    assert command("history", stored, "--plots", stored)[0] == 64


def test_the_report_has_the_history(parsed, stored):
    pytest.importorskip("matplotlib")
    from rlhf_kernels.engine import report

    page = report.build(results.load([stored]), "rlhf-kernels report")
    cells = parsed(page).cells
    assert cells.count("Slower by 30 % from run #6 (commit aaaaaaa to bbbbbbb).") == 2
    assert page.count('aria-label="History of swiglu') == 2, "ours, forward and both"


def test_mistakes(command, stored, tmp_path):
    one = store.read(stored)[0][0]
    store.append(tmp_path / "one.jsonl", one)
    code, out, err = command("history", tmp_path / "one.jsonl")
    assert (code, out) == (64, "")
    assert "no time was measured in two runs of one machine" in err
    assert (
        "unknown implementation 'nativ': did you mean 'native'?"
        in command("history", stored, "--impl", "nativ")[2]
    )
    assert "unknown case 'x*'" in command("history", stored, "--case", "x*")[2]
    assert "unknown op 'swigl'" in command("history", stored, "--op", "swigl")[2]
    assert "invalid choice: 'mood'" in command("history", stored, "--metric", "mood")[2]
