"""Files of rows, one object each: JSON lines, gzipped or not, or Parquet. The suffix says which.

Parquet has one type for a column and no missing fields: what a row does not have is null there, and nulls are
left out of the rows that are read.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from palm_rlhf.tasks.text import read_text

PARQUET = ".parquet"


def is_parquet(path: str | Path) -> bool:
    """Whether the file is named so."""
    return Path(path).suffix == PARQUET


def check_parquet(path: str | Path) -> None:
    """ValueError where the file is Parquet and pyarrow, which reads and writes that, is not installed."""
    if is_parquet(path):
        _arrow(path)


def read_rows(path: str | Path, expected: str) -> list[tuple[str, dict[str, Any]]]:
    """The objects of a file, each with where it is: "FILE, line 3".

    Raises:
        ValueError: a line is no object; the text ends with what is `expected`. The file is Parquet, and it
            cannot be read, or pyarrow is not installed.
    """
    if is_parquet(path):
        return [(f"{path}, row {number}", row) for number, row in enumerate(_parquet_rows(path), 1)]
    rows = []
    # Not splitlines(): it breaks at separators that JSON allows inside strings.
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: no JSON: {error.msg} at column {error.colno}. {expected}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{where}: expected an object, got {type(row).__name__}. {expected}")
        rows.append((where, row))
    return rows


def encoded(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> bytes:
    """What a file of this name holds of these rows.

    Raises:
        ValueError: it is Parquet, and a column has values of several types, or pyarrow is not installed.
    """
    if not is_parquet(path):
        return b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    arrow = _arrow(path)
    names = dict.fromkeys(name for row in rows for name in row)
    try:
        table = arrow.table({name: [row.get(name) for row in rows] for name in names})
        file = io.BytesIO()
        arrow.parquet.write_table(table, file)
    except arrow.ArrowException as error:
        raise ValueError(f"{path} cannot be Parquet: {error}. Name it .jsonl.") from error
    return file.getvalue()


def _parquet_rows(path: str | Path) -> list[dict[str, Any]]:
    arrow = _arrow(path)
    try:
        rows = arrow.parquet.read_table(path).to_pylist()
    except (OSError, arrow.ArrowException) as error:
        raise ValueError(f"{path} cannot be read as Parquet: {error}") from error
    return [_without_nulls(row) for row in rows]


def _without_nulls(value: Any) -> Any:
    """The same without fields of objects that are null; nulls in lists stay."""
    if isinstance(value, dict):
        return {name: _without_nulls(field) for name, field in value.items() if field is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value


def _arrow(path: str | Path) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(
            f"{path} is Parquet, which needs pyarrow, and that is not installed: "
            "pip install 'rlhf-kernels[parquet]', or name the file .jsonl"
        ) from error
    return pyarrow
