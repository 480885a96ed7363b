"""A comparison calls what is there and nothing else, and says what it cannot know. Samples of known truth."""

import itertools
import json
import math
import random
import statistics

import pytest

from rlhf_kernels import cli
from rlhf_kernels.engine import baselines, stats, store
from rlhf_kernels.engine.compare import Gate, Unlike, compare
from rlhf_kernels.engine.row import Row
from rlhf_kernels.engine.store import Run

MACHINE = {"device": "cpu", "processor": "synthetic", "threads": 1, "torch": "2.13"}


def _row(samples_us, case="case", impl="native", **more):
    times = {"median_us": statistics.median(itertools.chain(*samples_us))} if samples_us else {}
    return Row("op", impl, case, "float32", "forward", "cpu", samples_us=samples_us, **times | more)


def _run(rows, **more):
    return Run("rlhf-kernels bench op", dict(MACHINE), rows, **more)


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
            sides[side].append(_row(taken[side], f"case{number}"))
    return [[_run(rows, session="s", side=side)] for side, rows in sides.items()]


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
            rows.append(_row(samples, f"case{number}"))
        found.append(_run(rows, session="base" if index < runs else "head"))
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
    base = [_run([_row([[level] * 3] * 6)], session="base") for level in (1e-6, 1e6)]
    (row,) = compare(base, [_run([_row([[2.0] * 3] * 6)], session="head")]).rows
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
        runs = [[_run([_row(s)], session="s", side=name)] for s, name in ((base, "base"), (head, "head"))]
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
            rows.append(_row([[100 * factor + i + case / 100] * 3 for i in range(6)], f"case{case}"))
    runs = [[_run(rows, session="s", side=side)] for rows, side in zip(sides, ("base", "head"))]
    one = [[_run(run[0].rows[:1], session="s", side=run[0].side)] for run in runs]
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
    repeated = [_run(base_rows, session="base") for _ in range(2)]
    return compare(repeated, [_run(head_rows, **more)])


def test_a_row_that_vanished_or_broke_is_missing():
    samples = [[100.0] * 3] * 6
    good = [_row(samples, case) for case in ("a", "b", "c", "d")]
    now = [
        _row([], "b").failed("unavailable", "no compiler"),
        _row([], "c").failed("incorrect", "off by 3"),
        _row(samples, "d"),
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
    row = _two_sided([_row(samples, bytes=100, flops=1)], [_row(samples, bytes=50, flops=1)]).rows[0]
    assert (row.verdict, row.reason) == ("missing", "the case is another: 100 bytes became 50")


def test_other_libraries_are_judged_when_named():
    samples = [[100.0] * 3] * 6
    rows = [_row(samples, impl=impl) for impl in ("native", "TRL", "torch.compile")]
    assert [row.impl for row in compare([_run(rows)], [_run(rows)]).rows] == ["native"]
    assert [row.impl for row in compare([_run(rows)], [_run(rows)], impls=["TRL"]).rows] == ["TRL"]


def test_the_latest_session_counts():
    def of(level, session):
        return _run([_row([[level] * 3] * 6)], session=session)

    base = [of(50.0, "old"), of(100.0, "new"), of(101.0, "new")]
    report = compare(base, [of(100.0, "head")])
    assert report.rows[0].base_us == 100.5
    assert report.rows[0].processes == (12, 6)


def test_unlike_machines_are_refused():
    rows = [_row([[100.0] * 3] * 6)]
    base, head = _run(rows), _run(rows)
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
    runs = [_run(rows) for rows in (base, head)]
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


# --- the command -----------------------------------------------------------------------------------------


@pytest.fixture
def command(capsys, tmp_path, monkeypatch):
    """Runs `rlhf-kernels compare`, with a cache of its own: exit code, standard output, standard error."""
    monkeypatch.setenv("RLHF_KERNELS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)

    def run(*words):
        code = cli.main(["compare", *map(str, words)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def _stored(path, changes, processes=10):
    """Base and head runs of a session that differ by these changes, in two files."""
    for side in ("base", "head"):
        rows = []
        for case, change in changes.items():
            factor = 1 + change if side == "head" else 1.0
            rows.append(_row([[100.0 * factor * (1 + p / 1000)] * 5 for p in range(processes)], case))
        store.append(path / f"{side}.jsonl", _run(rows, session="s", side=side))
        store.append(path / "both.jsonl", _run(rows, session="s", side=side))
    return path / "base.jsonl", path / "head.jsonl"


def test_exit_codes_and_formats(command, tmp_path):
    base, head = _stored(tmp_path, {"fine": 0.001, "slow": 0.10})
    code, out, err = command(base, head, "--markdown", tmp_path / "comment.md")
    assert code == 1, err
    assert "| slower " in out
    assert "1 slower, 1 same; geometric mean of head's times over base's 1.049." in out
    comment = (tmp_path / "comment.md").read_text()
    assert comment.startswith("### rlhf-kernels: base -> head\n\n🔺 1 slower, ✅ 1 same.\n")
    assert comment.index("slow float32") < comment.index("<details>") < comment.index("fine float32")
    assert "Again: `rlhf-kernels compare" in comment
    code, out, _ = command(base, head, "--json", "--least", "20%")
    value = json.loads(out)
    assert code == value["exit_code"] == 0
    assert value["counts"]["same"] == 2
    assert {"verdict", "ratio", "ratio_ci", "p", "floor"} <= set(value["rows"][0])
    assert command(tmp_path / "both.jsonl")[0] == 1
    assert command(base, base)[0] == 0


def test_inconclusive_by_policy(command, tmp_path):
    base, head = _stored(tmp_path, {"few": 0.10}, processes=3)
    assert command(base, head)[0] == 0
    assert command(base, head, "--inconclusive=fail")[0] == 1
    code, out, _ = command(base, head, "--inconclusive=rerun")
    assert code == 75
    assert "Measure again, with more processes: rlhf-kernels bench op --case 'few' --processes 12" in out


def test_incorrect_is_worse_than_slow(command, tmp_path):
    store.append(tmp_path / "a.jsonl", _run([_row([[100.0] * 3] * 6)]))
    store.append(tmp_path / "b.jsonl", _run([_row([]).failed("incorrect", "off by 3")]))
    code, out, _ = command("a.jsonl", "b.jsonl")
    assert code == 2
    assert "incorrect: off by 3" in out


def test_unlike_machines_exit_with_three(command, tmp_path):
    store.append(tmp_path / "a.jsonl", _run([_row([[100.0] * 3] * 6)]))
    other = _run([_row([[100.0] * 3] * 6)])
    other.fingerprint["torch"] = "2.14"
    store.append(tmp_path / "b.jsonl", other)
    code, out, err = command("a.jsonl", "b.jsonl")
    assert (code, out) == (3, "")
    assert "torch: 2.13 and 2.14" in err
    assert err.count("\n") == 1
    assert command("a.jsonl", "b.jsonl", "--force")[0] == 0


def test_named_baselines(command, tmp_path):
    run = _run([_row([[100.0] * 3] * 6)])
    path = baselines.save("main", [run, run])
    assert path == tmp_path / "cache" / "baselines" / "main.jsonl"
    store.append(tmp_path / "head.jsonl", run)
    assert command("main", "head.jsonl")[0] == 0
    baselines.save("main", [run])
    assert len(store.read(path)[0]) == 1, "saved again in place of what it was"
    code, _, err = command("nain", "head.jsonl")
    assert code == 64
    assert err == "rlhf-kernels: there is no result file and no baseline 'nain'; baselines: main\n"
    code, _, err = command("../main", "head.jsonl")
    assert code == 64
    assert cli.main(["bench", "--save-baseline", "../x"]) == 64


def test_bad_files_are_one_sentence_and_finished_rows_count(command, tmp_path):
    base, head = _stored(tmp_path, {"a": 0.0, "b": 0.0})
    text = head.read_text()
    head.write_text(text[:-40])  # torn in the middle of the last row
    code, out, err = command(base, head)
    assert (code, err) == (1, "")
    assert f"Careful: 1 lines of {head} are broken and were left out." in out
    assert "head has no such row" in out
    assert "| same " in out
    for content, said in (
        ("", "holds no results: it is empty"),
        ("{broken", "holds no results: 1 of its lines cannot be read"),
        (
            json.dumps(_run([]).header() | {"schema": 99}),
            "holds schema 99, this version reads up to 1: upgrade",
        ),
        (json.dumps({"kind": "run"}), "holds schema None: expected a number up to 1"),
    ):
        head.write_text(content)
        code, out, err = command(base, head)
        assert (code, out) == (64, "")
        assert said in err
        assert err.count("\n") == 1
    code, _, err = command(base, tmp_path)
    assert code == 64
    assert "cannot be read: Is a directory" in err


def test_nothing_to_compare_is_an_error(command, tmp_path):
    store.append(tmp_path / "a.jsonl", _run([_row([[100.0] * 3] * 6, impl="TRL")]))
    code, out, err = command("a.jsonl", "a.jsonl")
    assert (code, out) == (64, "")
    assert "has no result to compare" in err
    assert command("a.jsonl", "a.jsonl", "--impl", "TRL")[0] == 0
