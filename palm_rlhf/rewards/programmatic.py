"""Rewards that are a Python function: rules, checkers, anything that can be computed from a response."""

from __future__ import annotations

import reprlib
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from palm_rlhf.generation import Generation
from palm_rlhf.tokens import Tokenizer, prompt_text

# Rewards are float32: what is larger would be infinite there.
_LARGEST = torch.finfo(torch.float32).max
_SHORT = reprlib.Repr()
_SHORT.maxstring, _SHORT.maxlist = 100, 40


class RewardError(ValueError):
    """A reward raised, or gave something that is no finite number; the text says for which response."""


class ProgrammaticReward:
    """`function(prompt, response)` for every response, as text or token ids, without padding and stop."""

    def __init__(
        self,
        function: Callable[[Any, Any], float],
        tokenizer: Tokenizer | None = None,
        on: Literal["text", "tokens"] = "text",
        stop: int | None = None,
    ) -> None:
        """
        Args:
            function: takes two strings, or two lists of ids; returns a finite number.
            tokenizer: decodes, for text.
            on: what the function takes.
            stop: token that is no part of a response's text; the tokenizer's by default.

        Raises:
            ValueError: text is asked for without a tokenizer, or `on` is something else.
        """
        if on not in ("text", "tokens"):
            raise ValueError(f"ProgrammaticReward: on must be 'text' or 'tokens', got {on!r}")
        if on == "text" and tokenizer is None:
            raise ValueError("ProgrammaticReward: text needs a tokenizer. Pass one, or on='tokens'.")
        self.function, self.tokenizer, self.on = function, tokenizer, on
        self.stop = tokenizer.stop if stop is None and tokenizer is not None else stop

    def __call__(self, generation: Generation) -> Tensor:
        """Rewards [B] in float32; RewardError names the response for which the function failed."""
        without = () if self.stop is None else (self.stop,)
        found = []
        for row in range(len(generation.tokens)):
            prompt, response = generation.prompt(row), generation.response(row, without=without)
            if self.on == "text":
                prompt, response = prompt_text(self.tokenizer, prompt), self.tokenizer.decode(response)
            found.append(self.score(prompt, response))
        return torch.tensor(found, dtype=torch.float32, device=generation.tokens.device)

    def score(self, prompt: Any, response: Any) -> float:
        """The function's number for one response; RewardError where it fails or gives none."""
        name = getattr(self.function, "__name__", type(self.function).__name__)
        where = f"for the prompt {_SHORT.repr(prompt)} and the response {_SHORT.repr(response)}"
        try:
            found = self.function(prompt, response)
        except Exception as error:
            raise RewardError(
                f"the reward {name}() raised {type(error).__name__}: {error}, {where}"
            ) from error
        try:
            # A text that reads as a number is a mistake, not a reward.
            score = None if isinstance(found, (str, bytes)) else float(found)
        except (TypeError, ValueError, OverflowError, RuntimeError):
            score = None
        if score is None or not abs(score) <= _LARGEST:
            raise RewardError(
                f"the reward {name}() gave {_SHORT.repr(found)}, {where}. Expected a finite float32 number."
            )
        return score
