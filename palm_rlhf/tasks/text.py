"""Text to imitate: a file as windows of one stream of tokens, or a line at a time."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from palm_rlhf.tokens import Tokenizer, first_ids, prompt_ids


@dataclass(frozen=True)
class Samples:
    """S stretches of a stream of N tokens. They may overlap, and nothing is copied before a batch is made.

    Attributes:
        stream: [N] int32.
        starts, lengths: [S] int64.
        pad: token on the right of those that are shorter than others in their batch.
        given: [S] int64, tokens at the start that are a prompt, to be read and not to be learned; None: none.
    """

    stream: Tensor
    starts: Tensor
    lengths: Tensor
    pad: int
    given: Tensor | None = None

    def __len__(self) -> int:
        return len(self.starts)

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [B, L] int64 and mask [B, L] boolean of these samples, L being the longest one's length."""
        lengths = self.lengths[index]
        column = torch.arange(int(lengths.max()))
        mask = column < lengths[:, None]
        place = (self.starts[index][:, None] + column).clamp(max=len(self.stream) - 1)
        return self.stream[place].long().masked_fill(~mask, self.pad), mask

    def learned(self, index: Tensor, mask: Tensor) -> Tensor:
        """[B, L]: which tokens of such a batch are to be learned; the first of a sample never is."""
        given = (
            torch.ones(len(index), dtype=torch.int64)
            if self.given is None
            else self.given[index].clamp(min=1)
        )
        return mask & (torch.arange(mask.shape[1]) >= given[:, None])

    def count_learned(self, index: Tensor) -> int:
        """How many tokens of these samples are to be learned."""
        given = 1 if self.given is None else self.given[index].clamp(min=1)
        return int((self.lengths[index] - given).clamp(min=0).sum())

    def divided(self, held_back: float, generator: torch.Generator | None = None) -> tuple[Samples, Samples]:
        """Those to train on and those to judge by: the last of them, or with a generator a random share.

        One sample alone is trained on. Of more at least one is on either side, unless `held_back` is 0.

        Raises:
            ValueError: the share is not in [0, 1).
        """
        if not 0 <= held_back < 1:
            raise ValueError(f"the share held back must be at least 0 and below 1, got {held_back}")
        total = len(self)
        count = min(max(round(total * held_back), 1), total - 1) if held_back else 0
        order = torch.arange(total) if generator is None else torch.randperm(total, generator=generator)
        return self._some(order[: total - count].sort().values), self._some(
            order[total - count :].sort().values
        )

    def _some(self, index: Tensor) -> Samples:
        given = None if self.given is None else self.given[index]
        return replace(self, starts=self.starts[index], lengths=self.lengths[index], given=given)


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file, which may be compressed with gzip.

    Raises:
        ValueError: it cannot be read, is empty, or holds something else than text.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
    except OSError as error:
        raise ValueError(f"the text file {path} cannot be read: {error.strerror or error}") from error
    except (EOFError, zlib.error) as error:
        raise ValueError(f"the text file {path} cannot be unpacked: {error}") from error
    if not data.strip():
        raise ValueError(f"the text file {path} is empty" + (": it holds white space only" if data else ""))
    if b"\0" in data:
        raise ValueError(f"{path} is no text file: byte {data.index(0)} is NUL. Expected UTF-8 text.")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is no UTF-8 text: byte {error.start} is 0x{data[error.start]:02x}. Convert it to UTF-8."
        ) from error


def read_lines(path: str | Path) -> list[str]:
    """The lines of a text file, without line breaks and without blank ones. Raises as `read_text` does."""
    lines = (line.removesuffix("\r") for line in read_text(path).split("\n"))
    return [line for line in lines if line.strip()]


def windows(text: str, tokenizer: Tokenizer, length: int, *, what: str = "the text") -> Samples:
    """The text in windows of length + 1 tokens, each beginning with the last token of the one before.

    So every token but the first is predicted once. Fewer than `length` tokens at the end are left out.

    Args:
        text: any text.
        tokenizer: makes the tokens.
        length: tokens that a window predicts.
        what: the text's name in errors.

    Raises:
        ValueError: length is below 1, or the text is shorter than a window.
    """
    if length < 1:
        raise ValueError(f"the length of a window must be at least 1, got {length}")
    stream = torch.tensor(tokenizer.encode(text), dtype=torch.int32)
    count = (len(stream) - 1) // length
    if count < 1:
        raise ValueError(
            f"{what} has {len(stream)} tokens, fewer than a window of {length + 1}. Give more text, or a "
            f"length of at most {max(1, len(stream) - 1)}."
        )
    starts = torch.arange(count) * length
    return Samples(stream, starts, torch.full((count,), length + 1), tokenizer.pad)


def lines(
    texts: Iterable[str | tuple[str, str]],
    tokenizer: Tokenizer,
    *,
    stop: int | None = None,
    length: int | None = None,
    what: str = "the text",
) -> Samples:
    """Each text with a stop token behind it.

    Args:
        texts: what to imitate, not empty; of a pair (prompt, response) the response alone.
        tokenizer: makes the tokens.
        stop: ends every text; the tokenizer's stop token by default.
        length: tokens of a text at most, with its stop token; None: any number.
        what: the name of the texts in errors.

    Raises:
        ValueError: there are no texts, or one is empty or too long.
    """
    rows, given = [], []
    for text in texts:
        if isinstance(text, str):
            prompt, response = first_ids(tokenizer), text
        else:
            prompt, response = prompt_ids(tokenizer, text[0]), text[1]
        rows.append([*prompt, *tokenizer.encode(response), tokenizer.stop if stop is None else stop])
        given.append(len(prompt))
    if not rows:
        raise ValueError(f"{what} has no lines")
    for number, row in enumerate(rows):
        if len(row) < 2:
            raise ValueError(f"{what}: sample {number} has no tokens")
        if length is not None and len(row) > length:
            raise ValueError(
                f"{what}: sample {number} has {len(row)} tokens with its stop token, more than the length "
                f"{length}. Raise the length, or shorten it."
            )
    lengths = torch.tensor([len(row) for row in rows])
    stream = torch.tensor([token for row in rows for token in row], dtype=torch.int32)
    return Samples(
        stream,
        lengths.cumsum(0) - lengths,
        lengths,
        tokenizer.pad,
        torch.tensor(given) if any(given) else None,
    )
