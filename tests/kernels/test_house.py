"""The house itself: choice of backends, overrides, strict mode, import cost."""

import json
import pickle
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

import rlhf_kernels
from rlhf_kernels.engine.spec import load_specs
from rlhf_kernels.ops.loss_head import kernel_torch
from rlhf_kernels.runtime import dispatch, native


def _python(code, **environment):
    """Runs code in a fresh process; returns (exit code, stdout, stderr)."""
    import os

    env = {k: v for k, v in os.environ.items() if not k.startswith(("RLHF_KERNELS", "TRITON_INTERPRET"))}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env | environment, timeout=120
    )
    return done.returncode, done.stdout.strip(), done.stderr.strip()


def test_after_a_warm_up_a_first_call_loads_nothing():
    code = (
        "import sys, torch, rlhf_kernels as rk\n"
        "x = torch.randn(2, 8, requires_grad=True)\n"
        "print(*rk.warm_up('swiglu', 'gae'), sep='; ')\n"
        "before = set(sys.modules)\n"
        "rk.swiglu(x).sum().backward()\n"
        "print(sorted(set(sys.modules) - before))"
    )
    status, out, error = _python(code)
    assert status == 0, error
    chosen, loaded = out.splitlines()
    assert chosen == f"{rlhf_kernels.explain('swiglu')}; {rlhf_kernels.explain('gae')}"
    assert loaded == "[]"
    for given in ({"tier": "huge"}, {"ops": ("swigloo",)}):
        with pytest.raises(ValueError, match="expected one of"):
            rlhf_kernels.warm_up(*given.pop("ops", ()), **given)


def test_a_warm_up_calls_every_op_forward_and_backward(monkeypatch):
    ours = {spec.op.name: spec.op for spec in load_specs().values()}
    for op in ours.values():
        monkeypatch.setattr(op, "_chosen", {})
    backward, calls = kernel_torch.backward, []
    monkeypatch.setattr(kernel_torch, "backward", lambda *args: calls.append(args) or backward(*args))
    with rlhf_kernels.backend("logprob=torch"):
        assert {choice.op for choice in rlhf_kernels.warm_up()} == set(ours)
    assert all(op._chosen for op in ours.values())
    assert calls


def test_explain_names_backend_and_reason():
    choice = rlhf_kernels.explain("swiglu")
    assert choice.backend in ("native", "torch")
    assert str(choice) == f"swiglu on cpu in float32: {choice.backend} ({choice.reason})"


def test_explain_unknown_op_names_the_ops():
    with pytest.raises(ValueError, match=r"unknown op 'swigloo': expected one of .*swiglu"):
        rlhf_kernels.explain("swigloo")


def test_every_function_is_explained_and_put_on_a_backend():
    for spec in load_specs().values():
        name = spec.name
        with rlhf_kernels.backend(f"{name}=torch"):
            choice = rlhf_kernels.explain(name)
            assert (choice.op, choice.backend) == (name, "torch")
            assert spec.op.choose(torch.ones(2)).__name__.endswith("kernel_torch")
    assert str(choice) == str(pickle.loads(pickle.dumps(choice)))
    assert rlhf_kernels.explain("lambda_return").reason.endswith("by the kernels of gae")


def test_explain_says_what_cannot_run(monkeypatch):
    with pytest.raises(TypeError, match=r"explain\(\): dtype must be float32, .* got int64"):
        rlhf_kernels.explain("gae", dtype=torch.int64)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "; PyTorch sees no GPU here" in str(rlhf_kernels.explain("attention", device="cuda"))


def test_backend_context_is_scoped_and_nested():
    x = torch.randn(2, 8)
    seen = []
    op = dispatch.OPS["swiglu"]
    for name in ("torch", "reference"):
        with rlhf_kernels.backend(name):
            seen.append(op.choose(x).__name__.rsplit(".", 1)[1])
            with rlhf_kernels.backend("swiglu=torch"):
                seen.append(op.choose(x).__name__.rsplit(".", 1)[1])
    assert seen == ["kernel_torch", "kernel_torch", "reference", "kernel_torch"]


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("tritn", ValueError, "unknown backend 'tritn': expected one of reference, torch, native"),
        ("sviglu=torch", ValueError, "unknown op 'sviglu'"),
        (3, TypeError, "expected a name such as 'torch', got int"),
    ],
)
def test_wrong_backend_is_one_sentence(name, error, message):
    with pytest.raises(error, match=message), rlhf_kernels.backend(name):
        pass


def test_environment_switch():
    code = "import rlhf_kernels as rk; print(rk.explain('swiglu').backend)"
    assert _python(code, RLHF_KERNELS_BACKEND="torch") == (0, "torch", "")
    status, _, error = _python(code, RLHF_KERNELS_BACKEND="cudnn")
    assert status == 1
    assert "RLHF_KERNELS_BACKEND: unknown backend 'cudnn'" in error


ROOT = Path(__file__).parents[2]
CALL = "import torch, rlhf_kernels as rk\nrk.swiglu(torch.ones(2, 4))\nrk.swiglu(torch.ones(2, 4))\n"


def test_unmet_wish_warns_once_with_reason_and_remedy():
    status, _, error = _python(CALL, RLHF_KERNELS_BACKEND="triton")
    assert status == 0
    assert error.count("FallbackWarning") == 1
    assert "triton kernels need a GPU" in error
    assert "RLHF_KERNELS_STRICT=1" in error


def test_strict_mode_makes_a_fallback_an_error():
    status, _, error = _python(CALL, RLHF_KERNELS_BACKEND="triton", RLHF_KERNELS_STRICT="1")
    assert status == 1
    assert "BackendError: swiglu on cpu runs on the" in error


HIDE = """
import sys, importlib.abc
class Hide(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name in ("rlhf_kernels._C", "rlhf_kernels._C_cuda", "rlhf_kernels._host"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Hide())
"""


def test_without_native_library_it_works_and_says_so():
    code = HIDE + CALL + "print(rk.explain('swiglu'))"
    status, out, error = _python(code)
    assert status == 0
    assert "swiglu on cpu in float32: torch (native: not built" in out
    assert error.count("FallbackWarning: swiglu on cpu runs on the torch backend") == 1


OUTDATED = """
import torch
from rlhf_kernels.runtime import native
class Old:
    def __getattr__(self, name):
        raise AttributeError(name)
torch.ops.__dict__["rlhf_kernels_native"] = Old()
"""


def test_a_library_older_than_the_source_says_so():
    if reason := native.missing("_C"):
        pytest.skip(reason)
    status, out, error = _python(OUTDATED + CALL + "print(rk.explain('swiglu'))")
    assert status == 0, error
    assert "torch (native: the compiled library has no swiglu" in out
    assert "it is older than this source: rebuild it" in error
    assert error.count("FallbackWarning: swiglu on cpu runs on the torch backend") == 1


def test_import_needs_torch_alone_and_is_quick():
    code = """
import sys, time
import torch
before = set(sys.modules)
start = time.process_time()  # a busy machine does not count
import rlhf_kernels
took = time.process_time() - start
new = {name.split('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)
print(round(took * 1e3, 1), round(start * 1e3), sorted(name for name in new if not name.startswith('_') ))
"""
    cached = {"PYTHONDONTWRITEBYTECODE": ""}  # as in an installation
    shares = []
    for _ in range(8):  # the other thread of a core may slow one of the two
        run = _python(code, **cached)[1]
        assert "['rlhf_kernels']" in run
        took, of_torch = map(float, run.split()[:2])
        shares.append(took / of_torch)
        if took < 50 or shares[-1] < 0.04:
            return
    raise AssertionError(f"of what torch takes: {shares}, where 0.04 are allowed")


def test_build_record_gives_the_reason(tmp_path, monkeypatch):
    (tmp_path / "_build.json").write_text(
        json.dumps({"skipped": {"_C": "no C++ compiler (c++ is not on PATH)"}})
    )
    monkeypatch.setattr(native, "_PACKAGE", tmp_path)
    assert native._build_reason("_C") == "no C++ compiler (c++ is not on PATH)"


def test_fallback_warning_is_a_user_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning):
            dispatch.OPS["swiglu"]._fell_back("torch", "cpu", f"a test at {time.time()}")


def test_readme_lists_every_kernel():
    done = subprocess.run([sys.executable, "tools/kernel_table.py", "--check"], cwd=ROOT, timeout=120)
    assert done.returncode == 0, "the README's table is out of date: run python tools/kernel_table.py"
