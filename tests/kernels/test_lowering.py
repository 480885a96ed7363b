"""Triton kernels as a launch on a GPU would have them compiled."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


def test_an_argument_of_one_is_a_constant_that_kernels_lower_with():
    pytest.importorskip("triton")
    script = Path(__file__).with_name("lowering.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["failed"] == []
    assert answer["lowered"] > 50
