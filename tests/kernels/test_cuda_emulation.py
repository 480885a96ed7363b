"""CUDA C++ kernels without a GPU: compiled by g++ over an emulation of blocks and warps, then checked.

What the emulation cannot show (races, the memory model, speed) needs a GPU: test_gpu.py.
"""

import importlib.util
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import include_paths, library_paths

from rlhf_kernels import _build_flags
from rlhf_kernels.engine.check import check_case
from rlhf_kernels.engine.spec import load_specs
from rlhf_kernels.runtime import native
from rlhf_kernels.runtime.files import locked

ROOT = Path(__file__).parents[2]
FAMILIES = sorted(path.parent.name for path in (ROOT / "csrc").glob("*/cuda.cu"))
SPECS = [spec for spec in load_specs().values() if "native" in spec.op.order.get("cuda", ())]
REGISTRATION = "STABLE_TORCH_LIBRARY_IMPL(rlhf_kernels_native, CUDA, m)"

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not on PATH"),
    pytest.mark.skipif(native.missing("_C") is not None, reason="the schemas live in _C, which is not built"),
]


@pytest.fixture(scope="session")
def emulated(tmp_path_factory):
    """Operators of every cuda.cu as CPU operators of the namespace rlhf_kernels_emulated."""
    work = tmp_path_factory.mktemp("emulated")
    library = torch.library.Library("rlhf_kernels_emulated", "DEF")
    for name in torch._C._dispatch_get_all_op_names():
        namespace, _, operator = name.partition("::")
        if namespace == "rlhf_kernels_native":
            schema = getattr(torch.ops.rlhf_kernels_native, operator).default._schema
            library.define(str(schema).partition("::")[2])
    # Once for all workers of pytest-xdist, whose folders lie in one.
    shared = work.parent if os.environ.get("PYTEST_XDIST_WORKER") is None else work.parent.parent
    with locked(shared / "emulated.lock"), ThreadPoolExecutor() as pool:
        libraries = list(pool.map(lambda family: _compiled(shared, family), FAMILIES))
    for path in libraries:
        torch.ops.load_library(str(path))
    yield torch.ops.rlhf_kernels_emulated
    library._destroy()


def _compiled(work, family):
    target = work / f"{family}.so"
    if target.exists():
        return target
    source = (ROOT / "csrc" / family / "cuda.cu").read_text()
    assert REGISTRATION in source
    copy = work / f"{family}.cpp"
    copy.write_text(source.replace(REGISTRATION, "STABLE_TORCH_LIBRARY_IMPL(rlhf_kernels_emulated, CPU, m)"))
    includes = [f"-I{path}" for path in (ROOT / "tests/emulation", ROOT / "csrc", *include_paths())]
    command = ["g++", "-O1", "-w", "-std=c++20", "-fPIC", "-shared", _build_flags.STABLE_ABI, *includes]
    libraries = [*(f"-L{path}" for path in library_paths()), "-ltorch", "-ltorch_cpu"]
    command += [str(copy), "-o", str(target), *libraries]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return target


def _emulated_kernel(spec, operators, monkeypatch):
    """The room's kernel_native.py, executed again over the emulated operators."""
    monkeypatch.setattr(native, "operator", lambda name: getattr(operators, name).default)
    module = importlib.util.find_spec(f"{spec.op.room}.{spec.op.modules.get('native', 'kernel_native')}")
    twin = importlib.util.module_from_spec(module)
    module.loader.exec_module(twin)
    return twin


def _small(case):
    size = 1
    for n in case.sizes.values():
        size *= max(n, 1)
    return size <= 32768


def _grid():
    """All cases in float32. What another type adds is the same in all of an op's: every third has it."""
    for spec in SPECS:
        grid = [(spec, case, dtype) for case in spec.cases if _small(case) for dtype in case.dtypes]
        others = [one for one in grid if one[2] is not torch.float32]
        for spec, case, dtype in [one for one in grid if one[2] is torch.float32] + others[::3]:
            yield pytest.param(spec, case, dtype, id=f"{spec.name}-{case.name}-{str(dtype)[6:]}")


@pytest.mark.parametrize(("spec", "case", "dtype"), _grid())
def test_emulated_cuda_is_right(emulated, monkeypatch, spec, case, dtype):
    twin = _emulated_kernel(spec, emulated, monkeypatch)
    monkeypatch.setattr(spec.op, "module", lambda name: twin)
    monkeypatch.setattr(spec.op, "_chosen", {})
    for row in check_case(spec, case, dtype, "native"):
        assert row.status == "ok", f"{row.direction}: {row.reason}"
