"""Text to token ids and back: bytes, a Hugging Face tokenizer file, or a tokenizer of transformers.

The last knows how its model is asked: what begins a text, and the template of a chat. `prompt_ids` asks in
that way, with any tokenizer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from palm_rlhf.models.protocol import CausalModel

# Before a name on the hub, or the path of a folder of transformers.
HUB = "hf:"
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
    """UTF-8: the ids are the 256 bytes. NUL pads and EOT stops, which no text holds.

    A model may have more ids: as with the other tokenizers, those have no text.
    """

    name = "bytes"
    vocabulary = 256
    pad = 0
    stop = 4

    def encode(self, text: str) -> list[int]:
        """The bytes."""
        return list(text.encode())

    def decode(self, tokens: Sequence[int]) -> str:
        """The text; bytes that are no UTF-8 become the replacement character."""
        kept = (token for token in tokens if token < self.vocabulary and token not in (self.pad, self.stop))
        return bytes(kept).decode(errors="replace")


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
        self.stop, self.pad = _ends(
            self.name, self._tokenizer.token_to_id, pad, stop, declared["pad_token"] if declared else None
        )

    def token(self, id: int) -> str | None:
        """The name of an id."""
        return self._tokenizer.id_to_token(id)

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without special tokens."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of ids; special tokens and the stop token have none."""
        return self._tokenizer.decode(
            [int(token) for token in tokens if token != self.stop], skip_special_tokens=True
        )


class HFTokenizer:
    """A tokenizer of transformers, with what its model expects before a text: a first token, a chat template.

    Attributes:
        tokenizer: that of transformers.
        start: ids that begin every text: the first token, where the tokenizer sets one, or none.
        chat, system: whether prompts are put into the chat template, and the system's message in it.
        text: everything that makes its ids, to tell two tokenizers apart.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        pad: str | None = None,
        stop: str | None = None,
        chat: bool = False,
        system: str | None = None,
    ) -> None:
        """
        Args:
            tokenizer: of `AutoTokenizer`.
            pad, stop: names of tokens; by default the tokenizer's own, then as in FileTokenizer. In a chat
                the stop token is by default what the template puts behind an answer.
            chat: put prompts into the chat template.
            system: message of the system in it.

        Raises:
            ValueError: a chat without a template, a system's message without a chat, no such token.
        """
        self.tokenizer, self.name = tokenizer, str(tokenizer.name_or_path) or type(tokenizer).__name__
        if chat and not tokenizer.chat_template:
            raise ValueError(f"the tokenizer {self.name} has no chat template: leave the chat out")
        if system is not None and not chat:
            raise ValueError("a system's message belongs to a chat, and none was asked for")
        self.chat, self.system = chat, system
        there = tokenizer.get_vocab()
        self.vocabulary = 1 + max(there.values())
        stop = stop or (self._end_of_turn() if chat else None) or tokenizer.eos_token
        self.stop, self.pad = _ends(self.name, there.get, pad, stop, tokenizer.pad_token)
        first = tokenizer("", verbose=False)["input_ids"][:1]
        self.start = first if first and first == [tokenizer.bos_token_id] else []
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self.text = json.dumps(there, sort_keys=True) if backend is None else backend.to_str()
        self._asked: dict[tuple[int, ...], str] = {}

    def token(self, id: int) -> str | None:
        """The name of an id."""
        return self.tokenizer.convert_ids_to_tokens(id)

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without special tokens."""
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of ids; special tokens and the stop token have none."""
        kept = [int(token) for token in tokens if token != self.stop]
        return self.tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def prompt(self, text: str | Sequence[Mapping[str, str]]) -> list[int]:
        """Ids of what the model is asked: a text, or messages with `role` and `content`; none for no text."""
        if not text:
            return []
        if not self.chat:
            if not isinstance(text, str):
                raise ValueError("messages need a chat template: ask for the chat, or give a text")
            return [*self.start, *self.encode(text)]
        messages = [{"role": "user", "content": text}] if isinstance(text, str) else list(text)
        if self.system is not None:
            messages = [{"role": "system", "content": self.system}, *messages]
        try:
            ids = self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=False
            )
        except Exception as error:  # whatever a template raises
            raise ValueError(f"the chat template of {self.name} refuses a prompt: {error}") from error
        if isinstance(text, str):
            self._asked[tuple(ids)] = text
        return ids

    def _end_of_turn(self) -> str | None:
        """The name of the special token that the template puts behind an answer."""
        said = "a b c"
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": said}]
        try:
            text = self.tokenizer.apply_chat_template(turns, tokenize=False)
        except Exception as error:
            raise ValueError(f"the chat template of {self.name} refuses an answer: {error}") from error
        first = next(iter(self.encode(text.rpartition(said)[2].lstrip())), None)
        special = {*self.tokenizer.all_special_ids, *self.tokenizer.added_tokens_decoder}
        return self.token(first) if first in special else None

    def prompt_text(self, tokens: Sequence[int]) -> str:
        """The text that was asked with these ids; that of the ids where none was."""
        return self._asked.get(tuple(tokens)) or self.decode(tokens)

    def save(self, folder: str | Path) -> None:
        """Writes it as transformers does."""
        self.tokenizer.save_pretrained(folder)


def _ends(
    name: str, id_of: Callable[[str], int | None], pad: str | None, stop: str | None, declared: str | None
) -> tuple[int, int]:
    """Ids of the stop and of the padding token, named or by usual names; `declared` is the file's padding."""
    for named in (stop, pad):
        if named is not None and id_of(named) is None:
            raise ValueError(f"{name} has no token {named!r}")
    usual = [token for token in STOPS if id_of(token) is not None]
    if stop is None and not usual:
        raise ValueError(
            f"{name} has no token with a usual name for the end of a text ({', '.join(STOPS[:3])}, "
            "...). Name it with stop=, or --stop-token."
        )
    end = id_of(usual[0] if stop is None else stop)
    if pad is None:
        ids = (id_of(token) for token in (declared, *PADS) if token is not None)
        return end, next((id for id in ids if id is not None and id != end), 0 if end else 1)
    if id_of(pad) == end:
        raise ValueError(
            f"{name}: {pad!r} is both padding and what ends a text. Choose two tokens: "
            "a model that never sees the end of a text does not learn to stop."
        )
    return end, id_of(pad)


def load_tokenizer(
    name: str | Path,
    *,
    pad: str | None = None,
    stop: str | None = None,
    chat: bool = False,
    system: str | None = None,
) -> Tokenizer:
    """`bytes`, a Hugging Face `tokenizer.json`, or with transformers `hf:NAME` or a folder.

    Args:
        name: as above. pad, stop: names of its tokens.
        chat, system: put prompts into its chat template, with a message of the system; see HFTokenizer.

    Raises:
        ValueError: the file is no tokenizer; see FileTokenizer and HFTokenizer.
        ModuleNotFoundError: transformers is needed and not installed.
    """
    if str(name).startswith(HUB) or Path(name).is_dir():
        from transformers import AutoTokenizer

        where = str(name).removeprefix(HUB)
        try:
            found = AutoTokenizer.from_pretrained(where)
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"{where} has no tokenizer of transformers. Name another one: {HUB}NAME, bytes or a "
                f"tokenizer.json. ({reason})"
            ) from error
        return HFTokenizer(found, pad=pad, stop=stop, chat=chat, system=system)
    if chat or system is not None:
        raise ValueError(f"a chat needs a tokenizer of transformers with a chat template, got {name}")
    if str(name) != "bytes":
        return FileTokenizer(name, pad=pad, stop=stop)
    if pad is not None or stop is not None:
        raise ValueError("the tokenizer 'bytes' has its own pad and stop tokens. Leave out the names.")
    return ByteTokenizer()


def prompt_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of what a model is asked, in the way that the tokenizer knows: first token and chat template."""
    return getattr(tokenizer, "prompt", tokenizer.encode)(text)


def first_ids(tokenizer: Tokenizer) -> list[int]:
    """What begins a text that nothing was asked before: a first token, or nothing."""
    return list(getattr(tokenizer, "start", ()))


def prompt_text(tokenizer: Tokenizer, tokens: Sequence[int]) -> str:
    """The text that was asked with these ids, without a chat template around it."""
    return getattr(tokenizer, "prompt_text", tokenizer.decode)(tokens)


def check_fits(tokenizer: Tokenizer, model: CausalModel) -> None:
    """ValueError for a tokenizer with ids that the model does not have."""
    if tokenizer.vocabulary > model.num_tokens:
        raise ValueError(
            f"the tokenizer {tokenizer.name} has {tokenizer.vocabulary} tokens and the model "
            f"{model.num_tokens}: they do not fit. Give the tokenizer that the model was trained with."
        )


def same_tokens(one: Tokenizer, other: Tokenizer) -> bool:
    """Whether two tokenizers give the same ids; how they pad or begin a text may differ."""
    return identity(one) == identity(other)


def identity(tokenizer: Tokenizer) -> str:
    """The name of a tokenizer, or what everything that makes its ids hashes to."""
    if not hasattr(tokenizer, "text"):
        return tokenizer.name
    found = json.loads(tokenizer.text)
    if isinstance(found.get("model"), dict):
        found = {part: found[part] for part in ("model", "added_tokens", "normalizer", "pre_tokenizer")}
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:16]


def stop_token(tokenizer: Tokenizer, text: str | None = None) -> int:
    """The id of a text that ends a response, where it is one token; else the tokenizer's stop token."""
    ids = tokenizer.encode(text) if text else []
    return ids[0] if len(ids) == 1 else tokenizer.stop
