"""The study of false alarms plants what it says, and counts what came out."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

COUNTED = """
import torch
from rlhf_kernels.engine.check import check_case
from rlhf_kernels.engine.spec import load_specs
import trust_ops.kernel_native as kernel

spec = load_specs("trust_ops.spec")["trust_passes"]
for case in spec.cases:
    assert {row.status for row in check_case(spec, case, torch.float32, "native")} == {"ok"}
seen = []
whole = kernel.swiglu
kernel.swiglu = lambda block: seen.append(block.shape[0]) or whole(block)
for case in spec.cases:
    args = spec.make(case, torch.float32, torch.Generator().manual_seed(0), torch.device("cpu")).args
    kernel.forward(**args)
    print(len(seen), sum(seen))
    seen.clear()
"""


def test_slow_downs_are_more_passes_over_as_many_rows():
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(BENCHMARKS), str(BENCHMARKS.parent)))}
    done = subprocess.run(
        [sys.executable, "-c", COUNTED],
        env=environment | {"TRUST_EXTRA": "5"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["105", str(105 * 16), "105", str(105 * 64)]


def test_summary_counts_verdicts(tmp_path, capsys):
    path = tmp_path / "trust.jsonl"
    row = {"op": "op", "case": "a", "verdict": "same", "ratio": 1.0}
    lines = [
        {"level": 0, "load": "busy", "rows": [row, row, row, row | {"verdict": "slower"}]},
        {"level": 5, "load": "busy", "rows": [row | {"verdict": "slower"}]},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    spec = importlib.util.spec_from_file_location("trust", BENCHMARKS / "trust.py")
    trust = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(trust)
    trust.summary(path)
    cells = [[c.strip() for c in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()[2:]]
    assert ["same", "busy", "", "1", "", "", "3", "25.0%"] in cells
    assert ["planted 5 %", "busy", "a", "1", "", "", "", "100.0%"] in cells
