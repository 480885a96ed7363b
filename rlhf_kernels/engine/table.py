"""Tables and progress: rich on a terminal, plain aligned Markdown in a pipe; rich is not required."""

from __future__ import annotations

import math
import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

try:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Table as RichTable
except ImportError:
    Console = None

_STYLES = {
    "ok": "green",
    "incorrect": "bold red",
    "error": "bold red",
    "unavailable": "yellow",
    "absent": "dim",
}


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> None:
    """Prints a table; columns whose name starts with '>' are numbers, set to the right."""
    right = [name.startswith(">") for name in columns]
    names = [name.removeprefix(">") for name in columns]
    if Console and sys.stdout.isatty():
        table = RichTable(title=title or None, title_justify="left", title_style="bold", box=SIMPLE_HEAD)
        for name, to_right in zip(names, right):
            table.add_column(name, justify="right" if to_right else "left", overflow="fold")
        for row in rows:
            table.add_row(*(_styled(cell) for cell in row))
        Console().print(table)
        return
    print(markdown(names, rows, right, title))


def markdown(
    names: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[bool], title: str = ""
) -> str:
    """An aligned Markdown table."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    widths = [max([3, len(name), *(len(row[i]) for row in cells)]) for i, name in enumerate(names)]

    def line(row: Sequence[str]) -> str:
        padded = (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right))
        return f"| {' | '.join(padded)} |"

    rule = "|".join("-" * (w + 1) + (":" if r else "-") for w, r in zip(widths, right))
    head = [f"**{title}**", ""] if title else []
    return "\n".join([*head, line(names), f"|{rule}|", *map(line, cells), ""])


def _styled(cell: str) -> str:
    style = _STYLES.get(cell.partition(" ")[0])
    cell = cell.replace("[", "\\[")
    return f"[{style}]{cell}[/{style}]" if style else cell


def print_notes(notes: Sequence[str]) -> None:
    """Prints sentences below a table, wrapped where there is a terminal."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 0
    for note in notes:
        print(textwrap.fill(note, width, subsequent_indent="  ") if width else note)


@contextmanager
def progress(quiet: bool) -> Iterator[Callable[[int, int, str], None]]:
    """Yields a function that is told (done, of, what next): a bar on a terminal, a line each elsewhere."""
    if quiet:
        yield lambda done, total, what: None
    elif Console and sys.stderr.isatty():
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("")

            def tell(done: int, total: int, what: str) -> None:
                bar.update(task, completed=done, total=total, description=what)

            yield tell
    else:

        def say(done: int, total: int, what: str) -> None:
            if done < total:
                print(f"[{done + 1}/{total}] {what}", file=sys.stderr, flush=True)

        yield say


def complain(message: str) -> None:
    """One line on standard error, red on a terminal unless NO_COLOR is set."""
    red = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
    print(f"\033[31m{message}\033[0m" if red else message, file=sys.stderr)


def share(value: float, digits: int = 0) -> str:
    """'12%'; '1000%+' where more tells nothing."""
    return f"{value:.{digits}%}" if value <= 10 else "1000%+"


def duration(microseconds: float, spread: float = 0.0) -> str:
    """'15.3 us': in the unit that fits, with no more digits than the half width `spread` leaves certain."""
    unit, factor = next(
        ((u, f) for u, f in (("s", 1e6), ("ms", 1e3), ("us", 1.0)) if microseconds >= f), ("ns", 1e-3)
    )
    return f"{_trimmed(microseconds / factor, spread / factor)} {unit}"


def _trimmed(value: float, spread: float) -> str:
    if value <= 0:
        return "0"
    digits = 2 - math.floor(math.log10(value))  # three significant digits at most
    if spread > 0:
        digits = min(digits, -math.floor(math.log10(spread)))
    return f"{value:.{max(digits, 0)}f}"


def size(nbytes: float) -> str:
    """'33.6 MB'."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= factor:
            return f"{nbytes / factor:.3g} {unit}"
    return f"{nbytes:.0f} B"


def figure(value: float | None, form: str = "{:.3g}") -> str:
    """A number, or nothing."""
    return "" if value is None else form.format(value)
