"""Exit codes of what could not be done, and what is kept of it: no backend, no inputs, no room, a defect."""

import json
import subprocess
import sys

import pytest
import torch

from rlhf_kernels import cli
from rlhf_kernels.engine import campaign, gate, roofs, store, tune
from rlhf_kernels.engine.bench import Bench
from rlhf_kernels.engine.regress import Regression
from rlhf_kernels.engine.spec import load_specs
from rlhf_kernels.engine.turns import SIDES, Side, Target
from rlhf_kernels.runtime import dispatch

PLANTED = ["--specs", "planted_ops.spec"]
SWIGLU = ["--specs", "rlhf_kernels.ops.swiglu.spec"]

pytestmark = pytest.mark.usefixtures("planted_specs", "own_cache", "forgotten")


def test_nothing_checked_is_not_fine(command, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(dispatch.Op, "unsupported", lambda op, name, *_: f"{name} is elsewhere")
    code, out, err = command("check", "planted_double", *PLANTED, "--quiet", "--backend", "torch")
    assert code == 3
    assert "Nothing was checked." in out
    assert err == (
        "rlhf-kernels: nothing was checked: --backend torch does not run here on cpu; rlhf-kernels doctor "
        "says how to mend it\n"
    )
    code, _, err = command("check", "planted_double", *PLANTED, "--quiet", "--backend", "gluon")
    assert code == 3
    assert "--backend gluon names none that these ops have: expected some of reference, torch" in err


def test_nothing_timed_of_what_was_asked_for_is_not_fine(command, known_roofs):
    words = ["bench", "swiglu", *SWIGLU, "--case", "small_64x512", "--seconds", "0.02", "--device", "cpu"]
    words += ["--quiet", "--json"]
    code, out, err = command(*words, "--impl", "triton")
    rows = {row["impl"]: row["status"] for row in json.loads(out)["rows"]}
    assert (code, rows) == (3, {"torch": "ok", "triton": "unavailable"})
    said = (
        "nothing was timed: --impl triton does not run here on cpu; rlhf-kernels doctor says how to mend it"
    )
    assert err == f"rlhf-kernels: {said}\n"
    code, _, err = command(*words, "--impl", "triton,torch")
    assert (code, err) == (0, "")


RAISING = """
from rlhf_kernels.engine.own import Case, Cost, Inputs, own_op
def make(case, dtype, generator, device):
    raise KeyError("Q")
SPECS = (own_op("raising", lambda x: x, {"native": lambda x: x}, make=make, cost=lambda *_: Cost(1, 1),
    cases=(Case("only", {}, tier="smoke"),)),)
"""


def test_inputs_that_cannot_be_made_are_rows(command, tmp_path):
    (tmp_path / "raising.py").write_text(RAISING)
    words = [tmp_path / "raising.py", "--dtype", "float32", "--quiet", "--json"]
    code, out, _ = command("check", *words)
    rows = json.loads(out)["rows"]
    assert code == 2
    assert {row["impl"] for row in rows} == {"torch", "native"}
    assert {row["reason"] for row in rows} == {"its inputs cannot be made: KeyError: 'Q'"}
    (spec,) = load_specs(str(tmp_path / "raising.py")).values()
    bench = Bench(torch.device("cpu"), None, roofs.Roofs(), 1)
    (row,) = bench.rows(spec, spec.cases[0], torch.float32)
    assert (row.status, row.reason) == ("error", rows[0]["reason"])
    code, _, err = command("list", tmp_path / "raising.py")
    assert (code, err) == (64, "rlhf-kernels: raising: the inputs of only cannot be made: KeyError: 'Q'\n")


LATER = """
from rlhf_kernels.engine.own import Case, Cost, Inputs, Knob, own_op, randn
def native(x, *, waste=0):
    return x + x
def make(case, dtype, generator, device):
    return Inputs({"x": randn([case.sizes["N"]], dtype, generator, device)})
SPECS = (own_op("later", lambda x: 2 * x, {"native": native}, make=make, cost=lambda *_: Cost(1, 1),
    cases=[Case(name, sizes, tier="smoke") for name, sizes in CASES.items()],
    knobs=(Knob("waste", "native", (0, 1), ("forward",)),)),)
"""
FINE, BROKEN = {"N": 64}, {}


def later(file, **cases):
    """A file of specs in which some cases have no sizes to make inputs of."""
    file.write_text(f"CASES = {cases}\n{LATER}")
    return file


def test_tuning_goes_on_behind_inputs_that_cannot_be_made(command, tmp_path):
    file = later(tmp_path / "later.py", first=FINE, broken=BROKEN, last=FINE)
    code, out, err = command("tune", file, "--dtype", "float32", "--seconds", "0.02", "--quiet", "--json")
    assert code == 2, err
    first, broken, last = json.loads(out)["outcomes"]
    assert (first["case"], first["refused"], len(first["timings_us"])) == ("first", {}, 2)
    assert (last["case"], last["refused"], len(last["timings_us"])) == ("last", {}, 2)
    assert (broken["case"], broken["backend"], broken["timings_us"]) == ("broken", "native", {})
    assert broken["refused"] == {"waste=0": "error: its inputs cannot be made: KeyError: 'N'"}


def test_regress_goes_on_behind_inputs_that_cannot_be_made(tmp_path):
    """One case that head broke, one that base had not right before, one that is fine."""
    files = [tmp_path / "base.py", tmp_path / "head.py"]
    later(files[0], first=FINE, broken=FINE, before=BROKEN)
    later(files[1], first=FINE, broken=BROKEN, before=FINE)
    sides = {side: Side(tmp_path, package=str(file)) for side, file in zip(SIDES, files)}
    targets = [
        Target("later", case, "float32", "forward", "native") for case in ("before", "broken", "first")
    ]
    found = Regression(tmp_path, ("a", "b"), campaign.Place(), targets, pairs=1, seconds=0.02)
    found.by_turns(sides, lambda *_: None, lambda: None)
    report = found.report()
    rows = {row.case: row for row in report.rows}
    assert set(rows) == {"broken", "first"}
    assert rows["first"].ratio > 0
    why = "error: its inputs cannot be made: KeyError: 'N'"
    assert (rows["broken"].verdict, rows["broken"].reason) == ("missing", why)
    assert gate.exit_code(report, "pass") == 2
    assert (
        f"Not compared, since base is not right: later before float32 forward: native is {why}"
        in report.notes
    )


def test_a_defect_is_not_a_regression(command, monkeypatch):
    def broken(args):
        raise AssertionError("planted")

    monkeypatch.setitem(cli.COMMANDS, "doctor", (broken, lambda parser: None))
    code, _, err = command("doctor")
    assert code == 70
    assert "Traceback" in err
    assert "planted" in err


def test_a_full_disk_is_one_sentence():
    with open("/dev/full", "w") as full:
        words = [sys.executable, "-m", "rlhf_kernels", "list", *SWIGLU]
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (70, "rlhf-kernels: No space left on device\n")


def test_an_out_that_cannot_be_written_is_refused_before_anything_is_measured(command, tmp_path):
    words = ["check", "planted_double", *PLANTED, "--backend", "torch", "--out"]
    code, out, err = command(*words, "/proc/x/rows.jsonl")
    assert (code, out) == (64, "")
    assert err == (
        "rlhf-kernels: --out /proc/x/rows.jsonl cannot be written: No such file or directory: /proc\n"
    )
    assert command(*words, tmp_path / "new" / "rows.jsonl")[0] == 0
    assert not list(tmp_path.glob(".rlhf-kernels*"))


def test_the_table_is_shown_although_out_fails(command, monkeypatch, tmp_path):
    def full(path, _):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(store, "append", full)
    words = ["check", "planted_double", *PLANTED, "--backend", "torch", "--quiet", "--out", tmp_path / "a"]
    code, out, err = command(*words)
    assert code == 64
    assert out.startswith("| op ")
    assert "No space left on device" in err
    json.loads(command(*words, "--json")[1])


def test_a_cache_that_cannot_be_written_costs_no_result(command, monkeypatch, known_roofs):
    monkeypatch.setenv("RLHF_KERNELS_CACHE", "/proc/x")
    assert roofs.roofs_for(torch.device("cpu"), 1, []).copy
    found = {f["name"]: f for f in json.loads(command("doctor", "--json")[1])}
    assert found["cache"]["state"] == "error"
    assert "No such file or directory: /proc; nothing is kept" in found["cache"]["detail"]
    monkeypatch.setattr(campaign, "bench", lambda *args: [])
    assert "the cache cannot be written: No such" in command("bench", "planted_double", *PLANTED)[2]
    one = tune.Outcome("planted_double", "native", "forward", "small", "float32", {"waste": 1}, {"waste": 0})
    one.timings_us, one.shape = {"waste=1": 1.0}, (8, 6)
    monkeypatch.setattr(campaign, "tune", lambda *args: iter([one]))
    code, out, err = command("tune", "planted_double", *PLANTED, "--quiet")
    assert code == 70
    assert 'Not stored: {"op": "planted_double", ' in out
    assert "what was found could not be stored in /proc/x/tuned.json (No such file or directory" in err
    (entry,) = json.loads(command("tune", "planted_double", *PLANTED, "--quiet", "--json")[1])["unstored"]
    assert entry["values"] == {"waste": 1}
