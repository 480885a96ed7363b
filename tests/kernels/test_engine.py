"""The engine: what it must catch, that it measures fairly, and that what it keeps can be read again."""

import dataclasses
import inspect
import itertools
import json
import math
import multiprocessing
import time
from pathlib import Path

import pytest
import torch

from rlhf_kernels.engine import conditions, implementations, poison, roofs, stats, store, tune
from rlhf_kernels.engine.bench import Bench, merged
from rlhf_kernels.engine.check import Judge, check_case, deviation
from rlhf_kernels.engine.clock import Contender, CpuClock, Limits, clock_for, measure
from rlhf_kernels.engine.memory import peak_bytes
from rlhf_kernels.engine.row import Row
from rlhf_kernels.engine.spec import Case, Cost, load_specs
from rlhf_kernels.ops.swiglu import kernel_torch
from rlhf_kernels.ops.swiglu.spec import SPECS
from rlhf_kernels.runtime import dispatch, native, tuned
from rlhf_kernels.runtime.files import write_aside
from rlhf_kernels.stacks import Unavailable, peers

SWIGLU = SPECS[0]
CPU = torch.device("cpu")
SHORT = Limits(seconds=0.05, warmup=0.02, rounds=3, precision=0.5)
allocate = torch._C._dynamo.guards._empty_strided_cpu  # what native kernels allocate with

needs_native = pytest.mark.skipif(native.missing("_C") is not None, reason=str(native.missing("_C")))


@pytest.fixture
def planted(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    return load_specs("planted_ops.spec")


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """A cache of its own; choices of kernels that depend on it are forgotten before and after."""
    monkeypatch.setenv("RLHF_KERNELS_CACHE", str(tmp_path))

    def forget():
        tuned.forget()
        for op in dispatch.OPS.values():
            op._chosen.clear()

    forget()
    yield tmp_path
    monkeypatch.undo()
    forget()


# --- check -----------------------------------------------------------------------------------------------


def swiglu(x, gate=None, gate_first=False):
    return kernel_torch.swiglu(x, gate, gate_first=gate_first)


def _unwritten(x, gate=None, gate_first=False):
    good = swiglu(x, gate, gate_first)
    out = allocate(tuple(good.shape), good.stride(), good.dtype)
    out[1:] = good[1:]
    return out


def _writes_to_input(x, gate=None, gate_first=False):
    out = swiglu(x, gate, gate_first)
    x.data[0, 0] += 1
    return out


def _writes_between_rows(x, gate=None, gate_first=False):
    x.data.as_strided((1,), (1,), x.storage_offset() - 1).fill_(7.0)  # the gap before the first row
    return swiglu(x, gate, gate_first)


_flips = itertools.count()


def _undecided(x, gate=None, gate_first=False):
    return swiglu(x, gate, gate_first) * (1 + 1e-7 * (next(_flips) % 2))


class _DroppedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        grad[-1] = 0
        return grad


def _wrong_gradient(x, gate=None, gate_first=False):
    return _DroppedGradient.apply(swiglu(x, gate, gate_first))


def _raises(x, gate=None, gate_first=False):
    raise RuntimeError("no\nsecond line")


def _cannot(x, gate=None, gate_first=False):
    raise Unavailable("not with these shapes")


@pytest.mark.parametrize(
    ("function", "case", "forward", "backward", "reason"),
    [
        (swiglu, "small_64x512", "ok", "ok", ""),
        (lambda **a: swiglu(**a) + 1e-3, "small_64x512", "incorrect", "ok", "the output is off by 0.001"),
        (_wrong_gradient, "small_64x512", "ok", "incorrect", "the gradient of x is off by"),
        (_unwritten, "small_64x512", "incorrect", "incorrect", "the output is not finite"),
        (_writes_to_input, "small_64x512", "incorrect", "incorrect", "it wrote to its inputs"),
        (_writes_between_rows, "strided_7x130", "incorrect", "incorrect", "it wrote to its inputs"),
        (_undecided, "small_64x512", "incorrect", "incorrect", "a second run gave other bits"),
        (lambda **a: swiglu(**a).double(), "small_64x512", "incorrect", "ok", "the output is float64 (64,"),
        (lambda **a: swiglu(**a)[:, :-1], "small_64x512", "error", "error", "RuntimeError"),
        (lambda **a: (swiglu(**a),) * 2, "small_64x512", "incorrect", "ok", "2 outputs, expected 1"),
        (_raises, "small_64x512", "error", "error", "RuntimeError: no"),
        (_cannot, "small_64x512", "unavailable", "unavailable", "not with these shapes"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)  # fmt: skip
def test_check_verdicts(function, case, forward, backward, reason):
    rows = Judge(SWIGLU, SWIGLU.case(case), torch.float32).rows("planted", function)
    assert [row.status for row in rows] == [forward, backward], rows
    bad = next((row for row in rows if row.status != "ok"), rows[0])
    assert bad.reason.startswith(reason), bad.reason
    assert "second line" not in bad.reason


@pytest.mark.parametrize("n", [1, 30, 100, 700, 40_000, 3_000_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_nothing_of_old_memory_is_left(n, dtype):
    """Also in what `torch.empty` does not allocate, and in what was freed a moment ago."""
    for _ in range(5):
        churned = [torch.ones(n + i, dtype=dtype) for i in range(20)]
        del churned[::2]
        with poison.poisoned(CPU, [torch.empty(n, dtype=dtype)]):
            for new in (torch.empty(n, dtype=dtype), allocate((n,), (1,), dtype)):
                assert not (new == 1).any()
                assert n < 1000 or new.isnan().all()


def test_unwritten_output_fails_although_old_memory_held_the_answer():
    judge = Judge(SWIGLU, SWIGLU.case("small_64x512"), torch.float32)
    for _ in range(3):
        swiglu(**judge.inputs.args)  # freed memory of the right size now holds the right values
    (row,) = judge.rows("planted", _unwritten, ["forward"])
    assert (row.status, row.error) == ("incorrect", math.inf)


def test_deviation_of_infinities_and_integers():
    inf, nan = math.inf, math.nan
    want = torch.tensor([1.0, inf, nan, 2.0, 1e9], dtype=torch.float64)
    yard = torch.tensor([1.0, inf, nan, nan, inf])
    assert deviation(torch.tensor([1.0, inf, nan, nan, inf]), want, yard, 1.0)[0] == 0  # as the yardstick
    assert deviation(torch.tensor([1.0, inf, nan, 2.0, 1e9]), want, yard, 1.0)[0] == 0  # or better
    assert deviation(torch.tensor([1.0, -inf, nan, 2.0, 1e9]), want, yard, 1.0)[0] == inf
    assert deviation(torch.tensor([nan, inf, nan, 2.0, 1e9]), want, yard, 1.0)[0] == inf
    error, allowed = deviation(torch.tensor([1.5]), torch.tensor([1.0]).double(), torch.tensor([1.125]), 2.0)
    assert (error, allowed) == (0.5, 0.25 + 2 * 2**-23)
    tokens = torch.tensor([3, 5, 7])
    assert deviation(tokens, torch.tensor([3, 5, 8]), torch.tensor([3, 5, 7]), 1.0) == (0.0, 0.0)
    assert deviation(tokens, torch.tensor([3, 4, 8]), torch.tensor([3, 4, 8]), 1.0) == (2.0, 0.0)


def test_only_the_checked_rows_count(planted):
    spec = planted["planted_double"]

    def wrong_in(row):
        def function(x):
            out = 2 * x
            out[row] += 1
            return out

        return function

    judge = Judge(spec, spec.case("rows"), torch.float32)
    assert judge.reference.outputs[0].shape == (2, 8)
    assert judge.rows("planted", wrong_in(5))[0].status == "ok"
    assert judge.rows("planted", wrong_in(63))[0].status == "incorrect"


def test_padding_of_a_foreign_function_does_not_count():
    spec = load_specs()["gae"]
    case = next(c for c in spec.cases if "mask" in spec.make(c, torch.float32, torch.Generator(), CPU).args)
    judge = Judge(spec, case, torch.float32)

    def careless(**args):
        return tuple(out.masked_fill(~args["mask"], 7.0) for out in spec.torch_form(**args))

    assert judge.rows("planted", careless, ["forward"])[0].status == "incorrect"
    assert judge.rows("planted", careless, ["forward"], foreign=True)[0].status == "ok"
    wrong = judge.rows("planted", lambda **a: tuple(o + 1 for o in careless(**a)), ["forward"], foreign=True)
    assert wrong[0].reason.startswith("returns is off by 1")


def test_fall_back_is_not_the_backend_asked_for():
    rows = check_case(SWIGLU, SWIGLU.cases[0], torch.float32, "gluon")
    assert {row.status for row in rows} == {"unavailable"}
    assert rows[0].reason == "swiglu has no gluon kernel"


def test_a_row_that_is_not_ok_has_no_time():
    with pytest.raises(ValueError, match="has no time"):
        Row("op", "impl", "case", "float32", "forward", "cpu", status="incorrect", median_us=1.0)
    row = Row("op", "impl", "case", "float32", "forward", "cpu", median_us=1.0, error=math.inf)
    assert row.failed("error", "why").median_us is None
    assert row.to_json()["error"] is None
    assert Row.from_json(json.loads(json.dumps(row.to_json()))).median_us == 1.0


# --- clock and statistics --------------------------------------------------------------------------------


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
def test_speed_ups_over_another_baseline(planted):
    spec = planted["planted_double"]
    bench = _bench(wanted=["torch"], baseline="native", directions=["forward"])
    rows = {row.impl: row for row in bench.rows(spec, spec.case("small"), torch.float32)}
    assert set(rows) == {"torch", "native"}
    assert rows["native"].speedup == 1.0
    assert rows["torch"].speedup > 1.0, "the native kernel wastes time by default"
    assert {row.baseline for row in rows.values()} == {"native"}


@needs_native
def test_bench_shows_no_time_of_what_is_wrong(planted):
    spec = planted["planted_wrong"]
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


def test_roofs_are_kept(cache, monkeypatch):
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
    (cache / "roofs.json").write_text("{broken")
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
    path.write_text(json.dumps(_run("x").header() | {"schema": 99}))
    with pytest.raises(ValueError, match=r"holds schema 99.*upgrade"):
        store.read(path)


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


# --- tune ------------------------------------------------------------------------------------------------


def _tuner(planted):
    spec = planted["planted_double"]
    return tune.Tuner(spec, spec.case("small"), torch.float32, "native", CPU, CpuClock(), SHORT)


@needs_native
def test_tune_finds_the_fast_value_and_refuses_the_wrong_one(planted, cache):
    (outcome,) = _tuner(planted).outcomes()
    assert outcome.values == {"waste": 1}
    assert outcome.default == {"waste": 0}
    assert outcome.gain > 1.02
    assert set(outcome.timings_us) == {"waste=0", "waste=1"}
    assert outcome.refused["waste=2"].startswith("incorrect: the output is off by")
    assert outcome.shape == (9, 7)  # 256 rows of 64

    path = tune.store(outcome.entry("cpu", torch.get_num_threads()))
    assert path == cache / "tuned.json"
    tune.store(outcome.entry("cpu", torch.get_num_threads()) | {"gain": 9})
    (entry,) = tuned.read_table(path)  # in place of the first
    assert entry["gain"] == 9

    for op in dispatch.OPS.values():
        op._chosen.clear()
    assert "tuned for 1 shapes" in str(dispatch.explain("planted_double"))
    function = planted["planted_double"].function
    kernel = dispatch.OPS["planted_double"].choose(torch.ones(256, 64))
    assert torch.equal(function(torch.ones(256, 64)), torch.full((256, 64), 2.0))
    assert kernel.forward._bound[torch.Size((256, 64)), torch.float32].keywords == {"waste": 1}
    function(torch.ones(2, 3))
    assert kernel.forward._bound[torch.Size((2, 3)), torch.float32] is kernel.forward._function


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"device": "another"}, "measured on another"),
        ({"threads": 77}, "measured with 77 threads"),
        ({"versions": {"torch": "1.0"}}, "measured with torch 1.0"),
    ],
)
def test_entries_of_another_machine_are_skipped(cache, change, reason):
    outcome = tune.Outcome("swiglu", "native", "forward", "c", "float32", {"grain": 1}, {"grain": 2})
    entry = outcome.entry("cpu", torch.get_num_threads())
    assert tuned.mismatch(entry, "cpu") is None
    assert tuned.mismatch(entry | change, "cpu").startswith(reason)
    tune.store(entry | change)
    assert tuned.classes("swiglu", "native", "forward", "cpu") == {}


def test_lookup_is_exact_or_near_within_range_or_the_default():
    found = {(5, 5): {"grain": 1}, (9, 5): {"grain": 2}, (9, 9): {"grain": 3}}
    assert tuned.lookup(found, (9, 5)) == ({"grain": 2}, "exact")
    assert tuned.lookup(found, (8, 5)) == ({"grain": 2}, "nearest, (9, 5)")
    assert tuned.lookup(found, (10, 5)) == ({}, "default")  # more rows than were ever measured
    assert tuned.lookup({}, (1, 1)) == ({}, "default")


def test_a_broken_table_is_no_table(cache):
    for text in ("{", "[]", '{"schema": 99, "entries": [1]}'):
        (cache / "tuned.json").write_text(text)
        assert tuned.read_table(cache / "tuned.json") == []


@needs_native
def test_knob_defaults_are_those_of_the_kernels():
    for spec in load_specs().values():
        for knob in spec.knobs:
            kernel = spec.op.module(knob.backend)
            functions = [f for f in knob.functions if hasattr(kernel, f)]
            assert functions, spec.name
            for function in functions:
                default = None
                if inspect.isfunction(getattr(kernel, function)):
                    default = inspect.signature(getattr(kernel, function)).parameters[knob.name].default
                if default is None:  # the kernel leaves it to its schema
                    name = spec.name + "_backward" * (function == "backward")
                    schema = getattr(torch.ops.rlhf_kernels_native, name).default._schema
                    default = next(a.default_value for a in schema.arguments if a.name == knob.name)
                assert default == knob.candidates[0], f"{spec.name}.{function}: {knob.name}"


def test_cases_are_found_by_name():
    case = Case("a", {"N": 1})
    assert dataclasses.replace(SWIGLU, cases=(case,)).case("a") is case
    with pytest.raises(ValueError, match="no case 'b': expected one of a"):
        dataclasses.replace(SWIGLU, cases=(case,)).case("b")
