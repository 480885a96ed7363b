"""Chat templates: how messages become the text that a model reads."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from palm_rlhf.tasks.text import read_text
from palm_rlhf.tokens import HFTokenizer, Tokenizer

Message = Mapping[str, str]
# What the plain template calls the speakers: the dialogues of hh-rlhf are written so.
SPEAKERS = {"user": "Human", "assistant": "Assistant", "system": "System"}
_CONFIG, _TEMPLATE = "tokenizer_config.json", "chat_template.jinja"


class Template(Protocol):
    """From messages to the text before a response."""

    # As --template and a stage's config name it.
    name: str
    # Whether its text has the token that begins all texts, where the tokenizer knows one.
    begins: bool

    def __call__(self, messages: Sequence[Message]) -> str:
        """The text up to where the response begins. ValueError for messages that it cannot show."""
        ...


class Bare:
    """A prompt as it is. There is no way to show more than one message."""

    name, begins = "none", False

    def __call__(self, messages: Sequence[Message]) -> str:
        """The text of the one message."""
        if len(messages) != 1:
            raise ValueError(
                f"a prompt of {len(messages)} messages needs a template: give --template plain, or a file"
            )
        return messages[0]["content"]


class Plain:
    """Speakers by their names, as in hh-rlhf: `\\n\\nHuman: ...\\n\\nAssistant:`."""

    name, begins = "plain", False

    def __call__(self, messages: Sequence[Message]) -> str:
        """The messages, and the name of who speaks next."""
        said = (f"\n\n{SPEAKERS.get(m['role'], m['role'])}: {m['content']}" for m in messages)
        return "".join(said) + f"\n\n{SPEAKERS['assistant']}:"


class Jinja:
    """A template in the language of Hugging Face's tokenizers, in a sandbox."""

    begins = True

    def __init__(self, source: str, name: str, tokens: Mapping[str, str] | None = None) -> None:
        """
        Args:
            source: the template. name: for errors and configs.
            tokens: special tokens that it may use, such as bos_token.

        Raises:
            ValueError: it is no template.
        """
        from jinja2 import TemplateError
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        # As transformers renders them: https://huggingface.co/docs/transformers/chat_templating_writing
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
        )
        environment.filters["tojson"] = lambda value, **more: json.dumps(value, ensure_ascii=False, **more)
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        self.name, self._tokens = name, dict(tokens or {})
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise ValueError(f"{name} is no chat template: {error}") from error

    def __call__(self, messages: Sequence[Message]) -> str:
        """The rendered text, with what invites a response."""
        from jinja2 import TemplateError

        try:
            return self._template.render(messages=list(messages), add_generation_prompt=True, **self._tokens)
        except TemplateError as error:
            raise ValueError(f"the chat template {self.name} cannot show these messages: {error}") from error


class Own:
    """The chat template of a tokenizer of transformers, with the message of the system that it was given."""

    name, begins = "own", True

    def __init__(self, tokenizer: HFTokenizer) -> None:
        self._tokenizer = tokenizer

    def __call__(self, messages: Sequence[Message]) -> str:
        """The rendered text, with what invites a response."""
        t = self._tokenizer
        first = [] if t.system is None else [{"role": "system", "content": t.system}]
        try:
            return t.tokenizer.apply_chat_template(
                [*first, *messages], add_generation_prompt=True, tokenize=False
            )
        except Exception as error:  # whatever a template raises
            raise ValueError(f"the chat template of {t.name} refuses a prompt: {error}") from error


def talking(tokenizer: Tokenizer, template: str) -> Tokenizer:
    """The tokenizer of a chat, whose stop token ends a turn, where `auto` means its own template."""
    own = isinstance(tokenizer, HFTokenizer) and bool(tokenizer.tokenizer.chat_template)
    if template != "auto" or not own or tokenizer.chat:
        return tokenizer
    return HFTokenizer(tokenizer.tokenizer, pad=tokenizer.token(tokenizer.pad), chat=True)


def _refuse(reason: str) -> None:
    from jinja2 import TemplateError

    raise TemplateError(reason)


def load_template(name: str, tokenizer: Tokenizer) -> Template:
    """`auto`, `none`, `plain`, or a file with a template.

    `auto` is the tokenizer's own: that of transformers, or what stands beside a tokenizer.json as
    chat_template.jinja or in tokenizer_config.json; a prompt as it is where there is none.

    Raises:
        ValueError: there is no such file, or it holds no template.
    """
    if name == "none":
        return Bare()
    if name == "plain":
        return Plain()
    if isinstance(tokenizer, HFTokenizer):
        if name != "auto":
            return Jinja(read_text(name), name, tokenizer.tokenizer.special_tokens_map)
        return Own(tokenizer) if tokenizer.tokenizer.chat_template else Bare()
    folder = Path(tokenizer.name).parent if hasattr(tokenizer, "text") else None
    tokens = special_tokens(folder) if folder is not None else {}
    if name != "auto":
        return Jinja(read_text(name), name, tokens)
    own = _own(folder) if folder is not None else None
    return Bare() if own is None else Jinja(*own, tokens)


def special_tokens(folder: Path) -> dict[str, str]:
    """By the names that templates use, such as bos_token: from tokenizer_config.json."""
    found = {name: value for name, value in _config(folder).items() if name.endswith("_token")}
    texts = {
        name: value.get("content") if isinstance(value, dict) else value for name, value in found.items()
    }
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _own(folder: Path) -> tuple[str, str] | None:
    """The template in a tokenizer's folder, and where it was."""
    if (folder / _TEMPLATE).is_file():
        return read_text(folder / _TEMPLATE), str(folder / _TEMPLATE)
    source = _config(folder).get("chat_template")
    if isinstance(source, list):  # several, by name
        source = {entry.get("name"): entry.get("template") for entry in source}.get("default")
    return (source, str(folder / _CONFIG)) if isinstance(source, str) else None


def _config(folder: Path) -> dict[str, Any]:
    path = folder / _CONFIG
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    return found if isinstance(found, dict) else {}
