"""Preferences in files of rows: pairs of a better and a worse response, or texts with a label."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from palm_rlhf.tasks.rows import read_rows

EXPECTED = 'Each line is {"chosen": text, "rejected": text} or {"text": text, "label": number}.'


@dataclass(frozen=True)
class Pair:
    """Two responses, of which the first was preferred.

    Attributes:
        chosen, rejected: the responses; whole dialogues where there is no prompt.
        prompt: what both respond to; may be empty.
        margin: by how much the chosen one is better, in units of the reward; None where nobody said.
        tokens: ids of prompt, chosen and rejected response where they were sampled, which their texts need
            not give again. A response's stop token is there if it came to one; None: made of the texts.
    """

    chosen: str
    rejected: str
    prompt: str = ""
    margin: float | None = None
    tokens: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]] | None = None


@dataclass(frozen=True)
class Labelled:
    """A text with a number: its bin, or its worth.

    Attributes:
        text: the response, or all of it.
        label: finite.
        prompt: what the text responds to; may be empty.
    """

    text: str
    label: float
    prompt: str = ""


Example = TypeVar("Example", Pair, Labelled)


def read_pairs(path: str | Path) -> list[Pair]:
    """Pairs from JSON lines, gzipped or not, or Parquet; ValueError names the line that is none.

    Left out are blank lines, and pairs of equal responses, which say nothing.
    """
    return [pair for pair in _read(path, Pair) if pair.chosen != pair.rejected]


def read_labelled(path: str | Path) -> list[Labelled]:
    """Texts with their labels from such a file; ValueError names the line that is none."""
    return _read(path, Labelled)


def read_examples(path: str | Path) -> list[Pair] | list[Labelled]:
    """What the first line holds, pairs or labelled texts; ValueError names the line that does not fit."""
    for where, row in read_rows(path, EXPECTED):
        if "chosen" in row:
            return read_pairs(path)
        if "text" in row:
            return read_labelled(path)
        raise ValueError(f'{where}: there is neither "chosen" nor "text". {EXPECTED}')
    raise ValueError(f"{path} has no lines. {EXPECTED}")


def split_examples(
    examples: Sequence[Example], held_out: float = 0.1, seed: int = 0
) -> tuple[list[Example], list[Example]]:
    """Examples to train on and examples to judge by, in the order that they came in.

    Examples with the same prompt stay together: a prompt that was trained on would flatter the judgement.

    Raises:
        ValueError: the share leaves one side empty.
    """
    train, judge = split_groups(
        [example.prompt or index for index, example in enumerate(examples)], held_out, seed
    )
    return [examples[index] for index in train], [examples[index] for index in judge]


def split_groups(groups: Sequence[Any], held_out: float, seed: int) -> tuple[list[int], list[int]]:
    """Places to train on and places to judge by, in order; those of one group stay together.

    Raises:
        ValueError: the share leaves one side empty.
    """
    members: dict[Any, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    order = torch.randperm(len(members), generator=torch.Generator().manual_seed(seed)).tolist()
    there, held = list(members.values()), set[int]()
    for place in order:
        if len(held) >= round(len(groups) * held_out):
            break
        held.update(there[place])
    if not 0 < len(held) < len(groups):
        raise ValueError(
            f"a share of {held_out:g} held out (--held-back) of {len(groups)} examples with {len(members)} "
            "prompts leaves one side empty. Choose one inside (0, 1), or give more examples."
        )
    return [index for index in range(len(groups)) if index not in held], sorted(held)


def _read(path: str | Path, kind: type[Example]) -> list[Example]:
    texts = ("chosen", "rejected") if kind is Pair else ("text",)
    found = []
    for where, row in read_rows(path, EXPECTED):
        # What is no pair at all is told so first.
        tokens = _tokens(row, where) if kind is Pair and all(name in row for name in texts) else None
        fields: dict[str, Any] = {name: _text(row, name, where, tokens is not None) for name in texts}
        if tokens is not None:
            fields["tokens"] = tokens
        if row.get("prompt") is not None:
            fields["prompt"] = _text(row, "prompt", where, empty=True)
        if kind is Labelled or row.get("margin") is not None:
            name = "label" if kind is Labelled else "margin"
            fields[name] = _number(row, name, where)
        found.append(kind(**fields))
    return found


def _tokens(row: dict[str, Any], where: str) -> tuple[tuple[int, ...], ...] | None:
    """Of prompt, chosen and rejected; None where the row has texts alone."""
    names = [f"{name}_tokens" for name in ("prompt", "chosen", "rejected")]
    if not any(name in row for name in names):
        return None
    for name in names:
        ids = row.get(name)
        if not isinstance(ids, list) or not ids or not all(type(id) is int and id >= 0 for id in ids):
            raise ValueError(
                f'{where}: "{name}" must be a list of token ids that is not empty, got {ids!r:.40}. Of '
                "prompt_tokens, chosen_tokens and rejected_tokens a pair has all or none."
            )
    return tuple(tuple(row[name]) for name in names)


def _text(row: dict[str, Any], name: str, where: str, empty: bool = False) -> str:
    if name not in row:
        raise ValueError(f'{where}: "{name}" is missing. {EXPECTED}')
    if not isinstance(row[name], str):
        raise ValueError(f'{where}: "{name}" must be a text, got {type(row[name]).__name__}. {EXPECTED}')
    if not row[name] and not empty:
        raise ValueError(f'{where}: "{name}" is empty. Leave the line out, or give it a text.')
    return row[name]


def _number(row: dict[str, Any], name: str, where: str) -> float:
    if name not in row:
        raise ValueError(f'{where}: "{name}" is missing. {EXPECTED}')
    value = row[name]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f'{where}: "{name}" must be a finite number, got {value!r}. {EXPECTED}')
    return float(value)
