"""The pytest plug-in in a project that is not ours: its clock, errors, roof share, and what it refuses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pytest_rlhf_kernels
from rlhf_kernels.engine import pytest_fixture, roofs
from rlhf_kernels.engine.clock import Limits
from rlhf_kernels.engine.fingerprint import fingerprint, machine_id

pytest.importorskip("pytest_benchmark")

ROOT = Path(__file__).parents[2]
PROJECT = """
import pytest
import torch
from rlhf_kernels.engine.spec import Cost


def doubled(x):
    return torch.add(x, x)


def forgetful(x):
    out = torch.empty_like(x)
    torch.mul(x[:, :-1], 2, out=out[:, :-1])
    return out


def plain(x):
    return 2 * x


@pytest.mark.benchmark(group="doubling")
def test_good(kernel_benchmark):
    x = torch.randn(64, 512)
    out = kernel_benchmark(doubled, x, reference=plain, cost=Cost(flops=x.numel(), bytes=2 * x.nbytes))
    assert torch.equal(out, 2 * x)


def test_both_directions(kernel_benchmark):
    kernel_benchmark(doubled, x=torch.randn(64, 512), reference=plain, wrt=["x"])


def test_forgetful(kernel_benchmark):
    kernel_benchmark(forgetful, torch.randn(64, 512), reference=plain)


def test_remembers(kernel_benchmark):
    known = {}
    kernel_benchmark(lambda x: known.setdefault(x.data_ptr(), 2 * x), torch.randn(64, 512), reference=plain)


def test_too_fast(kernel_benchmark):
    kernel_benchmark(doubled, torch.randn(4, 4), cost=Cost(flops=1, bytes=5e7))


def test_usual(benchmark):
    benchmark(sum, [1, 2, 3])
"""


@pytest.fixture
def project(tmp_path):
    """Runs pytest on the file above, or another, as a project with nothing but the installed plug-ins."""
    machine = {"copy": {"65536": 5e10}, "matmul": {"float32": 1e11}}
    known = {"schema": roofs.SCHEMA, "machines": {machine_id(fingerprint("cpu", 1)): machine}}
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "roofs.json").write_text(json.dumps(known))
    # pytest-benchmark keeps still where it finds itself in a worker of pytest-xdist.
    outer = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    environment = outer | {"PYTHONPATH": str(ROOT), "RLHF_KERNELS_CACHE": str(tmp_path / "cache")}

    def run(*words, text=PROJECT):
        (tmp_path / "test_project.py").write_text(text)
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "pytest_rlhf_kernels",
            *words,
            "--rootdir",
            ".",
        ]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    return run


def test_a_project_of_its_own(project, tmp_path):
    # A saved run that is a thousand times as fast: pytest-benchmark's own coarse net must hold.
    stats = dict.fromkeys(("min", "max", "mean", "median", "q1", "q3", "ld15iqr", "hd15iqr", "total"), 1e-9)
    stats |= {"stddev": 0, "iqr": 0, "rounds": 9, "iterations": 1, "ops": 1e9, "outliers": "0;0"}
    old = {"name": "test_good", "fullname": "test_project.py::test_good", "group": "doubling", "stats": stats}
    old |= {"params": None, "param": None, "extra_info": {}, "options": {}}
    (tmp_path / "fast.json").write_text(json.dumps({"machine_info": {}, "benchmarks": [old]}))
    quick = ("--kernel-seconds", "0.05", "--benchmark-max-time", "0.05")
    net = ("--benchmark-compare", "fast.json", "--benchmark-compare-fail", "median:50%")
    done = project(*quick, *net, "--benchmark-json", "saved.json")
    assert done.returncode == 1, done.stdout
    assert "Performance has regressed" in done.stdout + done.stderr
    assert done.stdout.startswith("..FFF."), "forgetful, from memory, and too fast"
    assert "it has no time: after it was timed it gave a wrong answer to new inputs" in done.stdout
    assert "pytest_fixture.py" not in done.stdout, "what failed is said at the test's own line"
    assert "not timed, because the forward is incorrect: the output is not finite" in done.stdout
    assert "us is too short for 50000000 bytes on this machine" in done.stdout
    saved = json.loads((tmp_path / "saved.json").read_text())
    assert saved["machine_info"]["rlhf_kernels"]["torch"] == torch.__version__
    timed = {one["name"]: one for one in saved["benchmarks"]}
    assert set(timed) == {"test_good", "test_both_directions", "test_usual"}, "what failed has no time"
    good = timed["test_good"]
    assert good["group"] == "doubling", "the marker of the test itself counts"
    assert good["options"]["timer"] == "rlhf_kernels_clock"
    assert timed["test_usual"]["options"]["timer"] != "rlhf_kernels_clock"
    info = good["extra_info"]
    assert info["clock"] == "CpuClock"
    assert info["error"] <= info["allowed"]
    assert info["roof_fraction"] > 0
    assert info["gbps"] == pytest.approx(2 * 64 * 512 * 4 / good["stats"]["median"] / 1e9)
    assert info["ci"][0] <= good["stats"]["median"] <= info["ci"][1]
    assert info["batch"] > 1
    assert any(one.startswith("OMP_PROC_BIND") for one in info["conditions_unmet"])
    assert timed["test_both_directions"]["extra_info"]["direction"] == "forward+backward"


def test_unused_it_imports_nothing(project):
    text = """
import sys

def test_light():
    assert "pytest_rlhf_kernels" in sys.modules
    assert not {"torch", "rlhf_kernels", "numpy"} & set(sys.modules)
"""
    done = project("-p", "no:benchmark", text=text)
    assert done.returncode == 0, done.stdout
    assert "1 passed" in done.stdout


class Options:
    """What the hooks read of a pytest configuration."""

    def __init__(self, force=False):
        self.values = {"kernel_force": force, "kernel_threads": 1}

    def getoption(self, name):
        return self.values[name]


def test_unlike_machines_are_refused():
    here = fingerprint("cpu", 1)
    compare = pytest_rlhf_kernels.pytest_benchmark_compare_machine_info

    def saved(**other):
        return {"machine_info": {"rlhf_kernels": here | other}}

    compare(Options(), saved(commit="another", dirty=True))
    compare(Options(), {"machine_info": {}})
    with pytest.raises(pytest.exit.Exception, match=r"torch 1\.0, here") as refused:
        compare(Options(), saved(torch="1.0"))
    assert refused.value.returncode == 3
    compare(Options(force=True), saved(torch="1.0"))


def test_disabled_it_still_checks():
    class Disabled:
        name, disabled, extra_info = "test", True, {}

        def pedantic(self, call):
            return call()

    kernel = pytest_fixture.KernelBenchmark(Disabled(), pytest_fixture.Replay(), Limits())
    x = torch.randn(8, 8)
    assert torch.equal(kernel(lambda x: x + x, x, reference=lambda x: 2 * x), 2 * x)
    with pytest.raises(AssertionError, match="is off by"):
        kernel(lambda x: x * 2.001, x, reference=lambda x: 2 * x)
    with pytest.raises(AssertionError, match="the backward is incorrect"):
        kernel(_Halved.apply, x, reference=lambda x: 2 * x, wrt=[0])
    with pytest.raises(TypeError, match="expected a tensor among the arguments"):
        kernel(sum, [1, 2])
    for given, kind, said in (
        ({"wrt": [3]}, ValueError, r"wrt has 3, expected positions, .* tensors: 0"),
        ({"wrt": ["x"]}, ValueError, r"wrt has 'x', expected positions"),
        ({"cost": (1, 2)}, TypeError, r"expected cost=rlhf_kernels.engine.spec.Cost\(.*\), got \(1, 2\)"),
        ({"reference": 3}, TypeError, r"expected reference=a function, got 3"),
    ):
        with pytest.raises(kind, match=said):
            kernel(lambda x: x + x, x, **given)
    with pytest.raises(TypeError, match="expected a function, got 3"):
        kernel(3, x)


class _Halved(torch.autograd.Function):
    """2 x with half its gradient."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return grad
