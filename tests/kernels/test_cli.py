"""The command line: exit codes, one sentence for a mistake, JSON that parses, Markdown in a pipe."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_kernels import cli
from rlhf_kernels.engine import baselines, campaign, commands, store, table
from rlhf_kernels.engine.conditions import WorkerError
from rlhf_kernels.engine.row import Row
from rlhf_kernels.runtime import dispatch, native, tuned

SWIGLU = ["--specs", "rlhf_kernels.ops.swiglu.spec"]
PLANTED = ["--specs", "planted_ops.spec"]
QUICK = ["--seconds", "0.05", "--impl", "native", "--quiet"]

needs_native = pytest.mark.skipif(native.missing("_C") is not None, reason=str(native.missing("_C")))


@pytest.fixture(autouse=True)
def surroundings(monkeypatch, tmp_path):
    """The planted ops can be imported, in workers too, and the cache is our own."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setenv("RLHF_KERNELS_CACHE", str(tmp_path / "cache"))
    tuned.forget()
    yield
    monkeypatch.undo()
    tuned.forget()
    for op in dispatch.OPS.values():
        op._chosen.clear()


@pytest.fixture
def run(capsys):
    """Runs a command: exit code, standard output, standard error."""

    def run(*words):
        code = cli.main([str(word) for word in words])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["bnech"], "unknown command 'bnech': did you mean 'bench'? expected one of doctor, list"),
        (["check", "swigl", *SWIGLU], "unknown op 'swigl': did you mean 'swiglu'? expected one of swiglu"),
        (["check", "--case", "palm_", *SWIGLU], "unknown case 'palm_': expected one of small_64x512"),
        (["check", "--dtype", "float8", *SWIGLU], "unknown dtype 'float8': did you mean 'float64'?"),
        (["check", "--tier", "small", *SWIGLU], "unknown tier 'small': expected one of smoke, typical"),
        (["check", "--backend", "cuda", *SWIGLU], "unknown backend 'cuda': expected one of reference"),
        (["bench", "--impl", "liger", *SWIGLU], "unknown implementation 'liger': did you mean 'Liger'?"),
        (["bench", "--baseline", "TRL", *SWIGLU], "unknown implementation 'TRL': expected one of torch"),
        (["bench", "--without", "trl", *SWIGLU], "unknown implementation 'trl': expected one of torch"),
        (
            ["bench", "--impl", "native", "--without", "native", *SWIGLU],
            "nothing is left to time without native",
        ),
        (["bench", "--tier", "awkward", *SWIGLU], "awkward cases are checked, not timed"),
        (["check", "--device", "tpu", *SWIGLU], "unknown device 'tpu': expected cpu or cuda"),
        (["bench", "--threads", "0"], "argument --threads: expected a number above zero, got 0"),
        (["bench", "--seconds", "soon"], "argument --seconds: invalid float value: 'soon'"),
        (["bench", "--sedonds", "1"], "unrecognized arguments: --sedonds"),
        (["bench", "--out", "/", *SWIGLU], "--out / is a directory: expected a file"),
        (["tune", "planted_wrong", *PLANTED], "nothing to tune on cpu: no knob of planted_wrong"),
        (["budget", "--target", "sm_70", *SWIGLU], "unknown target 'sm_70': did you mean"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_one_sentence(run, words, said):
    code, out, err = run(*words)
    assert (code, out) == (64, "")
    assert err.startswith(f"rlhf-kernels: {said}"), err
    assert err.count("\n") == 1


def test_no_gpu_is_said(run, monkeypatch):
    monkeypatch.setattr(commands.torch.cuda, "is_available", lambda: False)
    code, _, err = run("check", "--device", "cuda", *SWIGLU)
    assert code == 64
    assert "there is no GPU here" in err


@pytest.mark.parametrize("words", [[], ["--help"], *([name, "--help"] for name in cli.COMMANDS)])
def test_help(capsys, words):
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: rlhf-kernels")
    assert words[:1] not in ([], ["--help"]) or all(f"  {name} " in out for name in cli.COMMANDS)


def test_check_passes_and_fails(run, tmp_path):
    code, out, _ = run("check", "planted_double", *PLANTED, "--quiet", "--backend", "torch")
    assert code == 0
    assert "| planted_double | torch" in out
    code, out, err = run("check", *PLANTED, "--out", tmp_path / "rows.jsonl")
    assert code == (2 if native.missing("_C") is None else 0)
    assert "[1/" in err
    if code == 2:
        assert "What failed" in out
        assert "planted_wrong" in out.partition("What failed")[2]
        assert "planted_double" not in out.partition("What failed")[2]
    (kept,), broken = store.read(tmp_path / "rows.jsonl")
    assert broken == 0
    assert {row.op for row in kept.rows} == {"planted_double", "planted_wrong"}
    assert kept.fingerprint["torch"]


def test_check_json(run):
    code, out, _ = run("check", "swiglu", *SWIGLU, "--case", "one*", "--backend", "torch,triton", "--json")
    assert code == 0
    rows = json.loads(out)["rows"]
    assert {row["case"] for row in rows} == {"one_element"}
    assert {row["impl"] for row in rows} == {"torch", "triton"}
    assert all(row["status"] in ("ok", "unavailable") and row["median_us"] is None for row in rows)
    assert len({row["dtype"] for row in rows}) == 4


def test_list(run):
    code, out, _ = run("list", *SWIGLU, "--json")
    assert code == 0
    (op,) = json.loads(out)
    assert op["op"] == "swiglu"
    assert {"native", "triton", "torch"} <= set(op["backends"])
    assert "torch.compile" in op["implementations"]
    assert "| swiglu | " in run("list", *SWIGLU)[1]
    code, out, _ = run("list", "--json")
    assert code == 0
    found = {op["op"]: {case["name"]: case["options"] for case in op["cases"]} for op in json.loads(out)}
    assert found["gae"]["nan_masked_17x300"]["masked"] == "nan"
    assert "| small_64x512" in run("list", "swiglu", *SWIGLU)[1]


def test_ops_may_be_named_with_commas(run):
    (one, two) = json.loads(run("list", "swiglu,gae", "--json")[1])
    assert [one["op"], two["op"]] == ["swiglu", "gae"]
    assert run("list", "swiglu,gea")[2].startswith("rlhf-kernels: unknown op 'gea': did you mean 'gae'?")


@pytest.mark.parametrize(
    ("load", "said"),
    [(1.2, []), (1.9, ["1 other process was"]), (4.2, ["3 other processes were"])],
)
def test_other_processes_are_counted_in_words(monkeypatch, load, said):
    monkeypatch.setattr(commands, "running", lambda: load)
    assert commands._noise(campaign.Place(threads=1)) == [
        f"Careful: {one} running on this machine." for one in said
    ]


def test_doctor(run):
    code, out, _ = run("doctor", "--json")
    assert code == 0
    findings = {(f["topic"], f["name"]): f for f in json.loads(out)}
    assert findings["backends on cpu", "torch"]["state"] == "ok"
    assert findings["what runs", "swiglu on cpu"]["detail"]
    assert all(f["detail"] for f in findings.values())
    assert not [f for f in findings.values() if f["name"] == "doctor"], "a topic of doctor itself failed"
    assert run("doctor")[1].startswith("| topic ")


@needs_native
def test_bench_json_and_store(run, known_roofs, tmp_path):
    words = ["bench", *PLANTED, "--tier", "smoke", *QUICK, "--out", tmp_path / "a.jsonl", "--processes", "2"]
    code, out, _ = run(*words, "--json")
    assert code == 2, "planted_wrong is incorrect"
    result = json.loads(out)
    assert result["command"].startswith("rlhf-kernels bench --specs planted_ops.spec")
    rows = {(row["op"], row["impl"]): row for row in result["rows"]}
    good, wrong = rows["planted_double", "native"], rows["planted_wrong", "native"]
    wanted = (
        "op impl case dtype direction device status reason error median_us ci_us host_us gbps tflops "
        "roof_fraction peak_bytes speedup"
    )
    assert set(wanted.split()) <= set(good)
    assert good["status"] == "ok"
    assert len(good["samples_us"]) == 2
    assert good["threads"] == 1
    assert wrong["status"] == "incorrect"
    assert wrong["median_us"] is None
    (kept,), _ = store.read(tmp_path / "a.jsonl")
    assert len(kept.rows) == len(result["rows"])
    assert kept.roofs["copy"], "a page made elsewhere draws this machine's roofs"
    assert kept.roofs["matmul"]


@needs_native
def test_bench_keeps_repeated_runs_as_a_baseline(run, known_roofs, tmp_path):
    words = ["bench", "planted_double", *PLANTED, "--tier", "smoke", *QUICK, "--out", tmp_path / "a.jsonl"]
    code, out, err = run(*words, "--runs", "2", "--processes", "1", "--save-baseline", "main", "--json")
    assert code == 0, err
    assert "baseline main: 2 runs kept in" in err
    runs, _ = baselines.load("main")
    assert len(runs) == len(store.read(tmp_path / "a.jsonl")[0]) == 2
    assert runs[0].session == runs[1].session
    assert all(row.bytes for run in runs for row in run.rows)
    (row,) = [row for row in json.loads(out)["rows"] if row["impl"] == "native" and row["bytes"]]
    assert row["samples_us"] == [one for run in runs for one in run.rows[1].samples_us]


@needs_native
def test_bench_table(run):
    code, out, err = run(
        "bench", "planted_double", *PLANTED, "--tier", "smoke", "--seconds", "0.05", "--impl", "native"
    )
    assert code == 0, err
    assert "**planted_double: 2 x**" in out
    lines = [line for line in out.splitlines() if line.startswith("|")]
    assert len({len(line) for line in lines}) == 1, "the columns of Markdown are aligned"
    assert "Again: rlhf-kernels bench planted_double" in out
    assert "[1/1] planted_double small float32" in err


@needs_native
def test_bench_without_torch_compile(run):
    words = ["bench", "planted_double", *PLANTED, "--tier", "smoke", "--seconds", "0.05", "--json"]
    code, out, err = run(*words, "--without", "torch.compile")
    assert code == 0, err
    assert {row["impl"] for row in json.loads(out)["rows"]} == {"torch", "native"}


@needs_native
def test_tune_stores_and_refuses(run, tmp_path):
    words = ["tune", *PLANTED, "--case", "small", "--dtype", "float32", "--seconds", "0.05", "--threads", "1"]
    code, out, _ = run(*words, "--json", "--quiet", "--out", tmp_path / "tune.jsonl")
    assert code == 2, "one value of the knob is wrong"
    assert store.read(tmp_path / "tune.jsonl")[0][0].outcomes == json.loads(out)["outcomes"]
    result = json.loads(out)
    (outcome,) = result["outcomes"]
    assert outcome["values"] == {"waste": 1}
    assert list(outcome["refused"]) == ["waste=2"]
    (entry,) = tuned.read_table(Path(result["table"]))
    assert entry["values"] == {"waste": 1}
    assert entry["versions"]["torch"]
    found = {f["name"]: f["detail"] for f in json.loads(run("doctor", "--json")[1])}
    assert found["tuned.json"].startswith("1 of 1 entries apply here")


def test_interrupted_check_keeps_what_it_has(run, monkeypatch, tmp_path):
    whole = campaign.check

    def cut_short(*args):
        for number, row in enumerate(whole(*args)):
            if number == 3:
                raise KeyboardInterrupt
            yield row

    monkeypatch.setattr(campaign, "check", cut_short)
    code, out, err = run(
        "check", "planted_double", *PLANTED, "--quiet", "--json", "--out", tmp_path / "a.jsonl"
    )
    assert code == 130
    assert "interrupted" in err
    assert not json.loads(out)["complete"]
    assert len(store.read(tmp_path / "a.jsonl")[0][0].rows) == 3


def test_a_dying_process_keeps_what_was_measured(run, monkeypatch):
    def one_row(measurements, wanted, place, tell, processes, baseline, rows):
        row = Row("planted_double", "torch", "small", "float32", "forward", "cpu", status="unavailable")
        rows[row.key] = [row]
        raise WorkerError("the measuring process ended with -11")

    monkeypatch.setattr(campaign, "bench", one_row)
    code, out, err = run("bench", "planted_double", *PLANTED, "--json")
    assert code == 70
    assert "the measuring process ended with -11: what follows" in err
    assert len(json.loads(out)["rows"]) == 1


@needs_native
def test_a_time_limit_keeps_what_was_measured(known_roofs, tmp_path):
    words = [
        "bench",
        *PLANTED,
        "--tier",
        "smoke",
        "--seconds",
        "60",
        "--precision",
        "1e-9",
        "--impl",
        "native",
    ]
    command = [sys.executable, "-m", "rlhf_kernels", *words, "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr.readline().startswith("[1/2]")  # the worker has begun
    process.terminate()
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert not json.loads(out)["complete"]


def test_without_rich_there_are_still_tables(run, monkeypatch):
    monkeypatch.setattr(table, "Console", None)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    code, out, _ = run("list", *SWIGLU)
    assert code == 0
    assert "| swiglu | " in out


def test_on_a_terminal_rich_draws(run, monkeypatch):
    if table.Console is None:
        pytest.skip("rich is not installed")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("NO_COLOR", "1")
    out = run("list", *SWIGLU)[1]
    assert "swiglu" in out
    assert "| swiglu |" not in out
    assert "\033[3" not in out, "NO_COLOR"


def test_as_a_process():
    done = subprocess.run(
        [sys.executable, "-m", "rlhf_kernels", "check", "gea"], capture_output=True, text=True
    )
    assert done.returncode == 64
    assert done.stderr.startswith("rlhf-kernels: unknown op 'gea'")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("microseconds", "spread", "shown"),
    [
        (15.3456, 0.02, "15.3 us"),
        (15.3456, 0.2, "15.3 us"),
        (15.3456, 3.0, "15 us"),
        (0.5, 0.0, "500 ns"),
        (1234.5, 1.0, "1.23 ms"),
        (1234.5, 100.0, "1.2 ms"),
        (2_500_000, 0.0, "2.50 s"),
        (999.0, 0.0, "999 us"),
    ],
)
def test_durations_show_no_more_than_is_known(microseconds, spread, shown):
    assert table.duration(microseconds, spread) == shown


def test_sizes():
    assert [table.size(n) for n in (12, 4096, 33_554_432, 2_500_000_000)] == [
        "12 B",
        "4.1 kB",
        "33.6 MB",
        "2.5 GB",
    ]
