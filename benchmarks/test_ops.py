"""Every op at its smoke and typical cases, in every implementation there is, checked before it is timed.

    pytest benchmarks --benchmark-enable                      everything
    pytest benchmarks --benchmark-enable -k "swiglu and small"

One group is one op, case, dtype and direction. `rlhf-kernels bench` measures the same in interleaved rounds,
which is the fairer comparison; this suite is for `--benchmark-save`, `--benchmark-compare` and histograms;
`--benchmark-compare-fail=median:20%` is the coarse net. How it times: pytest_rlhf_kernels.py.
"""

from functools import lru_cache

import pytest
import torch

from rlhf_kernels.engine import implementations
from rlhf_kernels.engine.bench import DIRECTIONS, Bench, costs_of
from rlhf_kernels.engine.check import Judge
from rlhf_kernels.engine.clock import clock_for
from rlhf_kernels.engine.roofs import roofs_for
from rlhf_kernels.engine.select import measurements
from rlhf_kernels.engine.spec import load_specs

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32


MEASUREMENTS = {
    m.names: m
    for m in measurements(
        list(load_specs().values()),
        tiers=("smoke", "typical"),
        default_dtypes=lambda case: [d for d in case.dtypes if d == DTYPE],
    )
}


def _grid():
    for names, m in MEASUREMENTS.items():
        for name in implementations.names(m.spec):
            for direction in DIRECTIONS:
                label = "-".join((*names[:2], name.replace(" ", "_"), direction))
                yield pytest.param(names, name, direction, id=label)


@lru_cache(maxsize=1)
def _bench():
    return Bench(DEVICE, clock_for(DEVICE), roofs_for(DEVICE, 1, [DTYPE]), threads=1)


@lru_cache(maxsize=1)
def _judge(names):
    return Judge(*MEASUREMENTS[names], DEVICE)


@lru_cache(maxsize=1)
def _candidate(names, name):
    """An implementation at a case with its checked rows and its calls, or None where it does not exist."""
    judge = _judge(names)
    found = implementations.implementations(*MEASUREMENTS[names], DEVICE, judge.inputs.args, [name])
    one = next((one for one in found if one.name == name), None)
    return one and _bench().candidate(judge, one)


@pytest.mark.parametrize(("names", "name", "direction"), list(_grid()))
def test_op(kernel_benchmark, names, name, direction):
    benchmark = kernel_benchmark.benchmark
    if benchmark.disabled:
        pytest.skip("timings are taken with --benchmark-enable; correctness has tests of its own")
    candidate = _candidate(names, name)
    if candidate is None or direction not in candidate.rows:
        pytest.skip(f"there is no {name} {direction} of {names[0]} on {DEVICE.type}")
    row, call = candidate.rows[direction], candidate.calls.get(direction)
    if row.status == "unavailable":
        pytest.skip(row.reason)
    assert row.status == "ok", f"not timed, because it is {row.status}: {row.reason}"
    benchmark.group = " ".join((*names, direction))
    info = {"error": row.error, "allowed": row.allowed, "version": row.version}
    costs = costs_of(*MEASUREMENTS[names], direction)
    kernel_benchmark.timed(call, DEVICE, DTYPE, costs, info, candidate.implementation.context)
