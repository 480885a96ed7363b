"""Rollouts on disk: appended as they are made, read by row through a memory map, whole after a crash.

One file of blocks, a block for each rollout: a fixed head, a JSON head that says what is in it, and columns:
numbers of each response, then tokens and numbers of each token, packed without padding. Nothing has the
vocabulary's size: a token costs its id, and a float32 for each quantity that is known of it.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
import warnings
import zlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from palm_rlhf.generation import Generation
from palm_rlhf.models.packing import placed
from palm_rlhf.rollout.batch import Rollout, shuffled
from rlhf_kernels.runtime.files import locked

FILE = "rollouts.bin"
# Mark and version, bytes of the JSON head, bytes of the columns, checksums of either.
_HEAD = struct.Struct("<8sQQII")
_MARK = b"rollout1"
# Blocks and columns begin at multiples of it, so that a mapped tensor is aligned.
_ALIGNED = 64

_BY_RESPONSE = ("score", "group", "stopped", "seeds")
_BY_TOKEN = (
    "logprob", "log_mass", "reference_logprob", "values", "advantages", "returns", "head_ids", "head_logprob",
)  # fmt: skip
_OF_GENERATION = ("logprob", "log_mass", "stopped", "seeds")


class _Block(NamedTuple):
    """Where a block is, and what its JSON head says."""

    at: int
    end: int
    columns_at: int
    checksum: int
    first: int
    says: dict[str, Any]


class RolloutStore:
    """Rollouts of a folder; `dropped` says in a sentence what was left out of a damaged end, else None.

    Responses have the numbers 0, 1, 2, ... in the order in which they were appended.
    """

    def __init__(self, folder: str | Path, *, device: str | torch.device = "cpu") -> None:
        """Opens the store of a folder, or begins one there; nothing is written before the first `append`.

        Args:
            folder: of the store. device: of the rollouts that are read.

        Raises:
            ValueError: `folder` is a file, or holds a rollouts.bin that is none.

        Warns:
            RuntimeWarning: the end is damaged, as after a crash: what is `dropped`.
        """
        self.folder, self.device = Path(folder), torch.device(device)
        self.path = self.folder / FILE
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"a store of rollouts is a folder, and {self.folder} is a file")
        self._blocks: list[_Block] = []
        self._map: mmap.mmap | None = None
        self._known_sound: set[int] = set()
        self.dropped: str | None = None
        self._open()

    def __len__(self) -> int:
        """Responses."""
        return self._blocks[-1].first + self._blocks[-1].says["rows"] if self._blocks else 0

    @property
    def bytes(self) -> int:
        """On disk, without a damaged end."""
        return self._blocks[-1].end if self._blocks else 0

    @property
    def rollouts(self) -> list[dict[str, Any]]:
        """Of each rollout: `step`, `rows`, `first` row, `bytes`, `temperature`, names of its `columns`."""
        return [
            {
                "step": block.says["step"], "rows": block.says["rows"], "first": block.first,
                "bytes": block.end - block.at, "temperature": block.says["temperature"],
                "columns": list(block.says["columns"]),
            }
            for block in self._blocks
        ]  # fmt: skip

    def append(self, rollout: Rollout, *, step: int | None = None) -> slice:
        """Writes a rollout to the disk, and returns the rows that it now is.

        Groups are numbered from 0. Where the store has rollouts of this step or later ones, as after a run
        went back to a checkpoint, they are dropped first; `step` is by default the number of rollouts.

        Raises:
            ValueError: a row has a hole between its tokens, or another process has written here.
        """
        step = len(self._blocks) if step is None else int(step)
        head, columns = _written(rollout, step)
        self.folder.mkdir(parents=True, exist_ok=True)
        with locked(self.path), self.path.open("r+b" if self.path.exists() else "w+b") as file:
            size = file.seek(0, os.SEEK_END)
            if size < self.bytes or (size > self.bytes and self.dropped is None):
                raise ValueError(
                    f"another process has written to {self.path}. Give each run a store of its own."
                )
            while self._blocks and self._blocks[-1].says["step"] >= step:
                self._known_sound.discard(self._blocks.pop().at)
            at = self.bytes
            file.truncate(at)
            file.seek(at)
            file.write(_HEAD.pack(_MARK, len(head), len(columns), zlib.crc32(head), zlib.crc32(columns)))
            file.write(head)
            file.write(columns)
            file.flush()
            os.fsync(file.fileno())
        self.dropped = None
        first = len(self)
        self._remap()
        self._scan(at)
        return slice(first, len(self))

    def rollout(self, index: int) -> Rollout:
        """A rollout as it was appended, padded no more than it needs; IndexError where there is none."""
        block = self._blocks[index]
        return self._read([(block, list(range(block.says["rows"])))])

    def __getitem__(self, index: int | slice | Sequence[int] | Tensor) -> Rollout:
        """Responses as a Rollout, in the order asked for; groups of two rollouts never have one number.

        Booleans, one for each response, ask for those where they are True.

        Raises:
            IndexError: there is no such row, or there are not as many booleans as responses.
            ValueError: they were sampled at several temperatures, or a block is damaged.
        """
        if isinstance(index, slice):
            rows = list(range(*index.indices(len(self))))
        else:
            rows = [index] if isinstance(index, int) else self._numbers(torch.as_tensor(index).flatten())
            if wrong := [row for row in rows if not -len(self) <= row < len(self)]:
                raise IndexError(f"there is no response {wrong[0]}: the store has {len(self)}")
            rows = [row % len(self) for row in rows]
        if not rows:
            raise IndexError(f"no response was asked for, of the {len(self)} in the store")
        starts = [block.first for block in self._blocks]
        places = [bisect_right(starts, row) - 1 for row in rows]
        taken: dict[int, list[int]] = {}
        for place, row in zip(places, rows):
            taken.setdefault(place, []).append(row - starts[place])
        found = self._read([(self._blocks[place], own) for place, own in taken.items()], apart=True)
        # Read by block; back into the order asked for.
        rank = {place: i for i, place in enumerate(taken)}
        order = sorted(range(len(rows)), key=lambda i: rank[places[i]])
        back = torch.tensor(order).argsort()
        return found if bool((back.diff() > 0).all()) else found.rows(back.to(self.device))

    def _numbers(self, index: Tensor) -> list[int]:
        """Rows that an index [N] asks for: numbers, or booleans for all of them."""
        if index.dtype != torch.bool:
            return index.tolist()
        if len(index) != len(self):
            raise IndexError(f"a mask of {len(index)} booleans asks for responses: the store has {len(self)}")
        return index.nonzero().flatten().tolist()

    def __iter__(self) -> Iterator[Rollout]:
        """Every rollout in turn, read when it is its turn."""
        return (self.rollout(index) for index in range(len(self._blocks)))

    def minibatches(
        self, size: int, generator: torch.Generator | None = None, *, groups: bool = False
    ) -> Iterator[Rollout]:
        """All responses once, in a fresh order, `size` at a time: `Rollout.minibatches`, read one by one."""
        group = None
        if groups:
            self._map or self._remap()
            group = torch.cat([self._column(block, "group").long() + block.first for block in self._blocks])
        for index in shuffled(len(self), generator, group).split(size):
            yield self[index]

    def close(self) -> None:
        """Lets go of the file; the next `append` opens it again."""
        self._map = None

    def _open(self) -> None:
        if not self.path.exists():
            return
        self._remap()
        size = len(self._map) if self._map is not None else 0
        if size >= len(_MARK) and self._map[: len(_MARK)] != _MARK:
            raise ValueError(
                f"{self.path} is no store of rollouts: it does not begin as one. Choose another folder."
            )
        self._scan(0)
        # A crash can spoil what was written last, and no more: each block is on the disk before the next.
        while self._blocks and not self._sound(self._blocks[-1]):
            self._blocks.pop()
        if lost := size - self.bytes:
            self.dropped = (
                f"{self.path}: the last {lost} bytes are no whole rollout, as after a crash, and are left "
                f"out; the {len(self._blocks)} rollouts before them are there"
            )
            warnings.warn(self.dropped, RuntimeWarning, stacklevel=3)

    def _remap(self) -> None:
        with self.path.open("rb") as file:
            empty = file.seek(0, os.SEEK_END) == 0
            # A private map: tensors on it may be written to, which changes no file.
            self._map = None if empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)

    def _scan(self, at: int) -> None:
        """Takes up the blocks from this byte on, as long as their heads are whole."""
        size = len(self._map) if self._map is not None else 0
        while at + _HEAD.size <= size:
            mark, of_head, of_columns, head_sum, checksum = _HEAD.unpack_from(self._map, at)
            columns_at = at + _HEAD.size + of_head
            if mark != _MARK or columns_at + of_columns > size:
                return
            head = self._map[at + _HEAD.size : columns_at]
            if zlib.crc32(head) != head_sum:
                return
            end = columns_at + of_columns
            self._blocks.append(_Block(at, end, columns_at, checksum, len(self), json.loads(head)))
            at = end

    def _sound(self, block: _Block) -> bool:
        """Whether its columns are as they were written: looked at once."""
        if block.at not in self._known_sound:
            if self._map is None:
                self._remap()
            with memoryview(self._map) as whole, whole[block.columns_at : block.end] as columns:
                if zlib.crc32(columns) != block.checksum:
                    return False
            self._known_sound.add(block.at)
        return True

    def _column(self, block: _Block, name: str) -> Tensor:
        """A column on the map: nothing is read yet."""
        at, dtype, shape = block.says["columns"][name]
        count = torch.Size(shape).numel()
        if not count:
            return torch.zeros(shape, dtype=getattr(torch, dtype))
        found = torch.frombuffer(
            self._map, dtype=getattr(torch, dtype), count=count, offset=block.columns_at + at
        )
        return found.view(shape)

    def _read(self, parts: Sequence[tuple[_Block, list[int]]], apart: bool = False) -> Rollout:
        """Rows of blocks, block by block; with `apart` groups of two blocks are never the same."""
        temperatures = {block.says["temperature"] for block, _ in parts}
        if len(temperatures) > 1:
            raise ValueError(
                f"responses were sampled at temperatures {sorted(temperatures)}, and a rollout has one: read "
                "them apart"
            )
        names = set.intersection(*(set(block.says["columns"]) for block, _ in parts))
        found: dict[str, list[Tensor]] = {name: [] for name in names}
        for block, rows in parts:
            if not self._sound(block):
                raise ValueError(
                    f"{self.path}: the rollout of step {block.says['step']} is damaged (bytes {block.at} to "
                    f"{block.end}): its checksum is another. Leave it out, or use a copy of the file."
                )
            index = torch.tensor(rows)
            lengths = self._column(block, "lengths").long()
            tokens, responses = (_spans(x, index) for x in (lengths.sum(1), lengths[:, 1]))
            for name in names:
                column = self._column(block, name)
                if name == "tokens":
                    found[name].append(column.to(torch.int64)[tokens])
                elif name in _BY_TOKEN:
                    found[name].append(column[responses])
                else:
                    own = column[index]
                    found[name].append(own + block.first if apart and name == "group" else own)
        pad = parts[0][0].says["pad"]
        columns = {name: torch.cat(x) for name, x in found.items()}
        return _padded(columns, temperatures.pop(), pad, self.device)


def _spans(lengths: Tensor, rows: Tensor) -> Tensor:
    """Places of these rows' entries in a packed column whose rows have these lengths."""
    ends = lengths.cumsum(0)
    taken = lengths[rows]
    starts = (ends - lengths)[rows]
    first = F.pad(taken.cumsum(0), (1, 0))[:-1]
    return torch.arange(int(taken.sum())) + (starts - first).repeat_interleave(taken)


def _written(rollout: Rollout, step: int) -> tuple[bytes, bytes]:
    """The JSON head and the columns of a block, each filled up to a multiple of _ALIGNED."""
    g = rollout.generation
    mask, real = g.mask.cpu(), rollout.mask.cpu()
    lengths = torch.stack([mask[:, : g.prompt_width].sum(1), real.sum(1)], 1)
    place = torch.arange(mask.shape[1]) - g.prompt_width
    if bool((mask != ((place >= -lengths[:, :1]) & (place < lengths[:, 1:]))).any()):
        raise ValueError(
            "a row has a hole between its tokens: prompts must end, and responses begin, at one column"
        )
    tokens, padding = g.tokens.cpu()[mask], g.tokens.cpu()[~mask]
    largest = int(tokens.max()) if len(tokens) else 0
    small = next((t for t in (torch.uint8, torch.int16) if largest <= torch.iinfo(t).max), torch.int32)
    columns = {"lengths": lengths.int(), "tokens": tokens.to(small)}
    for name in (*_BY_RESPONSE, *_BY_TOKEN):
        value = getattr(g if name in _OF_GENERATION else rollout, name)
        if value is None:
            continue
        value = value.detach().cpu()
        if name == "group":
            value = torch.unique(value, return_inverse=True)[1].int()
        columns[name] = (value.int() if name == "head_ids" else value)[real] if name in _BY_TOKEN else value
    data, where = bytearray(), {}
    for name, column in columns.items():
        where[name] = [len(data), str(column.dtype).removeprefix("torch."), list(column.shape)]
        data += column.contiguous().flatten().view(torch.uint8).numpy().tobytes() if column.numel() else b""
        data += bytes(-len(data) % _ALIGNED)
    says = {
        "step": step, "rows": len(rollout), "temperature": float(rollout.temperature),
        "pad": int(padding[0]) if len(padding) else 0, "columns": where,
    }  # fmt: skip
    head = json.dumps(says).encode()
    head += b" " * (-(_HEAD.size + len(head)) % _ALIGNED)
    return head, bytes(data)


def _padded(columns: dict[str, Tensor], temperature: float, pad: int, device: torch.device) -> Rollout:
    """A rollout of packed columns."""
    lengths = columns.pop("lengths").long()
    width, steps = (int(x) for x in lengths.amax(0))
    place = torch.arange(width + steps) - width
    mask = (place >= -lengths[:, :1]) & (place < lengths[:, 1:])
    tokens = placed(columns.pop("tokens"), mask).masked_fill(~mask, pad)
    found = {
        name: placed(column, mask[:, width:]) if name in _BY_TOKEN else column
        for name, column in columns.items()
    }
    for name in ("group", "head_ids"):
        if name in found:
            found[name] = found[name].long()
    found = {name: value.to(device) for name, value in found.items()}
    own = {name: found.pop(name) for name in _OF_GENERATION if name in found}
    return Rollout(Generation(tokens.to(device), mask.to(device), width, **own), temperature, **found)
