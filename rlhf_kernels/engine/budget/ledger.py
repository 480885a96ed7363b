"""The committed budgets: one JSON file per room, which may only tighten unless a reason is given.

A file names the compilers that its figures were recorded with, and has one line per kernel, configuration
and target, sorted, so that a change reads as a change.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf_kernels.engine.budget.measured import Measured
from rlhf_kernels.runtime.files import write_aside

DIRECTORY = Path(__file__).parents[1] / "budgets"

# Of every figure, how a measured one may differ. A matrix-instruction count that rises is doubled work.
MOST = ("registers", "spills", "shared", "narrow_loads", "instructions")
EXACT = ("tensor_core",)
# The counts repeat to the instruction on one machine; this allows for what libc chooses for another processor
# (0.38 % of `sample` between two), and for another version of pybind11's calling code.
TOLERANCE = {"instructions": 0.005}


def excess(figures: Mapping[str, int], budget: Mapping[str, int]) -> list[str]:
    """Where figures break their budget, one clause each."""
    found = []
    for name, value in sorted(figures.items()):
        allowed = budget.get(name)
        if allowed is None:
            found.append(f"{name} {value} has no budget")
        elif name in EXACT and value != allowed:
            found.append(f"{name} {value}, budget exactly {allowed}")
        elif name in MOST and value > allowed * (1 + TOLERANCE.get(name, 0)):
            found.append(f"{name} {value}, budget {allowed}")
    return found


@dataclass
class Ledger:
    """The budgets of one room.

    Attributes:
        path: its file, which may not exist yet.
        tools: kind of kernel -> the compiler that its figures were recorded with.
        budgets: "<op>/<kernel and configuration>/<target>" -> figures.
        sources: of the same kernels, a digest of what the figures were compiled from and by.
    """

    path: Path
    tools: dict[str, str] = field(default_factory=dict)
    budgets: dict[str, dict[str, int]] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)

    @classmethod
    def load(cls, family: str, directory: Path = DIRECTORY) -> Ledger:
        """Reads a room's file; empty where there is none."""
        path = directory / f"{family}.json"
        if not path.is_file():
            return cls(path)
        content = json.loads(path.read_text())
        return cls(path, content["tools"], content["budgets"], content.get("sources", {}))

    def save(self) -> None:
        """Writes the file, sorted, one budget a line; a room without budgets has none."""
        if not self.budgets:
            return self.path.unlink(missing_ok=True)
        tools = json.dumps(self.tools, sort_keys=True)
        budgets, sources = _lines(self.budgets), _lines(self.sources)
        write_aside(self.path, f'{{\n "tools": {tools},\n "budgets": {budgets},\n "sources": {sources}\n}}\n')

    def update(
        self, measured: Iterable[Measured], gone: Iterable[str], tools: Mapping[str, str]
    ) -> list[str]:
        """Takes over new figures and drops budgets that are gone.

        Returns:
            What is loosened by that, one clause each: dropping counts, a first budget does not.
        """
        loosened = [f"{key} dropped" for key in gone if self.budgets.pop(key, None) is not None]
        for one in measured:
            if one.source:
                self.sources[one.key] = one.source
            old, new = self.budgets.get(one.key, one.figures), dict(one.figures)
            if broken := excess(new, old):
                loosened.append(f"{one.key} ({'; '.join(broken)})")
            else:  # what is tolerated must not add up
                new |= {name: min(new[name], old[name]) for name in TOLERANCE if name in new}
            self.budgets[one.key] = new
        self.tools |= tools
        self.sources = {key: source for key, source in self.sources.items() if key in self.budgets}
        return loosened


def _lines(values: Mapping[str, Any]) -> str:
    """A JSON object with one line per key, sorted."""
    lines = [f"  {json.dumps(key)}: {json.dumps(values[key], sort_keys=True)}" for key in sorted(values)]
    return "{\n" + ",\n".join(lines) + "\n }" if lines else "{}"


def note_in_changelog(path: Path, loosened: list[str], reason: str) -> None:
    """Appends one line to the changelog's Unreleased section.

    Raises:
        ValueError: there is no reason, or no such section.
    """
    if not reason:
        more = f" and {len(loosened) - 1} more" if loosened[1:] else ""
        raise ValueError(
            f'budgets would loosen: {loosened[0]}{more}. Say why with --reason "...", for {path.name}'
        )
    lines = path.read_text().splitlines() if path.is_file() else []
    if "## [Unreleased]" not in lines:
        raise ValueError(
            f"{path} has no '## [Unreleased]' section: add one, for the reason to be written there"
        )
    start = lines.index("## [Unreleased]") + 1
    end = next((i for i in range(start, len(lines)) if lines[i].startswith("## ")), len(lines))
    section = lines[start:end]
    while section and not section[-1].strip():
        section.pop()
    if "### Budgets loosened" not in section:
        section += ["", "### Budgets loosened"]
    shown = ", ".join(loosened[:3]) + (f" and {len(loosened) - 3} more" if len(loosened) > 3 else "")
    at = section.index("### Budgets loosened") + 1
    while at < len(section) and section[at].startswith(("- ", "  ")):
        at += 1
    section.insert(at, f"- {reason.rstrip('.')}: {shown}.")
    rest = ["", *lines[end:]] if end < len(lines) else []
    write_aside(path, "\n".join([*lines[:start], *section, *rest]) + "\n")
