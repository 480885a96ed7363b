"""Tables and progress: rich on a terminal, plain aligned Markdown in a pipe; rich is not required.

On a terminal no name and no number is broken in two: texts are wrapped, the widest column first, and where
that is not enough a row becomes lines of its own.
"""

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

_HEADING = "\ue000"  # stands for a line that is a heading
# Columns of sentences and paths, which may become as narrow as this.
_TEXTS = ("what", "detail", "why", "reason", "steps", "figures")
_WORD = 24


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> None:
    """Prints a table.

    Args:
        columns: their names; those that start with '>' are numbers, set to the right.
        rows: their cells; a row of one cell is a heading of those that follow.
        title: stands above it.
    """
    right = [name.startswith(">") for name in columns]
    names = [name.removeprefix(">") for name in columns]
    if not (Console and sys.stdout.isatty()):
        print(markdown(names, [[*row, *[""] * (len(names) - len(row))] for row in rows], right, title))
        return
    console = Console()
    # Two between columns: the space to the right of one, and the line that parts them, which is blank.
    widths = _widths(names, rows, right, console.width - 2 * (len(names) - 1))
    if title:
        console.print(title, style="bold", markup=False, highlight=False)
    if widths is None:
        _print_rows(console, names, rows, right)
    else:
        _print_columns(console, names, rows, right, widths)
    print()


def _widths(
    names: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[bool], room: int
) -> list[int] | None:
    """How wide each column is, in `room` altogether; None where no name or number could stay whole."""
    widths, least = [], []
    for i, name in enumerate(names):
        cells = [row[i] for row in rows if len(row) > 1]
        head = max(map(len, name.split()))  # a head of several words takes several lines
        whole = max(map(len, ("", *cells)))
        word = max(len(word) for cell in ("", *cells) for word in (cell.split() or [""]))
        narrow = whole if right[i] else min(whole, _WORD) if name in _TEXTS else word
        widths.append(max(len(name), whole))
        least.append(max(head, narrow))
    if sum(least) > room:
        return None
    while sum(widths) > room:
        widest = max((i for i in range(len(names)) if widths[i] > least[i]), key=widths.__getitem__)
        widths[widest] -= 1
    return widths


def _print_columns(
    console: Console,
    names: Sequence[str],
    rows: Sequence[Sequence[str]],
    right: Sequence[bool],
    widths: Sequence[int],
) -> None:
    table = RichTable(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for name, to_right, width in zip(names, right, widths):
        table.add_column(name, justify="right" if to_right else "left", overflow="fold", width=width)
    headings = [row[0] for row in rows if len(row) == 1]
    for row in rows:
        table.add_row(*(_styled(cell) for cell in row)) if len(row) > 1 else table.add_row(_HEADING)
    with console.capture() as drawn:
        console.print(table)
    for line in drawn.get().splitlines():  # a cell cannot reach over columns, a line can
        if _HEADING in line:
            console.print(headings.pop(0), style="bold", markup=False, highlight=False)
        else:
            print(line.rstrip())


def _print_rows(
    console: Console, names: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[bool]
) -> None:
    """Each row as a line of its names, and below it what the other columns say of it."""

    def say(text: str, style: str | None = None, indent: str = "    ") -> None:
        lines = textwrap.wrap(
            text, console.width, initial_indent=indent, subsequent_indent="    ", break_on_hyphens=False
        )
        for line in lines:
            console.print(line.replace("\xa0", " "), style=style, markup=False, highlight=False)

    for row in rows:
        own = [cell for name, cell, number in zip(names, row, right) if not number and name not in _TEXTS]
        states = [_STYLES[word] for cell in own if (word := cell.partition(" ")[0]) in _STYLES]
        say("  ".join(filter(None, own)), "bold" if len(row) == 1 else next(iter(states), None), indent="")
        # A no-break space keeps the words of a figure together.
        cells = [(n, c) for n, c, number in zip(names, row, right) if c and number]
        say("  ".join("\xa0".join(f"{name} {cell}".split()) for name, cell in cells))
        for name, cell in zip(names, row):
            say(cell if name in _TEXTS else "")


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
