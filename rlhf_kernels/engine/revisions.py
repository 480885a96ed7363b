"""Two revisions of a repository side by side: git worktrees, built, and taken away afterwards.

Built libraries are kept in <cache>/builds under the content of the sources that they were made of, so that a
revision whose C++ sources are those of another needs no compiler.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from rlhf_kernels.engine.conditions import WorkerError
from rlhf_kernels.engine.select import UsageError
from rlhf_kernels.runtime.files import cache_directory

# What the native kernels of this repository are made of.
_SOURCES = ("csrc", "setup.py", "rlhf_kernels/_build_flags.py")
_BUILT = (".so", ".pyd", "_build.json")


def git(repository: Path, *words: str) -> str:
    """What git answers.

    Raises:
        UsageError: git refused, or is not installed.
    """
    try:
        done = subprocess.run(["git", "-C", str(repository), *words], capture_output=True, text=True)
    except FileNotFoundError:
        raise UsageError("git was not found: it is needed to check revisions out") from None
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["no message"])[0]
        raise UsageError(f"git {words[0]} failed in {repository}: {said}")
    return done.stdout.strip()


def top_of(directory: Path) -> Path:
    """The repository that a directory belongs to.

    Raises:
        UsageError: it belongs to none.
    """
    try:
        return Path(git(directory, "rev-parse", "--show-toplevel"))
    except UsageError:
        raise UsageError(
            f"{directory} is in no git repository: regress compares two revisions of one"
        ) from None


def commit_of(repository: Path, revision: str) -> str:
    """The full name of a revision.

    Raises:
        UsageError: there is no such one.
    """
    try:
        return git(repository, "rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}")
    except UsageError:
        raise UsageError(
            f"unknown revision {revision!r}: expected a commit, branch or tag of {repository}"
        ) from None


@contextmanager
def checkouts(repository: Path, commits: Sequence[str]) -> Iterator[dict[str, Path]]:
    """A worktree of each commit; gone afterwards, whatever happens."""
    made: dict[str, Path] = {}
    try:
        for commit in dict.fromkeys(commits):
            path = cache_directory().resolve() / "worktrees" / f"{commit[:12]}-{os.getpid()}"
            path.parent.mkdir(parents=True, exist_ok=True)
            made[commit] = path
            git(repository, "worktree", "add", "--detach", "--quiet", str(path), commit)
        yield made
    finally:
        for path in made.values():
            with suppress(UsageError):
                git(repository, "worktree", "remove", "--force", str(path))
            shutil.rmtree(path, ignore_errors=True)


def build(repository: Path, commit: str, worktree: Path, command: str | None = None) -> str:
    """Puts the compiled libraries of a commit into its worktree; says where they came from.

    Args:
        repository: where the commit is.
        commit: its full name.
        worktree: where it is checked out.
        command: how it is built, in a shell; None means build_ext where there are csrc/ and setup.py.

    Raises:
        WorkerError: the command failed; the text ends with its last words.
    """
    present = [name for name in _SOURCES if (worktree / name).exists()]
    if command is None and not {"csrc", "setup.py"} <= set(present):
        return "nothing to build"
    parts = [git(repository, "rev-parse", f"{commit}:{name}") for name in present]
    if command is not None:  # who knows what it reads
        parts = [git(repository, "rev-parse", f"{commit}^{{tree}}"), command]
    parts += [platform.python_version(), platform.machine(), torch.__version__, os.environ.get("CXX", "")]
    kept = cache_directory().resolve() / "builds" / hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
    if not kept.is_dir():
        if command is None and _current(repository, commit, present):
            _copy(_libraries(repository), repository, kept)
        else:
            _run(command, worktree)
            _copy(_libraries(worktree), worktree, kept)
            return "built"
    _copy([path for path in kept.rglob("*") if path.is_file()], kept, worktree)
    return "kept from an earlier build of the same sources"


def _run(command: str | None, worktree: Path) -> None:
    command = command or shlex.join([sys.executable, "setup.py", "-q", "build_ext", "--inplace"])
    # A build that fails must not pass for one without native kernels.
    environment = os.environ | {"RLHF_KERNELS_REQUIRE_EXT": "1", "PYTHONPATH": str(worktree)}
    done = subprocess.run(
        command, shell=True, cwd=worktree, env=environment, capture_output=True, text=True
    )  # the command is the user's own
    if done.returncode:
        last = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["no message"]
        raise WorkerError(f"building failed with {done.returncode} ({command}): {last[0]}")


def _current(repository: Path, commit: str, sources: Sequence[str]) -> bool:
    """Whether the repository's own libraries are newer than its sources, and these are the commit's."""
    built = [path.stat().st_mtime for path in _libraries(repository) if path.suffix in (".so", ".pyd")]
    files = [repository / name for name in git(repository, "ls-files", "--", *sources).splitlines()]
    try:
        git(repository, "diff", "--quiet", commit, "--", *sources)
    except UsageError:
        return False
    return bool(built) and min(built) >= max(path.stat().st_mtime for path in files)


def _libraries(tree: Path) -> list[Path]:
    """What a build left beside the sources."""
    package = tree / "rlhf_kernels"
    where = package.glob("*") if package.is_dir() else tree.rglob("*")
    return [path for path in where if path.name.endswith(_BUILT)]


def _copy(files: Sequence[Path], start: Path, target: Path) -> None:
    """Copies files with their places below `start`; a directory that is new appears whole."""
    aside = target if target.exists() else target.with_name(f".{target.name}.{os.getpid()}")
    for file in files:
        place = aside / file.relative_to(start)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(file, place)
    if aside != target and aside.exists():
        aside.rename(target)
