"""A comparison calls what is there and nothing else, and says what it cannot know. Samples of known truth."""

import itertools
import math
import random
import statistics

import pytest

from rlhf_kernels.engine import stats
from rlhf_kernels.engine.compare import Gate, Unlike, compare
from rlhf_kernels.engine.row import Row
from tests.kernels.made_runs import MACHINE, made_row, made_run


def _noise(draw, tails=0.1):
    """A factor on one sample: a little jitter, and now and then another process in the way."""
    stray = 1 + draw.paretovariate(1.5) / 10 if draw.random() < tails else 1.0
    return math.exp(draw.gauss(0, 0.02)) * stray


def _by_turns(draw, change, processes=10, rounds=24, cases=1, base_us=100.0, layout=0.008):
    """Both sides of a session: a drift that they share, a layout of memory that each process has alone."""
    sides = {"base": [], "head": []}
    for number in range(cases):
        drift, taken = 0.0, {"base": [], "head": []}
        for _ in range(processes):
            for side in sides:
                taken[side].append([])
            own = {side: draw.gauss(0, layout) for side in sides}
            for _ in range(rounds):
                drift += draw.gauss(0, 0.03)
                for side, effect in (("base", 1.0), ("head", 1.0 + change)):
                    level = base_us * effect * math.exp(drift + own[side])
                    taken[side][-1].append(level * _noise(draw))
        for side in sides:
            sides[side].append(made_row(taken[side], f"case{number}"))
    return [[made_run(rows, session="s", side=side)] for side, rows in sides.items()]


def _apart(draw, change, runs=5, processes=6, rounds=24, cases=1, hours=0.03):
    """Repeated runs of base and one of head, each at an hour of its own that moves every time."""
    found = []
    for index in range(runs + 1):
        effect = 1.0 + (change if index == runs else 0.0)
        rows = []
        for number in range(cases):
            hour = draw.gauss(0, hours)
            samples = [
                [100 * effect * math.exp(hour + process) * _noise(draw) for _ in range(rounds)]
                for process in (draw.gauss(0, 0.01) for _ in range(processes))
            ]
            rows.append(made_row(samples, f"case{number}"))
        found.append(made_run(rows, session="base" if index < runs else "head"))
    return found[:runs], found[runs:]


def _called(report):
    return [row.verdict for row in report.rows if row.verdict in ("slower", "faster")]


# --- truth -----------------------------------------------------------------------------------------------


def test_no_false_alarms_by_turns():
    draw = random.Random(1)
    alarms = [_called(compare(*_by_turns(draw, 0.0, cases=6))) for _ in range(40)]
    assert sum(map(len, alarms)) <= 0.02 * 240


def test_finds_five_percent_by_turns():
    draw = random.Random(2)
    found = [_called(compare(*_by_turns(draw, 0.05))) for _ in range(60)]
    assert found.count(["slower"]) >= 0.95 * 60
    assert ["faster"] not in found
    quicker = [_called(compare(*_by_turns(draw, -0.05))) for _ in range(20)]
    assert quicker.count(["faster"]) >= 19


def test_no_false_alarms_between_hours():
    draw = random.Random(3)
    reports = [compare(*_apart(draw, 0.0, cases=4)) for _ in range(50)]
    assert sum(len(_called(report)) for report in reports) <= 0.02 * 200


def test_without_repeated_runs_the_floor_is_wide():
    draw = random.Random(4)
    base, head = _apart(draw, 0.07, runs=1, hours=0.0)
    (row,) = compare(base, head).rows
    assert (row.verdict, row.floor) == ("inconclusive", Gate().unknown)
    base, head = _apart(draw, 0.25, runs=1, hours=0.0)
    report = compare(base, head)
    assert report.rows[0].verdict == "slower"
    assert "--save-baseline" in " ".join(report.notes)
    base, head = _apart(draw, 0.07, runs=5, hours=0.0)
    assert compare(base, head).rows[0].verdict == "slower", "repeated runs show how quiet this machine is"


def test_noise_without_end_is_said_shortly():
    base = [made_run([made_row([[level] * 3] * 6)], session="base") for level in (1e-6, 1e6)]
    (row,) = compare(base, [made_run([made_row([[2.0] * 3] * 6)], session="head")]).rows
    assert (row.verdict, row.reason) == ("inconclusive", "noise alone makes up to 1000%+")


def test_the_floor_is_that_of_the_row():
    draw = random.Random(5)
    base, head = _apart(draw, 0.0, cases=2, hours=0.002)
    for run, factor in zip(base, (1.0, 1.06, 0.95, 1.05, 0.94)):  # the second case differs from run to run
        run.rows[1].samples_us = [[factor * x for x in samples] for samples in run.rows[1].samples_us]
    rows = {row.case: row for row in compare(base, head).rows}
    assert rows["case0"].floor < 0.05 < 0.1 < rows["case1"].floor
    assert (rows["case0"].verdict, rows["case1"].verdict) == ("same", "inconclusive")
    assert rows["case1"].reason.startswith("noise alone makes up to")


def test_each_gate_holds_alone():
    def verdict(changes, base_us=100.0, **gate):
        base = [[base_us] * 3 for _ in changes]
        head = [[base_us * (1 + change)] * 3 for change in changes]
        runs = [
            [made_run([made_row(s)], session="s", side=name)] for s, name in ((base, "base"), (head, "head"))
        ]
        return compare(*runs, Gate(**gate)).rows[0]

    assert verdict([0.05 + i / 1000 for i in range(8)]).verdict == "slower"
    assert verdict([-0.05 - i / 1000 for i in range(8)]).verdict == "faster"
    assert verdict([0.01 + i / 1000 for i in range(8)]).verdict == "same", "practical: below 2 %"
    assert verdict([0.05 + i / 1000 for i in range(8)], base_us=1.0).verdict == "same", "absolute: 0.05 us"
    four = verdict([0.05 + i / 1000 for i in range(4)])
    assert four.verdict == "inconclusive", "statistical: four processes cannot tell"
    assert "with 4 processes" in four.reason
    assert verdict([0.05, -0.04] * 4).verdict == "inconclusive"


def test_holm_counts_the_rows():
    sides = [[], []]
    for case in range(10):
        for rows, factor in zip(sides, (1.0, 1.05)):
            rows.append(made_row([[100 * factor + i + case / 100] * 3 for i in range(6)], f"case{case}"))
    runs = [[made_run(rows, session="s", side=side)] for rows, side in zip(sides, ("base", "head"))]
    one = [[made_run(run[0].rows[:1], session="s", side=run[0].side)] for run in runs]
    assert compare(*one).rows[0].verdict == "slower", "2 of 64 signs"
    assert {row.verdict for row in compare(*runs).rows} == {"inconclusive"}, (
        "and ten times as much for ten rows"
    )


# --- rank tests ------------------------------------------------------------------------------------------


def test_rank_tests_are_exact():
    assert stats.signed_rank([1, 2, 3, 4, 5]) == 2 / 32
    assert stats.signed_rank([1, -2, 3, 4, 5]) == 6 / 32  # sums 0, 1, 2 of the negative ranks
    assert stats.signed_rank([0.0, 0.0]) == 1.0
    assert stats.rank_sum([1, 2, 3], [4, 5, 6]) == pytest.approx(2 / 20)
    assert stats.rank_sum([1, 2, 4], [3, 5, 6]) == pytest.approx(4 / 20)
    assert stats.rank_sum([1, 1, 1], [1, 1, 1]) == 1.0
    # A brute force over all ways to choose, ties included.
    values, chosen = [1.0, 2.0, 2.0, 3.0, 5.0, 5.0, 7.0], (3, 5, 6)
    ranks = [statistics.mean(i + 1 for i, x in enumerate(sorted(values)) if x == v) for v in values]
    sums = [sum(ranks[i] for i in some) for some in itertools.combinations(range(7), 3)]
    seen = sum(ranks[i] for i in chosen)
    low, high = (sum(compared(s) for s in sums) for compared in (lambda s: s <= seen, lambda s: s >= seen))
    rest = [x for i, x in enumerate(values) if i not in chosen]
    assert stats.rank_sum(rest, [values[i] for i in chosen]) == pytest.approx(2 * min(low, high) / len(sums))


def test_the_normal_approximation_meets_the_exact_test():
    draw = random.Random(6)
    base, head = ([draw.gauss(mean, 1) for _ in range(10)] for mean in (0, 1))
    exact = stats.rank_sum(base, head)
    wide = stats.rank_sum(base, [*head, statistics.median(base)])  # 21 samples: approximated
    assert exact < 0.1
    assert wide == pytest.approx(exact, rel=0.5)


def test_holm_and_limits():
    assert stats.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert stats.holm([]) == []
    # Of five values with standard deviation 1: t(4) sqrt(1 + 1/5).
    values = [x / statistics.stdev([1, 2, 3, 4, 5]) for x in (1, 2, 3, 4, 5)]
    assert stats.repeat_limit(values) == pytest.approx(4.604 * math.sqrt(1.2))
    draw = random.Random(7)
    outside = 0
    for _ in range(2000):
        *seen, new = (draw.gauss(0, 1) for _ in range(5))
        outside += abs(new - statistics.fmean(seen)) > stats.repeat_limit(seen)
    assert 5 <= outside <= 40, "one in a hundred"
    low, high = stats.midmean_ci([draw.gauss(1, 0.1) for _ in range(40)])
    assert low < 1 < high
    assert high - low < 0.12


# --- rows ------------------------------------------------------------------------------------------------


def _two_sided(base_rows, head_rows, **more):
    repeated = [made_run(base_rows, session="base") for _ in range(2)]
    return compare(repeated, [made_run(head_rows, **more)])


def test_a_row_that_vanished_or_broke_is_missing():
    samples = [[100.0] * 3] * 6
    good = [made_row(samples, case) for case in ("a", "b", "c", "d")]
    now = [
        made_row([], "b").failed("unavailable", "no compiler"),
        made_row([], "c").failed("incorrect", "off by 3"),
        made_row(samples, "d"),
    ]
    rows = {row.case: row for row in _two_sided(good, now).rows}
    assert [rows[c].verdict for c in "abcd"] == ["missing", "missing", "missing", "same"]
    assert rows["a"].reason == "head has no such row"
    assert rows["b"].reason == "unavailable: no compiler"
    assert rows["c"].status == "incorrect"
    stopped = _two_sided(good, now, complete=False).rows
    assert next(row for row in stopped if row.case == "a").reason == "head was interrupted before it"


def test_another_shape_under_the_same_name_is_missing():
    samples = [[100.0] * 3] * 6
    row = _two_sided([made_row(samples, bytes=100, flops=1)], [made_row(samples, bytes=50, flops=1)]).rows[0]
    assert (row.verdict, row.reason) == ("missing", "the case is another: 100 bytes became 50")


def test_other_libraries_are_judged_when_named():
    samples = [[100.0] * 3] * 6
    rows = [made_row(samples, impl=impl) for impl in ("native", "TRL", "torch.compile")]
    assert [row.impl for row in compare([made_run(rows)], [made_run(rows)]).rows] == ["native"]
    assert [row.impl for row in compare([made_run(rows)], [made_run(rows)], impls=["TRL"]).rows] == ["TRL"]


def test_the_latest_session_counts():
    def of(level, session):
        return made_run([made_row([[level] * 3] * 6)], session=session)

    base = [of(50.0, "old"), of(100.0, "new"), of(101.0, "new")]
    report = compare(base, [of(100.0, "head")])
    assert report.rows[0].base_us == 100.5
    assert report.rows[0].processes == (12, 6)


def test_unlike_machines_are_refused():
    rows = [made_row([[100.0] * 3] * 6)]
    base, head = made_run(rows), made_run(rows)
    head.fingerprint |= {"threads": 2, "commit": "another"}
    with pytest.raises(Unlike, match=r"\(threads: 1 and 2\)"):
        compare([base], [head])
    assert compare([base], [head], force=True).notes[0].startswith("Careful: compared by force")


def test_budgets_are_exact():
    def of(case, **figures):
        return Row("op", "triton", case, "", "", "sm_90", figures=figures)

    base = [
        of("a", registers=64, spills=0),
        of("b", registers=64, tensor_core=24),
        of("c", instructions=100_000),
        of("d", registers=64),
        of("e", registers=64),
    ]
    head = [
        of("a", registers=64, spills=4),
        of("b", registers=64, tensor_core=0),
        of("c", instructions=102_000),
        of("d", registers=60),
        of("e", registers=64),
    ]
    runs = [made_run(rows) for rows in (base, head)]
    for run in runs:
        run.fingerprint["tools"] = {"triton": "triton 3.6.0"}
    rows = {row.case: row for row in compare(runs[:1], runs[1:]).rows}
    assert [rows[c].verdict for c in "abcde"] == ["slower", "slower", "slower", "faster", "same"]
    assert rows["c"].reason == "instructions 100000 -> 102000"
    runs[1].rows = runs[1].rows[1:]
    assert compare(runs[:1], runs[1:]).rows[0].verdict == "missing"
    runs[1].fingerprint = MACHINE | {"processor": "another", "tools": {"triton": "triton 3.6.0"}}
    compare(runs[:1], runs[1:])  # figures depend on the compiler alone
    runs[1].fingerprint["tools"] = {"triton": "triton 3.9.0"}
    with pytest.raises(Unlike, match=r"triton 3\.6\.0 and triton 3\.9\.0"):
        compare(runs[:1], runs[1:])
