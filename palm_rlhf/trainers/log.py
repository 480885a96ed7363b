"""What a run leaves behind while it runs: metrics as JSON lines and for TensorBoard, a bar, a curve."""

from __future__ import annotations

import io
import json
import math
import os
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from rlhf_kernels.runtime.files import write_aside

_SMOOTHED = 20


class RunLog:
    """Metrics of the run in `folder`: metrics.jsonl, one line a step, and tensorboard/."""

    def __init__(self, folder: str | Path, *, shown: Sequence[str] = (), tensorboard: bool = True) -> None:
        """`shown` are the metrics that stand beside the bar."""
        self.folder, self.shown = Path(folder), tuple(shown)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path = self.folder / "metrics.jsonl"
        self._file: TextIO | None = None
        self._board: Any = None
        self._wants_board = tensorboard

    def resume_at(self, step: int) -> None:
        """Drops what was logged after `step`, by a run that was killed before its next checkpoint."""
        self.close()
        if self.path.exists():
            kept = [row for row in read_metrics(self.path) if row["step"] <= step]
            write_aside(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        # By the line, so that a run can be watched.
        self._file = self.path.open("a", buffering=1)
        if self._wants_board:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                Console(stderr=True).print(
                    "no TensorBoard here: metrics go to metrics.jsonl only (pip install tensorboard)"
                )
                self._wants_board = False
            else:
                self._board = SummaryWriter(self.folder / "tensorboard", purge_step=step + 1)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """One line; numbers that are not finite become null, which JSON has. `resume_at` comes first."""
        row = {"step": step, **{name: _number(value) for name, value in metrics.items()}}
        self._file.write(json.dumps(row) + "\n")
        for name, value in metrics.items():
            if self._board is not None and isinstance(value, (int, float)):
                self._board.add_scalar(name, value, step)

    def flush(self) -> None:
        """Everything so far is on disk afterwards."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
        if self._board is not None:
            self._board.flush()

    def close(self) -> None:
        """Closes the files; `resume_at` opens them again."""
        for thing in (self._file, self._board):
            if thing is not None:
                thing.close()
        self._file = self._board = None

    @contextmanager
    def progress(
        self, name: str, start: int, steps: int, show: bool
    ) -> Iterator[Callable[[Mapping[str, float]], None]]:
        """A bar on standard error with the time that is left; calls advance it. Closes the log at the end."""
        try:
            with progress_bar(name, start, steps, show, self.shown) as advance:
                yield advance
        finally:
            self.flush()
            self.close()


@contextmanager
def progress_bar(
    name: str, start: int, total: int, show: bool, shown: Sequence[str] = ()
) -> Iterator[Callable[..., None]]:
    """A bar on standard error with the time that is left: `advance(metrics, by=1)` moves it.

    `shown` are the metrics that stand beside it.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TimeRemainingColumn(), TextColumn("{task.fields[figures]}"))  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), disable=not show) as bar:
        task = bar.add_task(name, total=total, completed=start, figures="")

        def advance(metrics: Mapping[str, float], by: int = 1) -> None:
            figures = "  ".join(f"{key} {metrics[key]:.3g}" for key in shown if key in metrics)
            bar.update(task, advance=by, figures=figures)

        yield advance


def _number(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, up to one that is no metric: a crash may have cut the last line short."""
    rows = []
    for line in Path(path).read_bytes().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            break
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            break
        rows.append(row)
    return rows


def _smoothed(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """At each step the mean over the twentieth of all points that ends there."""
    width = max(2, len(points) // _SMOOTHED)
    values = [value for _, value in points]
    return [
        (step, sum(values[max(0, i + 1 - width) : i + 1]) / min(i + 1, width))
        for i, (step, _) in enumerate(points)
    ]


def plot_metrics(
    rows: Sequence[Mapping[str, Any]], names: Sequence[str], path: str | Path, caption: str = ""
) -> Path:
    """A PNG with one panel a metric over steps; metrics that never occur are left out.

    Of many points the mean of the last twentieth of them is drawn as well, and more boldly.
    """
    # Without pyplot, which would choose a backend for the whole process.
    from matplotlib.figure import Figure

    there = [name for name in names if any(row.get(name) is not None for row in rows)]
    figure = Figure(figsize=(7, 2.2 * max(1, len(there)) + 0.6), layout="constrained")
    for axes, name in zip(figure.subplots(max(1, len(there)), 1, sharex=True, squeeze=False)[:, 0], there):
        points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
        few = len(points) < 2 * _SMOOTHED
        axes.plot(
            *zip(*points),
            color="#0072B2",
            linewidth=1.4,
            alpha=1 if few else 0.3,
            marker="." if few else None,
        )
        if not few:
            axes.plot(*zip(*_smoothed(points)), color="#0072B2", linewidth=1.8)
        axes.set_ylabel(name)
        axes.grid(alpha=0.3)
        axes.set_xlabel("step" if name == there[-1] else "")
    if caption:
        figure.suptitle(textwrap.fill(caption, 100), fontsize=8)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120, format="png")
    return write_aside(path, picture.getvalue())
