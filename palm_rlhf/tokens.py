"""Text to token ids and back: bytes, or a Hugging Face tokenizer file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from palm_rlhf.models.protocol import CausalModel

# What makers call the token that ends a text, and the one that fills; the first that is there counts.
STOPS = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "<|eot_id|>", "<|im_end|>", "[SEP]", "<|eos|>")
PADS = ("<pad>", "[PAD]", "<|pad|>", "<|padding|>", "<|finetune_right_pad_id|>", "<unk>", "[UNK]")


class Tokenizer(Protocol):
    """What the stack sees of a tokenizer.

    `vocabulary` is the number of ids, `pad` fills slots that are not real, `stop` ends a text; they differ.
    """

    name: str
    vocabulary: int
    pad: int
    stop: int

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without special tokens."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of ids; special tokens have none."""
        ...


class ByteTokenizer:
    """UTF-8: the ids are the 256 bytes. NUL pads and EOT stops, which no text holds."""

    name = "bytes"
    vocabulary = 256
    pad = 0
    stop = 4

    def encode(self, text: str) -> list[int]:
        """The bytes."""
        return list(text.encode())

    def decode(self, tokens: Sequence[int]) -> str:
        """The text; bytes that are no UTF-8 become the replacement character."""
        return bytes(token for token in tokens if token not in (self.pad, self.stop)).decode(errors="replace")


class FileTokenizer:
    """The tokenizer in a Hugging Face `tokenizer.json`, by the `tokenizers` package.

    Attributes:
        text: the file's text, to be kept beside a checkpoint.
    """

    def __init__(self, path: str | Path, *, pad: str | None = None, stop: str | None = None) -> None:
        """
        Args:
            path: the file.
            pad: the padding token. By default the file's own, or one with a usual name, or else the lowest id
                that does not stop: what is padding stands in masks, so that any id will do.
            stop: the token that ends a text; by default one with a usual name.

        Raises:
            ValueError: the file is no tokenizer, has no such token, or both are the same.
        """
        from tokenizers import Tokenizer

        path = Path(path)
        self.name = str(path)
        try:
            self.text = path.read_text(encoding="utf-8")
            self._tokenizer = Tokenizer.from_str(self.text)
        except OSError as error:
            raise ValueError(f"the tokenizer {path} cannot be read: {error.strerror}") from error
        except Exception as error:  # the package raises nothing narrower
            raise ValueError(
                f"{path} is no Hugging Face tokenizer.json ({error}). Give such a file, or 'bytes'."
            ) from error
        declared = self._tokenizer.padding
        # A text is encoded as it is: whole, and without padding.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.vocabulary = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        if self.vocabulary < 2:
            raise ValueError(f"{path} has {self.vocabulary} tokens: too few for texts and what ends them")
        self.stop = self._stop(stop)
        self.pad = self._pad(pad, declared["pad_token"] if declared else None)
        if self.pad == self.stop:
            raise ValueError(
                f"{path}: {self.token(self.pad)!r} is both padding and what ends a text. Choose two tokens: "
                "a model that never sees the end of a text does not learn to stop."
            )

    def token(self, id: int) -> str | None:
        """The name of an id."""
        return self._tokenizer.id_to_token(id)

    def _id(self, token: str) -> int:
        found = self._tokenizer.token_to_id(token)
        if found is None:
            raise ValueError(f"{self.name} has no token {token!r}")
        return found

    def _stop(self, named: str | None) -> int:
        if named is not None:
            return self._id(named)
        there = [token for token in STOPS if self._tokenizer.token_to_id(token) is not None]
        if not there:
            raise ValueError(
                f"{self.name} has no token with a usual name for the end of a text ({', '.join(STOPS[:3])}, "
                "...). Name it with stop=, or --stop-token."
            )
        return self._id(there[0])

    def _pad(self, named: str | None, declared: str | None) -> int:
        if named is not None:
            return self._id(named)
        ids = (self._tokenizer.token_to_id(token) for token in (declared, *PADS) if token is not None)
        return next((id for id in ids if id is not None and id != self.stop), 0 if self.stop else 1)

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without special tokens."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of ids; special tokens and the stop token have none."""
        return self._tokenizer.decode(
            [int(token) for token in tokens if token != self.stop], skip_special_tokens=True
        )


def load_tokenizer(name: str | Path, *, pad: str | None = None, stop: str | None = None) -> Tokenizer:
    """`bytes`, or the tokenizer in a Hugging Face `tokenizer.json`; `pad` and `stop` name its tokens.

    Raises:
        ValueError: the file is no tokenizer; see FileTokenizer.
    """
    if str(name) != "bytes":
        return FileTokenizer(name, pad=pad, stop=stop)
    if pad is not None or stop is not None:
        raise ValueError("the tokenizer 'bytes' has its own pad and stop tokens. Leave out the names.")
    return ByteTokenizer()


def check_fits(tokenizer: Tokenizer, model: CausalModel) -> None:
    """ValueError for a tokenizer with ids that the model does not have."""
    if tokenizer.vocabulary > model.num_tokens:
        raise ValueError(
            f"the tokenizer {tokenizer.name} has {tokenizer.vocabulary} tokens and the model "
            f"{model.num_tokens}: they do not fit. Give the tokenizer that the model was trained with."
        )


def stop_token(tokenizer: Tokenizer, text: str | None = None) -> int:
    """The id of a text that ends a response, where it is one token; else the tokenizer's stop token."""
    ids = tokenizer.encode(text) if text else []
    return ids[0] if len(ids) == 1 else tokenizer.stop
