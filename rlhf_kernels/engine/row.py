"""One line of a result: what was checked or timed, and how it came out."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

SCHEMA = 1

Status = Literal["ok", "incorrect", "unavailable", "error"]


def dtype_name(dtype: torch.dtype) -> str:
    """'float32' for torch.float32."""
    return str(dtype).removeprefix("torch.")


@dataclass
class Row:
    """The outcome of one implementation of one op at one case, dtype and direction.

    Attributes:
        status: ok | incorrect | unavailable | error; only an ok row may bear a time.
        reason: why it is not ok, in one sentence.
        error, allowed: largest absolute error against the float64 reference, and what was granted.
        median_us, ci_us: the time of one call and the 95 % interval of its median.
        host_us: time until the call returns, where the device works on by itself.
        gbps, tflops: least bytes and operations of the op over the time.
        roof_us, roof_fraction: the least time that this machine's measured roofs allow, and its share.
        peak_bytes: most memory held at once above the inputs.
        speedup, speedup_ci: time of `baseline` over this time, the median of all rounds, and its interval.
        flops, bytes: the work that the time is for; unlike work is never compared.
        samples_us: the raw samples, one list a process.
        version: of a foreign package.
        figures: what `budget` found, by name: registers, spills, instructions; exact, without a time.
        notes: what is shown beside figures, occupancy for instance.
    """

    op: str
    impl: str
    case: str
    dtype: str
    direction: str
    device: str
    status: Status = "ok"
    reason: str = ""
    error: float | None = None
    allowed: float | None = None
    median_us: float | None = None
    ci_us: tuple[float, float] | None = None
    host_us: float | None = None
    gbps: float | None = None
    tflops: float | None = None
    roof_us: float | None = None
    roof_fraction: float | None = None
    peak_bytes: int | None = None
    speedup: float | None = None
    speedup_ci: tuple[float, float] | None = None
    baseline: str | None = None
    threads: int | None = None
    version: str | None = None
    flops: float | None = None
    bytes: float | None = None
    samples_us: list[list[float]] = field(default_factory=list)
    figures: dict[str, int] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.status != "ok" and self.median_us is not None:
            raise ValueError(f"{self.op}/{self.impl}: a row that is {self.status} has no time")

    @property
    def key(self) -> tuple[str, ...]:
        """What identifies the measurement among others of a run."""
        return (self.op, self.case, self.dtype, self.direction, self.impl, self.device)

    @property
    def complaint(self) -> str:
        """What is wrong with it."""
        where = " ".join((self.op, self.case, self.dtype, self.direction))
        return f"{where}: {self.impl} is {self.status}: {self.reason}"

    def failed(self, status: Status, reason: str) -> Row:
        """This row without any figure of time, for the reason given."""
        kept = (
            "op", "impl", "case", "dtype", "direction", "device", "error", "allowed", "threads", "version",
            "figures", "notes",
        )  # fmt: skip
        return Row(**{name: getattr(self, name) for name in kept}, status=status, reason=reason)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; what is not finite becomes null, which JSON has no other word for."""
        return _finite(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Row:
        """Reads a row; fields of a later schema are left out."""
        names = {f.name for f in dataclasses.fields(cls)}
        row = cls(**{name: item for name, item in value.items() if name in names})
        row.ci_us, row.speedup_ci = (tuple(ci) if ci else None for ci in (row.ci_us, row.speedup_ci))
        return row


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
