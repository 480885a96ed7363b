"""Reads the recorded vectors: `golden("masked_normalize")` is a list of records (see README.md).

A record is a dict: package, version, function, case, kwargs, error (the exception's type and text where the
function raised and so gave no outputs, else None), and inputs, outputs and grads: tensors by name.
"""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import numpy
import torch

FOLDER = Path(__file__).parent
TENSOR_GROUPS = ("inputs", "outputs", "grads")


def names() -> list[str]:
    """The recorded operators."""
    return sorted(path.stem for path in FOLDER.glob("*.npz"))


def golden(name: str, package: str | None = None, function: str | None = None) -> list[dict[str, Any]]:
    """The records of one operator, of one package and one function if these are named; tensors are copies."""
    records, tensors = _read(name)
    chosen = [
        record
        for record in records
        if package in (None, record["package"]) and function in (None, record["function"])
    ]
    return [r | {group: _copies(r[group], tensors) for group in TENSOR_GROUPS} for r in chosen]


def _copies(places: dict[str, int], tensors: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensors[place].clone() for name, place in places.items()}


@cache
def _read(name: str) -> tuple[list[dict[str, Any]], list[torch.Tensor]]:
    with numpy.load(FOLDER / f"{name}.npz") as file:
        flat = {key: file[key] for key in file.files}
    index = json.loads(flat.pop("index").tobytes())
    tensors = [
        torch.from_numpy(flat[dtype][start : start + math.prod(shape)].reshape(shape))
        for dtype, start, shape in index["places"]
    ]
    return index["records"], tensors
