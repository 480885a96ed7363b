"""Uninitialised memory full of NaN, so that an output which is never written cannot pass by luck.

On the CPU glibc's M_PERTURB fills whatever malloc hands out: the native kernels allocate past
`torch.empty`, out of reach of `torch.utils.deterministic.fill_uninitialized_memory`. It misses some blocks of
a few hundred bytes, which come from lists of freed ones; so blocks of the expected sizes are filled and freed
before, as they are on a GPU, where the caching allocator hands them out again. (malloc's own pointers may
stand in the first bytes of such a block.) On a GPU, and where there is no glibc, PyTorch's switch serves too.
"""

from __future__ import annotations

import ctypes
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_M_PERTURB = -6
# malloc fills with the complement of the lowest byte: bytes of 0xff are a NaN in every floating-point dtype.
# Zero would switch the filling off, hence the higher bit.
_FILL_NAN = 0x100
# Bytes of a block that may come from such a list, of the room that aligning one asks for, and more blocks
# than a list holds: 7, and 7 that malloc moves into it when it runs out.
_SMALL, _ALIGNING, _LISTED = 4096, 160, 16


@contextmanager
def poisoned(device: torch.device, like: Iterable[Tensor] = ()) -> Iterator[None]:
    """Inside, new memory on `device` holds NaN. `like`: tensors of the sizes that will be allocated."""
    mallopt = _mallopt() if device.type == "cpu" else None
    spoilt = [block for t in like for block in _spoilt(t, large=mallopt is None)]
    del spoilt
    if mallopt is None:
        with _filled_by_torch():
            yield
        return
    mallopt(_M_PERTURB, _FILL_NAN)
    try:
        yield
    finally:
        mallopt(_M_PERTURB, 0)


def _spoilt(like: Tensor, large: bool) -> list[Tensor]:
    """Blocks full of NaN as a tensor like this one would take; `large` ones too."""
    sizes = [like.nbytes] if large else []
    if like.nbytes <= _SMALL:
        sizes += [n for n in range(like.nbytes, like.nbytes + _ALIGNING, 16) for _ in range(_LISTED)]
    return [torch.full((n,), 0xFF, dtype=torch.uint8, device=like.device) for n in sizes]


@contextmanager
def _filled_by_torch() -> Iterator[None]:
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*does not have a deterministic implementation.*")
            yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


def _mallopt() -> ctypes._NamedFuncPointer | None:
    """glibc's mallopt; other C libraries that bear the name ignore the option, so they are left alone."""
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    return libc.mallopt if hasattr(libc, "gnu_get_libc_version") else None
