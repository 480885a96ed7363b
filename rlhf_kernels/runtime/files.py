"""Where files are kept between runs, and how they are written so that no reader sees half of one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # no such locks on Windows; renaming still keeps each file whole there
    fcntl = None

PACKAGE = Path(__file__).parents[1]
ROOT = PACKAGE.parent


def cache_directory() -> Path:
    """Where answers are kept: .cache/ of a checkout, else the user's cache; RLHF_KERNELS_CACHE overrides."""
    if given := os.environ.get("RLHF_KERNELS_CACHE"):
        return Path(given)
    if (ROOT / "csrc").is_dir():
        return ROOT / ".cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rlhf_kernels"


def write_aside(path: str | Path, data: str | bytes) -> Path:
    """Writes a file under another name and renames it; makes its directory where there is none.

    An OSError names `path`, whichever of the two could not be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        aside.write_bytes(data.encode() if isinstance(data, str) else data)
        aside.replace(path)
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise
    finally:
        aside.unlink(missing_ok=True)
    return path


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds an exclusive lock beside `path`, for reading it again, changing and writing it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("w") as lock:
        if fcntl:
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
