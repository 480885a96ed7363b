"""The pytest-benchmark suite holds the conditions of a timing: `pytest benchmarks --benchmark-enable`."""

import pytest_rlhf_kernels
from rlhf_kernels import stacks
from rlhf_kernels.engine.conditions import unmet

pytest_plugins = ["pytest_rlhf_kernels"]


def pytest_configure(config):
    """Starts again under the conditions, which are read when a process starts."""
    pytest_rlhf_kernels.hold_conditions(config)
    stacks.activate()


def pytest_report_header(config):
    """Says where a timing would not be under the usual conditions."""
    if pytest_rlhf_kernels.enabled(config) and (missing := unmet(config.getoption("kernel_threads"))):
        return f"conditions that do not hold: {' '.join(missing)}"
    return None
