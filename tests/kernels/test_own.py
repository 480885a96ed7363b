"""Kernels of one's own: the example is checked, timed, tuned and guarded; planted mistakes are found."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from rlhf_kernels.engine import roofs
from rlhf_kernels.engine.clock import CpuClock, Limits
from rlhf_kernels.engine.own import Case, Cost, Inputs, own_op, randn
from rlhf_kernels.engine.spec import load_specs
from rlhf_kernels.engine.tune import Tuner
from rlhf_kernels.runtime import dispatch, tuned

pytest.importorskip("triton")
EXAMPLE = Path(__file__).parents[2] / "examples" / "own_kernel.py"

pytestmark = pytest.mark.usefixtures("forgotten")


@pytest.fixture
def planted(tmp_path):
    """The example with one line changed, and its budgets beside it."""

    def plant(old, new):
        text = EXAMPLE.read_text()
        assert text.count(old) == 1
        (tmp_path / "mine.py").write_text(text.replace(old, new))
        shutil.copytree(EXAMPLE.parent / "budgets", tmp_path / "budgets")
        return tmp_path / "mine.py"

    return plant


def test_the_example_is_right_and_short(command):
    code, out, _ = command("check", EXAMPLE, "--case", "ragged*", "--json", "--quiet")
    assert code == 0
    rows = json.loads(out)["rows"]
    right = {(row["impl"], row["dtype"]) for row in rows if row["status"] == "ok"}
    assert {
        ("triton", "float32"),
        ("triton", "float16"),
        ("native", "bfloat16"),
        ("torch", "bfloat16"),
    } <= right
    body = EXAMPLE.read_text().partition('"""\n\n')[2]
    assert len([line for line in body.splitlines() if line.strip()]) <= 42


def test_a_wrong_kernel_of_ones_own_is_found(command, planted):
    mine = planted("(gate * gate * x)", "(gate * gate * x * 1.001)")
    code, out, _ = command("check", mine, "--case", "ragged*", "--dtype", "float32", "--json", "--quiet")
    assert code == 2
    states = {row["impl"]: row["status"] for row in json.loads(out)["rows"]}
    assert states == {"torch": "ok", "native": "ok", "triton": "incorrect"}


def test_it_is_timed_in_a_process_of_its_own(command, monkeypatch, tmp_path):
    monkeypatch.setenv("RLHF_KERNELS_CACHE", str(tmp_path))
    monkeypatch.setattr(roofs, "_COPIES", {"cpu": (1 << 12,)})
    monkeypatch.setattr(roofs, "_fastest", lambda call, clock: 1e-9)
    roofs.roofs_for(torch.device("cpu"), 1, [])
    monkeypatch.chdir(EXAMPLE.parents[1])
    words = ("--case", "ragged*", "--impl", "native", "--seconds", "0.05", "--out", tmp_path / "own.jsonl")
    code, out, err = command("bench", "examples/own_kernel.py", *words)
    assert code == 0, err
    assert "**relu2: relu(gate)^2 x, elementwise.**" in out
    line = next(line for line in out.splitlines() if line.startswith("|   native"))
    assert "x |" in line, "a speed-up over eager"
    assert "Again: rlhf-kernels bench examples/own_kernel.py" in out
    assert '"op": "relu2"' in (tmp_path / "own.jsonl").read_text()


def test_its_knob_is_tuned():
    spec = load_specs(str(EXAMPLE))["relu2"]
    case = Case("narrow", {"N": 64, "F": 512}, dtypes=(torch.float32,))
    limits = Limits(seconds=0.03, warmup=0.01)
    tuner = Tuner(spec, case, torch.float32, "native", torch.device("cpu"), CpuClock(), limits)
    (outcome,) = tuner.outcomes()
    assert set(outcome.timings_us) == {"block=16384", "block=4096", "block=65536"}
    assert outcome.refused == {}
    assert outcome.shape == tuned.shape_class(torch.empty(64, 512))


def test_its_budget_holds_and_a_narrowed_load_is_found(command, planted, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0}, raising=False)  # one compiling process
    mine = planted("aligned=tuple(kinds)", 'aligned=tuple(kinds) if target == "sm_90" else ()')
    code, out, err = command("budget", mine, "--target", "sm_80,sm_90", "--json")
    rows = {row["device"]: row for row in json.loads(out)}
    if code == 3:
        pytest.skip(f"the budgets are of another compiler: {rows['sm_90']['reason']}")
    assert code == 1, err
    assert rows["sm_90"]["status"] == "ok"
    assert rows["sm_90"]["budget"]["narrow_loads"] == 0
    assert rows["sm_80"]["status"] == "incorrect"
    assert "narrow_loads" in rows["sm_80"]["reason"]


def test_the_declared_function_takes_the_best_backend():
    spec = load_specs(str(EXAMPLE))["relu2"]
    x, gate = torch.randn(2, 8, 16)
    want = torch.relu(gate).square() * x
    for given in (spec.function(x, gate), spec.function(x, gate=gate), spec.function(gate=gate, x=x)):
        torch.testing.assert_close(given, want)
    choice = dispatch.explain("relu2")
    assert choice.backend == "native"
    with dispatch.backend("relu2=triton", strict=True):
        torch.testing.assert_close(spec.function(x, gate), want)


ONE = Case("one", {"N": 4})


def _declared(name="mine", backends=None, cases=(ONE,)):
    def make(case, dtype, generator, device):
        return Inputs({"x": randn((4,), dtype, generator, device)})

    return own_op(
        name, lambda x: 2 * x, backends or {}, make=make, cost=lambda *_: Cost(4, 32), cases=cases
    )  # fmt: skip


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"name": "gae"}, "'gae' is an op of rlhf_kernels"),
        ({"name": "my op"}, "expected a name such as 'my_scale', got 'my op'"),
        ({"backends": {"cuda": abs}}, "unknown backend 'cuda', expected native, triton, gluon"),
        ({"cases": ()}, "expected a case or more"),
    ],
)
def test_mistaken_declarations(given, said):
    with pytest.raises(ValueError, match=said):
        _declared(**given)
    assert dispatch.OPS["gae"].room == "rlhf_kernels.ops.advantage"


def test_mistakes_on_the_command_line_are_one_sentence(command, tmp_path):
    (tmp_path / "empty.py").write_text("")
    (tmp_path / "broken.py").write_text("1 / 0")
    cases = {
        (tmp_path / "empty.py",): "declares no op: expected SPECS",
        (tmp_path / "broken.py",): "cannot be imported: ZeroDivisionError: division by zero",
        (tmp_path / "absent.py",): "there is no file",
        ("no_such.specs",): "no_such.specs cannot be imported: ModuleNotFoundError",
        (EXAMPLE, "other.specs"): "expected one package of specs, got",
        (EXAMPLE, "relu3"): "unknown op 'relu3': did you mean 'relu2'?",
    }
    for words, said in cases.items():
        code, out, err = command("check", *words)
        assert (code, out) == (64, "")
        assert said in err
        assert err.count("\n") == 1


def test_a_module_of_a_package(command, tmp_path, monkeypatch):
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "__init__.py").write_text("")
    shutil.copy(EXAMPLE, tmp_path / "my_package" / "specs.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [p for p in os.sys.path if p not in ("", os.getcwd())])
    code, out, _ = command("list", "my_package.specs", "--json")
    assert code == 0
    assert [op["op"] for op in json.loads(out)] == ["relu2"]
