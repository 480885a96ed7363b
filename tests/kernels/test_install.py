"""The package installs and works where nothing can be compiled, and says why."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from rlhf_kernels._build_flags import CXX_FLAGS, STABLE_ABI, level_flags

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def bare_install(tmp_path_factory):
    """An installation made with no compiler to be found."""
    work = tmp_path_factory.mktemp("bare")
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout: no list of the files that make up the package")
    for name in tracked.stdout.splitlines():
        if name.startswith(("rlhf_kernels/", "palm_rlhf/", "csrc/")) or "/" not in name:
            if not (ROOT / name).is_file():
                continue
            target = work / "source" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RLHF_KERNELS")}
    environment |= {"PATH": str(work / "empty"), "CXX": "no-such-compiler", "CC": "no-such-compiler"}
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    done = subprocess.run(
        [*command, "--target", str(work / "site"), str(work / "source")],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return work


def _run(work, code):
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("RLHF_KERNELS", "TRITON"))}
    # -S leaves out the .pth files: an editable installation would lend its own compiled library.
    environment["PYTHONPATH"] = os.pathsep.join([str(work / "site"), sysconfig.get_path("platlib")])
    done = subprocess.run(
        [sys.executable, "-S", "-c", code],
        env=environment,
        cwd=work,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_works_without_a_compiler(bare_install):
    code = (
        "import torch, rlhf_kernels as rk; print(rk.__file__); print(rk.explain('swiglu')); "
        "x = torch.randn(4, 8); silu = torch.nn.functional.silu; "
        "print(torch.equal(rk.swiglu(x), silu(x[:, 4:]) * x[:, :4]))"
    )
    place, choice, equal = _run(bare_install, code).splitlines()
    assert str(bare_install) in place
    assert "torch (native: no C++ compiler (no-such-compiler is not on PATH)" in choice
    assert equal == "True"


def test_the_pytest_plugin_and_the_page_are_installed(bare_install):
    code = (
        "import importlib.metadata as m, pytest_rlhf_kernels; print(pytest_rlhf_kernels.__file__); "
        "print([e.value for e in m.entry_points(group='pytest11', name='pytest_rlhf_kernels')][0]); "
        "from rlhf_kernels.engine import report; print(report._TEMPLATE.is_file())"
    )
    place, value, page = _run(bare_install, code).splitlines()
    assert str(bare_install) in place
    assert (value, page) == ("pytest_rlhf_kernels", "True")


@pytest.mark.parametrize(
    ("flags", "left_out"),
    [
        ("fpu avx2 avx512f", ["-DRK_WITHOUT_V4"]),
        ("fpu avx2 avx512f avx512bw avx512cd avx512dq avx512vl", []),
        (None, []),
    ],
    ids=["AVX2", "AVX-512", "unknown"],
)
def test_a_build_for_this_machine_leaves_out_what_it_cannot_run(monkeypatch, flags, left_out):
    def read(path):
        if flags is None:
            raise FileNotFoundError(path)
        return f"processor\t: 0\nflags\t\t: {flags}\n"

    monkeypatch.setattr(Path, "read_text", read)
    assert level_flags(here=True) == left_out
    assert level_flags(here=False) == []


def test_an_unknown_instruction_set_is_refused_by_name():
    code = "from rlhf_kernels.runtime.native import missing; print(missing('_C'), missing('_host'), sep='|')"
    environment = os.environ | {"RLHF_KERNELS_ISA": "avx512"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    reason = "RLHF_KERNELS_ISA is 'avx512', which is none of base, v3, v4, v4+bf16"
    assert done.stdout.strip() == f"{reason}|{reason}"


@pytest.mark.skipif(not level_flags(here=True), reason="AVX-512 is built here")
@pytest.mark.parametrize("family", ["advantage", "attention"])
def test_avx512_code_compiles_where_it_is_left_out(family):
    """The families with code for 16 lanes alone; `make setup` leaves it out on a processor without."""
    if shutil.which("g++") is None or sys.platform != "linux":
        pytest.skip("no g++: the AVX-512 code was not compiled")
    torch = Path(sysconfig.get_path("platlib")) / "torch" / "include"
    includes = [sysconfig.get_path("include"), torch, torch / "torch" / "csrc" / "api" / "include"]
    command = [
        "g++",
        "-std=c++20",
        "-fsyntax-only",
        *CXX_FLAGS,
        STABLE_ABI,
        "-DRK_MODULE=_C",
        f"-I{ROOT / 'csrc'}",
    ]
    command += [f"-isystem{folder}" for folder in includes]
    done = subprocess.run([*command, ROOT / "csrc" / family / "ops.cpp"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
