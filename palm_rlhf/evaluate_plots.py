"""Pictures of an evaluation: reward against KL divergence, and win rates."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_kernels.runtime.files import write_aside

_BLUE, _GREY = "#0072B2", "#777777"


def plot_frontier(models: Sequence[Mapping[str, Any]], path: Path, caption: str = "") -> Path | None:
    """Mean reward over nats from the first model, with 95 % intervals; None below two models with both."""
    there = [m for m in models if m.get("reward") and m.get("kl")]
    if len(there) < 2:
        return None

    def drawn(axes: Any) -> None:
        x, y = [[m[name]["value"] for m in there] for name in ("kl", "reward")]
        bars = {
            f"{side}err": list(zip(*(_apart(m[name]) for m in there)))
            for side, name in (("x", "kl"), ("y", "reward"))
        }
        axes.errorbar(
            x, y, **bars, fmt="o-", color=_BLUE, ecolor=_GREY, elinewidth=0.8, linewidth=1, capsize=2
        )  # fmt: skip
        for m, px, py in zip(there, x, y):
            axes.annotate(m["name"], (px, py), xytext=(5, 5), textcoords="offset points", fontsize=8)
        axes.set_xlabel("KL divergence from the first model, nats of a response")
        axes.set_ylabel("mean reward")

    return _picture(path, drawn, caption)


def plot_win_rate(models: Sequence[Mapping[str, Any]], path: Path, caption: str = "") -> Path | None:
    """Win rate of each over the first model, with 95 % intervals; None where there is none."""
    there = [m for m in models if m.get("win_rate")]
    if not there:
        return None

    def drawn(axes: Any) -> None:
        values = [m["win_rate"] for m in there]
        axes.barh(
            [m["name"] for m in there], [v["value"] for v in values], height=0.5, color=_BLUE,
            xerr=list(zip(*map(_apart, values))), ecolor=_GREY, capsize=3,
        )  # fmt: skip
        axes.axvline(0.5, color=_GREY, linewidth=0.8)
        axes.set_xlim(0, 1)
        axes.set_xlabel("win rate over the first model")
        axes.invert_yaxis()

    return _picture(path, drawn, caption)


def _apart(interval: Mapping[str, float]) -> tuple[float, float]:
    """How far the ends are from the value."""
    return interval["value"] - interval["low"], interval["high"] - interval["value"]


def _picture(path: Path, draw: Callable[[Any], None], caption: str) -> Path:
    # Without pyplot, which would choose a backend for the whole process.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    draw(axes)
    axes.grid(alpha=0.3)
    if caption:
        figure.suptitle(textwrap.fill(caption, 100), fontsize=8)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120, format="png")
    return write_aside(path, picture.getvalue())
