"""Runs the functions of other stacks, as installed, on seeded inputs and stores what they give.

What it is not: a test, or a definition of ours. Run it where the peers are installed:

    make peers && .peers/bin/python tests/golden/record.py
"""

from __future__ import annotations

import hashlib
import inspect
import json
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
sys.path[:0] = [str(FOLDER.parents[1]), str(FOLDER.parents[0])]

import numpy  # noqa: E402
import torch  # noqa: E402
from golden import advantages, palm, token_logprobs  # noqa: E402
from golden.inputs import generator  # noqa: E402
from torch import Tensor  # noqa: E402


class Book:
    """The records of one operator; equal arrays are stored once, end to end in one flat array per dtype."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.records: list[dict[str, Any]] = []
        self.places: dict[str, tuple[str, int, tuple[int, ...]]] = {}  # key -> dtype, offset, shape
        self.flat: dict[str, list[numpy.ndarray]] = {}

    def add(
        self,
        source: tuple[str, str, str],
        case: str,
        call: Callable[..., Any],
        inputs: Mapping[str, Tensor],
        kwargs: Mapping[str, Any] | None = None,
        wrt: tuple[str, ...] = (),
        outputs: tuple[str, ...] = ("out",),
    ) -> None:
        """Calls `call(**inputs, **kwargs)` and keeps inputs, outputs and gradients with respect to `wrt`.

        The gradients are those of the sum of <output, grad_output>; the latter joins the inputs."""
        package, version, function = source
        kwargs = dict(kwargs or {})
        inputs = {name: tensor.detach().clone() for name, tensor in inputs.items()}
        arguments = {name: tensor.clone().requires_grad_(name in wrt) for name, tensor in inputs.items()}
        grads: dict[str, Tensor] = {}
        error = None
        try:
            result = call(**arguments, **kwargs)
            result = dict(zip(outputs, result if isinstance(result, tuple) else (result,)))
            if wrt:
                grads, incoming = self._gradients(result, {name: arguments[name] for name in wrt})
                inputs |= incoming
        except Exception as caught:  # what a stack refuses is a fact as well
            result, error = {}, f"{type(caught).__name__}: {caught}"
        self.records.append(
            {
                "package": package,
                "version": version,
                "function": function,
                "case": case,
                "kwargs": kwargs,
                "inputs": self.store(inputs),
                "outputs": self.store(result),
                "grads": self.store(grads),
                "error": error,
            }
        )

    def _gradients(
        self, result: Mapping[str, Tensor], wrt: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        seed = generator(len(self.records))
        outs = {name: out for name, out in result.items() if out.requires_grad}
        incoming = {
            f"grad_{name}": torch.randn(out.shape, generator=seed, dtype=torch.float64).to(out.dtype)
            for name, out in outs.items()
        }
        found = torch.autograd.grad(
            list(outs.values()), list(wrt.values()), list(incoming.values()), allow_unused=True
        )
        return {name: g for name, g in zip(wrt, found) if g is not None}, incoming

    def store(self, tensors: Mapping[str, Tensor]) -> dict[str, int]:
        """Puts tensors away and returns the index of each one's place."""
        found = {}
        for name, tensor in tensors.items():
            array = tensor.detach().contiguous().numpy()
            dtype = str(array.dtype)
            digest = hashlib.sha256(f"{dtype}{array.shape}".encode() + array.tobytes()).hexdigest()
            if digest not in self.places:
                parts = self.flat.setdefault(dtype, [])
                self.places[digest] = (dtype, sum(part.size for part in parts), array.shape)
                parts.append(array.ravel())
            found[name] = list(self.places).index(digest)
        return found

    def save(self) -> None:
        """Writes <name>.npz beside this file."""
        path = FOLDER / f"{self.name}.npz"
        index = json.dumps({"records": self.records, "places": list(self.places.values())})
        flat = {dtype: numpy.concatenate(parts) for dtype, parts in self.flat.items()}
        numpy.savez_compressed(path, index=numpy.frombuffer(index.encode(), numpy.uint8), **flat)
        errors = sum(record["error"] is not None for record in self.records)
        print(f"{path.name}: {len(self.records)} records, {errors} errors, {path.stat().st_size} bytes")


def main() -> None:
    """Records every operator."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for module in (advantages, token_logprobs, palm):
        for name, record in inspect.getmembers(module, inspect.isfunction):
            if name.startswith("record_"):
                book = Book(name.removeprefix("record_"))
                record(book)
                book.save()


if __name__ == "__main__":
    main()
