"""A stage's file: rows in order, written a batch at a time, which a stage that was killed goes on with."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from palm_rlhf.tasks.rows import PARQUET, check_parquet, encoded, is_parquet, read_rows
from palm_rlhf.trainers.log import progress_bar
from rlhf_kernels.runtime.files import write_aside

SUFFIXES = (".jsonl", ".json", ".ndjson", PARQUET)


class StageFile:
    """JSON lines or Parquet at `path`: there as a whole or not at all.

    Until the last row is written they are JSON lines in `path`.part, and `path`.config.json says what makes
    them. The same command finds both, drops a batch that was cut short, and goes on with the next one.
    """

    def __init__(self, path: str | Path, config: Mapping[str, Any]) -> None:
        """
        Args:
            path: of the file; its folder is made when it is needed.
            config: all that rows depend on, as JSON holds it.

        Raises:
            ValueError: the suffix is another, it is Parquet without pyarrow, or what is there was made with
                another config.
        """
        self.path = Path(path)
        check_suffix(self.path)
        self.config = json.loads(json.dumps(config, default=str))
        self.part = self.path.with_name(f"{self.path.name}.part")
        self._check()

    @property
    def complete(self) -> bool:
        """Whether all rows are there."""
        return self.path.exists()

    def _check(self) -> None:
        # Where not one row was made, what would have made it binds nobody.
        if not self.path.exists() and not self._begun():
            return
        before = stage_config(self.path)
        if before is None:
            raise ValueError(
                f"--out {self.path} is there, and no stage of palm-rlhf wrote it (there is no "
                f"{config_path(self.path).name}). Choose another file."
            )
        before.pop("summary", None)
        names = sorted(before.keys() | self.config.keys())
        changed = [name for name in names if before.get(name) != self.config.get(name)]
        if changed:
            name = changed[0]
            raise ValueError(
                f"{self.path} was begun with {name} {before.get(name)}, and is to go on with "
                f"{self.config.get(name)}. Use the same flags and files, or another --out."
            )

    def _begun(self) -> bool:
        if not self.part.exists():
            return False
        with self.part.open("rb") as file:
            return file.readline().endswith(b"\n")

    def _rows_there(self, batch: int) -> int:
        """How many rows are written, in whole batches: what is after them is cut off."""
        if not self.part.exists():
            return 0
        ends = [0]
        with self.part.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                ends.append(ends[-1] + len(line))
        kept = (len(ends) - 1) // batch * batch
        os.truncate(self.part, ends[kept])
        return kept

    def write(
        self,
        batches: Sequence[Sequence[Any]],
        make: Callable[[Sequence[Any]], list[dict[str, Any]]],
        *,
        name: str,
        show: bool,
    ) -> list[dict[str, Any]]:
        """Makes and writes the batches that are not there yet; returns all rows, of earlier calls too.

        Args:
            batches: all of equal length but the last.
            make: a batch's rows, one for each of its elements.
            name, show: of the bar on standard error, and whether it is drawn.

        Raises:
            KeyboardInterrupt: Ctrl-C; the text says how much is there.
        """
        if not self.complete:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_aside(config_path(self.path), json.dumps(self.config, indent=1))
            self._write_rest(batches, make, name, show)
        if self.complete:
            self.part.unlink(missing_ok=True)  # of a call that was killed once the file was in its place
            return [row for _, row in read_rows(self.path, "")]
        return self._rows()

    def _rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.part.read_bytes().splitlines()]

    def _write_rest(self, batches: Sequence[Any], make: Callable[..., Any], name: str, show: bool) -> None:
        size, total = len(batches[0]), sum(map(len, batches))
        done = self._rows_there(size)
        try:
            with self.part.open("ab") as file, progress_bar(name, done, total, show) as advance:
                for part in batches[done // size :]:
                    rows = make(part)
                    file.write(b"".join(json.dumps(row).encode() + b"\n" for row in rows))
                    file.flush()
                    os.fsync(file.fileno())
                    done += len(rows)
                    advance({}, len(rows))
        except KeyboardInterrupt as stopped:
            raise KeyboardInterrupt(
                f"stopped after {done} of {total} prompts, which are in {self.part}; the same command goes on"
            ) from stopped

    def finish(self, summary: Mapping[str, Any]) -> Path:
        """Puts the file in its place, with a summary beside it."""
        write_aside(config_path(self.path), json.dumps({**self.config, "summary": summary}, indent=1))
        if is_parquet(self.path):
            write_aside(self.path, encoded(self.path, self._rows()))
            self.part.unlink()
        else:
            self.part.replace(self.path)
        return self.path


def check_suffix(path: Path) -> None:
    """ValueError for a file that is to hold anything else than rows, or Parquet where pyarrow is missing."""
    if path.suffix not in SUFFIXES:
        raise ValueError(
            f"a stage's file is JSON lines or Parquet, and {path} is not named so. Name it .jsonl."
        )
    check_parquet(path)


def config_path(path: str | Path) -> Path:
    """Where it is written what made a file."""
    return Path(path).with_name(f"{Path(path).name}.config.json")


def stage_config(path: str | Path) -> dict[str, Any] | None:
    """What made a stage's file; None where it is not said."""
    try:
        found = json.loads(config_path(path).read_bytes())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def read_stage(path: str | Path, stage: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows and config of a complete file of that stage.

    Raises:
        ValueError: there is no such file, it is not complete, or not of that stage.
    """
    path, config = Path(path), stage_config(path)
    if not path.exists() and path.with_name(f"{path.name}.part").exists():
        raise ValueError(f"{path} is not complete. Go on with the command that began it: palm-rlhf {stage}.")
    rows = [row for _, row in read_rows(path, f"It is to be a file of palm-rlhf {stage}.")]
    if config is None or config.get("stage") != stage:
        got = "another program" if config is None else f"palm-rlhf {config.get('stage')}"
        raise ValueError(f"{path} is of {got}, and is to be of palm-rlhf {stage}.")
    return rows, config


def digest(path: str | Path) -> str:
    """Stands for what is in a file."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


def version(path: str | Path) -> str:
    """Stands for a checkpoint without reading it: the sizes and times of its weights' files."""
    path = Path(path)
    files = [path]
    if path.is_dir():  # in a run those of a model of transformers are one folder down
        files = sorted([*path.glob("*.safetensors"), *path.glob("model/*.safetensors")])
    stats = [(file.name, file.stat()) for file in files if file.exists()]
    parts = [f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in stats]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def shard(text: str | None) -> tuple[int, int]:
    """`i/n` as (i, n), from 1/1; ValueError for what is none."""
    if text is None:
        return 1, 1
    first, slash, second = text.partition("/")
    if not (slash and first.isdigit() and second.isdigit() and 1 <= int(first) <= int(second)):
        raise ValueError(f"--shard is i/n with i from 1 to n, such as 1/4, got {text!r}")
    return int(first), int(second)
