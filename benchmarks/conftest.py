"""Conditions and fingerprint of the pytest-benchmark suite: `pytest benchmarks --benchmark-enable`."""

import os
import sys

import pytest
import torch

from rlhf_kernels import stacks
from rlhf_kernels.engine.conditions import conditions, unmet
from rlhf_kernels.engine.fingerprint import fingerprint

# What may differ between two runs that are compared.
_FREE = ("commit", "dirty", "build", "rlhf_kernels")


def pytest_configure(config):
    """Starts again under the conditions of a timing, which are read when a process starts."""
    if config.option.benchmark_enable and unmet(1) and not os.environ.get("RLHF_KERNELS_RESTARTED"):
        capture = config.pluginmanager.getplugin("capturemanager")
        if capture:
            capture.stop_global_capturing()
        environment = os.environ | conditions(1) | {"RLHF_KERNELS_RESTARTED": "1"}
        os.execve(
            sys.executable, [sys.executable, "-m", "pytest", *config.invocation_params.args], environment
        )
    config.option.benchmark_disable_gc = True
    torch.set_num_threads(1)
    stacks.activate()


def pytest_report_header(config):
    """Says where a timing would not be under the usual conditions."""
    if config.option.benchmark_enable and (missing := unmet(1)):
        return f"conditions that do not hold: {' '.join(missing)}"
    return None


def pytest_benchmark_update_machine_info(config, machine_info):
    """Adds what decides whether two runs can be compared."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    machine_info["rlhf_kernels"] = fingerprint(device, threads=1)


def pytest_benchmark_compare_machine_info(config, benchmarksession, machine_info, compared_benchmark):
    """Refuses to compare times of different machines or versions."""
    old = compared_benchmark["machine_info"].get("rlhf_kernels", {})
    new = machine_info["rlhf_kernels"]
    unlike = [name for name in new if name not in _FREE and old.get(name) != new[name]]
    if unlike:
        pytest.exit(f"the saved run is of another {', '.join(unlike)}: not compared", returncode=3)
