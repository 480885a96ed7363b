"""RLHF_KERNELS_PATCH: processes that a stack starts are patched where the work happens."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import rlhf_kernels
from rlhf_kernels import stacks
from rlhf_kernels.stacks import patching, workers
from rlhf_kernels.stacks.rebind import FAST, Call, Rebinding, Target

ROOT = Path(__file__).parents[2]


def _double(original):
    def function(x):
        return original(x) + 1

    return function


@pytest.fixture
def stack(monkeypatch, tmp_path):
    """A small stack on disk, and its declaration; `user` imports its function by name."""
    package = tmp_path / "planted_stack"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "maths.py").write_text("def function(x):\n    return 2 * x\n")
    (package / "user.py").write_text("from planted_stack.maths import function as called\n")
    (tmp_path / "planted_stack-1.0.dist-info").mkdir()
    (tmp_path / "planted_stack-1.0.dist-info" / "METADATA").write_text("Name: planted-stack\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    place = "planted_stack.maths:function"
    rebinding = Rebinding(
        "function", "swiglu", place, _double, lambda large: Call((torch.ones(2),)), backends=FAST | {"torch"}
    )
    target = Target("planted", "planted-stack", "planted_stack", ("1.0",), (rebinding,))
    monkeypatch.setattr(patching, "targets", lambda: {"planted": target})
    yield target
    for name in [name for name in sys.modules if name.startswith("planted_stack")]:
        del sys.modules[name]


def test_a_function_is_replaced_once_its_module_is_imported(stack):
    (patched,) = workers.watch(" planted ,planted")
    assert patched.replaced == []
    assert "planted_stack" not in sys.modules
    user = importlib.import_module("planted_stack.user")
    maths = sys.modules["planted_stack.maths"]
    assert (user.called(3), maths.function(3)) == (7, 7)
    assert [one.name for one in patched.replaced] == ["function"]
    assert type(maths.__loader__).__name__ == type(maths.__spec__.loader).__name__ == "SourceFileLoader"
    with pytest.raises(rlhf_kernels.PatchError, match="function is patched already"):
        rlhf_kernels.patch("planted")
    patched.undo()
    assert (user.called(3), maths.function(3)) == (6, 6)
    assert not any(isinstance(finder, workers._Watcher) for finder in sys.meta_path)


def test_what_is_imported_already_is_replaced_at_once(stack):
    user = importlib.import_module("planted_stack.user")
    (patched,) = workers.watch("planted")
    assert user.called(3) == 7
    patched.undo()
    assert user.called(3) == 6


def test_undone_before_its_import_it_stays_as_it_is(stack):
    workers.watch("planted")[0].undo()
    assert importlib.import_module("planted_stack.user").called(3) == 6


def test_errors_name_the_variable(stack, monkeypatch):
    with pytest.raises(ValueError, match=r"RLHF_KERNELS_PATCH: .*unknown target 'plant': expected"):
        workers.from_environment({workers.VARIABLE: "plant"})
    monkeypatch.setattr(patching, "installed_version", lambda package, folder: "2.0")
    message = r"RLHF_KERNELS_PATCH: .*planted-stack 2.0 was not checked.*RLHF_KERNELS_PATCH_UNTESTED=1"
    with pytest.raises(rlhf_kernels.PatchError, match=message):
        workers.from_environment({workers.VARIABLE: "planted"})
    (patched,) = workers.from_environment({workers.VARIABLE: "planted", workers.UNTESTED: "1"})
    patched.undo()


def _documented_pth():
    """The line of docs/patch.md that goes into a .pth file."""
    lines = (ROOT / "docs" / "patch.md").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith("import os; ")]
    return line


def test_a_process_that_knows_nothing_of_us_is_patched(tmp_path):
    """As a worker of Ray is: started with an environment, it imports the stack alone."""
    if patching._folder("transformers") is None and not stacks.activate():
        pytest.skip("transformers is not installed (make peers)")
    (tmp_path / "rlhf_kernels_patch.pth").write_text(_documented_pth())
    folders = [str(ROOT), *map(str, stacks.search_paths())]
    code = (
        f"import site, sys; sys.path[1:1] = {folders!r}; site.addsitedir({str(tmp_path)!r})\n"
        "from transformers.loss.loss_utils import ForCausalLMLoss\n"
        "print(ForCausalLMLoss.__module__)\n"
    )
    environment = {**os.environ, "RLHF_KERNELS_PATCH": "transformers"}
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.stdout.split() == ["rlhf_kernels.stacks.transformers"], done.stderr
