"""Row kernels under the sanitizers and as they are built, by random trials against NumPy."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_kernels.engine.budget.measured import CSRC
from rlhf_kernels.runtime import native

ROOT = Path(__file__).parents[2]


def _fuzz(*arguments):
    if "--library" not in arguments and shutil.which("g++") is None:
        pytest.skip("no g++: the sanitizers were not run")
    command = [sys.executable, ROOT / "tools" / "fuzz_host.py", *arguments]
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=500)


def test_row_kernels_under_sanitizers_agree_with_numpy():
    done = _fuzz("--seconds", 6)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("0 failed") == 3


def test_row_kernels_as_they_are_built_agree_with_numpy():
    if reason := native.missing("_host"):
        pytest.skip(reason)
    done = _fuzz("--seconds", 3, "--library", native.host().__file__)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("0 failed") == 3


def test_wrong_results_are_found(tmp_path):
    if reason := native.missing("_host"):
        pytest.skip(reason)
    for source in CSRC.glob("*/fuzz.py"):
        copy = tmp_path / source.parent.name / "fuzz.py"
        copy.parent.mkdir()
        copy.write_text(
            source.read_text().replace(
                "expected = g / (1 + np.exp(-g))", "expected = g / (1.0001 + np.exp(-g))"
            )
        )
    done = _fuzz("--seconds", 1, "--csrc", tmp_path, "--library", native.host().__file__)
    assert done.returncode == 2
    assert done.stdout.count(" swiglu: ") == done.stdout.count("1 failed") == 3


@pytest.fixture(scope="module")
def faulty_csrc(tmp_path_factory):
    """The sources of one family with a loop that runs one element too far."""
    csrc = tmp_path_factory.mktemp("faulty") / "csrc"
    shutil.copytree(CSRC / "common", csrc / "common", ignore=shutil.ignore_patterns("host.cpp"))
    shutil.copytree(CSRC / "swiglu", csrc / "swiglu")
    shutil.copy(CSRC / "host.cpp", csrc)
    rows = csrc / "swiglu" / "rows.h"
    text = rows.read_text()
    assert "i < n" in text
    rows.write_text(text.replace("i < n", "i <= n", 1))
    return csrc


def test_planted_read_beyond_the_end_is_found(faulty_csrc):
    done = _fuzz("--seconds", 3, "--csrc", faulty_csrc)
    assert done.returncode == 2
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr
