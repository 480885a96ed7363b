"""The folder of a run: what it was called with, and training in it that can be stopped and resumed."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from palm_rlhf.models.checkpoint import CheckpointError
from palm_rlhf.pipeline.files import digest
from palm_rlhf.trainers import loop
from palm_rlhf.trainers.checkpoints import Checkpoints
from palm_rlhf.trainers.log import RunLog, plot_metrics, read_metrics
from palm_rlhf.trainers.ranks import ranks
from rlhf_kernels.runtime.files import write_aside

try:
    import fcntl
except ImportError:  # no such locks on Windows
    fcntl = None

# What may change when a run is resumed, since no number depends on it.
_FREE = {"out", "quiet", "save_every", "keep", "device", "checkpoint_layers", "keep_rollouts"}
# Flags of files that are learned from: a checkpoint holds places in them.
_FILES = ("text", "pairs", "test_pairs", "prompts_file", "gsm8k")


class Run:
    """A folder with config.json, metrics.jsonl, tensorboard/, curve.png and checkpoints/."""

    def __init__(self, command: str, args: Any, line: str, grows: str = "steps") -> None:
        """Looks whether the folder can be used; writes nothing.

        Args:
            command: such as "sft".
            args: its dataclass, with the fields `out`, `quiet` and `save_every`. Of several processes of a
                launch one is `main`: it alone is to write.
            line: the command line, to resume by.
            grows: the field by which a finished run may go on.

        Raises:
            ValueError: `out` is something else, or a run that was begun with other flags.
        """
        # Before a model chooses its device: each process has its own.
        self.main = ranks().main
        self.folder, self.line, self.grows = Path(args.out), line, grows
        self.progress, self.save_every = not args.quiet, args.save_every
        self.config = {"command": command, **_flat(json.loads(json.dumps(asdict(args), default=str)))}
        self.config["inputs"] = _inputs(args)
        began = getattr(args, "model", None)
        self.checkpoints = Checkpoints(
            self.folder / "checkpoints", getattr(args, "keep", 2), None if began is None else str(began)
        )
        self._check()

    def _check(self) -> None:
        if self.save_every < 1:
            raise ValueError(f"--save-every must be at least 1, got {self.save_every}")
        if self.checkpoints.keep < 1:
            raise ValueError(f"--keep must be at least 1, got {self.checkpoints.keep}")
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"--out {self.folder} is a file. Choose a folder.")
        file = self.folder / "config.json"
        if not self.folder.is_dir() or not set(self.folder.iterdir()) - set(self._leftovers()):
            return
        try:
            before = json.loads(file.read_bytes())
            length = before[self.grows]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"--out {self.folder} is not empty and no run of palm-rlhf (it has no config.json of one). "
                "Choose another folder."
            ) from error
        if self.checkpoints.last is None and before["command"] == self.config["command"]:
            return  # nothing was learned yet
        names = ["command", *sorted((before.keys() | self.config.keys()) - _FREE - {self.grows, "inputs"})]
        changed = [name for name in names if before.get(name) != self.config.get(name)]
        if changed:
            name, now = changed[0], self.config.get(changed[0])
            raise ValueError(
                f"the run in {self.folder} was begun with {name} {before.get(name)}, and is to go on with "
                f"{now}. Use the same flags (only --{self.grows} may grow), or another --out."
            )
        if self.config[self.grows] < length:
            raise ValueError(
                f"the run in {self.folder} was begun with {length} {self.grows}, and is to go on with "
                f"{self.config[self.grows]}: they may only grow."
            )
        for name, made in before.get("inputs", {}).items():  # runs of before have none
            if self.config["inputs"].get(name, made) != made:
                raise ValueError(
                    f"--{name.replace('_', '-')} {self.config[name]} has changed since the run in "
                    f"{self.folder} was begun with it. Put back what it held, or choose another --out."
                )

    def _leftovers(self) -> list[Path]:
        """What a killed run had written aside and not renamed yet."""
        return [path for path in self.folder.glob(".*.*") if path.is_file() and path.suffix[1:].isdecimal()]

    def train(
        self, learner: loop.Learner, shown: Sequence[str], steps: int | None = None
    ) -> list[dict[str, Any]]:
        """Trains to the end, which is the flag `steps` by default, and returns the metrics of all steps.

        Raises:
            KeyboardInterrupt: Ctrl-C; the text says where the checkpoint is and how to go on.
            ValueError: training failed, and the text says where the last checkpoint is; or another process
                trains in the folder.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._alone():
            return self._train(learner, shown, self.config["steps"] if steps is None else steps)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Locks the folder itself, so that nothing is left in it; goes without where that cannot be."""
        if fcntl is None or not self.main:
            yield
            return
        place = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(place)
            raise ValueError(
                f"another process trains in {self.folder}. Wait for it, stop it, or choose another --out."
            ) from error
        except OSError:  # a file system without such locks
            pass
        try:
            yield
        finally:
            os.close(place)

    def _train(self, learner: loop.Learner, shown: Sequence[str], steps: int) -> list[dict[str, Any]]:
        if self.main:
            for leftover in self._leftovers():
                leftover.unlink()
            write_aside(self.folder / "config.json", json.dumps(self.config, indent=1))
        log = RunLog(self.folder, shown=shown)
        try:
            loop.run(
                learner,
                log,
                self.checkpoints,
                steps=steps,
                save_every=self.save_every,
                progress=self.progress,
            )
        except (loop.Interrupted, KeyboardInterrupt) as stopped:
            raise KeyboardInterrupt(self._stopped(getattr(stopped, "step", None))) from stopped
        except ValueError as error:
            # The loop says itself what to do about a checkpoint.
            if isinstance(error, CheckpointError) or self.checkpoints.last is None:
                raise
            raise ValueError(
                f"{str(error).rstrip('.')}; the last checkpoint is {self.checkpoints.last}"
            ) from error
        return read_metrics(log.path)

    def _stopped(self, step: int | None) -> str:
        if not self.main:
            return f"process {ranks().index} stopped as well"
        last = self.checkpoints.last
        if last is None:
            return "stopped before the first step; no checkpoint was written"
        when = f"stopped after step {step}" if step is not None else "stopped at once"
        return f"{when}; the checkpoint is {last}. Resume with: {self.line}"

    def draw(self, rows: Sequence[dict[str, Any]], names: Sequence[str], caption: str) -> Path | None:
        """curve.png; None, with a word on why, where matplotlib is not installed."""
        try:
            return plot_metrics(rows, names, self.folder / "curve.png", caption)
        except ImportError:
            print("no matplotlib here: no curve was drawn (pip install matplotlib)", file=sys.stderr)
            return None


def _inputs(args: Any) -> dict[str, str]:
    """Digests of the files that are learned from, by their flags; whoever reads them says what is missing."""
    paths = {name: getattr(args, name, None) for name in _FILES}
    return {name: digest(path) for name, path in paths.items() if path is not None and path.is_file()}


def _flat(config: dict[str, Any]) -> dict[str, Any]:
    """By the names of the flags, which know no nesting."""
    found: dict[str, Any] = {}
    for name, value in config.items():
        found.update(_flat(value) if isinstance(value, dict) else {name: value})
    return found
