"""Matplotlib figures as inline SVG whose colours and font are the page's CSS variables.

A figure is drawn in colours that stand for a role; in the text of the SVG each becomes `var(--role)`, so that
one drawing serves light and dark pages. Text stays text.
"""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from typing import Any

# The colours of roles; no other part of a figure may use them.
INK, MUTED, GRID, PAGE = "#010203", "#010204", "#010205", "#010206"
SERIES = tuple(f"#0102f{n}" for n in range(8))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
HATCHES = ("", "//", "..", "xx", "\\\\", "oo", "++", "--")

_VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--grid", PAGE: "--page"} | {
    color: f"--s{n}" for n, color in enumerate(SERIES)
}
_STYLE = {
    "svg.fonttype": "none", "font.family": "DejaVu Sans", "font.size": 10, "axes.labelsize": 10,
    "axes.edgecolor": MUTED, "axes.labelcolor": INK, "text.color": INK, 
    "xtick.color": MUTED, "ytick.color": MUTED, "xtick.labelcolor": INK, "ytick.labelcolor": INK,
    "axes.facecolor": "none", "figure.facecolor": "none", "savefig.facecolor": "none",
    "axes.grid": True, "grid.color": GRID, "grid.linewidth": 0.6, "axes.axisbelow": True,
    "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "legend.fontsize": 9,
    "hatch.linewidth": 0.5, "hatch.color": PAGE, "lines.linewidth": 1.6, "lines.markersize": 5,
    "figure.constrained_layout.use": True, "figure.dpi": 72,
}  # fmt: skip
_number = itertools.count()


@contextmanager
def figure(height: float = 3.1, width: float = 4.7) -> Iterator[tuple[Any, Any]]:
    """A figure and its axes in inches; narrow, so that its text can still be read on a phone."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        drawn = Figure(figsize=(width, height))
        yield drawn, drawn.subplots()


def inline(drawn: Any, label: str) -> str:
    """The figure as an <svg> element; call it while the figure's style holds.

    Args:
        drawn: a matplotlib figure.
        label: what it shows, for those who cannot see it.
    """
    import matplotlib

    text = io.StringIO()
    # Ids are made from this salt: two drawings on one page must not share any.
    with matplotlib.rc_context({"svg.hashsalt": f"report-{next(_number)}"}):
        drawn.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.S)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # names that nothing refers to
    svg = re.sub(r"'DejaVu Sans'[^;\"]*", "var(--font)", svg)
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, f"var({variable})")
    width = re.search(r'width="([\d.]+)pt"', svg)
    svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg, count=2)
    shown = f'style="max-width: {float(width[1]) * 4 / 3:.0f}px"' if width else ""
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(label)}" {shown}', 1).strip()


# The page's own variables, for a drawing that stands outside of it.
_LIGHT = {
    "--ink": "#1c1f23", "--muted": "#6b727a", "--grid": "#e4e7ea", "--page": "#ffffff", "--s0": "#0072b2",
    "--s1": "#d55e00", "--s2": "#009e73", "--s3": "#56b4e9", "--s4": "#cc79a7", "--s5": "#b58900",
    "--s6": "#7a5195", "--s7": "#7f8790", "--font": "sans-serif",
}  # fmt: skip


def standalone(drawing: str) -> str:
    """A drawing of `inline` as a file of its own, on white."""
    text = re.sub(r"var\((--\w+)\)", lambda found: _LIGHT[found[1]], drawing)
    text = re.sub(r'style="max-width: (\d+)px"', r'width="\1" style="background: #ffffff"', text, count=1)
    return f'<?xml version="1.0" encoding="utf-8"?>\n{text}\n'
