"""The study of false alarms plants what it says, and counts what came out."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

COUNTED = """
import torch
from rlhf_kernels.engine.check import check_case
from rlhf_kernels.engine.spec import load_specs
import trust_ops.kernel_native as kernel

spec = load_specs("trust_ops.spec")["trust_passes"]
for case in spec.cases[:2]:
    assert {row.status for row in check_case(spec, case, torch.float32, "native")} == {"ok"}
assert kernel._PLANTED, "the variable says so"
seen = []
whole = kernel.swiglu
kernel.swiglu = lambda block: seen.append(block) or whole(block)
for case in spec.cases[:3]:
    args = spec.make(case, torch.float32, torch.Generator().manual_seed(0), torch.device("cpu")).args
    for kernel._PLANTED in (True, False):
        kernel.forward(**args)
        print(len(seen), sum(map(len, seen)), len({block.data_ptr() for block in seen}))
        seen.clear()
"""


def test_slow_downs_are_more_passes_over_as_many_rows():
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(BENCHMARKS), str(BENCHMARKS.parent)))}
    done = subprocess.run(
        [sys.executable, "-c", COUNTED],
        env=environment | {"TRUST_PLANTED": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    # Cached, walking by 3 %, cached by 5 %, planted and not; a pass more walks through other memory.
    expected = [(103, 16, 1), (100, 16, 1), (103, 64, 103), (100, 64, 100), (105, 16, 1), (100, 16, 1)]
    lines = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    assert lines == [(passes, passes * rows, places) for passes, rows, places in expected]


@pytest.fixture
def trust(monkeypatch):
    """The study's script as a module."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("trust", BENCHMARKS / "trust.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_summary_counts_verdicts(trust, tmp_path, capsys):
    path = tmp_path / "trust.jsonl"
    row = {"op": "op", "case": "a", "verdict": "same", "ratio": 1.0}
    more = {"load": "busy", "took": 90, "fingerprint": {"commit": "abc"}}
    slow = row | {"case": "cached_16x512_5", "verdict": "slower"}
    lines = [
        {"what": "same", "running": 2.5, **more, "rows": [row, row, row, row | {"verdict": "slower"}]},
        {"what": "planted", "running": 7, **more, "rows": [slow]},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    trust.summary(path)
    out = capsys.readouterr().out
    assert "busy: 2 repetitions, 3 minutes, load average 2.5 to 7.0, commit abc" in out
    cells = [[c.strip() for c in line.split("|")[1:-1]] for line in out.splitlines()[2:]]
    none = ["0", "0", "0"]
    assert ["the same code", "busy", "4", "0", "1", "0", "0", "3", "25.0%", "0.6% to 80.6%"] in cells
    assert ["5 % planted, in the cache", "busy", "1", "0", "1", *none, "100.0%", "2.5% to 100.0%"] in cells


def test_intervals_of_shares(trust):
    # Clopper and Pearson's closed forms at the ends, and a value of their table.
    assert trust.shares(0, 200) == pytest.approx((0, 1 - 0.025 ** (1 / 200)))
    assert trust.shares(20, 20) == pytest.approx((0.025 ** (1 / 20), 1))
    assert trust.shares(3, 10) == pytest.approx((0.0667, 0.6525), abs=1e-4)
