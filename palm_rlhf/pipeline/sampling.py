"""Responses to prompts: what a sampler is, those that there are, and the rows of a file of samples."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from palm_rlhf.generation import generate
from palm_rlhf.models.protocol import CausalModel
from palm_rlhf.pipeline.chat import Template
from palm_rlhf.tasks.rows import is_parquet, read_rows
from palm_rlhf.tasks.text import read_lines
from palm_rlhf.tokens import Tokenizer, first_ids

EXPECTED = 'Each line is {"prompt": text} or {"messages": [{"role": "user", "content": text}, ...]}.'


@dataclass(frozen=True)
class SamplingOptions:
    """How responses are drawn."""

    temperature: float = 0.8
    """Divides the logits; 0 takes the most probable token."""
    top_p: float | None = 0.9
    """Sample from the smallest set of tokens with this probability; None: from all."""
    top_k: int | None = None
    """Sample from so many of the most probable tokens; None: from all."""
    max_new_tokens: int = 256
    """Tokens of a response at most, the stop token included."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")


class Response(NamedTuple):
    """One response.

    Attributes:
        tokens: ids; the stop token is the last, if it came to one.
        stopped: whether it did.
        logprob: the sum over its tokens at the sampling temperature, without truncation; None: not known.
    """

    tokens: list[int]
    stopped: bool
    logprob: float | None = None


@runtime_checkable
class Sampler(Protocol):
    """Draws one response to each prompt."""

    def __call__(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], options: SamplingOptions
    ) -> list[Response]:
        """Responses to prompts of token ids; a response's randomness is that of its seed alone."""
        ...


class ModelSampler:
    """A causal model of ours, by `palm_rlhf.generate`."""

    def __init__(self, model: CausalModel, *, stop: int, pad: int = 0, scope: str | None = None) -> None:
        """`stop` ends a response, `pad` fills what is not real, `scope` names adapters."""
        self.model, self.stop, self.pad, self.scope = model, stop, pad, scope

    def __call__(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], options: SamplingOptions
    ) -> list[Response]:
        """Responses to prompts of token ids, in one batch."""
        o = options
        drawn = generate(
            self.model, prompts, max_new_tokens=o.max_new_tokens, temperature=o.temperature, top_k=o.top_k,
            top_p=o.top_p, stop=self.stop, pad=self.pad, seeds=seeds, scope=self.scope,
        )  # fmt: skip
        logprob = drawn.logprob.double().sum(1).tolist()
        return [
            Response(drawn.response(row), bool(drawn.stopped[row]), logprob[row])
            for row in range(len(prompts))
        ]


class VLLMSampler:
    """vLLM, where it is installed. This class has not been run: vLLM was on no machine of this project."""

    def __init__(self, model: str, *, stop: int, **engine: Any) -> None:
        """`model` is a folder or hub name; `engine` are arguments of `vllm.LLM`."""
        from vllm import LLM, SamplingParams

        self._parameters, self._llm, self.stop = SamplingParams, LLM(model=model, **engine), stop

    def __call__(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], options: SamplingOptions
    ) -> list[Response]:
        """Responses to prompts of token ids; vLLM makes batches of them itself."""
        o, end = options, [self.stop]
        each = [
            self._parameters(
                seed=seed, temperature=o.temperature, top_p=1.0 if o.top_p is None else o.top_p,
                top_k=-1 if o.top_k is None else o.top_k, max_tokens=o.max_new_tokens, stop_token_ids=end,
            )
            for seed in seeds
        ]  # fmt: skip
        asked = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        found = [request.outputs[0] for request in self._llm.generate(asked, each, use_tqdm=False)]
        stopped = [output.finish_reason == "stop" for output in found]
        tokens = [list(output.token_ids) for output in found]
        return [
            Response(ids if ids[-1:] == end or not ended else ids + end, ended)
            for ids, ended in zip(tokens, stopped)
        ]


class Prompt(NamedTuple):
    """A prompt of a file.

    Attributes:
        id: its place in the file, whatever the shard.
        messages: the dialogue.
        text: what the model reads: the messages in a template.
        tokens: ids of the text.
    """

    id: int
    messages: list[dict[str, str]]
    text: str
    tokens: list[int]


def read_prompts(path: str | Path) -> list[list[dict[str, str]]]:
    """Dialogues that are to be answered: lines of text, or rows with "prompt" or "messages" (JSON, Parquet).

    Raises:
        ValueError: the file cannot be read, or a line is something else.
    """
    if not is_parquet(path) and not {".json", ".jsonl", ".ndjson"} & set(Path(path).suffixes):
        return [[{"role": "user", "content": line}] for line in read_lines(path)]
    return [_dialogue(row, where) for where, row in read_rows(path, EXPECTED)]


def read_prompt_texts(path: str | Path) -> list[str]:
    """The same where every prompt is one text; ValueError for a dialogue of several messages."""
    dialogues = read_prompts(path)
    for number, messages in enumerate(dialogues, 1):
        if len(messages) > 1 or messages[0]["role"] != "user":
            raise ValueError(
                f"{path}: prompt {number} is a dialogue of several messages, or not the user's. Those "
                "are for palm-rlhf sample; here every prompt is one text."
            )
    return [messages[0]["content"] for messages in dialogues]


def _dialogue(row: dict[str, Any], where: str) -> list[dict[str, str]]:
    messages = row.get("messages", row.get("prompt"))
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    good = isinstance(messages, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
        for m in messages
    )
    if not good or not messages or not messages[-1]["content"]:
        raise ValueError(f'{where}: there is neither a "prompt" nor "messages" with a text. {EXPECTED}')
    return [{"role": m["role"], "content": m["content"]} for m in messages]


def select(
    dialogues: Sequence[list[dict[str, str]]],
    template: Template,
    tokenizer: Tokenizer,
    *,
    shard: tuple[int, int] = (1, 1),
    limit: int | None = None,
    longest: int | None = None,
) -> tuple[list[Prompt], int]:
    """The prompts of a shard that are not too long, and how many were.

    Args:
        dialogues: of the whole file.
        template, tokenizer: make texts and tokens of them.
        shard: (i, n): the i-th of n equal stretches of the file, from 1.
        limit: prompts of the shard at most.
        longest: tokens of a prompt at most.

    Raises:
        ValueError: none is left, or one has no tokens.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"--limit must be at least 1, got {limit}")
    number, count = shard
    first, end = (number - 1) * len(dialogues) // count, number * len(dialogues) // count
    found = []
    start = [] if template.begins else first_ids(tokenizer)
    for index, messages in list(enumerate(dialogues))[first:end][:limit]:
        text = template(messages)
        found.append(Prompt(index, messages, text, [*start, *tokenizer.encode(text)]))
    if empty := [prompt.id for prompt in found if not prompt.tokens]:
        raise ValueError(f"prompt {empty[0]} has no tokens")
    kept = [prompt for prompt in found if longest is None or len(prompt.tokens) <= longest]
    if not kept:
        raise ValueError(
            f"of {len(found)} prompts in shard {number}/{count} none has at most {longest} tokens: raise "
            "--max-prompt-tokens"
            if found
            else f"shard {number}/{count} of {len(dialogues)} prompts is empty"
        )
    return kept, len(found) - len(kept)


def seed_of(seed: int, prompt: int, sample: int) -> int:
    """The seed of one response, 48 bits: it depends on nothing but these numbers."""
    return int.from_bytes(
        hashlib.blake2b(f"{seed} {prompt} {sample}".encode(), digest_size=6).digest(), "big"
    )


def sample_rows(
    prompts: Sequence[Prompt],
    sampler: Sampler,
    tokenizer: Tokenizer,
    options: SamplingOptions,
    *,
    samples: int,
    seed: int,
    stop: int,
) -> list[dict[str, Any]]:
    """Rows of a file of samples: prompts with so many responses each, drawn in one batch."""
    seeds = [seed_of(seed, prompt.id, k) for prompt in prompts for k in range(samples)]
    drawn = sampler([prompt.tokens for prompt in prompts for _ in range(samples)], seeds, options)
    rows = []
    for i, prompt in enumerate(prompts):
        own = slice(i * samples, (i + 1) * samples)
        rows.append(
            {
                "id": prompt.id,
                "prompt": prompt.text,
                "messages": prompt.messages,
                "responses": [tokenizer.decode([t for t in r.tokens if t != stop]) for r in drawn[own]],
                "prompt_tokens": list(prompt.tokens),
                "response_tokens": [r.tokens for r in drawn[own]],
                "stopped": [r.stopped for r in drawn[own]],
                "logprobs": [r.logprob for r in drawn[own]],
                "seeds": seeds[own],
            }
        )
    return rows
