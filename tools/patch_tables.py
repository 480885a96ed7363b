"""Writes the tables of docs/patch.md from recorded rows of `rlhf-kernels patch TARGET --check --json`.

    rlhf-kernels patch verl --check --json > rows.json
    python tools/patch_tables.py rows.json --record RECORD     # the rows go into that record, too
    python tools/patch_tables.py [--check]                     # write the tables, or only compare

The tables are of all records, benchmarks/results/patch-cpu-*.jsonl, by date: a function is shown with its
latest row. What `patch` leaves by declaration stands below the table.
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_kernels.engine.table import duration, size
from rlhf_kernels.stacks import patching
from rlhf_kernels.stacks.rebind import Target

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs" / "patch.md"
RESULTS = ROOT / "benchmarks" / "results"
Key = tuple[str, str, str, str]
HEADS = ["function", "by", "difference", "before", "ours", "speed-up", "memory before", "ours", "notes"]


def lines_of(target: Target, rows: list[dict[str, Any]]) -> list[str]:
    """The table of a stack."""
    lines = [f"| {' | '.join(HEADS)} |", "|---" * len(HEADS) + "|"]
    for rebinding in target.rebindings:
        for version in target.checked:
            if not rebinding.chosen or not rebinding.fits(version, target):
                continue
            found = [
                r for r in rows if (r["version"], r["name"]) == (version, rebinding.name) and r["before_us"]
            ]
            if found:
                several = len(target.checked) > 1
                lines.append(_line(found[-1], rebinding.note, f" {version[:4]}" if several else ""))
    left = "; ".join(f"{name}: {why}" for name, why in target.untouched.items())
    return [*lines, "", *textwrap.wrap(f"Left: {left}.", 120, break_on_hyphens=False)]


def _line(row: dict[str, Any], note: str, version: str) -> str:
    cells = [f"`{row['name']}`{version}", f"`{row['op']}`" if row["op"] else "", f"{row['error']:.0e}"]
    cells += [duration(row["before_us"]), duration(row["after_us"]), f"{row['speedup']:.2g}x"]
    cells += [size(row["before_bytes"]), size(row["after_bytes"])]
    notes = ["**left here**"] * (row["status"] == "left") + [note] * bool(note)
    return f"| {' | '.join([*cells, '; '.join(notes)])} |"


def updated(text: str, rows: list[dict[str, Any]]) -> str:
    """The documentation with the tables of these rows.

    Raises:
        ValueError: a table that has rows would have none.
    """
    for name, target in patching.targets().items():
        begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
        head, rest = text.split(begin)
        before, after = rest.split(end)
        lines = lines_of(target, [row for row in rows if row["target"] == name])
        if "\n| `" in before and not any(line.startswith("| `") for line in lines):
            raise ValueError(f"no record has a row of {name}, whose table has some")
        text = f"{head}{begin}" + "\n".join(lines) + f"\n{end}{after}"
    return text


def read(records: Sequence[Path]) -> dict[Key, dict[str, Any]]:
    """The rows of all records; of two of one function the later."""
    rows: dict[Key, dict[str, Any]] = {}
    for record in records:
        rows |= {_key(row): row for row in map(json.loads, record.read_text().splitlines())}
    return rows


def main() -> int:
    """Writes the tables; 1 where `--check` finds others."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("new", nargs="*", type=Path, help="files of `patch --check --json` to add")
    parser.add_argument("--record", type=Path, help="where what is added goes, one row a line")
    parser.add_argument("--check", action="store_true", help="write nothing, exit with 1 where it would")
    options = parser.parse_args()
    if missing := [path for path in options.new if not path.is_file()]:
        parser.error(f"no such file: {missing[0]}")
    if bool(options.new) != bool(options.record):
        parser.error("expected files to add and the --record that they go into, or neither")
    records = sorted(RESULTS.glob("patch-cpu-*.jsonl"))
    rows = read(records)
    new = {_key(row): row for path in options.new for row in json.loads(path.read_text()) if row["before_us"]}
    text = DOCS.read_text()
    try:
        tables = updated(text, list((rows | new).values()))
    except ValueError as error:
        parser.error(str(error))
    if options.check:
        return int(tables != text)
    if options.record:
        kept = read([options.record] if options.record.is_file() else []) | new
        options.record.write_text("".join(json.dumps(row) + "\n" for row in kept.values()))
    DOCS.write_text(tables)
    return 0


def _key(row: dict[str, Any]) -> Key:
    return row["target"], row["version"], row["name"], row["device"]


if __name__ == "__main__":
    sys.exit(main())
