"""The processes that train together, as `accelerate launch` starts them: shares of the work, sums over all.

All of them take the same examples and draw the same random numbers; each computes its share of the rows. So
an update is that of a single process but for the order in which sums are rounded.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Part = TypeVar("Part")


class Ranks:
    """This process is alone: its share is everything, and there is nothing to add."""

    index, count = 0, 1
    # Whether each holds a part of the models.
    sharded = False

    @property
    def main(self) -> bool:
        """Whether it is this process that writes."""
        return self.index == 0

    def share(self, length: int, multiple: int = 1) -> slice:
        """Which of `length` rows are this process's: as many as others', in whole groups of `multiple`."""
        groups = -(-length // multiple)
        first, last = (groups * rank // self.count * multiple for rank in (self.index, self.index + 1))
        return slice(min(first, length), min(last, length))

    def everyones(self, own: Any) -> list[Any]:
        """What every process has, in their order; others' tensors are on the CPU."""
        return [own]

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Replaces tensors by their sums over all processes."""

    def summed(self, own: Mapping[str, float]) -> dict[str, float]:
        """Numbers added by their names, which a process without work need not have."""
        found: dict[str, float] = {}
        for numbers in self.everyones(dict(own)):
            for name, value in numbers.items():
                found[name] = found.get(name, 0.0) + value
        return found

    def joined(self, own: Sequence[Tensor], device: torch.device) -> list[Tensor]:
        """Tensors whose rows are shares, as a whole; none from a process without work."""
        there = [parts for parts in self.everyones(list(own)) if parts]
        return [torch.cat(parts).to(device) for parts in zip(*there)]

    def any(self, own: bool) -> bool:
        """Whether it is so for one of them."""
        return any(self.everyones(own))

    @contextmanager
    def together(self) -> Iterator[None]:
        """Work in which no process waits for another: where it fails for one, all of them raise.

        The others would wait for it for ever. ValueError says to them which process failed, and why.
        """
        yield

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """The process that writes goes first."""
        yield

    def wait(self) -> None:
        """For the others."""

    def cut(self, *models: nn.Module | None) -> None:
        """Leaves every process its part of the weights, where models are in shards.

        In place: lists of parameters that were made before are of no use behind it.
        """

    def whole(self, module: nn.Module) -> nn.Module:
        """The module with all its weights, to read: itself where it has them. All processes must ask."""
        return module

    def gathered(self, tensors: Mapping[Any, Any]) -> dict[Any, Any]:
        """Tensors as a whole on the process that writes, by their names. All processes must ask."""
        return dict(tensors)

    def part_of(self, whole: Tensor, like: Tensor) -> Tensor:
        """What this process holds of a tensor, where it holds a part of `like`."""
        return whole

    def in_step(self, parts: Iterable[Part], spare: Callable[[], Part]) -> Iterator[tuple[Part, bool]]:
        """This process's parts of the work, each with True.

        Where all have to make as many forward passes, what `spare` gives follows with False for as long as
        others go on: it is to be computed and counts for nothing.
        """
        return ((part, True) for part in parts)

    def clipped(self, parameters: Sequence[nn.Parameter], limit: float) -> float:
        """The norm of their gradients, which are scaled down to `limit`."""
        return float(nn.utils.clip_grad_norm_(parameters, limit))


class Launched(Ranks):
    """One of several, by accelerate."""

    def __init__(self) -> None:
        """Joins the others; ModuleNotFoundError where accelerate is not installed."""
        from accelerate import PartialState, utils

        # Where there is no GPU it has to be said, or accelerate would take each process to be alone.
        self.state, self.utils = PartialState(cpu=not torch.cuda.is_available()), utils
        self.index, self.count = self.state.process_index, self.state.num_processes

    def everyones(self, own: Any) -> list[Any]:
        """As of one, by pickling."""
        return self.utils.gather_object([self.utils.send_to_device(own, "cpu")])

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """As of one; one reduction for each dtype."""
        by_type: dict[torch.dtype, list[Tensor]] = {}
        for tensor in tensors:
            by_type.setdefault(tensor.dtype, []).append(tensor)
        for parts in by_type.values():
            total = self.utils.reduce(torch.cat([part.flatten() for part in parts]), "sum")
            for part, found in zip(parts, total.split([part.numel() for part in parts])):
                part.copy_(found.view_as(part))

    @contextmanager
    def together(self) -> Iterator[None]:
        """As of one."""
        own = None
        try:
            yield
        except Exception as error:  # whatever a function of others raises
            own = error
        said = self.everyones(None if own is None else f"{type(own).__name__}: {own}")
        if own is not None:
            raise own
        for index, why in enumerate(said):
            if why is not None:
                raise ValueError(f"process {index} of {self.count} failed with {why}")

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """As of one."""
        with self.state.main_process_first():
            yield

    def wait(self) -> None:
        """As of one."""
        self.state.wait_for_everyone()


# As launchers name the number of processes: torchrun, and those of MPI.
_COUNTS = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")


@functools.cache
def ranks() -> Ranks:
    """The processes of this run: alone, unless a launcher has said in the environment how many there are.

    Raises:
        ValueError: several processes were asked for and one was started, or models are to be cut in shards
            in a way that there is not.
    """
    environment = os.environ
    if _asked("ACCELERATE_USE_DEEPSPEED"):
        raise ValueError(
            "the launch asks for DeepSpeed, whose engine makes updates itself: FSDP2 cuts models here. "
            "Launch with examples/accelerate/fsdp2.yaml, or with processes.yaml for a whole model in each."
        )
    if max(int(environment.get(name) or 1) for name in _COUNTS) > 1:
        if not _asked("ACCELERATE_USE_FSDP"):
            return Launched()
        from palm_rlhf.trainers.shards import Sharded

        return Sharded()
    if "ACCELERATE_USE_CPU" in environment and "MASTER_ADDR" in environment:
        raise ValueError(
            "accelerate launch was to start several processes and started one: with --cpu it needs "
            "--mpirun_hostfile. Without MPI use --multi_gpu in place of --cpu, also where there is no GPU."
        )
    return Ranks()


def _asked(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes")
