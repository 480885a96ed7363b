"""The engine measures fairly, shows no time of what is wrong, and what it keeps can be read again."""

import argparse
import fcntl
import itertools
import json
import multiprocessing
import os
import resource
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch

from rlhf_kernels.engine import commands, conditions, implementations, roofs, stats, store
from rlhf_kernels.engine.bench import Bench, merged
from rlhf_kernels.engine.clock import Contender, CpuClock, Limits, clock_for, measure
from rlhf_kernels.engine.memory import _without_marks, peak_bytes
from rlhf_kernels.engine.row import Row
from rlhf_kernels.engine.select import UsageError
from rlhf_kernels.engine.spec import Cost, load_specs
from rlhf_kernels.ops.swiglu.spec import SPECS
from rlhf_kernels.runtime import native
from rlhf_kernels.runtime.files import write_aside
from rlhf_kernels.stacks import Unavailable, peers

SWIGLU = SPECS[0]
CPU = torch.device("cpu")
SHORT = Limits(seconds=0.05, warmup=0.02, rounds=3, precision=0.5)

needs_native = pytest.mark.skipif(native.missing("_C") is not None, reason=str(native.missing("_C")))


class FakeClock:
    """Every call takes as long as its contender's name says; keeps the order of the samples."""

    def __init__(self):
        self.order = []

    def sample(self, contender):
        self.order.append(contender.name)
        time.sleep(float(contender.name))
        return float(contender.name)

    def batch(self, seconds):
        return 1

    def host(self, contender):
        return None


def test_rounds_are_interleaved_and_shuffled():
    clock = FakeClock()
    contenders = [Contender(name, lambda: None) for name in ("0.001", "0.0011", "0.0012", "0.0013")]
    samples = measure(contenders, clock, Limits(seconds=10, rounds=12))
    assert {len(s) for s in samples.values()} == {12}
    rounds = [tuple(clock.order[i : i + 4]) for i in range(12, len(clock.order), 4)]  # after the warm-up
    assert len(rounds) == 12
    assert all(len(set(one)) == 4 for one in rounds)
    assert len(set(rounds)) > 4


def test_a_slow_contender_sits_out():
    samples = measure([Contender("0.08", None), Contender("0.001", None)], FakeClock(), Limits(seconds=0.6))
    assert 3 <= len(samples["0.08"]) <= 4
    assert len(samples["0.001"]) > 2 * len(samples["0.08"])


def test_cpu_clock_fills_a_millisecond():
    calls = itertools.count()
    contender = Contender("count", lambda: next(calls))
    samples = measure([contender], CpuClock(), Limits(seconds=0.05))["count"]
    assert contender.batch * stats.median(samples) > 0.5e-3
    assert next(calls) >= contender.batch * len(samples)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_clock_sees_the_device_and_not_the_host():
    device = torch.device("cuda")
    x, y = torch.empty(2, 1 << 26, device=device).unbind()

    def slow_to_enqueue():
        time.sleep(0.0005)
        y.copy_(x)

    clock = clock_for(device)
    contenders = [Contender("copy", lambda: y.copy_(x)), Contender("late", slow_to_enqueue)]
    seconds = {name: stats.median(s) for name, s in measure(contenders, clock, Limits(seconds=1)).items()}
    assert 1e11 < 2 * x.nbytes / seconds["copy"] < 1e13
    assert seconds["late"] == pytest.approx(seconds["copy"], rel=0.3)
    assert clock.host(contenders[1]) > 0.0005


def test_median_interval():
    assert stats.median_ci([3.0, 1.0, 2.0]) == (1.0, 3.0)
    assert stats.median_ci(range(1, 21)) == (6, 15)  # order statistics 6 and 15 of 20: 95.9 %
    assert stats.mad([1.0, 2.0, 9.0]) == 1.0
    low, high = stats.ratio_ci([2.0, 2.1, 1.9] * 5, [1.0, 1.05, 0.95] * 5)
    assert 1.8 < low <= 2.0 <= high < 2.2


def test_peak_bytes_counts_what_is_held_at_once():
    def call():
        first = torch.empty(1000, dtype=torch.float32)
        del first
        return torch.empty(500, dtype=torch.float32), torch.empty(250, dtype=torch.float32)

    assert peak_bytes(call, CPU) == 4000


def test_the_profiler_says_nothing_on_standard_error(capfd):
    def call():
        print("the call's own", file=sys.stderr)

    peak_bytes(call, CPU)
    with _without_marks():
        os.write(2, b"USDT:2026 profiler_start\nanother line\n")
    assert capfd.readouterr().err == "the call's own\nanother line\n"


# --- bench -----------------------------------------------------------------------------------------------


def _bench(rate=1e12, **options):
    machine = roofs.Roofs({1 << 20: rate}, {"float32": 1e12})
    return Bench(CPU, CpuClock(), machine, 1, SHORT, **options)


@needs_native
def test_bench_times_what_is_right():
    rows = list(_bench(wanted=["native"]).rows(SWIGLU, SWIGLU.cases[0], torch.float32))
    assert [(r.impl, r.direction) for r in rows] == [
        (impl, direction) for direction in ("forward", "forward+backward") for impl in ("torch", "native")
    ]
    for row in rows:
        assert row.status == "ok"
        assert row.ci_us[0] <= row.median_us <= row.ci_us[1]
        assert min(row.gbps, row.tflops, row.roof_fraction, row.speedup, row.peak_bytes) > 0
        assert row.error <= row.allowed
    cost = SWIGLU.cost(SWIGLU.cases[0], torch.float32, "forward")
    assert rows[0].gbps == pytest.approx(cost.bytes / rows[0].median_us / 1e3)
    rounds = zip(rows[0].samples_us[0], rows[1].samples_us[0])
    assert rows[1].speedup == pytest.approx(stats.median([torch_us / own_us for torch_us, own_us in rounds]))
    assert rows[1].speedup_ci[0] <= rows[1].speedup <= rows[1].speedup_ci[1]


@needs_native
def test_speed_ups_over_another_baseline(planted_specs):
    spec = planted_specs["planted_double"]
    bench = _bench(wanted=["torch"], baseline="native", directions=["forward"])
    rows = {row.impl: row for row in bench.rows(spec, spec.case("small"), torch.float32)}
    assert set(rows) == {"torch", "native"}
    assert rows["native"].speedup == 1.0
    assert rows["torch"].speedup > 1.0, "the native kernel wastes time by default"
    assert {row.baseline for row in rows.values()} == {"native"}


@needs_native
def test_bench_shows_no_time_of_what_is_wrong(planted_specs):
    spec = planted_specs["planted_wrong"]
    rows = {r.impl: r for r in _bench(wanted=["native"]).rows(spec, spec.case("small"), torch.float32)}
    assert rows["torch"].status == "ok"
    assert rows["native"].status == "incorrect"
    assert rows["native"].median_us is None


def test_bench_refuses_a_time_below_the_physical_floor():
    row = next(iter(_bench(rate=1e3, wanted=["reference"]).rows(SWIGLU, SWIGLU.cases[0], torch.float32)))
    assert (row.status, row.median_us) == ("error", None)
    assert row.reason.startswith("suspicious: ")


def test_the_interpreter_is_never_timed():
    bench = _bench(wanted=["triton"], directions=["forward"])
    row = list(bench.rows(SWIGLU, SWIGLU.cases[0], torch.float32))[-1]
    assert (row.impl, row.status) == ("triton", "unavailable")


def test_processes_are_merged_by_their_medians():
    rows = [
        Row("op", "impl", "case", "float32", "forward", "cpu", median_us=m, ci_us=(m, m), gbps=60 / m,
            tflops=6 / m, speedup=s, roof_us=1.0, roof_fraction=1 / m, samples_us=[[m]])
        for m, s in ((3.0, 1.0), (1.0, 5.0), (2.0, 2.0))
    ]  # fmt: skip
    one = merged(rows)
    assert (one.median_us, one.ci_us, one.speedup, one.gbps) == (2.0, (1.0, 3.0), 2.0, 30.0)
    assert one.samples_us == [[3.0], [1.0], [2.0]]
    assert merged([*rows, rows[0].failed("incorrect", "why")]).status == "incorrect"


def test_time_limit_becomes_unavailable():
    def compile_forever():
        with implementations.time_limit(1, "too long"):
            try:
                time.sleep(60)
            except Exception:  # what compiles may swallow what it takes for its own failures
                pytest.fail("the alarm was swallowed")

    with pytest.raises(Unavailable, match="too long"):
        compile_forever()


def test_partial_peers_name_outputs_that_we_have():
    specs = load_specs()
    for peer in peers():
        if peer.outputs and peer.op in specs:
            assert set(peer.outputs) <= set(specs[peer.op].outputs), peer.label


def test_roofs_are_kept(own_cache, monkeypatch):
    calls = []
    monkeypatch.setattr(roofs, "_COPIES", {"cpu": (1 << 10, 1 << 12)})
    monkeypatch.setattr(roofs, "_fastest", lambda call, clock: calls.append(call) or 1e-3)
    first = roofs.roofs_for(CPU, 1, [torch.bfloat16])
    count = len(calls)
    assert set(first.matmul) == {"float32", "bfloat16"}
    assert roofs.roofs_for(CPU, 1, [torch.bfloat16]) == first
    assert len(calls) == count
    roofs.roofs_for(CPU, 2, [])  # another number of threads is another machine
    assert len(calls) > count
    (own_cache / "roofs.json").write_text("{broken")
    assert roofs.roofs_for(CPU, 1, [torch.bfloat16]) == first


def test_sixteen_bit_numbers_can_be_computed_in_float32():
    machine = roofs.Roofs({1: 1.0}, {"float32": 100.0, "float16": 1.0, "float64": 50.0})
    assert [machine.rate(d) for d in (torch.float16, torch.float32, torch.float64)] == [100.0, 100.0, 50.0]
    assert machine.seconds([Cost(200.0, 0.0)], torch.float32, copying=0.5) == 2.0


# --- store and processes ---------------------------------------------------------------------------------


def _run(command):
    row = Row("op", "impl", "case", "float32", "forward", "cpu", median_us=1.5, ci_us=(1.0, 2.0))
    return store.Run(command, {"device": "cpu"}, [row])


def test_store_appends_and_survives_a_torn_line(tmp_path):
    path = tmp_path / "new" / "results.jsonl"
    store.append(path, _run("first"))
    with path.open("a") as file:
        file.write('{"kind": "row", "op": "to')  # a crash in the middle of a line
    store.append(path, _run("second"))
    runs, broken = store.read(path)
    assert [run.command for run in runs] == ["first", "second"]
    assert broken == 1
    assert runs[1].rows == _run("second").rows
    assert list(path.parent.iterdir()) == [path], "no lock stays beside it"
    path.write_text(json.dumps(_run("x").header() | {"schema": 99}))
    with pytest.raises(ValueError, match=r"holds schema 99.*upgrade"):
        store.read(path)


def test_a_full_disk_leaves_the_file_whole(tmp_path, monkeypatch, capsys):
    path = tmp_path / "results.jsonl"
    store.append(path, _run("first"))
    whole = path.read_bytes()
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    args = argparse.Namespace(out=path, json=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(UsageError, match=r"results.jsonl: File too large; the 1 rows are printed above"):
            commands.write(args, _run("second"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, hard))
    assert path.read_bytes() == whole
    assert json.loads(capsys.readouterr().out)[0]["command"] == "second"
    path.unlink()
    path.mkdir()  # what cannot be opened either
    with pytest.raises(UsageError, match=r"Is a directory; the 1 rows are kept in .*rlhf-kernels-.*jsonl"):
        commands.write(args, _run("third"))
    (kept,) = tmp_path.glob("rlhf-kernels-*.jsonl")
    assert store.read(kept)[0][0].command == "third"


def test_a_file_that_goes_while_it_is_waited_for_is_made_again(tmp_path):
    path = tmp_path / "results.jsonl"
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        waiting = threading.Thread(target=store.append, args=(path, _run("second")))
        waiting.start()
        time.sleep(0.1)
        assert path.read_text() == ""
        path.unlink()  # as one does that could not write the first run of a file
    waiting.join()
    assert [run.command for run in store.read(path)[0]] == ["second"]


def _append_often(path, name):
    for _ in range(40):
        store.append(path, store.Run(name, {"x": "y" * 5000}))


def test_store_from_several_processes(tmp_path):
    path = tmp_path / "results.jsonl"
    processes = multiprocessing.get_context("fork")
    writers = [processes.Process(target=_append_often, args=(path, name)) for name in ("a", "b")]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    runs, broken = store.read(path)
    assert broken == 0
    assert sorted(run.command for run in runs) == ["a"] * 40 + ["b"] * 40


def test_written_aside(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_aside(path, "old")
    monkeypatch.setattr(Path, "replace", lambda *_: pytest.fail("died before the renaming"))
    with pytest.raises(pytest.fail.Exception):
        write_aside(path, "new")
    assert path.read_text() == "old"


def test_worker_fails_with_its_last_words():
    with pytest.raises(conditions.WorkerError, match="KeyError: 'nonsense'"):
        list(conditions.work({"command": "nonsense", "threads": 1}, 1))


def test_conditions_hold_in_the_worker_only():
    assert "OMP_PROC_BIND=true" in conditions.unmet(1)
    assert conditions.conditions(3)["OMP_NUM_THREADS"] == "3"
