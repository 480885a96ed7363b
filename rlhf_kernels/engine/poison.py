"""Uninitialised memory full of NaN, so that an output which is never written cannot pass by luck.

On the CPU glibc's M_PERTURB fills whatever malloc hands out: the native kernels allocate past
`torch.empty`, out of reach of `torch.utils.deterministic.fill_uninitialized_memory`. That switch serves where
there is no glibc and on a GPU, where freed blocks full of NaN are what the caching allocator reuses first.
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


@contextmanager
def poisoned(device: torch.device, like: Iterable[Tensor] = ()) -> Iterator[None]:
    """Inside, new memory on `device` holds NaN. `like`: tensors of the sizes that will be allocated."""
    if device.type == "cpu" and (mallopt := _mallopt()):
        mallopt(_M_PERTURB, _FILL_NAN)
        try:
            yield
        finally:
            mallopt(_M_PERTURB, 0)
        return
    spoilt = [torch.full_like(t, torch.nan) for t in like if t.is_floating_point()]
    del spoilt
    with _filled_by_torch():
        yield


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
