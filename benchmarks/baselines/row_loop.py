"""GAE by one serial C++ loop per row (row_loop.cpp), compiled for this machine when first called."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import subprocess
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_suffix(".cpp")
CACHE = Path(__file__).parents[2] / ".cache"
COMPILE = ("g++", "-O3", "-march=native", "-shared", "-fPIC")


def gae(
    rewards: Tensor, values: Tensor, gamma: float = 1.0, lam: float = 0.95, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Advantages and returns [B, T], float32 on the CPU; the state passes over masked steps."""
    if rewards.dtype != torch.float32 or values.dtype != torch.float32 or rewards.device.type != "cpu":
        raise ValueError(f"gae(): expected float32 on the CPU, got {rewards.dtype} on {rewards.device}")
    rewards, values = rewards.contiguous(), values.contiguous()
    mask = None if mask is None else mask.bool().contiguous()
    advantages, returns = torch.empty_like(rewards), torch.empty_like(rewards)
    library().row_loop_gae(
        rewards.data_ptr(),
        values.data_ptr(),
        None if mask is None else mask.data_ptr(),
        advantages.data_ptr(),
        returns.data_ptr(),
        *rewards.shape,
        gamma,
        lam,
    )
    return advantages, returns


@cache
def library() -> ctypes.CDLL:
    """The compiled loop. Raises RuntimeError with the compiler's words where it cannot be built."""
    key = hashlib.sha256(SOURCE.read_bytes() + f"{COMPILE}{platform.node()}".encode()).hexdigest()[:16]
    path = CACHE / f"row_loop-{key}.so"
    if not path.exists():
        CACHE.mkdir(exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}")
        try:
            command = [*COMPILE, str(SOURCE), "-o", str(unfinished)]
            subprocess.run(command, check=True, capture_output=True, text=True)
        except FileNotFoundError as error:
            raise RuntimeError("row_loop: g++ is not installed") from error
        except subprocess.CalledProcessError as error:
            raise RuntimeError(f"row_loop: {error.stderr}") from error
        unfinished.replace(path)
    loaded = ctypes.CDLL(str(path))
    pointers, sizes, scalars = [ctypes.c_void_p] * 5, [ctypes.c_int64] * 2, [ctypes.c_float] * 2
    loaded.row_loop_gae.argtypes = pointers + sizes + scalars
    loaded.row_loop_gae.restype = None
    return loaded
