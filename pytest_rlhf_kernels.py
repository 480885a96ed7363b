"""pytest plug-in: kernels timed by rlhf-kernels' clock inside pytest-benchmark.

    def test_scale(kernel_benchmark):
        x = torch.randn(64, 512)
        kernel_benchmark(scale, x, reference=plain_scale, cost=Cost(flops=x.numel(), bytes=2 * x.nbytes))

It is found by its entry point wherever rlhf-kernels is installed, and imports nothing but pytest until a test
asks for `kernel_benchmark`. A module of its own, because importing the package imports torch.
PYTEST_DONT_REWRITE: there is no assertion in it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from rlhf_kernels.engine.pytest_fixture import KernelBenchmark

# What may differ between two runs that are compared.
FREE = ("commit", "dirty", "build", "rlhf_kernels")
_RESTARTED = "RLHF_KERNELS_RESTARTED"
_replay = pytest.StashKey[Any]()
_used = pytest.StashKey[bool]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of what is timed by `kernel_benchmark`."""
    group = parser.getgroup("rlhf-kernels")
    group.addoption("--kernel-seconds", type=float, default=1.0, help="for the rounds of one test")
    group.addoption("--kernel-precision", type=float, default=0.01, help="stop at this half width")
    group.addoption("--kernel-threads", type=int, default=1, help="threads of the CPU")
    group.addoption(
        "--kernel-conditions", action="store_true", help="start again with threads bound, allocator fixed"
    )
    group.addoption(
        "--kernel-force", action="store_true", help="compare with a saved run of another machine or version"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Starts again under the conditions of a timing, where that is asked for."""
    if config.getoption("kernel_conditions"):
        hold_conditions(config)


def enabled(config: pytest.Config) -> bool:
    """Whether pytest-benchmark is here and times."""
    option = config.option
    if not hasattr(option, "benchmark_disable"):
        return False
    return not option.benchmark_disable or option.benchmark_enable


def hold_conditions(config: pytest.Config) -> None:
    """Replaces this process by one under `engine.conditions`: they are read when a process starts.

    For `pytest_configure` of a conftest.py that always wants them; --kernel-conditions does the same.
    """
    if not enabled(config) or os.environ.get(_RESTARTED) or os.environ.get("PYTEST_XDIST_WORKER"):
        return
    from rlhf_kernels.engine.conditions import conditions, unmet

    threads = config.getoption("kernel_threads")
    if not unmet(threads):
        return
    capture = config.pluginmanager.getplugin("capturemanager")
    if capture:
        capture.stop_global_capturing()
    environment = os.environ | conditions(threads) | {_RESTARTED: "1"}
    arguments = [sys.executable, "-m", "pytest", *config.invocation_params.args]
    os.execve(sys.executable, arguments, environment)


def pytest_itemcollected(item: pytest.Item) -> None:
    """Gives each test that uses `kernel_benchmark` a timer that replays its samples to pytest-benchmark."""
    if "kernel_benchmark" not in getattr(item, "fixturenames", ()):
        return
    from rlhf_kernels.engine.pytest_fixture import Replay

    item.stash[_replay] = replay = Replay()
    own = item.get_closest_marker("benchmark")
    options = own.kwargs if own else {}
    item.add_marker(pytest.mark.benchmark(**options | {"timer": replay.timer}), append=False)


@pytest.fixture
def kernel_benchmark(request: pytest.FixtureRequest, benchmark: Any) -> KernelBenchmark:
    """Checks a kernel against its definition, times it by our clock, and says how near the roof it is.

    See `rlhf_kernels.engine.pytest_fixture.KernelBenchmark`.
    """
    from rlhf_kernels.engine.clock import Limits
    from rlhf_kernels.engine.pytest_fixture import KernelBenchmark

    config = request.config
    config.stash[_used] = True
    limits = Limits(config.getoption("kernel_seconds"), config.getoption("kernel_precision"))
    return KernelBenchmark(benchmark, request.node.stash[_replay], limits, config.getoption("kernel_threads"))


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Adds the fingerprint where a kernel was timed."""
    if config.stash.get(_used, False):
        machine_info["rlhf_kernels"] = _fingerprint(config)


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_compare_machine_info(
    config: pytest.Config, compared_benchmark: Mapping[str, Any]
) -> None:
    """Refuses to compare kernels' times of different machines or versions: exit code 3."""
    old = compared_benchmark["machine_info"].get("rlhf_kernels")
    if old is None or config.getoption("kernel_force"):
        return
    new = _fingerprint(config)
    unlike = [name for name in {**old, **new} if name not in FREE and old.get(name) != new.get(name)]
    if unlike:
        said = ", ".join(f"{name} {old.get(name)}, here {new.get(name)}" for name in unlike)
        pytest.exit(
            f"the saved run is of another machine or version ({said}): not compared; "
            "--kernel-force compares it all the same",
            returncode=3,
        )


def _fingerprint(config: pytest.Config) -> dict[str, Any]:
    import torch

    from rlhf_kernels.engine.fingerprint import fingerprint

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return fingerprint(device, config.getoption("kernel_threads"))
