"""Writes the README's table of kernels from the specs: `python tools/kernel_table.py [--check]`."""

from __future__ import annotations

import sys
from pathlib import Path

from rlhf_kernels.engine.spec import load_specs

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- kernels: begin -->", "<!-- kernels: end -->"


def table() -> str:
    """One line for each op: what it does and where which backend serves it, best first."""
    lines = ["| function | what it does | CPU | GPU | gradients |", "|---|---|---|---|---|"]
    for name, spec in sorted(load_specs().items()):
        places = [", ".join(spec.op.order.get(device, ("torch",))) for device in ("cpu", "cuda")]
        gradients = "yes" if spec.differentiable else "no"
        lines.append(f"| `{name}` | {spec.summary} | {places[0]} | {places[1]} | {gradients} |")
    return "\n".join(lines)


def updated(text: str) -> str:
    """The README with the table of today."""
    head, rest = text.split(BEGIN)
    _, tail = rest.split(END)
    return f"{head}{BEGIN}\n{table()}\n{END}{tail}"


def main() -> int:
    """Rewrites the README, or with --check says whether it is up to date."""
    text = README.read_text()
    new = updated(text)
    if "--check" in sys.argv[1:]:
        return int(text != new)
    README.write_text(new)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
