"""Checkpoints of a run, a folder each: modules as safetensors, optimizers and random states beside them."""

from __future__ import annotations

import os
import pickle
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from palm_rlhf.models.checkpoint import CheckpointError, read_tensors, unshared, write_tensors
from palm_rlhf.trainers.frozen import check_frozen, digest, frozen_names
from palm_rlhf.trainers.ranks import ranks

if TYPE_CHECKING:
    from palm_rlhf.trainers.loop import Learner

STATE = "training.pt"
_NAME = re.compile(r"step-\d{8,}")


class Checkpoints:
    """Folders `step-00000100` under `folder`; the newest `keep` of them stay."""

    def __init__(self, folder: str | Path, keep: int = 2, base: str | None = None) -> None:
        """Nothing is made before the first save.

        `base` is the model that is trained, where it is in files of its own: checkpoints then leave out what
        of it does not learn, and have its digest.
        """
        self.folder, self.keep, self.base = Path(folder), keep, base
        # Of what does not learn, by the names of the modules: computed once.
        self._digests: dict[str, str] = {}

    def all(self) -> list[Path]:
        """Complete checkpoints, the newest last."""
        found = (path for path in self.folder.glob("step-*") if _NAME.fullmatch(path.name) and path.is_dir())
        return sorted(found, key=lambda path: int(path.name[5:]))

    @property
    def last(self) -> Path | None:
        """The newest."""
        return (self.all() or [None])[-1]

    def save(self, learner: Learner, step: int) -> Path:
        """Writes everything aside and renames the folder: a checkpoint is there as a whole or not at all.

        All processes must ask: one of them writes, and models in shards are gathered for it.
        """
        path = self.folder / f"step-{step:08d}"
        aside = self.folder / f".{path.name}.{os.getpid()}"
        if not ranks().main:
            for _ in self._modules(learner):
                pass
            _state(learner, step)
            return path
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        try:
            for name, tensors, metadata in self._modules(learner):
                write_tensors(aside / f"{name}.safetensors", tensors, metadata)
            torch.save(_state(learner, step), aside / STATE)
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

    def _modules(self, learner: Learner) -> Iterator[tuple[str, dict[str, Tensor], dict[str, Any]]]:
        """Name, tensors and metadata of each file."""
        for name, module in learner.modules().items():
            own, metadata = unshared(module), {"learner": learner.name}
            left = frozen_names(own) if self.base is not None else set()
            if left:
                if name not in self._digests:
                    self._digests[name] = digest({each: own[each] for each in left})
                about = {"model": self.base, "sha256": self._digests[name], "tensors": len(left)}
                metadata |= {"frozen": about}
            rest = {key: tensor for key, tensor in own.items() if key not in left}
            yield name, ranks().gathered(rest), metadata

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
        with ranks().main_first():
            if ranks().main:
                for leftover in self.folder.glob(".step-*"):  # of a run that was killed while it saved
                    shutil.rmtree(leftover, ignore_errors=True)
                self._tidy()
        path = self.last
        if path is None:
            return 0
        try:
            state = self._read(learner, path)
            for name, module in learner.modules().items():
                tensors, metadata = read_tensors(path / f"{name}.safetensors")
                _load(module, tensors, metadata, f"{name}.safetensors")
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
            state = torch.load(path / STATE, map_location="cpu", weights_only=True)
        except (OSError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is damaged or no checkpoint"
            raise CheckpointError(f"{STATE} cannot be read ({reason})") from error
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


def _load(module: nn.Module, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any], path: str) -> None:
    """In place, so that optimizers keep their parameters."""
    own = unshared(module)
    check_frozen(own, tensors, metadata, path)
    with torch.no_grad():
        for name, whole in tensors.items():
            if own[name].shape != whole.shape:
                raise CheckpointError(
                    f"{path} does not fit: {name} is {tuple(whole.shape)}, expected {tuple(own[name].shape)}"
                )
            own[name].copy_(ranks().part_of(whole, own[name]))


def _state(learner: Learner, step: int) -> dict[str, Any]:
    """All but the modules."""
    return {
        "step": step,
        "learner": learner.name,
        "optimizers": {name: _optimizer_state(found) for name, found in learner.optimizers().items()},
        "generators": {name: generator.get_state() for name, generator in learner.generators().items()},
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "extra": learner.extra_state(),
    }


def _optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Its state dictionary, with whole tensors on the process that writes."""
    found = optimizer.state_dict()
    return found | {"state": {place: ranks().gathered(own) for place, own in found["state"].items()}}


def _load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    learned = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    parts = {
        place: {name: ranks().part_of(whole, learned[place]) for name, whole in own.items()}
        for place, own in state["state"].items()
    }
    # How the update is computed is not of the state: models in shards need it otherwise.
    how = [{"foreach": group.get("foreach")} for group in optimizer.param_groups]
    optimizer.load_state_dict({**state, "state": parts})
    for group, own in zip(optimizer.param_groups, how):
        group.update(own)


def _restore_rest(learner: Learner, state: Mapping[str, Any]) -> None:
    for name, optimizer in learner.optimizers().items():
        _load_optimizer(optimizer, state["optimizers"][name])
    for name, generator in learner.generators().items():
        generator.set_state(state["generators"][name])
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
    learner.load_extra_state(state["extra"])
