"""Runs functions of an installed package straight from its source file.

Some stacks cannot be imported without a GPU, a cluster or flash-attn although the function in question needs
nothing but torch, and some have no function at all: TRL's advantages are statements in the middle of
`PPOTrainer.train`. Here the installed file is parsed and only the wanted part is executed, so that what runs
is theirs and not a transcription.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rlhf_kernels.stacks.peer import Unavailable, search_paths


def find_source(relative: str, folders: Sequence[Path] = ()) -> Path:
    """The file `relative` ("trl/trainer/utils.py") in the given folders or where packages are found."""
    for folder in [*folders, *map(Path, sys.path), *search_paths()]:
        if (folder / relative).is_file():
            return folder / relative
    raise Unavailable(f"{relative} is not installed (make peers)")


def extract(path: Path, *names: str, namespace: dict[str, Any]) -> dict[str, Any]:
    """Executes only the named definitions ("function" or "Class.method") of a file; returns the namespace."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    wanted = ast.Module([_definition(tree, name, path) for name in names], type_ignores=[])
    exec(compile(wanted, str(path), "exec"), namespace)
    return namespace


def extract_statements(
    path: Path,
    name: str,
    *,
    first: str,
    last: str | None,
    arguments: Sequence[str],
    namespace: dict[str, Any],
) -> Callable[..., dict[str, Any]]:
    """Makes a function of statements inside `name`; it returns its local variables.

    They are those from the first assignment to the variable `first` up to the last assignment to `last` in
    the same block, or to the end of that block where `last` is None."""
    function = _definition(ast.parse(path.read_text(encoding="utf-8")), name, path)
    for block in _blocks(function):
        starts = [i for i, statement in enumerate(block) if _assigns(statement, first)]
        if not starts:
            continue
        ends = [i for i, statement in enumerate(block) if last is None or _assigns(statement, last)]
        if not ends or ends[-1] < starts[0]:
            continue
        body = block[starts[0] : ends[-1] + 1]
        made = ast.parse(f"def statements({', '.join(arguments)}): return locals()")
        made.body[0].body[:0] = body
        ast.fix_missing_locations(made)
        exec(compile(made, str(path), "exec"), namespace)
        return namespace["statements"]
    raise Unavailable(f"{path.name}: {name} has no statements from {first} to {last}")


def _definition(tree: ast.Module, name: str, path: Path) -> ast.stmt:
    body = tree.body
    found = None
    for part in name.split("."):
        found = next((node for node in body if getattr(node, "name", None) == part), None)
        if found is None:
            raise Unavailable(f"{path.name} has no {name}")
        body = found.body
    return found


def _blocks(function: ast.stmt) -> Iterator[list[ast.stmt]]:
    for node in ast.walk(function):
        for part in ("body", "orelse", "finalbody"):
            block = getattr(node, part, None)
            if isinstance(block, list):
                yield block


def _assigns(statement: ast.stmt, variable: str) -> bool:
    targets = statement.targets if isinstance(statement, ast.Assign) else []
    return any(isinstance(target, ast.Name) and target.id == variable for target in targets)
