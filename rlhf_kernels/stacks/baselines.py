"""What one would write instead, from benchmarks/baselines of a checkout: a formula, loops in Python, C++."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from rlhf_kernels.runtime.files import ROOT
from rlhf_kernels.stacks.peer import Peer, Unavailable

FOLDER = ROOT / "benchmarks" / "baselines"


def _module(name: str) -> ModuleType:
    path = FOLDER / f"{name}.py"
    if not path.is_file():
        raise Unavailable(f"{path.name} is in a checkout of the sources only")
    spec = importlib.util.spec_from_file_location(f"benchmarks.baselines.{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _python_loop() -> Callable[..., tuple[Tensor, Tensor]]:
    function = _module("python_loop").gae

    def gae(
        rewards: Tensor,
        values: Tensor,
        *,
        mask: Tensor | None = None,
        gamma: float = 1.0,
        lam: float = 0.95,
        **_: Any,
    ) -> tuple[Tensor, Tensor]:
        return function(rewards, values, gamma, lam, mask)

    return gae


def _row_loop() -> Callable[..., tuple[Tensor, Tensor]]:
    module = _module("row_loop")
    module.library()

    def gae(
        rewards: Tensor,
        values: Tensor,
        *,
        mask: Tensor | None = None,
        gamma: float = 1.0,
        lam: float = 0.95,
        **_: Any,
    ) -> tuple[Tensor, Tensor]:
        if rewards.dtype != torch.float32:
            raise Unavailable("the C++ row loop is in float32 only")
        return module.gae(rewards, values, gamma, lam, mask)

    return gae


def _written_out() -> Callable[..., Tensor]:
    function = _module("written_out").rms_norm

    def rms_norm(x: Tensor, weight: Tensor, *, eps: float = 1e-5, **_: Any) -> Tensor:
        return function(x, weight, eps)

    return rms_norm


PEERS = [
    Peer(
        stack="baselines",
        op="rms_norm",
        label="written out",
        package="",
        origin="benchmarks/baselines/written_out.py",
        adapter=_written_out,
        options=frozenset({"eps"}),
        note="the formula in elementwise operations and a mean",
    ),
    Peer(
        stack="baselines",
        op="gae",
        label="Python loop",
        package="",
        origin="benchmarks/baselines/python_loop.py",
        adapter=_python_loop,
        semantics={"mask_mode": "zero"},
        options=frozenset({"mask", "gamma", "lam"}),
        directions=("forward",),
        note="the form that TRL and OpenRLHF have",
    ),
    Peer(
        stack="baselines",
        op="gae",
        label="C++ row loop",
        package="",
        origin="benchmarks/baselines/row_loop.cpp",
        adapter=_row_loop,
        options=frozenset({"mask", "gamma", "lam"}),
        directions=("forward",),
        devices=("cpu",),
        note="one serial loop a row, as PufferLib has it",
    ),
]
