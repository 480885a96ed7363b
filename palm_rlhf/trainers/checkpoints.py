"""Checkpoints of a run, a folder each: modules as safetensors, optimizers and random states beside them."""

from __future__ import annotations

import os
import pickle
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from palm_rlhf.models.checkpoint import CheckpointError, read_tensors, unshared, write_tensors

if TYPE_CHECKING:
    from palm_rlhf.trainers.loop import Learner

_STATE = "training.pt"
_NAME = re.compile(r"step-\d{8,}")


class Checkpoints:
    """Folders `step-00000100` under `folder`; the newest `keep` of them stay."""

    def __init__(self, folder: str | Path, keep: int = 2) -> None:
        """Nothing is made before the first save."""
        self.folder, self.keep = Path(folder), keep

    def all(self) -> list[Path]:
        """Complete checkpoints, the newest last."""
        found = (path for path in self.folder.glob("step-*") if _NAME.fullmatch(path.name) and path.is_dir())
        return sorted(found, key=lambda path: int(path.name[5:]))

    @property
    def last(self) -> Path | None:
        """The newest."""
        return (self.all() or [None])[-1]

    def save(self, learner: Learner, step: int) -> Path:
        """Writes everything aside and renames the folder: a checkpoint is there as a whole or not at all."""
        path = self.folder / f"step-{step:08d}"
        aside = self.folder / f".{path.name}.{os.getpid()}"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        try:
            for name, module in learner.modules().items():
                write_tensors(aside / f"{name}.safetensors", unshared(module), {"learner": learner.name})
            state = {
                "step": step,
                "learner": learner.name,
                "optimizers": {
                    name: optimizer.state_dict() for name, optimizer in learner.optimizers().items()
                },
                "generators": {
                    name: generator.get_state() for name, generator in learner.generators().items()
                },
                "torch": torch.get_rng_state(),
                "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
                "extra": learner.extra_state(),
            }
            torch.save(state, aside / _STATE)
            for file in aside.iterdir():
                _to_disk(file)
            _to_disk(aside)
            # Only a run that went back to an earlier checkpoint comes here a second time.
            self._discard(path)
            aside.replace(path)
            _to_disk(self.folder)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        self._tidy()
        return path

    def _tidy(self) -> None:
        for old in self.all()[: -self.keep]:
            self._discard(old)

    def _discard(self, path: Path) -> None:
        """Takes the name away first: a folder with half of its files would be taken for a checkpoint."""
        aside = path.with_name(f".{path.name}.{os.getpid()}.old")
        if path.is_dir():
            path.replace(aside)
            shutil.rmtree(aside, ignore_errors=True)

    def restore(self, learner: Learner) -> int:
        """Puts the newest checkpoint back and returns its step; 0 where there is none.

        Raises:
            CheckpointError: it is damaged, or does not fit the learner, which may then be half restored.
        """
        for leftover in self.folder.glob(".step-*"):  # of a run that was killed while it saved
            shutil.rmtree(leftover, ignore_errors=True)
        self._tidy()
        path = self.last
        if path is None:
            return 0
        try:
            state = self._read(learner, path)
            for name, module in learner.modules().items():
                tensors, _ = read_tensors(path / f"{name}.safetensors")
                _load(module, tensors, f"{name}.safetensors")
            _restore_rest(learner, state)
        except (CheckpointError, KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            reason = f"it lacks {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
            reason = reason.removesuffix(" Is it complete?").rstrip(".")
            raise CheckpointError(
                f"the checkpoint {path} cannot be resumed: {reason}. {self._remedy()}"
            ) from error
        return state["step"]

    def _read(self, learner: Learner, path: Path) -> dict[str, Any]:
        try:
            state = torch.load(path / _STATE, map_location="cpu", weights_only=True)
        except (OSError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is damaged or no checkpoint"
            raise CheckpointError(f"{_STATE} cannot be read ({reason})") from error
        if state["learner"] != learner.name:
            raise CheckpointError(f"it is one of {state['learner']!r}, not of {learner.name!r}")
        return state

    def _remedy(self) -> str:
        *before, last = self.all()
        if before:
            return f"Remove the folder {last.name} to go on from {before[-1].name}."
        return "Remove it to start over, or choose another output folder."


def _to_disk(path: Path) -> None:
    """Waits until a file, or the names in a folder, would survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _load(module: nn.Module, tensors: Mapping[str, Tensor], path: str) -> None:
    """In place, so that optimizers keep their parameters."""
    own = unshared(module)
    if own.keys() != tensors.keys():
        odd = sorted(own.keys() ^ tensors.keys())
        raise CheckpointError(
            f"{path} does not fit: {', '.join(odd[:3])} {'is' if len(odd) == 1 else 'are'} on one side only"
        )
    with torch.no_grad():
        for name, tensor in own.items():
            if tensor.shape != tensors[name].shape:
                raise CheckpointError(
                    f"{path} does not fit: {name} is {tuple(tensors[name].shape)}, expected "
                    f"{tuple(tensor.shape)}"
                )
            tensor.copy_(tensors[name])


def _restore_rest(learner: Learner, state: Mapping[str, Any]) -> None:
    for name, optimizer in learner.optimizers().items():
        optimizer.load_state_dict(state["optimizers"][name])
    for name, generator in learner.generators().items():
        generator.set_state(state["generators"][name])
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
    learner.load_extra_state(state["extra"])
