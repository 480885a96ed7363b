"""What this machine can do at most: bytes a second by copying, operations a second by a matrix product.

Both are measured with the clock that times the ops, not looked up. The roof of an op is a copy of as many
bytes, timed in the same rounds as the op, since what a machine can do changes from minute to minute
(`copy_of`); or its operations at the rate of a matrix product, where that takes longer. Rates are kept per
machine, number of threads and torch in <cache>/roofs.json.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from rlhf_kernels.engine.clock import Clock, Contender, Limits, clock_for, measure
from rlhf_kernels.engine.fingerprint import fingerprint, machine_id
from rlhf_kernels.engine.row import dtype_name
from rlhf_kernels.engine.spec import Cost
from rlhf_kernels.runtime.files import cache_directory, locked, write_aside

SCHEMA = 1
# Bytes read and written by the copies that are timed.
_COPIES = {"cpu": tuple(1 << n for n in range(16, 31, 2)), "cuda": tuple(1 << n for n in range(20, 33, 2))}
_MATRIX = {"cpu": 512, "cuda": 8192}
_LIMITS = Limits(seconds=0.2, warmup=0.1, precision=0.005)
# A time this many times below the least that the fastest copy allows was not spent on the work.
_SUSPICIOUS = 2.0


@dataclass
class Roofs:
    """Measured roofs of one machine.

    Attributes:
        copy: bytes moved -> bytes a second.
        matmul: dtype -> operations a second.
    """

    copy: dict[int, float] = field(default_factory=dict)
    matmul: dict[str, float] = field(default_factory=dict)

    @classmethod
    def from_json(cls, value: Any) -> Roofs:
        """Reads what a file holds; KeyError, TypeError, ValueError or AttributeError where it is no roofs."""
        return cls({int(n): float(rate) for n, rate in value["copy"].items()}, dict(value["matmul"]))

    def rate(self, dtype: torch.dtype) -> float:
        """Operations a second; 16-bit numbers can always be computed with in float32."""
        own = self.matmul[dtype_name(dtype)]
        return max(own, self.matmul["float32"]) if dtype.itemsize < 4 else own

    def seconds(self, costs: Sequence[Cost], dtype: torch.dtype, copying: float) -> float:
        """The least time for this work where a copy of its bytes takes `copying` seconds."""
        return max(copying, sum(cost.flops for cost in costs) / self.rate(dtype))

    def suspicious(self, seconds: float, cost: Cost) -> bool:
        """Whether a time is too short for moving the bytes even at the highest rate seen here."""
        return seconds * _SUSPICIOUS < cost.bytes / max(self.copy.values())


def roofs_for(device: torch.device, threads: int, dtypes: list[torch.dtype]) -> Roofs:
    """The roofs of this machine with these dtypes, from the cache or measured now.

    Where the cache cannot be written they are not kept; `bench` says so.
    """
    path = cache_directory() / "roofs.json"
    key = machine_id(fingerprint(device.type, threads))
    roofs = _read(path).get(key, Roofs())
    missing = [dtype for dtype in {torch.float32, *dtypes} if dtype_name(dtype) not in roofs.matmul]
    if roofs.copy and not missing:
        return roofs
    clock = clock_for(device)
    roofs.copy = roofs.copy or {n: _copy_rate(n, device, clock) for n in _COPIES[device.type]}
    roofs.matmul |= {dtype_name(dtype): _matmul_rate(dtype, device, clock) for dtype in missing}
    with suppress(OSError), locked(path):
        found = _read(path) | {key: roofs}
        machines = {name: asdict(one) for name, one in found.items()}
        write_aside(path, json.dumps({"schema": SCHEMA, "machines": machines}, indent=1))
    return roofs


def remembered(machine: str) -> Roofs | None:
    """The roofs of a machine (`fingerprint.machine_id`) where they were measured before, else None."""
    return _read(cache_directory() / "roofs.json").get(machine)


def _read(path: Any) -> dict[str, Roofs]:
    """Roofs by machine; a file that is absent, broken or of another schema holds none."""
    try:
        content = json.loads(path.read_text())
        machines = content["machines"] if content["schema"] == SCHEMA else {}
        return {name: Roofs.from_json(one) for name, one in machines.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def copy_of(costs: Sequence[Cost], device: torch.device) -> Callable[[], None]:
    """A call that moves as many bytes as the work does, one copy a pass: half is read and half written."""
    pairs = [
        [torch.zeros(max(1, int(cost.bytes) // 2), dtype=torch.uint8, device=device) for _ in range(2)]
        for cost in costs
    ]

    def copy() -> None:
        for source, target in pairs:
            target.copy_(source)

    return copy


def _copy_rate(nbytes: int, device: torch.device, clock: Clock) -> float:
    return nbytes / _fastest(copy_of([Cost(0, nbytes)], device), clock)


def _matmul_rate(dtype: torch.dtype, device: torch.device, clock: Clock) -> float:
    n = _MATRIX[device.type]
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * n**3 / _fastest(lambda: torch.mm(a, b, out=out), clock)


def _fastest(call: Callable[[], Any], clock: Clock) -> float:
    """Seconds of the fastest batch: a roof is what can be reached, not what is usual."""
    roof = Contender("roof", call)
    samples = measure([roof], clock, _LIMITS)["roof"]
    if roof.failure:
        raise roof.failure
    return min(samples)
